//! The pool of KV pages.

use crate::pool::SendPtr;
use crate::{KernelError, ThreadPool};

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
}

impl KvShape {
    /// f32 values of one page, all layers.
    pub fn page_len(&self) -> usize {
        self.layers * self.layer_len()
    }

    /// Bytes of one page, all layers.
    pub fn page_bytes(&self) -> usize {
        self.page_len() * size_of::<f32>()
    }

    fn layer_len(&self) -> usize {
        2 * self.kv_heads * self.head_len()
    }

    fn head_len(&self) -> usize {
        self.head_dim * self.page_size
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
/// `[layer]{ keys [kv_head][head_dim][page_size], values [kv_head][page_size][head_dim] }` in f32.
/// Keys lie transposed, so that the scores of neighbouring positions are neighbouring lanes. Memory
/// of pages never written is not touched.
#[derive(Debug)]
pub struct KvPool {
    shape: KvShape,
    data: Vec<f32>,
}

impl KvPool {
    /// A pool of zeros.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for a page size that is no multiple of 16, a head size that is no
    /// multiple of 4, or a pool beyond the address space.
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
        match total {
            Some(n) => Ok(KvPool { shape, data: vec![0.0; n] }),
            None => bad("KV pool too large, pages", shape.pages),
        }
    }

    /// The pool's shape.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// One page, all layers: what is sent to another node or checksummed.
    ///
    /// # Panics
    /// If the page is not in the pool.
    pub fn page(&self, page: u32) -> &[f32] {
        let len = self.shape.page_len();
        &self.data[page as usize * len..][..len]
    }

    /// One page, to be overwritten.
    ///
    /// # Panics
    /// If the page is not in the pool.
    pub fn page_mut(&mut self, page: u32) -> &mut [f32] {
        let len = self.shape.page_len();
        &mut self.data[page as usize * len..][..len]
    }

    /// Copies a page (copy-on-write).
    ///
    /// # Panics
    /// If a page is not in the pool.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let len = self.shape.page_len();
        let (from, to) = (from as usize * len, to as usize * len);
        assert!(to + len <= self.data.len(), "copy_page: target page");
        self.data.copy_within(from..from + len, to);
    }

    /// Writes one token's keys and values (`[kv_heads * head_dim]` each).
    ///
    /// # Panics
    /// If the place is not in the pool or a slice has another length.
    pub fn write(&mut self, layer: usize, at: KvSlot, k: &[f32], v: &[f32]) {
        let s = self.shape;
        let width = s.kv_heads * s.head_dim;
        assert_eq!((k.len(), v.len()), (width, width), "write: keys and values of one token");
        for head in 0..s.kv_heads {
            let (keys, values) = self.head_offsets(layer, at.page, head);
            let slot = self.check_slot(layer, at);
            for (d, k) in k[head * s.head_dim..][..s.head_dim].iter().enumerate() {
                self.data[keys + d * s.page_size + slot] = *k;
            }
            self.data[values + slot * s.head_dim..][..s.head_dim]
                .copy_from_slice(&v[head * s.head_dim..][..s.head_dim]);
        }
    }

    /// Writes the keys and values of a batch (`k` and `v` are `[slots][kv_heads * head_dim]`).
    ///
    /// # Panics
    /// As [`KvPool::write`].
    pub fn write_rows(
        &mut self,
        pool: &ThreadPool,
        layer: usize,
        slots: &[KvSlot],
        k: &[f32],
        v: &[f32],
    ) {
        let s = self.shape;
        let width = s.kv_heads * s.head_dim;
        assert_eq!(k.len(), slots.len() * width, "write_rows: keys");
        assert_eq!(v.len(), slots.len() * width, "write_rows: values");
        if slots.len() < 8 {
            for (i, at) in slots.iter().enumerate() {
                self.write(layer, *at, &k[i * width..][..width], &v[i * width..][..width]);
            }
            return;
        }
        slots.iter().for_each(|at| {
            self.check_slot(layer, *at);
        });
        let base = SendPtr(self.data.as_mut_ptr());
        pool.run(s.kv_heads, &|head| {
            for (i, at) in slots.iter().enumerate() {
                let (keys, values) = self.head_offsets(layer, at.page, head);
                let (slot, row) = (at.slot as usize, i * width + head * s.head_dim);
                for d in 0..s.head_dim {
                    // SAFETY: `check_slot` found layer, page and slot inside the pool, so the place
                    // is; tasks write different heads, and `&mut self` keeps everyone else out.
                    unsafe { *base.at(keys + d * s.page_size + slot) = k[row + d] };
                }
                let v = &v[row..row + s.head_dim];
                // SAFETY: as above.
                let to = unsafe { base.at(values + slot * s.head_dim) };
                // SAFETY: as above; `v` is not in the pool.
                unsafe { std::ptr::copy_nonoverlapping(v.as_ptr(), to, v.len()) };
            }
        });
    }

