use super::*;
use crate::DType;
use crate::testing::Rng;

/// One sequence's keys and values in scattered pages, and the plain attention over them.
struct Case {
    shape: KvShape,
    heads: usize,
    kv: KvPool,
    pages: Vec<u32>,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
    len: usize,
}

impl Case {
    fn new(seed: u64, shape: KvShape, heads: usize, len: usize, scale: f32) -> Case {
        let mut rng = Rng::new(seed);
        let mut kv = KvPool::new(shape).unwrap();
        // Whatever was left in a page must not be seen.
        let nan = vec![0xff; shape.page_bytes()];
        (0..shape.pages as u32).for_each(|p| kv.import_page(p, &nan));
        let mut pages: Vec<u32> = (0..shape.pages as u32).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, rng.below(i + 1));
        }
        let width = shape.kv_heads * shape.head_dim;
        let (mut k, mut v) = (rng.floats(len * width, scale), rng.floats(len * width, 1.0));
        let q = rng.floats(len * heads * shape.head_dim, scale);
        for p in 0..len {
            let at =
                KvSlot { page: pages[p / shape.page_size], slot: (p % shape.page_size) as u32 };
            let (k, v) = (&mut k[p * width..][..width], &mut v[p * width..][..width]);
            kv.write_rows(&ThreadPool::new(1), 1, &[at], k, v);
            // What is kept counts.
            kv.read(1, at, k, v);
        }
        Case { shape, heads, kv, pages, k, v, q, len }
    }

    fn reference(&self, p: usize, h: usize, cap: Option<f32>, window: Option<usize>) -> Vec<f64> {
        let s = &self.shape;
        let (dim, width) = (s.head_dim, s.kv_heads * s.head_dim);
        let kv_head = h / (self.heads / s.kv_heads);
        let q = &self.q[(p * self.heads + h) * dim..][..dim];
        let from = window.map_or(0, |w| (p + 1).saturating_sub(w));
        let score = |j: usize| {
            let k = &self.k[j * width + kv_head * dim..][..dim];
            let dot: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let x = dot * 0.25;
            cap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh())
        };
        let scores: Vec<f64> = (from..=p).map(score).collect();
        let max = scores.iter().fold(f64::MIN, |a, b| a.max(*b));
        let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let mut out = vec![0.0; dim];
        for (j, s) in (from..=p).zip(&scores) {
            let v = &self.v[j * width + kv_head * dim..][..dim];
            let w = (s - max).exp() / total;
            out.iter_mut().zip(v).for_each(|(o, v)| *o += w * f64::from(*v));
        }
        out
    }

    /// Attention of positions `start..start + rows`, in batch rows from `pad` on.
    fn run(&self, pool: &ThreadPool, start: usize, rows: usize, opt: Options) -> Vec<f32> {
        let width = self.heads * self.shape.head_dim;
        let mut out = vec![-7.0; rows * width];
        let seq = AttentionSeq { row: 0, rows, start, pages: &self.pages };
        paged_attention(
            pool,
            AttentionArgs {
                kv: &self.kv,
                layer: 1,
                heads: self.heads,
                q: &self.q[start * width..(start + rows) * width],
                seqs: &[seq],
                scale: 0.25,
                softcap: opt.0,
                window: opt.1,
                out: &mut out,
            },
        );
        out
    }
}

type Options = (Option<f32>, Option<usize>);
const OPTIONS: [Options; 4] =
    [(None, None), (Some(5.0), None), (None, Some(19)), (Some(9.0), Some(70))];

fn cases() -> Vec<Case> {
    let shape = |kv_heads, head_dim, page_size, len: usize| KvShape {
        layers: 2,
        kv_heads,
        head_dim,
        page_size,
        pages: len.div_ceil(page_size) + 2,
        dtype: DType::F32,
    };
    let half = |shape| KvShape { dtype: DType::F16, ..shape };
    vec![
        Case::new(1, shape(1, 4, 16, 1), 1, 1, 1.0),
        Case::new(2, shape(4, 8, 16, 77), 8, 77, 1.0),
        Case::new(3, shape(3, 64, 32, 300), 9, 300, 1.0),
        Case::new(4, shape(2, 128, 64, 131), 12, 131, 3.0),
        Case::new(5, shape(1, 84, 16, 600), 30, 600, 0.3),
        Case::new(6, shape(1, 20, 48, 50), 2, 50, 30.0),
        Case::new(7, half(shape(3, 64, 16, 300)), 9, 300, 1.0),
        Case::new(8, half(shape(2, 20, 48, 90)), 12, 90, 3.0),
    ]
}

