//! KV pages that leave an engine, and pages that come in.
//!
//! An [`Export`] follows a sequence: each full page appears in its [`ExportView`] as soon as it is
//! computed, under its tokens, those of an undecided draft included; when the sequence is over, so
//! does its last page, full or not. It holds the pages until it is dropped, also when the sequence is
//! long gone. A page whose tokens the switch cut is taken back
//! before the sequence overwrites it; what was copied before that is still the KV of its tokens.
//!
//! An [`Import`] puts pages into the engine's prefix cache, each behind the one before it, and holds
//! them until it is dropped. A last page that is not full waits outside the cache, which knows whole
//! pages only, for the first request that goes on behind it. What it holds is only a hint: an engine
//! that needs the room takes it.
//!
//! Pages are copied between steps, few at a time while requests run. While the engine's thread sleeps,
//! whoever asks for a copy makes it: on the processor that has the page's other side in its caches.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::{mpsc, oneshot, watch};

use crate::core::pages::{Page, PageId, PageTable};
use crate::core::prefix::{NodeId, ROOT};
use crate::executor::TokenId;
use crate::runner::{Command, Runner};

static SERIALS: AtomicU64 = AtomicU64::new(0);

/// A page of a sequence, with the tokens it is the KV of.
#[derive(Debug)]
pub struct ExportedPage {
    serial: u64,
    tokens: Box<[TokenId]>,
    page: Page,
    retracted: AtomicBool,
}

impl ExportedPage {
    fn new(tokens: &[TokenId], page: &Page) -> Arc<Self> {
        Arc::new(Self {
            serial: SERIALS.fetch_add(1, Ordering::Relaxed),
            tokens: tokens.into(),
            page: page.clone(),
            retracted: AtomicBool::new(false),
        })
    }

    /// Tells this page from every other one exported by this process.
    #[must_use]
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// The page's tokens, a page's size of them; of a sequence's last page maybe fewer.
    #[must_use]
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// The page to be read, unless it was taken back.
    pub(crate) fn readable(&self) -> Option<PageId> {
        (!self.retracted.load(Ordering::Acquire)).then(|| self.page.id())
    }
}

/// A sequence's pages so far.
#[derive(Clone, Debug, Default)]
pub struct ExportView {
    /// The first positions first, without a gap. Full pages, but for the last one of a sequence that
    /// is over.
    pub pages: Vec<Arc<ExportedPage>>,
    /// The engine knows of this export.
    attached: bool,
    /// The sequence is over: nothing changes any more.
    pub ended: bool,
}

/// The engine's end of an export.
#[derive(Debug)]
pub(crate) struct ExportLog(watch::Sender<ExportView>);

impl ExportLog {
    /// Both ends. `copies` is how pages are read.
    pub(crate) fn new(copies: CopyQueue) -> (Self, Export) {
        let (sender, view) = watch::channel(ExportView::default());
        (Self(sender), Export { view, copies })
    }

    /// Whether nobody follows any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.0.is_closed()
    }

    /// Tells what is computed: `tokens`, whose KV is in `table`.
    pub(crate) fn update(&self, tokens: &[TokenId], table: &PageTable, page_size: usize) {
        self.0.send_if_modified(|view| {
            let mut changed = !view.attached;
            view.attached = true;
            let full: Vec<&[TokenId]> = tokens.chunks_exact(page_size).collect();
            let same = view.pages.iter().zip(&full).take_while(|(old, new)| *old.tokens == ***new);
            let same = same.count();
            let in_use = |page: &ExportedPage| {
                table.pages().get(same).is_some_and(|held| held.id() == page.page.id())
            };
            // Fewer pages than before, none of them different: the sequence was preempted and
            // computes them again elsewhere, or is about to overwrite the one behind them.
            if same == full.len() && !view.pages.get(same).is_some_and(|page| in_use(page)) {
                return changed;
            }
            for gone in view.pages.drain(same..) {
                gone.retracted.store(true, Ordering::Release);
                changed = true;
            }
            for (tokens, page) in full.into_iter().zip(table.pages()).skip(same) {
                view.pages.push(ExportedPage::new(tokens, page));
                changed = true;
            }
            changed
        });
    }

    /// The sequence is over, and nobody changes its pages any more: `tokens`, whose KV is in `table`.
    pub(crate) fn end_after(&self, tokens: &[TokenId], table: &PageTable, page_size: usize) {
        self.update(tokens, table, page_size);
        self.0.send_if_modified(|view| {
            let full = tokens.len() / page_size;
            let rest = &tokens[full * page_size..];
            let page = table.pages().get(full).filter(|_| view.pages.len() == full);
            let Some(page) = page.filter(|_| !rest.is_empty()) else { return false };
            view.pages.push(ExportedPage::new(rest, page));
            true
        });
        self.end();
    }

    /// The sequence is over.
    pub(crate) fn end(&self) {
        self.0.send_modify(|view| {
            view.attached = true;
            view.ended = true;
        });
    }
}

