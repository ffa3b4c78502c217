//! Consoles over WebSocket: the server is a bounded byte pipe between a viewer and the engine's sockets.
//!
//! The engine keeps the scrollback and never waits for a viewer; here nothing is kept. `serial.sock` speaks first one line of
//! JSON from us (`{"from":OFFSET}`), then frames from the engine: one byte of kind, a 32-bit little-endian length, the bytes.
//! Kind 0 becomes a binary message, kind 1 a text message. `vnc.sock` is plain RFB both ways.

use std::{cell::Cell, future::Future, io, rc::Rc, time::Duration};

use actix_web::{
    HttpRequest, HttpResponse,
    http::header,
    rt,
    web::{self, Data, Path, Payload, Query},
};
use futures_util::{SinkExt, StreamExt, stream::SplitSink};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    time::{Instant, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        handshake::derive_accept_key,
        protocol::{Role, WebSocketConfig},
    },
};
use tokio_util::{io::ReaderStream, sync::CancellationToken};

use super::{State, guard::Viewer, look_only::LookOnly};
use crate::{
    error::{Error, ErrorKind, Result},
    guests::{Socket, lifecycle, status::Status},
    store::users::Role as UserRole,
};

/// Each way between actix and the WebSocket.
const PIPE_BYTES: usize = 64 << 10;
/// The longest message of a viewer: a paste into the console.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// The longest frame of an engine.
const FRAME_BYTES_MAX: usize = 1 << 20;
/// A quiet console is tried this often, and given up after three times that.
const PING: Duration = Duration::from_secs(30);
/// How long the end of a guest may take to be known after its sockets closed.
const REASON: Duration = Duration::from_secs(2);
/// How long a viewer has to answer the closing handshake.
const CLOSING: Duration = Duration::from_secs(1);
/// Without a newer one, this is as much scrollback as an engine keeps, with room for the frames.
const SCROLLBACK_BYTES_MAX: usize = 4 << 20;
/// How long an engine may take to go on with its scrollback: one on a busy host is slow.
const SCROLLBACK_SILENCE: Duration = Duration::from_secs(20);

const FRAME_DATA: u8 = 0;
const FRAME_TEXT: u8 = 1;

type Viewing = WebSocketStream<DuplexStream>;
type ToViewer = SplitSink<Viewing, Message>;

pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/api/v1/guests/{id}/serial", web::get().to(serial))
        .route("/api/v1/guests/{id}/vnc", web::get().to(vnc))
        .route("/api/v1/guests/{id}/scrollback", web::get().to(scrollback));
}

#[derive(Deserialize)]
struct From {
    from: Option<u64>,
}

async fn serial(
    who: Viewer,
    state: Data<State>,
    id: Path<String>,
    query: Query<From>,
    request: HttpRequest,
    payload: Payload,
) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?.row.id;
    let mut engine = state.guests.connect(&guest, Socket::Serial).await?;
    let first = format!("{{\"from\":{}}}\n", query.from.map_or_else(|| "null".to_owned(), |from| from.to_string()));
    engine.write_all(first.as_bytes()).await.map_err(broken)?;
    let end = End::new(&who, &state, state.guests.watch(&guest)?);
    let typing = match who.role {
        UserRole::Viewer => Typing::Nothing,
        UserRole::Operator | UserRole::Administrator => Typing::All,
    };
    upgrade(&request, payload, move |viewing| carry(viewing, engine, Kind::Serial, typing, end))
}

async fn vnc(
    who: Viewer,
    state: Data<State>,
    id: Path<String>,
    request: HttpRequest,
    payload: Payload,
) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?.row.id;
    let engine = state.guests.connect(&guest, Socket::Vnc).await?;
    let end = End::new(&who, &state, state.guests.watch(&guest)?);
    let typing = match who.role {
        UserRole::Viewer => Typing::LookOnly(LookOnly::default()),
        UserRole::Operator | UserRole::Administrator => Typing::All,
    };
    upgrade(&request, payload, move |viewing| carry(viewing, engine, Kind::Vnc, typing, end))
}

/// What the serial console has kept, as plain bytes.
async fn scrollback(_: Viewer, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?.row.id;
    let bytes = read_scrollback(&state, &guest).await?;
    Ok(HttpResponse::Ok().content_type("application/octet-stream").body(bytes))
}

