//! Measures the limits of this machine (memory bandwidth, multiply-add rate) and each kernel beside
//! them: `cargo run --release -p headstart-kernels --example kernel_bench [threads] [filter]`.

use headstart_kernels::{
    AttentionArgs, AttentionSeq, DType, KvPool, KvShape, KvSlot, Matrix, ThreadPool,
    paged_attention, silu_mul, vocab_stats_rows,
};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The median of `n` timings in seconds, after one warm-up.
fn median(n: usize, mut f: impl FnMut()) -> f64 {
    f();
    let mut times: Vec<f64> = (0..n)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[n / 2]
}

/// GB/s of reading a gigabyte once, with every thread.
fn bandwidth(pool: &ThreadPool) -> f64 {
    let data = vec![1u64; 128 << 20];
    let chunk = data.len() / 64;
    let total = AtomicU64::new(0);
    let time = median(5, || {
        pool.run(64, &|i| {
            let mut sums = [0u64; 32];
            for c in data[i * chunk..(i + 1) * chunk].chunks_exact(32) {
                for (s, v) in sums.iter_mut().zip(c) {
                    *s = s.wrapping_add(*v);
                }
            }
            total.fetch_add(black_box(sums).iter().sum(), Ordering::Relaxed);
        });
    });
    (data.len() * 8) as f64 / time / 1e9
}

/// GFLOP/s of f32 products that stay in the cache.
fn multiply_rate(pool: &ThreadPool) -> f64 {
    let (n, k, m) = (256, 512, 96);
    let w = Matrix::from_bytes(DType::F32, &blocks(DType::F32, n * k), n, k).unwrap();
    let (x, mut y) = (random(m * k), vec![0.0; m * n]);
    2.0 * (m * n * k) as f64 / median(50, || w.matmul(pool, &x, m, &mut y)) / 1e9
}

fn random(n: usize) -> Vec<f32> {
    let mut s = 0x1234_5678_9abc_def1u64;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Bytes of valid blocks: every f16 scale is made small.
fn blocks(dtype: DType, elements: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = match dtype {
        DType::F32 => return random(elements).iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => (0..dtype.bytes_for(elements).unwrap()).map(|i| (i * 131 % 251) as u8).collect(),
    };
    let scales: &[usize] = match dtype {
        DType::F16 | DType::BF16 => {
            bytes.chunks_exact_mut(2).for_each(|b| b[1] = 0x2c);
            return bytes;
        }
        DType::Q4_1 | DType::Q4_K => &[0, 2],
        DType::Q6_K => &[208],
        _ => &[0],
    };
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        scales.iter().for_each(|at| block[at + 1] = 0x20);
    }
    bytes
}

fn products(pool: &ThreadPool, gbs: f64, filter: &str) {
    println!("matmul          m       µs    GB/s  of peak   GFLOP/s");
    let shapes = [(1536, 576), (8960, 1536)];
    let types = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q8_0,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q4_K,
        DType::Q6_K,
    ];
    for (n, k) in shapes {
        for dtype in types {
            if !format!("{dtype}").contains(filter) || k % dtype.block_len() != 0 {
                continue;
            }
            let bytes = blocks(dtype, n * k);
            // Enough copies that none is still in a cache when its turn comes again.
            let copies = (400_000_000 / bytes.len()).clamp(1, 60);
            let all: Vec<Matrix> = (0..copies)
                .map(|_| Matrix::from_bytes_with(pool, dtype, &bytes, n, k).unwrap())
                .collect();
            for m in [1, 2, 4, 8, 16, 128, 512] {
                let x = random(m * k);
                let mut y = vec![0.0; m * n];
                let used = if m > 4 { 3.min(copies) } else { copies };
                let time = median(5, || {
                    all[..used].iter().for_each(|w| w.matmul(pool, &x, m, &mut y));
                    black_box(&y);
                }) / used as f64;
                let rate = bytes.len() as f64 / time / 1e9;
                println!(
                    "{:5} {n:5}x{k:<5} {m:4} {:8.1} {rate:7.1} {:6.0} % {:9.0}",
                    format!("{dtype}"),
                    time * 1e6,
                    rate / gbs * 100.0,
                    2.0 * (m * n * k) as f64 / time / 1e9,
                );
            }
        }
    }
}

fn attention(pool: &ThreadPool) {
    println!("attention (9 heads over 3, 64 wide)      µs   GFLOP/s");
    let (heads, kv_heads, head_dim, len) = (9, 3, 64, 1024);
    let shape = KvShape {
        layers: 1,
        kv_heads,
        head_dim,
        page_size: 16,
        pages: len / 16,
        dtype: DType::F16,
    };
    let mut kv = KvPool::new(shape).unwrap();
    let slots: Vec<KvSlot> =
        (0..len as u32).map(|p| KvSlot { page: p / 16, slot: p % 16 }).collect();
    let (k, v) = (random(len * kv_heads * head_dim), random(len * kv_heads * head_dim));
    kv.write_rows(pool, 0, &slots, &k, &v);
    let pages: Vec<u32> = (0..shape.pages as u32).collect();
    for (start, rows) in [(127, 1), (1023, 1), (0, 512), (512, 512)] {
        let q = random(rows * heads * head_dim);
        let mut out = vec![0.0; q.len()];
        let seqs = [AttentionSeq { row: 0, rows, start, pages: &pages }];
        let time = median(20, || {
            let args = AttentionArgs {
                kv: &kv,
                layer: 0,
                heads,
                q: &q,
                seqs: &seqs,
                scale: 0.125,
                softcap: None,
                window: None,
                out: &mut out,
            };
            paged_attention(pool, args);
        });
        let keys = rows * (2 * start + rows + 1) / 2;
        let flops = (4 * keys * heads * head_dim) as f64;
        println!("{rows:4} rows from {start:4} {:24.1} {:9.0}", time * 1e6, flops / time / 1e9);
    }
}

fn small(pool: &ThreadPool) {
    let time = median(2000, || pool.run(pool.threads(), &|_| ()));
    println!("empty job                {:10.2} µs", time * 1e6);
    let logits = random(49_152);
    let time = median(50, || {
        black_box(vocab_stats_rows(pool, &logits, logits.len()));
    });
    println!("vocab_stats of 49152     {:10.2} µs", time * 1e6);
    let (mut gate, up) = (random(512 * 1536), vec![1.0; 512 * 1536]);
    let time = median(20, || {
        gate.fill(1.5);
        silu_mul(pool, &mut gate, &up);
    });
    println!("silu_mul of 512 x 1536   {:10.2} µs", time * 1e6);
}

fn main() {
    let mut args = std::env::args().skip(1);
    let threads = args.next().and_then(|a| a.parse().ok()).unwrap_or(2);
    let filter = args.next().unwrap_or_default();
    let pool = ThreadPool::new(threads);
    let gbs = bandwidth(&pool);
    let gflops = multiply_rate(&pool);
    let cpu = headstart_kernels::Cpu::get();
    println!("{threads} threads, {cpu:?}, memory {gbs:.1} GB/s, f32 products {gflops:.0} GFLOP/s");
    small(&pool);
    attention(&pool);
    products(&pool, gbs, &filter);
}
