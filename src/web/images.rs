//! The image library: page, uploads with and without JavaScript, API.

use actix_web::{
    HttpRequest, HttpResponse,
    http::{StatusCode, header},
    web,
};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};

use super::{
    State,
    form::Form,
    guard::{Caller, Operator, UPLOAD_PATH, Viewer},
    multipart::Multipart,
    page::{form_status, html, see_other},
    view::{
        Bytes, Chrome, FieldErrors, ImageFields, ImageKind as ShownKind, ImageLine, ImagesPage, Level, Moment, Tab,
    },
};
use crate::{
    error::{Error, ErrorKind, Result},
    images::{Added, Incoming, Listed, NewImage},
    store::images::ImageKind,
    types::now_ms,
};

pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/images", web::get().to(list))
        .route(UPLOAD_PATH, web::post().to(upload_form))
        .route("/images/fetch", web::post().to(fetch))
        .route("/images/host", web::post().to(register))
        .route("/images/{id}/delete", web::post().to(delete))
        .route("/api/v1/images", web::get().to(api_list))
        .route("/api/v1/images", web::post().to(api_add))
        .route("/api/v1/images/upload", web::put().to(api_upload))
        .route("/api/v1/images/{id}", web::get().to(api_get))
        .route("/api/v1/images/{id}", web::delete().to(api_delete));
}

/// The page as it is now, for the whole or its live part.
pub async fn images_page(state: &State, chrome: Chrome) -> Result<ImagesPage> {
    Ok(ImagesPage {
        chrome,
        images: state.images.list().await?.iter().map(line).collect(),
        free: Bytes(state.images.free_bytes()),
        open_form: "",
        errors: FieldErrors::default(),
        fields: ImageFields::default(),
    })
}

fn line(listed: &Listed) -> ImageLine {
    let row = &listed.row;
    ImageLine {
        id: row.id.to_string(),
        name: row.name.to_string(),
        kind: match row.kind {
            ImageKind::Iso => ShownKind::Cd,
            ImageKind::Disk => ShownKind::Disk,
            ImageKind::Kernel | ImageKind::Initrd | ImageKind::Other => ShownKind::File,
        },
        ready: row.ready,
        size: Bytes(row.size_bytes),
        sha256: row.sha256.clone(),
        added: Moment::new(row.created_ms, now_ms()),
        used_by: listed.used_by.clone(),
        origin: row.host_path.as_ref().map_or_else(|| row.source.clone(), |path| path.display().to_string()),
        task: row.task_id.as_ref().map(ToString::to_string),
    }
}

async fn list(state: web::Data<State>, who: Viewer) -> Result<HttpResponse> {
    html(StatusCode::OK, &images_page(&state, state.chrome(&who, Tab::Images)).await?)
}

/// After a POST: back to the list, or the form again with what was wrong.
async fn answer(
    state: &State,
    who: &Caller,
    form: &'static str,
    fields: ImageFields,
    result: Result<Added>,
) -> Result<HttpResponse> {
    let error = match result {
        Ok(added) => {
            let text = if added.task.is_some() { "On its way." } else { "Added." };
            state.flash(who, Level::Ok, text);
            return Ok(see_other("/images"));
        }
        Err(error) => error,
    };
    let Some(status) = form_status(&error) else { return Err(error) };
    let mut page = images_page(state, state.chrome(who, Tab::Images)).await?;
    page.errors.add(error.field().unwrap_or(""), error.to_string());
    (page.open_form, page.fields) = (form, fields);
    html(status, &page)
}

async fn fetch(state: web::Data<State>, who: Operator, form: Form) -> Result<HttpResponse> {
    let fields = ImageFields {
        name: form.get("name").to_owned(),
        url: form.get("url").to_owned(),
        sha256: form.get("sha256").to_owned(),
        path: String::new(),
    };
    let new = new_image(&who, &fields.name, &fields.sha256, form.get("kind"))?;
    let result = state.images.fetch(&fields.url, new).await;
    audit(&state, &who, "fetch_image", &fields.url, &result).await?;
    answer(&state, &who, "fetch", fields, result).await
}

