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

#include "operators.h"
#include "pool.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 64;   // outputs a panel
constexpr int LINE = 64;   // bytes of a cache line
constexpr int CHUNK = 256;  // inputs a slice of a panel: 64 KiB in fp32, which stays in L2
constexpr int DISTANCE = 4096;  // elements that one row's weights are fetched ahead of their use
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

// c [M][PANEL] += `count` inputs of M rows times those of a panel. Meanwhile FETCH lines a step are
// fetched from `ahead` on: what is multiplied next, so that memory and arithmetic overlap.
template <typename T, int M, int FETCH>
const char* tile(const typename Weights<T>::X* x, const T* w, int64_t count, float* c,
                 const char* ahead) {
    constexpr int V = tile_vectors(M), STEP = Weights<T>::STEP;
    for (int v = 0; v < PANEL / W; v += V) {
        vf acc[M][V] = {};
        for (int64_t k = 0; k < count; k += STEP) {
            const T* lines = w + k * PANEL + v * W * STEP;
#pragma GCC unroll 4
            for (int j = 0; j < FETCH; j++) __builtin_prefetch(ahead + j * LINE, 0, 2);
            ahead += FETCH * LINE;
            Weights<T>::template step<M, V>(x + k * M, lines, acc);
        }
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) {
                float* target = c + m * PANEL + (v + j) * W;
                store(target, load(target) + acc[m][j]);
            }
    }
    return ahead;
}

template <typename T, int FETCH>
const char* any_tile(int rows, const typename Weights<T>::X* x, const T* w, int64_t count, float* c,
                     const char* ahead) {
    switch (rows) {
        case 1: return tile<T, 1, FETCH>(x, w, count, c, ahead);
        case 2: return tile<T, 2, FETCH>(x, w, count, c, ahead);
        case 3: return tile<T, 3, FETCH>(x, w, count, c, ahead);
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__ARM_NEON)
        case 4: return tile<T, 4, FETCH>(x, w, count, c, ahead);
        case 5: return tile<T, 5, FETCH>(x, w, count, c, ahead);
        default: return tile<T, 6, FETCH>(x, w, count, c, ahead);
#endif
    }
    return ahead;
}

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
        ahead = run(size, x + m * in + k * size, w, count, c + m * PANEL, ahead);
    }
}

// One row against several panels at once: as many streams from memory.
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

inline void copy_inputs(float* target, const float* x) { *target = *x; }
inline void copy_inputs(float* target, const uint16_t* x) {
    target[0] = bf16_to_float(x[0]);
    target[1] = bf16_to_float(x[1]);
}
inline void copy_inputs(uint16_t* target, const uint16_t* x) { std::memcpy(target, x, 4); }

// [rows][in] -> [in / STEP][rows][STEP]
template <typename T>
void copy_tile(const T* x, int64_t stride, int64_t rows, int64_t in, typename Weights<T>::X* target) {
    constexpr int STEP = Weights<T>::STEP;
    for (int64_t k = 0; k < in; k += STEP)
        for (int64_t m = 0; m < rows; m++, target += STEP) copy_inputs(target, x + m * stride + k);
}

// y [width] = sums plus bias or nothing.
template <typename T>
inline void write_row(T* y, const float* sums, const T* bias, int64_t width) {
    int64_t n = 0;
    if (!bias)
        for (; n + W <= width; n += W) store_as(y + n, load(sums + n));
    for (; n < width; n++) from_float(y + n, sums[n] + (bias ? to_float(bias[n]) : 0.0f));
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
    typedef typename Weights<T>::X X;
    const T* raw = static_cast<const T*>(a.x);
    const int64_t panels = (a.out + PANEL - 1) / PANEL;
    std::vector<X> x(a.rows * a.in);
    const int64_t num_tiles = (a.rows + TILE - 1) / TILE;
    const int64_t copiers = a.rows * a.in <= 1 << 16 ? 1 : a.threads;
    halyard::parallel(num_tiles, copiers, [&](int64_t i) {
        const int64_t m = i * TILE;
        copy_tile(raw + m * a.stride, a.stride, std::min<int64_t>(TILE, a.rows - m), a.in,
                  x.data() + m * a.in);
    });
    if (a.rows == 1) return one_row<T>(a, x.data());
    // Panels that lie side by side are claimed together: the next one is fetched ahead.
    const int64_t size = std::max<int64_t>(1, panels / (8 * a.threads));
    halyard::parallel((panels + size - 1) / size, a.threads, [&](int64_t group) {
        alignas(64) float c[ROWS * PANEL];
        const int64_t last = std::min(panels, (group + 1) * size);
        for (int64_t panel = group * size; panel < last; panel++) one_panel<T>(a, x.data(), panel, c);
    });
}

