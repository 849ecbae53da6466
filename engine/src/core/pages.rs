//! KV pages: one pool, reference-counted handles, a page table a sequence.

use std::sync::{Arc, Mutex, PoisonError};

/// The index of a KV page in the executor's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

#[derive(Debug)]
struct State {
    free: Vec<PageId>,
    references: Vec<u32>,
    /// Pages that the prefix cache holds.
    cached: Vec<bool>,
    /// How many pages nobody but the prefix cache holds.
    idle: usize,
}

impl State {
    /// Whether the prefix cache alone holds the page.
    fn is_idle(&self, id: PageId) -> bool {
        self.cached[id.0 as usize] && self.references[id.0 as usize] == 1
    }
}

/// A pool of KV pages. Clones share it.
#[derive(Clone, Debug)]
pub struct PagePool {
    state: Arc<Mutex<State>>,
    total: usize,
}

impl PagePool {
    /// A pool of the pages `0..total`, all free.
    #[must_use]
    pub fn new(total: usize) -> Self {
        let ids = 0..u32::try_from(total).unwrap_or(u32::MAX);
        let state = State {
            free: ids.rev().map(PageId).collect(),
            references: vec![0; total],
            cached: vec![false; total],
            idle: 0,
        };
        Self { state: Arc::new(Mutex::new(state)), total }
    }

    /// Pages in the pool.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }

    /// Pages that nobody holds.
    #[must_use]
    pub fn free(&self) -> usize {
        self.lock().free.len()
    }

    /// Pages that nobody but the prefix cache holds.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.lock().idle
    }

    /// Pages that somebody but the prefix cache holds.
    #[must_use]
    pub fn used(&self) -> usize {
        let state = self.lock();
        self.total - state.free.len() - state.idle
    }

    /// Takes a free page, if there is one.
    #[must_use]
    pub fn take(&self) -> Option<Page> {
        let mut state = self.lock();
        let id = state.free.pop()?;
        state.references[id.0 as usize] = 1;
        drop(state);
        Some(Page { id, pool: self.clone() })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Every critical section leaves the state whole, so a poisoned lock is still sound.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A hold on one page. Clones hold it too; the page is free again when the last one drops.
#[derive(Debug)]
pub struct Page {
    id: PageId,
    pool: PagePool,
}

impl Page {
    /// The page's index.
    #[must_use]
    pub fn id(&self) -> PageId {
        self.id
    }

    /// Whether nobody but the prefix cache holds the page.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.pool.lock().is_idle(self.id)
    }

    /// Gives a hold back that somebody still has: a deliberate bug.
    #[cfg(feature = "sabotage-fence")]
    pub(crate) fn give_back_early(&self) {
        drop(Self { id: self.id, pool: self.pool.clone() });
    }

    /// A hold for the prefix cache, which has none on this page yet.
    pub(super) fn clone_for_cache(&self) -> Self {
        let page = self.clone();
        self.pool.lock().cached[self.id.0 as usize] = true;
        page
    }

    /// Ends the prefix cache's hold, which this is.
    pub(super) fn uncache(self) {
        let mut state = self.pool.lock();
        state.idle -= usize::from(state.is_idle(self.id));
        state.cached[self.id.0 as usize] = false;
        drop(state);
    }
}

impl Clone for Page {
    fn clone(&self) -> Self {
        let mut state = self.pool.lock();
        if state.is_idle(self.id) {
            state.idle -= 1;
        }
        state.references[self.id.0 as usize] += 1;
        drop(state);
        Self { id: self.id, pool: self.pool.clone() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        let index = self.id.0 as usize;
        let was_idle = state.is_idle(self.id);
        state.references[index] -= 1;
        if state.references[index] == 0 {
            state.cached[index] = false;
            state.idle -= usize::from(was_idle);
            state.free.push(self.id);
        } else if state.is_idle(self.id) {
            state.idle += 1;
        }
    }
}

/// The pages of one sequence, in the order of their positions.
#[derive(Debug, Default)]
pub struct PageTable {
    pages: Vec<Page>,
    ids: Vec<PageId>,
}

impl PageTable {
    /// The page ids, first positions first.
    #[must_use]
    pub fn ids(&self) -> &[PageId] {
        &self.ids
    }

    /// Pages held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether no page is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The pages, first positions first.
    #[must_use]
    pub fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// Pages that would be free, or idle, if this table gave them back.
    #[must_use]
    pub fn exclusive(&self) -> usize {
        let Some(first) = self.pages.first() else { return 0 };
        let state = first.pool.lock();
        let exclusive = |id: &&PageId| {
            let index = id.0 as usize;
            state.references[index] == 1 + u32::from(state.cached[index])
        };
        self.ids.iter().filter(exclusive).count()
    }

    /// Appends a page.
    pub fn push(&mut self, page: Page) {
        self.ids.push(page.id());
        self.pages.push(page);
    }

    /// Gives back all pages but the first `count`.
    pub fn truncate(&mut self, count: usize) {
        self.pages.truncate(count);
        self.ids.truncate(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_free_when_its_last_handle_drops() {
        let pool = PagePool::new(2);
        let page = pool.take().expect("two are free");
        let other = page.clone();
        assert_eq!(pool.free(), 1);
        drop(page);
        assert_eq!(pool.free(), 1);
        drop(other);
        assert_eq!(pool.free(), 2);
    }

    #[test]
    fn a_page_that_only_the_cache_holds_is_idle() {
        let pool = PagePool::new(2);
        let page = pool.take().expect("two are free");
        let cached = page.clone_for_cache();
        assert_eq!((pool.idle(), pool.free()), (0, 1));
        drop(page);
        assert_eq!((pool.idle(), pool.free()), (1, 1));
        let user = cached.clone();
        assert_eq!(pool.idle(), 0);
        drop(user);
        assert_eq!(pool.idle(), 1);
        drop(cached);
        assert_eq!((pool.idle(), pool.free()), (0, 2));
    }

    #[test]
    fn a_table_holds_its_pages() {
        let pool = PagePool::new(3);
        let mut table = PageTable::default();
        while let Some(page) = pool.take() {
            table.push(page);
        }
        assert_eq!((table.len(), pool.free()), (3, 0));
        table.truncate(1);
        assert_eq!((table.ids().len(), pool.free()), (1, 2));
        drop(table);
        assert_eq!(pool.free(), 3);
    }
}
