//! Who may ask: every request passes [`guard`] first; handlers say by a parameter type ([`Viewer`], [`Operator`], [`Admin`]) what they need.
//!
//! A person comes with the cookie of a login, a script with a bearer token, the command line with the Unix socket's peer
//! credentials. What changes something is refused before its body is read when a foreign page sent it, and carries the
//! login's token in a field `csrf` or a header `x-csrf-token`.

use std::{net::IpAddr, ops::Deref, rc::Rc};

use actix_web::{
    FromRequest, HttpMessage, HttpRequest,
    body::{BoxBody, MessageBody},
    dev::{Payload, ServiceRequest, ServiceResponse},
    http::{Method, header},
    middleware::Next,
    web,
};
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use super::{
    State,
    form::{FORM_BYTES_MAX, Form},
    listen::Connection,
    page,
};
use crate::{
    auth::{self, Known},
    error::{Error, ErrorKind, Result},
    store::{blocking, users::Role},
    types::Id,
};

/// Multipart bodies go to this path only; its handler checks the first field itself, because the file comes after it.
pub const UPLOAD_PATH: &str = "/images/upload";
/// What "curl -d" sends when it is not told otherwise.
const NO_FORM: &str = "This came as a form. The API takes JSON with the header \"Content-Type: application/json\", and an \
     uploaded file with \"Content-Type: application/octet-stream\".";
/// The group whose members may use the Unix socket.
const HOST_GROUP: &str = "innkeeper";

/// Somebody who may come in.
#[derive(Debug)]
pub struct Caller {
    /// "ada", or "host:root" for somebody on the host itself.
    pub name: String,
    pub role: Role,
    /// A user of Innkeeper; none for somebody on the host itself.
    pub known: Option<Known>,
    pub address: IpAddr,
    /// Cancelled when the login ends or the server does: sockets and streams end with it.
    pub ended: CancellationToken,
    /// What forms carry; "" for callers that no browser can be tricked into.
    pub csrf: String,
}

impl Caller {
    pub fn login(&self) -> Option<&Id> {
        self.known.as_ref()?.login.as_ref()
    }
}

/// May look at everything but users.
#[derive(Clone)]
pub struct Viewer(Rc<Caller>);
/// May change guests and images.
#[derive(Clone)]
pub struct Operator(Viewer);
/// May do everything.
#[derive(Clone)]
pub struct Admin(Operator);

impl Deref for Viewer {
    type Target = Caller;
    fn deref(&self) -> &Caller {
        &self.0
    }
}
impl Deref for Operator {
    type Target = Viewer;
    fn deref(&self) -> &Viewer {
        &self.0
    }
}
impl Deref for Admin {
    type Target = Operator;
    fn deref(&self) -> &Operator {
        &self.0
    }
}

impl FromRequest for Viewer {
    type Error = Error;
    type Future = std::future::Ready<Result<Viewer>>;
    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        std::future::ready(caller_with(request, Role::Viewer))
    }
}
impl FromRequest for Operator {
    type Error = Error;
    type Future = std::future::Ready<Result<Operator>>;
    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        std::future::ready(caller_with(request, Role::Operator).map(Operator))
    }
}
impl FromRequest for Admin {
    type Error = Error;
    type Future = std::future::Ready<Result<Admin>>;
    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        std::future::ready(caller_with(request, Role::Administrator).map(Operator).map(Admin))
    }
}

fn caller_with(request: &HttpRequest, role: Role) -> Result<Viewer> {
    let caller = caller(request).ok_or_else(|| Error::new(ErrorKind::Unauthenticated, "Log in first."))?;
    if caller.role < role {
        return Err(Error::new(
            ErrorKind::Forbidden,
            format!("This needs the role {role}; \"{}\" has the role {}.", caller.name, caller.role),
        ));
    }
    Ok(Viewer(caller))
}

/// Who asks, when anybody; for pages that also show themselves to strangers.
pub fn caller(request: &HttpRequest) -> Option<Rc<Caller>> {
    request.extensions().get::<Rc<Caller>>().cloned()
}

/// The name of the login's cookie: several instances on one host have different ports, and browsers share cookies among ports.
pub fn cookie_name(port: u16) -> String {
    format!("__Host-innkeeper-{port}")
}

