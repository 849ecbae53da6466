//! One pass through the layers, launched kernel by kernel or as a recorded graph.

use std::collections::HashMap;

use headstart_kernels::DType;
use headstart_kernels::cuda::{
    Activations, Attention, Buffer, CudaError, Device, Gate, Graph, Precision, Rope, Rows, SPLIT,
    Staged, Tile, capture_on,
};

use super::in_flight::{Batches, InFlight, piece};
use super::load::{CudaModel, Group, RankModel};
use super::plan::{GRAPH_ROWS_MAX, GraphKey, Planned, SEQUENCES_MAX, table_stride_max};
use super::{CudaExecutor, Rank, probe};
use crate::executor::{IN_FLIGHT_MAX, Limits, Row};
use crate::model::Activation;

/// Bytes for the partial sums of decode attention; more rows than fit go one group after another.
const PARTS_BYTES: usize = 256 << 20;
/// Graphs kept; with more shapes than these, recording starts anew.
const GRAPHS_MAX: usize = 128;

/// Activations of a chunk, kept from call to call.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) staged: Staged,
    /// The residual stream `[tokens][hidden]`.
    pub(super) hidden: Buffer<f32>,
    /// What the last block adds to it.
    pub(super) delta: Buffer<f32>,
    /// A block's output, normed, in models that norm it.
    normed_delta: Activations,
    /// What a product reads.
    pub(super) input: Activations,
    qkv: Buffer<f32>,
    query: Activations,
    gate_up: Buffer<f32>,
    frequencies: Buffer<f32>,
    angles: Buffer<f32>,
    parts: Buffer<f32>,
    pub(super) tile: Tile,
}

impl Scratch {
    pub(super) fn new(
        model: &RankModel,
        precision: Precision,
        limits: Limits,
        tokens: usize,
    ) -> Result<Self, CudaError> {
        let (device, config) = (&model.device, &model.config);
        let (hidden, mlp, queries) =
            (config.hidden_size, config.intermediate_size, config.query_size());
        let stride = table_stride_max(limits);
        let words = Staged::words_for(tokens, 0) + SEQUENCES_MAX * stride;
        let splits = (stride * limits.page_size).div_ceil(SPLIT);
        let row_parts = config.heads * splits * (config.head_dim + 2);
        let parts = (row_parts * tokens).min(PARTS_BYTES / 4).max(row_parts);
        let expands = model.layers.iter().any(|l| {
            let groups = [&l.qkv, &l.output, &l.gate_up, &l.down];
            groups.iter().flat_map(|g| &g.weights).any(|w| !plain(w.dtype()))
        });
        let head = model.head.as_ref().unwrap_or(&model.embedding);
        let frequencies = config.rope.inverse_frequencies(config.head_dim);
        let widest = hidden.max(mlp).max(queries);
        let input = Activations::new(device, precision, tokens * widest, "activations")?;
        let post = if config.post_norms { tokens * hidden } else { 1 };
        Ok(Self {
            staged: Staged::new(
                device,
                words,
                limits.vocab_size,
                limits.pages + 1,
                limits.page_size,
            )?,
            hidden: device.alloc(tokens * hidden, "activations")?,
            delta: device.alloc(tokens * hidden, "activations")?,
            normed_delta: Activations::new(device, Precision::F32, post, "activations")?,
            input,
            qkv: device.alloc(tokens * (queries + 2 * config.kv_size()), "activations")?,
            query: Activations::new(device, precision, tokens * queries, "activations")?,
            gate_up: device.alloc(tokens * 2 * mlp, "activations")?,
            frequencies: device.upload(&frequencies, "rotary frequencies")?,
            angles: device.alloc(tokens * config.head_dim, "activations")?,
            parts: device.alloc(parts, "attention")?,
            tile: Tile::new(device, widest, expands || !plain(head.dtype()))?,
        })
    }
}

fn plain(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16)
}

/// A step's graphs, one on each device.
#[derive(Debug)]
struct Recording(Vec<Graph>);

impl Recording {
    fn launch(&self) -> Result<(), CudaError> {
        self.0.iter().try_for_each(Graph::launch)
    }
}

/// What is known of a shape of decode steps.
#[derive(Debug)]
enum Known {
    /// It ran plainly once: every kernel is loaded, every product has its plan.
    Warm,
    Recorded(Recording),
}

/// Recorded decode steps.
#[derive(Debug, Default)]
pub(super) struct Graphs(HashMap<GraphKey, Known>);

impl Graphs {
    pub(super) fn recorded(&self) -> usize {
        self.0.values().filter(|known| matches!(known, Known::Recorded(_))).count()
    }
}

