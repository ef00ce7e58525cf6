//! Versions, read from what compilers and linkers say of themselves.

use std::fmt::{self, Display, Formatter};

/// The first two numbers of a Rust release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
}

impl Version {
    /// Reads `1.95`, `1.95.0` or `1.97.0-nightly`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.trim().split('.');
        let (major, minor) = (numbers.next()?, numbers.next()?);
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl Display for Version {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The release in the answer to `rustc -vV`.
pub fn release_of(answer: &str) -> Option<Version> {
    Version::parse(field(answer, "release: ")?)
}

/// LLVM's major version in the answer to `rustc -vV`.
pub fn llvm_of(answer: &str) -> Option<u32> {
    field(answer, "LLVM version: ")?.split('.').next()?.parse().ok()
}

/// LLVM's major version in the strings of a linker: in the name of its shared library (`libLLVM.so.22.1`,
/// `libLLVM-22.so`), or what a static LLVM writes into the bitcode that it makes (`LLVM22.1.4`).
pub fn llvm_in_strings(strings: &str) -> Option<u32> {
    let majors: Vec<u32> = strings
        .lines()
        .filter_map(|line| {
            let name = line.split_once("LLVM")?.1.trim_start_matches(|c: char| !c.is_ascii_digit());
            name.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        })
        .collect();
    let (first, rest) = majors.split_first()?;
    rest.iter().all(|major| major == first).then_some(*first)
}

fn field<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
    answer.lines().find_map(|line| line.strip_prefix(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                          release: 1.97.0-nightly\nLLVM version: 22.1.4\n";

    #[test]
    fn rustc_says_what_it_is() {
        assert_eq!(release_of(ANSWER), Version::parse("1.97"));
        assert_eq!(llvm_of(ANSWER), Some(22));
        assert_eq!(llvm_of("rustc 1.97.0"), None);
    }

    #[test]
    fn versions_compare_by_number() {
        let version = |text| Version::parse(text).expect("a version");
        assert!(version("1.100.1") > version("1.95"));
        assert!(version("1.95.0") >= version("1.95"));
        assert!(version("1.85.0") < version("1.95"));
        assert_eq!(Version::parse("nightly"), None);
    }

    #[test]
    fn linkers_say_their_llvm_by_their_strings() {
        assert_eq!(llvm_in_strings("libLLVM.so.22"), Some(22));
        assert_eq!(llvm_in_strings("libLLVM-21"), Some(21));
        assert_eq!(llvm_in_strings("LLVM23.1.0"), Some(23));
        assert_eq!(llvm_in_strings("libLLVM.so.22\nLLVM22.1.8"), Some(22));
        assert_eq!(llvm_in_strings("libLLVM.so.22\nLLVM21.1.8"), None);
        assert_eq!(llvm_in_strings(""), None);
    }
}
