//! One pass through the layers.

use headstart_kernels::{
    AttentionArgs, AttentionSeq, KvSlot, RopeStyle, ThreadPool, add, add_bias, add_rms_norm,
    gelu_tanh_mul, matmul_group, paged_attention, rms_norm, rope, scale, silu_mul,
};

use super::CpuExecutor;
use crate::collective::RankLost;
use crate::executor::Row;
use crate::model::{Activation, Linear};

/// Neighbouring new tokens of one row within a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Which row of the batch.
    pub(super) row: usize,
    /// The absolute position of the first token.
    pub(super) start: usize,
    /// How many tokens.
    pub(super) len: usize,
    /// Where the first token lies in the chunk.
    pub(super) at: usize,
}

impl Span {
    /// Pages that hold the sequence up to the span's end.
    fn pages(&self, page_size: usize) -> usize {
        (self.start + self.len).div_ceil(page_size)
    }
}

/// The spans as attention wants them; `pages` holds their page tables end to end.
fn sequences<'a>(spans: &[Span], pages: &'a [u32], page_size: usize) -> Vec<AttentionSeq<'a>> {
    let mut rest = pages;
    let sequence = |span: &Span| {
        let (pages, after) = rest.split_at(span.pages(page_size));
        rest = after;
        AttentionSeq { row: span.at, rows: span.len, start: span.start, pages }
    };
    spans.iter().map(sequence).collect()
}

/// Activations of a chunk, `[tokens][width]` each, kept from call to call.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// The residual stream; after a pass, what the final norm reads.
    pub(super) hidden: Vec<f32>,
    normed: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attended: Vec<f32>,
    /// What attention or the MLP adds to the residual stream.
    delta: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    slots: Vec<KvSlot>,
    pages: Vec<u32>,
}

/// `outputs[i] = x · linears[i]ᵀ + bias`, all in one go.
fn project<const N: usize>(
    pool: &ThreadPool,
    x: &[f32],
    tokens: usize,
    linears: [&Linear; N],
    mut outputs: [&mut [f32]; N],
) {
    let mut pairs = linears.iter().zip(&mut outputs).map(|(l, y)| (&l.weight, &mut **y));
    let mut products: [_; N] = std::array::from_fn(|_| pairs.next().expect("N of both"));
    matmul_group(pool, x, tokens, &mut products);
    for (linear, y) in linears.iter().zip(outputs) {
        if let Some(bias) = &linear.bias {
            add_bias(pool, y, bias);
        }
    }
}

