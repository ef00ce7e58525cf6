//! The custom resources' definitions, as they are installed in a cluster.

use kube::CustomResourceExt as _;

use crate::announce::resource::L2Announcement;
use crate::ipam::pool::LoadBalancerPool;

/// The definitions as YAML, made of the types.
///
/// # Panics
/// Never: what is turned into YAML has names for keys.
pub fn yaml() -> String {
    let documents = [LoadBalancerPool::crd(), L2Announcement::crd()].map(|definition| {
        let text = serde_saphyr::to_string(&definition).expect("a definition is plain data");
        format!("{}\n", text.trim_end())
    });
    format!("# Made of the types: `affinity crds > kind/deploy/crds.yaml`\n{}", documents.join("---\n"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_installed_is_made_of_the_types() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../kind/deploy/crds.yaml");
        let installed = std::fs::read_to_string(path).expect(path);
        assert_eq!(installed, super::yaml(), "write it anew: affinity crds > kind/deploy/crds.yaml");
    }
}
