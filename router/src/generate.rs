//! The life of a request, whichever door it came through: admit, pick, render, check lengths, and
//! one task that owns everything until the last token. Dropping the [`Generation`] ends the task,
//! and with it both nodes' streams, the places on them and the place in the router.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::StreamExt;
use futures::future::{BoxFuture, join_all};
use futures::stream::FuturesUnordered;
use headstart_cluster::{NodeRecord, View};
use headstart_proto::{Error, ErrorCode, RequestId, v1};
use headstart_text::{ModelText, Tokenizer};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::admission::{self, Admission, Caller, Callers, Permit};
use crate::answer::Answer;
use crate::ask::{Ask, PRIORITY_HEADER, check_priority};
use crate::chance::Chance;
use crate::course::Course;
use crate::frames::{Decision, FinishReason, ServeEvent, Source};
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::options::{OnNoDrafter, RouterOptions};
use crate::outbox::{Event, Inbox, Outbox, Summary, outbox};
use crate::prompts::{self, Prompts};
use crate::retry::Budget;
use crate::route::{self, ModelEntry, Wish};
use crate::texts::Texts;

/// How soon a tokenizer that could not be fetched is asked for again.
const TEXT_RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// What every request shares.
#[derive(Debug)]
pub(crate) struct Core {
    /// What the operator set.
    pub(crate) options: RouterOptions,
    /// What is measured.
    pub(crate) metrics: Metrics,
    pub(crate) chance: Arc<Chance>,
    pub(crate) nodes: Nodes,
    /// The retries that all requests share.
    pub(crate) budget: Budget,
    started: Instant,
    texts: Texts,
    view: watch::Receiver<Arc<View>>,
    admission: Arc<Admission>,
    callers: Callers,
    /// No new requests are taken.
    pub(crate) draining: CancellationToken,
    /// Live requests are cut off.
    pub(crate) cut: CancellationToken,
    /// The tasks of live requests.
    pub(crate) tasks: TaskTracker,
}

/// What is known of a request before its first token.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    /// The request.
    pub(crate) request_id: RequestId,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// The model as the client named it.
    pub(crate) model: Arc<str>,
    /// The base's model name.
    pub(crate) base: Arc<str>,
    /// The drafter's model name; `None` where no drafter takes part.
    pub(crate) drafter: Option<Arc<str>>,
    /// The base's prompt.
    pub(crate) prompt_ids: Arc<[u32]>,
    /// The base's tokenizer.
    pub(crate) tokenizer: Tokenizer,
    /// Answers asked for.
    pub(crate) choices: u32,
}

impl Head {
    /// Tokens of the base's prompt.
    pub(crate) fn prompt_tokens(&self) -> u32 {
        u32::try_from(self.prompt_ids.len()).unwrap_or(u32::MAX)
    }

    /// Who begins the answers.
    pub(crate) fn first_source(&self) -> Source {
        if self.drafter.is_some() { Source::Drafter } else { Source::Base }
    }
}

/// A request that runs. Dropping it ends it everywhere.
#[derive(Debug)]
pub(crate) struct Generation {
    /// What is known of it.
    pub(crate) head: Head,
    inbox: Inbox,
    work: Work,
}

/// Who runs a request.
enum Work {
    /// A task of its own: what its client does not read yet gathers meanwhile.
    Task {
        _task: AbortOnDropHandle<()>,
    },
    /// Whoever waits for its events, so that nobody has to be woken.
    Here(BoxFuture<'static, ()>),
    Over,
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Task { .. } => "Task",
            Self::Here(_) => "Here",
            Self::Over => "Over",
        })
    }
}

impl Generation {
    /// A request that runs by itself.
    pub(crate) fn spawned(self) -> Self {
        let work = match self.work {
            Work::Here(run) => Work::Task { _task: AbortOnDropHandle::new(tokio::spawn(run)) },
            work => work,
        };
        Self { work, ..self }
    }

    /// What has happened in it, at least one event; `None` after the last one.
    pub(crate) async fn recv(&mut self) -> Option<VecDeque<Event>> {
        poll_fn(|cx| {
            if let Work::Here(run) = &mut self.work
                && run.as_mut().poll(cx).is_ready()
            {
                self.work = Work::Over;
            }
            self.inbox.poll_recv(cx)
        })
        .await
    }
}

/// Counts a request's outcome once, whatever way it ends.
struct Outcome {
    core: Arc<Core>,
    error: Option<ErrorCode>,
}

