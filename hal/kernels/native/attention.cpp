// Paged attention for the CPU. Written once in vectors of W floats (16, 8 or 4), which the compiler maps
// to AVX-512, AVX2, SSE or NEON; where the CPU has a dot instruction for bf16, products use it.
//
// One block of one layer holds, for each kv head, keys and then values of `block` tokens:
//   fp32  K [head_dim][block]            V [block][head_dim]
//   bf16  K [head_dim / 2][block][2]     V [block / 2][head_dim][2]      pairs, as the dot wants them
// Keys are transposed so that a vector holds one coordinate of W tokens: scores of W keys come
// without a sum across lanes.
//
// A work item is a tile of queries that share a kv head (the group of query heads times a few
// tokens) against a range of keys. Short rows against long contexts are cut into key ranges of fixed
// length and merged by log-sum-exp: one long context keeps all cores busy, and what a row computes
// does not depend on what else is in the batch.

#include <algorithm>
#include <vector>

#include "pool.h"
#include "vectors.h"

namespace {

constexpr int TILE = 36;          // queries a work item, at most
constexpr int REGISTERS = 6;      // queries a register tile
// Tokens of a sub-block, or as many coordinates of a value: PARTS vectors that lie in one place. wide(m)
// of them beside each other are what a tile of m queries holds sums for: in 32 registers, or in 16.
#if defined(__AVX512F__)
constexpr int SUB = W;
constexpr int wide(int) { return 4; }
#elif defined(__AVX2__)
constexpr int SUB = W;
constexpr int wide(int m) { return m == 1 ? 8 : m == 2 ? 4 : 2; }
#elif defined(__ARM_NEON)
constexpr int SUB = 4 * W;
constexpr int wide(int m) { return m == 1 ? 4 : m == 2 ? 2 : 1; }
#else
constexpr int SUB = 2 * W;
constexpr int wide(int m) { return m == 1 ? 4 : m == 2 ? 2 : 1; }
#endif
constexpr int PARTS = SUB / W;
constexpr int CHUNK = 128 / SUB;  // sub-blocks between two updates of the softmax
constexpr int SPLIT = 1024;       // keys a work item of a short row
constexpr int SHORT_ROW = 8;      // query tokens up to which a row is cut along its keys
constexpr float NEG_INF = -INFINITY;

#if defined(__AVX512F__)
// Polynomials for 2^f, f in [-0.5, 0.5], with the least relative error.
constexpr float EXP4[] = {0.9999992614f, 0.6931218145f, 0.2402474485f, 0.0559178621f, 0.0095701017f};
constexpr float EXP6[] = {1.0f,          0.6931472057f, 0.2402264689f, 0.0555032878f,
                          0.0096184890f, 0.0013399931f, 0.0001534581f};

// exp(x - top) for x <= top as 2^t: rounding and scaling are instructions here. A weight that is
// rounded to bf16 later needs fewer terms: relative error 4e-6, else 1e-7. -inf gives 0.
template <typename T>
inline vf weight_of(vf x, float top) {
    const vf t = x * 1.44269504f - top * 1.44269504f;
    // In this order a NaN stays one.
    const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)t);
    const __m512 n = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf f = (vf)bounded - (vf)n;
    vf p;
    if (sizeof(T) == 2) {
        p = f * EXP4[4] + EXP4[3];
        p = p * f + EXP4[2];
        p = p * f + EXP4[1];
        p = p * f + EXP4[0];
    } else {
        p = f * EXP6[6] + EXP6[5];
        p = p * f + EXP6[4];
        p = p * f + EXP6[3];
        p = p * f + EXP6[2];
        p = p * f + EXP6[1];
        p = p * f + EXP6[0];
    }
    return (vf)_mm512_scalef_ps((__m512)p, n);
}
inline float highest_of(vf x) { return _mm512_reduce_max_ps((__m512)x); }
inline float sum_of(vf x) { return _mm512_reduce_add_ps((__m512)x); }
#else
template <typename T>
inline vf weight_of(vf x, float top) {
    return vexp(x - top);
}
inline float highest_of(vf x) {
    float highest = x[0];
    for (int lane = 1; lane < W; lane++) highest = std::max(highest, x[lane]);
    return highest;
}
inline float sum_of(vf x) {
    float sum = 0.0f;
    for (int lane = 0; lane < W; lane++) sum += x[lane];
    return sum;
}
#endif

