//! One task for each guest: takes an event, asks the lifecycle table, carries the action out, publishes the new status.
//!
//! Nobody else starts, ends or steers an engine. The task itself waits only for its inbox and the database; what takes
//! longer runs beside it and reports back through the inbox.

mod history;
mod plugged;
mod suspension;

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, sleep_until},
};

use super::{
    engine_client::{Connected, EngineClient},
    lifecycle::{Action, Event, State, step},
    status::{Engine, Status},
    suspended,
};
use crate::{
    changes::{Change, Changes},
    error::{Error, ErrorKind, Result},
    host_client::HostClient,
    store::{
        Store, guests,
        users::{CRASHED, SUSPEND_FAILED},
    },
    types::{Id, now_ms},
    wire::{EndKind, EngineAction, EngineEnd, EngineMessage, HostAnswer, HostRequest, Launch, Observed},
};

/// A guest that has not reacted to its power button for this long gets a note.
const SHUTDOWN_NOTE: Duration = Duration::from_secs(30);
/// After a request to end in order, the engine is ended by force.
const PLUG: Duration = Duration::from_secs(2);
/// After force, `hostd` is asked whether the engine is really gone.
const VERIFY: Duration = Duration::from_secs(3);
/// Between two attempts to reach an engine that lives: at first, and at most.
const RECONNECT_FIRST: Duration = Duration::from_millis(20);
const RECONNECT_MOST: Duration = Duration::from_secs(5);
const INBOX_LEN: usize = 64;

/// What every supervisor needs of the server.
#[derive(Clone)]
pub struct Surroundings {
    pub store: Arc<Store>,
    pub host: HostClient,
    pub changes: Changes,
    pub state_dir: PathBuf,
    /// Where the folders with the engines' sockets are.
    pub guests_run_dir: PathBuf,
    /// Lives as long as the server; handlers run on shorter ones.
    pub runtime: Handle,
}

/// How a guest is found when the server starts.
pub enum Found {
    /// No engine; why the last one failed, if it did.
    Off { failure: Option<String> },
    /// No engine; its state is on disk.
    Suspended,
    /// Its engine lives. `asked_off`: it was asked to end before.
    Alive { asked_off: bool, saved: bool },
    /// Its engine has ended while no server looked.
    Ended { end: EngineEnd, saved: bool },
}

/// The way to a guest's supervisor. It ends when the last of these is gone.
#[derive(Clone)]
pub struct Supervisor {
    inbox: mpsc::Sender<Message>,
    status: watch::Receiver<Status>,
    /// Held while a guest is changed, deleted or started, so that these never mix.
    pub busy: Arc<tokio::sync::Mutex<()>>,
}

enum Message {
    /// A person asks. `launch` comes with `Start` alone.
    Ask {
        event: Event,
        launch: Option<Box<Launch>>,
        reply: oneshot::Sender<Result<()>>,
    },
    StartAnswered {
        result: Result<()>,
        reply: oneshot::Sender<Result<()>>,
    },
    CannotStart(Error),
    Connected {
        attempt: u64,
        result: Result<Connected>,
    },
    News {
        attempt: u64,
        message: EngineMessage,
    },
    Disconnected {
        attempt: u64,
    },
    Gone(EngineEnd),
}

impl Supervisor {
    pub fn start(guest: Id, found: Found, around: Surroundings) -> Supervisor {
        let (inbox, messages) = mpsc::channel(INBOX_LEN);
        let (state, reason) = match &found {
            Found::Off { failure: None } => (State::Stopped, None),
            Found::Off { failure } => (State::Failed, failure.clone()),
            Found::Suspended => (State::Suspended, None),
            Found::Alive { asked_off: true, .. } => (State::Stopping, None),
            Found::Alive { asked_off: false, .. } | Found::Ended { .. } => (State::Starting, None),
        };
        let (publish, status) = watch::channel(Status { state, reason, ..Status::unknown() });
        let around_runtime = around.runtime.clone();
        let task = Task {
            guest,
            around,
            publish,
            inbox: inbox.downgrade(),
            attempt: 0,
            retry: RECONNECT_FIRST,
            connect_at: None,
            note_at: None,
            force_at: None,
            pulled: false,
            crash_noted: false,
            saved: match found {
                Found::Off { .. } => false,
                Found::Suspended => true,
                Found::Alive { saved, .. } | Found::Ended { saved, .. } => saved,
            },
        };
        around_runtime.spawn(task.run(found, messages));
        Supervisor { inbox, status, busy: Arc::default() }
    }

    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Follows the status; closed when the guest is forgotten.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Asks for what a person wants.
    ///
    /// Errors: `Conflict` when it does not fit the state, with the sentence; what engine or `hostd` refuse with.
    pub async fn ask(&self, event: Event, launch: Option<Box<Launch>>) -> Result<()> {
        let (reply, replied) = oneshot::channel();
        self.inbox.send(Message::Ask { event, launch, reply }).await.map_err(|_| ended())?;
        replied.await.map_err(|_| ended())?
    }

