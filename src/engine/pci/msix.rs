//! MSI-X (PCI Local Bus 3.0, 6.8.2): vectors, masks and pending bits, once for all devices.
//!
//! A worker that signals and a vCPU that reprograms the table meet here without a lock: every field is an atomic.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};

use crate::engine::{
    bus::{Access, BusDevice, BusFault, Effect, Width},
    irq::{MsiMessage, MsiSink},
};

/// Bytes of the BAR that holds table and pending bits.
pub const BAR_BYTES: u32 = 4096;
/// Where the pending bits start in that BAR.
pub const PBA_OFFSET: u32 = 0x800;
const ENTRY_BYTES: u64 = 16;
/// One word of pending bits.
pub const VECTORS_MAX: u16 = 64;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;

/// The vectors of one function.
pub struct Msix {
    vectors: Box<[Vector]>,
    control: AtomicU16,
    pending: AtomicU64,
    sink: Arc<dyn MsiSink>,
}

/// The vectors of a function in a saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vectors {
    table: Vec<VectorState>,
    /// A bit for each vector.
    pending: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct VectorState {
    address: u64,
    data: u32,
    masked: bool,
}

struct Vector {
    address: AtomicU64,
    data: AtomicU32,
    masked: AtomicBool,
}

impl Msix {
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Arc<Msix> {
        assert!(vectors <= VECTORS_MAX, "one word of pending bits");
        let vector = || Vector { address: AtomicU64::new(0), data: AtomicU32::new(0), masked: AtomicBool::new(true) };
        let vectors = (0..vectors).map(|_| vector()).collect();
        Arc::new(Msix { vectors, control: AtomicU16::new(0), pending: AtomicU64::new(0), sink })
    }

    pub fn vectors(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(VECTORS_MAX)
    }

    /// Whether the driver chose MSI-X; INTx is silent then.
    pub fn enabled(&self) -> bool {
        self.control.load(Ordering::Acquire) & CONTROL_ENABLE != 0
    }

    /// Sends a vector's message, or remembers it while masked. Called by any thread; a vector that is not there is ignored.
    pub fn signal(&self, vector: u16) {
        if !self.enabled() || usize::from(vector) >= self.vectors.len() {
            return;
        }
        self.pending.fetch_or(1 << vector, Ordering::AcqRel);
        self.deliver(vector);
    }

    /// The function mask or the enable bit was written.
    pub fn set_control(&self, control: u16) {
        self.control.store(control & (CONTROL_ENABLE | CONTROL_MASK_ALL), Ordering::Release);
        for vector in 0..self.vectors() {
            self.deliver(vector);
        }
    }

    pub fn reset(&self) {
        self.control.store(0, Ordering::Release);
        self.pending.store(0, Ordering::Release);
        for vector in &self.vectors {
            vector.address.store(0, Ordering::Relaxed);
            vector.data.store(0, Ordering::Relaxed);
            vector.masked.store(true, Ordering::Release);
        }
    }

    /// The table and what is pending. The control word is in configuration space.
    pub fn save(&self) -> Vectors {
        let entry = |vector: &Vector| VectorState {
            address: vector.address.load(Ordering::Acquire),
            data: vector.data.load(Ordering::Acquire),
            masked: vector.masked.load(Ordering::Acquire),
        };
        Vectors { table: self.vectors.iter().map(entry).collect(), pending: self.pending.load(Ordering::Acquire) }
    }

    /// As saved, with nothing sent: what is pending was masked. False for the vectors of another function.
    #[must_use]
    pub fn restore(&self, saved: &Vectors, control: u16) -> bool {
        if saved.table.len() != self.vectors.len() {
            return false;
        }
        for (vector, saved) in self.vectors.iter().zip(&saved.table) {
            vector.address.store(saved.address & !3, Ordering::Relaxed);
            vector.data.store(saved.data, Ordering::Relaxed);
            vector.masked.store(saved.masked, Ordering::Release);
        }
        let there = u64::MAX.checked_shr(64 - u32::from(self.vectors())).unwrap_or(0);
        self.pending.store(saved.pending & there, Ordering::Release);
        self.control.store(control & (CONTROL_ENABLE | CONTROL_MASK_ALL), Ordering::Release);
        true
    }

