//! A TPM 2.0 for a guest: one `swtpm` each, joined to its engine by sockets. Needs no privilege.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Stdio},
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};

use crate::{error::Result, host::tool::SWTPM, wire};

/// Where `swtpm` finds its end of the control channel, the folder of its state, and its log.
const CONTROL_FD: i32 = 3;
const FOLDER_FD: i32 = 4;
const LOG_FD: i32 = 5;
/// Of its control channel (swtpm_ioctls(3)): ask what it can do, and hand over the socket of TPM commands.
const GET_CAPABILITY: u32 = 1;
const SET_DATAFD: u32 = 16;
/// The longest of the answers.
const ANSWER_LEN_MAX: usize = 64;
/// It answers within milliseconds, or is broken.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The engine's ends of a `swtpm`, and the process to reap.
pub struct Tpm {
    /// Takes orders about the TPM itself: power on, save, restore.
    pub control: OwnedFd,
    /// Takes TPM commands. The process ends when this closes, whether or not a server runs then.
    pub commands: OwnedFd,
    pub child: Child,
}

/// Starts a `swtpm`.
///
/// `run_as` is the user and group it becomes when started by root, who must own `folder`; that goes there by descriptor, so that nobody can
/// put another in its place. It complains to `log`.
///
/// Errors: `Unavailable` when `swtpm` is missing, or does not come up.
pub fn start(folder: OwnedFd, run_as: Option<u32>, log: File) -> Result<Tpm> {
    let failed = |error: io::Error| SWTPM.failed("start a TPM", error.to_string());
    let mut command = SWTPM.command()?;
    let (mut control, its_control) = UnixStream::pair().map_err(failed)?;
    let (commands, its_commands) = UnixStream::pair().map_err(failed)?;
    command.args(["socket", "--tpm2", "--terminate"]);
    command.args(["--tpmstate", &format!("dir=/proc/self/fd/{FOLDER_FD}")]);
    command.args(["--ctrl", &format!("type=unixio,clientfd={CONTROL_FD}"), "--log", &format!("fd={LOG_FD}")]);
    if let Some(user) = run_as.filter(|_| nix::unistd::geteuid().is_root()) {
        // With a user, std also empties the list of supplementary groups.
        command.uid(user).gid(user);
    }
    command.stdout(Stdio::null()).stderr(log.try_clone().map_err(failed)?);
    let mappings = vec![
        FdMapping { parent_fd: its_control.into(), child_fd: CONTROL_FD },
        FdMapping { parent_fd: folder, child_fd: FOLDER_FD },
        FdMapping { parent_fd: log.into(), child_fd: LOG_FD },
    ];
    command.fd_mappings(mappings).map_err(|error| failed(io::Error::other(error)))?;
    let mut child = command.spawn().map_err(failed)?;
    // Our copies of what it was handed: a process that ends at once is seen.
    drop(command);
    let greeted = control
        .set_read_timeout(Some(ANSWER_TIMEOUT))
        .and_then(|()| ask(&mut control, GET_CAPABILITY, &[]))
        .and_then(|()| ask(&mut control, SET_DATAFD, &[its_commands.as_fd()]))
        .and_then(|()| control.set_read_timeout(None));
    if let Err(error) = greeted {
        let _ = child.kill();
        let _ = child.wait();
        return Err(failed(io::Error::other(format!("{error} (its messages are in the guest's log)"))));
    }
    Ok(Tpm { control: control.into(), commands: commands.into(), child })
}

/// An order without fields, and its answer: a result, 0 for good, and what else there is.
fn ask(control: &mut UnixStream, order: u32, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    wire::send_bytes(&*control, &order.to_be_bytes(), descriptors)?;
    let mut answer = [0; ANSWER_LEN_MAX];
    let length = control.read(&mut answer)?;
    match answer.get(..length).unwrap_or_default().first_chunk() {
        Some(result) if u32::from_be_bytes(*result) == 0 => Ok(()),
        Some(result) => Err(io::Error::other(format!("it refuses order {order}: {}", u32::from_be_bytes(*result)))),
        None => Err(io::Error::other("it ended at once")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_comes_up_and_ends_with_its_sockets() {
        if SWTPM.find().is_none() {
            return println!("skipped: the package swtpm is not installed");
        }
        let folder = tempfile::tempdir().unwrap();
        let log = tempfile::tempfile().unwrap();
        let mut tpm = start(File::open(folder.path()).unwrap().into(), None, log).unwrap();
        assert!(tpm.child.try_wait().unwrap().is_none());
        drop((tpm.control, tpm.commands));
        assert!(tpm.child.wait().unwrap().code().is_some(), "it ends by itself");
    }
}
