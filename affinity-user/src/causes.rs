//! What is behind an error.

use std::error::Error;

/// An error with its causes, each told once: some errors tell their causes themselves, others ("client error") say little.
pub fn in_full(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
