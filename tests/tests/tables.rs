//! The kernel's maps as tables, and what the reconciler writes into them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use affinity_common::abi::affinity::{Affinity, AffinityKey};
use affinity_common::abi::conntrack::{Conntrack, ConntrackKey};
use affinity_common::abi::counters::Counter;
use affinity_common::abi::filter::FilterWord;
use affinity_common::abi::frontends::{Frontend, FrontendKey};
use affinity_common::abi::slots::Slot;
use affinity_common::abi::sockets::{Socket, SocketCookie, SocketKey};
use affinity_common::family::{V4, V6};
use affinity_common::types::{BackendId, Port, Proto, Seconds, Ticks};
use affinity_tests::mountns::{BPFFS, MountNs};
use affinity_tests::privilege::require_root;
use affinity_tests::programs::now;
use affinity_user::collector::Walker;
use affinity_user::loader::{Datapath, Options, Sizes};
use affinity_user::model::{FrontendKind, ServiceName, ServicePortName};
use affinity_user::plan::{BackendPlan, FamilyPlan, FrontendPlan, Origin, PortPlan, Scope, Scopes, ServicePlan};
use affinity_user::reconcile::{Change, Reconciler};
use affinity_user::tables::{TableError, bpf, dump};
use anyhow::{Result, anyhow};
use aya::maps::MapData;

/// As `linux/bpf.h` has it.
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// Runs a test on pinned maps of its own, so small that they can be filled.
fn on_maps(test: impl FnOnce(&Path) -> Result<()> + Send) -> Result<()> {
    on_maps_of(&[("frontends", 2), ("backends", 4), ("slots", 1024), ("affinity", 1)], test)
}

/// Runs a test on pinned maps of its own, some of them of these sizes.
fn on_maps_of(wanted: &[(&str, u32)], test: impl FnOnce(&Path) -> Result<()> + Send) -> Result<()> {
    require_root();
    MountNs::for_node()?.enter(|| {
        let mut sizes = Sizes::default();
        for (map, size) in wanted {
            sizes.set(map, *size).map_err(|error| anyhow!(error))?;
        }
        let pin_dir = PathBuf::from(BPFFS).join("affinity");
        let _datapath = Datapath::open(&Options { pin_dir: pin_dir.clone(), sizes, ..Options::default() })?;
        test(&pin_dir)
    })
}

fn open(pin_dir: &Path) -> Result<Reconciler> {
    Ok(Reconciler::open(bpf::open_pinned(pin_dir)?, Box::new(Instant::now))?)
}

/// Everything but slots and the configuration.
fn lines(pin_dir: &Path) -> Result<Vec<String>> {
    let lines = dump::dump(&bpf::open_pinned(pin_dir)?)?;
    Ok(lines.into_iter().filter(|line| !line.starts_with("slots") && !line.starts_with("config")).collect())
}

/// A service on 10.96.0.`n` with pods 10.244.`n`.x.
fn service(n: u8, affinity: Option<u32>, pods: &[u8]) -> Change {
    let name = ServiceName::new("default", format!("s{n}"));
    let port = Port::new(8080);
    let backend = |pod: &u8| BackendPlan {
        addr: [10, 244, n, *pod],
        port,
        eligible: Scopes { cluster: true, local: false },
        target: Some(format!("pod-{pod}").into()),
    };
    let frontend = FrontendPlan {
        addr: [10, 96, 0, n],
        port: Port::new(80),
        proto: Proto::TCP,
        origin: Origin::Anybody,
        kind: FrontendKind::ClusterIp,
        scope: Scope::Cluster,
        parts_outsiders: false,
        has_ranges: false,
        port_alone: false,
    };
    let v4 =
        FamilyPlan { frontends: vec![frontend], backends: pods.iter().map(backend).collect(), ..FamilyPlan::default() };
    Change::Apply(ServicePlan {
        name: name.clone(),
        ports: vec![PortPlan {
            name: ServicePortName { service: name, port: "http".into(), proto: Proto::TCP },
            seed: 0x5eed,
            affinity: affinity.map(Seconds::new),
            shares_affinity: false,
            v4,
            v6: FamilyPlan::default(),
        }],
        health: None,
    })
}