impl Drop for Outcome {
    fn drop(&mut self) {
        self.core.metrics.ended(self.error);
    }
}

impl Core {
    /// A core that knows the nodes in `view`.
    pub(crate) fn new(options: RouterOptions, view: watch::Receiver<Arc<View>>) -> Arc<Self> {
        let metrics = Metrics::new();
        let chance = Arc::new(Chance::new(options.chance_seed));
        let core = Arc::new(Self {
            admission: Admission::new(&options, metrics.clone()),
            callers: Callers::new(options.api_keys.clone()),
            metrics,
            nodes: Nodes::new(&options, Arc::clone(&chance)),
            chance,
            budget: Budget::default(),
            started: Instant::now(),
            texts: Texts::new(options.texts_max, options.read_timeout),
            view,
            draining: CancellationToken::new(),
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
            options,
        });
        core.resize();
        core
    }

    /// Who asks, by the headers of the request.
    ///
    /// # Errors
    /// [`ErrorCode::Unauthenticated`], and a priority that is none.
    pub(crate) fn caller(
        &self,
        authorization: Option<&str>,
        priority: Option<&str>,
    ) -> Result<Caller, Error> {
        let tenant = self.callers.tenant(authorization)?;
        let class = priority.map(|name| check_priority(PRIORITY_HEADER, name)).transpose()?;
        Ok(Caller { tenant, class })
    }

    /// Takes no new requests, and tells those that wait to go elsewhere.
    pub(crate) fn drain(&self) {
        self.draining.cancel();
        self.admission.close();
    }

    /// Admits what the nodes can hold now.
    fn resize(&self) {
        let view = self.view();
        self.admission.resize(&self.nodes.snapshot(&view), self.options.in_flight_max);
    }

    /// Brings the metrics of the nodes up to date.
    pub(crate) fn measure_nodes(&self) {
        let view = self.view();
        self.metrics.nodes(&self.nodes.snapshot(&view));
    }

    /// Time since the router's start.
    pub(crate) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// A base and a drafter that take new work are known, with their tokenizers.
    pub(crate) fn is_ready(&self) -> bool {
        let view = self.view();
        let ready =
            |record: &NodeRecord| !record.draining && self.texts.has(&record.text_fingerprint);
        let up = |tier| view.tier(tier).any(ready);
        let drafter = up(headstart_cluster::Tier::Drafter)
            || self.options.on_no_drafter == OnNoDrafter::BaseOnly;
        up(headstart_cluster::Tier::Base) && drafter && !self.draining.is_cancelled()
    }

