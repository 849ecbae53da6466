//! Memory that begins on a cache line, on huge pages where it is large.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use memmap2::MmapMut;

/// From this size on a buffer is a mapping of its own that begins on a huge page and asks for more
/// of them: a walk through gigabytes of weights would otherwise wait for the page table. No byte of
/// it is resident before it is written, and all of it goes back when it is dropped, whatever the
/// allocator.
const HUGE: usize = 2 << 20;

/// Zeroed bytes that begin on a cache line.
pub(crate) struct Buffer {
    ptr: NonNull<u8>,
    len: usize,
    /// Keeps a large buffer's memory; `None` for what comes from the allocator.
    mapping: Option<MmapMut>,
}

// SAFETY: the memory is owned and plain bytes; access goes through `&self` and `&mut self`.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub(crate) fn new(len: usize) -> Self {
        if len == 0 {
            return Buffer { ptr: NonNull::<Line>::dangling().cast(), len, mapping: None };
        }
        if let Some(buffer) = (len >= HUGE).then(|| Self::mapped(len)).flatten() {
            return buffer;
        }
        let layout = Self::layout(len);
        // SAFETY: the size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        Buffer { ptr, len, mapping: None }
    }

    /// A mapping, if the system gives one.
    fn mapped(len: usize) -> Option<Self> {
        let mut mapping = MmapMut::map_anon(len.checked_add(HUGE)?).ok()?;
        let skip = mapping.as_ptr().align_offset(HUGE);
        // A system without huge pages refuses: that changes nothing but speed.
        #[cfg(target_os = "linux")]
        let _ = mapping.advise_range(memmap2::Advice::HugePage, skip, len);
        let ptr = NonNull::new(mapping[skip..][..len].as_mut_ptr())?;
        Some(Buffer { ptr, len, mapping: Some(mapping) })
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, size_of::<Line>()).expect("a length within the address space")
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Grows to at least `len` bytes; what was in it is lost then.
    pub(crate) fn reserve(&mut self, len: usize) {
        if len > self.len {
            *self = Buffer::default();
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
        if self.len > 0 && self.mapping.is_none() {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) };
        }
    }
}

/// One cache line.
#[repr(C, align(64))]
struct Line([u8; 64]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_all_sizes_are_zeroed_aligned_and_writable() {
        for len in [0, 1, 64, 4096, HUGE - 1, HUGE, HUGE + 4097, 3 * HUGE] {
            let mut buffer = Buffer::new(len);
            assert_eq!((buffer.len(), buffer.bytes().len()), (len, len));
            assert!(buffer.as_ptr().addr().is_multiple_of(if len < HUGE { 64 } else { HUGE }));
            assert!(buffer.bytes().iter().all(|b| *b == 0));
            buffer.bytes_mut().fill(7);
            assert!(buffer.bytes().iter().all(|b| *b == 7));
        }
    }
}
