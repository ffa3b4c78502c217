//! A small AHCI driver, and a disk that can be held and made to fail. The tests use the HBA only as a driver could.

mod cd;
mod disk;
mod hostile;
mod queue;
mod saved;

use std::{
    sync::{Arc, Condvar, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::{
    super::{
        bus::Width,
        disk::{BlockError, DiskShape, RawFile},
        memory::{Gpa, RamSpan},
    },
    *,
};

const DEADLINE: Duration = Duration::from_secs(10);
const DATA: u64 = 0x20_0000;
const CD: u64 = 5;

const GHC: u64 = 0x04;
const IS: u64 = 0x08;
const P_CLB: u64 = 0x00;
const P_FB: u64 = 0x08;
const P_IS: u64 = 0x10;
const P_IE: u64 = 0x14;
const P_CMD: u64 = 0x18;
const P_TFD: u64 = 0x20;
const P_SIG: u64 = 0x24;
const P_SSTS: u64 = 0x28;
const P_SCTL: u64 = 0x2c;
const P_SERR: u64 = 0x30;
const P_SACT: u64 = 0x34;
const P_CI: u64 = 0x38;

/// An HBA with its memory, its line and its disks.
struct Driver {
    hba: Ahci,
    ram: GuestRam,
    line: Arc<(Mutex<bool>, Condvar)>,
    tray: CdTray,
    faults: HostFaults,
    reasons: mpsc::Receiver<String>,
}

/// One ATA command, as a driver fills it in.
#[derive(Default, Clone, Copy)]
struct Ata {
    command: u8,
    features: u8,
    lba: u64,
    device: u8,
    count: u16,
}

/// How a command ended: TFD and the interrupt bits.
#[derive(Debug, PartialEq, Eq)]
struct End {
    status: u8,
    error: u8,
    is: u32,
}

const GOOD_DMA: End = End { status: 0x50, error: 0, is: 1 };
const GOOD_PIO_IN: End = End { status: 0x50, error: 0, is: 2 };

fn failed(error: u8) -> End {
    End { status: 0x51, error, is: 0x4000_0001 }
}

impl Driver {
    /// With these disks and an empty tray, nothing set up.
    fn cold(disks: Vec<Arc<dyn BlockBackend>>) -> Driver {
        Driver::with_ram(GuestRam::new(16 << 20).unwrap(), disks)
    }
    fn with_ram(ram: GuestRam, disks: Vec<Arc<dyn BlockBackend>>) -> Driver {
        let line = Arc::new((Mutex::new(false), Condvar::new()));
        let wire = Arc::clone(&line);
        let irq = IrqLine::new(move |high| {
            *wire.0.lock().unwrap() = high;
            wire.1.notify_all();
        });
        let (tell, reasons) = mpsc::channel();
        let tell = Mutex::new(tell);
        let faults = HostFaults::new(move |reason| drop(tell.lock().unwrap().send(reason)));
        let disks = disks
            .into_iter()
            .enumerate()
            .map(|(number, backend)| AhciDisk { serial: format!("serial-{number}"), backend })
            .collect();
        let tray = CdTray::new();
        let hba = Ahci::new(ram.clone(), irq, disks, tray.clone(), &faults).unwrap();
        Driver { hba, ram, line, tray, faults, reasons }
    }

    /// As `cold`, with the first port and the CD's started.
    fn new(disks: Vec<Arc<dyn BlockBackend>>) -> Driver {
        let mut driver = Driver::cold(disks);
        driver.write(GHC, 0x8000_0002);
        driver.start(0);
        driver.start(CD);
        driver
    }

    fn read(&mut self, at: u64) -> u32 {
        self.hba.bar_read(5, Access::new(at, Width::B4)).unwrap() as u32
    }
    fn write(&mut self, at: u64, value: u32) {
        assert_eq!(self.hba.bar_write(5, Access::new(at, Width::B4), value.into()), Ok(Effect::None));
    }
    fn port(&mut self, port: u64, register: u64) -> u32 {
        self.read(0x100 + port * 0x80 + register)
    }
    fn set(&mut self, port: u64, register: u64, value: u32) {
        self.write(0x100 + port * 0x80 + register, value);
    }

    fn list(port: u64) -> u64 {
        0x1_0000 + port * 0x4000
    }
    fn frames(port: u64) -> u64 {
        Self::list(port) + 0x400
    }
    fn table(port: u64, slot: u64) -> u64 {
        Self::list(port) + 0x1000 + slot * 0x100
    }

    fn start(&mut self, port: u64) {
        self.set(port, P_CLB, Self::list(port) as u32);
        self.set(port, P_FB, Self::frames(port) as u32);
        self.set(port, P_IE, 0xffff_ffff);
        self.set(port, P_CMD, 0x16);
        self.set(port, P_CMD, 0x17);
    }

    /// Stops and starts the port, as after an error.
    fn restart(&mut self, port: u64) {
        self.set(port, P_CMD, 0x16);
        self.until("CR clears", |driver| driver.port(port, P_CMD) & 0x8000 == 0);
        self.set(port, P_IS, 0xffff_ffff);
        self.write(IS, 0xff);
        self.set(port, P_CMD, 0x17);
    }

    /// Fills a slot's header and table.
    fn fill(&mut self, port: u64, slot: u64, ata: Ata, packet: Option<&[u8]>, prdt: &[(u64, u32)]) {
        let lba = ata.lba.to_le_bytes();
        let [low, high] = ata.count.to_le_bytes();
        let fis = [
            0x27,
            0x80,
            ata.command,
            ata.features,
            lba[0],
            lba[1],
            lba[2],
            ata.device,
            lba[3],
            lba[4],
            lba[5],
            0,
            low,
            high,
            0,
            0,
            0,
            0,
            0,
            0,
        ];
        self.fill_raw(port, slot, &fis, packet, prdt);
    }

    fn fill_raw(&mut self, port: u64, slot: u64, fis: &[u8], packet: Option<&[u8]>, prdt: &[(u64, u32)]) {
        let table = Self::table(port, slot);
        let flags = 5 | u32::from(packet.is_some()) << 5 | (prdt.len() as u32) << 16;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&flags.to_le_bytes());
        header[4..8].fill(0xee);
        header[8..12].copy_from_slice(&(table as u32).to_le_bytes());
        self.ram.write(Gpa(Self::list(port) + slot * 32), &header).unwrap();
        self.ram.write(Gpa(table), &[0; 0x80]).unwrap();
        self.ram.write(Gpa(table), fis).unwrap();
        self.ram.write(Gpa(table + 0x40), packet.unwrap_or_default()).unwrap();
        for (number, (at, bytes)) in prdt.iter().enumerate() {
            let mut entry = [0; 16];
            entry[..8].copy_from_slice(&at.to_le_bytes());
            entry[12..].copy_from_slice(&bytes.wrapping_sub(1).to_le_bytes());
            self.ram.write(Gpa(table + 0x80 + number as u64 * 16), &entry).unwrap();
        }
    }

    /// Waits for the line and takes the port's end, as an interrupt handler does.
    fn end(&mut self, port: u64) -> End {
        let line = Arc::clone(&self.line);
        let high = line.0.lock().unwrap();
        let late = line.1.wait_timeout_while(high, DEADLINE, |high| !*high).unwrap().1;
        assert!(!late.timed_out(), "no interrupt came");
        let is = self.port(port, P_IS);
        self.set(port, P_IS, is);
        self.write(IS, 1 << port);
        let tfd = self.port(port, P_TFD);
        End { status: tfd as u8, error: (tfd >> 8) as u8, is }
    }

    /// Does one command of a disk in slot 0; recovers when it failed.
    fn ata(&mut self, port: u64, ata: Ata, prdt: &[(u64, u32)]) -> End {
        self.fill(port, 0, ata, None, prdt);
        self.finish(port)
    }

    /// Does one packet command by DMA, with a buffer of `bytes`.
    fn packet(&mut self, packet: &[u8], bytes: u32) -> End {
        let prdt = [(DATA, bytes)];
        let prdt = if bytes == 0 { &[][..] } else { &prdt };
        self.ram.write(Gpa(DATA), &vec![0xcc; bytes as usize]).unwrap();
        self.fill(CD, 0, Ata { command: 0xa0, features: 1, ..Ata::default() }, Some(packet), prdt);
        self.finish(CD)
    }

    fn finish(&mut self, port: u64) -> End {
        self.set(port, P_CI, 1);
        let end = self.end(port);
        if end.status & 1 != 0 {
            assert_eq!(self.port(port, P_CI), 1, "the failed slot stays");
            self.restart(port);
        }
        assert_eq!(self.port(port, P_CI), 0);
        end
    }

    /// Sense key, code and qualifier.
    fn sense(&mut self) -> (u8, u8, u8) {
        assert_eq!(self.packet(&[3, 0, 0, 0, 18, 0], 18), GOOD_DMA);
        let data = self.data(18);
        (data[2], data[12], data[13])
    }

    fn data(&self, bytes: usize) -> Vec<u8> {
        self.bytes(DATA, bytes)
    }
    fn bytes(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.ram.read(Gpa(at), &mut data).unwrap();
        data
    }
    fn moved(&self, port: u64) -> u32 {
        self.ram.get_u32(Gpa(Self::list(port) + 4)).unwrap()
    }

    fn until(&mut self, what: &str, condition: impl Fn(&mut Driver) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < DEADLINE, "waited too long: {what}");
            thread::yield_now();
        }
    }

    fn reason(&self) -> String {
        self.reasons.recv_timeout(DEADLINE).expect("the device reports the host's fault")
    }
}

