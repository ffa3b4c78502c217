//! The `innkeeper` command: reads the command line, takes on the role it names, gives the exit code.

#![expect(
    unsafe_code,
    reason = "inherited descriptors are claimed and malloc is set up, once, before anything else runs"
)]

use std::{
    io,
    net::{SocketAddr, TcpListener, ToSocketAddrs},
    os::unix::net::UnixListener,
    process::ExitCode,
};

use clap::Parser;
use command_fds::inherited::{init_inherited_fds, take_fd_ownership};
use innkeeper::{
    cli::{self, Cli, Command, Failure, Outcome, PlaceArgs, ServeArgs, WebArgs},
    engine, host,
    hostd::{self, ServeConfig, spawn},
    web::role::{self, WebRole},
};

/// Threads share so many heaps; by default each thread that allocates gets one of its own, and keeps what it freed.
const HEAPS_MAX: i32 = 2;
/// What is larger comes from the kernel and goes back to it at once, such as the 19 MiB that checking a password takes.
const HEAP_BLOCK_BYTES_MAX: i32 = 4 << 20;

fn main() -> ExitCode {
    keep_heaps_small();
    let Cli { place, command } = Cli::parse();
    let outcome = match command {
        Command::Engine => return run_engine(),
        Command::Serve(args) => serve(&place, &args),
        Command::Web(args) => run_web(&args),
        Command::Doctor { json } => {
            cli::default_state_dir(&place).and_then(|state| cli::doctor::run(&host::doctor::doctor(&state), json))
        }
        Command::Guest(command) => cli::run_guest(&place, command),
        Command::Image(command) => cli::run_image(&place, command),
        Command::Admin(command) => cli::run_admin(&place, command),
    };
    cli::exit_code(outcome)
}

fn serve(place: &PlaceArgs, args: &ServeArgs) -> Outcome {
    start_log();
    let config = ServeConfig {
        state: cli::default_state_dir(place)?,
        run: cli::run_dir(place)?,
        listen: parse_address(&args.listen)?,
    };
    Ok(hostd::serve(&config)?)
}

fn parse_address(text: &str) -> Outcome<SocketAddr> {
    let bad = |why: &dyn std::fmt::Display| {
        Failure::Usage(format!("--listen {text}: {why}; an address and a port are needed, such as 127.0.0.1:8443"))
    };
    let mut found = text.to_socket_addrs().map_err(|error| bad(&error))?;
    found.next().ok_or_else(|| bad(&"no such address"))
}

/// The web role, with the descriptors that `hostd` put at fixed numbers.
fn run_web(args: &WebArgs) -> Outcome {
    start_log();
    claim_descriptors();
    let take =
        |number| take_fd_ownership(number).map_err(|error| Failure::failed(format!("descriptor {number}: {error}")));
    let role = WebRole {
        state_dir: args.state_dir.clone(),
        run_dir: args.run_dir.clone(),
        announce: args.announce,
        hostd: take(spawn::WEB_HOSTD_FD)?,
        listener: TcpListener::from(take(spawn::WEB_LISTENER_FD)?),
        api: UnixListener::from(take(spawn::WEB_API_FD)?),
    };
    Ok(role::run(role)?)
}

fn run_engine() -> ExitCode {
    claim_descriptors();
    ExitCode::from(u8::try_from(engine::role::run()).unwrap_or(u8::MAX))
}

/// Must come before anything opens a descriptor of its own.
fn claim_descriptors() {
    // SAFETY: called once, first thing in a role, while this process has one thread and owns no descriptor but those it
    // inherited; nothing else in the program closes or adopts raw numbers.
    if let Err(error) = unsafe { init_inherited_fds() } {
        eprintln!("innkeeper: cannot take the inherited descriptors: {error}");
    }
}

/// Servers and engines run for months: what they do not use belongs to the guests.
fn keep_heaps_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) only sets parameters, here before there is a second thread; a refusal leaves the default.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, HEAPS_MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES_MAX);
    }
}

fn start_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("INNKEEPER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let terminal = io::IsTerminal::is_terminal(&io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(terminal)
        .with_target(false)
        .init();
}
