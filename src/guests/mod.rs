//! Guests: the service behind pages, API and command line.
//!
//! What a guest is made of is in the database; what it does is known by its [`supervisor::Supervisor`]. This module joins both,
//! and is the only way to change either.

mod disks;
pub mod engine_client;
pub mod freeze;
mod kept;
mod launch;
pub mod lifecycle;
mod make;
mod plug;
pub mod status;
pub mod supervisor;
mod suspended;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{io::AsyncReadExt, net::UnixStream, runtime::Handle, sync::mpsc};

use self::{
    lifecycle::{Event, State},
    status::Status,
    supervisor::{Found, Supervisor, Surroundings},
};
use crate::{
    error::{Error, ErrorKind, Result},
    host_client::{EngineGone, HostClient},
    spec::{BootFrom, DiskBus, RateLimit},
    store::{
        Store, Tx, blocking,
        guests::{self as rows, DiskRow, GuestRow},
        images,
    },
    tasks::Tasks,
    types::{Id, show_size},
    wire::{EngineAction, EngineEnd, HostAnswer, HostRequest, Place},
};

pub use disks::host_memory;

/// How long a request waits for what it caused; the guest goes on by itself afterwards.
const SETTLE: Duration = Duration::from_secs(5);
/// How long a picture waits for an engine that is just being started.
const REACHED: Duration = Duration::from_secs(20);
/// A screenshot this young is shown again instead of asking the engine.
const SCREENSHOT_AGE: Duration = Duration::from_secs(1);
/// The last picture of a guest is kept so long, for pages that look while its engine is going.
const SCREENSHOT_KEPT: Duration = Duration::from_secs(10);
/// Pictures that are kept at most: one for each guest and width, up to a few megabytes each.
const SCREENSHOTS_MAX: usize = 64;
/// A running guest that keeps less can do nothing with it.
const MEMORY_KEPT_MIN: u64 = 32 << 20;
/// The end of a guest's log that is shown.
pub const LOG_TAIL_BYTES: u64 = 64 << 10;
/// More than an engine keeps of a guest's serial console.
const SCROLLBACK_BYTES_MAX: u64 = 4 << 20;

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct Guests(Arc<Inner>);

struct Inner {
    around: Surroundings,
    tasks: Tasks,
    state_dir: PathBuf,
    supervisors: Mutex<BTreeMap<Id, Supervisor>>,
    /// The tasks that prepare disks, by guest.
    preparing: Mutex<HashMap<Id, Id>>,
    screenshots: Mutex<HashMap<(Id, Option<u32>), Taken>>,
}

/// A screenshot, and when it was taken.
type Taken = (std::time::Instant, Vec<u8>);

/// Everything there is to say about a guest.
#[derive(Clone, Debug)]
pub struct Guest {
    pub row: GuestRow,
    /// In boot order.
    pub disks: Vec<DiskRow>,
    pub kernel: Option<ImageName>,
    pub initrd: Option<ImageName>,
    pub cd: Option<ImageName>,
    pub status: Status,
    /// The task that prepares its disks.
    pub task: Option<Id>,
}

/// An image, as guests name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    pub id: Id,
    pub name: String,
}

/// What the service needs of the server.
pub struct Parts {
    pub store: Arc<Store>,
    pub host: HostClient,
    pub engines_gone: mpsc::UnboundedReceiver<EngineGone>,
    pub tasks: Tasks,
    pub changes: crate::changes::Changes,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
}

impl Guest {
    /// Everything that its firmware tries, first to last; empty without firmware.
    pub fn boot_order(&self) -> Vec<BootFrom> {
        if !self.row.boot.is_firmware() {
            return Vec::new();
        }
        launch::spec_of(&self.row, &self.disks).full_boot_order()
    }
}

