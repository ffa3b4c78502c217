//! RFB, the protocol of VNC: shows the guest's screen to viewers and takes their keys (RFC 6143).
//!
//! The engine speaks it on a Unix socket without a password; whoever hands connections over has checked who is there. Each
//! viewer has a thread that reads and one that writes. A viewer that does not read holds up only its own writer, which has no
//! queue: when it can write again it sends what has changed since it last did.

mod encodings;
mod handshake;
mod keys;
mod message;
mod painter;
mod pixel;
mod session;

use std::{
    collections::BTreeMap,
    io,
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use super::{input::InputSink, screen::Screen};

/// More viewers than this are refused with a reason.
pub const VIEWERS_MAX: usize = 16;

/// Refusals take a thread as well; more than this at once are closed without a word.
const REFUSALS_MAX: usize = 4;
/// How long a viewer may take for each step of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A viewer that reads nothing for so long is closed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// After a connection that could not be served: the host is short of something.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);
const ACCEPT_STACK_BYTES: usize = 128 << 10;
/// The longest desktop name.
const NAME_BYTES_MAX: usize = 255;

/// Accepts viewers on `listener` in a thread of its own, as long as the process lives. They leave when the screen is closed.
///
/// `name` is what viewers show as the title. Errors: the host gives no thread.
pub fn serve(listener: UnixListener, screen: Arc<Screen>, input: Arc<dyn InputSink>, name: &str) -> io::Result<()> {
    let server = RfbServer::new(screen, input, name);
    let accept = move || {
        loop {
            let served = listener.accept().and_then(|(stream, _)| server.serve(stream));
            if let Err(error) = served {
                tracing::warn!(%error, "a viewer of the screen cannot be served");
                thread::sleep(ACCEPT_AGAIN);
            }
        }
    };
    thread::Builder::new().name("rfb-accept".into()).stack_size(ACCEPT_STACK_BYTES).spawn(accept)?;
    Ok(())
}

/// Serves one guest's screen.
pub struct RfbServer {
    screen: Arc<Screen>,
    input: Arc<dyn InputSink>,
    /// The desktop's name, and how often it has changed.
    name: Mutex<(String, u64)>,
    table: Mutex<Table>,
    write_timeout: Duration,
}

#[derive(Default)]
struct Table {
    last_id: u64,
    viewers: BTreeMap<u64, UnixStream>,
    refusals: usize,
    closed: bool,
}

impl RfbServer {
    /// `name` is what viewers show as the title.
    pub fn new(screen: Arc<Screen>, input: Arc<dyn InputSink>, name: &str) -> Arc<RfbServer> {
        Arc::new(RfbServer::with_timeout(screen, input, name, WRITE_TIMEOUT))
    }

    fn with_timeout(screen: Arc<Screen>, input: Arc<dyn InputSink>, name: &str, write_timeout: Duration) -> RfbServer {
        RfbServer { screen, input, name: Mutex::new((shortened(name), 0)), table: Mutex::default(), write_timeout }
    }

    /// Serves a connection in threads of its own; returns at once. Called by whoever accepts connections.
    ///
    /// Errors: the host gives no thread or descriptor; the connection is closed.
    pub fn serve(self: &Arc<RfbServer>, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
        stream.set_write_timeout(Some(self.write_timeout))?;
        let server = Arc::clone(self);
        let mut table = lock(&self.table);
        if table.closed {
            return Ok(());
        }
        if table.viewers.len() >= VIEWERS_MAX {
            if table.refusals < REFUSALS_MAX {
                table.refusals += 1;
                let refuse = move || {
                    // A viewer that goes away instead of reading its refusal has its wish.
                    let _ = handshake::refuse(&stream, "Too many viewers look at this screen already.");
                    lock(&server.table).refusals -= 1;
                };
                let started = thread::Builder::new().name("rfb-refusal".into()).spawn(refuse);
                if started.is_err() {
                    table.refusals -= 1;
                }
                started?;
            }
            return Ok(());
        }
        table.last_id += 1;
        let id = table.last_id;
        table.viewers.insert(id, stream.try_clone()?);
        let run = move || {
            let ended = session::run(&server, stream);
            lock(&server.table).viewers.remove(&id);
            if let Err(error) = ended {
                tracing::debug!(viewer = id, %error, "a viewer of the screen has left");
            }
        };
        let started = thread::Builder::new().name("rfb-reader".into()).spawn(run);
        if started.is_err() {
            table.viewers.remove(&id);
        }
        started.map(drop)
    }

    /// How many viewers are connected.
    pub fn viewers(&self) -> usize {
        lock(&self.table).viewers.len()
    }

    /// Gives the desktop another name; viewers that can will show it.
    pub fn set_name(&self, name: &str) {
        let mut current = lock(&self.name);
        *current = (shortened(name), current.1 + 1);
        drop(current);
        self.screen.wake();
    }

    /// Closes every connection, and each later one: the guest has ended.
    pub fn close_all(&self) {
        let mut table = lock(&self.table);
        table.closed = true;
        for stream in table.viewers.values() {
            // A socket that is closed already needs nothing.
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(table);
        self.screen.close();
    }

    fn name(&self) -> (String, u64) {
        lock(&self.name).clone()
    }
}

fn shortened(name: &str) -> String {
    name.chars()
        .scan(0, |bytes, c| {
            *bytes += c.len_utf8();
            (*bytes <= NAME_BYTES_MAX).then_some(c)
        })
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
