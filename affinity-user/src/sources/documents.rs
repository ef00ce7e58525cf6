//! The text of a file as objects: YAML documents or JSON, single objects or lists of them.
//!
//! Each document stands for itself: what is wrong with one does not lose the others.

use std::path::Path;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::Value;
use serde_saphyr::Spanned;

use super::convert;
use crate::model::{Checked, EndpointSlice, Fault, Kind, Node, Object, ObjectName, Pod, Problem, Service};

/// An object of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Version {
    Service(Checked<Service>),
    EndpointSlice(Checked<EndpointSlice>),
    Node(Checked<Node>),
    Pod(Checked<Pod>),
}

impl Version {
    pub fn key(&self) -> (Kind, ObjectName) {
        match self {
            Self::Service(version) => (Kind::Service, version.name.clone()),
            Self::EndpointSlice(version) => (Kind::EndpointSlice, version.name.clone()),
            Self::Node(version) => (Kind::Node, version.name.clone()),
            Self::Pod(version) => (Kind::Pod, version.name.clone()),
        }
    }
}

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub objects: Vec<Version>,
    /// What is wrong with the file, as opposed to an object whose name is known.
    pub problems: Vec<Problem>,
}

impl Contents {
    /// Reads a file's text; `path` says whether it is JSON, by its extension.
    pub fn parse(path: &Path, text: &str) -> Self {
        let mut contents = Self::default();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        if path.extension().is_some_and(|extension| extension == "json") {
            contents.take_json(&file, text);
        } else {
            for (line, document) in documents(text) {
                contents.take_yaml(&file, line, document);
            }
        }
        contents
    }

    fn take_json(&mut self, file: &str, text: &str) {
        for value in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
            match value {
                Ok(value) => self.take_value(file, None, &value),
                Err(error) => {
                    self.problems
                        .push(Problem::new(format!("line {}", error.line()), Fault::Undecodable(error.to_string())));
                    return;
                }
            }
        }
    }

    /// Reads a YAML document before which the file has so many lines.
    fn take_yaml(&mut self, file: &str, lines_before: u64, text: &str) {
        let header = match serde_saphyr::from_str_with_options::<Option<Header>>(text, options()) {
            Ok(Some(header)) => header,
            Ok(None) => return,
            Err(error) => {
                self.problems.push(undecodable(None, "", lines_before, &error));
                return;
            }
        };
        if header.is_list() {
            match serde_saphyr::from_str_with_options::<List>(text, options()) {
                Ok(list) => {
                    for mut item in list.items {
                        header.adopt(&mut item.value);
                        self.take_value(file, Some(lines_before + item.referenced.line()), &item.value);
                    }
                }
                Err(error) => self.problems.push(undecodable(None, "", lines_before, &error)),
            }
            return;
        }
        self.take(&header, lines_before + 1, &Text::Yaml { file, lines_before, text });
    }

    fn take_value(&mut self, file: &str, line: Option<u64>, value: &Value) {
        let header = match Header::deserialize(value) {
            Ok(header) => header,
            Err(error) => {
                let field = line.map(|line| format!("line {line}")).unwrap_or_default();
                self.problems.push(Problem::new(field, Fault::Undecodable(error.to_string())));
                return;
            }
        };
        if header.is_list() {
            for item in value.get("items").and_then(Value::as_array).into_iter().flatten() {
                let mut item = item.clone();
                header.adopt(&mut item);
                self.take_value(file, line, &item);
            }
            return;
        }
        let place = line.map_or_else(|| file.to_owned(), |line| format!("{file}:{line}"));
        self.take(&header, line.unwrap_or(1), &Text::Json { place: &place, value });
    }

    fn take(&mut self, header: &Header, line: u64, text: &Text<'_>) {
        let Some(given) = header.kind.as_deref() else {
            self.problems.push(Problem::new(format!("line {line}: kind"), Fault::Missing));
            return;
        };
        // Of other kinds a service proxy has nothing to know.
        let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.to_string() == given) else { return };
        let api_version = header.api_version.as_deref().unwrap_or_default();
        if api_version != api_version_of(kind) {
            let message = format!("{kind} of {api_version:?} is not supported: {} is", api_version_of(kind));
            self.problems.push(Problem::new(format!("line {line}: apiVersion"), Fault::Undecodable(message)));
            return;
        }
        let metadata = ObjectMeta {
            namespace: header.metadata.namespace.clone(),
            name: header.metadata.name.clone(),
            ..ObjectMeta::default()
        };
        let name = match convert::name(kind, &metadata) {
            Ok(name) => name,
            Err(Problem { field, fault }) => {
                self.problems.push(Problem::new(format!("line {line}: {field}"), fault));
                return;
            }
        };
        self.objects.extend(match kind {
            Kind::Service => text.version(&name, convert::service).map(Version::Service),
            Kind::EndpointSlice => text.version(&name, convert::endpoint_slice).map(Version::EndpointSlice),
            Kind::Node => text.version(&name, |name, node| Some(convert::node(name, node))).map(Version::Node),
            Kind::Pod => text.version(&name, convert::pod).map(Version::Pod),
        });
    }
}