/// A disk of zeros, and another handle on its file.
fn raw(bytes: u64) -> (Arc<RawFile>, std::fs::File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    (RawFile::new(file.try_clone().unwrap(), false).unwrap(), file)
}

/// A disk whose every sector begins with its number.
fn numbered(sectors: u64) -> Arc<RawFile> {
    use std::os::unix::fs::FileExt;
    let (disk, file) = raw(sectors * 512);
    for sector in 0..sectors {
        file.write_all_at(&sector.to_le_bytes(), sector * 512).unwrap();
    }
    disk
}

/// A disk that holds reads until they are let go, or refuses them for want of space.
struct Gate {
    disk: Arc<RawFile>,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    shut: bool,
    inside: usize,
    full: bool,
}

impl Gate {
    fn new(disk: Arc<RawFile>) -> Arc<Gate> {
        Arc::new(Gate { disk, state: Mutex::default(), changed: Condvar::new() })
    }
    fn shut(&self) {
        self.state.lock().unwrap().shut = true;
    }
    fn open(&self) {
        self.state.lock().unwrap().shut = false;
        self.changed.notify_all();
    }
    fn set_full(&self, full: bool) {
        self.state.lock().unwrap().full = full;
    }
    /// Waits until a request is held.
    fn held(&self) {
        let state = self.state.lock().unwrap();
        let late = self.changed.wait_timeout_while(state, DEADLINE, |state| state.inside == 0).unwrap().1;
        assert!(!late.timed_out(), "no request came");
    }
    fn pass(&self) -> Result<(), BlockError> {
        let mut state = self.state.lock().unwrap();
        state.inside += 1;
        self.changed.notify_all();
        state = self.changed.wait_timeout_while(state, DEADLINE, |state| state.shut).unwrap().0;
        state.inside -= 1;
        if state.full { Err(BlockError::NoSpace) } else { Ok(()) }
    }
}

impl BlockBackend for Gate {
    fn shape(&self) -> DiskShape {
        self.disk.shape()
    }
    fn read(&self, ram: &GuestRam, at: u64, into: &[RamSpan]) -> Result<(), BlockError> {
        self.pass()?;
        self.disk.read(ram, at, into)
    }
    fn write(&self, ram: &GuestRam, at: u64, from: &[RamSpan]) -> Result<(), BlockError> {
        self.pass()?;
        self.disk.write(ram, at, from)
    }
    fn read_bytes(&self, at: u64, into: &mut [u8]) -> Result<(), BlockError> {
        self.pass()?;
        self.disk.read_bytes(at, into)
    }
    fn write_bytes(&self, at: u64, from: &[u8]) -> Result<(), BlockError> {
        self.pass()?;
        self.disk.write_bytes(at, from)
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.disk.flush()
    }
    fn discard(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        self.disk.discard(at, bytes)
    }
    fn write_zeroes(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        self.pass()?;
        self.disk.write_zeroes(at, bytes)
    }
}
