//! A model's weights on the device, or on several.

use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use headstart_kernels::cuda::{Buffer, CudaError, Device, Precision, Weights};
use headstart_kernels::{DType, dequantise, quantise};

use super::CudaLoadError;
use super::collective::{Collective, Ranks};
use crate::executor::ModelHash;
use crate::model::tensors::{Norm, Part, Raw, Tensors};
use crate::model::{ModelConfig, Progress, Shard, WeightDtype};

/// Elements that are expanded at once on their way to the device.
const EXPAND_LEN: usize = 1 << 20;

/// Matrices over one input whose outputs lie side by side: one product if they are of one format.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) weights: Vec<Weights>,
    /// Of all outputs.
    pub(super) bias: Option<Buffer<f32>>,
    /// Outputs of all.
    pub(super) rows: usize,
}

/// The weights of a layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention_norm: Buffer<f32>,
    /// Queries, keys, values.
    pub(super) qkv: Group,
    pub(super) qk_norms: Option<(Buffer<f32>, Buffer<f32>)>,
    pub(super) output: Group,
    pub(super) post_attention_norm: Option<Buffer<f32>>,
    pub(super) mlp_norm: Buffer<f32>,
    /// Gate, then up.
    pub(super) gate_up: Group,
    pub(super) down: Group,
    pub(super) post_mlp_norm: Option<Buffer<f32>>,
}

/// What one tensor-parallel rank holds of a model.
#[derive(Debug)]
pub(super) struct RankModel {
    pub(super) device: Device,
    /// With its own heads and its own part of the MLP's width.
    pub(super) config: ModelConfig,
    /// Tokens whose rows of the embedding and the head are here.
    pub(super) vocab: Range<usize>,
    pub(super) embedding: Weights,
    pub(super) head: Option<Weights>,
    pub(super) final_norm: Buffer<f32>,
    pub(super) layers: Vec<Layer>,
}

/// A model on a GPU, or in parts on one or several, shared read-only by its executors. Other processes
/// may have parts of it, too.
#[derive(Debug)]
pub struct CudaModel {
    /// In the order of the ranks.
    pub(super) parts: Vec<RankModel>,
    /// Ranks of the whole model, those of other processes among them.
    pub(super) of: usize,
    /// How their results are summed.
    pub(super) collective: Collective,
    /// The whole model.
    pub(super) config: ModelConfig,
    pub(super) precision: Precision,
    /// Names the model and how its weights are kept; `None`: it has no files.
    pub(super) hash: Option<ModelHash>,
    /// Held through a step: the model's executors share a stream, and what one of them launches
    /// while another records would become part of the recording.
    pub(super) turn: Mutex<()>,
}

impl CudaModel {
    /// Loads all ranks' parts; `devices` are theirs, in order.
    pub(super) fn load(
        devices: &[Device],
        ranks: Ranks,
        path: &Path,
        dtype: WeightDtype,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, CudaLoadError> {
        let all = Self::load_ranks(devices, 0, devices.len(), path, dtype, progress)?;
        let collective = Collective::new(ranks, devices).map_err(CudaLoadError::Device)?;
        Ok(Self { collective, ..all })
    }

    /// Loads a part after the other of the ranks from `first` on, of a model of so many; `devices` are
    /// theirs, in order. How they sum is not settled.
    pub(super) fn load_ranks(
        devices: &[Device],
        first: usize,
        of: usize,
        path: &Path,
        dtype: WeightDtype,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, CudaLoadError> {
        let mut nobody = |_: Progress| ();
        let files = Tensors::open(path, Shard::WHOLE, &mut nobody)?;
        let precision = match dtype {
            WeightDtype::F32 => Precision::F32,
            WeightDtype::Auto if files.embedding_dtype()? == DType::F32 => Precision::F32,
            WeightDtype::Auto | WeightDtype::Bf16 => Precision::Bf16,
        };
        let (hash, config) = (Some(files.hash(dtype)?), files.whole().clone());
        let (keeps, count) = (dtype == WeightDtype::Auto, devices.len());
        let part = |(index, device): (usize, &Device)| {
            // Each part reports its own way through the whole file.
            let mut scaled = |p: Progress| {
                let done = (index as u64 * p.bytes_total + p.bytes_loaded) / count as u64;
                progress(Progress { bytes_loaded: done, ..p });
            };
            let shard = Shard { rank: first + index, ranks: of };
            let tensors = Tensors::open(path, shard, &mut scaled)?;
            Uploader { device, tensors, precision, keeps }.part()
        };
        let parts: Vec<_> = devices.iter().enumerate().map(part).collect::<Result<_, _>>()?;
        let (collective, turn) = (Collective::Alone, Mutex::default());
        Ok(Self { parts, of, collective, config, precision, hash, turn })
    }

    /// A model of this shape with random bf16 weights, made on the device: for measuring.
    ///
    /// # Errors
    /// Too little memory, or a shape that the kernels cannot work with.
    pub fn random(
        ordinal: usize,
        config: ModelConfig,
        cache: Option<&Path>,
    ) -> Result<Self, CudaLoadError> {
        let device = Device::open(ordinal, cache).map_err(CudaLoadError::Device)?;
        random(&device, config).map_err(CudaLoadError::Copy)
    }

    /// Whether one rank has it all.
    pub(super) fn is_whole(&self) -> bool {
        self.of == 1
    }

    /// Whether other processes have parts of it.
    pub(super) fn is_spread(&self) -> bool {
        self.of > self.parts.len()
    }

    /// What the whole model is.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The name of the GPU that its first rank is on.
    #[must_use]
    pub fn device_name(&self) -> &str {
        self.device().name()
    }

    /// The device that its first rank is on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.parts[0].device
    }

    /// Its devices, each once.
    pub(super) fn devices(&self) -> impl Iterator<Item = &Device> {
        let apart = if self.collective.spans_devices() { self.parts.len() } else { 1 };
        self.parts[..apart].iter().map(|part| &part.device)
    }

    /// Which of [`Self::devices`] each rank has.
    pub(super) fn places(&self) -> impl Iterator<Item = usize> {
        let apart = self.collective.spans_devices();
        (0..self.parts.len()).map(move |rank| if apart { rank } else { 0 })
    }

    /// What activations, keys and values are kept in.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes of all matrices.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.rank_weight_bytes().sum()
    }

