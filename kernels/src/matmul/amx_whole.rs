//! [`super::amx`]'s `add` for a whole tile of rows, in registers: sixteen sums, and four more on the way, which
//! compilers do not manage without spilling.

use std::arch::asm;
use std::arch::x86_64::__m512;

/// Four-bit weights with minima.
///
/// # Safety
/// As [`super::amx`]'s `add`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn nibbles_mins(
    a: &mut [__m512; 16],
    scale: __m512,
    high: *const u8,
    min: __m512,
    x: *const f32,
) {
    // What passes through; assembly must know their type.
    let (t0, t1, t2, t3): (__m512, __m512, __m512, __m512);
    // SAFETY: reads what the caller promised.
    unsafe {
        asm!(
            "vcvtdq2ps {t0}, zmmword ptr [{high} + 0]",
            "vfmadd231ps {a0}, {s}, {t0}",
            "vfmadd231ps {a0}, {m}, dword ptr [{x} + 0]{{1to16}}",
            "vcvtdq2ps {t1}, zmmword ptr [{high} + 64]",
            "vfmadd231ps {a1}, {s}, {t1}",
            "vfmadd231ps {a1}, {m}, dword ptr [{x} + 4]{{1to16}}",
            "vcvtdq2ps {t2}, zmmword ptr [{high} + 128]",
            "vfmadd231ps {a2}, {s}, {t2}",
            "vfmadd231ps {a2}, {m}, dword ptr [{x} + 8]{{1to16}}",
            "vcvtdq2ps {t3}, zmmword ptr [{high} + 192]",
            "vfmadd231ps {a3}, {s}, {t3}",
            "vfmadd231ps {a3}, {m}, dword ptr [{x} + 12]{{1to16}}",
            "vcvtdq2ps {t0}, zmmword ptr [{high} + 256]",
            "vfmadd231ps {a4}, {s}, {t0}",
            "vfmadd231ps {a4}, {m}, dword ptr [{x} + 16]{{1to16}}",
            "vcvtdq2ps {t1}, zmmword ptr [{high} + 320]",
            "vfmadd231ps {a5}, {s}, {t1}",
            "vfmadd231ps {a5}, {m}, dword ptr [{x} + 20]{{1to16}}",
            "vcvtdq2ps {t2}, zmmword ptr [{high} + 384]",
            "vfmadd231ps {a6}, {s}, {t2}",
            "vfmadd231ps {a6}, {m}, dword ptr [{x} + 24]{{1to16}}",
            "vcvtdq2ps {t3}, zmmword ptr [{high} + 448]",
            "vfmadd231ps {a7}, {s}, {t3}",
            "vfmadd231ps {a7}, {m}, dword ptr [{x} + 28]{{1to16}}",
            "vcvtdq2ps {t0}, zmmword ptr [{high} + 512]",
            "vfmadd231ps {a8}, {s}, {t0}",
            "vfmadd231ps {a8}, {m}, dword ptr [{x} + 32]{{1to16}}",
            "vcvtdq2ps {t1}, zmmword ptr [{high} + 576]",
            "vfmadd231ps {a9}, {s}, {t1}",
            "vfmadd231ps {a9}, {m}, dword ptr [{x} + 36]{{1to16}}",
            "vcvtdq2ps {t2}, zmmword ptr [{high} + 640]",
            "vfmadd231ps {a10}, {s}, {t2}",
            "vfmadd231ps {a10}, {m}, dword ptr [{x} + 40]{{1to16}}",
            "vcvtdq2ps {t3}, zmmword ptr [{high} + 704]",
            "vfmadd231ps {a11}, {s}, {t3}",
            "vfmadd231ps {a11}, {m}, dword ptr [{x} + 44]{{1to16}}",
            "vcvtdq2ps {t0}, zmmword ptr [{high} + 768]",
            "vfmadd231ps {a12}, {s}, {t0}",
            "vfmadd231ps {a12}, {m}, dword ptr [{x} + 48]{{1to16}}",
            "vcvtdq2ps {t1}, zmmword ptr [{high} + 832]",
            "vfmadd231ps {a13}, {s}, {t1}",
            "vfmadd231ps {a13}, {m}, dword ptr [{x} + 52]{{1to16}}",
            "vcvtdq2ps {t2}, zmmword ptr [{high} + 896]",
            "vfmadd231ps {a14}, {s}, {t2}",
            "vfmadd231ps {a14}, {m}, dword ptr [{x} + 56]{{1to16}}",
            "vcvtdq2ps {t3}, zmmword ptr [{high} + 960]",
            "vfmadd231ps {a15}, {s}, {t3}",
            "vfmadd231ps {a15}, {m}, dword ptr [{x} + 60]{{1to16}}",
            a0 = inout(zmm_reg) a[0],
            a1 = inout(zmm_reg) a[1],
            a2 = inout(zmm_reg) a[2],
            a3 = inout(zmm_reg) a[3],
            a4 = inout(zmm_reg) a[4],
            a5 = inout(zmm_reg) a[5],
            a6 = inout(zmm_reg) a[6],
            a7 = inout(zmm_reg) a[7],
            a8 = inout(zmm_reg) a[8],
            a9 = inout(zmm_reg) a[9],
            a10 = inout(zmm_reg) a[10],
            a11 = inout(zmm_reg) a[11],
            a12 = inout(zmm_reg) a[12],
            a13 = inout(zmm_reg) a[13],
            a14 = inout(zmm_reg) a[14],
            a15 = inout(zmm_reg) a[15],
            t0 = out(zmm_reg) t0,
            t1 = out(zmm_reg) t1,
            t2 = out(zmm_reg) t2,
            t3 = out(zmm_reg) t3,
            s = in(zmm_reg) scale,
            high = in(reg) high,
            m = in(zmm_reg) min,
            x = in(reg) x,
            options(nostack, readonly, preserves_flags),
        );
    }
    let _ = (t0, t1, t2, t3);
}

