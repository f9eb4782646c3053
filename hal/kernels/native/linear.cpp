// y = x w^T + bias with weights packed in panels of 64 outputs, so that one pass over a panel reads
// memory in order:
//   fp32  [out / 64][in][64]        bf16  [out / 64][in / 2][64][2]
// Few rows: weights stream from memory once. Many rows: a slice of a panel stays in the cache while
// register tiles of rows pass over it. Sums are fp32: over a slice's inputs in order, then over the
// slices, so that a row's outputs depend neither on the other rows nor on the number of threads.
// The inputs are first copied tile by tile, [in][rows of the tile] (bf16: in pairs), for the tiles to
// read memory in order as well.

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int PANEL = 64;   // outputs a panel
constexpr int CHUNK = 256;  // inputs a slice of a panel: 64 KiB in fp32, which stays in L2
constexpr int DISTANCE = 4096;  // elements that weights are fetched ahead of their use
#if defined(__AVX512F__)
constexpr int STREAMS = 4;  // panels that one row is multiplied with at once
#else
constexpr int STREAMS = 2;
#endif
constexpr int ROWS = 192;   // rows between two passes over a panel
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__ARM_NEON)
constexpr int TILE = 6;  // rows a register tile
#else
constexpr int TILE = 3;
#endif

// Vectors of a panel that a tile of M rows holds in registers.
constexpr int tile_vectors(int m) {
#if defined(__AVX512F__)
    return m > 0 ? 4 : 0;
#else
    return m == 1 ? 4 : m <= 2 ? 2 : 1;
#endif
}

struct LinearArgs {
    const void* x;       // [rows][in]
    const void* packed;
    const void* bias;    // [out] as x, or null
    void* y;             // [rows][out]
    int64_t rows, in, out, threads;
};

template <typename T>
struct Weights;

template <>
struct Weights<float> {
    typedef float X;
    static constexpr int STEP = 1;  // inputs an innermost step

    template <int M, int V>
    static void step(const float* x, const float* w, vf (&acc)[M][V]) {
        vf value[V];
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) value[j] = load(w + j * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const float a = x[m];
#pragma GCC unroll 8
            for (int j = 0; j < V; j++) acc[m][j] += a * value[j];
        }
    }
};

template <>
struct Weights<uint16_t> {
    static constexpr int STEP = 2;
#if defined(__AVX512BF16__)
    typedef uint16_t X;

    template <int M, int V>
    static void step(const uint16_t* x, const uint16_t* w, vf (&acc)[M][V]) {
        vu pair[V];
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) pair[j] = load_u32(w + j * W * 2);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            int both;
            std::memcpy(&both, x + 2 * m, 4);
#pragma GCC unroll 8
            for (int j = 0; j < V; j++)
                acc[m][j] = (vf)_mm512_dpbf16_ps((__m512)acc[m][j], (__m512bh)pair[j],
                                                 (__m512bh)_mm512_set1_epi32(both));
        }
    }
#else
    typedef float X;

    template <int M, int V>
    static void step(const float* x, const uint16_t* w, vf (&acc)[M][V]) {
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) {
            const vu pair = load_u32(w + j * W * 2);
            const vf first = low_half(pair), second = high_half(pair);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                acc[m][j] += x[2 * m] * first;
                acc[m][j] += x[2 * m + 1] * second;
            }
        }
    }
#endif
};

// c [M][PANEL] += `count` inputs of M rows times those of a panel.
template <typename T, int M, bool AHEAD>
void tile(const typename Weights<T>::X* x, const T* w, int64_t count, float* c) {
    constexpr int V = tile_vectors(M), STEP = Weights<T>::STEP;
    for (int v = 0; v < PANEL / W; v += V) {
        vf acc[M][V] = {};
        for (int64_t k = 0; k < count; k += STEP) {
            const T* lines = w + k * PANEL + v * W * STEP;
            if (AHEAD)
#pragma GCC unroll 8
                for (int j = 0; j < V; j++) __builtin_prefetch(lines + j * W * STEP + DISTANCE, 0, 3);
            Weights<T>::template step<M, V>(x + k * M, lines, acc);
        }
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) {
                float* target = c + m * PANEL + (v + j) * W;
                store(target, load(target) + acc[m][j]);
            }
    }
}

template <typename T, bool AHEAD>
void any_tile(int rows, const typename Weights<T>::X* x, const T* w, int64_t count, float* c) {
    switch (rows) {
        case 1: return tile<T, 1, AHEAD>(x, w, count, c);
        case 2: return tile<T, 2, AHEAD>(x, w, count, c);
        case 3: return tile<T, 3, AHEAD>(x, w, count, c);
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__ARM_NEON)
        case 4: return tile<T, 4, AHEAD>(x, w, count, c);
        case 5: return tile<T, 5, AHEAD>(x, w, count, c);
        default: return tile<T, 6, AHEAD>(x, w, count, c);
#endif
    }
}