    /// Sends a pending vector if nothing masks it. Taking the pending bit is what decides who sends.
    fn deliver(&self, index: u16) {
        let Some(vector) = self.vectors.get(usize::from(index)) else { return };
        let control = self.control.load(Ordering::Acquire);
        let open = control & CONTROL_ENABLE != 0 && control & CONTROL_MASK_ALL == 0;
        if !open || vector.masked.load(Ordering::Acquire) {
            return;
        }
        let bit = 1 << index;
        if self.pending.fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
            let message = MsiMessage {
                address: vector.address.load(Ordering::Acquire),
                data: vector.data.load(Ordering::Acquire),
            };
            // A message to nowhere is the driver's mistake and changes nothing here.
            let _ = self.sink.send(message);
        }
    }

    fn read_u32(&self, offset: u64) -> u32 {
        if offset >= u64::from(PBA_OFFSET) {
            let pending = self.pending.load(Ordering::Acquire);
            return match offset - u64::from(PBA_OFFSET) {
                0 => pending as u32,
                4 => (pending >> 32) as u32,
                _ => 0,
            };
        }
        let Some(vector) = self.at(offset) else { return 0 };
        match offset % ENTRY_BYTES {
            0 => vector.address.load(Ordering::Acquire) as u32,
            4 => (vector.address.load(Ordering::Acquire) >> 32) as u32,
            8 => vector.data.load(Ordering::Acquire),
            _ => u32::from(vector.masked.load(Ordering::Acquire)),
        }
    }

    fn write_u32(&self, offset: u64, value: u32) {
        if offset >= u64::from(PBA_OFFSET) {
            return;
        }
        let Some(vector) = self.at(offset) else { return };
        let address = vector.address.load(Ordering::Acquire);
        match offset % ENTRY_BYTES {
            0 => vector.address.store(address & !0xffff_ffff | u64::from(value & !3), Ordering::Release),
            4 => vector.address.store(address & 0xffff_ffff | u64::from(value) << 32, Ordering::Release),
            8 => vector.data.store(value, Ordering::Release),
            _ => {
                vector.masked.store(value & 1 != 0, Ordering::Release);
                self.deliver(u16::try_from(offset / ENTRY_BYTES).unwrap_or(u16::MAX));
            }
        }
    }

    fn at(&self, offset: u64) -> Option<&Vector> {
        self.vectors.get(usize::try_from(offset / ENTRY_BYTES).ok()?)
    }
}

/// The table and the pending bits as a region of a BAR. Aligned 4 and 8 byte accesses are defined; others read zero.
pub struct MsixTable(pub Arc<Msix>);

impl BusDevice for MsixTable {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        match at.width {
            Width::B4 if at.offset.is_multiple_of(4) => Ok(u64::from(self.0.read_u32(at.offset))),
            Width::B8 if at.offset.is_multiple_of(8) => {
                let high = u64::from(self.0.read_u32(at.offset + 4));
                Ok(high << 32 | u64::from(self.0.read_u32(at.offset)))
            }
            _ => Err(BusFault::BadWidth),
        }
    }
    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        match at.width {
            Width::B4 if at.offset.is_multiple_of(4) => self.0.write_u32(at.offset, value as u32),
            Width::B8 if at.offset.is_multiple_of(8) => {
                self.0.write_u32(at.offset, value as u32);
                self.0.write_u32(at.offset + 4, (value >> 32) as u32);
            }
            _ => return Err(BusFault::BadWidth),
        }
        Ok(Effect::None)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{io, sync::Mutex};

    use super::*;

    /// Records what was sent.
    #[derive(Default)]
    pub(crate) struct Sent(pub(crate) Mutex<Vec<MsiMessage>>);
    impl MsiSink for Sent {
        fn send(&self, message: MsiMessage) -> io::Result<()> {
            self.0.lock().unwrap().push(message);
            Ok(())
        }
    }

    fn program(table: &mut MsixTable, vector: u64, data: u64) {
        for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, data), (12, 0)] {
            table.write(Access::new(vector * 16 + offset, Width::B4), value).unwrap();
        }
    }

    #[test]
    fn a_masked_vector_is_pending_and_fires_once_on_unmask() {
        let sent = Arc::new(Sent::default());
        let msix = Msix::new(2, Arc::clone(&sent) as Arc<dyn MsiSink>);
        let mut table = MsixTable(Arc::clone(&msix));
        program(&mut table, 1, 0x41);
        msix.signal(1);
        assert!(sent.0.lock().unwrap().is_empty(), "not enabled");
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        msix.signal(1);
        msix.signal(1);
        assert_eq!(table.read(Access::new(0x800, Width::B8)), Ok(2));
        msix.set_control(CONTROL_ENABLE);
        table.write(Access::new(16 + 12, Width::B4), 1).unwrap();
        msix.signal(1);
        table.write(Access::new(16 + 12, Width::B4), 0).unwrap();
        let message = MsiMessage { address: 0xfee0_0000, data: 0x41 };
        assert_eq!(*sent.0.lock().unwrap(), [message, message]);
        assert_eq!(table.read(Access::new(0x800, Width::B8)), Ok(0));
    }

    #[test]
    fn accesses_outside_the_table_do_nothing() {
        let msix = Msix::new(1, Arc::new(Sent::default()));
        let mut table = MsixTable(Arc::clone(&msix));
        msix.signal(7);
        assert_eq!(table.write(Access::new(0x7f0, Width::B4), 1), Ok(Effect::None));
        assert_eq!(table.read(Access::new(0x7f0, Width::B4)), Ok(0));
        assert_eq!(table.read(Access::new(0xff8, Width::B8)), Ok(0));
        assert_eq!(table.read(Access::new(1, Width::B4)), Err(BusFault::BadWidth));
    }
}