struct Args {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    void* pool;  // this layer's blocks
    const int64_t* slot_mapping;
    const int32_t* block_tables;
    const int32_t* seq_lens;
    const int32_t* query_start;
    const float* sinks;  // or null
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides in elements
    int64_t num_tokens, num_rows, max_blocks;
    int64_t num_heads, num_kv_heads, head_dim, block;
    int64_t window;
    float scale, softcap;
    int64_t threads;
};

struct Item {
    int row, kv_head;
    int first_query, num_queries;  // tokens within the row
    int first_head, num_heads;     // query heads within the group
    int first_key, last_key;       // keys [first, last)
    int part;                      // index into partial results, or -1
};

struct Span {  // partial results of one tile, to be merged
    int item;
    int count;
};

template <typename T>
struct Store;

// ---- fp32 ---------------------------------------------------------------------------------------

template <>
struct Store<float> {
    typedef float Query;  // queries as the score kernel reads them: [m][head_dim]
    typedef float Weight;
    static int64_t query_len(int64_t dim) { return dim; }
    static int64_t weight_len(int64_t keys) { return keys; }
    static void prepare_query(const float* q, float* out, int64_t dim) {
        std::memcpy(out, q, dim * sizeof(float));
    }
    static void write_key(float* k_base, const float* k, int64_t t, int64_t dim, int64_t block) {
        for (int64_t d = 0; d < dim; d++) k_base[d * block + t] = k[d];
    }
    static void write_value(float* v_base, const float* v, int64_t t, int64_t dim) {
        std::memcpy(v_base + t * dim, v, dim * sizeof(float));
    }
    static const float* keys(const float* k_base, int64_t t) { return k_base + t; }
    static const float* values(const float* v_base, int64_t t, int64_t dim) { return v_base + t * dim; }

    // Keys and values are equally many lines: while one streams through, the other is fetched.
    static const float* line_of_keys(const float* k, int64_t row, int64_t block) { return k + row * block; }
    static const float* line_of_values(const float* v, int64_t row) { return v + row * SUB; }

    template <int M, int J, bool AHEAD>
    static void scores(const float* q, int64_t ldq, const float* const* k, const float* const* v,
                       int64_t dim, int64_t block, float* s) {
        constexpr int V = J * PARTS;
        vf acc[M][V] = {};
        for (int64_t d = 0; d < dim; d++) {
            vf key[V];
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) key[j] = load(k[j / PARTS] + j % PARTS * W + d * block);
            if (AHEAD)
#pragma GCC unroll 8
                for (int j = 0; j < J; j++) __builtin_prefetch(line_of_values(v[j], d), 0, 2);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const float x = q[m * ldq + d];
#pragma GCC unroll 16
                for (int j = 0; j < V; j++) acc[m][j] += x * key[j];
            }
        }
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) store(s + m * CHUNK * SUB + j * W, acc[m][j]);
    }
    static void prepare_weights(const float*, float*, int64_t, int) {}
    static const float* weights(const float* p, const float*) { return p; }

    template <int M, int D, bool AHEAD>
    static void mix(const float* p, int64_t ldp, const float* const* v, const float* const* next,
                    int num_keys, int64_t d, int64_t dim, int64_t block, float* o) {
        constexpr int V = D * PARTS;
        vf acc[M][V];
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) acc[m][j] = load(o + m * dim + d + j * W);
        for (int t = 0; t < num_keys; t++) {
            const float* row = v[t / SUB] + (t % SUB) * dim + d;
            vf value[V];
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) value[j] = load(row + j * W);
            if (AHEAD)
#pragma GCC unroll 8
                for (int j = 0; j < D; j++)
                    __builtin_prefetch(line_of_keys(next[t / SUB], d + j * SUB + t % SUB, block), 0, 2);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const float x = p[m * ldp + t];
#pragma GCC unroll 16
                for (int j = 0; j < V; j++) acc[m][j] += x * value[j];
            }
        }
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) store(o + m * dim + d + j * W, acc[m][j]);
    }
};

// ---- bf16 ---------------------------------------------------------------------------------------