impl Guests {
    /// Tidies up after the last server, finds the engines that live, and starts the guests that should run and do not.
    ///
    /// Errors: the database fails. A supervisor that does not answer is logged, and nothing is taken for alive.
    pub async fn start(parts: Parts) -> Result<Guests> {
        let Parts { store, host, mut engines_gone, tasks, changes, state_dir, run_dir } = parts;
        let unfinished = store.writing(rows::delete_unfinished).await?;
        disks::remove(&state_dir, &unfinished);
        let guests_run_dir = run_dir.join("guests");
        let around = Surroundings {
            store,
            host,
            changes,
            state_dir: state_dir.clone(),
            guests_run_dir,
            runtime: Handle::current(),
        };
        let mut all = around.store.reading(rows::list).await?;
        let live = live_engines(&around.host).await;
        // Sent before the answer: engines that ended while no server looked.
        let mut ended: HashMap<Id, EngineEnd> = HashMap::new();
        while let Ok(gone) = engines_gone.try_recv() {
            ended.insert(gone.guest, gone.end);
        }
        for row in &mut all {
            if live.as_ref().is_some_and(|live| !live.contains(&row.id)) {
                check_saved(&around, row).await;
            }
        }
        let guests = Guests(Arc::new(Inner {
            around,
            tasks,
            state_dir,
            supervisors: Mutex::default(),
            preparing: Mutex::default(),
            screenshots: Mutex::default(),
        }));
        let mut to_start = Vec::new();
        let known = live.is_some();
        let live = live.unwrap_or_default();
        for row in all {
            let saved = row.suspended;
            let found = match (live.contains(&row.id), ended.remove(&row.id)) {
                (true, _) => Found::Alive { asked_off: !row.desired_on, saved },
                (false, Some(end)) => Found::Ended { end, saved },
                (false, None) => {
                    if known && row.desired_on && row.failure.is_none() {
                        to_start.push(row.id.clone());
                    }
                    if saved { Found::Suspended } else { Found::Off { failure: row.failure } }
                }
            };
            guests.supervise(row.id, found);
        }
        guests.clone().forward(engines_gone);
        guests.clone().bring_back(to_start);
        Ok(guests)
    }

    /// Hands news of ended engines to their supervisors.
    fn forward(self, mut engines_gone: mpsc::UnboundedReceiver<EngineGone>) {
        tokio::spawn(async move {
            while let Some(gone) = engines_gone.recv().await {
                match self.supervisor(&gone.guest) {
                    Some(supervisor) => supervisor.engine_gone(gone.end).await,
                    None => tracing::warn!(guest = %gone.guest, "the engine of an unknown guest has ended"),
                }
            }
        });
    }

    /// Starts, one after the other, the guests that were on when the host went down.
    fn bring_back(self, ids: Vec<Id>) {
        tokio::spawn(async move {
            for id in ids {
                tracing::info!(guest = %id, "starting a guest that was on");
                if let Err(error) = self.act(&id, Event::Start).await {
                    tracing::warn!(guest = %id, error = %error.for_log(), "a guest that was on does not start");
                    if let Some(supervisor) = self.supervisor(&id) {
                        supervisor.cannot_start(error).await;
                    }
                }
            }
        });
    }

    fn supervise(&self, id: Id, found: Found) -> Supervisor {
        let supervisor = Supervisor::start(id.clone(), found, self.0.around.clone());
        self.supervisors().insert(id, supervisor.clone());
        supervisor
    }

    fn supervisors(&self) -> MutexGuard<'_, BTreeMap<Id, Supervisor>> {
        self.0.supervisors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn supervisor(&self, id: &Id) -> Option<Supervisor> {
        self.supervisors().get(id).cloned()
    }

    fn supervisor_of(&self, id: &Id) -> Result<Supervisor> {
        self.supervisor(id).ok_or_else(|| Error::not_found("There is no such guest."))
    }

