//! The tour: what sticky services promise, act by act, each with what must be seen.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use affinity_tests::view::SessionRow;
use anyhow::Result;
use comfy_table::{Table, presets};

use crate::stage::{Door, Service, Stage, Way};

/// Which client reached which pod how often.
type Seen = Vec<BTreeMap<String, u32>>;

/// The tour so far.
struct Tour {
    acts: u32,
    kept: u32,
    broken: u32,
}

impl Tour {
    fn act(&mut self, title: &str) {
        self.acts += 1;
        println!("\n{}. {title}", self.acts);
    }

    fn expect(&mut self, what: &str, held: bool) {
        println!("   [{}] {what}", if held { "ok" } else { "NOT SO" });
        if held {
            self.kept += 1;
        } else {
            self.broken += 1;
        }
    }
}

/// Walks through it once; true if every expectation held.
pub fn run(stage: &mut Stage, requests: u32) -> Result<bool> {
    let mut tour = Tour { acts: 0, kept: 0, broken: 0 };
    let timeout = stage.affinity().unwrap_or_default();

    tour.act(&format!("{requests} requests of three clients to a service with sessionAffinity: ClientIP"));
    let before = stage.connections()?;
    let sticky = ask_all(stage, Service::Sticky, requests)?;
    show(stage, &stage.clients(), &sticky);
    let after = stage.connections()?;
    // In turn, but for the last round; a first packet that was lost and comes again is counted again.
    let half = u64::from(requests / 2).saturating_sub(3);
    let [packets, sockets] = [0, 1].map(|way| after[way] - before[way]);
    println!(
        "   {packets} connections were translated packet by packet (TC), {sockets} where their sockets connect (cgroup)"
    );
    tour.expect("each client came by both ways", packets >= half && sockets >= half);
    tour.expect("and reached one pod, whichever way it came", sticky.iter().all(|pods| pods.len() == 1));
    let used: BTreeSet<&String> = sticky.iter().flat_map(BTreeMap::keys).collect();
    tour.expect("different clients reached at least two pods", used.len() >= 2);
    show_sessions(stage)?;
    let sessions = stage.sessions()?;
    tour.expect("an affinity entry for each client, all live", sessions.iter().filter(|s| s.is_live()).count() == 3);

    tour.act("the same clients to a service with sessionAffinity: None");
    let spread = ask_all(stage, Service::Spread, 150)?;
    show(stage, &stage.clients(), &spread);
    tour.expect("each client reached several pods", spread.iter().all(|pods| pods.len() >= 3));

    let people = stage.outsiders();
    tour.act(&format!("{} people outside, by the node's port and by the load balancer's address", people.len()));
    let (mut from_outside, mut as_themselves) = (Vec::new(), true);
    for person in &people {
        let mut pods = BTreeMap::new();
        for door in Door::ALL.into_iter().cycle().take(50) {
            let (pod, client) = stage.ask_from_outside(*person, door)?;
            as_themselves &= client == *person;
            *pods.entry(pod).or_default() += 1;
        }
        from_outside.push(pods);
    }
    let names: Vec<String> = people.iter().map(IpAddr::to_string).collect();
    show(stage, &names, &from_outside);
    tour.expect("each reached one pod, by whichever of them", from_outside.iter().all(|pods| pods.len() == 1));
    let used: BTreeSet<&String> = from_outside.iter().flat_map(BTreeMap::keys).collect();
    tour.expect("different people reached at least two pods", used.len() >= 2);
    tour.expect("and the pods saw their own addresses", as_themselves);

    let lost = pod_of(&sticky, 0);
    tour.act(&format!("{lost} goes away"));
    stage.take_away(&lost)?;
    let after = ask_all(stage, Service::Sticky, 60)?;
    show(stage, &stage.clients(), &after);
    let moved = |client: usize| pod_of(&after, client) != pod_of(&sticky, client);
    let was_there = |client: usize| pod_of(&sticky, client) == lost;
    let clients = 0..stage.clients().len();
    tour.expect("its clients moved, each to one other pod", {
        clients.clone().filter(|&c| was_there(c)).all(|c| moved(c) && after[c].len() == 1)
    });
    tour.expect("and only they", clients.clone().filter(|&c| !was_there(c)).all(|c| !moved(c)));

    tour.act(&format!("{lost} comes back"));
    stage.bring_back(&lost)?;
    let back = ask_all(stage, Service::Sticky, 60)?;
    show(stage, &stage.clients(), &back);
    tour.expect("nobody moves again", clients.clone().all(|c| pod_of(&back, c) == pod_of(&after, c)));

    tour.act(&format!("nobody asks for {timeout} s, the service's timeoutSeconds"));
    let silence = Instant::now();
    let wait = Duration::from_secs(timeout.into());
    // Up to just before the bound the entries hold.
    thread::sleep(wait.mul_f32(0.5));
    let halfway = stage.sessions()?;
    tour.expect("halfway the entries are live", halfway.iter().filter(|s| s.is_live()).count() == 3);
    show_sessions(stage)?;
    thread::sleep((wait + Duration::from_millis(200)).saturating_sub(silence.elapsed()));
    let sessions = stage.sessions()?;
    tour.expect("then they have expired", !sessions.is_empty() && sessions.iter().all(|s| !s.is_live()));
    show_sessions(stage)?;
    let fresh = ask_all(stage, Service::Sticky, 60)?;
    show(stage, &stage.clients(), &fresh);
    tour.expect("a fresh choice for each client, which it keeps", fresh.iter().all(|pods| pods.len() == 1));

    tour.act("the service is switched to sessionAffinity: None, and back");
    stage.set_sticky(false)?;
    let none = ask_all(stage, Service::Sticky, 150)?;
    show(stage, &stage.clients(), &none);
    tour.expect("its clients spread", none.iter().all(|pods| pods.len() >= 3));
    stage.set_sticky(true)?;
    let again = ask_all(stage, Service::Sticky, 60)?;
    show(stage, &stage.clients(), &again);
    tour.expect("and are kept again", again.iter().all(|pods| pods.len() == 1));

    println!("\n{} expectations held, {} did not", tour.kept, tour.broken);
    Ok(tour.broken == 0)
}

