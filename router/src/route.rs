//! Which base and which drafter serve a request: a total order over a snapshot. Nothing here has
//! side effects, knows a clock or opens a connection.

use std::cmp::Reverse;
use std::time::Duration;

use headstart_cluster::{BaseRole, NodeRecord};
use headstart_proto::{Error, ErrorCode, NodeId, v1};

use crate::options::{Encoding, OnNoDrafter};

/// A node that takes new work, and how it does at the moment.
#[derive(Clone, Debug)]
pub(crate) struct Candidate<'a> {
    /// What it tells about itself.
    pub(crate) record: &'a NodeRecord,
    /// Answers this router runs on it now.
    pub(crate) in_flight: u32,
    /// How long it has been suspected to be gone; `None` while it is believed to be well.
    pub(crate) suspected_for: Option<Duration>,
}

/// Every node that might serve, draining ones included.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot<'a> {
    /// The bases.
    pub(crate) bases: Vec<Candidate<'a>>,
    /// The drafters.
    pub(crate) drafters: Vec<Candidate<'a>>,
}

/// The part of an answer's life that a node is sought for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// To read the prompt and the draft, for another base to write on.
    Score,
    /// To write on what was read.
    Write,
    /// All of it.
    Whole,
}

impl Part {
    /// Whether a node of this role is there for it. One that is not serves all the same where
    /// nobody else is.
    fn suits(self, role: BaseRole) -> bool {
        match role {
            BaseRole::Unified => true,
            BaseRole::Score => self == Self::Score,
            BaseRole::Decode => self == Self::Write,
        }
    }
}

/// How good a choice a node is: the least is the best. The order of the fields is the order of
/// their importance; the id decides between equals, so that the order is total.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    suspected: bool,
    /// Among suspected nodes, the one that had the longest time to come back.
    suspected_for: Reverse<Duration>,
    /// It has another part of an answer's life as its own.
    unsuited: bool,
    load_permille: u64,
    in_flight: u32,
    node_id: NodeId,
}

impl Candidate<'_> {
    /// `up`, `suspected` or `draining`.
    pub(crate) fn state(&self) -> &'static str {
        match (self.record.draining, self.suspected_for) {
            (true, _) => "draining",
            (false, Some(_)) => "suspected",
            (false, None) => "up",
        }
    }

    fn score(&self, part: Part) -> Score {
        let slots = u64::from(self.record.slots.max(1));
        Score {
            suspected: self.suspected_for.is_some(),
            suspected_for: Reverse(self.suspected_for.unwrap_or_default()),
            unsuited: !part.suits(self.record.base_role),
            load_permille: u64::from(self.in_flight) * 1000 / slots,
            in_flight: self.in_flight,
            node_id: self.record.node_id.clone(),
        }
    }
}

/// What the client and the operator say about the choice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    /// A base's name, or `base@drafter`.
    pub(crate) model: &'a str,
    /// The drafter named beside it.
    pub(crate) drafter: Option<&'a str>,
    /// How drafts travel.
    pub(crate) encoding: Encoding,
    /// What happens when no drafter is up.
    pub(crate) on_no_drafter: OnNoDrafter,
}

/// The choice.
#[derive(Clone, Debug)]
pub(crate) struct Route<'a> {
    /// The base that answers, or that reads for another one (see [`writer_for`]).
    pub(crate) base: &'a NodeRecord,
    /// The drafter that begins, and how its draft travels; `None`: the base answers alone.
    pub(crate) drafter: Option<(&'a NodeRecord, v1::DraftEncoding)>,
}

/// Picks a base and a drafter.
///
/// # Errors
/// Unknown names, names that contradict each other, and nobody there to serve.
pub(crate) fn pick<'a>(snapshot: &Snapshot<'a>, wish: &Wish<'_>) -> Result<Route<'a>, Error> {
    let (model, suffix) = split_model(snapshot, wish.model)?;
    let wanted = match (suffix, wish.drafter) {
        (Some(suffix), Some(named)) if suffix != named => {
            let message = format!(
                "headstart.drafter ({}) and the model name ({}) name different drafters",
                shown(named),
                shown(wish.model)
            );
            return Err(Error::invalid("headstart.drafter", message));
        }
        (suffix, named) => suffix.or(named),
    };
    let writes = |base: &Candidate<'_>| {
        let record = base.record;
        record.model == model
            && record.base_role == BaseRole::Decode
            && !record.draining
            && base.suspected_for.is_none()
    };
    let part = if snapshot.bases.iter().any(writes) { Part::Score } else { Part::Whole };
    let base = best(snapshot.bases.iter().filter(|base| base.record.model == model), part)
        .ok_or_else(|| {
            let message = format!("no base is up for model {}", shown(model));
            Error::new(ErrorCode::NoBase, message)
        })?
        .record;
    let drafter = pick_drafter(snapshot, wanted, base, wish)?;
    Ok(Route { base, drafter })
}

