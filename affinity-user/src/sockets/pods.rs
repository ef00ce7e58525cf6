//! Whose pod a network namespace is, and whether its sockets are served: what pods' annotations say. Pure, but for
//! [`uids`].
//!
//! A pod is known by its addresses, and before it has any by its uid in the cgroup of a process in its namespace. A new
//! namespace that is nobody's yet is left to TC as long as a pod that is to be left to TC has none: it may be that one's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use super::discovery::{self, Namespace};
use crate::model::Text;

/// What a pod of this node is known by, and what it wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSetting {
    /// Its uid.
    pub uid: Text,
    /// Its addresses, as far as it has any.
    pub addresses: Vec<IpAddr>,
    /// Whether its sockets are served where they are.
    pub served: bool,
}

/// What is seen of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// Its addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// The uids of the pods that processes in it are of.
    pub uids: BTreeSet<String>,
}

/// Which of some pods a namespace is of, by their uids and addresses: the first that has one of its addresses, else one that
/// has a process in it. A process of one pod may look into another's namespace, which its address tells apart.
pub fn whose(sight: &Sight, pods: &[(&str, &[IpAddr])]) -> Option<usize> {
    let by_address = pods.iter().position(|(_, addresses)| addresses.iter().any(|ip| sight.addresses.contains(ip)));
    by_address.or_else(|| pods.iter().position(|(uid, _)| sight.uids.contains(*uid)))
}

/// The namespaces whose sockets are to be left to TC; `default` is whether those of a pod are served that says nothing.
pub fn left_to_tc<N: Copy + Ord>(seen: &BTreeMap<N, Sight>, pods: &[PodSetting], default: bool) -> BTreeSet<N> {
    let known: Vec<_> = pods.iter().map(|pod| (&*pod.uid, &*pod.addresses)).collect();
    let mut waiting: BTreeSet<&str> = pods.iter().filter(|pod| !pod.served).map(|pod| &*pod.uid).collect();
    let (mut left, mut nobodys) = (BTreeSet::new(), BTreeSet::new());
    for (namespace, sight) in seen {
        let Some(pod) = whose(sight, &known).and_then(|at| pods.get(at)) else {
            nobodys.insert(*namespace);
            continue;
        };
        waiting.remove(&*pod.uid);
        if !pod.served {
            left.insert(*namespace);
        }
    }
    if !default || !waiting.is_empty() {
        left.extend(nobodys);
    }
    left
}

/// The uids of the pods that processes are of, by the processes' network namespaces. What ends meanwhile is left out.
pub fn uids() -> BTreeMap<Namespace, BTreeSet<String>> {
    let mut found: BTreeMap<Namespace, BTreeSet<String>> = BTreeMap::new();
    let Ok(own) = discovery::own() else { return found };
    for process in fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path()) {
        if let Some(uid) = uid_of(&process)
            && let Some(namespace) = discovery::of(&process.join("ns/net"), own)
        {
            found.entry(namespace).or_default().insert(uid);
        }
    }
    found
}

fn uid_of(process: &Path) -> Option<String> {
    uid_in(&fs::read_to_string(process.join("cgroup")).ok()?)
}

/// The uid of the pod that a process is of, by its `/proc/PID/cgroup`: the kubelet names a pod's cgroup `podUID`, or
/// `kubepods-…-podUID.slice` with underscores where systemd manages it.
fn uid_in(cgroup: &str) -> Option<String> {
    const LENGTH: usize = 36;
    let mut uids = cgroup.split(['/', '\n']).filter_map(|name| {
        let at = if name.starts_with("pod") { 0 } else { name.rfind("-pod")? + 1 };
        let uid = name.get(at + 3..at + 3 + LENGTH)?.replace('_', "-");
        let is_uid = uid
            .chars()
            .enumerate()
            .all(|(i, c)| if matches!(i, 8 | 13 | 18 | 23) { c == '-' } else { c.is_ascii_hexdigit() });
        is_uid.then_some(uid)
    });
    uids.next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "c1f1d6a6-8c2c-4a0b-9d1e-0123456789ab";

    fn pod(uid: &str, ip: Option<&str>, served: bool) -> PodSetting {
        let addresses = ip.into_iter().map(|ip| ip.parse().expect("an address")).collect();
        PodSetting { uid: uid.into(), addresses, served }
    }

    fn sight(ip: &str, uids: &[&str]) -> Sight {
        Sight {
            addresses: [ip.parse().expect("an address")].into(),
            uids: uids.iter().map(|uid| (*uid).to_owned()).collect(),
        }
    }

    #[test]
    fn cgroups_of_pods_name_them() {
        let underscored = UID.replace('-', "_");
        for cgroup in [
            format!(
                "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort-pod{underscored}.slice/cri-1.scope\n"
            ),
            format!("0::/../../kubepods-pod{underscored}.slice:cri-containerd:7f\n"),
            format!("12:pids:/x\n0::/kubepods/burstable/pod{UID}/7f1e\n"),
        ] {
            assert_eq!(uid_in(&cgroup).as_deref(), Some(UID), "{cgroup}");
        }
        for cgroup in ["", "0::/\n", "0::/system.slice/podman.service\n", "0::/kubepods/pod1234\n", "0::/pod\u{e9}\n"] {
            assert_eq!(uid_in(cgroup), None, "{cgroup}");
        }
    }

    #[test]
    fn a_pod_is_known_by_its_address_or_by_a_process() {
        let pods = [pod("a", Some("10.0.0.1"), false), pod("b", None, false), pod("c", Some("10.0.0.3"), true)];
        let seen = BTreeMap::from([
            (1, sight("10.0.0.1", &[])),
            (2, sight("10.0.0.2", &["b"])),
            // Somebody of pod a looks into pod c.
            (3, sight("10.0.0.3", &["a", "c"])),
            (4, sight("10.0.0.4", &[])),
        ]);
        assert_eq!(left_to_tc(&seen, &pods, true), [1, 2].into());
        assert_eq!(left_to_tc(&seen, &pods, false), [1, 2, 4].into(), "one that says nothing");
        assert_eq!(left_to_tc(&seen, &[], true), [].into());
    }

    #[test]
    fn what_may_be_a_pod_that_is_left_out_is_left_out_until_it_is_known() {
        let mut seen = BTreeMap::from([(1, sight("10.0.0.1", &[])), (2, sight("10.0.0.2", &["other"]))]);
        let pods = [pod("a", None, false), pod("other", None, true)];
        assert_eq!(left_to_tc(&seen, &pods, true), [1].into());
        seen.insert(3, sight("10.0.0.3", &["a"]));
        assert_eq!(left_to_tc(&seen, &pods, true), [3].into());
    }
}
