//! Sticky Kubernetes Services in eBPF: loader, tables, reconciliation and the node daemon.

pub mod object;
