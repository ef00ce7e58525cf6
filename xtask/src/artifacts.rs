//! What cargo says that it has built (`--message-format json`).

use std::path::PathBuf;

use serde_json::Value;

/// An executable that cargo has built.
#[derive(Debug, PartialEq)]
pub struct Executable {
    /// The target's name in Cargo.toml.
    pub name: String,
    /// The file.
    pub path: PathBuf,
}

/// The executables in cargo's messages.
pub fn executables(messages: &str) -> Vec<Executable> {
    messages.lines().filter_map(executable).collect()
}

fn executable(message: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(message).ok()?;
    let path = message.get("executable")?.as_str()?.into();
    let name = message.get("target")?.get("name")?.as_str()?.to_owned();
    Some(Executable { name, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_run_is_an_executable() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"anyhow"},"executable":null}
            {"reason":"compiler-artifact","target":{"name":"packet"},"executable":"/t/packet-1"}
            not JSON
            {"reason":"build-finished","success":true}"#;
        assert_eq!(executables(messages), [Executable { name: "packet".to_owned(), path: "/t/packet-1".into() }]);
    }
}
