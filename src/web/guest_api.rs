//! `/api/v1/guests`: guests as JSON. The shapes are in `api.rs`, shared with the command line.

use actix_web::{
    HttpResponse,
    http::StatusCode,
    web::{self, Bytes, Data, Path, Query},
};
use serde::{Deserialize, de::DeserializeOwned};

use super::{
    State,
    guard::{Operator, Viewer},
};
use crate::{
    api,
    error::{Error, ErrorKind, Result},
    guests::{
        Guest,
        freeze::FROZEN_S,
        lifecycle::{self, Event},
    },
    spec::RateLimit,
    store::guests::BootKind,
};

/// Screens are not wider.
const WIDTH_MAX: u32 = 8192;

pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/api/v1/guests", web::get().to(list))
        .route("/api/v1/guests", web::post().to(create))
        .route("/api/v1/guests/{id}", web::get().to(show))
        .route("/api/v1/guests/{id}", web::patch().to(change))
        .route("/api/v1/guests/{id}", web::delete().to(delete))
        .route("/api/v1/guests/{id}/cd", web::post().to(change_cd))
        .route("/api/v1/guests/{id}/memory", web::post().to(set_memory))
        .route("/api/v1/guests/{id}/disks/{disk}/limit", web::post().to(limit_disk))
        .route("/api/v1/guests/{id}/freeze", web::post().to(freeze))
        .route("/api/v1/guests/{id}/thaw", web::post().to(thaw))
        .route("/api/v1/guests/{id}/reset-firmware", web::post().to(reset_firmware))
        .route("/api/v1/guests/{id}/reset-tpm", web::post().to(reset_tpm))
        .route("/api/v1/guests/{id}/log", web::get().to(log))
        .route("/api/v1/guests/{id}/statistics", web::get().to(statistics))
        .route("/api/v1/guests/{id}/screenshot.png", web::get().to(screenshot))
        .route("/api/v1/guests/{id}/{action}", web::post().to(act));
}

/// A guest as the API says it.
pub fn guest_json(guest: &Guest) -> api::Guest {
    let Guest { row, disks, kernel, initrd, cd, status, task } = guest;
    let cmdline = row.cmdline.clone();
    let boot = match row.boot {
        BootKind::Bios => api::Boot::Disk { firmware: Some(api::Firmware::Bios) },
        BootKind::Uefi => api::Boot::Disk { firmware: Some(api::Firmware::Uefi) },
        BootKind::UefiSecure => api::Boot::Disk { firmware: Some(api::Firmware::UefiSecure) },
        BootKind::Test => api::Boot::Test { cmdline },
        BootKind::Kernel => api::Boot::Kernel {
            kernel: kernel.as_ref().map(|image| image.name.clone()).unwrap_or_default(),
            initrd: initrd.as_ref().map(|image| image.name.clone()),
            cmdline,
        },
    };
    api::Guest {
        id: row.id.clone(),
        name: row.name.clone(),
        state: state_json(status.state),
        reason: status.words(),
        since_ms: status.since_ms,
        desired: if row.desired_on { api::Desired::On } else { api::Desired::Off },
        cpus: row.cpus,
        sockets: row.sockets,
        threads: row.threads,
        memory_bytes: row.memory_bytes,
        boot,
        boot_order: guest.boot_order().iter().map(ToString::to_string).collect(),
        disks: disks
            .iter()
            .map(|disk| api::Disk {
                id: disk.id.clone(),
                size_bytes: disk.size_bytes,
                bus: disk.bus,
                ready: disk.ready,
                leaving: disk.leaving,
                limit: disk.limit,
            })
            .collect(),
        cdrom: cd.as_ref().map(|image| api::ImageName { id: image.id.clone(), name: image.name.clone() }),
        network: api::Network { mode: row.network.to_string(), model: row.network_model, mac: row.mac },
        watchdog: row.watchdog,
        cpu_model: row.cpu_model,
        switches: row.switches,
        memory_now_bytes: status.memory_now(row.memory_bytes),
        addresses: status.addresses.clone(),
        agent: status.agent.clone(),
        started_ms: status.started_ms,
        engine: status.engine.as_ref().map(|engine| api::Engine { pid: engine.pid, version: engine.version.clone() }),
        task: task.clone(),
        warnings: Vec::new(),
    }
}

