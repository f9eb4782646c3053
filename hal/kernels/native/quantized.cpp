// y = x w^T + bias with weights of 8 or 4 bits, see quantized.h. Codes are exact in bf16, so only a
// group's sum is scaled. Few rows widen codes in registers, many rows widen a group once into a scratch
// that their tiles then pass over; the sums are the same.

#include "panels.h"
#include "quantized.h"

namespace {

#if defined(__AVX512F__) && defined(BF16_DOT)
constexpr int FUSED = 64;  // rows up to which codes are widened in registers
constexpr int MAX_TILE = 10;  // of them at once
#elif defined(BF16_DOT)
constexpr int FUSED = 1, MAX_TILE = 1;
#endif
constexpr int FETCH_BYTES = 2048;  // how far ahead of their use codes are fetched

typedef int8_t vb __attribute__((vector_size(W), aligned(1)));

inline vi signed_bytes(const char* p) {  // GCC converts a vector of bytes one by one
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__ARM_NEON)
    uint32_t bytes;
    std::memcpy(&bytes, p, 4);
    return (vi)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)))));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__SSE2__)
    int bytes;
    std::memcpy(&bytes, p, 4);
    __m128i x = _mm_cvtsi32_si128(bytes);
    x = _mm_unpacklo_epi8(x, x);
    return (vi)_mm_srai_epi32(_mm_unpacklo_epi16(x, x), 24);
#else
    return __builtin_convertvector(*reinterpret_cast<const vb*>(p), vi);
#endif
}

// Codes of inputs k and k + 1 (k even) for the j-th W outputs.
template <int BITS>
inline void two_codes(const char* group, int64_t k, int j, vi* even, vi* odd) {
    if constexpr (BITS == 8) {
        const char* line = group + k * PANEL + j * W;
        *even = signed_bytes(line);
        *odd = signed_bytes(line + PANEL);
    } else {
        constexpr int PARTS = Codes<BITS>::LANES / W;  // vectors a line
        const vu both = load_u32(group + k / 2 * PANEL + j % PARTS * W * 4);
        const int shift = j / PARTS * 4;
        *even = (vi)(both >> shift & 15u) - 8;
        *odd = (vi)(both >> (16 + shift) & 15u) - 8;
    }
}

template <int BITS>
inline void widen(const char* group, int64_t k, float* target) {
#pragma GCC unroll 16
    for (int j = 0; j < PANEL / W; j++) {
        vi even, odd;
        two_codes<BITS>(group, k, j, &even, &odd);
        store(target + j * W, __builtin_convertvector(even, vf));
        store(target + PANEL + j * W, __builtin_convertvector(odd, vf));
    }
}

// Bf16 pairs of two inputs for the j-th W outputs.
template <int BITS>
inline vu widen_pair(const char* group, int64_t k, int j) {
#if defined(__AVX512BF16__)
    if constexpr (BITS == 4) {
        const __m512i line = (__m512i)load_u32(group + k / 2 * PANEL);
        const __m512i values = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040),
            short(0xc000), short(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
        return (vu)_mm512_permutexvar_epi16(j ? _mm512_srli_epi16(line, 4 * j) : line, values);
    }
#endif
    vi even, odd;
    two_codes<BITS>(group, k, j, &even, &odd);
    const vf low = __builtin_convertvector(even, vf), high = __builtin_convertvector(odd, vf);
    return ((vu)low >> 16) | (vu)high;  // a code's lower half is zero
}

template <int BITS>
inline void widen(const char* group, int64_t k, uint16_t* target) {
#pragma GCC unroll 16
    for (int j = 0; j < PANEL / W; j++) {
        const vu pairs = widen_pair<BITS>(group, k, j);
        std::memcpy(target + j * W * 2, &pairs, sizeof(pairs));
    }
}

inline void widen_scales(const char* group_scales, float* scales) {
    for (int n = 0; n < PANEL; n++) {
        uint16_t raw;
        std::memcpy(&raw, group_scales + 2 * n, 2);
        scales[n] = bf16_to_float(raw);
    }
}

