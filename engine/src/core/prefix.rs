//! The prefix cache: full KV pages, shared by their content.
//!
//! A page is known by its tokens and the page before it, so the cache is a tree, and a lookup
//! compares tokens: two prefixes are never mistaken for each other, whatever their hashes. The idea
//! is that of RadixAttention (SGLang, arXiv 2312.07104), by pages. What nobody else holds is given
//! up, least recently used first, when pages run out.

use std::collections::{BTreeSet, HashMap};

use super::pages::{Page, PageTable};
use super::scheduler::SequenceId;
use super::sequence::Sequence;
use crate::executor::TokenId;

/// Names a node of the tree, and with it all tokens up to the end of its page.
pub type NodeId = u64;
/// The tree's root: no tokens.
pub const ROOT: NodeId = 0;

#[derive(Debug)]
struct Node {
    page: Page,
    parent: NodeId,
    tokens: Box<[TokenId]>,
    children: usize,
    last_used: u64,
}

/// See the [module](self).
#[derive(Debug)]
pub struct PrefixCache {
    page_size: usize,
    nodes: HashMap<NodeId, Node>,
    children: HashMap<(NodeId, Box<[TokenId]>), NodeId>,
    /// The nodes without children, least recently used first.
    leaves: BTreeSet<(u64, NodeId)>,
    next_id: NodeId,
    clock: u64,
}

impl PrefixCache {
    /// An empty cache of pages of `page_size` tokens.
    #[must_use]
    pub fn new(page_size: usize) -> Self {
        Self {
            page_size,
            nodes: HashMap::new(),
            children: HashMap::new(),
            leaves: BTreeSet::new(),
            next_id: ROOT + 1,
            clock: 0,
        }
    }

    /// Pages in the cache.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether the cache is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The pages of the longest cached prefix of `tokens`.
    pub fn lookup(&mut self, tokens: &[TokenId]) -> Vec<Page> {
        self.clock += 1;
        let mut pages = Vec::new();
        let mut parent = ROOT;
        for chunk in tokens.chunks_exact(self.page_size) {
            let Some(id) = self.find(parent, chunk) else { break };
            self.touch(id);
            pages.push(self.nodes[&id].page.clone());
            parent = id;
        }
        pages
    }

    /// The cached page of `tokens`, a page's size of them, behind those of `parent`.
    pub fn behind(&mut self, parent: NodeId, tokens: &[TokenId]) -> Option<(NodeId, Page)> {
        self.clock += 1;
        let id = self.find(parent, tokens)?;
        self.touch(id);
        Some((id, self.nodes[&id].page.clone()))
    }

    /// Shares the full pages of `tokens`, whose KV the table holds, up to the first page that is
    /// cached already as another one's. So whoever holds a node's page mostly holds its ancestors'
    /// too, and what only the cache holds can be given up leaf by leaf.
    pub fn insert(&mut self, tokens: &[TokenId], table: &PageTable) {
        self.clock += 1;
        let mut parent = ROOT;
        for (chunk, page) in tokens.chunks_exact(self.page_size).zip(table.pages()) {
            parent = match self.find(parent, chunk) {
                Some(id) if self.nodes[&id].page.id() == page.id() => {
                    self.touch(id);
                    id
                }
                Some(_) => return,
                None => self.add(parent, chunk, page),
            };
        }
    }

    /// Gives up the least recently used page that nobody else holds. Returns whether there was one.
    pub fn evict_one(&mut self) -> bool {
        let idle = |id: &NodeId| self.nodes[id].page.is_idle();
        let leaf = self.leaves.iter().map(|&(_, id)| id).find(idle);
        // Whoever follows a sequence that was preempted holds pages behind others than its own.
        let inner = || {
            let idle = self.nodes.iter().filter(|(id, _)| idle(id));
            idle.min_by_key(|&(&id, node)| (node.last_used, id)).map(|(&id, _)| id)
        };
        let Some(id) = leaf.or_else(inner) else { return false };
        self.forget(id);
        true
    }

    /// Gives up a page and those behind it: without it they cannot be found.
    fn forget(&mut self, id: NodeId) {
        if let Some(above) = self.nodes.get(&id).map(|node| node.parent)
            && let Some(parent) = self.nodes.get_mut(&above)
        {
            parent.children -= 1;
            if parent.children == 0 {
                self.leaves.insert((parent.last_used, above));
            }
        }
        let mut lost = vec![id];
        while let Some(id) = lost.pop() {
            let Some(node) = self.nodes.remove(&id) else { continue };
            self.leaves.remove(&(node.last_used, id));
            if node.children > 0 {
                let behind = self.children.iter().filter(|((parent, _), _)| *parent == id);
                lost.extend(behind.map(|(_, &child)| child));
            }
            self.children.remove(&(node.parent, node.tokens));
            node.page.uncache();
        }
    }

    fn find(&self, parent: NodeId, tokens: &[TokenId]) -> Option<NodeId> {
        self.children.get(&(parent, Box::from(tokens))).copied()
    }

    fn touch(&mut self, id: NodeId) {
        let clock = self.clock;
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if self.leaves.remove(&(node.last_used, id)) {
            self.leaves.insert((clock, id));
        }
        node.last_used = clock;
    }

