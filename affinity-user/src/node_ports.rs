//! Node ports that processes of the node have bound too. A port is the service's all the same, by the addresses that have
//! node ports: the process does not get what is sent there, and nothing else would tell it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use affinity_common::types::{Port, Proto};

use crate::model::{FrontendKind, Matter, Model, Notice};
use crate::sockets::live::BoundSocket;

/// The node ports of services that these sockets have bound, at addresses that have node ports.
pub fn in_use(model: &Model, sockets: &[BoundSocket]) -> BTreeSet<Notice> {
    let bound: BTreeSet<(Port, Proto)> = sockets.iter().map(|it| (Port::new(it.at.port()), it.proto)).collect();
    let mut notices = BTreeSet::new();
    for view in model.outward_services() {
        for port in &view.service.ports {
            if port.node_port.is_none_or(|number| !bound.contains(&(number, port.proto))) {
                continue;
            }
            for held in view.frontends(port).filter(|held| held.kind == FrontendKind::NodePort) {
                let taken = |it: &&BoundSocket| {
                    (it.at.port(), it.proto) == (held.at.port.get(), held.at.proto) && takes(it, held.at.addr)
                };
                notices.extend(sockets.iter().filter(taken).map(|it| Notice {
                    service: view.service.name.clone(),
                    field: format!("spec.ports[{}].nodePort", port.index),
                    matter: Matter::NodePortInUse { frontend: held.at, bound: it.at },
                }));
            }
        }
    }
    notices
}

/// Whether a socket would get what is sent to an address.
fn takes(socket: &BoundSocket, addr: IpAddr) -> bool {
    match socket.at.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => addr.is_ipv4(),
        at if at.is_unspecified() => addr.is_ipv6() || socket.takes_ipv4,
        at => at == addr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sources::list_of;

    const OBJECTS: &str = "
apiVersion: v1
kind: Node
metadata: {name: here}
status: {addresses: [{type: InternalIP, address: 192.168.0.5}, {type: InternalIP, address: 'fd00::5'}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  clusterIPs: [10.96.0.1, 'fd00:96::1']
  ports: [{name: a, port: 80, nodePort: 30080}, {name: b, port: 80, nodePort: 30080, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: plain, namespace: shop}
spec: {clusterIPs: [10.96.0.2], ports: [{port: 30081}]}
";

    #[test]
    fn what_is_bound_at_a_served_address_is_told() {
        let mut model = Model::new("here");
        for event in list_of(OBJECTS) {
            event.enter(&mut model);
        }
        let told = |at: &str, proto, takes_ipv4| {
            let socket = BoundSocket { at: at.parse().expect("an address"), proto, takes_ipv4 };
            in_use(&model, &[socket]).iter().map(|it| format!("{} {}", it.service, it.message())).collect::<Vec<_>>()
        };
        let notice = |port, frontend: &str, bound: &str| {
            format!(
                "shop/web spec.ports[{port}].nodePort: a process of the node has bound {bound}: what is sent to {frontend} \
                 goes to the service, and not to it; end it, or give the service another port"
            )
        };
        let (four, six) = ("192.168.0.5:30080/TCP", "[fd00::5]:30080/TCP");
        for (at, takes_ipv4, frontends) in [
            ("192.168.0.5:30080", true, &[four][..]),
            ("0.0.0.0:30080", true, &[four]),
            ("[fd00::5]:30080", false, &[six]),
            ("[::]:30080", false, &[six]),
            ("[::]:30080", true, &[four, six]),
            // Others' ports, and what no node port is at.
            ("127.0.0.1:30080", true, &[]),
            ("192.168.0.6:30080", true, &[]),
            ("0.0.0.0:30079", true, &[]),
            ("0.0.0.0:30081", true, &[]),
        ] {
            let expected: Vec<_> = frontends.iter().map(|frontend| notice(0, frontend, at)).collect();
            assert_eq!(told(at, Proto::TCP, takes_ipv4), expected, "{at}");
        }
        let expected = notice(1, "192.168.0.5:30080/UDP", "0.0.0.0:30080");
        assert_eq!(told("0.0.0.0:30080", Proto::UDP, true), [expected]);
    }
}
