//! The course of one answer over its attempts: whatever dies on the way, what comes out is one
//! answer. When a node is lost before the draft is decided, another drafter or another base goes on
//! from what is known; afterwards only the base matters. See `docs/adr/0008-resume.md`.

use headstart_cluster::{NodeRecord, Tier};
use headstart_proto::v1::base_client::BaseClient;
use headstart_proto::{Epoch, Error, ErrorCode, NodeId, RequestId, v1};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::attempt::{Attempt, DraftPlan, Lost, Patience, ServePlan};
use crate::frames::{Decision, ServeEvent};
use crate::generate::Plan;
use crate::options::OnNoDrafter;
use crate::progress::Progress;
use crate::retry::{self, Blame, History, Situation, Verdict};
use crate::route::{self, Candidate, Part};

/// See the [module](self).
pub(crate) struct Course<'a> {
    plan: &'a Plan,
    request_id: RequestId,
    seed: u64,
    /// Of the latest `Serve` or `Draft`: it grows with each.
    epoch: Epoch,
    /// Of the latest `Serve`.
    serve_epoch: Epoch,
    base: NodeRecord,
    /// The base that writes on what `base` reads; it follows already.
    writer: Option<NodeRecord>,
    attempt: Option<Attempt>,
    /// Of the base that gave the answer up: while its stream lives, so does the lease of its KV.
    _leaving: Option<Attempt>,
    /// The call that lets `writer` follow.
    _following: Option<AbortOnDropHandle<()>>,
    progress: Progress,
    /// What failed since the answer last moved on, and which nodes it was.
    history: History,
    avoid: Vec<NodeId>,
    interrupted: Option<Instant>,
}

impl<'a> Course<'a> {
    /// Starts answer number `choice` on the nodes that `plan` names.
    ///
    /// # Errors
    /// When a node's address is malformed.
    pub(crate) fn start(plan: &'a Plan, choice: u32) -> Result<Self, Error> {
        let request_id = RequestId::new(&format!("{}-{choice}", plan.head.request_id))?;
        plan.core.budget.request(plan.core.uptime());
        let mut course = Self {
            plan,
            request_id,
            seed: plan.seed.wrapping_add(choice.into()),
            epoch: Epoch::FIRST,
            serve_epoch: Epoch::FIRST,
            base: plan.base.clone(),
            writer: None,
            attempt: None,
            _leaving: None,
            _following: None,
            progress: Progress::default(),
            history: History::default(),
            avoid: Vec::new(),
            interrupted: None,
        };
        let drafter = plan.drafter.as_ref().map(|(record, _)| record.clone());
        course.open(drafter.as_ref())?;
        Ok(course)
    }

    /// The draft's fate, once it is known.
    pub(crate) fn decision(&self) -> Option<Decision> {
        self.progress.decision()
    }

    /// What happens next in the answer. Nothing comes after [`ServeEvent::Finished`].
    ///
    /// # Errors
    /// When the answer cannot go on.
    pub(crate) async fn next(&mut self) -> Result<ServeEvent, Error> {
        loop {
            let Some(attempt) = &mut self.attempt else {
                return Err(Error::internal("an answer without an attempt"));
            };
            match attempt.next(&mut self.progress).await {
                Ok(event @ ServeEvent::Moved { .. }) => {
                    self.progress.take(&event);
                    self._leaving = self.attempt.take().map(Attempt::without_draft);
                    self.moved().await?;
                }
                Ok(event) => {
                    self.progress.take(&event);
                    self._leaving = None;
                    self.went_on();
                    return Ok(event);
                }
                Err(lost) => {
                    self.count(lost.tier, lost.error.code.code());
                    self.recover(lost).await?;
                }
            }
        }
    }

    /// The answer moved on: earlier failures are over.
    fn went_on(&mut self) {
        if let Some(interrupted) = self.interrupted.take() {
            self.plan.core.metrics.went_on(interrupted.elapsed());
            self.history = History::default();
            self.avoid.clear();
        }
    }

    /// The base gave the answer up in good order: that is no failure, but it goes on elsewhere.
    async fn moved(&mut self) -> Result<(), Error> {
        if self.writer.is_some() {
            // As planned.
            if self.reopen().is_ok() {
                return Ok(());
            }
        }
        self.count(Tier::Base, "moved");
        let node_id = self.base.node_id.clone();
        let error = Error::new(ErrorCode::Draining, format!("base {node_id} gave the answer up"));
        self.recover(Lost { tier: Tier::Base, node_id, error, blame: Blame::Failed }).await
    }

