//! Disks and network cards that are put in and taken out while the guest runs: orders of people, and what the guest lets go.
//!
//! A guest that does not let go is not waited for here: whoever gave the order sees that the device is still there.

use std::{fs::File, os::fd::OwnedFd};

use super::Keeper;
use crate::{
    engine::layout::slot,
    spec::{BootFrom, DiskSpec, FirstBoot, GuestSpec, NetworkSpec},
    wire::{EngineMessage, Plugged, PluggedDevice},
};

impl Keeper {
    /// Errors: a sentence for the person; nothing has changed then.
    pub(super) fn attach_disk(&mut self, disk: DiskSpec, file: Option<File>) -> Result<(), String> {
        let file = file.ok_or("No file was handed over for the disk.")?;
        let (spec, slot) = with_disk(&self.spec, disk.clone())?;
        let attached = self.machine.devices.attach_disk(slot, &disk, file);
        attached.map_err(|error| format!("The disk cannot be put in: {error}."))?;
        self.log.say(&format!("engine: the disk {} was put into slot {slot}", disk.id));
        self.came(spec);
        Ok(())
    }

    /// Errors: as `attach_disk`.
    pub(super) fn attach_network(&mut self, network: NetworkSpec, links: Vec<OwnedFd>) -> Result<(), String> {
        if links.is_empty() {
            return Err("Nothing was handed over for the network card.".into());
        }
        let spec = with_network(&self.spec, network.clone())?;
        let attached = self.machine.devices.attach_network(&network, links);
        attached.map_err(|error| format!("The network card cannot be put in: {error}."))?;
        self.log.say(&format!("engine: a network card was put into slot {}", slot::NETWORK));
        self.came(spec);
        Ok(())
    }

    /// Asks the guest. Errors: as `attach_disk`.
    pub(super) fn detach(&mut self, device: &PluggedDevice) -> Result<(), String> {
        let found = plugged(&self.spec, |_| false).into_iter().find(|plugged| plugged.device == *device);
        let slot = found
            .ok_or("The guest has no such disk or network card in a slot that can be emptied while it runs.")?
            .slot;
        self.machine.devices.ask_for(slot);
        self.log.say(&format!("engine: the guest was asked to let go of what is in slot {slot}"));
        self.tell_plugged();
        Ok(())
    }

    /// The guest has let go of something. The vCPU that did so waits.
    pub(super) fn let_go(&mut self) {
        self.machine.pause();
        let gone = self.machine.devices.take_out_ejected();
        self.went(&gone);
        if !self.paused {
            self.machine.resume();
        }
    }

    /// Before a reset: what the guest was asked for, and did not let go, goes now.
    pub(super) fn take_out_asked_for(&mut self) {
        self.machine.pause();
        let gone = self.machine.devices.take_out_asked_for();
        self.went(&gone);
    }

    fn came(&mut self, spec: GuestSpec) {
        self.spec = spec;
        self.machine.devices.follow(&self.spec);
        if self.paused {
            // What is new does nothing either.
            self.machine.pause();
        }
        self.tell_plugged();
    }

    fn went(&mut self, slots: &[u8]) {
        if slots.is_empty() {
            return;
        }
        for slot in slots {
            self.spec = without(&self.spec, *slot);
            self.log.say(&format!("engine: slot {slot} is empty"));
        }
        self.machine.devices.follow(&self.spec);
        if slots.contains(&slot::NETWORK) {
            self.announcer.say(|hello| hello.addresses.clear(), &EngineMessage::Addresses(Vec::new()));
        }
        self.tell_plugged();
    }

    fn tell_plugged(&self) {
        let present = plugged(&self.spec, |slot| self.machine.devices.is_asked_for(slot));
        let message = EngineMessage::Plugged(present.clone());
        self.announcer.say(|hello| hello.plugged = Some(present), &message);
    }
}

/// What of a guest can be taken out while it runs, in the order of the specification.
pub(super) fn plugged(spec: &GuestSpec, leaving: impl Fn(u8) -> bool) -> Vec<Plugged> {
    let disks = spec.disks.iter().zip(spec.disk_slots());
    let disks = disks.filter_map(|(disk, slot)| Some((PluggedDevice::Disk(disk.id.clone()), slot?)));
    let card = spec.network.iter().map(|network| (PluggedDevice::Network(network.mac), slot::NETWORK));
    disks.chain(card).map(|(device, slot)| Plugged { device, slot, leaving: leaving(slot) }).collect()
}

/// The guest with one more disk, and that disk's slot.
fn with_disk(spec: &GuestSpec, disk: DiskSpec) -> Result<(GuestSpec, u8), String> {
    if !disk.bus.has_slots() {
        return Err("Only disks on virtio or NVMe can be put in while the guest runs.".into());
    }
    if spec.disks.iter().any(|other| other.id == disk.id) {
        return Err("The guest has this disk already.".into());
    }
    let mut spec = spec.clone();
    spec.disks.push(disk);
    spec.check().map_err(|bad| bad.message)?;
    let spec = spec.with_slots();
    let slot = spec.disks.last().and_then(|disk| disk.slot).ok_or("All slots for disks are taken.")?;
    Ok((spec, slot))
}

fn with_network(spec: &GuestSpec, network: NetworkSpec) -> Result<GuestSpec, String> {
    if spec.network.is_some() {
        return Err("The guest has a network card already, and can have one.".into());
    }
    Ok(GuestSpec { network: Some(network), ..spec.clone() })
}

