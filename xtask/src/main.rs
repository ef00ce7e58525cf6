//! The one door to the project: `cargo xtask <verb>`.

mod artifacts;
mod assets;
mod bench;
mod build;
mod cargo;
mod cases;
mod cluster;
mod dwarf;
mod image;
mod kernel;
mod kind;
mod machine;
mod outcome;
mod process;
mod programs;
mod run;
mod say;
mod setup;
mod steps;
mod suites;
mod test;
mod toolchain;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Sets up, builds, runs and tests Affinity.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Setup(setup::Args),
    Build(build::Args),
    Image(image::Args),
    Test(test::Args),
    Run(run::Args),
    Bench(bench::Args),
    Cluster(cluster::Args),
    Kind(kind::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = process::end_children_on_interrupt().and_then(|()| match cli.verb {
        Verb::Setup(args) => setup::verb(&args),
        Verb::Build(args) => build::verb(&args),
        Verb::Image(args) => image::verb(&args),
        Verb::Test(args) => test::verb(&args),
        Verb::Run(args) => run::verb(args),
        Verb::Bench(args) => bench::verb(args),
        Verb::Cluster(args) => cluster::verb(args),
        Verb::Kind(args) => kind::verb(&args),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say::error(&error);
            ExitCode::FAILURE
        }
    }
}