/// Follows a sequence's pages. Clones share them; dropping the last one gives the pages back.
#[derive(Clone, Debug)]
pub struct Export {
    view: watch::Receiver<ExportView>,
    copies: CopyQueue,
}

impl Export {
    /// Waits until the engine has told what was computed so far.
    pub(crate) async fn attached(&mut self) {
        // An engine that is gone has told all it ever will.
        let _ = self.view.wait_for(|view| view.attached).await;
    }

    /// What there is now; [`Self::changed`] waits for more than this.
    pub fn view(&mut self) -> ExportView {
        self.view.borrow_and_update().clone()
    }

    /// Waits until the view differs from the last one seen. False when it never will again.
    pub async fn changed(&mut self) -> bool {
        self.view.changed().await.is_ok()
    }

    /// Gives the pages so far back, whoever reads them: a deliberate bug.
    #[cfg(feature = "sabotage-fence")]
    pub fn free(&self) {
        for page in &self.view.borrow().pages {
            page.page.give_back_early();
            // It is not to be given back again.
            std::mem::forget(Arc::clone(page));
        }
    }

    /// Has a page copied into `buffer`, which is resized to fit. Waits while others ask for too much.
    pub async fn read(&self, page: Arc<ExportedPage>, buffer: Vec<u8>) -> Reading {
        let (reply, answer) = oneshot::channel();
        // An engine that is gone drops the reply.
        let _ = self.copies.ask(Copy::Read { page, buffer, reply }).await;
        Reading(answer)
    }

    /// As [`Self::read`] while an engine computes, unless it would have to wait: then `None`.
    #[must_use]
    pub fn read_later(&self, page: Arc<ExportedPage>, buffer: Vec<u8>) -> Option<Reading> {
        let (reply, answer) = oneshot::channel();
        let asked = self.copies.ask_later(Copy::Read { page, buffer, reply });
        asked.then_some(Reading(answer))
    }

    /// Whether the engine has nothing to do: it copies at once what is asked, and needs not be asked
    /// ahead.
    #[must_use]
    pub fn engine_sleeps(&self) -> bool {
        self.copies.asleep.load(Ordering::Acquire)
    }
}

/// A page that is being read.
#[derive(Debug)]
pub struct Reading(oneshot::Receiver<Option<Vec<u8>>>);

impl Reading {
    /// Its bytes. `None`: the page was taken back, or the engine is gone.
    pub async fn done(self) -> Option<Vec<u8>> {
        self.0.await.ok()?
    }
}

/// Why a page was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// The engine needs its free pages for its requests.
    #[error("there is no room for the page")]
    NoRoom,
    /// The page does not follow on the last one.
    #[error("the page leaves a gap")]
    Gap,
    /// The page's bytes are not as many as this engine's pages have, or its tokens none or more.
    #[error("the page has another size")]
    Size,
    /// The executor could not write it.
    #[error("the page could not be written")]
    Failed,
    /// The engine has stopped.
    #[error("the engine has stopped")]
    Stopped,
}

