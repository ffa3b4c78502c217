//! Making, changing and deleting guests: everything is checked first, then one transaction, and an error changes nothing.

use std::fs::File;

use super::{
    Guest, Guests, disks,
    launch::{boot_from, place_of, spec_of},
    lifecycle::{Event, State},
    plug::NotPlugged,
    supervisor::Found,
};
use crate::{
    api::{Boot, ChangeGuest, CreateGuest, Firmware, NewDisk},
    changes::Change,
    error::{Error, Result},
    spec::{BootFrom, DISK_BYTES_MAX, DISK_BYTES_MIN, DISKS_MAX, DiskBus, MACHINE},
    store::{
        Tx, blocking,
        guests::{self as rows, BootKind, DiskRow, GuestRow, NetworkMode},
        images::{self, ImageRow},
        users,
    },
    switches::Switches,
    tasks::{NewTask, Progress},
    types::{Id, MacAddr, Name, now_ms, show_size},
    wire::{HostAnswer, HostRequest},
};

const CPUS: u32 = 1;
const MEMORY_BYTES: u64 = 512 << 20;
/// Disks are whole sectors.
const SECTOR_BYTES: u64 = 512;

/// A disk that was checked and does not exist yet.
pub(super) struct Plan {
    pub(super) row: DiskRow,
    image: Option<ImageRow>,
}

impl Guests {
    /// Makes a guest. Empty disks exist when this returns; images are copied by a task, which `Guest.task` names.
    ///
    /// `who` is for the audit trail. Errors: `Invalid` at its field, `NoCapacity`; nothing is made then.
    pub async fn create(&self, who: &str, wanted: CreateGuest) -> Result<(Guest, Vec<String>)> {
        let (guests, who) = (self.clone(), who.to_owned());
        self.to_its_end(async move { guests.create_now(&who, wanted).await }).await
    }

    async fn create_now(&self, who: &str, wanted: CreateGuest) -> Result<(Guest, Vec<String>)> {
        let name: Name = wanted.name.parse().map_err(|bad| Error::invalid("name", format!("{bad}")))?;
        let network = match &wanted.network {
            Some(text) => text.parse().map_err(|bad| Error::invalid("network", format!("{bad}")))?,
            None => self.usual_network().await,
        };
        let mut row = GuestRow {
            id: Id::random(),
            name,
            machine: MACHINE.into(),
            desired_on: false,
            note: String::new(),
            cpus: wanted.cpus.unwrap_or(CPUS),
            sockets: wanted.sockets.unwrap_or(1),
            threads: wanted.threads.unwrap_or(1),
            memory_bytes: wanted.memory_bytes.unwrap_or(MEMORY_BYTES),
            boot: BootKind::Bios,
            kernel_image_id: None,
            initrd_image_id: None,
            cmdline: String::new(),
            cd_image_id: None,
            boot_order: Vec::new(),
            network,
            network_model: wanted.network_model.unwrap_or_default(),
            watchdog: wanted.watchdog.unwrap_or_default(),
            cpu_model: wanted.cpu_model.unwrap_or_default(),
            switches: Switches::default().with(&wanted.switches),
            suspended: false,
            mac: MacAddr::random(),
            failure: None,
            created_ms: now_ms(),
        };
        let boot = wanted.boot.unwrap_or(Boot::Disk { firmware: None });
        let usual = self.usual_firmware().await;
        let (cdrom, new_disks, boot_order) = (wanted.cdrom, wanted.disks, wanted.boot_order);
        let (row, plans) = self
            .0
            .around
            .store
            .reading(move |tx| {
                apply_boot(tx, &mut row, boot, usual)?;
                row.cd_image_id = medium(tx, cdrom.as_deref())?;
                let plans = plan(tx, (&row.id, row.created_ms), 0, &new_disks)?;
                let disks: Vec<DiskRow> = plans.iter().map(|plan| plan.row.clone()).collect();
                row.boot_order = ordered(&boot_order, &disks)?;
                check(&row, &disks)?;
                if rows::named(tx, row.name.as_str())?.is_some_and(|other| other.name == row.name) {
                    return Err(Error::invalid("name", format!("Another guest has the name \"{}\".", row.name)));
                }
                Ok((row, plans))
            })
            .await?;
        let warnings = disks::memory_warning(row.memory_bytes).into_iter().collect();
        let (id, name, who_text) = (row.id.clone(), row.name.clone(), who.to_owned());
        let copies = self
            .make_disks(plans, move |tx, plans| {
                rows::insert(tx, &row)?;
                plans.iter().try_for_each(|plan| rows::insert_disk(tx, &plan.row))?;
                users::audit(tx, &who_text, "", "create_guest", row.name.as_str(), row.id.as_str())
            })
            .await?;
        self.finish(who, (id.clone(), name), copies, wanted.start, true).await?;
        Ok((self.get(id.as_str()).await?, warnings))
    }

