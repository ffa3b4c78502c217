//! The display device: a standard VGA with the Bochs display interface, as PCI function 1234:1111.
//!
//! One [`Vga`] is behind four doors: ports 0x3b4 to 0x3df, ports 0x1ce to 0x1d0, the window at 0xa0000 and the PCI function with
//! video memory (BAR0, mapped by KVM) and registers (BAR2). It has no interrupt and no thread, and draws nothing by itself:
//! `screen.rs` asks for a picture when somebody looks.

mod crtc;
mod dispi;
pub(crate) mod edid;
mod font;
mod planes;
mod registers;
mod render;
mod saved;
mod text;
mod text_mode;
mod window;

use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    bus::{Access, BusDevice, BusFault, Effect, SharedDevice, Width},
    layout,
    memory::HostRegion,
    pci::{BarKind, BarSpec, PciFunction, PciIdentity},
};
pub(crate) use planes::Planes;
use registers::Ports;
pub(crate) use registers::Registers;
pub(crate) use render::ScanOut;
pub(crate) use text::Blink;
pub use text_mode::{TEXT_SCREEN, TextScreen};

/// The size of video memory and of BAR0.
pub const VRAM_BYTES: usize = 16 << 20;

const PAGE_BYTES: usize = 4096;
const PAGES: usize = VRAM_BYTES / PAGE_BYTES;

/// The device's state. Locked for one access at a time; nothing slow happens under the lock.
pub struct Vga {
    registers: Registers,
    ports: Ports,
    dispi_index: u16,
    /// The four bytes that the last read of the window saw.
    latches: u32,
    vram: HostRegion,
    /// Written through the window since the screen last looked. Writes through BAR0 are in KVM's log instead.
    dirty: DirtyPages,
}

/// The device, as its doors and the screen share it.
pub type SharedVga = Arc<Mutex<Vga>>;

/// Which pages of video memory were written: one bit for 4 KiB.
#[derive(Clone, PartialEq, Eq)]
pub struct DirtyPages([u64; PAGES / 64]);

impl DirtyPages {
    pub const NONE: DirtyPages = DirtyPages([0; PAGES / 64]);

    pub fn any(&self) -> bool {
        self.0.iter().any(|word| *word != 0)
    }

    /// Adds a bitmap as KVM gives it, first page in bit 0 of the first word. What lies past the end is dropped.
    pub fn merge(&mut self, bitmap: &[u64]) {
        for (mine, other) in self.0.iter_mut().zip(bitmap) {
            *mine |= other;
        }
    }

