//! A server of its own for each test: the web role on a port of its own with a temporary state directory and a made-up supervisor.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use innkeeper::{
    admin,
    error::ErrorKind,
    state_files::{HOST_FOLDER, Owner, prepare_state},
    web::role::{self, WebRole},
    wire::{
        self, Attachment, Finding, HostAnswer, HostCall, HostMessage, HostRefusal, HostRequest, NetworkStatus, Place,
        Verdict,
    },
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

pub type HostAnswered = Result<(HostAnswer, Vec<OwnedFd>), HostRefusal>;

/// Waits until `true`; says what was waited for when it does not come.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub struct TestApp {
    pub port: u16,
    pub state: Arc<tempfile::TempDir>,
    /// What the supervisor was asked.
    pub asked: Arc<Mutex<Vec<HostRequest>>>,
    server: Option<JoinHandle<innkeeper::error::Result<()>>>,
    hostd: Option<OwnedFd>,
    hostd_thread: Option<JoinHandle<()>>,
}

impl TestApp {
    pub fn start() -> TestApp {
        TestApp::on(Arc::new(tempfile::tempdir().unwrap()), usual_host)
    }

    /// A server with a supervisor that answers as `host` says.
    pub fn with_host(host: impl Fn(&HostRequest, &Path) -> HostAnswered + Send + 'static) -> TestApp {
        TestApp::on(Arc::new(tempfile::tempdir().unwrap()), host)
    }

    fn on(
        state: Arc<tempfile::TempDir>,
        host: impl Fn(&HostRequest, &Path) -> HostAnswered + Send + 'static,
    ) -> TestApp {
        let run_dir = state.path().join("run");
        fs::create_dir_all(&run_dir).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let _ = fs::remove_file(run_dir.join("api.sock"));
        let api = UnixListener::bind(run_dir.join("api.sock")).unwrap();
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let hostd_thread = std::thread::spawn({
            let (far, asked, state) = (far.try_clone().unwrap(), Arc::clone(&asked), state.path().to_owned());
            move || supervise(&far, &asked, &state, host)
        });
        let role = WebRole { state_dir: state.path().to_owned(), run_dir, hostd: near, listener, api, announce: false };
        let server = Some(std::thread::spawn(move || role::run(role)));
        TestApp { port, state, asked, server, hostd: Some(far), hostd_thread: Some(hostd_thread) }
    }

    /// As under root's supervisor, where the files of the state are the service user's and `admin` becomes that user.
    pub fn give_state_to_its_user(&self) {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        prepare_state(self.state.path()).unwrap();
        let Owner { user, group } = Owner::service();
        for entry in fs::read_dir(self.state.path()).unwrap() {
            let path = entry.unwrap().path();
            if !path.ends_with(HOST_FOLDER) {
                std::os::unix::fs::chown(&path, Some(user), Some(group)).unwrap();
            }
        }
    }

    /// Ends the server as the end of its supervisor does; how long that took.
    pub fn stop(&mut self) -> Duration {
        let begun = Instant::now();
        if let Some(hostd) = self.hostd.take() {
            let _ = rustix::net::shutdown(&hostd, rustix::net::Shutdown::Both);
        }
        if let Some(server) = self.server.take() {
            server.join().expect("the server did not panic").expect("the server ended in order");
        }
        if let Some(thread) = self.hostd_thread.take() {
            let _ = thread.join();
        }
        begun.elapsed()
    }

    /// Ends the server and starts another on the same state, on another port.
    pub fn restart(mut self) -> TestApp {
        self.stop();
        TestApp::on(Arc::clone(&self.state), usual_host)
    }

    /// Ends the server and starts another on the same state, with another supervisor.
    pub fn restart_with(mut self, host: impl Fn(&HostRequest, &Path) -> HostAnswered + Send + 'static) -> TestApp {
        self.stop();
        TestApp::on(Arc::clone(&self.state), host)
    }

    /// The supervisor's end of its socket, to say what it was not asked.
    pub fn hostd_socket(&self) -> OwnedFd {
        self.hostd.as_ref().unwrap().try_clone().unwrap()
    }

    /// A client that is nobody yet.
    pub fn client(&self) -> Client {
        let ca = self.state.path().join("tls/ca.pem");
        eventually("the certificate authority", || ca.exists());
        Client::new(self.port, &fs::read(ca).unwrap())
    }

