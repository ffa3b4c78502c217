//! Live pages: one stream of server-sent events a page. Something changed, so the page's live parts are drawn again and sent if they differ.
//!
//! A stream sleeps until the broadcast of changes wakes it; only a guest's log, which an engine writes, is looked at by the clock.
//! It ends with the login and with the server.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use actix_web::{HttpResponse, http::header, web};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::broadcast::{Receiver, error::RecvError},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::bytes::Bytes;

use super::{
    State,
    guard::Viewer,
    guests,
    guests::LivePart,
    home, images, tasks,
    view::{Live, Tab, event},
};
use crate::{
    changes::Change,
    error::{Error, ErrorKind, Result},
    types::Id,
};

pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/events", web::get().to(page_events)).route("/api/v1/events", web::get().to(api_events));
}

/// A comment this often keeps proxies and browsers from giving up.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How often the page of a guest's log looks at it.
const LOOK_AT_LOG: Duration = Duration::from_secs(2);
/// Changes come in bursts; one drawing serves them all.
const GATHER: Duration = Duration::from_millis(100);
/// Numbers of events, for all streams.
static NEXT_EVENT: AtomicU64 = AtomicU64::new(1);

/// Which page a stream keeps live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    Home,
    Guests,
    Guest(Id, LivePart),
    Images,
    Tasks,
    Task(Id),
}

impl Scope {
    /// `tab` is which page of a guest.
    fn parse(text: &str, tab: &str) -> Result<Scope> {
        let part = match tab {
            "overview" | "" => LivePart::Overview,
            "log" => LivePart::Log,
            _ => LivePart::Head,
        };
        let bad = || Error::new(ErrorKind::Invalid, "There are no events of that kind.");
        Ok(match text.split_once(':') {
            None => match text {
                "home" => Scope::Home,
                "guests" => Scope::Guests,
                "images" => Scope::Images,
                "tasks" => Scope::Tasks,
                _ => return Err(bad()),
            },
            Some(("guest", id)) => Scope::Guest(id.parse().map_err(|_| bad())?, part),
            Some(("task", id)) => Scope::Task(id.parse().map_err(|_| bad())?),
            Some(_) => return Err(bad()),
        })
    }

    fn heartbeat(&self) -> Duration {
        if matches!(self, Scope::Guest(_, LivePart::Log)) { LOOK_AT_LOG } else { HEARTBEAT }
    }

    /// Whether the page shows what changed.
    fn shows(&self, change: &Change) -> bool {
        match (self, change) {
            (Scope::Home, _) => true,
            (Scope::Guests, Change::Guest(_)) => true,
            (Scope::Guest(shown, _), Change::Guest(changed)) => shown == changed,
            (Scope::Images, Change::Images) => true,
            (Scope::Tasks, Change::Task(_)) => true,
            (Scope::Task(shown), Change::Task(changed)) => shown == changed,
            (Scope::Guests | Scope::Guest(..) | Scope::Images | Scope::Tasks | Scope::Task(_), _) => false,
        }
    }

    /// The live parts of the page as they are now.
    async fn fragments(&self, state: &State, who: &Viewer) -> Result<String> {
        let drawn = match self {
            Scope::Home => home::home_page(state, who, state.quiet_chrome(who, Tab::Home)).await?.fragments(),
            Scope::Images => images::images_page(state, state.quiet_chrome(who, Tab::Images)).await?.fragments(),
            Scope::Tasks => tasks::tasks_page(state, who, state.quiet_chrome(who, Tab::Tasks)).await?.fragments(),
            Scope::Task(id) => tasks::task_page(state, who, state.quiet_chrome(who, Tab::Tasks), id).await?.fragments(),
            Scope::Guests => return guests::list_fragments(state, who).await,
            Scope::Guest(id, part) => return guests::guest_fragments(state, who, id.as_str(), *part).await,
        };
        drawn.map_err(|error| Error::internal("This page could not be drawn.", error))
    }
}

#[derive(Deserialize)]
struct EventsQuery {
    #[serde(default)]
    scope: String,
    #[serde(default)]
    tab: String,
}

struct PageStream {
    state: web::Data<State>,
    who: Viewer,
    scope: Scope,
    changes: Receiver<Change>,
    last_sent: Option<u64>,
    log_length: Option<u64>,
}

async fn page_events(state: web::Data<State>, who: Viewer, query: web::Query<EventsQuery>) -> Result<HttpResponse> {
    let scope = Scope::parse(&query.scope, &query.tab)?;
    // Listened to before the first drawing, so that no change falls between.
    let changes = state.changes.listen();
    let first = PageStream { state, who, scope, changes, last_sent: None, log_length: None };
    Ok(sse(stream::unfold(first, |mut page| async move { Some((Ok(page.next().await?), page)) })))
}

