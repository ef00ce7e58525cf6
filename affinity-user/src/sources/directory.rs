//! A directory of YAML and JSON files as a source: the same objects that the API server would serve.
//!
//! Its `*.yaml`, `*.yml` and `*.json` files are read, hidden ones and subdirectories are not. Changes are followed
//! while it runs: the system's notifications say when to look, and a look every few seconds makes up for those that are
//! lost. A file is read when it has rested for a moment, so neither a half-written one nor the gap in an
//! editor's replacing it is taken for a change; one that can't be understood keeps its objects as they were.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, mpsc as std_mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

use jiff::Timestamp;
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

use super::{
    BACKLOG, Health, Received, SourceError, SourceEvent,
    documents::{Contents, Version},
};
use crate::model::{Fault, Kind, ObjectName, Problem, ServiceName, Subject};

/// How long a file must have been left alone before it is read, or found missing before it is gone.
const SETTLE: Duration = Duration::from_millis(50);

/// The same for a file that has become empty: writers truncate first.
const SETTLE_EMPTY: Duration = Duration::from_secs(1);

/// How often the directory is looked at without a notification.
const RESCAN: Duration = Duration::from_secs(5);

/// Follows a directory, in a thread of its own, until the receiver is dropped.
///
/// # Errors
/// The system has no thread left. That the directory can't be read is no error but told by an event.
pub fn watch(path: impl Into<PathBuf>) -> io::Result<mpsc::Receiver<Received>> {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    let directory = Directory::new(path.into());
    thread::Builder::new().name("directory".into()).spawn(move || follow(directory, &sender))?;
    Ok(receiver)
}

fn follow(mut directory: Directory, sender: &mpsc::Sender<Received>) {
    let (wake, woken) = std_mpsc::channel();
    let mut notifier = Notifier { watcher: None, wake };
    while !sender.is_closed() {
        notifier.ensure(&directory.path);
        let Scan { events, again } = directory.scan();
        for event in events {
            if sender.blocking_send(Received::now(event)).is_err() {
                return;
            }
        }
        // The sender is in `notifier`: it can only time out.
        let _ = woken.recv_timeout(again.unwrap_or(RESCAN));
        while woken.try_recv().is_ok() {}
    }
}

/// The system's notifications for the directory, by inode: one that is replaced is watched anew.
struct Notifier {
    watcher: Option<(RecommendedWatcher, (u64, u64))>,
    wake: std_mpsc::Sender<()>,
}

impl Notifier {
    fn ensure(&mut self, path: &Path) {
        let Ok(metadata) = fs::metadata(path) else {
            self.watcher = None;
            return;
        };
        let inode = (metadata.dev(), metadata.ino());
        if self.watcher.as_ref().is_some_and(|(_, watched)| *watched == inode) {
            return;
        }
        let wake = self.wake.clone();
        let handler = move |event: notify::Result<notify::Event>| {
            // Reading the files is an event too, and no reason to read them again.
            if !event
                .is_ok_and(|event| matches!(event.kind, notify::EventKind::Access(access) if !is_end_of_write(access)))
            {
                let _ = wake.send(());
            }
        };
        let watcher = notify::recommended_watcher(handler).and_then(|mut watcher| {
            watcher.watch(path, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => self.watcher = Some((watcher, inode)),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no notifications: looking every {RESCAN:?}");
                self.watcher = None;
            }
        }
    }
}

fn is_end_of_write(access: notify::event::AccessKind) -> bool {
    access == notify::event::AccessKind::Close(notify::event::AccessMode::Write)
}

/// What a look at the directory led to.
struct Scan {
    events: Vec<SourceEvent>,
    /// When to look again, if not when something is told to have changed.
    again: Option<Duration>,
}

/// The directory as it was seen last.
struct Directory {
    path: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// Files that are not, or no longer, what `files` says, until they have settled.
    unsettled: HashMap<PathBuf, (Option<Stamp>, Instant)>,
    /// What was told, and of which file.
    told: BTreeMap<(Kind, ObjectName), (PathBuf, Version)>,
    /// Files for which problems were told.
    troubled: BTreeMap<PathBuf, Vec<Problem>>,
    /// When services without a creation timestamp were first seen: who came first keeps its address.
    born: HashMap<ServiceName, Timestamp>,
    synced: bool,
    /// Whether it was told to be fresh (or stale), if anything was.
    fresh: Option<bool>,
    started: Instant,
    /// When the directory could be read for the last time.
    read_at: Timestamp,
}

struct File {
    stamp: Stamp,
    objects: BTreeMap<(Kind, ObjectName), Version>,
    problems: Vec<Problem>,
}

/// What changes when a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: SystemTime,
}

