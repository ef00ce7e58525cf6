//! What is to be done about Leases, and when. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;

/// How long Leases last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// For how long after its last renewal a holder is taken to be there.
    pub duration: Duration,
    /// How often a holder renews.
    pub renew: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { duration: Duration::from_secs(15), renew: Duration::from_secs(5) }
    }
}

impl Timing {
    /// Whether a renewal that fails may be tried again before it is too late.
    pub fn is_sound(self) -> bool {
        self.renew * 2 < self.duration && !self.renew.is_zero()
    }

    /// For how long after its last renewal a holder takes itself to be one.
    pub fn deadline(self) -> Duration {
        self.duration * 2 / 3
    }
}

/// How long after a failure the same is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// A Lease as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Who holds it, if anybody does.
    pub holder: Option<String>,
    /// For how long it is held without being renewed.
    pub duration: Duration,
    /// Since when it has had this holder.
    pub acquired: Option<Timestamp>,
    /// When it was renewed last, by the holder's clock.
    pub renewed: Option<Timestamp>,
    /// How often it has changed hands.
    pub transitions: i32,
    /// Its version.
    pub version: String,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// When this version was seen here first.
    pub seen: Instant,
}

impl View {
    /// A Lease as it is read now; what was seen before is since then.
    pub fn read(lease: &Lease, known: Option<&Self>) -> Option<Self> {
        let spec = lease.spec.clone().unwrap_or_default();
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let seen = known.filter(|known| known.version == version).map_or_else(Instant::now, |known| known.seen);
        let duration = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or_default();
        Some(Self {
            holder: spec.holder_identity.filter(|holder| !holder.is_empty()),
            duration: Duration::from_secs(duration),
            acquired: spec.acquire_time.map(|time| time.0),
            renewed: spec.renew_time.map(|time| time.0),
            transitions: spec.lease_transitions.unwrap_or_default(),
            version,
            annotations: lease.metadata.annotations.clone().unwrap_or_default(),
            seen,
        })
    }
}

/// A Lease that is to be held, if nobody else does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// How long to wait once it can be had: whoever waits less is first.
    pub delay: Duration,
    /// What it says of itself.
    pub annotations: BTreeMap<String, String>,
}

/// What is to be done about a Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Get it.
    Acquire {
        /// The Lease.
        name: String,
        /// What for.
        claim: Claim,
    },
    /// Keep it.
    Renew {
        /// The Lease.
        name: String,
        /// Its version.
        version: String,
        /// What for.
        claim: Claim,
    },
    /// Give it up.
    Release {
        /// The Lease.
        name: String,
        /// Its version.
        version: String,
        /// Whether others may want it.
        is_needed: bool,
    },
}

impl Step {
    /// The Lease.
    pub fn name(&self) -> &str {
        match self {
            Self::Acquire { name, .. } | Self::Renew { name, .. } | Self::Release { name, .. } => name,
        }
    }
}

#[derive(Clone, Debug)]
struct Wanted {
    claim: Claim,
    since: Instant,
    /// When it was tried to get it last, in vain.
    tried: Option<Instant>,
}

#[derive(Clone, Debug)]
struct Held {
    version: String,
    /// When the last renewal that has succeeded was begun.
    renewed: Instant,
    /// When the last one was.
    tried: Instant,
    /// What the Lease says.
    claim: Claim,
    /// Whether others may want it, when it is given up.
    is_needed: bool,
}

/// Who takes part in any number of elections.
#[derive(Clone, Debug)]
pub struct Elector {
    identity: String,
    timing: Timing,
    wanted: BTreeMap<String, Wanted>,
    held: BTreeMap<String, Held>,
}

impl Elector {
    /// Takes part under a name.
    pub fn new(identity: &str, timing: Timing) -> Self {
        Self { identity: identity.to_owned(), timing, wanted: BTreeMap::new(), held: BTreeMap::new() }
    }

