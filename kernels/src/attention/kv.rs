//! The pool of KV pages.

use crate::buffer::Buffer;
use crate::pool::SendPtr;
use crate::{DType, KernelError, ThreadPool};
use half::f16;
use half::slice::HalfFloatSliceExt;

#[cfg(not(target_endian = "little"))]
compile_error!("KV pages travel as they lie in memory, which must be little-endian");

/// The shape of a [`KvPool`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers that keep keys and values.
    pub layers: usize,
    /// KV heads a layer.
    pub kv_heads: usize,
    /// Elements a head; a multiple of 4.
    pub head_dim: usize,
    /// Positions a page holds; a multiple of 16.
    pub page_size: usize,
    /// Pages in the pool.
    pub pages: usize,
    /// How keys and values are kept: F32, or F16, to which they are rounded (beyond its range to the
    /// largest finite value).
    pub dtype: DType,
}

impl KvShape {
    /// Elements of one page, all layers.
    pub fn page_len(&self) -> usize {
        self.layers * self.layer_len()
    }

    /// Bytes of one page, all layers.
    pub fn page_bytes(&self) -> usize {
        self.page_len() * self.dtype.block_bytes()
    }

    fn layer_len(&self) -> usize {
        2 * self.kv_heads * self.head_len()
    }

    fn head_len(&self) -> usize {
        self.head_dim * self.page_size
    }

    fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Where the keys and the values of a head begin in a page.
    fn head_offsets(&self, layer: usize, page: u32, head: usize) -> (usize, usize) {
        let layer = page as usize * self.page_len() + layer * self.layer_len();
        let keys = layer + head * self.head_len();
        (keys, keys + self.kv_heads * self.head_len())
    }

    fn check_slot(&self, layer: usize, at: KvSlot) {
        assert!(
            layer < self.layers
                && (at.page as usize) < self.pages
                && (at.slot as usize) < self.page_size,
            "layer {layer}, {at:?} is outside the KV pool"
        );
    }
}

/// Where a token's keys and values go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSlot {
    /// The page.
    pub page: u32,
    /// The position within the page.
    pub slot: u32,
}

/// Keys and values of all sequences, in pages.
///
/// One page is contiguous, so it is moved or copied as one slice:
/// `[layer]{ keys [kv_head][head_dim][page_size], values [kv_head][page_size][head_dim] }`. Keys lie
/// transposed, so that the scores of neighbouring positions are neighbouring lanes. Memory of pages
/// never written is not touched, up to a huge page around those that were.
#[derive(Debug)]
pub struct KvPool {
    shape: KvShape,
    data: Buffer,
    /// Rounded rows on their way into the pages.
    rounded: [Vec<f16>; 2],
}

