//! `headstart chat`: one question, or a conversation, in a terminal.

mod paint;
mod session;

use std::io::IsTerminal;

use clap::Args;
use headstart_proto::v1;
use tokio::sync::mpsc;

pub use paint::{MARK, Painter};
pub use session::{Answer, Asked, Session};

use crate::failure::Failure;

/// Talk to a running cluster.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  headstart chat                                     a conversation; /reset, /quit
  headstart chat \"What is the capital of France?\"    one question
  headstart chat --threshold 0.55 --window 4 \"Hi\"    a base that takes over sooner
  headstart chat --model qwen2.5-coder@smollm2 \"Hi\"  this base with that drafter

The drafter's words and the base's have two colours; ‖ marks the switch. The answer goes to
standard output, everything else to standard error.")]
pub struct ChatArgs {
    /// One question; without it, a conversation
    #[arg(value_name = "PROMPT")]
    pub prompt: Option<String>,
    /// The router's gRPC address
    #[arg(
        long,
        visible_alias = "url",
        value_name = "HOST:PORT",
        env = "HEADSTART_GRPC",
        default_value = "127.0.0.1:50051"
    )]
    pub grpc: String,
    /// How the questions are asked
    #[command(flatten)]
    pub asking: Asking,
}

/// How the questions are asked.
#[derive(Args, Clone, Debug, Default)]
pub struct Asking {
    /// A base's name, or base@drafter; the first that is served unless given
    #[arg(long)]
    pub model: Option<String>,
    /// What the system message says
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// The longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_tokens: u32,
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,
    /// Sample only among the likeliest tokens that make up this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Makes sampling repeatable
    #[arg(long)]
    pub seed: Option<u64>,
    /// Draft tokens that the base judges together (w)
    #[arg(long, value_name = "W")]
    pub window: Option<u32>,
    /// How likely the base must find them to take over (γ)
    #[arg(long, value_name = "G")]
    pub threshold: Option<f32>,
}

impl Asking {
    /// The request for the conversation so far.
    fn request(&self, model: String, messages: Vec<v1::Message>) -> v1::GenerateRequest {
        v1::GenerateRequest {
            model,
            messages,
            max_tokens: Some(self.max_tokens),
            sampling: Some(v1::Sampling {
                temperature: Some(self.temperature),
                top_p: self.top_p,
                seed: self.seed,
                ..v1::Sampling::default()
            }),
            window: self.window,
            threshold: self.threshold,
            ..v1::GenerateRequest::default()
        }
    }
}

/// Runs the command.
///
/// # Errors
/// When the router cannot be reached or refuses; in a conversation, refusals are printed and the
/// conversation goes on.
pub async fn run(args: ChatArgs) -> Result<(), Failure> {
    let mut session = Session::connect(&args.grpc, args.asking).await?;
    match args.prompt {
        Some(prompt) => once(&mut session, &prompt).await,
        None => converse(&mut session).await,
    }
}

/// Asks one question and prints the answer and its summary.
///
/// # Errors
/// When the router refuses, or the user interrupts.
pub async fn once(session: &mut Session, prompt: &str) -> Result<(), Failure> {
    let mut painter = Painter::new(anstream::stdout());
    tokio::select! {
        asked = session.ask(prompt, &mut painter) => {
            let answer = asked.map_err(|refused| Failure::Failed(refused.message))?;
            session::tell(&answer.summary());
            Ok(())
        }
        _ = tokio::signal::ctrl_c() => {
            painter.end();
            Err(Failure::Interrupted("interrupted".to_owned()))
        }
    }
}

/// A conversation over standard input, until it ends or the user quits.
///
/// # Errors
/// When standard input cannot be read.
pub async fn converse(session: &mut Session) -> Result<(), Failure> {
    session::tell(&session.greeting());
    let mut lines = input();
    loop {
        if std::io::stdin().is_terminal() {
            session::prompt();
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            _ = tokio::signal::ctrl_c() => None,
        };
        let line = match line {
            None => return Ok(()),
            Some(line) => {
                line.map_err(|error| Failure::Failed(format!("cannot read input: {error}")))?
            }
        };
        let mut painter = Painter::new(anstream::stdout());
        tokio::select! {
            asked = session.take(&line, &mut painter) => match asked {
                Asked::Quit => return Ok(()),
                Asked::Nothing => {}
                Asked::Said(words) => session::tell(&words),
            },
            // The answer stops here, the conversation does not.
            _ = tokio::signal::ctrl_c() => {
                painter.end();
                session::tell("(stopped)");
            }
        }
    }
}

/// The lines of standard input; a terminal cannot be read without a thread of its own.
fn input() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
