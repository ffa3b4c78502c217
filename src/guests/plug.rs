//! Disks, the medium in the CD drive and the network card that a running guest gets and gives back.

use std::time::Duration;

use super::{Guest, Guests, disks, launch, lifecycle::State, make, no_engine, supervisor::Supervisor};
use crate::{
    api::ChangeGuest,
    error::{Error, ErrorKind, Result},
    guests::launch::{attachment_of, disk_spec, spec_of},
    spec::NetworkModel,
    store::{
        Tx,
        guests::{self as rows, DiskRow, GuestRow, NetworkMode},
        users,
    },
    types::Id,
    wire::{EngineAction, HostRequest, PluggedDevice},
};

/// So long a guest is waited for that was asked to let go of something. It may take longer, or never do it.
const LET_GO: Duration = Duration::from_secs(10);
/// How long the engine may take to plug and unplug: its threads wait for the host's disks first.
const PLUG_REPLY: Duration = Duration::from_secs(60);

/// Why a running guest did not get something.
pub(super) struct NotPlugged {
    pub(super) error: Error,
    /// The engine was asked and is silent: it may still take it.
    late: bool,
}

impl NotPlugged {
    /// What the engine said, or that it said nothing.
    fn by_engine(error: Error) -> NotPlugged {
        NotPlugged { late: error.kind() == ErrorKind::Unavailable, error }
    }
}

/// Before the engine was asked.
impl From<Error> for NotPlugged {
    fn from(error: Error) -> NotPlugged {
        NotPlugged { error, late: false }
    }
}

impl Guests {
    /// Puts a medium into the drive or takes it out, also while the guest runs.
    ///
    /// Errors: `NotFound` for an image that is not there; what the engine says; nothing is changed then.
    pub async fn change_cd(&self, id: &Id, image: Option<&str>) -> Result<()> {
        let (guests, id, image) = (self.clone(), id.clone(), image.map(str::to_owned));
        self.to_its_end(async move { guests.change_cd_now(&id, image.as_deref()).await }).await
    }

    async fn change_cd_now(&self, id: &Id, image: Option<&str>) -> Result<()> {
        let supervisor = self.supervisor_of(id)?;
        let _busy = supervisor.busy.lock().await;
        let image = match image.filter(|image| !image.is_empty()) {
            Some(image) => {
                let image = image.to_owned();
                Some(self.0.around.store.reading(move |tx| make::ready_image(tx, &image, "image")).await?)
            }
            None => None,
        };
        let status = supervisor.status();
        if status.state == State::Suspended {
            return Err(Error::conflict("The guest is suspended. Its CD can be changed when it runs again."));
        }
        if status.state.is_live() {
            let client = status.client.ok_or_else(no_engine)?;
            let medium = match &image {
                Some(image) => Some(self.open(launch::place_of(image)).await?),
                None => None,
            };
            client.call(EngineAction::ChangeCd, medium).await?;
        }
        let (guest, image) = (id.clone(), image.map(|image| image.id));
        self.0.around.store.writing(move |tx| rows::set_cd(tx, &guest, image.as_ref())).await?;
        self.0.around.changes.tell(crate::changes::Change::Guest(id.clone()));
        Ok(())
    }

