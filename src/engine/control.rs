//! The engine's side of the control socket: JSON lines in, replies and events out (`wire.rs`).
//!
//! Connections only carry messages. What they ask for is done by the machine's thread, which gets it through one channel.

use std::{
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    time::Duration,
};

use super::{pvpanic::Panic, vcpu::VcpuEvent};
use crate::wire::{EngineAction, EngineMessage, EngineRequest, Hello, MESSAGE_BYTES_MAX, receive_bytes};

const CONNECTIONS_MAX: usize = 16;
/// Messages that wait for a slow reader; one more and it is cut off. It can connect again and sees the state of then.
const WAITING_MAX: usize = 64;
const STACK_BYTES: usize = 128 << 10;
const STALLED: Duration = Duration::from_secs(10);

/// What the machine's thread hears of.
pub enum Order {
    Request {
        action: EngineAction,
        /// In the order in which they were handed over.
        files: Vec<OwnedFd>,
        answer: Answer,
    },
    Vcpu(VcpuEvent),
    HostFault(String),
    Addresses(Vec<String>),
    Panic(Panic),
    /// The guest did not feed its watchdog.
    Watchdog,
    /// The guest's agent has something else to say.
    AgentNews,
    /// SIGTERM: somebody wants this host quiet.
    Terminate,
}

/// Where the reply to one request goes.
pub struct Answer {
    id: u64,
    to: SyncSender<Vec<u8>>,
}

impl Answer {
    pub fn done(self) {
        self.send(None, Vec::new());
    }
    pub fn refused(self, why: impl Into<String>) {
        self.send(Some(why.into()), Vec::new());
    }
    /// Done, or refused with a sentence.
    pub fn result(self, result: Result<(), String>) {
        self.send(result.err(), Vec::new());
    }
    pub fn with(self, payload: Vec<u8>) {
        self.send(None, payload);
    }
    fn send(self, error: Option<String>, payload: Vec<u8>) {
        let reply = EngineMessage::Reply { id: self.id, error, payload_bytes: payload.len() as u64 };
        let mut bytes = line(&reply);
        bytes.extend(payload);
        let _ = self.to.try_send(bytes);
    }
}

/// Everyone who listens, and what a newcomer is told first.
#[derive(Clone)]
pub struct Announcer(Arc<Mutex<Audience>>);

struct Audience {
    hello: Hello,
    listeners: Vec<Listener>,
}

/// Where a connection's words go. One that takes no more is ended: it would miss something, and comes again to hear all.
struct Listener {
    to: SyncSender<Vec<u8>>,
    stream: UnixStream,
}

impl Listener {
    fn tell(&self, bytes: Vec<u8>) -> bool {
        let told = self.to.try_send(bytes).is_ok();
        if !told {
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
        }
        told
    }
}

impl Announcer {
    pub fn new(hello: Hello) -> Announcer {
        Announcer(Arc::new(Mutex::new(Audience { hello, listeners: Vec::new() })))
    }

    /// Changes what newcomers are told and tells everyone else.
    pub fn say(&self, change: impl FnOnce(&mut Hello), message: &EngineMessage) {
        let mut audience = self.lock();
        change(&mut audience.hello);
        let bytes = line(message);
        audience.listeners.retain(|listener| listener.tell(bytes.clone()));
    }

    /// What newcomers are told now.
    pub fn hello(&self) -> Hello {
        self.lock().hello.clone()
    }

    fn join(&self, listener: Listener) {
        let mut audience = self.lock();
        let hello = line(&EngineMessage::Hello(audience.hello.clone()));
        if listener.tell(hello) {
            audience.listeners.push(listener);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Audience> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn line(message: &EngineMessage) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(message).expect("our messages are plain data");
    bytes.push(b'\n');
    bytes
}

/// The channel of the machine's thread.
pub fn orders() -> (Sender<Order>, Receiver<Order>) {
    channel()
}

/// Serves the control socket until the process ends.
pub fn serve(listener: UnixListener, orders: Sender<Order>, announcer: Announcer) -> io::Result<()> {
    let count = Arc::new(AtomicUsize::new(0));
    spawn("control", move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            if count.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
                count.fetch_sub(1, Ordering::AcqRel);
                continue;
            }
            let (orders, announcer, leaving) = (orders.clone(), announcer.clone(), Arc::clone(&count));
            let spawned = spawn("control-in", move || {
                // Whatever is wrong with a connection ends it; the guest does not notice.
                let _ = connection(&stream, &orders, &announcer);
                let _ = stream.shutdown(std::net::Shutdown::Both);
                leaving.fetch_sub(1, Ordering::AcqRel);
            });
            if spawned.is_err() {
                count.fetch_sub(1, Ordering::AcqRel);
            }
        }
    })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(work).map(drop)
}

