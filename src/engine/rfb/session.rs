//! One viewer: reads what it says and notes what it wants, for `painter.rs` to do.

use std::{
    io::{self, BufReader},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    thread,
};

use super::{
    RfbServer,
    encodings::Encoding,
    handshake,
    keys::Hands,
    lock,
    message::{self, Abilities, Area, Message},
    painter::Painter,
    pixel::PixelFormat,
};
use crate::engine::screen::Rect;

/// What a viewer wants. The reader notes it, the painter does it.
pub(super) struct Wishes {
    pub(super) format: PixelFormat,
    pub(super) abilities: Abilities,
    /// The viewer waits for an update.
    pub(super) waiting: bool,
    /// It wants everything again, or this part.
    pub(super) everything: bool,
    pub(super) part: Option<Rect>,
    /// Updates are sent without being asked for.
    pub(super) continuous: bool,
    /// Updates sent that way and not yet confirmed.
    pub(super) unconfirmed: usize,
    pub(super) tell_size: bool,
    /// The size that it wished for was passed on to the guest, or nothing there takes it.
    pub(super) size_passed_on: Option<bool>,
    pub(super) tell_extended_key: bool,
    /// Short messages to send as they are.
    pub(super) replies: Vec<u8>,
    /// The size that the viewer was told.
    pub(super) size: (usize, usize),
    pub(super) gone: bool,
}

/// Replies that a viewer may leave unread.
const REPLY_BYTES_MAX: usize = 4096;
const READ_BUFFER_BYTES: usize = 4096;

const FENCE_REQUEST: u32 = 1 << 31;
/// Block before, block after, sync next: all hold for replies sent in order between updates.
const FENCE_KNOWN: u32 = 0b111;
const FENCE_BLOCK_BEFORE: u32 = 1;
/// The payload by which we know the fences that confirm an update.
const CONFIRMS: [u8; 1] = [1];

/// Serves the viewer on `stream` until it leaves.
///
/// Errors: why it left, apart from closing its end.
pub(super) fn run(server: &Arc<RfbServer>, stream: UnixStream) -> io::Result<()> {
    handshake::welcome(&stream)?;
    stream.set_read_timeout(None)?;
    let viewer = server.screen.attach();
    let (width, height, size_generation) = viewer.size();
    let (name, name_generation) = server.name();
    handshake::introduce(&stream, (width, height), &name)?;
    let wishes = Arc::new(Mutex::new(Wishes::new((width, height))));
    let painter = Painter::new(
        viewer,
        Arc::clone(server),
        Arc::clone(&wishes),
        stream.try_clone()?,
        (size_generation, name_generation),
    );
    let painting = thread::Builder::new().name("rfb-writer".into()).spawn(move || painter.run())?;
    let read = listen(server, &stream, &wishes);
    lock(&wishes).gone = true;
    server.screen.wake();
    // Ends a write that hangs. A socket that is closed already needs nothing.
    let _ = stream.shutdown(Shutdown::Both);
    let painted = painting.join().unwrap_or_else(|_| Err(io::Error::other("The viewer's writer panicked")));
    match read {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => painted,
        read => read,
    }
}

/// Reads messages until the stream ends.
fn listen(server: &RfbServer, stream: &UnixStream, wishes: &Mutex<Wishes>) -> io::Result<()> {
    let mut from = BufReader::with_capacity(READ_BUFFER_BYTES, stream);
    let mut hands = Hands::new(Arc::clone(&server.input));
    loop {
        match message::read(&mut from)? {
            Message::Key { keysym, down } => {
                hands.keysym(keysym, down);
                server.screen.hurry();
            }
            Message::ExtendedKey { keysym, keycode, down } => {
                hands.extended_key(keysym, keycode, down);
                server.screen.hurry();
            }
            Message::Pointer { buttons, x, y } => {
                let size = lock(wishes).size;
                hands.pointer(buttons, x, y, size);
                server.screen.hurry();
            }
            Message::SetDesktopSize { width, height } => {
                let passed_on = server.screen.wish_size(width.into(), height.into());
                let mut wishes = lock(wishes);
                wishes.size_passed_on = wishes.abilities.extended_desktop_size.then_some(passed_on);
                drop(wishes);
                server.screen.wake();
            }
            Message::CutText => {}
            wish => {
                lock(wishes).note(wish)?;
                server.screen.wake();
            }
        }
    }
}

