//! `innkeeper admin …`: what needs the state directory and no login.

use clap::{Subcommand, ValueEnum};

use super::{Failure, Outcome, PlaceArgs};

#[derive(Debug, Subcommand)]
pub enum AdminCommand {
    /// Print a new one-time link that makes the first administrator.
    SetupLink,
    /// Make a user.
    CreateUser {
        name: String,
        /// What the user may do.
        #[arg(long, value_enum, default_value = "administrator")]
        role: RoleArg,
        /// Read the password from standard input, to the end of its first line.
        #[arg(long)]
        password_stdin: bool,
    },
    /// Give a user a new password and end all logins of that user.
    ResetPassword {
        name: String,
        /// Read the password from standard input, to the end of its first line.
        #[arg(long)]
        password_stdin: bool,
    },
    /// Print a new token for the API that acts as this user.
    CreateToken {
        /// The user.
        name: String,
        /// What the token is for; shown in the list of tokens.
        #[arg(long, default_value = "command line")]
        purpose: String,
    },
    /// Check the database; with --repair write it anew.
    CheckDatabase {
        #[arg(long)]
        repair: bool,
    },
    /// Make a new certificate from the same certificate authority.
    ReissueCertificate,
    /// Take away every network that Innkeeper made on this host.
    RemoveNetworks,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoleArg {
    Administrator,
    Operator,
    Viewer,
}

pub(super) fn run(_place: &PlaceArgs, _command: AdminCommand) -> Outcome {
    Err(Failure::failed("not wired yet"))
}
