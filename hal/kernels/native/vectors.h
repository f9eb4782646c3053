// Vectors of floats that the compiler maps to AVX-512, AVX2, SSE or NEON, and bf16 conversions. They are
// as wide as the processor's: wider ones it keeps in memory, not in registers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define BF16_DOT 1  // products of bf16 pairs, summed in fp32, are one instruction
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes
#elif defined(__AVX2__)
constexpr int W = 8;
#else
#define NARROW
constexpr int W = 4;  // SSE, NEON and what else has 128 bits
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef float vf_u __attribute__((vector_size(W * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint32_t vu_u __attribute__((vector_size(W * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));

inline vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
inline vu load_u32(const void* p) { return *reinterpret_cast<const vu_u*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_u*>(p) = x; }
inline vf splat(float x) { return x - vf{}; }
inline vi lanes() {  // 0, 1, 2 ...
    vi numbers;
    for (int i = 0; i < W; i++) numbers[i] = i;
    return numbers;
}
inline vf low_half(vu x) { return (vf)(x << 16); }           // first of each bf16 pair
inline vf high_half(vu x) { return (vf)(x & 0xffff0000u); }  // second

inline float bf16_to_float(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline uint16_t float_to_bf16(float f) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) { return bf16_to_float(x); }
inline void from_float(float* p, float x) { *p = x; }
inline void from_float(uint16_t* p, float x) { *p = float_to_bf16(x); }

inline void store_as(float* p, vf x) { store(p, x); }
inline void store_as(uint16_t* p, vf x) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &rounded, 32);
#elif defined(BF16_DOT)
    float32x4_t part[W / 4];
    std::memcpy(part, &x, sizeof(part));
    for (int i = 0; i < W / 4; i++)
        vst1_bf16(reinterpret_cast<bfloat16_t*>(p) + 4 * i, vcvt_bf16_f32(part[i]));
#else
    for (int i = 0; i < W; i++) p[i] = float_to_bf16(x[i]);
#endif
}

// exp(x) for x <= 0 (and moderately above); relative error about 2e-7. -inf gives 0.
inline vf vexp(vf x) {
    vi dead = x < -87.0f;
    x = dead ? splat(-87.0f) : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    vf n = x * 1.44269504f + magic;
    vi exponent = (vi)n - (vi)splat(magic);
    n = n - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vf result = (vf)((vi)p + (exponent << 23));
    return dead ? vf{} : result;
}

#if defined(__AVX512BF16__)
// sums + a's pairs times one pair that all lanes share.
inline vf dot(vf sums, vu pairs, uint32_t both) {
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(int(both)));
}
#elif defined(BF16_DOT)
inline vf dot(vf sums, vu pairs, uint32_t both) {
    const bfloat16x8_t x = vreinterpretq_bf16_u32(vdupq_n_u32(both));
    float32x4_t part[W / 4];
    bfloat16x8_t pair[W / 4];
    std::memcpy(part, &sums, sizeof(part));
    std::memcpy(pair, &pairs, sizeof(pair));
    for (int i = 0; i < W / 4; i++) part[i] = vbfdotq_f32(part[i], pair[i], x);
    std::memcpy(&sums, part, sizeof(part));
    return sums;
}
#endif

#if defined(NARROW)
// acc [M][V] += products of pairs of bf16 at line(j) with two inputs of each row at input(m): two of bf16
// where there is a dot, else two floats. With ONE, only a pair's first counts.
template <int M, int V, bool ONE = false, typename Line, typename Input>
inline void add_pairs(vf (&acc)[M][V], const Line& line, const Input& input) {
#if defined(BF16_DOT)
    vu pair[V];
    if constexpr (M > 1)
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) pair[j] = ONE ? load_u32(line(j)) & 0xffffu : load_u32(line(j));
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        uint32_t both;
        std::memcpy(&both, input(m), 4);
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) {
            if constexpr (M == 1) pair[j] = ONE ? load_u32(line(j)) & 0xffffu : load_u32(line(j));
            acc[m][j] = dot(acc[m][j], pair[j], both);
        }
    }
#else
    if constexpr (M == 1) {
        const float first = input(0)[0], second = input(0)[ONE ? 0 : 1];
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) {
            const vu pair = load_u32(line(j));
            acc[0][j] += first * low_half(pair);
            if (!ONE) acc[0][j] += second * high_half(pair);
        }
        return;
    }
    // All pairs' first halves, then their second ones: registers that hold the sums have no room for
    // both. They are read twice; the compiler mustn't know that, or it keeps them somewhere.
#pragma GCC unroll 2
    for (int i = 0; i < (ONE ? 1 : 2); i++) {
        int64_t nothing = 0;
        if (i) asm("" : "+r"(nothing));
        vf half[V];
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) {
            const vu pair = load_u32(line(j) + nothing);
            half[j] = i ? high_half(pair) : low_half(pair);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const float x = input(m)[i];
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) acc[m][j] += x * half[j];
        }
    }
#endif
}
#endif

}  // namespace
