//! The kernel's own virtio-net (vhost-net, linux/vhost.h): it serves a pair of queues from a queue of a tap, without us.
//!
//! The `vhost` crate opens `/dev/vhost-net` by its path, which the engine cannot; so these are the calls themselves.
#![expect(unsafe_code, reason = "vhost's ioctls have no safe wrapper that takes a descriptor")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_net::VIRTIO_NET_F_MRG_RXBUF,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use super::{event::Event, memory::GuestRam, virtio::Features};

/// What the kernel has to know of the accepted features: the shape of rings and headers.
const RING_FEATURES: Features = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Without these a header would not be as long, or not written as whole, as ours.
const NEEDED: Features = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Receive and transmit.
pub const RINGS: usize = 2;

/// An open `/dev/vhost-net`. Serves what it was prepared for from `start` to `stop`.
pub struct Vhost {
    fd: OwnedFd,
    /// It knows whose memory it works in.
    owned: bool,
    /// Each ring's used buffers are told here, and what is wrong with it.
    calls: [Event; RINGS],
    errors: Event,
}

/// A ring to serve. The addresses are of this process.
#[derive(Debug, Clone, Copy)]
pub struct Ring<'a> {
    pub size: u16,
    /// The next entry of the available ring.
    pub next: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub kick: &'a Event,
}

