//! Two first connections of one client at the same instant meet on one backend: 10,000 pairs on two CPUs for each way in
//! which an entry may be found, missing, expired or failed over.

use std::hint;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::thread;

use affinity_common::abi::affinity::Affinity;
use affinity_common::family::V4;
use affinity_common::reason::{Program, Reason};
use affinity_common::types::{BackendId, Nanos, Proto};
use affinity_tests::packet::{Packet, Tcp};
use affinity_tests::privilege::require_root;
use affinity_tests::programs::{PASS, Programs, Service, now};
use anyhow::{Context as _, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

const PAIRS: u32 = 10_000;
/// Seconds; the machine has to be up for longer.
const TIMEOUT: u32 = 30;
const FRONTEND: &str = "10.96.0.10:80";
const GONE: BackendId = BackendId { id: 99 };

/// How the two find the client's entry.
#[derive(Clone, Copy, Debug)]
enum Found {
    Missing,
    Expired,
    FailedOver,
}

#[test]
fn first_connections_at_one_instant_meet_on_one_backend() -> Result<()> {
    require_root();
    let cpus = cpus()?;
    assert!(cpus.len() >= 2, "needs two CPUs to have two packets at one instant");
    let mut programs = Programs::load()?;
    programs.set_service(&Service {
        id: 1,
        frontend: FRONTEND.parse()?,
        proto: Proto::TCP,
        timeout: TIMEOUT,
        backends: (1..=5u8).map(|id| (id.into(), ([10, 244, 0, 100 + id], 8080).into(), true)).collect(),
    })?;
    programs.set_backend(1, GONE.id, "10.244.0.199:8080".parse()?, false)?;
    for (found, expected) in [
        (Found::Missing, Reason::AffinityNew),
        (Found::Expired, Reason::AffinityExpired),
        (Found::FailedOver, Reason::AffinityFailover),
    ] {
        let before = programs.counters(Program::Ingress)?;
        let parted = race(&mut programs, &cpus, found)?;
        let after = programs.counters(Program::Ingress)?;
        let count = |reason: Reason| after[reason as usize] - before[reason as usize];
        println!(
            "{found:?}: {PAIRS} pairs, {parted} parted, {} adopted the other's choice",
            count(Reason::AffinityAdopted)
        );
        assert_eq!(parted, 0, "{found:?}");
        assert_eq!(count(expected), u64::from(PAIRS), "one of each pair chose, the other followed ({found:?})");
        assert_eq!(count(Reason::AffinityHit) + count(Reason::AffinityAdopted), u64::from(PAIRS));
        assert!(count(Reason::AffinityAdopted) > 0, "no two packets ever met: this is no race ({found:?})");
    }
    Ok(())
}

/// Runs the pairs; returns how many parted.
fn race(programs: &mut Programs, cpus: &[usize], found: Found) -> Result<u32> {
    let mut parted = 0;
    let expired = now()?
        .0
        .checked_sub(u64::from(TIMEOUT + 1) * 1_000_000_000)
        .map(Nanos)
        .context("the machine has just booted")?;
    for pair in 0..PAIRS {
        let [.., a, b] = pair.to_be_bytes();
        let client = SocketAddr::from(([10, 200, a, b], 40_000));
        let used = match found {
            Found::Missing => None,
            Found::Expired => Some((BackendId { id: 1 + pair % 5 }, expired)),
            Found::FailedOver => Some((GONE, now()?)),
        };
        match used {
            Some((backend, used)) => {
                let entry = Affinity { backend, last_used: used.ticks(), since: used.ticks(), zero: 0 };
                programs.set_affinity::<V4>(client, 1, entry)?;
            }
            None if programs.affinity::<V4>(client, 1)?.is_some() => programs.remove_affinity::<V4>(client, 1)?,
            None => {}
        }
        let shared = &*programs;
        let arrived = &AtomicU32::new(0);
        let chosen: Vec<Result<Vec<u8>>> = thread::scope(|scope| {
            let one = |index: usize| {
                let port = 40_000 + u16::try_from(index).unwrap_or_default();
                let packet = Packet::tcp((client.ip(), port), FRONTEND).flags(Tcp::SYN).build();
                let cpu = cpus[index];
                scope.spawn(move || {
                    let mut set = CpuSet::new();
                    set.set(cpu)?;
                    sched_setaffinity(Pid::from_raw(0), &set)?;
                    // Spinning: a thread that is woken comes too late to meet another.
                    arrived.fetch_add(1, SeqCst);
                    while arrived.load(SeqCst) < 2 {
                        hint::spin_loop();
                    }
                    let (action, out) = shared.run_uncounted(Program::Ingress, &packet)?;
                    assert_eq!(action, PASS);
                    Ok(out.get(30..34).context("an IPv4 packet")?.to_vec())
                })
            };
            [one(0), one(1)].into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let chosen = chosen.into_iter().collect::<Result<Vec<_>>>()?;
        parted += u32::from(chosen[0] != chosen[1]);
    }
    Ok(parted)
}

fn cpus() -> Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or_default()).collect())
}
