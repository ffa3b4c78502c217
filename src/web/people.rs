//! Users, API tokens, one's own password, the audit trail.

use actix_web::{HttpRequest, HttpResponse, http::StatusCode, web};
use serde::{Deserialize, Serialize};

use super::{
    State,
    form::Form,
    guard::{Admin, Caller, Viewer, address_of},
    page::{form_status, html, see_other},
    view::{AccountPage, Choice, FieldErrors, Level, Moment, Tab, TokenLine, UserLine, UsersPage},
};
use crate::{
    error::{Error, ErrorKind, Result},
    store::users::{self, AuditRow, Role, TokenRow, UserRow},
    types::{Id, now_ms},
};

pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/users", web::get().to(page))
        .route("/users", web::post().to(create))
        .route("/users/{id}/delete", web::post().to(delete))
        .route("/tokens", web::post().to(create_token))
        .route("/tokens/{id}/delete", web::post().to(delete_token))
        .route("/account", web::get().to(account))
        .route("/account", web::post().to(change_password))
        .route("/api/v1/session", web::get().to(api_session))
        .route("/api/v1/users", web::get().to(api_users))
        .route("/api/v1/users", web::post().to(api_create))
        .route("/api/v1/users/{id}", web::patch().to(api_change))
        .route("/api/v1/users/{id}", web::delete().to(api_delete))
        .route("/api/v1/tokens", web::get().to(api_tokens))
        .route("/api/v1/tokens", web::post().to(api_create_token))
        .route("/api/v1/tokens/{id}", web::delete().to(api_delete_token))
        .route("/api/v1/audit", web::get().to(api_audit));
}

const AUDIT_SHOWN: u32 = 200;

// ---- pages ----

async fn users_page(state: &State, who: &Caller) -> Result<UsersPage> {
    let (users, tokens) = state.store.reading(|tx| Ok((users::list(tx)?, users::tokens(tx)?))).await?;
    let now = now_ms();
    Ok(UsersPage {
        chrome: state.chrome(who, Tab::Users),
        users: users.into_iter().map(|row| user_line(row, who, now)).collect(),
        tokens: tokens.into_iter().map(|row| token_line(row, now)).collect(),
        roles: Role::ALL.map(|role| Choice { value: role.as_str().into(), label: role.as_str().into() }).to_vec(),
        new_token: None,
        name: String::new(),
        errors: FieldErrors::default(),
    })
}

fn user_line(row: UserRow, who: &Caller, now: i64) -> UserLine {
    UserLine {
        is_you: who.known.as_ref().is_some_and(|known| known.user_id == row.id),
        id: row.id.to_string(),
        name: row.name.to_string(),
        role: row.role.as_str(),
        created: Moment::new(row.created_ms, now),
        last_login: row.last_login_ms.map(|at| Moment::new(at, now)),
    }
}

fn token_line(row: TokenRow, now: i64) -> TokenLine {
    TokenLine {
        id: row.id.to_string(),
        name: row.name.to_string(),
        user: row.user.to_string(),
        created: Moment::new(row.created_ms, now),
        last_used: row.used_ms.map(|at| Moment::new(at, now)),
    }
}

async fn page(state: web::Data<State>, who: Admin) -> Result<HttpResponse> {
    html(StatusCode::OK, &users_page(&state, &who).await?)
}

/// The page again with what was wrong with one of its forms.
async fn refused(state: &State, who: &Caller, name: &str, error: Error) -> Result<HttpResponse> {
    let Some(status) = form_status(&error) else { return Err(error) };
    let mut page = users_page(state, who).await?;
    page.errors.add(error.field().unwrap_or(""), error.to_string());
    page.name = name.to_owned();
    html(status, &page)
}

async fn create(state: web::Data<State>, who: Admin, form: Form) -> Result<HttpResponse> {
    match create_user(&state, &who, form.get("name"), form.get("role"), form.get("password")).await {
        Ok(row) => {
            state.flash(&who, Level::Ok, format!("{} may log in now.", row.name));
            Ok(see_other("/users"))
        }
        Err(error) => refused(&state, &who, form.get("name"), error).await,
    }
}

async fn create_user(state: &State, who: &Caller, name: &str, role: &str, password: &str) -> Result<UserRow> {
    let role = role_of(role)?;
    let row = state.auth.create_user(name, role, password).await?;
    state.audit(who, "create_user", row.name.as_str(), role.as_str()).await?;
    Ok(row)
}

