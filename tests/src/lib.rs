//! What the whole-cluster tests share: processes, an HTTP client, the golden files.

pub mod golden;
pub mod http;
pub mod process;
