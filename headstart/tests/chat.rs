//! The chat against a router that says what the test wants.

use std::sync::{Arc, Mutex};

use headstart::chat::{Asked, Asking, Painter, Session};
use headstart_proto::v1::router_server::{Router, RouterServer};
use headstart_proto::{Error, ErrorCode, v1};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Answers "Hello, " as the drafter and "world." as the base, and keeps what it was asked.
#[derive(Clone, Default)]
struct Scripted {
    asked: Arc<Mutex<Vec<v1::GenerateRequest>>>,
    models: Vec<v1::Model>,
    refusal: Arc<Mutex<Option<Error>>>,
}

type Frames = tokio_stream::Iter<std::vec::IntoIter<Result<v1::GenerateFrame, Status>>>;

#[tonic::async_trait]
impl Router for Scripted {
    type GenerateStream = Frames;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Frames>, Status> {
        if let Some(refusal) = self.refusal.lock().unwrap().clone() {
            return Err(refusal.into());
        }
        self.asked.lock().unwrap().push(request.into_inner());
        let text = |source: v1::Source, text: &str| {
            v1::generate_frame::Event::Text(v1::GeneratedText {
                source: source.into(),
                text: text.to_owned(),
                ..v1::GeneratedText::default()
            })
        };
        let events = vec![
            v1::generate_frame::Event::Started(v1::GenerateStarted::default()),
            text(v1::Source::Drafter, "Hello, "),
            text(v1::Source::Base, "world."),
            v1::generate_frame::Event::Finished(v1::GenerateFinished {
                reason: v1::FinishReason::Stop.into(),
                completion_tokens: 4,
                draft: Some(v1::DraftSummary {
                    drafter: "small".to_owned(),
                    base: "large".to_owned(),
                    switched: true,
                    switch_index: Some(1),
                    kept_tokens: 2,
                    drafted_tokens: 3,
                    ..v1::DraftSummary::default()
                }),
                ..v1::GenerateFinished::default()
            }),
        ];
        let frame =
            |event| Ok(v1::GenerateFrame { event: Some(event), ..v1::GenerateFrame::default() });
        let frames: Vec<_> = events.into_iter().map(frame).collect();
        Ok(Response::new(tokio_stream::iter(frames)))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let models = self.models.clone();
        Ok(Response::new(v1::ListModelsResponse { models }))
    }
}

async fn serve(router: Scripted) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tonic::transport::Server::builder().add_service(RouterServer::new(router));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

fn models() -> Vec<v1::Model> {
    let model = |id: &str, tier: v1::NodeTier| v1::Model {
        id: id.to_owned(),
        tier: tier.into(),
        ..v1::Model::default()
    };
    vec![model("large@small", v1::NodeTier::Pair), model("large", v1::NodeTier::Base)]
}

fn contents(request: &v1::GenerateRequest) -> Vec<String> {
    let line = |m: &v1::Message| format!("{}: {}", m.role, m.content);
    request.messages.iter().map(line).collect()
}

async fn take(session: &mut Session, line: &str) -> (Asked, String) {
    let mut painter = Painter::new(Vec::new());
    let asked = session.take(line, &mut painter).await;
    let plain = anstream::adapter::strip_bytes(painter.written()).into_vec();
    (asked, String::from_utf8(plain).unwrap())
}

#[tokio::test]
async fn a_conversation_is_kept_until_it_is_reset() {
    let router = Scripted { models: models(), ..Scripted::default() };
    let address = serve(router.clone()).await;
    let asking = Asking {
        system: Some("Be brief.".to_owned()),
        max_tokens: 7,
        threshold: Some(0.5),
        ..Asking::default()
    };
    let mut session = Session::connect(&address, asking).await.unwrap();
    let (asked, text) = take(&mut session, "Hi").await;
    assert_eq!(text, "Hello, ‖world.\n");
    let Asked::Said(summary) = asked else { panic!("{asked:?}") };
    assert!(summary.contains("small → large, switched at 1: kept 2 of 3 drafted"), "{summary}");
    take(&mut session, "More").await;
    assert!(matches!(take(&mut session, "/reset").await.0, Asked::Said(_)));
    take(&mut session, "Again").await;
    assert_eq!(take(&mut session, "/quit").await.0, Asked::Quit);
    assert_eq!(take(&mut session, "  ").await.0, Asked::Nothing);

    let asked = router.asked.lock().unwrap();
    assert_eq!(asked[0].model, "large", "a base is preferred to a pair");
    assert_eq!(asked[0].max_tokens, Some(7));
    assert_eq!(asked[0].threshold, Some(0.5));
    assert_eq!(asked[0].window, None);
    assert_eq!(contents(&asked[0]), ["system: Be brief.", "user: Hi"]);
    assert_eq!(
        contents(&asked[1]),
        ["system: Be brief.", "user: Hi", "assistant: Hello, world.", "user: More"]
    );
    assert_eq!(contents(&asked[2]), ["system: Be brief.", "user: Again"]);
}

#[tokio::test]
async fn a_refused_question_is_told_and_forgotten() {
    let router = Scripted { models: models(), ..Scripted::default() };
    let address = serve(router.clone()).await;
    let mut session = Session::connect(&address, Asking::default()).await.unwrap();
    let refuse = |code, message: &str| {
        *router.refusal.lock().unwrap() = Some(Error::new(code, message));
    };
    refuse(ErrorCode::NoDrafter, "no drafter is up");
    let (asked, text) = take(&mut session, "One").await;
    assert_eq!((asked, text.as_str()), (Asked::Said("no drafter is up".to_owned()), ""));
    refuse(ErrorCode::ContextTooLong, "the prompt is too long");
    let (asked, _) = take(&mut session, "Two").await;
    assert_eq!(asked, Asked::Said("the prompt is too long; /reset starts afresh".to_owned()));
    *router.refusal.lock().unwrap() = None;
    take(&mut session, "Three").await;
    assert_eq!(contents(&router.asked.lock().unwrap()[0]), ["user: Three"]);
}

#[tokio::test]
async fn nobody_there_and_nothing_served_are_told_apart() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let failure = Session::connect(&free.to_string(), Asking::default()).await.unwrap_err();
    assert!(failure.message().contains("no router answers"), "{failure:?}");
    assert!(failure.message().contains("headstart up"), "{failure:?}");

    let empty = serve(Scripted::default()).await;
    let failure = Session::connect(&empty, Asking::default()).await.unwrap_err();
    assert!(failure.message().contains("serves no model yet"), "{failure:?}");

    let failure = Session::connect("not an address", Asking::default()).await.unwrap_err();
    assert!(matches!(failure, headstart::failure::Failure::Usage(_)), "{failure:?}");
}
