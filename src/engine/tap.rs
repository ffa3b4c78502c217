//! What a tap's descriptor takes orders for without privilege: offloads, the filter of what the guest receives, which queues are
//! in use. Frames themselves pass in `net_backend.rs`.
#![expect(unsafe_code, reason = "ioctls of a tap have no safe wrapper in our crates")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use crate::types::MacAddr;

/// What the guest takes behind a virtio-net header (linux/if_tun.h, `TUN_F_*`). Without `CSUM` the kernel takes none of the others.
pub const CSUM: u32 = 0x01;
pub const TSO4: u32 = 0x02;
pub const TSO6: u32 = 0x04;
/// With one of the two before only.
pub const TSO_ECN: u32 = 0x08;
/// Both, for IPv4 and IPv6, since Linux 6.2.
pub const USO: u32 = 0x20 | 0x40;

/// `TUN_FLT_ALLMULTI`: every multicast frame passes.
const FILTER_ALL_MULTICAST: u16 = 1;
/// So many addresses are compared; of those behind them, which have to be multicast ones, a hash.
pub const FILTER_EXACT: usize = 8;

/// Says what the kernel may leave to the guest: checksums and cutting into segments. Of the whole tap, not of one queue.
pub fn set_offloads(tap: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD as libc::Ioctl, libc::c_ulong::from(offloads)) })
}

/// Lets only frames to `addresses` come in, and with `all_multicast` all multicast ones. No addresses: everything comes in.
/// Of the whole tap, and only on the way to the guest.
pub fn set_filter(tap: BorrowedFd<'_>, all_multicast: bool, addresses: &[MacAddr]) -> io::Result<()> {
    let count = u16::try_from(addresses.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = if all_multicast { FILTER_ALL_MULTICAST } else { 0 };
    // `struct tun_filter`: two 16-bit numbers and the addresses.
    let mut filter = [flags.to_ne_bytes(), count.to_ne_bytes()].concat();
    filter.extend(addresses.iter().flat_map(|address| address.0));
    // SAFETY: TUNSETTXFILTER reads two numbers and as many addresses as the second says; `filter` has them and outlives the call.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETTXFILTER as libc::Ioctl, filter.as_ptr()) })
}

/// Whether the kernel hands frames to this queue of a tap with several. An error when it is so already.
pub fn set_queue_used(tap: BorrowedFd<'_>, used: bool) -> io::Result<()> {
    // SAFETY: `ifreq` is plain old data, for which all zero bytes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flags = if used { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: TUNSETQUEUE reads one `ifreq`, which `request` is and which outlives the call.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE as libc::Ioctl, &raw const request) })
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::{
        os::fd::OwnedFd,
        process::{Command, Stdio},
        thread,
    };

    use nix::sched::{CloneFlags, unshare};

    /// Runs a test on a thread with a network of its own: a tap of the kernel's called "ik-test", which is up, has the address
    /// 10.9.8.1/24 and no IPv6. Without root it is skipped.
    pub(crate) fn with_a_tap(queues: usize, test: impl FnOnce(Vec<OwnedFd>) + Send) {
        let inside = || {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
                return println!("skipped: no network namespace ({error})");
            }
            let tap = match crate::host::tap::open("ik-test", queues) {
                Ok(tap) => tap,
                Err(error) => return println!("skipped: {error}"),
            };
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/ik-test/disable_ipv6", "1");
            ip("address add 10.9.8.1/24 dev ik-test");
            ip("link set ik-test up");
            test(tap.queues);
        };
        thread::scope(|scope| scope.spawn(inside).join().unwrap());
    }

    /// As many `/dev/vhost-net`, or none.
    pub(crate) fn vhosts(count: usize) -> Vec<OwnedFd> {
        crate::host::tap::open_vhost(count)
    }

    pub(crate) fn ip(arguments: &str) {
        let done = Command::new("/sbin/ip").args(arguments.split(' ')).stdout(Stdio::null()).status();
        assert!(done.is_ok_and(|status| status.success()), "ip {arguments}");
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn what_is_no_tap_refuses() {
        let null = File::open("/dev/null").unwrap();
        assert!(set_offloads(null.as_fd(), CSUM).is_err());
        assert!(set_filter(null.as_fd(), true, &[MacAddr([2, 0, 0, 0, 0, 1])]).is_err());
        assert!(set_queue_used(null.as_fd(), false).is_err());
        let many = vec![MacAddr([2, 0, 0, 0, 0, 1]); 65_536];
        assert_eq!(set_filter(null.as_fd(), false, &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
