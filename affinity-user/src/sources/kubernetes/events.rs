//! Kubernetes events about objects that can't be programmed, for those who look at the object and not at a node's log.
//!
//! Every node reports for itself, as `reportingInstance`: what one can't program another may. Events are a courtesy: they
//! are spread over some time, and those that there is no room or no leave for are left out.

use std::time::Duration;

use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        core::v1::{self as core, ObjectReference},
        discovery::v1 as discovery,
    },
};
use kube::{
    Api, Client, Resource,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::sync::mpsc;

use super::{Options, SourceError, connect, trimmed};
use crate::{
    model::{Fault, Kind, Notice, ObjectName, Rejection, Subject},
    reconcile,
};

/// How many reports may wait.
const BACKLOG: usize = 4096;
/// The longest wait before an event; half of it on average. It spreads a cluster's nodes, and limits each.
const SPREAD: Duration = Duration::from_secs(1);
/// The longest note and action that the API takes, in bytes.
const NOTE_MAX: usize = 1024;
const ACTION_MAX: usize = 128;

/// What is wrong with an object, in an event's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    kind: Kind,
    name: ObjectName,
    reason: &'static str,
    /// What of the object; events of an object that differ in it are not counted as one.
    field: String,
    note: String,
}

impl Report {
    /// The report of a rejection; `None` if it is of nothing that events can be about.
    pub fn of_rejection(Rejection { object, problem }: &Rejection) -> Option<Self> {
        let Subject::Object(kind, name) = object else { return None };
        let reason =
            if matches!(problem.fault, Fault::Annotation { .. }) { "AnnotationIgnored" } else { "NotProgrammed" };
        Some(Self { kind: *kind, name: name.clone(), reason, field: problem.field.clone(), note: problem.to_string() })
    }

    /// The report of what people should know of a service.
    pub fn of_notice(notice: &Notice) -> Self {
        let Notice { service, field, matter } = notice;
        let (name, field) = (service.clone(), field.clone());
        Self { kind: Kind::Service, name, reason: matter.reason(), field, note: notice.message() }
    }

    /// The report of a service port that the maps have no room for, or the like.
    pub fn of_problem(reconcile::Problem { subject, error, .. }: &reconcile::Problem) -> Option<Self> {
        let reconcile::Subject::ServicePort(port) = subject else { return None };
        let field = format!("port {}/{}", port.port, port.proto);
        let note = format!("{port}: {error}");
        Some(Self { kind: Kind::Service, name: port.service.clone(), reason: "NotProgrammed", field, note })
    }
}

/// Makes events of reports, in a task of the current tokio runtime, as the node of this name.
///
/// # Panics
/// Outside a tokio runtime.
pub fn start(options: &Options, node: &str) -> mpsc::Sender<Report> {
    let (sender, mut receiver) = mpsc::channel(BACKLOG);
    let (options, node) = (options.clone(), node.to_owned());
    tokio::spawn(async move {
        let mut recorder = None;
        while let Some(report) = receiver.recv().await {
            tokio::time::sleep(SPREAD.mul_f64(fastrand::f64())).await;
            if let Err(error) = publish(&options, &node, &mut recorder, &report).await {
                tracing::debug!(%error, ?report, "no event");
                recorder = None;
            }
        }
    });
    sender
}

/// Why an event could not be made.
#[derive(Debug, Error)]
enum EventError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Api(#[from] kube::Error),
}

async fn publish(
    options: &Options,
    node: &str,
    connected: &mut Option<(Client, Recorder)>,
    report: &Report,
) -> Result<(), EventError> {
    let (client, recorder) = if let Some(connected) = connected {
        connected
    } else {
        let (client, _) = connect(options).await?;
        let reporter = Reporter { controller: "affinity".into(), instance: Some(node.to_owned()) };
        connected.insert((client.clone(), Recorder::new(client, reporter)))
    };
    // Whoever looks at an object asks for the events of its uid.
    let client = client.clone();
    let object = match report.kind {
        Kind::Service => find::<core::Service>(client, &report.name).await?,
        Kind::EndpointSlice => find::<discovery::EndpointSlice>(client, &report.name).await?,
        Kind::Pod => find::<trimmed::Pod>(client, &report.name).await?,
        Kind::Node => None,
    };
    let Some(object) = object else { return Ok(()) };
    let event = Event {
        type_: EventType::Warning,
        reason: report.reason.into(),
        note: Some(cut(&report.note, NOTE_MAX)),
        action: cut(&format!("Program {}", report.field), ACTION_MAX),
        secondary: None,
    };
    Ok(recorder.publish(&event, &object).await?)
}

/// An object as events name it; `None` if it is gone.
async fn find<K>(client: Client, name: &ObjectName) -> Result<Option<ObjectReference>, kube::Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
{
    let found = Api::<K>::namespaced(client, &name.namespace).get_metadata_opt(&name.name).await?;
    Ok(found.map(|object| ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        name: object.metadata.name,
        namespace: object.metadata.namespace,
        uid: object.metadata.uid,
        ..ObjectReference::default()
    }))
}

/// A text of at most so many bytes.
fn cut(text: &str, max: usize) -> String {
    text[..text.floor_char_boundary(max)].to_owned()
}

#[cfg(test)]
mod tests {
    use affinity_common::types::Proto;

    use super::*;
    use crate::model::{Matter, Problem};

    #[test]
    fn reports_are_of_objects_and_say_what_is_wrong() {
        let object = Subject::Object(Kind::Service, ObjectName::new("shop", "web"));
        let report = |object: &Subject, fault| {
            let rejection = Rejection { object: object.clone(), problem: Problem::new("spec.x", fault) };
            Report::of_rejection(&rejection).map(|report| (report.reason, report.note))
        };
        let unsupported = Fault::UnsupportedProtocol("SCTP".into());
        let note = "spec.x: SCTP is not supported: TCP and UDP are".to_owned();
        assert_eq!(report(&object, unsupported.clone()), Some(("NotProgrammed", note)));
        let annotation = Fault::Annotation { value: "x".into(), known: "on, off" };
        assert_eq!(report(&object, annotation).map(|(reason, _)| reason), Some("AnnotationIgnored"));
        assert_eq!(report(&Subject::File("a.yaml".into()), unsupported), None);
        let port = crate::model::ServicePortName {
            service: ObjectName::new("shop", "web"),
            port: "http".into(),
            proto: Proto::TCP,
        };
        let problem = reconcile::Problem {
            subject: reconcile::Subject::ServicePort(port),
            error: reconcile::ReconcileError::LongName,
            since: std::time::Instant::now(),
            attempts: 1,
            retry_at: std::time::Instant::now(),
        };
        let report = Report::of_problem(&problem).expect("a report");
        assert_eq!((report.kind, report.field.as_str()), (Kind::Service, "port http/TCP"));
        assert!(report.note.starts_with("shop/web/http/TCP: "), "{}", report.note);
        let report = Report::of_notice(&Notice {
            service: ObjectName::new("shop", "web"),
            field: "spec.externalIPs[0]".into(),
            matter: Matter::NodesOwnAddress([192, 0, 2, 1].into()),
        });
        assert_eq!((report.reason, report.field.as_str()), ("NodesOwnAddress", "spec.externalIPs[0]"));
        assert!(
            report.note.starts_with("spec.externalIPs[0]: 192.0.2.1 is the node's own address: "),
            "{}",
            report.note
        );
        assert_eq!(cut("aé", 2), "a");
    }
}
