//! A packet on its way out: offloads of the transmit path (317453, 3.5): checksums, TCP segmentation, VLAN tags.
//!
//! Segmentation is done here for every backend. A tap could take a whole packet behind a virtio-net header instead; that would
//! be a second path with limits of its own, for frames that a bridge must cut up again for most of their receivers.

use super::{
    super::saved::BadState,
    checksum::{self, ETHERNET_BYTES, VLAN_BYTES},
    saved::{ContextV1, OffloadsV1, OutgoingV1, check},
};

/// The longest frame that the card sends, without its check sequence.
const FRAME_BYTES_MAX: usize = 16 << 10;
/// The longest packet that a driver may hand over: 64 KiB to be segmented, behind the longest header that can be told.
const PACKET_BYTES_MAX: usize = (64 << 10) + 255;
const FRAME_BYTES_MIN: usize = 60;
/// Where a VLAN tag goes: behind the two addresses.
const TAG_AT: usize = 12;

const IPV6_BYTES: usize = 40;
const TCP_FLAGS_AT: usize = 13;
/// Only the last segment has these.
const TCP_FIN_PSH: u8 = 0x09;

/// A context descriptor (3.3.6): where the headers are. Every number is the driver's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) ip_start: usize,
    pub(super) ip_checksum_at: usize,
    /// The last byte that counts.
    pub(super) ip_end: usize,
    pub(super) l4_start: usize,
    pub(super) l4_checksum_at: usize,
    /// The last byte that counts; 0 for the packet's last.
    pub(super) l4_end: usize,
    pub(super) header_bytes: usize,
    pub(super) mss_bytes: usize,
    pub(super) is_tcp: bool,
    /// IPv4; IPv6 otherwise.
    pub(super) is_ipv4: bool,
}

/// What the card does with a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Offloads {
    pub(super) context: Option<Context>,
    pub(super) ip_checksum: bool,
    pub(super) l4_checksum: bool,
    pub(super) segment: bool,
    /// Of a legacy descriptor (3.3.3): where the sum starts and where it goes.
    pub(super) legacy_checksum: Option<(usize, usize)>,
    /// The tag's control information.
    pub(super) vlan: Option<u16>,
}

/// How a frame is finished: from registers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Finish {
    pub(super) vlan_ethertype: u16,
    pub(super) pad: bool,
}

impl Context {
    /// The fields of a descriptor have no more bits.
    pub(super) fn save(&self) -> ContextV1 {
        let Context {
            ip_start,
            ip_checksum_at,
            ip_end,
            l4_start,
            l4_checksum_at,
            l4_end,
            header_bytes,
            mss_bytes,
            is_tcp,
            is_ipv4,
        } = *self;
        ContextV1 {
            ip_start: ip_start as u8,
            ip_checksum_at: ip_checksum_at as u8,
            ip_end: ip_end as u16,
            l4_start: l4_start as u8,
            l4_checksum_at: l4_checksum_at as u8,
            l4_end: l4_end as u16,
            header_bytes: header_bytes as u8,
            mss_bytes: mss_bytes as u16,
            is_tcp,
            is_ipv4,
        }
    }

    /// A driver may have given any.
    pub(super) fn restore(saved: ContextV1) -> Context {
        Context {
            ip_start: saved.ip_start.into(),
            ip_checksum_at: saved.ip_checksum_at.into(),
            ip_end: saved.ip_end.into(),
            l4_start: saved.l4_start.into(),
            l4_checksum_at: saved.l4_checksum_at.into(),
            l4_end: saved.l4_end.into(),
            header_bytes: saved.header_bytes.into(),
            mss_bytes: saved.mss_bytes.into(),
            is_tcp: saved.is_tcp,
            is_ipv4: saved.is_ipv4,
        }
    }
}

impl Offloads {
    fn save(&self) -> OffloadsV1 {
        let Offloads { context, ip_checksum, l4_checksum, segment, legacy_checksum, vlan } = *self;
        OffloadsV1 {
            context: context.map(|context| context.save()),
            ip_checksum,
            l4_checksum,
            segment,
            legacy_checksum: legacy_checksum.map(|(start, at)| (start as u8, at as u8)),
            vlan,
        }
    }

