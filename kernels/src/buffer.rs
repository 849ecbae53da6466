//! Memory that begins on a cache line, on huge pages where it is large.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use half::f16;
use memmap2::MmapMut;

/// From this size on a buffer is part of a mapping that begins on a huge page and asks for more of
/// them: a walk through gigabytes of weights or KV would otherwise wait for the page table. A page of
/// it is resident once something in it is written, and all of it goes back to the system, whatever the
/// allocator.
const HUGE: usize = 2 << 20;
/// Bytes of the mappings that matrices share.
const CHUNK: usize = 64 << 20;

/// Where the matrices of one model lie side by side, so that all but the last bytes of them are on
/// huge pages. Memory goes back when the last matrix of a mapping is dropped.
#[derive(Debug, Default)]
pub struct Arena(Mutex<Option<Chunk>>);

/// A mapping, and how much of it is taken.
#[derive(Debug)]
struct Chunk {
    mapping: Arc<MmapMut>,
    taken: usize,
    end: usize,
}

impl Chunk {
    /// A mapping with `len` bytes from a huge page on, if the system gives one.
    fn new(len: usize) -> Option<Self> {
        let len = len.checked_next_multiple_of(HUGE)?;
        let mapping = MmapMut::map_anon(len.checked_add(HUGE)?).ok()?;
        let taken = mapping.as_ptr().align_offset(HUGE);
        // A system without huge pages refuses: that changes nothing but speed.
        #[cfg(target_os = "linux")]
        let _ = mapping.advise_range(memmap2::Advice::HugePage, taken, len);
        Some(Chunk { mapping: Arc::new(mapping), taken, end: taken + len })
    }

    fn take(&mut self, len: usize) -> Option<Buffer> {
        if self.end - self.taken < len {
            return None;
        }
        let at = self.mapping.as_ptr().wrapping_add(self.taken).cast_mut();
        self.taken = (self.taken + len).next_multiple_of(size_of::<Line>()).min(self.end);
        Some(Buffer { ptr: NonNull::new(at)?, len, mapping: Some(Arc::clone(&self.mapping)) })
    }
}

impl Arena {
    /// A buffer of zeros among those that were made before.
    fn buffer(&self, len: usize) -> Buffer {
        if len == 0 || len > CHUNK / 2 {
            return Buffer::new(len);
        }
        let mut chunk = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = chunk.as_mut().and_then(|chunk| chunk.take(len)) {
            return buffer;
        }
        *chunk = Chunk::new(CHUNK);
        chunk.as_mut().and_then(|chunk| chunk.take(len)).unwrap_or_else(|| Buffer::new(len))
    }
}

/// Zeroed bytes that begin on a cache line.
#[derive(Debug)]
pub(crate) struct Buffer {
    ptr: NonNull<u8>,
    len: usize,
    /// Keeps the memory; `None` for what comes from the allocator. Buffers that share a mapping have
    /// parts of it that do not overlap, and reach them through `ptr` alone.
    mapping: Option<Arc<MmapMut>>,
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
        let mapped = || Chunk::new(len)?.take(len);
        if let Some(buffer) = (len >= HUGE).then(mapped).flatten() {
            return buffer;
        }
        let layout = Self::layout(len);
        // SAFETY: the size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        Buffer { ptr, len, mapping: None }
    }

    /// A part of an arena, if there is one.
    pub(crate) fn in_arena(arena: Option<&Arena>, len: usize) -> Self {
        arena.map_or_else(|| Self::new(len), |arena| arena.buffer(len))
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

    pub(crate) fn halves(&self) -> &[f16] {
        // SAFETY: as above; a cache line is aligned for f16 and any bits are one.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.len / 2) }
    }

    pub(crate) fn halves_mut(&mut self) -> &mut [f16] {
        // SAFETY: as above, and we hold the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.len / 2) }
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

    fn check(mut buffer: Buffer, len: usize, align: usize) -> Buffer {
        assert_eq!((buffer.len(), buffer.bytes().len()), (len, len));
        assert!(buffer.as_ptr().addr().is_multiple_of(align));
        assert!(buffer.bytes().iter().all(|b| *b == 0));
        buffer.bytes_mut().fill(7);
        buffer
    }

    #[test]
    fn buffers_of_all_sizes_are_zeroed_aligned_and_writable() {
        for len in [0, 1, 64, 4096, HUGE - 1, HUGE, HUGE + 4097, 3 * HUGE] {
            check(Buffer::new(len), len, if len < HUGE { 64 } else { HUGE });
        }
    }

    #[test]
    fn buffers_of_an_arena_lie_apart_and_outlive_it() {
        let arena = Arena::default();
        let lens = [1, 100, HUGE + 1, 0, CHUNK / 2, CHUNK / 2 - HUGE, 5000, CHUNK / 2 + 1];
        let all = lens.map(|len| check(arena.buffer(len), len, 64));
        drop(arena);
        for (buffer, len) in all.iter().zip(lens) {
            assert!(buffer.bytes().iter().all(|b| *b == 7), "{len}");
        }
        // Those that fit share one mapping.
        assert_eq!(all[1].as_ptr().addr() - all[0].as_ptr().addr(), 64);
    }
}
