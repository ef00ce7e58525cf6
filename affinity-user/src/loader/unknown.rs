//! What the programs of sockets tell of network namespaces that they do not know.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use affinity_common::abi::netns::NetnsKey;
use affinity_common::abi::unknown_netns::SPEC;
use aya::maps::{Map, MapData, RingBuf};

use super::LoadError;

/// The reader of `unknown_netns`. The programs tell of one namespace, and of no other until that was taken. The descriptor can
/// be read from, in the eyes of `poll(2)`, when there is something to take.
pub struct UnknownNetns {
    ring: RingBuf<MapData>,
}

impl UnknownNetns {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, LoadError> {
        let opened =
            MapData::from_pin(pin_dir.join(SPEC.name)).and_then(Map::from_map_data).and_then(RingBuf::try_from);
        Ok(Self { ring: opened.map_err(|source| LoadError::MapAccess { map: SPEC.name, source })? })
    }

    /// The namespaces that were told of since the last call.
    pub fn take(&mut self) -> Vec<NetnsKey> {
        let mut told = Vec::new();
        while let Some(item) = self.ring.next() {
            told.extend(bytemuck::try_pod_read_unaligned::<NetnsKey>(&item));
        }
        told
    }
}

impl AsFd for UnknownNetns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}