/// Puts pages into an engine's prefix cache, and holds them until it is dropped.
#[derive(Debug)]
pub struct Import {
    id: u64,
    copies: CopyQueue,
    dropped: Arc<AtomicBool>,
}

impl Import {
    pub(crate) fn new(id: u64, copies: CopyQueue) -> Self {
        Self { id, copies, dropped: Arc::default() }
    }

    /// Writes page `index` (0 holds the first positions), which is the KV of `tokens` behind the
    /// pages before it. An index below the number of full pages written takes back those from there
    /// on. Behind a page that is not full there can be no other.
    ///
    /// # Errors
    /// [`ImportError::Stopped`]
    pub async fn write(
        &self,
        index: usize,
        tokens: Vec<TokenId>,
        data: Vec<u8>,
    ) -> Result<Writing, ImportError> {
        let (reply, answer) = oneshot::channel();
        let dropped = Arc::clone(&self.dropped);
        let page = IncomingPage { import: self.id, dropped, index, tokens, data };
        let asked = self.copies.ask(Copy::Write { page: Box::new(page), reply }).await;
        asked.map_err(|_| ImportError::Stopped)?;
        Ok(Writing(answer))
    }
}

/// A page that is being written.
#[derive(Debug)]
pub struct Writing(oneshot::Receiver<Result<Vec<u8>, ImportError>>);

impl Writing {
    /// Whether its result is there.
    #[must_use]
    pub fn is_done(&self) -> bool {
        !self.0.is_empty()
    }

    /// Waits until it is in the cache, and gives its buffer back, once. Cancel safe.
    ///
    /// # Errors
    /// See [`ImportError`]; what was written before stays.
    pub async fn done(&mut self) -> Result<Vec<u8>, ImportError> {
        (&mut self.0).await.map_err(|_| ImportError::Stopped)?
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::Release);
        self.copies.wake();
    }
}

/// A page that an [`Import`] brings.
#[derive(Debug)]
pub(crate) struct IncomingPage {
    pub(crate) import: u64,
    /// Set when the import is over.
    pub(crate) dropped: Arc<AtomicBool>,
    pub(crate) index: usize,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) data: Vec<u8>,
}

/// A page to be copied between two steps.
#[derive(Debug)]
pub(crate) enum Copy {
    Read { page: Arc<ExportedPage>, buffer: Vec<u8>, reply: oneshot::Sender<Option<Vec<u8>>> },
    Write { page: Box<IncomingPage>, reply: oneshot::Sender<Result<Vec<u8>, ImportError>> },
}

/// Where an engine is asked for copies.
#[derive(Clone, Debug)]
pub(crate) struct CopyQueue {
    pub(crate) copies: mpsc::Sender<Copy>,
    pub(crate) inbox: mpsc::Sender<Command>,
    /// The engine's thread waits for a command.
    pub(crate) asleep: Arc<AtomicBool>,
    /// Used here only while it does.
    pub(crate) runner: Weak<Mutex<Runner>>,
}

impl CopyQueue {
    /// Asks for a copy, which is made at once if the engine's thread sleeps.
    async fn ask(&self, copy: Copy) -> Result<(), mpsc::error::SendError<Copy>> {
        self.copies.send(copy).await?;
        if !self.copied_at_once() {
            self.wake();
        }
        Ok(())
    }

    /// Asks the engine's thread for a copy, unless the queue is full.
    fn ask_later(&self, copy: Copy) -> bool {
        let asked = self.copies.try_send(copy).is_ok();
        self.wake();
        asked
    }

    /// A thread that has just been woken waits for one such call at most: the next one sees it awake.
    fn copied_at_once(&self) -> bool {
        let copy = || {
            let runner = self.runner.upgrade()?;
            let mut runner = runner.try_lock().ok()?;
            self.asleep.load(Ordering::Acquire).then(|| runner.copy_while_asleep())
        };
        // The thread that is woken finds the lock poisoned by a panic, and ends.
        catch_unwind(AssertUnwindSafe(copy)).ok().flatten().unwrap_or(false)
    }

