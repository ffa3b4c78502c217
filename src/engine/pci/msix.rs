//! MSI-X (PCI Local Bus 3.0, 6.8.2): vectors, masks and pending bits, once for all devices.
//!
//! A worker that signals and a vCPU that reprograms the table meet here without a lock: every field is an atomic. The lock is of
//! vectors that KVM sends itself, which whoever reprograms the table cuts first.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};

use crate::engine::{
    bus::{Access, BusDevice, BusFault, Effect, Width},
    event::Event,
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
    connected: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    now: Vec<Connected>,
}

/// A vector whose message is sent when `event` is signalled.
struct Connected {
    id: u64,
    vector: u16,
    /// The sink's.
    number: u32,
    event: Event,
    cut: Event,
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
        let (control, pending, connected) = (AtomicU16::new(0), AtomicU64::new(0), Mutex::default());
        Arc::new(Msix { vectors, control, pending, sink, connected })
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

    /// Has a vector's message sent whenever `event` is signalled, without us, until `disconnect` with what this returns, or until
    /// anything of the vector changes, which `cut` tells. `None` where that cannot be: while it is masked, say.
    pub fn connect(&self, vector: u16, event: &Event, cut: &Event) -> Option<u64> {
        let mut connected = self.connected();
        let message = self.message(vector)?;
        let (event, cut) = (event.try_clone().ok()?, cut.try_clone().ok()?);
        let number = self.sink.connect(&event, message).ok()?;
        let id = connected.next;
        connected.next += 1;
        connected.now.push(Connected { id, vector, number, event, cut });
        Some(id)
    }

    /// Ends this. What was signalled and not sent is still to be read from the event.
    pub fn disconnect(&self, id: u64) {
        drop(self.cut(|connected| connected.id == id));
    }

    /// A queue no longer has this vector.
    pub fn let_go(&self, vector: u16) {
        drop(self.cut(|connected| connected.vector == vector));
    }

    /// These are sent by `signal` only, and nothing else is connected while the result is held.
    fn cut(&self, which: impl Fn(&Connected) -> bool) -> MutexGuard<'_, Connections> {
        let mut connected = self.connected();
        for Connected { number, event, cut, .. } in connected.now.extract_if(.., |connected| which(connected)) {
            self.sink.disconnect(&event, number);
            cut.signal();
        }
        connected
    }

    fn connected(&self) -> MutexGuard<'_, Connections> {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The function mask or the enable bit was written.
    pub fn set_control(&self, control: u16) {
        let _cut = self.cut(|_| true);
        self.control.store(control & (CONTROL_ENABLE | CONTROL_MASK_ALL), Ordering::Release);
        for vector in 0..self.vectors() {
            self.deliver(vector);
        }
    }

    pub fn reset(&self) {
        let _cut = self.cut(|_| true);
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
        let _cut = self.cut(|_| true);
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
        let Some(message) = self.message(index) else { return };
        let bit = 1 << index;
        if self.pending.fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
            // A message to nowhere is the driver's mistake and changes nothing here.
            let _ = self.sink.send(message);
        }
    }

    /// What is sent for a vector, unless something masks it.
    fn message(&self, index: u16) -> Option<MsiMessage> {
        let vector = self.vectors.get(usize::from(index))?;
        let control = self.control.load(Ordering::Acquire);
        let open = control & CONTROL_ENABLE != 0 && control & CONTROL_MASK_ALL == 0;
        if !open || vector.masked.load(Ordering::Acquire) {
            return None;
        }
        Some(MsiMessage { address: vector.address.load(Ordering::Acquire), data: vector.data.load(Ordering::Acquire) })
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
        let index = u16::try_from(offset / ENTRY_BYTES).unwrap_or(u16::MAX);
        let _cut = self.cut(|connected| connected.vector == index);
        let address = vector.address.load(Ordering::Acquire);
        match offset % ENTRY_BYTES {
            0 => vector.address.store(address & !0xffff_ffff | u64::from(value & !3), Ordering::Release),
            4 => vector.address.store(address & 0xffff_ffff | u64::from(value) << 32, Ordering::Release),
            8 => vector.data.store(value, Ordering::Release),
            _ => {
                vector.masked.store(value & 1 != 0, Ordering::Release);
                self.deliver(index);
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

    /// A sink that connects, and says what it was asked.
    #[derive(Default)]
    struct Connector(Mutex<Vec<(u32, Option<u32>)>>);
    impl MsiSink for Connector {
        fn send(&self, _: MsiMessage) -> io::Result<()> {
            Ok(())
        }
        fn connect(&self, _: &Event, message: MsiMessage) -> io::Result<u32> {
            let mut said = self.0.lock().unwrap();
            said.push((message.data, Some(message.data)));
            Ok(100 + message.data)
        }
        fn disconnect(&self, _: &Event, number: u32) {
            self.0.lock().unwrap().push((number - 100, None));
        }
    }

    #[test]
    fn a_connected_vector_is_cut_before_anything_of_it_changes() {
        let sink = Arc::new(Connector::default());
        let msix = Msix::new(3, Arc::clone(&sink) as Arc<dyn MsiSink>);
        let mut table = MsixTable(Arc::clone(&msix));
        let said = || std::mem::take(&mut *sink.0.lock().unwrap());
        let (event, cut) = (Event::new().unwrap(), Event::new().unwrap());
        for vector in 0..3 {
            program(&mut table, vector, 0x41 + vector);
        }
        assert_eq!(msix.connect(1, &event, &cut), None, "not enabled");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(msix.connect(3, &event, &cut), None, "there is none");
        let changes: [&dyn Fn(&mut MsixTable); 4] = [
            &|table| assert_eq!(table.write(Access::new(16 + 12, Width::B4), 1), Ok(Effect::None)),
            &|table| assert_eq!(table.write(Access::new(16 + 8, Width::B4), 0x42), Ok(Effect::None)),
            &|table| table.0.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL),
            &|table| table.0.let_go(1),
        ];
        for change in changes {
            msix.set_control(CONTROL_ENABLE);
            table.write(Access::new(16 + 12, Width::B4), 0).unwrap();
            let id = msix.connect(1, &event, &cut).unwrap();
            assert!(!cut.clear());
            // Another vector's mask is nothing to this one.
            table.write(Access::new(32 + 12, Width::B4), 1).unwrap();
            assert_eq!(said(), [(0x42, Some(0x42))]);
            change(&mut table);
            assert!(cut.clear());
            assert_eq!(said(), [(0x42, None)]);
            msix.disconnect(id);
            assert_eq!((said(), cut.clear()), (vec![], false), "it is over");
        }
        // Of two that share a vector, one that ends leaves the other.
        let [first, second] = [0, 1].map(|_| msix.connect(0, &event, &cut).unwrap());
        said();
        msix.disconnect(first);
        assert_eq!(said(), [(0x41, None)]);
        msix.reset();
        assert_eq!(said(), [(0x41, None)]);
        msix.disconnect(second);
        assert_eq!(said(), []);
        assert_eq!(msix.connect(0, &event, &cut), None, "masked after a reset");
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
