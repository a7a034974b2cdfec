//! Requests that wait, taken up so that adapters get equal shares.
//!
//! Every party (an adapter, or the base) has a queue and a counter of tokens that were computed for it; the party with the least comes
//! next. One that had nothing to ask is not owed for that time: its counter is lifted to the least of the others. After "Fairness in Serving
//! Large Language Models" (Sheng et al., 2024).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::Submission;

#[derive(Default)]
pub(super) struct Queue {
    parties: HashMap<Arc<str>, VecDeque<Submission>>,
    served: HashMap<Arc<str>, u64>,
    len: usize,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whose requests wait, by name.
    pub(super) fn parties(&self) -> Vec<Arc<str>> {
        let mut parties: Vec<_> = self.parties.keys().cloned().collect();
        parties.sort();
        parties
    }

    pub(super) fn push(&mut self, submission: Submission) {
        let party = Arc::clone(&submission.party);
        if !self.parties.contains_key(&party) {
            let least = self
                .parties
                .keys()
                .filter_map(|other| self.served.get(other));
            let least = least.min().copied().unwrap_or(0);
            let served = self.served.entry(Arc::clone(&party)).or_default();
            *served = (*served).max(least);
        }
        self.parties.entry(party).or_default().push_back(submission);
        self.len += 1;
    }

    /// Puts back what was popped last.
    pub(super) fn put_back(&mut self, submission: Submission) {
        let party = Arc::clone(&submission.party);
        self.parties
            .entry(party)
            .or_default()
            .push_front(submission);
        self.len += 1;
    }

    /// The next one, of those whose first request may be taken up now.
    pub(super) fn pop(&mut self, may: impl Fn(&Submission) -> bool) -> Option<Submission> {
        let firsts = self.parties.iter().filter_map(|(party, waiting)| {
            let first = waiting.front().filter(|first| may(first))?;
            let served = self.served.get(party).copied().unwrap_or(0);
            Some((served, first.submitted, party))
        });
        let (_, _, party) = firsts.min()?;
        let party = Arc::clone(party);
        let waiting = self.parties.get_mut(&party)?;
        let next = waiting.pop_front();
        if waiting.is_empty() {
            self.parties.remove(&party);
        }
        self.len -= usize::from(next.is_some());
        next
    }

    /// Counts tokens that were computed for a party.
    pub(super) fn charge(&mut self, party: &Arc<str>, tokens: u64) {
        *self.served.entry(Arc::clone(party)).or_default() += tokens;
        // Parties that are long gone are forgotten.
        if self.served.len() > 4096 {
            let parties = &self.parties;
            self.served.retain(|party, _| parties.contains_key(party));
        }
    }

    /// Takes out all that are not to stay; how many they were.
    pub(super) fn retain(&mut self, mut stays: impl FnMut(&Submission) -> bool) -> usize {
        let before = self.len;
        for waiting in self.parties.values_mut() {
            waiting.retain(&mut stays);
        }
        self.parties.retain(|_, waiting| !waiting.is_empty());
        self.len = self.parties.values().map(VecDeque::len).sum();
        before - self.len
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use lowrank::generate::{GenerateOptions, Request, Strategy};

    use super::*;

    fn submission(party: &str) -> Submission {
        let (updates, _) = tokio::sync::mpsc::unbounded_channel();
        let search = Strategy::Sample(GenerateOptions::default());
        Submission {
            request: Request::new(vec![1], None, search),
            grammar: None,
            party: party.into(),
            deadline: None,
            updates,
            is_over: Arc::default(),
            submitted: Instant::now(),
        }
    }

    fn pop(queue: &mut Queue) -> Option<Arc<str>> {
        let next = queue.pop(|_| true)?;
        queue.charge(&next.party, 10);
        Some(next.party)
    }

    #[test]
    fn a_rare_adapter_does_not_wait_behind_a_busy_one() {
        let mut queue = Queue::default();
        for _ in 0..5 {
            queue.push(submission("busy"));
        }
        assert_eq!(pop(&mut queue).as_deref(), Some("busy"));
        queue.push(submission("rare"));
        queue.push(submission("rare"));
        let order: Vec<_> = std::iter::from_fn(|| pop(&mut queue)).collect();
        let order: Vec<&str> = order.iter().map(|party| &**party).collect();
        // Neither is owed anything, so they take turns.
        assert_eq!(order, ["busy", "rare", "busy", "rare", "busy", "busy"]);
        assert!(queue.is_empty());
    }

    #[test]
    fn one_that_may_not_yet_holds_up_nobody_else() {
        let mut queue = Queue::default();
        queue.push(submission("a"));
        queue.push(submission("b"));
        let next = queue.pop(|waiting| &*waiting.party != "a").expect("b");
        assert_eq!(&*next.party, "b");
        queue.put_back(next);
        assert_eq!(queue.len(), 2);
        assert_eq!(queue.retain(|waiting| &*waiting.party == "a"), 1);
        assert_eq!(queue.len(), 1);
    }
}