/// The one pod of a client, or all of its pods where it has several.
fn pod_of(seen: &Seen, client: usize) -> String {
    seen[client].keys().cloned().collect::<Vec<_>>().join("+")
}

/// `requests` in all, the clients taking turns, by their packets and by their sockets in turn.
fn ask_all(stage: &Stage, service: Service, requests: u32) -> Result<Seen> {
    let clients = stage.clients().len();
    let mut seen: Seen = vec![BTreeMap::new(); clients];
    for request in 0..requests as usize {
        let client = request % clients;
        let way = if (request / clients).is_multiple_of(2) { Way::Packets } else { Way::Sockets };
        *seen[client].entry(stage.ask(client, service, way)?).or_default() += 1;
    }
    Ok(seen)
}

fn show(stage: &Stage, names: &[String], seen: &Seen) {
    let pods = stage.pods();
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    let header = pods.iter().map(|(name, ready)| if *ready { name.clone() } else { format!("({name})") });
    table.set_header(std::iter::once(String::new()).chain(header));
    for (client, reached) in names.iter().zip(seen) {
        let counts = pods.iter().map(|(name, _)| reached.get(name).map_or(String::from("."), u32::to_string));
        table.add_row(std::iter::once(client.clone()).chain(counts));
    }
    let total =
        pods.iter().map(|(name, _)| seen.iter().filter_map(|reached| reached.get(name)).sum::<u32>().to_string());
    table.add_row(std::iter::once(String::from("per pod")).chain(total));
    println!("{table}");
}

fn show_sessions(stage: &Stage) -> Result<()> {
    for session in stage.sessions()? {
        println!("   {}", describe(&session));
    }
    Ok(())
}

fn describe(session: &SessionRow) -> String {
    let left = session.left_seconds.map_or_else(|| String::from("expired"), |left| format!("{left:.1} s left"));
    format!("{} -> {}: {left}", session.client, session.pod.as_deref().unwrap_or("a pod that is gone"))
}
