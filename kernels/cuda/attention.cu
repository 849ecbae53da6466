// Causal attention over paged keys and values, grouped queries.

/// What both kernels are told. A window or cap of 0 is none.
struct AttentionArgs {
    u32 heads, table_stride, window;
    float scale, cap;
};

__device__ __forceinline__ float capped(float x, const AttentionArgs& a) {
    x *= a.scale;
    return a.cap > 0.f ? a.cap * tanhf(x / a.cap) : x;
}

/// Positions whose keys one block reduces. Splits lie at fixed positions, so a row's result depends
/// on neither the batch nor the number of splits in the grid.
const u32 SPLIT = 128;
/// Query heads of a group that a block works on together.
const u32 GROUP = 8;

/// One split of one row: block `(split, kv_head * chunk, item)`, 128 threads. `part` gets the
/// unnormalised sum of values `[item][head][splits][head_dim]`, `stats` the maximum and the sum of
/// weights `[item][head][splits][2]`.
template <class T>
__device__ void attend_split(const T* q, const T* pool, KvLayout kv, AttentionArgs a,
                             const u32* items, const u32* positions, const u32* row_tables,
                             const u32* tables, float* part, float* stats) {
    __shared__ float queries[GROUP][256];
    __shared__ float scores[GROUP][SPLIT];
    __shared__ float sums[GROUP * 512];
    u32 row = items ? items[blockIdx.z] : blockIdx.z, position = positions[row];
    u32 base = blockIdx.x * SPLIT;
    if (base > position) return;
    u32 group = a.heads / kv.kv_heads, chunks = (group + GROUP - 1) / GROUP;
    u32 kv_head = blockIdx.y / chunks, skip = blockIdx.y % chunks * GROUP;
    u32 head = kv_head * group + skip, heads = group - skip < GROUP ? group - skip : GROUP;
    u32 dim = kv.head_dim, t = threadIdx.x, lane = t % 32, warp = t / 32;
    u32 keys = position + 1 - base < SPLIT ? position + 1 - base : SPLIT;
    u32 from = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
    u32 hidden = from > base ? (from - base < keys ? from - base : keys) : 0;
    const u32* table = tables + (u64)row_tables[row] * a.table_stride;

    for (u32 i = t; i < heads * dim; i += 128) {
        queries[i / dim][i % dim] = to_float(q[((u64)row * a.heads + head) * dim + i]);
    }
    __syncthreads();
    // Eight lanes a key, four keys a warp.
    u32 sub = lane % 8;
    for (u32 key0 = warp * 4; key0 < SPLIT; key0 += 16) {
        u32 key = key0 + lane / 8;
        bool seen = key >= hidden && key < keys;
        float dot[GROUP];
        for (u32 g = 0; g < GROUP; g++) dot[g] = 0.f;
        if (seen) {
            u32 p = base + key;
            const T* k = pool + kv.at(table[p / kv.page_size], 0, kv_head, p % kv.page_size);
            for (u32 d = sub * 4; d < dim; d += 32) {
                float v[4];
                load_four(k + d, v);
#pragma unroll
                for (u32 g = 0; g < GROUP; g++) {
                    if (g >= heads) break;
                    for (int i = 0; i < 4; i++) dot[g] = fmaf(v[i], queries[g][d + i], dot[g]);
                }
            }
        }
#pragma unroll
        for (u32 g = 0; g < GROUP; g++) {
            float sum = dot[g];
            for (int d = 4; d > 0; d >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, d);
            if (sub == 0 && g < heads) scores[g][key] = seen ? capped(sum, a) : minus_infinity();
        }
    }
    __syncthreads();
    for (u32 g = warp; g < heads; g += 4) {
        float max = minus_infinity();
        for (u32 i = lane; i < SPLIT; i += 32) max = fmaxf(max, scores[g][i]);
        max = warp_max(max);
        float sum = 0.f;
        for (u32 i = lane; i < SPLIT; i += 32) {
            float s = scores[g][i];
            float w = s == minus_infinity() ? 0.f : expf(s - max);
            scores[g][i] = w;
            sum += w;
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            u64 at = ((u64)blockIdx.z * a.heads + head + g) * gridDim.x + blockIdx.x;
            stats[2 * at] = max;
            stats[2 * at + 1] = sum;
        }
    }
    __syncthreads();
    // Four dimensions a thread; what threads are left take other keys.
    u32 quads = dim / 4, lines = 128 / quads, line = t / quads, d = t % quads * 4;
    if (line < lines) {
        float sum[GROUP][4];
        for (u32 g = 0; g < GROUP; g++) {
            for (int i = 0; i < 4; i++) sum[g][i] = 0.f;
        }
        for (u32 key = hidden + line; key < keys; key += lines) {
            u32 p = base + key;
            float v[4];
            load_four(pool + kv.at(table[p / kv.page_size], 1, kv_head, p % kv.page_size) + d, v);
#pragma unroll
            for (u32 g = 0; g < GROUP; g++) {
                if (g >= heads) break;
                for (int i = 0; i < 4; i++) sum[g][i] = fmaf(scores[g][key], v[i], sum[g][i]);
            }
        }
#pragma unroll
        for (u32 g = 0; g < GROUP; g++) {
            for (int i = 0; i < 4; i++) sums[(line * GROUP + g) * dim + d + i] = sum[g][i];
        }
    }
    __syncthreads();
    for (u32 i = t; i < heads * dim; i += 128) {
        u32 g = i / dim;
        float sum = 0.f;
        for (u32 l = 0; l < lines; l++) sum += sums[(l * GROUP + g) * dim + i % dim];
        u64 at = ((u64)blockIdx.z * a.heads + head + g) * gridDim.x + blockIdx.x;
        part[at * dim + i % dim] = sum;
    }
}

