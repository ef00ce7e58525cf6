//! The table of cases, `tests/cases.json`: for each combination of situation, path, protocol and family the tests that show
//! it, or why there is no such thing. Each combination is in it once.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::workspace;

/// One combination.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Combination {
    situation: String,
    path: String,
    protocol: String,
    family: String,
}

/// What the table says of a combination.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Cell {
    /// These tests show it: the step's name and the test's.
    Tests(Vec<(String, String)>),
    /// There is no such thing, and why.
    Impossible(String),
}

/// What became of a combination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    Held,
    Failed,
    /// Not all of its tests were run.
    NotRun,
    Impossible,
}

impl Shown {
    const fn mark(self) -> &'static str {
        match self {
            Self::Held => "ok",
            Self::Failed => "FAILED",
            Self::NotRun => "?",
            Self::Impossible => "-",
        }
    }
}

/// The table.
pub struct Cases {
    dimensions: [Vec<String>; 4],
    cells: BTreeMap<Combination, Cell>,
}

/// The tests that were run, by step and name, and whether each held.
pub type Ran = BTreeMap<(String, String), bool>;

impl Cases {
    /// Reads the file.
    pub fn read() -> Result<Self> {
        let path = workspace::root().join("tests/cases.json");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text)?;
        let dimension = |name: &str| texts(&value[name]).with_context(|| format!("{name} is no list of names"));
        let dimensions =
            [dimension("situations")?, dimension("paths")?, dimension("protocols")?, dimension("families")?];
        let mut cells = BTreeMap::new();
        for entry in value["cells"].as_array().context("no cells")? {
            for combination in combinations(entry, &dimensions)? {
                let cell = cell(entry, &combination)?;
                if cells.insert(combination.clone(), cell).is_some() {
                    bail!("{combination:?} is there twice");
                }
            }
        }
        let [situations, paths, protocols, families] = &dimensions;
        let wanted = situations.len() * paths.len() * protocols.len() * families.len();
        if cells.len() != wanted {
            bail!("{} of {wanted} combinations are missing", wanted - cells.len());
        }
        Ok(Self { dimensions, cells })
    }

    /// Prints the table, and what is impossible and why. Returns the combinations that failed or, of the given steps, have a
    /// test that does not exist.
    pub fn print(&self, ran: &Ran, whole: bool) -> Vec<String> {
        let [situations, paths, protocols, families] = &self.dimensions;
        let columns: Vec<(&String, &String, &String)> = paths
            .iter()
            .flat_map(|path| {
                protocols.iter().flat_map(move |protocol| families.iter().map(move |it| (path, protocol, it)))
            })
            .collect();
        println!("\ncases (- there is no such thing, ? not all of its tests were run)\n");
        let head = columns
            .iter()
            .map(|(path, protocol, family)| format!("{path} {protocol}{}", family.trim_start_matches('v')));
        println!("| {:<12} | {} |", "", head.collect::<Vec<_>>().join(" | "));
        println!("|{}|", vec!["---"; columns.len() + 1].join("|"));
        let mut wrong = Vec::new();
        for situation in situations {
            let mut row = Vec::new();
            for (path, protocol, family) in &columns {
                let combination = Combination {
                    situation: situation.clone(),
                    path: (*path).clone(),
                    protocol: (*protocol).clone(),
                    family: (*family).clone(),
                };
                let shown = self.cells.get(&combination).map_or(Shown::NotRun, |cell| shown(cell, ran));
                if shown == Shown::Failed || whole && shown == Shown::NotRun {
                    wrong.push(format!("{situation}, {path}, {protocol}, {family}"));
                }
                row.push(shown.mark());
            }
            println!("| {situation:<12} | {} |", row.join(" | "));
        }
        println!();
        for (why, of) in self.impossible() {
            println!("- {}: {why}", of.into_iter().collect::<Vec<_>>().join(", "));
        }
        wrong
    }

    /// Why some combinations are not, and which.
    fn impossible(&self) -> BTreeMap<&str, BTreeSet<String>> {
        let mut reasons: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for (combination, cell) in &self.cells {
            if let Cell::Impossible(why) = cell {
                reasons.entry(why).or_default().insert(format!("{} by {}", combination.situation, combination.path));
            }
        }
        reasons
    }
}

