//! What every real executor refuses before it touches memory.

use super::{ExecutorError, Limits, Row};
use crate::core::pages::PageId;

fn refused(message: String) -> ExecutorError {
    ExecutorError { message, fatal: false }
}

impl Limits {
    /// Refuses a batch that would reach outside the model or the pool.
    pub(super) fn check(&self, rows: &[Row<'_>]) -> Result<(), ExecutorError> {
        self.check_behind(rows, &[])
    }

    /// [`Self::check`] for a batch behind another one, of which `sampled` says whether each row
    /// samples at its last probe.
    pub(super) fn check_behind(
        &self,
        rows: &[Row<'_>],
        sampled: &[bool],
    ) -> Result<(), ExecutorError> {
        let checked = rows.iter().enumerate().map(|(index, row)| {
            self.check_row(row, sampled).map_err(|what| refused(format!("row {index}: {what}")))
        });
        checked.collect()
    }

    fn check_row(&self, row: &Row<'_>, sampled: &[bool]) -> Result<(), String> {
        let Self { vocab_size, context_length, page_size, pages } = *self;
        if let Some(before) = row.pending {
            if sampled.get(before) != Some(&true) {
                return Err(format!("row {before} of the batch before samples no token"));
            }
            if row.start != row.context.len() {
                return Err(format!("known new tokens before a pending one: {}", row.start));
            }
            if row.sampling.has_penalties() {
                return Err("penalties cannot count a pending token".into());
            }
        }
        let len = row.end();
        if row.start >= len {
            return Err(format!("no new tokens: start {} of {len}", row.start));
        }
        if len > context_length {
            return Err(format!("{len} tokens exceed the context length {context_length}"));
        }
        if row.pages.len() * page_size < len {
            return Err(format!("{} pages do not hold {len} tokens", row.pages.len()));
        }
        if let Some(page) = row.pages.iter().find(|page| page.0 as usize >= pages) {
            return Err(format!("page {} of {pages}", page.0));
        }
        let new = &row.context[row.start..];
        if let Some(token) = new.iter().find(|token| **token as usize >= vocab_size) {
            return Err(format!("token {token} in a vocabulary of {vocab_size}"));
        }
        let mut next = row.start;
        for probe in row.probes {
            if probe.position < next || probe.position >= len {
                return Err(format!("probe at {} outside {next}..{len}", probe.position));
            }
            next = probe.position + 1;
            if let Some(target) = probe.target.filter(|t| *t as usize >= vocab_size) {
                return Err(format!("target {target} in a vocabulary of {vocab_size}"));
            }
        }
        Ok(())
    }

    /// Refuses a page that the pool does not have.
    pub(super) fn check_page(&self, page: PageId) -> Result<(), ExecutorError> {
        match (page.0 as usize) < self.pages {
            true => Ok(()),
            false => Err(refused(format!("page {} of {}", page.0, self.pages))),
        }
    }
}

/// Refuses bytes that are no page.
pub(super) fn check_page_bytes(data: &[u8], expected: usize) -> Result<(), ExecutorError> {
    match data.len() == expected {
        true => Ok(()),
        false => Err(refused(format!("expected a page of {expected} bytes, found {}", data.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::sampling::Sampling;
    use crate::executor::Probe;

    #[test]
    fn a_pending_token_is_one_that_the_batch_before_samples() {
        let limits = Limits { vocab_size: 10, context_length: 8, page_size: 4, pages: 3 };
        let penalised = Sampling { presence_penalty: 0.5, ..Sampling::default() };
        let sampling = Sampling::default();
        /// Known tokens, start, pages, sampling, the row before, and what is said.
        type Case<'a> = (usize, usize, usize, &'a Sampling, usize, &'a str);
        let cases: [Case<'_>; 7] = [
            (3, 3, 1, &sampling, 1, ""),
            (3, 3, 1, &sampling, 0, "row 0 of the batch before"),
            (3, 3, 1, &sampling, 2, "row 2 of the batch before"),
            (3, 2, 1, &sampling, 1, "before a pending one"),
            (4, 4, 1, &sampling, 1, "1 pages do not hold 5 tokens"),
            (8, 8, 3, &sampling, 1, "context length"),
            (3, 3, 1, &penalised, 1, "penalties"),
        ];
        for (known, start, pages, sampling, before, expected) in cases {
            let pages: Vec<PageId> = (0..pages as u32).map(PageId).collect();
            let (context, pending) = (vec![1; known], Some(before));
            let probes = [Probe { position: known, target: None, sample: true, top: 0 }];
            let (context, pages, probes) = (&context[..], &pages[..], &probes[..]);
            let row = Row { context, start, pages, answer_start: 0, probes, sampling, pending };
            match limits.check_behind(&[row], &[false, true]) {
                Ok(()) => assert_eq!(expected, ""),
                Err(error) => {
                    assert!(error.message.contains(expected) && !expected.is_empty(), "{error}");
                }
            }
            assert!(limits.check(&[row]).is_err(), "alone it is nothing");
        }
    }

    #[test]
    fn a_batch_stays_inside_the_model_and_the_pool() {
        let limits = Limits { vocab_size: 10, context_length: 8, page_size: 4, pages: 3 };
        let sampling = Sampling::default();
        let probe = |position, target| Probe { position, target, sample: false, top: 0 };
        /// Context, start, pages, probes, and what is said; empty: it is taken.
        type Case<'a> = (&'a [u32], usize, &'a [u32], &'a [Probe], &'a str);
        let cases: [Case<'_>; 9] = [
            (&[1, 2, 3], 0, &[2], &[probe(0, Some(9)), probe(2, None)], ""),
            (&[1, 2], 2, &[0], &[], "no new tokens"),
            (&[1; 9], 0, &[0, 1, 2], &[], "context length"),
            (&[1; 5], 0, &[0], &[], "do not hold"),
            (&[1], 0, &[3], &[], "page 3 of 3"),
            (&[1, 10], 1, &[0], &[], "token 10"),
            (&[1, 2], 1, &[0], &[probe(0, None)], "probe at 0"),
            (&[1, 2], 0, &[0], &[probe(1, None), probe(1, None)], "probe at 1"),
            (&[1, 2], 0, &[0], &[probe(1, Some(10))], "target 10"),
        ];
        for (context, start, pages, probes, expected) in cases {
            let pages: Vec<PageId> = pages.iter().copied().map(PageId).collect();
            let (pages, sampling) = (&pages[..], &sampling);
            let row =
                Row { context, start, pages, answer_start: 0, probes, sampling, pending: None };
            match limits.check(&[row]) {
                Ok(()) => assert_eq!(expected, ""),
                Err(error) => {
                    assert!(error.message.contains(expected) && !expected.is_empty(), "{error}");
                    assert!(error.message.starts_with("row 0: ") && !error.fatal);
                }
            }
        }
        assert!(limits.check_page(PageId(2)).is_ok() && limits.check_page(PageId(3)).is_err());
        assert!(check_page_bytes(&[0; 4], 4).is_ok() && check_page_bytes(&[0; 4], 5).is_err());
    }
}
