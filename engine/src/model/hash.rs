//! A model's hash, from a sample of its file.
//!
//! It covers the configuration, how weights are kept, and of every tensor the name, the shape, the
//! type and some rows. Reading all of a large model a second time would double the time it takes to
//! load; a fine-tune or another quantisation changes (nearly) every row.

use headstart_formats::{gguf, safetensors};
use sha2::{Digest, Sha256};

use super::WeightDtype;
use super::config::ModelConfig;
use super::error::LoadError;
use super::source::Source;
use crate::executor::ModelHash;

/// Rows of a tensor that are looked at, spread evenly.
const ROWS_SAMPLED: usize = 8;

/// Grows when the arithmetic changes in a way that changes keys or values beyond rounding.
const ARITHMETIC: u32 = 1;

/// The hash of the model in `source`, whose weights are kept as `dtype`.
pub(super) fn hash(
    source: &Source,
    config: &ModelConfig,
    dtype: WeightDtype,
) -> Result<ModelHash, LoadError> {
    let mut hasher = Sha256::new();
    hasher.update(format!("{ARITHMETIC} {dtype} {config:?}"));
    let mut bytes = Vec::new();
    for (name, described, shape) in tensors(source) {
        hasher.update(format!("{name} {described} {shape:?}"));
        let rows: usize = shape[..shape.len().saturating_sub(1)].iter().product();
        let step = rows.div_ceil(ROWS_SAMPLED).max(1);
        for row in (0..rows).step_by(step) {
            source.read_rows(&name, row..row + 1, &mut bytes)?;
            hasher.update(&bytes);
        }
    }
    Ok(ModelHash(hasher.finalize().into()))
}

/// Name, type and shape of every tensor, sorted by name.
fn tensors(source: &Source) -> Vec<(String, String, Vec<usize>)> {
    let gguf = |t: &gguf::TensorInfo| (t.name.clone(), t.dtype.to_string(), t.shape.clone());
    let dir = |name: &str, t: &safetensors::TensorInfo| {
        (name.to_owned(), format!("{:?}", t.dtype), t.shape.clone())
    };
    let mut tensors: Vec<_> = match source {
        Source::Gguf(file) => file.tensors().iter().map(gguf).collect(),
        Source::Dir(files) => {
            files.names().filter_map(|name| Some(dir(name, files.tensor(name)?))).collect()
        }
    };
    tensors.sort();
    tensors
}
