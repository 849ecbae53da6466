//! Every parser that faces outside, and right inputs for it.

use std::io::Write as _;
use std::path::Path;

use futures::FutureExt as _;
use headstart_base_node::convert::Job as BaseJob;
use headstart_base_node::gate::DraftGate;
use headstart_cluster::NodeRecord;
use headstart_drafter_node::convert::Job as DrafterJob;
use headstart_engine::Limits;
use headstart_formats::gguf::Gguf;
use headstart_formats::hf::HfConfig;
use headstart_formats::safetensors::SafetensorsFile;
use headstart_handoff::wire::{read_receiver, read_sender};
use headstart_proto::{Epoch, RequestId, v1};
use headstart_router::{RouterConfig, testing};
use headstart_service::config::parse_from;
use headstart_text::{ChatTemplate, ModelText, Role, TemplateTokens, Tokenizer};
use prost::Message;

use super::Target;
use super::seeds;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// minijinja repeats a string (`'x' * n`) to at most 100 MB, and holds two while it folds constants.
const TEMPLATE_MEMORY: usize = 256 * MIB;
/// What a node's model allows, in the targets that check against it.
const LIMITS: Limits = Limits { vocab_size: 64, context_length: 512, page_size: 16, pages: 64 };

const JSON: &[&str] = &["null", "true", "{", "}", "[", "]", "\"", ":", ",", "1e308", "\\uD83D"];
const ASK: &[&str] = &[
    "\"messages\":",
    "\"role\":",
    "\"content\":",
    "\"max_tokens\":",
    "\"stop\":",
    "\"n\":",
    "\"seed\":",
    "\"temperature\":",
    "\"logprobs\":",
    "\"stream_options\":",
    "\"headstart\":",
    "\"prompt\":",
];
/// Chained repetitions of strings are left out: minijinja folds them at every depth, which is slow
/// and within its bounds.
const TEMPLATE: &[&str] = &[
    "{{",
    "}}",
    "{%",
    "%}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if true %}",
    "{% endif %}",
    "{% set x = ",
    "messages",
    "loop.index0",
    "|tojson",
    "|trim",
    "|join",
    "|replace('a', 'b')",
    "range(",
    "namespace(",
    "raise_exception('x')",
    "strftime_now('%Y')",
    " ~ ",
    "[::-1]",
    ".split(' ')",
    "{% macro m(x) %}",
    "{% endmacro %}",
    "m(1)",
    "1000000000",
    "%s",
    "|format",
    "|indent(1000000)",
    "|batch(2)",
    "recursive",
    "loop(messages)",
    "{% set ns = namespace(a='x') %}",
    "ns.a",
    "'ab' * 9999999",
];

