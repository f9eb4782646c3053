// Weights [out][in] into the panels that linear.cpp and quantized.cpp read. One call fills whole panels
// from the `first`-th on, so that a weight joined from several needs no joined copy.

#include <algorithm>

#include "pool.h"
#include "quantized.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 64;

struct PackArgs {
    const void* weight;  // [out][in]
    void* packed;
    int64_t out, in, first, threads;
};

// 32 bits at a time: an fp32, or a pair of bf16.
void pack(const PackArgs& a, int64_t width) {
    constexpr int STEP = 64 / 4;  // a cache line of a row
    const uint32_t* weight = static_cast<const uint32_t*>(a.weight);
    uint32_t* packed = static_cast<uint32_t*>(a.packed) + a.first * width * PANEL;
    halyard::parallel((a.out + PANEL - 1) / PANEL, a.threads, [&](int64_t panel) {
        uint32_t* target = packed + panel * width * PANEL;
        const uint32_t* source = weight + panel * PANEL * width;
        const int64_t rows = std::min<int64_t>(PANEL, a.out - panel * PANEL);
        if (rows < PANEL) std::fill(target, target + width * PANEL, 0u);
        for (int64_t k0 = 0; k0 < width; k0 += STEP) {
            const int64_t count = std::min<int64_t>(STEP, width - k0);
            for (int64_t n = 0; n < rows; n++)
                for (int64_t k = k0; k < k0 + count; k++) target[k * PANEL + n] = source[n * width + k];
        }
    });
}

inline vf rounded(vf x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    return x + magic - magic;
}

inline vf within(vf x, float low, float high) {
    x = x < low ? splat(low) : x;
    return x > high ? splat(high) : x;
}

// The scale, exact in bf16, that leaves the least squared error, and codes by it.
template <int BITS>
float round_group(const float* values, int8_t* codes) {
    constexpr int GROUP = Codes<BITS>::GROUP;
    constexpr float TOP = BITS == 8 ? 127 : 7, LOW = BITS == 8 ? -127 : -8;
    float extreme = 0.0f;
    for (int i = 0; i < GROUP; i++)
        if (std::fabs(values[i]) > std::fabs(extreme)) extreme = values[i];
    float best = INFINITY, scale = 1.0f;
    // Four bits have one code more below zero than above: the extreme may lie there, or be cut.
    for (int tried = 0; tried < (BITS == 8 ? 1 : 12) && extreme != 0.0f; tried++) {
        const float share = 1.0f - 0.05f * float(tried / 2);
        const float wanted = (tried % 2 ? extreme / LOW : std::fabs(extreme) / TOP) * share;
        const float s = bf16_to_float(float_to_bf16(wanted));
        if (s == 0.0f) continue;
        vf error[16 / W] = {};  // 16 sums whatever the width, which so decides no tie
        for (int i = 0; i < GROUP; i += W) {
            const vf x = load(values + i);
            const vf left = within(rounded(x / s), LOW, TOP) * s - x;
            error[i / W % (16 / W)] += left * left;
        }
        float sum = 0.0f;
        for (int i = 0; i < 16; i++) sum += error[i / W][i % W];
        if (sum < best) best = sum, scale = s;
    }
    for (int i = 0; i < GROUP; i += W) {
        const vf x = within(rounded(load(values + i) / scale), LOW, TOP);
        for (int j = 0; j < W; j++) codes[i + j] = int8_t(x[j]);
    }
    return scale;
}

template <typename T, int BITS>
void quantize(const PackArgs& a) {
    typedef Codes<BITS> C;
    const int64_t groups = a.in / C::GROUP;
    halyard::parallel((a.out + PANEL - 1) / PANEL, a.threads, [&](int64_t panel) {
        char* target = static_cast<char*>(a.packed) + (a.first + panel) * groups * C::SIZE;
        for (int64_t g = 0; g < groups; g++, target += C::SIZE) {
            alignas(64) int8_t codes[PANEL][C::GROUP] = {};
            std::fill(target, target + C::SIZE, 0);
            for (int64_t n = 0; n < std::min<int64_t>(PANEL, a.out - panel * PANEL); n++) {
                const T* row = static_cast<const T*>(a.weight) + (panel * PANEL + n) * a.in + g * C::GROUP;
                float values[C::GROUP];
                for (int k = 0; k < C::GROUP; k++) values[k] = to_float(row[k]);
                const uint16_t scale = float_to_bf16(round_group<BITS>(values, codes[n]));
                std::memcpy(target + C::BYTES + 2 * n, &scale, 2);
            }
            for (int k = 0; k < C::GROUP; k++)
                for (int n = 0; n < PANEL; n++) {
                    if (BITS == 8) target[k * PANEL + n] = codes[n][k];
                    else target[Codes<4>::byte_of(k, n)] |= (codes[n][k] + 8) << Codes<4>::shift_of(n);
                }
        }
    });
}

}  // namespace

extern "C" {

int halyard_pack_args_size() { return int(sizeof(PackArgs)); }
void halyard_pack_float32(const PackArgs* args) { pack(*args, args->in); }
void halyard_pack_bfloat16(const PackArgs* args) { pack(*args, args->in / 2); }
void halyard_quantize_float32(const PackArgs* args, int64_t bits) {
    bits == 8 ? quantize<float, 8>(*args) : quantize<float, 4>(*args);
}
void halyard_quantize_bfloat16(const PackArgs* args, int64_t bits) {
    bits == 8 ? quantize<uint16_t, 8>(*args) : quantize<uint16_t, 4>(*args);
}
}
