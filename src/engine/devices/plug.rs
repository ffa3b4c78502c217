//! Disks and network cards that come and go while the guest runs. All of it is the machine's thread's.
//!
//! What is put in is on the bus, with its thread made, before the guest is told. What the guest lets go goes in the moment in which
//! the machine, with every vCPU parked, takes it out; the vCPU that asked for it goes on afterwards.

use std::{fs::File, io, os::fd::OwnedFd};

use super::{Devices, boot_order, lock};
use crate::{
    engine::layout::slot,
    spec::{DiskSpec, GuestSpec, NetworkSpec},
};

impl Devices {
    /// Puts a disk on virtio or NVMe into a slot for disks, and tells the guest.
    ///
    /// Errors: the slot is taken, the file cannot be used, or the host has no thread or descriptor for it. Nothing has changed then.
    pub fn attach_disk(&mut self, slot: u8, disk: &DiskSpec, file: File) -> io::Result<()> {
        self.check_free(slot)?;
        self.functions.add_disk(slot, disk, file)?;
        self.hotplug.filled(slot);
        Ok(())
    }

    /// Puts a network card into the slot for it, and tells the guest. `links` are as at the start, and at least one. Errors: as
    /// `attach_disk`.
    pub fn attach_network(&mut self, network: &NetworkSpec, links: Vec<OwnedFd>) -> io::Result<()> {
        self.check_free(slot::NETWORK)?;
        self.functions.add_network(network, links)?;
        self.hotplug.filled(slot::NETWORK);
        Ok(())
    }

    /// Asks the guest to let go of what is in `slot`. Again is another event, for a guest that missed the first.
    pub fn ask_for(&self, slot: u8) {
        if !self.functions.is_free(slot) {
            self.hotplug.ask_for(slot);
        }
    }

    /// Whether the guest was asked for what is in `slot`, and it is still there.
    pub fn is_asked_for(&self, slot: u8) -> bool {
        self.hotplug.is_asked_for(slot)
    }

    /// Takes out what the guest has let go; gives the slots that are empty now. Everything is held.
    pub fn take_out_ejected(&mut self) -> Vec<u8> {
        self.take_out(self.hotplug.take_ejected())
    }

    /// Takes out all that the guest was asked for: before a reset, after which it knows of nothing. Everything is held.
    pub fn take_out_asked_for(&mut self) -> Vec<u8> {
        self.take_out(self.hotplug.asked_for())
    }

    fn take_out(&mut self, slots: Vec<u8>) -> Vec<u8> {
        for slot in &slots {
            self.functions.remove(*slot);
            self.hotplug.emptied(*slot);
        }
        slots
    }

    /// The guest has other devices than before: what firmware tries from the next reset on.
    pub fn follow(&self, spec: &GuestSpec) {
        lock(&self.fw_cfg).set_boot_order(&boot_order(spec));
    }

    fn check_free(&self, slot: u8) -> io::Result<()> {
        let pluggable = slot::PLUGGABLE.checked_shr(slot.into()).unwrap_or(0) & 1 != 0;
        if pluggable && self.functions.is_free(slot) {
            Ok(())
        } else {
            Err(io::Error::other(format!("the PCI slot {slot} is not free")))
        }
    }
}
