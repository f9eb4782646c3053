// Where codes and scales of 8 or 4 bits lie. A panel of 64 outputs is groups of inputs, each
//   codes   int8 [GROUP][64], or 8 + int4 [GROUP / 2] lines of 64 bytes      then     scales bf16 [64]
// A line of int4 is 16 lanes of 32 bits: output 16 j + lane of the line's first input is nibble j of the
// lane's lower half, of its second input nibble j of the upper half. So one shift brings 32 codes to
// where a table of 16 words is indexed.
#pragma once

#include <cstdint>

namespace {

template <int BITS>
struct Codes {
    static constexpr int GROUP = 64, OUTPUTS = 64, LANES = 16;
    static constexpr int64_t BYTES = GROUP * OUTPUTS * BITS / 8;  // scales lie behind
    static constexpr int64_t SIZE = BYTES + OUTPUTS * 2;
    static constexpr int LINES = BITS / 4;  // cache lines of two inputs

    // Of four bits: the byte in a group that has input k of output n, and the code's shift in it.
    static int64_t byte_of(int64_t k, int64_t n) {
        return k / 2 * 64 + n % LANES * 4 + k % 2 * 2 + n / LANES / 2;
    }
    static int shift_of(int64_t n) { return int(n / LANES % 2 * 4); }
};

}  // namespace
