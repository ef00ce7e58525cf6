//! A flood of first packets from sources that nobody has: the tables stay as they are bounded, and those who use theirs keep them.

use affinity_common::abi::{affinity, conntrack};

use super::*;

const FRONTEND: &str = "10.96.0.40:80";
const SERVICE: u32 = 8;
/// So small that the flood fills them many times.
const CLIENTS: u32 = 8_192;
const CONNECTIONS: u32 = 16_384;
/// First packets of the flood: each would have an affinity entry and two of a connection.
const FLOOD: u32 = 200_000;
/// How many of them come between two packets of each client that goes on.
const BETWEEN: u32 = 1_000;

/// Somebody who was there before.
struct Client {
    name: String,
    backend: String,
    /// Whether its connection is used while the flood goes on.
    goes_on: bool,
    /// Whether it is not on the backend that would be its first choice, since that was gone for a while.
    has_moved: bool,
}

impl Client {
    fn packet(&self, port: u16) -> Packet {
        Packet::tcp(&*format!("{}:{port}", self.name), FRONTEND).flags(Tcp::ACK)
    }
}

/// The backend that a client's packet goes to, whatever it is counted as.
fn backend<F: Over>(programs: &Programs, packet: &Packet) -> Result<String> {
    let (action, sent) = programs.run_uncounted(Program::Ingress, &in_family::<F>(packet).build())?;
    assert_eq!(action, PASS, "{packet:?}");
    let host = *sent.get(if F::VERSION == 4 { 33 } else { 53 }).context("an IP packet")?;
    Ok(format!("10.244.0.{host}:8080"))
}

/// How many of some clients still meet their backend, by a packet of theirs.
fn kept<F: Over>(programs: &Programs, of: &[&Client], packet: impl Fn(&Client) -> Packet) -> Result<usize> {
    let mut kept = 0;
    for client in of {
        kept += usize::from(backend::<F>(programs, &packet(client))? == client.backend);
    }
    Ok(kept)
}

pub fn clients_that_are_there_survive_a_flood_of_first_packets<F: Over>() -> Result<()> {
    require_root();
    let sizes = [(affinity::spec::<F>().name, CLIENTS), (conntrack::spec::<F>().name, CONNECTIONS)];
    let mut programs = Programs::load_with(&sizes)?;
    programs.set_service(&service::<F>(SERVICE, FRONTEND, Proto::TCP, 10_800))?;
    let mut clients = Vec::new();
    for number in 0..240u32 {
        let name = format!("10.1.{}.{}", number / 100, number % 100 + 1);
        let first = format!("{name}:40000");
        let has_moved = number % 4 >= 2;
        if has_moved {
            // It came while its first choice was away.
            let choice = backend::<F>(&programs, &syn(&first, FRONTEND))?;
            let held = programs.affinity::<F>(over::<F>(&first), SERVICE)?.context("no entry")?;
            let other = (held.backend.id - SERVICE * 10) % 3 + 1 + SERVICE * 10;
            let moved = Affinity { backend: BackendId { id: other }, ..held };
            programs.set_affinity::<F>(over::<F>(&first), SERVICE, moved)?;
            assert_ne!(backend::<F>(&programs, &syn(&first, FRONTEND))?, choice);
        }
        let backend = backend::<F>(&programs, &syn(&first, FRONTEND))?;
        reply::<F>(&programs, &Packet::tcp(&*backend, &*first).flags(Tcp::SYN_ACK), FRONTEND)?;
        clients.push(Client { name, backend, goes_on: number % 2 == 1, has_moved });
    }
    let of = |goes_on: bool, has_moved: bool| -> Vec<&Client> {
        clients.iter().filter(|client| client.goes_on == goes_on && client.has_moved == has_moved).collect()
    };
    let busy: Vec<&Client> = clients.iter().filter(|client| client.goes_on).collect();
    for number in 0..FLOOD {
        let [_, b, c, d] = number.to_be_bytes();
        let source = format!("{}.{b}.{c}.{d}:{}", 20 + number % 7, 1_024 + number % 60_000);
        backend::<F>(&programs, &syn(&source, FRONTEND))?;
        if number % BETWEEN == 0 {
            assert_eq!(kept::<F>(&programs, &busy, |client| client.packet(40_000))?, busy.len(), "after {number}");
        }
    }
    let entries = programs.conntrack::<F>()?.len();
    assert!(entries <= CONNECTIONS as usize, "{entries}");
    // Who was silent is led anew: to where it was first, which for those who have not moved is where they are.
    let (still, moved_still) = (of(false, false), of(false, true));
    let established = kept::<F>(&programs, &still, |client| client.packet(40_000))?;
    assert_eq!(established, still.len(), "silent connections");
    let again = kept::<F>(&programs, &still, |client| client.packet(40_001).flags(Tcp::SYN))?;
    assert_eq!(again, still.len(), "new connections of silent clients");
    let active = [of(true, false), of(true, true)].map(|of| {
        let kept = kept::<F>(&programs, &of, |client| client.packet(40_001).flags(Tcp::SYN))?;
        anyhow::Ok((kept, of.len()))
    });
    let [(kept_active, all_active), (kept_moved, all_moved)] =
        active.into_iter().collect::<Result<Vec<_>>>()?.try_into().expect("two of them");
    assert_eq!(kept_active, all_active, "new connections of clients that go on");
    let silent = kept::<F>(&programs, &moved_still, |client| client.packet(40_000))?;
    println!(
        "{}: {FLOOD} first packets, {entries} of {CONNECTIONS} entries; of clients that had moved away from their first choice, new \
         connections of {kept_moved} of {all_moved} that went on are where they were, connections of {silent} of {} silent ones",
        F::NAME,
        moved_still.len()
    );
    Ok(())
}
