//! The engine: one process that runs one guest.

pub mod acpi;
pub mod bus;
pub mod cmos;
pub mod debugcon;
pub mod disk;
pub mod facts;
pub mod fwcfg;
pub mod i8042;
pub mod irq;
pub mod layout;
pub mod memory;
pub mod pci;
pub mod pm;
pub mod ps2;
pub mod reset;
pub mod smbios;
pub mod table_loader;
pub mod timer;
