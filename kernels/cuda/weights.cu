// Weights as they lie on the device, and the products that read them in place.
//
// A format says how eight weights of a row are found: group `g` of a row is two runs of four
// neighbours, beginning at columns `first(g)` and `second(g)`. Thirty-two lanes read neighbouring
// groups, so every load of a warp is one contiguous stretch. Block formats are cut into planes at
// upload (quants, then scales, `[rows][blocks]` each), so that loads are aligned; Q4_K's blocks of
// 144 bytes are aligned as they are.

/// The planes of a matrix; `blocks` of them a row.
struct Planes {
    const u8* data;
    u64 blocks_total;
    u32 cols;
};

struct FormatF32 {
    static const u32 BLOCK = 8;
    static __device__ __forceinline__ u32 first(u32 g) { return g * 8; }
    static __device__ __forceinline__ u32 second(u32 g) { return g * 8 + 4; }
    static __device__ __forceinline__ void load(const Planes& p, u64 row, u32 g, float (&w)[8]) {
        const float* at = (const float*)p.data + row * p.cols + g * 8;
        float half[4];
        load_four(at, half);
        for (int i = 0; i < 4; i++) w[i] = half[i];
        load_four(at + 4, half);
        for (int i = 0; i < 4; i++) w[4 + i] = half[i];
    }
};

struct FormatBF16 {
    static const u32 BLOCK = 8;
    static __device__ __forceinline__ u32 first(u32 g) { return g * 8; }
    static __device__ __forceinline__ u32 second(u32 g) { return g * 8 + 4; }
    static __device__ __forceinline__ void load(const Planes& p, u64 row, u32 g, float (&w)[8]) {
        uint4 v = load16(p.data + (row * p.cols + g * 8) * 2);
        u32 pairs[4] = {v.x, v.y, v.z, v.w};
        for (int i = 0; i < 4; i++) {
            w[2 * i] = low_bf16(pairs[i]);
            w[2 * i + 1] = high_bf16(pairs[i]);
        }
    }
};

__device__ __forceinline__ u32 byte_of(u32 word, int i) { return (word >> (8 * i)) & 255; }

/// Planes: 32 signed bytes; an f16 scale.
struct FormatQ8_0 {
    static const u32 BLOCK = 32;
    static __device__ __forceinline__ u32 first(u32 g) { return g * 8; }
    static __device__ __forceinline__ u32 second(u32 g) { return g * 8 + 4; }
    static __device__ __forceinline__ void load(const Planes& p, u64 row, u32 g, float (&w)[8]) {
        u64 block = row * (p.cols / 32) + g / 4;
        uint2 q = load8(p.data + block * 32 + g % 4 * 8);
        float d = half_to_float(*(const u16*)(p.data + p.blocks_total * 32 + block * 2));
        for (int i = 0; i < 4; i++) {
            w[i] = (float)(i8)byte_of(q.x, i) * d;
            w[4 + i] = (float)(i8)byte_of(q.y, i) * d;
        }
    }
};

/// Planes: 16 bytes of nibbles (byte `j` holds elements `j` and `j + 16`); an f16 scale.
struct FormatQ4_0 {
    static const u32 BLOCK = 32;
    static __device__ __forceinline__ u32 first(u32 g) { return g / 4 * 32 + g % 4 * 4; }
    static __device__ __forceinline__ u32 second(u32 g) { return first(g) + 16; }
    static __device__ __forceinline__ void load(const Planes& p, u64 row, u32 g, float (&w)[8]) {
        u64 block = row * (p.cols / 32) + g / 4;
        u32 q = load4(p.data + block * 16 + g % 4 * 4);
        float d = half_to_float(*(const u16*)(p.data + p.blocks_total * 16 + block * 2));
        for (int i = 0; i < 4; i++) {
            w[i] = (float)((int)(byte_of(q, i) & 15) - 8) * d;
            w[4 + i] = (float)((int)(byte_of(q, i) >> 4) - 8) * d;
        }
    }
};

/// Planes: 16 bytes of nibbles as above; an f16 scale and an f16 minimum.
struct FormatQ4_1 {
    static const u32 BLOCK = 32;
    static __device__ __forceinline__ u32 first(u32 g) { return g / 4 * 32 + g % 4 * 4; }
    static __device__ __forceinline__ u32 second(u32 g) { return first(g) + 16; }
    static __device__ __forceinline__ void load(const Planes& p, u64 row, u32 g, float (&w)[8]) {
        u64 block = row * (p.cols / 32) + g / 4;
        u32 q = load4(p.data + block * 16 + g % 4 * 4);
        u32 dm = load4(p.data + p.blocks_total * 16 + block * 4);
        float d = half_to_float((u16)dm), m = half_to_float((u16)(dm >> 16));
        for (int i = 0; i < 4; i++) {
            w[i] = fmaf((float)(byte_of(q, i) & 15), d, m);
            w[4 + i] = fmaf((float)(byte_of(q, i) >> 4), d, m);
        }
    }
};