#[test]
fn a_service_is_in_the_maps_and_the_next_daemon_finds_it() -> Result<()> {
    on_maps(|pin_dir| {
        let mut reconciler = open(pin_dir)?;
        reconciler.synced();
        let report = reconciler.reconcile([service(1, Some(60), &[1, 2])]);
        assert!(report.failed.is_empty(), "{report:?}");
        let expected = [
            "frontends_v4 10.96.0.1:80/TCP service=1 affinity=1 seed=00005eed slots=0+251 timeout=60 scope=0 flags=0",
            "addresses_v4 10.96.0.1 service",
            "backends_v4 1/1 addr=10.244.1.1:8080 eligible=1",
            "backends_v4 1/2 addr=10.244.1.2:8080 eligible=1",
            "service_filter 8368 bits=0000000000000002",
            "services 1 name=default/s1/http/TCP",
            "backend_names 1/1 name=pod-1",
            "backend_names 1/2 name=pod-2",
            "backend_stats 1/1 connections=0",
            "backend_stats 1/2 connections=0",
            "ids 0 service=2 backend=3",
        ];
        assert_eq!(lines(pin_dir)?, expected);
        assert!(reconciler.audit()?.differences.is_empty());

        let mut next = open(pin_dir)?;
        assert_eq!(next.reconcile([service(1, Some(60), &[1, 2])]).writes, 0);
        assert_eq!(next.synced().writes, 0);
        assert_eq!(lines(pin_dir)?, expected);

        let mut last = open(pin_dir)?;
        last.synced();
        assert_eq!(lines(pin_dir)?, ["ids 0 service=2 backend=3"]);
        Ok(())
    })
}

#[test]
fn a_full_map_is_told_from_other_refusals() -> Result<()> {
    on_maps(|pin_dir| {
        let mut reconciler = open(pin_dir)?;
        reconciler.synced();
        reconciler.reconcile((1..=3).map(|n| service(n, None, &[1])));
        let problems: Vec<_> = reconciler.problems().map(ToString::to_string).collect();
        assert_eq!(problems, ["default/s3/http/TCP: frontends_v4 is full (2): raise --map-size frontends=N"]);
        reconciler.reconcile([Change::Delete(ServiceName::new("default", "s1")), service(3, None, &[1])]);
        assert_eq!(reconciler.problems().count(), 0);

        let mut tables = bpf::open_pinned(pin_dir)?;
        let slots = &mut tables.shared.slots;
        assert_eq!(
            slots.insert(&1024, &Slot::default()),
            Err(TableError::Full { map: "slots".into(), capacity: 1024 })
        );
        assert_eq!(slots.get(&1024)?, None);
        let absent = tables.v4.frontends.remove(&FrontendKey::default());
        assert_eq!(absent, Err(TableError::NotFound { map: "frontends_v4".into() }));
        let missing = bpf::open_pinned(Path::new("/sys/fs/bpf/none")).err().expect("nothing is there");
        assert!(missing.is_missing(), "{missing}");
        Ok(())
    })
}

#[test]
fn affinity_entries_and_counters_are_read_and_taken_out() -> Result<()> {
    on_maps(|pin_dir| {
        let mut tables = bpf::open_pinned(pin_dir)?;
        let counter = Counter { packets: 3, bytes: 4 };
        tables.shared.counters.insert(&1, &counter)?;
        assert_eq!(tables.shared.counters.get(&1)?, Some(counter));
        tables.shared.counters.remove(&1)?;
        assert_eq!(tables.shared.counters.get(&1)?, Some(Counter::default()));

        let mut reconciler = open(pin_dir)?;
        reconciler.synced();
        reconciler.reconcile([service(1, Some(60), &[1]), service(2, Some(60), &[1])]);
        let ids: Vec<_> = tables.shared.services.keys()?;
        for (client, service) in (0..100).zip(ids.iter().cycle()) {
            tables.v4.affinity.insert(&AffinityKey::new([10, 0, 0, client], *service, 0), &Affinity::default())?;
        }
        assert_eq!(tables.v4.affinity.len()?, 100);
        reconciler.reconcile([service(1, None, &[1])]);
        while let Some(due) = reconciler.next_sweep() {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            reconciler.sweep_affinity(7)?;
        }
        let left = tables.v4.affinity.keys()?;
        assert_eq!(left.len(), 50);
        assert!(left.iter().all(|key| key.service == ids[1]));
        Ok(())
    })
}

