//! Starting the other roles: this same binary again, with descriptors at fixed numbers. Never a fork without an exec.

use std::{
    fs::File,
    io::{self, Seek, Write},
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{engine::role::START_FD, host::sys::unblock_signals, state_files::Owner, wire::EngineStart};

/// The running binary, also after its file was replaced by an upgrade.
const SELF: &str = "/proc/self/exe";
/// Descriptors of the web role.
pub const WEB_HOSTD_FD: i32 = 3;
pub const WEB_LISTENER_FD: i32 = 4;
pub const WEB_API_FD: i32 = 5;
/// Only kept open, for the lock on the state.
const WEB_LOCK_FD: i32 = 6;

/// Starts an engine. `output` takes what it prints; nothing of ours but the listed descriptors reaches it.
pub fn engine(start: &EngineStart, fds: Vec<OwnedFd>, output: File) -> io::Result<Child> {
    let mut message = File::from(memfd_create("engine-start", MemfdFlags::CLOEXEC)?);
    message.write_all(&serde_json::to_vec(start)?)?;
    message.rewind()?;
    let mut mappings = vec![FdMapping { parent_fd: message.into(), child_fd: START_FD }];
    for (fd, number) in fds.into_iter().zip(START_FD + 1..) {
        mappings.push(FdMapping { parent_fd: fd, child_fd: number });
    }
    let mut command = Command::new(SELF);
    command.arg0("innkeeper").arg("engine").env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    command.fd_mappings(mappings).map_err(io::Error::other)?;
    unblock_signals(&mut command).spawn()
}

/// What the web role is given.
pub struct Web<'a> {
    pub state: &'a Path,
    pub run: &'a Path,
    pub hostd: OwnedFd,
    pub listener: OwnedFd,
    pub api: OwnedFd,
    /// The file with the lock on the state.
    pub lock: OwnedFd,
    /// User and group to become.
    pub run_as: Option<Owner>,
    /// Tell people where the server is and how to get in.
    pub announce: bool,
}

/// Starts the web role; its log goes where ours goes.
pub fn web(web: Web<'_>) -> io::Result<Child> {
    let mappings = vec![
        FdMapping { parent_fd: web.hostd, child_fd: WEB_HOSTD_FD },
        FdMapping { parent_fd: web.listener, child_fd: WEB_LISTENER_FD },
        FdMapping { parent_fd: web.api, child_fd: WEB_API_FD },
        FdMapping { parent_fd: web.lock, child_fd: WEB_LOCK_FD },
    ];
    let mut command = Command::new(SELF);
    command.arg0("innkeeper").arg("web").arg("--state-dir").arg(web.state).arg("--run-dir").arg(web.run);
    command.stdin(Stdio::null());
    if web.announce {
        command.arg("--announce");
    }
    if let Some(owner) = web.run_as {
        // With a user, std also empties the list of supplementary groups.
        command.uid(owner.user).gid(owner.group);
    }
    command.fd_mappings(mappings).map_err(io::Error::other)?;
    unblock_signals(&mut command).spawn()
}
