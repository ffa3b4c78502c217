//! What driver and device say on the queues (virtio 1.2, 5.7.6): little-endian structures behind one header.

use crate::engine::{memory::GuestRam, vga::edid::EDID_BYTES, virtio::queue::Chain, worker::Malformed};

/// Requests (virtio 1.2, 5.7.6.7).
pub(super) mod command {
    pub(in super::super) const GET_DISPLAY_INFO: u32 = 0x0100;
    pub(in super::super) const RESOURCE_CREATE_2D: u32 = 0x0101;
    pub(in super::super) const RESOURCE_UNREF: u32 = 0x0102;
    pub(in super::super) const SET_SCANOUT: u32 = 0x0103;
    pub(in super::super) const RESOURCE_FLUSH: u32 = 0x0104;
    pub(in super::super) const TRANSFER_TO_HOST_2D: u32 = 0x0105;
    pub(in super::super) const RESOURCE_ATTACH_BACKING: u32 = 0x0106;
    pub(in super::super) const RESOURCE_DETACH_BACKING: u32 = 0x0107;
    pub(in super::super) const GET_EDID: u32 = 0x010a;
    pub(in super::super) const UPDATE_CURSOR: u32 = 0x0300;
    pub(in super::super) const MOVE_CURSOR: u32 = 0x0301;
}

const OK_NODATA: u32 = 0x1100;
const OK_DISPLAY_INFO: u32 = 0x1101;
const OK_EDID: u32 = 0x1104;

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    Unspecified = 0x1200,
    OutOfMemory = 0x1201,
    Scanout = 0x1202,
    Resource = 0x1203,
    Parameter = 0x1205,
}

/// The driver wants to hear when the request is done, which its answer says.
const FLAG_FENCE: u32 = 1;

pub(super) const HEADER_BYTES: usize = 24;
/// The longest request but for the list of a backing.
const REQUEST_BYTES_MAX: usize = 56;
/// The modes of all scanouts that could be (5.7.6.8): rectangle, enabled, flags.
const MODES: usize = 16;
const MODE_BYTES: usize = 24;
/// Room for an EDID in its answer.
const EDID_ROOM_BYTES: usize = 1024;

/// Pixels of a resource or a screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rect {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
}

impl Rect {
    /// Whether it is not empty, and inside `width` by `height` pixels.
    pub(super) fn is_within(self, width: u32, height: u32) -> bool {
        let end = |at: u32, length: u32| u64::from(at) + u64::from(length);
        let some = self.width > 0 && self.height > 0;
        some && end(self.x, self.width) <= u64::from(width) && end(self.y, self.height) <= u64::from(height)
    }

    /// What both have in common. Both are within something of at most `SIDE_MAX` pixels.
    pub(super) fn and(self, other: Rect) -> Option<Rect> {
        let (x, y) = (self.x.max(other.x), self.y.max(other.y));
        let right = (self.x + self.width).min(other.x + other.width);
        let bottom = (self.y + self.height).min(other.y + other.height);
        (right > x && bottom > y).then_some(Rect { x, y, width: right - x, height: bottom - y })
    }
}

/// The beginning of a request, copied out of the guest's memory once.
pub(super) struct Request {
    bytes: [u8; REQUEST_BYTES_MAX],
    length: usize,
}

impl Request {
    /// Errors: the chain is not RAM, which the queue has ruled out.
    pub(super) fn read(chain: &Chain, ram: &GuestRam) -> Result<Request, Malformed> {
        let mut bytes = [0; REQUEST_BYTES_MAX];
        let length = chain.readable_bytes().min(REQUEST_BYTES_MAX as u64) as usize;
        chain.read(ram, 0, bytes.get_mut(..length).unwrap_or_default()).map_err(|_| Malformed)?;
        Ok(Request { bytes, length })
    }

    /// Errors: the driver's request ends before it.
    pub(super) fn u32(&self, at: usize) -> Result<u32, Refused> {
        let there = self.bytes.get(..self.length).unwrap_or_default();
        let bytes = there.get(at..).and_then(|rest| rest.first_chunk()).ok_or(Refused::Parameter)?;
        Ok(u32::from_le_bytes(*bytes))
    }

    pub(super) fn u64(&self, at: usize) -> Result<u64, Refused> {
        Ok(u64::from(self.u32(at)?) | u64::from(self.u32(at + 4)?) << 32)
    }