    fn preparing(&self) -> MutexGuard<'_, HashMap<Id, Id>> {
        self.0.preparing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All guests, by name.
    pub async fn list(&self) -> Result<Vec<Guest>> {
        let statuses = self.statuses();
        let all = self
            .0
            .around
            .store
            .reading(|tx| rows::list(tx)?.into_iter().map(|row| joined(tx, row)).collect::<Result<Vec<_>>>())
            .await?;
        Ok(all.into_iter().filter_map(|guest| self.with_status(guest, &statuses)).collect())
    }

    /// One guest, by id or name.
    ///
    /// Errors: `NotFound`.
    pub async fn get(&self, id_or_name: &str) -> Result<Guest> {
        let (named, statuses) = (id_or_name.to_owned(), self.statuses());
        let found = self
            .0
            .around
            .store
            .reading(move |tx| rows::named(tx, &named)?.map(|row| joined(tx, row)).transpose())
            .await?;
        let missing = || Error::not_found(format!("There is no guest \"{}\".", crate::types::shorten(id_or_name)));
        found.and_then(|guest| self.with_status(guest, &statuses)).ok_or_else(missing)
    }

    /// What every guest does now. Taken before rows are read: a supervisor writes what lasts before it says what is, so a guest that is
    /// shown as stopped is never shown as meant to run.
    fn statuses(&self) -> BTreeMap<Id, Status> {
        self.supervisors().iter().map(|(id, supervisor)| (id.clone(), supervisor.status())).collect()
    }

    /// A guest that is just being made or deleted has no supervisor, and is not shown.
    fn with_status(&self, guest: Guest, statuses: &BTreeMap<Id, Status>) -> Option<Guest> {
        let status = statuses.get(&guest.row.id)?.clone();
        let task = self.preparing().get(&guest.row.id).cloned();
        Some(Guest { status, task, ..guest })
    }

    /// Carries out what a person asks for, and waits a moment for it to show. `event` is one of those of people.
    ///
    /// Errors: `Conflict` when it does not fit the state or the guest is not complete; `NotFound`; what the engine says.
    pub async fn act(&self, id: &Id, event: Event) -> Result<()> {
        let supervisor = self.supervisor_of(id)?;
        let suspended = supervisor.status().state == State::Suspended;
        if event == Event::Start || event == Event::Resume && suspended {
            return self.start_once(id, None).await;
        }
        {
            let _busy = match event {
                Event::Suspend => {
                    let busy = supervisor.busy.lock().await;
                    self.may_be_suspended(&supervisor, id).await?;
                    Some(busy)
                }
                _ => None,
            };
            supervisor.ask(event.clone(), None).await?;
        }
        match event {
            Event::Pause => drop(supervisor.wait_for(SETTLE, |status| status.state != State::Running).await),
            Event::Resume => drop(supervisor.wait_for(SETTLE, |status| status.state != State::Paused).await),
            Event::Suspend => {
                let shows = |status: &Status| status.state == State::Suspended || status.reason.is_some();
                drop(supervisor.wait_for(SETTLE, shows).await);
            }
            Event::Kill => drop(supervisor.wait_for(SETTLE, |status| !status.state.is_live()).await),
            _ => {}
        }
        Ok(())
    }

    /// Starts a guest, this once from another device than its boot order says (`cd`, `network`, a disk by id or as `disk1`) or into
    /// the firmware's setup (`setup`). A reset goes back to the boot order.
    ///
    /// Errors: as `act`; `Invalid` at `boot`.
    pub async fn start_once(&self, id: &Id, once: Option<&str>) -> Result<()> {
        let supervisor = self.supervisor_of(id)?;
        let _busy = supervisor.busy.lock().await;
        let launch = if supervisor.status().state.allows(Event::Start) {
            if supervisor.status().state != State::Suspended {
                self.forget_left(id).await?;
            }
            let mut launch = self.launch(id, once).await?;
            // What the supervisor knows: a full disk may have kept it from the row.
            launch.resume = supervisor.status().state == State::Suspended;
            Some(Box::new(launch))
        } else {
            None // the supervisor says why not
        };
        supervisor.ask(Event::Start, launch).await?;
        supervisor.wait_for(SETTLE, |status| status.state != State::Starting).await;
        Ok(())
    }