/// The guest without what is in `slot`, which it does not boot from any more either.
fn without(spec: &GuestSpec, slot: u8) -> GuestSpec {
    let mut spec = spec.with_slots();
    let gone: Vec<BootFrom> =
        spec.disks.extract_if(.., |disk| disk.slot == Some(slot)).map(|disk| BootFrom::Disk(disk.id)).collect();
    let is_gone = |from: &BootFrom| gone.contains(from);
    let network = slot == slot::NETWORK && spec.network.take().is_some();
    let goes = |from: &BootFrom| is_gone(from) || network && *from == BootFrom::Network;
    spec.boot_order.retain(|from| !goes(from));
    spec.first_boot = spec.first_boot.take().filter(|first| !matches!(first, FirstBoot::From(from) if goes(from)));
    spec
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        spec::{Boot, DiskBus, NetworkBackend, NetworkModel, RateLimit, tests::sample},
        types::{Id, MacAddr},
    };

    fn disk(bus: DiskBus, slot: Option<u8>) -> DiskSpec {
        DiskSpec { id: Id::random(), bus, read_only: false, slot, limit: RateLimit::default() }
    }

    fn card() -> NetworkSpec {
        NetworkSpec { mac: MacAddr([2; 6]), backend: NetworkBackend::Tap, model: NetworkModel::E1000 }
    }

    #[test]
    fn disks_come_into_the_first_free_slot_and_the_others_stay_where_they_are() {
        let disks = vec![disk(DiskBus::Virtio, None), disk(DiskBus::Ahci, None), disk(DiskBus::Nvme, None)];
        let first = GuestSpec { disks, ..sample() }.with_slots();
        let (second, slot) = with_disk(&first, disk(DiskBus::Nvme, None)).unwrap();
        assert_eq!((slot, second.disks.len()), (10, 4));
        let third = without(&second, 8);
        assert_eq!(third.disk_slots(), [None, Some(9), Some(10)]);
        let (fourth, slot) = with_disk(&third, disk(DiskBus::Virtio, None)).unwrap();
        assert_eq!((slot, fourth.disk_slots()), (8, vec![None, Some(9), Some(10), Some(8)]));
        let (fifth, slot) = with_disk(&fourth, disk(DiskBus::Virtio, Some(15))).unwrap();
        assert_eq!((slot, fifth.check()), (15, Ok(())));
        let refused = |disk| with_disk(&fifth, disk).unwrap_err();
        assert!(refused(fifth.disks[0].clone()).contains("virtio or NVMe"));
        assert!(refused(fifth.disks[1].clone()).contains("already"));
        assert!(refused(disk(DiskBus::Virtio, Some(15))).contains("slot 15"));
        assert!(refused(disk(DiskBus::Virtio, Some(4))).contains("slot"));
        let mut full = fifth;
        while full.disks.len() < 8 {
            full = with_disk(&full, disk(DiskBus::Virtio, None)).unwrap().0;
        }
        assert!(with_disk(&full, disk(DiskBus::Virtio, None)).unwrap_err().contains("at most 8"));
    }

    #[test]
    fn what_went_is_not_booted_from() {
        let (gone, stays) = (disk(DiskBus::Virtio, None), disk(DiskBus::Virtio, None));
        let (a, b) = (BootFrom::Disk(gone.id.clone()), BootFrom::Disk(stays.id.clone()));
        let spec = GuestSpec {
            boot: Boot::Bios,
            boot_order: vec![BootFrom::Network, a.clone(), BootFrom::Cd, b.clone()],
            first_boot: Some(FirstBoot::From(a)),
            network: Some(card()),
            disks: vec![gone, stays],
            ..sample()
        };
        assert_eq!(spec.check(), Ok(()));
        let without_disk = without(&spec, 8);
        assert_eq!(without_disk.boot_order, [BootFrom::Network, BootFrom::Cd, b.clone()]);
        assert_eq!((without_disk.first_boot.clone(), without_disk.check()), (None, Ok(())));
        let bare = without(&without_disk, slot::NETWORK);
        assert_eq!((bare.boot_order.clone(), bare.network.clone()), (vec![BootFrom::Cd, b], None));
        assert_eq!(bare.check(), Ok(()));
        assert_eq!(without(&bare, 8), bare, "an empty slot");
        assert_eq!(with_network(&bare, card()).unwrap().network, Some(card()));
        assert!(with_network(&spec, card()).is_err());
    }

    #[test]
    fn what_can_be_taken_out_is_listed_with_its_slot() {
        let disks = vec![disk(DiskBus::Ahci, None), disk(DiskBus::Virtio, None), disk(DiskBus::Nvme, Some(12))];
        let ids: Vec<Id> = disks.iter().map(|disk| disk.id.clone()).collect();
        let spec = GuestSpec { disks, network: Some(card()), ..sample() };
        let entry = |device, slot, leaving| Plugged { device, slot, leaving };
        let expected = [
            entry(PluggedDevice::Disk(ids[1].clone()), 8, false),
            entry(PluggedDevice::Disk(ids[2].clone()), 12, true),
            entry(PluggedDevice::Network(MacAddr([2; 6])), slot::NETWORK, false),
        ];
        assert_eq!(plugged(&spec, |slot| slot == 12), expected);
    }
}
