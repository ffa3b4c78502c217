//! A small blocking HTTP/1.1 client: over the server's Unix socket, or over TLS with the server's own certificate authority.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde::{Serialize, de::DeserializeOwned};

use super::{Failure, Outcome};

/// The variable that holds the token for `--url`.
pub const TOKEN_VARIABLE: &str = "INNKEEPER_TOKEN";
/// The longest head of an answer that is read.
const HEAD_BYTES_MAX: u64 = 64 << 10;
/// The longest answer that is kept in memory: screenshots and scrollback are well below.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an answer may take; what takes longer is a task.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
const COPY_BYTES: usize = 256 << 10;

/// Where the server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Socket(PathBuf),
    Url(Url),
}

/// `https://HOST[:PORT]`, with what proves both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    pub host: String,
    pub port: u16,
    pub ca: PathBuf,
    pub token: String,
}

/// Speaks to one server; each request has a connection of its own.
pub struct Client {
    target: Target,
    tls: Option<Arc<ClientConfig>>,
}

/// A connection to the server, before or after HTTP.
pub enum Stream {
    Unix(UnixStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

/// An answer whose body has been read.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub content_type: String,
    pub body: Vec<u8>,
}

impl Url {
    /// Errors: not `https`, or with a path, a user or no host.
    pub fn parse(text: &str, ca: PathBuf, token: String) -> Outcome<Url> {
        let usage = |why: &str| Failure::Usage(format!("--url {text}: {why}"));
        let rest = text.strip_prefix("https://").ok_or_else(|| usage("the address starts with https://"))?;
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains(['/', '@', '?', '#', ' ']) {
            return Err(usage("only https://HOST:PORT is possible, without a path or a user"));
        }
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => {
                (host, port.parse().map_err(|_| usage("the port is not a number up to 65535"))?)
            }
            _ => (authority, 443),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() { Err(usage("it names no host")) } else { Ok(Url { host, port, ca, token }) }
    }

    fn host_header(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl Client {
    pub fn new(target: Target) -> Outcome<Client> {
        let tls = match &target {
            Target::Socket(_) => None,
            Target::Url(url) => Some(Arc::new(tls_config(&url.ca)?)),
        };
        Ok(Client { target, tls })
    }

    /// A new connection, for one request or for a WebSocket.
    pub fn connect(&self) -> Outcome<Stream> {
        match &self.target {
            Target::Socket(path) => connect_socket(path),
            Target::Url(url) => {
                let config = self.tls.clone().ok_or_else(|| Failure::failed("no TLS settings"))?;
                connect_tls(url, config)
            }
        }
    }

    /// The headers that every request has: `Host`, and the token where there is one.
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        match &self.target {
            Target::Socket(_) => vec![("Host", "localhost".into())],
            Target::Url(url) => {
                vec![("Host", url.host_header()), ("Authorization", format!("Bearer {}", url.token))]
            }
        }
    }

    /// Fetches a JSON value.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Outcome<T> {
        self.request("GET", path, None)?.good()?.json()
    }

    /// Fetches bytes as they are.
    pub fn get_bytes(&self, path: &str) -> Outcome<Vec<u8>> {
        Ok(self.request("GET", path, None)?.good()?.body)
    }

    /// Sends a JSON value; the answer is good or an error.
    pub fn send(&self, method: &str, path: &str, value: &impl Serialize) -> Outcome<Answer> {
        let body = serde_json::to_vec(value).map_err(|error| Failure::failed(error.to_string()))?;
        self.request(method, path, Some(body))?.good()
    }

    /// A request with an optional JSON body; any answer.
    pub fn request(&self, method: &str, path: &str, body: Option<Vec<u8>>) -> Outcome<Answer> {
        let body = body.unwrap_or_default();
        let length = body.len() as u64;
        self.exchange(method, path, "application/json", &mut body.as_slice(), length, &mut |_| {})
    }

    /// Sends `length` bytes of `body` as they are, telling `progress` how many have gone.
    pub fn upload(
        &self,
        method: &str,
        path: &str,
        body: &mut dyn Read,
        length: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Outcome<Answer> {
        self.exchange(method, path, "application/octet-stream", body, length, progress)?.good()
    }

    fn exchange(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: &mut dyn Read,
        length: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Outcome<Answer> {
        let mut stream = self.connect()?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT));
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nAccept: application/json\r\n");
        for (name, value) in self.headers() {
            head += &format!("{name}: {value}\r\n");
        }
        if length > 0 {
            head += &format!("Content-Type: {kind}\r\n");
        }
        if length > 0 || method != "GET" {
            head += &format!("Content-Length: {length}\r\n");
        }
        head += "\r\n";
        let sent = stream.write_all(head.as_bytes()).and_then(|()| copy(body, &mut stream, length, progress));
        // A server that refuses answers before it has read everything: its answer says more than the broken pipe.
        match (read_answer(&mut BufReader::new(&mut stream)), sent) {
            (Ok(answer), _) => Ok(answer),
            (Err(_), Err(error)) => Err(Failure::failed(format!("The server took no more of the request: {error}."))),
            (Err(error), Ok(())) => Err(Failure::failed(format!("The server's answer cannot be read: {error}."))),
        }
    }
}

impl Answer {
    /// The answer when it is a success; otherwise the server's sentence.
    pub fn good(self) -> Outcome<Answer> {
        if (200..300).contains(&self.status) { Ok(self) } else { Err(self.failure()) }
    }

