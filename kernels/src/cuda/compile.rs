//! From CUDA C to machine code, by NVRTC.

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};
use std::ptr;

use cudarc::nvrtc::sys;

use super::CudaError;

/// All kernels, in the order in which they are compiled.
pub const SOURCE: &str = concat!(
    include_str!("../../cuda/prelude.cuh"),
    include_str!("../../cuda/rows.cu"),
    include_str!("../../cuda/weights.cu"),
    include_str!("../../cuda/attention.cu"),
    include_str!("../../cuda/vocab.cu"),
    include_str!("../../cuda/pages.cu"),
    include_str!("../../cuda/ranks.cu"),
);

/// Architectures that the kernels are written for and tested to compile for.
pub const ARCHITECTURES: [&str; 5] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100"];

/// Machine code of all kernels.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// A cubin.
    pub image: Vec<u8>,
    /// What the assembler said: registers, shared memory and spills of each kernel.
    pub log: String,
}

fn check(result: sys::nvrtcResult, what: &str) -> Result<(), CudaError> {
    if result == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: NVRTC answers with a static string.
    let said = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) };
    Err(CudaError::new(format!("{what}: {}", said.to_string_lossy())))
}

/// A program, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `nvrtcCreateProgram`, destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

impl Program {
    fn log(&self) -> Result<String, CudaError> {
        let mut size = 0;
        // SAFETY: the program lives; `size` is written.
        check(unsafe { sys::nvrtcGetProgramLogSize(self.0, &mut size) }, "size of the log")?;
        let mut log = vec![0u8; size.max(1)];
        // SAFETY: the log holds the size that was asked for.
        check(unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) }, "log")?;
        log.pop();
        Ok(String::from_utf8_lossy(&log).into_owned())
    }
}

/// Compiles all kernels for an architecture such as `sm_90a`. Takes seconds.
///
/// # Errors
/// [`CudaError`] with NVRTC's log. The caller made sure that NVRTC is there
/// ([`super::library::missing`]).
pub fn compile(architecture: &str) -> Result<Compiled, CudaError> {
    let source = CString::new(SOURCE).map_err(|e| CudaError::new(e.to_string()))?;
    let mut program = ptr::null_mut();
    // SAFETY: both strings end in a zero and outlive the call; there are no headers.
    let created = unsafe {
        let name = c"headstart.cu".as_ptr();
        sys::nvrtcCreateProgram(&mut program, source.as_ptr(), name, 0, ptr::null(), ptr::null())
    };
    check(created, "creating a program")?;
    let program = Program(program);
    let architecture = CString::new(format!("--gpu-architecture={architecture}"))
        .map_err(|e| CudaError::new(e.to_string()))?;
    let options = [architecture.as_ptr(), c"--ptxas-options=-v".as_ptr()];
    // SAFETY: as many options as said, each ending in a zero.
    let done = unsafe { sys::nvrtcCompileProgram(program.0, 2, options.as_ptr()) };
    let log = program.log()?;
    check(done, &format!("compiling the kernels: {log}"))?;
    let mut size = 0;
    // SAFETY: the program lives and is compiled; `size` is written.
    check(unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) }, "size of the cubin")?;
    let mut image = vec![0u8; size];
    // SAFETY: the image holds the size that was asked for.
    check(unsafe { sys::nvrtcGetCUBIN(program.0, image.as_mut_ptr().cast()) }, "cubin")?;
    Ok(Compiled { image, log })
}

/// [`compile`], or what it gave for the same source, architecture and device before. A cache that
/// cannot be read or written only costs time.
///
/// # Errors
/// As [`compile`].
pub fn compile_cached(
    architecture: &str,
    device: &str,
    cache: Option<&Path>,
) -> Result<Vec<u8>, CudaError> {
    let path = cache.map(|cache| cache_path(cache, architecture, device));
    if let Some(image) = path.as_ref().and_then(|path| std::fs::read(path).ok()) {
        return Ok(image);
    }
    let image = compile(architecture)?.image;
    if let Some(path) = path {
        let _ = keep(&path, &image);
    }
    Ok(image)
}

fn cache_path(cache: &Path, architecture: &str, device: &str) -> PathBuf {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hash = DefaultHasher::new();
    (SOURCE, device, env!("CARGO_PKG_VERSION")).hash(&mut hash);
    cache.join(format!("{architecture}-{:016x}.cubin", hash.finish()))
}

/// Writes beside the target, then renames, so that nobody reads half a file.
fn keep(path: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    std::fs::write(&partial, image)?;
    std::fs::rename(&partial, path)
}
