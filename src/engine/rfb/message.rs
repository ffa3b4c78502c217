//! What viewers say (RFC 6143, 7.5, and the extensions of the RFB community specification). Every length has a limit.

use std::io::{self, Read};

use super::{encodings::Encoding, pixel::PixelFormat};

/// One message. Rectangles are as sent; the sender of updates cuts them.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    PixelFormat(PixelFormat),
    Encodings(Abilities),
    Update {
        incremental: bool,
        area: Area,
    },
    Key {
        keysym: u32,
        down: bool,
    },
    /// An XT code, with 0x80 for the 0xE0 prefix.
    ExtendedKey {
        keysym: u32,
        keycode: u32,
        down: bool,
    },
    Pointer {
        buttons: u8,
        x: u16,
        y: u16,
    },
    SetDesktopSize {
        width: u16,
        height: u16,
    },
    Fence {
        flags: u32,
        payload: Vec<u8>,
    },
    ContinuousUpdates {
        on: bool,
    },
    /// The viewer's clipboard, which nobody takes.
    CutText,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) x: u16,
    pub(super) y: u16,
    pub(super) width: u16,
    pub(super) height: u16,
}

/// What a viewer understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Abilities {
    pub(super) encoding: Encoding,
    pub(super) desktop_size: bool,
    pub(super) extended_desktop_size: bool,
    pub(super) desktop_name: bool,
    pub(super) extended_key: bool,
    pub(super) fence: bool,
    pub(super) continuous_updates: bool,
}

impl Abilities {
    pub(super) const NONE: Abilities = Abilities {
        encoding: Encoding::Raw,
        desktop_size: false,
        extended_desktop_size: false,
        desktop_name: false,
        extended_key: false,
        fence: false,
        continuous_updates: false,
    };
}

pub(super) const DESKTOP_SIZE: i32 = -223;
pub(super) const EXTENDED_KEY: i32 = -258;
pub(super) const DESKTOP_NAME: i32 = -307;
pub(super) const EXTENDED_DESKTOP_SIZE: i32 = -308;
const FENCE: i32 = -312;
const CONTINUOUS_UPDATES: i32 = -313;

/// A longer clipboard or list of encodings ends the viewer.
const CUT_TEXT_BYTES_MAX: u64 = 256 << 10;
const ENCODINGS_MAX: u16 = 1024;
/// The longest payload of a fence, by its specification.
const FENCE_BYTES_MAX: usize = 64;

/// Reads one message.
///
/// Errors: the stream ended or failed; `InvalidData` for what no viewer may say.
pub(super) fn read(from: &mut impl Read) -> io::Result<Message> {
    let [kind] = bytes(from)?;
    match kind {
        0 => {
            let [_, _, _, format @ ..] = bytes::<19>(from)?;
            PixelFormat::parse(format)
                .map(Message::PixelFormat)
                .ok_or_else(|| wrong("a pixel format that is not served"))
        }
        2 => read_encodings(from).map(Message::Encodings),
        3 => {
            let [incremental, area @ ..] = bytes::<9>(from)?;
            let [x, y, width, height] = shorts(area);
            Ok(Message::Update { incremental: incremental != 0, area: Area { x, y, width, height } })
        }
        4 => {
            let [down, _, _, a, b, c, d] = bytes(from)?;
            Ok(Message::Key { keysym: u32::from_be_bytes([a, b, c, d]), down: down != 0 })
        }
        5 => {
            let [buttons, x1, x2, y1, y2] = bytes(from)?;
            Ok(Message::Pointer { buttons, x: u16::from_be_bytes([x1, x2]), y: u16::from_be_bytes([y1, y2]) })
        }
        6 => {
            let [_, _, _, length @ ..] = bytes::<7>(from)?;
            // A negative length is the extended clipboard's.
            skip(from, i32::from_be_bytes(length).unsigned_abs().into())?;
            Ok(Message::CutText)
        }
        150 => {
            let [on, ..] = bytes::<9>(from)?;
            Ok(Message::ContinuousUpdates { on: on != 0 })
        }
        248 => {
            let [_, _, _, a, b, c, d, length] = bytes(from)?;
            let length = usize::from(length);
            if length > FENCE_BYTES_MAX {
                return Err(wrong("a fence with a long payload"));
            }
            let mut payload = vec![0; length];
            from.read_exact(&mut payload)?;
            Ok(Message::Fence { flags: u32::from_be_bytes([a, b, c, d]), payload })
        }
        251 => {
            let [_, w1, w2, h1, h2, screens, _] = bytes(from)?;
            skip(from, u64::from(screens) * 16)?;
            Ok(Message::SetDesktopSize { width: u16::from_be_bytes([w1, w2]), height: u16::from_be_bytes([h1, h2]) })
        }
        255 => {
            let [kind, down1, down2, rest @ ..] = bytes::<11>(from)?;
            if kind != 0 {
                return Err(wrong("an unknown extension message"));
            }
            let [a, b, c, d, e, f, g, h] = rest;
            Ok(Message::ExtendedKey {
                keysym: u32::from_be_bytes([a, b, c, d]),
                keycode: u32::from_be_bytes([e, f, g, h]),
                down: (down1 | down2) != 0,
            })
        }
        _ => Err(wrong("an unknown message")),
    }
}

