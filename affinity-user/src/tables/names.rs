//! The names in map values: texts of a fixed size, filled up with zeroes.

use affinity_common::abi::{
    backend_names::{BackendName, NAME_MAX},
    services::{self, LABEL_MAX},
};

use crate::model::{ServiceName, ServicePortName};

/// A service port's name as the map holds it; `None` where a part of it is longer than any Kubernetes has.
pub fn encode_service(name: &ServicePortName) -> Option<services::ServicePortName> {
    let label = |text: &str| -> Option<[u8; LABEL_MAX]> {
        let mut out = [0; LABEL_MAX];
        out.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(out)
    };
    Some(services::ServicePortName {
        namespace: label(&name.service.namespace)?,
        name: label(&name.service.name)?,
        port_name: label(&name.port)?,
        proto: name.proto,
        zero: [0; 2],
    })
}

/// A service port's name out of the map; `None` where that holds no name.
pub fn decode_service(name: &services::ServicePortName) -> Option<ServicePortName> {
    let (namespace, service, port) = (text(&name.namespace)?, text(&name.name)?, text(&name.port_name)?);
    if namespace.is_empty() || service.is_empty() {
        return None;
    }
    Some(ServicePortName { service: ServiceName::new(namespace, service), port: port.into(), proto: name.proto })
}

/// A pod's name as the map holds it, cut where it is longer.
pub fn encode_backend(name: &str) -> BackendName {
    let mut out = [0; NAME_MAX];
    let cut = name.floor_char_boundary(NAME_MAX);
    out[..cut].copy_from_slice(&name.as_bytes()[..cut]);
    BackendName { name: out }
}

/// A pod's name out of the map; `None` where that holds no text.
pub fn decode_backend(name: &BackendName) -> Option<&str> {
    text(&name.name)
}

/// The text before the first zero.
fn text(bytes: &[u8]) -> Option<&str> {
    let len = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..len]).ok()
}

#[cfg(test)]
mod tests {
    use affinity_common::types::Proto;

    use super::*;

    fn name(port: &str) -> ServicePortName {
        ServicePortName { service: ServiceName::new("default", "web"), port: port.into(), proto: Proto::TCP }
    }

    #[test]
    fn names_survive_the_map() {
        for name in [name(""), name("http"), name(&"x".repeat(LABEL_MAX))] {
            assert_eq!(decode_service(&encode_service(&name).unwrap()), Some(name));
        }
        assert_eq!(encode_service(&name(&"x".repeat(LABEL_MAX + 1))), None);
        assert_eq!(decode_service(&bytemuck::Zeroable::zeroed()), None);
    }

    #[test]
    fn a_long_pod_name_is_cut_between_characters() {
        assert_eq!(decode_backend(&encode_backend("web-0")), Some("web-0"));
        let long = format!("{}\u{e9}", "x".repeat(NAME_MAX - 1));
        assert_eq!(decode_backend(&encode_backend(&long)), Some("x".repeat(NAME_MAX - 1).as_str()));
    }
}