impl CpuExecutor {
    /// Runs the tokens of `spans` through all layers; keys and values go to the pages, the residual
    /// stream stays in the scratch.
    ///
    /// # Errors
    /// [`RankLost`].
    pub(super) fn forward(&mut self, rows: &[Row<'_>], spans: &[Span]) -> Result<(), RankLost> {
        let tokens = spans.last().map_or(0, |span| span.at + span.len);
        self.embed(rows, spans, tokens)?;
        self.place(rows, spans);
        // Out of the scratch for a while, so that the sequences may borrow them.
        let pages = std::mem::take(&mut self.scratch.pages);
        let seqs = sequences(spans, &pages, self.limits.page_size);
        for layer in 0..self.model.layers.len() {
            self.attention(layer, tokens, &seqs)?;
            self.mlp(layer, tokens)?;
        }
        self.scratch.pages = pages;
        Ok(())
    }

    /// Token embeddings, and buffers of the right size.
    fn embed(&mut self, rows: &[Row<'_>], spans: &[Span], tokens: usize) -> Result<(), RankLost> {
        let config = self.model.config();
        let s = &mut self.scratch;
        let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
        for (buffer, width) in [
            (&mut s.hidden, hidden),
            (&mut s.normed, hidden),
            (&mut s.query, config.query_size()),
            (&mut s.key, config.kv_size()),
            (&mut s.value, config.kv_size()),
            (&mut s.attended, config.query_size()),
            (&mut s.delta, hidden),
            (&mut s.gate, mlp),
            (&mut s.up, mlp),
        ] {
            buffer.resize(tokens * width, 0.0);
        }
        let new = spans.iter().flat_map(|s| &rows[s.row].context[s.start..s.start + s.len]);
        let vocab = &self.model.vocab;
        for (token, out) in new.zip(s.hidden.chunks_exact_mut(hidden)) {
            let token = *token as usize;
            if vocab.contains(&token) {
                self.model.embedding.row_f32(token - vocab.start, out);
            } else {
                out.fill(0.0);
            }
        }
        self.collective.all_reduce(&mut s.hidden)?;
        if config.embedding_scale != 1.0 {
            scale(&self.pool, &mut s.hidden, config.embedding_scale);
        }
        Ok(())
    }

    /// Angles and KV places of every token, page tables of every span.
    fn place(&mut self, rows: &[Row<'_>], spans: &[Span]) {
        let page_size = self.limits.page_size;
        self.angles.set_positions(spans.iter().flat_map(|s| s.start..s.start + s.len));
        let s = &mut self.scratch;
        s.slots.clear();
        s.pages.clear();
        for span in spans {
            let pages = rows[span.row].pages;
            s.slots.extend((span.start..span.start + span.len).map(|position| KvSlot {
                page: pages[position / page_size].0,
                slot: (position % page_size) as u32,
            }));
            s.pages.extend(pages[..span.pages(page_size)].iter().map(|page| page.0));
        }
    }

    /// Norm, projections, rotation, attention over the pages, output projection, residual.
    fn attention(
        &mut self,
        index: usize,
        tokens: usize,
        seqs: &[AttentionSeq<'_>],
    ) -> Result<(), RankLost> {
        let (model, pool, s) = (&*self.model, &self.pool, &mut self.scratch);
        let (config, layer) = (model.config(), &model.layers[index]);
        let (eps, head_dim) = (config.norm_eps, config.head_dim);
        rms_norm(pool, &s.hidden, &layer.attention_norm, eps, &mut s.normed);
        let linears = [&layer.query, &layer.key, &layer.value];
        project(pool, &s.normed, tokens, linears, [&mut s.query, &mut s.key, &mut s.value]);
        if let Some((query_norm, key_norm)) = &layer.qk_norms {
            // A head is a row here. `attended` is free until attention fills it.
            rms_norm(pool, &s.query, query_norm, eps, &mut s.attended);
            std::mem::swap(&mut s.query, &mut s.attended);
            let normed = &mut s.attended[..s.key.len()];
            rms_norm(pool, &s.key, key_norm, eps, normed);
            s.key.copy_from_slice(normed);
        }
        let style = RopeStyle::HalfSplit;
        rope(pool, &mut s.query, config.heads, head_dim, &self.angles, style);
        rope(pool, &mut s.key, config.kv_heads, head_dim, &self.angles, style);
        self.kv.write_rows(pool, index, &s.slots, &s.key, &s.value);
        paged_attention(
            pool,
            AttentionArgs {
                kv: &self.kv,
                layer: index,
                heads: config.heads,
                q: &s.query,
                seqs,
                scale: config.attention_scale,
                softcap: config.attention_softcap,
                window: config.windows[index],
                out: &mut s.attended,
            },
        );
        project(pool, &s.attended, tokens, [&layer.output], [&mut s.delta]);
        self.collective.all_reduce(&mut s.delta)?;
        if let Some(norm) = &layer.post_attention_norm {
            rms_norm(pool, &s.delta, norm, eps, &mut s.normed);
            std::mem::swap(&mut s.delta, &mut s.normed);
        }
        Ok(())
    }

    /// Residual of attention, norm, gated MLP, residual.
    fn mlp(&mut self, index: usize, tokens: usize) -> Result<(), RankLost> {
        let (model, pool, s) = (&*self.model, &self.pool, &mut self.scratch);
        let (config, layer) = (model.config(), &model.layers[index]);
        let eps = config.norm_eps;
        add_rms_norm(pool, &mut s.hidden, &s.delta, &layer.mlp_norm, eps, &mut s.normed);
        let linears = [&layer.gate, &layer.up];
        project(pool, &s.normed, tokens, linears, [&mut s.gate, &mut s.up]);
        match config.activation {
            Activation::Silu => silu_mul(pool, &mut s.gate, &s.up),
            Activation::GeluTanh => gelu_tanh_mul(pool, &mut s.gate, &s.up),
        }
        project(pool, &s.gate, tokens, [&layer.down], [&mut s.delta]);
        self.collective.all_reduce(&mut s.delta)?;
        if let Some(norm) = &layer.post_mlp_norm {
            rms_norm(pool, &s.delta, norm, eps, &mut s.normed);
            std::mem::swap(&mut s.delta, &mut s.normed);
        }
        add(pool, &mut s.hidden, &s.delta);
        Ok(())
    }
}