    /// The guest should have been started, and cannot be.
    pub async fn cannot_start(&self, why: Error) {
        let _ = self.inbox.send(Message::CannotStart(why)).await;
    }

    /// `hostd` saw the engine's process end.
    pub async fn engine_gone(&self, end: EngineEnd) {
        let _ = self.inbox.send(Message::Gone(end)).await;
    }

    /// Waits until `wanted` holds, at most `longest`; the status then.
    pub async fn wait_for(&self, longest: Duration, wanted: impl FnMut(&Status) -> bool) -> Status {
        let mut status = self.status.clone();
        let _ = tokio::time::timeout(longest, status.wait_for(wanted)).await;
        self.status()
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Unavailable, "The server is ending; try again.")
}

struct Task {
    guest: Id,
    around: Surroundings,
    publish: watch::Sender<Status>,
    /// Weak, so that the task ends with its last user; upgraded for work beside it.
    inbox: mpsc::WeakSender<Message>,
    /// Numbers connections, so that words of an old one do not count.
    attempt: u64,
    retry: Duration,
    connect_at: Option<Instant>,
    note_at: Option<Instant>,
    force_at: Option<Instant>,
    /// The plug is being pulled: what the engine still says does not count.
    pulled: bool,
    /// That this engine's guest crashed is in its history.
    crash_noted: bool,
    /// The guest's state is on disk, and no engine has said that it goes on from there.
    saved: bool,
}

impl Task {
    async fn run(mut self, found: Found, mut messages: mpsc::Receiver<Message>) {
        match found {
            Found::Off { .. } | Found::Suspended => {}
            Found::Alive { .. } => self.connect(),
            Found::Ended { end, .. } => self.gone(end).await,
        }
        loop {
            let next = [self.connect_at, self.note_at, self.force_at].into_iter().flatten().min();
            tokio::select! {
                message = messages.recv() => match message {
                    Some(message) => self.handle(message).await,
                    None => return,
                },
                () = async { sleep_until(next.unwrap_or_else(Instant::now)).await }, if next.is_some() => self.on_time(),
            }
        }
    }

    async fn handle(&mut self, message: Message) {
        match message {
            Message::Ask { event, launch, reply } => self.ask(event, launch, reply).await,
            Message::StartAnswered { result, reply } => {
                match &result {
                    Ok(()) => self.connect(),
                    Err(error) => self.start_refused(error).await,
                }
                let _ = reply.send(result);
            }
            Message::CannotStart(error) => {
                if let Ok((next, _)) = step(self.state(), Event::Start) {
                    self.enter(next, None);
                    self.start_refused(&error).await;
                }
            }
            Message::Connected { attempt, result } if attempt == self.attempt => match result {
                Ok(connected) => self.connected(connected).await,
                Err(_) => self.connect_later(),
            },
            Message::News { attempt, message } if attempt == self.attempt => self.news(message).await,
            Message::Disconnected { attempt } if attempt == self.attempt => {
                self.change(|status| status.client = None);
                self.connect_later();
            }
            Message::Connected { .. } | Message::News { .. } | Message::Disconnected { .. } => {}
            Message::Gone(end) => self.gone(end).await,
        }
    }