#[test]
fn matches_the_reference() {
    let pool = ThreadPool::new(2);
    for (i, case) in cases().iter().enumerate() {
        for opt in OPTIONS {
            let got = case.run(&pool, 0, case.len, opt);
            let step = (case.len / 20).max(1);
            for p in (0..case.len).step_by(step).chain([case.len - 1]) {
                for h in 0..case.heads {
                    let at = (p * case.heads + h) * case.shape.head_dim;
                    for (a, b) in got[at..].iter().zip(case.reference(p, h, opt.0, opt.1)) {
                        assert!(
                            (f64::from(*a) - b).abs() < 2e-5,
                            "case {i} {opt:?} {p} {h}: {a} {b}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn any_chunking_gives_the_same_bits() {
    let (one, three) = (ThreadPool::new(1), ThreadPool::new(3));
    let mut rng = Rng::new(9);
    for case in cases() {
        let width = case.heads * case.shape.head_dim;
        for opt in OPTIONS {
            let whole = case.run(&one, 0, case.len, opt);
            let mut p = 0;
            while p < case.len {
                let most = [2, 90][rng.below(2)];
                let rows = (1 + rng.below(most)).min(case.len - p);
                let part = case.run(&three, p, rows, opt);
                let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&part), bits(&whole[p * width..(p + rows) * width]), "at {p}");
                p += rows;
            }
        }
    }
}

#[test]
fn what_a_later_token_holds_does_not_matter() {
    let pool = ThreadPool::new(2);
    let mut rng = Rng::new(10);
    for mut case in cases() {
        let (kv_width, width) =
            (case.shape.kv_heads * case.shape.head_dim, case.heads * case.shape.head_dim);
        for opt in OPTIONS {
            let right = case.run(&pool, 0, case.len, opt);
            let p = rng.below(case.len);
            let (page, slot) = (p / case.shape.page_size, p % case.shape.page_size);
            let at = KvSlot { page: case.pages[page], slot: slot as u32 };
            let (mut k, mut v) = (vec![0.0; kv_width], vec![0.0; kv_width]);
            case.kv.read(1, at, &mut k, &mut v);
            let nan = vec![f32::NAN; kv_width];
            case.kv.write_rows(&pool, 1, &[at], &nan, &nan);
            let got = case.run(&pool, 0, case.len, opt);
            case.kv.write_rows(&pool, 1, &[at], &k, &v);
            assert_eq!(got[..p * width], right[..p * width], "before {p}");
            assert!(got[p * width..][..width].iter().all(|v| v.is_nan()), "{p} itself");
        }
    }
}

#[test]
fn sequences_of_a_batch_do_not_meet() {
    let pool = ThreadPool::new(2);
    let case = &cases()[2];
    let width = case.heads * case.shape.head_dim;
    let rows = [(280, 1), (0, 50), (100, 7), (299, 1)];
    let mut q = vec![0.0; 61 * width];
    let mut seqs = Vec::new();
    let mut row = 1;
    for (start, n) in rows {
        q[row * width..(row + n) * width]
            .copy_from_slice(&case.q[start * width..(start + n) * width]);
        seqs.push(AttentionSeq { row, rows: n, start, pages: &case.pages });
        row += n;
    }
    let mut out = vec![-7.0; q.len()];
    paged_attention(
        &pool,
        AttentionArgs {
            kv: &case.kv,
            layer: 1,
            heads: case.heads,
            q: &q,
            seqs: &seqs,
            scale: 0.25,
            softcap: None,
            window: None,
            out: &mut out,
        },
    );
    assert!(out[..width].iter().chain(&out[60 * width..]).all(|v| *v == -7.0));
    for seq in &seqs {
        let alone = case.run(&pool, seq.start, seq.rows, (None, None));
        assert_eq!(alone, out[seq.row * width..(seq.row + seq.rows) * width]);
    }
}

#[test]
#[should_panic(expected = "page table")]
fn a_short_page_table_is_refused() {
    let case = &cases()[1];
    let seq = AttentionSeq { row: 0, rows: 1, start: 32, pages: &case.pages[..2] };
    let mut out = vec![0.0; 64];
    paged_attention(
        &ThreadPool::new(1),
        AttentionArgs {
            kv: &case.kv,
            layer: 1,
            heads: 8,
            q: &case.q[..64],
            seqs: &[seq],
            scale: 1.0,
            softcap: None,
            window: None,
            out: &mut out,
        },
    );
}