/// The elements of a pool.
pub(super) enum Elements<'a> {
    Single(&'a [f32]),
    Half(&'a [f16]),
}

impl KvPool {
    /// A pool of zeros.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for a page size that is no multiple of 16, a head size that is no
    /// multiple of 4, a type other than F32 and F16, or a pool beyond the address space.
    pub fn new(shape: KvShape) -> Result<Self, KernelError> {
        let bad = |what, found| Err(KernelError::Shape { what, found });
        if shape.page_size == 0 || !shape.page_size.is_multiple_of(16) {
            return bad("KV page size must be a multiple of 16", shape.page_size);
        }
        if shape.head_dim == 0 || !shape.head_dim.is_multiple_of(4) {
            return bad("head size must be a multiple of 4", shape.head_dim);
        }
        let total = [2, shape.layers, shape.kv_heads, shape.head_dim, shape.page_size, shape.pages]
            .iter()
            .try_fold(1usize, |a, b| a.checked_mul(*b))
            .filter(|n| *n <= isize::MAX as usize / size_of::<f32>());
        let Some(total) = total else { return bad("KV pool too large, pages", shape.pages) };
        if !matches!(shape.dtype, DType::F32 | DType::F16) {
            return bad("KV of a type with elements of bytes", shape.dtype.block_bytes());
        }
        let data = Buffer::new(total * shape.dtype.block_bytes());
        Ok(KvPool { shape, data, rounded: Default::default() })
    }

    /// The pool's shape.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    pub(super) fn elements(&self) -> Elements<'_> {
        match self.shape.dtype {
            DType::F16 => Elements::Half(self.data.halves()),
            _ => Elements::Single(self.data.floats()),
        }
    }

    /// Where a page's bytes are.
    fn page(&self, page: u32) -> std::ops::Range<usize> {
        let bytes = self.shape.page_bytes();
        page as usize * bytes..(page as usize + 1) * bytes
    }

    /// Writes the bytes of one page, all layers, little-endian: what is sent to another node or
    /// checksummed.
    ///
    /// # Panics
    /// If the page is not in the pool, or `out` is not [`KvShape::page_bytes`] long.
    pub fn export_page(&self, page: u32, out: &mut [u8]) {
        out.copy_from_slice(&self.data.bytes()[self.page(page)]);
    }

    /// Overwrites one page with the bytes of another one.
    ///
    /// # Panics
    /// As [`KvPool::export_page`].
    pub fn import_page(&mut self, page: u32, bytes: &[u8]) {
        let page = self.page(page);
        copy_past_caches(bytes, &mut self.data.bytes_mut()[page]);
    }

    /// Copies a page (copy-on-write).
    ///
    /// # Panics
    /// If a page is not in the pool.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        assert!(from.max(to) < self.shape.pages as u32, "copy_page: {from} to {to}");
        let (from, to) = (self.page(from), self.page(to));
        self.data.bytes_mut().copy_within(from, to.start);
    }

    /// Writes the keys and values of a batch (`k` and `v` are `[slots][kv_heads * head_dim]`).
    ///
    /// # Panics
    /// If a place is not in the pool or a slice has another length.
    pub fn write_rows(
        &mut self,
        pool: &ThreadPool,
        layer: usize,
        slots: &[KvSlot],
        k: &[f32],
        v: &[f32],
    ) {
        let s = self.shape;
        assert_eq!(k.len(), slots.len() * s.width(), "write_rows: keys");
        assert_eq!(v.len(), slots.len() * s.width(), "write_rows: values");
        slots.iter().for_each(|at| s.check_slot(layer, *at));
        if s.dtype == DType::F16 {
            let [keys, values] = &mut self.rounded;
            round(k, keys);
            round(v, values);
            scatter(pool, &s, self.data.halves_mut(), layer, slots, [keys, values]);
        } else {
            scatter(pool, &s, self.data.floats_mut(), layer, slots, [k, v]);
        }
    }

    /// Reads one token's keys and values back.
    ///
    /// # Panics
    /// As [`KvPool::write_rows`].
    pub fn read(&self, layer: usize, at: KvSlot, k: &mut [f32], v: &mut [f32]) {
        let s = &self.shape;
        s.check_slot(layer, at);
        assert_eq!((k.len(), v.len()), (s.width(), s.width()), "read: one token");
        let element = |i: usize| match self.elements() {
            Elements::Single(elements) => elements[i],
            Elements::Half(elements) => elements[i].to_f32(),
        };
        let slot = at.slot as usize;
        for head in 0..s.kv_heads {
            let (keys, values) = s.head_offsets(layer, at.page, head);
            for d in 0..s.head_dim {
                k[head * s.head_dim + d] = element(keys + d * s.page_size + slot);
                v[head * s.head_dim + d] = element(values + slot * s.head_dim + d);
            }
        }
    }

    /// The places of the keys `[head_dim][page_size]` and values `[page_size][head_dim]` of a head in
    /// a page.
    pub(super) fn head(
        &self,
        layer: usize,
        page: u32,
        head: usize,
    ) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let (keys, values) = self.shape.head_offsets(layer, page, head);
        let len = self.shape.head_len();
        (keys..keys + len, values..values + len)
    }
}

/// Copies past the caches where the machine can: a page is next read after many others came, and a
/// plain store would read each line before it writes it.
///
/// # Panics
/// If the lengths differ.
fn copy_past_caches(from: &[u8], to: &mut [u8]) {
    assert_eq!(from.len(), to.len(), "bytes of a page");
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
        // SAFETY: any bits are integers.
        let (head, lanes, tail) = unsafe { to.align_to_mut::<__m128i>() };
        let (first, rest) = from.split_at(head.len());
        let (rest, last) = rest.split_at(size_of_val(lanes));
        head.copy_from_slice(first);
        for (lane, from) in lanes.iter_mut().zip(rest.as_chunks::<16>().0) {
            // SAFETY: SSE2 is part of x86-64; `lane` is aligned, `from` is 16 bytes.
            unsafe { _mm_stream_si128(lane, _mm_loadu_si128(from.as_ptr().cast())) };
        }
        // SAFETY: as above. Who reads the page on another thread sees all of it.
        unsafe { _mm_sfence() };
        tail.copy_from_slice(last);
    }
    #[cfg(not(target_arch = "x86_64"))]
    to.copy_from_slice(from);
}

/// Rounds to the nearest half; beyond its range to its largest value.
fn round(from: &[f32], to: &mut Vec<f16>) {
    to.resize(from.len(), f16::ZERO);
    to.convert_from_f32_slice(from);
    for v in to {
        let bits = v.to_bits();
        let infinite = bits & 0x7fff == 0x7c00;
        *v = f16::from_bits(if infinite { bits - 1 } else { bits });
    }
}

