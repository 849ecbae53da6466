//! What happens in the world of a seed: its hosts, its requests, its faults. Everything is drawn
//! before anything runs.

use std::time::Duration;

use headstart_cluster::BaseRole;
use headstart_engine::Sampling;
use headstart_proto::v1;

use crate::net::HostId;
use crate::random::Random;

/// When the faults of the safety phase may begin, and until when requests may come.
pub const SAFETY: Duration = Duration::from_secs(8);

/// A world.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Routers.
    pub routers: usize,
    /// Drafters.
    pub drafters: usize,
    /// Bases.
    pub bases: Vec<Base>,
    /// Requests that a node runs at once.
    pub slots: usize,
    /// KV pages of eight tokens that a node has; a base with larger ones has fewer.
    pub pages: usize,
    /// Drafts travel as text.
    pub as_text: bool,
    /// How long either side of a handoff waits for the other.
    pub handoff_timeout: Duration,
    /// How long KV is kept for the base that goes on with an answer.
    pub kv_lease: Duration,
    /// Time of a drafter's step, and of a base's.
    pub step: (Duration, Duration),
    /// Sets the fakes of this world apart from those of others.
    pub salt: u64,
    /// Share of contexts in which base and drafter agree, in percent.
    pub agreement_percent: u64,
    /// The requests of the safety phase, in the order in which they come.
    pub asks: Vec<Ask>,
    /// The requests of the healing phase.
    pub healed: Vec<Ask>,
    /// The faults, in the order in which they begin.
    pub faults: Vec<Fault>,
    /// What the network draws from.
    pub network: Random,
}

/// What a host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A router.
    Router,
    /// A drafter.
    Drafter,
    /// A base.
    Base,
}

/// A base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// What it does of an answer.
    pub role: BaseRole,
    /// Tokens of its KV pages.
    pub page_size: usize,
    /// Ranks that its pages are cut among.
    pub tp: usize,
}

impl Base {
    /// Two or three that do everything, or two to four of which one reads and one writes.
    fn draw_all(random: &mut Random) -> Vec<Self> {
        use BaseRole::{Decode, Score, Unified};
        let split = random.chance(50);
        let mut roles = if split { vec![Score, Decode] } else { vec![Unified, Unified] };
        for _ in 0..random.index(if split { 3 } else { 2 }) {
            roles.push(if split { *random.pick(&[Score, Decode, Unified]) } else { Unified });
        }
        let mut base = |role| {
            let (page_size, tp) = (*random.pick(&[4, 8, 8, 16]), *random.pick(&[1, 1, 2]));
            Self { role, page_size, tp }
        };
        roles.into_iter().map(&mut base).collect()
    }
}

/// A request, and how its client behaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// When it comes, from the start of its phase.
    pub at: Duration,
    /// Which router it goes to.
    pub router: usize,
    /// What the user says.
    pub message: String,
    /// Tokens of the answer at most.
    pub max_tokens: u32,
    /// `0` is greedy.
    pub temperature: f32,
    /// Of sampling.
    pub top_p: f32,
    /// Taken from what the answer has.
    pub presence_penalty: f32,
    /// Taken from what the answer has, each time.
    pub frequency_penalty: f32,
    /// Of sampling.
    pub seed: u64,
    /// Answers.
    pub choices: u32,
    /// Log-probabilities are wanted, with so many alternatives.
    pub top_logprobs: Option<u32>,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Of the switch rule.
    pub window: u32,
    /// Of the switch rule.
    pub threshold: f32,
    /// Of the draft.
    pub draft_tokens_max: u32,
    /// How the client reads.
    pub reader: Reader,
}

/// How a client reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// As fast as it can.
    Eager,
    /// With a pause after every frame.
    Slow(Duration),
    /// So many frames, and then it hangs up.
    HangsUp(usize),
}

