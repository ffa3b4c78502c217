//! `innkeeper admin …`: what needs the state directory and no login.

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
};

use clap::{Subcommand, ValueEnum};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use super::{Failure, Outcome, PlaceArgs, default_state_dir, run_dir, say};
use crate::{
    admin::{self, Role},
    host::net::Networks,
    state_files::become_owner,
};

#[derive(Debug, Subcommand)]
pub enum AdminCommand {
    /// Print a new one-time link that makes the first administrator; the one before is of no more use.
    SetupLink,
    /// Make a user. The password is asked for on the terminal.
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
    /// Print a new token for the API. It is shown this once.
    CreateToken {
        /// What the token is for; shown in the list of tokens.
        name: String,
        /// The user it acts as; left out: the first administrator.
        #[arg(long)]
        user: Option<String>,
    },
    /// Check the database.
    CheckDatabase {
        /// Write it anew, with the server stopped; the old file stays beside the new one.
        #[arg(long)]
        repair: bool,
    },
    /// Make a new certificate from the same certificate authority; the server takes it at its next start.
    ReissueCertificate,
    /// Take away the NAT network that this Innkeeper made: bridge, rules, DHCP and forwarding. Refused while guests are on it.
    RemoveNetworks,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoleArg {
    Administrator,
    Operator,
    Viewer,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Role {
        match role {
            RoleArg::Administrator => Role::Administrator,
            RoleArg::Operator => Role::Operator,
            RoleArg::Viewer => Role::Viewer,
        }
    }
}

/// Carries a command out on the state directory itself.
pub(super) fn run(place: &PlaceArgs, command: AdminCommand) -> Outcome {
    let state = state_dir(place)?;
    let state = state.as_path();
    // The network is the host's; everything else is done as the one whose state it is.
    if !matches!(command, AdminCommand::RemoveNetworks) {
        let cannot = |error| Failure::failed(format!("Cannot work on {}: {error}.", state.display()));
        become_owner(state).map_err(cannot)?;
    }
    match command {
        AdminCommand::SetupLink => {
            let token = admin::setup_token(state)?;
            for base in admin::urls(state) {
                say(format!("{base}/setup?token={token}"))?;
            }
            Ok(())
        }
        AdminCommand::CreateUser { name, role, password_stdin } => {
            let password = password(password_stdin)?;
            admin::create_user(state, &name, role.into(), &password)?;
            say(format!("{name} created"))
        }
        AdminCommand::ResetPassword { name, password_stdin } => {
            let password = password(password_stdin)?;
            admin::reset_password(state, &name, &password)?;
            say(format!("{name} has a new password; all logins of {name} have ended"))
        }
        AdminCommand::CreateToken { name, user } => say(admin::create_token(state, &name, user.as_deref())?),
        AdminCommand::CheckDatabase { repair } => check_database(state, repair),
        AdminCommand::ReissueCertificate => {
            let certificate = admin::reissue_certificate(state)?;
            let _ = certificate;
            say("The certificate is made anew; a running server takes it at its next start.")
        }
        AdminCommand::RemoveNetworks => {
            Networks::new(state, run_dir(place)?).remove()?;
            say("the networks that Innkeeper made are gone")
        }
    }
}

fn check_database(state: &Path, repair: bool) -> Outcome {
    if repair {
        let old = admin::repair_database(state)?;
        say(format!("The database is written anew; the old one is {}.", old.display()))?;
    }
    let problems = admin::check_database(state)?;
    if problems.is_empty() {
        return say("The database is in order.");
    }
    for problem in &problems {
        say(problem)?;
    }
    Err(Failure::failed("The database is damaged; \"innkeeper admin check-database --repair\" may help."))
}

/// The state directory, which must exist: an admin command never makes one somewhere by mistake.
fn state_dir(place: &PlaceArgs) -> Outcome<PathBuf> {
    let dir = default_state_dir(place)?;
    if dir.is_dir() {
        Ok(dir)
    } else {
        let text = format!(
            "There is no state directory {}. Name it with --state DIR, or start the server once.",
            dir.display()
        );
        Err(Failure::failed(text))
    }
}

/// A password from standard input; on a terminal typed twice, without being shown.
fn password(from_stdin: bool) -> Outcome<String> {
    let stdin = io::stdin();
    if !from_stdin && !stdin.is_terminal() {
        return Err(Failure::Usage("the password is typed on a terminal, or comes with --password-stdin".into()));
    }
    if from_stdin {
        return read_password();
    }
    let hidden = Hidden::enter();
    write!(io::stderr(), "Password: ")?;
    let first = read_password()?;
    write!(io::stderr(), "\nThe same again: ")?;
    let second = read_password()?;
    drop(hidden);
    if first == second { Ok(first) } else { Err(Failure::failed("The two are not the same.")) }
}

fn read_password() -> Outcome<String> {
    let mut line = String::new();
    io::stdin().read_line(&mut line).map_err(|error| Failure::failed(format!("Cannot read the password: {error}.")))?;
    Ok(line.trim_end_matches(['\n', '\r']).to_owned())
}

/// The terminal without echo, until this is dropped.
struct Hidden(Option<Termios>);

impl Hidden {
    fn enter() -> Hidden {
        let Ok(before) = tcgetattr(io::stdin()) else { return Hidden(None) };
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        let set = tcsetattr(io::stdin(), OptionalActions::Flush, &quiet);
        Hidden(set.ok().map(|()| before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
            let _ = writeln!(io::stderr());
        }
    }
}
