//! Sticky Kubernetes Services in eBPF: loader, tables, reconciliation and the node daemon.

pub mod loader;
pub mod object;
