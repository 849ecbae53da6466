//! Sums over ranks on devices of their own.

use super::*;
use crate::cuda::{Communicators, UniqueId, capture_on};

/// Two devices, or one where there are no more; none on a machine with a GPU but without NCCL.
fn devices() -> Vec<Device> {
    let all: Vec<Device> = (0..2).filter_map(own_device).collect();
    if on_the_machine() && UniqueId::new().is_err() {
        eprintln!("SKIPPED sums by NCCL: this machine does not have it");
        return Vec::new();
    }
    if all.len() < 2 {
        eprintln!("SKIPPED ranks on two devices: this machine has one");
    }
    all
}

/// Values of each rank, and their sums in the order of the ranks.
fn values(rng: &mut Rng, ranks: usize, len: usize) -> (Vec<Vec<f32>>, Vec<f32>) {
    let values: Vec<Vec<f32>> = (0..ranks).map(|r| rng.floats(len, 10f32.powi(r as i32))).collect();
    let sum = |i: usize| values[1..].iter().fold(values[0][i], |sum, part| sum + part[i]);
    let sums = (0..len).map(sum).collect();
    (values, sums)
}

#[test]
fn one_thread_sums_over_its_devices() {
    let (all, mut rng) = (devices(), Rng::new(71));
    for devices in (1..=all.len()).map(|count| &all[..count]) {
        let ends = Communicators::new(devices).expect("NCCL is there");
        for (len, count) in [(1, 1), (5, 3), (70_000, 70_000)] {
            let (values, sums) = values(&mut rng, devices.len(), len);
            let parts = devices.iter().zip(&values);
            let mut buffers: Vec<_> = parts.map(|(device, part)| upload(device, part)).collect();
            let mut parts: Vec<_> = buffers.iter_mut().collect();
            ends.all_reduce(&mut parts, count).expect("a sum");
            for ((device, buffer), values) in devices.iter().zip(&buffers).zip(&values) {
                let got = read(device, buffer);
                assert_eq!(got[..count], sums[..count]);
                assert_eq!(got[count..], values[count..]);
            }
        }
    }
}

/// Every bit of what one rank has comes to all: tiny numbers, a negative zero and what is no number too.
#[test]
fn one_thread_gathers_from_its_devices() {
    let all = devices();
    let own = |rank| {
        let mut bits = [0x3fc0_0000, 0x8000_0000, 7, 0x7fc0_0000, 0xff80_0000, 0xffff_fff1];
        bits.rotate_left(rank);
        bits
    };
    for devices in (1..=all.len()).map(|count| &all[..count]) {
        let ends = Communicators::new(devices).expect("NCCL is there");
        let (ranks, len) = (devices.len(), own(0).len());
        let mut buffers: Vec<_> =
            devices.iter().map(|device| upload(device, &vec![9.0; ranks * len + 1])).collect();
        for (rank, (device, buffer)) in devices.iter().zip(&mut buffers).enumerate() {
            device.zero(buffer, ranks * len).expect("zeros");
            let own = own(rank).map(f32::from_bits);
            device.write(buffer, rank * len, &own).expect("a copy");
        }
        let mut parts: Vec<_> = buffers.iter_mut().collect();
        ends.all_gather(&mut parts, ranks * len).expect("all come");
        let expected: Vec<u32> = (0..ranks).flat_map(own).chain([9f32.to_bits()]).collect();
        for (device, buffer) in devices.iter().zip(&buffers) {
            let got: Vec<u32> = read(device, buffer).into_iter().map(f32::to_bits).collect();
            assert_eq!(got, expected, "{ranks} ranks");
        }
    }
}

#[test]
fn threads_sum_with_each_other() {
    let (devices, mut rng) = (devices(), Rng::new(72));
    if devices.is_empty() {
        return;
    }
    let (values, sums) = values(&mut rng, devices.len(), 900);
    let (id, ranks) = (UniqueId::new().expect("NCCL is there"), devices.len());
    std::thread::scope(|scope| {
        for (rank, (device, values)) in devices.iter().zip(&values).enumerate() {
            let sums = &sums;
            scope.spawn(move || {
                let one = std::slice::from_ref(device);
                let end = Communicators::join(&id, ranks, rank, one, &|| false).expect("all come");
                let mut buffer = upload(device, values);
                for round in 0..20 {
                    end.all_reduce(&mut [&mut buffer], 900).expect("a sum");
                    assert_eq!(&read(device, &buffer), sums, "rank {rank}, round {round}");
                    device.write(&mut buffer, 0, values).expect("a copy");
                }
            });
        }
    });
}