template <>
struct Store<uint16_t> {
#if defined(BF16_DOT)
    typedef uint32_t Query;   // bf16 pairs: [m][head_dim / 2]
    typedef uint32_t Weight;  // bf16 pairs of probabilities: [m][keys / 2]
    static int64_t query_len(int64_t dim) { return dim / 2; }
    static int64_t weight_len(int64_t keys) { return keys / 2; }
    static void prepare_query(const uint16_t* q, uint32_t* out, int64_t dim) {
        std::memcpy(out, q, dim * 2);
    }
#else
    typedef float Query;
    typedef float Weight;
    static int64_t query_len(int64_t dim) { return dim; }
    static int64_t weight_len(int64_t keys) { return keys; }
    static void prepare_query(const uint16_t* q, float* out, int64_t dim) {
        for (int64_t d = 0; d < dim; d++) out[d] = bf16_to_float(q[d]);
    }
#endif
    static void write_key(uint16_t* k_base, const uint16_t* k, int64_t t, int64_t dim, int64_t block) {
        for (int64_t d = 0; d < dim; d++) k_base[((d / 2) * block + t) * 2 + d % 2] = k[d];
    }
    static void write_value(uint16_t* v_base, const uint16_t* v, int64_t t, int64_t dim) {
        uint16_t* row = v_base + (t / 2) * dim * 2 + t % 2;
        for (int64_t d = 0; d < dim; d++) row[d * 2] = v[d];
    }
    static const uint16_t* keys(const uint16_t* k_base, int64_t t) { return k_base + t * 2; }
    static const uint16_t* values(const uint16_t* v_base, int64_t t, int64_t dim) {
        return v_base + t * dim;  // t is a multiple of SUB
    }

    static const uint16_t* line_of_keys(const uint16_t* k, int64_t row, int64_t block) {
        return k + row * block * 2;
    }
    static const uint16_t* line_of_values(const uint16_t* v, int64_t row) { return v + row * SUB * 2; }

    template <int M, int J, bool AHEAD>
    static void scores(const Query* q, int64_t ldq, const uint16_t* const* k, const uint16_t* const* v,
                       int64_t dim, int64_t block, float* s) {
        constexpr int V = J * PARTS;
        vf acc[M][V] = {};
        for (int64_t d = 0; d < dim / 2; d++) {
#if defined(NARROW)
            if (AHEAD)
#pragma GCC unroll 8
                for (int j = 0; j < J; j++) __builtin_prefetch(line_of_values(v[j], d), 0, 2);
            const auto keys = [&](int j) { return k[j / PARTS] + (j % PARTS * W + d * block) * 2; };
            add_pairs(acc, keys, [&](int m) { return q + m * ldq + query_len(2 * d); });
#else
            vu pair[V];
#pragma GCC unroll 16
            for (int j = 0; j < V; j++)
                pair[j] = load_u32(k[j / PARTS] + (j % PARTS * W + d * block) * 2);
            if (AHEAD)
#pragma GCC unroll 8
                for (int j = 0; j < J; j++) __builtin_prefetch(line_of_values(v[j], d), 0, 2);
#if defined(BF16_DOT)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const uint32_t x = q[m * ldq + d];
#pragma GCC unroll 16
                for (int j = 0; j < V; j++) acc[m][j] = dot(acc[m][j], pair[j], x);
            }
#else
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) {
                const vf even = low_half(pair[j]), odd = high_half(pair[j]);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    acc[m][j] += q[m * ldq + 2 * d] * even;
                    acc[m][j] += q[m * ldq + 2 * d + 1] * odd;
                }
            }
#endif
#endif
        }
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) store(s + m * CHUNK * SUB + j * W, acc[m][j]);
    }

#if defined(BF16_DOT)
    static void prepare_weights(const float* p, uint32_t* out, int64_t stride, int num_queries) {
        for (int m = 0; m < num_queries; m++)
            for (int64_t t = 0; t < stride; t += W)
                store_as(reinterpret_cast<uint16_t*>(out + m * stride / 2) + t, load(p + m * stride + t));
    }
    static const uint32_t* weights(const float*, const uint32_t* prepared) { return prepared; }
#else
    static void prepare_weights(const float*, float*, int64_t, int) {}
    static const float* weights(const float* p, const float*) { return p; }
