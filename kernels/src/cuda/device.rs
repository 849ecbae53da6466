//! A device: its context, stream and kernels.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fmt;
use std::path::Path;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;

use super::memory::Allocation;
use super::{blas, compile, library};

/// What a device, its driver or its libraries refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaError {
    message: String,
}

impl CudaError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into() }
    }
}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CudaError {}

pub(super) fn check(result: sys::CUresult, what: &str) -> Result<(), CudaError> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: the driver sets `text` to a static string, or leaves it null.
    unsafe { sys::cuGetErrorString(result, &mut text) };
    let said = match text.is_null() {
        true => format!("{result:?}"),
        // SAFETY: not null, so it is the driver's static string.
        false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
    };
    Err(CudaError::new(format!("{what}: {said}")))
}

/// What belongs to the driver and lives as long as anything on the device.
pub(super) struct Inner {
    ordinal: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static str, Function>>,
    /// What a graph that is being captured will use.
    pub(super) capturing: Mutex<Option<Vec<Arc<Allocation>>>>,
    pub(super) blas: Mutex<Option<blas::Blas>>,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the driver's handles may be used from any thread that has made the context current, which
// every call here does first.
unsafe impl Send for Inner {}
// SAFETY: as above; the driver locks for itself, and the maps are behind mutexes.
unsafe impl Sync for Inner {}

impl Inner {
    pub(super) fn bind(&self) {
        // SAFETY: the context lives as long as `self`. It cannot fail for a context that exists; if
        // the device is lost, the next call says so.
        unsafe { sys::cuCtxSetCurrent(self.context) };
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.bind();
        self.blas.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // SAFETY: each was created once and is destroyed once, users of the context first.
        unsafe {
            sys::cuStreamSynchronize(self.stream);
            sys::cuModuleUnload(self.module);
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.ordinal);
        }
    }
}

/// A GPU with this crate's kernels loaded. Clones share it.
#[derive(Clone)]
pub struct Device {
    pub(super) inner: Arc<Inner>,
    name: String,
    /// Compute capability, as 90 for 9.0.
    capability: u32,
    multiprocessors: u32,
    shared_bytes_max: usize,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Device {
    /// GPUs that the driver shows; 0 without a driver.
    #[must_use]
    pub fn count() -> usize {
        if library::missing().is_some() {
            return 0;
        }
        let mut count = 0;
        // SAFETY: the library is there; `count` is written.
        let seen = unsafe {
            check(sys::cuInit(0), "starting the driver")
                .and_then(|()| check(sys::cuDeviceGetCount(&mut count), "counting devices"))
        };
        if seen.is_ok() { usize::try_from(count).unwrap_or(0) } else { 0 }
    }

    /// Opens device `ordinal` and loads the kernels, from `cache` if they were compiled before.
    ///
    /// # Errors
    /// [`CudaError`] says in one sentence what is missing.
    pub fn open(ordinal: usize, cache: Option<&Path>) -> Result<Self, CudaError> {
        if let Some(missing) = library::missing() {
            return Err(CudaError::new(missing));
        }
        let wanted = i32::try_from(ordinal).map_err(|e| CudaError::new(e.to_string()))?;
        let (mut device, mut version) = (0, 0);
        // SAFETY: the library is there; the pointers are to locals.
        unsafe {
            check(sys::cuInit(0), "starting the NVIDIA driver")?;
            check(sys::cuDriverGetVersion(&mut version), "asking the driver's version")?;
            if version < 13000 {
                let (major, minor) = (version / 1000, version % 1000 / 10);
                let message = format!("the NVIDIA driver supports CUDA {major}.{minor}, not 13.0");
                return Err(CudaError::new(message));
            }
            check(sys::cuDeviceGet(&mut device, wanted), "finding the GPU")?;
        }
        let name = device_name(device)?;
        use sys::CUdevice_attribute as A;
        let major = attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let capability = (major * 10 + minor) as u32;
        if capability < 80 {
            let message = format!("{name} has compute capability {major}.{minor}; 8.0 is needed");
            return Err(CudaError::new(message));
        }
        let multiprocessors = attribute(device, A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = attribute(device, A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let image = compile::compile_cached(&format!("sm_{capability}"), &name, cache)?;
        Ok(Self {
            inner: Arc::new(start(device, &image)?),
            name,
            capability,
            multiprocessors: multiprocessors as u32,
            shared_bytes_max: shared as usize,
        })
    }

    /// The GPU's name, as its driver has it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, as 90 for 9.0.
    #[must_use]
    pub fn capability(&self) -> u32 {
        self.capability
    }

    /// Streaming multiprocessors.
    #[must_use]
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Bytes of shared memory that a block can have.
    #[must_use]
    pub fn shared_bytes_max(&self) -> usize {
        self.shared_bytes_max
    }

    /// Waits until all work is done.
    ///
    /// # Errors
    /// [`CudaError`] of that work.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.inner.bind();
        // SAFETY: the stream lives.
        check(unsafe { sys::cuStreamSynchronize(self.inner.stream) }, "running on the GPU")
    }

    pub(super) fn function(&self, name: &'static str) -> Result<sys::CUfunction, CudaError> {
        let mut functions = self.inner.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(function.0);
        }
        let symbol = CString::new(name).map_err(|e| CudaError::new(e.to_string()))?;
        let mut function = ptr::null_mut();
        // SAFETY: the module lives; the name ends in a zero.
        let found =
            unsafe { sys::cuModuleGetFunction(&mut function, self.inner.module, symbol.as_ptr()) };
        check(found, &format!("finding kernel {name}"))?;
        functions.insert(name, Function(function));
        Ok(function)
    }
}

fn device_name(device: sys::CUdevice) -> Result<String, CudaError> {
    let mut name = [0u8; 128];
    // SAFETY: the driver writes at most the length given, with a zero at the end.
    let done = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 127, device) };
    check(done, "asking the GPU's name")?;
    let length = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..length]).into_owned())
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32, CudaError> {
    let mut value = 0;
    // SAFETY: `value` is written.
    check(unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) }, "asking the GPU")?;
    Ok(value)
}

fn start(ordinal: sys::CUdevice, image: &[u8]) -> Result<Inner, CudaError> {
    let (mut context, mut stream, mut module) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    // SAFETY: the pointers are to locals; the image is a whole cubin, whose header says its size.
    unsafe {
        check(sys::cuDevicePrimaryCtxRetain(&mut context, ordinal), "opening the GPU")?;
        check(sys::cuCtxSetCurrent(context), "using the GPU")?;
        let loaded = sys::cuModuleLoadData(&mut module, image.as_ptr().cast());
        check(loaded, "loading the kernels")?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        check(sys::cuStreamCreate(&mut stream, flags), "creating a stream")?;
    }
    Ok(Inner {
        ordinal,
        context,
        stream,
        module,
        functions: Mutex::default(),
        capturing: Mutex::default(),
        blas: Mutex::default(),
    })
}
