//! What the whole-cluster tests share: processes, an HTTP client, the golden files, chaos, fuzzing.

pub mod chaos;
pub mod fuzz;
pub mod golden;
pub mod http;
pub mod process;
