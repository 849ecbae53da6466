//! The process that leads: it is the executor.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::wire::{PLAN_BYTES_MAX, found, found_bytes_max, plan_bytes, put_plan};
use super::{LocalRanks, Partials};
use crate::collective::RankLost;
use crate::collective::hosts::group::{Others, Peer, talk};
use crate::collective::hosts::link::Kind;
use crate::collective::hosts::{Place, Pulse};
use crate::core::sampling;
use crate::executor::check::check_page_bytes;
use crate::executor::{Executor, ExecutorError, Found, KvFormat, Limits, PageId, Row, partial};

/// The time in which a lost process is seen, once a sum with it has failed.
const LOSS_SEEN_WITHIN: Duration = Duration::from_secs(1);

/// The ranks of all processes, seen from the one that leads.
pub(in crate::executor) struct Leading<L> {
    /// These go before the others are told goodbye.
    local: L,
    elsewhere: Elsewhere,
    sampler: sampling::Scratch,
}

impl<L: LocalRanks> Leading<L> {
    pub(in crate::executor) fn new(local: L, elsewhere: Elsewhere) -> Self {
        Self { local, elsewhere, sampler: sampling::Scratch::default() }
    }
}

/// The ranks in other processes. They are told goodbye when this goes.
#[derive(Debug)]
pub(in crate::executor) struct Elsewhere {
    others: Arc<Mutex<Others>>,
    pulse: Pulse,
    place: Place,
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.pulse.leave();
    }
}

impl Elsewhere {
    pub(in crate::executor) fn new(others: Arc<Mutex<Others>>, pulse: Pulse, place: Place) -> Self {
        Self { others, pulse, place }
    }

    /// Sends the same to all followers.
    pub(in crate::executor) fn tell(
        &self,
        kind: Kind,
        write: impl Fn(&mut Vec<u8>),
    ) -> Result<(), RankLost> {
        let mut others = talk(&self.others);
        followers(&mut others).iter_mut().try_for_each(|peer| peer.link.send(kind, &write))
    }

    /// Tells the followers what to run.
    fn send_plan(&self, rows: &[Row<'_>]) -> Result<(), ExecutorError> {
        let bytes = plan_bytes(rows);
        if bytes > PLAN_BYTES_MAX {
            let message = format!("a step's plan has {bytes} bytes, more than {PLAN_BYTES_MAX}");
            return Err(ExecutorError { message, fatal: false });
        }
        Ok(self.tell(Kind::Plan, |out| put_plan(out, rows))?)
    }

    /// What the followers' ranks found, in the order of the ranks.
    fn found(&self, rows: &[Row<'_>], vocab: usize) -> Result<Partials, RankLost> {
        let mut all = Vec::with_capacity(self.place.ranks);
        let bytes_max = found_bytes_max(rows, vocab);
        for peer in followers(&mut talk(&self.others)) {
            for _ in peer.ranks.clone() {
                let (_, bytes) = peer.link.receive(&[Kind::Found], bytes_max)?;
                match found(bytes, rows, vocab) {
                    Some(found) => all.push(found),
                    None => return Err(peer.link.malformed()),
                }
            }
        }
        Ok(all)
    }

    /// Appends a page of the followers' ranks to `out`.
    fn read_page(&self, page: PageId, bytes: usize, out: &mut Vec<u8>) -> Result<(), RankLost> {
        let mut left = bytes;
        for peer in followers(&mut talk(&self.others)) {
            peer.link.send(Kind::Read, |out| out.extend(page.0.to_le_bytes()))?;
            let (_, bytes) = peer.link.receive(&[Kind::Page], left)?;
            left -= bytes.len();
            out.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn write_page(&self, page: PageId, format: KvFormat, data: &[u8]) -> Result<(), RankLost> {
        let mut rest = data;
        for peer in followers(&mut talk(&self.others)) {
            let rank = |rank| format.layout.layers * format.layout.layer_bytes(rank);
            let (part, after) = rest.split_at(peer.ranks.clone().map(rank).sum());
            peer.link.send(Kind::Write, |out| {
                out.extend(page.0.to_le_bytes());
                out.extend_from_slice(part);
            })?;
            rest = after;
        }
        Ok(())
    }

    /// What has just been computed counts only if nobody was lost meanwhile: a sum that was given up
    /// ends with values that mean nothing.
    fn all_there(&self) -> Result<(), RankLost> {
        self.pulse.lost().map_or(Ok(()), Err)
    }

    /// This process's own ranks failed: because another one is lost, or for reasons of their own, and
    /// then they are what the others lose.
    pub(in crate::executor) fn failed(&self, error: &ExecutorError) -> RankLost {
        failed(&self.pulse, self.place, error)
    }
}

/// As [`Elsewhere::failed`], for any process.
pub(super) fn failed(pulse: &Pulse, place: Place, error: &ExecutorError) -> RankLost {
    pulse.wait_for_end(LOSS_SEEN_WITHIN);
    pulse.lose(RankLost::new(place.local().start, error.message.clone()))
}

fn followers(others: &mut Others) -> &mut [Peer] {
    match others {
        Others::Followers(peers) => peers,
        Others::Leader(_) => &mut [],
    }
}

impl<L: LocalRanks> Executor for Leading<L> {
    fn limits(&self) -> Limits {
        self.local.limits()
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        let Self { local, elsewhere, sampler } = self;
        local.check(rows)?;
        elsewhere.send_plan(rows)?;
        let mut found = local.run(rows).map_err(|error| elsewhere.failed(&error))?;
        elsewhere.all_there()?;
        found.extend(elsewhere.found(rows, local.limits().vocab_size)?);
        partial::join(rows, found, sampler)
    }

    fn kv_format(&self) -> Option<KvFormat> {
        self.local.format()
    }

    fn read_page(&mut self, page: PageId, out: &mut Vec<u8>) -> Result<(), ExecutorError> {
        self.limits().check_page(page)?;
        out.resize(self.local.page_bytes(), 0);
        self.local.copy_out(page, out).map_err(|error| self.elsewhere.failed(&error))?;
        if let Some(format) = self.kv_format() {
            let bytes = format.layout.page_bytes();
            self.elsewhere.read_page(page, bytes - out.len(), out)?;
            check_page_bytes(out, bytes)?;
        }
        Ok(())
    }

    fn write_page(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        self.limits().check_page(page)?;
        let (format, here) = (self.kv_format(), self.local.page_bytes());
        check_page_bytes(data, format.map_or(here, |format| format.layout.page_bytes()))?;
        let written = self.local.copy_in(page, &data[..here]);
        written.map_err(|error| self.elsewhere.failed(&error))?;
        if let Some(format) = format {
            self.elsewhere.write_page(page, format, &data[here..])?;
        }
        Ok(())
    }

    fn pulse(&self) -> Option<Pulse> {
        Some(self.elsewhere.pulse.clone())
    }
}
