//! AHCI: a SATA host bus adapter with disks and a CD drive (AHCI 1.3.1).
//!
//! It says that it is Intel's ICH9 (8086:2922), which every firmware and system drives. Disks are on ports 0 to 4, the CD
//! drive always on port 5. Commands are done one after another by one thread, and so are queued ones (native command queuing, 32 on a
//! port): each tag ends with a Set Device Bits FIS of its own.
//!
//! `hba.rs` and `port.rs` are the registers, `worker.rs` is the thread, `fis.rs` the structures in guest memory, `ata.rs`, `queue.rs`
//! and `identify.rs` the disk, `atapi.rs`, `mmc.rs` and `tray.rs` the CD drive, `saved.rs` what is kept of all of it.

mod ata;
mod atapi;
mod fis;
mod hba;
mod identify;
mod mmc;
mod port;
mod queue;
mod saved;
mod tray;
mod worker;

#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

pub use tray::CdTray;

use super::{
    bus::{Access, BusFault, Effect},
    disk::BlockBackend,
    fault::HostFaults,
    irq::IrqLine,
    memory::GuestRam,
    pci::{BarKind, BarSpec, PciFunction, PciIdentity},
};
use hba::{Hba, PORTS, REGISTER_BYTES};
use port::Plugged;
use worker::{Drive, Shared};

/// How many disks there may be; the last port is the CD drive's.
pub const DISKS_MAX: usize = PORTS - 1;

const ABAR: u8 = 5;
const BARS: [BarSpec; 1] = [BarSpec { index: ABAR, size_bytes: REGISTER_BYTES as u32, kind: BarKind::Registers }];
const CD_SERIAL: &str = "CD5";

/// A disk on the HBA. Its number is its port.
pub struct AhciDisk {
    /// Printable ASCII; 20 characters are shown to the guest.
    pub serial: String,
    pub backend: Arc<dyn BlockBackend>,
}

/// The HBA as PCI function. Its thread lives as long as it.
pub struct Ahci {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

/// Stops and continues the HBA's I/O. Clones are the same one.
#[derive(Clone)]
pub struct AhciIo(Arc<Shared>);

impl AhciIo {
    /// Returns when no I/O is in flight, and no guest memory is written until `resume`. A request that waits for the host
    /// goes on waiting. Called by the control thread, with the vCPUs stopped.
    pub fn quiesce(&self) {
        self.0.quiesce();
    }
    pub fn resume(&self) {
        self.0.resume();
    }
}

impl Ahci {
    /// An HBA with its thread started and parked. Call before any vCPU runs.
    ///
    /// Errors: more than [`DISKS_MAX`] disks (`InvalidInput`), or the thread cannot be made.
    pub fn new(
        ram: GuestRam,
        irq: IrqLine,
        disks: Vec<AhciDisk>,
        tray: CdTray,
        faults: &HostFaults,
    ) -> io::Result<Ahci> {
        if disks.len() > DISKS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("AHCI takes {DISKS_MAX} disks at most")));
        }
        tray.power_on();
        let mut plugged = [Plugged::Nothing; PORTS];
        plugged[..disks.len()].fill(Plugged::Disk);
        plugged[DISKS_MAX] = Plugged::Cd;
        let mut drives = [const { None }; PORTS];
        for (place, disk) in drives.iter_mut().zip(disks) {
            *place = Some(Mutex::new(Drive::Disk(ata::Disk::new(disk.serial, disk.backend))));
        }
        drives[DISKS_MAX] = Some(Mutex::new(Drive::Cd(atapi::CdDrive::new(CD_SERIAL.into(), tray))));

        let shared = Arc::new(Shared::new(Hba::new(ram.clone(), irq, plugged), drives, faults.scope()));
        let worker = worker::spawn(Arc::clone(&shared), ram)?;
        Ok(Ahci { shared, worker })
    }

    /// For the machine, which pauses.
    pub fn io(&self) -> AhciIo {
        AhciIo(Arc::clone(&self.shared))
    }
}

impl PciFunction for Ahci {
    fn identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x8086,
            device: 0x2922,
            class: 0x01_0601,
            revision: 2,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            interrupt_pin: 1,
        }
    }

    fn bars(&self) -> &[BarSpec] {
        &BARS
    }

    fn bar_read(&mut self, bar: u8, at: Access) -> Result<u64, BusFault> {
        if bar != ABAR || at.offset >= REGISTER_BYTES {
            return Err(BusFault::NoRegister);
        }
        Ok(self.shared.hba().read(at.offset, at.width))
    }

    fn bar_write(&mut self, bar: u8, at: Access, value: u64) -> Result<Effect, BusFault> {
        if bar != ABAR || at.offset >= REGISTER_BYTES {
            return Err(BusFault::NoRegister);
        }
        self.shared.write(at.offset, at.width, value);
        Ok(Effect::None)
    }

    /// Waits for the running command, whose result is dropped; nothing reaches guest memory after this.
    fn reset(&mut self) {
        self.shared.reset();
    }
}

impl Drop for Ahci {
    fn drop(&mut self) {
        self.shared.end();
        if let Some(worker) = self.worker.take() {
            // A panic of the worker has been reported by its own thread.
            let _ = worker.join();
        }
    }
}
