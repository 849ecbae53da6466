//! What travels between processes beside sums: the plan of a step, and what ranks found.
//!
//! Only what a rank needs travels: of a sequence, its new tokens. Numbers are little-endian and
//! every count is checked against what is there.

use headstart_kernels::VocabStats;

use crate::core::pages::PageId;
use crate::core::sampling::Sampling;
use crate::executor::partial::Partial;
use crate::executor::{Limits, Probe, Row, TokenId};

/// Bytes of a plan at most.
pub(super) const PLAN_BYTES_MAX: usize = 256 << 20;
/// A token that is not there.
const NONE: u32 = u32::MAX;
/// `[argmax][max][log_sum_exp][target is there][target][top len][logits len]`
const PARTIAL_BYTES: usize = 28;

fn put(out: &mut Vec<u8>, value: usize) {
    out.extend(u32::try_from(value).unwrap_or(NONE).to_le_bytes());
}

/// Appends the rows of a step.
pub(super) fn put_plan(out: &mut Vec<u8>, rows: &[Row<'_>]) {
    put(out, rows.len());
    for row in rows {
        let new = &row.context[row.start..];
        put(out, row.start);
        put(out, new.len());
        put(out, row.pages.len());
        put(out, row.probes.len());
        put(out, usize::from(!row.sampling.is_plain_greedy()));
        out.extend(new.iter().flat_map(|token| token.to_le_bytes()));
        out.extend(row.pages.iter().flat_map(|page| page.0.to_le_bytes()));
        for probe in row.probes {
            put(out, probe.position);
            out.extend(probe.target.unwrap_or(NONE).to_le_bytes());
            put(out, usize::from(probe.sample));
            put(out, probe.top);
        }
    }
}

/// Bytes that [`put_plan`] appends.
pub(super) fn plan_bytes(rows: &[Row<'_>]) -> usize {
    let row = |row: &Row<'_>| {
        5 + (row.context.len() - row.start) + row.pages.len() + 4 * row.probes.len()
    };
    4 * (1 + rows.iter().map(row).sum::<usize>())
}

/// A row as a follower has it: tokens before `start` are 0, for no rank looks at them.
#[derive(Debug)]
pub(super) struct OwnedRow {
    context: Vec<TokenId>,
    start: usize,
    pages: Vec<PageId>,
    probes: Vec<Probe>,
    sampling: Sampling,
}

impl OwnedRow {
    pub(super) fn row(&self) -> Row<'_> {
        Row {
            context: &self.context,
            start: self.start,
            pages: &self.pages,
            answer_start: self.start,
            probes: &self.probes,
            sampling: &self.sampling,
            pending: None,
        }
    }
}

/// Reads a plan; `None`: it is malformed.
pub(super) fn plan(bytes: &[u8], limits: Limits) -> Option<Vec<OwnedRow>> {
    let mut reader = Reader(bytes);
    let rows = reader.count(20)?;
    let rows = (0..rows).map(|_| row(&mut reader, limits)).collect::<Option<Vec<_>>>()?;
    reader.0.is_empty().then_some(rows)
}

fn row(reader: &mut Reader<'_>, limits: Limits) -> Option<OwnedRow> {
    let [start, new, pages, probes, drawn] = reader.sizes()?;
    if start.checked_add(new)? > limits.context_length {
        return None;
    }
    let mut context = vec![0; start];
    context.extend(reader.words(new)?);
    let pages = reader.words(pages)?.map(PageId).collect();
    let probes = (0..reader.checked(probes, 16)?).map(|_| reader.probe()).collect::<Option<_>>()?;
    // All that a rank asks of a row's sampling is whether its logits are wanted.
    let temperature = if drawn == 0 { 0.0 } else { 1.0 };
    let sampling = Sampling { temperature, ..Sampling::default() };
    Some(OwnedRow { context, start, pages, probes, sampling })
}

/// Bytes that a rank's findings have at most, for a rank with `vocab` tokens of the vocabulary.
pub(super) fn found_bytes_max(rows: &[Row<'_>], vocab: usize) -> usize {
    let probe = |row: &Row<'_>, probe: &Probe| {
        let drawn = probe.sample && !row.sampling.is_plain_greedy();
        PARTIAL_BYTES + 8 * probe.top.min(vocab) + if drawn { 4 * vocab } else { 0 }
    };
    rows.iter().flat_map(|row| row.probes.iter().map(move |p| probe(row, p))).sum()
}

/// Appends what a rank found.
pub(super) fn put_found(out: &mut Vec<u8>, found: &[Vec<Partial>]) {
    for partial in found.iter().flatten() {
        let VocabStats { argmax, max, log_sum_exp } = partial.stats;
        out.extend(argmax.to_le_bytes());
        out.extend(max.to_le_bytes());
        out.extend(log_sum_exp.to_le_bytes());
        put(out, usize::from(partial.target.is_some()));
        out.extend(partial.target.unwrap_or(0.0).to_le_bytes());
        put(out, partial.top.len());
        put(out, partial.logits.len());
        for (token, logit) in &partial.top {
            out.extend(token.to_le_bytes());
            out.extend(logit.to_le_bytes());
        }
        out.extend(partial.logits.iter().flat_map(|logit| logit.to_le_bytes()));
    }
}

