//! Which interrupt of KVM's leads where: the pins of the interrupt controllers, and messages that an event sends (irqfd).

use std::io;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};

use super::irq::MsiMessage;

/// Pins of the IOAPIC; messages come after.
const PINS: u32 = 24;
/// A queue of a network card has one, while the kernel serves it.
const MESSAGES_MAX: usize = 1024;

/// The messages by number. A place that is free is taken again.
#[derive(Default)]
pub(super) struct IrqRoutes(Vec<Option<MsiMessage>>);

impl IrqRoutes {
    /// The number (GSI) that leads to `message` once KVM has the table.
    pub(super) fn add(&mut self, message: MsiMessage) -> io::Result<u32> {
        let free = self.0.iter().position(Option::is_none).unwrap_or(self.0.len());
        if free == MESSAGES_MAX {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        match self.0.get_mut(free) {
            Some(place) => *place = Some(message),
            None => self.0.push(Some(message)),
        }
        Ok(PINS + free as u32)
    }

    pub(super) fn remove(&mut self, number: u32) {
        let place = number.checked_sub(PINS).and_then(|place| self.0.get_mut(place as usize));
        if let Some(place) = place {
            *place = None;
        }
    }

    /// Every pin's input reaches both controllers; the timer's, 0, reaches the IOAPIC at pin 2, as on every PC and as the MADT says.
    pub(super) fn table(&self) -> io::Result<KvmIrqRouting> {
        let mut entries = Vec::new();
        let mut pin = |gsi: u32, irqchip: u32, pin: u32| {
            let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
            entries.push(entry);
        };
        for gsi in 0..8 {
            pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi);
            pin(gsi + 8, KVM_IRQCHIP_PIC_SLAVE, gsi);
        }
        for gsi in (0..PINS).filter(|gsi| *gsi != 2) {
            pin(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi });
        }
        for (gsi, message) in (PINS..).zip(&self.0) {
            let Some(MsiMessage { address, data }) = *message else { continue };
            let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
            entry.u.msi = kvm_irq_routing_msi { address_lo, address_hi, data, ..Default::default() };
            entries.push(entry);
        }
        KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::OutOfMemory.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_after_the_pins_and_a_free_place_is_taken_again() {
        let mut routes = IrqRoutes::default();
        let pins = routes.table().unwrap().as_slice().len();
        assert_eq!(pins, 16 + 23);
        let message = |data| MsiMessage { address: 0xfee0_1000, data };
        assert_eq!([1, 2, 3].map(|data| routes.add(message(data)).unwrap()), [24, 25, 26]);
        routes.remove(25);
        routes.remove(25);
        routes.remove(3);
        routes.remove(u32::MAX);
        let table = routes.table().unwrap();
        let numbers: Vec<_> = table.as_slice().iter().skip(pins).map(|entry| (entry.gsi, entry.type_)).collect();
        assert_eq!(numbers, [(24, KVM_IRQ_ROUTING_MSI), (26, KVM_IRQ_ROUTING_MSI)]);
        assert_eq!(routes.add(message(4)).unwrap(), 25);
        assert_eq!(routes.add(message(5)).unwrap(), 27);
    }

    #[test]
    fn there_is_an_end() {
        let mut routes = IrqRoutes::default();
        let message = MsiMessage { address: 0xfee0_0000, data: 0 };
        assert!((0..MESSAGES_MAX).all(|_| routes.add(message).is_ok()));
        assert_eq!(routes.add(message).unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
    }
}
