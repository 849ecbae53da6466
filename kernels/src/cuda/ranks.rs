//! What tensor-parallel ranks that share a device do together.

use super::device::{CudaError, Device};
use super::memory::Buffer;

/// Ranks that may share a device; `RANKS` of ranks.cu.
pub const SAME_DEVICE_RANKS_MAX: usize = 16;

/// Blocks that add: enough to fill a GPU, each element being one thread's.
const BLOCKS_MAX: usize = 1024;

/// `RankBuffers` of ranks.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct RankBuffers([u64; SAME_DEVICE_RANKS_MAX]);

impl Device {
    /// Replaces the first `count` values of each rank's buffer by their sums over the ranks, added
    /// in the order of the ranks.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a buffer is too small, or there are more than [`SAME_DEVICE_RANKS_MAX`].
    pub fn sum_ranks(
        &self,
        buffers: &mut [&mut Buffer<f32>],
        count: usize,
    ) -> Result<(), CudaError> {
        assert!(buffers.iter().all(|b| b.len() >= count), "sum_ranks: sizes");
        let mut addresses = RankBuffers([0; SAME_DEVICE_RANKS_MAX]);
        assert!(buffers.len() <= addresses.0.len(), "sum_ranks: ranks");
        for (address, buffer) in addresses.0.iter_mut().zip(&*buffers) {
            *address = buffer.address(0);
        }
        // SAFETY: the kernel's layout, sixteen pointers, whose buffers are kept below.
        let launch = unsafe { self.launch("sum_ranks").bytes(&addresses) };
        let launch = buffers.iter().fold(launch, |launch, buffer| launch.uses(buffer));
        let launch = launch.value(buffers.len() as u32).value(count as u64);
        let blocks = if buffers.len() < 2 { 0 } else { count.div_ceil(256).min(BLOCKS_MAX) };
        // SAFETY: (RankBuffers buffers, u32 ranks, u64 count); sizes checked.
        unsafe { launch.run([blocks, 1, 1], 256, 0) }
    }
}
