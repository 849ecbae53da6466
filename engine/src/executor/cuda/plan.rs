//! From rows to batches of the device. Pure.

use headstart_kernels::cuda::{Batch, SPLIT, Sequence};

use crate::executor::{Limits, Probe, Row};

/// Rows of the largest batch that is recorded as a graph.
pub(super) const GRAPH_ROWS_MAX: usize = 256;
/// Sequences of a chunk: bounds the page tables that travel to the device.
pub(super) const SEQUENCES_MAX: usize = GRAPH_ROWS_MAX;

/// Neighbouring new tokens of one row within a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) row: usize,
    /// The absolute position of the first token.
    pub(super) start: usize,
    pub(super) len: usize,
}

/// A probe whose logits the batch gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) row: usize,
    pub(super) probe: Probe,
    /// Its place among the batch's probes.
    pub(super) at: usize,
}

/// What of a batch's shape is fixed in a recorded graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    pub(super) rows: usize,
    pub(super) table_stride: usize,
}

/// A chunk as the device gets it.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) batch: Batch,
    pub(super) wanted: Vec<Wanted>,
    /// `None`: not a decode step.
    pub(super) graph: Option<GraphKey>,
}

/// Cuts the rows' new tokens into chunks of at most `tokens` of at most [`SEQUENCES_MAX`] rows.
pub(super) fn chunks(rows: &[Row<'_>], tokens: usize) -> Vec<Vec<Span>> {
    let (mut chunks, mut chunk, mut used) = (Vec::new(), Vec::new(), 0);
    for (index, row) in rows.iter().enumerate() {
        let mut start = row.start;
        while start < row.end() {
            let len = (row.end() - start).min(tokens - used);
            chunk.push(Span { row: index, start, len });
            start += len;
            used += len;
            if used == tokens || chunk.len() == SEQUENCES_MAX {
                chunks.push(std::mem::take(&mut chunk));
                used = 0;
            }
        }
    }
    if !chunk.is_empty() {
        chunks.push(chunk);
    }
    chunks
}

/// Table entries, a power of two of whole splits, so that few shapes serve all lengths.
fn table_stride(pages: usize, page_size: usize) -> usize {
    let split = SPLIT.div_ceil(page_size).max(1);
    pages.div_ceil(split).next_power_of_two() * split
}

/// The most table entries that a row can need.
pub(super) fn table_stride_max(limits: Limits) -> usize {
    table_stride(limits.context_length.div_ceil(limits.page_size), limits.page_size)
}

/// The batch of a chunk. With `extends`, new tokens of a sequence are computed together.
pub(super) fn plan(rows: &[Row<'_>], spans: &[Span], limits: Limits, extends: bool) -> Planned {
    let page_size = limits.page_size;
    let pages_of = |span: &Span| (span.start + span.len).div_ceil(page_size);
    let pages = spans.iter().map(pages_of).max().unwrap_or(1);
    let stride = table_stride(pages, page_size);
    let mut batch = Batch { table_stride: stride, ..Batch::default() };
    let mut wanted = Vec::new();
    for (table, span) in spans.iter().enumerate() {
        let (row, at) = (&rows[span.row], batch.tokens.len());
        let positions = span.start..span.start + span.len;
        // A token that is pending is put in its place on the device.
        let token = |position: usize| row.context.get(position).copied().unwrap_or(0);
        batch.tokens.extend(positions.clone().map(token));
        batch.pending.extend(row.pending.map(|before| (at as u32, before as u32)));
        batch.positions.extend(positions.clone().map(|p| p as u32));
        batch.row_tables.extend(positions.clone().map(|_| table as u32));
        batch.tables.extend(row.pages[..pages_of(span)].iter().map(|page| page.0));
        batch.tables.resize((table + 1) * stride, 0);
        if span.len > 1 && extends {
            batch.sequences.push(Sequence {
                row: at as u32,
                rows: span.len as u32,
                start: span.start as u32,
                table: table as u32,
            });
        } else {
            batch.singles.extend((at..at + span.len).map(|r| r as u32));
        }
        for probe in row.probes.iter().filter(|p| positions.contains(&p.position)) {
            wanted.push(Wanted { row: span.row, probe: *probe, at: batch.probes.len() });
            batch.probes.push((at + probe.position - span.start) as u32);
            batch.targets.push(probe.target.unwrap_or(u32::MAX));
        }
    }
    let decode = spans.len() <= GRAPH_ROWS_MAX && spans.iter().all(|span| span.len == 1);
    if !decode {
        return Planned { batch, wanted, graph: None };
    }
    fill_up(&mut batch, &mut wanted, limits);
    let graph = Some(GraphKey { rows: batch.tokens.len(), table_stride: stride });
    Planned { batch, wanted, graph }
}

/// Makes a decode step one of few shapes: as many rows as a power of two, each of them probed. The
/// rows that are added write to the pool's last page, which is nobody's.
fn fill_up(batch: &mut Batch, wanted: &mut [Wanted], limits: Limits) {
    let (used, stride) = (batch.tokens.len(), batch.table_stride);
    let rows = used.next_power_of_two();
    batch.tokens.resize(rows, 0);
    batch.positions.resize(rows, 0);
    batch.row_tables = (0..rows as u32).collect();
    for _ in used..rows {
        batch.tables.push(limits.pages as u32);
        batch.tables.resize(batch.tables.len() + stride - 1, 0);
    }
    let mut targets = vec![u32::MAX; rows];
    for (wanted, (probe, target)) in wanted.iter_mut().zip(batch.probes.iter().zip(&batch.targets))
    {
        wanted.at = *probe as usize;
        targets[wanted.at] = *target;
    }
    batch.singles = (0..rows as u32).collect();
    batch.probes = (0..rows as u32).collect();
    batch.targets = targets;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pages::PageId;
    use crate::core::sampling::Sampling;

    const LIMITS: Limits =
        Limits { vocab_size: 100, context_length: 640, page_size: 16, pages: 50 };

    fn probe(position: usize, target: Option<u32>) -> Probe {
        Probe { position, target, sample: true, top: 0 }
    }

    fn pages(ids: &[u32]) -> Vec<PageId> {
        ids.iter().map(|id| PageId(*id)).collect()
    }

    #[test]
    fn a_decode_step_is_filled_up_to_a_known_shape() {
        let (sampling, context) = (Sampling::default(), [7; 40]);
        let tables = [pages(&[3, 4, 5]), pages(&[9, 8]), pages(&[1])];
        let row = |len: usize, pages, probes| Row {
            context: &context[..len],
            start: len - 1,
            pages,
            answer_start: 0,
            probes,
            sampling: &sampling,
            pending: None,
        };
        let (first, third) = ([probe(39, None)], [probe(2, Some(6))]);
        let rows = [
            row(40, &tables[0], &first[..]),
            row(20, &tables[1], &[]),
            row(3, &tables[2], &third[..]),
        ];
        let chunks = chunks(&rows, 256);
        assert_eq!(chunks.len(), 1);
        let planned = plan(&rows, &chunks[0], LIMITS, true);
        let batch = &planned.batch;
        assert_eq!(planned.graph, Some(GraphKey { rows: 4, table_stride: 8 }));
        assert_eq!(
            (&batch.tokens[..], &batch.positions[..]),
            (&[7, 7, 7, 0][..], &[39, 19, 2, 0][..])
        );
        assert_eq!((&batch.singles, &batch.probes), (&vec![0, 1, 2, 3], &vec![0, 1, 2, 3]));
        assert_eq!(batch.targets, [u32::MAX, u32::MAX, 6, u32::MAX]);
        let places: Vec<_> = planned.wanted.iter().map(|w| (w.row, w.at)).collect();
        assert_eq!(places, [(0, 0), (2, 2)]);
        assert_eq!(batch.tables.len(), 4 * 8);
        assert_eq!(batch.tables[..3], [3, 4, 5]);
        assert_eq!(batch.tables[24], 50, "the page that is nobody's");
    }

    #[test]
    fn new_tokens_of_a_sequence_stay_together() {
        let (sampling, context) = (Sampling::default(), [7; 300]);
        let table = pages(&(0..19).collect::<Vec<_>>());
        let probes = [probe(4, None), probe(299, Some(1))];
        let row = |start| Row {
            context: &context,
            start,
            pages: &table,
            answer_start: 0,
            probes: if start == 0 { &probes } else { &[] },
            sampling: &sampling,
            pending: None,
        };
        let rows = [row(0), row(299)];
        let cut = chunks(&rows, 256);
        assert_eq!(cut.iter().map(Vec::len).collect::<Vec<_>>(), [1, 2]);
        let first = plan(&rows, &cut[0], LIMITS, true);
        assert_eq!(first.batch.sequences, [Sequence { row: 0, rows: 256, start: 0, table: 0 }]);
        assert_eq!((first.batch.probes, first.graph), (vec![4], None));
        let second = plan(&rows, &cut[1], LIMITS, true);
        assert_eq!(second.batch.sequences, [Sequence { row: 0, rows: 44, start: 256, table: 0 }]);
        assert_eq!(second.batch.singles, [44]);
        assert_eq!((second.batch.probes, second.batch.table_stride), (vec![43], 32));
        let plain = plan(&rows, &cut[1], LIMITS, false);
        assert_eq!((plain.batch.sequences.len(), plain.batch.singles.len()), (0, 45));
    }

    #[test]
    fn many_short_rows_are_cut_by_their_number() {
        let (sampling, context, table) = (Sampling::default(), [7; 3], pages(&[1]));
        let row = Row {
            context: &context,
            start: 2,
            pages: &table,
            answer_start: 0,
            probes: &[],
            sampling: &sampling,
            pending: None,
        };
        let rows = vec![row; 600];
        let cut: Vec<usize> = chunks(&rows, 2048).iter().map(Vec::len).collect();
        assert_eq!(cut, [256, 256, 88]);
    }

    #[test]
    fn table_strides_are_few() {
        for (pages, page_size, expected) in [
            (1, 16, 8),
            (8, 16, 8),
            (9, 16, 16),
            (100, 16, 128),
            (1, 256, 1),
            (3, 64, 4),
            (5, 64, 8),
        ] {
            assert_eq!(table_stride(pages, page_size), expected, "{pages} of {page_size}");
        }
    }
}