    /// Bytes of the matrices of each rank.
    pub fn rank_weight_bytes(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().map(RankModel::weight_bytes)
    }

    /// Bytes of the matrices that each step reads whole: all but an embedding that is not the head.
    #[must_use]
    pub fn decode_bytes(&self) -> usize {
        let looked_up = |part: &RankModel| part.head.as_ref().map_or(0, |_| part.embedding.bytes());
        self.weight_bytes() - self.parts.iter().map(looked_up).sum::<usize>()
    }
}

impl RankModel {
    fn weight_bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.output, &l.gate_up, &l.down]);
        let groups = layers.flat_map(|g| &g.weights);
        groups.chain([&self.embedding]).chain(&self.head).map(Weights::bytes).sum()
    }
}

/// One rank's part of a model on its way to the device.
struct Uploader<'a, 'p> {
    device: &'a Device,
    tensors: Tensors<'p>,
    precision: Precision,
    /// Formats that kernels read in place stay as the file has them.
    keeps: bool,
}

impl Uploader<'_, '_> {
    fn part(mut self) -> Result<RankModel, CudaLoadError> {
        let (device, precision, keeps) = (self.device, self.precision, self.keeps);
        let embedding = upload(device, self.tensors.embedding()?, precision, keeps)?;
        let head = match self.tensors.head()? {
            Some(raw) => Some(upload(device, raw, precision, keeps)?),
            None => None,
        };
        let layers = self.tensors.config().layers;
        let layers = (0..layers).map(|index| self.layer(index)).collect::<Result<_, _>>()?;
        let final_norm = self.tensors.final_norm()?;
        let final_norm = vector(device, &final_norm)?;
        let (config, vocab) = (self.tensors.config().clone(), self.tensors.vocab());
        device.synchronize().map_err(CudaLoadError::Copy)?;
        self.tensors.finish();
        let device = device.clone();
        Ok(RankModel { device, config, vocab, embedding, head, final_norm, layers })
    }

    fn layer(&mut self, index: usize) -> Result<Layer, CudaLoadError> {
        let [query_norm, key_norm] = [Norm::Query, Norm::Key].map(|norm| self.norm(index, norm));
        Ok(Layer {
            attention_norm: self.required(index, Norm::Attention)?,
            qkv: self.group(index, &[Part::Query, Part::Key, Part::Value])?,
            qk_norms: query_norm?.zip(key_norm?),
            output: self.group(index, &[Part::Output])?,
            post_attention_norm: self.norm(index, Norm::PostAttention)?,
            mlp_norm: self.required(index, Norm::Mlp)?,
            gate_up: self.group(index, &[Part::Gate, Part::Up])?,
            down: self.group(index, &[Part::Down])?,
            post_mlp_norm: self.norm(index, Norm::PostMlp)?,
        })
    }

    fn norm(&mut self, index: usize, norm: Norm) -> Result<Option<Buffer<f32>>, CudaLoadError> {
        let weights = self.tensors.norm(index, norm)?;
        weights.map(|w| vector(self.device, &w)).transpose()
    }

