//! The command line of Headstart: a whole cluster on one machine, a chat with it, and the models
//! it runs on.

pub mod bench;
pub mod chat;
pub mod cli;
pub mod demo;
pub mod failure;
pub mod models;
pub mod up;
