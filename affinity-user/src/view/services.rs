//! Service ports.

use std::collections::BTreeMap;
use std::net::IpAddr;

use affinity_common::abi::frontends::{CLUSTER_IP, EXTERNAL_IP, Frontend, KIND, LOAD_BALANCER, LOCAL};
use affinity_common::types::ServiceId;
use serde::Serialize;

use super::{FrontendAt, Snapshot};
use crate::model::FrontendKind;

/// A service port.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServiceRow {
    /// `namespace/name`.
    pub service: String,
    /// The port's name; empty where it has none.
    pub port_name: String,
    /// Its id.
    pub id: u32,
    /// Where it is reached: `10.96.0.10:80/TCP`.
    pub frontends: Vec<String>,
    /// The same in their order, with what there is to say of each.
    pub frontend_details: Vec<FrontendRow>,
    /// Seconds of affinity; none for `sessionAffinity: None`.
    pub affinity_timeout_seconds: Option<u32>,
    /// `spec.internalTrafficPolicy`: `Cluster`, or `Local` where clients are led to endpoints on this node alone.
    pub internal_traffic_policy: &'static str,
    /// Backends that take new sessions.
    pub eligible: usize,
    /// All backends.
    pub backends: usize,
    /// Clients that it keeps at the moment.
    pub live_sessions: usize,
}

/// A frontend of a service port.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FrontendRow {
    /// Where it is: `10.96.0.10:80/TCP`.
    pub frontend: String,
    /// The address in that.
    #[serde(skip)]
    pub address: IpAddr,
    /// `ClusterIP`, `ExternalIP`, `LoadBalancer` or `NodePort`.
    pub kind: String,
    /// The traffic policy: the internal one of a cluster IP, the external one of all others. `Local` where those whom it is
    /// about (all clients; those from outside) are led to endpoints on this node alone.
    pub traffic_policy: &'static str,
    /// Who is let in, where not all are.
    pub source_ranges: Option<Vec<String>>,
    /// The node that answers for the address by ARP or neighbour discovery, where somebody has asked the API server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announced_by: Option<String>,
}

impl FrontendRow {
    fn of(text: String, address: IpAddr, kind: FrontendKind, frontend: &Frontend, snapshot: &Snapshot) -> Self {
        let is_local = frontend.scope == LOCAL || frontend.parts_outsiders();
        let ranges = || snapshot.ranges.get(&frontend.service).cloned().unwrap_or_default();
        Self {
            frontend: text,
            address,
            kind: kind.to_string(),
            traffic_policy: if is_local { "Local" } else { "Cluster" },
            source_ranges: frontend.has_ranges().then(ranges),
            announced_by: None,
        }
    }
}

/// Which of a service's addresses a frontend is at, by its flags.
pub fn kind_of(flags: u16) -> FrontendKind {
    match flags & KIND {
        CLUSTER_IP => FrontendKind::ClusterIp,
        EXTERNAL_IP => FrontendKind::ExternalIp,
        LOAD_BALANCER => FrontendKind::LoadBalancer,
        // Two bits: there is no other.
        _ => FrontendKind::NodePort,
    }
}

