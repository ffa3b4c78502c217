//! One function's configuration space: header, BARs and capabilities as bytes with writable bits.

use super::{BarKind, BarSpec, CONFIG_BYTES, Capability, PciFunction, msix};
use crate::engine::bus::Width;

pub const COMMAND: u8 = 0x04;
pub const STATUS: u8 = 0x06;
pub const CAPABILITIES: u8 = 0x34;
pub const INTERRUPT_LINE: u8 = 0x3c;
pub const COMMAND_IO: u16 = 1;
pub const COMMAND_MEMORY: u16 = 2;
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// I/O, memory, bus master, parity, SERR, INTx disable; what firmware and systems write.
const COMMAND_WRITABLE: u16 = 0x0547;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR_0: usize = 0x10;
const CAP_ID_MSIX: u8 = 0x11;
/// The BAR that MSI-X structures live in, of most functions.
pub const MSIX_BAR: u8 = 1;

/// Stored bytes, and which of their bits the guest may write.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    reset: [u8; CONFIG_BYTES],
    bars: Vec<BarSpec>,
    msix_at: Option<u8>,
    msix_bar: Option<u8>,
}

impl ConfigSpace {
    /// The header of `function`. `multifunction` is the header-type bit of function 0.
    pub fn new(function: &dyn PciFunction, msix_vectors: u16, multifunction: bool) -> ConfigSpace {
        let mut config = ConfigSpace {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            reset: [0; CONFIG_BYTES],
            bars: function.bars().to_vec(),
            msix_at: None,
            msix_bar: (msix_vectors > 0).then(|| function.msix_bar()),
        };
        let id = function.identity();
        config.put(0x00, &id.vendor.to_le_bytes());
        config.put(0x02, &id.device.to_le_bytes());
        config.put(0x08, &[id.revision]);
        config.put(0x09, &id.class.to_le_bytes()[..3]);
        config.put(0x0e, &[if multifunction { 0x80 } else { 0 }]);
        config.put(0x2c, &id.subsystem_vendor.to_le_bytes());
        config.put(0x2e, &id.subsystem.to_le_bytes());
        config.put(0x3d, &[id.interrupt_pin]);
        config.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        config.allow(0x0c, &[0xff, 0xff]); // cache line size, latency timer: kept, without meaning
        config.allow(INTERRUPT_LINE, &[0xff]);
        if let Some(index) = config.msix_bar {
            config.bars.push(BarSpec { index, size_bytes: msix::BAR_BYTES, kind: BarKind::Registers });
        }
        for bar in config.bars.clone() {
            config.add_bar(bar);
        }
        config.add_capabilities(function.capabilities(), msix_vectors);
        for byte in function.config_bytes() {
            config.put(byte.offset, &[byte.reset]);
            config.allow(byte.offset, &[byte.writable]);
        }
        config.reset = config.bytes;
        config
    }

    pub fn bytes(&self) -> &[u8; CONFIG_BYTES] {
        &self.bytes
    }
    pub fn bars(&self) -> &[BarSpec] {
        &self.bars
    }
    /// Where the MSI-X capability starts.
    pub fn msix_at(&self) -> Option<u8> {
        self.msix_at
    }
    /// The BAR with the MSI-X table.
    pub fn msix_bar(&self) -> Option<u8> {
        self.msix_bar
    }
    pub fn command(&self) -> u16 {
        self.u16_at(COMMAND)
    }
    pub fn u16_at(&self, offset: u8) -> u16 {
        self.read(offset, Width::B2) as u16
    }
    pub fn set_interrupt_status(&mut self, high: bool) {
        let status = &mut self.bytes[usize::from(STATUS)];
        *status = *status & !STATUS_INTERRUPT | if high { STATUS_INTERRUPT } else { 0 };
    }

    /// Bytes past the end read as ones.
    pub fn read(&self, offset: u8, width: Width) -> u64 {
        let mut value = 0;
        for index in 0..width.bytes() {
            let byte = self.bytes.get(usize::from(offset) + index).copied().unwrap_or(0xff);
            value |= u64::from(byte) << (8 * index);
        }
        value
    }

