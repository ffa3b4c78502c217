//! Disks and cards that come and go, as a guest's ACPI methods and drivers see it.

use std::io::Read;

use super::*;

const GPE_STATUS: Place = Place::Port(layout::GPE0.start, Width::B2);
const UP: Place = Place::Port(layout::PCI_HOTPLUG.start, Width::B4);
const DOWN: Place = Place::Port(layout::PCI_HOTPLUG.start + 4, Width::B4);
const EJECT: u64 = layout::PCI_HOTPLUG.start + 8;
const EVENT: u64 = 1 << layout::GPE_HOTPLUG;

fn bare() -> Rig {
    rig_of(GuestSpec { memory_bytes: 256 << 20, ..sample_spec() })
}

fn disk(bus: DiskBus) -> DiskSpec {
    DiskSpec { id: Id::random(), bus, read_only: false, slot: None, limit: RateLimit::default() }
}

/// A disk's file that says when it is closed: its other end reads the end.
fn told() -> (File, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    (OwnedFd::from(near).into(), far)
}

fn is_closed(far: &mut UnixStream) -> bool {
    far.set_nonblocking(true).unwrap();
    matches!(far.read(&mut [0]), Ok(0))
}

impl Rig {
    fn id(&mut self, slot: u8) -> u64 {
        self.devices.pci.lock().unwrap().read(DevFn::new(slot, 0), 0, Width::B4)
    }

    /// As the guest's `_EJ0` and then the machine; gives the slots that are empty now.
    fn eject(&mut self, slots: u64) -> Vec<u8> {
        if self.pio.write(EJECT, Width::B4, slots) == Effect::None {
            return Vec::new();
        }
        self.paused(Devices::take_out_ejected)
    }

    fn paused<T>(&mut self, work: impl FnOnce(&mut Devices) -> T) -> T {
        self.devices.hold();
        let done = work(&mut self.devices);
        self.devices.release();
        done
    }
}

#[test]
fn a_disk_that_is_put_in_is_told_of_and_serves_and_leaves_in_the_middle_of_it() {
    let mut rig = bare();
    for _ in 0..3 {
        rig.devices.attach_disk(slot::DISK, &disk(DiskBus::Virtio), image()).unwrap();
        assert_eq!(rig.read(GPE_STATUS), EVENT);
        rig.write(GPE_STATUS, EVENT);
        assert_eq!([rig.read(UP), rig.read(UP), rig.read(DOWN)], [1 << slot::DISK, 0, 0]);
        rig.replay("seabios-virtio-blk");
        assert_eq!(rig.board.doorbells.lock().unwrap().len(), 2);
        assert!(rig.devices.attach_disk(slot::DISK, &disk(DiskBus::Virtio), image()).is_err(), "it is taken");
        rig.devices.ask_for(slot::DISK);
        assert_eq!([rig.read(GPE_STATUS), rig.read(DOWN)], [EVENT, 1 << slot::DISK]);
        rig.write(GPE_STATUS, EVENT);
        assert_eq!(rig.id(slot::DISK), 0x1042_1af4, "the guest is still to let go");
        assert_eq!(rig.eject(1 << slot::DISK), [slot::DISK]);
        assert_eq!((rig.id(slot::DISK), rig.read(DOWN)), (0xffff_ffff, 0));
        assert_eq!(*rig.board.doorbells.lock().unwrap(), [0u64; 0]);
        let before = rig.misses();
        assert_eq!(rig.mmio.read(0xfe00_0014, Width::B1), 0xff);
        assert!(rig.misses() > before, "its registers are gone from the address space");
        assert!(rig.eject(1 << slot::DISK).is_empty(), "a second time");
    }
}

#[test]
fn only_slots_that_are_free_for_it_take_a_disk() {
    let mut rig = rig_with(16 << 20, &[DiskBus::Virtio], NetworkModel::Virtio);
    for taken in [slot::HOST_BRIDGE, slot::VGA, slot::RNG, slot::DISK, slot::WATCHDOG, slot::VSOCK + 1, 32, 255] {
        assert!(rig.devices.attach_disk(taken, &disk(DiskBus::Nvme), image()).is_err(), "{taken}");
        rig.devices.ask_for(taken);
    }
    assert!(rig.devices.attach_disk(slot::DISK + 1, &disk(DiskBus::Ahci), image()).is_err());
    assert!(rig.devices.attach_network(&card(NetworkModel::Virtio), vec![image().into()]).is_err());
    rig.devices.ask_for(slot::DISK + 1);
    assert_eq!((rig.read(UP), rig.read(DOWN)), (0, 1 << slot::DISK), "what is there, and can go");
    assert!(rig.eject(!(1 << slot::DISK)).is_empty());
    assert_eq!(rig.eject(u64::MAX), [slot::DISK]);
    assert!(rig.eject(u64::MAX).is_empty());
    assert_ne!(rig.id(slot::RNG), 0xffff_ffff);
}