impl Directory {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            files: BTreeMap::new(),
            unsettled: HashMap::new(),
            told: BTreeMap::new(),
            troubled: BTreeMap::new(),
            born: HashMap::new(),
            synced: false,
            fresh: None,
            started: Instant::now(),
            read_at: Timestamp::now(),
        }
    }

    /// Looks at the directory, and says what has changed since the last look.
    fn scan(&mut self) -> Scan {
        let paths = match list(&self.path) {
            Ok(paths) => paths,
            Err(source) => return self.unreadable(source),
        };
        self.read_at = Timestamp::now();
        let mut again = None;
        let known: Vec<_> = self.files.keys().filter(|path| !paths.contains(*path)).cloned().collect();
        for path in paths.into_iter().chain(known) {
            if let Some(wait) = self.look_at(&path) {
                again = Some(again.map_or(wait, |again: Duration| again.min(wait)));
            }
        }
        self.unsettled.retain(|path, _| self.files.contains_key(path) || path.exists());
        // The first look waits for all files, though not forever for one that is always being written.
        if !self.synced && again.is_some() && self.started.elapsed() < RESCAN {
            return Scan { events: Vec::new(), again };
        }
        Scan { events: self.tell(), again }
    }

    fn unreadable(&mut self, source: io::Error) -> Scan {
        let mut events = Vec::new();
        if self.fresh.replace(false) != Some(false) {
            let source = Arc::new(source);
            for kind in Kind::ALL {
                let error = SourceError::Directory { path: self.path.clone(), source: source.clone() };
                events.push(SourceEvent::Health(kind, Health::Stale { since: self.read_at, error }));
            }
        }
        Scan { events, again: Some(Duration::from_secs(1)) }
    }

    /// Reads a file if it has changed and settled; else says when it may have.
    fn look_at(&mut self, path: &Path) -> Option<Duration> {
        let stamp = match stamp(path) {
            Ok(stamp) => stamp,
            Err(error) => {
                self.set_unreadable(path, &error);
                return None;
            }
        };
        if self.files.get(path).map(|file| file.stamp) == stamp {
            self.unsettled.remove(path);
            return None;
        }
        let settle = if stamp.is_some_and(|stamp| stamp.size == 0) { SETTLE_EMPTY } else { SETTLE };
        let rested = stamp.and_then(|stamp| stamp.modified.elapsed().ok()).unwrap_or_default();
        if rested < settle {
            let now = Instant::now();
            let (seen, since) = self.unsettled.entry(path.to_owned()).or_insert((stamp, now));
            if *seen != stamp {
                (*seen, *since) = (stamp, now);
            }
            if since.elapsed() < settle {
                return Some(settle.saturating_sub(since.elapsed()));
            }
        }
        self.unsettled.remove(path);
        let Some(stamp) = stamp else {
            self.files.remove(path);
            return None;
        };
        match read(path, stamp) {
            Ok(Some(text)) => self.take(path, stamp, &text),
            Ok(None) => return Some(SETTLE),
            Err(error) => self.set_unreadable(path, &error),
        }
        None
    }

    fn set_unreadable(&mut self, path: &Path, error: &io::Error) {
        let file = self.files.entry(path.to_owned()).or_insert_with(|| File {
            stamp: Stamp::NEVER,
            objects: BTreeMap::new(),
            problems: Vec::new(),
        });
        file.stamp = Stamp::NEVER;
        file.problems = vec![Problem::new("", Fault::Unreadable(error.to_string()))];
    }

    fn take(&mut self, path: &Path, stamp: Stamp, text: &str) {
        let Contents { objects: found, mut problems } = Contents::parse(path, text);
        let mut objects = BTreeMap::new();
        for object in found {
            let key = object.key();
            if let Some(twice) = objects.insert(key, self.with_age(object, stamp)) {
                let (kind, name) = twice.key();
                problems.push(duplicate(kind, name, path));
            }
        }
        if !problems.is_empty()
            && let Some(before) = self.files.get(path)
        {
            // What can't be understood may be what is no longer found.
            for (key, version) in &before.objects {
                objects.entry(key.clone()).or_insert_with(|| version.clone());
            }
        }
        self.files.insert(path.to_owned(), File { stamp, objects, problems });
    }

    /// A service without a creation timestamp is as old as its file was when it was first seen.
    fn with_age(&mut self, object: Version, stamp: Stamp) -> Version {
        let Version::Service(mut version) = object else { return object };
        if let Some(service) = version.object.as_mut().filter(|service| service.created.is_none()) {
            let modified = Timestamp::try_from(stamp.modified).unwrap_or(self.read_at);
            let created = *self.born.entry(version.name.clone()).or_insert(modified);
            Arc::make_mut(service).created = Some(created);
        }
        Version::Service(version)
    }

    /// Tells what differs from what was told.
    fn tell(&mut self) -> Vec<SourceEvent> {
        let mut objects: BTreeMap<&(Kind, ObjectName), (&PathBuf, &Version)> = BTreeMap::new();
        let mut troubled: BTreeMap<PathBuf, Vec<Problem>> = BTreeMap::new();
        for (path, file) in &self.files {
            if !file.problems.is_empty() {
                troubled.insert(path.clone(), file.problems.clone());
            }
            for (key, version) in &file.objects {
                let Some((first, kept)) = objects.get(key).copied() else {
                    objects.insert(key, (path, version));
                    continue;
                };
                // Which file had it before keeps it; if neither had, the one whose name comes first.
                let had = self.told.get(key).is_some_and(|(told, _)| told == path);
                let (winner, loser) = if had { ((path, version), first) } else { ((first, kept), path) };
                troubled.entry(loser.clone()).or_default().push(duplicate(key.0, key.1.clone(), winner.0));
                objects.insert(key, winner);
            }
        }

        let mut events = Vec::new();
        if !self.synced {
            events.extend(Kind::ALL.map(SourceEvent::Init));
        }
        let gone: Vec<_> = self.told.keys().filter(|key| !objects.contains_key(key)).cloned().collect();
        let told: BTreeMap<_, _> =
            objects.into_iter().map(|(key, (path, version))| (key.clone(), (path.clone(), version.clone()))).collect();
        for (key, (_, version)) in &told {
            if self.told.get(key).is_none_or(|(_, before)| before != version) {
                events.push(version.clone().into());
            }
        }
        for (kind, name) in gone {
            self.born.remove(&name);
            events.push(SourceEvent::Delete(kind, name));
        }
        self.told = told;

        let files: BTreeSet<_> = self.troubled.keys().chain(troubled.keys()).cloned().collect();
        for path in files {
            let problems = troubled.get(&path).cloned().unwrap_or_default();
            if self.troubled.get(&path) != Some(&problems) {
                events.push(SourceEvent::File(path, problems));
            }
        }
        self.troubled = troubled;

        if !std::mem::replace(&mut self.synced, true) {
            events.extend(Kind::ALL.map(SourceEvent::InitDone));
        }
        if self.fresh.replace(true) != Some(true) {
            events.extend(Kind::ALL.map(|kind| SourceEvent::Health(kind, Health::Fresh)));
        }
        events
    }
}

