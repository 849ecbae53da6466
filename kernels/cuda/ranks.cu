// What tensor-parallel ranks that share a device do together.

/// Ranks that may share a device; `RANKS` of ranks.rs.
const u32 RANKS = 16;

/// Each rank's buffer.
struct RankBuffers {
    float* of[RANKS];
};

/// Every rank's `[count]` values become their sums over the ranks, added in the order of the ranks.
KERNEL(256, sum_ranks, RankBuffers buffers, u32 ranks, u64 count) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        float sum = buffers.of[0][i];
        for (u32 r = 1; r < ranks; r++) sum += buffers.of[r][i];
        for (u32 r = 0; r < ranks; r++) buffers.of[r][i] = sum;
    }
}