async fn register(state: web::Data<State>, who: Operator, form: Form) -> Result<HttpResponse> {
    let fields =
        ImageFields { name: form.get("name").to_owned(), path: form.get("path").to_owned(), ..ImageFields::default() };
    let result = match administrator(&who) {
        Ok(()) => state.images.register(&fields.path, new_image(&who, &fields.name, "", form.get("kind"))?).await,
        Err(error) => Err(error),
    };
    audit(&state, &who, "register_image", &fields.path, &result).await?;
    answer(&state, &who, "host", fields, result).await
}

/// A file of the host is named with the supervisor's rights, so only administrators name one.
fn administrator(who: &Operator) -> Result<()> {
    if who.role == crate::store::users::Role::Administrator {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Invalid, "Only an administrator may take files of the host.").at("path"))
}

async fn delete(state: web::Data<State>, who: Operator, id: web::Path<String>) -> Result<HttpResponse> {
    let row = state.images.delete(&id).await?;
    state.audit(&who, "delete_image", row.name.as_str(), "").await?;
    state.flash(&who, Level::Ok, format!("{} is deleted.", row.name));
    Ok(see_other("/images"))
}

fn new_image(who: &Operator, name: &str, sha256: &str, kind: &str) -> Result<NewImage> {
    let kind = match kind {
        "" => None,
        kind => Some(kind.parse().map_err(|bad| Error::invalid("kind", format!("{bad}")))?),
    };
    Ok(NewImage {
        name: name.to_owned(),
        sha256: sha256.to_owned(),
        kind,
        who: who.name.clone(),
        file_name: String::new(),
    })
}

async fn audit(state: &State, who: &Operator, action: &str, subject: &str, result: &Result<Added>) -> Result<()> {
    match result {
        Ok(added) => state.audit(who, action, subject, added.image.as_str()).await,
        Err(_) => Ok(()),
    }
}

// ---- uploads ----

/// Without JavaScript: the fields `csrf`, `name`, `kind` (may be empty) and then `file`, in this order.
async fn upload_form(
    state: web::Data<State>,
    who: Operator,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let mut fields = ImageFields::default();
    let result = receive_form(&state, &who, &request, payload, &mut fields).await;
    audit(&state, &who, "upload_image", &fields.name, &result).await?;
    answer(&state, &who, "upload", fields, result).await
}

async fn receive_form(
    state: &State,
    who: &Operator,
    request: &HttpRequest,
    payload: web::Payload,
    fields: &mut ImageFields,
) -> Result<Added> {
    let mut body = Multipart::new(request, payload)?;
    let mut trusted = who.csrf.is_empty();
    let mut kind = String::new();
    while let Some(part) = body.next_part().await? {
        match (part.name.as_str(), part.file_name) {
            ("csrf", None) => trusted |= body.text().await? == who.csrf,
            _ if !trusted => {
                return Err(Error::new(
                    ErrorKind::Forbidden,
                    "This form is of another login or too old; load its page again.",
                ));
            }
            ("name", None) => fields.name = body.text().await?,
            ("kind", None) => kind = body.text().await?,
            ("file", Some(file_name)) => {
                if file_name.is_empty() {
                    return Err(Error::invalid("file", "Choose a file."));
                }
                let new = NewImage { file_name, ..new_image(who, &fields.name, "", &kind)? };
                let mut incoming = state.images.receive(new, None).await?;
                while let Some(piece) = body.piece().await? {
                    incoming.push(piece).await?;
                }
                return finish(state, incoming).await;
            }
            _ => {}
        }
    }
    Err(Error::invalid("file", "Choose a file."))
}

/// A server that ends keeps nothing half.
async fn finish(state: &State, incoming: Incoming) -> Result<Added> {
    if state.ending.is_cancelled() {
        return Err(Error::new(ErrorKind::Unavailable, "The server is ending; nothing was kept."));
    }
    incoming.finish().await
}

#[derive(Deserialize)]
struct UploadQuery {
    #[serde(default)]
    name: String,
    /// What the file is called where it comes from; gives the image its name when `name` is empty.
    #[serde(default)]
    file: String,
    #[serde(default)]
    sha256: String,
    #[serde(default)]
    kind: String,
}

