//! The engine: one process that runs one guest.

pub mod bus;
pub mod disk;
pub mod input;
pub mod irq;
pub mod layout;
pub mod memory;
pub mod pci;
pub mod screen;
pub mod vga;