/// Whether the client chose the drafter. Only for a wish that [`pick`] grants.
pub(crate) fn names_drafter(snapshot: &Snapshot<'_>, wish: &Wish<'_>) -> bool {
    wish.drafter.is_some()
        || split_model(snapshot, wish.model).is_ok_and(|(_, suffix)| suffix.is_some())
}

fn pick_drafter<'a>(
    snapshot: &Snapshot<'a>,
    wanted: Option<&str>,
    base: &NodeRecord,
    wish: &Wish<'_>,
) -> Result<Option<(&'a NodeRecord, v1::DraftEncoding)>, Error> {
    let named: Vec<&Candidate<'a>> = snapshot
        .drafters
        .iter()
        .filter(|drafter| wanted.is_none_or(|name| drafter.record.model == name))
        .collect();
    if let (Some(name), true, false) = (wanted, named.is_empty(), snapshot.drafters.is_empty()) {
        let message = format!("there is no drafter {}", shown(name));
        return Err(Error::new(ErrorCode::UnknownDrafter, message).with_field("headstart.drafter"));
    }
    let fits = |drafter: &&Candidate<'a>| encoding(wish.encoding, drafter.record, base).is_some();
    if !named.is_empty() && !named.iter().any(fits) {
        let message = format!(
            "drafts travel as token ids here (encoding = ids), and no drafter has the tokenizer of {}",
            shown(&base.model)
        );
        return Err(Error::new(ErrorCode::NoDrafter, message));
    }
    let chosen = best(named.into_iter().filter(fits), Part::Whole);
    match (chosen, wanted, wish.on_no_drafter) {
        (Some(drafter), ..) => {
            let encoding = encoding(wish.encoding, drafter.record, base);
            Ok(encoding.map(|encoding| (drafter.record, encoding)))
        }
        (None, None, OnNoDrafter::BaseOnly) => Ok(None),
        (None, Some(name), _) => {
            let message = format!("drafter {} is not up", shown(name));
            Err(Error::new(ErrorCode::NoDrafter, message))
        }
        (None, None, OnNoDrafter::Reject) => {
            Err(Error::new(ErrorCode::NoDrafter, "no drafter is up"))
        }
    }
}

/// The node to take over from `record`'s: it must run the same model with the same text side. One
/// that is in `avoid` is the last choice. The second value: whether the node is none of those.
pub(crate) fn successor<'a>(
    candidates: &[Candidate<'a>],
    record: &NodeRecord,
    avoid: &[NodeId],
    part: Part,
) -> Option<(&'a NodeRecord, bool)> {
    let same = candidates
        .iter()
        .filter(|node| is_like(node.record, record))
        .map(|node| (node, avoid.contains(&node.record.node_id)));
    let live = same.filter(|(node, _)| !node.record.draining);
    let (chosen, avoided) = live.min_by_key(|(node, avoided)| (*avoided, node.score(part)))?;
    Some((chosen.record, !avoided))
}

/// The part that a base is sought for: the draft is decided, or a base may write on for it, or not.
pub(crate) fn part(candidates: &[Candidate<'_>], record: &NodeRecord, decided: bool) -> Part {
    match decided {
        true => Part::Write,
        false if writer_like(candidates, record, &[]).is_some() => Part::Score,
        false => Part::Whole,
    }
}

/// The base that writes on what `record`'s has read, if that one only reads and another one is up.
pub(crate) fn writer_for<'a>(
    candidates: &[Candidate<'a>],
    record: &NodeRecord,
    avoid: &[NodeId],
) -> Option<&'a NodeRecord> {
    (record.base_role == BaseRole::Score).then(|| writer_like(candidates, record, avoid)).flatten()
}

fn writer_like<'a>(
    candidates: &[Candidate<'a>],
    record: &NodeRecord,
    avoid: &[NodeId],
) -> Option<&'a NodeRecord> {
    let writes = |node: &&Candidate<'a>| {
        let other = node.record;
        other.base_role == BaseRole::Decode
            && node.suspected_for.is_none()
            && is_like(other, record)
            && !avoid.contains(&other.node_id)
    };
    best(candidates.iter().filter(writes), Part::Write).map(|node| node.record)
}

