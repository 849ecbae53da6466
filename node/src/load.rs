//! A model and its text side, from a path to a running engine.

use std::path::Path;

use headstart_engine::executor::cpu::{self, CpuOptions};
use headstart_engine::model::{LoadError, LoadOptions, WeightDtype, Weights};
use headstart_engine::{EngineHandle, EngineOptions};
use headstart_service::node::NodeError;
use headstart_service::options::ModelOptions;
use headstart_text::{BasePrompt, ModelText};

/// Loads the model and its text side, and starts an engine on it. `base_prompt` is what the model is
/// prompted with where it is a base.
///
/// # Errors
/// [`NodeError::Model`] names the file and what is wrong with it.
pub fn load(
    options: &ModelOptions,
    base_prompt: BasePrompt,
) -> Result<(EngineHandle, ModelText), NodeError> {
    let failed = |error: String| NodeError::Model(error);
    let dtype: WeightDtype = options.dtype.parse().map_err(|_| {
        failed(format!("--dtype: expected auto, f32 or bf16, found {:?}", options.dtype))
    })?;
    let text = ModelText::load(&options.model)
        .and_then(|text| text.with_base_prompt(base_prompt))
        .map_err(|error| failed(error.to_string()))?;
    let threads = options.threads();
    let load = LoadOptions { dtype, threads };
    let weights = load_weights(&options.model, load, options.tp)
        .map_err(|error| failed(error.to_string()))?;
    let context = weights.config().context_length;
    let cpu =
        CpuOptions { threads, kv_tokens: options.kv_tokens(context), ..CpuOptions::default() };
    let executor = cpu::executor(&weights, cpu).map_err(|error| failed(error.message))?;
    let engine = EngineOptions {
        slots: options.slots,
        step_tokens: options.step_tokens,
        ..EngineOptions::default()
    };
    Ok((EngineHandle::start(executor, engine), text))
}

/// Loads the weights; every tenth of them is a log line.
fn load_weights(path: &Path, options: LoadOptions, tp: usize) -> Result<Weights, LoadError> {
    let mut told = 0;
    Weights::load(path, options, tp, &mut |progress| {
        let tenth = 10 * progress.bytes_loaded / progress.bytes_total.max(1);
        if tenth > told {
            told = tenth;
            let mib_total = progress.bytes_total >> 20;
            tracing::info!(path = %path.display(), percent = tenth * 10, mib_total, "loading");
        }
    })
}
