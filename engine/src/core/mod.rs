//! The pure part of the engine: values in, values out. No clock, channel, file or device in here.

pub mod pages;
pub mod prefix;
pub mod sampling;
pub mod scheduler;
pub mod sequence;
pub mod switch;
