//! Sends one viewer what it has not seen: decides what that is, cuts it into strips and writes them.

use std::{
    io::{self, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
};

use super::{
    RfbServer,
    encodings::{Encoder, Encoding},
    handshake::short,
    lock,
    message::{DESKTOP_NAME, DESKTOP_SIZE, EXTENDED_DESKTOP_SIZE, EXTENDED_KEY},
    pixel::PixelFormat,
    session::Wishes,
};
use crate::engine::screen::{Next, Rect, View, Viewer};

/// The writer of one viewer.
pub(super) struct Painter {
    viewer: Viewer,
    server: Arc<RfbServer>,
    wishes: Arc<Mutex<Wishes>>,
    stream: UnixStream,
    seen: Seen,
    encoder: Encoder,
    pixels: Vec<u32>,
    out: Vec<u8>,
}

/// What the viewer was told last.
struct Seen {
    generation: u64,
    size_generation: u64,
    name_generation: u64,
}

/// The next thing to do.
enum Work {
    Reply(Vec<u8>),
    Update(Update),
    End,
}

/// One FramebufferUpdate (RFC 6143, 7.6.1): rectangles that say something, then rectangles of pixels.
struct Update {
    format: PixelFormat,
    encoding: Encoding,
    notes: Vec<Note>,
    rects: Vec<Rect>,
    /// Sent behind the update.
    after: Vec<u8>,
}

/// A pseudo-rectangle.
enum Note {
    ExtendedKey,
    Name(String),
    /// The size, for viewers that only know that it can change.
    Size((usize, usize)),
    /// The size; why it is told, and what came of the viewer's wish.
    ExtendedSize {
        size: (usize, usize),
        reason: u16,
        status: u16,
    },
}

/// The most pixels of a rectangle: what a viewer costs in memory, and how long it holds the screen.
const STRIP_PIXELS: usize = 64 << 10;
/// Written at once, about.
const WRITE_BYTES: usize = 64 << 10;

/// `ExtendedDesktopSize`: the server changed the size; the viewer wanted to, and may not, or the guest was asked.
const BY_SERVER: u16 = 0;
const BY_VIEWER: u16 = 1;
const PROHIBITED: u16 = 1;
const FORWARDED: u16 = 4;

impl Painter {
    /// `generations` are those of the size and of the name that the viewer was told at the start.
    pub(super) fn new(
        viewer: Viewer,
        server: Arc<RfbServer>,
        wishes: Arc<Mutex<Wishes>>,
        stream: UnixStream,
        generations: (u64, u64),
    ) -> Painter {
        let seen = Seen { generation: 0, size_generation: generations.0, name_generation: generations.1 };
        Painter {
            viewer,
            server,
            wishes,
            stream,
            seen,
            encoder: Encoder::default(),
            pixels: Vec::new(),
            out: Vec::new(),
        }
    }

    /// Works until the viewer or the guest is gone.
    ///
    /// Errors: the viewer could not be written to, or has not read for too long.
    pub(super) fn run(mut self) -> io::Result<()> {
        let result = self.work();
        // Ends the reader too. A socket that is closed already needs nothing.
        let _ = self.stream.shutdown(Shutdown::Both);
        result
    }

    fn work(&mut self) -> io::Result<()> {
        loop {
            let (wishes, seen, server) = (&self.wishes, &mut self.seen, &self.server);
            match self.viewer.wait(|view| next(&mut lock(wishes), seen, server, view)) {
                Work::End => return Ok(()),
                Work::Reply(bytes) => self.stream.write_all(&bytes)?,
                Work::Update(update) => self.send(&update)?,
            }
        }
    }

    fn send(&mut self, update: &Update) -> io::Result<()> {
        let strips: Vec<Rect> = update.rects.iter().flat_map(|rect| strips(*rect)).collect();
        let count = update.notes.len() + strips.len();
        self.out.clear();
        self.out.extend([0, 0]);
        self.out.extend(short(count).to_be_bytes());
        update.notes.iter().for_each(|note| note.put(&mut self.out));
        for strip in strips {
            put_header(strip, update.encoding as i32, &mut self.out);
            self.viewer.copy(strip, &mut self.pixels);
            self.encoder.encode(update.encoding, &update.format, strip.width, &self.pixels, &mut self.out)?;
            if self.out.len() >= WRITE_BYTES {
                self.stream.write_all(&self.out)?;
                self.out.clear();
            }
        }
        self.out.extend_from_slice(&update.after);
        self.stream.write_all(&self.out)?;
        // Kept small between updates: most of them are.
        self.out.clear();
        self.out.shrink_to(WRITE_BYTES);
        Ok(())
    }
}

/// Decides what to do, with the screen and the wishes locked.
fn next(wishes: &mut Wishes, seen: &mut Seen, server: &RfbServer, view: &View<'_>) -> Next<Work> {
    if wishes.gone || view.closed {
        return Next::Done(Work::End);
    }
    if !wishes.replies.is_empty() {
        return Next::Done(Work::Reply(std::mem::take(&mut wishes.replies)));
    }
    if !wishes.waiting && !wishes.takes_unasked() {
        return Next::Sleep;
    }
    if view.due {
        return Next::Refresh;
    }
    let mut notes = notes(wishes, seen, server);
    let mut rects = Vec::new();
    let resized = view.size_generation != seen.size_generation;
    if resized {
        seen.size_generation = view.size_generation;
        seen.generation = 0;
    }
    if resized && (wishes.abilities.extended_desktop_size || wishes.abilities.desktop_size) {
        // The size goes alone: the viewer then asks for what is in it.
        wishes.size = view.size();
        wishes.part = None;
        wishes.everything = false;
        // A wish is answered in any case: noVNC makes no other before.
        notes.retain_mut(|note| match note {
            Note::ExtendedSize { size, reason, .. } => {
                *size = wishes.size;
                *reason == BY_VIEWER
            }
            _ => true,
        });
        notes.push(if wishes.abilities.extended_desktop_size {
            Note::ExtendedSize { size: wishes.size, reason: BY_SERVER, status: 0 }
        } else {
            Note::Size(wishes.size)
        });
    } else {
        if std::mem::take(&mut wishes.everything) {
            seen.generation = 0;
        }
        if resized {
            // A viewer that must keep its size sees black where the picture no longer reaches.
            rects.push(Rect { x: 0, y: 0, width: wishes.size.0, height: wishes.size.1 });
        } else {
            rects.extend(view.changed_since(seen.generation).into_iter().filter_map(|rect| within(rect, wishes.size)));
            rects.extend(wishes.part.take());
        }
        seen.generation = view.generation;
    }
    if notes.is_empty() && rects.is_empty() {
        return Next::Refresh;
    }
    wishes.waiting = false;
    let after = wishes.confirmation();
    Next::Done(Work::Update(Update { format: wishes.format, encoding: wishes.encoding(), notes, rects, after }))
}

/// What is to be said before the pixels.
fn notes(wishes: &mut Wishes, seen: &mut Seen, server: &RfbServer) -> Vec<Note> {
    let mut notes = Vec::new();
    if std::mem::take(&mut wishes.tell_extended_key) {
        notes.push(Note::ExtendedKey);
    }
    let (name, name_generation) = server.name();
    if wishes.abilities.desktop_name && name_generation != seen.name_generation {
        seen.name_generation = name_generation;
        notes.push(Note::Name(name));
    }
    let size = wishes.size;
    if let Some(passed_on) = wishes.size_passed_on.take() {
        let status = if passed_on { FORWARDED } else { PROHIBITED };
        notes.push(Note::ExtendedSize { size, reason: BY_VIEWER, status });
    }
    if std::mem::take(&mut wishes.tell_size) {
        notes.push(Note::ExtendedSize { size, reason: BY_SERVER, status: 0 });
    }
    notes
}

impl Note {
    fn put(&self, out: &mut Vec<u8>) {
        let rect = |x: u16, y: u16, (width, height): (usize, usize)| Rect { x: x.into(), y: y.into(), width, height };
        match self {
            Note::ExtendedKey => put_header(rect(0, 0, (0, 0)), EXTENDED_KEY, out),
            Note::Name(name) => {
                put_header(rect(0, 0, (0, 0)), DESKTOP_NAME, out);
                out.extend((name.len() as u32).to_be_bytes());
                out.extend(name.as_bytes());
            }
            Note::Size(size) => put_header(rect(0, 0, *size), DESKTOP_SIZE, out),
            Note::ExtendedSize { size, reason, status } => {
                put_header(rect(*reason, *status, *size), EXTENDED_DESKTOP_SIZE, out);
                // One screen that fills the desktop: its number, place, size and flags.
                out.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                out.extend(short(size.0).to_be_bytes());
                out.extend(short(size.1).to_be_bytes());
                out.extend([0; 4]);
            }
        }
    }
}

fn put_header(rect: Rect, encoding: i32, out: &mut Vec<u8>) {
    for part in [rect.x, rect.y, rect.width, rect.height] {
        out.extend(short(part).to_be_bytes());
    }
    out.extend(encoding.to_be_bytes());
}

/// The part of `rect` inside a desktop of this size.
fn within(rect: Rect, size: (usize, usize)) -> Option<Rect> {
    let width = rect.width.min(size.0.checked_sub(rect.x)?);
    let height = rect.height.min(size.1.checked_sub(rect.y)?);
    (width > 0 && height > 0).then_some(Rect { width, height, ..rect })
}

/// Cuts a rectangle into pieces of bounded size, in whole tiles of ZRLE where that fits.
fn strips(rect: Rect) -> impl Iterator<Item = Rect> {
    let rows = (STRIP_PIXELS / rect.width.max(1)).max(1);
    let rows = if rows > 64 { rows - rows % 64 } else { rows };
    (0..rect.height).step_by(rows).map(move |at| Rect { y: rect.y + at, height: rows.min(rect.height - at), ..rect })
}
