// Logits of tokens that a grammar forbids become -inf, where they lie. One pass: a mask is a bit a
// token, and W of them become a vector that is added.

#include <limits>

#include "operators.h"
#include "vectors.h"

extern "C" void halyard_bar_float32(const MaskArgs* args) {
    const vu lane = 1u << (vu)lanes();
    const vf never = splat(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < args->rows; i++) {
        const uint8_t* bits = args->allowed + i * args->bytes;
        float* logits = args->logits + (args->places ? args->places[i] : i) * args->stride;
        int64_t token = 0;
        for (; token + W <= args->vocab; token += W) {
            uint32_t some = bits[token / 8];  // lanes look at the W lowest bits
            if (W == 16) some |= uint32_t(bits[token / 8 + 1]) << 8;
            if (W == 4) some >>= token % 8;
            const vi barred = ((lane & (some - vu{})) == 0);
            // Added, not written: a number that is none stays none.
            store(logits + token, load(logits + token) + (vf)(barred & (vi)never));
        }
        for (; token < args->vocab; token++)
            if (!(bits[token / 8] >> (token % 8) & 1)) logits[token] += never[0];
    }
}
