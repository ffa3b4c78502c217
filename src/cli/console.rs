//! `innkeeper guest console`: this terminal as the guest's serial console, over a WebSocket.
//!
//! One thread, one poll(2) over the connection, standard input and the ending signals. The terminal is made raw and is put back
//! on every way out. Ctrl+] leaves. When the server goes away, the console connects again where it was.

use std::{
    io::{self, IsTerminal, Read, Write},
    os::fd::AsFd,
    thread::sleep,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use serde::Deserialize;
use tokio_tungstenite::tungstenite::{
    self, Message, WebSocket,
    client::IntoClientRequest,
    http::{HeaderName, HeaderValue},
};

use super::{
    Failure, Outcome,
    client::{Client, Stream},
    guest,
};

/// Ctrl+].
const ESCAPE: u8 = 0x1d;
/// After the end of standard input: silence for this long ends the console.
const DRAIN_SILENCE: Duration = Duration::from_millis(700);
/// After the end of standard input: the console ends at last, even if the guest goes on talking.
const DRAIN_LONGEST: Duration = Duration::from_secs(5);
/// How long a lost connection is tried again.
const RECONNECT: Duration = Duration::from_secs(15);
const INPUT_BYTES: usize = 4096;

type Socket = WebSocket<Stream>;

/// What the server says between the bytes.
#[derive(Debug, Default, Deserialize)]
struct Note {
    offset: Option<u64>,
    skipped: Option<u64>,
    reset: Option<u64>,
    closed: Option<String>,
}

/// Why one connection is over.
enum End {
    /// The person left, or standard input ended and the guest is silent.
    Left,
    /// A signal asked to end.
    Signal(i32),
    /// The server said why.
    Closed(String),
    /// The connection broke.
    Lost,
}

/// Connects until the person leaves, standard input ends or the guest is off.
pub fn run(client: &Client, name: &str) -> Outcome {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    let cannot = |error: nix::Error| Failure::failed(format!("Cannot watch for signals: {error}."));
    signals.thread_block().map_err(cannot)?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(cannot)?;
    let mut session = Session { signals, next: None, drain: None, raw: None };
    let mut socket = open(client, name, None)?;
    session.raw = RawTerminal::enter();
    if session.raw.is_some() {
        session.tell(&format!("Connected to {name}. Ctrl+] leaves."));
    }
    loop {
        let end = session.serve(&mut socket);
        match end? {
            End::Left => return Ok(()),
            End::Signal(number) => {
                return Err(Failure::failed(format!("Ended by signal {number}.")));
            }
            End::Closed(reason) => {
                session.tell(&reason);
                return Ok(());
            }
            End::Lost => socket = session.reconnect(client, name)?,
        }
    }
}

struct Session {
    signals: SignalFd,
    /// The offset of the next byte of the guest.
    next: Option<u64>,
    /// Standard input has ended: since when, and when the guest was last heard.
    drain: Option<(Instant, Instant)>,
    raw: Option<RawTerminal>,
}

impl Session {
    fn serve(&mut self, socket: &mut Socket) -> Outcome<End> {
        loop {
            if let Some(end) = self.receive(socket)? {
                return Ok(end);
            }
            let timeout = match self.drain {
                None => PollTimeout::NONE,
                Some((since, heard)) => {
                    let left = DRAIN_SILENCE
                        .saturating_sub(heard.elapsed())
                        .min(DRAIN_LONGEST.saturating_sub(since.elapsed()));
                    if left.is_zero() {
                        return Ok(End::Left);
                    }
                    PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
                }
            };
            let stdin = io::stdin();
            let mut watched = vec![
                PollFd::new(socket.get_ref().as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            if self.drain.is_none() {
                watched.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut watched, timeout) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(Failure::failed(format!("Cannot wait for the console: {error}."))),
            }
            let ready = |at: usize| watched.get(at).is_some_and(|fd| fd.any().unwrap_or(false));
            let (signalled, typed) = (ready(1), ready(2));
            drop(watched);
            if signalled && let Ok(Some(signal)) = self.signals.read_signal() {
                return Ok(End::Signal(i32::try_from(signal.ssi_signo).unwrap_or(0)));
            }
            if typed && let Some(end) = self.send_typed(socket)? {
                return Ok(end);
            }
        }
    }

    /// Writes out everything that has arrived.
    fn receive(&mut self, socket: &mut Socket) -> Outcome<Option<End>> {
        loop {
            match socket.read() {
                Ok(Message::Binary(bytes)) => {
                    if let Some(next) = &mut self.next {
                        *next += bytes.len() as u64;
                    }
                    if let Some((_, heard)) = &mut self.drain {
                        *heard = Instant::now();
                    }
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(&bytes)?;
                    stdout.flush()?;
                }
                Ok(Message::Text(text)) => {
                    let note: Note = serde_json::from_str(text.as_str()).unwrap_or_default();
                    if let Some(end) = self.note(note) {
                        return Ok(Some(end));
                    }
                }
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_) | Message::Close(_)) => {}
                Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(_) => return Ok(Some(End::Lost)),
            }
        }
    }

    fn note(&mut self, note: Note) -> Option<End> {
        if let Some(offset) = note.offset {
            self.next = Some(offset);
        }
        if let Some(skipped) = note.skipped.filter(|skipped| *skipped > 0) {
            self.tell(&format!("{skipped} bytes skipped"));
        }
        if note.reset.is_some() && self.raw.is_some() {
            self.tell("reset");
        }
        note.closed.map(End::Closed)
    }

    fn send_typed(&mut self, socket: &mut Socket) -> Outcome<Option<End>> {
        let mut buffer = [0; INPUT_BYTES];
        let got = match io::stdin().lock().read(&mut buffer) {
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(_) => 0,
        };
        let mut typed = buffer.get(..got).unwrap_or_default();
        if typed.is_empty() {
            if self.raw.is_some() {
                return Ok(Some(End::Left)); // the terminal is gone
            }
            self.drain = Some((Instant::now(), Instant::now()));
            return Ok(None);
        }
        let leaves = self.raw.is_some().then(|| typed.iter().position(|byte| *byte == ESCAPE)).flatten();
        if let Some(at) = leaves {
            typed = typed.get(..at).unwrap_or_default();
        }
        let sent = if typed.is_empty() { Ok(()) } else { send_all(socket, typed) };
        Ok(match (leaves, sent) {
            (Some(_), _) => Some(End::Left),
            (None, Err(())) => Some(End::Lost),
            (None, Ok(())) => None,
        })
    }

    fn reconnect(&self, client: &Client, name: &str) -> Outcome<Socket> {
        self.tell("Connection lost; connecting again…");
        let deadline = Instant::now() + RECONNECT;
        loop {
            match open(client, name, self.next) {
                Ok(socket) => return Ok(socket),
                Err(failure) if Instant::now() >= deadline => return Err(failure),
                Err(Failure::Answered { status, text }) if status < 500 => {
                    return Err(Failure::Answered { status, text });
                }
                Err(_) => {}
            }
            if let Ok(Some(signal)) = self.signals.read_signal() {
                return Err(Failure::failed(format!("Ended by signal {}.", signal.ssi_signo)));
            }
            sleep(Duration::from_millis(300));
        }
    }

    /// A word of ours among the guest's, on standard error.
    fn tell(&self, text: &str) {
        let clean: String = text.chars().filter(|c| !c.is_control()).collect();
        let line_end = if self.raw.is_some() { "\r\n" } else { "\n" };
        let _ = write!(io::stderr(), "[{clean}]{line_end}");
    }
}