#[test]
fn affinity_is_refreshed_by_the_datapaths_own_hand() -> Result<()> {
    require_root();
    MountNs::for_node()?.enter(|| {
        let pin_dir = PathBuf::from(BPFFS).join("affinity");
        let mut datapath = Datapath::open(&Options { pin_dir: pin_dir.clone(), ..Options::default() })?;
        // A second one is another handle.
        let touch = datapath.touch().and_then(|_| datapath.touch())?;
        let mut reconciler = open(&pin_dir)?;
        reconciler.synced();
        reconciler.reconcile([service(1, Some(60), &[1, 2]), service(2, None, &[1])]);
        let mut tables = bpf::open_pinned(&pin_dir)?;
        let client = [10, 244, 0, 11];
        let proto = Proto::TCP;
        let key = SocketKey::<V4>::new(SocketCookie::new(7), [10, 244, 1, 1], Port::new(8080), proto);
        let frontend = |n: u8| FrontendKey::<V4>::new([10, 96, 0, n], Port::new(80), proto);
        let id = tables.v4.frontends.get(&frontend(1))?.ok_or_else(|| anyhow!("no frontend"))?.service;
        let backend = tables.v4.backends.keys()?[0].backend;
        let (addr, port) = ([10, 96, 0, 1], Port::new(80));
        let socket = Socket { service: id, backend, client, addr, port, ..Socket::default() };
        let entry = AffinityKey::new(client, id, 0);
        // Five seconds ago, but also on a machine that has just been started.
        let then = Ticks { at: now()?.ticks().at.wrapping_sub(300) };
        let used = Affinity { backend, last_used: then, since: then, zero: 0 };
        tables.v4.affinity.insert(&entry, &used)?;

        let other = BackendId { id: backend.id + 1 };
        assert!(touch.touch(&key, &Socket { backend: other, ..socket })?);
        assert_eq!(tables.v4.affinity.get(&entry)?, Some(used), "another backend's entry is left alone");
        assert!(touch.touch(&key, &socket)?);
        let refreshed = tables.v4.affinity.get(&entry)?.ok_or_else(|| anyhow!("no entry"))?;
        assert!(refreshed.last_used.age(now()?).0 < 1_000_000_000 && refreshed.since == then, "{refreshed:?}");
        assert!(!touch.touch(&key, &Socket { addr: [10, 96, 0, 9], ..socket })?, "no such frontend");
        let spread = tables.v4.frontends.get(&frontend(2))?.ok_or_else(|| anyhow!("no frontend"))?.service;
        assert!(!touch.touch(&key, &Socket { service: spread, addr: [10, 96, 0, 2], ..socket })?, "no affinity");
        let v6 = SocketKey::<V6>::default();
        assert!(!touch.touch(&v6, &Socket::<V6>::default())?);
        Ok(())
    })
}

/// Many entries, of which every second one is over: all are read, in parts and at once, and those go.
#[test]
fn many_connections_are_walked_through_in_parts() -> Result<()> {
    const ENTRIES: u32 = 200_000;
    on_maps_of(&[("conntrack", 2 * ENTRIES)], |pin_dir| {
        let mut tables = bpf::open_pinned(pin_dir)?;
        let (now, frontend) = (now()?.ticks(), [10, 96, 0, 1]);
        let key =
            |n: u32| ConntrackKey::<V4>::forward(n.to_be_bytes(), Port::new(1), frontend, Port::new(80), Proto::UDP);
        let old = Ticks { at: now.at.wrapping_sub(Seconds::new(3_600).ticks()) };
        for n in 0..ENTRIES {
            let last_seen = if n % 2 == 0 { now } else { old };
            tables.v4.conntrack.insert(&key(n), &Conntrack { last_seen, ..Conntrack::default() })?;
        }
        // One that is not there keeps none of the others.
        let gone = [key(0), key(ENTRIES), key(2), key(0), key(4)];
        assert_eq!(tables.v4.conntrack.remove_all(&gone)?, 3);
        let there = tables.v4.conntrack.len()?;
        assert_eq!(there, ENTRIES as usize - 3, "read at once, each once");
        let mut parts = 0;
        let walk = Walker::new(bpf::open_pinned(pin_dir)?).walk(|| {
            parts += 1;
            true
        })?;
        assert!(walk.looked_at >= there && parts > 50, "{walk:?} in {parts} parts");
        assert_eq!(walk.removed, ENTRIES as usize / 2);
        println!("{} entries in {parts} parts: {:.3} s", walk.looked_at, walk.busy_seconds);
        let left = tables.v4.conntrack.entries()?;
        assert_eq!(left.len(), ENTRIES as usize / 2 - 3);
        assert!(left.iter().all(|(_, entry)| entry.last_seen == now) && left.is_sorted_by_key(|(key, _)| *key));
        Ok(())
    })
}

