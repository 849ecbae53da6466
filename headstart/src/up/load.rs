//! Models into memory, with progress; one copy for all nodes that run the same one.

use std::path::Path;

use headstart_engine::executor::device::Placed;
use headstart_engine::model::LoadOptions;
use headstart_text::ModelText;

use super::args::UpOptions;
use crate::failure::Failure;
use crate::models::Local;
use crate::models::cache::Check;
use crate::models::command::fetch_all;
use crate::models::progress::{Progress, Show, human_bytes};

/// What a tier's nodes run.
#[derive(Clone, Debug)]
pub(super) struct Loaded {
    /// The name clients use.
    pub(super) name: String,
    pub(super) weights: Placed,
    pub(super) text: ModelText,
}

/// Both tiers' models, the drafter's first.
pub(super) async fn load(options: &UpOptions) -> Result<(Loaded, Loaded), Failure> {
    let specs = vec![options.drafter.clone(), options.base.clone()];
    let mut locals = fetch_all(specs, Check::Size).await?;
    let (base, drafter) = (locals.pop(), locals.pop());
    let (Some(drafter), Some(base)) = (drafter, base) else {
        return Err(Failure::Failed("fetching brought no models".to_owned()));
    };
    let options = options.clone();
    let work = move || both(&options, &drafter, &base);
    match tokio::task::spawn_blocking(work).await {
        Ok(loaded) => loaded,
        Err(error) => Err(Failure::Failed(format!("loading failed: {error}"))),
    }
}

fn both(options: &UpOptions, drafter: &Local, base: &Local) -> Result<(Loaded, Loaded), Failure> {
    // Text first: it is quick, and what is wrong with it is known before the long load.
    let drafter_text = text(&drafter.path)?;
    let base_text = text(&base.path)?.with_base_prompt(options.base_prompt.into());
    let base_text = base_text.map_err(|error| failed(&base.path, &error))?;
    let drafter_weights = weights(options, drafter, 1)?;
    let base_weights = match drafter.path == base.path && options.tp == 1 {
        true => drafter_weights.clone(),
        false => weights(options, base, options.tp)?,
    };
    let named = |name: &Option<String>, local: &Local| name.clone().unwrap_or(local.name.clone());
    Ok((
        Loaded {
            name: named(&options.drafter_name, drafter),
            weights: drafter_weights,
            text: drafter_text,
        },
        Loaded { name: named(&options.base_name, base), weights: base_weights, text: base_text },
    ))
}

fn text(path: &Path) -> Result<ModelText, Failure> {
    ModelText::load(path).map_err(|error| failed(path, &error))
}

fn weights(options: &UpOptions, local: &Local, tp: usize) -> Result<Placed, Failure> {
    let load = LoadOptions { dtype: options.dtype, threads: options.threads() };
    let progress = Progress::start(Show::Progress, &format!("loading {}", local.name), 0);
    let weights = Placed::load(&local.path, options.device, load, tp, &mut |so_far| {
        progress.set_total(so_far.bytes_total);
        progress.set(so_far.bytes_loaded);
    })
    .map_err(|error| failed(&local.path, &error))?;
    progress.finish();
    tracing::info!(
        model = local.name,
        weights = human_bytes(weights.weight_bytes() as u64),
        "loaded"
    );
    Ok(weights)
}

/// Errors of the formats name their file; the others are told which one it was.
fn failed(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    let (path, error) = (path.display().to_string(), error.to_string());
    if error.contains(&path) {
        return Failure::Failed(error);
    }
    Failure::Failed(format!("{path}: {error}"))
}