    /// Reads one token's keys and values back.
    ///
    /// # Panics
    /// As [`KvPool::write`].
    pub fn read(&self, layer: usize, at: KvSlot, k: &mut [f32], v: &mut [f32]) {
        let s = self.shape;
        let slot = self.check_slot(layer, at);
        for head in 0..s.kv_heads {
            let (keys, values) = self.head_offsets(layer, at.page, head);
            for d in 0..s.head_dim {
                k[head * s.head_dim + d] = self.data[keys + d * s.page_size + slot];
                v[head * s.head_dim + d] = self.data[values + slot * s.head_dim + d];
            }
        }
    }

    fn check_slot(&self, layer: usize, at: KvSlot) -> usize {
        let s = &self.shape;
        assert!(
            layer < s.layers && (at.page as usize) < s.pages && (at.slot as usize) < s.page_size,
            "layer {layer}, {at:?} is outside the KV pool"
        );
        at.slot as usize
    }

    /// Where the keys and the values of a head begin in a page.
    fn head_offsets(&self, layer: usize, page: u32, head: usize) -> (usize, usize) {
        let s = &self.shape;
        let layer = page as usize * s.page_len() + layer * s.layer_len();
        let keys = layer + head * s.head_len();
        (keys, keys + s.kv_heads * s.head_len())
    }

    /// The keys `[head_dim][page_size]` and values `[page_size][head_dim]` of a head in a page.
    pub(super) fn head(&self, layer: usize, page: u32, head: usize) -> (&[f32], &[f32]) {
        let (keys, values) = self.head_offsets(layer, page, head);
        let len = self.shape.head_len();
        (&self.data[keys..keys + len], &self.data[values..values + len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    #[test]
    fn what_is_written_is_read() {
        let shape = KvShape { layers: 3, kv_heads: 3, head_dim: 12, page_size: 16, pages: 5 };
        let (mut a, mut b) = (KvPool::new(shape).unwrap(), KvPool::new(shape).unwrap());
        let pool = ThreadPool::new(2);
        let mut rng = Rng::new(7);
        let slots: Vec<_> = (0..40).map(|i| KvSlot { page: 4 - i / 16, slot: i % 16 }).collect();
        let (k, v) = (rng.floats(40 * 36, 1.0), rng.floats(40 * 36, 1.0));
        a.write_rows(&pool, 1, &slots, &k, &v);
        for (i, at) in slots.iter().enumerate() {
            b.write(1, *at, &k[i * 36..][..36], &v[i * 36..][..36]);
            let (mut rk, mut rv) = (vec![0.0; 36], vec![0.0; 36]);
            a.read(1, *at, &mut rk, &mut rv);
            assert_eq!((&rk[..], &rv[..]), (&k[i * 36..][..36], &v[i * 36..][..36]));
        }
        assert_eq!(a.data, b.data);
        a.copy_page(4, 0);
        assert_eq!(a.page(4), a.page(0));
        let copy = a.page(3).to_vec();
        b.page_mut(1).copy_from_slice(&copy);
        assert_eq!(b.page(1), a.page(3));
    }

    #[test]
    fn bad_shapes_are_refused() {
        let good = KvShape { layers: 1, kv_heads: 1, head_dim: 4, page_size: 16, pages: 1 };
        assert!(KvPool::new(KvShape { page_size: 8, ..good }).is_err());
        assert!(KvPool::new(KvShape { head_dim: 6, ..good }).is_err());
        assert!(KvPool::new(KvShape { pages: usize::MAX, ..good }).is_err());
        assert!(KvPool::new(good).is_ok());
    }
}