impl Ask {
    /// What the base samples by; the seed is the first answer's.
    #[must_use]
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            ..Sampling::default()
        }
    }

    /// The request on the wire.
    #[must_use]
    pub fn wire(&self) -> v1::GenerateRequest {
        v1::GenerateRequest {
            model: "big".into(),
            messages: vec![v1::Message { role: "user".into(), content: self.message.clone() }],
            max_tokens: Some(self.max_tokens),
            sampling: Some(v1::Sampling {
                temperature: Some(self.temperature),
                top_p: Some(self.top_p),
                seed: Some(self.seed),
                presence_penalty: Some(self.presence_penalty),
                frequency_penalty: Some(self.frequency_penalty),
                ..v1::Sampling::default()
            }),
            stop: self.stop.clone(),
            n: Some(self.choices),
            top_logprobs: self.top_logprobs,
            window: Some(self.window),
            threshold: Some(self.threshold),
            draft_tokens_max: Some(self.draft_tokens_max),
            ..v1::GenerateRequest::default()
        }
    }

    fn draw(random: &mut Random, routers: usize, within: Duration) -> Self {
        let sampled = random.chance(50);
        let penalised = sampled && random.chance(50);
        let words = ["tell", "me", "a", "story", "of", "the", "little", "dog", "who", "ran", "?"];
        let message: Vec<&str> = (0..random.within(1..9)).map(|_| *random.pick(&words)).collect();
        let reader = match random.within(0..10) {
            0 => Reader::Slow(random.millis(5..300)),
            1 => Reader::HangsUp(random.index(12)),
            _ => Reader::Eager,
        };
        Self {
            at: random.millis(0..within.as_millis() as u64),
            router: random.index(routers),
            message: message.join(" "),
            max_tokens: random.within(1..48) as u32,
            temperature: if sampled { 0.8 } else { 0.0 },
            top_p: if sampled && random.chance(30) { 0.9 } else { 1.0 },
            presence_penalty: if penalised { 1.0 } else { 0.0 },
            frequency_penalty: if penalised { 0.5 } else { 0.0 },
            seed: random.bits(),
            choices: if random.chance(20) { 2 } else { 1 },
            top_logprobs: random.chance(30).then(|| random.within(0..3) as u32),
            stop: if random.chance(25) { vec![random_stop(random)] } else { Vec::new() },
            window: random.within(1..7) as u32,
            threshold: *random.pick(&[0.2, 0.55, 0.8, 0.95]),
            draft_tokens_max: random.within(1..40) as u32,
            reader,
        }
    }
}

/// A letter or two: most answers have them somewhere.
fn random_stop(random: &mut Random) -> String {
    let letters = ["a", "e", "th", "qu", " t", "on", "z"];
    (*random.pick(&letters)).to_owned()
}

/// Something that goes wrong for a while.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// When it begins, or begins to wait for what it is aimed at.
    pub at: Duration,
    /// How long it lasts.
    pub lasts: Duration,
    /// What it is.
    pub kind: FaultKind,
    /// What it waits for. The hosts of its kind are then those that take part.
    pub aim: Option<Aim>,
}

/// What a fault is aimed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// A transfer of KV pages, so long after it began: its sender or its receiver, and the link
    /// between them.
    Transfer {
        /// So long after it began.
        after: Duration,
        /// It is the receiver that fails.
        receiver: bool,
    },
    /// A draft that is on its way to the base: its drafter, and the link between them. The fault
    /// ends as soon after another draft took its place as it would have lasted, or after
    /// [`SUPERSEDED_WITHIN`].
    Handoff,
}

/// How long a fault that is aimed at a handoff waits for another one to take its place.
pub const SUPERSEDED_WITHIN: Duration = Duration::from_secs(6);

