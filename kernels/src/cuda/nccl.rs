//! Sums, and what is gathered, over ranks that have a GPU each, by NCCL.
//!
//! NCCL is opened when it is asked for: one GPU needs none of it. The functions are those of NCCL 2.14
//! and later (<https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html>). Communicators are
//! non-blocking, as NCCL asks of those that are to be aborted: a call returns at once, and what it
//! began is looked at until it is done, or given up.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use libloading::os::unix::Library;

use super::device::{CudaError, Device};
use super::library;
use super::memory::Buffer;

/// `ncclUint32`, `ncclFloat32` and `ncclSum`.
const UINT32: c_int = 3;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
/// `ncclSuccess` and `ncclInProgress`.
const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;

/// The pause between two looks at what is in progress.
const LOOK_PAUSE: Duration = Duration::from_micros(100);

type Handle = *mut c_void;
type Status = c_int;

/// `ncclUniqueId`: what the ranks of a group have in common.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([c_char; UniqueId::BYTES]);

/// `ncclConfig_t` as it was in 2.14; later versions take what they do not find there from themselves.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

const NON_BLOCKING: Config =
    Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: 21400, blocking: 0 };

/// What is called of NCCL.
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    comm_init_rank_config:
        unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> Status,
    comm_get_async_error: unsafe extern "C" fn(Handle, *mut Status) -> Status,
    comm_abort: unsafe extern "C" fn(Handle) -> Status,
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
                comm_init_rank_config: *library.get(b"ncclCommInitRankConfig\0")?,
                comm_get_async_error: *library.get(b"ncclCommGetAsyncError\0")?,
                comm_abort: *library.get(b"ncclCommAbort\0")?,
                all_reduce: *library.get(b"ncclAllReduce\0")?,
                group_start: *library.get(b"ncclGroupStart\0")?,
                group_end: *library.get(b"ncclGroupEnd\0")?,
                get_error_string: *library.get(b"ncclGetErrorString\0")?,
            })
        }
    }

    /// An error, unless it is done or begun.
    fn check(&self, status: Status, what: &str) -> Result<(), CudaError> {
        if status == SUCCESS || status == IN_PROGRESS {
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

    /// Waits until what was begun on these is done.
    fn wait_for(
        &self,
        ends: &[Communicator],
        what: &str,
        given_up: &dyn Fn() -> bool,
    ) -> Result<(), CudaError> {
        for end in ends {
            let mut state = IN_PROGRESS;
            while state == IN_PROGRESS {
                // SAFETY: the handle is not aborted; `state` is written.
                let asked = unsafe { (self.comm_get_async_error)(end.handle, &mut state) };
                self.check(asked, what)?;
                self.check(state, what)?;
                if state == IN_PROGRESS {
                    if given_up() {
                        return Err(CudaError::new(format!("{what}: {ABORTED}")));
                    }
                    std::thread::sleep(LOOK_PAUSE);
                }
            }
        }
        Ok(())
    }
}

/// What is said where a group is gone.
const ABORTED: &str = "it was given up";

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

    /// What another process needs of it.
    #[must_use]
    pub fn bytes(&self) -> [u8; Self::BYTES] {
        self.0.map(|byte| byte as u8)
    }

    /// One that another process made.
    #[must_use]
    pub fn of(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes.map(|byte| byte as c_char))
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId")
    }
}

/// One rank's end. It goes with [`Communicators`], which knows whether it was aborted.
struct Communicator {
    handle: Handle,
    device: Device,
}

// SAFETY: a communicator may be used from any thread, one at a time.
unsafe impl Send for Communicator {}

/// The ends of neighbouring ranks of a group that one thread drives, each with a GPU of its own. What
/// recorded a sum must go before them: NCCL waits for that.
pub struct Communicators {
    ranks: usize,
    /// Empty: aborted.
    ends: Mutex<Vec<Communicator>>,
    aborting: AtomicBool,
}

impl fmt::Debug for Communicators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Communicators({} ranks)", self.ranks)
    }
}

impl Drop for Communicators {
    fn drop(&mut self) {
        self.abort();
    }
}

impl Communicators {
    /// Whether there can be any.
    ///
    /// # Errors
    /// NCCL is not on this machine.
    pub fn available() -> Result<(), CudaError> {
        functions().map(|_| ())
    }

    /// The whole group: a rank on each of `devices`, in order.
    ///
    /// # Errors
    /// NCCL is not on this machine, or refuses the devices.
    pub fn new(devices: &[Device]) -> Result<Self, CudaError> {
        Self::join(&UniqueId::new()?, devices.len(), 0, devices, &|| false)
    }