    /// Marks the pages of `bytes` bytes from `at`.
    pub fn mark(&mut self, at: usize, bytes: usize) {
        for page in pages(at, bytes) {
            if let Some(word) = self.0.get_mut(page / 64) {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// Whether a page of `bytes` bytes from `at` was written.
    pub fn touches(&self, at: usize, bytes: usize) -> bool {
        pages(at, bytes).any(|page| self.0.get(page / 64).is_some_and(|word| word >> (page % 64) & 1 != 0))
    }
}

fn pages(at: usize, bytes: usize) -> Range<usize> {
    let end = at.saturating_add(bytes).div_ceil(PAGE_BYTES).min(PAGES);
    at / PAGE_BYTES..if bytes == 0 { 0 } else { end }
}

impl Vga {
    /// A device as after power on: blank.
    ///
    /// Errors: the host has no memory for video memory.
    pub fn new() -> io::Result<SharedVga> {
        Ok(Arc::new(Mutex::new(Vga {
            registers: Registers::default(),
            ports: Ports::default(),
            dispi_index: 0,
            latches: 0,
            vram: HostRegion::new(VRAM_BYTES)?,
            dirty: DirtyPages::NONE,
        })))
    }

    /// Video memory, for KVM to map at BAR0 with its dirty log on.
    pub fn vram(&self) -> HostRegion {
        self.vram.clone()
    }

    /// 80 columns and 25 lines with a font and a palette, as a BIOS would leave them: for guests that start without one.
    pub fn start_in_text_mode(&mut self) {
        self.registers = text_mode::registers();
        self.vram_changed(text_mode::fill(&self.vram));
    }

    /// Back to power on. Video memory keeps its content; the screen is blank until a mode is set.
    pub fn reset(&mut self) {
        self.registers = Registers::default();
        self.ports = Ports::default();
        self.dispi_index = 0;
        self.latches = 0;
    }

    /// What a picture is made of, and which pages the window wrote since the last call.
    pub(crate) fn take_for_screen(&mut self) -> (Registers, DirtyPages) {
        (self.registers.clone(), std::mem::replace(&mut self.dirty, DirtyPages::NONE))
    }

    /// What a picture is made of.
    pub(crate) fn registers(&self) -> Registers {
        self.registers.clone()
    }

    fn vram_changed(&mut self, bytes: usize) {
        self.dirty.mark(0, bytes);
    }

    fn read_port(&mut self, port: u16) -> u8 {
        self.ports.read(&self.registers, port)
    }

    fn write_port(&mut self, port: u16, value: u8) {
        self.ports.write(&mut self.registers, port, value);
    }

    fn read_dispi(&self, index: u16) -> u16 {
        self.registers.dispi.read(index, self.vram.bytes())
    }

    fn write_dispi(&mut self, index: u16, value: u16) {
        let clear = self.registers.dispi.write(index, value).min(self.vram.bytes());
        // Only pages that hold something are written: the others would cost the host memory.
        let mut page = [0; PAGE_BYTES];
        for at in (0..clear).step_by(PAGE_BYTES) {
            let page = &mut page[..(clear - at).min(PAGE_BYTES)];
            self.vram.read(at, page);
            let zeroes = &[0; PAGE_BYTES][..page.len()];
            if page != zeroes {
                self.vram.write(at, zeroes);
                self.dirty.mark(at, page.len());
            }
        }
    }

    fn read_window(&mut self, offset: usize) -> u8 {
        window::read(&self.registers, &mut self.latches, &self.vram, offset)
    }

    fn write_window(&mut self, offset: usize, value: u8) {
        if let Some((at, bytes)) = window::write(&self.registers, self.latches, &self.vram, offset, value) {
            self.dirty.mark(at, bytes);
        }
    }
}

/// What the machine puts on the port bus.
pub fn ports(vga: &SharedVga) -> [(Range<u64>, SharedDevice); 3] {
    let door = |at: Range<u64>| -> (Range<u64>, SharedDevice) {
        let device = VgaPorts { vga: Arc::clone(vga), first: at.start as u16 };
        (at, Arc::new(Mutex::new(device)))
    };
    let dispi: SharedDevice = Arc::new(Mutex::new(DispiPorts(Arc::clone(vga))));
    [door(layout::VGA_MONO), door(layout::VGA), (layout::DISPI, dispi)]
}

/// What the machine puts on the MMIO bus.
pub fn window(vga: &SharedVga) -> (Range<u64>, SharedDevice) {
    (layout::VGA_WINDOW, Arc::new(Mutex::new(VgaWindow(Arc::clone(vga)))))
}

/// What the machine puts on the PCI bus.
pub fn pci_function(vga: &SharedVga) -> VgaFunction {
    VgaFunction { vga: Arc::clone(vga), edid: edid::block() }
}

fn lock(vga: &SharedVga) -> MutexGuard<'_, Vga> {
    vga.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads an access byte by byte, lowest first.
fn read_bytes(at: Access, mut byte: impl FnMut(u64) -> u8) -> u64 {
    (0..at.width.bytes() as u64).fold(0, |value, index| value | u64::from(byte(at.offset + index)) << (8 * index))
}

/// Writes an access byte by byte, lowest first: a word to an index register sets its data register too.
fn write_bytes(at: Access, value: u64, mut byte: impl FnMut(u64, u8)) {
    for (index, part) in value.to_le_bytes().into_iter().take(at.width.bytes()).enumerate() {
        byte(at.offset + index as u64, part);
    }
}

struct VgaPorts {
    vga: SharedVga,
    first: u16,
}

impl BusDevice for VgaPorts {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        let mut vga = lock(&self.vga);
        Ok(read_bytes(at, |offset| vga.read_port(self.first.wrapping_add(offset as u16))))
    }
    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let mut vga = lock(&self.vga);
        write_bytes(at, value, |offset, part| vga.write_port(self.first.wrapping_add(offset as u16), part));
        Ok(Effect::None)
    }
}

/// Index at 0x1ce, data at 0x1cf and, aligned, at 0x1d0.
struct DispiPorts(SharedVga);

impl BusDevice for DispiPorts {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        let vga = lock(&self.0);
        match (at.offset, at.width) {
            (0, Width::B1 | Width::B2) => Ok(vga.dispi_index.into()),
            (_, Width::B1 | Width::B2) => Ok(vga.read_dispi(vga.dispi_index).into()),
            (_, Width::B4 | Width::B8) => Err(BusFault::BadWidth),
        }
    }
    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let mut vga = lock(&self.0);
        match (at.offset, at.width) {
            (0, Width::B1 | Width::B2) => vga.dispi_index = value as u16,
            (_, Width::B1 | Width::B2) => {
                let index = vga.dispi_index;
                vga.write_dispi(index, value as u16);
            }
            (_, Width::B4 | Width::B8) => return Err(BusFault::BadWidth),
        }
        Ok(Effect::None)
    }
}