    /// Writes the writable bits.
    pub fn write(&mut self, offset: u8, width: Width, value: u64) {
        for index in 0..width.bytes() {
            let at = usize::from(offset) + index;
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                let new = (value >> (8 * index)) as u8;
                *byte = *byte & !mask | new & mask;
            }
        }
    }

    pub fn reset(&mut self) {
        self.bytes = self.reset;
    }

    /// The writable bits as saved; what the function is stays.
    pub fn restore(&mut self, saved: &[u8; CONFIG_BYTES]) {
        for (((byte, reset), mask), saved) in self.bytes.iter_mut().zip(&self.reset).zip(&self.writable).zip(saved) {
            *byte = reset & !mask | saved & mask;
        }
    }

    /// Where a BAR points now, if its space is enabled and the address makes sense.
    pub fn bar_address(&self, bar: BarSpec) -> Option<u64> {
        let at = BAR_0 as u8 + 4 * bar.index;
        let low = self.read(at, Width::B4);
        let (enable, address, limit) = match bar.kind {
            BarKind::Io => (COMMAND_IO, low & !3, 1 << 16),
            BarKind::Registers | BarKind::Ram => (COMMAND_MEMORY, low & !15, 1 << 32),
            BarKind::Registers64 => (COMMAND_MEMORY, low & !15 | self.read(at + 4, Width::B4) << 32, 1 << 52),
        };
        let end = address.checked_add(u64::from(bar.size_bytes))?;
        // All address bits set is the sizing probe; zero is not yet placed.
        let placed = address != 0 && end < limit;
        (placed && self.command() & enable != 0).then_some(address)
    }

    fn add_bar(&mut self, bar: BarSpec) {
        assert!(bar.size_bytes.is_power_of_two() && bar.index < 6, "{bar:?}");
        let at = BAR_0 as u8 + 4 * bar.index;
        let flags = match bar.kind {
            BarKind::Io => 1,
            BarKind::Registers => 0,
            BarKind::Registers64 => 4,
            BarKind::Ram => 8,
        };
        self.put(at, &u32::to_le_bytes(flags));
        self.allow(at, &(!(bar.size_bytes - 1)).to_le_bytes());
        if bar.kind == BarKind::Registers64 {
            self.allow(at + 4, &[0xff; 4]);
        }
    }

    fn add_capabilities(&mut self, mut capabilities: Vec<Capability>, msix_vectors: u16) {
        if let Some(bar) = self.msix_bar {
            let mut body = (msix_vectors - 1).to_le_bytes().to_vec();
            body.extend(u32::from(bar).to_le_bytes());
            body.extend((msix::PBA_OFFSET | u32::from(bar)).to_le_bytes());
            capabilities.insert(0, Capability { id: CAP_ID_MSIX, body });
        }
        let mut link = CAPABILITIES;
        let mut at = 0x40u8;
        for capability in capabilities {
            self.put(link, &[at]);
            self.put(at, &[capability.id, 0]);
            self.put(at + 2, &capability.body);
            if capability.id == CAP_ID_MSIX {
                self.allow(at + 2, &[0, 0xc0]);
                self.msix_at = Some(at);
            }
            link = at + 1;
            let next = usize::from(at) + (2 + capability.body.len()).next_multiple_of(4);
            at = u8::try_from(next).expect("our capabilities fit in configuration space");
        }
        if link != CAPABILITIES {
            self.put(STATUS, &[STATUS_CAPABILITIES]);
        }
    }

    /// Lets the guest write these bits; for a device's own capability.
    pub fn allow(&mut self, offset: u8, bits: &[u8]) {
        for (index, bit) in bits.iter().enumerate() {
            self.writable[usize::from(offset) + index] = *bit;
        }
    }

    fn put(&mut self, offset: u8, bytes: &[u8]) {
        let at = usize::from(offset);
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}
