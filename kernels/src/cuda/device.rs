//! A device: context, stream, module, memory, launches, graphs.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;

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

fn check(result: sys::CUresult, what: &str) -> Result<(), CudaError> {
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

/// Plain data that may lie on a device.
///
/// # Safety
/// Every bit pattern is a value, and there is no padding.
pub unsafe trait Element: Copy + 'static {}
// SAFETY: plain numbers.
unsafe impl Element for u8 {}
// SAFETY: plain numbers.
unsafe impl Element for u16 {}
// SAFETY: plain numbers.
unsafe impl Element for u32 {}
// SAFETY: plain numbers.
unsafe impl Element for u64 {}
// SAFETY: plain numbers.
unsafe impl Element for f32 {}

/// What belongs to the driver and lives as long as anything on the device.
pub(super) struct Inner {
    ordinal: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static str, Function>>,
    /// What a graph that is being captured will use.
    capturing: Mutex<Option<Vec<Arc<Allocation>>>>,
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

    /// Bytes of memory that are free, and of all memory.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn memory_bytes(&self) -> Result<(usize, usize), CudaError> {
        let (mut free, mut total) = (0, 0);
        self.inner.bind();
        // SAFETY: the context is current; both are written.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "asking for free memory")?;
        Ok((free, total))
    }

    /// `len` elements, of unknown values.
    ///
    /// # Errors
    /// [`CudaError`] names what the memory was for.
    pub fn alloc<T: Element>(&self, len: usize, what: &str) -> Result<Buffer<T>, CudaError> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or_else(|| CudaError::new(format!("{what}: {len} elements")))?;
        let mut address = 0;
        self.inner.bind();
        // SAFETY: the context is current; the driver refuses what it does not have.
        let done = unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(16)) };
        check(done, &format!("{} MiB of GPU memory for {what}", bytes >> 20))?;
        let allocation = Arc::new(Allocation { address, bytes, inner: Arc::clone(&self.inner) });
        Ok(Buffer { allocation, len, element: PhantomData })
    }

    /// A copy of `data` on the device.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn upload<T: Element>(&self, data: &[T], what: &str) -> Result<Buffer<T>, CudaError> {
        let mut buffer = self.alloc(data.len(), what)?;
        self.write(&mut buffer, 0, data)?;
        Ok(buffer)
    }

    /// Overwrites `buffer[at..]` with `data`, which may be changed as soon as this returns.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write<T: Element>(
        &self,
        buffer: &mut Buffer<T>,
        at: usize,
        data: &[T],
    ) -> Result<(), CudaError> {
        assert!(at <= buffer.len && data.len() <= buffer.len - at, "write past a buffer");
        if data.is_empty() {
            return Ok(());
        }
        self.inner.bind();
        let to = buffer.address(at);
        // SAFETY: the target holds the bytes. From pageable memory the driver copies to its own
        // buffer before it returns.
        let done = unsafe {
            let (from, bytes) = (data.as_ptr().cast(), size_of_val(data));
            sys::cuMemcpyHtoDAsync_v2(to, from, bytes, self.inner.stream)
        };
        check(done, "copying to the GPU")
    }

    /// Reads `buffer[at..]` into `data`, when all work before it is done.
    ///
    /// # Errors
    /// [`CudaError`], also of that work.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn read<T: Element>(
        &self,
        buffer: &Buffer<T>,
        at: usize,
        data: &mut [T],
    ) -> Result<(), CudaError> {
        assert!(at <= buffer.len && data.len() <= buffer.len - at, "read past a buffer");
        if data.is_empty() {
            return Ok(());
        }
        self.inner.bind();
        // SAFETY: both sides hold the bytes; `data` is not touched before the stream is done.
        let done = unsafe {
            let (to, bytes) = (data.as_mut_ptr().cast(), size_of_val(data));
            sys::cuMemcpyDtoHAsync_v2(to, buffer.address(at), bytes, self.inner.stream)
        };
        check(done, "copying from the GPU")?;
        self.synchronize()
    }

    /// Copies elements from one buffer to another.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If it does not fit.
    pub fn copy<T: Element>(
        &self,
        from: &Buffer<T>,
        from_at: usize,
        to: &mut Buffer<T>,
        to_at: usize,
        len: usize,
    ) -> Result<(), CudaError> {
        assert!(from_at + len <= from.len && to_at + len <= to.len, "copy past a buffer");
        self.inner.bind();
        // SAFETY: both sides hold the bytes, and are different buffers.
        let done = unsafe {
            let bytes = len * size_of::<T>();
            let (to, from) = (to.address(to_at), from.address(from_at));
            sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.inner.stream)
        };
        check(done, "copying on the GPU")
    }

    /// Sets all bytes to zero.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn zero<T: Element>(&self, buffer: &mut Buffer<T>) -> Result<(), CudaError> {
        self.inner.bind();
        let bytes = buffer.len * size_of::<T>();
        // SAFETY: the buffer holds the bytes.
        let done = unsafe { sys::cuMemsetD8Async(buffer.address(0), 0, bytes, self.inner.stream) };
        check(done, "clearing GPU memory")
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

    /// Records what `work` calls, instead of running it, as one graph. Buffers that it uses stay
    /// alive as long as the graph.
    ///
    /// # Errors
    /// [`CudaError`] of the driver, or what `work` gives.
    pub fn capture(
        &self,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Graph, CudaError> {
        self.inner.bind();
        // Other threads' work must not end the capture.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        let begun = unsafe { sys::cuStreamBeginCapture_v2(self.inner.stream, mode) };
        check(begun, "starting to capture a graph")?;
        *self.capturing() = Some(Vec::new());
        let worked = work();
        let used = self.capturing().take().unwrap_or_default();
        let mut graph = ptr::null_mut();
        // SAFETY: the stream lives and is capturing; it must be ended whatever `work` gave.
        let ended = unsafe { sys::cuStreamEndCapture(self.inner.stream, &mut graph) };
        worked?;
        check(ended, "capturing a graph")?;
        let mut exec = ptr::null_mut();
        // SAFETY: the graph was just captured; it is not needed once it has an executable form.
        let made = unsafe {
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            made
        };
        check(made, "building a graph")?;
        Ok(Graph { exec, inner: Arc::clone(&self.inner), _used: used })
    }

    fn capturing(&self) -> std::sync::MutexGuard<'_, Option<Vec<Arc<Allocation>>>> {
        self.inner.capturing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A graph that is being captured keeps these alive.
    pub(super) fn keep_for_capture<'a>(&self, used: impl IntoIterator<Item = &'a Arc<Allocation>>) {
        if let Some(all) = self.capturing().as_mut() {
            all.extend(used.into_iter().cloned());
        }
    }

    /// A launch of kernel `name`; arguments follow in the kernel's order.
    pub(super) fn launch(&self, name: &'static str) -> Launch<'_> {
        Launch { device: self, name, words: Vec::new(), starts: Vec::new(), used: Vec::new() }
    }

    fn function(&self, name: &'static str) -> Result<sys::CUfunction, CudaError> {
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

    /// Marks a point in the stream's time.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn timer(&self) -> Result<Timer, CudaError> {
        self.inner.bind();
        let mut event = ptr::null_mut();
        // SAFETY: the context is current; the event is recorded on a stream of it.
        unsafe {
            check(sys::cuEventCreate(&mut event, 0), "creating an event")?;
            let timer = Timer { event, inner: Arc::clone(&self.inner) };
            check(sys::cuEventRecord(event, self.inner.stream), "recording an event")?;
            Ok(timer)
        }
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

/// Memory on a device, freed when nobody uses it.
pub(super) struct Allocation {
    address: sys::CUdeviceptr,
    bytes: usize,
    inner: Arc<Inner>,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.inner.bind();
        // SAFETY: allocated once, freed once. The driver waits for work that may use it.
        unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// `len` elements on a device.
pub struct Buffer<T> {
    allocation: Arc<Allocation>,
    len: usize,
    element: PhantomData<T>,
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} elements)", self.len)
    }
}

