use super::*;
use headstart_cluster::Tier;

/// A node of the table: its record, answers in flight, how long it has been suspected.
type Node = (NodeRecord, u32, Option<Duration>);

fn node(words: &[&str]) -> Node {
    let record = NodeRecord {
        node_id: NodeId::new(words[1]).unwrap(),
        tier: if words[0] == "base" { Tier::Base } else { Tier::Drafter },
        address: "localhost:1".into(),
        model: words[2].into(),
        tokenizer_fingerprint: words[3].into(),
        text_fingerprint: words[3].into(),
        context_length: 512,
        slots: words[4].parse().unwrap(),
        kv_tokens: 0,
        draining: words.contains(&"draining"),
        incarnation: 1,
        base_role: words.iter().find_map(|word| word.parse().ok()).unwrap_or_default(),
        kv_address: String::new(),
    };
    let suspected_for = words
        .iter()
        .find_map(|word| word.strip_prefix("suspected="))
        .map(|ms| Duration::from_millis(ms.parse().unwrap()));
    (record, words[5].parse().unwrap(), suspected_for)
}

fn snapshot(nodes: &[Node]) -> Snapshot<'_> {
    let mut snapshot = Snapshot::default();
    for (record, in_flight, suspected_for) in nodes {
        let candidate = Candidate { record, in_flight: *in_flight, suspected_for: *suspected_for };
        match record.tier {
            Tier::Base => snapshot.bases.push(candidate),
            Tier::Drafter => snapshot.drafters.push(candidate),
        }
    }
    snapshot
}

fn outcome(nodes: &[Node], question: &str) -> String {
    let mut words = question.split_whitespace();
    let mut wish = Wish {
        model: words.next().unwrap(),
        drafter: None,
        encoding: Encoding::Auto,
        on_no_drafter: OnNoDrafter::Reject,
    };
    for word in words {
        match word.split_once('=') {
            Some(("drafter", name)) => wish.drafter = Some(name),
            Some(("encoding", name)) => wish.encoding = name.parse().unwrap(),
            None if word == "base_only" => wish.on_no_drafter = OnNoDrafter::BaseOnly,
            _ => panic!("unknown word {word}"),
        }
    }
    match pick(&snapshot(nodes), &wish) {
        Err(error) => format!("error {}", error.code),
        Ok(Route { base, drafter: None }) => format!("{} - -", base.node_id),
        Ok(Route { base, drafter: Some((drafter, encoding)) }) => {
            let writer = writer_for(&snapshot(nodes).bases, base, &[]);
            let encoding = if encoding == v1::DraftEncoding::Ids { "ids" } else { "text" };
            let writer = writer.map_or(String::new(), |writer| format!(">{}", writer.node_id));
            format!("{}{writer} {} {encoding}", base.node_id, drafter.node_id)
        }
    }
}

#[test]
fn the_table_of_cases_holds() {
    let mut nodes = Vec::new();
    let mut asked = 0;
    for (index, line) in include_str!("../testdata/route.txt").lines().enumerate() {
        let line = line.trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.first() {
            Some(&"clear") => nodes.clear(),
            Some(&"node") => nodes.push(node(&words[1..])),
            Some(&"pick") => {
                let (question, expected) = line["pick".len()..].split_once("=>").unwrap();
                assert_eq!(
                    outcome(&nodes, question),
                    expected.trim(),
                    "line {}: {line}",
                    index + 1
                );
                asked += 1;
            }
            Some(word) if !word.starts_with('#') => panic!("line {}: {line}", index + 1),
            _ => {}
        }
    }
    assert!(asked > 30, "the table was read");
}

#[test]
fn the_choice_does_not_depend_on_the_order_of_the_snapshot() {
    let lines = [
        "base b1 m T 4 1",
        "base b2 m T 4 1",
        "base b3 m T 4 2",
        "drafter d2 s T 1 0",
        "drafter d1 s T 1 0",
    ];
    let mut nodes: Vec<Node> =
        lines.iter().map(|line| node(&line.split(' ').collect::<Vec<_>>())).collect();
    for _ in 0..nodes.len() {
        nodes.rotate_left(1);
        assert_eq!(outcome(&nodes, "m"), "b1 d1 ids");
    }
}

#[test]
fn models_are_bases_and_the_pairs_that_fit() {
    let nodes = [
        node(&["base", "b1", "big", "T1", "1", "0"]),
        node(&["base", "b2", "big", "T1", "1", "0"]),
        node(&["base", "b3", "gone", "T1", "1", "0", "draining"]),
        node(&["drafter", "d1", "small", "T1", "1", "0"]),
        node(&["drafter", "d2", "other", "T2", "1", "0"]),
    ];
    let names = |setting| {
        let models = models(&snapshot(&nodes), setting);
        models.into_iter().map(|m| (m.id, m.pair, m.nodes)).collect::<Vec<_>>()
    };
    let (big, pair) = (("big".to_owned(), false, 2), ("big@small".to_owned(), true, 2));
    assert_eq!(names(Encoding::Ids), [big.clone(), pair.clone()]);
    assert_eq!(names(Encoding::Auto), [big, ("big@other".to_owned(), true, 2), pair]);
}