    /// Changes a stopped guest, or disks of one that runs. Empty disks exist when this returns; images are copied by a task, which `Guest.task` names.
    ///
    /// Errors: `Conflict` while it runs, `Invalid` at its field, `NoCapacity`; nothing is changed then.
    pub async fn change(&self, who: &str, id: &Id, wanted: ChangeGuest) -> Result<(Guest, Vec<String>)> {
        let (guests, who, id) = (self.clone(), who.to_owned(), id.clone());
        self.to_its_end(async move { guests.change_now(&who, &id, wanted).await }).await
    }

    async fn change_now(&self, who: &str, id: &Id, wanted: ChangeGuest) -> Result<(Guest, Vec<String>)> {
        let supervisor = self.supervisor_of(id)?;
        let _busy = supervisor.busy.lock().await;
        if supervisor.status().state.is_live() {
            return self.change_running(who, id, &supervisor, wanted).await;
        }
        self.must_rest(id, "changed")?;
        let guest = id.clone();
        let removed = wanted.remove_disks.clone();
        let usual = self.usual_firmware().await;
        let (row, plans) = self.0.around.store.reading(move |tx| changed(tx, &guest, wanted, usual)).await?;
        let warnings = disks::memory_warning(row.memory_bytes).into_iter().collect();
        let (name, who_text, gone) = (row.name.clone(), who.to_owned(), removed.clone());
        let copies = self
            .make_disks(plans, move |tx, plans| {
                rows::update(tx, &row)?;
                gone.iter().try_for_each(|disk| rows::delete_disk(tx, disk))?;
                plans.iter().try_for_each(|plan| rows::insert_disk(tx, &plan.row))?;
                users::audit(tx, &who_text, "", "change_guest", row.name.as_str(), row.id.as_str())
            })
            .await?;
        disks::remove(&self.0.state_dir, &removed);
        self.finish(who, (id.clone(), name), copies, false, false).await?;
        Ok((self.get(id.as_str()).await?, warnings))
    }

    /// Deletes a stopped guest with its disks. `confirm` is its name, as the person typed it.
    ///
    /// Errors: `Invalid` at `confirm`; `Conflict` while it runs or is being prepared.
    pub async fn delete(&self, who: &str, id: &Id, confirm: &str) -> Result<()> {
        let (guests, who, id, confirm) = (self.clone(), who.to_owned(), id.clone(), confirm.to_owned());
        self.to_its_end(async move { guests.delete_now(&who, &id, &confirm).await }).await
    }

    async fn delete_now(&self, who: &str, id: &Id, confirm: &str) -> Result<()> {
        let supervisor = self.supervisor_of(id)?;
        let _busy = supervisor.busy.lock().await;
        self.must_rest(id, "deleted")?;
        let (guest, who, confirm) = (id.clone(), who.to_owned(), confirm.trim().to_owned());
        let gone = self
            .0
            .around
            .store
            .writing(move |tx| {
                let row = rows::by_id(tx, &guest)?.ok_or_else(|| Error::not_found("There is no such guest."))?;
                if confirm != row.name.as_str() {
                    return Err(Error::invalid("confirm", format!("Type \"{}\" to delete this guest.", row.name)));
                }
                let disks = rows::disks(tx, &guest)?;
                rows::delete(tx, &guest)?;
                users::audit(tx, &who, "", "delete_guest", row.name.as_str(), &format!("{} disks", disks.len()))?;
                Ok(disks.into_iter().map(|disk| disk.id).collect::<Vec<_>>())
            })
            .await?;
        self.forget(id, gone).await
    }

