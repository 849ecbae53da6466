//! The CUDA side: a device, its kernels, and safe calls of them.
//!
//! Nothing here is linked: the driver, NVRTC and cublasLt are opened when a device is asked for, NCCL
//! when several are, so the same binary runs where there is no GPU ([`library`]). Kernels are CUDA C without headers
//! (`kernels/cuda`), compiled for the device at hand by NVRTC ([`compile`]).
//!
//! All work of a [`Device`] goes to one stream, in the order of the calls, so buffers need no
//! events; what the host shares with it, [`Pinned`] memory, has one. Shapes that do not fit are programming errors and panic; what a device can refuse is a
//! [`CudaError`].

mod ask;
mod batch;
mod blas;
pub mod compile;
mod device;
mod graph;
mod launch;
pub mod library;
mod memory;
mod nccl;
mod ops;
mod pinned;
mod ranks;
#[cfg(test)]
mod tests;
mod vocab;
mod weights;

pub use ask::{Answers, AskRoom, Facts, Keep, Questions};
pub use batch::{Batch, Sequence, Staged};
pub use device::{CudaError, Device};
pub use graph::{Graph, Timer, capture_on};
pub use memory::{Buffer, Element};
pub use nccl::{Communicators, UniqueId};
pub use ops::{Activations, Attention, Gate, KvCache, KvDims, Precision, Rope, Rows, SPLIT};
pub use pinned::Pinned;
pub use ranks::SAME_DEVICE_RANKS_MAX;
pub use vocab::{SampleArgs, TokenFound};
pub use weights::{Tile, Weights};
