//! The OpenAI-compatible surface: requests in, responses and server-sent events out.

mod fields;
mod inert;
mod messages;
pub(crate) mod request;
pub(crate) mod response;
pub(crate) mod stream;

pub(crate) use messages::role;
