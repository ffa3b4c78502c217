//! Address spaces: finds the device behind a port or an MMIO address and hands it one access.
//!
//! Two `Bus` values exist, PIO and MMIO. A `Bus` is changed rarely (a BAR moves) and read at every exit, so each vCPU reads
//! through its own `BusView`: a copy of the map, fetched again only when the generation has changed. No lock is shared
//! between vCPUs on the way to a device.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// How wide one access is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    B1 = 1,
    B2 = 2,
    B4 = 4,
    B8 = 8,
}

impl Width {
    pub fn from_bytes(bytes: usize) -> Option<Width> {
        match bytes {
            1 => Some(Width::B1),
            2 => Some(Width::B2),
            4 => Some(Width::B4),
            8 => Some(Width::B8),
            _ => None,
        }
    }
    pub fn bytes(self) -> usize {
        self as usize
    }
    /// All ones, as wide as this; also what a read of nothing gives.
    pub fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self as u32)
    }
}

/// Where inside its own region a device is touched, and how wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    pub offset: u64,
    pub width: Width,
}

impl Access {
    pub fn new(offset: u64, width: Width) -> Access {
        Access { offset, width }
    }
}

/// What the machine must do after a write. Devices ask; only the vCPU loop acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    None,
    Reset,
    PowerOff,
    /// Takes out of the PCI slots what the guest has let go.
    Eject,
}

/// The guest touched something that is not there. Never a host failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BusFault {
    NoDevice,
    NoRegister,
    BadWidth,
}

/// A device on a bus. Called by vCPU threads, one call at a time; `at.offset` is inside the mapped region, though an access
/// that starts inside may reach past its end. Values are little-endian in the low bytes of the `u64`.
pub trait BusDevice: Send {
    fn read(&mut self, at: Access) -> Result<u64, BusFault>;
    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault>;
}

pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

type Map = BTreeMap<u64, (u64, SharedDevice)>; // start -> (end, device)

/// The wanted region is not free; our mistake, or a BAR that the guest put over another.
#[derive(Debug, PartialEq, Eq)]
pub struct Overlap {
    pub wanted: Range<u64>,
    pub taken: Range<u64>,
}

/// One address space.
#[derive(Default)]
pub struct Bus {
    map: Mutex<Arc<Map>>,
    generation: AtomicU64,
    misses: AtomicU64,
}

impl Bus {
    /// Puts `device` at `at`. The device is called with offsets from `at.start`.
    pub fn map(&self, at: Range<u64>, device: SharedDevice) -> Result<(), Overlap> {
        assert!(at.start < at.end, "empty bus region {at:x?}");
        self.change(|map| {
            if let Some((&start, &(end, _))) = map.range(..at.end).next_back()
                && end > at.start
            {
                return Err(Overlap { wanted: at, taken: start..end });
            }
            map.insert(at.start, (at.end, device));
            Ok(())
        })
    }

    /// Takes away the region that starts at `start`; nothing happens when there is none.
    pub fn unmap(&self, start: u64) {
        self.change(|map| {
            map.remove(&start);
        });
    }

    /// A view for one reader.
    pub fn view(self: &Arc<Bus>) -> BusView {
        let map = Arc::clone(&self.map.lock().unwrap_or_else(PoisonError::into_inner));
        BusView { generation: self.generation.load(Ordering::Acquire), map, bus: Arc::clone(self) }
    }

    /// How often the guest touched what is not there.
    pub fn misses(&self) -> u64 {
        self.misses.load(Ordering::Relaxed)
    }

    fn change<T>(&self, work: impl FnOnce(&mut Map) -> T) -> T {
        let mut shared = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let out = work(Arc::make_mut(&mut shared));
        self.generation.fetch_add(1, Ordering::Release);
        out
    }
}

/// One vCPU's copy of the map, renewed when the bus has changed.
#[derive(Clone)]
pub struct BusView {
    bus: Arc<Bus>,
    generation: u64,
    map: Arc<Map>,
}

