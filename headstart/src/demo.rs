//! `headstart demo`: a cluster, one question, and how to go on.

use std::io::IsTerminal;
use std::net::{SocketAddr, TcpListener};

use anstyle::Style;
use clap::{Args, Parser};

use crate::chat::{self, Asking, Session};
use crate::failure::Failure;
use crate::models::Spec;
use crate::up::{Cluster, UpOptions};

const HEADING: Style = Style::new().bold();

/// See it work: start a cluster, ask it something, say how to go on.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  headstart demo
  headstart demo --drafter smollm2 --base smollm2 --prompt \"Tell me about foxes.\"

With a terminal it then stays for a chat; without one it exits.")]
pub struct DemoArgs {
    /// The model that begins answers
    #[arg(long, value_name = "SPEC", default_value = "smollm2")]
    drafter: Spec,
    /// The model that takes over
    #[arg(long, value_name = "SPEC", default_value = "qwen2.5-coder")]
    base: Spec,
    /// What to ask
    #[arg(long, default_value = "Why is the sky blue?")]
    prompt: String,
    /// The longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: u32,
}

/// Runs the command.
///
/// # Errors
/// When a model cannot be had, the cluster cannot start, or the question gets no answer.
pub async fn run(args: DemoArgs) -> Result<(), Failure> {
    let required = ["headstart up", "--drafter", "smollm2", "--base", "smollm2"];
    let mut options =
        UpOptions::try_parse_from(required).map_err(|error| Failure::Usage(error.to_string()))?;
    options.drafter = args.drafter.clone();
    options.base = args.base.clone();
    options.http = free(options.http);
    options.grpc = free(options.grpc);
    let cluster = tokio::select! {
        cluster = Cluster::start(&options) => cluster?,
        _ = tokio::signal::ctrl_c() => {
            return Err(Failure::Interrupted("interrupted".to_owned()));
        }
    };
    let outcome = talk(&cluster, &args).await;
    let stopped = cluster.stop().await;
    outcome.and(stopped)
}

async fn talk(cluster: &Cluster, args: &DemoArgs) -> Result<(), Failure> {
    let asking = Asking { max_tokens: args.max_tokens, ..Asking::default() };
    let mut session = Session::connect(&cluster.grpc().to_string(), asking).await?;
    anstream::eprintln!(
        "\n{HEADING}{} drafts, {} takes over{HEADING:#}\n\n{}\n",
        cluster.names()[0],
        cluster.names()[1],
        args.prompt
    );
    chat::once(&mut session, &args.prompt).await?;
    anstream::eprintln!("\n{}", how_to_go_on(cluster));
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        return chat::converse(&mut session).await;
    }
    Ok(())
}

fn how_to_go_on(cluster: &Cluster) -> String {
    let (http, grpc) = (cluster.http(), cluster.grpc());
    let ([_, model], [drafter, base]) = (cluster.names(), cluster.specs());
    format!(
        r#"{HEADING}How to go on{HEADING:#}
  The cluster again, until Ctrl-C:
    target/release/headstart up --drafter {drafter} --base {base} --http {http} --grpc {grpc}
  A chat with it, in another terminal:
    target/release/headstart chat --grpc {grpc}
  Over HTTP:
    curl -N http://{http}/v1/chat/completions -H 'Content-Type: application/json' \
      -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'
  With the OpenAI client for Python:
    from openai import OpenAI
    client = OpenAI(base_url="http://{http}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="{model}", messages=[{{"role": "user", "content": "Hello"}}])
    print(answer.choices[0].message.content)
"#
    )
}

/// `address`, or any free port there when somebody else has it.
fn free(mut address: SocketAddr) -> SocketAddr {
    if TcpListener::bind(address).is_err() {
        address.set_port(0);
    }
    address
}
