//! KV pages that leave the device and come in.
//!
//! On the device a head's keys lie position by position, as its values do. In [`KvLayout`] they lie
//! element by element, as the CPU's kernels read them: keys are transposed on the host.

use std::sync::PoisonError;

use headstart_kernels::cuda::Precision;

use super::{CudaExecutor, lost};
use crate::core::pages::PageId;
use crate::executor::check::check_page_bytes;
use crate::executor::{ExecutorError, KvDtype, KvFormat, KvLayout};

/// Copies `from` to `to` with each head's keys transposed from `[rows][cols]`; values stay as they
/// are. Both are whole pages of a rank with `heads` KV heads.
fn transpose_keys(
    layout: &KvLayout,
    heads: usize,
    [rows, cols]: [usize; 2],
    from: &[u8],
    to: &mut [u8],
) {
    let (head, element) = (layout.head_bytes(), layout.dtype.bytes());
    let keys = heads * head;
    let layers = from.chunks_exact(2 * keys).zip(to.chunks_exact_mut(2 * keys));
    for (from, to) in layers {
        to[keys..].copy_from_slice(&from[keys..]);
        let heads = from[..keys].chunks_exact(head).zip(to[..keys].chunks_exact_mut(head));
        for (from, to) in heads {
            for (index, value) in from.chunks_exact(element).enumerate() {
                let (row, col) = (index / cols, index % cols);
                to[(col * rows + row) * element..][..element].copy_from_slice(value);
            }
        }
    }
}

impl CudaExecutor {
    /// What its pages are to other executors; a model without files has no name.
    pub(super) fn format_of_all(&self) -> Option<KvFormat> {
        let model = self.model.hash?;
        Some(KvFormat { model, layout: self.layout() })
    }

    /// The layout of its pages outside it.
    fn layout(&self) -> KvLayout {
        let config = self.model.config();
        KvLayout {
            page_size: self.limits.page_size,
            layers: config.layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            dtype: match self.model.precision() {
                Precision::F32 => KvDtype::F32,
                Precision::Bf16 => KvDtype::Bf16,
            },
            tp: self.model.of,
        }
    }

    /// Bytes of a page of this process's ranks.
    pub(super) fn local_page_bytes(&self) -> usize {
        self.ranks.iter().map(|rank| rank.kv.page_bytes()).sum()
    }

    /// Copies a page to the host, the ranks' parts one behind the other.
    pub(super) fn page_out(&mut self, page: PageId, out: &mut [u8]) -> Result<(), ExecutorError> {
        self.limits.check_page(page)?;
        check_page_bytes(out, self.local_page_bytes())?;
        let (layout, model) = (self.layout(), self.model.clone());
        let _turn = model.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (order, mut rest) = ([layout.page_size, layout.head_dim], out);
        for (part, rank) in model.parts.iter().zip(&mut self.ranks) {
            let device = &part.device;
            device.gather_pages(&rank.kv, &[page.0], &mut rank.page).map_err(lost)?;
            self.page_host.resize(rank.kv.page_bytes(), 0);
            device.read(&rank.page, 0, &mut self.page_host).map_err(lost)?;
            let (to, after) = rest.split_at_mut(self.page_host.len());
            transpose_keys(&layout, rank.kv.dims().kv_heads, order, &self.page_host, to);
            rest = after;
        }
        Ok(())
    }

    /// Overwrites a page from the host.
    pub(super) fn page_in(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        self.limits.check_page(page)?;
        check_page_bytes(data, self.local_page_bytes())?;
        let (layout, model) = (self.layout(), self.model.clone());
        let _turn = model.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (order, mut rest) = ([layout.head_dim, layout.page_size], data);
        for (part, rank) in model.parts.iter().zip(&mut self.ranks) {
            let (from, after) = rest.split_at(rank.kv.page_bytes());
            self.page_host.resize(from.len(), 0);
            transpose_keys(&layout, rank.kv.dims().kv_heads, order, from, &mut self.page_host);
            part.device.write(&mut rank.page, 0, &self.page_host).map_err(lost)?;
            part.device.scatter_pages(&mut rank.kv, &[page.0], &rank.page).map_err(lost)?;
            rest = after;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_change_their_order_and_values_do_not() {
        let layout = KvLayout {
            page_size: 2,
            layers: 1,
            kv_heads: 2,
            head_dim: 3,
            dtype: KvDtype::Bf16,
            tp: 1,
        };
        let device: Vec<u8> = (0..layout.page_bytes() as u8).collect();
        let (mut outside, mut back) = (vec![0; device.len()], vec![0; device.len()]);
        transpose_keys(&layout, 2, [2, 3], &device, &mut outside);
        // Elements 0 to 5 of the first head: two positions of three become three of two.
        assert_eq!(outside[..12], [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
        assert_eq!(outside[24..], device[24..]);
        transpose_keys(&layout, 2, [3, 2], &outside, &mut back);
        assert_eq!(back, device);
    }
}
