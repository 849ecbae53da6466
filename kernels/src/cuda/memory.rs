//! Memory of a device: allocations, copies to it, from it and on it.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys;

use super::device::{CudaError, Device, Inner, check};

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

    /// Whose memory it is.
    pub(super) fn device(&self) -> &Arc<Inner> {
        &self.allocation.inner
    }

    pub(super) fn address(&self, at: usize) -> u64 {
        self.allocation.address + (at * size_of::<T>()) as u64
    }
}

impl Buffer<f32> {
    /// The same memory, as the numbers' bits.
    pub(super) fn as_words(&self) -> Buffer<u32> {
        let allocation = Arc::clone(&self.allocation);
        Buffer { allocation, len: self.len, element: PhantomData }
    }
}

impl Device {
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
        self.keep_for_capture([&from.allocation, &to.allocation]);
        check(done, "copying on the GPU")
    }

    /// Sets the first `len` elements to zero.
    ///
    /// # Errors
    /// [`CudaError`]
    ///
    /// # Panics
    /// If there are fewer.
    pub fn zero<T: Element>(&self, buffer: &mut Buffer<T>, len: usize) -> Result<(), CudaError> {
        assert!(len <= buffer.len, "zero past a buffer");
        self.inner.bind();
        let bytes = len * size_of::<T>();
        // SAFETY: the buffer holds the bytes.
        let done = unsafe { sys::cuMemsetD8Async(buffer.address(0), 0, bytes, self.inner.stream) };
        self.keep_for_capture([&buffer.allocation]);
        check(done, "clearing GPU memory")
    }
}