/// Four-bit weights.
///
/// # Safety
/// As [`super::amx`]'s `add`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn nibbles(a: &mut [__m512; 16], scale: __m512, high: *const u8) {
    // What passes through; assembly must know their type.
    let (t0, t1, t2, t3): (__m512, __m512, __m512, __m512);
    // SAFETY: reads what the caller promised.
    unsafe {
        asm!(
            "vcvtdq2ps {t0}, zmmword ptr [{high} + 0]",
            "vfmadd231ps {a0}, {s}, {t0}",
            "vcvtdq2ps {t1}, zmmword ptr [{high} + 64]",
            "vfmadd231ps {a1}, {s}, {t1}",
            "vcvtdq2ps {t2}, zmmword ptr [{high} + 128]",
            "vfmadd231ps {a2}, {s}, {t2}",
            "vcvtdq2ps {t3}, zmmword ptr [{high} + 192]",
            "vfmadd231ps {a3}, {s}, {t3}",
            "vcvtdq2ps {t0}, zmmword ptr [{high} + 256]",
            "vfmadd231ps {a4}, {s}, {t0}",
            "vcvtdq2ps {t1}, zmmword ptr [{high} + 320]",
            "vfmadd231ps {a5}, {s}, {t1}",
            "vcvtdq2ps {t2}, zmmword ptr [{high} + 384]",
            "vfmadd231ps {a6}, {s}, {t2}",
            "vcvtdq2ps {t3}, zmmword ptr [{high} + 448]",
            "vfmadd231ps {a7}, {s}, {t3}",
            "vcvtdq2ps {t0}, zmmword ptr [{high} + 512]",
            "vfmadd231ps {a8}, {s}, {t0}",
            "vcvtdq2ps {t1}, zmmword ptr [{high} + 576]",
            "vfmadd231ps {a9}, {s}, {t1}",
            "vcvtdq2ps {t2}, zmmword ptr [{high} + 640]",
            "vfmadd231ps {a10}, {s}, {t2}",
            "vcvtdq2ps {t3}, zmmword ptr [{high} + 704]",
            "vfmadd231ps {a11}, {s}, {t3}",
            "vcvtdq2ps {t0}, zmmword ptr [{high} + 768]",
            "vfmadd231ps {a12}, {s}, {t0}",
            "vcvtdq2ps {t1}, zmmword ptr [{high} + 832]",
            "vfmadd231ps {a13}, {s}, {t1}",
            "vcvtdq2ps {t2}, zmmword ptr [{high} + 896]",
            "vfmadd231ps {a14}, {s}, {t2}",
            "vcvtdq2ps {t3}, zmmword ptr [{high} + 960]",
            "vfmadd231ps {a15}, {s}, {t3}",
            a0 = inout(zmm_reg) a[0],
            a1 = inout(zmm_reg) a[1],
            a2 = inout(zmm_reg) a[2],
            a3 = inout(zmm_reg) a[3],
            a4 = inout(zmm_reg) a[4],
            a5 = inout(zmm_reg) a[5],
            a6 = inout(zmm_reg) a[6],
            a7 = inout(zmm_reg) a[7],
            a8 = inout(zmm_reg) a[8],
            a9 = inout(zmm_reg) a[9],
            a10 = inout(zmm_reg) a[10],
            a11 = inout(zmm_reg) a[11],
            a12 = inout(zmm_reg) a[12],
            a13 = inout(zmm_reg) a[13],
            a14 = inout(zmm_reg) a[14],
            a15 = inout(zmm_reg) a[15],
            t0 = out(zmm_reg) t0,
            t1 = out(zmm_reg) t1,
            t2 = out(zmm_reg) t2,
            t3 = out(zmm_reg) t3,
            s = in(zmm_reg) scale,
            high = in(reg) high,
            options(nostack, readonly, preserves_flags),
        );
    }
    let _ = (t0, t1, t2, t3);
}

