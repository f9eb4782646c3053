// y = x w^T + bias with weights packed in panels of 64 outputs, so that one pass over a panel reads
// memory in order:
//   fp32  [out / 64][in][64]        bf16  [out / 64][in / 2][64][2]
// Few rows: weights stream from memory once. Many rows: a slice of a panel stays in the cache while
// register tiles of rows pass over it. Sums are fp32: over a slice's inputs in order, then over the
// slices, so that a row's outputs depend neither on the other rows nor on the number of threads.

#include <atomic>
#include <chrono>

#include "panels.h"

namespace {

// `rows` rows against `count` inputs of a panel from the k-th on, tile by tile. On the way as much
// is fetched of what is multiplied next, unless that is null.
template <typename T>
void tiles(const typename Weights<T>::X* x, int64_t in, int64_t rows, int64_t k, const T* w,
           int64_t count, float* c, const T* next) {
    const char* ahead = reinterpret_cast<const char*>(next);
    const char* end = ahead + count * PANEL * sizeof(T);
    // Passes over the slice: the more there are, the fewer lines each has to fetch.
    const int64_t passes = (rows + TILE - 1) / TILE * (PANEL / W / tile_vectors(TILE));
    for (int64_t m = 0; m < rows; m += TILE) {
        const int size = int(std::min<int64_t>(TILE, rows - m));
        const auto run = !next || ahead >= end ? any_tile<T, 0>
                         : passes == 1         ? any_tile<T, 4>
                         : passes <= 3         ? any_tile<T, 2>
                                               : any_tile<T, 1>;
        ahead = run(size, x + m * in + k * size, w, count, c + m * PANEL, ahead, nullptr);
    }
}

// One row against several panels at once: as many streams from memory. Where a panel's sums are more
// than the registers hold, first one part of its lines is read, then the other.
template <typename T, int N, int FIRST = 0>
void stream(const typename Weights<T>::X* x, const T* w, int64_t stride, int64_t count, float* c) {
    constexpr int V = tile_vectors(1), STEP = Weights<T>::STEP;
    vf acc[N][1][V] = {};
    for (int64_t k = 0; k < count; k += STEP)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            const T* lines = w + n * stride + k * PANEL + FIRST * W * STEP;
#pragma GCC unroll 4
            for (int j = 0; j < V; j += 16 / W)
                __builtin_prefetch(lines + j * W * STEP + DISTANCE, 0, 3);
            Weights<T>::template step<1, V>(x + k, lines, acc[n]);
        }
    for (int n = 0; n < N; n++)
        for (int j = 0; j < V; j++) {
            float* target = c + n * PANEL + (FIRST + j) * W;
            store(target, load(target) + acc[n][0][j]);
        }
    if constexpr (FIRST + V < PANEL / W) stream<T, N, FIRST + V>(x, w, stride, count, c);
}

// c [count][PANEL] = one row against `count` panels from the first on, at most STREAMS.
template <typename T>
void row_sums(const LinearArgs& a, const typename Weights<T>::X* x, int64_t first, int64_t count,
              float* c) {
    const int64_t stride = PANEL * a.in;
    std::fill(c, c + count * PANEL, 0.0f);
    for (int64_t k = 0; k < a.in; k += CHUNK) {
        const int64_t inputs = std::min<int64_t>(CHUNK, a.in - k);
        const T* w = static_cast<const T*>(a.packed) + first * stride + k * PANEL;
        if (count > 1 && count == STREAMS)
            stream<T, STREAMS>(x + k, w, stride, inputs, c);
        else
            for (int64_t i = 0; i < count; i++)
                stream<T, 1>(x + k, w + i * stride, stride, inputs, c + i * PANEL);
    }
}

// Panels that one row is multiplied with in one go: several cores make streams enough, and small
// groups divide better among them.
int64_t panels_of_a_row(int64_t panels, int64_t threads) {
    return threads == 1 || panels >= 4 * STREAMS * threads ? STREAMS : 1;
}

// c [rows][PANEL] = rows from row0 on against a panel. Behind its own slices `next` is fetched.
template <typename T>
void panel_sums(const LinearArgs& a, const typename Weights<T>::X* x, int64_t row0, int64_t rows,
                const T* w, const T* next, float* c) {
    std::fill(c, c + rows * PANEL, 0.0f);
    for (int64_t k = 0; k < a.in; k += CHUNK) {
        const int64_t count = std::min<int64_t>(CHUNK, a.in - k);
        const T* own = w + k * PANEL;
        const T* then = row0 ? nullptr : k + count < a.in ? own + count * PANEL : next;
        tiles<T>(x + row0 * a.in, a.in, rows, k, own, count, c, then);
    }
}