    /// Does something in several steps, whoever waits for it or has stopped waiting: a browser that goes away leaves nothing half done.
    async fn to_its_end<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let done = self.0.around.runtime.spawn(work).await;
        done.unwrap_or_else(|error| Err(Error::internal("The change was not completed.", error)))
    }

    /// Has a running guest keep so much of its memory and give the rest back to the host, until it is told otherwise or starts anew.
    ///
    /// Errors: `Invalid` at `memory_bytes`; `Conflict` when it does not run; what the engine says.
    pub async fn set_memory(&self, id: &Id, memory_bytes: u64) -> Result<()> {
        let supervisor = self.supervisor_of(id)?;
        let guest = id.clone();
        let row = self.0.around.store.reading(move |tx| rows::by_id(tx, &guest)).await?;
        let whole = row.ok_or_else(|| Error::not_found("There is no such guest."))?.memory_bytes;
        if !(MEMORY_KEPT_MIN.min(whole)..=whole).contains(&memory_bytes) {
            let (least, most) = (show_size(MEMORY_KEPT_MIN.min(whole)), show_size(whole));
            return Err(Error::invalid(
                "memory_bytes",
                format!("This guest can keep {least} to {most} while it runs."),
            ));
        }
        let status = supervisor.status();
        if !status.state.is_live() {
            return Err(Error::conflict("The guest does not run. Its memory is changed with its hardware."));
        }
        let bytes = whole - memory_bytes;
        status.client.ok_or_else(no_engine)?.call(EngineAction::Balloon { bytes }, None).await?;
        supervisor.wait_for(SETTLE, |status| status.balloon_bytes == bytes).await;
        Ok(())
    }

    /// Changes how much the guest may ask of one of its disks (an id, or its place: `disk1`), also while it runs.
    ///
    /// Errors: `NotFound`; `Invalid` at `bytes_per_s`, `operations_per_s` or `disk`; what the engine says; nothing is changed then.
    pub async fn limit_disk(&self, guest: &Guest, disk: &str, limit: RateLimit) -> Result<()> {
        let missing = || Error::not_found("The guest has no such disk.");
        let Ok(BootFrom::Disk(disk)) = launch::boot_from(disk, &guest.disks) else { return Err(missing()) };
        let row = guest.disks.iter().find(|row| row.id == disk).ok_or_else(missing)?;
        limit.check().map_err(|bad| Error::invalid(bad.field, bad.message))?;
        if row.bus != DiskBus::Virtio && !limit.is_none() {
            return Err(Error::invalid("disk", "Only a disk on virtio can be limited."));
        }
        let supervisor = self.supervisor_of(&guest.row.id)?;
        let _busy = supervisor.busy.lock().await;
        let status = supervisor.status();
        let mut engine = None;
        if status.state.is_live() && row.bus == DiskBus::Virtio {
            let client = status.client.ok_or_else(no_engine)?;
            client.call(EngineAction::LimitDisk { disk: disk.clone(), limit }, None).await?;
            engine = Some((client, EngineAction::LimitDisk { disk: disk.clone(), limit: row.limit }));
        }
        let written = self.0.around.store.writing(move |tx| rows::set_disk_limit(tx, &disk, limit)).await;
        if let (Err(_), Some((client, as_before))) = (&written, engine)
            && let Err(error) = client.call(as_before, None).await
        {
            tracing::warn!(guest = %guest.row.id, %error, "a limit that could not be kept lasts until the guest stops");
        }
        let written = written?;
        self.0.around.changes.tell(crate::changes::Change::Guest(guest.row.id.clone()));
        if written { Ok(()) } else { Err(missing()) }
    }

    /// The guest's screen as PNG, at most `max_width` wide and at most a second old.
    ///
    /// Errors: `NotFound` when it does not run; `Unavailable` when its engine does not answer.
    pub async fn screenshot(&self, id: &Id, max_width: Option<u32>) -> Result<Vec<u8>> {
        // A page draws a guest as soon as it is being started; its picture is there when its engine has been reached.
        let reached = |status: &Status| status.client.is_some() || !status.state.is_live();
        let no_screen = || Error::not_found("The guest does not run, so it has no screen.");
        let supervisor = self.supervisor_of(id)?;
        let status = supervisor.wait_for(REACHED, reached).await;
        if !status.state.is_live() {
            return Err(no_screen());
        }
        let key = (id.clone(), max_width);
        let shots = || self.0.screenshots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, png)) = shots().get(&key).filter(|(taken, _)| taken.elapsed() < SCREENSHOT_AGE) {
            return Ok(png.clone());
        }
        let client = status.client.ok_or_else(no_engine)?;
        let png = match client.call(EngineAction::Screenshot { max_width }, None).await {
            Ok(png) => png,
            Err(error) => {
                // An engine that is just ending answers no more; what it showed last is its screen.
                let last = shots().get(&key).filter(|(taken, _)| taken.elapsed() < SCREENSHOT_KEPT).cloned();
                if let Some((_, png)) = last {
                    return Ok(png);
                }
                // Or it has never shown anything, and its end is about to be known.
                let status = supervisor.wait_for(SETTLE, |status| !status.state.is_live()).await;
                return Err(if status.state.is_live() { error } else { no_screen() });
            }
        };
        let mut shots = shots();
        shots.retain(|_, (taken, _)| taken.elapsed() < SCREENSHOT_KEPT);
        if shots.len() >= SCREENSHOTS_MAX {
            let oldest = shots.iter().min_by_key(|(_, (taken, _))| *taken).map(|(key, _)| key.clone());
            oldest.and_then(|key| shots.remove(&key));
        }
        shots.insert(key, (std::time::Instant::now(), png.clone()));
        Ok(png)
    }

    /// What the engine counts, as it says it.
    ///
    /// Errors: as `screenshot`.
    pub async fn statistics(&self, id: &Id) -> Result<serde_json::Value> {
        let client = self.supervisor_of(id)?.status().client.ok_or_else(no_engine)?;
        let json = client.call(EngineAction::Statistics, None).await?;
        serde_json::from_slice(&json).map_err(|error| Error::internal("The engine's counters cannot be read.", error))
    }

    /// A connection to the guest's serial console or its screen.
    ///
    /// Errors: `Conflict` when it does not run; `Unavailable` when its engine does not listen.
    pub async fn connect(&self, id: &Id, socket: Socket) -> Result<UnixStream> {
        if !self.supervisor_of(id)?.status().state.is_live() {
            return Err(Error::conflict("The guest does not run."));
        }
        let path = self.0.around.guests_run_dir.join(id.as_str()).join(socket.file_name());
        UnixStream::connect(path).await.map_err(|error| no_engine().because(error))
    }

    /// What a guest that is off had on its serial console when it ended in order.
    pub async fn last_scrollback(&self, id: &Id) -> Option<Vec<u8>> {
        let path = self.0.state_dir.join("guests").join(id.as_str()).join("scrollback");
        let mut kept = Vec::new();
        // The engine wrote it, and whoever took it over may have written anything.
        let file = tokio::fs::File::open(path).await.ok()?;
        file.take(SCROLLBACK_BYTES_MAX).read_to_end(&mut kept).await.ok()?;
        Some(kept)
    }

    /// Follows what a guest does; closed when it is deleted.
    pub fn watch(&self, id: &Id) -> Result<tokio::sync::watch::Receiver<Status>> {
        Ok(self.supervisor_of(id)?.watch())
    }

    /// The end of the guest's log, and how many bytes are before it.
    pub async fn log_tail(&self, id: &Id) -> Result<(Vec<u8>, u64)> {
        let path = self.0.state_dir.join("guests").join(id.as_str()).join("log");
        blocking(move || {
            let cannot = |error| Error::internal("Cannot read the guest's log.", error);
            let mut file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
                Err(error) => return Err(cannot(error)),
            };
            let length = file.metadata().map_err(cannot)?.len();
            let before = length.saturating_sub(LOG_TAIL_BYTES);
            file.seek(SeekFrom::Start(before)).map_err(cannot)?;
            let mut tail = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut tail).map_err(cannot)?;
            Ok((tail, before))
        })
        .await
    }

    /// What a disk takes on the host.
    pub fn disk_used_bytes(&self, id: &Id) -> Option<u64> {
        disks::used_bytes(&self.0.state_dir, id)
    }

    /// Has `hostd` open a file for reading.
    async fn open(&self, place: Place) -> Result<OwnedFd> {
        match self.0.around.host.call(HostRequest::OpenFile(place)).await? {
            (HostAnswer::File { .. }, mut descriptors) if descriptors.len() == 1 => {
                descriptors.pop().ok_or_else(|| Error::internal("Cannot open a file.", "no descriptor"))
            }
            _ => Err(Error::internal("Cannot open a file.", "an answer without a descriptor")),
        }
    }
}

