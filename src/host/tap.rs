//! A tap: the host's end of a guest's network card, there as long as the engine holds its descriptor.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use crate::{
    error::{Error, ErrorKind, Result},
    host::sys,
    types::Id,
};

/// Bytes of `struct virtio_net_hdr_v1` before each frame (virtio 1.2, 5.1.6): with `num_buffers`, which modern devices always have.
pub const HEADER_BYTES: i32 = 12;

/// A tap and the name by which the host's tools know it.
#[derive(Debug)]
pub struct Tap {
    /// One a queue; at least one. Non-blocking. Whole frames, each behind a virtio-net header of `HEADER_BYTES`.
    pub queues: Vec<OwnedFd>,
    pub name: String,
}

/// The name of a guest's tap: 11 characters of the 15 that Linux has.
pub fn name_of(guest: &Id) -> String {
    format!("ik-{guest}")
}

/// Makes a tap with so many queues, for a guest that sends and receives with several vCPUs at once. It is not persistent: the kernel
/// removes it, and takes it off its bridge, when the last descriptor closes.
///
/// No offloads are taken: frames come whole and with checksums, until the engine says what its guest takes. Needs CAP_NET_ADMIN.
///
/// Errors: `Conflict` when a tap of this name is in use (the guest's engine still runs); `Unavailable` without `/dev/net/tun` or privilege.
pub fn open(name: &str, queues: usize) -> Result<Tap> {
    let mut tap = Tap { queues: Vec::new(), name: name.to_owned() };
    for number in 0..queues.max(1) {
        let kind = sys::TapKind { several_queues: queues > 1, new: number == 0 };
        tap.queues.push(open_queue(name, kind)?);
    }
    Ok(tap)
}

/// The kernel's own virtio-net, once for each queue of a tap. None where the host has not that, or does not let us.
pub fn open_vhost(queues: usize) -> Vec<OwnedFd> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_CLOEXEC);
    let opened = (0..queues).map(|_| options.open("/dev/vhost-net").map(OwnedFd::from));
    opened.collect::<io::Result<_>>().unwrap_or_default()
}

fn open_queue(name: &str, kind: sys::TapKind) -> Result<OwnedFd> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    let tun = options.open("/dev/net/tun").map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => "Run Innkeeper as root, or give the guest the network \"user\".",
            _ => "Load the kernel module: modprobe tun",
        };
        Error::new(ErrorKind::Unavailable, format!("Cannot open /dev/net/tun ({error}). {remedy}")).because(error)
    })?;
    let made = sys::make_tap(tun.as_fd(), name, kind).and_then(|()| sys::set_tap_header(tun.as_fd(), HEADER_BYTES, 0));
    made.map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => {
            Error::conflict(format!("The tap \"{name}\" is in use: an engine of this guest still runs."))
        }
        Some(libc::EPERM) => Error::new(
            ErrorKind::Unavailable,
            "Making a tap needs root (CAP_NET_ADMIN). Run Innkeeper as root, or give the guest the network \"user\".",
        ),
        _ => Error::new(ErrorKind::Unavailable, format!("Cannot make the tap \"{name}\" ({error}).")),
    })?;
    Ok(tun.into())
}