/// Joins a row's splits in ascending order: block `(head, item)`.
template <class T>
__device__ void join_splits(const float* part, const float* stats, const u32* items,
                            const u32* positions, T* out, u32 splits, u32 dim) {
    u32 row = items ? items[blockIdx.y] : blockIdx.y, used = positions[row] / SPLIT + 1;
    u64 at = ((u64)blockIdx.y * gridDim.x + blockIdx.x) * splits;
    float max = minus_infinity();
    for (u32 s = 0; s < used; s++) max = fmaxf(max, stats[2 * (at + s)]);
    for (u32 d = threadIdx.x; d < dim; d += blockDim.x) {
        float sum = 0.f, weight = 0.f;
        for (u32 s = 0; s < used; s++) {
            float m = stats[2 * (at + s)];
            if (m == minus_infinity()) continue;
            float w = expf(m - max);
            weight = fmaf(w, stats[2 * (at + s) + 1], weight);
            sum = fmaf(w, part[(at + s) * dim + d], sum);
        }
        store(out + ((u64)row * gridDim.x + blockIdx.x) * dim + d, sum / weight);
    }
}

#define DECODE(T)                                                                                  \
    KERNEL(128, attend_split_##T, const T* q, const T* pool, KvLayout kv, AttentionArgs a,         \
           const u32* items, const u32* positions, const u32* row_tables, const u32* tables,       \
           float* part, float* stats) {                                                            \
        attend_split<T>(q, pool, kv, a, items, positions, row_tables, tables, part, stats);        \
    }                                                                                              \
    KERNEL(64, join_splits_##T, const float* part, const float* stats, const u32* items,           \
           const u32* positions, T* out, u32 splits, u32 dim) {                                    \
        join_splits<T>(part, stats, items, positions, out, splits, dim);                           \
    }
DECODE(float)
DECODE(bf16)

/// Rows of queries a block works on: 16 a warp.
const u32 QUERY_ROWS = 64;