/// The 6-bit scale and minimum of sub-block `j` from the 12 packed bytes of a Q4_K block.
__device__ __forceinline__ void scale_min(const u32 (&packed)[3], u32 j, float& s, float& m) {
    u32 low = byte_of(packed[0], j % 4), mid = byte_of(packed[1], j % 4);
    u32 high = byte_of(packed[2], j % 4);
    if (j < 4) {
        s = (float)(low & 63);
        m = (float)(mid & 63);
    } else {
        s = (float)((high & 15) | (low >> 6 << 4));
        m = (float)((high >> 4) | (mid >> 6 << 4));
    }
}

/// Blocks as ggml has them: f16 scale, f16 minimum, 12 bytes of scales, 128 of nibbles.
struct FormatQ4_K {
    static const u32 BLOCK = 256;
    static __device__ __forceinline__ u32 first(u32 g) {
        return g / 32 * 256 + g % 32 / 8 * 64 + g % 8 * 4;
    }
    static __device__ __forceinline__ u32 second(u32 g) { return first(g) + 32; }
    static __device__ __forceinline__ void load(const Planes& p, u64 row, u32 g, float (&w)[8]) {
        const u8* block = p.data + (row * (p.cols / 256) + g / 32) * 144;
        uint4 head = load16(block);
        u32 chunk = g % 32 / 8;
        u32 q = load4(block + 16 + chunk * 32 + g % 8 * 4);
        float d = half_to_float((u16)head.x), dmin = half_to_float((u16)(head.x >> 16));
        u32 packed[3] = {head.y, head.z, head.w};
        float s0, m0, s1, m1;
        scale_min(packed, 2 * chunk, s0, m0);
        scale_min(packed, 2 * chunk + 1, s1, m1);
        for (int i = 0; i < 4; i++) {
            w[i] = fmaf(d * s0, (float)(byte_of(q, i) & 15), -(dmin * m0));
            w[4 + i] = fmaf(d * s1, (float)(byte_of(q, i) >> 4), -(dmin * m1));
        }
    }
};

/// Planes: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, an f16 scale.
struct FormatQ6_K {
    static const u32 BLOCK = 256;
    static __device__ __forceinline__ u32 first(u32 g) {
        u32 i = g % 32;
        return g / 32 * 256 + i / 16 * 128 + i % 16 / 8 * 32 + i % 8 * 4;
    }
    static __device__ __forceinline__ u32 second(u32 g) { return first(g) + 64; }
    static __device__ __forceinline__ void load(const Planes& p, u64 row, u32 g, float (&w)[8]) {
        u64 block = row * (p.cols / 256) + g / 32, blocks = p.blocks_total;
        u32 i = g % 32, half = i / 16, quarter = i % 16 / 8, l = i % 8 * 4;
        u32 low = load4(p.data + block * 128 + half * 64 + quarter * 32 + l);
        u32 high = load4(p.data + blocks * 128 + block * 64 + half * 32 + l);
        const i8* scales = (const i8*)p.data + blocks * 192 + block * 16;
        float d = half_to_float(*(const u16*)(p.data + blocks * 208 + block * 2));
        u32 at = half * 8 + quarter * 2 + l / 16;
        float s0 = d * (float)scales[at], s1 = d * (float)scales[at + 4];
        for (int k = 0; k < 4; k++) {
            u32 q = byte_of(low, k), h = byte_of(high, k);
            w[k] = s0 * (float)((int)((q & 15) | ((h >> (2 * quarter)) & 3) << 4) - 32);
            w[4 + k] = s1 * (float)((int)((q >> 4) | ((h >> (2 * quarter + 4)) & 3) << 4) - 32);
        }
    }
};

