//! Super-blocks of 256: Q4_K, Q5_K, Q6_K.

use super::f16_at;

/// The 6-bit scale and minimum of group `j` (0..8), from the 12 packed bytes.
pub(crate) fn scale_min(j: usize, s: &[u8]) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
    }
}

pub(super) fn q4_k(b: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    let (scales, q) = (&b[4..16], &b[16..144]);
    for (j, o) in out.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_min(j, scales);
        let (d, m) = (d * f32::from(s), dmin * f32::from(m));
        let shift = 4 * (j % 2);
        for (o, &q) in o.iter_mut().zip(&q[j / 2 * 32..]) {
            *o = d * f32::from((q >> shift) & 15) - m;
        }
    }
}

pub(super) fn q5_k(b: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    let (scales, high, q) = (&b[4..16], &b[16..48], &b[48..176]);
    for (j, o) in out.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_min(j, scales);
        let (d, m) = (d * f32::from(s), dmin * f32::from(m));
        let shift = 4 * (j % 2);
        for (l, (o, &q)) in o.iter_mut().zip(&q[j / 2 * 32..]).enumerate() {
            let q = ((q >> shift) & 15) | (((high[l] >> j) & 1) << 4);
            *o = d * f32::from(q) - m;
        }
    }
}

/// The six-bit value (0..64) of element `i` (0..256) of a Q6_K block.
pub(crate) fn q6_at(b: &[u8], i: usize) -> u8 {
    let (half, quarter, l) = (i / 128, i / 32 % 4, i % 32);
    let low = b[half * 64 + l + 32 * (quarter % 2)] >> (4 * (quarter / 2));
    let high = b[128 + half * 32 + l] >> (2 * quarter);
    (low & 15) | ((high & 3) << 4)
}

pub(super) fn q6_k(b: &[u8], out: &mut [f32]) {
    let d = f16_at(b, 208);
    for (i, o) in out.iter_mut().enumerate() {
        let scale = f32::from(b[192 + i / 16] as i8);
        *o = d * scale * f32::from(q6_at(b, i) as i8 - 32);
    }
}