// Weight-only int8 or int4: a panel is groups of inputs, each
//   codes  int8 [GROUP][64], or two nibbles of 8 + code [GROUP / 2][64]     then     scales fp32 [64]
// Codes are exact in bf16, so only a group's sum is scaled: one row widens codes in registers, many
// rows widen a group once into a scratch that their tiles then pass over; the sums are the same.
template <int BITS>
struct Codes {
    static constexpr int GROUP = BITS == 8 ? 128 : 64;
    static constexpr int64_t BYTES = GROUP * PANEL * BITS / 8;  // scales lie behind
    static constexpr int64_t SIZE = BYTES + PANEL * 4;
};

typedef int8_t vb __attribute__((vector_size(W), aligned(1)));
typedef uint8_t vub __attribute__((vector_size(W), aligned(1)));

inline vi signed_bytes(const char* p) {  // GCC converts a vector of bytes one by one
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    return __builtin_convertvector(*reinterpret_cast<const vb*>(p), vi);
#endif
}

inline vi unsigned_bytes(const char* p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    return __builtin_convertvector(*reinterpret_cast<const vub*>(p), vi);
#endif
}

// Codes of inputs k and k + 1 (k even) for W outputs from the `first`-th on, as T's weights.
template <int BITS>
inline void two_codes(const char* group, int64_t k, int first, vi* even, vi* odd) {
    if constexpr (BITS == 8) {
        const char* line = group + k * PANEL + first;
        *even = signed_bytes(line);
        *odd = signed_bytes(line + PANEL);
    } else {
        const char* line = group + k / 2 * PANEL + first;
        const vi both = unsigned_bytes(line);
        *even = (both & 15) - 8;
        *odd = (both >> 4) - 8;
    }
}

template <int BITS>
inline void widen(const char* group, int64_t k, int first, float* target) {
    vi even, odd;
    two_codes<BITS>(group, k, first, &even, &odd);
    store(target, __builtin_convertvector(even, vf));
    store(target + PANEL, __builtin_convertvector(odd, vf));
}

template <int BITS>
inline vu widen_pair(const char* group, int64_t k, int first) {
#if defined(__AVX512BF16__)
    if constexpr (BITS == 4) {  // nibbles look their bf16 up
        const __m512i both = _mm512_cvtepu8_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(group + k / 2 * PANEL + first)));
        const __m512i index = _mm512_or_si512(both, _mm512_slli_epi32(_mm512_srli_epi32(both, 4), 16));
        const __m512i values = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040),
            short(0xc000), short(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
        return (vu)_mm512_permutexvar_epi16(index, values);
    }
#endif
    vi even, odd;
    two_codes<BITS>(group, k, first, &even, &odd);
    const vf low = __builtin_convertvector(even, vf), high = __builtin_convertvector(odd, vf);
    return ((vu)low >> 16) | (vu)high;  // a code's lower half is zero
}

template <int BITS>
inline void widen(const char* group, int64_t k, int first, uint16_t* target) {
    const vu pair = widen_pair<BITS>(group, k, first);
    std::memcpy(target, &pair, sizeof(pair));
}

template <typename T, int BITS>
void quantized_panel(const LinearArgs& a, const typename Weights<T>::X* x, int64_t panel, float* c) {
    typedef Codes<BITS> C;
    constexpr int V = PANEL / W;
    alignas(64) T scratch[C::GROUP * PANEL];
    const int64_t groups = a.in / C::GROUP;
    const char* codes = static_cast<const char*>(a.packed) + panel * groups * C::SIZE;
    std::fill(c, c + a.rows * PANEL, 0.0f);
    for (int64_t g = 0; g < groups; g++, codes += C::SIZE) {
        const float* scales = reinterpret_cast<const float*>(codes + C::BYTES);
        for (int64_t k = 0; k < C::GROUP; k += 2) {
            __builtin_prefetch(codes + C::SIZE + k * PANEL * BITS / 8, 0, 2);
            __builtin_prefetch(codes + C::SIZE + (k + 1) * PANEL * BITS / 8, 0, 2);
            for (int j = 0; j < V; j++) widen<BITS>(codes, k, j * W, scratch + k * PANEL + j * W * Weights<T>::STEP);
        }
        for (int64_t m = 0; m < a.rows; m += TILE) {
            const int size = int(std::min<int64_t>(TILE, a.rows - m));
            alignas(64) float sums[TILE * PANEL] = {};
            any_tile<T, 0>(size, x + m * a.in + g * C::GROUP * size, scratch, C::GROUP, sums, codes);
            for (int i = 0; i < size; i++)
                for (int j = 0; j < V; j++) {
                    float* target = c + (m + i) * PANEL + j * W;
                    store(target, load(target) + load(sums + i * PANEL + j * W) * load(scales + j * W));
                }
        }
    }
}