/// Errors: as `Guests::connect`.
pub async fn read_scrollback(state: &State, guest: &crate::types::Id) -> Result<Vec<u8>> {
    #[derive(Deserialize)]
    struct Note {
        offset: Option<u64>,
        end: Option<u64>,
    }
    let mut engine = match state.guests.connect(guest, Socket::Serial).await {
        Ok(engine) => engine,
        // What the guest said last is what people want to read when it is off.
        Err(error) if error.kind() == ErrorKind::Conflict => {
            return state.guests.last_scrollback(guest).await.ok_or(error);
        }
        Err(error) => return Err(error),
    };
    engine.write_all(b"{\"from\":null}\n").await.map_err(broken)?;
    let mut frames = Frames(BufReader::new(engine));
    let (mut bytes, mut next, mut end) = (Vec::new(), 0, None);
    while end.is_none_or(|end| next < end) && bytes.len() < SCROLLBACK_BYTES_MAX {
        match timeout(SCROLLBACK_SILENCE, frames.next()).await {
            Ok(Ok(Some(Frame::Data(data)))) => {
                next += data.len() as u64;
                bytes.extend_from_slice(&data);
            }
            Ok(Ok(Some(Frame::Text(text)))) => {
                if let Ok(note) = serde_json::from_str::<Note>(&text) {
                    next = note.offset.unwrap_or(next);
                    end = end.or(note.end);
                }
            }
            // The engine has ended: that is all there is.
            Ok(Ok(None) | Err(_)) => break,
            Err(silent) => return Err(broken(silent.into())),
        }
    }
    Ok(bytes)
}

fn broken(error: io::Error) -> Error {
    Error::new(ErrorKind::Unavailable, "The engine does not answer now; try again.").because(error)
}

/// Answers the handshake (RFC 6455 section 4.2) and runs `session` on the connection. Login and origin are checked before.
///
/// Errors: `Invalid` when this is no WebSocket handshake.
fn upgrade<S, F>(request: &HttpRequest, mut incoming: Payload, session: S) -> Result<HttpResponse>
where
    S: FnOnce(Viewing) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let text = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
    let key = text("sec-websocket-key");
    if !super::guard::is_websocket(request) || text("sec-websocket-version") != "13" || key.is_empty() {
        return Err(Error::new(ErrorKind::Invalid, "This address is a WebSocket (version 13)."));
    }
    let accept = derive_accept_key(key.as_bytes());
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let (outgoing, mut far) = tokio::io::split(far);
    rt::spawn(async move {
        while let Some(Ok(bytes)) = incoming.next().await {
            if far.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = far.shutdown().await; // the session sees the end of the stream
    });
    rt::spawn(async move {
        let limits = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX))
            .read_buffer_size(16 << 10)
            .write_buffer_size(0)
            .max_write_buffer_size(FRAME_BYTES_MAX + PIPE_BYTES);
        session(WebSocketStream::from_raw_socket(near, Role::Server, Some(limits)).await).await;
    });
    Ok(HttpResponse::SwitchingProtocols()
        .upgrade("websocket")
        .insert_header((header::SEC_WEBSOCKET_ACCEPT, accept))
        .streaming(ReaderStream::with_capacity(outgoing, PIPE_BYTES)))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Serial,
    Vnc,
}

/// What of a viewer's bytes reaches the guest.
enum Typing {
    All,
    Nothing,
    /// The screen, for people who may only look.
    LookOnly(LookOnly),
}

/// Why a console ends from our side.
struct End {
    /// The login or the server ended.
    ended: CancellationToken,
    server: CancellationToken,
    status: watch::Receiver<Status>,
}

impl End {
    fn new(who: &Viewer, state: &State, status: watch::Receiver<Status>) -> End {
        End { ended: who.ended.clone(), server: state.ending.clone(), status }
    }

    /// The sentence for the viewer, `said` by the engine when it said one; nothing when connecting again may help.
    async fn reason(mut self, said: Option<String>) -> Option<String> {
        if self.server.is_cancelled() {
            return None;
        }
        if self.ended.is_cancelled() {
            return Some("You are logged out.".to_owned());
        }
        let over = timeout(REASON, self.status.wait_for(|status| !status.state.is_live())).await;
        match over {
            Ok(Ok(status)) => Some(match (status.state, &status.reason) {
                (lifecycle::State::Failed, Some(reason)) => format!("The guest failed: {reason}"),
                _ => "The guest has stopped.".to_owned(),
            }),
            Ok(Err(_)) => Some("The guest was deleted.".to_owned()),
            Err(_) => said,
        }
    }
}

/// Which side ended a console.
enum Side {
    Viewer,
    /// With its reason, when it gave one.
    Engine(Option<String>),
    Server,
}

/// Carries bytes both ways until one side ends, then says why and closes.
async fn carry(viewing: Viewing, engine: UnixStream, kind: Kind, mut typing: Typing, end: End) {
    let (mut viewer, mut typed) = viewing.split();
    let (from_engine, mut to_engine) = engine.into_split();
    let heard = Rc::new(Cell::new(Instant::now()));
    let inwards = async {
        while let Some(Ok(message)) = typed.next().await {
            heard.set(Instant::now());
            if inward(message, &mut typing, &mut to_engine).await.is_err() {
                return Side::Engine(None);
            }
        }
        Side::Viewer
    };
    let outwards = async {
        match kind {
            Kind::Serial => outward_serial(from_engine, &mut viewer, &heard).await,
            Kind::Vnc => outward_vnc(from_engine, &mut viewer, &heard).await,
        }
    };
    // A slow viewer holds up `outwards` alone; dropping both ends them in any state.
    let side = {
        let (inwards, outwards) = (std::pin::pin!(inwards), std::pin::pin!(outwards));
        tokio::select! {
            side = inwards => side,
            side = outwards => side,
            () = end.ended.cancelled() => Side::Server,
        }
    };
    let reason = match side {
        Side::Viewer => return,
        Side::Engine(said) => end.reason(said).await,
        Side::Server => end.reason(None).await,
    };
    let closing = async {
        if let (Some(reason), Kind::Serial) = (reason, kind) {
            let text = serde_json::json!({ "closed": reason }).to_string();
            let _ = viewer.send(Message::text(text)).await;
        }
        let _ = viewer.send(Message::Close(None)).await;
        while let Some(Ok(_)) = typed.next().await {} // until the close was answered
    };
    let _ = timeout(CLOSING, closing).await;
}

