//! Pages as a whole.

use super::*;
use crate::cuda::{KvCache, KvDims};

/// Where a head's element 0 lies in the pool.
pub(super) fn place(
    dims: KvDims,
    page: usize,
    layer: usize,
    values: usize,
    head: usize,
    slot: usize,
) -> usize {
    let block = (page * dims.layers + layer) * 2 + values;
    ((block * dims.kv_heads + head) * dims.page_size + slot) * dims.head_dim
}

/// The whole pool's values.
pub(super) fn all(device: &Device, kv: &KvCache) -> Vec<f32> {
    let pages: Vec<u32> = (0..kv.dims().pages as u32).collect();
    let mut bytes = device.alloc(pages.len() * kv.page_bytes(), "test data").expect("memory");
    device.gather_pages(kv, &pages, &mut bytes).expect("a launch");
    let mut host = vec![0u8; bytes.len()];
    device.read(&bytes, 0, &mut host).expect("a copy");
    if kv.page_bytes() == 4 * kv.dims().page_len() {
        host.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    } else {
        let wide = |b: &[u8]| bf16::from_le_bytes([b[0], b[1]]).to_f32();
        host.chunks_exact(2).map(wide).collect()
    }
}

/// A pool with these values.
pub(super) fn filled(device: &Device, dims: KvDims, precision: Precision, x: &[f32]) -> KvCache {
    let mut kv = KvCache::new(device, dims, precision).expect("a pool");
    let bytes: Vec<u8> = match precision {
        Precision::F32 => x.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Precision::Bf16 => x.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    };
    let pages: Vec<u32> = (0..dims.pages as u32).collect();
    let bytes = device.upload(&bytes, "test data").expect("memory");
    device.scatter_pages(&mut kv, &pages, &bytes).expect("a launch");
    kv
}

#[test]
fn pages_are_gathered_and_scattered() {
    let (device, mut rng) = (device(), Rng::new(24));
    let dims = KvDims { layers: 2, kv_heads: 3, head_dim: 12, page_size: 16, pages: 5 };
    for precision in [Precision::F32, Precision::Bf16] {
        let data = rounded(precision, &rng.floats(5 * dims.page_len(), 1.0));
        let mut kv = filled(&device, dims, precision, &data);
        assert_eq!(all(&device, &kv), data);
        let mut some = device.alloc(2 * kv.page_bytes(), "test data").expect("memory");
        device.gather_pages(&kv, &[4, 1], &mut some).expect("a launch");
        device.scatter_pages(&mut kv, &[0, 4], &some).expect("a launch");
        let (got, len) = (all(&device, &kv), dims.page_len());
        let page = |data: &[f32], p: usize| data[p * len..][..len].to_vec();
        for (now, before) in [(0, 4), (1, 1), (2, 2), (3, 3), (4, 1)] {
            assert_eq!(page(&got, now), page(&data, before), "{now}");
        }
    }
}