/// Two products a group.
///
/// # Safety
/// As [`super::amx`]'s `add`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn levels(a: &mut [__m512; 16], scale: __m512, high: *const u8, low: *const u8) {
    // What passes through; assembly must know their type.
    let (t0, t1, t2, t3): (__m512, __m512, __m512, __m512);
    // SAFETY: reads what the caller promised.
    unsafe {
        asm!(
            "vpslld {t0}, zmmword ptr [{high} + 0], 4",
            "vpaddd {t0}, {t0}, zmmword ptr [{low} + 0]",
            "vcvtdq2ps {t0}, {t0}",
            "vfmadd231ps {a0}, {s}, {t0}",
            "vpslld {t1}, zmmword ptr [{high} + 64], 4",
            "vpaddd {t1}, {t1}, zmmword ptr [{low} + 64]",
            "vcvtdq2ps {t1}, {t1}",
            "vfmadd231ps {a1}, {s}, {t1}",
            "vpslld {t2}, zmmword ptr [{high} + 128], 4",
            "vpaddd {t2}, {t2}, zmmword ptr [{low} + 128]",
            "vcvtdq2ps {t2}, {t2}",
            "vfmadd231ps {a2}, {s}, {t2}",
            "vpslld {t3}, zmmword ptr [{high} + 192], 4",
            "vpaddd {t3}, {t3}, zmmword ptr [{low} + 192]",
            "vcvtdq2ps {t3}, {t3}",
            "vfmadd231ps {a3}, {s}, {t3}",
            "vpslld {t0}, zmmword ptr [{high} + 256], 4",
            "vpaddd {t0}, {t0}, zmmword ptr [{low} + 256]",
            "vcvtdq2ps {t0}, {t0}",
            "vfmadd231ps {a4}, {s}, {t0}",
            "vpslld {t1}, zmmword ptr [{high} + 320], 4",
            "vpaddd {t1}, {t1}, zmmword ptr [{low} + 320]",
            "vcvtdq2ps {t1}, {t1}",
            "vfmadd231ps {a5}, {s}, {t1}",
            "vpslld {t2}, zmmword ptr [{high} + 384], 4",
            "vpaddd {t2}, {t2}, zmmword ptr [{low} + 384]",
            "vcvtdq2ps {t2}, {t2}",
            "vfmadd231ps {a6}, {s}, {t2}",
            "vpslld {t3}, zmmword ptr [{high} + 448], 4",
            "vpaddd {t3}, {t3}, zmmword ptr [{low} + 448]",
            "vcvtdq2ps {t3}, {t3}",
            "vfmadd231ps {a7}, {s}, {t3}",
            "vpslld {t0}, zmmword ptr [{high} + 512], 4",
            "vpaddd {t0}, {t0}, zmmword ptr [{low} + 512]",
            "vcvtdq2ps {t0}, {t0}",
            "vfmadd231ps {a8}, {s}, {t0}",
            "vpslld {t1}, zmmword ptr [{high} + 576], 4",
            "vpaddd {t1}, {t1}, zmmword ptr [{low} + 576]",
            "vcvtdq2ps {t1}, {t1}",
            "vfmadd231ps {a9}, {s}, {t1}",
            "vpslld {t2}, zmmword ptr [{high} + 640], 4",
            "vpaddd {t2}, {t2}, zmmword ptr [{low} + 640]",
            "vcvtdq2ps {t2}, {t2}",
            "vfmadd231ps {a10}, {s}, {t2}",
            "vpslld {t3}, zmmword ptr [{high} + 704], 4",
            "vpaddd {t3}, {t3}, zmmword ptr [{low} + 704]",
            "vcvtdq2ps {t3}, {t3}",
            "vfmadd231ps {a11}, {s}, {t3}",
            "vpslld {t0}, zmmword ptr [{high} + 768], 4",
            "vpaddd {t0}, {t0}, zmmword ptr [{low} + 768]",
            "vcvtdq2ps {t0}, {t0}",
            "vfmadd231ps {a12}, {s}, {t0}",
            "vpslld {t1}, zmmword ptr [{high} + 832], 4",
            "vpaddd {t1}, {t1}, zmmword ptr [{low} + 832]",
            "vcvtdq2ps {t1}, {t1}",
            "vfmadd231ps {a13}, {s}, {t1}",
            "vpslld {t2}, zmmword ptr [{high} + 896], 4",
            "vpaddd {t2}, {t2}, zmmword ptr [{low} + 896]",
            "vcvtdq2ps {t2}, {t2}",
            "vfmadd231ps {a14}, {s}, {t2}",
            "vpslld {t3}, zmmword ptr [{high} + 960], 4",
            "vpaddd {t3}, {t3}, zmmword ptr [{low} + 960]",
            "vcvtdq2ps {t3}, {t3}",
            "vfmadd231ps {a15}, {s}, {t3}",
            a0 = inout(zmm_reg) a[0],
            a1 = inout(zmm_reg) a[1],
            a2 = inout(zmm_reg) a[2],
            a3 = inout(zmm_reg) a[3],
            a4 = inout(zmm_reg) a[4],
            a5 = inout(zmm_reg) a[5],
            a6 = inout(zmm_reg) a[6],
            a7 = inout(zmm_reg) a[7],
            a8 = inout(zmm_reg) a[8],
            a9 = inout(zmm_reg) a[9],
            a10 = inout(zmm_reg) a[10],
            a11 = inout(zmm_reg) a[11],
            a12 = inout(zmm_reg) a[12],
            a13 = inout(zmm_reg) a[13],
            a14 = inout(zmm_reg) a[14],
            a15 = inout(zmm_reg) a[15],
            t0 = out(zmm_reg) t0,
            t1 = out(zmm_reg) t1,
            t2 = out(zmm_reg) t2,
            t3 = out(zmm_reg) t3,
            s = in(zmm_reg) scale,
            high = in(reg) high,
            low = in(reg) low,
            options(nostack, readonly, preserves_flags),
        );
    }
    let _ = (t0, t1, t2, t3);
}