/// Puts rows of keys and values into their pages; the places have been checked.
fn scatter<E: Copy + Send + Sync>(
    pool: &ThreadPool,
    s: &KvShape,
    data: &mut [E],
    layer: usize,
    slots: &[KvSlot],
    [k, v]: [&[E]; 2],
) {
    let base = SendPtr(data.as_mut_ptr());
    let head = |head: usize| {
        for (i, at) in slots.iter().enumerate() {
            let (keys, values) = s.head_offsets(layer, at.page, head);
            let (slot, row) = (at.slot as usize, i * s.width() + head * s.head_dim);
            for d in 0..s.head_dim {
                // SAFETY: layer, page and slot are inside the pool, so the place is; tasks write
                // different heads, and `&mut` keeps everyone else out.
                unsafe { *base.at(keys + d * s.page_size + slot) = k[row + d] };
            }
            let v = &v[row..row + s.head_dim];
            // SAFETY: as above.
            let to = unsafe { base.at(values + slot * s.head_dim) };
            // SAFETY: as above; `v` is not in the pool.
            unsafe { std::ptr::copy_nonoverlapping(v.as_ptr(), to, v.len()) };
        }
    };
    // A few tokens are not worth waking a thread.
    if slots.len() < 8 { (0..s.kv_heads).for_each(head) } else { pool.run(s.kv_heads, &head) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    #[test]
    fn what_is_written_is_read() {
        let shape = KvShape {
            layers: 3,
            kv_heads: 3,
            head_dim: 12,
            page_size: 16,
            pages: 5,
            dtype: DType::F32,
        };
        let pool = ThreadPool::new(2);
        for dtype in [DType::F32, DType::F16] {
            let shape = KvShape { dtype, ..shape };
            let (mut a, mut b) = (KvPool::new(shape).unwrap(), KvPool::new(shape).unwrap());
            let mut rng = Rng::new(7);
            let slots: Vec<_> =
                (0..40).map(|i| KvSlot { page: 4 - i / 16, slot: i % 16 }).collect();
            let (k, v) = (rng.floats(40 * 36, 1.0), rng.floats(40 * 36, 1.0));
            a.write_rows(&pool, 1, &slots, &k, &v);
            let kept = |x: &[f32]| -> Vec<f32> {
                let half = |v: &f32| f16::from_f32(*v).to_f32();
                if dtype == DType::F32 { x.to_vec() } else { x.iter().map(half).collect() }
            };
            for (i, at) in slots.iter().enumerate() {
                let (k, v) = (&k[i * 36..][..36], &v[i * 36..][..36]);
                b.write_rows(&pool, 1, &[*at], k, v);
                let (mut rk, mut rv) = (vec![0.0; 36], vec![0.0; 36]);
                a.read(1, *at, &mut rk, &mut rv);
                assert_eq!((rk, rv), (kept(k), kept(v)));
            }
            let page = |pool: &KvPool, page| {
                let mut bytes = vec![1; shape.page_bytes()];
                pool.export_page(page, &mut bytes);
                bytes
            };
            assert!((0..5).all(|p| page(&a, p) == page(&b, p)));
            a.copy_page(4, 0);
            assert_eq!(page(&a, 4), page(&a, 0));
            b.import_page(1, &page(&a, 3));
            assert_eq!(page(&b, 1), page(&a, 3));
        }
    }

    #[test]
    fn any_part_of_a_page_is_filled() {
        let bytes: Vec<u8> = (0..40).collect();
        for (from, len) in (0..18).flat_map(|from| (0..40).map(move |len| (from, len))) {
            let mut to = [255; 60];
            copy_past_caches(&bytes[..len], &mut to[from..from + len]);
            for (i, to) in to.into_iter().enumerate() {
                let right = if (from..from + len).contains(&i) { bytes[i - from] } else { 255 };
                assert_eq!(to, right, "{i} of {len} from {from}");
            }
        }
    }

    #[test]
    fn halves_stay_finite() {
        let mut to = Vec::new();
        round(&[1e9, -1e9, 65504.0, 1e-9, f32::NAN, -0.1], &mut to);
        let back: Vec<f32> = to.iter().map(|v| v.to_f32()).collect();
        assert_eq!(back[..4], [65504.0, -65504.0, 65504.0, 0.0]);
        assert!(back[4].is_nan() && (back[5] + 0.1).abs() < 5e-5);
    }

    #[test]
    fn bad_shapes_are_refused() {
        let dtype = DType::F32;
        let good = KvShape { layers: 1, kv_heads: 1, head_dim: 4, page_size: 16, pages: 1, dtype };
        assert!(KvPool::new(KvShape { page_size: 8, ..good }).is_err());
        assert!(KvPool::new(KvShape { head_dim: 6, ..good }).is_err());
        assert!(KvPool::new(KvShape { pages: usize::MAX, ..good }).is_err());
        assert!(KvPool::new(KvShape { dtype: DType::Q8_0, ..good }).is_err());
        assert!(KvPool::new(good).is_ok());
    }
}