impl BusView {
    /// Reads; a miss is all ones.
    pub fn read(&mut self, address: u64, width: Width) -> u64 {
        let answer = match self.find(address) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(Access { offset, width })
            }
            None => Err(BusFault::NoDevice),
        };
        answer.unwrap_or_else(|_| {
            self.bus.misses.fetch_add(1, Ordering::Relaxed);
            u64::MAX
        }) & width.mask()
    }

    /// Writes; a miss is dropped.
    pub fn write(&mut self, address: u64, width: Width, value: u64) -> Effect {
        let answer = match self.find(address) {
            Some((offset, device)) => device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(Access { offset, width }, value & width.mask()),
            None => Err(BusFault::NoDevice),
        };
        answer.unwrap_or_else(|_| {
            self.bus.misses.fetch_add(1, Ordering::Relaxed);
            Effect::None
        })
    }

    /// Writes bytes as one access. One that crosses a page arrives from KVM in odd lengths; those go byte by byte, and the
    /// strongest effect wins.
    pub fn write_bytes(&mut self, address: u64, data: &[u8]) -> Effect {
        if let Some(width) = Width::from_bytes(data.len()) {
            return self.write(address, width, from_le(data));
        }
        let mut effect = Effect::None;
        for (index, byte) in data.iter().enumerate() {
            let done = self.write(address.wrapping_add(index as u64), Width::B1, u64::from(*byte));
            if done != Effect::None {
                effect = done;
            }
        }
        effect
    }

    /// Reads bytes as one access, or byte by byte as `write_bytes` does.
    pub fn read_bytes(&mut self, address: u64, data: &mut [u8]) {
        if let Some(width) = Width::from_bytes(data.len()) {
            return to_le(self.read(address, width), data);
        }
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.read(address.wrapping_add(index as u64), Width::B1) as u8;
        }
    }

    /// The device at `address` and the offset inside its region.
    fn find(&mut self, address: u64) -> Option<(u64, SharedDevice)> {
        let now = self.bus.generation.load(Ordering::Acquire);
        if now != self.generation {
            self.map = Arc::clone(&self.bus.map.lock().unwrap_or_else(PoisonError::into_inner));
            self.generation = now;
        }
        let (&start, (end, device)) = self.map.range(..=address).next_back()?;
        (address < *end).then(|| (address - start, Arc::clone(device)))
    }
}

/// The number in these bytes, lowest first; at most eight of them count.
pub fn from_le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Fills `into` with a number's bytes, lowest first.
pub fn to_le(value: u64, into: &mut [u8]) {
    for (byte, part) in into.iter_mut().zip(value.to_le_bytes()) {
        *byte = part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Cell(u64);
    impl BusDevice for Cell {
        fn read(&mut self, at: Access) -> Result<u64, BusFault> {
            Ok(self.0 + at.offset)
        }
        fn write(&mut self, _: Access, value: u64) -> Result<Effect, BusFault> {
            self.0 = value;
            Ok(Effect::Reset)
        }
    }

    #[test]
    fn an_access_reaches_the_device_with_its_own_offset() {
        let bus = Arc::new(Bus::default());
        bus.map(0x100..0x108, Arc::new(Mutex::new(Cell(0)))).unwrap();
        let mut view = bus.view();
        assert_eq!(view.write(0x100, Width::B2, 0x1_0040), Effect::Reset);
        assert_eq!(view.read(0x103, Width::B1), 0x43);
    }

    #[test]
    fn a_miss_reads_ones_and_is_counted() {
        let bus = Arc::new(Bus::default());
        bus.map(0x100..0x108, Arc::new(Mutex::new(Cell(0)))).unwrap();
        let mut view = bus.view();
        assert_eq!(view.read(0x108, Width::B2), 0xffff);
        assert_eq!(view.read(0xff, Width::B8), u64::MAX);
        assert_eq!(view.write(0x99, Width::B1, 1), Effect::None);
        assert_eq!(bus.misses(), 3);
    }

    #[test]
    fn regions_never_overlap_and_the_top_of_the_space_works() {
        let bus = Arc::new(Bus::default());
        let cell = || Arc::new(Mutex::new(Cell(0)));
        bus.map(0x100..0x200, cell()).unwrap();
        for at in [0x1ff..0x200, 0x0..0x101, 0x100..0x101, 0x50..0x300] {
            assert!(bus.map(at.clone(), cell()).is_err(), "{at:x?}");
        }
        bus.map(0x200..u64::MAX, cell()).unwrap();
        bus.map(0x0..0x100, cell()).unwrap();
    }

    #[test]
    fn a_view_sees_a_region_move() {
        let bus = Arc::new(Bus::default());
        let mut view = bus.view();
        assert_eq!(view.read(0x10, Width::B1), 0xff);
        bus.map(0x10..0x11, Arc::new(Mutex::new(Cell(7)))).unwrap();
        assert_eq!(view.read(0x10, Width::B1), 7);
        bus.unmap(0x10);
        assert_eq!(view.read(0x10, Width::B1), 0xff);
    }
}
