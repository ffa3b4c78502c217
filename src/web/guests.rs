//! The pages of guests: the list, the form that makes one, and the pages of one guest.

use actix_web::{
    HttpResponse,
    http::{StatusCode, header},
    web::{self, Data, Path, Query},
};
use serde::Deserialize;

use super::{
    State,
    form::Form,
    guard::{Caller, Operator, Viewer},
    guest_api::event_of,
    guest_forms as forms,
    guest_words::{cd_words, disk_lines, facts, head, line, words},
    home::{done_words, level_of},
    host,
    page::{form_status, html, local_path, see_other},
    view::{self, FieldErrors, GuestFields, GuestTab, Level, Live, Tab},
};
use crate::{
    api::ChangeGuest,
    error::{Error, ErrorKind, Result},
    guests::{Guest, lifecycle::Event},
    store::users::{self, AuditRow},
    types::{Id, now_ms, parse_size},
};

/// The width of the pictures in lists.
const THUMBNAIL_WIDTH: u32 = 320;
/// The end of the scrollback that a page without JavaScript shows.
const SCROLLBACK_SHOWN_BYTES: usize = 16 << 10;
/// Lines of a guest's history on its page.
const EVENTS_SHOWN: u32 = 12;

pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/guests", web::get().to(list))
        .route("/guests", web::post().to(create))
        .route("/guests/new", web::get().to(new))
        .route("/guests/{id}", web::get().to(overview))
        .route("/guests/{id}/console", web::get().to(console))
        .route("/guests/{id}/serial", web::get().to(serial))
        .route("/guests/{id}/hardware", web::get().to(hardware))
        .route("/guests/{id}/hardware", web::post().to(change))
        .route("/guests/{id}/log", web::get().to(log))
        .route("/guests/{id}/thumbnail.png", web::get().to(thumbnail))
        .route("/guests/{id}/delete", web::get().to(delete_form))
        .route("/guests/{id}/delete", web::post().to(delete))
        .route("/guests/{id}/cd", web::post().to(change_cd))
        .route("/guests/{id}/memory", web::post().to(set_memory))
        .route("/guests/{id}/network", web::post().to(change_network))
        .route("/guests/{id}/disks", web::post().to(add_disk))
        .route("/guests/{id}/disks/{disk}/limit", web::post().to(limit_disk))
        .route("/guests/{id}/disks/{disk}/delete", web::post().to(delete_disk))
        .route("/guests/{id}/reset-firmware", web::post().to(reset_firmware))
        .route("/guests/{id}/reset-tpm", web::post().to(reset_tpm))
        .route("/guests/{id}/{action}", web::post().to(act));
}

// ---- pages, also for the live stream ----

/// `/guests`, filtered by `query`.
pub async fn list_page(state: &State, caller: &Caller, query: &str) -> Result<view::GuestsPage> {
    let wanted = query.trim().to_lowercase();
    let guests = state.guests.list().await?;
    let matches = |guest: &&Guest| {
        let row = &guest.row;
        [row.name.as_str(), row.note.as_str(), guest.status.state.word()]
            .into_iter()
            .chain(guest.status.addresses.iter().map(String::as_str))
            .any(|text| text.to_lowercase().contains(&wanted))
    };
    Ok(view::GuestsPage {
        chrome: state.quiet_chrome(caller, Tab::Guests),
        query: query.to_owned(),
        guests: guests.iter().filter(matches).map(|guest| line(guest, caller)).collect(),
        obstacle: obstacle(state).await,
    })
}

/// What keeps guests from running on this host. A supervisor that does not answer is said where it is needed.
async fn obstacle(state: &State) -> Option<view::Finding> {
    host::obstacles(state).await.unwrap_or_default().into_iter().next().map(host::shown)
}

/// `/guests/{id}`.
async fn guest_page(state: &State, caller: &Caller, guest: &Guest) -> Result<view::GuestPage> {
    let id = guest.row.id.clone();
    let events = state.store.reading(move |tx| users::audit_of_guest(tx, &id, EVENTS_SHOWN)).await?;
    let obstacle = match guest.status.state.is_live() {
        true => None,
        false => obstacle(state).await,
    };
    Ok(view::GuestPage {
        obstacle,
        chrome: state.quiet_chrome(caller, Tab::Guests),
        guest: head(guest, caller, GuestTab::Overview),
        words: words(guest),
        facts: facts(guest),
        disks: disk_lines(state, guest),
        cd: cd_words(guest),
        gauges: Vec::new(),
        events: events.into_iter().map(event_line).collect(),
    })
}

