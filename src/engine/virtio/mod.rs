//! virtio devices (virtio 1.2). The transport in `pci.rs` owns negotiation; a device is a kind, features, a configuration and
//! a worker. `rng.rs` is the one-screen example to copy.

pub mod balloon;
pub mod block;
pub mod console;
pub mod gpu;
pub mod input;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod vsock;

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering},
};

use self::queue::VirtQueue;
use super::{event::Event, irq::IrqLine, memory::GuestRam, pci::msix::Msix, saved::SaveState, worker};

/// Feature bits; `virtio-bindings` has their numbers.
pub type Features = u64;

/// Bits of every device here (virtio 1.2, section 6): modern, event index, indirect descriptors.
pub const COMMON_FEATURES: Features = 1 << 32 | 1 << 29 | 1 << 28;

/// Device types (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Network = 1,
    Block = 2,
    Console = 3,
    Entropy = 4,
    Balloon = 5,
    Gpu = 16,
    Input = 18,
    Socket = 19,
}

/// The thread of a virtio device.
pub type Worker = worker::Worker<Running>;

/// A device's behaviour. The transport calls it with the device's lock held.
/// It saves and restores what it keeps itself; the transport does so with registers and queues.
pub trait VirtioDevice: SaveState + Send {
    fn kind(&self) -> Kind;
    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// What the device offers beside `COMMON_FEATURES`.
    fn offered(&self) -> Features;
    /// Fills `into` from the device's configuration at `offset`; bytes it has not are left zero.
    fn read_config(&self, offset: usize, into: &mut [u8]);
    fn write_config(&mut self, _offset: usize, _bytes: &[u8]) {}
    /// Its threads, which serve the queues while the driver runs.
    fn workers(&self) -> &[Worker];
    /// Which of them serves `queue`, for a driver that accepted these features. One that gets no queue stays parked.
    fn worker_of(&self, _queue: usize, _accepted: Features) -> usize {
        0
    }
}

/// Everything a worker needs while the driver runs: moved in at DRIVER_OK, dropped at reset. The queues are the validated
/// ones of that moment, whatever the driver writes into the transport afterwards.
pub struct Running {
    pub ram: GuestRam,
    pub queues: Vec<VirtQueue>,
    pub interrupts: Arc<Interrupts>,
    pub features: Features,
}

impl worker::Session for Running {
    fn set_broken(&self) {
        self.interrupts.set_needs_reset();
    }
}

impl Running {
    pub fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }
}

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// No vector (virtio 1.2, 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Of [`Interrupts`], in a saved state.
mod saved {
    #[derive(serde::Serialize, serde::Deserialize)]
    pub(super) struct InterruptsV1 {
        pub config_vector: u16,
        pub queue_vectors: Vec<u16>,
        pub isr: u8,
        pub needs_reset: bool,
    }
}

/// How a device interrupts its driver: MSI-X when that is enabled, INTx with the ISR byte otherwise.
pub struct Interrupts {
    msix: Arc<Msix>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    /// ISR status and the pin change together.
    isr: Mutex<u8>,
    line: IrqLine,
    needs_reset: AtomicBool,
    /// Counts changes of the configuration (virtio 1.2, 4.1.4.3), by the device and by what the driver writes there.
    generation: AtomicU8,
}

impl Interrupts {
    pub fn new(msix: Arc<Msix>, line: IrqLine, queues: usize) -> Arc<Interrupts> {
        Arc::new(Interrupts {
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: Mutex::new(0),
            line,
            needs_reset: AtomicBool::new(false),
            generation: AtomicU8::new(0),
        })
    }

    /// Buffers of queue `index` were used.
    pub fn used(&self, index: usize) {
        let vector = self.queue_vectors.get(index).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire));
        self.raise(vector, ISR_QUEUE);
    }

    /// Has `event` interrupt for queue `index` whenever it is signalled, as [`Msix::connect`] does.
    pub fn connect(&self, index: usize, event: &Event, cut: &Event) -> Option<u64> {
        let own = self.queue_vectors.get(index)?;
        let vector = own.load(Ordering::Acquire);
        let id = self.msix.connect(vector, event, cut)?;
        // The driver may have chosen another one meanwhile, before there was anything to cut.
        if own.load(Ordering::Acquire) != vector {
            self.msix.disconnect(id);
            return None;
        }
        Some(id)
    }

    pub fn disconnect(&self, id: u64) {
        self.msix.disconnect(id);
    }

    fn set_queue_vector(&self, index: usize, vector: u16) {
        if let Some(own) = self.queue_vectors.get(index) {
            self.msix.let_go(own.swap(vector, Ordering::AcqRel));
        }
    }

    /// The configuration or the status has changed: a driver that reads it meanwhile reads it again (virtio 1.2, 2.5.3).
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(self.config_vector.load(Ordering::Acquire), ISR_CONFIG);
    }

    /// The driver broke the rules: nothing more is served until it resets the device (virtio 1.2, 2.1.2).
    pub fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.config_changed();
    }

    fn raise(&self, vector: u16, isr_bit: u8) {
        if self.msix.enabled() {
            return self.msix.signal(vector);
        }
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        *isr |= isr_bit;
        self.line.set(true);
    }

    /// Reading the ISR status clears it and lowers the pin (virtio 1.2, 4.1.4.5).
    fn take_isr(&self) -> u8 {
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        self.line.set(false);
        std::mem::take(&mut isr)
    }

    /// The vectors, the ISR byte and whether the driver must reset the device.
    fn save(&self) -> saved::InterruptsV1 {
        saved::InterruptsV1 {
            config_vector: self.config_vector.load(Ordering::Acquire),
            queue_vectors: self.queue_vectors.iter().map(|vector| vector.load(Ordering::Acquire)).collect(),
            isr: *self.isr.lock().unwrap_or_else(PoisonError::into_inner),
            needs_reset: self.needs_reset.load(Ordering::Acquire),
        }
    }

    /// Vectors are checked by the caller.
    fn restore(&self, saved: &saved::InterruptsV1) {
        self.config_vector.store(saved.config_vector, Ordering::Release);
        for (vector, saved) in self.queue_vectors.iter().zip(&saved.queue_vectors) {
            vector.store(*saved, Ordering::Release);
        }
        self.needs_reset.store(saved.needs_reset, Ordering::Release);
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        *isr = saved.isr & (ISR_QUEUE | ISR_CONFIG);
        self.line.set(*isr != 0);
    }

    fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.needs_reset.store(false, Ordering::Release);
        self.take_isr();
    }
}

#[cfg(test)]
pub(crate) mod testing;