    /// Changes a guest that runs: disks on virtio or NVMe and the network card come and go. `busy` is held by the caller.
    ///
    /// Errors: as `change`. A disk that the guest does not let go at once is no error but a warning.
    pub(super) async fn change_running(
        &self,
        who: &str,
        id: &Id,
        supervisor: &Supervisor,
        wanted: ChangeGuest,
    ) -> Result<(Guest, Vec<String>)> {
        let removed = wanted.remove_disks.clone();
        let coming = ChangeGuest { remove_disks: Vec::new(), ..wanted };
        let rest = ChangeGuest { add_disks: Vec::new(), network: None, network_model: None, ..coming.clone() };
        if rest != ChangeGuest::default() {
            let text = "The guest runs. Disks on virtio or NVMe and the network card can be changed meanwhile; the rest when it has stopped.";
            return Err(Error::conflict(text));
        }
        let status = supervisor.status();
        if status.client.is_none() {
            return Err(no_engine());
        }
        if status.plugged.is_none() {
            let text = "This guest was started by an older release. Its disks and network can be changed while it runs after its next start.";
            return Err(Error::conflict(text));
        }
        if self.preparing().contains_key(id) {
            return Err(make::being_prepared());
        }
        let leaving = self.to_let_go(id, &removed, |disk| status.has_plugged(disk)).await?;
        let (guest, usual) = (id.clone(), self.usual_firmware().await);
        let (row, plans) = self.0.around.store.reading(move |tx| make::changed(tx, &guest, coming, usual)).await?;
        if plans.iter().any(|plan| !plan.row.bus.has_slots()) {
            return Err(Error::invalid("disk", "Only disks on virtio or NVMe can be added while the guest runs."));
        }
        self.change_card(supervisor, &row).await?;
        let (name, who_text) = (row.name.clone(), who.to_owned());
        let empty: Vec<DiskRow> = plans.iter().filter(|plan| plan.row.ready).map(|plan| plan.row.clone()).collect();
        let copies = self
            .make_disks(plans, move |tx, plans| {
                plans.iter().try_for_each(|plan| rows::insert_disk(tx, &plan.row))?;
                users::audit(tx, &who_text, "", "change_guest", row.name.as_str(), row.id.as_str())
            })
            .await?;
        for (at, disk) in empty.iter().enumerate() {
            if let Err(NotPlugged { error, late }) = self.attach(id, disk).await {
                // Nor do the ones come that would have followed. One that may come late stays: if not now, it comes with the next start.
                let following = empty.iter().skip(at + usize::from(late)).chain(copies.iter().map(|plan| &plan.row));
                let gone: Vec<Id> = following.map(|disk| disk.id.clone()).collect();
                disks::remove(&self.0.state_dir, &gone);
                let delete = move |tx: &Tx| gone.iter().try_for_each(|disk| rows::delete_disk(tx, disk));
                self.0.around.store.writing(delete).await?;
                return Err(error);
            }
        }
        let mut warnings = Vec::new();
        for disk in &leaving {
            warnings.extend(self.let_go(supervisor, disk).await?);
        }
        self.finish(who, (id.clone(), name), copies, false, false).await?;
        Ok((self.get(id.as_str()).await?, warnings))
    }

    /// Gives the guest the network card of `wanted`, which is its row changed: what it has goes first, for another network too, so that
    /// its system asks the new one for an address.
    ///
    /// The row always says what the guest has: it is what the guest goes on with after a suspension.
    ///
    /// Errors: the guest does not let go of its card, or the host cannot make another. It has none then, and its row says so.
    async fn change_card(&self, supervisor: &Supervisor, wanted: &GuestRow) -> Result<()> {
        let row = self.get(wanted.id.as_str()).await?.row;
        if (&row.network, row.network_model) == (&wanted.network, wanted.network_model) {
            return Ok(());
        }
        let status = supervisor.status();
        if status.has_card() {
            let detach = EngineAction::Detach(PluggedDevice::Network(row.mac));
            status.client.ok_or_else(no_engine)?.call_within(PLUG_REPLY, detach, None).await?;
            let after = supervisor.wait_for(LET_GO, |status| !status.has_card()).await;
            if after.plugged.is_none() {
                return Err(Error::conflict("The guest has ended meanwhile. Its network is as it was."));
            }
            if after.has_card() {
                let text = "The guest was asked to let go of its network card, and uses it still. When it has, it has no network, and can be \
                            given another. A reset or a shutdown takes the card out at once.";
                return Err(Error::conflict(text));
            }
        }
        let (mode, model) = (wanted.network.clone(), wanted.network_model);
        // Before the engine has it: one that says it has no card is believed, and this forgotten.
        self.set_card(&row, mode, model).await?;
        let card = GuestRow { network: wanted.network.clone(), network_model: model, ..row.clone() };
        if let Err(NotPlugged { error, late }) = self.attach_card(supervisor, &card).await {
            if late {
                return Err(error);
            }
            self.set_card(&row, NetworkMode::None, model).await?;
            return Err(Error::new(error.kind(), format!("The guest has no network card now: {error}")));
        }
        Ok(())
    }

    /// Whether the guest can go on from what it has now: with other disks or another card than its rows say it could not.
    ///
    /// Errors: `Conflict`, and what to do.
    pub(super) async fn may_be_suspended(&self, supervisor: &Supervisor, guest: &Id) -> Result<()> {
        if self.preparing().contains_key(guest) {
            return Err(make::being_prepared());
        }
        let status = supervisor.status();
        if status.plugged.is_none() {
            return Ok(());
        }
        let Guest { row, disks, .. } = self.get(guest.as_str()).await?;
        let mut missing = disks.iter().filter(|disk| disk.bus.has_slots() && !status.has_plugged(&disk.id));
        if let Some(disk) = missing.next() {
            let text = format!(
                "Disk {} comes with the guest's next start: until then it cannot be suspended. Shut it down.",
                disk.id
            );
            return Err(Error::conflict(text));
        }
        if (row.network != NetworkMode::None) != status.has_card() {
            let text = "The guest's network card comes or goes with its next start: until then it cannot be suspended. Shut it down.";
            return Err(Error::conflict(text));
        }
        Ok(())
    }