    pub fn json<T: DeserializeOwned>(&self) -> Outcome<T> {
        serde_json::from_slice(&self.body).map_err(|error| {
            Failure::failed(format!("The server answered what this version does not understand: {error}."))
        })
    }

    fn failure(&self) -> Failure {
        #[derive(serde::Deserialize)]
        struct Problem {
            title: Option<String>,
            detail: Option<String>,
            field: Option<String>,
        }
        let problem = serde_json::from_slice::<Problem>(&self.body).ok();
        let text = match problem {
            Some(Problem { detail: Some(detail), field: Some(field), .. }) => format!("{field}: {detail}"),
            Some(Problem { detail: Some(detail), .. }) => detail,
            Some(Problem { title: Some(title), .. }) => title,
            _ => format!("The server answered {} without saying why.", self.status),
        };
        Failure::Answered { status: self.status, text }
    }
}

impl Stream {
    /// How long a read may wait. A failure to set it only means waiting longer.
    fn set_read_timeout(&self, timeout: Option<Duration>) {
        let _ = match self {
            Stream::Unix(stream) => stream.set_read_timeout(timeout),
            Stream::Tls(stream) => stream.sock.set_read_timeout(timeout),
        };
    }

    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.set_nonblocking(on),
            Stream::Tls(stream) => stream.sock.set_nonblocking(on),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tls(stream) => stream.sock.as_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.read(into),
            Stream::Tls(stream) => match stream.read(into) {
                // The server closed without close_notify: lengths and chunks already say what is complete.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
                other => other,
            },
        }
    }
}

impl Write for Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.write(from),
            Stream::Tls(stream) => stream.write(from),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.flush(),
            Stream::Tls(stream) => stream.flush(),
        }
    }
}

/// Text as one component of a path or a value of a query.
pub fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(byte));
        } else {
            out += &format!("%{byte:02X}");
        }
    }
    out
}

fn connect_socket(path: &Path) -> Outcome<Stream> {
    UnixStream::connect(path).map(Stream::Unix).map_err(|error| {
        let shown = path.display();
        Failure::failed(match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => format!(
                "No Innkeeper answers at {shown}. Start it with \"innkeeper serve\", or name its state directory with --state DIR."
            ),
            io::ErrorKind::PermissionDenied => {
                format!("You may not use {shown}. Be root or a member of the group innkeeper, or use --url with a token.")
            }
            _ => format!("Cannot connect to {shown}: {error}."),
        })
    })
}

fn connect_tls(url: &Url, config: Arc<ClientConfig>) -> Outcome<Stream> {
    let named = url.host_header();
    let failed = |error: &dyn std::fmt::Display| Failure::failed(format!("Cannot connect to {named}: {error}."));
    let name = ServerName::try_from(url.host.clone()).map_err(|error| failed(&error))?;
    let mut last = None;
    for address in (url.host.as_str(), url.port).to_socket_addrs().map_err(|error| failed(&error))? {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(socket) => {
                let session = ClientConnection::new(config, name).map_err(|error| failed(&error))?;
                return Ok(Stream::Tls(Box::new(StreamOwned::new(session, socket))));
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or_else(|| failed(&"the name has no address"), |error| failed(&error)))
}

fn tls_config(ca: &Path) -> Outcome<ClientConfig> {
    let cannot = |error: &dyn std::fmt::Display| Failure::Usage(format!("--ca {}: {error}", ca.display()));
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).map_err(|error| cannot(&error))? {
        roots.add(certificate.map_err(|error| cannot(&error))?).map_err(|error| cannot(&error))?;
    }
    if roots.is_empty() {
        return Err(cannot(&"there is no certificate in it"));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(versions.map_err(|error| cannot(&error))?.with_root_certificates(roots).with_no_client_auth())
}

fn copy(from: &mut dyn Read, to: &mut Stream, length: u64, progress: &mut dyn FnMut(u64)) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut done = 0;
    while done < length {
        let got = from.read(&mut buffer)?;
        if got == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was read"));
        }
        let take = got.min(usize::try_from(length - done).unwrap_or(got));
        to.write_all(buffer.get(..take).unwrap_or_default())?;
        done += take as u64;
        progress(done);
    }
    to.flush()
}

fn read_answer(from: &mut impl BufRead) -> io::Result<Answer> {
    loop {
        let answer = read_one_answer(from)?;
        if answer.status >= 200 {
            return Ok(answer); // 100 Continue and its like come before the real one
        }
    }
}