    /// Wakes the engine's thread where it sleeps.
    fn wake(&self) {
        // With a full inbox the thread is awake.
        let _ = self.inbox.try_send(Command::Wake);
    }
}

/// The pages that one [`Import`] has brought.
#[derive(Debug)]
pub(crate) struct Imported {
    pub(crate) dropped: Arc<AtomicBool>,
    /// Full ones, under their names in the prefix cache. Each is held, so the cache gives none up.
    pub(crate) pages: Vec<(NodeId, Page)>,
    /// A page behind them that is not full, with its tokens.
    pub(crate) last: Option<(Vec<TokenId>, Page)>,
}

impl Imported {
    pub(crate) fn new(dropped: Arc<AtomicBool>) -> Self {
        Self { dropped, pages: Vec::new(), last: None }
    }

    /// Forgets the pages from `index` on, and says which one is the last. `None`: there are fewer.
    pub(crate) fn cut(&mut self, index: usize) -> Option<NodeId> {
        self.last = None;
        self.pages.truncate(index);
        let last = self.pages.last().map_or(ROOT, |&(node, _)| node);
        (self.pages.len() == index).then_some(last)
    }

    /// Of how many of `tokens` the page that is not full is the KV, if it lies behind `before`.
    pub(crate) fn last_holds(&self, before: Option<&Page>, tokens: &[TokenId]) -> usize {
        let same = self.pages.last().map(|(_, page)| page.id()) == before.map(Page::id);
        let own = self.last.as_ref().filter(|_| same).map_or(&[][..], |(own, _)| own);
        own.iter().zip(tokens).take_while(|(a, b)| a == b).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pages::PagePool;

    fn table(pool: &PagePool, pages: usize) -> PageTable {
        let mut table = PageTable::default();
        (0..pages).for_each(|_| table.push(pool.take().expect("a free page")));
        table
    }

    fn log() -> (ExportLog, Export) {
        let (copies, _) = mpsc::channel(1);
        let (inbox, _) = mpsc::channel(1);
        ExportLog::new(CopyQueue { copies, inbox, asleep: Arc::default(), runner: Weak::new() })
    }

    fn serials(export: &mut Export) -> Vec<u64> {
        export.view().pages.iter().map(|page| page.serial()).collect()
    }

    #[test]
    fn a_page_about_to_be_overwritten_is_taken_back() {
        let pool = PagePool::new(8);
        let mut table = table(&pool, 3);
        let (log, mut export) = log();
        log.update(&[1, 2, 3, 4, 5, 6], &table, 2);
        let before = export.view();
        assert_eq!(before.pages.len(), 3);
        // Tokens 4 to 6 are cut: the second page goes on to be used, the third is given back.
        table.truncate(2);
        log.update(&[1, 2, 3], &table, 2);
        let after = serials(&mut export);
        assert_eq!(after, [before.pages[0].serial()]);
        let readable = |page: &Arc<ExportedPage>| page.readable().is_some();
        assert_eq!(before.pages.iter().map(readable).collect::<Vec<_>>(), [true, false, false]);
        log.update(&[1, 2, 3, 9], &table, 2);
        assert_eq!(export.view().pages[1].tokens(), [3, 9]);
        assert_eq!(serials(&mut export)[0], after[0]);
    }

    #[test]
    fn pages_of_a_preempted_sequence_stay() {
        let pool = PagePool::new(8);
        let mut first = table(&pool, 3);
        let (log, mut export) = log();
        log.update(&[1, 2, 3, 4, 5, 6], &first, 2);
        let before = serials(&mut export);
        first.truncate(0);
        assert_eq!(pool.free(), 5, "the export holds them");
        let again = table(&pool, 4);
        log.update(&[1, 2, 3, 4], &again, 2);
        log.update(&[1, 2, 3, 4, 5, 6, 7, 8], &again, 2);
        assert_eq!(serials(&mut export)[..3], before);
        assert_eq!(export.view().pages.len(), 4);
        drop((export, again));
        assert_eq!(pool.free(), 4, "the log holds them until the sequence is over");
        drop(log);
        assert_eq!(pool.free(), 8);
    }
}
