use super::*;
use proptest::prelude::*;

fn pool(word: &str) -> Pool {
    match word.split_once(':') {
        None if word == "router" => Pool::Router,
        None if word == "drafters" => Pool::Drafters,
        Some(("base", name)) => Pool::Base(name.into()),
        Some(("drafter", name)) => Pool::Drafter(name.into()),
        _ => panic!("unknown pool {word}"),
    }
}

/// A queue and what its requests are called.
struct Table {
    start: Instant,
    queue: Queue,
    rooms: HashMap<Pool, Room>,
    tickets: HashMap<String, Ticket>,
}

impl Table {
    fn new(words: &[&str]) -> Self {
        let number = |index: usize| words[index].parse::<u64>().unwrap();
        let limits = Limits {
            requests_max: number(0) as usize,
            tokens_max: number(1),
            wait_max: Duration::from_millis(number(2)),
        };
        let start = Instant::now();
        let (rooms, tickets) = Default::default();
        Self { start, queue: Queue::new(limits, start), rooms, tickets }
    }

    fn shown(&self, verdicts: Vec<Verdict>) -> String {
        let name =
            |ticket| self.tickets.iter().find(|(_, known)| **known == ticket).unwrap().0.as_str();
        let mut shown: Vec<String> = verdicts
            .into_iter()
            .map(|(ticket, verdict)| match verdict {
                Ok(()) => format!("+{}", name(ticket)),
                Err(refusal) => {
                    let after = refusal.retry_after.as_millis();
                    format!("-{}:{}:{after}", name(ticket), refusal.reason.as_str())
                }
            })
            .collect();
        if shown.is_empty() {
            shown.push("nothing".into());
        }
        shown.join(" ")
    }

    fn act(&mut self, words: &[&str]) -> String {
        let now = self.start + Duration::from_millis(words[0].parse().unwrap());
        let verdicts = match words[1] {
            "room" => {
                let tokens = words[4].parse().unwrap();
                self.rooms
                    .insert(pool(words[2]), Room { slots: words[3].parse().unwrap(), tokens });
                self.queue.resize(self.rooms.clone(), now)
            }
            "leave" => self.queue.leave(self.tickets[words[2]], now),
            "correct" => {
                let tokens = words[3].parse().unwrap();
                let claims = claims(tokens, &words[4..]);
                self.queue.correct(self.tickets[words[2]], tokens, claims)
            }
            "interactive" | "batch" => {
                let class = Class::from_name(words[1]).unwrap();
                let (tenant, tokens) = (Tenant::Named(words[3].into()), words[4].parse().unwrap());
                let demand = Demand { class, tenant, tokens, claims: claims(tokens, &words[5..]) };
                let (ticket, verdicts) = self.queue.arrive(demand, now);
                self.tickets.insert(words[2].into(), ticket);
                verdicts
            }
            other => panic!("unknown event {other}"),
        };
        self.shown(verdicts)
    }
}

/// One slot and all tokens of each pool.
fn claims(tokens: u64, words: &[&str]) -> Vec<Claim> {
    words.iter().map(|word| Claim { pool: pool(word), slots: 1, tokens }).collect()
}

#[test]
fn the_table_of_cases_holds() {
    let mut table = Table::new(&["0", "0", "0"]);
    let mut asked = 0;
    for (index, line) in include_str!("../../testdata/admission.txt").lines().enumerate() {
        let line = line.trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.first() {
            None => {}
            Some(word) if word.starts_with('#') => {}
            Some(&"queue") => table = Table::new(&words[1..]),
            Some(_) => {
                let (event, expected) = line.split_once("=>").unwrap_or_else(|| panic!("{line}"));
                let words: Vec<&str> = event.split_whitespace().collect();
                let found = table.act(&words);
                assert_eq!(found, expected.trim(), "line {}: {line}", index + 1);
                asked += 1;
            }
        }
    }
    assert!(asked > 50, "{asked}");
}

#[derive(Clone, Debug)]
enum Act {
    Arrive { batch: bool, tenant: u8, tokens: u64, base: u8, slots: u32 },
    Leave(usize),
    Correct(usize, u64),
    Resize(u32, u64),
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (any::<bool>(), 0_u8..3, 1_u64..50, 0_u8..2, 1_u32..3).prop_map(
            |(batch, tenant, tokens, base, slots)| Act::Arrive { batch, tenant, tokens, base, slots }
        ),
        4 => any::<prop::sample::Index>().prop_map(|index| Act::Leave(index.index(1 << 16))),
        1 => (any::<prop::sample::Index>(), 1_u64..100)
            .prop_map(|(index, tokens)| Act::Correct(index.index(1 << 16), tokens)),
        1 => (2_u32..6, 40_u64..100).prop_map(|(slots, tokens)| Act::Resize(slots, tokens)),
    ]
}

fn base(index: u8) -> Pool {
    Pool::Base(index.to_string().into())
}

fn rooms(slots: u32, tokens: u64) -> HashMap<Pool, Room> {
    let room = Room { slots, tokens };
    HashMap::from([(base(0), room), (base(1), room), (Pool::Drafters, room)])
}