/// Reads what a rank found at the probes of `rows`; `None`: it is malformed. `vocab` is the whole
/// vocabulary's size.
pub(super) fn found(bytes: &[u8], rows: &[Row<'_>], vocab: usize) -> Option<Vec<Vec<Partial>>> {
    let mut reader = Reader(bytes);
    let mut of = |row: &Row<'_>| {
        let mut one = |probe: &Probe| {
            let drawn = probe.sample && !row.sampling.is_plain_greedy();
            reader.partial(vocab).filter(|partial| partial.logits.is_empty() != drawn)
        };
        row.probes.iter().map(&mut one).collect::<Option<Vec<_>>>()
    };
    let found = rows.iter().map(&mut of).collect::<Option<Vec<_>>>()?;
    reader.0.is_empty().then_some(found)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn word(&mut self) -> Option<u32> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*word))
    }

    fn float(&mut self) -> Option<f32> {
        self.word().map(f32::from_bits)
    }

    fn size(&mut self) -> Option<usize> {
        self.word().map(|word| word as usize)
    }

    fn sizes<const N: usize>(&mut self) -> Option<[usize; N]> {
        let mut sizes = [0; N];
        for size in &mut sizes {
            *size = self.size()?;
        }
        Some(sizes)
    }

    /// A count of things of at least `bytes` each that can all be there.
    fn checked(&self, count: usize, bytes: usize) -> Option<usize> {
        (count.checked_mul(bytes)? <= self.0.len()).then_some(count)
    }

    fn count(&mut self, bytes: usize) -> Option<usize> {
        let count = self.size()?;
        self.checked(count, bytes)
    }

    fn words(&mut self, count: usize) -> Option<impl Iterator<Item = u32> + use<'a>> {
        let (words, rest) = self.0.split_at_checked(count.checked_mul(4)?)?;
        self.0 = rest;
        Some(words.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])))
    }

    fn probe(&mut self) -> Option<Probe> {
        let position = self.size()?;
        let target = Some(self.word()?).filter(|token| *token != NONE);
        let [sample, top] = self.sizes()?;
        Some(Probe { position, target, sample: sample != 0, top })
    }

    fn partial(&mut self, vocab: usize) -> Option<Partial> {
        let (argmax, max, log_sum_exp) = (self.word()?, self.float()?, self.float()?);
        let (known, target) = (self.word()?, self.float()?);
        let [top, logits] = self.sizes()?;
        let token = |token: u32| ((token as usize) < vocab).then_some(token);
        let stats = VocabStats { argmax: token(argmax)?, max, log_sum_exp };
        let top = (0..self.checked(top, 8)?)
            .map(|_| Some((token(self.word()?)?, self.float()?)))
            .collect::<Option<_>>()?;
        let logits = self.words(logits)?.map(f32::from_bits).collect();
        Some(Partial { stats, target: (known != 0).then_some(target), top, logits })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { vocab_size: 100, context_length: 64, page_size: 16, pages: 50 };

    fn partial(argmax: u32) -> Partial {
        Partial {
            stats: VocabStats { argmax, max: 2.5, log_sum_exp: 3.5 },
            target: (argmax > 3).then_some(-1.5),
            top: vec![(argmax, 2.5), (1, f32::NEG_INFINITY)],
            logits: vec![0.5; argmax as usize],
        }
    }

    #[test]
    fn plans_and_findings_survive_the_way() {
        let (greedy, drawn) =
            (Sampling::default(), Sampling { temperature: 0.7, ..Sampling::default() });
        let probes = [
            Probe { position: 20, target: Some(3), sample: false, top: 2 },
            Probe { position: 23, target: None, sample: true, top: 0 },
        ];
        let (context, pages) = ((0..24).collect::<Vec<u32>>(), [PageId(3), PageId(9)]);
        let row = |start, probes, sampling| Row {
            context: &context,
            start,
            pages: &pages,
            answer_start: 12,
            probes,
            sampling,
            pending: None,
        };
        let rows = [row(18, &probes[..], &drawn), row(23, &[], &greedy)];
        let mut bytes = Vec::new();
        put_plan(&mut bytes, &rows);
        assert_eq!(bytes.len(), plan_bytes(&rows));
        let read = plan(&bytes, LIMITS).expect("well formed");
        for (owned, row) in read.iter().zip(&rows) {
            let read = owned.row();
            assert_eq!((read.start, read.pages, read.probes), (row.start, row.pages, row.probes));
            assert_eq!(read.context[row.start..], row.context[row.start..]);
            assert_eq!(read.context.len(), row.context.len());
            assert_eq!(read.sampling.is_plain_greedy(), row.sampling.is_plain_greedy());
        }
        let undrawn = Partial { logits: Vec::new(), ..partial(7) };
        let partials = vec![vec![undrawn, partial(2)], vec![]];
        let mut bytes = Vec::new();
        put_found(&mut bytes, &partials);
        assert!(bytes.len() <= found_bytes_max(&rows, 50));
        let read = found(&bytes, &rows, 100).expect("well formed");
        assert_eq!(format!("{read:?}"), format!("{partials:?}"));
        assert!(found(&bytes, &rows, 5).is_none(), "a token outside the vocabulary");
        assert!(found(&bytes[1..], &rows, 100).is_none());
        assert!(found(&bytes, &[row(18, &probes, &greedy)], 100).is_none(), "nobody draws");
    }

    proptest! {
        /// Whatever comes, nothing panics or grows beyond what came.
        #[test]
        fn bytes_are_a_plan_or_not(bytes in proptest::collection::vec(0u8..3, 0..400)) {
            let _ = plan(&bytes, LIMITS);
            let sampling = Sampling::default();
            let probes = [Probe { position: 0, target: None, sample: true, top: 1 }];
            let row = Row {
                context: &[1],
                start: 0,
                pages: &[],
                answer_start: 0,
                probes: &probes,
                sampling: &sampling,
                pending: None,
            };
            let _ = found(&bytes, &[row], 100);
        }
    }
}
