//! NVMe: a controller with one namespace for one disk (NVM Express 1.4, NVM command set).
//!
//! ```text
//! BAR 0, 16 KiB:  0000 registers   1000 doorbells, 4 bytes each: tail of SQ 0, head of CQ 0, tail of SQ 1, …     BAR 4  MSI-X
//!
//! vCPU:    write a doorbell ──▶ one atomic ──▶ wake the worker, only if it sleeps
//! worker:  fetch a command ──▶ do it ──▶ completion entry ──▶ MSI-X or pin
//! ```
//!
//! A doorbell is not an ioeventfd: what is written is the new tail or head, and an ioeventfd tells only that something was.
//! So a submission leaves the kernel, but it meets no lock that the worker holds, and a worker that is busy costs it one store.
//!
//! The worker owns the queues, the features and the logs, from CC.EN to the reset of the controller; the registers are the
//! vCPUs'. `registers.rs` is what a driver writes, `doorbells.rs` and `interrupts.rs` what both sides share, `worker.rs` the
//! thread, `session.rs` the queues of one enabled controller, `admin.rs`, `features.rs`, `logs.rs`, `identify.rs` and `io.rs` the
//! commands, `prp.rs` where their data is, `saved.rs` what is kept of a suspended controller.

mod admin;
mod command;
mod doorbells;
mod events;
mod features;
mod identify;
mod interrupts;
mod io;
mod logs;
mod prp;
mod queue;
mod registers;
mod saved;
mod session;
#[cfg(test)]
mod tests;
mod worker;