impl PageStream {
    /// The next bytes to send; `None` at the end. At once the first time: the page may be older than its stream.
    async fn next(&mut self) -> Option<Bytes> {
        let mut heartbeat = Instant::now() + self.scope.heartbeat();
        let mut stale = self.last_sent.is_none();
        loop {
            if !stale {
                match wait(&self.state, &self.who, &mut self.changes, heartbeat).await {
                    Woken::End => return None,
                    Woken::Heartbeat if self.log_grew().await => stale = true,
                    Woken::Heartbeat => return Some(Bytes::from_static(b": here\n\n")),
                    Woken::Lagged => stale = true,
                    Woken::Changed(change) => stale = self.scope.shows(&change),
                }
                continue;
            }
            stale = false;
            if self.last_sent.is_some() {
                sleep(GATHER).await;
                // What came meanwhile is in the drawing.
                while self.changes.try_recv().is_ok() {}
            }
            let html = match self.scope.fragments(&self.state, &self.who).await {
                Ok(html) => html,
                // What the page shows is gone: the page says so when it is loaded again.
                Err(error) if error.kind() == ErrorKind::NotFound => return None,
                Err(error) => {
                    tracing::warn!(error = %error.for_log(), "cannot draw a live page");
                    continue;
                }
            };
            let mut hasher = DefaultHasher::new();
            html.hash(&mut hasher);
            let now = Some(hasher.finish());
            let before = std::mem::replace(&mut self.last_sent, now);
            if before != now && !html.is_empty() {
                return Some(Bytes::from(event(NEXT_EVENT.fetch_add(1, Relaxed), &html)));
            }
            heartbeat = Instant::now() + self.scope.heartbeat();
        }
    }

    /// Whether the log that this page shows is another one than at the last look.
    async fn log_grew(&mut self) -> bool {
        let Scope::Guest(id, LivePart::Log) = &self.scope else { return false };
        let Ok((tail, before)) = self.state.guests.log_tail(id).await else { return false };
        let length = before.saturating_add(tail.len() as u64);
        self.log_length.replace(length) != Some(length)
    }
}

enum Woken {
    Changed(Change),
    Lagged,
    Heartbeat,
    End,
}

async fn wait(state: &State, who: &Viewer, changes: &mut Receiver<Change>, heartbeat: Instant) -> Woken {
    tokio::select! {
        () = who.ended.cancelled() => Woken::End,
        () = state.ending.cancelled() => Woken::End,
        change = changes.recv() => match change {
            Ok(change) => Woken::Changed(change),
            Err(RecvError::Lagged(_)) => Woken::Lagged,
            Err(RecvError::Closed) => Woken::End,
        },
        () = sleep_until(heartbeat) => match &who.known {
            Some(known) if !state.auth.still_holds(known).await.unwrap_or(true) => Woken::End,
            Some(_) | None => Woken::Heartbeat,
        },
    }
}

/// `{"kind":"guest","id":"…"}`: read the rest where it is. `everything` after events were lost.
#[derive(Serialize)]
struct ApiEvent {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Id>,
}

async fn api_events(state: web::Data<State>, who: Viewer) -> HttpResponse {
    let changes = state.changes.listen();
    let first = (state, who, changes);
    sse(stream::unfold(first, |(state, who, mut changes)| async move {
        let told = match wait(&state, &who, &mut changes, Instant::now() + HEARTBEAT).await {
            Woken::End => return None,
            Woken::Heartbeat => Bytes::from_static(b": here\n\n"),
            Woken::Lagged => json_event(&ApiEvent { kind: "everything", id: None }),
            Woken::Changed(change) => json_event(&match change {
                Change::Guest(id) => ApiEvent { kind: "guest", id: Some(id) },
                Change::Task(id) => ApiEvent { kind: "task", id: Some(id) },
                Change::Images => ApiEvent { kind: "images", id: None },
                Change::Host => ApiEvent { kind: "host", id: None },
            }),
        };
        Some((Ok(told), (state, who, changes)))
    }))
}

fn json_event(event: &ApiEvent) -> Bytes {
    let json = serde_json::to_string(event).unwrap_or_default();
    Bytes::from(format!("id: {}\ndata: {json}\n\n", NEXT_EVENT.fetch_add(1, Relaxed)))
}

fn sse(events: impl futures_util::Stream<Item = Result<Bytes, Error>> + 'static) -> HttpResponse {
    HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header((header::CACHE_CONTROL, "no-store"))
        // A compressor would hold events back until the stream ends.
        .insert_header((header::CONTENT_ENCODING, "identity"))
        .streaming(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_woken_by_what_it_shows() {
        let id = Id::random();
        let scope = Scope::parse(&format!("task:{id}"), "").unwrap();
        assert!(scope.shows(&Change::Task(id.clone())));
        assert!(!scope.shows(&Change::Task(Id::random())));
        assert!(!scope.shows(&Change::Guest(id)));
        assert!(Scope::parse("home", "").unwrap().shows(&Change::Images));
        for bad in ["", "guest", "guest:", "guest:x y", "task", "nonsense:1", "images:1"] {
            assert!(Scope::parse(bad, "").is_err(), "{bad}");
        }
    }
}
