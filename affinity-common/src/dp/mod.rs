//! The datapath's logic.