use std::{
    io::Result as IoResult,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use self::{
    doorbells::Doorbells,
    identify::Identity,
    interrupts::Interrupts,
    registers::{Registers, Wish},
    session::Session,
    worker::Commands,
};
use super::{
    bus::{Access, BusFault, Effect},
    disk::BlockBackend,
    fault::FaultReport,
    memory::GuestRam,
    pci::{BarKind, BarSpec, PciFunction, PciIdentity, root::Wiring},
    worker::Worker,
};

/// Pairs of I/O queues; a promise of the machine version. With one thread behind them more would only spread interrupts.
const IO_QUEUES: u16 = 8;
/// With the pair of admin queues.
const QUEUES: usize = IO_QUEUES as usize + 1;
/// MSI-X vectors of a controller: one for each completion queue.
pub const VECTORS: u16 = QUEUES as u16;
/// The unit of CC.MPS 0, the only one: guests here have pages of 4 KiB.
const PAGE_BYTES: u32 = 4096;

const REGISTER_BAR: u8 = 0;
const MSIX_BAR: u8 = 4;
const BARS: [BarSpec; 1] = [BarSpec { index: REGISTER_BAR, size_bytes: 16 << 10, kind: BarKind::Registers64 }];
/// QEMU's NVMe controller, which every system knows. Linux then ignores the namespace's identifiers and names the disk by its
/// serial number.
const VENDOR: u16 = 0x1b36;
const SUBSYSTEM_VENDOR: u16 = 0x1af4;

/// The disk behind a controller.
pub struct NvmeDisk {
    /// Printable ASCII; 20 characters are shown to the guest. The namespace's UUID comes from all of it.
    pub serial: String,
    pub backend: Arc<dyn BlockBackend>,
}

/// Stops and continues a controller's I/O. Clones are the same one.
#[derive(Clone)]
pub struct NvmeIo(Worker<Session>);

impl NvmeIo {
    /// Returns when no I/O is in flight.
    pub fn hold(&self) {
        self.0.hold();
    }
    /// I/O goes on; a request that met a host fault is tried again.
    pub fn release(&self) {
        self.0.release();
    }
    /// The controller goes away: its thread has ended and its disk is closed when this returns.
    pub fn end(&self) {
        self.0.end();
    }
}

/// What the vCPUs and the worker share.
struct Shared {
    doorbells: Doorbells,
    interrupts: Interrupts,
    /// CSTS.CFS: the controller cannot go on without a reset.
    fatal: AtomicBool,
    /// CSTS.SHST; the worker does what `SHUTDOWN_ASKED` asks for.
    shutdown: AtomicU8,
    /// CC.IOSQES and CC.IOCQES are what this controller takes.
    entry_sizes_fit: AtomicBool,
}

const SHUTDOWN_NONE: u8 = 0;
const SHUTDOWN_ASKED: u8 = 1;
const SHUTDOWN_DONE: u8 = 2;

impl Shared {
    fn shutdown_asked(&self) -> bool {
        self.shutdown.load(Ordering::Acquire) == SHUTDOWN_ASKED
    }
}

/// An NVMe controller as PCI function. Its thread is parked while CC.EN is 0.
pub struct Nvme {
    registers: Registers,
    shared: Arc<Shared>,
    worker: Worker<Session>,
    ram: GuestRam,
}

impl Nvme {
    /// A controller with its thread started and parked. Call before any vCPU runs. `report` is called on that thread.
    ///
    /// Errors: the thread or its wake-up cannot be made.
    pub fn new(ram: GuestRam, wiring: &Wiring, disk: NvmeDisk, report: FaultReport) -> IoResult<Nvme> {
        let shared = Arc::new(Shared {
            doorbells: Doorbells::new()?,
            interrupts: Interrupts::new(Arc::clone(&wiring.msix), wiring.irq.clone()),
            fatal: AtomicBool::new(false),
            shutdown: AtomicU8::new(SHUTDOWN_NONE),
            entry_sizes_fit: AtomicBool::new(false),
        });
        let identity = Identity::new(&disk.serial, disk.backend.shape());
        let worker = Worker::spawn("nvme", Commands::new(disk.backend, identity, report))?;
        Ok(Nvme { registers: Registers::default(), shared, worker, ram })
    }

    /// For the machine, which pauses.
    pub fn io(&self) -> NvmeIo {
        NvmeIo(self.worker.clone())
    }

    /// CC.EN was set: checks the admin queues and lets the worker run, or says that the controller cannot (7.6.1).
    fn enable(&mut self) {
        self.shared.shutdown.store(SHUTDOWN_NONE, Ordering::Release);
        match Session::new(&self.ram, &self.shared, self.registers.admin_queues()) {
            Some(session) => {
                self.registers.set_ready(true);
                self.worker.activate(session);
            }
            None => self.shared.fatal.store(true, Ordering::Release),
        }
    }

    /// A controller reset (7.3.2). Returns when no command is in flight and guest RAM is not touched any more.
    fn disable(&mut self) {
        self.worker.reset();
        self.registers.set_ready(false);
        self.shared.doorbells.reset();
        self.shared.interrupts.reset();
        self.shared.fatal.store(false, Ordering::Release);
        self.shared.shutdown.store(SHUTDOWN_NONE, Ordering::Release);
    }

    /// CC.SHN was set (7.6.2). A controller that is not at work has nothing to finish.
    fn shut_down(&self) {
        let works = self.registers.ready() && !self.shared.fatal.load(Ordering::Acquire);
        let (next, wake) = if works { (SHUTDOWN_ASKED, true) } else { (SHUTDOWN_DONE, false) };
        let first = self.shared.shutdown.compare_exchange(SHUTDOWN_NONE, next, Ordering::AcqRel, Ordering::Acquire);
        if first.is_ok() && wake {
            self.shared.doorbells.wake();
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            registers::INTMS => self.shared.interrupts.mask(value),
            registers::INTMC => self.shared.interrupts.unmask(value),
            registers::DOORBELLS.. => {
                if self.registers.ready() {
                    self.ring(((offset - registers::DOORBELLS) / 4) as usize, value);
                }
            }
            _ => {
                let wish = self.registers.write(offset, value);
                self.shared.entry_sizes_fit.store(self.registers.entry_sizes_fit(), Ordering::Release);
                match wish {
                    Wish::Nothing => {}
                    Wish::Enable => self.enable(),
                    Wish::Disable => self.disable(),
                    Wish::ShutDown => self.shut_down(),
                }
            }
        }
    }

    fn ring(&self, index: usize, value: u32) {
        let (queue, completion) = (index / 2, index % 2 == 1);
        if !completion {
            self.shared.doorbells.ring_tail(queue, value);
        } else if self.shared.doorbells.ring_head(queue, value) {
            self.shared.interrupts.consumed(queue, value);
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            registers::INTMS | registers::INTMC => self.shared.interrupts.masked(),
            registers::CSTS => {
                u32::from(self.registers.ready())
                    | u32::from(self.shared.fatal.load(Ordering::Acquire)) << 1
                    | u32::from(self.shared.shutdown.load(Ordering::Acquire)) << 2
            }
            _ => self.registers.read(offset),
        }
    }
}

impl PciFunction for Nvme {
    fn identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: VENDOR,
            device: 0x0010,
            class: 0x01_0802,
            revision: 2,
            subsystem_vendor: SUBSYSTEM_VENDOR,
            subsystem: 0x1100,
            interrupt_pin: 1,
        }
    }

    fn bars(&self) -> &[BarSpec] {
        &BARS
    }

    /// The registers take BAR 0 and, being 64-bit, BAR 1.
    fn msix_bar(&self) -> u8 {
        MSIX_BAR
    }

    fn bar_read(&mut self, _: u8, at: Access) -> Result<u64, BusFault> {
        let low = u64::from(self.read_register(at.offset));
        match pieces(at)? {
            1 => Ok(low),
            _ => Ok(u64::from(self.read_register(at.offset + 4)) << 32 | low),
        }
    }

    fn bar_write(&mut self, _: u8, at: Access, value: u64) -> Result<Effect, BusFault> {
        let pieces = pieces(at)?;
        self.write_register(at.offset, value as u32);
        if pieces == 2 {
            self.write_register(at.offset + 4, (value >> 32) as u32);
        }
        Ok(Effect::None)
    }

    fn reset(&mut self) {
        self.disable();
        self.registers = Registers::default();
        self.shared.entry_sizes_fit.store(false, Ordering::Release);
    }
}

/// How many registers an access touches. Other accesses than aligned ones of 4 or 8 bytes are not defined (3.1).
fn pieces(at: Access) -> Result<usize, BusFault> {
    match at.width.bytes() {
        bytes @ (4 | 8) if at.offset.is_multiple_of(bytes as u64) => Ok(bytes / 4),
        _ => Err(BusFault::BadWidth),
    }
}