    /// Places taken for answers in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.admission.held()
    }

    /// The names clients may use.
    pub(crate) fn models(&self) -> Vec<ModelEntry> {
        let view = self.view();
        route::models(&self.nodes.snapshot(&view), self.options.encoding)
    }

    /// Follows the view until `self.cut`: forgets nodes that left, and fetches the texts of those
    /// that came, so that the first request finds them.
    pub(crate) async fn follow_view(self: Arc<Self>) {
        let mut changes = self.view.clone();
        loop {
            let view = Arc::clone(&changes.borrow_and_update());
            self.nodes.retain(&view);
            self.resize();
            let follow_suspicions = async {
                loop {
                    self.nodes.changed().await;
                    self.resize();
                }
            };
            let warm = async {
                while !self.fetch_texts(&view).await {
                    tokio::time::sleep(TEXT_RETRY_INTERVAL).await;
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                biased;
                () = self.cut.cancelled() => return,
                changed = changes.changed() => if changed.is_err() { return },
                () = warm => {}
                () = follow_suspicions => {}
            }
        }
    }

    /// Fetches the texts of the view's models that are not here yet. Returns whether all are.
    async fn fetch_texts(&self, view: &View) -> bool {
        let records = view.nodes.values().filter(|record| !record.draining);
        let fetches = records.map(|record| async {
            let fetched = self.texts.get(record, &self.nodes, view).await;
            fetched.inspect_err(|error| tracing::warn!(%error, "a node is not ready")).is_ok()
        });
        join_all(fetches).await.into_iter().all(|fetched| fetched)
    }

    /// Starts a request. It goes on whenever its events are waited for, and by itself once it is
    /// [`Generation::spawned`].
    ///
    /// # Errors
    /// Everything that can be told before a node is asked for an answer.
    pub(crate) async fn generate(
        self: &Arc<Self>,
        ask: Ask,
        caller: Caller,
    ) -> Result<Generation, Error> {
        let mut outcome = Outcome { core: Arc::clone(self), error: Some(ErrorCode::Cancelled) };
        let started = Box::pin(self.prepare(ask, caller)).await;
        match started {
            Ok((head, plan, permit)) => {
                let (outbox, inbox) = outbox(self.options.reader_bytes_max);
                let run = plan.run(permit, outcome, outbox);
                let work = Work::Here(Box::pin(self.tasks.track_future(run)));
                Ok(Generation { head, inbox, work })
            }
            Err(error) => {
                outcome.error = Some(error.code);
                Err(error)
            }
        }
    }

    async fn prepare(
        self: &Arc<Self>,
        ask: Ask,
        caller: Caller,
    ) -> Result<(Head, Plan, Permit), Error> {
        let arrived = Instant::now();
        let permit = self.admit(&ask, caller).await?;
        let view = self.view();
        let route = route::pick(&self.nodes.snapshot(&view), &self.wish(&ask))?;
        let (base, drafter) = (route.base, route.drafter);
        let drafter_text = async {
            match drafter {
                Some((record, _)) => self.texts.get(record, &self.nodes, &view).await.map(Some),
                None => Ok(None),
            }
        };
        let (base_text, drafter_text) =
            tokio::try_join!(self.texts.get(base, &self.nodes, &view), drafter_text)?;
        let prompts = prompts::render(ask.messages.clone(), &base_text, drafter_text).await?;
        let drafter_context = drafter.map(|(record, _)| record.context_length);
        let max_tokens =
            prompts.max_tokens(base.context_length, drafter_context, ask.max_tokens)?;
        permit.correct(
            prompts.base.ids.len(),
            prompts.drafter.as_ref().map(|prompt| prompt.ids.len()),
            max_tokens,
        );
        let head = Head {
            request_id: RequestId::generate(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
            model: ask.model.as_str().into(),
            base: base.model.as_str().into(),
            drafter: drafter.map(|(record, _)| record.model.as_str().into()),
            prompt_ids: prompts.base.ids.as_slice().into(),
            tokenizer: base_text.tokenizer().clone(),
            choices: ask.choices,
        };
        let plan = Plan {
            core: Arc::clone(self),
            arrived,
            head: head.clone(),
            base: base.clone(),
            drafter: drafter.map(|(record, encoding)| (record.clone(), encoding)),
            seed: ask.sampling.seed.unwrap_or_else(|| self.chance.bits()),
            stops: stops(&ask, &base_text),
            window: ask.window.unwrap_or(self.options.window),
            threshold: ask.threshold.unwrap_or(self.options.threshold),
            max_tokens,
            prompts,
            ask,
        };
        Ok((head, plan, permit))
    }

    fn wish<'a>(&self, ask: &'a Ask) -> Wish<'a> {
        Wish {
            model: &ask.model,
            drafter: ask.drafter.as_deref(),
            encoding: self.options.encoding,
            on_no_drafter: self.options.on_no_drafter,
        }
    }

    /// Waits for a place. Names that nobody serves are told at once.
    async fn admit(&self, ask: &Ask, caller: Caller) -> Result<Permit, Error> {
        if self.draining.is_cancelled() {
            return Err(Error::new(ErrorCode::Draining, "the router is shutting down"));
        }
        let view = self.view();
        let wish = self.wish(ask);
        let (base, drafter, named) = {
            let snapshot = self.nodes.snapshot(&view);
            let route = route::pick(&snapshot, &wish)?;
            (route.base, route.drafter, route::names_drafter(&snapshot, &wish))
        };
        let request = admission::Request {
            class: ask.class.or(caller.class).unwrap_or_default(),
            caller,
            choices: ask.choices,
            messages: &ask.messages,
            max_tokens: ask.max_tokens,
            draft_tokens_max: ask.draft_tokens_max.unwrap_or(self.options.draft_tokens_max),
            base,
            drafter: drafter.map(|(record, _)| named.then_some(record.model.as_str())),
            drafter_context: drafter.map_or(0, |(record, _)| record.context_length),
        };
        self.admission.admit(&request).await
    }
}

/// The client's stop strings and those of the base's prompt.
fn stops(ask: &Ask, base_text: &ModelText) -> Vec<String> {
    let plain = base_text.base_stop_strings().iter().map(|&stop| stop.to_owned());
    ask.stop.iter().cloned().chain(plain).collect()
}