fn role_of(text: &str) -> Result<Role> {
    text.parse().map_err(|bad| Error::invalid("role", format!("{bad}")))
}

async fn delete(state: web::Data<State>, who: Admin, id: web::Path<String>) -> Result<HttpResponse> {
    match delete_user(&state, &who, &id).await {
        Ok(row) => {
            state.flash(&who, Level::Ok, format!("{} is deleted.", row.name));
            Ok(see_other("/users"))
        }
        Err(error) => refused(&state, &who, "", error).await,
    }
}

async fn delete_user(state: &State, who: &Caller, id: &str) -> Result<UserRow> {
    let id = user_id(state, id).await?;
    let row = state.auth.delete_user(&id).await?;
    state.audit(who, "delete_user", row.name.as_str(), "").await?;
    Ok(row)
}

/// By id or by name.
async fn user_id(state: &State, named: &str) -> Result<Id> {
    let named = named.to_owned();
    let found = state.store.reading(move |tx| {
        if let Ok(id) = named.parse::<Id>()
            && let Some(row) = users::by_id(tx, &id)?
        {
            return Ok(Some(row));
        }
        users::by_name(tx, &named)
    });
    found.await?.map(|row| row.id).ok_or_else(|| Error::not_found("There is no such user."))
}

/// A token acts for a user, so somebody on the host itself has to say for whom.
fn own_id(who: &Caller) -> Result<Id> {
    let own = who.known.as_ref().map(|known| known.user_id.clone());
    own.ok_or_else(|| Error::invalid("user", "Say for which user the token is: \"innkeeper admin create-token\" does."))
}

async fn create_token(state: web::Data<State>, who: Admin, form: Form) -> Result<HttpResponse> {
    let name = form.get("token_name");
    let made = match own_id(&who) {
        Ok(user) => state.auth.create_token(&user, name).await,
        Err(error) => Err(error),
    };
    match made {
        Ok(secret) => {
            state.audit(&who, "create_token", name.trim(), &who.name).await?;
            let mut page = users_page(&state, &who).await?;
            page.new_token = Some(secret);
            // The secret is on this answer only, so it is no redirect.
            html(StatusCode::CREATED, &page)
        }
        Err(error) => refused(&state, &who, "", error).await,
    }
}

async fn delete_token(state: web::Data<State>, who: Admin, id: web::Path<String>) -> Result<HttpResponse> {
    revoke(&state, &who, &id).await?;
    Ok(see_other("/users"))
}

async fn revoke(state: &State, who: &Caller, id: &str) -> Result<()> {
    let id: Id = id.parse().map_err(|_| Error::not_found("There is no such token."))?;
    state.auth.delete_token(&id).await?;
    state.audit(who, "delete_token", id.as_str(), "").await
}

async fn account(state: web::Data<State>, who: Viewer) -> Result<HttpResponse> {
    html(StatusCode::OK, &AccountPage { chrome: state.chrome(&who, Tab::Account), errors: FieldErrors::default() })
}

async fn change_password(
    state: web::Data<State>,
    who: Viewer,
    request: HttpRequest,
    form: Form,
) -> Result<HttpResponse> {
    let Some(known) = &who.known else {
        return Err(Error::conflict("Somebody on the host itself has no password here."));
    };
    let changed = if form.get("password") == form.get("password_again") {
        state.auth.change_password(known, form.get("current"), form.get("password"), address_of(&request)).await
    } else {
        Err(Error::invalid("password_again", "The two passwords differ."))
    };
    let Err(error) = changed else {
        state.audit(&who, "change_password", &who.name, "").await?;
        state.flash(&who, Level::Ok, "The password is changed; your other logins have ended.");
        return Ok(see_other("/account"));
    };
    let status = match error.kind() {
        ErrorKind::Unavailable => StatusCode::TOO_MANY_REQUESTS,
        _ => match form_status(&error) {
            Some(status) => status,
            None => return Err(error),
        },
    };
    let mut page = AccountPage { chrome: state.chrome(&who, Tab::Account), errors: FieldErrors::default() };
    page.errors.add(error.field().unwrap_or(""), error.to_string());
    html(status, &page)
}

// ---- API ----

