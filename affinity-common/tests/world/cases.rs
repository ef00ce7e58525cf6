//! How many cases a property is tried with.

use proptest::prelude::ProptestConfig;

/// So many, or as many as `PROPTEST_CASES` says. No seeds are kept: they mean nothing once a generator has changed. What was
/// found is written down as a test of its own.
pub fn cases(of_its_own: u32) -> ProptestConfig {
    let asked = ProptestConfig::default().cases;
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { asked } else { of_its_own };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}
