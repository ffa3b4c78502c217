//! The server's end of an engine's control socket: the greeting, requests with their replies, and news in the engine's order.

use std::{collections::HashMap, io, os::fd::AsFd, os::fd::OwnedFd, path::Path, time::Duration};

use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    error::{Error, ErrorKind, Result},
    wire::{self, EngineAction, EngineMessage, EngineRequest, Hello, MESSAGE_BYTES_MAX, Observed, PROTOCOL},
};

/// An engine that lives greets at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a reply may take; a screenshot of a large screen takes a fraction of it.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest screenshot, with room to spare.
const PAYLOAD_BYTES_MAX: u64 = 64 << 20;
const REQUESTS_LEN_MAX: usize = 32;
/// News that wait for the supervisor; beyond this the engine waits.
const NEWS_LEN_MAX: usize = 64;
const READ_BYTES: usize = 64 << 10;

/// One connection to one engine. Cheap to clone; ends when the last clone and the receiver of its news are gone.
#[derive(Clone, Debug)]
pub struct EngineClient {
    requests: mpsc::Sender<Request>,
    /// How an engine of another protocol differs; such an engine is asked nothing.
    stranger: Option<String>,
}

#[derive(Debug)]
struct Request {
    action: EngineAction,
    descriptors: Vec<OwnedFd>,
    reply: Reply,
}

type Reply = oneshot::Sender<Result<Vec<u8>>>;

/// What a connection begins with.
pub struct Connected {
    pub client: EngineClient,
    pub hello: Hello,
    /// Closed when the connection ends.
    pub news: mpsc::Receiver<EngineMessage>,
}

impl EngineClient {
    /// Connects and waits for the greeting. Must be called inside a runtime.
    ///
    /// Errors: `Unavailable` when nobody listens or greets.
    pub async fn connect(socket: &Path) -> Result<Connected> {
        let silent = |why: &dyn std::fmt::Display| {
            Error::new(ErrorKind::Unavailable, "The engine does not answer.").because(why.to_string())
        };
        let stream = UnixStream::connect(socket).await.map_err(|error| silent(&error))?;
        let mut inbox = Inbox::default();
        let hello = timeout(HELLO_TIMEOUT, inbox.hello(&stream)).await.map_err(|error| silent(&error))?;
        let hello = hello.map_err(|error| silent(&error))?;
        let (requests, queue) = mpsc::channel(REQUESTS_LEN_MAX);
        let (tell, news) = mpsc::channel(NEWS_LEN_MAX);
        tokio::spawn(async move {
            if let Err(error) = converse(&stream, inbox, queue, tell).await {
                tracing::debug!(%error, "the connection to an engine broke");
            }
        });
        Ok(Connected { client: EngineClient { requests, stranger: stranger(hello.protocol) }, hello, news })
    }

    /// Why this engine is asked nothing, when it speaks another protocol.
    pub fn stranger(&self) -> Option<&str> {
        self.stranger.as_deref()
    }

    /// Asks the engine; the reply's payload.
    ///
    /// Errors: `Conflict` with the engine's own sentence, or when it speaks another protocol; `Unavailable` when it is silent.
    pub async fn call(&self, action: EngineAction, descriptors: impl IntoIterator<Item = OwnedFd>) -> Result<Vec<u8>> {
        self.call_within(REPLY_TIMEOUT, action, descriptors).await
    }

    /// The same for what the guest itself takes its time for.
    pub async fn call_within(
        &self,
        longest: Duration,
        action: EngineAction,
        descriptors: impl IntoIterator<Item = OwnedFd>,
    ) -> Result<Vec<u8>> {
        if let Some(stranger) = &self.stranger {
            return Err(Error::conflict(stranger.clone()));
        }
        let silent = || Error::new(ErrorKind::Unavailable, "The engine does not answer now; try again.");
        let (reply, replied) = oneshot::channel();
        let request = Request { action, descriptors: descriptors.into_iter().collect(), reply };
        let asked = async {
            self.requests.send(request).await.map_err(|_| silent())?;
            replied.await.map_err(|_| silent())?
        };
        timeout(longest, asked).await.map_err(|_| silent())?
    }
}

/// The sentence for an engine whose protocol this server does not speak. It speaks its own and the one before.
fn stranger(protocol: u32) -> Option<String> {
    let how = match protocol {
        PROTOCOL => return None,
        newer if newer > PROTOCOL => "newer",
        older if older + 1 == PROTOCOL && older > 0 => return None,
        _ => "much older",
    };
    Some(format!(
        "Its engine speaks a {how} protocol ({protocol}) than this server ({PROTOCOL}): the guest runs on and can be powered off, \
         but not be controlled otherwise until it is started again."
    ))
}

/// Carries requests and replies until either end closes.
async fn converse(
    stream: &UnixStream,
    mut inbox: Inbox,
    mut queue: mpsc::Receiver<Request>,
    tell: mpsc::Sender<EngineMessage>,
) -> io::Result<()> {
    let mut waiting: HashMap<u64, (EngineAction, Reply)> = HashMap::new();
    let mut last_id = 0;
    loop {
        while let Some(message) = inbox.take()? {
            match message {
                Incoming::News(message) => {
                    if tell.send(message).await.is_err() {
                        return Ok(());
                    }
                }
                Incoming::Reply { id, error, payload } => {
                    let Some((action, reply)) = waiting.remove(&id) else { continue };
                    // In the engine's own order with its news, so that an older word never overtakes a newer one.
                    if error.is_none()
                        && let Some(observed) = now_observed(&action)
                    {
                        let _ = tell.send(EngineMessage::State(observed)).await;
                    }
                    let _ = reply.send(error.map_or(Ok(payload), |text| Err(Error::conflict(text))));
                }
            }
        }
        tokio::select! {
            request = queue.recv() => {
                let Some(Request { action, descriptors, reply }) = request else { return Ok(()) };
                waiting.retain(|_, (_, reply)| !reply.is_closed());
                last_id += 1;
                send(stream, &EngineRequest { id: last_id, action: action.clone() }, &descriptors).await?;
                waiting.insert(last_id, (action, reply));
            }
            got = inbox.fill(stream) => if got? == 0 { return Ok(()) },
            () = tell.closed() => return Ok(()),
        }
    }
}