#[derive(Serialize)]
struct ApiSession<'a> {
    name: &'a str,
    role: Role,
    /// For the header `x-csrf-token` of requests with the cookie; empty where none is needed.
    csrf: &'a str,
    version: &'static str,
}

async fn api_session(who: Viewer) -> HttpResponse {
    HttpResponse::Ok().json(ApiSession {
        name: &who.name,
        role: who.role,
        csrf: &who.csrf,
        version: env!("CARGO_PKG_VERSION"),
    })
}

#[derive(Serialize)]
struct ApiUser {
    id: Id,
    name: String,
    role: Role,
    created_ms: i64,
    last_login_ms: Option<i64>,
}

impl From<UserRow> for ApiUser {
    fn from(row: UserRow) -> ApiUser {
        let UserRow { id, name, role, password_hash: _, created_ms, last_login_ms } = row;
        ApiUser { id, name: name.to_string(), role, created_ms, last_login_ms }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ApiNewUser {
    name: String,
    role: String,
    password: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ApiChangeUser {
    role: Option<String>,
    password: Option<String>,
}

async fn api_users(state: web::Data<State>, _: Admin) -> Result<HttpResponse> {
    let rows = state.store.reading(users::list).await?;
    Ok(HttpResponse::Ok().json(rows.into_iter().map(ApiUser::from).collect::<Vec<_>>()))
}

async fn api_create(state: web::Data<State>, who: Admin, new: web::Json<ApiNewUser>) -> Result<HttpResponse> {
    let row = create_user(&state, &who, &new.name, &new.role, &new.password).await?;
    Ok(HttpResponse::Created().json(ApiUser::from(row)))
}

async fn api_change(
    state: web::Data<State>,
    who: Admin,
    id: web::Path<String>,
    change: web::Json<ApiChangeUser>,
) -> Result<HttpResponse> {
    let id = user_id(&state, &id).await?;
    if let Some(role) = &change.role {
        let row = state.auth.set_role(&id, role_of(role)?).await?;
        state.audit(&who, "set_role", row.name.as_str(), role).await?;
    }
    if let Some(password) = &change.password {
        state.auth.set_password(&id, password, who.login()).await?;
        state.audit(&who, "reset_password", id.as_str(), "").await?;
    }
    let row = state.store.reading(move |tx| users::by_id(tx, &id)).await?;
    Ok(HttpResponse::Ok().json(row.map(ApiUser::from)))
}

async fn api_delete(state: web::Data<State>, who: Admin, id: web::Path<String>) -> Result<HttpResponse> {
    delete_user(&state, &who, &id).await?;
    Ok(HttpResponse::NoContent().finish())
}

#[derive(Serialize)]
struct ApiToken {
    id: Id,
    name: String,
    user: String,
    created_ms: i64,
    used_ms: Option<i64>,
}

async fn api_tokens(state: web::Data<State>, _: Admin) -> Result<HttpResponse> {
    let rows = state.store.reading(users::tokens).await?.into_iter().map(|row| ApiToken {
        id: row.id,
        name: row.name.to_string(),
        user: row.user.to_string(),
        created_ms: row.created_ms,
        used_ms: row.used_ms,
    });
    Ok(HttpResponse::Ok().json(rows.collect::<Vec<_>>()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ApiNewToken {
    name: String,
    /// Id or name; oneself when left out.
    user: Option<String>,
}

#[derive(Serialize)]
struct ApiSecret {
    token: String,
}

async fn api_create_token(state: web::Data<State>, who: Admin, new: web::Json<ApiNewToken>) -> Result<HttpResponse> {
    let user = match &new.user {
        Some(named) => user_id(&state, named).await?,
        None => own_id(&who)?,
    };
    let token = state.auth.create_token(&user, &new.name).await?;
    state.audit(&who, "create_token", new.name.trim(), user.as_str()).await?;
    Ok(HttpResponse::Created().json(ApiSecret { token }))
}

async fn api_delete_token(state: web::Data<State>, who: Admin, id: web::Path<String>) -> Result<HttpResponse> {
    revoke(&state, &who, &id).await?;
    Ok(HttpResponse::NoContent().finish())
}

async fn api_audit(state: web::Data<State>, _: Admin) -> Result<HttpResponse> {
    let rows: Vec<AuditRow> = state.store.reading(|tx| users::audit_trail(tx, AUDIT_SHOWN)).await?;
    Ok(HttpResponse::Ok().json(rows))
}