template <int BITS>
inline const char* codes_of(const LinearArgs& a, int64_t panel) {
    return static_cast<const char*>(a.packed) + panel * (a.in / Codes<BITS>::GROUP) * Codes<BITS>::SIZE;
}

// y rows [first, first + rows) of a panel from their sums.
template <typename T>
void write_rows(const LinearArgs& a, int64_t panel, int64_t first, int64_t rows, const float* c) {
    const int64_t width = std::min<int64_t>(PANEL, a.out - panel * PANEL);
    const T* bias = static_cast<const T*>(a.bias);
    for (int64_t m = 0; m < rows; m++)
        write_row(static_cast<T*>(a.y) + (first + m) * a.out + panel * PANEL, c + m * PANEL,
                  bias ? bias + panel * PANEL : nullptr, width);
}

// Many rows against a panel, ROWS at a time.
template <typename T, int BITS>
void many_rows(const LinearArgs& a, const typename Weights<T>::X* x, int64_t panel) {
    typedef Codes<BITS> C;
    alignas(64) T scratch[C::GROUP * PANEL];
    alignas(64) float c[ROWS * PANEL], scales[PANEL];
    const int64_t groups = a.in / C::GROUP;
    for (int64_t row0 = 0; row0 < a.rows; row0 += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, a.rows - row0);
        std::fill(c, c + rows * PANEL, 0.0f);
        const char* codes = codes_of<BITS>(a, panel);
        for (int64_t g = 0; g < groups; g++, codes += C::SIZE) {
            widen_scales(codes + C::BYTES, scales);
            for (int64_t k = 0; k < C::GROUP; k += 2) {
#pragma GCC unroll 2
                for (int i = 0; i < C::LINES; i++)
                    __builtin_prefetch(codes + k * PANEL * BITS / 8 + FETCH_BYTES + i * LINE, 0, 2);
                widen<BITS>(codes, k, scratch + k * PANEL);
            }
            for (int64_t m = 0; m < rows; m += TILE) {
                const int size = int(std::min<int64_t>(TILE, rows - m));
                any_tile<T, 0>(size, x + (row0 + m) * a.in + g * C::GROUP * size, scratch, C::GROUP,
                               c + m * PANEL, nullptr, scales);
            }
        }
        write_rows<T>(a, panel, row0, rows, c);
    }
}

#if defined(BF16_DOT)
// c [N][M][PANEL] += a group of inputs of M rows times those of N panels: codes go to registers.
template <int BITS, int M, int N, int FIRST, bool FETCH>
inline void fused_vectors(const uint16_t* x, const char* const (&codes)[N], float* c) {
    constexpr int V = M <= 6 ? 4 : 2;  // of a panel's vectors
    typedef Codes<BITS> C;
    vf sums[N][M][V] = {};
    for (int64_t k = 0; k < C::GROUP; k += 2)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
            if (FETCH)
#pragma GCC unroll 2
                for (int i = 0; i < C::LINES; i++)
                    __builtin_prefetch(codes[n] + k * PANEL * BITS / 8 + FETCH_BYTES + i * LINE, 0, 3);
#if defined(__AVX512F__)
            if constexpr (BITS == 8 && M == 1) {  // what the dot does, without making pairs
                uint32_t both;
                std::memcpy(&both, x + k, 4);
                const vf first = low_half(vu{} + both), second = high_half(vu{} + both);
#pragma GCC unroll 4
                for (int j = 0; j < V; j++) {
                    vi even, odd;
                    two_codes<BITS>(codes[n], k, FIRST + j, &even, &odd);
                    sums[n][0][j] += second * __builtin_convertvector(odd, vf);
                    sums[n][0][j] += first * __builtin_convertvector(even, vf);
                }
                continue;
            }
#endif
            vu pairs[V];
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) pairs[j] = widen_pair<BITS>(codes[n], k, FIRST + j);
#pragma GCC unroll 10
            for (int m = 0; m < M; m++) {
                uint32_t both;
                std::memcpy(&both, x + k * M + 2 * m, 4);
#pragma GCC unroll 4
                for (int j = 0; j < V; j++) sums[n][m][j] = dot(sums[n][m][j], pairs[j], both);
            }
        }
    for (int n = 0; n < N; n++)
        for (int j = 0; j < V; j++) {
            vu raw;
            for (int i = 0; i < W; i++) {
                uint16_t half;
                std::memcpy(&half, codes[n] + C::BYTES + 2 * ((FIRST + j) * W + i), 2);
                raw[i] = uint32_t(half) << 16;
            }
            for (int m = 0; m < M; m++) {
                float* target = c + (n * M + m) * PANEL + (FIRST + j) * W;
                store(target, load(target) + sums[n][m][j] * (vf)raw);
            }
        }
    if constexpr (FIRST + V < PANEL / W) fused_vectors<BITS, M, N, FIRST + V, false>(x, codes, c);
}

