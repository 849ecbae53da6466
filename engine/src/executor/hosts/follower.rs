//! A process that runs ranks of a model for the leader's process.

use std::sync::Mutex;
use std::thread::JoinHandle;

use super::leader::failed;
use super::wire::{OwnedRow, PLAN_BYTES_MAX, plan, put_found};
use super::{FollowError, LocalRanks};
use crate::collective::RankLost;
use crate::collective::hosts::group::{Others, talk};
use crate::collective::hosts::link::{Kind, Link};
use crate::collective::hosts::{Place, Pulse};
use crate::executor::{Limits, PageId};

/// A follower's connections, beside that of the work.
#[derive(Debug)]
pub(in crate::executor) struct Following {
    pub(in crate::executor) place: Place,
    pub(in crate::executor) pulse: Pulse,
    /// Ends when the leader has left or is lost.
    pub(in crate::executor) watching: JoinHandle<()>,
}

impl Following {
    /// Does what the leader asks until it leaves or is lost.
    pub(in crate::executor) fn serve(
        self,
        mut ranks: impl LocalRanks,
        others: &Mutex<Others>,
    ) -> Result<(), FollowError> {
        let error = loop {
            if let Err(error) = serve(&mut ranks, others, &self.pulse) {
                break error;
            }
        };
        self.end(error)
    }

    /// Why it ends with `error`; after the leader's goodbye there is no why.
    pub(in crate::executor) fn end(self, error: FollowError) -> Result<(), FollowError> {
        let Self { place, pulse, watching } = self;
        let lost = match &error {
            FollowError::Executor(error) => failed(&pulse, place, error),
            FollowError::Lost(lost) => lost.clone(),
            FollowError::Join(_) => return Err(error),
        };
        // The goodbye comes over another connection than the end of the work.
        let _ = watching.join();
        match pulse.is_over() {
            true => Ok(()),
            // Its own failure is told in its own words.
            false if lost.rank == place.local().start => Err(error),
            false => Err(FollowError::Lost(pulse.lost().unwrap_or(lost))),
        }
    }
}

/// What the leader asks.
enum Asked {
    Step(Vec<OwnedRow>),
    Read(PageId),
    Write(PageId, Vec<u8>),
}

/// Does what the leader asks next.
fn serve(
    ranks: &mut impl LocalRanks,
    others: &Mutex<Others>,
    pulse: &Pulse,
) -> Result<(), FollowError> {
    // The link is free while the ranks run: they may sum over it.
    let asked = asked(&mut talk(others), ranks.limits())?;
    match asked {
        Asked::Step(plan) => {
            let rows: Vec<_> = plan.iter().map(OwnedRow::row).collect();
            if ranks.check(&rows).is_err() {
                return Err(leader(&mut talk(others))?.malformed().into());
            }
            let found = ranks.run(&rows)?;
            let mut others = talk(others);
            let link = leader(&mut others)?;
            // If the leader is gone, the sums may have been given up: what they hold means nothing.
            if let Some(lost) = pulse.lost() {
                return Err(lost.into());
            }
            for found in &found {
                link.send(Kind::Found, |out| put_found(out, found))?;
            }
        }
        Asked::Read(page) => {
            let mut bytes = vec![0; ranks.page_bytes()];
            ranks.copy_out(page, &mut bytes)?;
            leader(&mut talk(others))?.send(Kind::Page, |out| out.extend_from_slice(&bytes))?;
        }
        Asked::Write(page, data) if data.len() == ranks.page_bytes() => {
            ranks.copy_in(page, &data)?;
        }
        Asked::Write(..) => return Err(leader(&mut talk(others))?.malformed().into()),
    }
    Ok(())
}

fn leader(others: &mut Others) -> Result<&mut Link, RankLost> {
    match others {
        Others::Leader(link) => Ok(link),
        Others::Followers(_) => Err(RankLost::new(0, "it is this process")),
    }
}

/// Waits for what the leader asks next.
fn asked(others: &mut Others, limits: Limits) -> Result<Asked, RankLost> {
    let link = leader(others)?;
    let (kind, bytes) = link.receive(&[Kind::Plan, Kind::Read, Kind::Write], PLAN_BYTES_MAX)?;
    let asked = match kind {
        Kind::Plan => plan(bytes, limits).map(Asked::Step),
        _ => bytes.split_first_chunk().and_then(|(page, data)| {
            let page = PageId(u32::from_le_bytes(*page));
            limits.check_page(page).ok()?;
            Some(match kind {
                Kind::Read => Asked::Read(page),
                _ => Asked::Write(page, data.to_vec()),
            })
        }),
    };
    asked.ok_or_else(|| link.malformed())
}
