//! The first page, and the page about Innkeeper itself.

use actix_web::{HttpRequest, HttpResponse, http::StatusCode, web};

use super::{
    State, assets, guard,
    guard::{Caller, Viewer},
    guest_words, host,
    page::{html, see_other},
    tasks,
    view::{AboutPage, Chrome, EventLine, HomePage, Level, Moment, Tab},
};
use crate::{
    error::Result,
    store::users::{self, AuditRow, Role},
    types::now_ms,
};

pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/", web::get().to(home)).route("/about", web::get().to(about));
}

const TASKS_SHOWN: usize = 5;
const EVENTS_SHOWN: u32 = 8;

/// The page as it is now, for the whole or its live parts.
pub async fn home_page(state: &State, who: &Caller, chrome: Chrome) -> Result<HomePage> {
    let events = events_for(state, who).await?;
    let now = now_ms();
    let guests = state.guests.list().await?;
    let path = |row: &AuditRow| {
        let about = guests.iter().find(|guest| guest.row.id.as_str() == row.detail)?;
        Some(format!("/guests/{}", about.row.id))
    };
    Ok(HomePage {
        chrome,
        needs: host::needs(state).await,
        gauges: host::gauges(state),
        guests: guests.iter().map(|guest| guest_words::line(guest, who)).collect(),
        tasks: state.tasks.list().await?.into_iter().take(TASKS_SHOWN).map(|row| tasks::line(row, who)).collect(),
        events: events.into_iter().map(|row| (path(&row), row)).map(|(path, row)| event_line(row, path, now)).collect(),
    })
}

/// One line of the audit trail: "Deleted user bob", with a link where there is still something to see.
fn event_line(row: AuditRow, path: Option<String>, now: i64) -> EventLine {
    let (text, subject) = match path {
        Some(path) => (done_words(&row.action), Some((row.subject, path))),
        None => (format!("{} {}", done_words(&row.action), row.subject), None),
    };
    EventLine { at: Moment::new(row.at_ms, now), level: level_of(&row.action), text, subject, who: Some(row.who) }
}

pub fn level_of(action: &str) -> Level {
    if [users::FAILED, users::CRASHED].contains(&action) { Level::Missing } else { Level::Ok }
}

/// An action of the audit trail, once it is done: "create_user" as "Created user".
pub fn done_words(action: &str) -> String {
    let (verb, object) = action.split_once('_').unwrap_or((action, ""));
    let verb = match verb {
        "create" => "Created",
        "change" => "Changed",
        "delete" => "Deleted",
        "start" => "Started",
        "shutdown" => "Shut down",
        "poweroff" => "Powered off",
        "reset" => "Reset",
        "pause" => "Paused",
        "resume" => "Resumed",
        "suspend" => "Suspended",
        "fetch" => "Fetched",
        "register" => "Added",
        "upload" => "Uploaded",
        "set" => "Set",
        "limit" => "Limited",
        "freeze" => "Froze",
        "thaw" => "Thawed",
        "fail" => "Failed",
        "crash" => "Crashed",
        "switch" => "Switched",
        _ => return action.replace('_', " "),
    };
    format!("{verb} {}", object.replace('_', " ")).trim_end().to_owned()
}

/// The end of the audit trail; it names users and addresses, so only administrators see it.
async fn events_for(state: &State, who: &Caller) -> Result<Vec<AuditRow>> {
    match who.role {
        Role::Administrator => state.store.reading(|tx| users::audit_trail(tx, EVENTS_SHOWN)).await,
        Role::Operator | Role::Viewer => Ok(Vec::new()),
    }
}

async fn home(state: web::Data<State>, request: HttpRequest) -> Result<HttpResponse> {
    let Some(who) = guard::caller(&request) else {
        let nobody = state.store.reading(users::count).await? == 0;
        return Ok(see_other(if nobody { "/setup" } else { "/login" }));
    };
    html(StatusCode::OK, &home_page(&state, &who, state.chrome(&who, Tab::Home)).await?)
}

async fn about(state: web::Data<State>, who: Viewer) -> Result<HttpResponse> {
    let chrome = state.chrome(&who, Tab::About);
    html(StatusCode::OK, &AboutPage { chrome, version: env!("CARGO_PKG_VERSION"), packages: assets::packages() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_said_in_words() {
        assert_eq!(done_words("create_user"), "Created user");
        assert_eq!(done_words("shutdown_guest"), "Shut down guest");
        assert_eq!(done_words("set_up"), "Set up");
        assert_eq!(done_words("something_else"), "something else");
    }
}
