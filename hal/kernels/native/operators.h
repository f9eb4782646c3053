// What the library offers beside attention: linears over packed weights (linear.cpp,
// quantized.cpp), masks (mask.cpp).
#pragma once

#include <cstdint>

struct LinearArgs {
    const void* x;  // [rows][in], `stride` elements from one row to the next
    const void* packed;
    const void* bias;  // [out] as x, or null
    void* y;           // [rows][out]
    int64_t rows, in, out, stride, threads;
};

// Adds the time that it lives to what halyard_product_nanoseconds tells: calls of two threads add up.
class ProductTimer {
public:
    ProductTimer();
    ~ProductTimer();

private:
    int64_t began;
};

struct MaskArgs {
    float* logits;           // [any][vocab], `stride` elements from one row to the next
    const uint8_t* allowed;  // [rows][bytes], a bit a token, lowest first
    const int64_t* places;   // [rows] of the logits, or null: the first `rows`
    int64_t rows, vocab, stride, bytes;
};

extern "C" {

// Since the library was loaded, in products.
int64_t halyard_product_nanoseconds();
// Forbidden tokens' logits become -inf.
void halyard_bar_float32(const MaskArgs* args);

void halyard_linear_float32(const LinearArgs* args);
void halyard_linear_bfloat16(const LinearArgs* args);
// Over packed weights [2 x out]: silu, or tanh's gelu, of the first half's outputs times the second's.
void halyard_gated_float32(const LinearArgs* args, int64_t gelu);
void halyard_gated_bfloat16(const LinearArgs* args, int64_t gelu);
// As halyard_linear over weights of 8 or 4 bits.
void halyard_quantized_float32(const LinearArgs* args, int64_t bits);
void halyard_quantized_bfloat16(const LinearArgs* args, int64_t bits);

// Rows `ids` [count] of the matrix that was quantised, [count][in].
void halyard_quantized_rows_float32(const int64_t* ids, int64_t count, const void* packed, int64_t in,
                                    int64_t bits, void* y);
void halyard_quantized_rows_bfloat16(const int64_t* ids, int64_t count, const void* packed, int64_t in,
                                     int64_t bits, void* y);

// Rows `ids` [count] of the matrix that was packed, [count][in].
void halyard_rows_float32(const int64_t* ids, int64_t count, const void* packed, int64_t in, void* y);
void halyard_rows_bfloat16(const int64_t* ids, int64_t count, const void* packed, int64_t in, void* y);
}
