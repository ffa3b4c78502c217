//! The first page, and the page about Innkeeper itself.

use actix_web::{HttpRequest, HttpResponse, http::StatusCode, web};

use super::{
    State, assets, guard,
    guard::{Caller, Viewer},
    guests, host,
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
    Ok(HomePage {
        chrome,
        needs: host::needs(state).await,
        gauges: host::gauges(state),
        guests: state.guests.list().await?.iter().map(|guest| guests::line(guest, who)).collect(),
        tasks: state.tasks.list().await?.into_iter().take(TASKS_SHOWN).map(|row| tasks::line(row, who)).collect(),
        events: events.into_iter().map(|row| event_line(row, now)).collect(),
    })
}

/// One line of the audit trail: "create user bob".
pub fn event_line(row: AuditRow, now: i64) -> EventLine {
    EventLine {
        at: Moment::new(row.at_ms, now),
        level: Level::Ok,
        text: format!("{} {}", row.action.replace('_', " "), row.subject),
        subject: None,
        who: Some(row.who),
    }
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
