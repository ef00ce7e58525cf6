//! The pinned maps: their sizes, and whether those that are there are ours.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use affinity_common::abi::config::Config;
use affinity_common::abi::{self, Kind, LAYOUT, MAPS, MapSpec};
use aya::Ebpf;
use aya::maps::{Array, Map, MapData, MapInfo, MapType, ProgramArray};
use aya::programs::ProgramFd;
use bytemuck::Pod;

use super::migrate::{self, Migration};
use super::{LoadError, pin};

/// An LRU map below that many elements a CPU evicts what is in use: the kernel takes free elements off its list in
/// batches of 128 for each CPU (`LOCAL_FREE_TARGET` of `kernel/bpf/bpf_lru_list.c`).
const LRU_ELEMENTS_A_CPU: usize = 256;

/// The numbers of elements of the maps that can be resized. Maps of both families go by one name: `frontends`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    asked: BTreeMap<String, u32>,
}

impl Sizes {
    /// The names that have a size.
    pub fn names() -> impl Iterator<Item = &'static str> {
        MAPS.iter().filter(|spec| spec.resizable).map(setting)
    }

    /// Asks for a size.
    ///
    /// # Errors
    /// An unknown name, or a size of 0, in words.
    pub fn set(&mut self, name: &str, elements: u32) -> Result<(), String> {
        if !Self::names().any(|known| known == name) {
            let known: Vec<&str> = Self::names().collect();
            return Err(format!("no map {name:?}; these have a size: {}", known.join(", ")));
        }
        if elements == 0 {
            return Err(format!("{name} needs at least one element"));
        }
        self.asked.insert(name.to_owned(), elements);
        Ok(())
    }

    /// The number of elements that a map is made with: what was asked for or the default, an LRU map rounded up to what
    /// keeps it useful on this machine.
    pub fn of(&self, spec: &MapSpec) -> u32 {
        let default = u32::try_from(spec.default_size).unwrap_or(u32::MAX);
        let asked = self.asked.get(setting(spec)).copied().unwrap_or(default);
        if spec.kind != Kind::LruHash {
            return asked;
        }
        let cpus = aya::util::nr_cpus().unwrap_or(1);
        asked.max(u32::try_from(cpus * LRU_ELEMENTS_A_CPU).unwrap_or(u32::MAX))
    }
}

/// The name of a map's size: its own without the family. There are no more addresses than frontends.
fn setting(spec: &MapSpec) -> &'static str {
    match spec.name.strip_suffix("_v4").or_else(|| spec.name.strip_suffix("_v6")).unwrap_or(spec.name) {
        "addresses" => "frontends",
        name => name,
    }
}

/// Where each map is pinned.
pub fn pins(pin_dir: &Path) -> Vec<(&'static MapSpec, PathBuf)> {
    MAPS.iter().map(|spec| (spec, pin_dir.join(pin::name(spec)))).collect()
}

/// What is pinned already.
pub struct Pinned {
    /// What is not as it was asked for, though it can stay.
    pub warnings: Vec<String>,
    /// How the maps of the layout before become ours, where they are of that.
    pub migration: Option<Migration>,
}

/// Whether the maps that are pinned already are ours, or become so.
pub fn check_pinned(pin_dir: &Path, sizes: &Sizes) -> Result<Pinned, LoadError> {
    // The layout first: of another one, nothing else need be as we know it.
    let config = pin_dir.join(abi::config::SPEC.name);
    let mut migration = None;
    if config.exists() {
        match read_layout(&config)? {
            0 | LAYOUT => {}
            migrate::FROM => migration = Some(Migration::begin(pin_dir)?),
            found => return Err(LoadError::Layout { path: pin_dir.to_owned(), found, ours: LAYOUT }),
        }
    }
    let mut warnings = Vec::new();
    for (spec, path) in pins(pin_dir) {
        if !path.exists() {
            continue;
        }
        let info = open(spec, &path)?.info().map_err(|source| LoadError::MapAccess { map: spec.name, source })?;
        if let Some(what) = difference(spec, &info) {
            return Err(LoadError::Map { path, what });
        }
        let asked = sizes.of(spec);
        if spec.resizable && info.max_entries() != asked {
            warnings.push(format!(
                "{} stays at {} elements, though {asked} were asked for: a map is resized by `affinity cleanup` and a new start",
                spec.name,
                info.max_entries()
            ));
        }
    }
    Ok(Pinned { warnings, migration })
}