    fn restore(saved: OffloadsV1) -> Offloads {
        let OffloadsV1 { context, ip_checksum, l4_checksum, segment, legacy_checksum, vlan } = saved;
        Offloads {
            context: context.map(Context::restore),
            ip_checksum,
            l4_checksum,
            segment,
            legacy_checksum: legacy_checksum.map(|(start, at)| (start.into(), at.into())),
            vlan,
        }
    }
}

/// A packet that is gathered from descriptors, and then becomes frames, one at a time.
#[derive(Default)]
pub(super) struct Outgoing {
    packet: Vec<u8>,
    is_too_long: bool,
    pub(super) offloads: Offloads,
    /// Payload that is in frames already; the whole packet unless it is segmented.
    taken: usize,
    segments: u16,
    frame: Vec<u8>,
}

impl Outgoing {
    /// Room for all that may come, so that nothing is allocated for a packet.
    pub(super) fn new() -> Outgoing {
        Outgoing {
            packet: Vec::with_capacity(PACKET_BYTES_MAX),
            frame: Vec::with_capacity(PACKET_BYTES_MAX + VLAN_BYTES),
            ..Outgoing::default()
        }
    }

    pub(super) fn save(&self) -> OutgoingV1 {
        let Outgoing { packet, is_too_long, offloads, taken, segments, frame } = self;
        OutgoingV1 {
            packet: packet.clone(),
            is_too_long: *is_too_long,
            offloads: offloads.save(),
            taken: *taken as u32, // at most PACKET_BYTES_MAX
            segments: *segments,
            frame: frame.clone(),
        }
    }

    /// `is_whole`: its last descriptor was taken, and its frames are on their way.
    pub(super) fn restore(&mut self, saved: OutgoingV1, is_whole: bool) -> Result<(), BadState> {
        let OutgoingV1 { packet, is_too_long, offloads, taken, segments, frame } = saved;
        let taken = taken as usize;
        check(packet.len() <= PACKET_BYTES_MAX && taken <= packet.len(), "a packet that is too long")?;
        check(frame.len() <= FRAME_BYTES_MAX + VLAN_BYTES, "a frame that is too long")?;
        check(!is_too_long || packet.is_empty(), "data of a packet that is not sent")?;
        let is_on_its_way = taken > 0 || segments > 0 || !frame.is_empty();
        check(is_whole || !is_on_its_way, "frames of a packet that is not whole")?;
        self.clear();
        self.packet.extend(packet);
        self.frame.extend(frame);
        (self.is_too_long, self.offloads) = (is_too_long, Offloads::restore(offloads));
        (self.taken, self.segments) = (taken, segments);
        // It was looked at when it became whole, and is not looked at again.
        check(!is_whole || self.packet.is_empty() || self.is_well_formed(), "a packet that makes no frames")
    }

    /// Ready for the next packet.
    pub(super) fn clear(&mut self) {
        self.packet.clear();
        self.frame.clear();
        (self.is_too_long, self.offloads, self.taken, self.segments) = (false, Offloads::default(), 0, 0);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.packet.is_empty() && !self.is_too_long
    }

    /// Room for `bytes` more. `None` when the packet is, or becomes, longer than any may be; it will not be sent.
    pub(super) fn extend(&mut self, bytes: usize) -> Option<&mut [u8]> {
        let before = self.packet.len();
        if self.is_too_long || before + bytes > PACKET_BYTES_MAX {
            self.spoil();
            return None;
        }
        self.packet.resize(before + bytes, 0);
        self.packet.get_mut(before..)
    }

    /// The packet will not be sent.
    pub(super) fn spoil(&mut self) {
        self.is_too_long = true;
        self.packet.clear();
    }

    /// Whether the packet can be segmented as its context says.
    pub(super) fn is_well_formed(&self) -> bool {
        match self.offloads {
            Offloads { segment: true, context: Some(context), .. } => {
                let frame = context.header_bytes + context.mss_bytes.min(self.packet.len());
                context.mss_bytes > 0
                    && context.header_bytes >= ETHERNET_BYTES
                    && context.header_bytes < self.packet.len()
                    && frame <= FRAME_BYTES_MAX
            }
            Offloads { segment: true, context: None, .. } => false,
            Offloads { segment: false, .. } => (ETHERNET_BYTES..=FRAME_BYTES_MAX).contains(&self.packet.len()),
        }
    }