/// The first encoding of pixels that we have counts; the order of the others does not.
fn read_encodings(from: &mut impl Read) -> io::Result<Abilities> {
    let [_, count @ ..] = bytes::<3>(from)?;
    let count = u16::from_be_bytes(count);
    if count > ENCODINGS_MAX {
        return Err(wrong("too many encodings"));
    }
    let mut abilities = Abilities::NONE;
    let mut chosen = None;
    for _ in 0..count {
        let number = i32::from_be_bytes(bytes(from)?);
        match number {
            DESKTOP_SIZE => abilities.desktop_size = true,
            EXTENDED_DESKTOP_SIZE => abilities.extended_desktop_size = true,
            DESKTOP_NAME => abilities.desktop_name = true,
            EXTENDED_KEY => abilities.extended_key = true,
            FENCE => abilities.fence = true,
            CONTINUOUS_UPDATES => abilities.continuous_updates = true,
            _ => chosen = chosen.or(Encoding::from_number(number)),
        }
    }
    abilities.encoding = chosen.unwrap_or(Encoding::Raw);
    Ok(abilities)
}

fn bytes<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn shorts([a, b, c, d, e, f, g, h]: [u8; 8]) -> [u16; 4] {
    [[a, b], [c, d], [e, f], [g, h]].map(u16::from_be_bytes)
}

fn skip(from: &mut impl Read, count: u64) -> io::Result<()> {
    if count > CUT_TEXT_BYTES_MAX {
        return Err(wrong("too long a text"));
    }
    let skipped = io::copy(&mut from.take(count), &mut io::sink())?;
    if skipped < count { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("The viewer sent {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_and_lengths_are_checked() {
        let read = |bytes: &[u8]| super::read(&mut { bytes }).map_err(|error| error.kind());
        assert_eq!(
            read(&[3, 1, 0, 1, 0, 2, 3, 0, 0, 9]),
            Ok(Message::Update { incremental: true, area: Area { x: 1, y: 2, width: 768, height: 9 } })
        );
        assert_eq!(read(&[6, 0, 0, 0, 0, 0, 0, 2, 65, 66]), Ok(Message::CutText));
        assert_eq!(read(&[6, 0, 0, 0, 0xff, 0xff, 0xff, 0xfe, 65, 66]), Ok(Message::CutText));
        assert_eq!(read(&[6, 0, 0, 0, 0, 0, 0, 2, 65]), Err(io::ErrorKind::UnexpectedEof));
        assert_eq!(read(&[6, 0, 0, 0, 0x80, 0, 0, 0]), Err(io::ErrorKind::InvalidData));
        assert_eq!(read(&[2, 0, 0xff, 0xff]), Err(io::ErrorKind::InvalidData));
        assert_eq!(read(&[248, 0, 0, 0, 0, 0, 0, 0, 65]), Err(io::ErrorKind::InvalidData));
        assert_eq!(read(&[251, 0, 4, 0, 3, 0, 0, 0]), Ok(Message::SetDesktopSize { width: 1024, height: 768 }));
        assert_eq!(
            read(&[255, 0, 0, 1, 0, 0, 0, 65, 0, 0, 0, 0x9d]),
            Ok(Message::ExtendedKey { keysym: 65, keycode: 0x9d, down: true })
        );
        assert_eq!(read(&[99]), Err(io::ErrorKind::InvalidData));
    }

    #[test]
    fn the_viewers_first_known_encoding_is_taken() {
        let mut bytes = vec![2, 0, 0, 5];
        for number in [7i32, -258, 16, 6, -223] {
            bytes.extend(number.to_be_bytes());
        }
        let Ok(Message::Encodings(abilities)) = read(&mut bytes.as_slice()) else { panic!("not encodings") };
        let expected =
            Abilities { encoding: Encoding::Zrle, extended_key: true, desktop_size: true, ..Abilities::NONE };
        assert_eq!(abilities, expected);
    }
}