/// What a fulfilled request says about the engine's state.
fn now_observed(action: &EngineAction) -> Option<Observed> {
    match action {
        EngineAction::Pause => Some(Observed::Paused { reason: None }),
        EngineAction::Resume => Some(Observed::Running),
        EngineAction::Reset
        | EngineAction::PressPowerButton
        | EngineAction::PowerOff
        | EngineAction::Suspend
        | EngineAction::Freeze { .. }
        | EngineAction::Thaw
        | EngineAction::Balloon { .. }
        | EngineAction::LimitDisk { .. }
        | EngineAction::ChangeCd
        | EngineAction::AttachDisk(_)
        | EngineAction::AttachNetwork(_)
        | EngineAction::Detach(_)
        | EngineAction::Screenshot { .. }
        | EngineAction::Statistics => None,
    }
}

async fn send(stream: &UnixStream, request: &EngineRequest, descriptors: &[OwnedFd]) -> io::Result<()> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    stream.async_io(Interest::WRITABLE, || wire::send_bytes(stream, &line, &descriptors)).await
}

enum Incoming {
    News(EngineMessage),
    Reply { id: u64, error: Option<String>, payload: Vec<u8> },
}

/// Bytes that have arrived, cut into messages. Lines and payloads are bounded.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    /// A reply whose payload is still arriving.
    reply: Option<(u64, Option<String>, usize)>,
}

impl Inbox {
    /// Reads what is there; 0 at the end of the connection. Losing this future loses nothing.
    async fn fill(&mut self, stream: &UnixStream) -> io::Result<usize> {
        loop {
            stream.readable().await?;
            let mut chunk = [0; READ_BYTES];
            match stream.try_read(&mut chunk) {
                Ok(got) => {
                    self.bytes.extend_from_slice(chunk.get(..got).unwrap_or_default());
                    return Ok(got);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn hello(&mut self, stream: &UnixStream) -> io::Result<Hello> {
        loop {
            match self.take()? {
                Some(Incoming::News(EngineMessage::Hello(hello))) => return Ok(hello),
                Some(_) => {}
                None => {
                    if self.fill(stream).await? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
        }
    }

    /// The next whole message. Lines that are JSON but no message of this release are skipped.
    fn take(&mut self) -> io::Result<Option<Incoming>> {
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        loop {
            if let Some((id, error, length)) = self.reply.take() {
                if self.bytes.len() < length {
                    self.reply = Some((id, error, length));
                    return Ok(None);
                }
                let payload = self.bytes.drain(..length).collect();
                return Ok(Some(Incoming::Reply { id, error, payload }));
            }
            let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') else {
                return if self.bytes.len() > MESSAGE_BYTES_MAX { Err(bad("a line without an end")) } else { Ok(None) };
            };
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(EngineMessage::Reply { id, error, payload_bytes }) => {
                    if payload_bytes > PAYLOAD_BYTES_MAX {
                        return Err(bad("a payload that is too long"));
                    }
                    let length = usize::try_from(payload_bytes).map_err(|_| bad("a payload that is too long"))?;
                    self.reply = Some((id, error, length));
                }
                Ok(message) => return Ok(Some(Incoming::News(message))),
                Err(_) if serde_json::from_slice::<serde::de::IgnoredAny>(&line).is_ok() => {}
                Err(_) => return Err(bad("a line that is not JSON")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inbox(bytes: &[u8]) -> Inbox {
        Inbox { bytes: bytes.to_vec(), reply: None }
    }

    #[test]
    fn a_payload_is_not_read_as_lines() {
        let mut inbox = inbox(b"{\"reply\":{\"id\":3,\"error\":null,\"payload_bytes\":4}}\n{\n}\n\"reset\"\n{\"la");
        assert!(
            matches!(inbox.take(), Ok(Some(Incoming::Reply { id: 3, error: None, payload })) if payload == b"{\n}\n")
        );
        assert!(matches!(inbox.take(), Ok(Some(Incoming::News(EngineMessage::Reset)))));
        assert!(matches!(inbox.take(), Ok(None)));
    }

    #[test]
    fn what_a_newer_engine_adds_is_skipped_and_nonsense_is_not() {
        let mut newer = inbox(b"{\"weather\":\"fine\"}\n{\"state\":\"running\"}\n");
        assert!(matches!(newer.take(), Ok(Some(Incoming::News(EngineMessage::State(Observed::Running))))));
        assert!(inbox(b"SSH-2.0\n").take().is_err());
        assert!(inbox(&vec![b'x'; MESSAGE_BYTES_MAX + 1]).take().is_err());
        let huge = format!("{{\"reply\":{{\"id\":3,\"error\":null,\"payload_bytes\":{}}}}}\n", u64::MAX);
        assert!(inbox(huge.as_bytes()).take().is_err());
    }

    #[test]
    fn only_another_protocol_is_a_stranger() {
        assert_eq!(stranger(PROTOCOL), None);
        assert!(stranger(PROTOCOL + 1).unwrap().contains("newer"));
    }
}
