// Operators for code that Inductor generates: called there as C functions, without the dispatcher and
// without Python. They reach tensors through torch's stable C functions, whose addresses are handed
// over once (halyard_bind_torch), so that no header and no library of torch is needed to build this.

#include <cstdint>
#include <cstring>

#include "operators.h"

namespace {

typedef void* Handle;  // AtenTensorHandle

struct Torch {  // torch/csrc/inductor/aoti_torch/c/shim.h
    int32_t (*get_data_ptr)(Handle, void**);
    int32_t (*get_dim)(Handle, int64_t*);
    int32_t (*get_sizes)(Handle, int64_t**);
    int32_t (*get_strides)(Handle, int64_t**);
    int32_t (*get_dtype)(Handle, int32_t*);
    int32_t (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
};

constexpr int32_t SUCCESS = 0, FAILURE = 1;
constexpr int32_t FLOAT32 = 6, BFLOAT16 = 15, INT64 = 4;  // c10::ScalarType
constexpr int MAX_DIM = 8;

Torch torch = {};
int64_t threads = 1, min_work = 0;

struct View {
    char* data;
    int64_t dim, *sizes, *strides;
    int32_t dtype;
    bool ok;

    explicit View(Handle tensor) : ok(false) {
        void* pointer = nullptr;
        ok = tensor && torch.get_data_ptr && !torch.get_data_ptr(tensor, &pointer) &&
             !torch.get_dim(tensor, &dim) && !torch.get_sizes(tensor, &sizes) &&
             !torch.get_strides(tensor, &strides) && !torch.get_dtype(tensor, &dtype) && dim <= MAX_DIM;
        data = static_cast<char*>(pointer);
    }

