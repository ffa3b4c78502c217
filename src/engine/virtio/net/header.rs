//! `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6), which goes before each frame: checked on its way out, and in.
//!
//! ```text
//! 0 flags   1 type of segmentation   2 header bytes   4 segment bytes   6 checksum start   8 checksum offset   10 buffers
//! ```

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

use crate::engine::{
    net_backend::{HEADER_BYTES, Header},
    tap,
    virtio::Features,
};

pub(super) const NEEDS_CSUM: u8 = 1;
pub(super) const DATA_VALID: u8 = 2;

pub(super) const NONE: u8 = 0;
pub(super) const TCPV4: u8 = 1;
pub(super) const TCPV6: u8 = 4;
pub(super) const UDP_L4: u8 = 5;
/// Beside one of the TCP types: the first segment's congestion bit is its own.
pub(super) const ECN: u8 = 0x80;

const HEADER_AT: usize = 2;
const SEGMENT_AT: usize = 4;
const START_AT: usize = 6;
const OFFSET_AT: usize = 8;
const BUFFERS_AT: usize = 10;

const ETHERNET_BYTES: usize = 14;
const TCP_BYTES: usize = 20;
const UDP_BYTES: usize = 8;

/// What the driver takes on the way in, and may switch off again (`VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET`).
pub(super) const GUEST_OFFLOADS: Features = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

fn has(features: Features, feature: u32) -> bool {
    features & 1 << feature != 0
}

