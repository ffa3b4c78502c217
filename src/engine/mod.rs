//! The engine: one process that runs one guest.

pub mod ahci;
pub mod bus;
pub mod disk;
pub mod fault;
pub mod irq;
pub mod layout;
pub mod memory;
pub mod pci;