    /// Goes on without a node that was lost.
    async fn recover(&mut self, lost: Lost) -> Result<(), Error> {
        let Lost { tier, node_id, mut error, blame } = lost;
        let interrupted = *self.interrupted.get_or_insert_with(Instant::now);
        if tier == Tier::Base {
            self.attempt = None;
        }
        tracing::debug!(
            request_id = %self.request_id, %tier, %node_id, %error, ?blame,
            tokens = self.progress.tokens(), failures = self.history.failures, "attempt was lost"
        );
        self.avoid.push(node_id);
        self.history.failed(tier, blame);
        loop {
            let late = interrupted.elapsed() >= self.plan.core.options.resume_timeout;
            let situation = Situation {
                code: error.code,
                begun: self.progress.tokens() > 0,
                elsewhere: self.elsewhere(tier),
                late,
            };
            let jitter = self.plan.core.chance.unit();
            let pause = match retry::decide(self.history, situation, jitter) {
                Verdict::Now => None,
                Verdict::After(pause) => Some(pause),
                Verdict::Refuse => return Err(error),
                Verdict::Poison => {
                    return Err(retry::poison(tier, self.progress.tokens(), &error));
                }
            };
            if let Some(pause) = pause {
                tokio::time::sleep(pause).await;
            }
            // A node that says it is going away beats nobody to death.
            let planned = error.code == ErrorCode::Draining;
            if !planned && !self.plan.core.budget.take(self.plan.core.uptime()) {
                self.plan.core.metrics.retry_refused();
                if !situation.begun {
                    return Err(error);
                }
                self.history.failed(tier, Blame::Failed);
                tokio::time::sleep(retry::pause(self.history.failures, jitter)).await;
                continue;
            }
            let opened = match tier {
                Tier::Base => self.reopen(),
                Tier::Drafter => self.redraft(),
            };
            match opened {
                Ok(()) => return Ok(()),
                Err(none) => {
                    error = none;
                    self.history.failed(tier, Blame::Failed);
                }
            }
        }
    }

    /// Whether a node of `tier` that did not fail could go on.
    fn elsewhere(&self, tier: Tier) -> bool {
        let view = self.plan.core.view();
        let snapshot = self.plan.core.nodes.snapshot(&view);
        let (candidates, record) = match (tier, &self.plan.drafter) {
            (Tier::Base, _) => (&snapshot.bases, &self.plan.base),
            (Tier::Drafter, Some((record, _))) => (&snapshot.drafters, record),
            (Tier::Drafter, None) => return false,
        };
        let part = self.part(candidates);
        let successor = route::successor(candidates, record, &self.avoid, part);
        successor.is_some_and(|(_, elsewhere)| elsewhere)
    }

    /// Opens a base again, and a draft if it is still wanted.
    fn reopen(&mut self) -> Result<(), Error> {
        let view = self.plan.core.view();
        let snapshot = self.plan.core.nodes.snapshot(&view);
        let part = self.part(&snapshot.bases);
        let follows = self.writer.take().filter(|writer| {
            let live = route::is_live(&snapshot.bases, writer);
            part == Part::Write && live && !self.avoid.contains(&writer.node_id)
        });
        if let Some(writer) = follows {
            self.base = writer;
            self.epoch = self.epoch.next();
            self.serve_epoch = self.epoch;
            return self.open(None);
        }
        self._following = None;
        let base = route::successor(&snapshot.bases, &self.plan.base, &self.avoid, part);
        let base = base.ok_or_else(|| no_node(ErrorCode::NoBase, &self.plan.base))?.0.clone();
        let drafter = match self.progress.settled() {
            Some(_) => None,
            None => self.drafter()?,
        };
        self.base = base;
        self.epoch = self.epoch.next();
        self.serve_epoch = self.epoch;
        self.open(drafter.as_ref())
    }

    /// Opens another draft for the base's stream.
    fn redraft(&mut self) -> Result<(), Error> {
        let Some(drafter) = self.drafter()? else { return Ok(()) };
        self.epoch = self.epoch.next();
        let plan = self.draft_plan(&drafter)?;
        if let Some(attempt) = &mut self.attempt {
            attempt.replace_draft(plan);
        }
        Ok(())
    }

    /// The drafter that goes on; `None` if nobody drafts.
    fn drafter(&self) -> Result<Option<NodeRecord>, Error> {
        let Some((record, _)) = &self.plan.drafter else { return Ok(None) };
        let view = self.plan.core.view();
        let snapshot = self.plan.core.nodes.snapshot(&view);
        match route::successor(&snapshot.drafters, record, &self.avoid, Part::Whole) {
            Some((drafter, _)) => Ok(Some(drafter.clone())),
            None => Err(no_node(ErrorCode::NoDrafter, record)),
        }
    }

    /// Opens an attempt at `self.base`, with a draft by `drafter`.
    fn open(&mut self, drafter: Option<&NodeRecord>) -> Result<(), Error> {
        let draft = drafter.map(|drafter| self.draft_plan(drafter)).transpose()?;
        self.writer = drafter.and_then(|_| self.prefetch());
        let serve = self.serve_plan()?;
        self.attempt = Some(Attempt::open(serve, draft, &self.progress));
        Ok(())
    }

