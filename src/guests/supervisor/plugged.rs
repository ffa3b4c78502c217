//! What a supervisor does about disks and network cards that come and go while the guest runs.

use super::Task;
use crate::{
    guests::disks,
    store::guests,
    types::Id,
    wire::{Plugged, PluggedDevice},
};

impl Task {
    /// The engine says what is plugged in: where each disk is is kept, and what has left is forgotten.
    pub(super) async fn plugged(&mut self, plugged: Option<Vec<Plugged>>) {
        let all = plugged.clone().unwrap_or_default();
        let guest = self.guest.clone();
        // An engine of an older release says nothing, and keeps its card.
        let lost_card =
            card_is_missing(plugged.as_deref()) && !card_is_missing(self.publish.borrow().plugged.as_deref());
        if lost_card {
            let guest = guest.clone();
            self.log(self.around.store.writing(move |tx| guests::forget_network(tx, &guest)).await);
        }
        let slots: Vec<(Id, u8)> = all
            .into_iter()
            .filter_map(|Plugged { device, slot, .. }| match device {
                PluggedDevice::Disk(disk) => Some((disk, slot)),
                PluggedDevice::Network(_) => None,
            })
            .collect();
        let here: Vec<Id> = slots.iter().map(|(disk, _)| disk.clone()).collect();
        let written = self.around.store.writing(move |tx| {
            slots.iter().try_for_each(|(disk, slot)| guests::set_disk_slot(tx, &guest, disk, *slot))
        });
        self.log(written.await);
        self.forget_left(move |disk| here.contains(disk)).await;
        // After the rows, which whoever waits for something to go reads or writes next.
        self.change(|status| status.plugged = plugged);
    }

    /// Forgets the disks that were to leave and that `has` says are gone, and their files.
    pub(super) async fn forget_left(&self, has: impl Fn(&Id) -> bool + Send + 'static) {
        let guest = self.guest.clone();
        match self.around.store.writing(move |tx| guests::delete_left_disks(tx, &guest, has)).await {
            Ok(gone) if gone.is_empty() => {}
            Ok(gone) => {
                disks::remove(&self.around.state_dir, &gone);
                self.tell();
            }
            Err(error) => self.log(Err(error)),
        }
    }
}

fn card_is_missing(plugged: Option<&[Plugged]>) -> bool {
    plugged.is_some_and(|plugged| !plugged.iter().any(Plugged::is_card))
}