fn state_json(state: lifecycle::State) -> api::State {
    match state {
        lifecycle::State::Stopped => api::State::Stopped,
        lifecycle::State::Suspended => api::State::Suspended,
        lifecycle::State::Starting => api::State::Starting,
        lifecycle::State::Running => api::State::Running,
        lifecycle::State::Paused => api::State::Paused,
        lifecycle::State::Stopping => api::State::Stopping,
        lifecycle::State::Failed => api::State::Failed,
    }
}

/// The event that an action of a person is, by its word in addresses.
///
/// Errors: `NotFound`.
pub fn event_of(action: &str) -> Result<Event> {
    Ok(match action {
        "start" => Event::Start,
        "shutdown" => Event::Shutdown,
        "poweroff" => Event::Kill,
        "reset" => Event::Reset,
        "pause" => Event::Pause,
        "suspend" => Event::Suspend,
        "resume" => Event::Resume,
        _ => return Err(Error::not_found("There is nothing at this address.")),
    })
}

/// A JSON body. Errors: `Invalid` with what is wrong and where.
fn json<T: DeserializeOwned>(body: &Bytes) -> Result<T> {
    if body.is_empty() {
        return Err(Error::new(
            ErrorKind::Invalid,
            "This needs a body: JSON, with \"Content-Type: application/json\".",
        ));
    }
    serde_json::from_slice(body)
        .map_err(|error| Error::new(ErrorKind::Invalid, format!("The JSON of this request does not fit: {error}.")))
}

async fn list(_: Viewer, state: Data<State>) -> Result<HttpResponse> {
    let guests: Vec<api::Guest> = state.guests.list().await?.iter().map(guest_json).collect();
    Ok(HttpResponse::Ok().json(guests))
}

async fn show(_: Viewer, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    Ok(HttpResponse::Ok().json(guest_json(&state.guests.get(&id).await?)))
}

async fn create(who: Operator, state: Data<State>, body: Bytes) -> Result<HttpResponse> {
    let (guest, warnings) = state.guests.create(&who.name, json(&body)?).await?;
    Ok(answer(StatusCode::CREATED, &guest, warnings))
}

async fn change(who: Operator, state: Data<State>, id: Path<String>, body: Bytes) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let (guest, warnings) = state.guests.change(&who.name, &guest.row.id, json(&body)?).await?;
    Ok(answer(StatusCode::OK, &guest, warnings))
}

fn answer(status: StatusCode, guest: &Guest, warnings: Vec<String>) -> HttpResponse {
    let status = if guest.task.is_some() { StatusCode::ACCEPTED } else { status };
    HttpResponse::build(status).json(api::Guest { warnings, ..guest_json(guest) })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Delete {
    confirm: Option<String>,
}

async fn delete(who: Operator, state: Data<State>, id: Path<String>, body: Bytes) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let confirm = if body.is_empty() { None } else { json::<Delete>(&body)?.confirm };
    let confirm = confirm.unwrap_or_else(|| guest.row.name.to_string());
    state.guests.delete(&who.name, &guest.row.id, &confirm).await?;
    Ok(HttpResponse::NoContent().finish())
}

async fn act(who: Operator, state: Data<State>, path: Path<(String, String)>, body: Bytes) -> Result<HttpResponse> {
    let (id, action) = path.into_inner();
    let event = event_of(&action)?;
    let guest = state.guests.get(&id).await?;
    if event == Event::Start {
        let wanted = if body.is_empty() { api::StartGuest::default() } else { json(&body)? };
        state.guests.start_once(&guest.row.id, wanted.boot.as_deref()).await?;
    } else {
        state.guests.act(&guest.row.id, event).await?;
    }
    state.audit_guest(&who, &action, &guest.row).await?;
    Ok(HttpResponse::Ok().json(guest_json(&state.guests.get(guest.row.id.as_str()).await?)))
}

