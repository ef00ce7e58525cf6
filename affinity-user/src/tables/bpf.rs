//! The kernel's maps, by aya.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use affinity_common::abi::{
    self, MapSpec, addresses, affinity, announced, backend_names, backend_stats, backends, config, conntrack, counters,
    filter, fragments, frontends, ids, lifetimes, netns, services, slots, sockets,
    source_ranges::{self, Range, RangeKey},
    uplinks,
};
use affinity_common::family::Family;
use affinity_common::types::ServiceId;
use aya::{
    Ebpf,
    maps::{
        Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues,
        lpm_trie::{Key, LpmTrie},
    },
};
use aya_obj::generated::BPF_F_MMAPABLE;
use nix::errno::Errno;
use thiserror::Error;

use super::{FamilyTables, Operation, Part, Position, SharedTables, Table, TableError, Tables};
use crate::loader::pin;
use crate::syscall::{self, memory::Elements};

/// A map can't be used as a table.
#[derive(Debug, Error)]
#[error("map {map} in {place}: {source}")]
pub struct OpenError {
    /// The map.
    pub map: &'static str,
    /// The pin's path, or the loaded object.
    pub place: String,
    /// Why not.
    pub source: MapError,
}

impl OpenError {
    /// Whether the map is not there at all.
    pub fn is_missing(&self) -> bool {
        match &self.source {
            MapError::SyscallError(error) => error.io_error.kind() == std::io::ErrorKind::NotFound,
            MapError::InvalidName { .. } => true,
            _ => false,
        }
    }
}

/// Opens the maps that are pinned in a directory.
pub fn open_pinned(dir: &Path) -> Result<Tables, OpenError> {
    open(|spec| {
        let path: PathBuf = dir.join(pin::name(spec));
        let map = MapData::from_pin(&path).and_then(Map::from_map_data);
        map.map_err(|source| OpenError { map: spec.name, place: path.display().to_string(), source })
    })
}

/// Takes the maps out of a loaded object. Those that it has pinned can be opened again; the others belong to the tables
/// and to the programs.
pub fn take_from(object: &mut Ebpf) -> Result<Tables, OpenError> {
    open(|spec| {
        object.take_map(spec.name).ok_or_else(|| OpenError {
            map: spec.name,
            place: "the loaded object".to_owned(),
            source: MapError::InvalidName { name: spec.name.to_owned() },
        })
    })
}

fn open(mut source: impl FnMut(&MapSpec) -> Result<Map, OpenError>) -> Result<Tables, OpenError> {
    Ok(Tables {
        v4: family(&mut source)?,
        v6: family(&mut source)?,
        shared: SharedTables {
            service_filter: Box::new(BpfArray::open(&filter::SERVICES, &mut source)?),
            direct_filter: Box::new(BpfArray::open(&filter::DIRECT, &mut source)?),
            snat_filter: Box::new(BpfArray::open(&filter::SNAT, &mut source)?),
            slots: Box::new(BpfArray::open(&slots::SPEC, &mut source)?),
            services: Box::new(BpfHash::open(&services::SPEC, &mut source)?),
            backend_names: Box::new(BpfHash::open(&backend_names::SPEC, &mut source)?),
            backend_stats: Box::new(BpfHash::open(&backend_stats::SPEC, &mut source)?),
            ids: Box::new(BpfArray::open(&ids::SPEC, &mut source)?),
            config: Box::new(BpfArray::open(&config::SPEC, &mut source)?),
            lifetimes: Box::new(BpfArray::open(&lifetimes::SPEC, &mut source)?),
            counters: Box::new(BpfCounters::open(&counters::SPEC, &mut source)?),
        },
    })
}

fn family<F: Family>(
    source: &mut impl FnMut(&MapSpec) -> Result<Map, OpenError>,
) -> Result<FamilyTables<F>, OpenError> {
    Ok(FamilyTables {
        frontends: Box::new(BpfHash::open(&frontends::spec::<F>(), &mut *source)?),
        addresses: Box::new(BpfHash::open(&addresses::spec::<F>(), &mut *source)?),
        backends: Box::new(BpfHash::open(&backends::spec::<F>(), &mut *source)?),
        affinity: Box::new(BpfHash::open(&affinity::spec::<F>(), &mut *source)?),
        fragments: Box::new(BpfHash::open(&fragments::spec::<F>(), &mut *source)?),
        conntrack: Box::new(BpfHash::open(&conntrack::spec::<F>(), &mut *source)?),
        netns: Box::new(BpfHash::open(&netns::spec::<F>(), &mut *source)?),
        sockets: Box::new(BpfHash::open(&sockets::spec::<F>(), &mut *source)?),
        uplinks: Box::new(BpfHash::open(&uplinks::spec::<F>(), &mut *source)?),
        ranges: Box::new(BpfRanges::open(&source_ranges::spec::<F>(), &mut *source)?),
        announced: Box::new(BpfHash::open(&announced::spec::<F>(), &mut *source)?),
    })
}