/// Whether `record`'s node is up and takes new work.
pub(crate) fn is_live(candidates: &[Candidate<'_>], record: &NodeRecord) -> bool {
    candidates.iter().any(|node| {
        let same = node.record.node_id == record.node_id;
        same && node.record.incarnation == record.incarnation && !node.record.draining
    })
}

/// Whether a node other than `record`'s could go on with what that one does.
pub(crate) fn has_successor(candidates: &[Candidate<'_>], record: &NodeRecord) -> bool {
    candidates.iter().any(|node| {
        let other = node.record;
        other.node_id != record.node_id && !other.draining && is_like(other, record)
    })
}

/// Whether an answer that `record`'s node began means the same on `other`'s, and fits it.
fn is_like(other: &NodeRecord, record: &NodeRecord) -> bool {
    other.model == record.model
        && other.text_fingerprint == record.text_fingerprint
        && other.tokenizer_fingerprint == record.tokenizer_fingerprint
        && other.context_length >= record.context_length
}

/// The least-scored node that takes new work.
fn best<'s, 'a: 's>(
    candidates: impl Iterator<Item = &'s Candidate<'a>>,
    part: Part,
) -> Option<&'s Candidate<'a>> {
    candidates.filter(|node| !node.record.draining).min_by_key(|node| node.score(part))
}

/// How a draft travels between the two, or `None` when `setting` forbids the pair.
fn encoding(
    setting: Encoding,
    drafter: &NodeRecord,
    base: &NodeRecord,
) -> Option<v1::DraftEncoding> {
    let equal = drafter.tokenizer_fingerprint == base.tokenizer_fingerprint;
    match (setting, equal) {
        (Encoding::Auto | Encoding::Ids, true) => Some(v1::DraftEncoding::Ids),
        (Encoding::Auto, false) | (Encoding::Text, _) => Some(v1::DraftEncoding::Text),
        (Encoding::Ids, false) => None,
    }
}

/// Splits `base@drafter`. A base whose own name has an `@` is found first.
fn split_model<'m>(
    snapshot: &Snapshot<'_>,
    model: &'m str,
) -> Result<(&'m str, Option<&'m str>), Error> {
    let is_base = |name: &str| snapshot.bases.iter().any(|base| base.record.model == name);
    if is_base(model) {
        return Ok((model, None));
    }
    for (at, _) in model.rmatch_indices('@') {
        let (base, drafter) = (&model[..at], &model[at + 1..]);
        if is_base(base) && !drafter.is_empty() {
            return Ok((base, Some(drafter)));
        }
    }
    if snapshot.bases.is_empty() {
        return Err(Error::new(ErrorCode::NoBase, "no base is up"));
    }
    let message = format!("there is no model {}", shown(model));
    Err(Error::new(ErrorCode::UnknownModel, message).with_field("model"))
}

/// A name from outside, for an error message.
fn shown(name: &str) -> String {
    format!("{:?}", &name[..name.floor_char_boundary(80)])
}

/// A model clients can name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModelEntry {
    /// The name.
    pub(crate) id: String,
    /// It is `base@drafter`.
    pub(crate) pair: bool,
    /// Bases that serve it.
    pub(crate) nodes: u32,
    /// Tokens a conversation may have.
    pub(crate) context_length: u32,
}

/// Every name a client may use: the bases, and each with each drafter that fits it. Sorted.
pub(crate) fn models(snapshot: &Snapshot<'_>, setting: Encoding) -> Vec<ModelEntry> {
    let mut entries = std::collections::BTreeMap::<String, ModelEntry>::new();
    let live = |node: &&Candidate<'_>| !node.record.draining;
    let mut add = |id: String, pair: bool, context_length: u32| {
        let fresh = ModelEntry { id: id.clone(), pair, nodes: 0, context_length };
        let entry = entries.entry(id).or_insert(fresh);
        entry.nodes += 1;
        entry.context_length = entry.context_length.min(context_length);
    };
    for base in snapshot.bases.iter().filter(live) {
        let base = base.record;
        add(base.model.clone(), false, base.context_length);
        let mut names: Vec<&str> = snapshot
            .drafters
            .iter()
            .filter(live)
            .filter(|drafter| encoding(setting, drafter.record, base).is_some())
            .map(|drafter| drafter.record.model.as_str())
            .collect();
        names.sort_unstable();
        names.dedup();
        for drafter in names {
            add(format!("{}@{drafter}", base.model), true, base.context_length);
        }
    }
    entries.into_values().collect()
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
