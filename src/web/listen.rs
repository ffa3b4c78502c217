//! The listeners: HTTPS with a redirect for plain HTTP on one port, and plain HTTP on the Unix socket for the command line.

use std::{io, net::TcpListener, os::unix::net::UnixListener, rc::Rc, time::Duration};

use actix_http::{HttpService, Request, Response, body::MessageBody};
use actix_rt::net::{TcpStream, UnixStream};
use actix_server::ServerBuilder;
use actix_service::{
    IntoServiceFactory, Service, ServiceFactory, ServiceFactoryExt, fn_factory, fn_service, map_config,
};
use actix_web::dev::AppConfig;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

/// How a request came in; `request.conn_data::<Connection>()`.
#[derive(Debug, Clone, Copy)]
pub enum Connection {
    Tls,
    /// Over the Unix socket, from this user.
    Host {
        uid: u32,
        gid: u32,
    },
}

/// A connection that says nothing, or not all of its head, is closed after this.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Pages come in bursts; consoles keep their own connection.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
const DISCONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// The first byte of a TLS handshake record, RFC 8446 section 5.1.
const TLS_HANDSHAKE: u8 = 0x16;
/// A plain request's head is read this far for its path and host.
const PLAIN_HEAD_BYTES_MAX: usize = 8 << 10;

/// Adds both listeners to the server. `app` makes one application a worker.
pub fn listen<F, I, S, B>(
    server: ServerBuilder,
    tcp: TcpListener,
    api: UnixListener,
    tls: ServerConfig,
    app: F,
) -> io::Result<ServerBuilder>
where
    F: Fn() -> I + Send + Clone + 'static,
    I: IntoServiceFactory<S, Request>,
    S: ServiceFactory<Request, Config = AppConfig> + 'static,
    S::Service: 'static,
    S::Error: Into<actix_web::Error> + 'static,
    S::InitError: std::fmt::Debug,
    S::Response: Into<Response<B>> + 'static,
    B: MessageBody + 'static,
{
    let over_tls = app.clone();
    // Connections that wait for a next request end at once when the server does.
    let (ending, api_ending) = (server.graceful_shutdown_signal(), server.graceful_shutdown_signal());
    server
        .listen("https", tcp, move || {
            let app = over_tls.clone();
            let (tls, ending) = (tls.clone(), ending.clone());
            fn_factory(move || {
                let ending = ending.clone();
                let app = app().into_factory().map_err(|error| error.into().error_response());
                let https = HttpService::build()
                    .keep_alive(KEEP_ALIVE)
                    .client_request_timeout(HEAD_TIMEOUT)
                    .client_disconnect_timeout(DISCONNECT_TIMEOUT)
                    .tcp_nodelay(true)
                    .graceful_shutdown_signal(move || notified(ending.clone()))
                    .on_connect_ext(|_, data| {
                        data.insert(Connection::Tls);
                    })
                    .finish(map_config(app, |()| AppConfig::default()))
                    .rustls_0_23(tls.clone())
                    .new_service(());
                async move {
                    let https = Rc::new(https.await?);
                    Ok::<_, ()>(fn_service(move |stream: TcpStream| {
                        let https = Rc::clone(&https);
                        async move {
                            match first_byte(&stream).await {
                                Some(TLS_HANDSHAKE) => {
                                    if let Err(error) = https.call(stream).await {
                                        tracing::debug!(?error, "a connection ended badly");
                                    }
                                }
                                Some(byte) if byte.is_ascii_uppercase() => redirect(stream).await,
                                _ => {}
                            }
                            Ok::<_, io::Error>(())
                        }
                    }))
                }
            })
        })?
        .listen_uds("api", api, move || {
            let app = app().into_factory().map_err(|error| error.into().error_response());
            let ending = api_ending.clone();
            let http = HttpService::build()
                .keep_alive(KEEP_ALIVE)
                .client_request_timeout(HEAD_TIMEOUT)
                .graceful_shutdown_signal(move || notified(ending.clone()))
                .on_connect_ext(|stream: &UnixStream, data| {
                    // Without credentials there is no `Connection::Host`, and so nobody comes in.
                    if let Ok(peer) = stream.peer_cred() {
                        data.insert(Connection::Host { uid: peer.uid(), gid: peer.gid() });
                    }
                })
                .finish(map_config(app, |()| AppConfig::default()));
            fn_service(|stream: UnixStream| async move { Ok((stream, actix_http::Protocol::Http1, None)) })
                .and_then(http)
        })
}

async fn notified(ending: actix_server::GracefulShutdownSignal) {
    ending.notified().await;
}

/// Looks at the first byte and leaves it there.
async fn first_byte(stream: &TcpStream) -> Option<u8> {
    let mut byte = [0];
    match timeout(HEAD_TIMEOUT, stream.peek(&mut byte)).await {
        Ok(Ok(1)) => Some(byte[0]),
        _ => None,
    }
}

/// Answers a plain HTTP request with the same address on HTTPS.
async fn redirect(mut stream: TcpStream) {
    let answer = match timeout(HEAD_TIMEOUT, read_head(&mut stream)).await {
        Ok(Some(head)) => https_address(&head).map(|to| {
            format!(
                "HTTP/1.1 308 Permanent Redirect\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
        }),
        _ => None,
    };
    let answer =
        answer.unwrap_or_else(|| "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into());
    let _ = timeout(DISCONNECT_TIMEOUT, async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    })
    .await;
}

async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut part = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let got = stream.read(&mut part).await.ok().filter(|got| *got > 0)?;
        head.extend_from_slice(part.get(..got)?);
        if head.len() > PLAIN_HEAD_BYTES_MAX {
            return None;
        }
    }
    String::from_utf8(head).ok()
}

/// `https://HOST/PATH` of a request's head; none when it has no usable host or path.
fn https_address(head: &str) -> Option<String> {
    let mut lines = head.split("\r\n");
    let path = lines.next()?.split(' ').nth(1).filter(|path| path.starts_with('/'))?;
    let host = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("host").then(|| value.trim())
    })?;
    let plain = |text: &str, more: &str| {
        text.bytes().all(|byte| byte.is_ascii_alphanumeric() || more.as_bytes().contains(&byte))
    };
    let good = !host.is_empty() && plain(host, ".-_:[]%") && path.bytes().all(|byte| byte.is_ascii_graphic());
    good.then(|| format!("https://{host}{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_redirect_keeps_host_and_path_and_nothing_else() {
        let to = |head: &str| https_address(head);
        assert_eq!(to("GET /a?b=1 HTTP/1.1\r\nHost: inn:8443\r\n\r\n").as_deref(), Some("https://inn:8443/a?b=1"));
        assert_eq!(to("GET / HTTP/1.1\r\nhost:[::1]:8443\r\n\r\n").as_deref(), Some("https://[::1]:8443/"));
        assert_eq!(to("GET / HTTP/1.1\r\n\r\n"), None);
        assert_eq!(to("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"), None);
        assert_eq!(to("GET http://evil/ HTTP/1.1\r\nHost: inn\r\n\r\n"), None);
    }
}