struct VgaWindow(SharedVga);

impl BusDevice for VgaWindow {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        let mut vga = lock(&self.0);
        Ok(read_bytes(at, |offset| vga.read_window(offset as usize)))
    }
    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let mut vga = lock(&self.0);
        write_bytes(at, value, |offset, part| vga.write_window(offset as usize, part));
        Ok(Effect::None)
    }
}

/// The PCI function: BAR0 is video memory, BAR2 holds EDID, VGA ports and display interface (QEMU `standard-vga`, "MMIO area spec").
pub struct VgaFunction {
    vga: SharedVga,
    edid: [u8; 128],
}

const BARS: [BarSpec; 2] = [
    BarSpec { index: 0, size_bytes: VRAM_BYTES as u32, kind: BarKind::Ram },
    BarSpec { index: 2, size_bytes: 4096, kind: BarKind::Registers },
];
/// The "extended registers": their length, and a byte order that is little-endian for ever.
const QEXT: [u8; 8] = [8, 0, 0, 0, 0x1e, 0x1e, 0x1e, 0x1e];

impl PciFunction for VgaFunction {
    fn identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x1234,
            device: 0x1111,
            class: 0x03_0000,
            revision: 2,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            interrupt_pin: 0,
        }
    }

    fn bars(&self) -> &[BarSpec] {
        &BARS
    }

    /// BAR0 comes here only while KVM does not map it.
    fn bar_read(&mut self, bar: u8, at: Access) -> Result<u64, BusFault> {
        let mut vga = lock(&self.vga);
        Ok(read_bytes(at, |offset| match (bar, offset) {
            (0, _) => vga.vram.get(offset as usize),
            (2, 0x400..=0x41f) => vga.read_port(0x3c0 + (offset - 0x400) as u16),
            (2, 0x500..=0x515) => vga.read_dispi((offset - 0x500) as u16 / 2).to_le_bytes()[(offset & 1) as usize],
            (2, 0x600..=0x607) => QEXT.get((offset - 0x600) as usize).copied().unwrap_or(0),
            (2, _) => self.edid.get(offset as usize).copied().unwrap_or(0),
            _ => 0xff,
        }))
    }

    fn bar_write(&mut self, bar: u8, at: Access, value: u64) -> Result<Effect, BusFault> {
        let mut vga = lock(&self.vga);
        match (bar, at.offset) {
            (0, _) => write_bytes(at, value, |offset, part| {
                vga.vram.set(offset as usize, part);
                vga.dirty.mark(offset as usize, 1);
            }),
            (2, 0x400..=0x41f) => write_bytes(at, value, |offset, part| {
                vga.write_port(0x3c0 + (offset - 0x400) as u16, part);
            }),
            (2, 0x500..=0x515) => {
                // These are 16-bit registers: half of one cannot be written.
                if at.offset & 1 != 0 || at.width == Width::B1 {
                    return Err(BusFault::BadWidth);
                }
                for index in 0..(at.width.bytes() / 2) as u16 {
                    vga.write_dispi((at.offset - 0x500) as u16 / 2 + index, (value >> (16 * index)) as u16);
                }
            }
            _ => {}
        }
        Ok(Effect::None)
    }

    fn reset(&mut self) {
        lock(&self.vga).reset();
    }
}

#[cfg(test)]
mod tests;