#[test]
fn what_is_taken_out_is_closed() {
    let mut rig = bare();
    for bus in [DiskBus::Virtio, DiskBus::Nvme] {
        let (file, mut far) = told();
        let disk = disk(bus);
        rig.devices.attach_disk(15, &disk, file).unwrap();
        assert!(!is_closed(&mut far));
        assert_eq!(rig.devices.limit_disk(&disk.id, RateLimit::default()), bus == DiskBus::Virtio);
        rig.devices.ask_for(15);
        assert_eq!(rig.eject(1 << 15), [15]);
        assert!(!rig.devices.limit_disk(&disk.id, RateLimit::default()), "it is gone");
        assert!(is_closed(&mut far), "{bus:?}");
    }
    for model in [NetworkModel::Virtio, NetworkModel::E1000] {
        let mut rig = rig_with(16 << 20, &[], model);
        rig.devices.ask_for(slot::NETWORK);
        assert_eq!(rig.eject(u64::MAX), [slot::NETWORK]);
        assert!(is_closed(&mut rig.network), "{model:?}");
        assert!(rig.devices.network_link().is_none());
        let (near, mut far) = UnixStream::pair().unwrap();
        rig.devices.attach_network(&card(model), vec![near.into()]).unwrap();
        assert_eq!(rig.read(UP), 1 << slot::NETWORK);
        assert_ne!(rig.id(slot::NETWORK), 0xffff_ffff);
        rig.devices.ask_for(slot::NETWORK);
        assert_eq!(rig.paused(Devices::take_out_asked_for), [slot::NETWORK]);
        assert!(is_closed(&mut far), "{model:?}");
    }
    // The queues of a tap, some of which the card keeps handles on; and a vCPU that keeps the card.
    let mut rig = bare();
    let (first, second) = (told(), told());
    let mut ends = [first.1, second.1];
    let tap = NetworkSpec { backend: NetworkBackend::Tap, ..card(NetworkModel::Virtio) };
    rig.devices.attach_network(&tap, vec![first.0.into(), second.0.into()]).unwrap();
    let kept = rig.devices.network_link().cloned();
    rig.devices.ask_for(slot::NETWORK);
    assert_eq!(rig.eject(1 << slot::NETWORK), [slot::NETWORK]);
    assert!(ends.iter_mut().all(is_closed) && kept.is_some());
}

#[test]
fn a_reset_finds_what_is_there_and_forgets_what_was_asked() {
    let mut rig = rig_with(256 << 20, &[DiskBus::Virtio, DiskBus::Nvme], NetworkModel::Virtio);
    rig.devices.attach_disk(12, &disk(DiskBus::Virtio), image()).unwrap();
    rig.devices.ask_for(8);
    rig.devices.ask_for(4);
    let gone = rig.paused(|devices| {
        let gone = devices.take_out_asked_for();
        devices.reset();
        gone
    });
    assert_eq!(gone, [4, 8]);
    assert_eq!([rig.read(UP), rig.read(DOWN), rig.read(GPE_STATUS)], [0, 0, 0]);
    assert_eq!([4, 8, 9, 12].map(|slot| rig.id(slot)), [0xffff_ffff, 0xffff_ffff, 0x0010_1b36, 0x1042_1af4]);
    assert!(rig.paused(Devices::take_out_asked_for).is_empty());
}

#[test]
fn a_suspended_guest_goes_on_with_what_it_has_then() {
    let (first, second) = (disk(DiskBus::Virtio), DiskSpec { slot: Some(11), ..disk(DiskBus::Virtio) });
    let spec = GuestSpec { memory_bytes: 256 << 20, disks: vec![first], ..sample_spec() };
    let mut rig = rig_of(spec.clone());
    rig.replay("seabios-virtio-blk");
    rig.devices.attach_disk(11, &second, image()).unwrap();
    rig.devices.ask_for(8);
    let states = rig.paused(|devices| devices.save());
    let without = rig_of(spec.clone());
    let mut left = states.clone();
    without.devices.hold();
    without.devices.restore(&mut |name| taken(&mut left, name)).unwrap();
    assert!(!left.is_empty(), "a machine with another specification notices");
    let mut disks = spec.disks.clone();
    disks.push(second);
    let mut again = rig_of(GuestSpec { disks, ..spec });
    let mut left = states;
    again.devices.hold();
    again.devices.restore(&mut |name| taken(&mut left, name)).unwrap();
    again.devices.release();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!([again.read(UP), again.read(DOWN), again.read(GPE_STATUS)], [1 << 11, 1 << 8, EVENT]);
    assert!(again.devices.is_asked_for(8));
    assert_eq!(again.eject(1 << 8), [8]);
    assert_eq!([8, 11].map(|slot| again.id(slot)), [0xffff_ffff, 0x1042_1af4]);
}

#[test]
fn firmware_is_told_of_a_new_disk_at_the_next_reset() {
    let mut rig = bare();
    let before = rig.file("bootorder");
    let spec = GuestSpec { disks: vec![disk(DiskBus::Virtio)], ..sample_spec() };
    rig.devices.follow(&spec);
    assert_eq!(rig.file("bootorder"), before);
    rig.paused(|devices| devices.reset());
    let after = String::from_utf8(rig.file("bootorder")).unwrap();
    assert!(after.starts_with("/pci@i0cf8/scsi@8/disk@0,0\n"), "{after}");
    rig.devices.follow(&sample_spec());
    rig.paused(|devices| devices.reset());
    assert_eq!(rig.file("bootorder"), before);
}
