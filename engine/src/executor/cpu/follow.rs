//! A process that runs ranks of a model on the CPU for the leader's process.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::CpuOptions;
use super::parallel::TensorParallel;
use crate::collective::hosts::group::Others;
use crate::collective::hosts::join::Joined;
use crate::collective::hosts::{Member, Place, Spanning, join};
use crate::executor::hosts::FollowError;
use crate::executor::hosts::follower::Following;
use crate::model::Weights;

/// Runs this place's ranks until the leader says goodbye. `find` looks the leader's address up
/// before each try to reach it, for `join_timeout`; `ready` is called once it took this process.
///
/// # Errors
/// [`FollowError`].
///
/// # Panics
/// If the parts are not those of this place, in order.
pub fn follow(
    weights: &Weights,
    threads: usize,
    place: Place,
    join_timeout: Duration,
    find: &mut dyn FnMut() -> Result<String, String>,
    ready: &mut dyn FnMut(),
) -> Result<(), FollowError> {
    let parts = weights.parts().to_vec();
    let member = Member { place, model: parts[0].hash(), on_gpus: false };
    let Joined { link, pulse, watching, terms } = join(find, &member, join_timeout)?;
    let options = CpuOptions {
        threads,
        page_size: terms.page_size,
        kv_tokens: terms.kv_tokens,
        chunk_tokens: terms.chunk_tokens,
    };
    let others = Arc::new(Mutex::new(Others::Leader(link)));
    let ends = Spanning::group(place, Arc::clone(&others), pulse.clone());
    let following = Following { place, pulse, watching };
    match TensorParallel::of(parts, place, options, ends) {
        Ok(ranks) => {
            ready();
            following.serve(ranks, &others)
        }
        Err(error) => following.end(error.into()),
    }
}