impl Stamp {
    /// What no file has.
    const NEVER: Self = Self { device: 0, inode: 0, size: 0, modified: SystemTime::UNIX_EPOCH };
}

fn duplicate(kind: Kind, name: ObjectName, first: &Path) -> Problem {
    let object = Subject::Object(kind, name).to_string();
    Problem::new("", Fault::DuplicateObject { object, first: first.display().to_string() })
}

fn list(directory: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut paths = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let extension = path.extension().unwrap_or_default();
        if !is_hidden && ["yaml", "yml", "json"].iter().any(|known| extension == *known) {
            paths.insert(path);
        }
    }
    Ok(paths)
}

/// `None` if there is no such file.
fn stamp(path: &Path) -> io::Result<Option<Stamp>> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(Some(Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: metadata.modified()?,
        })),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The text of a file; `None` if it has changed meanwhile.
fn read(path: &Path, expected: Stamp) -> io::Result<Option<String>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok((stamp(path)? == Some(expected)).then_some(text))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::model::Model;

    /// A directory and the model that follows it, without a thread: each look is a call.
    struct Bench {
        dir: tempfile::TempDir,
        source: Directory,
        model: Model,
        health: Vec<String>,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let source = Directory::new(dir.path().to_owned());
            Self { dir, source, model: Model::default(), health: Vec::new() }
        }

        fn write(&self, file: &str, text: &str) {
            fs::write(self.dir.path().join(file), text).expect("written");
        }

        fn look(&mut self) -> Option<Duration> {
            let Scan { events, again } = self.source.scan();
            for event in events {
                if let Some((kind, health)) = event.enter(&mut self.model) {
                    self.health.push(match health {
                        Health::Fresh => format!("{kind} fresh"),
                        Health::Stale { error, .. } => format!("{kind} stale: {error}"),
                    });
                }
            }
            again
        }

        /// Looks until all files have settled, and tells the services and their first address.
        fn settle(&mut self) -> String {
            while let Some(wait) = self.look() {
                thread::sleep(wait);
            }
            self.services()
        }

        fn services(&self) -> String {
            let services = self.model.services();
            services
                .map(|view| format!("{}={} ", view.service.name.name, view.service.cluster_ips[0]))
                .collect::<Vec<_>>()
                .concat()
        }

        fn rejections(&self) -> String {
            let dir = format!("{}/", self.dir.path().display());
            let rejections: Vec<_> = self.model.rejections().map(|rejection| rejection.to_string()).collect();
            rejections.join("\n").replace(&dir, "")
        }
    }

    fn service(name: &str, ip: &str) -> String {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
        )
    }

    #[test]
    fn files_come_change_and_go() {
        let mut bench = Bench::new();
        bench.write("a.yaml", &service("a", "10.0.0.1"));
        bench.write(
            "b.json",
            r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"},
                                  "spec": {"clusterIP": "10.0.0.2", "ports": [{"port": 80}]}}"#,
        );
        bench.write(".c.yaml", &service("hidden", "10.0.0.3"));
        bench.write("d.txt", &service("text", "10.0.0.4"));
        assert!(bench.look().is_some(), "they were written just now");
        assert!(!bench.model.is_synced());
        assert_eq!(bench.settle(), "a=10.0.0.1 b=10.0.0.2 ");
        assert!(bench.model.is_synced());
        assert_eq!(bench.health, Kind::ALL.map(|kind| format!("{kind} fresh")));

        bench.write("a.yaml", &(service("a", "10.0.0.9") + &service("c", "10.0.0.3")));
        assert_eq!(bench.settle(), "a=10.0.0.9 b=10.0.0.2 c=10.0.0.3 ");
        fs::remove_file(bench.dir.path().join("b.json")).expect("removed");
        assert_eq!(bench.settle(), "a=10.0.0.9 c=10.0.0.3 ");
    }

    #[test]
    fn an_editors_gap_and_a_half_written_file_are_no_change() {
        let mut bench = Bench::new();
        let path = bench.dir.path().join("a.yaml");
        bench.write("a.yaml", &(service("a", "10.0.0.1") + &service("b", "10.0.0.2")));
        assert_eq!(bench.settle(), "a=10.0.0.1 b=10.0.0.2 ");
        // Moved away, written anew in two steps: a look in between sees a gap, nothing, and half of it.
        fs::rename(&path, path.with_extension("yaml~")).expect("renamed");
        bench.look();
        bench.write("a.yaml", "");
        bench.look();
        bench.write("a.yaml", &service("a", "10.0.0.7"));
        bench.look();
        assert_eq!(bench.services(), "a=10.0.0.1 b=10.0.0.2 ");
        bench.write("a.yaml", &(service("a", "10.0.0.7") + &service("b", "10.0.0.2")));
        assert_eq!(bench.settle(), "a=10.0.0.7 b=10.0.0.2 ");
    }

    #[test]
    fn a_file_that_does_not_parse_keeps_its_objects() {
        let mut bench = Bench::new();
        bench.write("a.yaml", &(service("a", "10.0.0.1") + &service("b", "10.0.0.2")));
        bench.settle();
        bench.write("a.yaml", &(service("a", "10.0.0.9") + "---\nkind: Service\nmetadata: {name: [\n"));
        assert_eq!(bench.settle(), "a=10.0.0.9 b=10.0.0.2 ", "a is understood, b may be what is not");
        let rejections = bench.rejections();
        assert!(rejections.starts_with("a.yaml: line "), "{rejections}");
        bench.write("a.yaml", &service("a", "10.0.0.9"));
        assert_eq!(bench.settle(), "a=10.0.0.9 ");
        assert_eq!(bench.rejections(), "");
        bench.write("a.yaml", &service("a", "10.0.0.256"));
        assert_eq!(bench.settle(), "a=10.0.0.9 ");
        assert_eq!(bench.rejections(), "Service default/a: spec.clusterIP: \"10.0.0.256\" is no IP address");
    }

    #[test]
    fn an_object_in_two_files_is_the_first_ones() {
        let mut bench = Bench::new();
        bench.write("b.yaml", &service("a", "10.0.0.1"));
        bench.settle();
        bench.write("a.yaml", &service("a", "10.0.0.2"));
        assert_eq!(bench.settle(), "a=10.0.0.1 ");
        let first = bench.dir.path().join("b.yaml");
        assert_eq!(
            bench.rejections().replace(&first.display().to_string(), "b.yaml"),
            "a.yaml: Service default/a is in b.yaml already: remove one"
        );
        fs::remove_file(first).expect("removed");
        assert_eq!(bench.settle(), "a=10.0.0.2 ");
        assert_eq!(bench.rejections(), "");
    }

    #[test]
    fn who_came_first_keeps_an_address() {
        let mut bench = Bench::new();
        bench.write("z.yaml", &service("z", "10.0.0.1"));
        bench.settle();
        bench.write("a.yaml", &service("a", "10.0.0.1"));
        bench.settle();
        let lost = "Service default/a: spec.ports[0].port: 10.0.0.1:80/TCP belongs to Service default/z";
        assert!(bench.rejections().starts_with(lost), "{}", bench.rejections());
        // Editing the older one does not make it younger.
        bench.write("z.yaml", &(service("z", "10.0.0.1") + "  # edited\n"));
        bench.settle();
        assert!(bench.rejections().starts_with(lost), "{}", bench.rejections());
    }

    #[test]
    fn a_directory_that_is_away_deletes_nothing() {
        let mut bench = Bench::new();
        bench.write("a.yaml", &service("a", "10.0.0.1"));
        bench.settle();
        let (path, away) = (bench.dir.path().to_owned(), bench.dir.path().with_extension("away"));
        fs::rename(&path, &away).expect("renamed");
        bench.look();
        bench.look();
        assert_eq!(bench.services(), "a=10.0.0.1 ");
        fs::rename(&away, &path).expect("renamed");
        bench.settle();
        let told: Vec<_> =
            bench.health.iter().map(|health| health.replace(&path.display().to_string(), "DIR")).collect();
        let stale = "stale: directory DIR: No such file or directory (os error 2)";
        let expected = ["fresh", stale, "fresh"].map(|health| Kind::ALL.map(|kind| format!("{kind} {health}")));
        assert_eq!(told, expected.concat());
    }

    #[test]
    fn a_file_that_is_no_text_is_named() {
        let mut bench = Bench::new();
        fs::write(bench.dir.path().join("a.yaml"), [0xff, 0xfe, 0]).expect("written");
        bench.write("b.yaml", &service("b", "10.0.0.1"));
        assert_eq!(bench.settle(), "b=10.0.0.1 ");
        assert!(bench.rejections().starts_with("a.yaml: can't be read: "), "{}", bench.rejections());
        fs::set_permissions(bench.dir.path().join("b.yaml"), fs::Permissions::from_mode(0o600)).expect("set");
        assert_eq!(bench.settle(), "b=10.0.0.1 ");
    }

    /// With the thread and the system's notifications: far sooner than the next look without one.
    #[tokio::test]
    async fn a_change_is_noticed() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::write(dir.path().join("a.yaml"), service("a", "10.0.0.1")).expect("written");
        let mut events = watch(dir.path()).expect("a thread");
        let mut model = Model::default();
        while !model.is_synced() {
            events.recv().await.expect("an event").event.enter(&mut model);
        }
        fs::write(dir.path().join("b.tmp"), service("b", "10.0.0.2")).expect("written");
        fs::rename(dir.path().join("b.tmp"), dir.path().join("b.yaml")).expect("renamed");
        let b = ObjectName::new("default", "b");
        let noticed = async {
            while model.service(&b).is_none() {
                events.recv().await.expect("an event").event.enter(&mut model);
            }
        };
        tokio::time::timeout(Duration::from_secs(3), noticed).await.expect("noticed before the next look");
    }
}