/// What the tap is told of the driver's offloads; the kernel refuses some of them without others.
pub(super) fn tap_offloads(offloads: Features) -> u32 {
    if !has(offloads, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut found = tap::CSUM;
    for (feature, flag) in [(VIRTIO_NET_F_GUEST_TSO4, tap::TSO4), (VIRTIO_NET_F_GUEST_TSO6, tap::TSO6)] {
        if has(offloads, feature) {
            found |= flag;
        }
    }
    if found & (tap::TSO4 | tap::TSO6) != 0 && has(offloads, VIRTIO_NET_F_GUEST_ECN) {
        found |= tap::TSO_ECN;
    }
    if has(offloads, VIRTIO_NET_F_GUEST_USO4) && has(offloads, VIRTIO_NET_F_GUEST_USO6) {
        found |= tap::USO;
    }
    found
}

/// The header for the kernel, of a frame that the guest sends: made anew of what was checked (5.1.6.2.2). `None` when the
/// frame must not be sent: its offload was not negotiated, or points outside the frame.
pub(super) fn for_host(header: &Header, frame_bytes: usize, features: Features) -> Option<Header> {
    let number = |at: usize| get(header, at);
    let [flags, kind, ..] = *header;
    let mut out = [0; HEADER_BYTES];
    let (start, offset) = (number(START_AT), number(OFFSET_AT));
    // A flag that was not negotiated is one that the device does not know: ignored.
    let needs_checksum = flags & NEEDS_CSUM != 0 && has(features, VIRTIO_NET_F_CSUM);
    if needs_checksum {
        if start < ETHERNET_BYTES || start + offset + 2 > frame_bytes {
            return None;
        }
        out[0] = NEEDS_CSUM;
        put(&mut out, START_AT, start);
        put(&mut out, OFFSET_AT, offset);
    }
    if kind == NONE {
        return Some(out);
    }
    let (feature, l4_bytes) = match kind & !ECN {
        TCPV4 => (VIRTIO_NET_F_HOST_TSO4, TCP_BYTES),
        TCPV6 => (VIRTIO_NET_F_HOST_TSO6, TCP_BYTES),
        UDP_L4 if kind & ECN == 0 => (VIRTIO_NET_F_HOST_USO, UDP_BYTES),
        _ => return None,
    };
    let negotiated = has(features, feature) && (kind & ECN == 0 || has(features, VIRTIO_NET_F_HOST_ECN));
    let (headers_end, header_bytes, segment_bytes) = (start + l4_bytes, number(HEADER_AT), number(SEGMENT_AT));
    let inside = headers_end <= frame_bytes && header_bytes <= frame_bytes;
    if !negotiated || !needs_checksum || !inside || segment_bytes == 0 {
        return None;
    }
    out[1] = kind;
    // Only a hint (5.1.6.2); some drivers say less than there is.
    put(&mut out, HEADER_AT, header_bytes.max(headers_end));
    put(&mut out, SEGMENT_AT, segment_bytes);
    Some(out)
}

/// The header for the guest, of a frame that comes in. `None` when the guest does not take it: it waited in the tap since
/// another driver took more than this one does.
pub(super) fn for_guest(header: &Header, offloads: Features) -> Option<Header> {
    let mut out = *header;
    let takes_checksums = has(offloads, VIRTIO_NET_F_GUEST_CSUM);
    let [flags, kind, ..] = out;
    if flags & NEEDS_CSUM != 0 && !takes_checksums {
        return None;
    }
    let taken = match kind & !ECN {
        NONE => kind == NONE,
        TCPV4 => has(offloads, VIRTIO_NET_F_GUEST_TSO4),
        TCPV6 => has(offloads, VIRTIO_NET_F_GUEST_TSO6),
        UDP_L4 => has(offloads, VIRTIO_NET_F_GUEST_USO4) && has(offloads, VIRTIO_NET_F_GUEST_USO6),
        _ => false,
    };
    if !taken || (kind & ECN != 0 && !has(offloads, VIRTIO_NET_F_GUEST_ECN)) {
        return None;
    }
    // Without the feature there are no flags (5.1.6.4.1).
    out[0] = if takes_checksums { flags & (NEEDS_CSUM | DATA_VALID) } else { 0 };
    Some(out)
}

/// How many buffers the frame fills (5.1.6.4).
pub(super) fn set_buffers(header: &mut Header, count: usize) {
    put(header, BUFFERS_AT, count);
}

fn get(header: &Header, at: usize) -> usize {
    let bytes = header.get(at..).and_then(|rest| rest.first_chunk::<2>());
    usize::from(bytes.map_or(0, |bytes| u16::from_le_bytes(*bytes)))
}

fn put(header: &mut Header, at: usize, number: usize) {
    if let Some(bytes) = header.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<2>()) {
        *bytes = u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Features = u64::MAX;

    fn header(flags: u8, kind: u8, numbers: [u16; 4]) -> Header {
        let mut header = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0xee, 0xee];
        for (index, number) in numbers.into_iter().enumerate() {
            header[2 + 2 * index..4 + 2 * index].copy_from_slice(&number.to_le_bytes());
        }
        header
    }

    fn made(flags: u8, kind: u8, numbers: [u16; 4]) -> Option<Header> {
        let mut header = header(flags, kind, numbers);
        header[10..].fill(0);
        Some(header)
    }

    #[test]
    fn headers_of_the_guest_are_made_anew_of_what_was_checked() {
        let sent = |header: Header, bytes| for_host(&header, bytes, ALL);
        // A frame without offloads: whatever else is in the header does not go on.
        assert_eq!(sent(header(0xfe, 0, [9; 4]), 60), Some([0; HEADER_BYTES]));
        assert_eq!(sent(header(1, 0, [9, 9, 34, 16]), 60), made(1, 0, [0, 0, 34, 16]));
        for (start, offset) in [(34, 24), (14, 44), (58, 0)] {
            assert!(sent(header(1, 0, [0, 0, start, offset]), 60).is_some(), "{start} {offset}");
        }
        for (start, offset) in
            [(34, 25), (13, 0), (0, 0), (59, 0), (60, 0), (0xffff, 0), (34, 0xffff), (0xffff, 0xffff)]
        {
            assert_eq!(sent(header(1, 0, [0, 0, start, offset]), 60), None, "{start} {offset}");
        }
        assert_eq!(sent(header(1, TCPV4, [54, 1448, 34, 16]), 9000), made(1, TCPV4, [54, 1448, 34, 16]));
        assert_eq!(sent(header(1, TCPV6 | ECN, [0, 1, 54, 16]), 9000), made(1, TCPV6 | ECN, [74, 1, 54, 16]), "a hint");
        assert_eq!(sent(header(1, UDP_L4, [42, 1400, 34, 6]), 42), made(1, UDP_L4, [42, 1400, 34, 6]));
        let good = [54, 1448, 34, 16];
        for (what, bad, bytes) in [
            ("no checksum", header(0, TCPV4, good), 9000),
            ("no segments", header(1, TCPV4, [54, 0, 34, 16]), 9000),
            ("headers behind the end", header(1, TCPV4, [9001, 1448, 34, 16]), 9000),
            ("TCP behind the end", header(1, TCPV4, good), 53),
            ("fragments", header(1, 3, good), 9000),
            ("not a type", header(1, 2, good), 9000),
            ("not a type", header(1, 0x7f, good), 9000),
            ("all ones", [0xff; HEADER_BYTES], 60),
            ("congestion of nothing", header(1, ECN, good), 9000),
            ("congestion of UDP", header(1, UDP_L4 | ECN, [42, 1400, 34, 6]), 9000),
        ] {
            assert_eq!(sent(bad, bytes), None, "{what}");
        }
    }

    #[test]
    fn every_offload_of_the_guest_needs_its_feature() {
        let checksum = header(1, 0, [0, 0, 34, 16]);
        assert_eq!(for_host(&checksum, 60, ALL & !(1 << VIRTIO_NET_F_CSUM)), Some([0; HEADER_BYTES]));
        for (feature, kind) in [
            (VIRTIO_NET_F_HOST_TSO4, TCPV4),
            (VIRTIO_NET_F_HOST_TSO6, TCPV6),
            (VIRTIO_NET_F_HOST_ECN, TCPV4 | ECN),
            (VIRTIO_NET_F_HOST_USO, UDP_L4),
            (VIRTIO_NET_F_CSUM, TCPV4),
        ] {
            let header = header(1, kind, [0, 1448, 34, 16]);
            assert!(for_host(&header, 9000, ALL).is_some());
            assert_eq!(for_host(&header, 9000, ALL & !(1 << feature)), None, "{feature}");
        }
    }

    #[test]
    fn frames_that_the_driver_does_not_take_are_left_out() {
        for (flags, kind, feature) in [
            (NEEDS_CSUM, 0, VIRTIO_NET_F_GUEST_CSUM),
            (NEEDS_CSUM, TCPV4, VIRTIO_NET_F_GUEST_TSO4),
            (NEEDS_CSUM, TCPV6, VIRTIO_NET_F_GUEST_TSO6),
            (NEEDS_CSUM, TCPV6 | ECN, VIRTIO_NET_F_GUEST_ECN),
            (NEEDS_CSUM, UDP_L4, VIRTIO_NET_F_GUEST_USO4),
            (NEEDS_CSUM, UDP_L4, VIRTIO_NET_F_GUEST_USO6),
        ] {
            let header = header(flags, kind, [54, 1448, 34, 16]);
            assert_eq!(for_guest(&header, GUEST_OFFLOADS), Some(header));
            assert_eq!(for_guest(&header, GUEST_OFFLOADS & !(1 << feature)), None, "{feature}");
        }
        let valid = header(DATA_VALID | 0xf0, 0, [0; 4]);
        assert_eq!(for_guest(&valid, GUEST_OFFLOADS).unwrap()[0], DATA_VALID);
        assert_eq!(for_guest(&valid, 0).unwrap()[0], 0, "no flags without the feature");
        assert_eq!(for_guest(&header(0, ECN, [0; 4]), GUEST_OFFLOADS), None);
        assert_eq!(for_guest(&header(0, 3, [0; 4]), GUEST_OFFLOADS), None);
    }

    #[test]
    fn the_tap_is_told_what_it_takes_together() {
        let told = |features: &[u32]| tap_offloads(features.iter().fold(0, |bits, feature| bits | 1 << feature));
        assert_eq!(told(&[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6]), 0, "no checksums, nothing");
        assert_eq!(told(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_USO4]), tap::CSUM);
        let tso = [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN];
        assert_eq!(told(&tso), tap::CSUM | tap::TSO6 | tap::TSO_ECN);
        assert_eq!(tap_offloads(GUEST_OFFLOADS), tap::CSUM | tap::TSO4 | tap::TSO6 | tap::TSO_ECN | tap::USO);
    }
}