// The same for one row and several panels at once: as many streams from memory.
template <typename T, int N>
void stream(const typename Weights<T>::X* x, const T* w, int64_t stride, int64_t count, float* c) {
    constexpr int V = PANEL / W, STEP = Weights<T>::STEP;
    vf acc[N][1][V] = {};
    for (int64_t k = 0; k < count; k += STEP)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            const T* lines = w + n * stride + k * PANEL;
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) __builtin_prefetch(lines + j * W * STEP + DISTANCE, 0, 3);
            Weights<T>::template step<1, V>(x + k, lines, acc[n]);
        }
    for (int n = 0; n < N; n++)
        for (int j = 0; j < V; j++) {
            float* target = c + n * PANEL + j * W;
            store(target, load(target) + acc[n][0][j]);
        }
}

inline void convert(float* target, float x) { *target = x; }
inline void convert(float* target, uint16_t x) { *target = bf16_to_float(x); }
inline void convert(uint16_t* target, uint16_t x) { *target = x; }

// [rows][in] -> [in / STEP][rows][STEP]
template <typename T>
void copy_tile(const T* x, int64_t rows, int64_t in, typename Weights<T>::X* target) {
    constexpr int STEP = Weights<T>::STEP;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t k = 0; k < in; k += STEP)
            for (int i = 0; i < STEP; i++)
                convert(target + k * rows + m * STEP + i, x[m * in + k + i]);
}

template <typename T>
void linear(const LinearArgs& a) {
    typedef typename Weights<T>::X X;
    const T* raw = static_cast<const T*>(a.x);
    const T* packed = static_cast<const T*>(a.packed);
    const T* bias = static_cast<const T*>(a.bias);
    T* y = static_cast<T*>(a.y);
    const int64_t panels = (a.out + PANEL - 1) / PANEL;
    std::vector<X> x(a.rows * a.in);
    // Where a core is shared, each meeting of the threads may cost a time slice: few of them.
    const bool copy_alone = a.rows * a.in <= 1 << 16;
    const auto copy = [&](int64_t m) {
        copy_tile(raw + m * a.in, std::min<int64_t>(TILE, a.rows - m), a.in, x.data() + m * a.in);
    };
    if (copy_alone)
        for (int64_t m = 0; m < a.rows; m += TILE) copy(m);

#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
    {
        if (!copy_alone) {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < a.rows; m += TILE) copy(m);
        }
        std::vector<float> c(std::max<int64_t>(STREAMS, std::min<int64_t>(a.rows, ROWS)) * PANEL);
        if (a.rows == 1) {
            // Several cores make streams enough, and small groups divide better among them.
            const int64_t size =
                a.threads == 1 || panels >= 4 * STREAMS * a.threads ? STREAMS : 1;
#pragma omp for schedule(static) nowait
            for (int64_t group = 0; group < (panels + size - 1) / size; group++) {
                const int64_t panel = group * size;
                const int64_t stride = PANEL * a.in;
                std::fill(c.begin(), c.end(), 0.0f);
                for (int64_t k = 0; k < a.in; k += CHUNK) {
                    const int64_t count = std::min<int64_t>(CHUNK, a.in - k);
                    const T* w = packed + panel * stride + k * PANEL;
                    if (size > 1 && panel + STREAMS <= panels)
                        stream<T, STREAMS>(x.data() + k, w, stride, count, c.data());
                    else
                        for (int64_t i = 0; i < size && panel + i < panels; i++)
                            stream<T, 1>(x.data() + k, w + i * stride, stride, count,
                                         c.data() + i * PANEL);
                }
                const int64_t first = panel * PANEL;
                const int64_t width = std::min<int64_t>(size * PANEL, a.out - first);
                for (int64_t n = 0; n < width; n++)
                    from_float(y + first + n, c[n] + (bias ? to_float(bias[first + n]) : 0.0f));
            }
        } else
#pragma omp for schedule(static) nowait
        for (int64_t panel = 0; panel < panels; panel++) {
            const T* w = packed + panel * PANEL * a.in;
            const int64_t width = std::min<int64_t>(PANEL, a.out - panel * PANEL);
            for (int64_t row0 = 0; row0 < a.rows; row0 += ROWS) {
                const int64_t rows = std::min<int64_t>(ROWS, a.rows - row0);
                std::fill(c.begin(), c.begin() + rows * PANEL, 0.0f);
                for (int64_t k = 0; k < a.in; k += CHUNK) {
                    const int64_t count = std::min<int64_t>(CHUNK, a.in - k);
                    for (int64_t m = 0; m < rows; m += TILE) {
                        const int64_t size = std::min<int64_t>(TILE, rows - m);
                        const auto run = row0 + m == 0 ? any_tile<T, true> : any_tile<T, false>;
                        run(int(size), x.data() + (row0 + m) * a.in + k * size, w + k * PANEL,
                            count, c.data() + m * PANEL);
                    }
                }
                for (int64_t m = 0; m < rows; m++) {
                    T* target = y + (row0 + m) * a.out + panel * PANEL;
                    const float* sums = c.data() + m * PANEL;
                    if (bias)
                        for (int64_t n = 0; n < width; n++)
                            from_float(target + n, sums[n] + to_float(bias[panel * PANEL + n]));
                    else
                        for (int64_t n = 0; n < width; n++) from_float(target + n, sums[n]);
                }
            }
        }
    }
}

}  // namespace

extern "C" {

void halyard_linear_float32(const LinearArgs* args) { linear<float>(*args); }
void halyard_linear_bfloat16(const LinearArgs* args) { linear<uint16_t>(*args); }
int halyard_linear_args_size() { return int(sizeof(LinearArgs)); }
}
