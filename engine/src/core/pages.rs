//! KV pages: one pool, reference-counted handles, a page table a sequence.

use std::sync::{Arc, Mutex, PoisonError};

/// The index of a KV page in the executor's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

#[derive(Debug)]
struct State {
    free: Vec<PageId>,
    references: Vec<u32>,
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
        let state = State { free: ids.rev().map(PageId).collect(), references: vec![0; total] };
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
}

impl Clone for Page {
    fn clone(&self) -> Self {
        self.pool.lock().references[self.id.0 as usize] += 1;
        Self { id: self.id, pool: self.pool.clone() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        let references = &mut state.references[self.id.0 as usize];
        *references -= 1;
        if *references == 0 {
            state.free.push(self.id);
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

    /// Takes pages until `count` are held. Returns false, keeping what it has, if the pool is empty.
    pub fn grow(&mut self, count: usize, pool: &PagePool) -> bool {
        while self.pages.len() < count {
            let Some(page) = pool.take() else { return false };
            self.ids.push(page.id());
            self.pages.push(page);
        }
        true
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
    fn a_table_grows_as_far_as_the_pool_goes() {
        let pool = PagePool::new(3);
        let mut table = PageTable::default();
        assert!(table.grow(2, &pool));
        assert!(!table.grow(4, &pool));
        assert_eq!((table.len(), pool.free()), (3, 0));
        table.truncate(1);
        assert_eq!((table.ids().len(), pool.free()), (1, 2));
        drop(table);
        assert_eq!(pool.free(), 3);
    }
}