    /// Takes a guest that is in no row any more out of everything else.
    async fn forget(&self, id: &Id, gone: Vec<Id>) -> Result<()> {
        self.supervisors().remove(id);
        self.preparing().remove(id);
        let (state_dir, guest) = (self.0.state_dir.clone(), id.clone());
        blocking(move || {
            disks::remove(&state_dir, &gone);
            let folder = state_dir.join("guests").join(guest.as_str());
            match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(folder = %folder.display(), %error, "cannot remove the folder of a deleted guest");
                }
                _ => {}
            }
            Ok(())
        })
        .await?;
        self.0.around.changes.tell(Change::Guest(id.clone()));
        Ok(())
    }

    pub(super) fn must_rest(&self, id: &Id, verb: &str) -> Result<()> {
        let state = self.supervisor_of(id)?.status().state;
        if state == State::Suspended {
            let text = "The guest is suspended. Start it to go on, or discard its saved state; then it can be";
            return Err(Error::conflict(format!("{text} {verb}.")));
        }
        if state.is_live() {
            return Err(Error::conflict(format!("The guest is {state}. It can be {verb} when it has stopped.")));
        }
        if self.preparing().contains_key(id) {
            return Err(being_prepared());
        }
        Ok(())
    }

    /// UEFI where the host has it.
    pub(super) async fn usual_firmware(&self) -> BootKind {
        match self.0.around.host.call(HostRequest::FirmwareStatus).await {
            Ok((HostAnswer::FirmwareStatus { uefi: true }, _)) => BootKind::Uefi,
            Ok(_) | Err(_) => BootKind::Bios,
        }
    }

    async fn usual_network(&self) -> NetworkMode {
        match self.0.around.host.call(HostRequest::NetworkStatus).await {
            Ok((HostAnswer::NetworkStatus(status), _)) if status.privileged => NetworkMode::Nat,
            Ok(_) | Err(_) => NetworkMode::User,
        }
    }

    /// Makes the empty disks, then runs `write` in one transaction; the disks go again when it fails. Returns what is to be copied.
    pub(super) async fn make_disks(
        &self,
        plans: Vec<Plan>,
        write: impl FnOnce(&Tx, &[Plan]) -> Result<()> + Send + 'static,
    ) -> Result<Vec<Plan>> {
        let (store, state_dir) = (self.0.around.store.clone(), self.0.state_dir.clone());
        blocking(move || {
            let mut made = Vec::new();
            let work = || -> Result<()> {
                for Plan { row, .. } in plans.iter().filter(|plan| plan.row.ready) {
                    disks::create(&state_dir, &row.id, row.size_bytes)?;
                    made.push(row.id.clone());
                }
                store.write(|tx| write(tx, &plans))
            };
            let result = work();
            if result.is_err() {
                disks::remove(&state_dir, &made);
            }
            result.map(|()| plans.into_iter().filter(|plan| !plan.row.ready).collect())
        })
        .await
    }

    /// What follows the transaction: the supervisor, the copies, the start.
    pub(super) async fn finish(
        &self,
        who: &str,
        guest: (Id, Name),
        copies: Vec<Plan>,
        start: bool,
        new: bool,
    ) -> Result<()> {
        let (id, name) = guest;
        if copies.is_empty() {
            if new {
                self.supervise(id.clone(), Found::Off { failure: None });
            }
            self.0.around.changes.tell(Change::Guest(id.clone()));
            if start && let Err(error) = self.act(&id, Event::Start).await {
                tracing::warn!(guest = %id, error = %error.for_log(), "a new guest does not start");
            }
            return Ok(());
        }
        let job = Job { guests: self.clone(), id: id.clone(), new, start };
        let prepared = async {
            let mut files = Vec::new();
            for plan in copies {
                let image = plan.image.ok_or_else(|| Error::internal("Cannot copy an image.", "no image"))?;
                files.push((plan.row, File::from(self.open(place_of(&image)).await?), image.size_bytes));
            }
            let new_task = NewTask {
                kind: "copy_disk",
                title: format!("Prepare the disks of {name}"),
                subject: format!("/guests/{id}"),
                who: who.to_owned(),
            };
            Ok((self.0.tasks.begin(new_task).await?, files))
        };
        match prepared.await {
            Ok((progress, files)) => {
                self.preparing().insert(id.clone(), progress.id().clone());
                if new {
                    self.supervise(id.clone(), Found::Off { failure: None });
                }
                self.0.around.changes.tell(Change::Guest(id));
                self.0.tasks.run(progress, move |progress| job.run(files, progress));
                Ok(())
            }
            Err(error) => {
                let undone = blocking(move || job.undo()).await;
                undone.and(Err(error))
            }
        }
    }
}