template <int BITS, int M>
void fused_rows(const uint16_t* x, const char* codes, float* c, bool fetch) {
    const char* const one[1] = {codes};
    (fetch ? fused_vectors<BITS, M, 1, 0, true> : fused_vectors<BITS, M, 1, 0, false>)(x, one, c);
}

// Rows a tile. Eight keep the dot busiest; rows that a tile lacks are zero.
inline int64_t tile_of(int64_t rows) {
    if (rows <= 6) return rows;
    return rows == 9 || rows == 10 || rows == 19 || rows == 20 ? 10 : rows == 11 || rows == 12 ? 6 : 8;
}

template <int BITS>
void any_fused_rows(int64_t rows, const uint16_t* x, const char* codes, float* c, bool fetch) {
    switch (rows) {
        case 1: return fused_rows<BITS, 1>(x, codes, c, fetch);
#if defined(__AVX512F__)
        case 2: return fused_rows<BITS, 2>(x, codes, c, fetch);
        case 3: return fused_rows<BITS, 3>(x, codes, c, fetch);
        case 4: return fused_rows<BITS, 4>(x, codes, c, fetch);
        case 5: return fused_rows<BITS, 5>(x, codes, c, fetch);
        case 6: return fused_rows<BITS, 6>(x, codes, c, fetch);
        case 8: return fused_rows<BITS, 8>(x, codes, c, fetch);
        default: return fused_rows<BITS, 10>(x, codes, c, fetch);
#endif
    }
}

// One row against two panels: its sums of one follow each other slower than they could be started.
template <int BITS>
void one_row_two_panels(const LinearArgs& a, const uint16_t* x, int64_t panel, int64_t apart) {
    typedef Codes<BITS> C;
    const char* codes[2] = {codes_of<BITS>(a, panel), codes_of<BITS>(a, panel + apart)};
    alignas(64) float c[2 * PANEL] = {};
    for (int64_t g = 0; g < a.in / C::GROUP; g++, codes[0] += C::SIZE, codes[1] += C::SIZE) {
        const char* const both[2] = {codes[0], codes[1]};
        fused_vectors<BITS, 1, 2, 0, true>(x + g * C::GROUP, both, c);
    }
    write_rows<uint16_t>(a, panel, 0, 1, c);
    write_rows<uint16_t>(a, panel + apart, 0, 1, c + PANEL);
}

