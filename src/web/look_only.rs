//! A viewer's side of RFB without its keys and pointer: for people who may look at a screen and not touch it.
//!
//! The handshake and every message that is about drawing pass; what would reach the guest is left out (RFC 6143 section 7.5,
//! and the extensions that our server speaks). A message that is not known here ends the connection: its length is unknown too.

/// ProtocolVersion (RFC 6143 section 7.1.1) of those who choose a security type. To a viewer of an older one the engine says which,
/// and its handshake is a byte shorter: what followed would be taken apart at other places than in the engine.
const VERSIONS: [&[u8; 12]; 2] = [b"RFB 003.008\n", b"RFB 003.007\n"];
/// ProtocolVersion, then the security type (7.1.2), then ClientInit (7.3.1).
const HANDSHAKE_BYTES: usize = 12 + 1 + 1;
/// The longest message that is waited for: encodings and fences are far shorter, a clipboard is left out as it comes.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Cuts a viewer's bytes into messages.
#[derive(Default)]
pub struct LookOnly {
    greeted: usize,
    /// The beginning of a message that is not whole.
    pending: Vec<u8>,
    /// Bytes still to come of a message that is left out.
    dropping: usize,
}

/// The viewer sent what cannot be followed.
#[derive(Debug, PartialEq, Eq)]
pub struct Unknown;

impl LookOnly {
    /// What of `bytes` may go on to the engine.
    pub fn filter(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Unknown> {
        let greeting = bytes.len().min(HANDSHAKE_BYTES - self.greeted);
        let (greeting, rest) = bytes.split_at(greeting);
        for byte in greeting {
            let known = |version: &&[u8; 12]| version.get(self.greeted).is_none_or(|expected| expected == byte);
            if !VERSIONS.iter().any(known) {
                return Err(Unknown);
            }
            self.greeted += 1;
        }
        let mut passed = greeting.to_vec();
        let dropped = rest.len().min(self.dropping);
        self.dropping -= dropped;
        self.pending.extend_from_slice(rest.get(dropped..).unwrap_or_default());
        while let Some((length, passes)) = message(&self.pending)? {
            if !passes {
                let here = length.min(self.pending.len());
                self.pending.drain(..here);
                self.dropping = length - here;
                if self.dropping > 0 {
                    break;
                }
                continue;
            }
            if length > MESSAGE_BYTES_MAX {
                return Err(Unknown);
            }
            if self.pending.len() < length {
                break;
            }
            passed.extend(self.pending.drain(..length));
        }
        Ok(passed)
    }
}

/// The length of the message that begins here and whether it passes; nothing while its head is not whole.
fn message(bytes: &[u8]) -> Result<Option<(usize, bool)>, Unknown> {
    let Some(kind) = bytes.first() else { return Ok(None) };
    let u8_at = |at: usize| bytes.get(at).copied().map(usize::from);
    let u16_at = |at: usize| Some(u8_at(at)? << 8 | u8_at(at + 1)?);
    let i32_at = |at: usize| Some(i32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    Ok(match kind {
        0 => Some((20, true)),                             // SetPixelFormat
        2 => u16_at(2).map(|count| (4 + 4 * count, true)), // SetEncodings
        3 => Some((10, true)),                             // FramebufferUpdateRequest
        4 => Some((8, false)),                             // KeyEvent
        5 => Some((6, false)),                             // PointerEvent; our server has no extended buttons
        // ClientCutText; a negative length is that of the extended clipboard.
        6 => i32_at(4)
            .map(|length| (usize::try_from(length.unsigned_abs()).unwrap_or(usize::MAX).saturating_add(8), false)),
        150 => Some((10, true)),                                  // EnableContinuousUpdates
        248 => u8_at(8).map(|length| (9 + length, true)),         // ClientFence
        250 => Some((4, false)),                                  // xvp: power
        251 => u8_at(6).map(|screens| (8 + 16 * screens, false)), // SetDesktopSize
        255 => match u8_at(1) {
            None => None,
            Some(0) => Some((12, false)), // QEMU extended key
            Some(1) => match u16_at(2) {
                // QEMU audio
                None => None,
                Some(2) => Some((10, true)),
                Some(_) => Some((4, true)),
            },
            Some(_) => return Err(Unknown),
        },
        _ => return Err(Unknown),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: &[u8] = &[3, 1, 0, 0, 0, 0, 1, 0, 1, 0];
    const KEY: &[u8] = &[4, 1, 0, 0, 0, 0, 0, b'a'];
    const QEMU_KEY: &[u8] = &[255, 0, 0, 1, 0, 0, 0, b'a', 0, 0, 0, 30];
    const POINTER: &[u8] = &[5, 1, 0, 9, 0, 9];
    const ENCODINGS: &[u8] = &[2, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 16];
    const CUT: &[u8] = &[6, 0, 0, 0, 0, 0, 0, 3, b'r', b'm', b' '];

    fn handshake() -> Vec<u8> {
        [b"RFB 003.008\n".as_slice(), &[1, 1]].concat()
    }

    #[test]
    fn keys_pointer_and_clipboard_never_pass_however_they_are_cut() {
        let sent = [&handshake(), ENCODINGS, KEY, REQUEST, POINTER, CUT, QEMU_KEY, REQUEST].concat();
        let allowed = [&handshake(), ENCODINGS, REQUEST, REQUEST].concat();
        for piece in 1..sent.len() {
            let mut filter = LookOnly::default();
            let passed: Vec<u8> = sent.chunks(piece).flat_map(|bytes| filter.filter(bytes).unwrap()).collect();
            assert_eq!(passed, allowed, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_is_not_known_ends_the_connection() {
        let mut filter = LookOnly::default();
        filter.filter(&handshake()).unwrap();
        assert_eq!(filter.filter(&[77, 0, 0]), Err(Unknown));
    }

    #[test]
    fn a_huge_clipboard_takes_no_memory() {
        let mut filter = LookOnly::default();
        filter.filter(&handshake()).unwrap();
        filter.filter(&[6, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff]).unwrap();
        for _ in 0..100 {
            assert_eq!(filter.filter(&[3; 1000]), Ok(vec![]));
        }
        assert!(filter.pending.is_empty());
    }

    #[test]
    fn a_size_is_not_wished_for_by_who_may_only_look() {
        let size = [251, 0, 4, 0, 3, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 3, 0, 0, 0, 0, 0];
        let mut filter = LookOnly::default();
        let sent = [&handshake(), REQUEST, &size, REQUEST].concat();
        assert_eq!(filter.filter(&sent), Ok([&handshake(), REQUEST, REQUEST].concat()));
    }

    #[test]
    fn a_version_with_a_shorter_handshake_is_refused() {
        // The engine takes these for 3.3, reads ClientInit (1), and then a key where we would see a request for an update.
        for version in [b"RFB 003.003\n", b"RFB 003.889\n", b"RFB 004.001\n"] {
            let sent = [version.as_slice(), &[1], &[4, 3, 0, 0, 0, 0, 0, b'a', 3, 0, 0]].concat();
            for piece in 1..sent.len() {
                let mut filter = LookOnly::default();
                let passed = sent.chunks(piece).try_for_each(|bytes| filter.filter(bytes).map(drop));
                assert_eq!(passed, Err(Unknown), "in pieces of {piece}");
            }
        }
    }
}