/// A key or value in aya's eyes.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T>(T);

// SAFETY: `Plain<T>` is `T` in memory, and that is `bytemuck::Pod`: any bytes are a value, and there is no padding.
unsafe impl<T: bytemuck::Pod> aya::Pod for Plain<T> {}

/// What went wrong, in the table's words.
fn refused(map: &'static str, capacity: usize, op: Operation, error: MapError) -> TableError {
    let errno = match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        MapError::IoError(error) => error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        // As the kernel has it.
        MapError::OutOfBounds { .. } => Errno::E2BIG,
        MapError::KeyNotFound | MapError::ElementNotFound => Errno::ENOENT,
        _ => Errno::EINVAL,
    };
    match (op, errno) {
        (Operation::Insert, Errno::E2BIG) => TableError::Full { map: map.to_owned(), capacity },
        (Operation::Remove, Errno::ENOENT) => TableError::NotFound { map: map.to_owned() },
        _ => TableError::Syscall { op, map: map.to_owned(), errno },
    }
}

/// A hash map, LRU or not.
struct BpfHash<K, V> {
    name: &'static str,
    capacity: usize,
    fd: OwnedFd,
    map: HashMap<MapData, Plain<K>, Plain<V>>,
}

impl<K: bytemuck::Pod, V: bytemuck::Pod> BpfHash<K, V> {
    fn open(spec: &MapSpec, source: impl FnOnce(&MapSpec) -> Result<Map, OpenError>) -> Result<Self, OpenError> {
        let map = source(spec)?;
        let capacity = capacity(spec, &map)?;
        let fd = descriptor(spec, &map)?;
        let map = HashMap::try_from(map).map_err(|source| mismatch(spec, source))?;
        Ok(Self { name: spec.name, capacity, fd, map })
    }

    fn refused(&self, op: Operation, error: MapError) -> TableError {
        refused(self.name, self.capacity, op, error)
    }
}

fn mismatch(spec: &MapSpec, source: MapError) -> OpenError {
    OpenError { map: spec.name, place: format!("layout {}", abi::LAYOUT), source }
}

/// Another descriptor of the map, for what aya has no way for.
fn descriptor(spec: &MapSpec, map: &Map) -> Result<OwnedFd, OpenError> {
    let (Map::HashMap(data) | Map::LruHashMap(data) | Map::Array(data)) = map else {
        let name = spec.name.to_owned();
        return Err(mismatch(spec, MapError::InvalidName { name }));
    };
    data.fd().as_fd().try_clone_to_owned().map_err(|error| mismatch(spec, MapError::IoError(error)))
}

/// How many entries are read by one call where all are wanted.
const BATCH: usize = 4096;

/// The entries from a position on, by one call, and by more where a hash map's bucket wants more room.
fn part<K: bytemuck::Pod, V: bytemuck::Pod>(
    map: BorrowedFd<'_>,
    from: Option<Position>,
    most: usize,
) -> std::io::Result<Part<K, V>> {
    let mut room = most.max(1);
    loop {
        let (mut keys, mut values) = (vec![K::zeroed(); room], vec![V::zeroed(); room]);
        match syscall::lookup_batch(map, from.map(|Position(at)| at), &mut keys, &mut values) {
            Ok((count, next)) => {
                keys.truncate(count);
                return Ok((keys.into_iter().zip(values).collect(), next.map(Position)));
            }
            Err(error) if error.raw_os_error() == Some(Errno::ENOSPC as i32) => room *= 2,
            Err(error) => return Err(error),
        }
    }
}

/// All entries, in the order of the keys.
fn all<K: bytemuck::Pod + Ord + Copy, V: bytemuck::Pod>(map: BorrowedFd<'_>) -> std::io::Result<Vec<(K, V)>> {
    let (mut entries, mut from) = (Vec::new(), None);
    loop {
        let (some, next) = part::<K, V>(map, from, BATCH)?;
        entries.extend(some);
        if next.is_none() {
            break;
        }
        from = next;
    }
    entries.sort_unstable_by_key(|(key, _)| *key);
    entries.dedup_by(|(a, _), (b, _)| a == b);
    Ok(entries)
}

