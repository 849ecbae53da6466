//! A short version of `make sim`: some seeds, and that a seed is all that a run depends on.

use std::thread;

use headstart_sim::run::run;
use headstart_sim::{fixture, invariants};

/// Worlds run here; `make sim` runs as many as it is told.
const SEEDS: u64 = 200;

#[test]
fn no_seed_breaks_anything() {
    let text = fixture();
    let half = |first: u64| {
        let text = text.clone();
        thread::spawn(move || {
            for seed in (first..SEEDS).step_by(2) {
                let broken = invariants::broken(&run(seed, &text, false));
                assert!(broken.is_empty(), "seed {seed}: {broken:#?}");
            }
        })
    };
    for half in [half(0), half(1)] {
        half.join().expect("every seed holds");
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let text = fixture();
    for seed in 1_000_000..1_000_010 {
        // Another thread has other hash keys and another clock.
        let elsewhere = {
            let text = text.clone();
            thread::spawn(move || run(seed, &text, true))
        };
        let (here, there) = (run(seed, &text, true), elsewhere.join().expect("it runs"));
        let (one, two) = (sorted(here.lines), sorted(there.lines));
        if let Some((one, two)) = one.iter().zip(&two).find(|(one, two)| one != two) {
            panic!("seed {seed} differs:\n{one}\n{two}");
        }
        assert_eq!(here.digest, there.digest, "seed {seed}");
        let other = run(seed + 100, &text, false);
        assert_ne!(here.digest, other.digest, "the hash tells runs apart");
    }
}

/// What happens at one instant has no order.
fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort_unstable();
    lines
}