// Panels [first, last) for few rows, `tile` at a time.
template <int BITS>
void fused_panels(const LinearArgs& a, const uint16_t* x, int64_t tile, int64_t first, int64_t last) {
    typedef Codes<BITS> C;
    if (a.rows == 1) {  // from both halves at once
        const int64_t half = (last - first) / 2;
        for (int64_t i = 0; i < half; i++) one_row_two_panels<BITS>(a, x, first + i, half);
        first += 2 * half;
    }
    alignas(64) float c[(FUSED + MAX_TILE) * PANEL];
    for (int64_t panel = first; panel < last; panel++) {
        std::fill(c, c + (a.rows + tile) * PANEL, 0.0f);
        const char* codes = codes_of<BITS>(a, panel);
        for (int64_t g = 0; g < a.in / C::GROUP; g++, codes += C::SIZE)
            for (int64_t m = 0; m < a.rows; m += tile)
                any_fused_rows<BITS>(tile, x + m * a.in + g * C::GROUP * tile, codes, c + m * PANEL, m == 0);
        write_rows<uint16_t>(a, panel, 0, a.rows, c);
    }
}
#endif

template <typename F>
void by_panels(const LinearArgs& a, const F& run) {
    const int64_t panels = (a.out + PANEL - 1) / PANEL;
    const int64_t size = std::max<int64_t>(2, panels / (8 * a.threads));
    halyard::parallel((panels + size - 1) / size, a.threads,
                      [&](int64_t i) { run(i * size, std::min(panels, (i + 1) * size)); });
}

template <typename T, int BITS>
void quantized(const LinearArgs& a) {
    const ProductTimer timer;
#if defined(BF16_DOT)
    if constexpr (sizeof(T) == 2) {
        if (a.rows <= FUSED) {
            const int64_t tile = tile_of(a.rows);
            const auto x = tiled_inputs<T>(a, tile, true);
            return by_panels(a, [&](int64_t first, int64_t last) {
                fused_panels<BITS>(a, x.get(), tile, first, last);
            });
        }
    }
#endif
    const auto x = tiled_inputs<T>(a);
    by_panels(a, [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; panel++) many_rows<T, BITS>(a, x.get(), panel);
    });
}

template <typename T, int BITS>
void rows_of(const int64_t* ids, int64_t count, const char* packed, int64_t in, T* y) {
    typedef Codes<BITS> C;
    for (int64_t i = 0; i < count; i++) {
        const int64_t n = ids[i] % PANEL;
        const char* codes = packed + ids[i] / PANEL * (in / C::GROUP) * C::SIZE;
        for (int64_t g = 0; g < in / C::GROUP; g++, codes += C::SIZE) {
            uint16_t raw;
            std::memcpy(&raw, codes + C::BYTES + 2 * n, 2);
            const float scale = bf16_to_float(raw);
            T* target = y + i * in + g * C::GROUP;
            for (int64_t k = 0; k < C::GROUP; k++) {
                int code;
                if constexpr (BITS == 8) {
                    code = int8_t(codes[k * PANEL + n]);
                } else {
                    code = (uint8_t(codes[C::byte_of(k, n)]) >> C::shift_of(n) & 15) - 8;
                }
                from_float(target + k, float(code) * scale);
            }
        }
    }
}

}  // namespace

extern "C" {

void halyard_quantized_float32(const LinearArgs* args, int64_t bits) {
    bits == 8 ? quantized<float, 8>(*args) : quantized<float, 4>(*args);
}
void halyard_quantized_bfloat16(const LinearArgs* args, int64_t bits) {
    bits == 8 ? quantized<uint16_t, 8>(*args) : quantized<uint16_t, 4>(*args);
}

void halyard_quantized_rows_float32(const int64_t* ids, int64_t count, const void* packed, int64_t in,
                                    int64_t bits, void* y) {
    (bits == 8 ? rows_of<float, 8> : rows_of<float, 4>)(ids, count, static_cast<const char*>(packed), in,
                                                        static_cast<float*>(y));
}
void halyard_quantized_rows_bfloat16(const int64_t* ids, int64_t count, const void* packed, int64_t in,
                                     int64_t bits, void* y) {
    (bits == 8 ? rows_of<uint16_t, 8> : rows_of<uint16_t, 4>)(
        ids, count, static_cast<const char*>(packed), in, static_cast<uint16_t*>(y));
}
}