/// What may go wrong.
#[derive(Clone, Debug, PartialEq)]
pub enum FaultKind {
    /// A host's processes die; its kernel resets connections unless it lost its power. They are
    /// started again when the fault ends.
    Crash {
        /// Who.
        host: HostId,
        /// Nobody is told.
        silent: bool,
    },
    /// A host is held past all deadlines, or for a moment. Its record may expire meanwhile.
    Hold {
        /// Who.
        host: HostId,
    },
    /// Two hosts cannot reach each other, or only one way.
    Partition {
        /// From whom.
        from: HostId,
        /// To whom.
        to: HostId,
        /// Nor back.
        both: bool,
    },
    /// Bits of KV frames flip on their way between two hosts, in so many of a thousand pieces.
    Corrupt {
        /// From whom.
        from: HostId,
        /// To whom, and back.
        to: HostId,
        /// How often.
        permille: u64,
    },
    /// A link is slow, both ways.
    Slow {
        /// From whom.
        from: HostId,
        /// To whom.
        to: HostId,
        /// By how much.
        latency: Duration,
    },
    /// A host is asked to drain; it is started again when the fault ends.
    Drain {
        /// Who.
        host: HostId,
    },
    /// The membership store is away for everybody.
    StoreAway,
    /// One host does not reach the store, and its record expires.
    StoreCut {
        /// Who.
        host: HostId,
    },
    /// What the store tells comes late.
    StoreLate {
        /// By how much.
        late: Duration,
    },
}

impl FaultKind {
    /// A short name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Crash { silent: false, .. } => "crash",
            Self::Crash { silent: true, .. } => "power loss",
            Self::Hold { .. } => "hold",
            Self::Partition { both: true, .. } => "partition",
            Self::Partition { both: false, .. } => "one-way partition",
            Self::Slow { .. } => "slow link",
            Self::Corrupt { .. } => "corrupt pages",
            Self::Drain { .. } => "drain",
            Self::StoreAway => "store away",
            Self::StoreCut { .. } => "store cut off",
            Self::StoreLate { .. } => "store late",
        }
    }

    /// The same between others: of one host, or of the link.
    #[must_use]
    pub fn of(self, host: HostId, link: (HostId, HostId)) -> Self {
        let (from, to) = link;
        match self {
            Self::Crash { silent, .. } => Self::Crash { host, silent },
            Self::Hold { .. } => Self::Hold { host },
            Self::Drain { .. } => Self::Drain { host },
            Self::StoreCut { .. } => Self::StoreCut { host },
            Self::Partition { both, .. } => Self::Partition { from, to, both },
            Self::Slow { latency, .. } => Self::Slow { from, to, latency },
            Self::Corrupt { permille, .. } => Self::Corrupt { from, to, permille },
            Self::StoreAway | Self::StoreLate { .. } => self,
        }
    }
}

impl Plan {
    /// The plan of a seed.
    #[must_use]
    pub fn draw(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (routers, drafters) = (1 + random.index(2), 2);
        let bases = Base::draw_all(&mut random);
        let split = bases[0].role != BaseRole::Unified;
        let count = if split { random.within(8..20) } else { random.within(4..10) };
        let mut asks: Vec<Ask> =
            (0..count).map(|_| Ask::draw(&mut random, routers, SAFETY)).collect();
        if split {
            // Half of them come close together, so that pages are soon used again.
            let burst = random.millis(0..6000);
            for ask in asks.iter_mut().step_by(2) {
                ask.at = burst + random.millis(0..2000);
            }
        }
        asks.sort_by_key(|ask| ask.at);
        let mut healed: Vec<Ask> =
            (0..3).map(|_| Ask::draw(&mut random, routers, Duration::from_secs(3))).collect();
        healed.sort_by_key(|ask| ask.at);
        let hosts = routers + drafters + bases.len();
        let mut faults: Vec<Fault> =
            (0..random.within(0..5)).map(|_| Fault::draw(&mut random, routers, hosts)).collect();
        if split {
            faults.extend((0..random.within(0..4)).map(|_| Fault::of_transfer(&mut random)));
        }
        if random.chance(30) {
            faults.push(Fault::of_handoff(&mut random));
        }
        faults.sort_by_key(|fault| fault.at);
        Self {
            routers,
            drafters,
            bases,
            slots: random.within(2..7) as usize,
            pages: 4 * random.within(if split { 6..14 } else { 10..24 }) as usize,
            as_text: random.chance(30),
            handoff_timeout: Duration::from_secs(*random.pick(&[1, 4])),
            kv_lease: random.millis(100..2000),
            step: (random.millis(1..6), random.millis(2..16)),
            salt: random.bits(),
            agreement_percent: random.within(30..95),
            asks,
            healed,
            faults,
            network: random.fork(),
        }
    }

