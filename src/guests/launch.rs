//! From a guest's rows to what `hostd` needs to start its engine.

use super::Guests;
use crate::{
    error::{Error, Result},
    spec::{Boot, BootFrom, DiskSpec, FirstBoot, GuestSpec, NetworkBackend, NetworkSpec},
    store::{
        Tx,
        guests::{self as rows, BootKind, DiskRow, GuestRow, NetworkMode},
        images::{self, ImageRow},
    },
    types::{BadValue, Id},
    wire::{Attachment, Launch, Place},
};

impl Guests {
    /// Everything to start this guest anew as it is configured now; `once` is what this one start does otherwise, as a person says it.
    ///
    /// Errors: `Conflict` when a disk is not ready or an image is gone; `Invalid` at `boot`.
    pub(super) async fn launch(&self, id: &Id, once: Option<&str>) -> Result<Launch> {
        let (id, once) = (id.clone(), once.map(str::to_owned));
        self.0
            .around
            .store
            .reading(move |tx| {
                let row = rows::by_id(tx, &id)?.ok_or_else(|| Error::not_found("There is no such guest."))?;
                let disks = rows::disks(tx, &id)?;
                let mut launch = of_rows(tx, &row, &disks)?;
                if let Some(word) = once.as_deref().filter(|word| !word.is_empty()) {
                    launch.spec.first_boot = Some(first_boot(word, &disks)?);
                    launch.spec.check().map_err(|bad| Error::invalid("boot", bad.message))?;
                }
                Ok(launch)
            })
            .await
    }
}

fn first_boot(word: &str, disks: &[DiskRow]) -> Result<FirstBoot> {
    match word {
        "setup" => Ok(FirstBoot::Setup),
        word => Ok(FirstBoot::From(boot_from(word, disks).map_err(|bad| Error::invalid("boot", bad.to_string()))?)),
    }
}

/// A word of a person: `cd`, `network`, the id of a disk, or its place: `disk1`.
pub(super) fn boot_from(word: &str, disks: &[DiskRow]) -> Result<BootFrom, BadValue> {
    let Some(number) = word.strip_prefix("disk").and_then(|number| number.parse::<usize>().ok()) else {
        return word.parse();
    };
    let disk = number.checked_sub(1).and_then(|index| disks.get(index));
    disk.map(|disk| BootFrom::Disk(disk.id.clone())).ok_or_else(|| BadValue(format!("The guest has no disk {number}.")))
}

/// Where the file of an image is.
pub(super) fn place_of(image: &ImageRow) -> Place {
    match &image.host_path {
        Some(path) => Place::Host(path.clone()),
        None => Place::Image(image.id.clone()),
    }
}

/// One disk of a guest.
pub(super) fn disk_spec(disk: &DiskRow) -> DiskSpec {
    DiskSpec {
        id: disk.id.clone(),
        bus: disk.bus,
        read_only: disk.read_only,
        slot: disk.slot.filter(|_| disk.bus.has_slots()),
        limit: disk.limit,
    }
}

/// What the engine will be told; also checked when a guest is made or changed.
pub(super) fn spec_of(row: &GuestRow, disks: &[DiskRow]) -> GuestSpec {
    let cmdline = row.cmdline.clone();
    GuestSpec {
        id: row.id.clone(),
        name: row.name.clone(),
        machine: row.machine.clone(),
        cpus: row.cpus,
        sockets: row.sockets,
        threads: row.threads,
        memory_bytes: row.memory_bytes,
        boot: match row.boot {
            BootKind::Bios => Boot::Bios,
            BootKind::Uefi => Boot::Uefi { secure_boot: false },
            BootKind::UefiSecure => Boot::Uefi { secure_boot: true },
            BootKind::Kernel => Boot::Kernel { initrd: row.initrd_image_id.is_some(), cmdline },
            BootKind::Test => Boot::Test { cmdline },
        },
        disks: disks.iter().map(disk_spec).collect(),
        cd: row.cd_image_id.is_some(),
        network: match row.network {
            NetworkMode::None => None,
            NetworkMode::Nat | NetworkMode::Bridge(_) => Some(NetworkBackend::Tap),
            NetworkMode::User => Some(NetworkBackend::Passt),
        }
        .map(|backend| NetworkSpec { mac: row.mac, backend, model: row.network_model }),
        watchdog: row.watchdog,
        cpu_model: row.cpu_model,
        switches: row.switches,
        boot_order: row.boot_order.clone(),
        first_boot: None,
    }
}

/// What its network card is connected to.
pub(super) fn attachment_of(row: &GuestRow) -> Option<Attachment> {
    match &row.network {
        NetworkMode::None => None,
        NetworkMode::Nat => Some(Attachment::Nat),
        NetworkMode::User => Some(Attachment::User),
        NetworkMode::Bridge(name) => Some(Attachment::Bridge(name.clone())),
    }
}

fn of_rows(tx: &Tx, row: &GuestRow, disks: &[DiskRow]) -> Result<Launch> {
    if disks.iter().any(|disk| !disk.ready) {
        return Err(Error::conflict("An image is still being copied into a disk of this guest."));
    }
    let place = |id: &Option<Id>| -> Result<Option<Place>> {
        let Some(id) = id else { return Ok(None) };
        match images::by_id(tx, id)? {
            Some(image) if image.ready => Ok(Some(place_of(&image))),
            Some(image) => Err(Error::conflict(format!("The image \"{}\" is not complete yet.", image.name))),
            None => Err(Error::internal("An image of this guest is missing.", format!("image {id}"))),
        }
    };
    Ok(Launch {
        spec: spec_of(row, disks),
        disks: disks.iter().map(|disk| Place::Disk(disk.id.clone())).collect(),
        cd: place(&row.cd_image_id)?,
        kernel: place(&row.kernel_image_id)?,
        initrd: place(&row.initrd_image_id)?,
        resume: false,
        attachment: attachment_of(row),
    })
}