fn capacity(spec: &MapSpec, map: &Map) -> Result<usize, OpenError> {
    let (Map::HashMap(data) | Map::LruHashMap(data)) = map else {
        return Ok(0); // Not a hash map: aya says so next.
    };
    Ok(data.info().map_err(|source| mismatch(spec, source))?.max_entries() as usize)
}

impl<K: bytemuck::Pod + Ord + Send, V: bytemuck::Pod + Send> Table<K, V> for BpfHash<K, V> {
    fn name(&self) -> &str {
        self.name
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        match self.map.get(&Plain(*key), 0) {
            Ok(Plain(value)) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(self.refused(Operation::Get, error)),
        }
    }

    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        let done = self.map.insert(Plain(*key), Plain(*value), 0);
        done.map_err(|error| self.refused(Operation::Insert, error))
    }

    fn insert_all(&mut self, keys: &[K], values: &[V]) -> (usize, Result<(), TableError>) {
        let (count, done) = syscall::update_batch(self.fd.as_fd(), keys, values);
        (count, done.map_err(|error| self.refused(Operation::Insert, MapError::IoError(error))))
    }

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        let done = self.map.remove(&Plain(*key));
        done.map_err(|error| self.refused(Operation::Remove, error))
    }

    fn keys(&self) -> Result<Vec<K>, TableError> {
        Ok(self.entries()?.into_iter().map(|(key, _)| key).collect())
    }

    fn entries(&self) -> Result<Vec<(K, V)>, TableError> {
        all(self.fd.as_fd()).map_err(|error| self.refused(Operation::List, MapError::IoError(error)))
    }

    fn part(&self, from: Option<Position>, most: usize) -> Result<Part<K, V>, TableError> {
        part(self.fd.as_fd(), from, most).map_err(|error| self.refused(Operation::List, MapError::IoError(error)))
    }

    fn remove_all(&mut self, keys: &[K]) -> Result<usize, TableError> {
        let (mut removed, mut rest) = (0, keys);
        while !rest.is_empty() {
            let (count, done) = syscall::delete_batch(self.fd.as_fd(), rest);
            removed += count;
            match done {
                Ok(()) => break,
                // Gone already: the next one.
                Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {
                    rest = rest.get(count + 1..).unwrap_or_default();
                }
                Err(error) => return Err(self.refused(Operation::Remove, MapError::IoError(error))),
            }
        }
        Ok(removed)
    }
}

/// The trie of source ranges.
struct BpfRanges<F: Family> {
    name: &'static str,
    capacity: usize,
    map: LpmTrie<MapData, RangeData<F>, Plain<Range>>,
}

/// The part of a range's key behind the length of its prefix.
#[derive(Clone, Copy)]
#[repr(C)]
struct RangeData<F: Family> {
    service: ServiceId,
    addr: F::Addr,
}

// SAFETY: both fields are `bytemuck::Pod`, of a size that is a multiple of four, and neither is aligned to more than four: any
// bytes are a value, and there is no padding.
unsafe impl<F: Family> aya::Pod for RangeData<F> {}

impl<F: Family> BpfRanges<F> {
    fn open(spec: &MapSpec, source: impl FnOnce(&MapSpec) -> Result<Map, OpenError>) -> Result<Self, OpenError> {
        let map = source(spec)?;
        let capacity = match &map {
            Map::LpmTrie(data) => data.info().map_err(|source| mismatch(spec, source))?.max_entries() as usize,
            _ => 0, // No trie: aya says so next.
        };
        let map = LpmTrie::try_from(map).map_err(|source| mismatch(spec, source))?;
        Ok(Self { name: spec.name, capacity, map })
    }

    fn key(key: &RangeKey<F>) -> Key<RangeData<F>> {
        Key::new(key.prefix_len, RangeData { service: key.service, addr: key.addr })
    }

    fn refused(&self, op: Operation, error: MapError) -> TableError {
        // A full trie says that there is no space (`kernel/bpf/lpm_trie.c`).
        if let (Operation::Insert, MapError::SyscallError(syscall)) = (op, &error)
            && syscall.io_error.raw_os_error() == Some(Errno::ENOSPC as i32)
        {
            return TableError::Full { map: self.name.to_owned(), capacity: self.capacity };
        }
        refused(self.name, self.capacity, op, error)
    }
}