    // All but the last dimension as one, if memory allows it: its size and its stride.
    bool rows(int64_t* count, int64_t* stride) const {
        if (!ok || dim < 1 || (strides[dim - 1] != 1 && sizes[dim - 1] != 1)) return false;
        *count = 1;
        *stride = sizes[dim - 1];
        bool first = true;
        for (int64_t d = dim - 2; d >= 0; d--) {
            if (sizes[d] == 1) continue;
            if (first) *stride = strides[d];
            else if (strides[d] != *stride * *count) return false;
            first = false;
            *count *= sizes[d];
        }
        return true;
    }
};

int32_t empty(int64_t dim, const int64_t* sizes, int32_t dtype, Handle* result) {
    int64_t strides[MAX_DIM + 1], step = 1;
    for (int64_t d = dim - 1; d >= 0; d--) {
        strides[d] = step;
        step *= sizes[d] > 1 ? sizes[d] : 1;
    }
    return torch.empty_strided(dim, sizes, strides, dtype, 0, -1, result);
}

void* data_of(Handle tensor) {
    void* pointer = nullptr;
    return torch.get_data_ptr(tensor, &pointer) ? nullptr : pointer;
}

// Makes y [..., out] for x [..., in] and has `run` fill it.
template <typename F>
int32_t multiply(Handle x, Handle packed, Handle* bias, int64_t out, Handle* result, const F& run) {
    const View in(x), weights(packed);
    int64_t rows, stride;
    if (!weights.ok || !in.rows(&rows, &stride)) return FAILURE;
    if (in.dtype != FLOAT32 && in.dtype != BFLOAT16) return FAILURE;
    int64_t sizes[MAX_DIM];
    std::memcpy(sizes, in.sizes, in.dim * sizeof(int64_t));
    sizes[in.dim - 1] = out;
    if (empty(in.dim, sizes, in.dtype, result)) return FAILURE;
    const void* addend = bias && *bias ? data_of(*bias) : nullptr;
    const int64_t width = in.sizes[in.dim - 1];
    const LinearArgs args = {in.data, weights.data, addend, data_of(*result), rows, width, out, stride,
                             rows * width * out >= min_work ? threads : 1};
    return run(&args, in, weights);
}

// Makes y [..., in] for ids [...] and has `run` fill it.
template <typename F>
int32_t look_up(Handle ids, int64_t in, int32_t dtype, Handle* result, const F& run) {
    const View indices(ids);
    int64_t count, stride;
    if (!indices.ok || indices.dtype != INT64 || indices.dim >= MAX_DIM) return FAILURE;
    if (indices.dim == 0) count = stride = 1;
    else if (!indices.rows(&count, &stride)) return FAILURE;
    const int64_t last = indices.dim ? indices.sizes[indices.dim - 1] : 1;
    if (stride != last && count > 1) return FAILURE;
    int64_t sizes[MAX_DIM];
    std::memcpy(sizes, indices.sizes, indices.dim * sizeof(int64_t));
    sizes[indices.dim] = in;
    if (empty(indices.dim + 1, sizes, dtype, result)) return FAILURE;
    run(reinterpret_cast<const int64_t*>(indices.data), count * last, data_of(*result));
    return SUCCESS;
}

}  // namespace

extern "C" {

void halyard_bind_torch(const Torch* functions) { torch = *functions; }
int halyard_torch_size() { return int(sizeof(Torch)); }
// Products of fewer multiplications than `work` are done by one thread.
void halyard_set_threads(int64_t count, int64_t work) {
    threads = count;
    min_work = work;
}

// y [..., out] = x [..., in] times packed weights, plus bias [out] or null.
int32_t aoti_torch_cpu_packed_linear(Handle x, Handle packed, Handle* bias, int64_t out, Handle* result) {
    return multiply(x, packed, bias, out, result, [](const LinearArgs* args, const View& in, const View& weights) {
        if (weights.dtype != in.dtype) return FAILURE;
        (in.dtype == FLOAT32 ? halyard_linear_float32 : halyard_linear_bfloat16)(args);
        return SUCCESS;
    });
}

// y [..., out] = x [..., in] times the first half of packed weights [2 x out], activated, times x times
// the second half.
int32_t aoti_torch_cpu_gated_linear(Handle x, Handle packed, int64_t out, int32_t gelu, Handle* result) {
    return multiply(x, packed, nullptr, out, result, [gelu](const LinearArgs* args, const View& in, const View& weights) {
        if (weights.dtype != in.dtype) return FAILURE;
        (in.dtype == FLOAT32 ? halyard_gated_float32 : halyard_gated_bfloat16)(args, gelu);
        return SUCCESS;
    });
}

// y [..., out] = x [..., in] times weights of 8 or 4 bits, plus bias [out] or null.
int32_t aoti_torch_cpu_quantized_linear(Handle x, Handle packed, Handle* bias, int64_t out, int64_t bits,
                                        Handle* result) {
    return multiply(x, packed, bias, out, result, [bits](const LinearArgs* args, const View& in, const View&) {
        (in.dtype == FLOAT32 ? halyard_quantized_float32 : halyard_quantized_bfloat16)(args, bits);
        return SUCCESS;
    });
}

// Rows `ids` of the matrix that was packed: [...] int64 -> [..., in].
int32_t aoti_torch_cpu_packed_embedding(Handle ids, Handle packed, int64_t in, Handle* result) {
    const View weights(packed);
    if (!weights.ok) return FAILURE;
    return look_up(ids, in, weights.dtype, result, [&](const int64_t* wanted, int64_t count, void* y) {
        (weights.dtype == FLOAT32 ? halyard_rows_float32 : halyard_rows_bfloat16)(wanted, count, weights.data,
                                                                                in, y);
    });
}

// Rows `ids` of the matrix that was quantised: [...] int64 -> [..., in], bf16 or fp32.
int32_t aoti_torch_cpu_quantized_embedding(Handle ids, Handle packed, int64_t in, int64_t bits,
                                           int32_t bfloat16, Handle* result) {
    const View weights(packed);
    if (!weights.ok) return FAILURE;
    return look_up(ids, in, bfloat16 ? BFLOAT16 : FLOAT32, result,
                   [&](const int64_t* wanted, int64_t count, void* y) {
                       (bfloat16 ? halyard_quantized_rows_bfloat16 : halyard_quantized_rows_float32)(
                           wanted, count, weights.data, in, bits, y);
                   });
}
}
