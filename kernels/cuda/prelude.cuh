// What every kernel is written in: CUDA C without headers, so that NVRTC needs none on the user's
// machine. Everything that is not plain C++ (inline PTX, warp operations, launch syntax) is wrapped
// here, and has a second body in emulated/device.hpp that runs on the host, for tests.
#ifndef HEADSTART_EMULATED

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define KERNEL(threads, name, ...) \
    extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
/// The same for at least `blocks` blocks on a multiprocessor at a time, which bounds registers.
#define CROWDED_KERNEL(threads, blocks, name, ...) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

__device__ __forceinline__ uint4 load16(const void* p) { return *(const uint4*)p; }
__device__ __forceinline__ uint2 load8(const void* p) { return *(const uint2*)p; }
__device__ __forceinline__ u32 load4(const void* p) { return *(const u32*)p; }

/// Two floats, rounded to nearest even: `lo` in the lower half.
__device__ __forceinline__ u32 pack_bf16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

/// 2^x to about two units in the last place.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

/// Starts the copy of 16 bytes to shared memory; zeros if not `valid` (`from` is not read then).
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
/// Closes a group of copies.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `N` groups of this thread are under way.
template <int N> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/// Four 8x8 matrices of 16-bit elements; lane `l` names row `l % 8` of matrix `l / 8`.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
/// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
/// `d[16][8] += a[16][16] · b[16][8]`, bf16 in, f32 out (PTX ISA, "mma.m16n8k16").
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

const u32 ALL_LANES = 0xffffffffu;

struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float float_from_bits(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float low_bf16(u32 pair) { return float_from_bits(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return float_from_bits(pair & 0xffff0000u); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return float_from_bits((u32)x.bits << 16); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(bf16* p, float x) { p->bits = (u16)pack_bf16(x, 0.f); }

/// Four neighbouring elements, aligned to their size.
__device__ __forceinline__ void load_four(const float* p, float (&out)[4]) {
    uint4 v = load16(p);
    out[0] = float_from_bits(v.x);
    out[1] = float_from_bits(v.y);
    out[2] = float_from_bits(v.z);
    out[3] = float_from_bits(v.w);
}
__device__ __forceinline__ void load_four(const bf16* p, float (&out)[4]) {
    uint2 v = load8(p);
    out[0] = low_bf16(v.x);
    out[1] = high_bf16(v.x);
    out[2] = low_bf16(v.y);
    out[3] = high_bf16(v.y);
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, d));
    return x;
}

/// Sum over a block of whole warps; every thread gets it. `shared` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float* shared) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.f;
    for (u32 w = 0; w < blockDim.x / 32; w++) sum += shared[w];
    return sum;
}

__device__ __forceinline__ float minus_infinity() { return float_from_bits(0xff800000u); }

/// Where the values of a KV page lie, in elements:
/// `[page][layer][keys, values][kv_head][slot][head_dim]`.
struct KvLayout {
    u32 layers, layer, kv_heads, page_size, head_dim;
    __device__ __forceinline__ u64 at(u32 page, u32 values, u32 head, u32 slot) const {
        u64 block = ((u64)page * layers + layer) * 2 + values;
        return ((block * kv_heads + head) * page_size + slot) * head_dim;
    }
};
