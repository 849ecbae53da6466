//! The wire: the generated `headstart.v1` types and services, typed ids, and the one table that
//! says how an error looks over gRPC and over HTTP.

pub mod error;
pub mod ids;

pub use error::{Error, ErrorCode};
pub use ids::{Epoch, IdError, NodeId, Position, RequestId};

/// The generated messages, clients and servers of the package `headstart.v1`.
#[allow(
    missing_docs,
    unreachable_pub,
    rust_2018_idioms,
    clippy::all,
    clippy::large_futures,
    clippy::needless_pass_by_value
)]
pub mod v1 {
    tonic::include_proto!("headstart.v1");
}

/// The compiled descriptors of every `headstart.v1` file, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("headstart");
