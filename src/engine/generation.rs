//! The VM generation id: 128 random bits in the guest's memory that are others when the guest has become a copy, or has gone back
//! in time (Microsoft, "Virtual Machine Generation ID", 2012). A system that hears of it makes new random seeds and ids.
//!
//! ```text
//! boot   GUID_FILE ── firmware ──▶ a page that no system uses, to which the DSDT is linked; its address ──▶ ADDRESS_FILE
//! renew  another id into that page ──▶ general-purpose event ──▶ \_GPE._E05 ──▶ Notify(\_SB.VGEN) ──▶ the driver reads it
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    memory::{Gpa, GuestRam},
    saved::{BadState, SaveState, State as SavedState},
};

pub const GUID_FILE: &str = "etc/vmgenid_guid";
/// The guest writes this one: 8 bytes, little-endian.
pub const ADDRESS_FILE: &str = "etc/vmgenid_addr";
/// A page for itself, as the paper asks for.
pub const FILE_BYTES: usize = 4096;
/// Where the id is in its page. OVMF takes what a pointer leads to for an ACPI table if it looks like one; behind zeros as long
/// as a table's header nothing does.
pub const GUID_AT: u8 = 40;
const GUID_BYTES: usize = 16;

/// The machine's hold on its generation id. Clones are the same.
#[derive(Clone)]
pub struct Generation(Arc<Shared>);

struct Shared {
    ram: GuestRam,
    changed: Box<dyn Fn() + Send + Sync>,
    state: Mutex<State>,
}

struct State {
    guid: [u8; GUID_BYTES],
    /// Where the guest's firmware says that it put the id; zero before it says so.
    at: Gpa,
}

impl State {
    /// Writes the id into the guest's memory. False when no good place is known.
    fn write(&self, ram: &GuestRam) -> bool {
        self.at != Gpa(0) && self.at.0.is_multiple_of(8) && ram.write(self.at, &self.guid).is_ok()
    }
}

impl Generation {
    /// `changed` raises the event in the guest.
    pub fn new(ram: GuestRam, guid: [u8; 16], changed: impl Fn() + Send + Sync + 'static) -> Generation {
        let state = Mutex::new(State { guid, at: Gpa(0) });
        Generation(Arc::new(Shared { ram, changed: Box::new(changed), state }))
    }

    /// Gives the guest another id and tells it. For a guest that goes on from a snapshot or as a copy, before its first
    /// instruction there; a guest that was only suspended keeps its id. Every vCPU is parked.
    pub fn renew(&self, guid: [u8; 16]) {
        let mut state = self.lock();
        state.guid = guid;
        let told = state.write(&self.0.ram);
        drop(state);
        if told {
            (self.0.changed)();
        }
    }

    /// What `GUID_FILE` holds.
    pub fn file(&self) -> Vec<u8> {
        let mut page = vec![0; usize::from(GUID_AT)];
        page.extend(self.lock().guid);
        page.resize(FILE_BYTES, 0);
        page
    }

    /// The id is at `at` from now on: the guest's firmware says so, or our own boot. It is written there, as it may be another
    /// than when the firmware read the file. A place that is no RAM is a guest without an id.
    pub fn placed(&self, at: Gpa) {
        let mut state = self.lock();
        state.at = at;
        state.write(&self.0.ram);
    }

    /// What `placed` heard last; zero when nothing.
    pub fn address(&self) -> Gpa {
        self.lock().at
    }

    /// The machine is reset: its memory is no place any more. The id stays.
    pub fn reset(&self) {
        self.lock().at = Gpa(0);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use crate::engine::saved::hex;

    pub(super) const KIND: &str = "generation";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        #[serde(with = "hex")]
        pub(super) guid: Vec<u8>,
        pub(super) at: u64,
    }
}

impl SaveState for Generation {
    fn save(&self) -> SavedState {
        let State { guid, at } = &*self.lock();
        SavedState::new(saved::KIND, 1, &saved::V1 { guid: guid.to_vec(), at: at.0 })
    }