/// `struct vhost_vring_state`.
#[repr(C)]
struct RingState {
    index: u32,
    number: u32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct RingAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_vring_file`; -1 for none.
#[repr(C)]
struct RingFile {
    index: u32,
    fd: i32,
}

const GET_FEATURES: libc::Ioctl = read_code::<u64>(0x00);
const SET_FEATURES: libc::Ioctl = write_code::<u64>(0x00);
const SET_OWNER: libc::Ioctl = code(0, 0, 0x01);
/// Its size is that of the head; the regions follow.
const SET_MEM_TABLE: libc::Ioctl = write_code::<u64>(0x03);
const SET_RING_SIZE: libc::Ioctl = write_code::<RingState>(0x10);
const SET_RING_ADDRESSES: libc::Ioctl = write_code::<RingAddresses>(0x11);
const SET_RING_NEXT: libc::Ioctl = write_code::<RingState>(0x12);
const GET_RING_NEXT: libc::Ioctl = code(WRITE | READ, size_of::<RingState>(), 0x12);
const SET_RING_KICK: libc::Ioctl = write_code::<RingFile>(0x20);
const SET_RING_CALL: libc::Ioctl = write_code::<RingFile>(0x21);
const SET_RING_ERROR: libc::Ioctl = write_code::<RingFile>(0x22);
const SET_BACKEND: libc::Ioctl = write_code::<RingFile>(0x30);

const WRITE: u64 = 1;
const READ: u64 = 2;

/// `_IOC` of asm-generic/ioctl.h with vhost's type.
const fn code(direction: u64, bytes: usize, number: u64) -> libc::Ioctl {
    (direction << 30 | (bytes as u64) << 16 | 0xaf << 8 | number) as libc::Ioctl
}
const fn read_code<T>(number: u64) -> libc::Ioctl {
    code(READ, size_of::<T>(), number)
}
const fn write_code<T>(number: u64) -> libc::Ioctl {
    code(WRITE, size_of::<T>(), number)
}

impl Vhost {
    /// Whether a descriptor is one.
    pub fn is(fd: BorrowedFd<'_>) -> bool {
        get_features(fd).is_ok()
    }

    pub fn new(fd: OwnedFd) -> io::Result<Vhost> {
        Ok(Vhost { fd, owned: false, calls: [Event::new()?, Event::new()?], errors: Event::new()? })
    }

    /// Signalled when the driver is to be interrupted for a ring.
    pub fn calls(&self) -> &[Event; RINGS] {
        &self.calls
    }

    /// Signalled when a ring breaks the rules: it is served no more.
    pub fn errors(&self) -> &Event {
        &self.errors
    }

    /// Whether it can serve a driver that accepted these.
    pub fn can_serve(&self, accepted: Features) -> bool {
        let known = get_features(self.fd.as_fd()).unwrap_or(0);
        accepted & NEEDED == NEEDED && known & accepted & RING_FEATURES == accepted & RING_FEATURES
    }

    /// Takes over what both rings are. They, and `ram`, stay where they are until `stop`.
    ///
    /// Errors: what the kernel says; `start` must not be called then.
    pub fn prepare(&mut self, ram: &GuestRam, accepted: Features, rings: &[Ring<'_>; RINGS]) -> io::Result<()> {
        if !self.owned {
            // SAFETY: SET_OWNER takes no argument.
            checked(unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_OWNER) })?;
            self.owned = true;
        }
        // Of a driver before this one.
        self.errors.clear();
        self.set(SET_FEATURES, &(accepted & RING_FEATURES))?;
        self.set_memory(ram)?;
        for (index, (ring, call)) in rings.iter().zip(&self.calls).enumerate() {
            let index = index as u32;
            self.set(SET_RING_SIZE, &RingState { index, number: ring.size.into() })?;
            self.set(SET_RING_NEXT, &RingState { index, number: ring.next.into() })?;
            let Ring { descriptors, used, available, .. } = *ring;
            self.set(SET_RING_ADDRESSES, &RingAddresses { index, flags: 0, descriptors, used, available, log: 0 })?;
            let file = |event: &Event| RingFile { index, fd: event.as_fd().as_raw_fd() };
            self.set(SET_RING_CALL, &file(call))?;
            self.set(SET_RING_ERROR, &file(&self.errors))?;
            self.set(SET_RING_KICK, &file(ring.kick))?;
        }
        Ok(())
    }

    /// Serves both rings from `tap` until `stop`, which follows after an error too: one of them may be served then.
    pub fn start(&self, tap: BorrowedFd<'_>) -> io::Result<()> {
        for index in 0..RINGS as u32 {
            self.set(SET_BACKEND, &RingFile { index, fd: tap.as_raw_fd() })?;
        }
        Ok(())
    }

    /// Serves no more, and returns when it touches guest RAM no more: with the next entry of each available ring.
    pub fn stop(&self) -> io::Result<[u16; RINGS]> {
        let mut next = [0; RINGS];
        for index in 0..RINGS as u32 {
            self.set(SET_BACKEND, &RingFile { index, fd: -1 })?;
            self.set(SET_RING_KICK, &RingFile { index, fd: -1 })?;
        }
        for (index, next) in next.iter_mut().enumerate() {
            let mut state = RingState { index: index as u32, number: 0 };
            // SAFETY: GET_RING_NEXT reads and writes one `vhost_vring_state`, which `state` is.
            checked(unsafe { libc::ioctl(self.fd.as_raw_fd(), GET_RING_NEXT, &raw mut state) })?;
            *next = state.number as u16;
        }
        Ok(next)
    }

    /// `struct vhost_memory` and its regions: where guest RAM is in this process.
    fn set_memory(&self, ram: &GuestRam) -> io::Result<()> {
        let ranges = ram.ranges();
        let mut table = vec![ranges.len() as u64];
        table.extend(ranges.iter().flat_map(|range| [range.start.0, range.bytes, range.host_address, 0]));
        // SAFETY: SET_MEM_TABLE reads the number of regions, which is the table's first 32 bits, 32 bits of padding, and four
        // 64-bit numbers for each region; `table` has them and outlives the call.
        checked(unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_MEM_TABLE, table.as_ptr()) })
    }

    /// Calls that read one structure. `T` is the one that `code` was made with.
    fn set<T>(&self, code: libc::Ioctl, value: &T) -> io::Result<()> {
        assert_eq!(code >> 16 & 0x3fff, size_of::<T>() as libc::Ioctl, "the structure is not the call's");
        // SAFETY: the kernel reads as many bytes as `code` says, which are those of `value`, borrowed for this call.
        checked(unsafe { libc::ioctl(self.fd.as_raw_fd(), code, &raw const *value) })
    }
}

fn get_features(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut features = 0u64;
    // SAFETY: GET_FEATURES writes 64 bits, which `features` has. Another file refuses the call.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), GET_FEATURES, &raw mut features) }).map(|()| features)
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn the_calls_have_the_kernels_numbers() {
        let codes = [GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE, SET_RING_SIZE, SET_RING_ADDRESSES];
        assert_eq!(
            codes.map(|code| code as u32),
            [0x8008_af00, 0x4008_af00, 0xaf01, 0x4008_af03, 0x4008_af10, 0x4028_af11]
        );
        let codes = [SET_RING_NEXT, GET_RING_NEXT, SET_RING_KICK, SET_RING_CALL, SET_RING_ERROR, SET_BACKEND];
        assert_eq!(
            codes.map(|code| code as u32),
            [0x4008_af12, 0xc008_af12, 0x4008_af20, 0x4008_af21, 0x4008_af22, 0x4008_af30]
        );
    }

    #[test]
    fn another_file_is_none_and_serves_nothing() {
        let null = File::open("/dev/null").unwrap();
        assert!(!Vhost::is(null.as_fd()));
        let mut vhost = Vhost::new(null.into()).unwrap();
        assert!(!vhost.can_serve(NEEDED));
        let (ram, kick) = (GuestRam::new(1 << 20).unwrap(), Event::new().unwrap());
        let ring = Ring { size: 16, next: 0, descriptors: 0, available: 0, used: 0, kick: &kick };
        assert!(vhost.prepare(&ram, NEEDED, &[ring, ring]).is_err());
        assert!(vhost.start(kick.as_fd()).is_err());
        assert!(vhost.stop().is_err());
    }
}