    /// The rectangle behind the header.
    pub(super) fn rect(&self) -> Result<Rect, Refused> {
        let [x, y, width, height] = [0, 4, 8, 12].map(|at| self.u32(HEADER_BYTES + at));
        Ok(Rect { x: x?, y: y?, width: width?, height: height? })
    }

    /// What it asks for. Errors: it has no whole header.
    pub(super) fn command(&self) -> Result<u32, Refused> {
        if self.length < HEADER_BYTES { Err(Refused::Unspecified) } else { self.u32(0) }
    }
}

/// What a request is answered with.
pub(super) enum Answer {
    Done,
    /// The size of the only screen.
    DisplayInfo {
        width: u32,
        height: u32,
    },
    /// None: the display has none for its size.
    Edid(Option<[u8; EDID_BYTES]>),
}

/// Fills `out` with the answer to `request`.
pub(super) fn put_answer(request: &Request, answer: Result<Answer, Refused>, out: &mut Vec<u8>) {
    let kind = match &answer {
        Ok(Answer::Done) => OK_NODATA,
        Ok(Answer::DisplayInfo { .. }) => OK_DISPLAY_INFO,
        Ok(Answer::Edid(_)) => OK_EDID,
        Err(refused) => *refused as u32,
    };
    out.clear();
    out.extend(kind.to_le_bytes());
    out.resize(HEADER_BYTES, 0);
    // A fence goes back with its number and its context (5.7.6.7).
    if request.u32(4).is_ok_and(|flags| flags & FLAG_FENCE != 0)
        && let (Some(into), Some(from)) = (out.get_mut(4..20), request.bytes.get(4..20))
    {
        into.copy_from_slice(from);
        into[..4].copy_from_slice(&FLAG_FENCE.to_le_bytes());
    }
    match answer {
        Ok(Answer::Done) | Err(_) => {}
        Ok(Answer::DisplayInfo { width, height }) => {
            [0, 0, width, height, 1, 0].iter().for_each(|number| out.extend(number.to_le_bytes()));
            out.resize(HEADER_BYTES + MODES * MODE_BYTES, 0);
        }
        Ok(Answer::Edid(edid)) => {
            let edid = edid.as_ref().map(|edid| edid.as_slice()).unwrap_or_default();
            [edid.len() as u32, 0].iter().for_each(|number| out.extend(number.to_le_bytes()));
            out.extend(edid);
            out.resize(HEADER_BYTES + 8 + EDID_ROOM_BYTES, 0);
        }
    }
}

/// How the four bytes of a pixel are meant (virtio 1.2, 5.7.6.8, `virtio_gpu_formats`). Names are in the order of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    B8G8R8A8 = 1,
    B8G8R8X8 = 2,
    A8R8G8B8 = 3,
    X8R8G8B8 = 4,
    R8G8B8A8 = 67,
    X8B8G8R8 = 68,
    A8B8G8R8 = 121,
    R8G8B8X8 = 134,
}

impl Format {
    pub(super) fn from_number(number: u32) -> Option<Format> {
        let all = [
            Format::B8G8R8A8,
            Format::B8G8R8X8,
            Format::A8R8G8B8,
            Format::X8R8G8B8,
            Format::R8G8B8A8,
            Format::X8B8G8R8,
            Format::A8B8G8R8,
            Format::R8G8B8X8,
        ];
        all.into_iter().find(|format| *format as u32 == number)
    }

    /// A pixel as 0xAARRGGBB; opaque in a format without alpha.
    pub(super) fn argb(self, bytes: [u8; 4]) -> u32 {
        let (red, green, blue, alpha) = match (self, bytes) {
            (Format::B8G8R8A8, [b, g, r, a]) => (r, g, b, a),
            (Format::B8G8R8X8, [b, g, r, _]) => (r, g, b, 255),
            (Format::A8R8G8B8, [a, r, g, b]) => (r, g, b, a),
            (Format::X8R8G8B8, [_, r, g, b]) => (r, g, b, 255),
            (Format::R8G8B8A8, [r, g, b, a]) => (r, g, b, a),
            (Format::X8B8G8R8, [_, b, g, r]) => (r, g, b, 255),
            (Format::A8B8G8R8, [a, b, g, r]) => (r, g, b, a),
            (Format::R8G8B8X8, [r, g, b, _]) => (r, g, b, 255),
        };
        u32::from_be_bytes([alpha, red, green, blue])
    }
}
