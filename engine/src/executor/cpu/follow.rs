//! A process that runs ranks of a model for the leader's process.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::parallel::{copy_in, copy_out, run_all, side_by_side};
use super::remote::{OwnedRow, PLAN_BYTES_MAX, plan, put_found};
use super::{CpuExecutor, CpuOptions};
use crate::collective::RankLost;
use crate::collective::hosts::group::{Others, talk};
use crate::collective::hosts::join::Joined;
use crate::collective::hosts::link::{Kind, Link};
use crate::collective::hosts::{JoinError, Place, Spanning, join};
use crate::executor::{ExecutorError, PageId};
use crate::model::Weights;

/// A process that follows could not begin, or go on.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// It found no leader that takes it.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Its ranks cannot run.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// The leader is gone.
    #[error("{0}")]
    Lost(RankLost),
}

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
    let Joined { link, pulse, watching, terms } = join(find, place, parts[0].hash(), join_timeout)?;
    let options = CpuOptions {
        threads,
        page_size: terms.page_size,
        kv_tokens: terms.kv_tokens,
        chunk_tokens: terms.chunk_tokens,
    };
    let others = Arc::new(Mutex::new(Others::Leader(link)));
    let ends = Spanning::group(place, Arc::clone(&others), pulse.clone());
    let mut ranks = side_by_side(parts, place.local().start, options, ends)?;
    ready();
    let lost = loop {
        if let Err(lost) = serve(&mut ranks, &others) {
            break lost;
        }
    };
    // The goodbye comes over another connection than the end of the work.
    let _ = watching.join();
    if pulse.is_over() { Ok(()) } else { Err(FollowError::Lost(pulse.lost().unwrap_or(lost))) }
}

/// What the leader asks.
enum Asked {
    Step(Vec<OwnedRow>),
    Read(PageId),
    Write(PageId, Vec<u8>),
}

/// Does what the leader asks next.
fn serve(ranks: &mut [CpuExecutor], others: &Mutex<Others>) -> Result<(), RankLost> {
    // The link is free while the ranks run: they sum over it.
    let asked = asked(&mut talk(others), &ranks[0])?;
    match asked {
        Asked::Step(plan) => {
            let rows: Vec<_> = plan.iter().map(OwnedRow::row).collect();
            if ranks[0].limits.check(&rows).is_err() {
                return Err(leader(&mut talk(others))?.malformed());
            }
            let found = run_all(ranks, &rows)?;
            let mut others = talk(others);
            let link = leader(&mut others)?;
            found.iter().try_for_each(|found| link.send(Kind::Found, |out| put_found(out, found)))
        }
        Asked::Read(page) => {
            let mut bytes = vec![0; page_bytes(ranks)];
            copy_out(ranks, page, &mut bytes);
            leader(&mut talk(others))?.send(Kind::Page, |out| out.extend_from_slice(&bytes))
        }
        Asked::Write(page, data) if data.len() == page_bytes(ranks) => {
            copy_in(ranks, page, &data);
            Ok(())
        }
        Asked::Write(..) => Err(leader(&mut talk(others))?.malformed()),
    }
}

fn page_bytes(ranks: &[CpuExecutor]) -> usize {
    ranks.iter().map(|rank| rank.kv.shape().page_bytes()).sum()
}

fn leader(others: &mut Others) -> Result<&mut Link, RankLost> {
    match others {
        Others::Leader(link) => Ok(link),
        Others::Followers(_) => Err(RankLost::new(0, "it is this process")),
    }
}

/// Waits for what the leader asks next.
fn asked(others: &mut Others, rank: &CpuExecutor) -> Result<Asked, RankLost> {
    let link = leader(others)?;
    let (kind, bytes) = link.receive(&[Kind::Plan, Kind::Read, Kind::Write], PLAN_BYTES_MAX)?;
    let asked = match kind {
        Kind::Plan => plan(bytes, rank.limits).map(Asked::Step),
        _ => bytes.split_first_chunk().and_then(|(page, data)| {
            let page = PageId(u32::from_le_bytes(*page));
            rank.limits.check_page(page).ok()?;
            Some(match kind {
                Kind::Read => Asked::Read(page),
                _ => Asked::Write(page, data.to_vec()),
            })
        }),
    };
    asked.ok_or_else(|| link.malformed())
}