impl<T: Element> Buffer<T> {
    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.allocation.bytes
    }

    pub(super) fn allocation(&self) -> &Arc<Allocation> {
        &self.allocation
    }

    pub(super) fn address(&self, at: usize) -> u64 {
        self.allocation.address + (at * size_of::<T>()) as u64
    }
}

/// Recorded work that is launched as one.
pub struct Graph {
    exec: sys::CUgraphExec,
    inner: Arc<Inner>,
    _used: Vec<Arc<Allocation>>,
}

// SAFETY: as for `Inner`; launches bind the context first.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Graph")
    }
}

impl Graph {
    /// Runs the recorded work after what the stream has already.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn launch(&self) -> Result<(), CudaError> {
        self.inner.bind();
        // SAFETY: graph and stream live, and so does every buffer that the graph uses.
        check(unsafe { sys::cuGraphLaunch(self.exec, self.inner.stream) }, "launching a graph")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.inner.bind();
        // SAFETY: built once, destroyed once.
        unsafe { sys::cuGraphExecDestroy(self.exec) };
    }
}

/// A point in a stream's time.
pub struct Timer {
    event: sys::CUevent,
    inner: Arc<Inner>,
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Timer")
    }
}

impl Timer {
    /// Seconds from `self` to `end`, when both have been reached.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn seconds_until(&self, end: &Timer) -> Result<f64, CudaError> {
        self.inner.bind();
        let mut milliseconds = 0.0;
        // SAFETY: both events live and were recorded.
        unsafe {
            check(sys::cuEventSynchronize(end.event), "waiting for an event")?;
            let read = sys::cuEventElapsedTime_v2(&mut milliseconds, self.event, end.event);
            check(read, "reading an event's time")?;
        }
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.inner.bind();
        // SAFETY: created once, destroyed once.
        unsafe { sys::cuEventDestroy_v2(self.event) };
    }
}