    fn required(&mut self, index: usize, norm: Norm) -> Result<Buffer<f32>, CudaLoadError> {
        let missing = self.tensors.refused("a layer's norm", &"it is missing");
        self.norm(index, norm)?.ok_or(CudaLoadError::Load(missing))
    }

    fn group(&mut self, index: usize, parts: &[Part]) -> Result<Group, CudaLoadError> {
        let mut weights = Vec::with_capacity(parts.len());
        let mut biases = Vec::new();
        for part in parts {
            let raw = self.tensors.weight(index, *part)?;
            weights.push(upload(self.device, raw, self.precision, self.keeps)?);
            biases.extend(self.tensors.bias(index, *part)?.into_iter().flatten());
        }
        group(self.device, weights, &biases).map_err(CudaLoadError::Copy)
    }
}

fn group(device: &Device, weights: Vec<Weights>, bias: &[f32]) -> Result<Group, CudaError> {
    let rows = weights.iter().map(Weights::rows).sum();
    let joined = match weights.len() {
        1 => None,
        _ => Weights::joined(device, &weights.iter().collect::<Vec<_>>())?,
    };
    let bias = match bias {
        [] => None,
        bias => Some(device.upload(bias, "biases")?),
    };
    Ok(Group { weights: joined.map_or(weights, |one| vec![one]), bias, rows })
}

fn vector(device: &Device, data: &[f32]) -> Result<Buffer<f32>, CudaLoadError> {
    device.upload(data, "norms").map_err(CudaLoadError::Copy)
}

fn upload(
    device: &Device,
    raw: Raw<'_>,
    precision: Precision,
    keeps: bool,
) -> Result<Weights, CudaLoadError> {
    let dtype = stored_as(raw.dtype, precision, keeps);
    let bytes = match dtype == raw.dtype {
        true => None,
        false => Some(converted(raw, dtype)),
    };
    let bytes = bytes.as_deref().unwrap_or(raw.bytes);
    Weights::upload(device, dtype, bytes, raw.rows, raw.cols).map_err(CudaLoadError::Copy)
}

/// In which format a matrix is kept on the device.
fn stored_as(dtype: DType, precision: Precision, keeps: bool) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 if keeps && dtype != DType::F32 && Weights::reads(dtype) => dtype,
        Precision::Bf16 => DType::BF16,
    }
}

/// The matrix in a plain format. Sizes were checked with the file's record.
fn converted(raw: Raw<'_>, dtype: DType) -> Vec<u8> {
    let (block, block_bytes) = (raw.dtype.block_len(), raw.dtype.block_bytes());
    let mut out = Vec::with_capacity(raw.rows * raw.cols * dtype.block_bytes());
    let mut floats = vec![0.0; EXPAND_LEN];
    for bytes in raw.bytes.chunks(EXPAND_LEN / block * block_bytes) {
        let floats = &mut floats[..bytes.len() / block_bytes * block];
        if dequantise(raw.dtype, bytes, floats).is_ok() {
            out.extend(quantise(dtype, floats).unwrap_or_default());
        }
    }
    out
}

fn random(device: &Device, config: ModelConfig) -> Result<CudaModel, CudaError> {
    let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
    let (queries, kv) = (config.query_size(), config.kv_size());
    let mut seed = 0;
    let mut matrix = |rows: usize, cols: usize| {
        seed += 1;
        // Keeps the variance of activations.
        let scale = (3.0 / cols as f32).sqrt();
        Weights::random_bf16(device, rows, cols, seed, scale)
    };
    let ones = || device.upload(&vec![1.0f32; hidden], "norms");
    let one = |weights: Weights| group(device, vec![weights], &[]);
    let embedding = matrix(config.vocab_size, hidden)?;
    let head = match config.tied_embeddings {
        true => None,
        false => Some(matrix(config.vocab_size, hidden)?),
    };
    let mut layers = Vec::with_capacity(config.layers);
    for _ in 0..config.layers {
        layers.push(Layer {
            attention_norm: ones()?,
            qkv: one(matrix(queries + 2 * kv, hidden)?)?,
            qk_norms: None,
            output: one(matrix(hidden, queries)?)?,
            post_attention_norm: None,
            mlp_norm: ones()?,
            gate_up: one(matrix(2 * mlp, hidden)?)?,
            down: one(matrix(hidden, mlp)?)?,
            post_mlp_norm: None,
        });
    }
    let final_norm = ones()?;
    device.synchronize()?;
    let (device, vocab) = (device.clone(), 0..config.vocab_size);
    let whole = config.clone();
    let part = RankModel { device, config, vocab, embedding, head, final_norm, layers };
    Ok(CudaModel {
        parts: vec![part],
        of: 1,
        collective: Collective::Alone,
        config: whole,
        precision: Precision::Bf16,
        hash: None,
        turn: Mutex::default(),
    })
}
