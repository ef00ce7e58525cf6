//! The Kubernetes objects of the demonstration, as the YAML that a person would write.

use std::fmt::Write as _;
use std::net::IpAddr;

/// The service that keeps its clients.
pub const STICKY: &str = "orders";
/// The service that spreads them.
pub const SPREAD: &str = "catalog";

/// The node, as the daemon is told.
pub const NODE: &str = "node";

/// How a service is reached from outside.
pub struct Outside {
    /// By a port of the node's.
    pub node_port: u16,
    /// By an address of a load balancer's.
    pub balancer: IpAddr,
}

/// The node with its addresses.
pub fn node(addresses: &[IpAddr]) -> String {
    let mut yaml = format!("apiVersion: v1\nkind: Node\nmetadata:\n  name: {NODE}\nstatus:\n  addresses:\n");
    for address in addresses {
        writeln!(yaml, "  - {{type: InternalIP, address: \"{address}\"}}").expect("a string takes it");
    }
    yaml
}

/// A service of the demonstration.
pub fn service(name: &str, address: IpAddr, timeout: Option<u32>, outside: Option<&Outside>) -> String {
    let affinity = match timeout {
        Some(seconds) => format!(
            "  sessionAffinity: ClientIP\n  sessionAffinityConfig:\n    clientIP:\n      timeoutSeconds: {seconds}\n"
        ),
        None => "  sessionAffinity: None\n".to_owned(),
    };
    let (kind, node_port, status) = match outside {
        Some(Outside { node_port, balancer }) => (
            "LoadBalancer",
            format!("    nodePort: {node_port}\n"),
            format!("status:\n  loadBalancer:\n    ingress:\n    - ip: \"{balancer}\"\n"),
        ),
        None => ("ClusterIP", String::new(), String::new()),
    };
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: default\nspec:\n  type: {kind}\n  \
         clusterIP: \"{address}\"\n  clusterIPs: [\"{address}\"]\n{affinity}  ports:\n  - name: http\n    port: 80\n    \
         protocol: TCP\n    targetPort: 8080\n{node_port}{status}"
    )
}

/// The `EndpointSlice` of a service, of an address's family: its pods by name and address, and whether each is ready.
pub fn slice(service: &str, family: IpAddr, pods: &[(String, IpAddr, bool)]) -> String {
    let family = if family.is_ipv4() { "IPv4" } else { "IPv6" };
    let mut yaml = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {service}-1\n  namespace: default\n  \
         labels:\n    kubernetes.io/service-name: {service}\naddressType: {family}\nports:\n- name: http\n  port: 8080\n  \
         protocol: TCP\nendpoints:\n"
    );
    for (name, address, ready) in pods {
        writeln!(
            yaml,
            "- addresses: [\"{address}\"]\n  conditions: {{ready: {ready}}}\n  targetRef: {{kind: Pod, name: {name}, namespace: default}}"
        )
        .expect("a string takes it");
    }
    if pods.is_empty() {
        yaml.truncate(yaml.len() - "endpoints:\n".len());
        yaml.push_str("endpoints: []\n");
    }
    yaml
}