/// Arguments of a kernel, in its order.
pub(super) struct Launch<'a> {
    device: &'a Device,
    name: &'static str,
    /// Arguments, each from a word's beginning.
    words: Vec<u64>,
    starts: Vec<usize>,
    used: Vec<Arc<Allocation>>,
}

impl Launch<'_> {
    /// A pointer to `buffer[at..]`.
    pub(super) fn buffer<T: Element>(mut self, buffer: &Buffer<T>, at: usize) -> Self {
        assert!(at <= buffer.len, "{}: an argument past its buffer", self.name);
        self.used.push(Arc::clone(&buffer.allocation));
        self.value(buffer.address(at))
    }

    /// A pointer, or null.
    pub(super) fn maybe<T: Element>(self, buffer: Option<&Buffer<T>>) -> Self {
        match buffer {
            Some(buffer) => self.buffer(buffer, 0),
            None => self.value(0u64),
        }
    }

    /// Keeps a buffer alive that a struct argument points to.
    pub(super) fn uses<T: Element>(mut self, buffer: &Buffer<T>) -> Self {
        self.used.push(Arc::clone(&buffer.allocation));
        self
    }

    /// A number.
    pub(super) fn value<V: Element>(self, value: V) -> Self {
        // SAFETY: an element has no padding.
        unsafe { self.bytes(&value) }
    }

    /// A structure in C's layout.
    ///
    /// # Safety
    /// `V` has the kernel's layout, no padding, and its pointers are kept alive by [`Self::uses`].
    pub(super) unsafe fn bytes<V: Copy>(mut self, value: &V) -> Self {
        let start = self.words.len();
        self.words.resize(start + size_of::<V>().div_ceil(8), 0);
        // SAFETY: the words hold the value's bytes, which are initialised.
        unsafe {
            let to = self.words[start..].as_mut_ptr().cast::<u8>();
            ptr::copy_nonoverlapping(ptr::from_ref(value).cast::<u8>(), to, size_of::<V>());
        }
        self.starts.push(start);
        self
    }

    /// Launches `grid` blocks of `threads`, each with `shared_bytes` of dynamic shared memory.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and with them it reads and writes inside its buffers.
    pub(super) unsafe fn run(
        mut self,
        grid: [usize; 3],
        threads: u32,
        shared_bytes: usize,
    ) -> Result<(), CudaError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let inner = &self.device.inner;
        inner.bind();
        let function = self.device.function(self.name)?;
        if shared_bytes > 48 << 10 {
            use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MAX;
            // SAFETY: the function lives.
            let set = unsafe { sys::cuFuncSetAttribute(function, MAX, shared_bytes as i32) };
            check(set, &format!("shared memory of {}", self.name))?;
        }
        let [x, y, z] = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let base = self.words.as_mut_ptr();
        // SAFETY: every start is inside the words.
        let mut arguments: Vec<*mut c_void> =
            self.starts.iter().map(|start| unsafe { base.add(*start) }.cast()).collect();
        // SAFETY: the caller's promise; the driver copies the arguments.
        let launched = unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                threads,
                1,
                1,
                shared_bytes as u32,
                inner.stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check(launched, &format!("launching {}", self.name))?;
        self.device.keep_for_capture(&self.used);
        Ok(())
    }
}