    async fn attach_card(&self, supervisor: &Supervisor, card: &GuestRow) -> Result<(), NotPlugged> {
        let (spec, attachment) = (spec_of(card, &[]), attachment_of(card));
        let (Some(network), Some(attachment)) = (spec.network.clone(), attachment) else { return Ok(()) };
        let client = supervisor.status().client.ok_or_else(no_engine)?;
        let connect = HostRequest::ConnectNetwork { spec: Box::new(spec), attachment };
        let (_, links) = self.0.around.host.call(connect).await?;
        let asked = client.call_within(PLUG_REPLY, EngineAction::AttachNetwork(network), links).await;
        asked.map(drop).map_err(NotPlugged::by_engine)
    }

    async fn set_card(&self, row: &GuestRow, mode: NetworkMode, model: NetworkModel) -> Result<()> {
        let (id, order) = (row.id.clone(), row.boot_order.clone());
        let write = move |tx: &Tx| {
            rows::set_network(tx, &id, &mode, model)?;
            // Without a card the network went from it.
            if mode == NetworkMode::None { Ok(()) } else { rows::set_boot_order(tx, &id, &order) }
        };
        self.0.around.store.writing(write).await
    }

    /// The disks to take out, all of which can be.
    async fn to_let_go(&self, guest: &Id, removed: &[Id], is_plugged: impl Fn(&Id) -> bool) -> Result<Vec<DiskRow>> {
        let guest = guest.clone();
        let disks = self.0.around.store.reading(move |tx| rows::disks(tx, &guest)).await?;
        let found = removed.iter().map(|gone| {
            let disk = disks.iter().find(|disk| disk.id == *gone);
            let disk = disk.ok_or_else(|| Error::invalid("remove_disks", format!("This guest has no disk {gone}.")))?;
            if is_plugged(gone) {
                return Ok(disk.clone());
            }
            let text = format!("Disk {gone} can be removed when the guest has stopped: it is not on virtio or NVMe.");
            Err(Error::invalid("remove_disks", text))
        });
        found.collect()
    }

    /// Gives a disk to its guest, if that runs; otherwise its next start does. `busy` is held by the caller.
    ///
    /// Errors: the disk cannot be opened, or what the engine says.
    pub(super) async fn attach(&self, guest: &Id, disk: &DiskRow) -> Result<(), NotPlugged> {
        let status = self.supervisor_of(guest)?.status();
        if !status.state.is_live() {
            return Ok(());
        }
        let client = status.client.ok_or_else(no_engine)?;
        let request = HostRequest::OpenDisk { guest: guest.clone(), disk: disk.id.clone() };
        let (_, mut files) = self.0.around.host.call(request).await?;
        let asked = client.call_within(PLUG_REPLY, EngineAction::AttachDisk(disk_spec(disk)), files.pop()).await;
        asked.map(drop).map_err(NotPlugged::by_engine)
    }

    /// Without an engine, what a guest was asked to let go is gone.
    pub(super) async fn forget_left(&self, guest: &Id) -> Result<()> {
        let id = guest.clone();
        let gone = self.0.around.store.writing(move |tx| rows::delete_left_disks(tx, &id, |_| false)).await?;
        disks::remove(&self.0.state_dir, &gone);
        Ok(())
    }

    /// Asks the guest to let a disk go, and waits a moment. A warning when it has not.
    async fn let_go(&self, supervisor: &Supervisor, disk: &DiskRow) -> Result<Option<String>> {
        let client = supervisor.status().client.ok_or_else(no_engine)?;
        let mark = |leaving: bool| {
            let id = disk.id.clone();
            self.0.around.store.writing(move |tx| rows::set_disk_leaving(tx, &id, leaving))
        };
        mark(true).await?;
        let detach = EngineAction::Detach(PluggedDevice::Disk(disk.id.clone()));
        if let Err(error) = client.call_within(PLUG_REPLY, detach, None).await {
            // One that is silent may still do it.
            if error.kind() != ErrorKind::Unavailable {
                mark(false).await?;
            }
            return Err(error);
        }
        let status = supervisor.wait_for(LET_GO, |status| !status.has_plugged(&disk.id)).await;
        Ok(status.has_plugged(&disk.id).then(|| {
            format!(
                "The guest was asked to let go of disk {}, and uses it still. It is deleted as soon as the guest has, at the latest \
                 when the guest is reset or stops.",
                disk.id
            )
        }))
    }
}
