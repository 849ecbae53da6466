//! Kernels of Headstart: everything a decoder needs to run a step, on the CPU (the items below, on
//! f32 activations) and on NVIDIA GPUs ([`cuda`]).
//!
//! - [`ThreadPool`]: fork-join over the cores; every other entry point takes one.
//! - [`Matrix`]: weights `[rows][cols]`, repacked into tiles at load; `y[m][rows] = x[m][cols] · Wᵀ`
//!   by [`Matrix::matmul`] or, for several matrices over one input, [`matmul_group`].
//! - [`dequantise`], [`quantise`]: the block formats of ggml.
//! - [`rms_norm`], [`add_rms_norm`], [`add`], [`add_bias`], [`rope`], [`silu_mul`],
//!   [`gelu_tanh_mul`], [`softcap`], [`scale`]: element-wise steps over `[m][width]`.
//! - [`KvPool`] and [`paged_attention`]: keys and values in pages, causal grouped-query attention.
//! - [`peak`]: what the arithmetic units do at most, to set the others beside.
//! - [`vocab_stats`], [`vocab_stats_rows`], [`top_n`]: what is asked of logits.
//!
//! **Batch invariance.** The bits of an output row depend on nothing but the row's own input and the
//! instruction set of the processor: not on `m`, the other rows, the number of threads, or how a
//! prompt was cut into calls. Every kernel fixes the order of its floating-point sums per output
//! value; integer sums are exact, so there the order is free.
//!
//! This is the one crate of the project that holds `unsafe` code. Kernels are chosen at run time:
//! AMX, AVX-512 (VNNI, BF16), AVX2, or plain Rust. Shapes that do not fit are programming errors and
//! panic; data from outside (types, byte counts, pool shapes) is refused with [`KernelError`].

mod activation;
mod attention;
mod buffer;
mod cpu;
pub mod cuda;
mod dtype;
mod math;
mod matmul;
mod norm;
mod peak;
mod pool;
mod quant;
mod rope;
#[cfg(test)]
mod testing;
mod vocab;

pub use activation::{gelu_tanh_mul, scale, silu_mul, softcap};
pub use attention::{AttentionArgs, AttentionSeq, KvPool, KvShape, KvSlot, paged_attention};
pub use buffer::Arena;
pub use cpu::{Cpu, Isa};
pub use dtype::{DType, KernelError};
pub use matmul::{Matrix, matmul_group};
pub use norm::{add, add_bias, add_rms_norm, rms_norm};
pub use peak::{Peak, peak};
pub use pool::ThreadPool;
pub use quant::{dequantise, quantise};
pub use rope::{RopeAngles, RopeStyle, rope};
pub use vocab::{VocabStats, top_n, vocab_stats, vocab_stats_rows};