/// A line of the guest's history: "Started", "Changed CD".
fn event_line(row: AuditRow) -> view::EventLine {
    let words = done_words(&row.action);
    view::EventLine {
        at: view::Moment::new(row.at_ms, now_ms()),
        level: level_of(&row.action),
        text: words.trim_end_matches(" guest").trim_end_matches(" of").replace(" cd", " CD").replace(" tpm", " TPM"),
        subject: None,
        who: Some(row.who),
    }
}

async fn log_page(state: &State, caller: &Caller, guest: &Guest) -> Result<view::GuestLogPage> {
    let (tail, before) = state.guests.log_tail(&guest.row.id).await?;
    Ok(view::GuestLogPage {
        chrome: state.quiet_chrome(caller, Tab::Guests),
        guest: head(guest, caller, GuestTab::Log),
        text: printable(&tail),
        left_out: view::Bytes(before),
    })
}

/// What is live on one of the pages of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LivePart {
    Overview,
    Log,
    /// The header alone: on all other pages.
    Head,
}

/// What changes on a page of one guest, for its stream.
///
/// Errors: `NotFound` when the guest is gone.
pub async fn guest_fragments(state: &State, caller: &Caller, id: &str, part: LivePart) -> Result<String> {
    let guest = state.guests.get(id).await?;
    let drawn = match part {
        LivePart::Overview => guest_page(state, caller, &guest).await?.fragments(),
        LivePart::Log => log_page(state, caller, &guest).await?.fragments(),
        LivePart::Head => {
            let chrome = state.quiet_chrome(caller, Tab::Guests);
            let head = head(&guest, caller, GuestTab::Console);
            view::GuestHeadPart { chrome: &chrome, guest: &head }.fragments()
        }
    };
    drawn.map_err(|error| Error::internal("This page could not be drawn.", error))
}

/// As `guest_fragments`, for the list.
pub async fn list_fragments(state: &State, caller: &Caller) -> Result<String> {
    let drawn = list_page(state, caller, "").await?.fragments();
    drawn.map_err(|error| Error::internal("This page could not be drawn.", error))
}

/// Text of a guest without what moves a terminal's cursor. What was written over an earlier text of its line replaces it.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut shown = String::with_capacity(text.len());
    let mut letters = text.chars().peekable();
    let mut at_line_start = false;
    while let Some(letter) = letters.next() {
        if at_line_start && !letter.is_control() {
            shown.truncate(shown.rfind('\n').map_or(0, |end| end + 1));
        }
        at_line_start = letter == '\r' || at_line_start && letter.is_control() && letter != '\n';
        match letter {
            // Control sequences (ECMA-48 section 5.4): parameters, then one final byte.
            '\u{1b}' if letters.next_if_eq(&'[').is_some() => {
                while letters.next_if(|c| ('\u{20}'..='\u{3f}').contains(c)).is_some() {}
                letters.next();
            }
            '\n' | '\t' => shown.push(letter),
            letter if letter.is_control() => {}
            letter => shown.push(letter),
        }
    }
    shown
}

async fn scrollback_shown(state: &State, guest: &Guest) -> String {
    let bytes = super::console::read_scrollback(state, &guest.row.id).await.unwrap_or_default();
    let from = bytes.len().saturating_sub(SCROLLBACK_SHOWN_BYTES);
    printable(bytes.get(from..).unwrap_or_default())
}

// ---- handlers ----

#[derive(Deserialize)]
struct Filter {
    #[serde(default)]
    q: String,
}

async fn list(who: Viewer, state: Data<State>, filter: Query<Filter>) -> Result<HttpResponse> {
    let page = list_page(&state, &who, &filter.q).await?;
    html(StatusCode::OK, &view::GuestsPage { chrome: state.chrome(&who, Tab::Guests), ..page })
}

async fn new(who: Operator, state: Data<State>) -> Result<HttpResponse> {
    let choices = forms::choices(&state).await?;
    let fields = GuestFields {
        network: forms::usual_network(&choices),
        firmware: forms::usual_firmware(&choices),
        ..GuestFields::default()
    };
    let chrome = state.chrome(&who, Tab::Guests);
    html(StatusCode::OK, &view::GuestNewPage { chrome, fields, errors: FieldErrors::default(), choices })
}