#endif

    template <int M, int D, bool AHEAD>
    static void mix(const Weight* p, int64_t ldp, const uint16_t* const* v,
                    const uint16_t* const* next, int num_keys, int64_t d, int64_t dim, int64_t block,
                    float* o) {
        constexpr int V = D * PARTS;
        vf acc[M][V];
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) acc[m][j] = load(o + m * dim + d + j * W);
#if defined(NARROW)
        const uint16_t* row;
        const auto pairs = [&](int j) { return row + j * W * 2; };
        int t = 0;
        const auto weights_of = [&](int m) { return p + m * weight_len(ldp) + weight_len(t); };
        for (; t + 1 < num_keys; t += 2) {
            row = v[t / SUB] + ((t % SUB) / 2 * dim + d) * 2;
            if (AHEAD)
#pragma GCC unroll 8
                for (int j = 0; j < D; j++)
                    __builtin_prefetch(
                        line_of_keys(next[t / SUB], (d / SUB + j) * (SUB / 2) + (t % SUB) / 2, block), 0,
                        2);
            add_pairs(acc, pairs, weights_of);
        }
        if (t < num_keys) {  // the slot behind the last key holds anything
            row = v[t / SUB] + ((t % SUB) / 2 * dim + d) * 2;
            add_pairs<M, V, true>(acc, pairs, weights_of);
        }
#else
        for (int t = 0; t < num_keys; t += 2) {
            const uint16_t* row = v[t / SUB] + ((t % SUB) / 2 * dim + d) * 2;
            vu pair[V];
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) pair[j] = load_u32(row + j * W * 2);
            if (AHEAD)
#pragma GCC unroll 8
                for (int j = 0; j < D; j++)
                    __builtin_prefetch(
                        line_of_keys(next[t / SUB], (d / SUB + j) * (SUB / 2) + (t % SUB) / 2, block), 0,
                        2);
            if (t + 1 == num_keys)  // the slot behind the last key holds anything
                for (int j = 0; j < V; j++) pair[j] &= 0xffffu;
#if defined(BF16_DOT)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const uint32_t x = p[m * (ldp / 2) + t / 2];
#pragma GCC unroll 16
                for (int j = 0; j < V; j++) acc[m][j] = dot(acc[m][j], pair[j], x);
            }
#else
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) {
                const vf first = low_half(pair[j]), second = high_half(pair[j]);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    acc[m][j] += p[m * ldp + t] * first;
                    acc[m][j] += p[m * ldp + t + 1] * second;
                }
            }
#endif
        }
#endif
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) store(o + m * dim + d + j * W, acc[m][j]);
    }
};

template <typename T, int M, bool AHEAD>
void scores_tile(const typename Store<T>::Query* q, int64_t ldq, const T* const* k, const T* const* v,
                 int num_sub, int64_t dim, int64_t block, float* s) {
    constexpr int J = wide(M);
    int j = 0;
    for (; j + J <= num_sub; j += J)
        Store<T>::template scores<M, J, AHEAD>(q, ldq, k + j, v + j, dim, block, s + j * SUB);
    for (; j < num_sub; j++)
        Store<T>::template scores<M, 1, AHEAD>(q, ldq, k + j, v + j, dim, block, s + j * SUB);
}

template <typename T, int M, bool AHEAD>
void mix_tile(const typename Store<T>::Weight* p, int64_t ldp, const T* const* v, const T* const* next,
              int num_keys, int64_t dim, int64_t block, float* o) {
    constexpr int D = wide(M);
    int64_t d = 0;
    for (; d + D * SUB <= dim; d += D * SUB)
        Store<T>::template mix<M, D, AHEAD>(p, ldp, v, next, num_keys, d, dim, block, o);
    for (; d < dim; d += SUB)
        Store<T>::template mix<M, 1, AHEAD>(p, ldp, v, next, num_keys, d, dim, block, o);
}

// Calls a register-tile function for all queries: full tiles, then the rest.
#define FOR_TILES(num, CALL)                                  \
    {                                                         \
        int m = 0;                                            \
        for (; m + REGISTERS <= (num); m += REGISTERS) CALL(REGISTERS) \
        switch ((num) - m) {                                  \
            case 1: CALL(1) break;                            \
            case 2: CALL(2) break;                            \
            case 3: CALL(3) break;                            \
            case 4: CALL(4) break;                            \
            case 5: CALL(5) break;                            \
        }                                                     \
    }

