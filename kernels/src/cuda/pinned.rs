//! Host memory that the device reads and writes by itself, while the host goes on.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use cudarc::driver::sys;

use super::device::{CudaError, Device, Inner, check};
use super::memory::{Buffer, Element};

/// `len` elements of page-locked host memory. Copies from and to it return before they are done; who
/// looks at it waits for them.
pub struct Pinned<T> {
    data: NonNull<T>,
    len: usize,
    /// Reached when the last copy is done.
    copied: sys::CUevent,
    /// A copy may be under way.
    busy: bool,
    inner: Arc<Inner>,
    element: PhantomData<T>,
}

// SAFETY: it owns its memory, of plain numbers; the driver's calls bind the context first.
unsafe impl<T: Element> Send for Pinned<T> {}

impl<T> fmt::Debug for Pinned<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} elements)", self.len)
    }
}

impl<T> Pinned<T> {
    /// Waits until the device neither reads nor writes it.
    fn wait(&mut self) -> Result<(), CudaError> {
        if self.busy {
            self.inner.bind();
            // SAFETY: the event lives and was recorded.
            check(unsafe { sys::cuEventSynchronize(self.copied) }, "running on the GPU")?;
            self.busy = false;
        }
        Ok(())
    }
}

impl<T: Element> Pinned<T> {
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

    /// The elements, once the device has done with them.
    ///
    /// # Errors
    /// [`CudaError`] of the work before.
    pub fn wait_for(&mut self) -> Result<&mut [T], CudaError> {
        self.wait()?;
        // SAFETY: it holds so many elements, written when it was made; no copy is under way, and none
        // can begin while the slice is borrowed.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) })
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // A device that fails here does not copy any more.
        let _ = self.wait();
        self.inner.bind();
        // SAFETY: each was made once and goes once; no copy is under way.
        unsafe {
            sys::cuMemFreeHost(self.data.as_ptr().cast());
            sys::cuEventDestroy_v2(self.copied);
        }
    }
}

impl Device {
    /// `len` elements of page-locked memory, zero.
    ///
    /// # Errors
    /// [`CudaError`] names what the memory was for.
    pub fn pinned<T: Element>(&self, len: usize, what: &str) -> Result<Pinned<T>, CudaError> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or_else(|| CudaError::new(format!("{what}: {len} elements")))?;
        self.inner.bind();
        let mut copied = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the context is current; `copied` is written.
        check(unsafe { sys::cuEventCreate(&mut copied, flags) }, "creating an event")?;
        let mut address: *mut c_void = ptr::null_mut();
        // SAFETY: the context is current; `address` is written. The driver aligns it to a page.
        let done = unsafe { sys::cuMemHostAlloc(&mut address, bytes.max(16), 0) };
        let done = check(done, &format!("{} KiB of page-locked memory for {what}", bytes >> 10));
        let data = match (done, NonNull::new(address.cast::<T>())) {
            (Ok(()), Some(data)) => data,
            (done, _) => {
                // SAFETY: made once, destroyed once.
                unsafe { sys::cuEventDestroy_v2(copied) };
                done?;
                return Err(CudaError::new(format!("page-locked memory for {what}")));
            }
        };
        // SAFETY: the driver gave so many bytes; zeros are a value of every element.
        unsafe { ptr::write_bytes(data.as_ptr().cast::<u8>(), 0, bytes) };
        let inner = Arc::clone(&self.inner);
        Ok(Pinned { data, len, copied, busy: false, inner, element: PhantomData })
    }

    /// Copies the first `len` elements of `from` to `to[at..]`, when all work before is done.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write_pinned<T: Element>(
        &self,
        to: &mut Buffer<T>,
        at: usize,
        from: &mut Pinned<T>,
        len: usize,
    ) -> Result<(), CudaError> {
        assert!(len <= from.len && at <= to.len() && len <= to.len() - at, "write past a buffer");
        if len == 0 {
            return Ok(());
        }
        self.inner.bind();
        from.busy = true;
        // SAFETY: both sides hold the bytes; the host's are neither changed nor freed before the
        // event is reached.
        let done = unsafe {
            let (host, bytes) = (from.data.as_ptr().cast(), len * size_of::<T>());
            sys::cuMemcpyHtoDAsync_v2(to.address(at), host, bytes, self.inner.stream)
        };
        self.copying(from, done, "copying to the GPU")
    }

    /// Copies `from[at..]` to `to[to_at..]`, `len` elements, when all work before is done.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If it does not fit.
    pub fn read_pinned<T: Element>(
        &self,
        from: &Buffer<T>,
        at: usize,
        to: &mut Pinned<T>,
        to_at: usize,
        len: usize,
    ) -> Result<(), CudaError> {
        assert!(at <= from.len() && len <= from.len() - at, "read past a buffer");
        assert!(to_at <= to.len && len <= to.len - to_at, "read past host memory");
        if len == 0 {
            return Ok(());
        }
        self.inner.bind();
        to.busy = true;
        // SAFETY: both sides hold the bytes; the host's are not looked at before the event is
        // reached.
        let done = unsafe {
            let (host, bytes) = (to.data.as_ptr().add(to_at).cast(), len * size_of::<T>());
            sys::cuMemcpyDtoHAsync_v2(host, from.address(at), bytes, self.inner.stream)
        };
        self.copying(to, done, "copying from the GPU")
    }

    /// A copy was begun, or refused: its end is marked.
    fn copying<T>(
        &self,
        pinned: &Pinned<T>,
        begun: sys::CUresult,
        what: &str,
    ) -> Result<(), CudaError> {
        check(begun, what)?;
        // SAFETY: event and stream live.
        let marked = check(unsafe { sys::cuEventRecord(pinned.copied, self.inner.stream) }, what);
        // Without a mark, nobody could tell when the copy is done.
        marked.or_else(|error| self.synchronize().and(Err(error)))
    }
}