fn shown(cell: &Cell, ran: &Ran) -> Shown {
    match cell {
        Cell::Impossible(_) => Shown::Impossible,
        Cell::Tests(tests) => {
            let results: Vec<Option<bool>> = tests.iter().map(|test| ran.get(test).copied()).collect();
            if results.contains(&Some(false)) {
                Shown::Failed
            } else if results.contains(&None) {
                Shown::NotRun
            } else {
                Shown::Held
            }
        }
    }
}

fn texts(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
}

/// Those that an entry is about: all of a dimension that it does not name.
fn combinations(entry: &Value, dimensions: &[Vec<String>; 4]) -> Result<Vec<Combination>> {
    let of = |name: &str, all: &[String]| -> Result<Vec<String>> {
        let Some(named) = entry.get(name) else { return Ok(all.to_vec()) };
        let named = texts(named).with_context(|| format!("{name} of {entry} is no list of names"))?;
        match named.iter().find(|one| !all.contains(one)) {
            Some(unknown) => bail!("{unknown:?} of {entry} is no {name}"),
            None => Ok(named),
        }
    };
    let [situations, paths, protocols, families] = dimensions;
    let (situations, paths) = (of("situation", situations)?, of("path", paths)?);
    let (protocols, families) = (of("protocol", protocols)?, of("family", families)?);
    let mut all = Vec::new();
    for situation in &situations {
        for path in &paths {
            for protocol in &protocols {
                for family in &families {
                    all.push(Combination {
                        situation: situation.clone(),
                        path: path.clone(),
                        protocol: protocol.clone(),
                        family: family.clone(),
                    });
                }
            }
        }
    }
    Ok(all)
}

fn cell(entry: &Value, combination: &Combination) -> Result<Cell> {
    match (entry.get("tests").and_then(texts), entry.get("why").and_then(Value::as_str)) {
        (None, Some(why)) => Ok(Cell::Impossible(why.to_owned())),
        (Some(tests), None) if !tests.is_empty() => {
            let named = tests.iter().map(|test| {
                let test = test.replace("{family}", &combination.family);
                let (step, name) = test.split_once(' ').with_context(|| format!("{test:?} is not `STEP TEST`"))?;
                Ok((step.to_owned(), name.to_owned()))
            });
            Ok(Cell::Tests(named.collect::<Result<_>>()?))
        }
        _ => bail!("{entry} has neither tests nor a reason, or both"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIMENSIONS: &str =
        r#""situations": ["new"], "paths": ["TC", "socket"], "protocols": ["TCP"], "families": ["v4", "v6"]"#;

    fn parse(cells: &str) -> Result<Cases> {
        Cases::parse(&format!("{{{DIMENSIONS}, \"cells\": [{cells}]}}"))
    }

    #[test]
    fn the_table_is_whole() {
        Cases::read().expect("a sound table");
    }

    #[test]
    fn each_combination_is_there_once_and_says_something() {
        let of_tc = r#"{"path": ["TC"], "tests": ["packet {family}::a"]}"#;
        let of_socket = r#"{"path": ["socket"], "why": "none"}"#;
        assert!(parse(&format!("{of_tc}, {of_socket}")).is_ok());
        for wrong in [
            of_tc.to_owned(),
            format!("{of_tc}, {of_socket}, {of_socket}"),
            r#"{"tests": ["packet"]}"#.to_owned(),
            r#"{"tests": []}"#.to_owned(),
            r#"{"path": ["pigeon"], "why": "x"}"#.to_owned(),
            r#"{"tests": ["packet a"], "why": "x"}"#.to_owned(),
        ] {
            assert!(parse(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_failed_or_does_not_exist_is_told() {
        let cases = parse(r#"{"path": ["TC"], "tests": ["packet {family}::a"]}, {"path": ["socket"], "why": "none"}"#);
        let cases = cases.expect("a sound table");
        let test = |family: &str| ("packet".to_owned(), format!("{family}::a"));
        let mut ran = Ran::from([(test("v4"), true), (test("v6"), false)]);
        assert_eq!(cases.print(&ran, true), ["new, TC, TCP, v6"]);
        ran.remove(&test("v6"));
        assert_eq!(cases.print(&ran, true), ["new, TC, TCP, v6"]);
        assert!(cases.print(&ran, false).is_empty());
    }
}
