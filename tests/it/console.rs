//! Consoles as viewers meet them: WebSockets on the one side, an engine's sockets on the other.

use std::{
    io,
    net::TcpStream,
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use innkeeper::wire::EndKind;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{self, Message, WebSocket, client::IntoClientRequest};

use crate::{
    fake_engine::{Engine, Lab},
    support::{Client, eventually},
};

type Viewer = WebSocket<UnixStream>;

/// A running guest "a", and its engine.
fn running(lab: &Lab) -> (Client, Arc<Engine>) {
    let mut client = lab.administrator();
    let guest = json!({ "name": "a", "boot": { "kind": "test" }, "network": "none", "start": true });
    let made = client.call("POST", "/api/v1/guests", &guest);
    assert_eq!((made.status, &made.json()["state"]), (201, &json!("running")));
    let engine = lab.engine("a").unwrap();
    (client, engine)
}

fn view(lab: &Lab, what: &str) -> Viewer {
    let stream = UnixStream::connect(lab.app.path("run/api.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    tungstenite::client(format!("ws://localhost/api/v1/guests/a/{what}"), stream).unwrap().0
}

fn note(viewer: &mut Viewer) -> Value {
    match viewer.read().unwrap() {
        Message::Text(text) => serde_json::from_str(text.as_str()).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Reads bytes until there are `count`; other messages on the way are returned beside them.
fn bytes(viewer: &mut Viewer, count: usize) -> (Vec<u8>, Vec<Value>) {
    let (mut got, mut notes) = (Vec::new(), Vec::new());
    while got.len() < count {
        match viewer.read().unwrap() {
            Message::Binary(more) => got.extend_from_slice(&more),
            Message::Text(text) => notes.push(serde_json::from_str(text.as_str()).unwrap()),
            _ => {}
        }
    }
    (got, notes)
}

fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at % 251) as u8).collect()
}

#[test]
fn every_viewer_sees_everything_in_order_and_may_type() {
    let lab = Lab::start();
    let (_client, engine) = running(&lab);
    engine.print(b"before ");
    let (mut first, mut second) = (view(&lab, "serial"), view(&lab, "serial?from=3"));
    assert_eq!(note(&mut first), json!({ "offset": 0, "skipped": 0, "end": 7 }));
    assert_eq!(note(&mut second), json!({ "offset": 3, "skipped": 0, "end": 7 }));
    engine.print(b"after");
    assert_eq!(bytes(&mut first, 12).0, b"before after");
    assert_eq!(bytes(&mut second, 9).0, b"ore after");
    first.send(Message::binary(b"ro".to_vec())).unwrap();
    second.send(Message::text("ot\n")).unwrap();
    eventually("both have typed", || engine.typed().len() == 5);

    let all = pattern(3 << 20);
    engine.print(&all);
    assert!(bytes(&mut first, all.len()).0 == all, "3 MiB in order");
    assert!(bytes(&mut second, all.len()).0 == all);
}

#[test]
fn skipped_bytes_are_counted_to_the_viewer() {
    let lab = Lab::start();
    let (_client, engine) = running(&lab);
    engine.print(&pattern(1000));
    engine.forget(400);
    assert_eq!(note(&mut view(&lab, "serial?from=100")), json!({ "offset": 400, "skipped": 300, "end": 1000 }));
    let mut late = view(&lab, "serial");
    assert_eq!(note(&mut late), json!({ "offset": 400, "skipped": 0, "end": 1000 }));
    assert_eq!(bytes(&mut late, 600).0, pattern(1000)[400..]);
    assert_eq!(scrollback(&lab), pattern(1000)[400..]);
}

fn scrollback(lab: &Lab) -> Vec<u8> {
    lab.administrator().get("/api/v1/guests/a/scrollback").body
}

#[test]
fn a_viewer_that_stops_reading_holds_up_nobody() {
    let lab = Lab::start();
    let (_client, engine) = running(&lab);
    let mut stalled = view(&lab, "serial");
    let mut reading = view(&lab, "serial");
    let all = pattern(8 << 20);
    let begun = Instant::now();
    for chunk in all.chunks(64 << 10) {
        engine.print(chunk);
    }
    let (got, _) = bytes(&mut reading, all.len());
    assert!(got == all);
    assert!(begun.elapsed() < Duration::from_secs(20));
    // The stalled one is served when it reads again.
    assert_eq!(bytes(&mut stalled, all.len()).0.len(), all.len());
}

#[test]
fn the_screen_is_a_plain_pipe() {
    let lab = Lab::start();
    let (_client, _engine) = running(&lab);
    let mut screen = view(&lab, "vnc");
    assert_eq!(bytes(&mut screen, 12).0, b"RFB 003.008\n");
    let all = pattern(300_000);
    for chunk in all.chunks(1000) {
        screen.send(Message::binary(chunk.to_vec())).unwrap();
    }
    assert!(bytes(&mut screen, all.len()).0 == all, "back as it went");
}

#[test]
fn the_end_of_a_guest_is_said_on_its_console() {
    let lab = Lab::start();
    let (_client, engine) = running(&lab);
    let mut viewer = view(&lab, "serial");
    note(&mut viewer);
    engine.end(EndKind::Failed, "A triple fault, again and again.");
    assert_eq!(note(&mut viewer)["closed"], "The guest failed: A triple fault, again and again.");
    assert!(matches!(viewer.read(), Ok(Message::Close(_))));
    assert!(matches!(viewer.read(), Err(tungstenite::Error::ConnectionClosed)));
    let refused = tungstenite::client(
        "ws://localhost/api/v1/guests/a/serial",
        UnixStream::connect(lab.app.path("run/api.sock")).unwrap(),
    );
    match refused {
        Err(tungstenite::HandshakeError::Failure(tungstenite::Error::Http(answer))) => assert_eq!(answer.status(), 409),
        other => panic!("{:?}", other.map(|_| ())),
    }
}

#[test]
fn a_console_goes_on_after_a_restart_of_the_server() {
    let lab = Lab::start();
    let (_client, engine) = running(&lab);
    engine.print(b"one two ");
    let mut viewer = view(&lab, "serial");
    note(&mut viewer);
    assert_eq!(bytes(&mut viewer, 8).0, b"one two ");
    let lab = lab.restart();
    loop {
        match viewer.read() {
            Ok(Message::Close(_)) | Err(_) => break,
            Ok(Message::Text(text)) => assert!(!text.as_str().contains("closed"), "the guest lives: {text}"),
            Ok(_) => {}
        }
    }
    engine.print(b"three");
    let mut viewer = view(&lab, "serial?from=8");
    assert_eq!(note(&mut viewer)["offset"], 8);
    assert_eq!(bytes(&mut viewer, 5).0, b"three");
}

/// A WebSocket of a browser: over TLS, with a cookie and an origin.
fn browse(lab: &Lab, client: &Client, origin: &str) -> Result<WebSocket<impl io::Read + io::Write + use<>>, u16> {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(lab.app.path("tls/ca.pem")).unwrap() {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let session = rustls::ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
    let socket = TcpStream::connect(("127.0.0.1", lab.app.port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut request = format!("wss://localhost:{}/api/v1/guests/a/serial", lab.app.port).into_client_request().unwrap();
    request.headers_mut().insert("cookie", client.cookie.clone().unwrap().parse().unwrap());
    request.headers_mut().insert("origin", origin.parse().unwrap());
    match tungstenite::client(request, rustls::StreamOwned::new(session, socket)) {
        Ok((viewer, _)) => Ok(viewer),
        Err(tungstenite::HandshakeError::Failure(tungstenite::Error::Http(answer))) => Err(answer.status().as_u16()),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn only_our_own_pages_may_open_a_console_with_a_cookie() {
    let lab = Lab::start();
    let (client, engine) = running(&lab);
    engine.print(b"hello");
    for foreign in ["https://evil.example", "http://localhost", "null"] {
        assert_eq!(browse(&lab, &client, foreign).err(), Some(403), "{foreign}");
    }
    let mut own = browse(&lab, &client, &format!("https://localhost:{}", lab.app.port)).unwrap();
    assert!(matches!(own.read(), Ok(Message::Text(_))));
    assert!(matches!(own.read(), Ok(Message::Binary(bytes)) if bytes == "hello"));
}

#[test]
fn what_is_no_handshake_is_refused() {
    let lab = Lab::start();
    let (mut client, _engine) = running(&lab);
    assert_eq!(client.get("/api/v1/guests/a/serial").status, 422);
    assert_eq!(client.get("/api/v1/guests/b/serial").status, 404);
}