    /// What a host is.
    #[must_use]
    pub fn kind(&self, host: HostId) -> Kind {
        match host {
            _ if host < self.routers => Kind::Router,
            _ if host < self.routers + self.drafters => Kind::Drafter,
            _ => Kind::Base,
        }
    }

    /// The hosts of a kind.
    pub fn hosts(&self, kind: Kind) -> impl Iterator<Item = HostId> {
        let all = self.routers + self.drafters + self.bases.len();
        (0..all).filter(move |&host| self.kind(host) == kind)
    }

    /// The names of all hosts: routers, drafters, bases, and one for all clients.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let tier = |name: &'static str, count| (0..count).map(move |n| format!("{name}-{n}"));
        tier("router", self.routers)
            .chain(tier("drafter", self.drafters))
            .chain(tier("base", self.bases.len()))
            .chain(["client".to_owned()])
            .collect()
    }
}

impl Fault {
    /// A fault among `hosts`, of which the first are routers.
    fn draw(random: &mut Random, routers: usize, hosts: usize) -> Self {
        let node = |random: &mut Random| routers + random.index(hosts - routers);
        // Mostly nodes: a router takes its clients' requests with it.
        let any = |random: &mut Random| {
            if random.chance(15) { random.index(routers) } else { node(random) }
        };
        let pair = |random: &mut Random| {
            let from = random.index(hosts);
            (from, (from + 1 + random.index(hosts - 1)) % hosts)
        };
        let kind = match random.within(0..16) {
            0..4 => FaultKind::Crash { host: any(random), silent: random.chance(40) },
            4..7 => FaultKind::Hold { host: any(random) },
            7..10 => {
                let (from, to) = pair(random);
                FaultKind::Partition { from, to, both: random.chance(60) }
            }
            10 => {
                let (from, to) = pair(random);
                FaultKind::Slow { from, to, latency: random.millis(20..800) }
            }
            11..13 => FaultKind::Drain { host: any(random) },
            13 => FaultKind::StoreAway,
            14 => FaultKind::StoreCut { host: node(random) },
            _ => FaultKind::StoreLate { late: random.millis(10..3000) },
        };
        let lasts =
            if random.chance(60) { random.millis(5..1500) } else { random.millis(1500..40_000) };
        Self { at: random.millis(0..SAFETY.as_millis() as u64), lasts, kind, aim: None }
    }

    /// A fault in the middle of a transfer of KV pages.
    fn of_transfer(random: &mut Random) -> Self {
        let (host, from, to) = (0, 0, 0);
        let kind = match random.within(0..12) {
            0..2 => FaultKind::Crash { host, silent: random.chance(40) },
            2..6 => FaultKind::Hold { host },
            6..8 => FaultKind::Partition { from, to, both: random.chance(50) },
            8..10 => FaultKind::Slow { from, to, latency: random.millis(5..1200) },
            10 => FaultKind::Corrupt { from, to, permille: random.within(5..500) },
            _ => FaultKind::Drain { host },
        };
        let aim = Aim::Transfer { after: random.millis(0..60), receiver: random.chance(70) };
        let at = random.millis(0..SAFETY.as_millis() as u64);
        Self { at, lasts: random.millis(5..4000), kind, aim: Some(aim) }
    }

    /// A fault that holds a draft up, for as long as another one needs to take its place.
    fn of_handoff(random: &mut Random) -> Self {
        let kind = match random.chance(50) {
            true => FaultKind::Hold { host: 0 },
            false => FaultKind::Partition { from: 0, to: 0, both: false },
        };
        let at = random.millis(0..SAFETY.as_millis() as u64);
        Self { at, lasts: random.millis(1..60), kind, aim: Some(Aim::Handoff) }
    }
}
