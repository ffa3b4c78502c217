//! The Internet checksum (RFC 1071), as the card computes it for frames to send and verifies it in received ones.

const ETHERTYPE_AT: usize = 12;
pub(super) const ETHERNET_BYTES: usize = 14;
pub(super) const VLAN_BYTES: usize = 4;
const ETHERTYPE_IPV4: u16 = 0x0800;
const IPV4_BYTES: usize = 20;
const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_CHECKSUM_AT: usize = 16;
const UDP_CHECKSUM_AT: usize = 6;
/// More fragments, and the fragment's offset.
const FRAGMENT: u16 = 0x3fff;

/// The ones' complement sum of big-endian words; a last odd byte is the upper half of a word.
pub(super) fn sum(bytes: &[u8]) -> u16 {
    let mut words = bytes.chunks_exact(4);
    // Frames are so short that this never overflows.
    let mut sum: u64 =
        words.by_ref().map(|word| u64::from(u32::from_be_bytes(word.try_into().unwrap_or_default()))).sum();
    let mut last = [0; 4];
    for (into, from) in last.iter_mut().zip(words.remainder()) {
        *into = *from;
    }
    sum += u64::from(u32::from_be_bytes(last));
    fold(sum)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// The ones' complement sum of two sums.
pub(super) fn add(first: u16, second: u16) -> u16 {
    fold(u64::from(first) + u64::from(second))
}

pub(super) fn get_u16(frame: &[u8], at: usize) -> Option<u16> {
    frame.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

/// Nothing happens outside the frame.
pub(super) fn put_u16(frame: &mut [u8], at: usize, value: u16) {
    if let Some(bytes) = frame.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *bytes = value.to_be_bytes();
    }
}

/// Puts the checksum of `frame[start..end]` at `at`. What is there before counts: drivers leave the pseudo header's sum.
/// Nothing happens when a place is outside the frame.
pub(super) fn put(frame: &mut [u8], start: usize, end: usize, at: usize) {
    if at + 2 > frame.len() {
        return;
    }
    let Some(part) = frame.get(start..end).filter(|part| !part.is_empty()) else { return };
    let checksum = match !sum(part) {
        // For UDP zero means that there is no checksum (RFC 768); for the others both are right.
        0 => 0xffff,
        other => other,
    };
    put_u16(frame, at, checksum);
}

/// What verifying the checksums of a received frame gave; `None` for one that there is not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Verified {
    /// Of the IPv4 header.
    pub(super) ip_is_good: Option<bool>,
    /// Of TCP or UDP over IPv4, when the frame has the whole packet.
    pub(super) l4_is_good: Option<bool>,
}

/// Verifies a frame whose VLAN tag, if it has one, is 4 bytes behind the addresses (317453, 3.2.9).
pub(super) fn verify(frame: &[u8], is_tagged: bool) -> Verified {
    let tag = if is_tagged { VLAN_BYTES } else { 0 };
    match frame.get(ETHERNET_BYTES + tag..) {
        Some(packet) if get_u16(frame, ETHERTYPE_AT + tag) == Some(ETHERTYPE_IPV4) => verify_ipv4(packet),
        _ => Verified::default(),
    }
}

fn verify_ipv4(packet: &[u8]) -> Verified {
    let none = Verified::default();
    let Some(first) = packet.first().filter(|first| **first >> 4 == 4) else { return none };
    let header_bytes = usize::from(first & 15) * 4;
    let Some(header) = packet.get(..header_bytes).filter(|_| header_bytes >= IPV4_BYTES) else { return none };
    let ip_is_good = Some(sum(header) == 0xffff);
    let total = usize::from(get_u16(header, 2).unwrap_or(0));
    // Padding of the frame is not the packet's.
    let Some(segment) = packet.get(header_bytes..total) else { return Verified { ip_is_good, ..none } };
    let is_fragment = get_u16(header, 6).is_some_and(|word| word & FRAGMENT != 0);
    let checksum_at = match header.get(9) {
        Some(&TCP) => TCP_CHECKSUM_AT,
        Some(&UDP) => UDP_CHECKSUM_AT,
        _ => return Verified { ip_is_good, ..none },
    };
    let Some(checksum) = get_u16(segment, checksum_at) else { return Verified { ip_is_good, ..none } };
    let is_absent = checksum_at == UDP_CHECKSUM_AT && checksum == 0;
    if is_fragment || is_absent {
        return Verified { ip_is_good, ..none };
    }
    let protocol = header.get(9).copied().map_or(0, u16::from);
    let addresses = header.get(12..20).unwrap_or_default();
    let pseudo = add(sum(addresses), add(protocol, segment.len() as u16));
    Verified { ip_is_good, l4_is_good: Some(add(pseudo, sum(segment)) == 0xffff) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_rfc_1071() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2, "its example");
        assert_eq!(sum(&[]), 0);
        assert_eq!(sum(&[0xab]), 0xab00);
        assert_eq!(sum(&[0, 1, 0xab]), 0xab01);
        assert_eq!(sum(&[0xff; 65_536]), 0xffff);
        for length in 0..40 {
            let bytes: Vec<u8> = (0..length).map(|at: u8| at.wrapping_mul(37).wrapping_add(200)).collect();
            let plain = bytes.chunks(2).fold(0u32, |sum, pair| {
                let sum = sum + (u32::from(pair[0]) << 8) + pair.get(1).map_or(0, |low| u32::from(*low));
                (sum & 0xffff) + (sum >> 16)
            });
            assert_eq!(u32::from(sum(&bytes)), plain, "{length} bytes");
        }
    }

    #[test]
    fn places_outside_the_frame_are_left_alone() {
        let mut frame = [1; 20];
        for (start, end, at) in [(20, 20, 0), (21, 30, 0), (10, 5, 0), (0, 21, 0), (0, 20, 19), (0, 20, 65_535)] {
            put(&mut frame, start, end, at);
            assert_eq!(frame, [1; 20], "{start} {end} {at}");
        }
        put(&mut frame, 0, 20, 18);
        assert_eq!(sum(&frame), !sum(&[1, 1]), "the place's old content counted");
    }
}
