//! Samples and what is said of them: the median and the quartiles.

use serde::Serialize;

/// Samples in nanoseconds.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

/// What samples come to, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Half of the samples are less.
    pub median: f64,
    /// A quarter of the samples is less.
    pub lower_quartile: f64,
    /// A quarter of the samples is more.
    pub upper_quartile: f64,
    /// The least.
    pub least: f64,
}

/// A median and where it lies: of 100 such intervals at least 95 hold the true median, whatever the samples' distribution.
///
/// Its bounds are samples, the k-th least and the k-th greatest; k is the greatest number for which fewer than k of n tosses
/// of a coin are heads with a probability of 2.5 % at most. Of fewer than six samples it is their whole range, and holds
/// the median less often.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Half of the samples are less.
    pub median: f64,
    /// The lower bound.
    pub lower: f64,
    /// The upper bound.
    pub upper: f64,
}

impl Samples {
    /// Adds a sample.
    pub fn push(&mut self, nanos: f64) {
        self.0.push(nanos);
    }

    /// How many times the other's sample of the same round each sample is.
    pub fn ratio_to(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect())
    }

    /// The median and its confidence interval of 95 %, by order statistics; zeroes without a sample.
    pub fn interval(&self) -> Interval {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let bound = bound(sorted.len());
        let at = |index: Option<usize>| index.and_then(|index| sorted.get(index)).copied().unwrap_or(0.0);
        Interval {
            median: self.summary().median,
            lower: at(Some(bound)),
            upper: at(sorted.len().checked_sub(bound + 1)),
        }
    }

    /// How much more each sample is than the other of the same round: what the machine's drift does to both, it does
    /// not to their difference.
    pub fn over(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a - b).collect())
    }

    /// Each sample and the other of the same round.
    pub fn plus(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a + b).collect())
    }

    /// What they come to; zeroes without a sample.
    pub fn summary(&self) -> Summary {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let quantile = |fourths: usize| {
            let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
            let (at, part) = (last * fourths / 4, last * fourths % 4);
            let next = sorted[(at + 1).min(last)];
            sorted[at] + (next - sorted[at]) * f64::from(u8::try_from(part).unwrap_or(0)) / 4.0
        };
        Summary { median: quantile(2), lower_quartile: quantile(1), upper_quartile: quantile(3), least: quantile(0) }
    }
}

/// The index, from either end of so many sorted samples, of the bound of the median's interval: [`Interval`] has the rule.
fn bound(samples: usize) -> usize {
    let mut ways = 0.5f64.powi(i32::try_from(samples).unwrap_or(i32::MAX));
    let (mut below, mut heads) = (ways, 0u32);
    while below <= 0.025 && (heads as usize) < samples / 2 {
        heads += 1;
        ways *= f64::from(u32::try_from(samples).unwrap_or(u32::MAX) - heads + 1) / f64::from(heads);
        below += ways;
    }
    (heads as usize).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(of: &[u32]) -> Samples {
        let mut samples = Samples::default();
        for n in of {
            samples.push((*n).into());
        }
        samples
    }

    #[test]
    fn quartiles_lie_between_samples_where_they_must() {
        let summary = samples(&[4, 1, 3, 2]).summary();
        assert_eq!(summary, Summary { median: 2.5, lower_quartile: 1.75, upper_quartile: 3.25, least: 1.0 });
        let summary = samples(&[30, 10, 20, 50, 40]).summary();
        assert_eq!(summary, Summary { median: 30.0, lower_quartile: 20.0, upper_quartile: 40.0, least: 10.0 });
        assert_eq!(samples(&[7]).summary().upper_quartile.to_bits(), 7f64.to_bits());
    }

    #[test]
    fn differences_and_sums_are_taken_round_by_round() {
        let sum = samples(&[1, 2, 3]).plus(&samples(&[10, 20, 90])).summary();
        assert_eq!((sum.median.to_bits(), sum.least.to_bits()), (22f64.to_bits(), 11f64.to_bits()));
        let summary = samples(&[110, 220, 330]).over(&samples(&[100, 200, 300])).summary();
        assert_eq!((summary.median.to_bits(), summary.least.to_bits()), (20f64.to_bits(), 10f64.to_bits()));
    }

    #[test]
    fn the_median_s_interval_is_that_of_the_tables() {
        // Of the sign test: the greatest k of which 2 P(heads < k) <= 5 %.
        let tabled = [(6, 1), (9, 2), (12, 3), (15, 4), (20, 6), (25, 8), (30, 10), (50, 18)];
        assert_eq!(tabled.map(|(samples, _)| (samples, bound(samples) + 1)), tabled);
        let interval = samples(&[7, 1, 6, 2, 5, 3, 4, 9, 8]).interval();
        assert_eq!(interval, Interval { median: 5.0, lower: 2.0, upper: 8.0 });
        let few = samples(&[3, 1, 2]).interval();
        assert_eq!(few, Interval { median: 2.0, lower: 1.0, upper: 3.0 });
        assert_eq!(samples(&[]).interval(), Interval { median: 0.0, lower: 0.0, upper: 0.0 });
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let interval = samples(&[50, 120, 90]).ratio_to(&samples(&[100, 200, 300])).interval();
        assert_eq!(interval, Interval { median: 0.5, lower: 0.3, upper: 0.6 });
    }
}