    /// A client that is logged in as the administrator "ada".
    pub fn administrator(&self) -> Client {
        let mut client = self.client();
        client.get("/login");
        if client.get("/login").location() == Some("/setup") {
            let token = admin::setup_token(self.state.path()).unwrap();
            let fields =
                [("token", token.as_str()), ("name", "ada"), ("password", PASSWORD), ("password_again", PASSWORD)];
            let answer = client.post("/setup", &fields);
            assert_eq!(answer.status, 303, "{}", answer.text());
        } else {
            client.log_in("ada", PASSWORD);
        }
        client
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.state.path().join(name)
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        }
    }
}

pub const PASSWORD: &str = "correct horse";

/// A supervisor on a good host, without engines.
pub fn usual_host(request: &HostRequest, state: &Path) -> HostAnswered {
    let open = |path: PathBuf| match fs::File::open(&path) {
        Ok(file) => Ok((HostAnswer::File { size_bytes: file.metadata().unwrap().len() }, vec![OwnedFd::from(file)])),
        Err(error) => {
            Err(HostRefusal { kind: ErrorKind::NotFound, message: format!("Cannot open {}: {error}.", path.display()) })
        }
    };
    match request {
        HostRequest::StartEngine(_) | HostRequest::KillEngine(_) => Ok((HostAnswer::Done, vec![])),
        HostRequest::ListEngines => Ok((HostAnswer::Engines(vec![]), vec![])),
        HostRequest::OpenFile(Place::Image(id)) => open(state.join(format!("images/{id}.raw"))),
        HostRequest::OpenFile(Place::Disk(id)) => open(state.join(format!("disks/{id}.raw"))),
        HostRequest::OpenFile(Place::Host(path)) => open(path.clone()),
        HostRequest::OpenDisk { disk, .. } => open(state.join(format!("disks/{disk}.raw"))),
        HostRequest::ConnectNetwork { attachment: Attachment::Bridge(name), .. } => {
            Err(HostRefusal { kind: ErrorKind::Invalid, message: format!("There is no bridge {name} here.") })
        }
        HostRequest::ConnectNetwork { .. } => {
            let queue = || OwnedFd::from(fs::File::open("/dev/null").unwrap());
            Ok((HostAnswer::Done, vec![queue(), queue()]))
        }
        HostRequest::OpenSuspend(id) => {
            let file = fs::File::create(state.join(format!("guests/{id}/suspended.part"))).unwrap();
            Ok((HostAnswer::File { size_bytes: 0 }, vec![OwnedFd::from(file)]))
        }
        HostRequest::NetworkStatus => Ok((HostAnswer::NetworkStatus(NetworkStatus::default()), vec![])),
        HostRequest::FirmwareStatus => Ok((HostAnswer::FirmwareStatus { uefi: true }, vec![])),
        HostRequest::Doctor => Ok((
            HostAnswer::Findings(vec![Finding {
                id: "kvm".into(),
                title: "KVM".into(),
                verdict: Verdict::Ok,
                detail: "/dev/kvm answers".into(),
                remedy: String::new(),
                essential: true,
            }]),
            vec![],
        )),
    }
}

fn supervise(
    socket: &OwnedFd,
    asked: &Mutex<Vec<HostRequest>>,
    state: &Path,
    host: impl Fn(&HostRequest, &Path) -> HostAnswered,
) {
    while let Ok(Some((call, _))) = wire::receive::<HostCall>(socket) {
        asked.lock().unwrap().push(call.request.clone());
        let (result, fds) = match host(&call.request, state) {
            Ok((answer, fds)) => (Ok(answer), fds),
            Err(refusal) => (Err(refusal), vec![]),
        };
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        if wire::send(socket, &HostMessage::Answer { seq: call.seq, result }, &borrowed).is_err() {
            break;
        }
    }
}

/// An HTTPS client that trusts the server's authority, follows no redirects and keeps its cookie.
pub struct Client {
    agent: ureq::Agent,
    pub port: u16,
    pub cookie: Option<String>,
    pub csrf: String,
}

/// A TLS connection without HTTP, for what no client would send.
pub type RawConnection = rustls::StreamOwned<rustls::ClientConnection, std::net::TcpStream>;

/// What came back.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
    pub fn location(&self) -> Option<&str> {
        self.header("location")
    }
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

