//! What every answer has in common: errors as pages or as problem details, redirects, security headers, the request's id in the log.
//!
//! The only match from `ErrorKind` to status, the only log line for our own faults, the only error page.

use actix_web::{
    HttpMessage, HttpRequest, HttpResponse, HttpResponseBuilder, ResponseError,
    body::{BodySize, BoxBody, MessageBody},
    dev::{ServiceRequest, ServiceResponse},
    http::{
        Method, StatusCode,
        header::{self, HeaderName, HeaderValue},
    },
};
use askama::Template;
use serde::Serialize;

use super::{
    guard,
    view::{Chrome, ErrorPage, Tab},
};
use crate::{
    error::{Error, ErrorKind, Result},
    types::Id,
};

/// For every page without a terminal.
pub const CONTENT_SECURITY_POLICY: &str = "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
     connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

/// In the log beside the cause, and on the page of an error that is ours.
#[derive(Clone)]
struct RequestId(Id);

fn status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorKind::Conflict => StatusCode::CONFLICT,
        ErrorKind::Unauthenticated => StatusCode::UNAUTHORIZED,
        ErrorKind::Forbidden => StatusCode::FORBIDDEN,
        ErrorKind::NoCapacity => StatusCode::INSUFFICIENT_STORAGE,
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Only the status: [`finish`] knows the request and writes the body.
impl ResponseError for Error {
    fn status_code(&self) -> StatusCode {
        status(self.kind())
    }
    fn error_response(&self) -> HttpResponse {
        HttpResponse::new(self.status_code())
    }
}

/// A rendered page. Pages are of one login and one moment: nobody keeps them.
pub fn html(status: StatusCode, page: &impl Template) -> Result<HttpResponse> {
    let body = page.render().map_err(|error| Error::internal("This page could not be drawn.", error))?;
    Ok(HttpResponse::build(status).content_type("text/html; charset=utf-8").body(body))
}

/// The answer to a POST that did what it should.
pub fn see_other(path: &str) -> HttpResponse {
    HttpResponse::SeeOther().insert_header((header::LOCATION, path)).finish()
}

/// A path of this server that a client may name to go on to; anything else is "/".
pub fn local_path(path: &str) -> &str {
    let local = path.starts_with('/') && !path.starts_with("//") && !path.contains(['\\', '\r', '\n', '\t']);
    if local { path } else { "/" }
}

/// Which form status an error has when its form is shown again; errors that are not about the input go to the error page.
pub fn form_status(error: &Error) -> Option<StatusCode> {
    match error.kind() {
        ErrorKind::Invalid => Some(StatusCode::UNPROCESSABLE_ENTITY),
        ErrorKind::Conflict if error.field().is_some() => Some(StatusCode::UNPROCESSABLE_ENTITY),
        ErrorKind::NoCapacity | ErrorKind::Conflict => Some(status(error.kind())),
        _ => None,
    }
}

/// Gives the request its id.
pub(super) fn identify(request: &ServiceRequest) {
    request.extensions_mut().insert(RequestId(Id::random()));
}

