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

impl Samples {
    /// Adds a sample.
    pub fn push(&mut self, nanos: f64) {
        self.0.push(nanos);
    }

    /// How much more each sample is than the other of the same round: what the machine's drift does to both, it does
    /// not to their difference.
    pub fn over(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a - b).collect())
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
    fn differences_are_taken_round_by_round() {
        let summary = samples(&[110, 220, 330]).over(&samples(&[100, 200, 300])).summary();
        assert_eq!((summary.median.to_bits(), summary.least.to_bits()), (20f64.to_bits(), 10f64.to_bits()));
    }
}