/// Reads `rows` rows of `DIM` elements, `from(row)` or zeros where that is null, into shared memory
/// with a stride of `DIM + 8`, which spreads the rows of `ldmatrix` over all banks.
template <u32 DIM, class From>
__device__ __forceinline__ void fetch_rows(bf16* to, u32 rows, From from) {
    for (u32 i = threadIdx.x; i < rows * (DIM / 8); i += 128) {
        u32 row = i / (DIM / 8), column = i % (DIM / 8) * 8;
        const bf16* source = from(row);
        copy_async16(to + row * (DIM + 8) + column, source ? source + column : to, source != 0);
    }
}

/// Attention of new tokens on tensor cores (FlashAttention-2, arXiv 2307.08691), keys and values
/// rounded to bf16. Block `(tile, kv_head, sequence)`, 128 threads; a tile is 64 of the sequence's
/// `tokens * group` query rows, row `r` being head `r % group` of token `r / group`. Sequence `s`:
/// `seqs[4 * s ..]` is its first batch row, its new tokens, the first one's position, its table.
template <u32 DIM, u32 KEYS>
__device__ void extend(const bf16* q, const bf16* pool, KvLayout kv, AttentionArgs a,
                       const u32* seqs, const u32* tables, bf16* out) {
    DYNAMIC_SHARED(shared);
    const u32 STRIDE = DIM + 8;
    bf16* qs = (bf16*)shared;
    bf16* ks = qs + QUERY_ROWS * STRIDE;
    bf16* vs = ks + KEYS * STRIDE;
    const u32* seq = seqs + 4 * blockIdx.z;
    u32 row0 = seq[0], start = seq[2], group = a.heads / kv.kv_heads;
    u32 rows = seq[1] * group, first = blockIdx.x * QUERY_ROWS, kv_head = blockIdx.y;
    if (first >= rows) return;
    const u32* table = tables + (u64)seq[3] * a.table_stride;
    u32 last = (first + QUERY_ROWS < rows ? first + QUERY_ROWS : rows) - 1;
    u32 lowest = start + first / group, end = start + last / group + 1;
    u32 begin = a.window && lowest + 1 > a.window ? lowest + 1 - a.window : 0;
    begin = begin / KEYS * KEYS;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    auto query = [&](u32 r) -> const bf16* {
        if (first + r >= rows) return (const bf16*)0;
        u32 token = row0 + (first + r) / group, head = kv_head * group + (first + r) % group;
        return q + ((u64)token * a.heads + head) * DIM;
    };
    auto place = [&](u32 position, u32 values) -> const bf16* {
        if (position >= end) return (const bf16*)0;
        u32 page = table[position / kv.page_size];
        return pool + kv.at(page, values, kv_head, position % kv.page_size);
    };
    fetch_rows<DIM>(qs, QUERY_ROWS, query);
    fetch_rows<DIM>(ks, KEYS, [&](u32 r) { return place(begin + r, 0); });
    copy_async_commit();

    float sum[DIM / 8][4], max[2] = {minus_infinity(), minus_infinity()}, weight[2] = {0.f, 0.f};
#pragma unroll
    for (u32 i = 0; i < DIM / 8; i++) {
        for (int j = 0; j < 4; j++) sum[i][j] = 0.f;
    }
    u32 mine[2], positions[2];
    for (int j = 0; j < 2; j++) {
        mine[j] = first + warp * 16 + lane / 4 + 8 * j;
        positions[j] = start + mine[j] / group;
    }
    for (u32 base = begin; base < end; base += KEYS) {
        copy_async_wait<0>();
        __syncthreads();
        fetch_rows<DIM>(vs, KEYS, [&](u32 r) { return place(base + r, 1); });
        copy_async_commit();
        float score[KEYS / 8][4];
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; n++) {
            for (int j = 0; j < 4; j++) score[n][j] = 0.f;
        }
#pragma unroll
        for (u32 k = 0; k < DIM; k += 16) {
            u32 qa[4], kb[4];
            load_matrices(qa, qs + (warp * 16 + lane % 16) * STRIDE + k + lane / 16 * 8);
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n += 2) {
                u32 key = n * 8 + lane / 16 * 8 + lane % 8;
                load_matrices(kb, ks + key * STRIDE + k + lane / 8 % 2 * 8);
                mma_bf16(score[n], qa, kb[0], kb[1]);
                mma_bf16(score[n + 1], qa, kb[2], kb[3]);
            }
        }
        float best[2] = {max[0], max[1]};
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; n++) {
            for (int j = 0; j < 4; j++) {
                u32 key = base + n * 8 + lane % 4 * 2 + j % 2, position = positions[j / 2];
                bool seen = key <= position && (!a.window || key + a.window > position);
                score[n][j] = seen ? capped(score[n][j], a) : minus_infinity();
                best[j / 2] = fmaxf(best[j / 2], score[n][j]);
            }
        }
        float shift[2], rescale[2];
        for (int j = 0; j < 2; j++) {
            best[j] = fmaxf(best[j], __shfl_xor_sync(ALL_LANES, best[j], 1));
            best[j] = fmaxf(best[j], __shfl_xor_sync(ALL_LANES, best[j], 2));
            // A row that has seen no key yet keeps its sums of zero.
            shift[j] = best[j] == minus_infinity() ? 0.f : best[j] * 1.44269504f;
            rescale[j] = exp2_fast(fmaf(max[j], 1.44269504f, -shift[j]));
            max[j] = best[j];
            weight[j] *= rescale[j];
        }
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; n++) {
            for (int j = 0; j < 4; j++) {
                score[n][j] = exp2_fast(fmaf(score[n][j], 1.44269504f, -shift[j / 2]));
                weight[j / 2] += score[n][j];
            }
        }