/// The raw bytes of the file as the body.
async fn api_upload(
    state: web::Data<State>,
    who: Operator,
    request: HttpRequest,
    query: web::Query<UploadQuery>,
    mut payload: web::Payload,
) -> Result<HttpResponse> {
    let length = match request.headers().get(header::CONTENT_LENGTH) {
        None => None,
        Some(value) => {
            let length = value.to_str().ok().and_then(|text| text.parse().ok());
            Some(length.ok_or_else(|| Error::invalid("file", "The length of the upload cannot be read."))?)
        }
    };
    let new = new_image(&who, &query.name, &query.sha256, &query.kind)?;
    let new = NewImage { file_name: query.file.clone(), ..new };
    let mut incoming = state.images.receive(new, length).await?;
    while let Some(piece) = payload.next().await {
        let cut = |error| Error::invalid("file", "The upload was cut short; nothing was kept.").because(error);
        incoming.push(piece.map_err(cut)?).await?;
    }
    let result = finish(&state, incoming).await;
    audit(&state, &who, "upload_image", &query.name, &result).await?;
    Ok(HttpResponse::Created().json(ApiAdded::from(result?)))
}

// ---- API ----

#[derive(Serialize)]
struct ApiImage {
    id: String,
    name: String,
    kind: ImageKind,
    state: &'static str,
    size_bytes: u64,
    sha256: Option<String>,
    source: String,
    host_path: Option<String>,
    task: Option<String>,
    created_ms: i64,
    used_by: Vec<String>,
}

impl From<Listed> for ApiImage {
    fn from(Listed { row, used_by }: Listed) -> ApiImage {
        ApiImage {
            id: row.id.to_string(),
            name: row.name.to_string(),
            kind: row.kind,
            state: if row.ready { "ready" } else { "uploading" },
            size_bytes: row.size_bytes,
            sha256: row.sha256,
            source: row.source,
            host_path: row.host_path.map(|path| path.display().to_string()),
            task: row.task_id.map(|id| id.to_string()),
            created_ms: row.created_ms,
            used_by,
        }
    }
}

/// The image, and the task that still works on it.
#[derive(Serialize)]
struct ApiAdded {
    image: String,
    task: Option<String>,
}

impl From<Added> for ApiAdded {
    fn from(added: Added) -> ApiAdded {
        ApiAdded { image: added.image.to_string(), task: added.task.map(|id| id.to_string()) }
    }
}

/// `POST /api/v1/images`: an address to fetch, or a file of the host.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ApiNew {
    url: Option<String>,
    host_path: Option<String>,
    name: Option<String>,
    sha256: Option<String>,
    kind: Option<String>,
}

async fn api_list(state: web::Data<State>, _: Viewer) -> Result<HttpResponse> {
    let images: Vec<ApiImage> = state.images.list().await?.into_iter().map(ApiImage::from).collect();
    Ok(HttpResponse::Ok().json(images))
}

async fn api_get(state: web::Data<State>, _: Viewer, id: web::Path<String>) -> Result<HttpResponse> {
    Ok(HttpResponse::Ok().json(ApiImage::from(state.images.get(&id).await?)))
}

async fn api_add(state: web::Data<State>, who: Operator, new: web::Json<ApiNew>) -> Result<HttpResponse> {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let image = new_image(&who, &text(&new.name), &text(&new.sha256), &text(&new.kind))?;
    let (action, subject, result) = match (&new.url, &new.host_path) {
        (Some(url), None) => ("fetch_image", url, state.images.fetch(url, image).await),
        (None, Some(path)) => {
            administrator(&who)?;
            ("register_image", path, state.images.register(path, image).await)
        }
        _ => return Err(Error::invalid("url", "Either \"url\" or \"host_path\" is needed.")),
    };
    audit(&state, &who, action, subject, &result).await?;
    let added = result?;
    let status = if added.task.is_some() { StatusCode::ACCEPTED } else { StatusCode::CREATED };
    Ok(HttpResponse::build(status).json(ApiAdded::from(added)))
}

async fn api_delete(state: web::Data<State>, who: Operator, id: web::Path<String>) -> Result<HttpResponse> {
    let row = state.images.delete(&id).await?;
    state.audit(&who, "delete_image", row.name.as_str(), "").await?;
    Ok(HttpResponse::NoContent().finish())
}
