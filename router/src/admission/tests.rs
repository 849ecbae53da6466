use super::*;
use futures::FutureExt;
use headstart_cluster::Tier;
use headstart_proto::NodeId;
use headstart_text::Role;

fn record(tier: Tier, id: &str, model: &str, slots: u32, kv_tokens: u64) -> NodeRecord {
    NodeRecord {
        node_id: NodeId::new(id).unwrap(),
        tier,
        address: "localhost:1".into(),
        model: model.into(),
        tokenizer_fingerprint: "t".into(),
        text_fingerprint: "t".into(),
        context_length: 512,
        slots,
        kv_tokens,
        draining: false,
        incarnation: 1,
        base_role: headstart_cluster::BaseRole::Unified,
        kv_address: String::new(),
    }
}

fn candidate(record: &NodeRecord, suspected: bool) -> Candidate<'_> {
    Candidate { record, in_flight: 0, suspected_for: suspected.then_some(Duration::ZERO) }
}

#[test]
fn room_is_what_live_nodes_have_together() {
    let bases = [
        record(Tier::Base, "b1", "big", 4, 1000),
        record(Tier::Base, "b2", "big", 8, 2000),
        NodeRecord { draining: true, ..record(Tier::Base, "b3", "big", 16, 1000) },
        record(Tier::Base, "b4", "big", 32, 1000),
        record(Tier::Base, "c1", "lonely", 64, 1000),
        record(Tier::Base, "d1", "silent", 1, 0),
    ];
    let drafters =
        [record(Tier::Drafter, "d1", "small", 2, 100), record(Tier::Drafter, "d2", "tiny", 3, 200)];
    // b4 and c1 are suspected; nobody else serves what c1 serves.
    let suspected = [false, false, false, true, true, false];
    let snapshot = Snapshot {
        bases: bases.iter().zip(suspected).map(|(record, out)| candidate(record, out)).collect(),
        drafters: drafters.iter().map(|record| candidate(record, false)).collect(),
    };
    let rooms = rooms(&snapshot, 99);
    let room = |pool: &Pool| rooms.get(pool).map(|room| (room.slots, room.tokens));
    assert_eq!(room(&Pool::Base("big".into())), Some((12, 3000)));
    assert_eq!(room(&Pool::Base("lonely".into())), Some((64, 1000)));
    assert_eq!(room(&Pool::Base("silent".into())), Some((1, u64::MAX)));
    assert_eq!(room(&Pool::Drafters), Some((5, 300)));
    assert_eq!(room(&Pool::Drafter("tiny".into())), Some((3, 200)));
    assert_eq!(room(&Pool::Router), Some((99, u64::MAX)));
    assert_eq!(rooms.len(), 7);
}

#[test]
fn bases_with_roles_hold_as_many_answers_as_there_are_pairs() {
    use headstart_cluster::BaseRole::{Decode, Score, Unified};
    // Slots are 4 a node and KV tokens 1000, and 100 where a node is small.
    /// Bases, whether each is small, and what slots and tokens their tier then has.
    type Case = (&'static [(BaseRole, bool)], u32, u64);
    let cases: [Case; 9] = [
        (&[(Unified, false), (Unified, false)], 8, 2000),
        (&[(Score, false), (Decode, false)], 4, 1000),
        (&[(Score, false), (Decode, false), (Decode, false)], 4, 1000),
        (&[(Score, false), (Score, false), (Decode, true)], 4, 100),
        (&[(Score, true), (Score, true), (Decode, false), (Decode, false)], 8, 200),
        (&[(Unified, false), (Score, false), (Decode, false)], 8, 2000),
        (&[(Unified, false), (Score, false), (Score, false)], 4, 1000),
        (&[(Score, false), (Score, false)], 8, 2000),
        (&[(Decode, false)], 4, 1000),
    ];
    for (nodes, slots, tokens) in cases {
        let records: Vec<_> = (nodes.iter().zip(1..))
            .map(|((role, small), id)| NodeRecord {
                base_role: *role,
                ..record(Tier::Base, &format!("b{id}"), "big", 4, if *small { 100 } else { 1000 })
            })
            .collect();
        let bases = records.iter().map(|record| candidate(record, false)).collect();
        let rooms = rooms(&Snapshot { bases, drafters: vec![] }, 99);
        let room = rooms[&Pool::Base("big".into())];
        assert_eq!((room.slots, room.tokens), (slots, tokens), "{nodes:?}");
    }
    // A base that is suspected makes no pair.
    let score = NodeRecord { base_role: Score, ..record(Tier::Base, "b1", "big", 4, 1000) };
    let decode = NodeRecord { base_role: Decode, ..record(Tier::Base, "b2", "big", 2, 1000) };
    for (suspected, slots) in [(false, 2), (true, 4)] {
        let bases = vec![candidate(&score, false), candidate(&decode, suspected)];
        let rooms = rooms(&Snapshot { bases, drafters: vec![] }, 99);
        assert_eq!(rooms[&Pool::Base("big".into())].slots, slots, "suspected: {suspected}");
    }
}

/// An admission over one base and one drafter of two slots each.
struct Fixture {
    admission: Arc<Admission>,
    base: NodeRecord,
    drafter: NodeRecord,
    messages: Vec<Message>,
}

impl Fixture {
    fn new(options: &RouterOptions, slots: u32, kv_tokens: u64) -> Self {
        let admission = Admission::new(options, Metrics::new());
        let base = record(Tier::Base, "b1", "big", slots, kv_tokens);
        let drafter = record(Tier::Drafter, "d1", "small", 1, kv_tokens);
        let messages = vec![Message { role: Role::User, content: "x".repeat(40) }];
        let fixture = Self { admission, base, drafter, messages };
        fixture.resize();
        fixture
    }

    fn resize(&self) {
        let snapshot = Snapshot {
            bases: vec![candidate(&self.base, false)],
            drafters: vec![candidate(&self.drafter, false)],
        };
        self.admission.resize(&snapshot, 1000);
    }

    fn request(&self, max_tokens: Option<u32>) -> Request<'_> {
        Request {
            caller: Caller { tenant: Tenant::Anonymous, class: None },
            class: Class::Interactive,
            choices: 1,
            messages: &self.messages,
            max_tokens,
            draft_tokens_max: 10,
            base: &self.base,
            drafter: Some(None),
            drafter_context: 512,
        }
    }

    fn now(&self, max_tokens: Option<u32>) -> Option<Result<Permit, Error>> {
        self.admission.admit(&self.request(max_tokens)).now_or_never()
    }
}

