//! Both prompts of a request, and whether they fit.

use std::sync::Arc;

use headstart_proto::{Error, ErrorCode};
use headstart_text::{Message, ModelText, Prompt, TextError};

/// Conversations longer than this are rendered off the threads that carry tokens.
const INLINE_BYTES_MAX: usize = 8 << 10;

/// Both prompts.
#[derive(Debug)]
pub(crate) struct Prompts {
    /// What the base continues.
    pub(crate) base: Prompt,
    /// What the drafter answers; `None` where no drafter takes part.
    pub(crate) drafter: Option<Prompt>,
}

/// Renders and tokenizes `messages` for both models.
///
/// # Errors
/// In `messages` when a chat template refuses them; internal when a template or tokenizer fails.
pub(crate) async fn render(
    messages: Vec<Message>,
    base: &Arc<ModelText>,
    drafter: Option<Arc<ModelText>>,
) -> Result<Prompts, Error> {
    let base = Arc::clone(base);
    let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    let both = move || {
        let drafter = drafter.map(|text| text.drafter_prompt(&messages)).transpose();
        Ok(Prompts { base: base.base_prompt(&messages)?, drafter: drafter? })
    };
    let rendered: Result<Prompts, TextError> = if bytes <= INLINE_BYTES_MAX {
        both()
    } else {
        tokio::task::spawn_blocking(both)
            .await
            .map_err(|error| Error::internal(format!("render the prompt: {error}")))?
    };
    rendered.map_err(|error| match error.client_fault() {
        true => Error::invalid("messages", error.to_string()),
        false => Error::internal(format!("render the prompt: {error}")),
    })
}

impl Prompts {
    /// Tokens the answer may have: `wanted`, or what the base's context leaves.
    ///
    /// # Errors
    /// [`ErrorCode::ContextTooLong`] when a prompt fills its context, or `wanted` does not fit
    /// beside it.
    pub(crate) fn max_tokens(
        &self,
        base_context: u32,
        drafter_context: Option<u32>,
        wanted: Option<u32>,
    ) -> Result<u32, Error> {
        let left = left(&self.base, base_context, "model")?;
        if let (Some(prompt), Some(context)) = (&self.drafter, drafter_context) {
            self::left(prompt, context, "drafter")?;
        }
        match wanted {
            Some(wanted) if wanted > left => {
                let used = self.base.ids.len();
                let message = format!(
                    "max_tokens is too large: {wanted}. This model's maximum context length is \
                     {base_context} tokens and the messages take {used} of them, which leaves {left}"
                );
                Err(Error::new(ErrorCode::ContextTooLong, message).with_field("max_tokens"))
            }
            Some(wanted) => Ok(wanted),
            None => Ok(left),
        }
    }
}

/// What `prompt` leaves of `context`, at least one token.
fn left(prompt: &Prompt, context: u32, whose: &str) -> Result<u32, Error> {
    let used = prompt.ids.len();
    match u32::try_from(used).ok().and_then(|used| context.checked_sub(used)) {
        Some(left) if left > 0 => Ok(left),
        _ => {
            let message = format!(
                "this {whose}'s maximum context length is {context} tokens, but the messages take \
                 {used}; please shorten the messages"
            );
            Err(Error::new(ErrorCode::ContextTooLong, message).with_field("messages"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(base: usize, drafter: Option<usize>) -> Prompts {
        let prompt = |tokens| Prompt { text: String::new(), ids: vec![0; tokens] };
        Prompts { base: prompt(base), drafter: drafter.map(prompt) }
    }

    #[test]
    fn lengths_as_a_table() {
        // base prompt, drafter prompt, wanted => tokens or the field at fault; contexts 10 and 8
        let cases = [
            (4, Some(4), None, Ok(6)),
            (4, Some(4), Some(6), Ok(6)),
            (4, Some(4), Some(7), Err("max_tokens")),
            (9, Some(4), None, Ok(1)),
            (10, Some(4), None, Err("messages")),
            (11, Some(4), Some(1), Err("messages")),
            (4, Some(8), None, Err("messages")),
            (4, None, None, Ok(6)),
        ];
        for (base, drafter, wanted, expected) in cases {
            let result = prompts(base, drafter).max_tokens(10, drafter.map(|_| 8), wanted);
            let result = result.map_err(|error| {
                assert_eq!(error.code, ErrorCode::ContextTooLong);
                error.field.unwrap_or_default()
            });
            assert_eq!(result, expected.map_err(str::to_owned), "{base} {drafter:?} {wanted:?}");
        }
    }
}