fn open(spec: &'static MapSpec, path: &Path) -> Result<MapData, LoadError> {
    MapData::from_pin(path).map_err(|source| LoadError::MapAccess { map: spec.name, source })
}

fn read_layout(config: &Path) -> Result<u32, LoadError> {
    let data = open(&abi::config::SPEC, config)?;
    let info = data.info().map_err(|source| LoadError::MapAccess { map: abi::config::SPEC.name, source })?;
    if let Some(what) = difference(&abi::config::SPEC, &info) {
        return Err(LoadError::Map { path: config.to_owned(), what });
    }
    let failed = |source| LoadError::MapAccess { map: abi::config::SPEC.name, source };
    let map: Array<MapData, [u8; size_of::<Config>()]> =
        Map::from_map_data(data).and_then(Array::try_from).map_err(failed)?;
    Ok(bytemuck::pod_read_unaligned::<Config>(&map.get(&0, 0).map_err(failed)?).layout)
}

/// How a map differs from what its name promises.
pub(super) fn difference(spec: &MapSpec, info: &MapInfo) -> Option<String> {
    let kind = match spec.kind {
        Kind::Array => MapType::Array,
        Kind::PerCpuArray => MapType::PerCpuArray,
        Kind::Hash => MapType::Hash,
        Kind::LruHash => MapType::LruHash,
        Kind::LpmTrie => MapType::LpmTrie,
        Kind::ProgArray => MapType::ProgramArray,
        Kind::RingBuf => MapType::RingBuf,
    };
    let found = info.map_type().ok();
    if found != Some(kind) {
        return Some(format!("it is a {found:?}, not a {kind:?}"));
    }
    let sizes = [("key", info.key_size(), spec.key_size), ("value", info.value_size(), spec.value_size)];
    sizes
        .iter()
        .find(|(_, found, ours)| *found as usize != *ours)
        .map(|(what, found, ours)| format!("its {what} has {found} bytes, not {ours}"))
}

/// Writes our layout's version into maps that nobody has claimed yet, or that were of the layout `from` until now.
pub fn claim(object: &mut Ebpf, from: u32, layout: u32) -> Result<(), LoadError> {
    let name = abi::config::SPEC.name;
    let failed = |source| LoadError::MapAccess { map: name, source };
    let map = object.map_mut(name).ok_or_else(|| failed(aya::maps::MapError::InvalidName { name: name.to_owned() }))?;
    let mut map: Array<_, [u8; size_of::<Config>()]> = Array::try_from(map).map_err(failed)?;
    let mut config: Config = read(&map.get(&0, 0).map_err(failed)?);
    if config.layout == from {
        config.layout = layout;
        map.set(0, bytemuck::cast::<Config, [u8; size_of::<Config>()]>(config), 0).map_err(failed)?;
    }
    Ok(())
}

/// Puts a program where others hand over to it. The pin keeps it there.
pub fn hand_over(object: &mut Ebpf, index: u32, program: &ProgramFd) -> Result<(), LoadError> {
    let name = abi::tail_calls::SPEC.name;
    let failed = |source| LoadError::MapAccess { map: name, source };
    let map = object.map_mut(name).ok_or_else(|| failed(aya::maps::MapError::InvalidName { name: name.to_owned() }))?;
    ProgramArray::try_from(map).and_then(|mut programs| programs.set(index, program, 0)).map_err(failed)
}

fn read<T: Pod>(bytes: &[u8]) -> T {
    bytemuck::pod_read_unaligned(bytes)
}

#[cfg(test)]
mod tests {
    use affinity_common::family::V6;

    use super::*;

    #[test]
    fn sizes_have_names_and_bounds() {
        let mut sizes = Sizes::default();
        sizes.set("frontends", 6).expect("a known name");
        assert_eq!(sizes.of(&abi::frontends::spec::<V6>()), 6);
        assert!(sizes.set("frontends_v4", 6).is_err_and(|text| text.contains("frontends")));
        assert!(sizes.set("slots", 0).is_err());
        sizes.set("affinity", 1).expect("a known name");
        assert!(sizes.of(&abi::affinity::spec::<V6>()) >= 256);
    }
}
