//! The raw system calls of `host/` that no crate wraps: tap ioctls, KVM's version, the kernel's clock, signals of children.
#![expect(
    unsafe_code,
    reason = "ioctls of /dev/net/tun and /dev/kvm, and adjtimex, have no safe wrapper in our crates"
)]

use std::{
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use nix::sys::signal::SigSet;

/// `KVM_GET_API_VERSION` (linux/kvm.h): `_IO(KVMIO, 0x00)`.
const KVM_GET_API_VERSION: libc::Ioctl = 0xae00;

/// What the descriptor becomes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TapKind {
    /// A tap that can have several descriptors, each a queue.
    pub(crate) several_queues: bool,
    /// The tap must not be there yet. Otherwise it may be, and this becomes one more of its queues.
    pub(crate) new: bool,
}

/// Makes the open `/dev/net/tun` a tap called `name`: whole Ethernet frames, each behind a virtio-net header, no packet information.
///
/// Errors: `InvalidInput` for a name that does not fit; `EBUSY` when the tap is in use; `EPERM` without CAP_NET_ADMIN.
pub(crate) fn make_tap(tun: BorrowedFd<'_>, name: &str, kind: TapKind) -> io::Result<()> {
    // SAFETY: `ifreq` is plain old data, for which all zero bytes are a value.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    // The last byte stays 0: the kernel wants the name terminated.
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if kind.several_queues {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    if kind.new {
        flags |= libc::IFF_TUN_EXCL;
    }
    // IFF_TUN_EXCL is the sign bit of the kernel's `short`.
    request.ifr_ifru.ifru_flags = (flags as u16).cast_signed();
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is and which outlives the call.
    checked(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) })?;
    Ok(())
}

/// Sets the length of the header before each frame, and which offloads the reader takes (`TUN_F_*`; 0 for none).
pub(crate) fn set_tap_header(tap: BorrowedFd<'_>, header_bytes: i32, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one `int`, which outlives the call.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ as libc::Ioctl, &raw const header_bytes) })?;
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    checked(unsafe {
        libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD as libc::Ioctl, libc::c_ulong::from(offloads))
    })?;
    Ok(())
}

/// The version of the KVM interface that the open `/dev/kvm` speaks; 12 since Linux 2.6.22.
pub(crate) fn kvm_api_version(kvm: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: KVM_GET_API_VERSION takes no argument; another device's file answers with an error.
    checked(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0) })
}

/// Whether the kernel's clock is kept in step by something (adjtimex(2), STA_UNSYNC). Reads only, so it needs no privilege.
pub(crate) fn clock_is_synchronised() -> io::Result<bool> {
    // SAFETY: `timex` is plain old data, for which all zero bytes are a value; `modes` 0 asks to read.
    let mut timex: libc::timex = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: adjtimex reads and writes one `timex`, which outlives the call.
    checked(unsafe { libc::adjtimex(&raw mut timex) })?;
    Ok(timex.status & libc::STA_UNSYNC == 0)
}

/// Lets the child begin with no signal blocked. A child inherits its parent's mask, and `hostd` blocks what it takes from a signalfd: a
/// dnsmasq started with that mask would never see SIGTERM.
pub(crate) fn unblock_signals(command: &mut Command) -> &mut Command {
    let unblock = || SigSet::empty().thread_set_mask().map_err(io::Error::from);
    // SAFETY: between fork and exec the closure makes one system call, allocates nothing and takes no lock.
    unsafe { command.pre_exec(unblock) }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    const NEW: TapKind = TapKind { several_queues: false, new: true };

    #[test]
    fn another_file_is_neither_tap_nor_kvm() {
        let null = File::open("/dev/null").unwrap();
        assert!(make_tap(null.as_fd(), "ik-test", NEW).is_err());
        assert!(set_tap_header(null.as_fd(), 12, 0).is_err());
        assert!(kvm_api_version(null.as_fd()).is_err());
    }

    #[test]
    fn names_at_the_edge_of_what_the_kernel_takes() {
        let null = File::open("/dev/null").unwrap();
        for bad in ["", "sixteen-letters-"] {
            assert_eq!(make_tap(null.as_fd(), bad, NEW).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{bad}");
        }
        // Fifteen fit: what refuses then is the file, not the name.
        assert_ne!(make_tap(null.as_fd(), "fifteen-letters", NEW).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_child_begins_with_no_signal_blocked() {
        let blocked = |command: &mut Command| {
            let output = command.args(["SigBlk", "/proc/self/status"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().trim().trim_start_matches("SigBlk:").trim().to_owned()
        };
        let mut term = SigSet::empty();
        term.add(nix::sys::signal::Signal::SIGTERM);
        term.thread_block().unwrap();
        assert_eq!(blocked(&mut Command::new("grep")), "0000000000004000");
        assert_eq!(blocked(unblock_signals(&mut Command::new("grep"))), "0000000000000000");
    }

    #[test]
    fn the_clock_can_be_asked() {
        assert!(clock_is_synchronised().is_ok());
    }
}
