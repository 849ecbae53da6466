//! Which sequences the next step extends, and by how much: a pure function of a snapshot.
//!
//! Continuous batching with chunked prefill (Sarathi-Serve, arXiv 2403.02310): decodes and draft
//! scoring go first, since a user waits for them, and prefill fills what is left of the step.

/// Names a sequence within an engine; grows with every one, so a lower id is older.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// A sequence as the scheduler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// The sequence.
    pub id: SequenceId,
    /// Tokens that can be extended now.
    pub work: usize,
    /// Whether they are prefill.
    pub prefilling: bool,
    /// Tokens whose KV is in its pages.
    pub computed: usize,
    /// KV pages it holds.
    pub pages: usize,
    /// Those of them that no other sequence holds.
    pub exclusive: usize,
}

/// What a step may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Tokens a step extends at most.
    pub step_tokens: usize,
    /// Tokens a KV page holds.
    pub page_size: usize,
    /// Free KV pages.
    pub free_pages: usize,
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extend {
    /// The sequence.
    pub id: SequenceId,
    /// Tokens to extend, at least 1.
    pub tokens: usize,
    /// Pages it must hold for that.
    pub pages: usize,
}

/// The next step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Sequences that give all their pages back first, to be recomputed later.
    pub preempt: Vec<SequenceId>,
    /// Sequences to extend.
    pub extend: Vec<Extend>,
    /// The oldest sequence that found no page. Until it does, younger ones take none from the
    /// prefix cache.
    pub starved: Option<SequenceId>,
}

/// Plans a step.
///
/// `demands` is in order of age, oldest first. A sequence that finds no page takes them from the
/// youngest one that holds any and is younger than itself; if there is none it waits. So the oldest
/// sequence always moves, provided that the pool can hold any one sequence.
#[must_use]
pub fn plan(demands: &[Demand], budget: Budget) -> Plan {
    let mut planner = Planner {
        demands,
        budget,
        tokens_left: budget.step_tokens,
        free_pages: budget.free_pages,
        preempted: vec![false; demands.len()],
        extended: vec![false; demands.len()],
        plan: Plan::default(),
    };
    for prefilling in [false, true] {
        for (index, demand) in demands.iter().enumerate() {
            if demand.work > 0 && demand.prefilling == prefilling {
                planner.place(index);
            }
        }
    }
    planner.plan
}

struct Planner<'a> {
    demands: &'a [Demand],
    budget: Budget,
    tokens_left: usize,
    free_pages: usize,
    preempted: Vec<bool>,
    extended: Vec<bool>,
    plan: Plan,
}

impl Planner<'_> {
    fn place(&mut self, index: usize) {
        let demand = self.demands[index];
        let mut tokens = demand.work.min(self.tokens_left);
        if tokens == 0 || self.preempted[index] {
            return;
        }
        let page_size = self.budget.page_size;
        let wanted = (demand.computed + tokens).div_ceil(page_size);
        while wanted > demand.pages + self.free_pages {
            let Some(victim) = self.victim(index) else {
                break;
            };
            self.preempted[victim] = true;
            self.free_pages += self.demands[victim].exclusive;
            self.plan.preempt.push(self.demands[victim].id);
        }
        // A prefill may go as far as the free pages do.
        let room = (demand.pages + self.free_pages) * page_size;
        tokens = tokens.min(room.saturating_sub(demand.computed));
        if tokens == 0 {
            let oldest = self.plan.starved.map_or(demand.id, |id| id.min(demand.id));
            self.plan.starved = Some(oldest);
            return;
        }
        let pages = (demand.computed + tokens).div_ceil(page_size).max(demand.pages);
        self.free_pages -= pages - demand.pages;
        self.tokens_left -= tokens;
        self.extended[index] = true;
        self.plan.extend.push(Extend { id: demand.id, tokens, pages });
    }

    /// The youngest sequence after `index` whose pages can be taken.
    fn victim(&self, index: usize) -> Option<usize> {
        (index + 1..self.demands.len()).rev().find(|&other| {
            self.demands[other].pages > 0 && !self.preempted[other] && !self.extended[other]
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `d` decodes, `s` scores, `p` prefills: `name work computed pages`.
    fn demands(text: &str) -> Vec<Demand> {
        text.lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .enumerate()
            .map(|(index, line)| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let number = |i: usize| fields[i].parse().expect("a number");
                Demand {
                    id: SequenceId(index as u64),
                    prefilling: fields[0] == "p",
                    work: number(1),
                    computed: number(2),
                    pages: number(3),
                    exclusive: fields.get(4).map_or(number(3), |_| number(4)),
                }
            })
            .collect()
    }

    fn show(plan: &Plan) -> String {
        let mut words: Vec<String> = plan.preempt.iter().map(|id| format!("-{}", id.0)).collect();
        words.extend(plan.extend.iter().map(|e| format!("{}+{}/{}", e.id.0, e.tokens, e.pages)));
        words.join(" ")
    }

    #[test]
    fn table() {
        for case in include_str!("testdata/scheduler.txt").split("\n\n") {
            let lines: Vec<&str> =
                case.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
            let [budget, sequences @ .., expected] = lines.as_slice() else {
                continue;
            };
            let numbers: Vec<usize> =
                budget.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            let budget =
                Budget { step_tokens: numbers[0], page_size: numbers[1], free_pages: numbers[2] };
            let plan = plan(&demands(&sequences.join("\n")), budget);
            assert_eq!(show(&plan), expected.trim_start_matches("=>").trim(), "{case}");
        }
    }

    proptest! {
        #[test]
        fn a_plan_fits_its_budget_and_moves_the_oldest(
            specs in prop::collection::vec((0usize..40, any::<bool>(), 0usize..60), 1..12),
            step_tokens in 1usize..64,
            free_pages in 0usize..8,
        ) {
            let page_size = 4;
            let demands: Vec<Demand> = specs
                .iter()
                .enumerate()
                .map(|(index, &(work, prefilling, computed))| Demand {
                    id: SequenceId(index as u64),
                    work,
                    prefilling,
                    computed,
                    pages: computed.div_ceil(page_size),
                    exclusive: computed.div_ceil(page_size),
                })
                .collect();
            let plan = plan(&demands, Budget { step_tokens, page_size, free_pages });
            let tokens: usize = plan.extend.iter().map(|e| e.tokens).sum();
            prop_assert!(tokens <= step_tokens);
            let find = |id: SequenceId| demands[id.0 as usize];
            let freed: usize = plan.preempt.iter().map(|&id| find(id).pages).sum();
            let taken: usize = plan.extend.iter().map(|e| e.pages - find(e.id).pages).sum();
            prop_assert!(taken <= free_pages + freed);
            for extend in &plan.extend {
                let demand = find(extend.id);
                prop_assert!(extend.tokens >= 1 && extend.tokens <= demand.work);
                prop_assert!(extend.pages * page_size >= demand.computed + extend.tokens);
                prop_assert!(!plan.preempt.contains(&extend.id));
            }
            let total: usize = free_pages + demands.iter().map(|d| d.pages).sum::<usize>();
            if let Some(oldest) = demands.first()
                && oldest.work > 0
                && !oldest.prefilling
                && total * page_size > oldest.computed
            {
                prop_assert!(plan.extend.iter().any(|e| e.id == oldest.id));
            }
        }
    }
}
