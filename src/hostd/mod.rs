//! `hostd`: the small, single-threaded supervisor. As root it is the only privileged part: it holds the port, opens files and
//! devices, starts the web role and the engines, and makes networks. It answers a closed set of requests and nothing else.
//!
//! The web role dies: it is started again. We die: the web role ends with our socket; engines run on and are found again.

mod cgroup;
pub mod engines;
pub mod files;
pub mod requests;
pub mod spawn;

use std::{
    fs::{self, File},
    io::{self, Write},
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{OpenOptionsExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};

use self::{engines::Engines, files::StateFiles};
use crate::{
    error::{Error, ErrorKind, Result},
    host::net::Networks,
    state_files::{Owner, prepare_own, prepare_state},
    types::Id,
    wire::{self, EngineEnd, HostCall, HostMessage, HostRefusal},
};

/// How long the web role may take to end.
const WEB_END: Duration = Duration::from_millis(1500);
/// How long the web role of a server that died may take to notice and end.
const OLD_WEB_END: Duration = Duration::from_secs(5);
/// A web role that ends so soon after its start will do so again.
const WEB_TOO_SOON: Duration = Duration::from_secs(2);
const WEB_FAILURES_MAX: u32 = 5;

/// What `innkeeper serve` was told.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    pub state: PathBuf,
    pub run: PathBuf,
    pub listen: SocketAddr,
}

/// Serves until SIGTERM or SIGINT. Engines run on.
///
/// Errors: `Conflict` when another process serves this state, and who; what is missing otherwise.
pub fn serve(config: &ServeConfig) -> Result<()> {
    // Root gives the web role to the service user; anybody else runs everything as themselves.
    let web_user = nix::unistd::geteuid().is_root().then(Owner::service);
    prepare_state(&config.state).map_err(|error| unusable(&config.state, error))?;
    prepare_own(&config.run).map_err(|error| unusable(&config.run, error))?;
    let mut lock = lock(&config.state)?;
    let listener = TcpListener::bind(config.listen).map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::AddrInUse => " Another program has it: end that, or choose another with --listen.",
            _ => "",
        };
        Error::new(ErrorKind::Unavailable, format!("Cannot listen on {}: {error}.{remedy}", config.listen))
            .because(error)
    })?;
    let address = listener.local_addr().map_or(config.listen, |address| address);
    let internal = |error: io::Error| Error::internal(format!("Cannot start: {error}."), error);
    lock.set_len(0).and_then(|()| writeln!(lock, "{} {address}", std::process::id())).map_err(internal)?;
    let api = bind_api(&config.run, web_user).map_err(internal)?;
    let networks = Networks::new(&config.state, &config.run);
    let files = StateFiles::new(&config.state);
    let (engines, gone) = Engines::adopt(&config.run, files.clone(), networks.clone(), web_user).map_err(internal)?;
    let mut hostd = Hostd {
        config: config.clone(),
        web_user,
        lock,
        listener,
        api,
        files,
        engines,
        networks,
        web: None,
        unheard: gone,
        failures: 0,
        announced: false,
    };
    hostd.run().map_err(internal)
}

struct Hostd {
    config: ServeConfig,
    web_user: Option<Owner>,
    lock: File,
    listener: TcpListener,
    api: UnixListener,
    files: StateFiles,
    engines: Engines,
    networks: Networks,
    web: Option<Web>,
    /// Ends of engines that no web role has heard of yet.
    unheard: Vec<(Id, EngineEnd)>,
    failures: u32,
    /// A web role that is started again says nothing, and leaves the set-up link as it is.
    announced: bool,
}

struct Web {
    child: Child,
    socket: OwnedFd,
    started: Instant,
}

/// What woke the loop.
enum Woken {
    Signal,
    Web,
    Engine(Id),
}