/// The copies for one guest, on a thread that may block.
struct Job {
    guests: Guests,
    id: Id,
    /// The guest was made for these disks: without them it goes.
    new: bool,
    start: bool,
}

impl Job {
    fn run(self, files: Vec<(DiskRow, File, u64)>, progress: &mut Progress) -> Result<()> {
        let inner = &self.guests.0;
        let total = files.iter().map(|(_, _, bytes)| *bytes).sum();
        let mut meter = disks::Meter::new(progress, "Copying", total);
        let mut busy = None;
        let mut copy = || -> Result<()> {
            for (row, image, _) in &files {
                disks::copy(&inner.state_dir, &row.id, image, row.size_bytes, &mut meter)?;
            }
            // A start that comes in between would give the guest the same disks.
            let supervisor = self.guests.supervisor_of(&self.id)?;
            busy = Some(inner.around.runtime.block_on(supervisor.busy.lock_owned()));
            inner
                .around
                .store
                .write(|tx| files.iter().try_for_each(|(row, ..)| rows::set_disk_ready(tx, &row.id).map(drop)))
        };
        match copy() {
            Ok(()) => {
                self.guests.preparing().remove(&self.id);
                let attach =
                    |(row, ..): &(DiskRow, File, u64)| inner.around.runtime.block_on(self.guests.attach(&self.id, row));
                let attached = files.iter().try_for_each(attach);
                drop(busy);
                inner.around.changes.tell(Change::Guest(self.id.clone()));
                attached.map_err(|NotPlugged { error, .. }| {
                    let text = format!("The guest has the disk from its next start; it could not get it now: {error}");
                    Error::new(error.kind(), text)
                })?;
                if self.start {
                    let (guests, id) = (self.guests.clone(), self.id.clone());
                    inner.around.runtime.spawn(async move {
                        if let Err(error) = guests.act(&id, Event::Start).await {
                            tracing::warn!(guest = %id, error = %error.for_log(), "a new guest does not start");
                        }
                    });
                }
                Ok(())
            }
            Err(error) => {
                self.undo()?;
                Err(error)
            }
        }
    }

    /// Takes the disks that did not come about away again, and the guest that was made for them.
    fn undo(self) -> Result<()> {
        let inner = &self.guests.0;
        let gone: Vec<Id> = inner.around.store.write(|tx| {
            let disks = rows::disks(tx, &self.id)?;
            let gone: Vec<Id> = disks.into_iter().filter(|disk| self.new || !disk.ready).map(|disk| disk.id).collect();
            if self.new {
                rows::delete(tx, &self.id)?;
            } else {
                gone.iter().try_for_each(|disk| rows::delete_disk(tx, disk))?;
            }
            Ok(gone)
        })?;
        disks::remove(&inner.state_dir, &gone);
        self.guests.preparing().remove(&self.id);
        if self.new {
            self.guests.supervisors().remove(&self.id);
        }
        inner.around.changes.tell(Change::Guest(self.id.clone()));
        Ok(())
    }
}