template <typename T>
struct Scratch {
    std::vector<typename Store<T>::Query> q;
    std::vector<typename Store<T>::Weight> w;
    std::vector<float> s, o;
    void fit(int64_t dim) {
        if (int64_t(o.size()) >= TILE * dim) return;
        q.resize(TILE * dim);
        w.resize(TILE * CHUNK * SUB);
        s.resize(TILE * CHUNK * SUB);
        o.resize(TILE * dim);
    }
};

template <typename T>
void run_item(const Args& a, const Item& item, Scratch<T>& scratch, float* partial) {
    const int64_t dim = a.head_dim, block = a.block;
    const int row_first = a.query_start[item.row];
    const int query_len = a.query_start[item.row + 1] - row_first;
    const int position0 = a.seq_lens[item.row] - query_len + item.first_query;
    const int num = item.num_queries * item.num_heads;
    const int64_t group = a.num_heads / a.num_kv_heads;
    const int64_t head0 = item.kv_head * group + item.first_head;
    const int64_t ldq = Store<T>::query_len(dim);
    const T* q = static_cast<const T*>(a.q);
    for (int i = 0; i < item.num_queries; i++)
        for (int h = 0; h < item.num_heads; h++)
            Store<T>::prepare_query(
                q + (row_first + item.first_query + i) * a.q_token + (head0 + h) * a.q_head,
                scratch.q.data() + (i * item.num_heads + h) * ldq, dim);

    float max[TILE], sum[TILE];
    std::fill(max, max + num, NEG_INF);
    std::fill(sum, sum + num, 0.0f);
    float* o = scratch.o.data();
    std::fill(o, o + num * dim, 0.0f);
    float* s = scratch.s.data();
    const int32_t* table = a.block_tables + item.row * a.max_blocks;
    const int64_t half = a.num_kv_heads * dim * block;  // keys of all heads, then values
    const T* pool = static_cast<const T*>(a.pool);
    const int stride = CHUNK * SUB;
    const int last_position = position0 + item.num_queries - 1;

    // Keys before every window of the tile are not read at all.
    int first_key = item.first_key;
    if (a.window > 0) first_key = std::max(first_key, int(position0 - a.window + 1));
    first_key = first_key / SUB * SUB;
    const int end_key = std::min(item.last_key, last_position + 1);
    for (int key0 = first_key; key0 < end_key; key0 += stride) {
        const int num_keys = std::min(stride, end_key - key0);
        const int num_sub = (num_keys + SUB - 1) / SUB;
        const T* keys[CHUNK];
        const T* values[CHUNK];
        for (int j = 0; j < num_sub; j++) {
            const int64_t token = key0 + j * SUB;
            const T* base = pool + table[token / block] * 2 * half + item.kv_head * dim * block;
            keys[j] = Store<T>::keys(base, token % block);
            values[j] = Store<T>::values(base + half, token % block, dim);
        }
#define CALL(M)                                                                             \
    (m == 0 ? scores_tile<T, M, true> : scores_tile<T, M, false>)(                          \
        scratch.q.data() + m * ldq, ldq, keys, values, num_sub, dim, block, s + m * stride);
        FOR_TILES(num, CALL)
#undef CALL
        const bool masked = key0 + num_keys - 1 > position0 || num_keys % SUB != 0 ||
                            (a.window > 0 && key0 < last_position - a.window + 1);
        for (int m = 0; m < num; m++) {
            float* row = s + m * stride;
            const int position = position0 + m / item.num_heads;
            vf top = splat(NEG_INF);
            for (int j = 0; j < num_sub * PARTS; j++) {
                vf x = load(row + j * W) * a.scale;
                if (a.softcap > 0) {  // c * tanh(x / c)
                    vf y = x * (2.0f / a.softcap);
                    y = y > 40.0f ? splat(40.0f) : y;
                    y = y < -40.0f ? splat(-40.0f) : y;
                    x = a.softcap - 2.0f * a.softcap / (vexp(y) + 1.0f);
                }
                if (masked) {
                    vi key = lanes() + (key0 + j * W);
                    vi hidden = (key > position) | (key >= key0 + num_keys);
                    if (a.window > 0) hidden |= (key <= int(position - a.window));
                    hidden |= (key < item.first_key);
                    x = hidden ? splat(NEG_INF) : x;
                }
                store(row + j * W, x);
                top = x > top ? x : top;
            }
            const float highest = std::max(max[m], highest_of(top));
            if (highest == NEG_INF) {  // nothing of this chunk is visible to this query
                std::fill(row, row + num_sub * SUB, 0.0f);
                continue;
            }
            const float keep = max[m] == NEG_INF ? 0.0f : std::exp(max[m] - highest);
            vf total = {};
            for (int j = 0; j < num_sub * PARTS; j++) {
                vf e = weight_of<T>(load(row + j * W), highest);
                store(row + j * W, e);
                total += e;
            }
            sum[m] = sum[m] * keep + sum_of(total);
            max[m] = highest;
            if (keep != 1.0f)
                for (int64_t d = 0; d < dim; d += W) store(o + m * dim + d, load(o + m * dim + d) * keep);
        }
        Store<T>::prepare_weights(s, scratch.w.data(), stride, num);
        auto weights = Store<T>::weights(s, scratch.w.data());
        const int64_t ldw = Store<T>::weight_len(stride);
        const T* next[CHUNK];  // keys of the next chunk, where there is one
        for (int j = 0; j < num_sub; j++) {
            const int64_t token = key0 + stride + j * SUB;
            next[j] = token < end_key ? Store<T>::keys(pool + table[token / block] * 2 * half +
                                                           item.kv_head * dim * block,
                                                       token % block)
                                      : keys[j];
        }
#define CALL(M)                                                                             \
    (m == 0 ? mix_tile<T, M, true> : mix_tile<T, M, false>)(                                \
        weights + m * ldw, stride, values, next, num_keys, dim, block, o + m * dim);
        FOR_TILES(num, CALL)
#undef CALL
    }

    if (partial) {  // [num][dim] sums, then maxima, then denominators
        std::memcpy(partial, o, num * dim * sizeof(float));
        std::memcpy(partial + TILE * dim, max, num * sizeof(float));
        std::memcpy(partial + TILE * dim + TILE, sum, num * sizeof(float));
        return;
    }
    T* out = static_cast<T*>(a.out);
    for (int m = 0; m < num; m++) {
        const int64_t head = head0 + m % item.num_heads;
        const int64_t token = row_first + item.first_query + m / item.num_heads;
        float divisor = sum[m];
        if (a.sinks) divisor += std::exp(a.sinks[head] - max[m]);
        const float scale = divisor > 0 ? 1.0f / divisor : 0.0f;
        T* target = out + (token * a.num_heads + head) * dim;
        for (int64_t d = 0; d < dim; d++) from_float(target + d, o[m * dim + d] * scale);
    }
}

