//! The `innkeeper` command: reads the command line, takes on the role it names, gives the exit code.

use std::process::ExitCode;

use clap::Parser;
use innkeeper::cli::{self, Cli, Command, Failure};

fn main() -> ExitCode {
    let Cli { place, command } = Cli::parse();
    let outcome = match command {
        Command::Serve(_) | Command::Web | Command::Engine | Command::Doctor { .. } => {
            Err(Failure::failed("This build has no server yet."))
        }
        Command::Guest(command) => cli::run_guest(&place, command),
        Command::Image(command) => cli::run_image(&place, command),
        Command::Admin(command) => cli::run_admin(&place, command),
    };
    cli::exit_code(outcome)
}
