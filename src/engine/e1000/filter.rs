//! Which received frames the guest gets (317453, 3.2.1): by address, by VLAN, by length.

use super::{
    checksum::get_u16,
    registers::{
        ADDRESSES, MTA, RAH_AV, RAL, RCTL, RCTL_BAM, RCTL_LPE, RCTL_MPE, RCTL_UPE, RCTL_VFE, Registers, VET, VFTA,
    },
};

/// The longest frame without RCTL.LPE, with its check sequence; a VLAN tag is not counted.
const FRAME_BYTES_MAX: usize = 1518;
/// RAH: which address the entry is for; 0 is the destination.
const RAH_SELECT: u32 = 3 << 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// By its own address, or because every frame of its kind is wanted.
    Exact,
    /// By the hash of its address alone: the driver looks again.
    Imperfect,
    Unwanted,
    TooLong,
}

/// The tag's control information, when the frame's type is the VLAN type.
pub(super) fn vlan_tag(registers: &Registers, frame: &[u8]) -> Option<u16> {
    let is_tagged = get_u16(frame, 12).map(u32::from) == Some(registers.get(VET));
    if is_tagged { get_u16(frame, 14) } else { None }
}

/// `frame` has an Ethernet header at least; `fcs_bytes` is how much longer it is on the wire.
pub(super) fn judge(registers: &Registers, frame: &[u8], tag: Option<u16>, fcs_bytes: usize) -> Verdict {
    let Some(destination) = frame.first_chunk::<6>() else { return Verdict::Unwanted };
    let control = registers.get(RCTL);
    let verdict = by_address(registers, control, *destination);
    if verdict == Verdict::Unwanted {
        return verdict;
    }
    if let Some(tag) = tag
        && control & RCTL_VFE != 0
    {
        let vlan = u32::from(tag) & 0xfff;
        if registers.get(VFTA + 4 * (vlan >> 5)) >> (vlan & 31) & 1 == 0 {
            return Verdict::Unwanted;
        }
    }
    let longest = FRAME_BYTES_MAX + if tag.is_some() { 4 } else { 0 };
    if control & RCTL_LPE == 0 && frame.len() + fcs_bytes > longest {
        return Verdict::TooLong;
    }
    verdict
}

fn by_address(registers: &Registers, control: u32, destination: [u8; 6]) -> Verdict {
    let is_group = destination[0] & 1 != 0;
    let is_broadcast = destination == [0xff; 6];
    let by_kind = if is_group { control & RCTL_MPE != 0 } else { control & RCTL_UPE != 0 };
    if by_kind || (is_broadcast && control & RCTL_BAM != 0) || is_own(registers, destination) {
        return Verdict::Exact;
    }
    if is_group && is_in_hash(registers, control, destination) { Verdict::Imperfect } else { Verdict::Unwanted }
}

/// Receive addresses (13.5.2, 13.5.3).
fn is_own(registers: &Registers, destination: [u8; 6]) -> bool {
    let [a, b, c, d, e, f] = destination;
    let (low, high) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0]));
    (0..ADDRESSES).any(|number| {
        let at = RAL + 8 * number;
        let rah = registers.get(at + 4);
        rah & (RAH_AV | RAH_SELECT | 0xffff) == RAH_AV | high && registers.get(at) == low
    })
}

/// The multicast table (13.5.1): 12 bits of the address, from where RCTL.MO says, are the number of a bit.
fn is_in_hash(registers: &Registers, control: u32, destination: [u8; 6]) -> bool {
    let shift = match control >> 12 & 3 {
        0 => 4,
        1 => 3,
        2 => 2,
        _ => 0,
    };
    let bit = (u32::from(destination[5]) << 8 | u32::from(destination[4])) >> shift & 0xfff;
    registers.get(MTA + 4 * (bit >> 5)) >> (bit & 31) & 1 != 0
}