/// Recorded on all devices at once, and launched on each.
#[test]
fn sums_are_recorded() {
    let (devices, mut rng) = (devices(), Rng::new(73));
    if devices.is_empty() {
        return;
    }
    let (values, sums) = values(&mut rng, devices.len(), 40);
    let ends = Communicators::new(&devices).expect("NCCL is there");
    let parts = devices.iter().zip(&values);
    let mut buffers: Vec<_> = parts.map(|(device, part)| upload(device, part)).collect();
    let all: Vec<&Device> = devices.iter().collect();
    let biases: Vec<_> = devices.iter().map(|device| upload(device, &[1.0; 40])).collect();
    let graphs = capture_on(&all, || {
        let mut parts: Vec<_> = buffers.iter_mut().collect();
        ends.all_reduce(&mut parts, 40)?;
        let ranks = devices.iter().zip(&mut buffers).zip(&biases);
        ranks.into_iter().try_for_each(|((device, part), bias)| device.add_bias(part, bias, 1))
    });
    let graphs = graphs.expect("graphs");
    let parts = devices.iter().zip(&buffers).zip(&values);
    parts.for_each(|((device, part), values)| assert_eq!(&read(device, part), values, "recorded"));
    for launch in 1..3 {
        graphs.iter().for_each(|graph| graph.launch().expect("a launch"));
        for (device, buffer) in devices.iter().zip(&buffers) {
            let expected: Vec<f32> = match launch {
                1 => sums.iter().map(|sum| sum + 1.0).collect(),
                _ => sums
                    .iter()
                    .map(|s| (1..devices.len()).fold(s + 1.0, |a, _| a + (s + 1.0)) + 1.0)
                    .collect(),
            };
            assert_eq!(read(device, buffer), expected, "launch {launch}");
        }
    }
}

#[test]
fn two_ranks_on_one_device_are_refused() {
    let Some(device) = devices().into_iter().next() else { return };
    let error = Communicators::new(&[device.clone(), device]).expect_err("NCCL wants one each");
    assert!(error.to_string().starts_with("joining a group of GPUs: NCCL: "), "{error}");
}

/// What the other ranks never do, somebody else ends.
#[test]
fn who_waits_for_a_lost_rank_is_freed_by_an_abort() {
    let devices = devices();
    if devices.len() < 2 {
        return;
    }
    let id = UniqueId::of(UniqueId::new().expect("NCCL is there").bytes());
    let join = |rank| {
        let one = std::slice::from_ref(&devices[rank]);
        Communicators::join(&id, 2, rank, one, &|| false).expect("both come")
    };
    let (end, lost) = std::thread::scope(|scope| {
        let lost = scope.spawn(|| join(1));
        (join(0), lost.join().expect("joins"))
    });
    let mut buffer = upload(&devices[0], &[1.0; 8]);
    end.all_reduce(&mut [&mut buffer], 8).expect("it is begun");
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| devices[0].synchronize());
        end.abort();
        waits.join().expect("no panic").expect("the device is well");
    });
    let error = end.all_reduce(&mut [&mut buffer], 8).expect_err("it is gone");
    assert_eq!(error.to_string(), "summing over GPUs: it was given up");
    drop(lost);
}

#[test]
fn who_does_not_come_is_given_up() {
    let Some(device) = devices().into_iter().next() else { return };
    let id = UniqueId::new().expect("NCCL is there");
    let looks = std::cell::Cell::new(0);
    let given_up = || looks.replace(looks.get() + 1) == 3;
    let error = Communicators::join(&id, 2, 0, &[device], &given_up).expect_err("nobody comes");
    assert_eq!(error.to_string(), "joining a group of GPUs: it was given up");
}