#pragma unroll
        for (u32 i = 0; i < DIM / 8; i++) {
            for (int j = 0; j < 4; j++) sum[i][j] *= rescale[j / 2];
        }
        copy_async_wait<0>();
        __syncthreads();
        if (base + KEYS < end) {
            fetch_rows<DIM>(ks, KEYS, [&](u32 r) { return place(base + KEYS + r, 0); });
            copy_async_commit();
        }
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; n += 2) {
            u32 pa[4] = {pack_bf16(score[n][0], score[n][1]), pack_bf16(score[n][2], score[n][3]),
                         pack_bf16(score[n + 1][0], score[n + 1][1]),
                         pack_bf16(score[n + 1][2], score[n + 1][3])};
            u32 key = n * 8 + lane % 16, vb[4];
#pragma unroll
            for (u32 d = 0; d < DIM; d += 16) {
                load_matrices_transposed(vb, vs + key * STRIDE + d + lane / 16 * 8);
                mma_bf16(sum[d / 8], pa, vb[0], vb[1]);
                mma_bf16(sum[d / 8 + 1], pa, vb[2], vb[3]);
            }
        }
    }
    for (int j = 0; j < 2; j++) {
        weight[j] += __shfl_xor_sync(ALL_LANES, weight[j], 1);
        weight[j] += __shfl_xor_sync(ALL_LANES, weight[j], 2);
        if (mine[j] >= rows) continue;
        u32 token = row0 + mine[j] / group, head = kv_head * group + mine[j] % group;
        u32* to = (u32*)(out + ((u64)token * a.heads + head) * DIM);
        float scale = 1.f / weight[j];
#pragma unroll
        for (u32 i = 0; i < DIM / 8; i++) {
            to[i * 4 + lane % 4] = pack_bf16(sum[i][2 * j] * scale, sum[i][2 * j + 1] * scale);
        }
    }
}

#define EXTEND(DIM, KEYS)                                                                          \
    KERNEL(128, extend_##DIM, const bf16* q, const bf16* pool, KvLayout kv, AttentionArgs a,       \
           const u32* seqs, const u32* tables, bf16* out) {                                        \
        extend<DIM, KEYS>(q, pool, kv, a, seqs, tables, out);                                      \
    }
EXTEND(64, 64)
EXTEND(96, 64)
EXTEND(128, 64)
EXTEND(256, 32)