#if defined(__AVX512BF16__)
// One row: codes go from memory to registers.
template <int BITS>
void quantized_row(const LinearArgs& a, const uint16_t* x, int64_t panel, float* c) {
    typedef Codes<BITS> C;
    constexpr int V = PANEL / W;
    const int64_t groups = a.in / C::GROUP;
    const char* codes = static_cast<const char*>(a.packed) + panel * groups * C::SIZE;
    vf total[V] = {};
    for (int64_t g = 0; g < groups; g++, codes += C::SIZE, x += C::GROUP) {
        vf sums[V] = {};
        for (int64_t k = 0; k < C::GROUP; k += 2) {
            const char* line = codes + k * PANEL * BITS / 8;
            __builtin_prefetch(line + DISTANCE, 0, 3);
            if (BITS == 8) __builtin_prefetch(line + DISTANCE + LINE, 0, 3);
            int both;
            std::memcpy(&both, x + k, 4);
#pragma GCC unroll 4
            for (int j = 0; j < V; j++)
                sums[j] = (vf)_mm512_dpbf16_ps((__m512)sums[j], (__m512bh)widen_pair<BITS>(codes, k, j * W),
                                               (__m512bh)_mm512_set1_epi32(both));
        }
        for (int j = 0; j < V; j++)
            total[j] += sums[j] * load(reinterpret_cast<const float*>(codes + C::BYTES) + j * W);
    }
    for (int j = 0; j < V; j++) store(c + j * W, total[j]);
}
#endif

template <typename T, int BITS>
void quantized(const LinearArgs& a) {
    typedef typename Weights<T>::X X;
    const T* raw = static_cast<const T*>(a.x);
    const T* bias = static_cast<const T*>(a.bias);
    std::vector<X> x(a.rows * a.in);
    halyard::parallel((a.rows + TILE - 1) / TILE, a.rows * a.in <= 1 << 16 ? 1 : a.threads, [&](int64_t i) {
        const int64_t m = i * TILE;
        copy_tile(raw + m * a.stride, a.stride, std::min<int64_t>(TILE, a.rows - m), a.in,
                  x.data() + m * a.in);
    });
    const int64_t panels = (a.out + PANEL - 1) / PANEL;
    const int64_t size = std::max<int64_t>(1, panels / (8 * a.threads));
    halyard::parallel((panels + size - 1) / size, a.threads, [&](int64_t group) {
        std::vector<float> c(a.rows * PANEL);
        for (int64_t panel = group * size; panel < std::min(panels, (group + 1) * size); panel++) {
#if defined(__AVX512BF16__)
            if constexpr (sizeof(T) == 2) {
                if (a.rows == 1) quantized_row<BITS>(a, x.data(), panel, c.data());
                else quantized_panel<T, BITS>(a, x.data(), panel, c.data());
            } else
#endif
                quantized_panel<T, BITS>(a, x.data(), panel, c.data());
            const int64_t width = std::min<int64_t>(PANEL, a.out - panel * PANEL);
            for (int64_t m = 0; m < a.rows; m++)
                write_row(static_cast<T*>(a.y) + m * a.out + panel * PANEL, c.data() + m * PANEL,
                          bias ? bias + panel * PANEL : nullptr, width);
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

}  // namespace

extern "C" {

void halyard_linear_float32(const LinearArgs* args) { linear<float>(*args); }
void halyard_linear_bfloat16(const LinearArgs* args) { linear<uint16_t>(*args); }
void halyard_quantized_float32(const LinearArgs* args, int64_t bits) {
    bits == 8 ? quantized<float, 8>(*args) : quantized<float, 4>(*args);
}
void halyard_quantized_bfloat16(const LinearArgs* args, int64_t bits) {
    bits == 8 ? quantized<uint16_t, 8>(*args) : quantized<uint16_t, 4>(*args);
}

void halyard_rows_float32(const int64_t* ids, int64_t count, const void* packed, int64_t in, void* y) {
    rows_of<float>(ids, count, static_cast<const float*>(packed), in, static_cast<float*>(y));
}
void halyard_rows_bfloat16(const int64_t* ids, int64_t count, const void* packed, int64_t in, void* y) {
    rows_of<uint16_t>(ids, count, static_cast<const uint16_t*>(packed), in, static_cast<uint16_t*>(y));
}
int halyard_linear_args_size() { return int(sizeof(LinearArgs)); }
}