template <typename T>
void linear(const LinearArgs& a) {
    const ProductTimer timer;
    const auto x = tiled_inputs<T>(a);
    const T* packed = static_cast<const T*>(a.packed);
    const T* bias = static_cast<const T*>(a.bias);
    T* y = static_cast<T*>(a.y);
    const int64_t panels = (a.out + PANEL - 1) / PANEL;
    if (a.rows == 1) {
        const int64_t size = panels_of_a_row(panels, a.threads);
        halyard::parallel((panels + size - 1) / size, a.threads, [&](int64_t group) {
            float c[STREAMS * PANEL];
            const int64_t panel = group * size, first = panel * PANEL;
            row_sums<T>(a, x.get(), panel, std::min(size, panels - panel), c);
            write_row(y + first, c, bias ? bias + first : nullptr,
                      std::min<int64_t>(size * PANEL, a.out - first));
        });
        return;
    }
    // Panels that lie side by side are claimed together: the next one is fetched ahead.
    const int64_t size = std::max<int64_t>(1, panels / (8 * a.threads));
    halyard::parallel((panels + size - 1) / size, a.threads, [&](int64_t group) {
        alignas(64) float c[ROWS * PANEL];
        const int64_t last = std::min(panels, (group + 1) * size);
        for (int64_t panel = group * size; panel < last; panel++) {
            const T* w = packed + panel * PANEL * a.in;
            const int64_t first = panel * PANEL, width = std::min<int64_t>(PANEL, a.out - first);
            for (int64_t row0 = 0; row0 < a.rows; row0 += ROWS) {
                const int64_t rows = std::min<int64_t>(ROWS, a.rows - row0);
                panel_sums<T>(a, x.get(), row0, rows, w, w + PANEL * a.in, c);
                for (int64_t m = 0; m < rows; m++)
                    write_row(y + (row0 + m) * a.out + first, c + m * PANEL,
                              bias ? bias + first : nullptr, width);
            }
        }
    });
}

// y [width] = activation of the gate's sums, times the others. Both activations are x times a sigmoid.
template <typename T, bool GELU>
void write_gated(T* y, const float* gate, const float* up, int64_t width) {
    for (int64_t n = 0; n < width; n += W) {
        const vf x = load(gate + n);
        const vf z = GELU ? x * (1.5957691216f + 0.0713548162726f * x * x) : x;
        // Below the sigmoid is 0 to fp32, or as good as; vexp gives 0 above. What isn't a number passes.
        const vi shut = z < -87.0f;
        const vf open = shut ? vf{} : 1.0f / (1.0f + vexp(-z));
        store_as(y + n, x * open * load(up + n));
    }
}

// As linear over twice `out` outputs, of which the first half gates the second.
template <typename T, bool GELU>
void gated(const LinearArgs& a) {
    const ProductTimer timer;
    const auto x = tiled_inputs<T>(a);
    const T* packed = static_cast<const T*>(a.packed);
    T* y = static_cast<T*>(a.y);
    const int64_t panels = a.out / PANEL, stride = PANEL * a.in;
    if (a.rows == 1) {
        const int64_t size = panels_of_a_row(panels, a.threads);
        halyard::parallel((panels + size - 1) / size, a.threads, [&](int64_t group) {
            float gate[STREAMS * PANEL], up[STREAMS * PANEL];
            const int64_t panel = group * size, count = std::min(size, panels - panel);
            row_sums<T>(a, x.get(), panel, count, gate);
            row_sums<T>(a, x.get(), panels + panel, count, up);
            write_gated<T, GELU>(y + panel * PANEL, gate, up, count * PANEL);
        });
        return;
    }
    const int64_t size = std::max<int64_t>(1, panels / (8 * a.threads));
    halyard::parallel((panels + size - 1) / size, a.threads, [&](int64_t group) {
        alignas(64) float gate[ROWS * PANEL], up[ROWS * PANEL];
        const int64_t last = std::min(panels, (group + 1) * size);
        for (int64_t panel = group * size; panel < last; panel++) {
            const T* w = packed + panel * stride;
            const T* other = w + panels * stride;
            for (int64_t row0 = 0; row0 < a.rows; row0 += ROWS) {
                const int64_t rows = std::min<int64_t>(ROWS, a.rows - row0);
                panel_sums<T>(a, x.get(), row0, rows, w, other, gate);
                panel_sums<T>(a, x.get(), row0, rows, other, w + stride, up);
                for (int64_t m = 0; m < rows; m++)
                    write_gated<T, GELU>(y + (row0 + m) * a.out + panel * PANEL, gate + m * PANEL,
                                         up + m * PANEL, PANEL);
            }
        }
    });
}

template <typename T>
void rows_of(const int64_t* ids, int64_t count, const T* packed, int64_t in, T* y) {
    constexpr int STEP = Weights<T>::STEP;
    for (int64_t i = 0; i < count; i++) {
        const T* row = packed + ids[i] / PANEL * PANEL * in + ids[i] % PANEL * STEP;
        for (int64_t k = 0; k < in; k += STEP)
            std::memcpy(y + i * in + k, row + k * PANEL, STEP * sizeof(T));
    }
}

std::atomic<int64_t> product_nanoseconds{0};

int64_t now() {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

ProductTimer::ProductTimer() : began(now()) {}
ProductTimer::~ProductTimer() { product_nanoseconds.fetch_add(now() - began, std::memory_order_relaxed); }

extern "C" {

int64_t halyard_product_nanoseconds() { return product_nanoseconds.load(std::memory_order_relaxed); }
void halyard_linear_float32(const LinearArgs* args) { linear<float>(*args); }
void halyard_linear_bfloat16(const LinearArgs* args) { linear<uint16_t>(*args); }
void halyard_gated_float32(const LinearArgs* args, int64_t gelu) {
    (gelu ? gated<float, true> : gated<float, false>)(*args);
}
void halyard_gated_bfloat16(const LinearArgs* args, int64_t gelu) {
    (gelu ? gated<uint16_t, true> : gated<uint16_t, false>)(*args);
}
void halyard_rows_float32(const int64_t* ids, int64_t count, const void* packed, int64_t in, void* y) {
    rows_of<float>(ids, count, static_cast<const float*>(packed), in, static_cast<float*>(y));
}
void halyard_rows_bfloat16(const int64_t* ids, int64_t count, const void* packed, int64_t in, void* y) {
    rows_of<uint16_t>(ids, count, static_cast<const uint16_t*>(packed), in, static_cast<uint16_t*>(y));
}
int halyard_linear_args_size() { return int(sizeof(LinearArgs)); }
}
