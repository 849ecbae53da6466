//! A model and its text side, from a path to a running engine.

use std::path::Path;

use headstart_engine::executor::device::{DeviceChoice, Placed, PlacedRanks};
use headstart_engine::executor::hosts::LeadError;
use headstart_engine::model::{LoadOptions, Progress, WeightDtype};
use headstart_engine::{EngineHandle, EngineOptions, Executor};
use headstart_service::node::NodeError;
use headstart_service::options::ModelOptions;
use headstart_text::{BasePrompt, ModelText};

use crate::ranks::Gathering;

/// How `--dtype` wants weights kept.
pub(crate) fn dtype(options: &ModelOptions) -> Result<WeightDtype, NodeError> {
    options.dtype.parse().map_err(|_| {
        let message = format!("--dtype: expected auto, f32 or bf16, found {:?}", options.dtype);
        NodeError::Model(message)
    })
}

/// Where `--device` wants the model.
pub(crate) fn device(options: &ModelOptions) -> Result<DeviceChoice, NodeError> {
    let device = options.device.parse::<DeviceChoice>();
    device.map_err(|error| NodeError::Model(format!("--device: {error}")))
}

/// Loads the model and its text side, and starts an engine on it. `base_prompt` is what the model is
/// prompted with where it is a base. A node whose ranks are in several processes waits for them as
/// `gathering` says.
///
/// # Errors
/// [`NodeError::Model`] names the file and what is wrong with it; [`NodeError::Ranks`] what kept the
/// processes from finding together.
pub fn load(
    options: &ModelOptions,
    base_prompt: BasePrompt,
    gathering: Option<Gathering>,
) -> Result<(EngineHandle, ModelText), NodeError> {
    let failed = |error: String| NodeError::Model(error);
    let text = ModelText::load(&options.model)
        .and_then(|text| text.with_base_prompt(base_prompt))
        .map_err(|error| failed(error.to_string()))?;
    let executor = match gathering {
        Some(gathering) => lead(options, &gathering)?,
        None => {
            let (threads, device) = (options.threads(), device(options)?);
            let load = LoadOptions { dtype: dtype(options)?, threads };
            let progress = &mut told(&options.model);
            let model = Placed::load(&options.model, device, load, options.tp, progress);
            let model = model.map_err(failed)?;
            let kv_tokens = options.kv_tokens(model.config().context_length);
            model.executor(threads, kv_tokens).map_err(|error| failed(error.message))?
        }
    };
    let engine = EngineOptions {
        slots: options.slots,
        step_tokens: options.step_tokens,
        ..EngineOptions::default()
    };
    Ok((EngineHandle::start(executor, engine), text))
}

/// This process's ranks, and those that join it.
fn lead(options: &ModelOptions, gathering: &Gathering) -> Result<Box<dyn Executor>, NodeError> {
    let Gathering { place, times, listener, .. } = gathering;
    let (threads, device) = (options.threads(), device(options)?);
    let load = LoadOptions { dtype: dtype(options)?, threads };
    let progress = &mut told(&options.model);
    let ranks = PlacedRanks::load(&options.model, device, load, *place, progress);
    let ranks = ranks.map_err(NodeError::Model)?;
    let kv_tokens = options.kv_tokens(ranks.config().context_length);
    gathering.announce_again()?;
    ranks.lead(threads, kv_tokens, *times, listener).map_err(|error| match error {
        LeadError::Executor(error) => NodeError::Model(error.message),
        error => NodeError::Ranks(error.to_string()),
    })
}

/// Tells every tenth of the weights in a log line.
pub(crate) fn told(path: &Path) -> impl FnMut(Progress) {
    let mut told = 0;
    move |progress| {
        let tenth = 10 * progress.bytes_loaded / progress.bytes_total.max(1);
        if tenth > told {
            told = tenth;
            let mib_total = progress.bytes_total >> 20;
            tracing::info!(path = %path.display(), percent = tenth * 10, mib_total, "loading");
        }
    }
}
