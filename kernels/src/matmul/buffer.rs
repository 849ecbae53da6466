//! Memory that begins on a cache line.

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeroed bytes that begin on a cache line.
pub(crate) struct Buffer {
    lines: Vec<Line>,
    len: usize,
}

impl Buffer {
    pub(crate) fn new(len: usize) -> Self {
        Buffer { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Grows to at least `len` bytes; what was in it is kept.
    pub(crate) fn reserve(&mut self, len: usize) {
        if len > self.len {
            self.lines.resize(len.div_ceil(64), Line([0; 64]));
            self.len = len;
        }
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.lines.as_ptr().cast()
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.lines.as_mut_ptr().cast()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `lines` holds at least `len` initialised bytes.
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