async fn inward(message: Message, typing: &mut Typing, engine: &mut OwnedWriteHalf) -> io::Result<()> {
    let bytes = match message {
        Message::Binary(bytes) => bytes,
        Message::Text(text) => text.into(),
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_) => return Ok(()),
    };
    match typing {
        Typing::All => engine.write_all(&bytes).await,
        Typing::Nothing => Ok(()),
        Typing::LookOnly(filter) => {
            let passed = filter.filter(&bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
            engine.write_all(&passed).await
        }
    }
}

/// Until one side ends.
async fn outward_serial(engine: OwnedReadHalf, viewer: &mut ToViewer, heard: &Cell<Instant>) -> Side {
    let mut frames = Frames(BufReader::with_capacity(PIPE_BYTES, engine));
    loop {
        // Waiting for the first byte alone can be given up without losing anything.
        let message = match timeout(PING, frames.0.fill_buf()).await {
            Err(_) if heard.get().elapsed() > PING * 3 => return Side::Viewer,
            Err(_) => Message::Ping(Vec::new().into()),
            Ok(Err(_)) => return Side::Engine(None),
            Ok(Ok(_)) => match frames.next().await {
                Ok(Some(Frame::Data(bytes))) => Message::binary(bytes),
                Ok(Some(Frame::Text(text))) => match closed(&text) {
                    Some(reason) => return Side::Engine(Some(reason)),
                    None => Message::text(text),
                },
                Ok(None) | Err(_) => return Side::Engine(None),
            },
        };
        if viewer.send(message).await.is_err() {
            return Side::Viewer;
        }
    }
}

/// Why the engine ends the console. What became of the guest is known better here.
fn closed(note: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Note {
        closed: Option<String>,
    }
    serde_json::from_str::<Note>(note).ok()?.closed
}

/// As `outward_serial`.
async fn outward_vnc(mut engine: OwnedReadHalf, viewer: &mut ToViewer, heard: &Cell<Instant>) -> Side {
    let mut buffer = vec![0; PIPE_BYTES];
    loop {
        let message = match timeout(PING, engine.read(&mut buffer)).await {
            Err(_) if heard.get().elapsed() > PING * 3 => return Side::Viewer,
            Err(_) => Message::Ping(Vec::new().into()),
            Ok(Ok(0) | Err(_)) => return Side::Engine(None),
            Ok(Ok(got)) => Message::binary(buffer.get(..got).unwrap_or_default().to_vec()),
        };
        if viewer.send(message).await.is_err() {
            return Side::Viewer;
        }
    }
}

enum Frame {
    Data(Vec<u8>),
    Text(String),
}

/// The engine's frames, cut out of its stream.
struct Frames<R>(BufReader<R>);

impl<R: tokio::io::AsyncRead + Unpin> Frames<R> {
    /// Nothing at the end of the stream. Errors: a frame that is too long or cut short.
    async fn next(&mut self) -> io::Result<Option<Frame>> {
        loop {
            let kind = match self.0.read_u8().await {
                Ok(kind) => kind,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            };
            let length = usize::try_from(self.0.read_u32_le().await?).unwrap_or(usize::MAX);
            if length > FRAME_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that is too long"));
            }
            let mut bytes = vec![0; length];
            self.0.read_exact(&mut bytes).await?;
            match kind {
                FRAME_DATA => return Ok(Some(Frame::Data(bytes))),
                FRAME_TEXT => return Ok(Some(Frame::Text(String::from_utf8_lossy(&bytes).into_owned()))),
                _ => {} // of a newer engine
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix_rt::test]
    async fn frames_are_cut_where_their_lengths_say() {
        let wire = b"\x01\x02\x00\x00\x00{}\x07\x01\x00\x00\x00?\x00\x03\x00\x00\x00abc\x00\xff\xff\xff\xff";
        let mut frames = Frames(BufReader::new(wire.as_slice()));
        assert!(matches!(frames.next().await, Ok(Some(Frame::Text(text))) if text == "{}"));
        assert!(
            matches!(frames.next().await, Ok(Some(Frame::Data(bytes))) if bytes == b"abc"),
            "unknown kinds are skipped"
        );
        assert!(frames.next().await.is_err(), "4 GiB");
        assert!(matches!(Frames(BufReader::new(&b""[..])).next().await, Ok(None)));
        assert!(Frames(BufReader::new(&b"\x00\x03\x00\x00\x00a"[..])).next().await.is_err());
    }
}
