//! Which CUDA libraries this machine has.

use std::path::Path;
use std::sync::OnceLock;

use cudarc::{cublaslt, driver, nvrtc};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Names of a directory whose CUDA libraries are used before those that the system would find.
pub const LIBRARIES_VARIABLE: &str = "HEADSTART_CUDA_LIBRARIES";

/// What is opened from such a directory, in this order: a library after those that it needs.
const NAMES: [&str; 8] = [
    "libcuda.so",
    "libcuda.so.1",
    "libnvrtc-builtins.so.13.0",
    "libnvrtc.so",
    "libnvrtc.so.13",
    "libcublasLt.so",
    "libcublasLt.so.13",
    NCCL,
];

/// NVIDIA's collective communication library, which only models on several GPUs need.
const NCCL: &str = "libnccl.so.2";

/// What is said where it is needed and not there.
pub(super) const NCCL_MISSING: &str =
    "libnccl.so.2, which ranks on several GPUs need, is not on this machine";

/// Opens the libraries of `directory`, for as long as the process lives. A library that is opened
/// by its path is found again under its own name.
pub fn open_all_in(directory: &Path) {
    for name in NAMES {
        let path = directory.join(name);
        if path.exists() {
            // SAFETY: opening a CUDA library runs its initialisers, which are sound by its maker's
            // word; the directory is the operator's choice.
            if let Ok(library) = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
                std::mem::forget(library);
            }
        }
    }
}

/// What stands in the way of using a GPU here, in words; `None`: nothing known.
pub fn missing() -> Option<&'static str> {
    static MISSING: OnceLock<Option<&'static str>> = OnceLock::new();
    *MISSING.get_or_init(|| {
        if let Some(directory) = std::env::var_os(LIBRARIES_VARIABLE) {
            open_all_in(Path::new(&directory));
        }
        // SAFETY: opens and closes the library; as in `open_all_in`.
        let [cuda, nvrtc, cublaslt] = unsafe {
            [
                driver::sys::is_culib_present(),
                nvrtc::sys::is_culib_present(),
                cublaslt::sys::is_culib_present(),
            ]
        };
        if !cuda {
            Some("libcuda, the NVIDIA driver's library, is not on this machine")
        } else if !nvrtc {
            Some("libnvrtc.so.13 of CUDA 13 is not on this machine")
        } else if !cublaslt {
            Some("libcublasLt.so.13 of CUDA 13 is not on this machine")
        } else {
            None
        }
    })
}

/// Opens NCCL; `None`: it is not there.
pub(super) fn open_nccl() -> Option<Library> {
    // The operator's folder comes first.
    if missing().is_some() {
        return None;
    }
    // SAFETY: as in `open_all_in`.
    unsafe { Library::open(Some(NCCL), RTLD_NOW | RTLD_GLOBAL) }.ok()
}