    /// The ranks `first..first + devices.len()` of a group of `ranks`; waits for the others, unless
    /// they are given up.
    ///
    /// # Errors
    /// NCCL is not on this machine, refuses the devices, or does not reach the other ranks.
    pub fn join(
        id: &UniqueId,
        ranks: usize,
        first: usize,
        devices: &[Device],
        given_up: &dyn Fn() -> bool,
    ) -> Result<Self, CudaError> {
        let (nccl, what) = (functions()?, "joining a group of GPUs");
        let number = |n: usize| c_int::try_from(n).map_err(|e| CudaError::new(e.to_string()));
        let all = number(ranks)?;
        let mut handles = vec![ptr::null_mut(); devices.len()];
        let joined = nccl.group(what, || {
            for (at, (handle, device)) in handles.iter_mut().zip(devices).enumerate() {
                let (rank, mut config) = (number(first + at)?, NON_BLOCKING);
                device.inner.bind();
                // SAFETY: the device's context is current; the handle is written before this
                // returns; the configuration is copied.
                let status =
                    unsafe { (nccl.comm_init_rank_config)(handle, all, *id, rank, &mut config) };
                nccl.check(status, what)?;
            }
            Ok(())
        });
        let made = handles.into_iter().zip(devices).filter(|(handle, _)| !handle.is_null());
        let ends: Vec<_> =
            made.map(|(handle, device)| Communicator { handle, device: device.clone() }).collect();
        let joined = joined.and_then(|()| nccl.wait_for(&ends, what, given_up));
        let all = Self { ranks, ends: Mutex::new(ends), aborting: AtomicBool::new(false) };
        joined.map(|()| all)
    }

    /// Replaces the first `count` values of each rank's buffer by their sums over all ranks.
    ///
    /// # Errors
    /// [`CudaError`], also when the group was aborted.
    ///
    /// # Panics
    /// If a buffer is too small or not on its rank's device, or is not there.
    pub fn all_reduce(
        &self,
        buffers: &mut [&mut Buffer<f32>],
        count: usize,
    ) -> Result<(), CudaError> {
        self.reduce(buffers, count, FLOAT32)
    }

    /// Gives every rank the first `count` values of all: each of them is zero on all ranks but the one
    /// that has it. What is added is the values' bits, so they stay as they are, whatever they are.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    ///
    /// # Panics
    /// As [`Self::all_reduce`].
    pub fn all_gather(
        &self,
        buffers: &mut [&mut Buffer<f32>],
        count: usize,
    ) -> Result<(), CudaError> {
        self.reduce(buffers, count, UINT32)
    }

    /// Sums 32-bit values of NCCL's type `kind`.
    fn reduce(
        &self,
        buffers: &mut [&mut Buffer<f32>],
        count: usize,
        kind: c_int,
    ) -> Result<(), CudaError> {
        let (nccl, what) = (functions()?, "summing over GPUs");
        // Whoever aborts may hold the lock for long.
        let ends = self.ends.try_lock().ok().filter(|ends| !ends.is_empty());
        let ends = ends.ok_or_else(|| CudaError::new(format!("{what}: {ABORTED}")))?;
        assert_eq!(buffers.len(), ends.len(), "all_reduce: a buffer for each rank");
        nccl.group(what, || {
            for (end, buffer) in ends.iter().zip(buffers) {
                let inner = &end.device.inner;
                assert!(buffer.len() >= count, "all_reduce: sizes");
                assert!(Arc::ptr_eq(buffer.device(), inner), "all_reduce: another rank's buffer");
                inner.bind();
                let values = buffer.address(0) as *mut c_void;
                // SAFETY: the buffer holds the count, and is on the communicator's device, as is
                // the stream; in place is allowed. Nothing is in progress on the communicator.
                let status = unsafe {
                    let stream = inner.stream.cast();
                    (nccl.all_reduce)(values, values, count, kind, SUM, end.handle, stream)
                };
                nccl.check(status, what)?;
                end.device.keep_for_capture([buffer.allocation()]);
            }
            Ok(())
        })?;
        nccl.wait_for(&ends, what, &|| self.aborting.load(Ordering::Acquire))
    }

    /// Gives the group up: sums that wait for other ranks end, with values that mean nothing. Returns
    /// when what recorded a sum is gone.
    pub fn abort(&self) {
        self.aborting.store(true, Ordering::Release);
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let (Ok(nccl), false) = (functions(), ends.is_empty()) else { return };
        // As one group, so that none waits for what another one must free.
        let _ = nccl.group("leaving a group of GPUs", || {
            for end in ends.drain(..) {
                end.device.inner.bind();
                // SAFETY: created once, gone once, its device alive; nobody else has the lock.
                unsafe { (nccl.comm_abort)(end.handle) };
            }
            Ok(())
        });
    }
}
