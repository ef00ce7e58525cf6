//! What `affinity VERB -o json` prints, as far as the suites and the demonstration read it.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::daemon::Cli;
use crate::wait;

/// A row of `affinity service list`.
#[derive(Clone, Debug, Deserialize)]
pub struct ServiceRow {
    /// `namespace/name`.
    pub service: String,
    /// The port's name.
    pub port_name: String,
    /// Where it is reached: `10.96.0.10:80/TCP`.
    pub frontends: Vec<String>,
    /// Seconds of affinity; none for `sessionAffinity: None`.
    pub affinity_timeout_seconds: Option<u32>,
    /// Backends that take new sessions.
    pub eligible: usize,
    /// All backends.
    pub backends: usize,
}

/// A row of `affinity backend list`.
#[derive(Clone, Debug, Deserialize)]
pub struct BackendRow {
    /// `namespace/name`.
    pub service: String,
    /// The backend's id.
    pub id: u32,
    /// The pod's name, where it is known.
    pub pod: Option<String>,
    /// Address and port.
    pub address: String,
    /// `eligible` or `draining`.
    pub state: String,
    /// Connections that it was given.
    pub connections: u64,
}

/// A row of `affinity session list`.
#[derive(Clone, Debug, Deserialize)]
pub struct SessionRow {
    /// The client's address.
    pub client: IpAddr,
    /// `namespace/name`.
    pub service: String,
    /// The pod's name, where it is known.
    pub pod: Option<String>,
    /// Seconds since the client was given this backend.
    pub age_seconds: f64,
    /// Seconds until the entry expires.
    pub left_seconds: Option<f64>,
    /// `live` or `expired`.
    pub state: String,
}

impl SessionRow {
    /// Whether the entry still holds the client.
    pub fn is_live(&self) -> bool {
        self.state == "live"
    }
}

/// A row of the counters of `affinity status`.
#[derive(Clone, Debug, Deserialize)]
pub struct CounterRow {
    /// The program's name.
    pub program: String,
    /// The reason's name.
    pub reason: String,
    /// How many packets, or calls of sockets, ended in the program for the reason.
    pub packets: u64,
}

impl Cli {
    /// The counters of `affinity status`.
    ///
    /// # Errors
    /// Those of [`Cli::json`].
    pub fn counters(&self) -> Result<Vec<CounterRow>> {
        let mut status = self.json(&["status"])?;
        serde_json::from_value(status["counters"].take()).context("the counters of affinity status")
    }

    /// How many packets, or calls of sockets, ended as `wanted`, by the counters.
    ///
    /// # Errors
    /// Those of [`Cli::json`].
    pub fn counted(&self, wanted: impl Fn(&CounterRow) -> bool) -> Result<u64> {
        Ok(self.counters()?.iter().filter(|row| wanted(row)).map(|row| row.packets).sum())
    }

    /// `affinity service list`.
    ///
    /// # Errors
    /// Those of [`Cli::json`].
    pub fn services(&self) -> Result<Vec<ServiceRow>> {
        self.rows(&["service", "list"])
    }

    /// `affinity backend list`.
    ///
    /// # Errors
    /// Those of [`Cli::json`].
    pub fn backends(&self) -> Result<Vec<BackendRow>> {
        self.rows(&["backend", "list"])
    }

    /// `affinity session list`.
    ///
    /// # Errors
    /// Those of [`Cli::json`].
    pub fn sessions(&self) -> Result<Vec<SessionRow>> {
        self.rows(&["session", "list"])
    }

    /// Waits until a service (`namespace/name`) is as `wanted`; `None` stands for one that is not there.
    ///
    /// # Errors
    /// After `timeout`, with what it is then.
    pub fn wait_for_service(
        &self,
        name: &str,
        timeout: Duration,
        wanted: impl Fn(Option<&ServiceRow>) -> bool,
    ) -> Result<()> {
        let mut last = None;
        let outcome = wait::until_true(&format!("service {name} as wanted"), timeout, || {
            let services = self.services()?;
            last = services.into_iter().find(|row| row.service == name);
            Ok(wanted(last.as_ref()))
        });
        outcome.with_context(|| format!("it is {last:?}"))
    }

    fn rows<T: DeserializeOwned>(&self, verb: &[&str]) -> Result<Vec<T>> {
        let value = self.json(verb)?;
        let text = value.to_string();
        serde_json::from_value(value).with_context(|| format!("affinity {}: {text}", verb.join(" ")))
    }
}
