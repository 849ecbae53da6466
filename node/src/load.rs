//! A model and its text side, from a path to a running engine.

use std::path::Path;

use headstart_engine::executor::device::{DeviceChoice, Placed};
use headstart_engine::model::{LoadOptions, WeightDtype};
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
    let device = options.device.parse::<DeviceChoice>();
    let device = device.map_err(|error| failed(format!("--device: {error}")))?;
    let text = ModelText::load(&options.model)
        .and_then(|text| text.with_base_prompt(base_prompt))
        .map_err(|error| failed(error.to_string()))?;
    let threads = options.threads();
    let load = LoadOptions { dtype, threads };
    let model = place(&options.model, device, load, options.tp).map_err(failed)?;
    let kv_tokens = options.kv_tokens(model.config().context_length);
    let executor = model.executor(threads, kv_tokens).map_err(|error| failed(error.message))?;
    let engine = EngineOptions {
        slots: options.slots,
        step_tokens: options.step_tokens,
        ..EngineOptions::default()
    };
    Ok((EngineHandle::start(executor, engine), text))
}

/// Loads the weights; every tenth of them is a log line.
fn place(
    path: &Path,
    device: DeviceChoice,
    options: LoadOptions,
    tp: usize,
) -> Result<Placed, String> {
    let mut told = 0;
    Placed::load(path, device, options, tp, &mut |progress| {
        let tenth = 10 * progress.bytes_loaded / progress.bytes_total.max(1);
        if tenth > told {
            told = tenth;
            let mib_total = progress.bytes_total >> 20;
            tracing::info!(path = %path.display(), percent = tenth * 10, mib_total, "loading");
        }
    })
}