pub(super) fn being_prepared() -> Error {
    Error::conflict("A disk of this guest is still being prepared. Wait for that task or cancel it.")
}

/// The row and the new disks that a change results in.
pub(super) fn changed(tx: &Tx, id: &Id, wanted: ChangeGuest, usual: BootKind) -> Result<(GuestRow, Vec<Plan>)> {
    let ChangeGuest {
        name,
        cpus,
        sockets,
        threads,
        memory_bytes,
        boot,
        boot_order,
        cdrom,
        network,
        network_model,
        watchdog,
        cpu_model,
        switches,
        add_disks,
        remove_disks,
    } = wanted;
    let mut row = rows::by_id(tx, id)?.ok_or_else(|| Error::not_found("There is no such guest."))?;
    if let Some(name) = name {
        row.name = name.parse().map_err(|bad| Error::invalid("name", format!("{bad}")))?;
    }
    row.cpus = cpus.unwrap_or(row.cpus);
    row.sockets = sockets.unwrap_or(row.sockets);
    row.threads = threads.unwrap_or(row.threads);
    row.memory_bytes = memory_bytes.unwrap_or(row.memory_bytes);
    if let Some(boot) = boot {
        let usual = if row.boot.is_firmware() { row.boot } else { usual };
        apply_boot(tx, &mut row, boot, usual)?;
    }
    if let Some(cdrom) = cdrom {
        row.cd_image_id = medium(tx, Some(&cdrom))?;
    }
    if let Some(network) = network {
        row.network = network.parse().map_err(|bad| Error::invalid("network", format!("{bad}")))?;
    }
    row.network_model = network_model.unwrap_or(row.network_model);
    row.watchdog = watchdog.unwrap_or(row.watchdog);
    row.cpu_model = cpu_model.unwrap_or(row.cpu_model);
    row.switches = row.switches.with(&switches);
    let mut disks = rows::disks(tx, id)?;
    if let Some(stranger) = remove_disks.iter().find(|gone| !disks.iter().any(|disk| disk.id == **gone)) {
        return Err(Error::invalid("remove_disks", format!("This guest has no disk {stranger}.")));
    }
    let next = disks.iter().map(|disk| disk.position + 1).max().unwrap_or(0);
    disks.retain(|disk| !remove_disks.contains(&disk.id));
    let plans = plan(tx, (&row.id, tx.now_ms), next, &add_disks)?;
    disks.extend(plans.iter().map(|plan| plan.row.clone()));
    match boot_order {
        Some(words) => row.boot_order = ordered(&words, &disks)?,
        // What went away has no place in it any more.
        None => row.boot_order.retain(|from| match from {
            BootFrom::Disk(id) => disks.iter().any(|disk| disk.id == *id),
            BootFrom::Network => row.network != NetworkMode::None,
            BootFrom::Cd => true,
        }),
    }
    check(&row, &disks)?;
    Ok((row, plans))
}

/// A boot order as a person says it.
fn ordered(words: &[String], disks: &[DiskRow]) -> Result<Vec<BootFrom>> {
    let parsed = words.iter().map(|word| boot_from(word, disks)).collect::<Result<_, _>>();
    parsed.map_err(|bad| Error::invalid("boot_order", bad.to_string()))
}

fn check(row: &GuestRow, disks: &[DiskRow]) -> Result<()> {
    spec_of(row, disks).check().map_err(|bad| Error::invalid(bad.field, bad.message))
}

/// An image that a person named and that is complete.
///
/// Errors: `Invalid` at `field`.
pub(super) fn ready_image(tx: &Tx, id_or_name: &str, field: &'static str) -> Result<ImageRow> {
    match images::named(tx, id_or_name)? {
        Some(image) if image.ready => Ok(image),
        Some(image) => Err(Error::invalid(field, format!("The image \"{}\" is not complete yet.", image.name))),
        None => {
            let shown = crate::types::shorten(id_or_name);
            Err(Error::invalid(field, format!("There is no image \"{shown}\" in the library.")))
        }
    }
}