impl<F: Family> Table<RangeKey<F>, Range> for BpfRanges<F> {
    fn name(&self) -> &str {
        self.name
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    /// Of the longest range that the key is in.
    fn get(&self, key: &RangeKey<F>) -> Result<Option<Range>, TableError> {
        match self.map.get(&Self::key(key), 0) {
            Ok(Plain(value)) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(self.refused(Operation::Get, error)),
        }
    }

    fn insert(&mut self, key: &RangeKey<F>, value: &Range) -> Result<(), TableError> {
        let done = self.map.insert(&Self::key(key), Plain(*value), 0);
        done.map_err(|error| self.refused(Operation::Insert, error))
    }

    fn remove(&mut self, key: &RangeKey<F>) -> Result<(), TableError> {
        let done = self.map.remove(&Self::key(key));
        done.map_err(|error| self.refused(Operation::Remove, error))
    }

    fn keys(&self) -> Result<Vec<RangeKey<F>>, TableError> {
        let mut keys = Vec::new();
        for key in self.map.keys() {
            let key = key.map_err(|error| self.refused(Operation::List, error))?;
            let RangeData { service, addr } = key.data();
            keys.push(RangeKey { prefix_len: key.prefix_len(), service, addr });
        }
        keys.sort_unstable();
        Ok(keys)
    }
}

/// An array.
struct BpfArray<V: bytemuck::Pod> {
    name: &'static str,
    fd: OwnedFd,
    map: Array<MapData, Plain<V>>,
    /// Whether its memory can be ours too. One that an earlier version has made can't.
    is_mappable: bool,
    /// The elements that were written last, and the first of them: what is written next is often next to them.
    window: Option<(u32, Elements<V>)>,
}

/// From how many elements on an array's memory is mapped for them: below, a call of the kernel's that writes them takes less time
/// than one that maps, and another one that unmaps.
const MAPPED_FROM: usize = 32;
/// How many elements are mapped at a time.
const WINDOW: usize = 1 << 14;

impl<V: bytemuck::Pod> BpfArray<V> {
    fn open(spec: &MapSpec, source: impl FnOnce(&MapSpec) -> Result<Map, OpenError>) -> Result<Self, OpenError> {
        let map = source(spec)?;
        let fd = descriptor(spec, &map)?;
        let is_mappable = match &map {
            Map::Array(data) => data.info().map_err(|source| mismatch(spec, source))?.map_flags() & BPF_F_MMAPABLE != 0,
            _ => false, // No array: aya says so next.
        };
        let map = Array::try_from(map).map_err(|source| mismatch(spec, source))?;
        Ok(Self { name: spec.name, fd, map, is_mappable, window: None })
    }

    fn refused(&self, op: Operation, error: MapError) -> TableError {
        refused(self.name, self.map.len() as usize, op, error)
    }

    /// The first of keys that are in a row, and all in the array.
    fn row(&self, keys: &[u32]) -> Option<u32> {
        let (first, last) = (*keys.first()?, *keys.last()?);
        let in_a_row = keys.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1]));
        (in_a_row && last < self.map.len()).then_some(first)
    }

    /// The first of keys whose memory is worth being mapped.
    fn mapped_row(&self, keys: &[u32]) -> Option<u32> {
        self.row(keys).filter(|_| self.is_mappable && keys.len() >= MAPPED_FROM)
    }

    /// Writes values into the memory of elements that are in the array.
    fn store(&mut self, first: u32, values: &[V]) -> std::io::Result<()> {
        let fits = |(start, window): &(u32, Elements<V>)| {
            first.checked_sub(*start).is_some_and(|from| from as usize + values.len() <= window.len())
        };
        let (start, mut window) = if let Some(window) = self.window.take().filter(fits) {
            window
        } else {
            let left = (self.map.len() - first) as usize;
            (first, Elements::map(self.fd.as_fd(), first, values.len().max(WINDOW).min(left))?)
        };
        window.store((first - start) as usize, values);
        self.window = Some((start, window));
        Ok(())
    }
}

impl<V: bytemuck::Pod + Send> Table<u32, V> for BpfArray<V> {
    fn entries(&self) -> Result<Vec<(u32, V)>, TableError> {
        all(self.fd.as_fd()).map_err(|error| self.refused(Operation::List, MapError::IoError(error)))
    }