#[tokio::test]
async fn a_drafter_is_free_once_its_draft_is_decided() {
    let fixture = Fixture::new(&RouterOptions::default(), 2, 10_000);
    let first = fixture.now(Some(10)).unwrap().unwrap();
    assert!(fixture.now(Some(10)).is_none(), "the drafter has one slot");
    first.draft_decided();
    let second = fixture.now(Some(10)).unwrap().unwrap();
    second.draft_decided();
    assert!(fixture.now(Some(10)).is_none(), "the base has two");
    drop(first);
    assert!(fixture.now(Some(10)).unwrap().is_ok());
}

#[tokio::test]
async fn estimates_are_corrected_once_the_prompt_is_tokenised() {
    // Estimated: 8 + 40/4 tokens of prompt, and the answer.
    let fixture = Fixture::new(&RouterOptions::default(), 100, 60);
    let wide = fixture.now(Some(32)).unwrap().unwrap();
    wide.draft_decided();
    assert!(fixture.now(Some(1)).is_none(), "50 of 60 tokens are taken");
    wide.correct(5, None, 32);
    let narrow = fixture.now(Some(1)).unwrap().unwrap();
    drop((wide, narrow));
    // Without max_tokens the usual length is expected, and learnt.
    let open = fixture.now(None).unwrap().unwrap();
    open.draft_decided();
    assert!(fixture.now(Some(1)).is_none(), "256 tokens are expected");
    for _ in 0..1000 {
        open.answered(4);
    }
    open.correct(5, None, 400);
    assert!(fixture.now(Some(10)).unwrap().is_ok());
}

#[tokio::test]
async fn whoever_waits_is_admitted_or_told_why_not() {
    let options = RouterOptions { queue_timeout: Duration::from_millis(50), ..Default::default() };
    let fixture = Fixture::new(&options, 1, 10_000);
    let permit = fixture.now(Some(10)).unwrap().unwrap();
    let request = fixture.request(Some(10));
    let late = fixture.admission.admit(&request).await.unwrap_err();
    assert_eq!(late.code, ErrorCode::Overloaded);
    assert!(late.retry_after_secs().is_some() && late.message.contains("in time"), "{late}");
    // Neither who was refused nor who hung up is in the way of the next.
    assert!(fixture.now(Some(10)).is_none());
    let waiting = fixture.admission.admit(&request);
    tokio::pin!(waiting);
    assert!((&mut waiting).now_or_never().is_none());
    drop(permit);
    let permit = waiting.await.unwrap();
    // Closing sends away who waits; who runs goes on.
    let waiting = fixture.admission.admit(&request);
    tokio::pin!(waiting);
    assert!((&mut waiting).now_or_never().is_none());
    fixture.admission.close();
    assert_eq!(waiting.await.unwrap_err().code, ErrorCode::Draining);
    assert_eq!(fixture.now(Some(10)).unwrap().unwrap_err().code, ErrorCode::Draining);
    drop(permit);
}

#[tokio::test]
async fn a_queue_of_none_refuses_at_once() {
    let options = RouterOptions { queue_requests_max: 0, ..Default::default() };
    let fixture = Fixture::new(&options, 1, 10_000);
    let _permit = fixture.now(Some(10)).unwrap().unwrap();
    let error = fixture.now(Some(10)).unwrap().unwrap_err();
    assert_eq!((error.code, error.retry_after_secs()), (ErrorCode::Overloaded, Some(1)));
}
