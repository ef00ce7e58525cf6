//! The datapath's own debug log, which the verifier has compiled out unless it was asked for.

use std::time::Duration;

use aya_log::EbpfLogger;
use tokio::time::interval;

use crate::loader::Datapath;

/// How often the programs' ring is read.
const LOOK: Duration = Duration::from_millis(100);

/// Forwards the programs' log to ours, in a task of its own.
pub fn forward(datapath: &mut Datapath) {
    match EbpfLogger::init(datapath.object()) {
        Ok(mut logger) => {
            let mut look = interval(LOOK);
            tokio::spawn(async move {
                loop {
                    look.tick().await;
                    logger.flush();
                }
            });
        }
        Err(error) => tracing::warn!(%error, "no log of the datapath"),
    }
}
