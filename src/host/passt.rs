//! User-mode networking: one `passt` for each guest, joined to its engine by a socket. Needs no privilege.

use std::{
    fs,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::Stdio,
};

use command_fds::{CommandFdExt, FdMapping};

use crate::{
    error::{Error, ErrorKind, Result},
    host::tool::PASST,
};

/// Where `passt` finds its end of the socket.
const SOCKET_FD: i32 = 3;

/// Starts a `passt` and returns the engine's end of its socket: a stream of frames, each behind a 32-bit big-endian length.
///
/// `run_as` is the user and group it becomes when started by root; without one it becomes `nobody` by itself. It goes into the background
/// once it works, so its complaints about the host are this call's error, and it is nobody's child: it ends when the engine's end closes,
/// whether or not a server runs then.
///
/// Errors: `Unavailable` when `passt` is missing, when the host has no default route (it takes the guest's address from there), or with
/// what `passt` says.
pub fn start(run_as: Option<u32>) -> Result<OwnedFd> {
    let mut command = PASST.command()?;
    if !has_default_route() {
        return Err(Error::new(
            ErrorKind::Unavailable,
            "User-mode networking needs a default route on this host, and there is none. Connect the host to a network, or give the guest \
             the network \"none\".",
        ));
    }
    let doing = "start user-mode networking";
    let (engine_end, passt_end) = UnixStream::pair().map_err(|error| PASST.failed(doing, error.to_string()))?;
    command.args(["--quiet", "--fd", &SOCKET_FD.to_string()]);
    if let Some(user) = run_as.filter(|_| nix::unistd::geteuid().is_root()) {
        command.args(["--runas", &format!("{user}:{user}")]);
    }
    command
        .fd_mappings(vec![FdMapping { parent_fd: passt_end.into(), child_fd: SOCKET_FD }])
        .map_err(|error| PASST.failed(doing, error.to_string()))?;
    command.stdout(Stdio::null());
    let output = command.output().map_err(|error| PASST.failed(doing, error.to_string()))?;
    if !output.status.success() {
        return Err(PASST.failed(doing, String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    Ok(engine_end.into())
}

/// Whether the host has a default route, of IPv4 or IPv6. What cannot be read counts as none.
pub fn has_default_route() -> bool {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    ipv4_default(&read("/proc/thread-self/net/route")) || ipv6_default(&read("/proc/thread-self/net/ipv6_route"))
}

/// `/proc/net/route`: interface, destination, gateway, flags, …, mask; default is destination 0 and mask 0, flag 1 says up.
fn ipv4_default(table: &str) -> bool {
    table.lines().skip(1).any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000")
    })
}

/// `/proc/net/ipv6_route`: destination, prefix length, …, interface; the kernel's own `unreachable default` is on `lo`.
fn ipv6_default(table: &str) -> bool {
    table.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let zero = fields.first().is_some_and(|destination| destination.bytes().all(|byte| byte == b'0'));
        zero && fields.get(1) == Some(&"00") && fields.last() != Some(&"lo")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_found_in_the_kernels_tables() {
        let head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        let lan = "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let default = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        assert!(!ipv4_default(""));
        assert!(!ipv4_default(&format!("{head}{lan}")));
        assert!(ipv4_default(&format!("{head}{lan}{default}")));
        let zero = "0".repeat(32);
        let unreachable = format!("{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo\n");
        let real = format!("{zero} 00 {zero} 00 fe80{} 00000400 00000001 00000000 00450003     eth0\n", "0".repeat(28));
        assert!(!ipv6_default(&unreachable));
        assert!(ipv6_default(&format!("{unreachable}{real}")));
    }
}
