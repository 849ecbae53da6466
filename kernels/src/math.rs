//! Scalar arithmetic in a form that compilers turn into vectors.
//!
//! `FMA` is false only where the processor has no fused multiply-add (there `mul_add` would be a
//! slow library call). Nothing here depends on how many elements are worked on at once.

/// `a * b + c`, fused if `FMA`.
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The exact value of a half, without a branch, so that it becomes vectors.
#[inline(always)]
pub(crate) fn half_to_f32(half: half::f16) -> f32 {
    // 2^112, the difference of the exponents' offsets.
    const SCALE: f32 = f32::from_bits((112 + 127) << 23);
    let bits = u32::from(half.to_bits());
    let value = f32::from_bits((bits & 0x7fff) << 13) * SCALE;
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(value.to_bits() | special | (bits & 0x8000) << 16)
}

/// e^x within 2 ulp. Results below the normal range are flushed to 0, overflow gives infinity, NaN
/// stays NaN, and `exp(0) == 1` exactly.
///
/// Cody–Waite reduction and the degree-5 polynomial of Cephes `expf`.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding this rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -88.0 { -88.0 } else { clamped };
    let shifted = fma::<FMA>(clamped, LOG2E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_HIGH, clamped);
    let r = fma::<FMA>(n, -LN2_LOW, r);
    let p = fma::<FMA>(1.987_569_1e-4, r, 1.398_199_9e-3);
    let p = fma::<FMA>(p, r, 8.333_452e-3);
    let p = fma::<FMA>(p, r, 4.166_579_6e-2);
    let p = fma::<FMA>(p, r, 1.666_666_5e-1);
    let p = fma::<FMA>(p, r, 0.5);
    let p = fma::<FMA>(p, r * r, r) + 1.0;
    // 2^n in two factors, so that n = 128 does not overflow before its time.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let scale = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let y = p * scale(half) * scale(n - half);
    if x < -87.3 { 0.0 } else { y }
}

/// x · sigmoid(x).
#[inline(always)]
pub(crate) fn silu<const FMA: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FMA>(-x))
}

/// GELU with the tanh approximation.
#[inline(always)]
pub(crate) fn gelu_tanh<const FMA: bool>(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let inner = SQRT_2_OVER_PI * fma::<FMA>(0.044_715 * x * x, x, x);
    // 0.5 (1 + tanh(u)) = 1 / (1 + e^(-2u))
    x / (1.0 + exp::<FMA>(-2.0 * inner))
}

/// tanh, exact to about 2e-7 absolute.
#[inline(always)]
pub(crate) fn tanh<const FMA: bool>(x: f32) -> f32 {
    let e = exp::<FMA>(-2.0 * x.abs());
    let t = (1.0 - e) / (1.0 + e);
    if x < 0.0 { -t } else { t }
}

/// Sums 16 lanes in a fixed order.
#[inline(always)]
pub(crate) fn sum16(v: &[f32; 16]) -> f32 {
    let mut s = *v;
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            s[i] += s[i + width];
        }
        width /= 2;
    }
    s[0]
}

/// Writes a safe function that runs `$body::<FMA>` compiled for the best instruction set.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? => $body:ident) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { $body::<true>($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { $body::<true>($($arg),*) }
                let isa = $crate::cpu::Cpu::get().isa;
                if isa >= $crate::cpu::Isa::Avx512 {
                    // SAFETY: the processor has these features.
                    return unsafe { avx512($($arg),*) };
                }
                if isa >= $crate::cpu::Isa::Avx2 {
                    // SAFETY: the processor has these features.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body::<false>($($arg),*)
        }
    };
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_and_total() {
        for fma in [true, false] {
            let f = if fma { exp::<true> } else { exp::<false> };
            assert_eq!(f(0.0), 1.0);
            assert_eq!(f(f32::NEG_INFINITY), 0.0);
            assert_eq!(f(f32::INFINITY), f32::INFINITY);
            assert!(f(f32::NAN).is_nan());
            let mut x = -87.2f32;
            while x < 88.7 {
                let want = f64::from(x).exp();
                assert!((f64::from(f(x)) / want - 1.0).abs() < 3e-7, "exp({x})");
                x += 0.0137;
            }
        }
    }

    #[test]
    fn activations_match_their_definitions() {
        for i in -2000..2000 {
            let x = i as f32 * 0.01;
            let d = f64::from(x);
            assert!((f64::from(silu::<true>(x)) - d / (1.0 + (-d).exp())).abs() < 2e-6);
            let u = 0.7978845608 * (d + 0.044715 * d * d * d);
            assert!((f64::from(gelu_tanh::<true>(x)) - 0.5 * d * (1.0 + u.tanh())).abs() < 3e-6);
            assert!((f64::from(tanh::<true>(x)) - d.tanh()).abs() < 5e-7);
        }
    }
}
