//! Sums over ranks that have a GPU each, by NCCL.
//!
//! NCCL is opened when it is asked for: one GPU needs none of it. The functions are those of NCCL 2
//! (<https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html>).

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::ptr;
use std::sync::{Arc, OnceLock};

use libloading::os::unix::Library;

use super::device::{CudaError, Device};
use super::library;
use super::memory::Buffer;

/// `ncclFloat32` and `ncclSum`.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

type Handle = *mut c_void;
type Status = c_int;

/// `ncclUniqueId`: what the ranks of a group have in common.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([c_char; UniqueId::BYTES]);

/// What is called of NCCL.
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    comm_init_rank: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int) -> Status,
    comm_destroy: unsafe extern "C" fn(Handle) -> Status,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Handle,
        *mut c_void,
    ) -> Status,
    group_start: unsafe extern "C" fn() -> Status,
    group_end: unsafe extern "C" fn() -> Status,
    get_error_string: unsafe extern "C" fn(Status) -> *const c_char,
}

impl Functions {
    /// # Safety
    /// `library` is NCCL 2, and stays open.
    unsafe fn of(library: &Library) -> Result<Self, libloading::Error> {
        // SAFETY: the caller's promise: these are NCCL's functions by name.
        unsafe {
            Ok(Self {
                get_unique_id: *library.get(b"ncclGetUniqueId\0")?,
                comm_init_rank: *library.get(b"ncclCommInitRank\0")?,
                comm_destroy: *library.get(b"ncclCommDestroy\0")?,
                all_reduce: *library.get(b"ncclAllReduce\0")?,
                group_start: *library.get(b"ncclGroupStart\0")?,
                group_end: *library.get(b"ncclGroupEnd\0")?,
                get_error_string: *library.get(b"ncclGetErrorString\0")?,
            })
        }
    }

    fn check(&self, status: Status, what: &str) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NCCL answers with a static string.
        let said = unsafe { CStr::from_ptr((self.get_error_string)(status)) };
        Err(CudaError::new(format!("{what}: NCCL: {}", said.to_string_lossy())))
    }

    /// Makes one group of the calls for several ranks, as one thread that drives them has to.
    fn group(
        &self,
        what: &str,
        calls: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        // SAFETY: every start has its end.
        self.check(unsafe { (self.group_start)() }, what)?;
        let called = calls();
        // SAFETY: as above.
        let ended = self.check(unsafe { (self.group_end)() }, what);
        called.and(ended)
    }
}

/// NCCL, opened once for as long as the process lives.
fn functions() -> Result<&'static Functions, CudaError> {
    static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
    let opened = FUNCTIONS.get_or_init(|| {
        let library = library::open_nccl().ok_or(library::NCCL_MISSING)?;
        // SAFETY: the library has NCCL's name and is leaked.
        unsafe { Functions::of(Box::leak(Box::new(library))) }.map_err(|e| format!("NCCL: {e}"))
    });
    opened.as_ref().map_err(|message| CudaError::new(message.clone()))
}

impl UniqueId {
    /// Bytes of an id.
    pub const BYTES: usize = 128;

    /// A new one.
    ///
    /// # Errors
    /// NCCL is not on this machine, or finds no network.
    pub fn new() -> Result<Self, CudaError> {
        let (nccl, mut id) = (functions()?, Self([0; Self::BYTES]));
        // SAFETY: `id` is written.
        nccl.check(unsafe { (nccl.get_unique_id)(&mut id) }, "making a group of GPUs")?;
        Ok(id)
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId")
    }
}

/// One rank's end.
struct Communicator {
    handle: Handle,
    device: Device,
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.device.inner.bind();
        if let Ok(nccl) = functions() {
            // SAFETY: created once, destroyed once, its device alive.
            unsafe { (nccl.comm_destroy)(self.handle) };
        }
    }
}

/// The ends of neighbouring ranks of a group that one thread drives, each with a GPU of its own.
pub struct Communicators(Vec<Communicator>);

// SAFETY: a communicator may be used from any thread, one at a time.
unsafe impl Send for Communicators {}
// SAFETY: NCCL is only called through `all_reduce`, on the streams of devices whose model lets one
// step run at a time; the handles themselves are not changed.
unsafe impl Sync for Communicators {}

impl fmt::Debug for Communicators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Communicators({} ranks)", self.0.len())
    }
}

impl Communicators {
    /// The whole group: a rank on each of `devices`, in order.
    ///
    /// # Errors
    /// NCCL is not on this machine, or refuses the devices.
    pub fn new(devices: &[Device]) -> Result<Self, CudaError> {
        Self::join(&UniqueId::new()?, devices.len(), 0, devices)
    }

    /// The ranks `first..first + devices.len()` of a group of `ranks`; waits for the others.
    ///
    /// # Errors
    /// NCCL is not on this machine, refuses the devices, or does not reach the other ranks.
    pub fn join(
        id: &UniqueId,
        ranks: usize,
        first: usize,
        devices: &[Device],
    ) -> Result<Self, CudaError> {
        let (nccl, what) = (functions()?, "joining a group of GPUs");
        let number = |n: usize| c_int::try_from(n).map_err(|e| CudaError::new(e.to_string()));
        let ranks = number(ranks)?;
        let mut handles = vec![ptr::null_mut(); devices.len()];
        let joined = nccl.group(what, || {
            for (at, (handle, device)) in handles.iter_mut().zip(devices).enumerate() {
                let rank = number(first + at)?;
                device.inner.bind();
                // SAFETY: the device's context is current; the handle is written by the group's end.
                let status = unsafe { (nccl.comm_init_rank)(handle, ranks, *id, rank) };
                nccl.check(status, what)?;
            }
            Ok(())
        });
        let made = handles.into_iter().zip(devices).filter(|(handle, _)| !handle.is_null());
        let all = made.map(|(handle, device)| Communicator { handle, device: device.clone() });
        let all = Self(all.collect());
        joined.map(|()| all)
    }

    /// Replaces the first `count` values of each rank's buffer by their sums over all ranks.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If a buffer is too small or not on its rank's device, or is not there.
    pub fn all_reduce(
        &self,
        buffers: &mut [&mut Buffer<f32>],
        count: usize,
    ) -> Result<(), CudaError> {
        let (nccl, what) = (functions()?, "summing over GPUs");
        assert_eq!(buffers.len(), self.0.len(), "all_reduce: a buffer for each rank");
        nccl.group(what, || {
            for (end, buffer) in self.0.iter().zip(buffers) {
                let inner = &end.device.inner;
                assert!(buffer.len() >= count, "all_reduce: sizes");
                assert!(Arc::ptr_eq(buffer.device(), inner), "all_reduce: another rank's buffer");
                inner.bind();
                let values = buffer.address(0) as *mut c_void;
                // SAFETY: the buffer holds the count, and is on the communicator's device, as is
                // the stream; in place is allowed.
                let status = unsafe {
                    let stream = inner.stream.cast();
                    (nccl.all_reduce)(values, values, count, FLOAT32, SUM, end.handle, stream)
                };
                nccl.check(status, what)?;
                end.device.keep_for_capture([buffer.allocation()]);
            }
            Ok(())
        })
    }
}