async fn create(who: Operator, state: Data<State>, form: Form) -> Result<HttpResponse> {
    let mut fields = forms::fields_of(&form);
    forms::number_test_guest(&state, &mut fields).await?;
    let (status, errors) = match forms::create_guest(&fields) {
        Ok(wanted) => match state.guests.create(&who.name, wanted).await {
            Ok((guest, warnings)) => {
                for warning in warnings {
                    state.flash(&who, Level::Degraded, warning);
                }
                return Ok(see_other(&format!("/guests/{}", guest.row.id)));
            }
            Err(error) => match form_status(&error) {
                Some(status) => (status, forms::field_errors(&error, false)),
                None => return Err(error),
            },
        },
        Err(errors) => (StatusCode::UNPROCESSABLE_ENTITY, errors),
    };
    let choices = forms::choices(&state).await?;
    html(status, &view::GuestNewPage { chrome: state.chrome(&who, Tab::Guests), fields, errors, choices })
}

async fn overview(who: Viewer, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let page = guest_page(&state, &who, &guest).await?;
    html(StatusCode::OK, &view::GuestPage { chrome: state.chrome(&who, Tab::Guests), ..page })
}

async fn console(who: Viewer, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let scrollback = scrollback_shown(&state, &guest).await;
    let head = head(&guest, &who, GuestTab::Console);
    html(StatusCode::OK, &view::GuestConsolePage { chrome: state.chrome(&who, Tab::Guests), guest: head, scrollback })
}

async fn serial(who: Viewer, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let nonce = format!("{}{}{}", Id::random(), Id::random(), Id::random());
    let policy = format!("{}; style-src-elem 'self' 'nonce-{nonce}'", super::page::CONTENT_SECURITY_POLICY);
    let page = view::GuestSerialPage {
        chrome: state.chrome(&who, Tab::Guests),
        guest: head(&guest, &who, GuestTab::Serial),
        scrollback: scrollback_shown(&state, &guest).await,
        nonce,
    };
    let mut answer = html(StatusCode::OK, &page)?;
    let policy = header::HeaderValue::from_str(&policy)
        .map_err(|error| Error::internal("This page could not be drawn.", error))?;
    answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    Ok(answer)
}

async fn hardware_page(
    state: &State,
    who: &Viewer,
    guest: &Guest,
    fields: GuestFields,
    errors: FieldErrors,
) -> Result<view::GuestHardwarePage> {
    Ok(view::GuestHardwarePage {
        chrome: state.chrome(who, Tab::Guests),
        guest: head(guest, who, GuestTab::Hardware),
        fields,
        errors,
        choices: forms::choices(state).await?,
        disks: disk_lines(state, guest),
        cd: guest.cd.as_ref().map(|image| image.id.to_string()).unwrap_or_default(),
        uefi: guest.row.boot.is_uefi(),
        tpm: guest.row.switches.tpm,
        boot_devices: forms::boot_devices(guest),
    })
}

async fn hardware(who: Viewer, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let fields = forms::fields_of_guest(&guest);
    html(StatusCode::OK, &hardware_page(&state, &who, &guest, fields, FieldErrors::default()).await?)
}

async fn change(who: Operator, state: Data<State>, id: Path<String>, form: Form) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let fields = forms::fields_of(&form);
    let wanted = forms::change_guest(&fields);
    changed_by_form(&state, &who, &guest, fields, wanted, "The hardware is saved.").await
}

async fn change_network(who: Operator, state: Data<State>, id: Path<String>, form: Form) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let fields = forms::network_fields_of(&form, &guest);
    let wanted = forms::change_network(&fields);
    changed_by_form(&state, &who, &guest, fields, wanted, "The network is changed.").await
}

/// Carries out what a form of the hardware page asks for, and says `done`; the page with the form as typed when it cannot be.
async fn changed_by_form(
    state: &State,
    who: &Operator,
    guest: &Guest,
    fields: GuestFields,
    wanted: Result<ChangeGuest, FieldErrors>,
    done: &str,
) -> Result<HttpResponse> {
    let (status, errors) = match wanted {
        Ok(wanted) => match state.guests.change(&who.name, &guest.row.id, wanted).await {
            Ok((_, warnings)) => {
                match warnings.into_iter().next() {
                    Some(warning) => state.flash(who, Level::Degraded, warning),
                    None => state.flash(who, Level::Ok, done),
                }
                return Ok(see_other(&format!("/guests/{}/hardware", guest.row.id)));
            }
            Err(error) => match form_status(&error) {
                Some(status) => (status, forms::field_errors(&error, true)),
                None => return Err(error),
            },
        },
        Err(errors) => (StatusCode::UNPROCESSABLE_ENTITY, errors),
    };
    // What it is now: a change that failed may have got half of the way on a guest that runs.
    let guest = state.guests.get(guest.row.id.as_str()).await?;
    html(status, &hardware_page(state, who, &guest, fields, errors).await?)
}