impl Client {
    pub fn new(port: u16, ca_pem: &[u8]) -> Client {
        let ca = ureq::tls::Certificate::from_pem(ca_pem).unwrap();
        let tls = ureq::tls::TlsConfig::builder().root_certs(ureq::tls::RootCerts::new_with_certs(&[ca])).build();
        let agent = ureq::Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .timeout_global(Some(Duration::from_secs(20)))
            .build()
            .into();
        Client { agent, port, cookie: None, csrf: String::new() }
    }

    pub fn log_in(&mut self, name: &str, password: &str) {
        let answer = self.post("/login", &[("name", name), ("password", password)]);
        assert_eq!(answer.status, 303, "{}", answer.text());
    }

    /// Sends anything; keeps the cookie of the answer and reads the token of its page.
    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut request =
            ureq::http::Request::builder().method(method).uri(format!("https://localhost:{}{path}", self.port));
        if let Some(cookie) = &self.cookie {
            request = request.header("cookie", cookie);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = if body.is_empty() && method == "GET" {
            self.agent.run(request.body(()).unwrap())
        } else {
            self.agent.run(request.body(body).unwrap())
        };
        let mut answer = answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let headers =
            answer.headers().iter().map(|(key, value)| (key.to_string(), value.to_str().unwrap().to_owned())).collect();
        let body = answer.body_mut().with_config().limit(64 << 20).read_to_vec().unwrap();
        let answer = Answer { status: answer.status().as_u16(), headers, body };
        if let Some(cookie) = answer.header("set-cookie") {
            self.cookie = Some(cookie.split(';').next().unwrap().to_owned());
        }
        if let Some((_, after)) = answer.text().split_once("name=\"csrf\" value=\"") {
            self.csrf = after.split('"').next().unwrap().to_owned();
        }
        answer
    }

    pub fn get(&mut self, path: &str) -> Answer {
        self.send("GET", path, &[], &[])
    }

    /// A form as a browser sends it: with `Origin` and the token of the last page.
    pub fn post(&mut self, path: &str, fields: &[(&str, &str)]) -> Answer {
        let mut body = format!("csrf={}", escape(&self.csrf));
        for (name, value) in fields {
            body += &format!("&{name}={}", escape(value));
        }
        let origin = format!("https://localhost:{}", self.port);
        let headers = [("origin", origin.as_str()), ("content-type", "application/x-www-form-urlencoded")];
        self.send("POST", path, &headers, body.as_bytes())
    }

    /// A JSON request as the page's script sends it.
    pub fn call(&mut self, method: &str, path: &str, json: &serde_json::Value) -> Answer {
        let (origin, csrf) = (format!("https://localhost:{}", self.port), self.csrf.clone());
        let headers =
            [("origin", origin.as_str()), ("x-csrf-token", csrf.as_str()), ("content-type", "application/json")];
        self.send(method, path, &headers, json.to_string().as_bytes())
    }
}

impl Client {
    /// A connection on which the test speaks for itself.
    pub fn raw(app: &TestApp) -> RawConnection {
        connect_tls(app.port, &app.path("tls/ca.pem"))
    }

    /// The beginning of a request of this login.
    pub fn head(&self, method: &str, path: &str, more: &str) -> String {
        let (port, cookie, csrf) = (self.port, self.cookie.as_deref().unwrap_or(""), &self.csrf);
        format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost:{port}\r\nCookie: {cookie}\r\nX-CSRF-Token: {csrf}\r\n{more}\r\n"
        )
    }

    /// Opens a stream of events; the returned connection has read past the head of the answer.
    pub fn stream(&self, app: &TestApp, path: &str) -> RawConnection {
        let mut connection = Client::raw(app);
        connection.write_all(self.head("GET", path, "").as_bytes()).unwrap();
        let head = read_until(&mut connection, "\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        connection
    }
}

/// A TLS connection to a server on this host that has a certificate of this authority.
pub fn connect_tls(port: u16, ca: &Path) -> RawConnection {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
    let connection = rustls::ClientConnection::new(config, "localhost".try_into().unwrap()).unwrap();
    let socket = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    rustls::StreamOwned::new(connection, socket)
}

/// Reads until `end` has come, byte by byte; what was read.
pub fn read_until(from: &mut impl Read, end: &str) -> String {
    let mut text = Vec::new();
    while !text.ends_with(end.as_bytes()) {
        let mut byte = [0];
        match from.read(&mut byte) {
            Ok(1) => text.push(byte[0]),
            other => panic!("{other:?} after {}", String::from_utf8_lossy(&text)),
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

pub fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