    /// The name.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// How long Leases last.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Whether a Lease says that it is held by this one.
    pub fn is_own(&self, lease: &Lease) -> bool {
        lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_ref()) == Some(&self.identity)
    }

    /// What is to be held from now on. Of what is not, `is_needed` says whether others may want it.
    pub fn want(&mut self, claims: BTreeMap<String, Claim>, is_needed: impl Fn(&str) -> bool, now: Instant) {
        for (name, held) in &mut self.held {
            held.is_needed = claims.contains_key(name) || is_needed(name);
        }
        let mut before = std::mem::take(&mut self.wanted);
        self.wanted = claims
            .into_iter()
            .map(|(name, claim)| {
                let wanted = match before.remove(&name) {
                    Some(known) => Wanted { claim, ..known },
                    None => Wanted { claim, since: now, tried: None },
                };
                (name, wanted)
            })
            .collect();
    }

    /// What is held at this moment.
    pub fn held(&self, now: Instant) -> BTreeSet<String> {
        self.held.keys().filter(|name| self.holds(name, now)).cloned().collect()
    }

    /// Whether a Lease is held at this moment, and wanted.
    pub fn holds(&self, name: &str, now: Instant) -> bool {
        let is_in_time = |held: &Held| now < held.renewed + self.timing.deadline();
        self.wanted.contains_key(name) && self.held.get(name).is_some_and(is_in_time)
    }

    /// When a Lease that is not held may be tried to get.
    fn chance(&self, wanted: &Wanted, view: Option<&View>) -> Instant {
        let delay = wanted.claim.delay;
        let chance = match view {
            None => wanted.since + delay,
            Some(View { holder: None, seen, .. }) => (*seen).max(wanted.since) + delay,
            // Of an earlier life.
            Some(View { holder: Some(holder), .. }) if *holder == self.identity => wanted.since,
            Some(view) => (view.seen + view.duration).max(wanted.since) + delay,
        };
        wanted.tried.map_or(chance, |tried| chance.max(tried + RETRY))
    }

    fn renewal(&self, name: &str, held: &Held) -> Instant {
        let is_changed = self.wanted.get(name).is_some_and(|wanted| wanted.claim.annotations != held.claim.annotations);
        let failed = held.tried > held.renewed;
        let wait = if failed || is_changed { RETRY.min(self.timing.renew) } else { self.timing.renew };
        held.tried + wait
    }

    /// What is to be done now.
    pub fn steps(&mut self, leases: &BTreeMap<String, View>, now: Instant) -> Vec<Step> {
        let deadline = self.timing.deadline();
        self.held.retain(|_, held| now < held.renewed + deadline);
        let mut steps = Vec::new();
        for (name, held) in &self.held {
            let version = held.version.clone();
            match self.wanted.get(name) {
                None => steps.push(Step::Release { name: name.clone(), version, is_needed: held.is_needed }),
                Some(wanted) if now >= self.renewal(name, held) => {
                    steps.push(Step::Renew { name: name.clone(), version, claim: wanted.claim.clone() });
                }
                Some(_) => {}
            }
        }
        for (name, wanted) in &self.wanted {
            if !self.held.contains_key(name) && now >= self.chance(wanted, leases.get(name)) {
                steps.push(Step::Acquire { name: name.clone(), claim: wanted.claim.clone() });
            }
        }
        steps
    }

    /// When there is something to be done again, as far as is known.
    pub fn next(&self, leases: &BTreeMap<String, View>, now: Instant) -> Instant {
        let kept = self.held.iter().map(|(name, held)| {
            if self.wanted.contains_key(name) {
                self.renewal(name, held).min(held.renewed + self.timing.deadline())
            } else {
                held.tried + RETRY
            }
        });
        let chances = self.wanted.iter().filter(|(name, _)| !self.held.contains_key(*name));
        let chances = chances.map(|(name, wanted)| self.chance(wanted, leases.get(name)));
        kept.chain(chances).min().unwrap_or(now + Duration::from_mins(1)).max(now + Duration::from_millis(1))
    }

    /// Everything that is held, to be given up.
    pub fn resign(&mut self) -> Vec<Step> {
        self.wanted.clear();
        let release = |(name, held): (&String, &Held)| Step::Release {
            name: name.clone(),
            version: held.version.clone(),
            is_needed: true,
        };
        self.held.iter().map(release).collect()
    }

    /// A step, begun at that time, has been done; the Lease has the version then, or is gone.
    pub fn done(&mut self, step: &Step, version: Option<&str>, started: Instant) {
        match (step, version) {
            (Step::Acquire { name, claim } | Step::Renew { name, claim, .. }, Some(version)) => {
                let held = Held {
                    version: version.to_owned(),
                    renewed: started,
                    tried: started,
                    claim: claim.clone(),
                    is_needed: true,
                };
                self.held.insert(name.clone(), held);
                if let Some(wanted) = self.wanted.get_mut(name) {
                    wanted.tried = None;
                }
            }
            (step, _) => {
                self.held.remove(step.name());
            }
        }
    }

    /// Another has been first.
    pub fn lost(&mut self, step: &Step, started: Instant) {
        self.held.remove(step.name());
        self.failed(step, started);
    }

    /// It is not known what has come of a step that was begun at that time.
    pub fn failed(&mut self, step: &Step, started: Instant) {
        if let Some(held) = self.held.get_mut(step.name()) {
            held.tried = started;
        }
        if let Some(wanted) = self.wanted.get_mut(step.name()) {
            wanted.tried = Some(started);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn claims(names: &[&str]) -> BTreeMap<String, Claim> {
        names.iter().map(|name| ((*name).to_owned(), Claim::default())).collect()
    }

    fn view(holder: Option<&str>, seen: Instant) -> View {
        View {
            holder: holder.map(str::to_owned),
            duration: 15 * SECOND,
            acquired: None,
            renewed: None,
            transitions: 0,
            version: "7".to_owned(),
            annotations: BTreeMap::new(),
            seen,
        }
    }

    /// Names of Leases with the verb.
    fn told(steps: &[Step]) -> Vec<String> {
        let told = |step: &Step| match step {
            Step::Acquire { name, .. } => format!("acquire {name}"),
            Step::Renew { name, .. } => format!("renew {name}"),
            Step::Release { name, is_needed: true, .. } => format!("release {name}"),
            Step::Release { name, is_needed: false, .. } => format!("delete {name}"),
        };
        steps.iter().map(told).collect()
    }

    /// One who holds a Lease since `now`.
    fn holder(now: Instant) -> Elector {
        let mut elector = Elector::new("a", Timing::default());
        elector.want(claims(&["x"]), |_| true, now);
        let steps = elector.steps(&BTreeMap::new(), now);
        assert_eq!(told(&steps), ["acquire x"]);
        elector.done(&steps[0], Some("1"), now);
        elector
    }

    #[test]
    fn a_holder_renews_and_counts_itself_out_in_time() {
        let start = Instant::now();
        let mut elector = holder(start);
        let none = BTreeMap::new();
        assert!(elector.holds("x", start));
        assert_eq!(elector.next(&none, start), start + 5 * SECOND);
        assert_eq!(told(&elector.steps(&none, start + 4 * SECOND)), [""; 0]);
        let steps = elector.steps(&none, start + 5 * SECOND);
        assert_eq!(told(&steps), ["renew x"]);
        elector.done(&steps[0], Some("2"), start + 5 * SECOND);
        // From here on no renewal succeeds.
        for second in 10..15 {
            let now = start + second * SECOND;
            let steps = elector.steps(&none, now);
            assert_eq!(told(&steps), ["renew x"], "{second}");
            elector.failed(&steps[0], now);
            assert!(elector.holds("x", now));
        }
        assert!(!elector.holds("x", start + 15 * SECOND), "ten seconds after the last renewal");
        assert!(elector.held(start + 15 * SECOND).is_empty());
    }

    #[test]
    fn a_lease_of_another_can_be_had_when_it_has_not_changed_for_its_duration() {
        let start = Instant::now();
        let mut elector = Elector::new("a", Timing::default());
        elector.want(claims(&["x"]), |_| true, start);
        let leases = [("x".to_owned(), view(Some("b"), start + SECOND))].into();
        assert_eq!(elector.next(&leases, start), start + 16 * SECOND);
        assert_eq!(told(&elector.steps(&leases, start + 15 * SECOND)), [""; 0]);
        assert_eq!(told(&elector.steps(&leases, start + 16 * SECOND)), ["acquire x"]);
    }

    #[test]
    fn what_is_given_up_can_be_had_at_once_by_who_waits_least() {
        let start = Instant::now();
        let delay = Duration::from_millis(300);
        let mut elector = Elector::new("a", Timing::default());
        elector.want([("x".to_owned(), Claim { delay, ..Claim::default() })].into(), |_| true, start);
        let leases = [("x".to_owned(), view(None, start + SECOND))].into();
        assert_eq!(told(&elector.steps(&leases, start + SECOND)), [""; 0]);
        assert_eq!(told(&elector.steps(&leases, start + SECOND + delay)), ["acquire x"]);
    }

    #[test]
    fn one_takes_up_what_it_held_in_an_earlier_life() {
        let start = Instant::now();
        let mut elector = Elector::new("a", Timing::default());
        elector.want(claims(&["x"]), |_| true, start);
        let leases = [("x".to_owned(), view(Some("a"), start))].into();
        assert_eq!(told(&elector.steps(&leases, start)), ["acquire x"]);
    }

    #[test]
    fn who_was_not_first_tries_again_a_second_later_at_the_earliest() {
        let start = Instant::now();
        let mut elector = Elector::new("a", Timing::default());
        elector.want(claims(&["x"]), |_| true, start);
        let leases = [("x".to_owned(), view(None, start))].into();
        let steps = elector.steps(&leases, start);
        elector.lost(&steps[0], start);
        assert_eq!(told(&elector.steps(&leases, start + SECOND / 2)), [""; 0]);
        assert_eq!(told(&elector.steps(&leases, start + SECOND)), ["acquire x"]);
    }

    #[test]
    fn what_is_not_wanted_any_more_is_given_up_or_deleted() {
        let start = Instant::now();
        let mut elector = holder(start);
        elector.want(BTreeMap::new(), |_| true, start);
        assert!(!elector.holds("x", start), "at once");
        let steps = elector.steps(&BTreeMap::new(), start);
        assert_eq!(told(&steps), ["release x"]);
        elector.want(BTreeMap::new(), |_| false, start);
        let steps = elector.steps(&BTreeMap::new(), start);
        assert_eq!(told(&steps), ["delete x"]);
        elector.done(&steps[0], None, start);
        assert_eq!(told(&elector.steps(&BTreeMap::new(), start)), [""; 0]);
    }

    #[test]
    fn a_lease_that_says_something_else_is_renewed_soon() {
        let start = Instant::now();
        let mut elector = holder(start);
        let annotations = [("a".to_owned(), "b".to_owned())].into();
        elector.want([("x".to_owned(), Claim { annotations, ..Claim::default() })].into(), |_| true, start);
        assert_eq!(told(&elector.steps(&BTreeMap::new(), start + SECOND)), ["renew x"]);
    }

    #[test]
    fn who_resigns_gives_everything_up() {
        let start = Instant::now();
        let mut elector = holder(start);
        let steps = elector.resign();
        assert_eq!(told(&steps), ["release x"]);
        elector.done(&steps[0], Some("9"), start);
        assert!(elector.held(start).is_empty());
    }
}