/// Writes the body of an error and the headers of every answer.
pub(super) async fn finish(answer: ServiceResponse<BoxBody>) -> ServiceResponse<BoxBody> {
    let mut answer = match fault(&answer) {
        Some(fault) => {
            let (request, response) = answer.into_parts();
            let shown = show(&request, &fault).unwrap_or_else(|_| HttpResponse::new(fault.status));
            drop(response);
            ServiceResponse::new(request, shown)
        }
        None => answer,
    };
    let defaults = [
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "same-origin"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    let headers = answer.headers_mut();
    for (name, value) in defaults {
        if !headers.contains_key(&name) {
            headers.insert(name, HeaderValue::from_static(value));
        }
    }
    answer
}

/// An error on its way out.
struct Fault {
    status: StatusCode,
    detail: String,
    field: Option<&'static str>,
    for_log: Option<String>,
}

fn fault(answer: &ServiceResponse<BoxBody>) -> Option<Fault> {
    let status = answer.status();
    if !status.is_client_error() && !status.is_server_error() {
        return None;
    }
    let ours = answer.response().error().and_then(|error| error.as_error::<Error>());
    if let Some(error) = ours {
        return Some(Fault { status, detail: error.to_string(), field: error.field(), for_log: Some(error.for_log()) });
    }
    let foreign = answer.response().error().map(ToString::to_string);
    let empty = matches!(answer.response().body().size(), BodySize::None | BodySize::Sized(0));
    if foreign.is_none() && !empty {
        return None;
    }
    let detail = match status {
        StatusCode::METHOD_NOT_ALLOWED => "This address does not do that.".to_owned(),
        StatusCode::PAYLOAD_TOO_LARGE => "The request is too long.".to_owned(),
        _ if status.is_server_error() => "Something went wrong inside the server.".to_owned(),
        _ => foreign.clone().unwrap_or_else(|| "The request cannot be understood.".to_owned()),
    };
    Some(Fault { status, detail, field: None, for_log: foreign })
}

fn show(request: &HttpRequest, fault: &Fault) -> Result<HttpResponse> {
    let id = request.extensions().get::<RequestId>().map(|id| id.0.to_string()).unwrap_or_default();
    let ours = fault.status == StatusCode::INTERNAL_SERVER_ERROR;
    let cause = fault.for_log.as_deref().unwrap_or("");
    if ours {
        tracing::error!(request = %id, method = %request.method(), path = request.path(), cause, "a request failed");
    } else {
        tracing::debug!(request = %id, method = %request.method(), path = request.path(), cause, "a request was refused");
    }
    if !wants_page(request) {
        return Ok(problem(fault, ours.then_some(id.as_str())));
    }
    if fault.status == StatusCode::UNAUTHORIZED {
        return Ok(see_other(&format!("/login{}", login_query(request))));
    }
    let state = guard::state(request)?;
    let caller = guard::caller(request);
    let page = ErrorPage {
        chrome: caller.as_deref().map_or_else(Chrome::default, |caller| state.chrome(caller, Tab::None)),
        status: fault.status.as_u16(),
        title: title(fault.status).to_owned(),
        detail: fault.detail.clone(),
        next: Some(("Home".to_owned(), "/".to_owned())),
        request_id: ours.then_some(id),
    };
    html(fault.status, &page)
}

/// Where to come back to after logging in: only pages that were looked at, not actions.
fn login_query(request: &HttpRequest) -> String {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    if path == "/" || request.method() != Method::GET {
        return String::new();
    }
    let escaped: String = path
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect();
    format!("?next={escaped}")
}

/// People get pages; scripts, streams and the parts of a page get problem details.
fn wants_page(request: &HttpRequest) -> bool {
    let path = request.path();
    !(path.starts_with("/api/") || path == "/events" || path.starts_with("/assets/") || guard::is_websocket(request))
}

fn title(status: StatusCode) -> &'static str {
    match status {
        StatusCode::NOT_FOUND => "Not there",
        StatusCode::UNPROCESSABLE_ENTITY => "That does not fit",
        StatusCode::CONFLICT => "Not now",
        StatusCode::UNAUTHORIZED => "Log in first",
        StatusCode::FORBIDDEN => "Not allowed",
        StatusCode::INSUFFICIENT_STORAGE => "Not enough room",
        StatusCode::SERVICE_UNAVAILABLE => "Not reachable",
        status if status.is_server_error() => "Something went wrong",
        _ => "That request was wrong",
    }
}

/// RFC 9457.
#[derive(Serialize)]
struct Problem<'a> {
    r#type: &'static str,
    title: &'static str,
    status: u16,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'a str>,
}

fn problem(fault: &Fault, request_id: Option<&str>) -> HttpResponse {
    let body = Problem {
        r#type: "about:blank",
        title: title(fault.status),
        status: fault.status.as_u16(),
        detail: &fault.detail,
        field: fault.field,
        request_id,
    };
    HttpResponseBuilder::new(fault.status)
        .content_type("application/problem+json")
        .body(serde_json::to_vec(&body).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn only_our_own_paths_are_gone_on_to() {
        for (path, to) in
            [("/guests?q=a", "/guests?q=a"), ("//evil", "/"), ("https://evil", "/"), ("/\\evil", "/"), ("", "/")]
        {
            assert_eq!(local_path(path), to);
        }
    }

    #[test]
    fn after_the_login_one_comes_back_to_the_page() {
        let query = |request: TestRequest| login_query(&request.to_http_request());
        assert_eq!(query(TestRequest::get().uri("/guests/a?x=1&y=2")), "?next=/guests/a%3Fx%3D1%26y%3D2");
        assert_eq!(query(TestRequest::post().uri("/guests/a/start")), "");
        assert_eq!(query(TestRequest::get().uri("/")), "");
    }
}
