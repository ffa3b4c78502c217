//! The tray of the CD drive: which medium is in it, and what the guest has yet to be told about changes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    super::disk::BlockBackend,
    saved::{ChangeV1, EventV1, TrayV1},
};

/// The tray, shared by the drive and the control thread. Clones are the same tray.
///
/// The host's wishes win: `eject` takes the medium out even when the guest has locked the tray, as the pin hole of a real
/// drive does. A command that is reading meanwhile ends with what it began with.
#[derive(Clone, Default)]
pub struct CdTray(Arc<Mutex<Tray>>);

#[derive(Default)]
struct Tray {
    medium: Option<Arc<dyn BlockBackend>>,
    /// The guest opened the tray; the medium, if any, lies in it out of reach.
    open: bool,
    locked: bool,
    change: Change,
    event: MediaEvent,
}

/// What commands that need the medium must answer first. A guest that only asks whether the unit is ready would not notice
/// an exchange, so it is shown an empty drive once, and then the change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Change {
    #[default]
    None,
    Absent,
    Changed,
}

/// Event codes of the media class (MMC-6, 6.6.2, GET EVENT STATUS NOTIFICATION).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum MediaEvent {
    #[default]
    None = 0,
    New = 2,
    Removed = 3,
}

/// What the drive finds when a command needs the medium.
pub(super) enum Medium {
    Ready(Arc<dyn BlockBackend>),
    /// The medium is another than before: to be told once.
    Changed,
    Empty,
    Open,
}

/// The guest may not open the tray that it locked.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Locked;

impl CdTray {
    /// A closed tray without a medium.
    pub fn new() -> CdTray {
        CdTray::default()
    }

    /// Puts a medium in and closes the tray; what was in it is taken out. Called from the control thread at any time.
    pub fn insert(&self, medium: Arc<dyn BlockBackend>) {
        self.lock().insert(medium);
    }

    /// Takes the medium out, locked or not.
    pub fn eject(&self) {
        let mut tray = self.lock();
        let had_medium = tray.medium.take().is_some();
        tray.emptied(had_medium);
    }

    /// Whether the guest finds a medium: one is in, and the guest has not opened the tray.
    pub fn has_medium(&self) -> bool {
        let tray = self.lock();
        !tray.open && tray.medium.is_some()
    }

    /// Before power on nobody has seen the old medium: nothing is to be told.
    pub(super) fn power_on(&self) {
        let mut tray = self.lock();
        tray.locked = false;
        tray.change = Change::None;
        tray.event = MediaEvent::None;
    }

    /// The medium for a command; tells of a change first.
    pub(super) fn medium(&self) -> Medium {
        let mut tray = self.lock();
        if tray.open {
            return Medium::Open;
        }
        let Some(medium) = tray.medium.clone() else { return Medium::Empty };
        match tray.change {
            Change::None => Medium::Ready(medium),
            Change::Absent => {
                tray.change = Change::Changed;
                Medium::Empty
            }
            Change::Changed => {
                tray.change = Change::None;
                Medium::Changed
            }
        }
    }

    /// The medium as it is, without telling of changes.
    pub(super) fn peek(&self) -> Option<Arc<dyn BlockBackend>> {
        let tray = self.lock();
        if tray.open { None } else { tray.medium.clone() }
    }

    /// Takes the notice of a change that REQUEST SENSE may report.
    pub(super) fn take_change(&self) -> bool {
        let mut tray = self.lock();
        let changed = !tray.open && tray.change == Change::Changed;
        if changed {
            tray.change = Change::None;
        }
        changed
    }

    /// The last event, told once.
    pub(super) fn take_event(&self) -> MediaEvent {
        std::mem::take(&mut self.lock().event)
    }

    pub(super) fn is_open(&self) -> bool {
        self.lock().open
    }

    pub(super) fn is_locked(&self) -> bool {
        self.lock().locked
    }

    pub(super) fn set_locked(&self, locked: bool) {
        self.lock().locked = locked;
    }

    /// The guest opens the tray.
    pub(super) fn open(&self) -> Result<(), Locked> {
        let mut tray = self.lock();
        if tray.locked {
            return Err(Locked);
        }
        if !tray.open && tray.medium.is_some() {
            tray.event = MediaEvent::Removed;
        }
        tray.open = true;
        Ok(())
    }

    /// The guest closes the tray.
    pub(super) fn close(&self) {
        let mut tray = self.lock();
        if tray.open && tray.medium.is_some() {
            tray.change = Change::Changed;
            tray.event = MediaEvent::New;
        }
        tray.open = false;
    }

    pub(super) fn save(&self) -> TrayV1 {
        let Tray { medium, open, locked, change, event } = &*self.lock();
        let change = match change {
            Change::None => ChangeV1::None,
            Change::Absent => ChangeV1::Absent,
            Change::Changed => ChangeV1::Changed,
        };
        let event = match event {
            MediaEvent::None => EventV1::None,
            MediaEvent::New => EventV1::New,
            MediaEvent::Removed => EventV1::Removed,
        };
        TrayV1 { loaded: medium.is_some(), open: *open, locked: *locked, change, event }
    }

    /// Every state can be. The medium stays what it is; if none was in before and one is now, or the other way round, then it is
    /// as if somebody had changed that while the guest was suspended.
    pub(super) fn restore(&self, saved: TrayV1) {
        let TrayV1 { loaded, open, locked, change, event } = saved;
        let change = match change {
            ChangeV1::None => Change::None,
            ChangeV1::Absent => Change::Absent,
            ChangeV1::Changed => Change::Changed,
        };
        let event = match event {
            EventV1::None => MediaEvent::None,
            EventV1::New => MediaEvent::New,
            EventV1::Removed => MediaEvent::Removed,
        };
        let mut tray = self.lock();
        let medium = tray.medium.take();
        *tray = Tray { medium: None, open, locked, change, event };
        match medium {
            Some(medium) if loaded => tray.medium = Some(medium),
            Some(medium) => tray.insert(medium),
            None if loaded => tray.emptied(true),
            None => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tray> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tray {
    fn insert(&mut self, medium: Arc<dyn BlockBackend>) {
        let seen = !self.open && self.medium.is_some();
        self.change = if seen { Change::Absent } else { Change::Changed };
        self.event = MediaEvent::New;
        self.open = false;
        self.medium = Some(medium);
    }

    /// The medium, if there was one, has been taken out.
    fn emptied(&mut self, had_medium: bool) {
        if had_medium && !self.open {
            self.event = MediaEvent::Removed;
        }
        self.locked = false;
        self.change = Change::None;
    }
}
