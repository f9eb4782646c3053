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

// `rows` rows against `count` inputs of a panel from the k-th on, tile by tile. With `fetch`, the
// inputs behind them (the next slice, or the next panel's first) are fetched on the way.
template <typename T>
void tiles(const typename Weights<T>::X* x, int64_t in, int64_t rows, int64_t k, const T* w,
           int64_t count, float* c, bool fetch) {
    const char* ahead = reinterpret_cast<const char*>(w + count * PANEL);
    const char* end = ahead + count * PANEL * sizeof(T);
    // Passes over the slice: the more there are, the fewer lines each has to fetch.
    const int64_t passes = (rows + TILE - 1) / TILE * (PANEL / W / tile_vectors(TILE));
    for (int64_t m = 0; m < rows; m += TILE) {
        const int size = int(std::min<int64_t>(TILE, rows - m));
        const auto run = !fetch || ahead >= end ? any_tile<T, 0>
                         : passes == 1          ? any_tile<T, 4>
                         : passes <= 3          ? any_tile<T, 2>
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

// One row against all panels.
template <typename T>
void one_row(const LinearArgs& a, const typename Weights<T>::X* x) {
    const T* packed = static_cast<const T*>(a.packed);
    const T* bias = static_cast<const T*>(a.bias);
    T* y = static_cast<T*>(a.y);
    const int64_t panels = (a.out + PANEL - 1) / PANEL, stride = PANEL * a.in;
    // Several cores make streams enough, and small groups divide better among them.
    const int64_t size = a.threads == 1 || panels >= 4 * STREAMS * a.threads ? STREAMS : 1;
    halyard::parallel((panels + size - 1) / size, a.threads, [&](int64_t group) {
        const int64_t panel = group * size;
        float c[STREAMS * PANEL] = {};
        for (int64_t k = 0; k < a.in; k += CHUNK) {
            const int64_t count = std::min<int64_t>(CHUNK, a.in - k);
            const T* w = packed + panel * stride + k * PANEL;
            if (size > 1 && panel + STREAMS <= panels)
                stream<T, STREAMS>(x + k, w, stride, count, c);
            else
                for (int64_t i = 0; i < size && panel + i < panels; i++)
                    stream<T, 1>(x + k, w + i * stride, stride, count, c + i * PANEL);
        }
        const int64_t first = panel * PANEL;
        const int64_t width = std::min<int64_t>(size * PANEL, a.out - first);
        write_row(y + first, c, bias ? bias + first : nullptr, width);
    });
}

// A panel for all rows.
template <typename T>
void one_panel(const LinearArgs& a, const typename Weights<T>::X* x, int64_t panel, float* c) {
    const T* w = static_cast<const T*>(a.packed) + panel * PANEL * a.in;
    const T* bias = static_cast<const T*>(a.bias);
    const int64_t width = std::min<int64_t>(PANEL, a.out - panel * PANEL);
    for (int64_t row0 = 0; row0 < a.rows; row0 += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, a.rows - row0);
        std::fill(c, c + rows * PANEL, 0.0f);
        for (int64_t k = 0; k < a.in; k += CHUNK) {
            const int64_t count = std::min<int64_t>(CHUNK, a.in - k);
            tiles<T>(x + row0 * a.in, a.in, rows, k, w + k * PANEL, count, c, row0 == 0);
        }
        for (int64_t m = 0; m < rows; m++)
            write_row(static_cast<T*>(a.y) + (row0 + m) * a.out + panel * PANEL, c + m * PANEL,
                      bias ? bias + panel * PANEL : nullptr, width);
    }
}

template <typename T>
void linear(const LinearArgs& a) {
    const ProductTimer timer;
    const auto x = tiled_inputs<T>(a);
    const int64_t panels = (a.out + PANEL - 1) / PANEL;
    if (a.rows == 1) return one_row<T>(a, x.get());
    // Panels that lie side by side are claimed together: the next one is fetched ahead.
    const int64_t size = std::max<int64_t>(1, panels / (8 * a.threads));
    halyard::parallel((panels + size - 1) / size, a.threads, [&](int64_t group) {
        alignas(64) float c[ROWS * PANEL];
        const int64_t last = std::min(panels, (group + 1) * size);
        for (int64_t panel = group * size; panel < last; panel++) one_panel<T>(a, x.get(), panel, c);
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
void halyard_rows_float32(const int64_t* ids, int64_t count, const void* packed, int64_t in, void* y) {
    rows_of<float>(ids, count, static_cast<const float*>(packed), in, static_cast<float*>(y));
}
void halyard_rows_bfloat16(const int64_t* ids, int64_t count, const void* packed, int64_t in, void* y) {
    rows_of<uint16_t>(ids, count, static_cast<const uint16_t*>(packed), in, static_cast<uint16_t*>(y));
}
int halyard_linear_args_size() { return int(sizeof(LinearArgs)); }
}
