//! The same model in another type, made by llama.cpp's own program, once, in the user's cache. From
//! a quantised file the result is no better than that file: it is there to be measured.

use std::path::Path;

use clap::ValueEnum;

use super::build::{self, Flavor};
use crate::bench::steps::Steps;
use crate::failure::Failure;
use crate::models::cache::{self, PullLock};
use crate::models::{Cancel, Local};

/// The folder in the cache.
const FOLDER: &str = "requantized";

/// A type of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(in crate::bench) enum Quantized {
    Q8_0,
    Q4_0,
    Q4_1,
    Bf16,
    F16,
}

impl Quantized {
    /// As `llama-quantize` calls it.
    const fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }
}

/// `local` as `to`.
///
/// # Errors
/// When llama.cpp cannot be built, or does not make the file.
pub(in crate::bench) fn make(
    local: &Local,
    to: Quantized,
    cancel: &Cancel,
) -> Result<Local, Failure> {
    let llama = build::llama(Flavor::Native, cancel)?;
    let models = cache::folder()?;
    let parent = models.parent().unwrap_or(&models);
    let folder = parent.join(FOLDER);
    let _lock = PullLock::acquire(parent, FOLDER, cancel)?;
    std::fs::create_dir_all(&folder).map_err(|error| failed("create", &folder, &error))?;
    let stem = local.path.file_stem().unwrap_or_default().to_string_lossy();
    let path = folder.join(format!("{stem}.{}.gguf", to.name()));
    let made = Local { path: path.clone(), name: format!("{}.{}", local.name, to.name()) };
    if is_newer(&path, &local.path) {
        return Ok(made);
    }
    let _steps = Steps::start(&format!("making {} of {}", to.name(), local.name), 0);
    let partial = folder.join(".partial");
    let mut command = llama.command("llama-quantize");
    command.arg("--allow-requantize").arg(&local.path).arg(&partial).arg(to.name());
    llama.run("llama-quantize", command, cancel)?;
    std::fs::rename(&partial, &path).map_err(|error| failed("rename", &partial, &error))?;
    Ok(made)
}

/// Whether `path` was made after `source` was last changed.
fn is_newer(path: &Path, source: &Path) -> bool {
    let changed = |path: &Path| std::fs::metadata(path)?.modified();
    match (changed(path), changed(source)) {
        (Ok(made), Ok(source)) => made > source,
        _ => false,
    }
}

fn failed(verb: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::Failed(format!("cannot {verb} {}: {error}", path.display()))
}