async fn change_cd(who: Operator, state: Data<State>, id: Path<String>, form: Form) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let back = format!("/guests/{}/hardware", guest.row.id);
    match state.guests.change_cd(&guest.row.id, Some(form.get("image"))).await {
        Ok(()) => {
            state.audit_guest(&who, "change_cd_of", &guest.row).await?;
            state.flash(&who, Level::Ok, "The CD is changed.");
            Ok(see_other(&back))
        }
        Err(error) => {
            let status = form_status(&error).ok_or_else(|| Error::new(error.kind(), error.to_string()))?;
            let mut errors = FieldErrors::default();
            errors.add("image", error.to_string());
            let fields = forms::fields_of_guest(&guest);
            html(status, &hardware_page(&state, &who, &guest, fields, errors).await?)
        }
    }
}

async fn set_memory(who: Operator, state: Data<State>, id: Path<String>, form: Form) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let done = match parse_size(form.get("memory_now")) {
        Ok(bytes) => state.guests.set_memory(&guest.row.id, bytes).await,
        Err(bad) => Err(Error::invalid("memory_now", bad.to_string())),
    };
    match done {
        Ok(()) => {
            state.audit_guest(&who, "change_memory_of", &guest.row).await?;
            state.flash(&who, Level::Ok, "The guest was asked. It gives memory back as it can.");
            Ok(see_other(&format!("/guests/{}/hardware", guest.row.id)))
        }
        Err(error) => {
            let status = form_status(&error).ok_or_else(|| Error::new(error.kind(), error.to_string()))?;
            let mut errors = FieldErrors::default();
            errors.add("memory_now", error.to_string());
            let memory_now = form.get("memory_now").to_owned();
            let fields = view::GuestFields { memory_now, ..forms::fields_of_guest(&guest) };
            html(status, &hardware_page(&state, &who, &guest, fields, errors).await?)
        }
    }
}

async fn limit_disk(
    who: Operator,
    state: Data<State>,
    path: Path<(String, String)>,
    form: Form,
) -> Result<HttpResponse> {
    let (id, disk) = path.into_inner();
    let guest = state.guests.get(&id).await?;
    let done = match forms::limit_of(&form) {
        Ok(limit) => state.guests.limit_disk(&guest, &disk, limit).await,
        Err(error) => Err(error),
    };
    match done {
        Ok(()) => {
            state.audit_guest(&who, "limit_disk_of", &guest.row).await?;
            state.flash(&who, Level::Ok, "The limit of the disk is set.");
            Ok(see_other(&format!("/guests/{}/hardware", guest.row.id)))
        }
        Err(error) => {
            let status = form_status(&error).ok_or_else(|| Error::new(error.kind(), error.to_string()))?;
            let mut errors = FieldErrors::default();
            errors.add(&format!("limit_{disk}"), error.to_string());
            let mut page = hardware_page(&state, &who, &guest, forms::fields_of_guest(&guest), errors).await?;
            for line in page.disks.iter_mut().filter(|line| line.id == disk) {
                line.limit = Some(["bytes_per_s", "operations_per_s"].map(|field| form.get(field).to_owned()));
            }
            html(status, &page)
        }
    }
}

async fn add_disk(who: Operator, state: Data<State>, id: Path<String>, form: Form) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let fields = forms::disk_fields_of(&form, &guest);
    let wanted = forms::add_disk(&fields);
    changed_by_form(&state, &who, &guest, fields, wanted, "The guest has one more disk.").await
}

async fn delete_disk(who: Operator, state: Data<State>, path: Path<(String, String)>) -> Result<HttpResponse> {
    let (id, disk) = path.into_inner();
    let guest = state.guests.get(&id).await?;
    let disk: Id = disk.parse().map_err(|_| Error::not_found("There is no such disk."))?;
    let wanted = ChangeGuest { remove_disks: vec![disk], ..Default::default() };
    let (_, warnings) = state.guests.change(&who.name, &guest.row.id, wanted).await?;
    match warnings.into_iter().next() {
        Some(warning) => state.flash(&who, Level::Degraded, warning),
        None => state.flash(&who, Level::Ok, "The disk is deleted."),
    }
    Ok(see_other(&format!("/guests/{}/hardware", guest.row.id)))
}

async fn reset_firmware(who: Operator, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let done = state.guests.reset_firmware(&who.name, &guest.row.id).await;
    after_reset(&state, &who, &guest.row.id, done, "The firmware starts as new.")
}

