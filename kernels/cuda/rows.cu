// Steps over rows of activations: norms, rotation and KV write, gates, biases.

/// `residual[r] += delta[r]` (if there is a delta), then `out[i] = rms_norm(residual[r]) * weight`.
/// `r = rows[i]`, or `i` without a list. One block a row.
template <class T>
__device__ void add_rms_norm(float* residual, const float* delta, const float* weight,
                             const u32* rows, T* out, u32 width, float eps) {
    __shared__ float partial[32];
    u64 row = rows ? rows[blockIdx.x] : blockIdx.x;
    float* x = residual + row * width;
    float sum = 0.f;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        float v = x[i];
        if (delta) {
            v += delta[row * width + i];
            x[i] = v;
        }
        sum = fmaf(v, v, sum);
    }
    float scale = 1.f / sqrtf(block_sum(sum, partial) / (float)width + eps);
    T* to = out + (u64)blockIdx.x * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) store(to + i, x[i] * scale * weight[i]);
}

KERNEL(256, add_rms_norm_f32, float* residual, const float* delta, const float* weight,
       const u32* rows, float* out, u32 width, float eps) {
    add_rms_norm(residual, delta, weight, rows, out, width, eps);
}
KERNEL(256, add_rms_norm_bf16, float* residual, const float* delta, const float* weight,
       const u32* rows, bf16* out, u32 width, float eps) {
    add_rms_norm(residual, delta, weight, rows, out, width, eps);
}

/// `x[r][i] += bias[i]`, in place.
KERNEL(256, add_bias, float* x, const float* bias, u32 width, u64 count) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] += bias[i % width];
}

/// `x = cap * tanh(x / cap)`, in place.
KERNEL(256, softcap, float* x, float cap, u64 count) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] = cap * tanhf(x[i] / cap);
}

/// Cosines, then sines, of each row's position: `table[row][2 * half]`. The angle is the
/// single-precision product, as in Hugging Face transformers.
KERNEL(128, rope_table, const u32* positions, const float* inverse_frequencies, float* table,
       u32 half) {
    float* row = table + (u64)blockIdx.x * 2 * half;
    for (u32 i = threadIdx.x; i < half; i += blockDim.x) {
        double angle = (double)((float)positions[blockIdx.x] * inverse_frequencies[i]);
        row[i] = (float)cos(angle);
        row[half + i] = (float)sin(angle);
    }
}


/// One element of a projection's row with its bias.
__device__ __forceinline__ float biased(const float* x, const float* bias, u32 i) {
    return bias ? x[i] + bias[i] : x[i];
}

/// One block a row, one warp a head: bias, norm per head (if there are weights), rotation in
/// rotate-half order; queries to `q[row][heads * head_dim]`, keys and values to the row's slot.
template <class T>
__device__ void rope_write(const float* qkv, const float* bias, const float* q_norm,
                           const float* k_norm, const float* table, const u32* positions,
                           const u32* row_tables, const u32* tables, T* q, T* pool, KvLayout kv,
                           u32 heads, u32 table_stride, float eps) {
    u32 row = blockIdx.x, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    u32 dim = kv.head_dim, half = dim / 2, position = positions[row];
    u32 page = tables[(u64)row_tables[row] * table_stride + position / kv.page_size];
    u32 slot = position % kv.page_size;
    const float* angles = table + (u64)row * 2 * half;
    const float* x = qkv + (u64)row * (heads + 2 * kv.kv_heads) * dim;
    for (u32 head = threadIdx.x / 32; head < heads + 2 * kv.kv_heads; head += warps) {
        u32 first = head * dim;
        if (head >= heads + kv.kv_heads) {
            T* to = pool + kv.at(page, 1, head - heads - kv.kv_heads, slot);
            for (u32 i = lane; i < dim; i += 32) store(to + i, biased(x, bias, first + i));
            continue;
        }
        const float* norm = head < heads ? q_norm : k_norm;
        float scale = 1.f;
        if (norm) {
            float sum = 0.f;
            for (u32 i = lane; i < dim; i += 32) {
                float v = biased(x, bias, first + i);
                sum = fmaf(v, v, sum);
            }
            scale = 1.f / sqrtf(warp_sum(sum) / (float)dim + eps);
        }
        T* to = head < heads ? q + (u64)row * heads * dim + first
                             : pool + kv.at(page, 0, head - heads, slot);
        for (u32 i = lane; i < half; i += 32) {
            float a = biased(x, bias, first + i), b = biased(x, bias, first + half + i);
            if (norm) {
                a = a * scale * norm[i];
                b = b * scale * norm[half + i];
            }
            store(to + i, a * angles[i] - b * angles[half + i]);
            store(to + half + i, b * angles[i] + a * angles[half + i]);
        }
    }
}

#define ROPE_WRITE(T)                                                                              \
    KERNEL(128, rope_write_##T, const float* qkv, const float* bias, const float* q_norm,          \
           const float* k_norm, const float* table, const u32* positions, const u32* row_tables,   \
           const u32* tables, T* q, T* pool, KvLayout kv, u32 heads, u32 table_stride,             \
           float eps) {                                                                            \
        rope_write<T>(qkv, bias, q_norm, k_norm, table, positions, row_tables, tables, q, pool,    \
                      kv, heads, table_stride, eps);                                               \
    }
ROPE_WRITE(float)
ROPE_WRITE(bf16)

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }
__device__ __forceinline__ float gelu_tanh(float x) {
    float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.f + tanhf(inner));
}

/// `out[r][i] = act(x[r][i]) * x[r][width + i]`: the gate and the up projection lie side by side.
#define GATED(name, act, T)                                                                        \
    KERNEL(256, name, const float* x, const float* bias, T* out, u32 width, u64 count) {           \
        u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;                                        \
        if (i >= count) return;                                                                    \
        u32 column = (u32)(i % width);                                                             \
        const float* row = x + i / width * 2 * width;                                              \
        store(out + i, act(biased(row, bias, column)) * biased(row, bias, width + column));        \
    }
GATED(silu_mul_f32, silu, float)
GATED(silu_mul_bf16, silu, bf16)
GATED(gelu_tanh_mul_f32, gelu_tanh, float)
GATED(gelu_tanh_mul_bf16, gelu_tanh, bf16)
