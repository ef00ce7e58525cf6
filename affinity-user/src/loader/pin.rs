//! What maps are pinned as: a map whose contents have changed is another map, so that both can be there during an upgrade.

use affinity_common::abi::MapSpec;

/// The versions of maps that are not the first: whoever changes a map's key or value raises it, and
/// [`affinity_common::abi::LAYOUT`], and tells [`super::migrate`] how the one becomes the other.
const VERSIONS: &[(&str, u32)] = &[
    ("frontends_v4", 2),
    ("frontends_v6", 2),
    ("sockets_v4", 2),
    ("sockets_v6", 2),
    // Programs hand over to those of their own version alone: raised with each program that is handed over to.
    ("tail_calls", TAIL_CALLS),
];

/// The version of `tail_calls`.
const TAIL_CALLS: u32 = 6;

/// Pins of earlier versions within this layout that nobody uses once the programs are replaced.
pub const STALE: &[&str] = &["tail_calls-v4", "tail_calls-v5"];

/// The name of a map's pin: its own, and from its second version on that (`sockets_v4-v2`).
pub fn name(spec: &MapSpec) -> String {
    match VERSIONS.iter().find(|(name, _)| *name == spec.name) {
        Some((name, version)) => format!("{name}-v{version}"),
        None => spec.name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use affinity_common::abi::MAPS;

    use super::*;

    #[test]
    fn every_pin_has_a_name_of_its_own() {
        let names: BTreeSet<String> = MAPS.iter().map(name).collect();
        assert_eq!(names.len(), MAPS.len());
        assert!(VERSIONS.iter().all(|(name, version)| *version > 1 && MAPS.iter().any(|spec| spec.name == *name)));
        // The kernel keeps names with dots to itself.
        assert!(names.iter().all(|name| !name.contains('.')));
    }
}