/// What a guest's engine can be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    Serial,
    Vnc,
}

impl Socket {
    fn file_name(self) -> &'static str {
        match self {
            Socket::Serial => "serial.sock",
            Socket::Vnc => "vnc.sock",
        }
    }
}

fn no_engine() -> Error {
    Error::new(ErrorKind::Unavailable, "The engine does not answer now; try again.")
}

/// Puts right what a row says of the saved state of a guest without an engine, where the file tells otherwise.
async fn check_saved(around: &Surroundings, row: &mut rows::GuestRow) {
    match (suspended::find(&around.state_dir, &row.id), row.suspended) {
        (suspended::Found::Spent, _) => {
            tracing::warn!(guest = %row.id, "the host lost power after the guest had gone on from its saved state");
            row.suspended = false;
            suspended::remove(&around.state_dir, &row.id);
        }
        // A start without it would have taken it away.
        (suspended::Found::Whole, false) => {
            tracing::warn!(guest = %row.id, "the guest was suspended when its row could not be written");
            (row.suspended, row.desired_on) = (true, false);
        }
        _ => return,
    }
    let (id, suspended) = (row.id.clone(), row.suspended);
    let written = around.store.writing(move |tx| {
        rows::set_suspended(tx, &id, suspended)?;
        if suspended { rows::set_desired(tx, &id, false) } else { Ok(()) }
    });
    if let Err(error) = written.await {
        tracing::warn!(guest = %row.id, %error, "cannot write whether the guest is suspended");
    }
}

/// Nothing when `hostd` does not say.
async fn live_engines(host: &HostClient) -> Option<Vec<Id>> {
    match host.call(HostRequest::ListEngines).await {
        Ok((HostAnswer::Engines(engines), _)) => Some(engines.into_iter().map(|engine| engine.guest).collect()),
        Ok(_) => None,
        Err(error) => {
            tracing::error!(error = %error.for_log(), "cannot ask which engines live");
            None
        }
    }
}

/// A row with what it refers to; without a status yet.
fn joined(tx: &Tx, row: GuestRow) -> Result<Guest> {
    let named = |id: &Option<Id>| -> Result<Option<ImageName>> {
        let Some(id) = id else { return Ok(None) };
        Ok(images::by_id(tx, id)?.map(|image| ImageName { id: image.id, name: image.name.to_string() }))
    };
    Ok(Guest {
        disks: rows::disks(tx, &row.id)?,
        kernel: named(&row.kernel_image_id)?,
        initrd: named(&row.initrd_image_id)?,
        cd: named(&row.cd_image_id)?,
        status: Status::unknown(),
        task: None,
        row,
    })
}