impl Wishes {
    fn new(size: (usize, usize)) -> Wishes {
        Wishes {
            format: PixelFormat::NATIVE,
            abilities: Abilities::NONE,
            waiting: false,
            everything: false,
            part: None,
            continuous: false,
            unconfirmed: 0,
            tell_size: false,
            size_passed_on: None,
            tell_extended_key: false,
            replies: Vec::new(),
            size,
            gone: false,
        }
    }

    /// Takes note of a message.
    ///
    /// Errors: the viewer asks much and reads nothing.
    fn note(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::PixelFormat(format) => self.format = format,
            Message::Encodings(abilities) => self.note_abilities(abilities),
            Message::Update { incremental, area } => {
                self.waiting = true;
                if !incremental {
                    self.tell_size |= self.abilities.extended_desktop_size;
                    self.note_part(area);
                }
            }
            Message::Fence { flags, payload } => {
                if flags & FENCE_REQUEST != 0 {
                    self.replies.extend(fence(flags & FENCE_KNOWN, &payload));
                } else if payload == CONFIRMS {
                    self.unconfirmed = self.unconfirmed.saturating_sub(1);
                }
            }
            Message::ContinuousUpdates { on } => {
                self.continuous = on && self.abilities.continuous_updates;
                if !on {
                    self.replies.push(END_OF_CONTINUOUS_UPDATES);
                }
            }
            Message::Key { .. }
            | Message::ExtendedKey { .. }
            | Message::Pointer { .. }
            | Message::SetDesktopSize { .. }
            | Message::CutText => {}
        }
        if self.replies.len() > REPLY_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "The viewer does not read the replies it asks for"));
        }
        Ok(())
    }

    fn note_abilities(&mut self, now: Abilities) {
        let before = std::mem::replace(&mut self.abilities, now);
        self.tell_extended_key |= now.extended_key;
        self.tell_size |= now.extended_desktop_size && !before.extended_desktop_size;
        // These two are announced by messages that only a viewer which knows them understands.
        if now.fence && !before.fence {
            self.replies.extend(fence(FENCE_REQUEST, &[]));
        }
        if now.continuous_updates && !before.continuous_updates {
            self.replies.push(END_OF_CONTINUOUS_UPDATES);
        }
        self.continuous &= now.continuous_updates;
    }

    /// Adds a part that the viewer wants whether it changed or not.
    fn note_part(&mut self, area: Area) {
        let (x, y) = (usize::from(area.x).min(self.size.0), usize::from(area.y).min(self.size.1));
        let end = |at: usize, length: u16, size: usize| (at + usize::from(length)).min(size);
        let (mut left, mut top) = (x, y);
        let (mut right, mut bottom) = (end(x, area.width, self.size.0), end(y, area.height, self.size.1));
        if let Some(other) = self.part {
            (left, top) = (left.min(other.x), top.min(other.y));
            (right, bottom) = (right.max(other.x + other.width), bottom.max(other.y + other.height));
        }
        if (left, top) == (0, 0) && (right, bottom) == self.size {
            self.everything = true;
            self.part = None;
        } else if right > left && bottom > top {
            self.part = Some(Rect { x: left, y: top, width: right - left, height: bottom - top });
        }
    }

    /// Whether the viewer can take an update that it did not ask for: not too many are under way.
    pub(super) fn takes_unasked(&self) -> bool {
        /// As many as hide a slow line's delay without filling its buffers.
        const UNCONFIRMED_MAX: usize = 3;
        self.continuous && self.unconfirmed < UNCONFIRMED_MAX
    }

    /// A fence to send after an update, when this viewer confirms them.
    pub(super) fn confirmation(&mut self) -> Vec<u8> {
        if !self.continuous || !self.abilities.fence {
            return Vec::new();
        }
        self.unconfirmed += 1;
        fence(FENCE_REQUEST | FENCE_BLOCK_BEFORE, &CONFIRMS)
    }

    pub(super) fn encoding(&self) -> Encoding {
        self.abilities.encoding
    }
}

/// A message and, with that number, an announcement of the extension.
const END_OF_CONTINUOUS_UPDATES: u8 = 150;

fn fence(flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![248, 0, 0, 0];
    bytes.extend(flags.to_be_bytes());
    bytes.push(payload.len() as u8);
    bytes.extend(payload);
    bytes
}
