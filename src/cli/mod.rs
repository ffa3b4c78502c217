//! The command line: what can be typed, where it goes, and the exit code: 0 done, 1 failed, 2 typed wrongly.

pub mod admin;
pub mod client;
pub mod console;
pub mod doctor;
pub mod guest;
mod guest_args;
pub mod image;
pub mod table;
pub mod task;

use std::{
    fmt,
    io::{self, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};

pub use admin::AdminCommand;
pub use guest_args::GuestCommand;
pub use image::ImageCommand;

use client::{Client, TOKEN_VARIABLE, Target, Url};

/// One Linux machine as a virtualization appliance, run from a browser.
///
/// "innkeeper serve" starts the server; the other commands speak to it over a socket on this host,
/// or over HTTPS with --url, --ca and a token in INNKEEPER_TOKEN.
#[derive(Debug, Parser)]
#[command(name = "innkeeper", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub place: PlaceArgs,
    #[command(subcommand)]
    pub command: Command,
}

/// The heading of the options that every command has.
const WHERE: &str = "Where the server is";

/// Where the server or its state is.
#[derive(Debug, Clone, Default, Args)]
pub struct PlaceArgs {
    /// The state directory; its run-time files are then in DIR/run. Left out: /var/lib/innkeeper for root, and a
    /// place below the home directory for anybody else.
    #[arg(long, global = true, value_name = "DIR", help_heading = WHERE)]
    pub state: Option<PathBuf>,
    /// A server elsewhere, as https://HOST:PORT. Needs --ca and a token in INNKEEPER_TOKEN.
    #[arg(long, global = true, value_name = "URL", requires = "ca", conflicts_with = "state", help_heading = WHERE)]
    pub url: Option<String>,
    /// The certificate authority of that server, from its page "Trust this Innkeeper".
    #[arg(long, global = true, value_name = "FILE", requires = "url", help_heading = WHERE)]
    pub ca: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the server in the foreground. When it ends, guests run on.
    Serve(ServeArgs),
    /// Say what this host can do for guests, and what to do about what is missing.
    Doctor {
        /// Print one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Guests: make, start, stop, watch and remove them.
    #[command(subcommand)]
    Guest(GuestCommand),
    /// The library of disk images, CDs and kernels.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Users, tokens, certificate and database; needs the state directory, not a login.
    #[command(subcommand)]
    Admin(AdminCommand),
    /// The web role; started by serve.
    #[command(hide = true)]
    Web(WebArgs),
    /// The engine of one guest; started by serve.
    #[command(hide = true)]
    Engine,
}

#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Address and port to listen on; left out, only this machine reaches the pages. [::]:8443 is every address,
    /// 0.0.0.0:8443 every IPv4 address.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8443")]
    pub listen: String,
}

#[derive(Debug, Clone, Args)]
pub struct WebArgs {
    #[arg(long)]
    pub state_dir: PathBuf,
    #[arg(long)]
    pub run_dir: PathBuf,
    /// Say where the server is and make the set-up link: at the first start of the web role, not when it is started again.
    #[arg(long)]
    pub announce: bool,
}

/// Why a command did not do its work.
#[derive(Debug)]
pub enum Failure {
    /// Typed wrongly; exit code 2.
    Usage(String),
    /// Exit code 1.
    Failed(String),
    /// The server's own sentence; exit code 1.
    Answered { status: u16, text: String },
    /// Whoever reads our output is gone; nothing to say.
    Unread,
}

pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    pub fn failed(text: impl Into<String>) -> Failure {
        Failure::Failed(text.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(text) | Failure::Failed(text) | Failure::Answered { text, .. } => f.write_str(text),
            Failure::Unread => f.write_str("nobody reads the output"),
        }
    }
}

impl From<crate::error::Error> for Failure {
    fn from(error: crate::error::Error) -> Failure {
        Failure::Failed(error.for_log())
    }
}

/// Output that nobody reads any more (`innkeeper … | head`) is no failure worth a sentence.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::Unread,
            _ => Failure::Failed(format!("Cannot write the output: {error}.")),
        }
    }
}

/// The exit code of an outcome; says on standard error what went wrong.
pub fn exit_code(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) | Err(Failure::Unread) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(io::stderr(), "innkeeper: {failure}");
            ExitCode::from(if matches!(failure, Failure::Usage(_)) { 2 } else { 1 })
        }
    }
}

/// Carries out a command that speaks to a running server.
pub fn run_guest(place: &PlaceArgs, command: GuestCommand) -> Outcome {
    guest::run(&client(place)?, place, command)
}

/// As `run_guest`.
pub fn run_image(place: &PlaceArgs, command: ImageCommand) -> Outcome {
    image::run(&client(place)?, place, command)
}

/// Carries out a command on the state directory itself.
pub fn run_admin(place: &PlaceArgs, command: AdminCommand) -> Outcome {
    if place.url.is_some() {
        return Err(Failure::Usage(
            "admin commands work on the state directory of this host; --url is not possible".into(),
        ));
    }
    admin::run(place, command)
}

fn client(place: &PlaceArgs) -> Outcome<Client> {
    let target = match (&place.url, &place.ca) {
        (Some(url), Some(ca)) => {
            let token = std::env::var(TOKEN_VARIABLE).unwrap_or_default();
            if token.is_empty() || token.chars().any(|c| !c.is_ascii_graphic()) {
                let text =
                    format!("--url needs a token in {TOKEN_VARIABLE}; \"innkeeper admin create-token\" makes one");
                return Err(Failure::Usage(text));
            }
            Target::Url(Url::parse(url, ca.clone(), token)?)
        }
        _ => Target::Socket(api_socket(place)),
    };
    Client::new(target)
}

