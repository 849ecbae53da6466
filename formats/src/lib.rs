//! Readers of model files: GGUF, safetensors and Hugging Face directories.
//!
//! Parsing only. Every reader is total: whatever the bytes are, it returns a value or a
//! [`FormatError`] that names the file, the field, what was expected and what was found. Nothing is
//! allocated by a count that the file's own length has not vouched for. Tensors are read one by one
//! with positioned reads, so loading a model needs no more memory than its weights and one tensor.

mod error;
pub mod gguf;
pub mod hf;
mod io;
pub mod safetensors;

pub use error::FormatError;