/// Reads requests; a second thread writes what is sent back.
fn connection(stream: &UnixStream, orders: &Sender<Order>, announcer: &Announcer) -> io::Result<()> {
    stream.set_write_timeout(Some(STALLED))?;
    let (to, from) = sync_channel::<Vec<u8>>(WAITING_MAX);
    let mut writer = stream.try_clone()?;
    spawn("control-out", move || {
        while let Ok(bytes) = from.recv() {
            if writer.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = writer.shutdown(std::net::Shutdown::Both);
    })?;
    announcer.join(Listener { to: to.clone(), stream: stream.try_clone()? });
    let mut pending = Vec::new();
    let mut files: Vec<OwnedFd> = Vec::new();
    // So many messages come before the one that they belong to.
    let mut others = 0;
    let mut bytes = vec![0; 8 << 10];
    loop {
        let (count, descriptors) = receive_bytes(stream, &mut bytes)?;
        if count == 0 {
            return Ok(());
        }
        pending.extend_from_slice(bytes.get(..count).unwrap_or_default());
        if !descriptors.is_empty() {
            // The kernel ends a read behind the bytes that descriptors came with: they belong to the message of the last byte.
            let ends = pending.iter().filter(|byte| **byte == b'\n').count();
            others = ends - usize::from(pending.ends_with(b"\n"));
            files.extend(descriptors);
        }
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let request: EngineRequest = serde_json::from_slice(pending.get(..end).unwrap_or_default())?;
            pending.drain(..=end);
            let files = if others == 0 { std::mem::take(&mut files) } else { Vec::new() };
            others = others.saturating_sub(1);
            let answer = Answer { id: request.id, to: to.clone() };
            orders.send(Order::Request { action: request.action, files, answer }).map_err(io::Error::other)?;
        }
        if pending.len() > MESSAGE_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::AsFd};

    use super::*;
    use crate::{
        types::Id,
        wire::{Observed, PROTOCOL, send_bytes},
    };

    fn hello() -> Hello {
        Hello {
            protocol: PROTOCOL,
            version: String::new(),
            guest: Id::random(),
            pid: 1,
            observed: Observed::Running,
            started_ms: 0,
            cd_present: false,
            addresses: Vec::new(),
            crashed: false,
            agent: None,
            balloon_bytes: 0,
            plugged: None,
        }
    }

    fn socket(folder: &tempfile::TempDir) -> (UnixListener, UnixStream) {
        let path = folder.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (listener, client)
    }

    #[test]
    fn a_file_goes_to_the_request_that_it_came_with() {
        let folder = tempfile::tempdir().unwrap();
        let (listener, client) = socket(&folder);
        let file = tempfile::tempfile().unwrap();
        let request = |id: u64, action: EngineAction| {
            let mut bytes = serde_json::to_vec(&EngineRequest { id, action }).unwrap();
            bytes.push(b'\n');
            bytes
        };
        // All of them wait when the engine looks for the first time, and are read as one as far as the kernel likes.
        for id in 0..3 {
            send_bytes(&client, &request(2 * id, EngineAction::Statistics), &[]).unwrap();
            send_bytes(&client, &request(2 * id + 1, EngineAction::ChangeCd), &[file.as_fd()]).unwrap();
        }
        let (orders, inbox) = orders();
        serve(listener, orders, Announcer::new(hello())).unwrap();
        for number in 0..6 {
            let Ok(Order::Request { action, files, .. }) = inbox.recv_timeout(Duration::from_secs(20)) else {
                panic!("request {number} did not come");
            };
            let with_file = matches!(action, EngineAction::ChangeCd);
            assert_eq!((files.len(), number % 2 == 1), (usize::from(with_file), with_file), "request {number}");
        }
    }

    #[test]
    fn a_listener_that_misses_news_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let (listener, mut client) = socket(&folder);
        let announcer = Announcer::new(hello());
        serve(listener, orders().0, announcer.clone()).unwrap();
        // Until it has joined.
        client.read_exact(&mut [0]).unwrap();
        let news = EngineMessage::Addresses(vec!["10.0.0.1".repeat(1000)]);
        for _ in 0..10 * WAITING_MAX {
            announcer.say(|_| {}, &news);
        }
        assert!(announcer.lock().listeners.is_empty());
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).unwrap();
        assert!(rest.len() < 10 * WAITING_MAX * 8000);
    }
}
