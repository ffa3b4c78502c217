//! The pages in front of the door: set-up, login, logout, and how to trust the certificate; and the files pages load.

use actix_web::{
    HttpRequest, HttpResponse,
    http::{StatusCode, header},
    web,
};
use serde::Deserialize;

use super::{
    State, assets,
    form::Form,
    guard::{self, Viewer, address_of, cookie_name},
    page::{form_status, html, local_path, see_other},
    view::{FieldErrors, LoginPage, Moment, SetupPage, Tab, TrustPage, fingerprint},
};
use crate::{
    error::{Error, ErrorKind, Result},
    store::users,
    types::now_ms,
};

/// The browser keeps the cookie this long; the server ends an idle login much earlier.
const COOKIE_SECONDS: u32 = 30 * 24 * 3600;

pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/setup", web::get().to(setup_page))
        .route("/setup", web::post().to(setup))
        .route("/login", web::get().to(login_page))
        .route("/login", web::post().to(login))
        .route("/logout", web::post().to(logout))
        .route("/trust", web::get().to(trust))
        .route("/trust/ca.pem", web::get().to(ca_pem))
        .route("/assets/{file}", web::get().to(asset));
}

#[derive(Deserialize)]
struct SetupQuery {
    #[serde(default)]
    token: String,
}

async fn setup_page(state: web::Data<State>, query: web::Query<SetupQuery>) -> Result<HttpResponse> {
    if has_users(&state).await? {
        return Ok(see_other("/login"));
    }
    let refused = if query.token.is_empty() {
        Some("Open the one-time link that Innkeeper printed when it started.".to_owned())
    } else if state.auth.setup_token_is(&query.token).await? {
        None
    } else {
        Some("This set-up link is wrong or spent.".to_owned())
    };
    let token = query.into_inner().token;
    html(
        StatusCode::OK,
        &SetupPage { chrome: state.door_chrome(), token, name: String::new(), errors: FieldErrors::default(), refused },
    )
}

async fn setup(state: web::Data<State>, request: HttpRequest, form: Form) -> Result<HttpResponse> {
    let (token, name, password) = (form.get("token"), form.get("name"), form.get("password"));
    let mut errors = FieldErrors::default();
    let made = if password == form.get("password_again") {
        state.auth.set_up(token, name, password, address_of(&request)).await
    } else {
        Err(Error::invalid("password_again", "The two passwords differ."))
    };
    let error = match made {
        Ok(secret) => return Ok(logged_in(&state, &secret, "/")),
        Err(error) => error,
    };
    let refused = (error.kind() == ErrorKind::Forbidden).then(|| error.to_string());
    let status = match error.kind() {
        ErrorKind::Forbidden => StatusCode::FORBIDDEN,
        ErrorKind::Unavailable => StatusCode::TOO_MANY_REQUESTS,
        _ => match form_status(&error) {
            Some(status) => status,
            None => return Err(error),
        },
    };
    errors.add(error.field().unwrap_or(""), error.to_string());
    html(
        status,
        &SetupPage { chrome: state.door_chrome(), token: token.to_owned(), name: name.to_owned(), errors, refused },
    )
}

#[derive(Deserialize)]
struct LoginQuery {
    #[serde(default)]
    next: String,
}

async fn login_page(
    state: web::Data<State>,
    request: HttpRequest,
    query: web::Query<LoginQuery>,
) -> Result<HttpResponse> {
    if !has_users(&state).await? {
        return Ok(see_other("/setup"));
    }
    if guard::caller(&request).is_some() {
        return Ok(see_other(local_path(&query.next)));
    }
    let next = query.into_inner().next;
    html(StatusCode::OK, &LoginPage { chrome: state.door_chrome(), name: String::new(), next, error: None })
}

async fn login(state: web::Data<State>, request: HttpRequest, form: Form) -> Result<HttpResponse> {
    let name = form.get("name").trim();
    let error = match state.auth.log_in(name, form.get("password"), address_of(&request)).await {
        Ok(secret) => return Ok(logged_in(&state, &secret, local_path(form.get("next")))),
        Err(error) => error,
    };
    let status = match error.kind() {
        ErrorKind::Unauthenticated => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorKind::Unavailable => StatusCode::TOO_MANY_REQUESTS,
        _ => return Err(error),
    };
    let page = LoginPage {
        chrome: state.door_chrome(),
        name: name.to_owned(),
        next: form.get("next").to_owned(),
        error: Some(error.to_string()),
    };
    html(status, &page)
}

async fn logout(state: web::Data<State>, who: Viewer) -> Result<HttpResponse> {
    if let Some(login) = who.login() {
        state.auth.log_out(login).await?;
    }
    let mut answer = see_other("/login");
    set_cookie(&mut answer, &state, "", 0);
    Ok(answer)
}

fn logged_in(state: &State, secret: &str, to: &str) -> HttpResponse {
    let mut answer = see_other(to);
    set_cookie(&mut answer, state, secret, COOKIE_SECONDS);
    answer
}

fn set_cookie(answer: &mut HttpResponse, state: &State, value: &str, seconds: u32) {
    let name = cookie_name(state.port);
    let cookie = format!("{name}={value}; Path=/; Max-Age={seconds}; Secure; HttpOnly; SameSite=Lax");
    if let Ok(cookie) = header::HeaderValue::from_str(&cookie) {
        answer.headers_mut().insert(header::SET_COOKIE, cookie);
    }
}

async fn has_users(state: &State) -> Result<bool> {
    Ok(state.store.reading(users::count).await? > 0)
}

async fn trust(state: web::Data<State>, request: HttpRequest) -> Result<HttpResponse> {
    let certificate = &state.certificate;
    let chrome = match guard::caller(&request) {
        Some(caller) => state.chrome(&caller, Tab::None),
        None => state.door_chrome(),
    };
    let page = TrustPage {
        chrome,
        ca_fingerprint: fingerprint(&certificate.ca_sha256),
        leaf_fingerprint: fingerprint(&certificate.leaf_sha256),
        names: certificate.names.clone(),
        leaf_until: Moment::new(certificate.leaf_until_ms, now_ms()),
    };
    html(StatusCode::OK, &page)
}

async fn ca_pem(state: web::Data<State>) -> HttpResponse {
    HttpResponse::Ok()
        .content_type("application/x-x509-ca-cert")
        .insert_header((header::CONTENT_DISPOSITION, "attachment; filename=\"innkeeper-ca.pem\""))
        .body(state.certificate.ca_pem.clone())
}

async fn asset(request: HttpRequest, file: web::Path<String>) -> Result<HttpResponse> {
    let asset = assets::find(&file).ok_or_else(|| Error::not_found("There is no such file."))?;
    let accepted = request.headers().get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok()).unwrap_or("");
    let body = asset.body(accepted);
    let mut answer = HttpResponse::Ok();
    answer.content_type(asset.content_type);
    answer
        .insert_header((header::CACHE_CONTROL, assets::CACHE_CONTROL))
        .insert_header((header::VARY, "Accept-Encoding"));
    if !body.encoding.is_empty() {
        answer.insert_header((header::CONTENT_ENCODING, body.encoding));
    }
    Ok(answer.body(body.bytes))
}
