//! KV pages that leave the device and come in.
//!
//! On the device a head's keys lie position by position, as its values do. In [`KvLayout`] they lie
//! element by element, as the CPU's kernels read them: keys are transposed on the host.

use std::sync::PoisonError;

use headstart_kernels::cuda::{KvDims, Precision};

use super::{CudaExecutor, lost};
use crate::core::pages::PageId;
use crate::executor::check::check_page_bytes;
use crate::executor::{ExecutorError, KvDtype, KvFormat, KvLayout};

/// The layout of a pool's pages outside it.
fn layout(dims: KvDims, precision: Precision) -> KvLayout {
    KvLayout {
        page_size: dims.page_size,
        layers: dims.layers,
        kv_heads: dims.kv_heads,
        head_dim: dims.head_dim,
        dtype: match precision {
            Precision::F32 => KvDtype::F32,
            Precision::Bf16 => KvDtype::Bf16,
        },
        tp: 1,
    }
}

/// Copies `from` to `to` with each head's keys transposed from `[rows][cols]`; values stay as they
/// are. Both are whole pages.
fn transpose_keys(layout: &KvLayout, rows: usize, cols: usize, from: &[u8], to: &mut [u8]) {
    let (head, element) = (layout.head_bytes(), layout.dtype.bytes());
    let keys = layout.kv_heads * head;
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
    pub(super) fn format(&self) -> Option<KvFormat> {
        let model = self.model.hash?;
        Some(KvFormat { model, layout: layout(self.kv.dims(), self.model.precision()) })
    }

    /// Copies a page to the host.
    pub(super) fn page_out(
        &mut self,
        page: PageId,
        out: &mut Vec<u8>,
    ) -> Result<(), ExecutorError> {
        self.limits.check_page(page)?;
        let layout = layout(self.kv.dims(), self.model.precision());
        let model = self.model.clone();
        let _turn = model.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let device = model.device();
        device.gather_pages(&self.kv, &[page.0], &mut self.page).map_err(lost)?;
        device.read(&self.page, 0, &mut self.page_host).map_err(lost)?;
        out.resize(layout.page_bytes(), 0);
        transpose_keys(&layout, layout.page_size, layout.head_dim, &self.page_host, out);
        Ok(())
    }

    /// Overwrites a page from the host.
    pub(super) fn page_in(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        self.limits.check_page(page)?;
        let layout = layout(self.kv.dims(), self.model.precision());
        check_page_bytes(data, layout.page_bytes())?;
        transpose_keys(&layout, layout.head_dim, layout.page_size, data, &mut self.page_host);
        let model = self.model.clone();
        let _turn = model.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let device = model.device();
        device.write(&mut self.page, 0, &self.page_host).map_err(lost)?;
        device.scatter_pages(&mut self.kv, &[page.0], &self.page).map_err(lost)
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
        transpose_keys(&layout, 2, 3, &device, &mut outside);
        // Elements 0 to 5 of the first head: two positions of three become three of two.
        assert_eq!(outside[..12], [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
        assert_eq!(outside[24..], device[24..]);
        transpose_keys(&layout, 3, 2, &outside, &mut back);
        assert_eq!(back, device);
    }
}