/// The empty text is an empty drive.
fn medium(tx: &Tx, image: Option<&str>) -> Result<Option<Id>> {
    match image {
        None | Some("") => Ok(None),
        Some(image) => Ok(Some(ready_image(tx, image, "cdrom")?.id)),
    }
}

/// `usual` is the firmware where none is named.
fn apply_boot(tx: &Tx, row: &mut GuestRow, boot: Boot, usual: BootKind) -> Result<()> {
    (row.kernel_image_id, row.initrd_image_id) = (None, None);
    match boot {
        Boot::Disk { firmware } => {
            row.boot = match firmware {
                None => usual,
                Some(Firmware::Bios) => BootKind::Bios,
                Some(Firmware::Uefi) => BootKind::Uefi,
                Some(Firmware::UefiSecure) => BootKind::UefiSecure,
            };
            row.cmdline = String::new();
        }
        Boot::Test { cmdline } => (row.boot, row.cmdline) = (BootKind::Test, cmdline),
        Boot::Kernel { kernel, initrd, cmdline } => {
            if kernel.is_empty() {
                return Err(Error::invalid("kernel", "A kernel from the library is needed."));
            }
            (row.boot, row.cmdline) = (BootKind::Kernel, cmdline);
            row.kernel_image_id = Some(ready_image(tx, &kernel, "kernel")?.id);
            if let Some(initrd) = initrd.filter(|initrd| !initrd.is_empty()) {
                row.initrd_image_id = Some(ready_image(tx, &initrd, "initrd")?.id);
            }
        }
    }
    Ok(())
}

/// Checks the disks to make. Disks as old as their guest were made with it.
fn plan(tx: &Tx, (guest, created_ms): (&Id, i64), first: u32, wanted: &[NewDisk]) -> Result<Vec<Plan>> {
    if wanted.len() > DISKS_MAX {
        return Err(Error::invalid("disk", format!("A guest has at most {DISKS_MAX} disks.")));
    }
    let mut plans = Vec::new();
    for (position, disk) in (first..).zip(wanted) {
        let image = match disk.image.as_deref() {
            None | Some("") => None,
            Some(image) => Some(ready_image(tx, image, "disk_image")?),
        };
        let row = DiskRow {
            id: Id::random(),
            guest_id: guest.clone(),
            position,
            bus: disk.bus.unwrap_or(DiskBus::Virtio),
            size_bytes: disk_size(disk.size_bytes, image.as_ref())?,
            image_id: image.as_ref().map(|image| image.id.clone()),
            read_only: false,
            ready: image.is_none(),
            slot: None,
            leaving: false,
            limit: disk.limit,
            created_ms,
        };
        plans.push(Plan { row, image });
    }
    Ok(plans)
}

fn disk_size(wanted: Option<u64>, image: Option<&ImageRow>) -> Result<u64> {
    let least = image.map_or(DISK_BYTES_MIN, |image| image.size_bytes.div_ceil(SECTOR_BYTES) * SECTOR_BYTES);
    let Some(size_bytes) = wanted.or(image.map(|_| least)) else {
        return Err(Error::invalid("disk_size", "A disk needs a size or an image."));
    };
    if !(DISK_BYTES_MIN..=DISK_BYTES_MAX).contains(&size_bytes) || !size_bytes.is_multiple_of(SECTOR_BYTES) {
        let most = show_size(DISK_BYTES_MAX);
        return Err(Error::invalid(
            "disk_size",
            format!("A disk has {DISK_BYTES_MIN} bytes to {most}, in whole sectors of {SECTOR_BYTES} bytes."),
        ));
    }
    match image {
        Some(image) if size_bytes < least => Err(Error::invalid(
            "disk_size",
            format!("The image \"{}\" needs a disk of at least {}.", image.name, show_size(least)),
        )),
        _ => Ok(size_bytes),
    }
}
