//! Which device a model runs on, and what loads and runs it there.

use std::fmt;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use super::cpu::{self, CpuOptions};
use super::cuda::{self, CudaExecutor, CudaModel, CudaOptions, CudaPart, Ranks};
use super::hosts::{FollowError, HostTimes, LeadError};
use super::{Executor, ExecutorError};
use crate::collective::hosts::Place;
use crate::model::{LoadOptions, ModelConfig, Progress, Weights};

/// What `--device` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if there is one.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, or an error.
    Cuda,
}

impl DeviceChoice {
    const ALL: [(Self, &'static str); 3] =
        [(Self::Auto, "auto"), (Self::Cpu, "cpu"), (Self::Cuda, "cuda")];

    /// Whether the choice comes to a GPU on this machine.
    #[must_use]
    pub fn is_cuda(self) -> bool {
        match self {
            Self::Auto => cuda::devices() > 0,
            Self::Cpu => false,
            Self::Cuda => true,
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(choice, _)| choice == self).map_or("auto", |(_, n)| n);
        f.write_str(name)
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text);
        found
            .map(|(choice, _)| *choice)
            .ok_or_else(|| format!("{text:?} is none of auto, cpu, cuda"))
    }
}

/// A model in the memory of the device that runs it. Clones share it.
#[derive(Clone, Debug)]
pub enum Placed {
    /// In main memory.
    Cpu(Weights),
    /// On a GPU.
    Cuda(Arc<CudaModel>),
}

/// Where compiled kernels are kept: `$XDG_CACHE_HOME/headstart/kernels`, or under `~/.cache`.
fn kernel_cache() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let caches = set("XDG_CACHE_HOME").map(PathBuf::from);
    let caches = caches.or_else(|| set("HOME").map(|home| Path::new(&home).join(".cache")));
    caches.map(|caches| caches.join("headstart/kernels"))
}

impl Placed {
    /// Loads a model where `choice` says, for `tp` tensor-parallel ranks.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the files, or what the device lacks.
    pub fn load(
        path: &Path,
        choice: DeviceChoice,
        options: LoadOptions,
        tp: usize,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, String> {
        if choice.is_cuda() {
            let ranks = Ranks::place(tp, cuda::devices())?;
            let loaded = cuda::load(path, options.dtype, ranks, kernel_cache(), progress);
            return loaded.map(Self::Cuda).map_err(|e| e.to_string());
        }
        Weights::load(path, options, tp, progress).map(Self::Cpu).map_err(|e| e.to_string())
    }

    /// What the model is.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        match self {
            Self::Cpu(model) => model.config(),
            Self::Cuda(model) => model.config(),
        }
    }

    /// Bytes of all matrices.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        match self {
            Self::Cpu(model) => model.weight_bytes(),
            Self::Cuda(model) => model.weight_bytes(),
        }
    }

    /// An executor of it. `threads` are those of the CPU.
    ///
    /// # Errors
    /// The kernels cannot work with the model, or there is too little memory.
    pub fn executor(
        &self,
        threads: usize,
        kv_tokens: usize,
    ) -> Result<Box<dyn Executor>, ExecutorError> {
        Ok(match self {
            Self::Cpu(model) => {
                let options = CpuOptions { threads, kv_tokens, ..CpuOptions::default() };
                cpu::executor(model, options)?
            }
            Self::Cuda(model) => {
                let options = CudaOptions { kv_tokens, ..CudaOptions::default() };
                Box::new(CudaExecutor::new(Arc::clone(model), &options)?)
            }
        })
    }
}

/// The ranks of one process in the memory of their devices; others have the model's other ranks.
#[derive(Debug)]
pub enum PlacedRanks {
    /// In main memory.
    Cpu(Weights, Place),
    /// On a GPU each.
    Cuda(Box<CudaPart>),
}

impl PlacedRanks {
    /// Loads the ranks of `place` where `choice` says.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the files, or what the device lacks.
    pub fn load(
        path: &Path,
        choice: DeviceChoice,
        options: LoadOptions,
        place: Place,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, String> {
        let (local, of) = (place.local(), place.ranks);
        if choice.is_cuda() {
            Ranks::place_apart(&local, of, cuda::devices())?;
            let loaded = cuda::load_ranks(path, options.dtype, place, kernel_cache(), progress);
            return loaded.map(|part| Self::Cuda(Box::new(part))).map_err(|e| e.to_string());
        }
        let loaded = Weights::load_ranks(path, options, local, of, progress);
        loaded.map(|weights| Self::Cpu(weights, place)).map_err(|e| e.to_string())
    }

    /// What the whole model is.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        match self {
            Self::Cpu(weights, _) => weights.config(),
            Self::Cuda(part) => part.config(),
        }
    }

    /// Leads the model's ranks: waits on `listener` for the others. `threads` are those of the CPU.
    ///
    /// # Errors
    /// [`LeadError`]
    pub fn lead(
        self,
        threads: usize,
        kv_tokens: usize,
        times: HostTimes,
        listener: &TcpListener,
    ) -> Result<Box<dyn Executor>, LeadError> {
        match self {
            Self::Cpu(weights, place) => {
                let options = CpuOptions { threads, kv_tokens, ..CpuOptions::default() };
                cpu::lead(weights.parts().to_vec(), options, place, times, listener)
            }
            Self::Cuda(part) => {
                let options = CudaOptions { kv_tokens, ..CudaOptions::default() };
                cuda::lead(*part, &options, times, listener)
            }
        }
    }

    /// Runs the ranks for a leader until it says goodbye. `find` looks its address up before each try
    /// to reach it, for `join_timeout`; `ready` is called once all is ready here.
    ///
    /// # Errors
    /// [`FollowError`]
    pub fn follow(
        self,
        threads: usize,
        join_timeout: Duration,
        find: &mut dyn FnMut() -> Result<String, String>,
        ready: &mut dyn FnMut(),
    ) -> Result<(), FollowError> {
        match self {
            Self::Cpu(weights, place) => {
                cpu::follow(&weights, threads, place, join_timeout, find, ready)
            }
            Self::Cuda(part) => cuda::follow(*part, join_timeout, find, ready),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_have_names() {
        for (choice, name) in DeviceChoice::ALL {
            assert_eq!(choice.to_string(), name);
            assert_eq!(name.parse(), Ok(choice));
        }
        assert!("tpu".parse::<DeviceChoice>().is_err());
    }
}