/// Every service port, by name.
pub fn services(snapshot: &Snapshot) -> Vec<ServiceRow> {
    let mut rows: BTreeMap<ServiceId, ServiceRow> = BTreeMap::new();
    for FrontendAt { address, proto, value: frontend, .. } in snapshot.frontends.iter().filter(|it| !it.outsiders) {
        let id = frontend.service;
        let row = rows.entry(id).or_insert_with(|| ServiceRow {
            service: snapshot.names.service(id),
            port_name: snapshot.names.port(id),
            id: id.id,
            frontends: Vec::new(),
            affinity_timeout_seconds: frontend.has_affinity().then_some(frontend.timeout.secs),
            frontend_details: Vec::new(),
            internal_traffic_policy: "Cluster",
            eligible: 0,
            backends: 0,
            live_sessions: 0,
        });
        let (kind, text) = (kind_of(frontend.flags), format!("{address}/{proto}"));
        if kind == FrontendKind::ClusterIp && frontend.scope == LOCAL {
            row.internal_traffic_policy = "Local";
        }
        row.frontends.push(text.clone());
        row.frontend_details.push(FrontendRow::of(text, address.ip(), kind, frontend, snapshot));
    }
    for (key, backend) in &snapshot.names.backends {
        if let Some(row) = rows.get_mut(&key.service) {
            row.backends += 1;
            row.eligible += usize::from(backend.eligible);
        }
    }
    let affinities = snapshot.affinities();
    for client in &snapshot.clients {
        let Some(keeping) = affinities.get(&client.service) else { continue };
        let live = usize::from(client.entry.pair().is_live(keeping.timeout, snapshot.now));
        for service in &keeping.services {
            if let Some(row) = rows.get_mut(service) {
                row.live_sessions += live;
            }
        }
    }
    let mut rows: Vec<_> = rows.into_values().collect();
    rows.sort_by(|a, b| (&a.service, &a.port_name, a.id).cmp(&(&b.service, &b.port_name, b.id)));
    rows
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{
        model::Model,
        plan::plan,
        reconcile::{Change, Reconciler},
        sources::list_of,
        tables::memory::MemoryTables,
    };

    const OBJECTS: &str = "
apiVersion: v1
kind: Node
metadata: {name: here}
status: {addresses: [{type: InternalIP, address: 192.168.0.5}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.1
  externalIPs: [198.51.100.1]
  externalTrafficPolicy: Local
  loadBalancerSourceRanges: [10.0.0.0/8, 172.16.0.0/12]
  ports: [{port: 80, nodePort: 30080}]
status: {loadBalancer: {ingress: [{ip: 203.0.113.1}]}}
---
apiVersion: v1
kind: Service
metadata: {name: app}
spec: {clusterIP: 10.96.0.2, internalTrafficPolicy: Local, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
addressType: IPv4
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
ports: [{port: 8080}]
endpoints: [{addresses: [10.1.0.1], nodeName: here}, {addresses: [10.1.0.2], nodeName: there}]
";

    #[test]
    fn each_frontend_is_shown_once_with_its_kind_policy_and_ranges() {
        let mut model = Model::new("here");
        for event in list_of(OBJECTS) {
            event.enter(&mut model);
        }
        let memory = MemoryTables::default();
        let mut reconciler = Reconciler::open(memory.tables(), Box::new(Instant::now)).expect("tables");
        reconciler.sync(model.services().map(|view| Change::Apply(plan(&view))).collect::<Vec<_>>());
        let snapshot = Snapshot::of(&memory.tables()).expect("tables");

        let rows = services(&snapshot);
        let [app, web] = &rows[..] else { panic!("{rows:?}") };
        assert_eq!((app.internal_traffic_policy, web.internal_traffic_policy), ("Local", "Cluster"));
        assert_eq!((web.backends, web.eligible), (2, 2));
        let lines: Vec<_> = web
            .frontend_details
            .iter()
            .map(|it| {
                let ranges = it.source_ranges.as_ref().map_or("all".to_owned(), |ranges| ranges.join(","));
                format!("{} {} {} {ranges}", it.frontend, it.kind, it.traffic_policy)
            })
            .collect();
        assert_eq!(
            lines,
            [
                "10.96.0.1:80/TCP ClusterIP Cluster all",
                "192.168.0.5:30080/TCP NodePort Local all",
                "198.51.100.1:80/TCP ExternalIP Local all",
                "203.0.113.1:80/TCP LoadBalancer Local 10.0.0.0/8,172.16.0.0/12",
            ]
        );
        assert!(web.frontends.iter().eq(web.frontend_details.iter().map(|it| &it.frontend)));
        // Shares are those among the cluster's clients.
        let shares: Vec<_> = crate::view::backends(&snapshot).iter().map(|row| row.share).collect();
        assert_eq!(shares, [0.5, 0.5]);
    }
}
