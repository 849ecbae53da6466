//! Both prompts of a request, and whether they fit.

use std::sync::Arc;

use futures::future::OptionFuture;
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

/// Renders and tokenizes `messages` for both models; a long conversation for both at once.
///
/// # Errors
/// In `messages` when a chat template refuses them; internal when a template or tokenizer fails.
pub(crate) async fn render(
    messages: Vec<Message>,
    base: &Arc<ModelText>,
    drafter: Option<Arc<ModelText>>,
) -> Result<Prompts, Error> {
    let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    if bytes <= INLINE_BYTES_MAX {
        let base = base.base_prompt(&messages).map_err(refused)?;
        let drafter = drafter.map(|text| text.drafter_prompt(&messages)).transpose();
        return Ok(Prompts { base, drafter: drafter.map_err(refused)? });
    }
    let messages = Arc::new(messages);
    let (text, asked) = (Arc::clone(base), Arc::clone(&messages));
    let base = aside(move || text.base_prompt(&asked));
    let drafter = drafter.map(|text| aside(move || text.drafter_prompt(&messages)));
    let base = base.await?;
    let drafter = OptionFuture::from(drafter).await.transpose()?;
    Ok(Prompts { base, drafter })
}

/// Starts a rendering on a thread that carries no tokens.
fn aside(
    render: impl FnOnce() -> Result<Prompt, TextError> + Send + 'static,
) -> impl Future<Output = Result<Prompt, Error>> {
    let rendering = tokio::task::spawn_blocking(render);
    async {
        let rendered = rendering.await;
        let rendered =
            rendered.map_err(|error| Error::internal(format!("render the prompt: {error}")))?;
        rendered.map_err(refused)
    }
}

fn refused(error: TextError) -> Error {
    match error.client_fault() {
        true => Error::invalid("messages", error.to_string()),
        false => Error::internal(format!("render the prompt: {error}")),
    }
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
    use headstart_text::Role;

    use super::*;

    #[tokio::test]
    async fn long_and_short_conversations_render_alike() {
        let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/stories260k");
        let text = Arc::new(ModelText::load(fixture.as_ref()).unwrap());
        for words in [1, INLINE_BYTES_MAX / 5, INLINE_BYTES_MAX / 5 + 1] {
            let messages = vec![Message::new(Role::User, "once ".repeat(words))];
            let base = text.base_prompt(&messages).unwrap();
            let drafter = text.drafter_prompt(&messages).unwrap();
            let with = render(messages.clone(), &text, Some(Arc::clone(&text))).await.unwrap();
            assert_eq!((with.base.ids, with.drafter.unwrap().ids), (base.ids.clone(), drafter.ids));
            let alone = render(messages, &text, None).await.unwrap();
            assert_eq!((alone.base.ids, alone.drafter.is_none()), (base.ids, true));
        }
    }

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