const fn api_version_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Service | Kind::Node | Kind::Pod => "v1",
        Kind::EndpointSlice => "discovery.k8s.io/v1",
    }
}

/// An object that is still to be decoded.
enum Text<'a> {
    /// A YAML document before which the file has so many lines.
    Yaml { file: &'a str, lines_before: u64, text: &'a str },
    /// A value that is found there.
    Json { place: &'a str, value: &'a Value },
}

impl Text<'_> {
    /// The object as a version of what it is converted to; what can't be decoded is one of which nothing can be used.
    fn version<T: DeserializeOwned, O: Object>(
        &self,
        name: &ObjectName,
        convert: impl FnOnce(&ObjectName, &T) -> Option<Checked<O>>,
    ) -> Option<Checked<O>> {
        let decoded = match self {
            Self::Yaml { file, lines_before, text } => yaml(file, *lines_before, text),
            Self::Json { place, value } => json(place, value),
        };
        match decoded {
            Ok(object) => convert(name, &object),
            Err(problem) => Some(Checked::rejected(name.clone(), problem)),
        }
    }
}

/// What says what an object is.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    api_version: Option<String>,
    kind: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    metadata: Metadata,
}

#[derive(Debug, Default, Deserialize)]
struct Metadata {
    namespace: Option<String>,
    name: Option<String>,
}

#[derive(Deserialize)]
struct List {
    #[serde(default, deserialize_with = "or_default")]
    items: Vec<Spanned<Value>>,
}

fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Header {
    fn is_list(&self) -> bool {
        self.kind.as_deref().is_some_and(|kind| kind.ends_with("List"))
    }

    /// Items of a typed list (`ServiceList`) need not say what they are.
    fn adopt(&self, item: &mut Value) {
        let Some(item) = item.as_object_mut() else { return };
        let Some(kind) = self.kind.as_deref().and_then(|kind| kind.strip_suffix("List")) else { return };
        if !kind.is_empty() && !item.contains_key("kind") {
            item.insert("kind".into(), kind.into());
            item.insert("apiVersion".into(), self.api_version.clone().into());
        }
    }
}

fn yaml<T: DeserializeOwned>(file: &str, lines_before: u64, text: &str) -> Result<T, Problem> {
    let mut field = String::new();
    serde_saphyr::with_deserializer_from_str_with_options(text, options(), |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            field = path(error.path());
            error.into_inner()
        })
    })
    .map_err(|error| undecodable(Some(file), &field, lines_before, &error))
}

fn json<T: DeserializeOwned>(place: &str, value: &Value) -> Result<T, Problem> {
    decode(value)
        .map_err(|Problem { field, fault }| Problem::new(field, Fault::Undecodable(format!("{fault} ({place})"))))
}

/// An object of what came as one; a problem names the field.
pub(super) fn decode<T: DeserializeOwned>(value: &Value) -> Result<T, Problem> {
    serde_path_to_error::deserialize(value)
        .map_err(|error| Problem::new(path(error.path()), Fault::Undecodable(error.inner().to_string())))
}

fn path(path: &serde_path_to_error::Path) -> String {
    let path = path.to_string();
    if path == "." { String::new() } else { path }
}

/// With `file`, a fault of an object in it, at `field`; without, one of the file itself, at a line.
fn undecodable(file: Option<&str>, field: &str, lines_before: u64, error: &serde_saphyr::Error) -> Problem {
    let error = error.without_snippet();
    let line = error.location().map(|location| lines_before + location.line());
    let message = error.render_with_formatter(&serde_saphyr::UserMessageFormatter);
    // The location is told once, and in lines of the file instead of the document.
    let message = message.split_once(" at line ").map_or(message.as_str(), |(message, _)| message);
    match (file, line) {
        (None, None) => Problem::new("", Fault::Undecodable(message.to_owned())),
        (None, Some(line)) => Problem::new(format!("line {line}"), Fault::Undecodable(message.to_owned())),
        (Some(file), None) => Problem::new(field, Fault::Undecodable(format!("{message} ({file})"))),
        (Some(file), Some(line)) => Problem::new(field, Fault::Undecodable(format!("{message} ({file}:{line})"))),
    }
}

