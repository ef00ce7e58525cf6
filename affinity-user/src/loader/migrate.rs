//! An upgrade over a change of the layout: what the maps of the layout before hold is carried over.
//!
//! A map whose layout has changed is pinned under another name ([`pin`]), so that both are there while programs are
//! replaced: those of the earlier version, which are still on interfaces, go on with their own maps. It goes like this:
//!
//! 1. The maps of the new layout are made, and filled from those of the old one, entry by entry, by a converter that knows
//!    both ([`CHANGES`]).
//! 2. The programs are replaced, link by link, each in one step.
//! 3. What the programs of the earlier version have added meanwhile to maps that they write is carried over too, where the new maps
//!    know no better.
//! 4. The maps are the new layout's from now on (`config.layout`), and the old pins go.
//!
//! A daemon that ends before the fourth step has taken nothing from its predecessor: that one may go on, or the next one does
//! all of it again. Maps of any other layout are refused, never misread: of an older one, since nobody knows any more how to
//! read them; of a newer one, since nobody knows yet.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use affinity_common::abi::frontends::{self, Frontend, FrontendKey};
use affinity_common::abi::sockets::{self, Socket, SocketKey};
use affinity_common::abi::{LAYOUT, MapSpec};
use affinity_common::family::{Family, V4, V6};
use affinity_common::types::{Seconds, ServiceId};
use aya::maps::MapData;
use bytemuck::Zeroable as _;

use super::LoadError;
use super::maps::{self, Sizes};
use super::pin;
use crate::syscall::{self, Existing};

/// The one layout that maps are carried over from.
pub(super) const FROM: u32 = LAYOUT - 1;

/// How many entries are read at a time.
const BATCH: usize = 4096;

/// A key and a value as bytes.
type Entry = (Vec<u8>, Vec<u8>);

/// A map of the layout before, whose contents have another layout now. It is a hash map, or an LRU one.
struct Change {
    /// Its pin's name.
    pin: &'static str,
    /// The size of its keys in bytes.
    key_size: usize,
    /// The size of its values in bytes.
    value_size: usize,
    /// The map of this layout.
    new: MapSpec,
    /// Whether programs write it. One that user space alone writes is its own again once it runs: what it takes out must not come
    /// back.
    is_programs: bool,
    /// An entry in the new layout; `None` if it is not to be carried over.
    convert: fn(&[u8], &[u8]) -> Option<Entry>,
}

/// What has changed from [`FROM`] to [`LAYOUT`].
const CHANGES: &[Change] = &[
    frontends_of_3::<V4>("frontends_v4"),
    frontends_of_3::<V6>("frontends_v6"),
    sockets_of_3::<V4>("sockets_v4", 20),
    sockets_of_3::<V6>("sockets_v6", 44),
];
/// Pins of [`FROM`] that nothing is carried over from.
const GONE: &[&str] = &["tail_calls"];
// Whoever makes a new layout says here what becomes of the maps of this one.
const _: () = assert!(LAYOUT == 4, "CHANGES tells how maps of layout 3 become those of layout 4");

/// A frontend of layout 3: affinity was to each service port, and the scope was all of its last word.
const fn frontends_of_3<F: Family>(pin: &'static str) -> Change {
    Change {
        pin,
        key_size: size_of::<FrontendKey<F>>(),
        value_size: size_of::<[u32; 6]>(),
        new: frontends::spec::<F>(),
        is_programs: false,
        convert: frontend_of_3,
    }
}

fn frontend_of_3(key: &[u8], value: &[u8]) -> Option<Entry> {
    let [id, seed, first_slot, slot_count, secs, scope]: [u32; 6] = bytemuck::try_pod_read_unaligned(value).ok()?;
    let service = ServiceId { id };
    let frontend = Frontend {
        service,
        affinity: service,
        seed,
        first_slot,
        slot_count,
        timeout: Seconds { secs },
        scope: u16::try_from(scope).ok()?,
        flags: 0,
    };
    Some((key.to_owned(), bytemuck::bytes_of(&frontend).to_owned()))
}

/// Sockets of layout 3 lack what they were given their backend by: that they are looked into again at once.
const fn sockets_of_3<F: Family>(pin: &'static str, value_size: usize) -> Change {
    Change {
        pin,
        key_size: size_of::<SocketKey<F>>(),
        value_size,
        new: sockets::spec::<F>(),
        is_programs: true,
        convert: socket_of_3::<F>,
    }
}

fn socket_of_3<F: Family>(key: &[u8], value: &[u8]) -> Option<Entry> {
    let mut socket = Socket::<F>::zeroed();
    bytemuck::bytes_of_mut(&mut socket).get_mut(..value.len())?.copy_from_slice(value);
    Some((key.to_owned(), bytemuck::bytes_of(&socket).to_owned()))
}

/// A migration under way.
#[derive(Debug)]
pub(super) struct Migration {
    pin_dir: PathBuf,
    moves: Vec<Move>,
}

/// A map that moves.
struct Move {
    change: &'static Change,
    old: OwnedFd,
    /// How many entries the old one has room for.
    capacity: u32,
}

impl std::fmt::Debug for Move {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.change.pin)
    }
}

