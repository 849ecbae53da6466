// Pages of the KV pool as a whole, and what a benchmark needs.

/// Copies pages of `bytes` (a multiple of 16): `to[to_pages[i]] = from[from_pages[i]]`, a list of
/// null counting up from 0. Gathers pages for a handoff, scatters them, copies on write.
/// Block `(stripe, page)`.
KERNEL(256, copy_pages, const u8* from, const u32* from_pages, u8* to, const u32* to_pages,
       u64 bytes) {
    u64 source = (u64)(from_pages ? from_pages[blockIdx.y] : blockIdx.y) * bytes;
    u64 target = (u64)(to_pages ? to_pages[blockIdx.y] : blockIdx.y) * bytes;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < bytes / 16;
         i += (u64)gridDim.x * blockDim.x) {
        *(uint4*)(to + target + i * 16) = load16(from + source + i * 16);
    }
}

__device__ __forceinline__ float hashed(u64 seed, u64 i) {
    u64 bits = mix(seed ^ i * 0x9e3779b97f4a7c15ull);
    return (float)(u32)(bits >> 40) / 8388608.f - 1.f;
}

/// Reproducible numbers in `-scale..scale`.
KERNEL(256, fill_random_bf16, bf16* to, u64 count, u64 seed, float scale) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        store(to + i, hashed(seed, i) * scale);
    }
}
KERNEL(256, fill_f32, float* to, u64 count, float value) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) to[i] = value;
}

/// Reads `words` 16-byte words once: what memory can do. `sink` is written if all bits are zero,
/// so that the reads cannot be left out.
KERNEL(256, read_memory, const u8* from, u64 words, u32* sink) {
    u32 bits = 0;
    u64 step = (u64)gridDim.x * blockDim.x;
#pragma unroll 4
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += step) {
        uint4 v = load16(from + i * 16);
        bits |= v.x | v.y | v.z | v.w;
    }
    if (bits == 0) *sink = 1;
}