impl CudaExecutor {
    /// Has a chunk run and its probes answered: the `index`-th of its batch.
    pub(super) fn run(
        &mut self,
        rows: &[Row<'_>],
        index: usize,
        planned: &Planned,
        batch: &mut InFlight,
    ) -> Result<(), CudaError> {
        let Batches { lanes, kept, .. } = &mut self.batches;
        let ranks = self.model.parts.iter().zip(&mut self.ranks);
        for ((part, rank), lane) in ranks.zip(&mut lanes[batch.lane]) {
            let (device, staged) = (&part.device, &mut rank.scratch.staged);
            let host = piece(device, &mut lane.staging, index, staged.words())?;
            staged.stage(device, &planned.batch, host)?;
        }
        let kept = &kept[(batch.lane + IN_FLIGHT_MAX - 1) % IN_FLIGHT_MAX];
        let ranks = self.model.parts.iter().zip(&mut self.ranks);
        for ((part, rank), place) in ranks.zip(self.model.places()) {
            part.device.take_tokens(&mut rank.scratch.staged, &kept[place])?;
        }
        if let Some(key) = planned.graph {
            self.decode(key)?;
            return self.ask(rows, &planned.wanted, 0, key.rows, batch);
        }
        layers(&self.model, &mut self.ranks)?;
        let probes = planned.batch.probes.len();
        for first in (0..probes).step_by(probe::ROWS) {
            let count = probe::ROWS.min(probes - first);
            heads(&self.model, &mut self.ranks, &mut self.gathered, first, count)?;
            self.ask(rows, &planned.wanted, first, count, batch)?;
        }
        Ok(())
    }

    /// A decode step of all rows, with the logits of each.
    fn decode(&mut self, key: GraphKey) -> Result<(), CudaError> {
        if let Some(Known::Recorded(graph)) = self.graphs.0.get(&key) {
            return graph.launch();
        }
        debug_assert!(key.rows <= GRAPH_ROWS_MAX);
        let warm = self.graphs.0.contains_key(&key);
        if self.graphs.0.len() >= GRAPHS_MAX && !warm {
            self.graphs.0.clear();
        }
        let (model, ranks, gathered) = (&self.model, &mut self.ranks, &mut self.gathered);
        let mut all = || {
            layers(model, ranks)?;
            heads(model, ranks, gathered, 0, key.rows)
        };
        if !warm {
            all()?;
            self.graphs.0.insert(key, Known::Warm);
            return Ok(());
        }
        let devices: Vec<&Device> = model.devices().collect();
        let graphs = Recording(capture_on(&devices, all)?);
        graphs.launch()?;
        self.graphs.0.insert(key, Known::Recorded(graphs));
        Ok(())
    }
}

/// Does something on each rank, in order.
fn each(
    model: &CudaModel,
    ranks: &mut [Rank],
    mut work: impl FnMut(&RankModel, &mut Rank) -> Result<(), CudaError>,
) -> Result<(), CudaError> {
    model.parts.iter().zip(ranks).try_for_each(|(part, rank)| work(part, rank))
}

/// Sums the first `width` values a token of each rank's buffer over the ranks.
fn sum(
    model: &CudaModel,
    ranks: &mut [Rank],
    width: usize,
    buffer: impl Fn(&mut Scratch) -> &mut Buffer<f32>,
) -> Result<(), CudaError> {
    let count = ranks[0].scratch.staged.rows() * width;
    let mut buffers: Vec<_> = ranks.iter_mut().map(|rank| buffer(&mut rank.scratch)).collect();
    model.collective.sum(&mut buffers, count)
}

/// Runs the staged tokens through all layers; keys and values go to the pages. What the last block
/// adds stays in `delta`, on every rank.
fn layers(model: &CudaModel, ranks: &mut [Rank]) -> Result<(), CudaError> {
    let width = model.config.hidden_size;
    each(model, ranks, embed)?;
    sum(model, ranks, width, |s| &mut s.hidden)?;
    for index in 0..model.config.layers {
        each(model, ranks, |part, rank| attention(part, index, rank))?;
        sum(model, ranks, width, |s| &mut s.delta)?;
        each(model, ranks, |part, rank| mlp(part, index, rank))?;
        sum(model, ranks, width, |s| &mut s.delta)?;
        each(model, ranks, |part, rank| {
            let layer = &part.layers[index];
            finish(part, &layer.down, layer.post_mlp_norm.as_ref(), &mut rank.scratch)
        })?;
    }
    Ok(())
}

/// The logits of `count` probes from `first` on, and their facts, which come together.
fn heads(
    model: &CudaModel,
    ranks: &mut [Rank],
    gathered: &mut [probe::Gathered],
    first: usize,
    count: usize,
) -> Result<(), CudaError> {
    each(model, ranks, |part, rank| probe::head(part, rank, first, count))?;
    probe::gather_facts(model, ranks, gathered, count)
}

/// A rank's part of the token embeddings, and the angles of all positions.
fn embed(model: &RankModel, rank: &mut Rank) -> Result<(), CudaError> {
    let (device, config, s) = (&model.device, &model.config, &mut rank.scratch);
    let (first, scale) = (model.vocab.start, config.embedding_scale);
    device.embed(&model.embedding, first, &s.staged, scale, &mut s.hidden)?;
    device.rope_table(&s.staged, &s.frequencies, &mut s.angles)
}

/// `y = x · weightsᵀ` for all matrices of a group, side by side.
fn project(
    device: &Device,
    group: &Group,
    x: &Activations,
    tokens: usize,
    y: &mut Buffer<f32>,
    tile: &mut Tile,
) -> Result<(), CudaError> {
    let mut at = 0;
    for weights in &group.weights {
        device.matmul(weights, x, tokens, y, group.rows, at, tile)?;
        at += weights.rows();
    }
    Ok(())
}

/// Adds the bias to the sum of the ranks' outputs, and norms it in models that do.
fn finish(
    model: &RankModel,
    group: &Group,
    norm: Option<&Buffer<f32>>,
    s: &mut Scratch,
) -> Result<(), CudaError> {
    let (device, tokens) = (&model.device, s.staged.rows());
    if let Some(bias) = &group.bias {
        device.add_bias(&mut s.delta, bias, tokens)?;
    }
    if let Some(norm) = norm {
        let (eps, rows) = (model.config.norm_eps, Rows::First(tokens));
        device.add_rms_norm(&mut s.delta, None, norm, eps, rows, &mut s.normed_delta)?;
        if let Activations::F32(normed) = &s.normed_delta {
            device.copy(normed, 0, &mut s.delta, 0, tokens * norm.len())?;
        }
    }
    Ok(())
}

/// Residual of the block before, norm, projections, rotation, attention, output projection.
fn attention(model: &RankModel, index: usize, rank: &mut Rank) -> Result<(), CudaError> {
    let (layer, kv, s) = (&model.layers[index], &mut rank.kv, &mut rank.scratch);
    let (device, config, tokens) = (&model.device, &model.config, s.staged.rows());
    let (eps, rows) = (config.norm_eps, Rows::First(tokens));
    let delta = (index > 0).then_some(&s.delta);
    device.add_rms_norm(&mut s.hidden, delta, &layer.attention_norm, eps, rows, &mut s.input)?;
    project(device, &layer.qkv, &s.input, tokens, &mut s.qkv, &mut s.tile)?;
    let rope = Rope {
        heads: config.heads,
        bias: layer.qkv.bias.as_ref(),
        norms: layer.qk_norms.as_ref().map(|(q, k)| (q, k)),
        eps,
    };
    device.rope_write(&s.qkv, &rope, &s.angles, &s.staged, index, kv, &mut s.query)?;
    let how = Attention {
        heads: config.heads,
        scale: config.attention_scale,
        softcap: config.attention_softcap,
        window: config.windows[index],
    };
    device.attend(&how, &s.query, kv, index, &s.staged, &mut s.parts, &mut s.input)?;
    project(device, &layer.output, &s.input, tokens, &mut s.delta, &mut s.tile)
}

/// The rest of attention's output, its residual, norm, gated MLP.
fn mlp(model: &RankModel, index: usize, rank: &mut Rank) -> Result<(), CudaError> {
    let (layer, s) = (&model.layers[index], &mut rank.scratch);
    finish(model, &layer.output, layer.post_attention_norm.as_ref(), s)?;
    let (device, config, tokens) = (&model.device, &model.config, s.staged.rows());
    let (eps, rows) = (config.norm_eps, Rows::First(tokens));
    let delta = Some(&s.delta);
    device.add_rms_norm(&mut s.hidden, delta, &layer.mlp_norm, eps, rows, &mut s.input)?;
    project(device, &layer.gate_up, &s.input, tokens, &mut s.gate_up, &mut s.tile)?;
    let gate = match config.activation {
        Activation::Silu => Gate::Silu,
        Activation::GeluTanh => Gate::GeluTanh,
    };
    let (bias, width) = (layer.gate_up.bias.as_ref(), config.intermediate_size);
    device.gate(gate, &s.gate_up, bias, tokens, width, &mut s.input)?;
    project(device, &layer.down, &s.input, tokens, &mut s.delta, &mut s.tile)
}
