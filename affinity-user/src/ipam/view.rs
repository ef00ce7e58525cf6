//! Pools, for those who ask: as rows.

use serde::Serialize;

use super::block::Range;
use super::pool::{Block, LoadBalancerPool, Usage};

/// A pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PoolRow {
    /// Its name.
    pub pool: String,
    /// What it is made of, as it is written: `CIDR`, or `FIRST-LAST`.
    pub blocks: Vec<String>,
    /// Whether no more addresses are given.
    pub disabled: bool,
    /// Its IPv4 addresses.
    pub ipv4: Usage,
    /// Its IPv6 addresses.
    pub ipv6: Usage,
    /// What is said of it; nothing before somebody has looked at it.
    pub conditions: Vec<ConditionRow>,
}

/// Something that is said of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConditionRow {
    /// `Ready`, `Conflict`, `Outside`.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True` or `False`.
    pub status: String,
    /// A word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

impl PoolRow {
    /// The row of a pool.
    pub fn of(pool: &LoadBalancerPool) -> Self {
        let status = pool.status.clone().unwrap_or_default();
        let conditions = status.conditions.into_iter().map(|condition| ConditionRow {
            type_: condition.type_,
            status: condition.status,
            reason: condition.reason,
            message: condition.message,
        });
        Self {
            pool: pool.metadata.name.clone().unwrap_or_default(),
            blocks: pool.spec.blocks.iter().map(block).collect(),
            disabled: pool.spec.disabled,
            ipv4: status.ipv4,
            ipv6: status.ipv6,
            conditions: conditions.collect(),
        }
    }

    /// What people should know of it, in a few words.
    pub fn summary(&self) -> String {
        if self.conditions.is_empty() {
            return "nobody gives addresses: does a daemon run?".to_owned();
        }
        let bad =
            self.conditions.iter().filter(|condition| (condition.type_ == "Ready") != (condition.status == "True"));
        let bad: Vec<&str> = bad.map(|condition| condition.message.as_str()).collect();
        if bad.is_empty() { "ready".to_owned() } else { bad.join("; ") }
    }
}

fn block(block: &Block) -> String {
    match (&block.cidr, Range::of(block)) {
        (Some(cidr), _) => cidr.clone(),
        (None, Ok(range)) => range.to_string(),
        (None, Err(error)) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_shown_as_it_is_written() {
        let pool: LoadBalancerPool = serde_saphyr::from_str(
            "apiVersion: affinity.dev/v1alpha1\nkind: LoadBalancerPool\nmetadata: {name: lab}\n\
             spec: {blocks: [{cidr: 192.0.2.0/24}, {start: 2001:db8::1, stop: 2001:db8::9}]}",
        )
        .expect("a pool");
        let mut row = PoolRow::of(&pool);
        assert_eq!(row.blocks, ["192.0.2.0/24", "2001:db8::1-2001:db8::9"]);
        assert!(row.summary().starts_with("nobody"));
        let condition = |type_: &str, status: &str| ConditionRow {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: String::new(),
            message: format!("{type_} {status}"),
        };
        row.conditions = vec![condition("Ready", "True"), condition("Conflict", "False")];
        assert_eq!(row.summary(), "ready");
        row.conditions =
            vec![condition("Ready", "False"), condition("Conflict", "True"), condition("Outside", "False")];
        assert_eq!(row.summary(), "Ready False; Conflict True");
    }
}
