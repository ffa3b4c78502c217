//! PCI: what a function is. Decoding, BAR sizing and moving, enable bits and MSI-X live in this folder, so no device writes them.

pub mod assign;
pub mod config;
pub mod hotplug;
pub mod intx;
pub mod msix;
pub mod root;

use super::{
    bus::{Access, BusFault, Effect, Width},
    event::Event,
    saved::SaveState,
};

/// Bytes of a function's configuration space (PCI Local Bus 3.0, 6.1).
pub const CONFIG_BYTES: usize = 256;

/// Where a function sits on bus 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevFn(u8);

impl DevFn {
    pub const fn new(slot: u8, function: u8) -> DevFn {
        DevFn(slot << 3 | function & 7)
    }
    pub const fn slot(self) -> u8 {
        self.0 >> 3
    }
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

/// What a function says it is (PCI Local Bus 3.0, 6.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciIdentity {
    pub vendor: u16,
    pub device: u16,
    /// Class, subclass, programming interface: 0x010601 is AHCI.
    pub class: u32,
    pub revision: u8,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
    /// 0 for no interrupt pin, 1 to 4 for INTA to INTD.
    pub interrupt_pin: u8,
}

/// What is behind a base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// 32-bit memory-mapped registers.
    Registers,
    /// 64-bit memory-mapped registers; takes this BAR and the next.
    Registers64,
    /// Prefetchable memory that KVM maps: video RAM.
    Ram,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarSpec {
    pub index: u8,
    /// A power of two, at least 4 for ports and 4096 for memory.
    pub size_bytes: u32,
    pub kind: BarKind,
}

/// A capability of a function, without the id and next bytes (PCI Local Bus 3.0, 6.7).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    pub id: u8,
    /// What follows the next pointer.
    pub body: Vec<u8>,
}

/// A register in configuration space that belongs to the device: a byte with its value after reset and its writable bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigByte {
    pub offset: u8,
    pub reset: u8,
    pub writable: u8,
}

/// An offset in a BAR whose writes signal `event` without leaving the kernel.
pub struct Doorbell {
    pub bar: u8,
    pub offset: u64,
    pub event: Event,
}

/// A function's behaviour. Identity, BARs and capabilities are fixed for life. Called with this function's lock held.
/// What it saves and restores is its own: configuration space, MSI-X and where its BARs are belong to the root.
pub trait PciFunction: SaveState + Send {
    fn identity(&self) -> PciIdentity;
    fn bars(&self) -> &[BarSpec];
    fn capabilities(&self) -> Vec<Capability> {
        Vec::new()
    }
    /// Device-specific configuration bytes, from 0x40 on.
    fn config_bytes(&self) -> Vec<ConfigByte> {
        Vec::new()
    }
    /// The BAR with the MSI-X table, for a function that has vectors. None of its own BARs may reach into it.
    fn msix_bar(&self) -> u8 {
        config::MSIX_BAR
    }
    fn doorbells(&self) -> Vec<Doorbell> {
        Vec::new()
    }
    /// Answers a read of configuration space instead of the bytes stored there.
    fn config_read(&mut self, _config: &[u8; CONFIG_BYTES], _offset: u8, _width: Width) -> Option<u64> {
        None
    }
    /// Something from 0x40 on was written; `config` is what is stored now.
    fn config_written(&mut self, _config: &[u8; CONFIG_BYTES], _offset: u8, _width: Width) {}
    fn bar_read(&mut self, bar: u8, at: Access) -> Result<u64, BusFault>;
    fn bar_write(&mut self, bar: u8, at: Access, value: u64) -> Result<Effect, BusFault>;
    /// Back to the state after power on. BARs and the command register are the caller's.
    fn reset(&mut self);
}
