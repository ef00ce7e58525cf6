//! `status --pods`.

use anyhow::Result;
use serde_json::json;

use super::args::{Common, Output};
use super::print::{self, line, or_dash};
use super::show::describe_node;
use crate::status::StatusFile;
use crate::view::pods::{self, NodeView, PodRow, Way};

/// By which way each pod of the node is served.
pub(super) fn show(common: &Common) -> Result<()> {
    let status = StatusFile::read(&common.state_dir)?;
    let view = pods::look(&common.pin_dir, status.as_ref())?;
    let rows = view.rows();
    let unknown = why_pods_are_not_known(status.as_ref(), &view);
    if common.output == Output::Json {
        return print::json(&json!({
            "node": status.as_ref().and_then(|status| status.node.as_ref()),
            "pods_are_known": unknown.is_none(),
            "why_not": unknown,
            "problems": view.problems,
            "pods": rows,
        }));
    }
    if let Some(node) = status.as_ref().and_then(|status| status.node.as_ref()) {
        line(format!("node: {}", describe_node(node)))?;
    }
    if let Some(why) = unknown {
        line(format!("which network namespace is which pod's is not known: {why}"))?;
    }
    for problem in &view.problems {
        line(format!("problem: {problem}"))?;
    }
    line("")?;
    print::table(
        &["pod", "addresses", "served by", "interface", "why not by sockets", "why not by tc"],
        rows.iter().map(cells),
    )
}

/// Why there may be pods that are no row.
fn why_pods_are_not_known(status: Option<&StatusFile>, view: &NodeView) -> Option<String> {
    let Some(status) = status else { return Some("no daemon runs".to_owned()) };
    let node = status.node.as_ref().map_or("this node", |node| node.name.as_str());
    match &view.pods {
        None => Some("the daemon has listed no pods yet, or may not".to_owned()),
        Some(pods) if pods.is_empty() && status.source.kind == "directory" => {
            Some(format!("{} has no pod of {node}", status.source.detail))
        }
        Some(_) => None,
    }
}

fn cells(row: &PodRow) -> Vec<String> {
    let name = row.pod.clone().or_else(|| row.netns.clone());
    let interfaces = row.interfaces.iter().map(|end| match end.mode {
        Some(mode) => format!("{} ({mode})", end.interface),
        None => end.interface.clone(),
    });
    let some = |texts: Vec<String>| or_dash(Some(texts.join(", ")).filter(|text| !text.is_empty()));
    let why = |way: &Way| or_dash(way.message.as_ref());
    vec![
        or_dash(name),
        some(row.addresses.iter().map(ToString::to_string).collect()),
        row.served_by.name().to_owned(),
        some(interfaces.collect()),
        why(&row.socket),
        why(&row.tc),
    ]
}
