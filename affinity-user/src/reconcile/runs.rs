//! Which slots are free: runs of them are handed out, and taken back.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::ReconcileError;

/// How long a run rests before it is used again: a program may still hold a frontend's value that points at it. Programs
/// run for microseconds; a restart of the daemon takes longer than that, so what was at rest then is free afterwards.
pub(super) const REST: Duration = Duration::from_secs(1);

/// A run of slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Run {
    /// Its first slot.
    pub first: u32,
    /// How many slots it has.
    pub count: u32,
}

impl Run {
    /// The slots' indices.
    pub fn slots(self) -> std::ops::Range<u32> {
        self.first..self.first + self.count
    }
}

/// The free slots of the array.
pub(super) struct Runs {
    capacity: u32,
    /// Free ranges: first slot to the slot after the last; none touches another.
    free: BTreeMap<u32, u32>,
    /// Runs at rest, and until when.
    resting: VecDeque<(Instant, Run)>,
}

impl Runs {
    /// All slots are free.
    pub fn new(capacity: usize) -> Self {
        let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
        Self { capacity, free: BTreeMap::from([(0, capacity)]), resting: VecDeque::new() }
    }

    /// Takes a run that is in use already. Returns whether all of it was free; in any case none of it is any more.
    pub fn adopt(&mut self, run: Run) -> bool {
        let Some(end) = run.first.checked_add(run.count).filter(|end| *end <= self.capacity) else {
            return false;
        };
        let whole = self.free.range(..=run.first).next_back().is_some_and(|(_, free_end)| *free_end >= end);
        let touched: Vec<_> =
            self.free.range(..end).filter(|(_, free_end)| **free_end > run.first).map(|(s, e)| (*s, *e)).collect();
        for (start, free_end) in touched {
            self.free.remove(&start);
            if start < run.first {
                self.free.insert(start, run.first);
            }
            if free_end > end {
                self.free.insert(end, free_end);
            }
        }
        whole
    }

    /// Hands out a run of `count` slots: of the free ranges that it fits in, out of the smallest.
    pub fn take(&mut self, count: usize, now: Instant) -> Result<Run, ReconcileError> {
        while let Some((until, run)) = self.resting.front().copied()
            && until <= now
        {
            self.resting.pop_front();
            self.insert(run);
        }
        let fitting =
            self.free.iter().map(|(start, end)| (end - start, *start)).filter(|(len, _)| *len as usize >= count);
        let Some((len, first)) = fitting.min() else {
            return Err(ReconcileError::NoSlots { needed: count, capacity: self.capacity });
        };
        let count = u32::try_from(count).unwrap_or(len);
        self.free.remove(&first);
        if count < len {
            self.free.insert(first + count, first + len);
        }
        Ok(Run { first, count })
    }

    /// Takes back a run that frontends pointed at until now.
    pub fn give_back(&mut self, run: Run, now: Instant) {
        self.resting.push_back((now + REST, run));
    }

    /// Takes back a run that no frontend has pointed at.
    pub fn give_back_unused(&mut self, run: Run) {
        self.insert(run);
    }

    fn insert(&mut self, run: Run) {
        let (mut start, mut end) = (run.first, run.first + run.count);
        if let Some((before, before_end)) = self.free.range(..start).next_back()
            && *before_end == start
        {
            start = *before;
        }
        if let Some(after_end) = self.free.remove(&end) {
            end = after_end;
        }
        self.free.insert(start, end);
    }

    /// How many slots there are.
    pub fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// How many slots are neither in use nor at rest.
    pub fn free(&self) -> u32 {
        self.free.iter().map(|(start, end)| end - start).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_run_rests_before_it_is_used_again() {
        let start = Instant::now();
        let mut runs = Runs::new(10);
        let first = runs.take(6, start).unwrap();
        runs.give_back(first, start);
        let early = start + Duration::from_millis(999);
        let refused = runs.take(6, early).unwrap_err();
        assert_eq!(refused.to_string(), "slots has no 6 free in a row (of 10): raise --map-size slots=N");
        assert_eq!(runs.take(4, early).unwrap(), Run { first: 6, count: 4 });
        assert_eq!(runs.take(6, start + REST).unwrap(), first);
    }

    #[test]
    fn the_smallest_hole_that_fits_is_filled() {
        let now = Instant::now();
        let mut runs = Runs::new(100);
        let taken: Vec<_> = [10, 1, 5, 1].map(|n| runs.take(n, now).unwrap()).into();
        runs.give_back_unused(taken[0]);
        runs.give_back_unused(taken[2]);
        assert_eq!(runs.take(4, now).unwrap().first, 11);
        assert_eq!(runs.take(6, now).unwrap().first, 0);
        assert_eq!(runs.take(20, now).unwrap().first, 17);
    }

    #[test]
    fn adopted_runs_are_not_handed_out_even_where_they_overlap() {
        let now = Instant::now();
        let mut runs = Runs::new(20);
        assert!(runs.adopt(Run { first: 5, count: 5 }));
        assert!(!runs.adopt(Run { first: 8, count: 6 }));
        assert!(!runs.adopt(Run { first: 18, count: 3 }));
        assert!(!runs.adopt(Run { first: u32::MAX, count: 2 }));
        assert_eq!(runs.free(), 5 + 6);
        assert_eq!(runs.take(6, now).unwrap(), Run { first: 14, count: 6 });
        assert_eq!(runs.take(5, now).unwrap(), Run { first: 0, count: 5 });
    }

    proptest! {
        #[test]
        fn no_slot_is_in_two_runs_and_none_is_lost(steps in prop::collection::vec((any::<bool>(), 1usize..40), 1..200)) {
            let mut now = Instant::now();
            let mut runs = Runs::new(200);
            let mut held: Vec<Run> = Vec::new();
            for (take, n) in steps {
                if take {
                    if let Ok(run) = runs.take(n, now) {
                        prop_assert_eq!(run.count as usize, n);
                        prop_assert!(run.slots().end <= 200);
                        prop_assert!(held.iter().all(|h| h.slots().end <= run.first || run.slots().end <= h.first));
                        held.push(run);
                    }
                } else if !held.is_empty() {
                    runs.give_back(held.swap_remove(n % held.len()), now);
                    now += Duration::from_millis(100);
                }
            }
            let left: u32 = held.iter().map(|run| run.count).sum();
            for run in held {
                runs.give_back(run, now);
            }
            prop_assert!(runs.free() + left <= 200);
            prop_assert_eq!(runs.take(200, now + REST).unwrap(), Run { first: 0, count: 200 });
        }
    }
}