/// By windows of 16,384, which are moved along, and end where the array does.
#[test]
fn slots_are_written_where_programs_see_them() -> Result<()> {
    const SIZE: u32 = 40_001;
    on_maps_of(&[("slots", SIZE)], |pin_dir| {
        let info = MapData::from_pin(pin_dir.join("slots"))?.info()?;
        assert_ne!(info.map_flags() & BPF_F_MMAPABLE, 0);
        let mut tables = bpf::open_pinned(pin_dir)?;
        let slot = |id| Slot { backend: BackendId { id } };
        let mut expected = vec![slot(0); SIZE as usize];
        // Within the first window, over its end, before it, where no window has been, and at the end.
        for (round, (first, count)) in
            [(5, 251), (300, 16_000), (16_380, 251), (3, 33), (30_000, 9_000), (SIZE - 40, 40)].into_iter().enumerate()
        {
            let keys: Vec<u32> = (first..first + count).collect();
            let values: Vec<Slot> =
                keys.iter().map(|key| slot(key * 7 + u32::try_from(round).unwrap_or_default())).collect();
            assert_eq!(tables.shared.slots.insert_all(&keys, &values), (keys.len(), Ok(())));
            assert_eq!(tables.shared.slots.get_all(&keys)?, values.iter().copied().map(Some).collect::<Vec<_>>());
            expected[first as usize..(first + count) as usize].copy_from_slice(&values);
        }
        // By calls of the kernel's, of another opening.
        let seen: Vec<Slot> =
            bpf::open_pinned(pin_dir)?.shared.slots.entries()?.into_iter().map(|(_, it)| it).collect();
        assert!(seen == expected);
        Ok(())
    })
}

/// Many entries by one call are as many by a call each, also where there is no room for all of them.
#[test]
fn entries_are_written_and_read_many_at_a_time() -> Result<()> {
    on_maps(|pin_dir| {
        let mut tables = bpf::open_pinned(pin_dir)?;
        let slot = |id| Slot { backend: BackendId { id } };
        let keys: Vec<u32> = (0..300).collect();
        let slots: Vec<Slot> = (1..=300).map(slot).collect();
        let (count, done) = tables.shared.slots.insert_all(&keys, &slots);
        done?;
        assert_eq!(count, 300);
        for run in [0..300, 7..11, 299..300] {
            let run: Vec<u32> = run.collect();
            let expected: Vec<_> = run.iter().map(|key| Some(slot(key + 1))).collect();
            assert_eq!(tables.shared.slots.get_all(&run)?, expected);
        }
        assert_eq!(tables.shared.slots.get_all(&[5, 3, 5000])?, [Some(slot(6)), Some(slot(4)), None]);
        assert_eq!(tables.shared.slots.get_all(&[1023, 1024])?, [Some(slot(0)), None]);
        assert_eq!(tables.shared.slots.get_all(&[])?, []);
        assert_eq!(tables.shared.slots.insert_all(&[], &[]).0, 0);

        // Many are written into the map's memory, here across pages; few, and one by one, by calls.
        let keys: Vec<u32> = (490..1024).collect();
        let slots: Vec<Slot> = keys.iter().map(|key| slot(key * 3)).collect();
        assert_eq!(tables.shared.slots.insert_all(&keys, &slots), (keys.len(), Ok(())));
        for key in [489, 490, 511, 512, 513, 1023] {
            let expected = if key < 490 { 0 } else { key * 3 };
            assert_eq!(tables.shared.slots.get(&key)?, Some(slot(expected)), "{key}");
        }
        let beyond: Vec<u32> = (1020..1060).collect();
        let (count, done) = tables.shared.slots.insert_all(&beyond, &[slot(7); 40]);
        assert_eq!((count, done), (4, Err(TableError::Full { map: "slots".into(), capacity: 1024 })));
        assert_eq!(
            tables.shared.slots.get_all(&(1019..1024).collect::<Vec<_>>())?,
            [3057, 7, 7, 7, 7].map(|id| Some(slot(id)))
        );
        // A map whose memory is the kernel's alone, as slots of an earlier version are.
        let (keys, words): (Vec<u32>, Vec<_>) = (100..200).map(|key| (key, FilterWord { bits: key.into() })).unzip();
        assert_eq!(tables.shared.direct_filter.insert_all(&keys, &words), (100, Ok(())));
        assert_eq!(tables.shared.direct_filter.get_all(&keys)?, words.into_iter().map(Some).collect::<Vec<_>>());

        let key = |port| FrontendKey::<V4>::new([10, 96, 0, 1], Port::new(port), Proto::TCP);
        let (count, done) = tables.v4.frontends.insert_all(&[1, 2, 3].map(key), &[Frontend::default(); 3]);
        assert_eq!(done, Err(TableError::Full { map: "frontends_v4".into(), capacity: 2 }));
        assert_eq!(count, 2);
        assert_eq!(tables.v4.frontends.len()?, 2);
        Ok(())
    })
}