/// The middleware around everything: who asks, whether a foreign page made them, headers and errors of the answer.
pub async fn guard(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let mut request = request;
    page::identify(&request);
    let answer = match admit(&mut request).await {
        Ok(()) => next.call(request).await?.map_into_boxed_body(),
        Err(error) => {
            let (http, _) = request.into_parts();
            let response = actix_web::HttpResponse::from_error(error);
            ServiceResponse::new(http, response)
        }
    };
    Ok(page::finish(answer).await)
}

async fn admit(request: &mut ServiceRequest) -> Result<()> {
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    let caller = identify_caller(request).await?;
    let by_browser = caller.as_ref().is_none_or(|caller| !caller.csrf.is_empty());
    if by_browser && (changes || is_websocket(request.request())) {
        same_origin(request.request())?;
    }
    if changes {
        let csrf = caller.as_ref().map_or("", |caller| caller.csrf.as_str()).to_owned();
        read_form(request, &csrf).await?;
    }
    if let Some(caller) = caller {
        request.extensions_mut().insert(Rc::new(caller));
    }
    Ok(())
}

async fn identify_caller(request: &ServiceRequest) -> Result<Option<Caller>> {
    let state = state(request.request())?;
    let connection = request.request().conn_data::<Connection>();
    let address = address_of(request.request());
    let from = |known: Known, csrf: String| Caller {
        name: known.user.to_string(),
        role: known.role,
        address,
        ended: known.ended.clone(),
        known: Some(known),
        csrf,
    };
    if let Some(value) = request.headers().get(header::AUTHORIZATION) {
        let secret = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer ")).unwrap_or("").trim();
        let known = state.auth.by_token(secret).await?;
        let wrong = || Error::new(ErrorKind::Unauthenticated, "The bearer token is unknown.");
        return known.map(|known| Some(from(known, String::new()))).ok_or_else(wrong);
    }
    if let Some(Connection::Host { uid, gid }) = connection {
        return on_the_host(*uid, *gid, state).await.map(Some);
    }
    let Some(secret) = cookie(request.request(), &cookie_name(state.port)) else { return Ok(None) };
    let known = state.auth.by_login(&secret).await?;
    Ok(known.map(|known| from(known, auth::csrf_of(&secret))))
}

/// Root, the serving user and members of the group may do everything: they could do it to the state directory anyway.
async fn on_the_host(uid: u32, gid: u32, state: &State) -> Result<Caller> {
    let (name, allowed) = blocking(move || Ok(host_user(uid, gid))).await?;
    if !allowed {
        return Err(Error::new(
            ErrorKind::Forbidden,
            format!("Only root and members of the group {HOST_GROUP} may use this socket; you are {name}."),
        ));
    }
    Ok(Caller {
        name: format!("host:{name}"),
        role: Role::Administrator,
        known: None,
        address: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        ended: state.ending.clone(),
        csrf: String::new(),
    })
}

fn host_user(uid: u32, gid: u32) -> (String, bool) {
    use nix::unistd::{Gid, Group, Uid, User, geteuid, getgrouplist};
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let name = user.as_ref().map_or_else(|| uid.to_string(), |user| user.name.clone());
    if uid == 0 || uid == geteuid().as_raw() {
        return (name, true);
    }
    let Some(group) = Group::from_name(HOST_GROUP).ok().flatten() else { return (name, false) };
    let mut groups = vec![Gid::from_raw(gid)];
    if let Some(user) = user.as_ref().and_then(|user| std::ffi::CString::new(user.name.as_str()).ok()) {
        groups.extend(getgrouplist(&user, Gid::from_raw(gid)).unwrap_or_default());
    }
    (name, groups.contains(&group.gid))
}

/// A browser says where a request comes from; what says nothing is no browser.
fn same_origin(request: &HttpRequest) -> Result<()> {
    let text = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap_or("?"));
    let ours = match (text("origin"), text("sec-fetch-site")) {
        (Some(origin), _) => host_of(request).is_some_and(|host| origin == format!("https://{host}")),
        (None, Some(site)) => matches!(site, "same-origin" | "none"),
        (None, None) => !is_websocket(request),
    };
    if ours {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::Forbidden, "Another web page sent this request; it was refused."))
    }
}

/// The host and port that the client asked for.
pub fn host_of(request: &HttpRequest) -> Option<String> {
    let authority = request.uri().authority().map(|authority| authority.to_string());
    authority.or_else(|| Some(request.headers().get(header::HOST)?.to_str().ok()?.to_owned()))
}