async fn reset_tpm(who: Operator, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let done = state.guests.reset_tpm(&who.name, &guest.row.id).await;
    after_reset(&state, &who, &guest.row.id, done, "The TPM starts as new.")
}

fn after_reset(state: &State, who: &Operator, id: &Id, done: Result<()>, said: &str) -> Result<HttpResponse> {
    match done {
        Ok(()) => state.flash(who, Level::Ok, said),
        Err(error) if error.kind() == ErrorKind::Conflict => state.flash(who, Level::Missing, error.to_string()),
        Err(error) => return Err(error),
    }
    Ok(see_other(&format!("/guests/{id}/hardware")))
}

async fn log(who: Viewer, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let page = log_page(&state, &who, &guest).await?;
    html(StatusCode::OK, &view::GuestLogPage { chrome: state.chrome(&who, Tab::Guests), ..page })
}

async fn thumbnail(_: Viewer, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let png = state.guests.screenshot(&guest.row.id, Some(THUMBNAIL_WIDTH)).await?;
    Ok(HttpResponse::Ok().content_type("image/png").body(png))
}

fn delete_page(
    state: &State,
    who: &Viewer,
    guest: &Guest,
    errors: FieldErrors,
    confirm: &str,
) -> view::GuestDeletePage {
    view::GuestDeletePage {
        chrome: state.chrome(who, Tab::Guests),
        guest: head(guest, who, GuestTab::Overview),
        disks: disk_lines(state, guest),
        errors,
        confirm: confirm.to_owned(),
    }
}

async fn delete_form(who: Operator, state: Data<State>, id: Path<String>) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    html(StatusCode::OK, &delete_page(&state, &who, &guest, FieldErrors::default(), ""))
}

async fn delete(who: Operator, state: Data<State>, id: Path<String>, form: Form) -> Result<HttpResponse> {
    let guest = state.guests.get(&id).await?;
    let confirm = form.get("confirm");
    match state.guests.delete(&who.name, &guest.row.id, confirm).await {
        Ok(()) => {
            state.flash(&who, Level::Ok, format!("{} is deleted.", guest.row.name));
            Ok(see_other("/guests"))
        }
        Err(error) => {
            let status = form_status(&error).ok_or_else(|| Error::new(error.kind(), error.to_string()))?;
            html(status, &delete_page(&state, &who, &guest, forms::field_errors(&error, false), confirm))
        }
    }
}

/// A button: goes back to where it was pressed; what does not fit is said there.
async fn act(who: Operator, state: Data<State>, path: Path<(String, String)>, form: Form) -> Result<HttpResponse> {
    let (id, action) = path.into_inner();
    let event = event_of(&action)?;
    let guest = state.guests.get(&id).await?;
    let done = match event {
        Event::Start => state.guests.start_once(&guest.row.id, Some(form.get("boot"))).await,
        event => state.guests.act(&guest.row.id, event).await,
    };
    match done {
        Ok(()) => state.audit_guest(&who, &action, &guest.row).await?,
        Err(error) => {
            tracing::info!(guest = %guest.row.id, action, error = %error.for_log(), "a guest does not do as asked");
            state.flash(&who, Level::Missing, format!("{}: {error}", guest.row.name));
        }
    }
    let back = match local_path(form.get("back")) {
        "/" if form.get("back") != "/" => format!("/guests/{}", guest.row.id),
        back => back.to_owned(),
    };
    Ok(see_other(&back))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_of_a_guest_says_what_was_done_to_it() {
        let text = |action: &str| {
            let [who, address, subject, detail] = ["boss", "", "web01", "abcd2345"].map(str::to_owned);
            event_line(AuditRow { at_ms: 0, who, address, action: action.to_owned(), subject, detail }).text
        };
        assert_eq!(
            [
                "create_guest",
                "poweroff_guest",
                "change_cd_of_guest",
                "limit_disk_of_guest",
                "reset_tpm_of_guest",
                users::FAILED,
                users::SWITCHED_OFF,
            ]
            .map(text),
            ["Created", "Powered off", "Changed CD", "Limited disk", "Reset TPM", "Failed", "Switched off"]
        );
    }

    #[test]
    fn what_a_guest_prints_cannot_move_the_cursor_of_a_page() {
        assert_eq!(printable(b"a\x1b[31;1mred\x1b[0m\r\n\x07\x1bcb\xff"), "ared\ncb\u{fffd}");
        assert_eq!(printable(b"boot\r\n12:01\x1b[K\r12:02\x1b[K\r"), "boot\n12:02");
        assert_eq!(printable(b"one\r\r\ntwo\n\rthree"), "one\ntwo\nthree");
    }
}