impl Migration {
    /// Opens the maps of the layout before.
    pub fn begin(pin_dir: &Path) -> Result<Self, LoadError> {
        let mut moves = Vec::new();
        for change in CHANGES {
            let path = pin_dir.join(change.pin);
            if !path.exists() {
                continue;
            }
            let failed = |source| LoadError::MapAccess { map: change.pin, source };
            let data = MapData::from_pin(&path).map_err(failed)?;
            let info = data.info().map_err(failed)?;
            let before = MapSpec { key_size: change.key_size, value_size: change.value_size, ..change.new };
            if let Some(what) = maps::difference(&before, &info) {
                return Err(LoadError::Map { path, what });
            }
            let old = data.fd().as_fd().try_clone_to_owned().map_err(|error| failed(error.into()))?;
            moves.push(Move { change, old, capacity: info.max_entries() });
        }
        Ok(Self { pin_dir: pin_dir.to_owned(), moves })
    }

    /// The size that a new map is made with: as large as the old one at least.
    pub fn size(&self, spec: &MapSpec, sizes: &Sizes) -> u32 {
        let old = self.moves.iter().find(|it| it.change.new.name == spec.name);
        sizes.of(spec).max(old.map_or(0, |old| old.capacity))
    }

    /// Carries over all that the old maps hold. Returns how many entries that are.
    pub fn copy(&self) -> Result<usize, LoadError> {
        self.moves.iter().map(|it| it.carry(&self.pin_dir, Existing::Replace)).sum()
    }

    /// Carries over what programs have written to the old maps and the new ones do not hold, and takes the old maps out of the way.
    pub fn finish(&self) -> Result<usize, LoadError> {
        let moves = self.moves.iter().filter(|it| it.change.is_programs);
        let carried = moves.map(|it| it.carry(&self.pin_dir, Existing::Keep)).sum::<Result<_, _>>()?;
        for pin in self.moves.iter().map(|it| it.change.pin).chain(GONE.iter().copied()) {
            let path = self.pin_dir.join(pin);
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(pin = %path.display(), %error, "a map of the layout before stays; nobody uses it");
            }
        }
        Ok(carried)
    }
}

impl Move {
    fn carry(&self, pin_dir: &Path, existing: Existing) -> Result<usize, LoadError> {
        let Change { pin: before, key_size, value_size, new, is_programs: _, convert } = self.change;
        let failed = |error: std::io::Error| LoadError::MapAccess { map: before, source: error.into() };
        let target = MapData::from_pin(pin_dir.join(pin::name(new)));
        let target = target.map_err(|source| LoadError::MapAccess { map: new.name, source })?;
        let (mut carried, mut from, mut room) = (0, None, BATCH);
        loop {
            let (mut keys, mut values) = (vec![0; room * key_size], vec![0; room * value_size]);
            let (count, next) = match syscall::lookup_batch_bytes(self.old.as_fd(), from, room, &mut keys, &mut values)
            {
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    room *= 2;
                    continue;
                }
                read => read.map_err(failed)?,
            };
            for (key, value) in keys.chunks(*key_size).zip(values.chunks(*value_size)).take(count) {
                let Some((key, value)) = convert(key, value) else { continue };
                carried += usize::from(syscall::update(target.fd().as_fd(), &key, &value, existing).map_err(failed)?);
            }
            if next.is_none() {
                return Ok(carried);
            }
            from = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::Kind;
    use affinity_common::types::{BackendId, Port};

    use super::*;

    #[test]
    fn a_change_is_of_a_map_that_has_another_pin_now() {
        for change in CHANGES {
            assert_ne!(change.pin, pin::name(&change.new));
            assert!(matches!(change.new.kind, Kind::Hash | Kind::LruHash));
        }
    }

    /// The bytes of layout 3, by hand.
    #[test]
    fn a_socket_of_layout_3_is_what_it_was() {
        let key = SocketKey::<V4>::default();
        let old = [7, 0, 0, 0, 9, 0, 0, 0, 10, 244, 0, 11, 10, 96, 0, 10, 0, 80, 0, 0];
        let (new_key, value) = socket_of_3::<V4>(bytemuck::bytes_of(&key), &old).expect("a socket");
        assert_eq!(new_key, bytemuck::bytes_of(&key));
        let socket: Socket<V4> = bytemuck::pod_read_unaligned(&value);
        let expected = Socket {
            service: ServiceId { id: u32::from_le_bytes([7, 0, 0, 0]) },
            backend: BackendId { id: u32::from_le_bytes([9, 0, 0, 0]) },
            client: [10, 244, 0, 11],
            addr: [10, 96, 0, 10],
            port: Port::new(80),
            ..Socket::default()
        };
        assert_eq!(socket, expected);
        assert_eq!(socket_of_3::<V4>(&[], &[0; 99]), None);
    }

    #[test]
    fn a_frontend_of_layout_3_is_what_it_was() {
        let old: [u32; 6] = [7, 0xfeed, 251, 502, 10800, 0];
        let (key, value) = frontend_of_3(&[1, 2, 3], bytemuck::bytes_of(&old)).expect("a frontend");
        assert_eq!(key, [1, 2, 3]);
        let service = ServiceId { id: 7 };
        let expected = Frontend {
            service,
            affinity: service,
            seed: 0xfeed,
            first_slot: 251,
            slot_count: 502,
            timeout: Seconds::new(10800),
            scope: 0,
            flags: 0,
        };
        assert_eq!(bytemuck::pod_read_unaligned::<Frontend>(&value), expected);
        assert_eq!(frontend_of_3(&[], &[0; 28]), None);
    }
}
