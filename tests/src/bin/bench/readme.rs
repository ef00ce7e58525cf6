//! The figures as README.md has them, to be pasted there: Markdown, of one run.

use std::fmt::Write as _;

use crate::Bench;
use crate::cases::{
    ESTABLISHED_PLAIN, ESTABLISHED_STICKY, FIRST_HIT, FIRST_NEW, NODE_PORT, NODE_PORT_FIRST, NOT_SERVICE, REPLY, WAY,
    WAY_BACK, WAY_FIRST,
};
use crate::crr::{self, Rates};
use crate::north_south::{self, Proxy};
use crate::report::{Report, interval, ratio, text};
use crate::sockets::{self, Call, Calls, Named};
use crate::version::Version;

/// The rows, and what the README calls them.
const PACKETS: [(&str, &str); 11] = [
    (NOT_SERVICE.name, "not for a service"),
    (ESTABLISHED_STICKY.name, "established, with affinity"),
    (ESTABLISHED_PLAIN.name, "established, without affinity"),
    (REPLY.name, "reply"),
    (FIRST_HIT.name, "first packet, affinity hit"),
    (FIRST_NEW.name, "first packet, new client"),
    (NODE_PORT.name, "to a node port, pod of this node: established"),
    (NODE_PORT_FIRST.name, "first packet of that, affinity hit"),
    (WAY.name, "to a node port, pod elsewhere: established, both programs"),
    (WAY_BACK.name, "reply to that, both programs"),
    (WAY_FIRST.name, "first packet of that, both programs"),
];

const CALLS: [(Call, Named, &str); 4] = [
    (Call::Reconnect, Named::Sticky, "`connect`, again, with affinity"),
    (Call::Fresh, Named::Sticky, "`connect`, a new socket, with affinity"),
    (Call::Send, Named::Sticky, "`sendmsg`, with affinity"),
    (Call::Fresh, Named::Pod, "`connect`, not to a service"),
];

/// The tables of the parts that were measured.
pub fn tables(bench: &Bench) -> String {
    let setup = &bench.setup;
    let mut text = format!("{} rounds on {}, Linux {}\n", setup.rounds, setup.processor, setup.kernel);
    let tables = [
        bench.packets.as_ref().map(packets),
        bench.sockets.as_ref().map(calls),
        bench.crr.as_ref().map(exchanges),
        bench.north_south.as_ref().map(from_outside),
    ];
    for table in tables {
        text += &table.unwrap_or_default();
    }
    text
}

fn packets(report: &Report) -> String {
    let most = report.rows.iter().map(|row| row.services).max().unwrap_or(1);
    let empty = report.floors.first().map_or(f64::NAN, |floor| floor.empty.median);
    let mut table = format!(
        "\nThe empty program takes {empty:.0}.\n\n\
         | packet | 1 service | {most} services | against the empty program | IPv6, 1 service | to IPv4 |\n\
         |---|---|---|---|---|---|\n"
    );
    for (row, name) in PACKETS {
        let find = |version, services| report.find(version, row, services, false);
        let (one, ipv6) = (find(Version::V4, 1), find(Version::V6, 1));
        let against = one.map(|row| format!("{:.1} times", row.nanos.median / empty));
        let cells = [
            one.map(|row| text(&row.nanos)),
            find(Version::V4, most).map(|row| text(&row.nanos)),
            against,
            ipv6.map(|row| text(&row.nanos)),
            ipv6.and_then(|row| row.to_ipv4.as_ref()).map(ratio),
        ];
        line(&mut table, name, cells);
    }
    table
}

fn calls(calls: &Calls) -> String {
    let mut text = "\n| call | IPv4 | over an empty program | IPv6 | over an empty program | to IPv4 |\n\
                    |---|---|---|---|---|---|\n"
        .to_owned();
    for (call, named, name) in CALLS {
        let find = |version| sockets::find(&calls.rows, call, named, version);
        let (v4, v6) = (find(Version::V4), find(Version::V6));
        let cells = [
            v4.map(|row| interval(&row.nanos)),
            v4.map(|row| interval(&row.over_empty)),
            v6.map(|row| interval(&row.nanos)),
            v6.map(|row| interval(&row.over_empty)),
            v6.and_then(|row| row.to_ipv4.as_ref()).map(ratio),
        ];
        line(&mut text, name, cells);
    }
    text
}

fn exchanges(rates: &Rates) -> String {
    let mut text =
        "\n| way | services | family | exchanges a second, 1 thread | to direct with conntrack | 16 threads | to \
                    direct with conntrack |\n|---|---|---|---|---|---|---|\n"
            .to_owned();
    for first in rates.rows.iter().filter(|row| row.threads == 1) {
        let same = |row: &&crr::Row| {
            (row.way, row.version, row.services) == (first.way, first.version, first.services) && row.threads > 1
        };
        let many = rates.rows.iter().find(same);
        let cells = [
            Some(first.services.map_or_else(|| "-".to_owned(), |services| services.to_string())),
            Some(first.version.name().to_owned()),
            Some(interval(&first.rate)),
            Some(crr::ratio_text(&first.ratio)),
            many.map(|row| interval(&row.rate)),
            many.map(|row| crr::ratio_text(&row.ratio)),
        ];
        line(&mut text, first.way.name(), cells);
    }
    text
}

fn from_outside(rates: &north_south::Rates) -> String {
    let mut text =
        "\n| to a pod of | family | threads | Affinity | kube-proxy | ratio |\n|---|---|---|---|---|---|\n".to_owned();
    for row in rates.rows.iter().filter(|row| row.proxy == Proxy::Affinity) {
        let peer = rates.rows.iter().find(|peer| peer.proxy == Proxy::KubeProxy && peer.setting() == row.setting());
        let cells = [
            Some(row.version.name().to_owned()),
            Some(row.threads.to_string()),
            Some(interval(&row.rate)),
            peer.map(|peer| interval(&peer.rate)),
            row.ratio.as_ref().map(crr::ratio_text),
        ];
        line(&mut text, row.pod.name(), cells);
    }
    text
}

fn line<const N: usize>(text: &mut String, name: &str, cells: [Option<String>; N]) {
    let cells = cells.map(Option::unwrap_or_default).join(" | ");
    let _ = writeln!(text, "| {name} | {cells} |");
}