    /// The id itself is in the guest's memory already.
    fn restore(&mut self, state: &SavedState) -> Result<(), BadState> {
        let saved::V1 { guid, at } = state.fields(saved::KIND, 1)?;
        let guid = guid.try_into().map_err(|_| BadState::new(saved::KIND, "the id has not 16 bytes"))?;
        *self.lock() = State { guid, at: Gpa(at) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::engine::saved::testing::{matches_golden, spoil};

    fn made(guid: u8) -> (Generation, GuestRam, Arc<AtomicUsize>) {
        let ram = GuestRam::new(16 << 20).unwrap();
        let events = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&events);
        let generation = Generation::new(ram.clone(), [guid; 16], move || {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        (generation, ram, events)
    }

    fn bytes(ram: &GuestRam, at: u64) -> [u8; 18] {
        let mut seen = [0; 18];
        ram.read(Gpa(at - 1), &mut seen).unwrap();
        seen
    }

    fn around(guid: u8) -> [u8; 18] {
        let mut expected = [guid; 18];
        (expected[0], expected[17]) = (0, 0);
        expected
    }

    #[test]
    fn a_renewed_id_is_in_its_place_before_the_guest_hears_of_it() {
        let (generation, ram, events) = made(1);
        generation.renew([2; 16]);
        assert_eq!(events.load(Ordering::SeqCst), 0, "nobody knows a place yet");
        generation.placed(Gpa(0x20_0028));
        assert_eq!(bytes(&ram, 0x20_0028), around(2), "what was read before may be old");
        assert_eq!(events.load(Ordering::SeqCst), 0);
        generation.renew([3; 16]);
        assert_eq!((bytes(&ram, 0x20_0028), events.load(Ordering::SeqCst)), (around(3), 1));
        assert_eq!(generation.file()[40..56], [3; 16]);
        generation.reset();
        generation.renew([4; 16]);
        assert_eq!((bytes(&ram, 0x20_0028), events.load(Ordering::SeqCst)), (around(3), 1));
        assert_eq!(generation.file()[40..56], [4; 16], "for the firmware's next boot");
    }

    #[test]
    fn places_that_are_none_are_harmless() {
        let (generation, ram, events) = made(1);
        for at in [0, 1, 0x20_0004, 0xa_0000, 0x9_fff8, 0xfff_fff8, 0xffff_fff8, u64::MAX - 7, u64::MAX, 1 << 63] {
            generation.placed(Gpa(at));
            assert_eq!(generation.address(), Gpa(at));
            generation.renew([2; 16]);
        }
        assert_eq!(events.load(Ordering::SeqCst), 0);
        assert_eq!(ram.get_u64(Gpa(0)), Ok(0));
    }

    #[test]
    fn a_restored_id_keeps_its_place_and_rings_only_when_renewed() {
        let (first, _, _) = made(1);
        first.placed(Gpa(0x7_0028));
        let saved = matches_golden(&first.save());
        let (mut second, ram, events) = made(9);
        second.restore(&saved).unwrap();
        assert_eq!(second.save().fields::<serde_json::Value>("generation", 1), saved.fields("generation", 1));
        assert_eq!(
            (bytes(&ram, 0x7_0028), events.load(Ordering::SeqCst)),
            (around(0), 0),
            "memory is restored elsewhere"
        );
        second.renew([5; 16]);
        assert_eq!((bytes(&ram, 0x7_0028), events.load(Ordering::SeqCst)), (around(5), 1));
        let mut refused = 0;
        spoil(&saved, |state| {
            let (mut device, _, _) = made(1);
            refused += usize::from(device.restore(state).is_err());
            device.renew([6; 16]);
            device.placed(Gpa(8));
            device.reset();
        });
        assert!(refused > 20, "{refused}");
    }
}
