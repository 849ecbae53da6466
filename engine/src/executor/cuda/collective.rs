//! Where the ranks of a model on GPUs are, and how what they found is summed, or comes together.
//!
//! One thread drives all ranks, step by step, so they need no meeting point on the host: ranks that
//! share a device share its stream, and a kernel adds their buffers up; ranks that have a device each
//! sum by NCCL, over processes too.

use std::ops::Range;
use std::sync::Arc;

use headstart_kernels::cuda::{Buffer, Communicators, CudaError, Device, SAME_DEVICE_RANKS_MAX};

/// Where a model's tensor-parallel ranks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranks {
    /// So many on GPU 0.
    SameDevice(usize),
    /// One on each of so many GPUs, the first on GPU 0.
    Devices(usize),
}

impl Ranks {
    /// The places of `tp` ranks on a machine with so many GPUs: a GPU for each, unless there is but
    /// one.
    ///
    /// # Errors
    /// A sentence that says how many ranks there can be.
    pub fn place(tp: usize, gpus: usize) -> Result<Self, String> {
        match tp {
            1 => Ok(Self::SameDevice(1)),
            _ if gpus > 1 && (2..=gpus).contains(&tp) => Ok(Self::Devices(tp)),
            _ if gpus > 1 => {
                Err(format!("--tp: expected 1 to {gpus} ranks, one on each GPU, found {tp}"))
            }
            2..=SAME_DEVICE_RANKS_MAX => Ok(Self::SameDevice(tp)),
            _ => {
                let most = SAME_DEVICE_RANKS_MAX;
                Err(format!("--tp: expected 1 to {most} ranks on one GPU, found {tp}"))
            }
        }
    }

    /// The places of the ranks of one of several processes: a GPU for each, the first of them on GPU 0.
    /// (A machine without a GPU has more to say, which is not said here.)
    ///
    /// # Errors
    /// A sentence that says how many GPUs there are.
    pub fn place_apart(local: &Range<usize>, tp: usize, gpus: usize) -> Result<Self, String> {
        match local.len() {
            here if gpus == 0 || here <= gpus => Ok(Self::Devices(here)),
            here => Err(format!(
                "--tp: {here} of the {tp} ranks are this process's, with a GPU for each: expected \
                 {here} GPUs, found {gpus}"
            )),
        }
    }

    /// The GPU of each rank, in order.
    pub(super) fn ordinals(self) -> Vec<usize> {
        match self {
            Self::SameDevice(ranks) => vec![0; ranks],
            Self::Devices(ranks) => (0..ranks).collect(),
        }
    }
}

/// A stretch of what a rank found, and where it belongs among what all found.
pub(super) struct Piece<'a> {
    pub(super) from: &'a Buffer<f32>,
    pub(super) at: usize,
    pub(super) to: usize,
    pub(super) len: usize,
}

/// How ranks sum what they found.
#[derive(Debug)]
pub(super) enum Collective {
    /// There is one.
    Alone,
    /// A kernel adds the buffers of the device up.
    SameDevice(Device),
    /// NCCL does, over devices.
    Nccl(Arc<Communicators>),
}

impl Collective {
    /// That of ranks on `devices`, in order.
    pub(super) fn new(ranks: Ranks, devices: &[Device]) -> Result<Self, CudaError> {
        match (ranks, devices) {
            (Ranks::Devices(_), devices) => {
                Communicators::new(devices).map(Arc::new).map(Self::Nccl)
            }
            (Ranks::SameDevice(_), [first, _, ..]) => Ok(Self::SameDevice(first.clone())),
            (Ranks::SameDevice(_), _) => Ok(Self::Alone),
        }
    }

    /// Whether each rank has a device of its own.
    pub(super) fn spans_devices(&self) -> bool {
        matches!(self, Self::Nccl(_))
    }

    /// Replaces the first `count` values of each rank's buffer by their sums over the ranks, so that
    /// every rank has the same bits.
    pub(super) fn sum(
        &self,
        buffers: &mut [&mut Buffer<f32>],
        count: usize,
    ) -> Result<(), CudaError> {
        match self {
            Self::Alone => Ok(()),
            Self::SameDevice(device) => device.sum_ranks(buffers, count),
            Self::Nccl(ends) => ends.all_reduce(buffers, count),
        }
    }

    /// Ends sums that wait for a device which failed. What recorded one goes first.
    pub(super) fn give_up(&self) {
        if let Self::Nccl(ends) = self {
            ends.abort();
        }
    }

    /// Brings the pieces of all ranks together on each device, in the first `count` values of `to`, which
    /// they fill. `ranks` are each rank's device and pieces; all ranks are here.
    pub(super) fn gather<'a, P: IntoIterator<Item = Piece<'a>>>(
        &self,
        ranks: impl Iterator<Item = (&'a Device, P)>,
        to: &mut [&mut Buffer<f32>],
        count: usize,
    ) -> Result<(), CudaError> {
        for (rank, (device, pieces)) in ranks.enumerate() {
            let to = &mut *to[if self.spans_devices() { rank } else { 0 }];
            if self.spans_devices() {
                device.zero(to, count)?;
            }
            for Piece { from, at, to: place, len } in pieces {
                device.copy(from, at, to, place, len)?;
            }
        }
        match self {
            Self::Alone | Self::SameDevice(_) => Ok(()),
            Self::Nccl(ends) => ends.all_gather(to, count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_a_gpu_each_unless_there_is_but_one() {
        use Ranks::{Devices, SameDevice};
        let too_many = |most: &str, tp| Err(format!("--tp: expected 1 to {most}, found {tp}"));
        for (tp, gpus, expected) in [
            (1, 0, Ok(SameDevice(1))),
            (1, 8, Ok(SameDevice(1))),
            (4, 1, Ok(SameDevice(4))),
            (2, 2, Ok(Devices(2))),
            (3, 8, Ok(Devices(3))),
            (4, 2, too_many("2 ranks, one on each GPU", 4)),
            (17, 1, too_many("16 ranks on one GPU", 17)),
            (0, 1, too_many("16 ranks on one GPU", 0)),
        ] {
            assert_eq!(Ranks::place(tp, gpus), expected, "{tp} ranks, {gpus} GPUs");
        }
        let few = "--tp: 2 of the 4 ranks are this process's, with a GPU for each: expected 2 GPUs, \
                   found 1";
        for (local, gpus, expected) in
            [(2..4, 2, Ok(Devices(2))), (0..1, 8, Ok(Devices(1))), (2..4, 1, Err(few.to_owned()))]
        {
            assert_eq!(Ranks::place_apart(&local, 4, gpus), expected, "{local:?}, {gpus} GPUs");
        }
        assert_eq!(SameDevice(2).ordinals(), [0, 0]);
        assert_eq!(Devices(3).ordinals(), [0, 1, 2]);
    }
}