/// `y[m][row] = x[m][cols] · W[row][cols]ᵀ` for up to `M` rows of `x` a block; a warp an output
/// column. Weights become f32 in registers. A sum's order does not depend on `M`.
template <class F, int M, class T>
__device__ void matvec(Planes w, const T* x, u32 m, u32 rows, float* y, u32 y_stride) {
    u32 lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    u32 base = blockIdx.y * M;
    if (row >= rows) return;
    float sum[M];
    for (int i = 0; i < M; i++) sum[i] = 0.f;
#pragma unroll(M == 1 ? 4 : M == 2 ? 2 : 1)
    for (u32 g = lane; g < w.cols / 8; g += 32) {
        float weights[8];
        F::load(w, row, g, weights);
        u32 first = F::first(g), second = F::second(g);
#pragma unroll
        for (int i = 0; i < M; i++) {
            // Rows beyond the batch read its last one; their sums are not stored.
            const T* at = x + (u64)(base + i < m ? base + i : m - 1) * w.cols;
            float a[4], b[4];
            load_four(at + first, a);
            load_four(at + second, b);
            for (int k = 0; k < 4; k++) sum[i] = fmaf(weights[k], a[k], sum[i]);
            for (int k = 0; k < 4; k++) sum[i] = fmaf(weights[4 + k], b[k], sum[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < M; i++) {
        float total = warp_sum(sum[i]);
        if (lane == 0 && base + i < m) y[(u64)(base + i) * y_stride + row] = total;
    }
}

#define MATVEC(format, M)                                                                          \
    CROWDED_KERNEL(128, M == 8 ? 8 : 4, matvec_##format##_##M, Planes w, const bf16* x, u32 m, u32 rows, float* y,         \
           u32 y_stride) {                                                                         \
        matvec<Format##format, M>(w, x, m, rows, y, y_stride);                                     \
    }
#define MATVECS(format) MATVEC(format, 1) MATVEC(format, 2) MATVEC(format, 4) MATVEC(format, 8)
MATVECS(BF16)
MATVECS(Q8_0)
MATVECS(Q4_0)
MATVECS(Q4_1)
MATVECS(Q4_K)
MATVECS(Q6_K)

/// Embeddings: `out[i] = W[tokens[i] - start] * scale`, one block a token; zeros for tokens that are
/// not among the `rows` from `start` on.
template <class F>
__device__ void embed(Planes w, const u32* tokens, u32 start, u32 rows, float* out, float scale) {
    float* to = out + (u64)blockIdx.x * w.cols;
    // A token below `start` wraps around, past any matrix.
    u32 row = tokens[blockIdx.x] - start;
    for (u32 g = threadIdx.x; g < w.cols / 8; g += blockDim.x) {
        float weights[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
        if (row < rows) F::load(w, row, g, weights);
        for (int i = 0; i < 4; i++) {
            to[F::first(g) + i] = weights[i] * scale;
            to[F::second(g) + i] = weights[4 + i] * scale;
        }
    }
}

/// `out[i] = bf16(W[row0 + i])`: what a matrix product on tensor cores reads. One block a row.
template <class F> __device__ void expand(Planes w, u32 row0, bf16* out) {
    bf16* to = out + (u64)blockIdx.x * w.cols;
    for (u32 g = threadIdx.x; g < w.cols / 8; g += blockDim.x) {
        float v[8];
        F::load(w, (u64)row0 + blockIdx.x, g, v);
        u32* a = (u32*)(to + F::first(g));
        u32* b = (u32*)(to + F::second(g));
        a[0] = pack_bf16(v[0], v[1]);
        a[1] = pack_bf16(v[2], v[3]);
        b[0] = pack_bf16(v[4], v[5]);
        b[1] = pack_bf16(v[6], v[7]);
    }
}

#define LOOKUP(format)                                                                             \
    KERNEL(128, embed_##format, Planes w, const u32* tokens, u32 start, u32 rows, float* out,      \
           float scale) {                                                                          \
        embed<Format##format>(w, tokens, start, rows, out, scale);                                 \
    }                                                                                              \
    KERNEL(128, expand_##format, Planes w, u32 row0, bf16* out) {                                  \
        expand<Format##format>(w, row0, out);                                                      \
    }
LOOKUP(F32)
LOOKUP(BF16)
LOOKUP(Q8_0)
LOOKUP(Q4_0)
LOOKUP(Q4_1)
LOOKUP(Q4_K)
LOOKUP(Q6_K)

/// `y[m][n] = x[m][k] · W[n][k]ᵀ` in single precision. Each output is one chain of fused
/// multiply-adds in ascending `k`, so it does not depend on `m`. Tiles of 32 by 32.
KERNEL(256, matmul_f32, const float* w, const float* x, u32 m, u32 n, u32 k, float* y,
       u32 y_stride) {
    __shared__ float xs[32][33], ws[32][33];
    u32 column = threadIdx.x % 32, line = threadIdx.x / 32;
    u32 n0 = blockIdx.x * 32, m0 = blockIdx.y * 32;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    for (u32 k0 = 0; k0 < k; k0 += 32) {
        for (u32 i = line; i < 32; i += 8) {
            bool in = k0 + column < k;
            xs[i][column] = in && m0 + i < m ? x[(u64)(m0 + i) * k + k0 + column] : 0.f;
            ws[i][column] = in && n0 + i < n ? w[(u64)(n0 + i) * k + k0 + column] : 0.f;
        }
        __syncthreads();
        for (u32 kk = 0; kk < 32; kk++) {
            for (int i = 0; i < 4; i++) sum[i] = fmaf(ws[column][kk], xs[line + 8 * i][kk], sum[i]);
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; i++) {
        u32 row = m0 + line + 8 * i;
        if (row < m && n0 + column < n) y[(u64)row * y_stride + n0 + column] = sum[i];
    }
}
