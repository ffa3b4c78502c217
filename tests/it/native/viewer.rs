//! Serial console, screen and picture of a guest, as a viewer has them.

use std::{
    fs,
    io::{self, Cursor, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{self, Message, WebSocket};

use super::world::{PATIENCE, World};

/// What the test guest says first.
pub const GREETING: &str = "Welcome to Innkeeper. This is the built-in test guest.";

/// A viewer of the serial console. It checks on its own that offsets and skipped bytes add up.
pub struct Serial {
    way: Way,
    /// Where it began.
    pub start: u64,
    /// The offset of the next byte.
    pub next: u64,
    pub seen: Vec<u8>,
    pub skipped: u64,
    pub resets: Vec<u64>,
    /// Why the console ended, as the viewer was told.
    pub closed: Option<String>,
    /// The connection has ended.
    pub over: bool,
    greeted: bool,
}

enum Way {
    /// Through the server.
    Socket(Box<WebSocket<UnixStream>>),
    /// At the engine itself: frames of one byte of kind, four of length, and the payload.
    Engine(UnixStream, Vec<u8>),
}

/// What can arrive.
enum Piece {
    Bytes(Vec<u8>),
    Note(Value),
    Silence,
    End,
}

impl Serial {
    /// Through the server, from `from` or the oldest byte kept.
    pub fn open(world: &World, guest: &str, from: Option<u64>) -> Serial {
        let stream = UnixStream::connect(world.run_dir().join("api.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let from = from.map_or(String::new(), |from| format!("?from={from}"));
        let address = format!("ws://localhost/api/v1/guests/{guest}/serial{from}");
        let socket = tungstenite::client(address, stream).unwrap().0;
        Serial::begin(Way::Socket(Box::new(socket)))
    }

    /// At the engine itself.
    pub fn at_engine(socket: &Path, from: Option<u64>) -> Serial {
        let mut stream = UnixStream::connect(socket).unwrap();
        writeln!(stream, "{}", json!({ "from": from })).unwrap();
        Serial::begin(Way::Engine(stream, Vec::new()))
    }

    fn begin(way: Way) -> Serial {
        let mut serial = Serial {
            way,
            start: 0,
            next: 0,
            seen: Vec::new(),
            skipped: 0,
            resets: Vec::new(),
            closed: None,
            over: false,
            greeted: false,
        };
        serial.until("the greeting of the console", |serial| serial.greeted);
        serial
    }

    /// Takes what comes next, if something comes in time.
    pub fn receive(&mut self, patience: Duration) {
        match self.way.piece(patience) {
            Piece::Bytes(bytes) => {
                self.next += bytes.len() as u64;
                self.seen.extend(bytes);
            }
            Piece::Note(note) => self.note(&note),
            Piece::Silence => {}
            Piece::End => self.over = true,
        }
    }

    fn note(&mut self, note: &Value) {
        if let Some(offset) = note["offset"].as_u64() {
            let skipped = note["skipped"].as_u64().unwrap_or(0);
            if self.greeted {
                assert_eq!(offset, self.next + skipped, "{note}");
                self.skipped += skipped;
            } else {
                (self.greeted, self.start, self.skipped) = (true, offset, skipped);
            }
            self.next = offset;
        }
        self.resets.extend(note["reset"].as_u64());
        self.closed = note["closed"].as_str().map(str::to_owned).or(self.closed.take());
    }

    /// Reads until `true`.
    pub fn until(&mut self, what: &str, condition: impl FnMut(&Serial) -> bool) {
        self.until_within(PATIENCE, what, condition);
    }

    pub fn until_within(&mut self, patience: Duration, what: &str, mut condition: impl FnMut(&Serial) -> bool) {
        let deadline = Instant::now() + patience;
        while !condition(self) {
            assert!(Instant::now() < deadline && !self.over, "waited in vain: {what}; seen: {}", self.tail());
            self.receive(Duration::from_millis(100));
        }
    }

    /// Reads until the guest has printed this after what was seen already.
    pub fn expect(&mut self, text: &str) {
        let from = self.seen.len();
        self.until(text, |serial| contains(&serial.seen[from..], text));
    }

    /// Reads until the clock has moved on by two steps.
    pub fn see_it_tick(&mut self) {
        let from = self.seen.len();
        self.until("the clock goes on", |serial| times(&serial.seen[from..]).len() > 2);
    }

    /// Reads on for so long.
    pub fn listen(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            self.receive(left);
        }
    }

    /// Reads until this offset; connects again where it was, as the page does, should it have been given up meanwhile.
    pub fn catch_up(&mut self, world: &World, guest: &str, offset: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.next < offset {
            if self.over {
                let again = Serial::open(world, guest, Some(self.next));
                assert_eq!(again.start, self.next);
                (self.way, self.over) = (again.way, false);
                self.seen.extend(again.seen);
                (self.skipped, self.next) = (self.skipped + again.skipped, again.next);
            }
            assert!(Instant::now() < deadline, "the console does not reach {offset}: {}", self.next);
            self.receive(Duration::from_millis(100));
        }
    }

    /// Reads to the end of the connection.
    pub fn drain(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.over {
            assert!(Instant::now() < deadline, "the console does not end");
            self.receive(Duration::from_millis(100));
        }
    }

    pub fn type_keys(&mut self, text: &str) {
        match &mut self.way {
            Way::Socket(socket) => socket.send(Message::binary(text.as_bytes().to_vec())).unwrap(),
            Way::Engine(stream, _) => stream.write_all(text.as_bytes()).unwrap(),
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    fn tail(&self) -> String {
        String::from_utf8_lossy(&self.seen[self.seen.len().saturating_sub(400)..]).into_owned()
    }
}

impl Way {
    fn piece(&mut self, patience: Duration) -> Piece {
        let patience = Some(patience.max(Duration::from_millis(1)));
        match self {
            Way::Socket(socket) => {
                socket.get_ref().set_read_timeout(patience).unwrap();
                match socket.read() {
                    Ok(Message::Binary(bytes)) => Piece::Bytes(bytes.to_vec()),
                    Ok(Message::Text(text)) => Piece::Note(serde_json::from_str(text.as_str()).unwrap()),
                    Ok(_) => Piece::Silence,
                    Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Piece::Silence,
                    Err(_) => Piece::End,
                }
            }
            Way::Engine(stream, pending) => {
                stream.set_read_timeout(patience).unwrap();
                if let Some(piece) = frame(pending) {
                    return piece;
                }
                let mut bytes = vec![0; 256 << 10];
                match stream.read(&mut bytes) {
                    Ok(0) => return Piece::End,
                    Ok(count) => pending.extend(&bytes[..count]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return Piece::End,
                }
                frame(pending).unwrap_or(Piece::Silence)
            }
        }
    }
}

/// Cuts one whole frame off.
fn frame(pending: &mut Vec<u8>) -> Option<Piece> {
    let head = pending.first_chunk::<5>()?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let kind = head[0];
    let payload = pending.get(5..5 + length)?.to_vec();
    pending.drain(..5 + length);
    Some(if kind == 0 { Piece::Bytes(payload) } else { Piece::Note(serde_json::from_slice(&payload).unwrap()) })
}

pub fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The different times that the test guest has shown.
pub fn times(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let mut times: Vec<String> = Vec::new();
    for piece in text.split('\r').skip(1).filter_map(|piece| piece.get(..8)) {
        let is_time = piece.split(':').count() == 3 && piece.bytes().all(|c| c.is_ascii_digit() || c == b':');
        if is_time && times.last().is_none_or(|last| last != piece) {
            times.push(piece.to_owned());
        }
    }
    times
}

// ---- screen ----

/// A viewer of the screen, at the engine itself.
pub struct Rfb {
    stream: UnixStream,
    pub width: u16,
    pub height: u16,
}

impl Rfb {
    pub fn open(socket: &Path) -> Rfb {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut take = |count: usize, answer: &[u8]| {
            let mut bytes = vec![0; count];
            stream.read_exact(&mut bytes).unwrap();
            stream.write_all(answer).unwrap();
            bytes
        };
        assert_eq!(take(12, b"RFB 003.008\n"), b"RFB 003.008\n");
        let kinds = take(1, b"")[0];
        assert!(take(usize::from(kinds), &[1]).contains(&1), "no password is asked for");
        assert_eq!(take(4, &[1]), [0; 4]);
        let init = take(24, b"");
        let name = u32::from_be_bytes(init[20..24].try_into().unwrap());
        take(name as usize, b"");
        let number = |at: usize| u16::from_be_bytes([init[at], init[at + 1]]);
        Rfb { width: number(0), height: number(2), stream }
    }

    /// Asks for the whole screen, or for what has changed.
    pub fn request(&mut self, incremental: bool) {
        let mut message = vec![3, u8::from(incremental), 0, 0, 0, 0];
        message.extend(self.width.to_be_bytes());
        message.extend(self.height.to_be_bytes());
        self.stream.write_all(&message).unwrap();
    }

    pub fn type_keys(&mut self, text: &str) {
        for key in text.bytes() {
            for down in [1, 0] {
                self.stream.write_all(&[4, down, 0, 0, 0, 0, 0, key]).unwrap();
            }
        }
    }
}

/// The guest's screen as a picture.
pub struct Picture {
    pub width: usize,
    pub height: usize,
    bytes: Vec<u8>,
}

impl Picture {
    pub fn take(world: &World, guest: &str) -> Picture {
        let file = world.file("shot.png", b"");
        if nix::unistd::geteuid().is_root() {
            let owner = world.state().parent().unwrap().to_owned();
            let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(owner).unwrap());
            std::os::unix::fs::chown(&file, Some(owner), Some(owner)).unwrap();
        }
        world.well(&format!("guest screenshot {guest} {}", file.display()));
        let mut reader = png::Decoder::new(Cursor::new(fs::read(file).unwrap())).read_info().unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut bytes).unwrap();
        bytes.truncate(info.buffer_size());
        Picture { width: info.width as usize, height: info.height as usize, bytes }
    }

    pub fn is_blank(&self) -> bool {
        let pixel = self.bytes.len() / (self.width * self.height);
        self.bytes.chunks(pixel).all(|other| other == &self.bytes[..pixel])
    }

    /// The pixels of one of 25 lines of text.
    pub fn line(&self, number: usize) -> &[u8] {
        let line = self.bytes.len() / 25;
        &self.bytes[number * line..(number + 1) * line]
    }
}

/// Lines of the test guest's screen.
pub const CLOCK_LINE: usize = 6;
pub const TYPED_LINE: usize = 8;