    fn name(&self) -> &str {
        self.name
    }

    fn capacity(&self) -> usize {
        self.map.len() as usize
    }

    fn get(&self, key: &u32) -> Result<Option<V>, TableError> {
        match self.map.get(key, 0) {
            Ok(Plain(value)) => Ok(Some(value)),
            Err(MapError::OutOfBounds { .. } | MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(self.refused(Operation::Get, error)),
        }
    }

    fn insert(&mut self, key: &u32, value: &V) -> Result<(), TableError> {
        let done = self.map.set(*key, Plain(*value), 0);
        done.map_err(|error| self.refused(Operation::Insert, error))
    }

    fn insert_all(&mut self, keys: &[u32], values: &[V]) -> (usize, Result<(), TableError>) {
        let room = keys.len().min(values.len());
        // What can't be mapped now can be written by a call.
        if self.mapped_row(keys).is_some_and(|first| self.store(first, &values[..room]).is_ok()) {
            return (room, Ok(()));
        }
        let (count, done) = syscall::update_batch(self.fd.as_fd(), keys, values);
        (count, done.map_err(|error| self.refused(Operation::Insert, MapError::IoError(error))))
    }

    /// Keys in a row are read at once.
    fn get_all(&self, keys: &[u32]) -> Result<Vec<Option<V>>, TableError> {
        let Some(first) = self.row(keys) else { return keys.iter().map(|key| self.get(key)).collect() };
        let failed = |error| self.refused(Operation::Get, MapError::IoError(error));
        if self.mapped_row(keys).is_some()
            && let Ok(values) = Elements::read(self.fd.as_fd(), first, keys.len())
        {
            return Ok(values.into_iter().map(Some).collect());
        }
        // The position is the key that was read last.
        let (entries, _) =
            part::<u32, V>(self.fd.as_fd(), first.checked_sub(1).map(Position), keys.len()).map_err(failed)?;
        Ok(entries.into_iter().map(|(_, value)| Some(value)).collect())
    }

    fn remove(&mut self, key: &u32) -> Result<(), TableError> {
        self.insert(key, &V::zeroed())
    }

    fn keys(&self) -> Result<Vec<u32>, TableError> {
        Ok((0..self.map.len()).collect())
    }
}

/// The counters: each element's values of all CPUs are one.
struct BpfCounters {
    name: &'static str,
    map: PerCpuArray<MapData, Plain<counters::Counter>>,
}

impl BpfCounters {
    fn open(spec: &MapSpec, source: impl FnOnce(&MapSpec) -> Result<Map, OpenError>) -> Result<Self, OpenError> {
        let map = PerCpuArray::try_from(source(spec)?).map_err(|source| mismatch(spec, source))?;
        Ok(Self { name: spec.name, map })
    }

    fn refused(&self, op: Operation, error: MapError) -> TableError {
        refused(self.name, self.map.len() as usize, op, error)
    }
}

impl Table<u32, counters::Counter> for BpfCounters {
    fn name(&self) -> &str {
        self.name
    }

    fn capacity(&self) -> usize {
        self.map.len() as usize
    }

    fn get(&self, key: &u32) -> Result<Option<counters::Counter>, TableError> {
        match self.map.get(key, 0) {
            Ok(values) => {
                Ok(Some(values.iter().fold(counters::Counter::default(), |sum, Plain(value)| counters::Counter {
                    packets: sum.packets.wrapping_add(value.packets),
                    bytes: sum.bytes.wrapping_add(value.bytes),
                })))
            }
            Err(MapError::OutOfBounds { .. } | MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(self.refused(Operation::Get, error)),
        }
    }

    /// The first CPU gets the value, the others nothing.
    fn insert(&mut self, key: &u32, value: &counters::Counter) -> Result<(), TableError> {
        let written = aya::util::nr_cpus().map_err(|(_, error)| MapError::IoError(error)).and_then(|cpus| {
            let mut values = vec![Plain(counters::Counter::default()); cpus];
            if let Some(first) = values.first_mut() {
                *first = Plain(*value);
            }
            self.map.set(*key, PerCpuValues::try_from(values)?, 0)
        });
        written.map_err(|error| self.refused(Operation::Insert, error))
    }

    fn remove(&mut self, key: &u32) -> Result<(), TableError> {
        self.insert(key, &counters::Counter::default())
    }

    fn keys(&self) -> Result<Vec<u32>, TableError> {
        Ok((0..self.map.len()).collect())
    }
}