fn read_one_answer(from: &mut impl BufRead) -> io::Result<Answer> {
    let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut head = from.by_ref().take(HEAD_BYTES_MAX);
    let first = read_line(&mut head)?;
    let status: u16 = first
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1))
        .and_then(|code| code.parse().ok())
        .ok_or_else(|| bad("not an HTTP answer"))?;
    let (mut length, mut chunked, mut content_type) = (None, false, String::new());
    loop {
        let line = read_line(&mut head)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or_else(|| bad("a header without a colon"))?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.parse::<u64>().map_err(|_| bad("a wrong Content-Length"))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = value.eq_ignore_ascii_case("chunked");
        } else if name.eq_ignore_ascii_case("content-type") {
            value.clone_into(&mut content_type);
        }
    }
    let body = match (chunked, length) {
        _ if status < 200 || status == 204 || status == 304 => Vec::new(),
        (true, _) => read_chunks(from)?,
        (false, Some(length)) => read_exactly(from, length)?,
        (false, None) => {
            let mut body = Vec::new();
            from.take(ANSWER_BYTES_MAX).read_to_end(&mut body)?;
            body
        }
    };
    Ok(Answer { status, content_type, body })
}

fn read_line(from: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line)?;
    match line.strip_suffix(b"\n") {
        None => Err(io::ErrorKind::UnexpectedEof.into()),
        Some(line) => Ok(String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line)).into_owned()),
    }
}

fn read_exactly(from: &mut impl Read, length: u64) -> io::Result<Vec<u8>> {
    if length > ANSWER_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is too long"));
    }
    let mut body = Vec::new();
    from.take(length).read_to_end(&mut body)?;
    if body.len() as u64 == length { Ok(body) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn read_chunks(from: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = read_line(&mut from.by_ref().take(HEAD_BYTES_MAX))?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size =
            u64::from_str_radix(size, 16).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a wrong chunk"))?;
        if size == 0 {
            while !read_line(&mut from.by_ref().take(HEAD_BYTES_MAX))?.is_empty() {}
            return Ok(body);
        }
        if (body.len() as u64).saturating_add(size) > ANSWER_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is too long"));
        }
        body.extend(read_exactly(from, size)?);
        read_line(&mut from.by_ref().take(HEAD_BYTES_MAX))?;
    }
}

/// Opens a file to upload. Errors name it: absent, a directory, not readable.
pub fn open_upload(path: &Path) -> Outcome<(File, u64)> {
    let cannot = |why: &dyn std::fmt::Display| Failure::failed(format!("Cannot read {}: {why}.", path.display()));
    let file = File::open(path).map_err(|error| cannot(&error))?;
    let about = file.metadata().map_err(|error| cannot(&error))?;
    if about.is_file() { Ok((file, about.len())) } else { Err(cannot(&"it is not a regular file")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_by_length_by_chunks_and_to_the_end() {
        let cases: [(&str, &str); 4] = [
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloXX", "hello"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", "hello"),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nhello", "hello"),
            ("HTTP/1.1 204 No Content\r\n\r\n", ""),
        ];
        for (wire, body) in cases {
            assert_eq!(read_answer(&mut wire.as_bytes()).unwrap().body, body.as_bytes(), "{wire}");
        }
    }

    #[test]
    fn a_broken_answer_is_an_error() {
        for wire in [
            "",
            "SSH-2.0-x\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
            "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        ] {
            assert!(read_answer(&mut wire.as_bytes()).is_err(), "{wire}");
        }
    }

    #[test]
    fn the_servers_sentence_reaches_the_person() {
        let wire =
            "HTTP/1.1 422 x\r\n\r\n{\"title\":\"t\",\"detail\":\"A guest has 1 to 64 vCPUs.\",\"field\":\"cpus\"}";
        let failure = read_answer(&mut wire.as_bytes()).unwrap().good().unwrap_err();
        assert_eq!(failure.to_string(), "cpus: A guest has 1 to 64 vCPUs.");
    }

    #[test]
    fn addresses_are_https_and_nothing_more() {
        let parse = |text: &str| Url::parse(text, "ca.pem".into(), String::new());
        let good = parse("https://host.lan:8443/").unwrap();
        assert_eq!((good.host.as_str(), good.port, good.host_header().as_str()), ("host.lan", 8443, "host.lan:8443"));
        let six = parse("https://[fd00::1]:8443").unwrap();
        assert_eq!((six.host.as_str(), six.host_header().as_str()), ("fd00::1", "[fd00::1]:8443"));
        assert_eq!(parse("https://[fd00::1]").unwrap().port, 443);
        for bad in ["http://h", "https://", "https://h/x", "https://u@h", "https://h:99999"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn odd_names_cannot_leave_their_place_in_a_path() {
        assert_eq!(encode("a/b?c d.iso"), "a%2Fb%3Fc%20d.iso");
    }
}
