//! How soon a look for unknown network namespaces follows the call for it: at once, but not over and over for one that can't
//! be found. Pure.

use std::time::{Duration, Instant};

/// How long a look rests after one that has found something.
const REST: Duration = Duration::from_millis(100);
/// How many times as long as the look itself it rests at least: looking takes an eleventh of a CPU at most.
const RESTS: u32 = 10;

/// The time of the next look that is called for.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    from: Instant,
    rest: Duration,
    longest: Duration,
}

impl Pace {
    /// The first call is answered at once; a look rests for `longest` where nothing is ever found.
    pub fn new(now: Instant, longest: Duration) -> Self {
        Self { from: now, rest: REST, longest }
    }

    /// When a call that comes now is to be answered.
    pub fn answer_at(&self, now: Instant) -> Instant {
        self.from.max(now)
    }

    /// A call was answered by a look, which has found something new or nothing.
    pub fn answered(&mut self, began: Instant, ended: Instant, found: bool) {
        self.rest = if found { REST } else { (self.rest * 2).min(self.longest) };
        self.from = ended + self.rest.max((ended - began) * RESTS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    #[test]
    fn calls_are_answered_at_once_and_those_for_nothing_more_and_more_seldom() {
        let start = Instant::now();
        let mut pace = Pace::new(start, 10_000 * MILLISECOND);
        assert_eq!(pace.answer_at(start), start);
        let mut now = start;
        // A flood of calls for a minute, and nothing is ever found.
        let mut looks = 0;
        while now < start + Duration::from_mins(1) {
            pace.answered(now, now + MILLISECOND, false);
            now = pace.answer_at(now + MILLISECOND);
            looks += 1;
        }
        assert!((10..=14).contains(&looks), "{looks}");
        pace.answered(now, now, true);
        assert_eq!(pace.answer_at(now), now + REST);
        let later = now + Duration::from_mins(1);
        assert_eq!(pace.answer_at(later), later);
    }

    #[test]
    fn a_slow_look_is_rare() {
        let start = Instant::now();
        let mut pace = Pace::new(start, 10_000 * MILLISECOND);
        pace.answered(start, start + 300 * MILLISECOND, true);
        assert_eq!(pace.answer_at(start), start + 3_300 * MILLISECOND);
    }
}
