//! What the custom resources select services and nodes by.

use std::collections::BTreeMap;

use kube::core::{Expression, Selector, SelectorExt as _};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::ServiceName;

/// Labels that an object must have, as in Kubernetes' own selectors; an empty one selects every object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LabelSelector {
    /// Labels and the values that they must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// Requirements, all of which must be met.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Requirement>,
}

/// Which services are meant; an empty one selects every service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSelector {
    /// Labels and the values that they must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// Requirements, all of which must be met.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Requirement>,
    /// The namespaces that they must be in; any where none is named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<String>,
}

/// A requirement on one label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Requirement {
    /// The label.
    pub key: String,
    /// How it is compared.
    pub operator: Operator,
    /// The values of `In` and `NotIn`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// How a label is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Operator {
    /// It has one of the values.
    In,
    /// It has none of the values, or is not there.
    NotIn,
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

impl LabelSelector {
    /// Whether an object with these labels is selected.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        matches(&self.match_labels, &self.match_expressions, labels)
    }
}

impl ServiceSelector {
    /// Whether a service of that name, with these labels, is selected.
    pub fn matches(&self, service: &ServiceName, labels: &BTreeMap<String, String>) -> bool {
        (self.namespaces.is_empty() || self.namespaces.iter().any(|namespace| *namespace == *service.namespace))
            && matches(&self.match_labels, &self.match_expressions, labels)
    }
}

impl Requirement {
    fn expression(&self) -> Expression {
        let (key, values) = (self.key.clone(), self.values.iter().cloned().collect());
        match self.operator {
            Operator::In => Expression::In(key, values),
            Operator::NotIn => Expression::NotIn(key, values),
            Operator::Exists => Expression::Exists(key),
            Operator::DoesNotExist => Expression::DoesNotExist(key),
        }
    }
}

fn matches(exact: &BTreeMap<String, String>, wanted: &[Requirement], labels: &BTreeMap<String, String>) -> bool {
    let mut selector: Selector = exact.clone().into_iter().collect();
    selector.extend(wanted.iter().map(Requirement::expression));
    selector.matches(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_selected_by_namespace_and_labels() {
        let labels = [("app".to_owned(), "web".to_owned()), ("tier".to_owned(), "front".to_owned())].into();
        let service = ServiceName::new("shop", "web");
        let selects = |text: &str| {
            let selector: ServiceSelector = serde_saphyr::from_str(text).expect("a selector");
            selector.matches(&service, &labels)
        };
        for (text, expected) in [
            ("{}", true),
            ("{namespaces: [shop, other]}", true),
            ("{namespaces: [other]}", false),
            ("{matchLabels: {app: web}}", true),
            ("{matchLabels: {app: web, tier: back}}", false),
            ("{matchExpressions: [{key: tier, operator: In, values: [front, back]}]}", true),
            ("{matchExpressions: [{key: tier, operator: NotIn, values: [front]}]}", false),
            ("{matchExpressions: [{key: none, operator: NotIn, values: [front]}]}", true),
            ("{matchExpressions: [{key: app, operator: Exists}, {key: none, operator: DoesNotExist}]}", true),
            ("{matchExpressions: [{key: none, operator: Exists}]}", false),
            ("{namespaces: [shop], matchLabels: {app: other}}", false),
        ] {
            assert_eq!(selects(text), expected, "{text}");
        }
    }
}
