//! What `promtool check metrics` and the conventions of Prometheus ask of an exposition, asked of ours; and that the
//! documentation names the same metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;

use affinity_common::abi::counters::{Counter, index};
use affinity_common::reason::{Program, Reason};

use super::exposition::Format;
use super::*;
use crate::duties::{DutiesStatus, PoolStatus};
use crate::ipam::pool::Usage;
use crate::status::SourceStatus;
use crate::tables::Table as _;
use crate::tables::memory::MemoryTables;

fn metrics() -> Arc<Metrics> {
    let memory = MemoryTables::default();
    let counter = Counter { packets: 3, bytes: 180 };
    memory.counters.clone().insert(&index(Program::Ingress, Reason::AffinityNew), &counter).expect("room");
    let metrics = Metrics::new(memory.tables());
    metrics.sync.observe(0.001);
    let counts = SourceCounts { stale_since: Some(Timestamp::now()), ..SourceCounts::default() };
    let mut status = StatusFile::new(SourceStatus::new("directory", "/somewhere")).expect("proc");
    let usage = Usage { total: 254, used: 3, available: 251 };
    status.duties = Some(DutiesStatus {
        gives_addresses: true,
        pools: [("lab".to_owned(), PoolStatus { ipv4: usage, ipv6: Usage::default() })].into(),
        unmet: [("PoolExhausted".to_owned(), 2)].into(),
        announced: vec![[192, 0, 2, 1].into()],
    });
    metrics.publish(Published {
        status,
        seen_interfaces: true,
        counts: Counts::default(),
        sources: Kind::ALL.map(|kind| (kind, counts.clone())).into(),
        ignored: IgnoredTriggers::default(),
    });
    Arc::new(metrics)
}

fn exposition(format: Format) -> String {
    format.of(&metrics().text().expect("tables in memory"))
}

/// A line of a sample: name, labels and value.
fn sample(line: &str) -> (&str, BTreeMap<&str, &str>, f64) {
    let (series, value) = line.rsplit_once(' ').expect("a value");
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let labels = labels.strip_suffix('}').expect("labels end");
    let pairs = labels.split("\",").filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.trim_end_matches('"').split_once("=\"").expect("a label"));
    (name, pairs.collect(), value.parse().expect("a number"))
}

/// The metric that a sample is of.
fn family<'a>(name: &'a str, types: &BTreeMap<&str, &str>) -> &'a str {
    let mut of_histogram = ["_bucket", "_sum", "_count"].iter().filter_map(|suffix| name.strip_suffix(suffix));
    of_histogram.find(|name| types.get(name) == Some(&"histogram")).unwrap_or(name)
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        && !name.contains("__")
}

/// Every complaint about an exposition in the older format.
fn complaints(text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let (mut types, mut helps) = (BTreeMap::new(), BTreeMap::new());
    let mut series = BTreeSet::new();
    let mut finished = BTreeSet::new();
    let mut current = "";
    let mut complain = |name: &str, what: &str| complaints.push(format!("{name}: {what}"));
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap_or((rest, ""));
            if help.len() < 10 || help.ends_with('.') {
                complain(name, "no help, or a full stop after it");
            }
            if helps.insert(name, help).is_some() {
                complain(name, "a second HELP");
            }
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            if types.insert(name, kind).is_some() {
                complain(name, "a second TYPE");
            }
            if !helps.contains_key(name) {
                complain(name, "no HELP before TYPE");
            }
            if (kind == "counter") != name.ends_with("_total") {
                complain(name, "counters end in _total, and nothing else does");
            }
            for suffix in ["_count", "_sum", "_bucket", "_counter", "_gauge", "_histogram"] {
                if name.trim_end_matches("_total").ends_with(suffix) {
                    complain(name, "the name says the type");
                }
            }
            for unit in
                ["milliseconds", "ms", "microseconds", "nanoseconds", "minutes", "kilobytes", "megabytes", "percent"]
            {
                if name.split('_').any(|part| part == unit) {
                    complain(name, "not a base unit");
                }
            }
            for unit in ["seconds", "bytes", "ratio"] {
                let at_the_end = name.trim_end_matches("_total").ends_with(&format!("_{unit}"));
                if name.split('_').any(|part| part == unit) && !at_the_end {
                    complain(name, "the unit is not at the end");
                }
            }
            if name.contains("duration") && !name.contains("duration_seconds") {
                complain(name, "a duration without its unit");
            }
            if !is_name(name) {
                complain(name, "not lower case with single underscores");
            }
            if !name.starts_with("affinity_") && !name.starts_with("process_") {
                complain(name, "no prefix");
            }
            continue;
        }
        let (name, labels, value) = sample(line);
        let of = family(name, &types);
        if !types.contains_key(of) {
            complain(name, "a sample without TYPE");
        }
        if of != current && !finished.insert(of) {
            complain(of, "its samples are not together");
        }
        current = of;
        if !series.insert(line.rsplit_once(' ').map(|(series, _)| series)) {
            complain(line, "twice");
        }
        if types.get(of) == Some(&"counter") && value < 0.0 || value.is_nan() {
            complain(line, "no value that it can have");
        }
        for label in labels.keys() {
            if !is_name(label) || *label == "le" && !name.ends_with("_bucket") || *label == "quantile" {
                complain(line, "a label of an odd name");
            }
        }
    }
    complaints
}