    /// A person's wish: table first, then what must last, then the action.
    async fn ask(&mut self, event: Event, launch: Option<Box<Launch>>, reply: oneshot::Sender<Result<()>>) {
        let planned = step(self.state(), event.clone());
        // Refused before it is kept: a guest that cannot be asked is not meant to be off yet.
        if matches!(planned, Ok((_, Some(Action::PressPowerButton))))
            && self.client().is_none_or(|client| client.stranger().is_some())
        {
            let text = "The engine cannot be asked now; try again, or power the guest off.";
            let _ = reply.send(Err(Error::new(ErrorKind::Unavailable, text)));
            return;
        }
        let checked = match planned {
            Ok((next, action)) => self.keep(&event).await.map(|()| (next, action)),
            Err(refused) => Err(Error::conflict(refused.to_string())),
        };
        let (next, action) = match checked {
            Ok(checked) => checked,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        self.enter(next, None);
        match action {
            Some(Action::StartEngine) => self.start_engine(launch, reply),
            Some(Action::PullPlug) => {
                self.pull_plug();
                let _ = reply.send(Ok(()));
            }
            Some(Action::PressPowerButton) => {
                self.note_at = Some(Instant::now() + SHUTDOWN_NOTE);
                self.send(EngineAction::PressPowerButton, reply);
            }
            Some(Action::SendPause) => self.send(EngineAction::Pause, reply),
            Some(Action::SendResume) => self.send(EngineAction::Resume, reply),
            Some(Action::SendReset) => self.send(EngineAction::Reset, reply),
            Some(Action::SendSuspend) => self.send_suspend(reply),
            Some(Action::Discard) => {
                self.forget_saved().await;
                let _ = reply.send(Ok(()));
            }
            None => {
                let _ = reply.send(Ok(()));
            }
        }
    }

    /// Writes what a wish means beyond this run of the engine, before anything is done for it.
    async fn keep(&self, event: &Event) -> Result<()> {
        let on = match event {
            Event::Start | Event::Resume => true,
            Event::Shutdown | Event::Kill => false,
            // Being suspended may yet fail; what it means is kept when it is done.
            Event::Pause | Event::Reset | Event::Suspend => return Ok(()),
            Event::Attached(_) | Event::Told(_) => return Ok(()),
            Event::StartRefused | Event::EngineGone(_) | Event::ResumeFailed => return Ok(()),
        };
        let (guest, starts) = (self.guest.clone(), *event == Event::Start);
        let write = move |tx: &crate::store::Tx| {
            guests::set_desired(tx, &guest, on)?;
            if starts { guests::set_failure(tx, &guest, None) } else { Ok(()) }
        };
        self.around.store.writing(write).await
    }

    fn start_engine(&mut self, launch: Option<Box<Launch>>, reply: oneshot::Sender<Result<()>>) {
        let Some(inbox) = self.inbox.upgrade() else { return };
        self.pulled = false;
        self.retry = RECONNECT_FIRST;
        let host = self.around.host.clone();
        tokio::spawn(async move {
            let result = match launch {
                Some(launch) => host.call(HostRequest::StartEngine(launch)).await.map(|_| ()),
                None => Err(Error::internal("Cannot start the guest.", "a start without a launch")),
            };
            let _ = inbox.send(Message::StartAnswered { result, reply }).await;
        });
    }

    async fn start_refused(&mut self, error: &Error) {
        tracing::warn!(guest = %self.guest, error = %error.for_log(), "the engine was not started");
        if self.saved {
            // What it is to go on from is whole, and the next start tries again.
            self.not_resumed(error.to_string()).await;
        } else if let Ok((next, _)) = step(self.state(), Event::StartRefused) {
            let reason = error.to_string();
            self.keep_failure(&reason).await;
            self.enter(next, Some(reason));
        }
        // It may live after all, unknown to us: then it is found by its socket.
        if error.kind() == ErrorKind::Conflict {
            self.connect();
        }
    }

    /// Tries to reach the engine, beside this task.
    fn connect(&mut self) {
        let Some(inbox) = self.inbox.upgrade() else { return };
        self.connect_at = None;
        self.attempt += 1;
        let attempt = self.attempt;
        let socket = self.around.guests_run_dir.join(self.guest.as_str()).join("control.sock");
        tokio::spawn(async move {
            let result = EngineClient::connect(&socket).await;
            let _ = inbox.send(Message::Connected { attempt, result }).await;
        });
    }

    fn connect_later(&mut self) {
        if self.state().is_live() {
            self.connect_at = Some(Instant::now() + self.retry);
            self.retry = (self.retry * 2).min(RECONNECT_MOST);
        }
    }

    async fn connected(&mut self, connected: Connected) {
        let Connected { client, hello, mut news } = connected;
        let Some(inbox) = self.inbox.upgrade() else { return };
        if hello.guest != self.guest {
            tracing::error!(guest = %self.guest, other = %hello.guest, "another guest's engine answers");
            return self.connect_later();
        }
        // It greets when it goes on: what it was restored from is spent.
        if self.saved {
            self.forget_saved().await;
        }
        let attempt = self.attempt;
        tokio::spawn(async move {
            while let Some(message) = news.recv().await {
                if inbox.send(Message::News { attempt, message }).await.is_err() {
                    return;
                }
            }
            let _ = inbox.send(Message::Disconnected { attempt }).await;
        });
        self.retry = RECONNECT_FIRST;
        if self.state() == State::Failed {
            let guest = self.guest.clone();
            self.log(self.around.store.writing(move |tx| guests::set_failure(tx, &guest, None)).await);
        }
        let note = client.stranger().map(str::to_owned);
        self.publish.send_modify(|status| {
            status.started_ms = Some(hello.started_ms);
            status.engine = Some(Engine { pid: hello.pid, version: hello.version });
            status.addresses = hello.addresses;
            status.cd_present = Some(hello.cd_present);
            status.crashed = hello.crashed;
            status.balloon_bytes = hello.balloon_bytes;
            status.agent = hello.agent;
            status.client = Some(client);
        });
        self.plugged(hello.plugged).await;
        let reason = reason_of(&hello.observed).or(note);
        self.observe(Event::Attached(hello.observed), reason);
    }

    async fn news(&mut self, message: EngineMessage) {
        match message {
            EngineMessage::State(observed) => {
                let reason = reason_of(&observed);
                self.observe(Event::Told(observed), reason);
            }
            EngineMessage::Addresses(addresses) => self.change(|status| status.addresses = addresses),
            EngineMessage::Balloon { bytes } => self.change(|status| status.balloon_bytes = bytes),
            EngineMessage::Agent(facts) => self.change(|status| status.agent = facts),
            EngineMessage::CdChanged { present } => self.change(|status| status.cd_present = Some(present)),
            EngineMessage::Crashed => {
                self.change(|status| status.crashed = true);
                // Once: a guest that crashes and resets for ever does not push everything else out of the trail.
                if !std::mem::replace(&mut self.crash_noted, true) {
                    self.note(CRASHED).await;
                }
            }
            EngineMessage::Reset => {
                tracing::info!(guest = %self.guest, "the guest was reset");
                self.change(|status| status.crashed = false);
            }
            EngineMessage::SuspendFailed(reason) => {
                tracing::warn!(guest = %self.guest, reason, "the guest could not be suspended");
                suspended::remove(&self.around.state_dir, &self.guest);
                self.change(|status| status.reason = Some(format!("The guest could not be suspended: {reason}.")));
                self.note(SUSPEND_FAILED).await;
            }
            EngineMessage::Plugged(plugged) => self.plugged(Some(plugged)).await,
            EngineMessage::Hello(_) | EngineMessage::Reply { .. } => {}
        }
    }

    /// What the engine says about itself, unless its plug is being pulled.
    fn observe(&mut self, event: Event, reason: Option<String>) {
        if self.pulled {
            return self.tell();
        }
        let before = self.state();
        match step(before, event) {
            Ok((State::Stopping, _)) => self.tell(),
            Ok((next, _)) => self.enter(next, reason),
            Err(refused) => tracing::debug!(guest = %self.guest, ?refused, "news that do not fit"),
        }
    }

    fn pull_plug(&mut self) {
        let in_order = self.client().filter(|client| !self.pulled && client.stranger().is_none());
        self.pulled = true;
        self.note_at = None;
        let Some(client) = in_order else {
            self.force_at = None;
            return self.force();
        };
        self.force_at = Some(Instant::now() + PLUG);
        tokio::spawn(async move { client.call(EngineAction::PowerOff, None).await });
    }

    /// Has the engine killed, and makes sure that it is gone.
    fn force(&self) {
        let Some(inbox) = self.inbox.upgrade() else { return };
        let (host, guest) = (self.around.host.clone(), self.guest.clone());
        tokio::spawn(async move {
            if let Err(error) = host.call(HostRequest::KillEngine(guest.clone())).await {
                tracing::error!(%guest, error = %error.for_log(), "cannot end the engine");
            }
            sleep(VERIFY).await;
            let lives = match host.call(HostRequest::ListEngines).await {
                Ok((HostAnswer::Engines(engines), _)) => engines.iter().any(|engine| engine.guest == guest),
                Ok(_) | Err(_) => true,
            };
            if !lives {
                let end = EngineEnd { how: EndKind::Killed, reason: "The engine is gone.".into() };
                let _ = inbox.send(Message::Gone(end)).await;
            }
        });
    }

    async fn gone(&mut self, end: EngineEnd) {
        let Ok((next, _)) = step(self.state(), Event::EngineGone(end.how)) else { return };
        let (next, end) = match next {
            State::Suspended => self.suspended(next, end).await,
            _ => (next, end),
        };
        tracing::info!(guest = %self.guest, how = ?end.how, reason = %end.reason, "the engine has ended");
        let reason = (next == State::Failed).then_some(end.reason);
        // It ended before it greeted, and what it should have gone on from is still whole.
        let resumes = self.saved && next != State::Suspended;
        let whole = resumes && suspended::find(&self.around.state_dir, &self.guest) == suspended::Found::Whole;
        if resumes && !whole {
            self.forget_saved().await;
        }
        if !whole && next != State::Suspended {
            // What an engine wrote that was killed over it.
            suspended::remove(&self.around.state_dir, &self.guest);
            self.forget_left(|_| false).await;
            self.keep_end(reason.clone()).await;
        }
        self.attempt += 1; // words that are still on their way do not count
        (self.pulled, self.crash_noted) = (false, false);
        self.publish.send_modify(|status| {
            status.started_ms = None;
            status.engine = None;
            status.addresses = Vec::new();
            status.cd_present = None;
            status.crashed = false;
            status.balloon_bytes = 0;
            status.plugged = None;
            status.agent = None;
            status.client = None;
        });
        if whole {
            return self.not_resumed(reason.unwrap_or_else(|| "it was powered off.".into())).await;
        }
        self.enter(next, reason);
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        let due = |at: &mut Option<Instant>| at.take_if(|at| *at <= now).is_some();
        if due(&mut self.connect_at) {
            self.connect();
        }
        if due(&mut self.force_at) && self.state() == State::Stopping {
            self.force();
        }
        if due(&mut self.note_at) && self.state() == State::Stopping {
            let text = format!(
                "The guest has not reacted to its power button for {} s. Press it again, or power the guest off.",
                SHUTDOWN_NOTE.as_secs()
            );
            self.change(|status| status.reason = Some(text));
        }
    }

    fn send(&self, action: EngineAction, reply: oneshot::Sender<Result<()>>) {
        let Some(client) = self.client() else {
            let _ = reply.send(Err(Error::new(ErrorKind::Unavailable, "The engine does not answer now; try again.")));
            return;
        };
        tokio::spawn(async move {
            let _ = reply.send(client.call(action, None).await.map(|_| ()));
        });
    }

    fn enter(&mut self, state: State, reason: Option<String>) {
        if !state.is_live() {
            (self.connect_at, self.note_at, self.force_at) = (None, None, None);
        }
        if state != State::Stopping {
            self.note_at = None;
        }
        self.change(|status| {
            if status.state != state {
                status.since_ms = Some(now_ms());
            }
            status.state = state;
            status.reason = reason;
        });
    }

    fn change(&self, change: impl FnOnce(&mut Status)) {
        self.publish.send_modify(change);
        self.tell();
    }

    fn tell(&self) {
        self.around.changes.tell(Change::Guest(self.guest.clone()));
    }

    fn log(&self, result: Result<()>) {
        if let Err(error) = result {
            tracing::error!(guest = %self.guest, error = %error.for_log(), "cannot note the end of an engine");
        }
    }

    fn state(&self) -> State {
        self.publish.borrow().state
    }

    fn client(&self) -> Option<EngineClient> {
        self.publish.borrow().client.clone()
    }
}

fn reason_of(observed: &Observed) -> Option<String> {
    match observed {
        Observed::Running => None,
        Observed::Paused { reason } => reason.clone(),
    }
}