impl Hostd {
    fn run(&mut self) -> io::Result<()> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
            set.add(signal);
        }
        set.thread_block()?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        self.start_web()?;
        self.first_network();
        loop {
            for woken in self.wait(&signals)? {
                match woken {
                    Woken::Signal => {
                        while let Ok(Some(signal)) = signals.read_signal() {
                            if signal.ssi_signo != Signal::SIGCHLD as u32 {
                                self.end_web();
                                return Ok(());
                            }
                            self.engines.reap();
                        }
                    }
                    Woken::Web => self.serve_web(),
                    Woken::Engine(guest) => {
                        let end = self.engines.ended(&guest);
                        tracing::info!(%guest, reason = end.reason, "an engine ended");
                        self.unheard.push((guest, end));
                    }
                }
            }
            self.check_web()?;
            self.tell();
        }
    }

    fn wait(&self, signals: &SignalFd) -> io::Result<Vec<Woken>> {
        let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
        let mut meanings = vec![Woken::Signal];
        if let Some(web) = &self.web {
            fds.push(PollFd::new(&web.socket, PollFlags::IN));
            meanings.push(Woken::Web);
        }
        for (guest, watch) in self.engines.watches() {
            fds.push(PollFd::from_borrowed_fd(watch, PollFlags::IN));
            meanings.push(Woken::Engine(guest.clone()));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        Ok(meanings.into_iter().zip(ready).filter_map(|(meaning, ready)| ready.then_some(meaning)).collect())
    }

    fn start_web(&mut self) -> io::Result<()> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        let child = spawn::web(spawn::Web {
            state: &self.config.state,
            run: &self.config.run,
            hostd: theirs,
            listener: self.listener.as_fd().try_clone_to_owned()?,
            api: self.api.as_fd().try_clone_to_owned()?,
            lock: self.lock.as_fd().try_clone_to_owned()?,
            run_as: self.web_user,
            announce: !self.announced,
        })?;
        self.announced = true;
        self.web = Some(Web { child, socket: ours, started: Instant::now() });
        // Ends that nobody heard of come before the answer to the first question.
        self.tell();
        Ok(())
    }

    /// Starts the web role again when it has ended; gives up on one that cannot start.
    fn check_web(&mut self) -> io::Result<()> {
        let Some(web) = &mut self.web else { return Ok(()) };
        let Some(status) = web.child.try_wait()? else { return Ok(()) };
        let soon = web.started.elapsed() < WEB_TOO_SOON;
        self.web = None;
        self.failures = if soon { self.failures + 1 } else { 0 };
        if soon && (status.code().is_some_and(|code| code != 0) || self.failures >= WEB_FAILURES_MAX) {
            return Err(io::Error::other(format!("the web role cannot run ({status})")));
        }
        tracing::warn!(%status, "the web role ended; it is started again");
        self.start_web()
    }

    /// Answers what the web role asks.
    fn serve_web(&mut self) {
        loop {
            let Some(web) = &self.web else { return };
            let call = match wire::receive::<HostCall>(&web.socket) {
                Ok(Some((call, _))) => call,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It is ending, and may have to say why before it is gone.
                Ok(None) => {
                    if let Some(web) = &mut self.web {
                        wait_or_kill(&mut web.child);
                    }
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "the web role sent what is no request");
                    return self.drop_web();
                }
            };
            let (result, descriptors) = requests::answer(self, call.request);
            let message = HostMessage::Answer { seq: call.seq, result };
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            if !self.send(&message, &borrowed) {
                let message = "The answer is too long to be sent.".to_owned();
                let refusal = HostRefusal { kind: ErrorKind::Internal, message };
                self.send(&HostMessage::Answer { seq: call.seq, result: Err(refusal) }, &[]);
            }
        }
    }

    fn tell(&mut self) {
        if self.web.is_none() {
            return;
        }
        for (guest, end) in std::mem::take(&mut self.unheard) {
            self.send(&HostMessage::EngineGone { guest, end }, &[]);
        }
    }

    /// False for a message that is too long; nothing was sent then. A web role that does not listen is ended.
    fn send(&mut self, message: &HostMessage, descriptors: &[std::os::fd::BorrowedFd<'_>]) -> bool {
        let Some(web) = &self.web else { return true };
        match wire::send(&web.socket, message, descriptors) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                tracing::error!(%error, "a message is too long for the web role");
                return false;
            }
            Err(error) => {
                tracing::warn!(%error, "the web role does not listen");
                self.drop_web();
            }
        }
        true
    }

    /// Ends a web role that is of no more use; `check_web` starts another.
    fn drop_web(&mut self) {
        if let Some(web) = &mut self.web {
            let _ = web.child.kill();
            let _ = web.child.wait();
        }
    }

    fn end_web(&mut self) {
        let Some(mut web) = self.web.take() else { return };
        let pid = i32::try_from(web.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        wait_or_kill(&mut web.child);
    }

    /// With privilege a NAT network is there from the first start on. A host without the tools says so on its page.
    fn first_network(&self) {
        if self.web_user.is_some()
            && let Err(error) = self.networks.ensure_nat()
        {
            tracing::warn!("{}", error.for_log());
        }
    }
}

/// Waits until a process that is ending has ended; kills one that takes too long.
fn wait_or_kill(child: &mut Child) {
    let deadline = Instant::now() + WEB_END;
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        // SIGCHLD is blocked and pending; a short poll on nothing is the wait.
        let _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 5_000_000 }));
    }
    let _ = child.kill();
    let _ = child.wait();
}

fn unusable(folder: &Path, error: io::Error) -> Error {
    Error::new(ErrorKind::Unavailable, format!("Cannot use the folder {}: {error}.", folder.display())).because(error)
}

/// One server for one state. The lock is ours and our web role's, and ends with both, however they end: after our death
/// the next server waits for the old web role, which still has the port and the database.
fn lock(state: &Path) -> Result<File> {
    let path = state.join("serve.lock");
    // The web role may add files to the folder: a link in this one's place would lead root to where that role may not write.
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
    // Opened before made: some systems let nobody open another's file in such a folder with the wish to make it.
    let file = options.open(&path).or_else(|_| options.create(true).truncate(false).open(&path));
    let file = file.map_err(|error| {
        Error::new(ErrorKind::Unavailable, format!("Cannot open {}: {error}.", path.display())).because(error)
    })?;
    let deadline = Instant::now() + OLD_WEB_END;
    while file.try_lock().is_err() {
        let holder = fs::read_to_string(&path).unwrap_or_default();
        let (pid, address) = holder.trim().split_once(' ').unwrap_or(("unknown", "an unknown address"));
        if pid.parse().ok().and_then(engines::started).is_some() {
            return Err(Error::conflict(format!(
                "Another Innkeeper serves {} already: process {pid}, listening on {address}.",
                state.display()
            )));
        }
        if Instant::now() > deadline {
            return Err(Error::conflict(format!(
                "The Innkeeper that served {} has ended (process {pid}), but its \"innkeeper web\" still runs. End that, and start again.",
                state.display()
            )));
        }
        let _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 }));
    }
    Ok(file)
}

/// The socket of the command line; whoever may connect is checked again by the web role.
fn bind_api(run: &Path, owner: Option<Owner>) -> io::Result<UnixListener> {
    let path = run.join("api.sock");
    let _ = fs::remove_file(&path);
    let api = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o660))?;
    if let Some(owner) = owner {
        std::os::unix::fs::chown(&path, Some(owner.user), Some(owner.group))?;
    }
    Ok(api)
}