proptest! {
    /// Nobody is forgotten or told twice, the bounds hold, nothing is admitted over the room that
    /// there is, nobody waits while nothing runs, and in the end everything is given back.
    #[test]
    fn every_request_is_decided_once_and_nothing_leaks(acts in prop::collection::vec(any_act(), 1..80)) {
        let start = Instant::now();
        let limits = Limits { requests_max: 6, tokens_max: 150, wait_max: Duration::from_secs(5) };
        let mut queue = Queue::new(limits, start);
        queue.resize(rooms(3, 60), start);
        let (mut waiting, mut running) = (Vec::<Ticket>::new(), Vec::<Ticket>::new());
        let decide = |verdicts: Vec<Verdict>, waiting: &mut Vec<Ticket>, running: &mut Vec<Ticket>| {
            for (ticket, verdict) in verdicts {
                let index = waiting.iter().position(|other| *other == ticket);
                waiting.remove(index.expect("only who waits is told"));
                if verdict.is_ok() {
                    running.push(ticket);
                }
            }
        };
        for (step, act) in acts.into_iter().enumerate() {
            let now = start + Duration::from_millis(step as u64 * 20);
            let verdicts = match act {
                Act::Arrive { batch, tenant, tokens, base: index, slots } => {
                    let class = if batch { Class::Batch } else { Class::Interactive };
                    let claim = |pool| Claim { pool, slots, tokens };
                    let claims = vec![claim(base(index)), claim(Pool::Drafters)];
                    let tenant = Tenant::Bearer(tenant.into());
                    let (ticket, verdicts) =
                        queue.arrive(Demand { class, tenant, tokens, claims }, now);
                    waiting.push(ticket);
                    verdicts
                }
                Act::Leave(index) if !running.is_empty() => {
                    let ticket = running.swap_remove(index % running.len());
                    queue.leave(ticket, now)
                }
                Act::Leave(index) if !waiting.is_empty() => {
                    let ticket = waiting.swap_remove(index % waiting.len());
                    queue.leave(ticket, now)
                }
                Act::Correct(index, tokens) if !running.is_empty() => {
                    let ticket = running[index % running.len()];
                    queue.correct(ticket, tokens, vec![Claim { pool: base(0), slots: 1, tokens }])
                }
                Act::Resize(slots, tokens) => queue.resize(rooms(slots, tokens), now),
                Act::Leave(_) | Act::Correct(..) => Vec::new(),
            };
            decide(verdicts, &mut waiting, &mut running);
            let [(requests, tokens), (more, more_tokens)] = Class::ALL.map(|class| queue.waiting(class));
            prop_assert_eq!(requests + more, waiting.len());
            prop_assert!(requests + more <= 6 && tokens + more_tokens <= 150);
            prop_assert_eq!(queue.entries.len(), waiting.len() + running.len());
            if running.is_empty() {
                prop_assert!(waiting.is_empty(), "work waits while nothing runs");
            }
        }
        let end = start + Duration::from_secs(100);
        while let Some(ticket) = running.pop() {
            let verdicts = queue.leave(ticket, end);
            decide(verdicts, &mut waiting, &mut running);
        }
        prop_assert!(waiting.is_empty());
        prop_assert!(queue.entries.is_empty());
        prop_assert!(queue.used.values().all(|used| used.slots == 0 && used.tokens == 0));
    }

    /// Among tenants who always have something waiting, each gets the same tokens, give or take one
    /// request, however large or many its requests are.
    #[test]
    fn tenants_who_wait_share_evenly(sizes in prop::collection::vec(1_u64..40, 3), served in 50_usize..150) {
        let start = Instant::now();
        let limits = Limits { requests_max: 1000, tokens_max: 1 << 30, wait_max: Duration::from_secs(9999) };
        let mut queue = Queue::new(limits, start);
        queue.resize(HashMap::from([(base(0), Room { slots: 1, tokens: 1000 })]), start);
        let mut owner = HashMap::new();
        let mut running = Vec::new();
        let mut arrive = |queue: &mut Queue, who: usize| {
            let claims = vec![Claim { pool: base(0), slots: 1, tokens: sizes[who] }];
            let tenant = Tenant::Bearer(who as u64);
            let demand = Demand { class: Class::Interactive, tenant, tokens: sizes[who], claims };
            let (ticket, verdicts) = queue.arrive(demand, start);
            owner.insert(ticket, who);
            (owner.clone(), verdicts)
        };
        let mut owners = HashMap::new();
        for round in 0..6 {
            let (known, verdicts) = arrive(&mut queue, round % 3);
            owners = known;
            running.extend(verdicts.into_iter().map(|(ticket, _)| ticket));
        }
        let mut got = [0_u64; 3];
        for _ in 0..served {
            let ticket = running.pop().expect("one runs");
            let who = owners[&ticket];
            got[who] += sizes[who];
            // It comes back with the next one before its place is free.
            let (known, verdicts) = arrive(&mut queue, who);
            owners = known;
            prop_assert!(verdicts.is_empty());
            running.extend(queue.leave(ticket, start).into_iter().map(|(ticket, _)| ticket));
        }
        let slack = 3 * sizes.iter().max().unwrap();
        let (least, most) = (got.iter().min().unwrap(), got.iter().max().unwrap());
        prop_assert!(most - least <= slack, "{got:?} of sizes {sizes:?}");
    }
}