    /// The frame under way; empty when there is none.
    pub(super) fn frame(&self) -> &[u8] {
        &self.frame
    }

    /// The frame was sent.
    pub(super) fn frame_done(&mut self) {
        self.frame.clear();
    }

    /// Makes the next frame of a packet that is well formed; false when it has no more.
    pub(super) fn next_frame(&mut self, finish: Finish) -> bool {
        if self.taken >= self.packet.len() {
            return false;
        }
        match self.offloads {
            Offloads { segment: true, context: Some(context), .. } => self.next_segment(&context),
            Offloads { .. } => {
                self.frame.extend_from_slice(&self.packet);
                self.taken = self.packet.len();
            }
        }
        self.put_checksums();
        if let Some(tag) = self.offloads.vlan {
            let [high, low] = finish.vlan_ethertype.to_be_bytes();
            let [tag_high, tag_low] = tag.to_be_bytes();
            self.frame.splice(TAG_AT..TAG_AT, [high, low, tag_high, tag_low]);
        }
        if finish.pad && self.frame.len() < FRAME_BYTES_MIN {
            self.frame.resize(FRAME_BYTES_MIN, 0);
        }
        true
    }

    /// The header once more, changed for the next piece of the payload, and that piece (3.5.4).
    fn next_segment(&mut self, context: &Context) {
        let start = context.header_bytes + self.taken;
        let end = self.packet.len().min(start + context.mss_bytes);
        let is_last = end == self.packet.len();
        let (header, payload) = (self.packet.get(..context.header_bytes), self.packet.get(start..end));
        self.frame.extend_from_slice(header.unwrap_or_default());
        self.frame.extend_from_slice(payload.unwrap_or_default());

        let (frame, ip, l4) = (self.frame.as_mut_slice(), context.ip_start, context.l4_start);
        let ip_bytes = frame.len().saturating_sub(ip);
        let l4_bytes = frame.len().saturating_sub(l4) as u16;
        if context.is_ipv4 {
            checksum::put_u16(frame, ip + 2, ip_bytes as u16);
            let id = checksum::get_u16(frame, ip + 4).unwrap_or(0);
            checksum::put_u16(frame, ip + 4, id.wrapping_add(self.segments));
        } else {
            checksum::put_u16(frame, ip + 4, ip_bytes.saturating_sub(IPV6_BYTES) as u16);
        }
        if context.is_tcp {
            if let Some(sequence) = frame.get_mut(l4 + 4..).and_then(|rest| rest.first_chunk_mut()) {
                *sequence = u32::from_be_bytes(*sequence).wrapping_add(self.taken as u32).to_be_bytes();
            }
            if let Some(flags) = frame.get_mut(l4 + TCP_FLAGS_AT).filter(|_| !is_last) {
                *flags &= !TCP_FIN_PSH;
            }
        } else {
            checksum::put_u16(frame, l4 + 4, l4_bytes);
        }
        if self.offloads.l4_checksum {
            // The driver's pseudo header has no length, since each segment has its own.
            let pseudo = checksum::get_u16(frame, context.l4_checksum_at).unwrap_or(0);
            checksum::put_u16(frame, context.l4_checksum_at, checksum::add(pseudo, l4_bytes));
        }
        self.segments = self.segments.wrapping_add(1);
        self.taken = if is_last { self.packet.len() } else { end - context.header_bytes };
    }

    fn put_checksums(&mut self) {
        let frame = self.frame.as_mut_slice();
        let length = frame.len();
        let end = |last: usize| if last == 0 { length } else { length.min(last + 1) };
        if let Some((start, at)) = self.offloads.legacy_checksum {
            checksum::put(frame, start, length, at);
        }
        let Some(context) = self.offloads.context else { return };
        if self.offloads.ip_checksum {
            checksum::put(frame, context.ip_start, end(context.ip_end), context.ip_checksum_at);
        }
        if self.offloads.l4_checksum {
            checksum::put(frame, context.l4_start, end(context.l4_end), context.l4_checksum_at);
        }
    }
}
