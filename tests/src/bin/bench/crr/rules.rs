//! nftables rules of the shape that kube-proxy's nftables mode writes, and the least that has connections tracked.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::version::Version;

/// Has connections tracked, and does nothing else.
pub const TRACK: &str =
    "table inet track { chain forward { type filter hook forward priority 0; ct state invalid drop; }\n}\n";

/// So many services beside the measured one, which has affinity and the given backends.
///
/// Chains, sets and maps are those of kube-proxy 1.33 (`pkg/proxy/nftables/proxier.go`): one look-up of the destination
/// in `service-ips`, a chain for each service and each endpoint, an affinity set for each endpoint.
pub fn kube_proxy(to: SocketAddr, backends: &[SocketAddr], others: u32) -> String {
    let mut rules = String::from(FRAME);
    let version = Version::of_address(to);
    let measured = Service { id: "m".to_owned(), to, backends: backends.to_vec(), sticky: true };
    let others = (1..=others).map(|number| {
        let [address, backends @ ..] = other(to, number);
        let backends = backends.map(|address| SocketAddr::new(address, 8080)).into();
        Service { id: number.to_string(), to: SocketAddr::new(address, 80), backends, sticky: false }
    });
    let services: Vec<Service> = [measured].into_iter().chain(others).collect();
    for service in &services {
        service.write(&mut rules);
    }
    let elements = |of: &dyn Fn(&Service) -> String| services.iter().map(of).collect::<Vec<_>>().join(", ");
    let ips =
        elements(&|service| format!("{} . tcp . {} : goto service-{}", service.to.ip(), service.to.port(), service.id));
    let addresses = elements(&|service| service.to.ip().to_string());
    let _ = write!(
        rules,
        "map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {ips} }} }}\n\
         {HOOKS}}}\nadd element ip kube-proxy cluster-ips {{ {addresses} }}\n"
    );
    match version {
        Version::V4 => rules,
        // The same but for the names of what is of the family, and the addresses that the frame has.
        Version::V6 => V6.iter().fold(rules, |rules, (v4, v6)| rules.replace(v4, v6)),
    }
}

/// IPv4's words and IPv6's.
const V6: [(&str, &str); 8] = [
    ("table ip ", "table ip6 "),
    ("element ip ", "element ip6 "),
    ("ipv4_addr", "ipv6_addr"),
    ("ip saddr", "ip6 saddr"),
    ("ip daddr", "ip6 daddr"),
    ("198.51.100.11", "fd00:c5::11"),
    ("10.244.0.0/16", "fd00:10:244::/48"),
    ("10.96.0.0/12", "fd00:10:96::/108"),
];

/// The address of another service, and those of its backends, of the measured one's family.
pub fn other(than: SocketAddr, number: u32) -> [IpAddr; 3] {
    [97, 3, 4].map(|net: u8| {
        let v6 = Ipv6Addr::new(0xfd00, 0x10, net.into(), 0, 0, 0, 0, 0);
        Version::of_address(than).address(Ipv4Addr::new(10, net, 0, 0), v6, number)
    })
}

struct Service {
    id: String,
    to: SocketAddr,
    backends: Vec<SocketAddr>,
    sticky: bool,
}

impl Service {
    fn write(&self, rules: &mut String) {
        let Self { id, to, backends, sticky } = self;
        let mut lines = Vec::new();
        let (mut sessions, mut choices) = (String::new(), Vec::new());
        for (number, backend) in backends.iter().enumerate() {
            let (ip, endpoint) = (backend.ip(), format!("{id}-{number}"));
            let mut remember = String::new();
            if *sticky {
                let set = format!("affinity-ep-{endpoint}");
                lines.push(format!("set {set} {{ type ipv4_addr; flags dynamic,timeout; timeout 10800s; }}"));
                remember = format!("update @{set} {{ ip saddr }}; ");
                let _ = write!(sessions, "ip saddr @{set} goto endpoint-{endpoint}; ");
            }
            lines.push(format!(
                "chain endpoint-{endpoint} {{ ip saddr {ip} jump mark-for-masquerade; {remember}meta l4proto tcp dnat to {backend}; }}"
            ));
            choices.push(format!("{number} : goto endpoint-{endpoint}"));
        }
        lines.push(format!(
            "chain service-{id} {{ ip daddr {} tcp dport {} ip saddr != 10.244.0.0/16 jump mark-for-masquerade; \
             {sessions}numgen random mod {} vmap {{ {} }}; }}",
            to.ip(),
            to.port(),
            backends.len(),
            choices.join(", ")
        ));
        *rules += &(lines.join("\n") + "\n");
    }
}

const FRAME: &str = "table ip kube-proxy {
set cluster-ips { type ipv4_addr; }
set nodeport-ips { type ipv4_addr; elements = { 198.51.100.11 } }
map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
map service-nodeports { type inet_proto . inet_service : verdict; }
chain mark-for-masquerade { mark set mark or 0x4000; }
chain masquerading { mark & 0x4000 == 0 return; mark set mark xor 0x4000; masquerade fully-random; }
chain cluster-ips-check { ip daddr @cluster-ips reject; ip daddr 10.96.0.0/12 drop; }
chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
chain nodeport-endpoints-check { ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }
";

const HOOKS: &str = "chain services { ip daddr . meta l4proto . th dport vmap @service-ips; ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports; }
chain filter-prerouting { type filter hook prerouting priority -110; policy accept; ct state new jump firewall-check; }
chain filter-input { type filter hook input priority -110; policy accept; ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check; }
chain filter-forward { type filter hook forward priority -110; policy accept; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }
chain filter-output { type filter hook output priority -110; policy accept; ct state new jump service-endpoints-check; ct state new jump firewall-check; }
chain filter-output-post-dnat { type filter hook output priority -90; policy accept; ct state new jump cluster-ips-check; }
chain nat-prerouting { type nat hook prerouting priority -100; policy accept; jump services; }
chain nat-output { type nat hook output priority -100; policy accept; jump services; }
chain nat-postrouting { type nat hook postrouting priority 100; policy accept; jump masquerading; }
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_is_reached_by_its_address_and_the_measured_one_is_sticky() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let rules = kube_proxy(at("10.96.0.10:80"), &[at("10.244.0.101:8080"), at("10.244.0.102:8080")], 300);
        assert!(rules.contains("10.96.0.10 . tcp . 80 : goto service-m,"), "{rules}");
        assert!(rules.contains("10.97.1.44 . tcp . 80 : goto service-300 }"), "{rules}");
        assert_eq!(rules.matches("chain service-").count(), 302, "300 services, the measured one, and a check");
        assert_eq!(rules.matches("update @affinity-ep-").count(), 2);
        assert!(rules.contains("dnat to 10.244.0.102:8080"), "{rules}");
    }
    #[test]
    fn ipv6_s_rules_have_nothing_of_ipv4_s() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let rules = kube_proxy(at("[fd00:10:96::10]:80"), &[at("[fd00:10:244::101]:8080")], 2);
        assert!(rules.starts_with("table ip6 kube-proxy {") && rules.contains("add element ip6 kube-proxy"), "{rules}");
        assert!(rules.contains("dnat to [fd00:10:244::101]:8080"), "{rules}");
        assert!(rules.contains("fd00:10:61::2 . tcp . 80 : goto service-2 }"), "{rules}");
        for word in [" ip ", "ip saddr", "ip daddr", "ipv4", "10.", "198."] {
            assert!(!rules.contains(word), "{word}: {rules}");
        }
    }
}
