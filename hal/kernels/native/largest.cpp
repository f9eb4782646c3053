// The first of the largest numbers of each row: what a greedy row draws. NaN counts as the largest.

#include "operators.h"
#include "pool.h"
#include "vectors.h"

namespace {

constexpr int64_t MIN_PARALLEL = 1 << 17;  // numbers below which one thread looks through all rows

struct Best {
    vf value;
    vi index;
    vi nan;

    void meet(vf x, vi i) {
        const vi higher = x > value;
        value = higher ? x : value;
        index = higher ? i : index;
        nan |= (vi)(x != x);
    }
};

inline float at(const float* row, int64_t i) { return row[i]; }
inline float at(const uint16_t* row, int64_t i) { return bf16_to_float(row[i]); }

// Numbers [i, i + 2 W) of a row: a pair of vectors, and where the first lies and how far apart they are.
inline void meet(const float* row, int64_t i, vi numbers, Best* even, Best* odd) {
    even->meet(load(row + i), numbers + int(i));
    odd->meet(load(row + i + W), numbers + int(i + W));
}
inline void meet(const uint16_t* row, int64_t i, vi numbers, Best* even, Best* odd) {
    const vu pairs = load_u32(row + i);
    even->meet(low_half(pairs), 2 * numbers + int(i));
    odd->meet(high_half(pairs), 2 * numbers + int(i + 1));
}

template <typename T>
void largest_of(const T* row, int64_t count, int64_t* where, float* value) {
    const vi numbers = lanes();
    const Best nothing = {splat(-INFINITY), vi{}, vi{}};
    Best parts[2] = {nothing, nothing};
    int64_t i = 0, best = 0;
    for (; i + 2 * W <= count; i += 2 * W) meet(row, i, numbers, &parts[0], &parts[1]);
    bool nan = false;
    float top = -INFINITY;
    for (const Best& part : parts)
        for (int j = 0; j < W; j++) {
            nan |= part.nan[j] != 0;
            // A lane that met nothing above -inf has index 0: the first of them, as it should be.
            if (part.value[j] > top || (part.value[j] == top && part.index[j] < best))
                top = part.value[j], best = part.index[j];
        }
    for (; i < count; i++) {
        const float x = at(row, i);
        nan |= x != x;
        if (x > top) top = x, best = i;
    }
    if (nan)
        for (best = 0; at(row, best) == at(row, best);) best++;
    *where = best;
    *value = at(row, best);
}

template <typename T>
void largest(const T* data, int64_t rows, int64_t count, int64_t stride, int64_t* where, float* value,
             int64_t threads) {
    halyard::parallel(rows, rows * count < MIN_PARALLEL ? 1 : threads, [&](int64_t i) {
        largest_of(data + i * stride, count, where + i, value + i);
    });
}

}  // namespace

extern "C" {

void halyard_largest_float32(const float* data, int64_t rows, int64_t count, int64_t stride, int64_t* where,
                             float* value, int64_t threads) {
    largest(data, rows, count, stride, where, value, threads);
}
void halyard_largest_bfloat16(const uint16_t* data, int64_t rows, int64_t count, int64_t stride,
                              int64_t* where, float* value, int64_t threads) {
    largest(data, rows, count, stride, where, value, threads);
}
}