    /// The part that a base is sought for now.
    fn part(&self, bases: &[Candidate<'_>]) -> Part {
        route::part(bases, &self.plan.base, self.progress.settled().is_some())
    }

    /// Lets the base that will write on follow the one that reads, until it has the answer or the
    /// answer is over. It is only a hint: nobody waits for what comes of it.
    fn prefetch(&mut self) -> Option<NodeRecord> {
        let core = &self.plan.core;
        let view = core.view();
        let bases = core.nodes.snapshot(&view).bases;
        let writer = route::writer_for(&bases, &self.base, &self.avoid)?.clone();
        if !self.base.kv_address.is_empty()
            && let Ok(link) = core.nodes.link(&writer)
        {
            let request = v1::PrefetchRequest {
                request_id: self.request_id.to_string(),
                epoch: self.epoch.next().get(),
                kv: Some(v1::KvSource {
                    address: self.base.kv_address.clone(),
                    request_id: self.request_id.to_string(),
                    epoch: self.serve_epoch.get(),
                }),
            };
            let following = tokio::spawn(async move {
                if let Err(error) = BaseClient::new(link).prefetch(request).await {
                    tracing::debug!(%error, "a base does not prefetch");
                }
            });
            self._following = Some(AbortOnDropHandle::new(following));
        }
        Some(writer)
    }

    fn serve_plan(&self) -> Result<ServePlan, Error> {
        let Plan { core, ask, prompts, drafter, .. } = self.plan;
        let view = core.view();
        let bases = core.nodes.snapshot(&view).bases;
        core.metrics.attempt(Tier::Base);
        let request = v1::ServeRequest {
            request_id: self.request_id.to_string(),
            epoch: self.serve_epoch.get(),
            prompt_ids: prompts.base.ids.clone(),
            prompt_text: prompts.base.text.clone(),
            max_tokens: self.plan.max_tokens,
            sampling: Some(self.sampling()),
            top_logprobs: ask.top_logprobs,
            draft: drafter.as_ref().map(|(_, encoding)| self.policy(*encoding)),
            resume: self.progress.resume(),
            move_when_decided: self.writer.is_some(),
            movable: route::has_successor(&bases, &self.base),
        };
        Ok(ServePlan {
            request_id: self.request_id.clone(),
            epoch: self.serve_epoch,
            node_id: self.base.node_id.clone(),
            place: core.nodes.place(&self.base)?,
            request,
            patience: Patience {
                first_frame: core.options.first_frame_timeout,
                frame: core.options.frame_timeout,
            },
        })
    }

    fn draft_plan(&self, drafter: &NodeRecord) -> Result<DraftPlan, Error> {
        let Plan { core, ask, prompts, .. } = self.plan;
        let (Some((_, encoding)), Some(prompt)) = (&self.plan.drafter, &prompts.drafter) else {
            return Err(Error::internal("a draft that nobody asked for"));
        };
        let view = core.view();
        let drafters = core.nodes.snapshot(&view).drafters;
        core.metrics.attempt(Tier::Drafter);
        let request = v1::DraftRequest {
            request_id: self.request_id.to_string(),
            epoch: self.epoch.get(),
            prompt_ids: prompt.ids.clone(),
            draft_tokens_max: ask.draft_tokens_max.unwrap_or(core.options.draft_tokens_max),
            sampling: Some(v1::Sampling {
                temperature: Some(core.options.draft_temperature),
                seed: Some(self.seed),
                ..Default::default()
            }),
            base_address: self.base.address.clone(),
            encoding: (*encoding).into(),
            serve_epoch: self.serve_epoch.get(),
            prefix_ids: self.progress.prefix(*encoding),
            movable: route::has_successor(&drafters, drafter),
        };
        let place = core.nodes.place(drafter)?;
        Ok(DraftPlan { node_id: drafter.node_id.clone(), place, request })
    }

    fn policy(&self, encoding: v1::DraftEncoding) -> v1::DraftPolicy {
        let options = &self.plan.core.options;
        v1::DraftPolicy {
            window: self.plan.window,
            threshold: self.plan.threshold,
            encoding: encoding.into(),
            on_draft_complete: options.on_draft_complete.wire().into(),
            continue_empty_draft: options.on_no_drafter == OnNoDrafter::BaseOnly,
        }
    }

    fn sampling(&self) -> v1::Sampling {
        let sampling = &self.plan.ask.sampling;
        v1::Sampling {
            temperature: Some(sampling.temperature),
            top_p: Some(sampling.top_p),
            top_k: Some(sampling.top_k),
            min_p: Some(sampling.min_p),
            seed: Some(self.seed),
            presence_penalty: Some(sampling.presence_penalty),
            frequency_penalty: Some(sampling.frequency_penalty),
        }
    }

    fn count(&self, tier: Tier, cause: &'static str) {
        let phase = match (self.progress.tokens(), self.progress.decision()) {
            (_, Some(_)) => "write",
            (0, None) => "start",
            (_, None) => "draft",
        };
        self.plan.core.metrics.failover(tier, phase, cause);
    }
}

fn no_node(code: ErrorCode, like: &NodeRecord) -> Error {
    Error::new(code, format!("no {} is up for model {:?}", like.tier, like.model))
}
