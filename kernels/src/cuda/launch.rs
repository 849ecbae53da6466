//! Launches of kernels, with arguments that are kept alive.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::device::{CudaError, Device, check};
use super::memory::{Allocation, Buffer, Element};

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
        assert!(at <= buffer.len(), "{}: an argument past its buffer", self.name);
        self.used.push(Arc::clone(buffer.allocation()));
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
        self.used.push(Arc::clone(buffer.allocation()));
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

impl Device {
    /// A launch of kernel `name`; arguments follow in the kernel's order.
    pub(super) fn launch(&self, name: &'static str) -> Launch<'_> {
        Launch { device: self, name, words: Vec::new(), starts: Vec::new(), used: Vec::new() }
    }
}
