//! The engine: one process that runs one guest.

pub mod addresses;
pub mod boot;
pub mod bus;
pub mod chipset;
pub mod console;
mod cpuid;
pub mod disk;
pub mod event;
pub mod irq;
pub mod layout;
pub mod memory;
pub mod pci;
mod start_state;
pub mod uart;
pub mod vcpu;
pub mod virtio;
pub mod vm;
