//! Memory that begins on a cache line, on huge pages where it is large.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// From this size on a buffer begins on a huge page and asks for more of them: a walk through
/// gigabytes of weights would otherwise wait for the page table.
const HUGE: usize = 2 << 20;

/// Zeroed bytes that begin on a cache line.
pub(crate) struct Buffer {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory is owned and plain bytes; access goes through `&self` and `&mut self`.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub(crate) fn new(len: usize) -> Self {
        if len == 0 {
            return Buffer { ptr: NonNull::<Line>::dangling().cast(), len };
        }
        let layout = Self::layout(len);
        // SAFETY: the size is not zero.
        let ptr = unsafe { alloc(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        if len >= HUGE {
            advise_huge(ptr, len);
        }
        // SAFETY: the allocation has `len` bytes.
        unsafe { ptr.as_ptr().write_bytes(0, len) };
        Buffer { ptr, len }
    }

    fn layout(len: usize) -> Layout {
        let align = if len >= HUGE { HUGE } else { size_of::<Line>() };
        Layout::from_size_align(len, align).expect("a length that fits the address space")
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Grows to at least `len` bytes; what was in it is lost then.
    pub(crate) fn reserve(&mut self, len: usize) {
        if len > self.len {
            *self = Buffer::new(len.next_power_of_two());
        }
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `ptr` holds `len` initialised bytes.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and we hold the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }

    pub(crate) fn floats(&self) -> &[f32] {
        // SAFETY: as above; a cache line is aligned for f32 and any bits are a float.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.len / 4) }
    }

    pub(crate) fn floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and we hold the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.len / 4) }
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Buffer::new(0)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) };
        }
    }
}

/// One cache line.
#[repr(C, align(64))]
struct Line([u8; 64]);

/// `madvise(MADV_HUGEPAGE)`; a refusal changes nothing but speed.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn advise_huge(ptr: NonNull<u8>, len: usize) {
    const MADVISE: i64 = 28;
    const MADV_HUGEPAGE: i64 = 14;
    let whole_pages = len / 4096 * 4096;
    // SAFETY: advice about our own allocation, whose contents it keeps.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") MADVISE => _, in("rdi") ptr.as_ptr(),
            in("rsi") whole_pages, in("rdx") MADV_HUGEPAGE, lateout("rcx") _, lateout("r11") _);
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn advise_huge(_: NonNull<u8>, _: usize) {}