async fn set_memory(who: Operator, state: Data<State>, id: Path<String>, body: Bytes) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let wanted: api::SetMemory = json(&body)?;
    state.guests.set_memory(&guest.row.id, wanted.memory_bytes).await?;
    state.audit_guest(&who, "change_memory_of", &guest.row).await?;
    Ok(HttpResponse::Ok().json(guest_json(&state.guests.get(guest.row.id.as_str()).await?)))
}

async fn freeze(who: Operator, state: Data<State>, id: Path<String>, body: Bytes) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let wanted = if body.is_empty() { api::Freeze::default() } else { json(&body)? };
    let file_systems = state.guests.freeze(&guest.row.id, wanted.seconds.unwrap_or(FROZEN_S)).await?;
    state.audit_guest(&who, "freeze_file_systems_of", &guest.row).await?;
    Ok(HttpResponse::Ok().json(api::Frozen { file_systems }))
}

async fn thaw(who: Operator, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let file_systems = state.guests.thaw(&guest.row.id).await?;
    state.audit_guest(&who, "thaw_file_systems_of", &guest.row).await?;
    Ok(HttpResponse::Ok().json(api::Frozen { file_systems }))
}

async fn limit_disk(
    who: Operator,
    state: Data<State>,
    path: Path<(String, String)>,
    body: Bytes,
) -> Result<HttpResponse> {
    let (id, disk) = path.into_inner();
    let guest = state.guests.get(&id).await?;
    let limit: RateLimit = json(&body)?;
    state.guests.limit_disk(&guest, &disk, limit).await?;
    state.audit_guest(&who, "limit_disk_of", &guest.row).await?;
    Ok(HttpResponse::Ok().json(guest_json(&state.guests.get(guest.row.id.as_str()).await?)))
}

async fn change_cd(who: Operator, state: Data<State>, id: Path<String>, body: Bytes) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let wanted: api::ChangeCd = json(&body)?;
    state.guests.change_cd(&guest.row.id, wanted.image.as_deref()).await?;
    state.audit_guest(&who, "change_cd_of", &guest.row).await?;
    Ok(HttpResponse::Ok().json(guest_json(&state.guests.get(guest.row.id.as_str()).await?)))
}

async fn reset_tpm(who: Operator, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    state.guests.reset_tpm(&who.name, &guest.row.id).await?;
    Ok(HttpResponse::Ok().json(guest_json(&state.guests.get(guest.row.id.as_str()).await?)))
}

async fn reset_firmware(who: Operator, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    state.guests.reset_firmware(&who.name, &guest.row.id).await?;
    Ok(HttpResponse::Ok().json(guest_json(&state.guests.get(guest.row.id.as_str()).await?)))
}

async fn log(_: Viewer, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let (tail, _) = state.guests.log_tail(&guest.row.id).await?;
    Ok(HttpResponse::Ok().content_type("text/plain; charset=utf-8").body(tail))
}

async fn statistics(_: Viewer, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    Ok(HttpResponse::Ok().json(state.guests.statistics(&guest.row.id).await?))
}

#[derive(Deserialize)]
struct Width {
    width: Option<u32>,
}

async fn screenshot(_: Viewer, state: Data<State>, id: Path<String>, query: Query<Width>) -> Result<HttpResponse> {
    let width = match query.width {
        Some(width) if width == 0 || width > WIDTH_MAX => {
            return Err(Error::invalid("width", format!("A screenshot is 1 to {WIDTH_MAX} wide.")));
        }
        width => width,
    };
    let guest = state.guests.get(&id).await?;
    let png = state.guests.screenshot(&guest.row.id, width).await?;
    Ok(HttpResponse::Ok().content_type("image/png").body(png))
}