template <typename T>
void merge(const Args& a, const Item& item, const float* parts, int count) {
    const int64_t dim = a.head_dim, size = TILE * (dim + 2);
    const int64_t group = a.num_heads / a.num_kv_heads;
    const int64_t head0 = item.kv_head * group + item.first_head;
    const int num = item.num_queries * item.num_heads;
    T* out = static_cast<T*>(a.out);
    std::vector<float> total(dim);
    for (int m = 0; m < num; m++) {
        float highest = NEG_INF;
        for (int i = 0; i < count; i++) highest = std::max(highest, parts[i * size + TILE * dim + m]);
        std::fill(total.begin(), total.end(), 0.0f);
        const int64_t head = head0 + m % item.num_heads;
        float divisor = a.sinks ? std::exp(a.sinks[head] - highest) : 0.0f;
        for (int i = 0; i < count; i++) {
            const float* part = parts + i * size;
            const float top = part[TILE * dim + m];
            if (top == NEG_INF) continue;
            const float weight = std::exp(top - highest);
            divisor += weight * part[TILE * dim + TILE + m];
            for (int64_t d = 0; d < dim; d++) total[d] += weight * part[m * dim + d];
        }
        const int64_t token = a.query_start[item.row] + item.first_query + m / item.num_heads;
        const float scale = divisor > 0 ? 1.0f / divisor : 0.0f;
        T* target = out + (token * a.num_heads + head) * dim;
        for (int64_t d = 0; d < dim; d++) from_float(target + d, total[d] * scale);
    }
}