/// Every target.
pub const ALL: &[Target] = &[
    Target {
        name: "http-chat",
        seeds: seeds::chat_bodies,
        words: ASK,
        bytes_max: 16 * KIB,
        memory_max: 4 * MIB,
        run: |input| drop(testing::parse_chat(input)),
    },
    Target {
        name: "http-completion",
        seeds: seeds::completion_bodies,
        words: ASK,
        bytes_max: 16 * KIB,
        memory_max: 4 * MIB,
        run: |input| drop(testing::parse_completion(input)),
    },
    Target {
        name: "grpc-generate",
        seeds: seeds::generate_requests,
        words: &[],
        bytes_max: 16 * KIB,
        memory_max: 4 * MIB,
        run: |input| {
            let _ = v1::GenerateRequest::decode(input).map(testing::check_generate);
        },
    },
    Target {
        name: "grpc-serve-request",
        seeds: seeds::serve_requests,
        words: &[],
        bytes_max: 16 * KIB,
        memory_max: 4 * MIB,
        run: |input| {
            let _ = v1::ServeRequest::decode(input).map(|request| BaseJob::new(request, LIMITS));
        },
    },
    Target {
        name: "grpc-draft-request",
        seeds: seeds::draft_requests,
        words: &["127.0.0.1:1", "[::1]:65535", "http://"],
        bytes_max: 16 * KIB,
        memory_max: 4 * MIB,
        run: |input| {
            let _ = v1::DraftRequest::decode(input).map(|request| DrafterJob::new(request, LIMITS));
        },
    },
    Target {
        name: "grpc-serve-frames",
        seeds: seeds::serve_frames,
        words: &[],
        bytes_max: 16 * KIB,
        memory_max: 4 * MIB,
        run: |input| drop(testing::admit_frames(delimited::<v1::ServeFrame>(input))),
    },
    Target {
        name: "grpc-handoff-frames",
        seeds: seeds::handoff_frames,
        words: &[],
        bytes_max: 16 * KIB,
        memory_max: 4 * MIB,
        run: handoff_frames,
    },
    Target {
        name: "kv-receiver-frames",
        seeds: seeds::kv_receiver_frames,
        words: &["HSKV"],
        bytes_max: 16 * KIB,
        memory_max: 4 * MIB,
        run: |mut input| while let Some(Ok(_)) = read_receiver(&mut input).now_or_never() {},
    },
    Target {
        name: "kv-sender-frames",
        seeds: seeds::kv_sender_frames,
        words: &[],
        bytes_max: 16 * KIB,
        memory_max: 4 * MIB,
        run: |mut input| {
            let layout = Some(&seeds::KV_LAYOUT);
            while let Some(Ok(_)) = read_sender(&mut input, layout, Vec::new()).now_or_never() {}
        },
    },
    Target {
        name: "error-trailer",
        seeds: seeds::error_trailers,
        words: &["unavailable", "overloaded"],
        bytes_max: 8 * KIB,
        memory_max: 4 * MIB,
        run: error_trailer,
    },
    Target {
        name: "node-record",
        seeds: seeds::node_records,
        words: JSON,
        bytes_max: 32 * KIB,
        memory_max: 4 * MIB,
        run: |input| drop(NodeRecord::from_json(input)),
    },
    Target {
        name: "gguf",
        seeds: seeds::gguf_files,
        words: &["tokenizer.ggml.tokens", "general.alignment", "llama", "gpt2"],
        bytes_max: 64 * KIB,
        memory_max: 32 * MIB,
        run: |input| {
            if let Ok((metadata, _)) = Gguf::check(input, Path::new("fuzz.gguf")) {
                let _ = ModelText::from_metadata(&metadata);
            }
        },
    },
    Target {
        name: "safetensors",
        seeds: seeds::safetensors_files,
        words: JSON,
        bytes_max: 64 * KIB,
        memory_max: 16 * MIB,
        run: |input| drop(SafetensorsFile::check(input, Path::new("fuzz.safetensors"))),
    },
    Target {
        name: "hf-config",
        seeds: seeds::hf_configs,
        words: JSON,
        bytes_max: 32 * KIB,
        memory_max: 4 * MIB,
        run: |input| drop(serde_json::from_slice::<HfConfig>(input)),
    },
    Target {
        name: "tokenizer-json",
        seeds: seeds::tokenizers,
        words: JSON,
        bytes_max: 16 * KIB,
        memory_max: 64 * MIB,
        run: |input| {
            if let Ok(tokenizer) = Tokenizer::from_json(input)
                && let Ok(ids) = tokenizer.encode("Hello, wörld!  \u{1F600}\n")
            {
                drop(tokenizer.decode(&ids));
            }
        },
    },
    Target {
        name: "text-bundle",
        seeds: seeds::bundles,
        words: JSON,
        bytes_max: 32 * KIB,
        memory_max: TEMPLATE_MEMORY,
        run: |input| drop(ModelText::from_bundle(input)),
    },
    Target {
        name: "chat-template",
        seeds: seeds::templates,
        words: TEMPLATE,
        bytes_max: 8 * KIB,
        memory_max: TEMPLATE_MEMORY,
        run: chat_template,
    },
    Target {
        name: "config-toml",
        seeds: seeds::configs,
        words: &["[[", "]]", "'''", "\"\"\"", "inf", "nan", "1979-05-27", "etcd", "http", "30s"],
        bytes_max: 8 * KIB,
        memory_max: 16 * MIB,
        run: config_file,
    },
];

/// Messages as they lie one behind the other, each after its length.
fn delimited<M: Message + Default>(mut input: &[u8]) -> Vec<M> {
    let mut messages = Vec::new();
    while !input.is_empty() {
        let Ok(message) = M::decode_length_delimited(&mut input) else { break };
        messages.push(message);
    }
    messages
}

fn handoff_frames(input: &[u8]) {
    let Ok(id) = RequestId::new("r") else { return };
    let mut gate = DraftGate::new(id, Epoch::FIRST, 0);
    for frame in delimited::<v1::HandoffFrame>(input) {
        if gate.admit(frame).is_err() {
            return;
        }
    }
}

fn error_trailer(input: &[u8]) {
    let mut status = tonic::Status::internal("x");
    let value = tonic::metadata::MetadataValue::from_bytes(input);
    status.metadata_mut().insert_bin(headstart_proto::error::ERROR_TRAILER, value);
    let _ = headstart_proto::Error::from_status(&status);
}

fn chat_template(input: &[u8]) {
    let Ok(source) = std::str::from_utf8(input) else { return };
    let tokens = TemplateTokens { bos_token: Some("<s>".into()), ..TemplateTokens::default() };
    if let Ok(template) = ChatTemplate::new(source, tokens) {
        let _ = template.render(&[
            headstart_text::Message::new(Role::System, "Be kind."),
            headstart_text::Message::new(Role::User, "Hello <b>"),
            headstart_text::Message::new(Role::Assistant, "Hi!"),
            headstart_text::Message::new(Role::User, "{{ messages }}"),
        ]);
    }
}

fn config_file(input: &[u8]) {
    let Ok(mut file) = tempfile::NamedTempFile::new() else { return };
    if file.write_all(input).is_err() {
        return;
    }
    let path = file.path().as_os_str().to_owned();
    let arguments = ["headstart-router".into(), "--config".into(), path];
    let _ = parse_from::<RouterConfig>(arguments).map(|config| config.router.options().is_ok());
}
