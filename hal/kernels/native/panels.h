// What products with weights in panels of 64 outputs have in common: register tiles of rows against a
// panel, and inputs copied tile by tile, [in][rows of the tile] (bf16: in pairs), so that the tiles
// read memory in order.
#pragma once

#include <algorithm>
#include <memory>

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
constexpr int STREAMS = 1;  // its sums are half of the registers
#endif
constexpr int ROWS = 192;   // rows between two passes over a panel
constexpr int TILE = 6;  // rows a register tile

// Vectors of a panel that a tile of M rows holds in registers: of 32 (AVX-512, NEON) or of 16.
constexpr int tile_vectors(int m) {
#if defined(__AVX512F__)
    return m > 0 ? 4 : 0;
#elif defined(__ARM_NEON)
    return m == 1 ? 16 : m == 2 ? 8 : 4;
#else
    return m == 1 ? 8 : m == 2 ? 4 : 2;
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
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) value[j] = load(w + j * W);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            const float a = x[m];
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) acc[m][j] += a * value[j];
        }
    }
};

template <>
struct Weights<uint16_t> {
    static constexpr int STEP = 2;
#if defined(NARROW)
#if defined(BF16_DOT)
    typedef uint16_t X;
#else
    typedef float X;
#endif

    template <int M, int V>
    static void step(const X* x, const uint16_t* w, vf (&acc)[M][V]) {
        add_pairs(acc, [&](int j) { return w + j * W * 2; }, [&](int m) { return x + 2 * m; });
    }
#elif defined(BF16_DOT)
    typedef uint16_t X;

    template <int M, int V>
    static void step(const uint16_t* x, const uint16_t* w, vf (&acc)[M][V]) {
        vu pair[V];
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) pair[j] = load_u32(w + j * W * 2);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            uint32_t both;
            std::memcpy(&both, x + 2 * m, 4);
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) acc[m][j] = dot(acc[m][j], pair[j], both);
        }
    }
#else
    typedef float X;

    template <int M, int V>
    static void step(const float* x, const uint16_t* w, vf (&acc)[M][V]) {
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) {
            const vu pair = load_u32(w + j * W * 2);
            const vf first = low_half(pair), second = high_half(pair);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                acc[m][j] += x[2 * m] * first;
                acc[m][j] += x[2 * m + 1] * second;
            }
        }
    }
#endif
};

// c [M][PANEL] += `count` inputs of M rows times those of a panel, times scales [PANEL] if there are
// some. Meanwhile FETCH lines a step are fetched from `ahead` on: what is multiplied next, so that
// memory and arithmetic overlap.
template <typename T, int M, int FETCH>
const char* tile(const typename Weights<T>::X* x, const T* w, int64_t count, float* c,
                 const char* ahead, const float* scales = nullptr) {
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
                if (scales) store(target, load(target) + acc[m][j] * load(scales + (v + j) * W));
                else store(target, load(target) + acc[m][j]);
            }
    }
    return ahead;
}

template <typename T, int FETCH>
const char* any_tile(int rows, const typename Weights<T>::X* x, const T* w, int64_t count, float* c,
                     const char* ahead, const float* scales = nullptr) {
    switch (rows) {
        case 1: return tile<T, 1, FETCH>(x, w, count, c, ahead, scales);
        case 2: return tile<T, 2, FETCH>(x, w, count, c, ahead, scales);
        case 3: return tile<T, 3, FETCH>(x, w, count, c, ahead, scales);
        case 4: return tile<T, 4, FETCH>(x, w, count, c, ahead, scales);
        case 5: return tile<T, 5, FETCH>(x, w, count, c, ahead, scales);
        default: return tile<T, 6, FETCH>(x, w, count, c, ahead, scales);
    }
}

inline void copy_inputs(float* target, const float* x) { *target = *x; }
inline void copy_inputs(float* target, const uint16_t* x) {
    target[0] = bf16_to_float(x[0]);
    target[1] = bf16_to_float(x[1]);
}
inline void copy_inputs(uint16_t* target, const uint16_t* x) { std::memcpy(target, x, 4); }

// [rows][in] -> [in / STEP][tile][STEP]
template <typename T>
void copy_tile(const T* x, int64_t stride, int64_t rows, int64_t tile, int64_t in,
               typename Weights<T>::X* target) {
    constexpr int STEP = Weights<T>::STEP;
    for (int64_t k = 0; k < in; k += STEP, target += tile * STEP)
        for (int64_t m = 0; m < rows; m++) copy_inputs(target + m * STEP, x + m * stride + k);
}

// y [width] = sums plus bias or nothing.
template <typename T>
inline void write_row(T* y, const float* sums, const T* bias, int64_t width) {
    int64_t n = 0;
    if (!bias)
        for (; n + W <= width; n += W) store_as(y + n, load(sums + n));
    for (; n < width; n++) from_float(y + n, sums[n] + (bias ? to_float(bias[n]) : 0.0f));
}

// The inputs of a product, tile by tile: `tile` rows each; the last has what is left, or zeros behind
// it if it is to be `full`. Memory is not cleared first: that would be a pass over it by one thread.
template <typename T>
std::unique_ptr<typename Weights<T>::X[]> tiled_inputs(const LinearArgs& a, int64_t tile = TILE,
                                                       bool full = false) {
    typedef typename Weights<T>::X X;
    const T* raw = static_cast<const T*>(a.x);
    const int64_t tiles = (a.rows + tile - 1) / tile;
    std::unique_ptr<X[]> x(new X[(full ? tiles * tile : a.rows) * a.in]);
    const int64_t copiers = a.rows * a.in <= 1 << 16 ? 1 : a.threads;
    halyard::parallel(tiles, copiers, [&](int64_t i) {
        const int64_t m = i * tile, rows = std::min<int64_t>(tile, a.rows - m);
        X* target = x.get() + m * a.in;
        if (full && rows < tile) std::fill(target, target + tile * a.in, X(0));
        copy_tile(raw + m * a.stride, a.stride, rows, full ? tile : rows, a.in, target);
    });
    return x;
}

}  // namespace