/// Where a server keeps its run-time files: DIR/run with --state, else the place for root or this user.
///
/// Errors: as `default_state_dir`.
pub fn run_dir(place: &PlaceArgs) -> Outcome<PathBuf> {
    let own = User::now().run_dirs(place).into_iter().next();
    own.ok_or_else(|| Failure::Usage("there is no home directory; use --state DIR".into()))
}

/// Where the socket for commands is: of one's own server when it runs, else the system's, which members of the group
/// innkeeper use.
fn api_socket(place: &PlaceArgs) -> PathBuf {
    let user = User::now();
    let mut sockets: Vec<PathBuf> = user.run_dirs(place).into_iter().map(|dir| dir.join("api.sock")).collect();
    if place.state.is_none() && !user.root {
        sockets.push(Path::new(SYSTEM_RUN).join("api.sock"));
    }
    let answers = |socket: &&PathBuf| UnixStream::connect(socket).is_ok();
    let found = sockets.iter().find(answers).or(sockets.first());
    found.cloned().unwrap_or_default()
}

const SYSTEM_RUN: &str = "/run/innkeeper";

/// What decides where somebody's own server is.
struct User {
    root: bool,
    runtime: Option<PathBuf>,
    state: Option<PathBuf>,
}

impl User {
    fn now() -> User {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
        let state = default_state_dir(&PlaceArgs::default()).ok();
        User { root: nix::unistd::geteuid().is_root(), runtime, state }
    }

    /// Where the run-time files of one's own server are or would be. A server takes the first; the second is where one is
    /// that was started without a session, such as by cron.
    fn run_dirs(&self, place: &PlaceArgs) -> Vec<PathBuf> {
        match &place.state {
            Some(state) => vec![state.join("run")],
            None if self.root => vec![SYSTEM_RUN.into()],
            None => {
                let in_session = self.runtime.as_ref().map(|dir| dir.join("innkeeper"));
                in_session.into_iter().chain(self.state.as_ref().map(|dir| dir.join("run"))).collect()
            }
        }
    }
}

/// Where the state is: --state, else the system's place for root or this user.
///
/// Errors: no home directory to put it in.
pub fn default_state_dir(place: &PlaceArgs) -> Outcome<PathBuf> {
    if let Some(state) = &place.state {
        return Ok(state.clone());
    }
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/innkeeper"));
    }
    let data = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let data = data.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/share")));
    data.map(|dir| dir.join("innkeeper"))
        .ok_or_else(|| Failure::Usage("there is no home directory; use --state DIR".into()))
}

/// One line on standard output.
fn say(text: impl fmt::Display) -> Outcome {
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// A value as indented JSON on standard output.
fn say_json(value: &impl serde::Serialize) -> Outcome {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::failed(error.to_string()))?;
    say(text)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_server_of_an_ordinary_user_is_in_places_of_that_user() {
        let here = PlaceArgs::default();
        let user = |runtime: Option<&str>| User {
            root: false,
            runtime: runtime.map(PathBuf::from),
            state: Some("/home/ada/.local/share/innkeeper".into()),
        };
        let in_state = PathBuf::from("/home/ada/.local/share/innkeeper/run");
        assert_eq!(user(None).run_dirs(&here).as_slice(), std::slice::from_ref(&in_state));
        assert_eq!(user(Some("/run/user/7")).run_dirs(&here), [PathBuf::from("/run/user/7/innkeeper"), in_state]);
        assert_eq!(User { root: true, ..user(Some("/run/user/0")) }.run_dirs(&here), [PathBuf::from(SYSTEM_RUN)]);
        let named = PlaceArgs { state: Some("/srv/inn".into()), ..PlaceArgs::default() };
        assert_eq!(user(Some("/run/user/7")).run_dirs(&named), [PathBuf::from("/srv/inn/run")]);
    }

    #[test]
    fn the_commands_that_scripts_rely_on_are_understood() {
        for line in [
            "serve --listen 0.0.0.0:8443 --state /tmp/s",
            "--state /tmp/s guest ls --json",
            "guest create web01 --cpus 2 --memory 512M --disk 4G --disk debian --cdrom x.iso --network bridge:br0 --state /tmp/s",
            "guest create k --kernel vmlinuz --initrd initrd --cmdline console=ttyS0 --network none",
            "guest create t --test-guest --cmdline quiet",
            "guest create f --firmware bios",
            "guest show web01 --json",
            "guest set web01 --cpus 4 --memory 1G",
            "guest set web01 --test-guest --cmdline flood",
            "guest start web01",
            "guest shutdown web01",
            "guest poweroff web01",
            "guest reset web01",
            "guest pause web01",
            "guest resume web01",
            "guest rm web01",
            "guest cd web01 debian.iso",
            "guest cd web01 --eject",
            "guest console web01 --dump",
            "guest screenshot web01 shot.png",
            "image add https://example.org/x.iso --sha256 00",
            "image add ./x.iso --name x",
            "image ls",
            "image rm x",
            "admin setup-link",
            "admin create-user anna --role administrator --password-stdin",
            "admin create-token anna",
            "admin remove-networks",
            "doctor --json",
            "engine",
        ] {
            let words = std::iter::once("innkeeper").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn what_is_typed_wrongly_is_refused_before_anything_happens() {
        for line in [
            "",
            "guest",
            "guest create",
            "guest create x --memory lots",
            "guest create x --cpus -1",
            "guest create x --initrd i",
            "guest create x --test-guest --kernel k",
            "guest set x --test-guest --firmware bios",
            "guest create x --firmware coreboot",
            "guest cd x",
            "guest cd x a.iso --eject",
            "--url https://h guest ls",
            "admin create-user x --role king",
        ] {
            let words = std::iter::once("innkeeper").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
