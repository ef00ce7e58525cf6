//! The kernel's maps, by aya.

use std::path::{Path, PathBuf};

use affinity_common::abi::{
    self, MapSpec, addresses, affinity, backend_names, backend_stats, backends, config, conntrack, counters, filter,
    frontends, ids, netns, services, slots, sockets,
};
use affinity_common::family::Family;
use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues},
};
use nix::errno::Errno;
use thiserror::Error;

use super::{FamilyTables, Operation, SharedTables, Table, TableError, Tables};

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
        let path: PathBuf = dir.join(spec.name);
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
            slots: Box::new(BpfArray::open(&slots::SPEC, &mut source)?),
            services: Box::new(BpfHash::open(&services::SPEC, &mut source)?),
            backend_names: Box::new(BpfHash::open(&backend_names::SPEC, &mut source)?),
            backend_stats: Box::new(BpfHash::open(&backend_stats::SPEC, &mut source)?),
            ids: Box::new(BpfArray::open(&ids::SPEC, &mut source)?),
            config: Box::new(BpfArray::open(&config::SPEC, &mut source)?),
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
        conntrack: Box::new(BpfHash::open(&conntrack::spec::<F>(), &mut *source)?),
        netns: Box::new(BpfHash::open(&netns::spec::<F>(), &mut *source)?),
        sockets: Box::new(BpfHash::open(&sockets::spec::<F>(), &mut *source)?),
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
    map: HashMap<MapData, Plain<K>, Plain<V>>,
}

impl<K: bytemuck::Pod, V: bytemuck::Pod> BpfHash<K, V> {
    fn open(spec: &MapSpec, source: impl FnOnce(&MapSpec) -> Result<Map, OpenError>) -> Result<Self, OpenError> {
        let map = source(spec)?;
        let capacity = capacity(spec, &map)?;
        let map = HashMap::try_from(map).map_err(|source| mismatch(spec, source))?;
        Ok(Self { name: spec.name, capacity, map })
    }

    fn refused(&self, op: Operation, error: MapError) -> TableError {
        refused(self.name, self.capacity, op, error)
    }
}

fn mismatch(spec: &MapSpec, source: MapError) -> OpenError {
    OpenError { map: spec.name, place: format!("layout {}", abi::LAYOUT), source }
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

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        let done = self.map.remove(&Plain(*key));
        done.map_err(|error| self.refused(Operation::Remove, error))
    }

    fn keys(&self) -> Result<Vec<K>, TableError> {
        let mut keys = Vec::new();
        // The kernel starts again from the first key where the last one has gone meanwhile, so there can be more keys
        // than there is room for, and no end in a map that changes quickly.
        for key in self.map.keys().take(2 * self.capacity) {
            let Plain(key) = key.map_err(|error| self.refused(Operation::List, error))?;
            keys.push(key);
        }
        keys.sort_unstable();
        keys.dedup();
        Ok(keys)
    }
}

/// An array.
struct BpfArray<V: bytemuck::Pod> {
    name: &'static str,
    map: Array<MapData, Plain<V>>,
}

impl<V: bytemuck::Pod> BpfArray<V> {
    fn open(spec: &MapSpec, source: impl FnOnce(&MapSpec) -> Result<Map, OpenError>) -> Result<Self, OpenError> {
        let map = Array::try_from(source(spec)?).map_err(|source| mismatch(spec, source))?;
        Ok(Self { name: spec.name, map })
    }

    fn refused(&self, op: Operation, error: MapError) -> TableError {
        refused(self.name, self.map.len() as usize, op, error)
    }
}

impl<V: bytemuck::Pod + Send> Table<u32, V> for BpfArray<V> {
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