/// Sends, waiting while the connection takes no more: the guest's pace is the typist's.
fn send_all(socket: &mut Socket, bytes: &[u8]) -> Result<(), ()> {
    let mut result = socket.send(Message::binary(bytes.to_vec()));
    loop {
        match result {
            Ok(()) => return Ok(()),
            Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut watched = [PollFd::new(socket.get_ref().as_fd(), PollFlags::POLLOUT)];
                if poll(&mut watched, PollTimeout::NONE).is_err_and(|error| error != nix::Error::EINTR) {
                    return Err(());
                }
                result = socket.flush();
            }
            Err(_) => return Err(()),
        }
    }
}

/// Opens the WebSocket; from then on its connection does not block.
///
/// Errors: the server's own sentence when it refuses.
fn open(client: &Client, name: &str, from: Option<u64>) -> Outcome<Socket> {
    let cannot = |error: &dyn std::fmt::Display| Failure::failed(format!("Cannot open the console: {error}."));
    let query = from.map_or_else(String::new, |from| format!("?from={from}"));
    let uri = format!("ws://innkeeper{}{query}", guest::path(name, "/serial"));
    let mut request = uri.into_client_request().map_err(|error| cannot(&error))?;
    for (header, value) in client.headers() {
        let header = HeaderName::from_bytes(header.as_bytes()).map_err(|error| cannot(&error))?;
        request.headers_mut().insert(header, HeaderValue::from_str(&value).map_err(|error| cannot(&error))?);
    }
    let (socket, _) = tungstenite::client(request, client.connect()?).map_err(|error| match error {
        tungstenite::HandshakeError::Failure(tungstenite::Error::Http(answer)) => refused(client, name, &answer),
        other => cannot(&other),
    })?;
    socket.get_ref().set_nonblocking(true)?;
    Ok(socket)
}

/// A refused upgrade's body may have been cut off; the guest itself says the same in full.
fn refused(client: &Client, name: &str, answer: &tungstenite::http::Response<Option<Vec<u8>>>) -> Failure {
    let status = answer.status().as_u16();
    let body = answer.body().clone().unwrap_or_default();
    let answered = super::client::Answer { status, content_type: String::new(), body };
    if let Err(failure @ Failure::Answered { .. }) =
        client.request("GET", &guest::path(name, ""), None).and_then(super::client::Answer::good)
    {
        return failure;
    }
    answered.good().err().unwrap_or_else(|| Failure::failed("The server did not open the console."))
}

/// The terminal on standard input, byte by byte and without echo, until this is dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Nothing when standard input is no terminal.
    fn enter() -> Option<RawTerminal> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(RawTerminal { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
        let _ = writeln!(io::stderr());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_of_a_newer_server_are_read_as_far_as_they_go() {
        let note: Note = serde_json::from_str(r#"{"offset":7,"skipped":2,"colour":"green"}"#).unwrap();
        assert_eq!((note.offset, note.skipped, note.reset), (Some(7), Some(2), None));
    }
}