template <typename T>
void attend(const Args& a) {
    const int64_t dim = a.head_dim, block = a.block;
    const int64_t half = a.num_kv_heads * dim * block;
    const int64_t group = a.num_heads / a.num_kv_heads;
    T* pool = static_cast<T*>(a.pool);
    const T* k = static_cast<const T*>(a.k);
    const T* v = static_cast<const T*>(a.v);

    std::vector<Item> items;
    std::vector<Span> spans;
    int num_parts = 0;
    for (int row = 0; row < a.num_rows; row++) {
        const int query_len = a.query_start[row + 1] - a.query_start[row];
        const int seq_len = a.seq_lens[row];
        const int heads = int(std::min<int64_t>(group, TILE));
        const int tokens = std::max(1, TILE / heads);
        const bool cut = query_len <= SHORT_ROW && seq_len > SPLIT;
        for (int first = 0; first < query_len; first += tokens)
            for (int h = 0; h < group; h += heads)
                for (int head = 0; head < a.num_kv_heads; head++) {
                    Item item = {row, head, first, std::min(tokens, query_len - first),
                                 h, int(std::min<int64_t>(heads, group - h)), 0, seq_len, -1};
                    if (!cut) {
                        items.push_back(item);
                        continue;
                    }
                    const int count = (seq_len + SPLIT - 1) / SPLIT;
                    spans.push_back({int(items.size()), count});
                    for (int i = 0; i < count; i++) {
                        item.first_key = i * SPLIT;
                        item.last_key = std::min(seq_len, (i + 1) * SPLIT);
                        item.part = num_parts++;
                        items.push_back(item);
                    }
                }
    }
    const int64_t part_size = TILE * (dim + 2);
    std::vector<float> parts(num_parts * part_size);
    const int num_items = int(items.size()), num_spans = int(spans.size());

    const auto write = [&](int64_t token) {
        const int64_t slot = a.slot_mapping[token];
        if (slot < 0) return;
        T* base = pool + slot / block * 2 * half;
        for (int64_t head = 0; head < a.num_kv_heads; head++) {
            T* own = base + head * dim * block;
            Store<T>::write_key(own, k + token * a.k_token + head * a.k_head, slot % block, dim, block);
            Store<T>::write_value(own + half, v + token * a.v_token + head * a.v_head, slot % block, dim);
        }
    };
    const int64_t writers = a.num_tokens * a.num_kv_heads * dim <= 1 << 14 ? 1 : a.threads;
    const int64_t share = writers == 1 ? a.num_tokens : 16;  // tokens written in one go
    halyard::parallel((a.num_tokens + share - 1) / share, writers, [&](int64_t i) {
        const int64_t last = std::min(a.num_tokens, (i + 1) * share);
        for (int64_t token = i * share; token < last; token++) write(token);
    });
    halyard::parallel(num_items, a.threads, [&](int64_t i) {
        static thread_local Scratch<T> scratch;
        scratch.fit(dim);
        const Item& item = items[i];
        run_item<T>(a, item, scratch, item.part < 0 ? nullptr : parts.data() + item.part * part_size);
    });
    halyard::parallel(num_spans, a.threads, [&](int64_t i) {
        const Item& first = items[spans[i].item];
        merge<T>(a, first, parts.data() + first.part * part_size, spans[i].count);
    });
}

}  // namespace

extern "C" {

void halyard_attend_float32(const Args* args) { attend<float>(*args); }
void halyard_attend_bfloat16(const Args* args) { attend<uint16_t>(*args); }
int halyard_args_size() { return int(sizeof(Args)); }

// Whole blocks, all layers: data is [layers][blocks][bytes]; moves are (source, target) pairs.
void halyard_move_blocks(const char* source, char* target, int64_t layers, int64_t source_blocks,
                         int64_t target_blocks, int64_t bytes, const int64_t* moves, int64_t num_moves,
                         int64_t threads) {
    halyard::parallel(layers, layers * num_moves * bytes > (1 << 20) ? threads : 1, [&](int64_t layer) {
        for (int64_t move = 0; move < num_moves; move++)
            std::memcpy(target + (layer * target_blocks + moves[2 * move + 1]) * bytes,
                        source + (layer * source_blocks + moves[2 * move]) * bytes, bytes);
    });
}
}