/// Files of a cluster's size are legal: the limits are those of a hostile input, and a directory is the operator's own.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! { budget: None, with_snippet: false }
}

/// The documents of a YAML file that hold anything, each with the number of lines before it.
///
/// A line that starts with `---` ends a document wherever it stands; no scalar can contain it (YAML 1.2, 9.1.2).
fn documents(text: &str) -> Vec<(u64, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 0, 0);
    let mut has_content = false;
    for (number, line) in (0..).zip(text.split_inclusive('\n')) {
        let marker = line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if marker.is_some() {
            if has_content {
                documents.push((start_line, &text[start..at]));
                (start, start_line) = (at, number);
            } else if text[start..at].lines().all(|line| !line.starts_with('%')) {
                // Directives belong to the document that follows them.
                (start, start_line) = (at, number);
            }
            has_content = false;
        }
        let content = marker.unwrap_or(line).trim_start();
        has_content |= !content.is_empty() && !content.starts_with(['#', '%']) && content.trim_end() != "...";
        at += line.len();
    }
    if has_content {
        documents.push((start_line, &text[start..]));
    }
    documents
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump(path: &str, text: &str) -> String {
        let contents = Contents::parse(Path::new(path), text);
        let mut lines = Vec::new();
        for object in &contents.objects {
            let (kind, name) = object.key();
            let problems = match object {
                Version::Service(version) => &version.problems,
                Version::EndpointSlice(version) => &version.problems,
                Version::Node(version) => &version.problems,
                Version::Pod(version) => &version.problems,
            };
            let problems: Vec<_> = problems.iter().map(|problem| format!(" | {problem}")).collect();
            lines.push(format!("{kind} {name}{}\n", problems.concat()));
        }
        lines.extend(contents.problems.iter().map(|problem| format!("! {problem}\n")));
        lines.concat()
    }

    const WEB: &str = "{apiVersion: v1, kind: Service, metadata: {name: web}, \
                       spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}}";

    #[test]
    fn documents_stand_for_themselves() {
        let text =
            format!("# a comment\n---\n{WEB}\n---\nkind: [\n--- # more\nkind: ConfigMap\n---\n\n---\nmetadata: {{}}\n");
        let dump = dump("a.yaml", &text);
        let mut lines = dump.lines();
        assert_eq!(lines.next(), Some("Service default/web"));
        let syntax = lines.next().unwrap_or_default();
        assert!(syntax.starts_with("! line 5: ") || syntax.starts_with("! line 6: "), "{dump}");
        assert_eq!(lines.next(), Some("! line 10: kind: is missing"), "{dump}");
        assert_eq!(lines.next(), None);
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named_with_its_line() {
        let text = "kind: ConfigMap\n---\napiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  ports:\n  - port: http\n";
        let dump = dump("a.yaml", text);
        assert!(dump.starts_with("Service default/web | spec.ports[0].port: "), "{dump}");
        assert!(dump.contains("(a.yaml:9)"), "{dump}");
    }

    #[test]
    fn lists_are_their_items() {
        let json = r#"{"apiVersion": "v1", "kind": "ServiceList", "items": [
            {"metadata": {"name": "a"}, "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]}},
            {"metadata": {"name": "b"}, "spec": {"clusterIP": "10.0.0.2", "ports": [{"port": "x"}]}}]}"#;
        let expected = "Service default/a\n\
                        Service default/b | spec.ports[0].port: invalid type: string \"x\", expected i32 (l.json)\n";
        assert_eq!(dump("l.json", json), expected);
        let yaml = format!("kind: List\napiVersion: v1\nitems:\n- {WEB}\n- kind: Service\n  apiVersion: v2\n");
        assert_eq!(
            dump("l.yaml", &yaml),
            "Service default/web\n\
             ! line 5: apiVersion: Service of \"v2\" is not supported: v1 is\n"
        );
    }

    #[test]
    fn a_file_cut_anywhere_is_read_without_panic() {
        let text = format!("%YAML 1.2\n---\n{WEB}\n---\nkind: List\nitems:\n- {WEB}\n...\n");
        assert_eq!(dump("a.yaml", &text), "Service default/web\nService default/web\n");
        for end in (0..text.len()).filter(|&end| text.is_char_boundary(end)) {
            dump("a.yaml", &text[..end]);
            dump("a.json", &text[..end]);
        }
    }
}