pub fn is_websocket(request: &HttpRequest) -> bool {
    let upgrade = request.headers().get(header::UPGRADE);
    upgrade.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Reads a form and checks its token; leaves other bodies to their handlers.
async fn read_form(request: &mut ServiceRequest, csrf: &str) -> Result<()> {
    let kind = request.content_type().to_ascii_lowercase();
    let form = if kind == "application/x-www-form-urlencoded" {
        let mut body = Vec::new();
        let mut payload = request.take_payload();
        while let Some(chunk) = payload.next().await {
            let chunk = chunk
                .map_err(|error| Error::new(ErrorKind::Invalid, "The form did not arrive whole.").because(error))?;
            if body.len() + chunk.len() > FORM_BYTES_MAX {
                return Err(Error::new(ErrorKind::Invalid, "The form is too long."));
            }
            body.extend_from_slice(&chunk);
            if request.path().starts_with("/api/") && !body.is_empty() {
                return Err(Error::new(ErrorKind::Invalid, NO_FORM));
            }
        }
        Some(Form::parse(&body)?)
    } else {
        None
    };
    let header = request.headers().get("x-csrf-token").and_then(|value| value.to_str().ok());
    let given = header.or_else(|| form.as_ref().map(|form| form.get("csrf")));
    let checked_later = kind == "multipart/form-data" && request.path() == UPLOAD_PATH;
    if !csrf.is_empty() && given != Some(csrf) && !checked_later {
        return Err(Error::new(ErrorKind::Forbidden, "This form is of another login or too old; load its page again."));
    }
    if let Some(form) = form {
        request.extensions_mut().insert(form);
    }
    Ok(())
}

/// The value of one cookie. A name that comes twice is taken for nothing: somebody plays tricks.
fn cookie(request: &HttpRequest, name: &str) -> Option<String> {
    let mut found = None;
    for line in request.headers().get_all(header::COOKIE) {
        for pair in line.to_str().ok()?.split(';') {
            if let Some((_, value)) = pair.trim().split_once('=').filter(|(key, _)| *key == name) {
                if found.is_some() {
                    return None;
                }
                found = Some(value.to_owned());
            }
        }
    }
    found
}

pub fn address_of(request: &HttpRequest) -> IpAddr {
    request.peer_addr().map_or(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), |peer| peer.ip().to_canonical())
}

pub fn state(request: &HttpRequest) -> Result<&State> {
    let state = request.app_data::<web::Data<State>>().map(|data| data.get_ref());
    state.ok_or_else(|| Error::new(ErrorKind::Internal, "The server is not set up."))
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn a_cookie_is_found_once_or_not_at_all() {
        let cookie_of =
            |text: &str| cookie(&TestRequest::default().insert_header((header::COOKIE, text)).to_http_request(), "a");
        assert_eq!(cookie_of("b=1; a=2").as_deref(), Some("2"));
        assert_eq!(cookie_of("a=1; a=2"), None);
        assert_eq!(cookie_of("aa=1"), None);
    }

    #[test]
    fn foreign_pages_are_refused() {
        let allowed = |headers: &[(&str, &str)]| {
            let mut request = TestRequest::post().insert_header((header::HOST, "inn:8443"));
            for header in headers {
                request = request.insert_header(*header);
            }
            same_origin(&request.to_http_request()).is_ok()
        };
        assert!(allowed(&[("origin", "https://inn:8443")]));
        assert!(allowed(&[]), "a script without a browser");
        assert!(allowed(&[("sec-fetch-site", "same-origin")]));
        assert!(!allowed(&[("sec-fetch-site", "cross-site")]));
        assert!(!allowed(&[("sec-fetch-site", "same-site")]), "another port of the same host");
        for origin in ["https://evil.example", "http://inn:8443", "https://inn:9000", "null"] {
            assert!(!allowed(&[("origin", origin), ("sec-fetch-site", "same-origin")]), "{origin}");
        }
        assert!(!allowed(&[("upgrade", "websocket")]), "a browser's WebSocket always has an Origin");
    }

    #[test]
    fn root_may_use_the_socket() {
        assert!(host_user(0, 0).1);
        assert!(!host_user(65_533, 65_533).1);
    }
}