#[test]
fn the_exposition_is_as_prometheus_wants_it() {
    let text = exposition(Format::Prometheus);
    assert_eq!(complaints(&text), Vec::<String>::new(), "{text}");
    assert!(
        text.contains(
            "affinity_datapath_packets_total{program=\"ingress\",reason=\"affinity-new\",verdict=\"pass\"} 3\n"
        )
    );
    assert!(text.contains("affinity_selections_total{reason=\"affinity-new\"} 3\n"), "{text}");
    assert!(text.contains("affinity_sync_duration_seconds_count 1\n"), "{text}");
    for line in [
        "affinity_address_leader 1",
        "affinity_pool_addresses{pool=\"lab\",family=\"ipv4\",state=\"available\"} 251",
        "affinity_unmet_services{reason=\"PoolExhausted\"} 2",
        "affinity_announced_addresses{family=\"ipv4\"} 1",
        "affinity_announced_addresses{family=\"ipv6\"} 0",
    ] {
        assert!(text.contains(&format!("{line}\n")), "{line}: {text}");
    }
    assert!(!text.contains("pool=\"lab\",family=\"ipv6\""), "it has no IPv6 addresses: {text}");
}

#[test]
fn the_lint_complains() {
    for (wrong, about) in [
        ("# TYPE affinity_a gauge\naffinity_a 1\n", "no HELP"),
        ("# HELP affinity_a what it is\n# TYPE affinity_a counter\naffinity_a 1\n", "_total"),
        ("# HELP affinity_a_ms what it is\n# TYPE affinity_a_ms gauge\naffinity_a_ms 1\n", "base unit"),
        ("# HELP affinity_a what it is\n# TYPE affinity_a gauge\naffinity_a 1\naffinity_a 1\n", "twice"),
        ("# HELP affinity_seconds_a what it is\n# TYPE affinity_seconds_a gauge\n", "not at the end"),
        ("affinity_a 1\n", "without TYPE"),
    ] {
        assert!(
            complaints(wrong).iter().any(|complaint| complaint.contains(about)),
            "{wrong}: {:?}",
            complaints(wrong)
        );
    }
}

#[test]
fn open_metrics_ends_and_names_units() {
    let text = exposition(Format::OpenMetrics);
    assert!(text.ends_with("# EOF\n"));
    assert!(text.contains("# TYPE affinity_datapath_bytes counter\n# UNIT affinity_datapath_bytes bytes\n"), "{text}");
}

#[test]
fn every_metric_is_told_as_it_is_defined() {
    let text = exposition(Format::Prometheus);
    let told: Vec<(String, String)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .collect();
    let defined: Vec<_> = definitions::ALL.iter().map(|it| (it.full_name(), it.kind_name().to_owned())).collect();
    assert_eq!(told, defined);
    let types: BTreeMap<&str, &str> = told.iter().map(|(name, kind)| (name.as_str(), kind.as_str())).collect();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, mut labels, _) = sample(line);
        labels.remove("le");
        let of = definitions::ALL.iter().find(|it| it.full_name() == family(name, &types)).expect("defined");
        assert_eq!(labels.into_keys().collect::<BTreeSet<_>>(), of.labels.iter().copied().collect(), "{line}");
    }
}

#[test]
fn the_documentation_has_the_same_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let text = fs::read_to_string(path).expect("docs/metrics.md");
    let start = text.find("| metric |").expect("a table");
    let table = &text[start..];
    let end = table.find("\n\n").map_or(table.len(), |end| end + 1);
    let ours = definitions::table();
    assert_eq!(&table[..end], ours, "docs/metrics.md is to have this table:\n{ours}");
}