    /// Shares a page behind that of `parent`, which the caller holds; there is none of these tokens.
    pub fn add(&mut self, parent: NodeId, tokens: &[TokenId], page: &Page) -> NodeId {
        let id = self.next_id;
        self.next_id += 1;
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children += 1;
            self.leaves.remove(&(node.last_used, parent));
        }
        let node = Node {
            page: page.clone_for_cache(),
            parent,
            tokens: Box::from(tokens),
            children: 0,
            last_used: self.clock,
        };
        self.nodes.insert(id, node);
        self.children.insert((parent, Box::from(tokens)), id);
        self.leaves.insert((self.clock, id));
        id
    }
}

/// The sequences that should wait: an older one is computing whole pages that they begin with as well
/// (several answers to one prompt, a system prompt that many share). They find them in the cache when
/// it is there, so nothing is computed twice. `sequences` are in order of age, oldest first.
pub fn followers<'a>(
    sequences: impl Iterator<Item = (SequenceId, &'a Sequence)>,
    page_size: usize,
) -> BTreeSet<SequenceId> {
    let mut leaders: Vec<(&[TokenId], usize)> = Vec::new();
    let mut followers = BTreeSet::new();
    for (id, sequence) in sequences {
        let own = sequence.reusable();
        let common = |tokens: &[TokenId]| {
            let (own, tokens) = (own.chunks_exact(page_size), tokens.chunks_exact(page_size));
            own.zip(tokens).take_while(|(a, b)| a == b).count() * page_size
        };
        if leaders.iter().any(|(tokens, computed)| common(tokens) > *computed) {
            followers.insert(id);
            continue;
        }
        let (tokens, computed) = sequence.prefilling();
        if tokens.len() >= page_size {
            leaders.push((tokens, computed));
        }
    }
    followers
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::pages::PagePool;
    use super::*;

    fn table(pool: &PagePool, pages: usize) -> PageTable {
        let mut table = PageTable::default();
        (0..pages).for_each(|_| table.push(pool.take().expect("a free page")));
        table
    }

    fn ids(pages: &[Page]) -> Vec<u32> {
        pages.iter().map(|page| page.id().0).collect()
    }

    #[test]
    fn a_prefix_is_found_by_whole_pages() {
        let pool = PagePool::new(8);
        let mut cache = PrefixCache::new(2);
        let held = table(&pool, 2);
        cache.insert(&[1, 2, 3, 4, 5], &held);
        assert_eq!(ids(&cache.lookup(&[1, 2, 3, 4, 9, 9])), [0, 1]);
        assert_eq!(ids(&cache.lookup(&[1, 2, 9, 4])), [0]);
        assert_eq!(ids(&cache.lookup(&[3, 4])), [0u32; 0]);
        assert_eq!(ids(&cache.lookup(&[1])), [0u32; 0]);
    }

    #[test]
    fn the_least_recently_used_leaf_goes_first_and_a_held_page_stays() {
        let pool = PagePool::new(8);
        let mut cache = PrefixCache::new(1);
        cache.insert(&[1, 2], &table(&pool, 2));
        cache.insert(&[3], &table(&pool, 1));
        let held = cache.lookup(&[1]);
        assert_eq!((pool.free(), pool.idle()), (5, 2));
        assert!(cache.evict_one());
        assert_eq!(cache.lookup(&[1, 2]).len(), 1, "the oldest leaf is gone");
        assert!(cache.evict_one());
        assert!(!cache.evict_one(), "the rest is held");
        drop(held);
        assert!(cache.evict_one() && cache.is_empty());
        assert_eq!((pool.free(), pool.idle()), (8, 0));
    }

    #[test]
    fn a_page_before_one_that_is_held_can_be_given_up() {
        let pool = PagePool::new(8);
        let mut cache = PrefixCache::new(1);
        let mut table = table(&pool, 3);
        cache.insert(&[1, 2, 3], &table);
        let held = table.pages()[1].clone();
        table.truncate(0);
        assert_eq!((pool.free(), pool.idle()), (5, 2));
        assert!(cache.evict_one() && cache.evict_one(), "every idle page can be given up");
        assert!(!cache.evict_one() && cache.is_empty());
        assert_eq!((pool.free(), pool.idle()), (7, 0));
        drop(held);
        assert_eq!((pool.free(), pool.idle()), (8, 0));
    }

    proptest! {
        /// Whatever is found was put there under the same tokens, and all of it can be given up.
        #[test]
        fn lookups_find_what_was_inserted(
            texts in prop::collection::vec(prop::collection::vec(0u32..3, 0..12), 1..12),
            evictions in 0usize..6,
        ) {
            let pool = PagePool::new(200);
            let mut cache = PrefixCache::new(2);
            let mut owner = HashMap::new();
            for text in &texts {
                let mut table = PageTable::default();
                cache.lookup(text).into_iter().for_each(|page| table.push(page));
                while table.len() < text.len() / 2 {
                    table.push(pool.take().expect("a free page"));
                }
                cache.insert(text, &table);
                for (index, page) in cache.lookup(text).iter().enumerate() {
                    let prefix = text[..2 * (index + 1)].to_vec();
                    prop_assert_eq!(owner.entry(page.id()).or_insert(prefix.clone()), &prefix);
                }
                prop_assert_eq!(cache.lookup(text).len(), text.len() / 2);
            }
            for _ in 0..evictions {
                cache.evict_one();
            }
            for text in &texts {
                for (index, page) in cache.lookup(text).iter().enumerate() {
                    prop_assert_eq!(&owner[&page.id()], &text[..2 * (index + 1)]);
                }
            }
            prop_assert_eq!(pool.idle(), cache.len());
            prop_assert_eq!(pool.free() + pool.idle(), 200);
            while cache.evict_one() {}
            prop_assert_eq!(pool.free(), 200);
        }
    }
}