/// Everything a request's task needs.
pub(crate) struct Plan {
    pub(crate) core: Arc<Core>,
    arrived: Instant,
    pub(crate) head: Head,
    pub(crate) base: NodeRecord,
    pub(crate) drafter: Option<(NodeRecord, v1::DraftEncoding)>,
    pub(crate) prompts: Prompts,
    pub(crate) seed: u64,
    stops: Vec<String>,
    pub(crate) window: u32,
    pub(crate) threshold: f32,
    pub(crate) max_tokens: u32,
    pub(crate) ask: Ask,
}

impl Plan {
    /// Runs every answer to its end. `permit` and `outcome` live as long as this does.
    async fn run(self, permit: Permit, mut outcome: Outcome, outbox: Outbox) {
        let limit = self.core.options.request_timeout;
        let all = async {
            let mut answers: FuturesUnordered<_> =
                (0..self.ask.choices).map(|choice| self.answer(choice, &permit, &outbox)).collect();
            while let Some(result) = answers.next().await {
                result?;
            }
            Ok(())
        };
        let result = tokio::select! {
            biased;
            result = tokio::time::timeout(limit, all) => result.unwrap_or_else(|_| {
                let message = format!("the request took more than {limit:?}");
                Err(Error::new(ErrorCode::DeadlineExceeded, message))
            }),
            () = outbox.overflowed() => {
                let bytes = self.core.options.reader_bytes_max;
                let message = format!("more than {bytes} bytes of the answer waited to be read");
                Err(Error::new(ErrorCode::SlowReader, message))
            }
            () = self.core.cut.cancelled() => {
                Err(Error::new(ErrorCode::Draining, "the router is shutting down"))
            }
        };
        // The place is free before the client hears that the request is over.
        drop(permit);
        outcome.error = result.as_ref().err().map(|error| error.code);
        drop(outcome);
        if let Err(error) = result {
            tracing::debug!(request_id = %self.head.request_id, %error, "request failed");
            outbox.push(Event::Failed(error));
        }
    }

    /// Runs one answer to its end.
    async fn answer(&self, choice: u32, permit: &Permit, outbox: &Outbox) -> Result<(), Error> {
        let metrics = &self.core.metrics;
        let mut course = Course::start(self, choice)?;
        let tokenizer = &self.head.tokenizer;
        let mut answer = Answer::new(tokenizer, self.stops.clone(), self.head.first_source());
        let mut pieces = Vec::new();
        let mut last: Option<Instant> = None;
        let mut reason = loop {
            match course.next().await? {
                ServeEvent::Tokens(run) => {
                    let now = Instant::now();
                    if last.is_none() && choice == 0 {
                        metrics.first_token(self.arrived);
                    }
                    let gap = last.map(|last| now - last);
                    metrics.tokens(run.source, run.ids.len(), gap);
                    last = Some(now);
                    answer.push(run, &mut pieces);
                    for piece in pieces.drain(..) {
                        outbox.push(Event::Text { choice, piece });
                    }
                    if answer.stopped() {
                        break FinishReason::Stop;
                    }
                }
                ServeEvent::Switched(decision) => {
                    permit.draft_decided();
                    metrics.switched(decision.by_threshold, decision.kept_tokens);
                }
                ServeEvent::Finished(reason) => break reason,
                ServeEvent::Moved { .. } => {}
            }
        };
        let summary = self.summary(course.decision(), &answer);
        drop(course);
        answer.finish(&mut pieces);
        if answer.stopped() {
            reason = FinishReason::Stop;
        }
        for piece in pieces {
            outbox.push(Event::Text { choice, piece });
        }
        let completion_tokens = answer.tokens();
        permit.answered(completion_tokens);
        outbox.push(Event::Finished { choice, reason, completion_tokens, summary });
        Ok(())
    }

    /// What became of the draft. An answer that ended before the draft was decided kept what it has.
    fn summary(&self, decision: Option<Decision>, answer: &Answer) -> Summary {
        let kept = decision.map_or(answer.drafter_tokens(), |decision| decision.kept_tokens);
        Summary {
            drafter: self.head.drafter.clone(),
            base: Arc::clone(&self.head.base),
            switched: decision.is_some_and(|decision| decision.by_threshold),
            switch_index: kept.checked_sub(1),
            drafted_tokens: decision.map_or(kept, |decision| decision.drafted_tokens),
            kept_tokens: kept,
            window: self.window,
            threshold: self.threshold,
        }
    }
}
