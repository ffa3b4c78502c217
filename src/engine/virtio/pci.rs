//! The virtio-pci transport (virtio 1.2, 4.1): status, feature selection, queue registers, vectors, ISR. Modern only.
//!
//! ```text
//! BAR 1  MSI-X                BAR 4, 16 KiB:  0000 common   1000 ISR   2000 device   3000 doorbells, 4 bytes a queue
//! ```
//!
//! Queue registers are frozen from DRIVER_OK on: what the device uses was validated and moved out at that moment.

mod saved;

use std::sync::{Arc, atomic::Ordering};

use virtio_queue::{Queue, QueueT};

use super::{COMMON_FEATURES, Features, Interrupts, Kind, NO_VECTOR, Running, VirtioDevice, Worker, queue::VirtQueue};
use crate::engine::{
    bus::{Access, BusFault, Effect, Width},
    event::Event,
    memory::GuestRam,
    pci::{BarKind, BarSpec, CONFIG_BYTES, Capability, Doorbell, PciFunction, PciIdentity, root::Wiring},
};

const BAR: u8 = 4;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const REGION_BYTES: u64 = 0x1000;
const NOTIFY_MULTIPLIER: u32 = 4;
const BARS: [BarSpec; 1] = [BarSpec { index: BAR, size_bytes: 0x4000, kind: BarKind::Registers64 }];

const CAP_VENDOR: u8 = 9;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
/// Where the PCI configuration access capability lies: MSI-X (12), common (16), notify (20), ISR (16), device (16) before it.
const PCI_CAP_AT: u8 = 0x40 + 12 + 16 + 20 + 16 + 16;
const PCI_CAP_DATA: u8 = PCI_CAP_AT + 16;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

/// A virtio device behind PCI registers.
pub struct VirtioPci<D: VirtioDevice> {
    device: D,
    ram: GuestRam,
    interrupts: Arc<Interrupts>,
    kicks: Vec<Event>,
    // what the driver wrote
    device_feature_select: u32,
    driver_feature_select: u32,
    accepted: Features,
    status: u8,
    queue_select: u16,
    queues: Vec<Queue>,
}

impl<D: VirtioDevice> VirtioPci<D> {
    pub fn new(device: D, ram: GuestRam, wiring: &Wiring) -> std::io::Result<VirtioPci<D>> {
        let sizes = device.queue_sizes();
        let queues = fresh_queues(sizes);
        Ok(VirtioPci {
            ram,
            interrupts: Interrupts::new(Arc::clone(&wiring.msix), wiring.irq.clone(), queues.len()),
            kicks: sizes.iter().map(|_| Event::new()).collect::<Result<_, _>>()?,
            device_feature_select: 0,
            driver_feature_select: 0,
            accepted: 0,
            status: 0,
            queue_select: 0,
            queues,
            device,
        })
    }

    /// MSI-X vectors of a device: one for the configuration, one a queue.
    pub fn vectors(device: &D) -> u16 {
        1 + device.queue_sizes().len() as u16
    }

    pub fn device(&self) -> &D {
        &self.device
    }

    fn offered(&self) -> Features {
        self.device.offered() | COMMON_FEATURES
    }

    fn running(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn reset_device(&mut self) {
        self.device.workers().iter().for_each(Worker::reset);
        self.interrupts.reset();
        self.queues = fresh_queues(self.device.queue_sizes());
        self.status = 0;
        self.accepted = 0;
        self.queue_select = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
    }

    /// virtio 1.2, 3.1.1: each step is checked when the driver takes it.
    fn set_status(&mut self, status: u8) {
        if status == 0 {
            return self.reset_device();
        }
        let was_running = self.running();
        // Bits are only ever added (2.1.1): what was frozen by one stays so.
        self.status |= status & !STATUS_NEEDS_RESET;
        // Features that were not offered, or an old driver without VERSION_1: FEATURES_OK does not stick.
        if self.accepted & !self.offered() != 0 || self.accepted & 1 << 32 == 0 {
            self.status &= !STATUS_FEATURES_OK;
        }
        if !self.running() || was_running {
            return;
        }
        if self.status & STATUS_FEATURES_OK == 0 {
            return self.interrupts.set_needs_reset();
        }
        self.activate();
    }

    fn activate(&mut self) {
        let event_idx = self.accepted & 1 << 29 != 0;
        let map = self.ram.map();
        let mut in_use = Vec::new();
        for (index, (queue, kick)) in self.queues.iter().zip(&self.kicks).enumerate() {
            let (state, Ok(kick)) = (queue.state(), kick.try_clone()) else { return self.interrupts.set_needs_reset() };
            let Ok(mut mine) = Queue::try_from(state) else { return self.interrupts.set_needs_reset() };
            mine.set_event_idx(event_idx);
            if mine.ready() && !mine.is_valid(map) {
                return self.interrupts.set_needs_reset();
            }
            if mine.ready() {
                in_use.push(VirtQueue::new(mine, index, kick));
            } else if index == 0 {
                // Every device here needs its first queue.
                return self.interrupts.set_needs_reset();
            }
        }
        self.hand_out(in_use);
    }

    /// Gives each worker its queues; one without any stays parked.
    fn hand_out(&self, in_use: Vec<VirtQueue>) {
        let workers = self.device.workers();
        let mut shares: Vec<Vec<VirtQueue>> = workers.iter().map(|_| Vec::new()).collect();
        for queue in in_use {
            if let Some(share) = shares.get_mut(self.device.worker_of(queue.index(), self.accepted)) {
                share.push(queue);
            }
        }
        for (worker, queues) in workers.iter().zip(shares).filter(|(_, queues)| !queues.is_empty()) {
            let interrupts = Arc::clone(&self.interrupts);
            worker.activate(Running { ram: self.ram.clone(), queues, interrupts, features: self.accepted });
        }
    }

    fn common_read(&self, at: Access) -> Result<u64, BusFault> {
        // Narrower than the register is read by iPXE of 2019, which Debian has: the features by 16 bits.
        if at.width as usize > register(at.offset)? as usize {
            return Err(BusFault::BadWidth);
        }
        Ok(self.common_register(at)? & at.width.mask())
    }

    fn common_register(&self, at: Access) -> Result<u64, BusFault> {
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        let interrupts = &self.interrupts;
        Ok(match at.offset {
            0x00 => u64::from(self.device_feature_select),
            0x04 => half(self.offered(), self.device_feature_select),
            0x08 => u64::from(self.driver_feature_select),
            0x0c => half(self.accepted, self.driver_feature_select),
            0x10 => u64::from(interrupts.config_vector.load(Ordering::Acquire)),
            0x12 => self.queues.len() as u64,
            0x14 => {
                let broken = interrupts.needs_reset.load(Ordering::Acquire);
                u64::from(self.status | if broken { STATUS_NEEDS_RESET } else { 0 })
            }
            0x15 => u64::from(interrupts.generation.load(Ordering::Acquire)),
            0x16 => u64::from(self.queue_select),
            0x18 => self.queue().map_or(0, |queue| u64::from(queue.size())),
            0x1a => interrupts
                .queue_vectors
                .get(usize::from(self.queue_select))
                .map_or(u64::from(NO_VECTOR), |vector| u64::from(vector.load(Ordering::Acquire))),
            0x1c => self.queue().map_or(0, |queue| u64::from(queue.ready())),
            0x1e => u64::from(self.queue_select),
            0x20..=0x37 => return self.ring_address(at),
            _ => return Err(BusFault::NoRegister),
        })
    }

    fn ring_address(&self, at: Access) -> Result<u64, BusFault> {
        let Some(queue) = self.queue() else { return Ok(0) };
        let address = match at.offset & 0x38 {
            0x20 => queue.desc_table(),
            0x28 => queue.avail_ring(),
            _ => queue.used_ring(),
        };
        Ok(if at.offset & 4 != 0 { address >> 32 } else { address })
    }

    fn common_write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let own = register(at.offset)?;
        if at.width != own && (at.width, own) != (Width::B4, Width::B8) {
            return Err(BusFault::BadWidth);
        }
        let value32 = value as u32;
        let value16 = value as u16;
        match at.offset {
            0x00 => self.device_feature_select = value32,
            0x08 => self.driver_feature_select = value32,
            0x0c if self.status & STATUS_FEATURES_OK == 0 => {
                let value = u64::from(value32);
                match self.driver_feature_select {
                    0 => self.accepted = self.accepted & !0xffff_ffff | value,
                    1 => self.accepted = self.accepted & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
            0x10 => self.interrupts.config_vector.store(self.checked_vector(value16), Ordering::Release),
            0x14 => self.set_status(value as u8),
            0x16 => self.queue_select = value16,
            0x1a => {
                let checked = self.checked_vector(value16);
                self.interrupts.set_queue_vector(usize::from(self.queue_select), checked);
            }
            0x18 | 0x1c | 0x20..=0x37 => self.queue_write(at, value),
            0x0c | 0x04 | 0x12 | 0x15 | 0x1e => {}
            _ => return Err(BusFault::NoRegister),
        }
        Ok(Effect::None)
    }

    /// Queue registers; ignored once the driver said DRIVER_OK.
    fn queue_write(&mut self, at: Access, value: u64) {
        if self.running() {
            return;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        let low = Some(value as u32);
        let high = (at.width == Width::B8).then_some((value >> 32) as u32);
        match at.offset {
            0x18 => queue.set_size(value as u16),
            0x1c => queue.set_ready(value == 1),
            0x20 => queue.set_desc_table_address(low, high),
            0x24 => queue.set_desc_table_address(None, low),
            0x28 => queue.set_avail_ring_address(low, high),
            0x2c => queue.set_avail_ring_address(None, low),
            0x30 => queue.set_used_ring_address(low, high),
            0x34 => queue.set_used_ring_address(None, low),
            _ => {}
        }
    }

    /// A vector that the device does not have reads back as none (virtio 1.2, 4.1.5.1.2).
    fn checked_vector(&self, vector: u16) -> u16 {
        if usize::from(vector) <= self.queues.len() { vector } else { NO_VECTOR }
    }

    /// What the PCI configuration access capability points at.
    fn window(config: &[u8; CONFIG_BYTES]) -> Option<Access> {
        let at = usize::from(PCI_CAP_AT);
        let word = |offset: usize| {
            let bytes: [u8; 4] = config.get(at + offset..at + offset + 4)?.try_into().ok()?;
            Some(u32::from_le_bytes(bytes))
        };
        let bar = *config.get(at + 4)?;
        let width = Width::from_bytes(usize::try_from(word(12)?).ok()?)?;
        (bar == BAR && width != Width::B8).then_some(Access::new(u64::from(word(8)?), width))
    }
}

/// How wide the register of the common configuration is that begins here; a 64-bit one has halves (virtio 1.2, 4.1.3.1 and 4.1.4.3).
fn register(offset: u64) -> Result<Width, BusFault> {
    Ok(match offset {
        0x00 | 0x04 | 0x08 | 0x0c | 0x24 | 0x2c | 0x34 => Width::B4,
        0x10 | 0x12 | 0x16 | 0x18 | 0x1a | 0x1c | 0x1e => Width::B2,
        0x14 | 0x15 => Width::B1,
        0x20 | 0x28 | 0x30 => Width::B8,
        _ => return Err(BusFault::NoRegister),
    })
}

fn fresh_queues(sizes: &[u16]) -> Vec<Queue> {
    sizes.iter().map(|size| Queue::new(*size).expect("our queue sizes are powers of two")).collect()
}

impl<D: VirtioDevice> PciFunction for VirtioPci<D> {
    fn identity(&self) -> PciIdentity {
        let kind = self.device.kind();
        PciIdentity {
            vendor: 0x1af4,
            device: 0x1040 + kind as u16,
            class: match kind {
                Kind::Network => 0x020000,
                Kind::Block => 0x010000,
                Kind::Console => 0x078000,
                Kind::Entropy | Kind::Balloon => 0x00ff00,
                // By itself no VGA (`gpu::VgaCard` makes it one).
                Kind::Gpu => 0x038000,
                Kind::Input => 0x098000,
                Kind::Socket => 0x078000,
            },
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            interrupt_pin: 1,
        }
    }

    fn bars(&self) -> &[BarSpec] {
        &BARS
    }

    fn capabilities(&self) -> Vec<Capability> {
        let capability = |kind: u8, offset: u64, length: u64, more: &[u8]| {
            let mut body = vec![16 + more.len() as u8, kind, if kind == CFG_PCI { 0 } else { BAR }, 0, 0, 0];
            body.extend((offset as u32).to_le_bytes());
            body.extend((length as u32).to_le_bytes());
            body.extend(more);
            Capability { id: CAP_VENDOR, body }
        };
        vec![
            capability(CFG_COMMON, COMMON, 0x38, &[]),
            capability(CFG_NOTIFY, NOTIFY, REGION_BYTES, &NOTIFY_MULTIPLIER.to_le_bytes()),
            capability(CFG_ISR, ISR, 1, &[]),
            capability(CFG_DEVICE, DEVICE, REGION_BYTES, &[]),
            capability(CFG_PCI, 0, 0, &[0; 4]),
        ]
    }

    fn config_bytes(&self) -> Vec<crate::engine::pci::ConfigByte> {
        let writable = [4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19];
        let byte = |at| crate::engine::pci::ConfigByte { offset: PCI_CAP_AT + at, reset: 0, writable: 0xff };
        writable.into_iter().map(byte).collect()
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        let bell = |(index, kick): (usize, &Event)| {
            let offset = NOTIFY + index as u64 * u64::from(NOTIFY_MULTIPLIER);
            kick.try_clone().ok().map(|event| Doorbell { bar: BAR, offset, event })
        };
        self.kicks.iter().enumerate().filter_map(bell).collect()
    }

    fn config_read(&mut self, config: &[u8; CONFIG_BYTES], offset: u8, _: Width) -> Option<u64> {
        if offset != PCI_CAP_DATA {
            return None;
        }
        let at = Self::window(config)?;
        self.bar_read(BAR, at).ok()
    }

    fn config_written(&mut self, config: &[u8; CONFIG_BYTES], offset: u8, width: Width) {
        // Writing the data register writes what it points at; the bytes are those just stored behind it.
        if offset == PCI_CAP_DATA
            && let Some(at) = Self::window(config)
            && let Some(bytes) = config.get(usize::from(PCI_CAP_DATA)..usize::from(PCI_CAP_DATA) + width.bytes())
        {
            let value = bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            let _ = self.bar_write(BAR, at, value);
        }
    }

    fn bar_read(&mut self, _: u8, at: Access) -> Result<u64, BusFault> {
        match at.offset {
            COMMON..ISR => self.common_read(at),
            ISR => Ok(u64::from(self.interrupts.take_isr())),
            DEVICE..NOTIFY => {
                let mut bytes = [0; 8];
                let into = bytes.get_mut(..at.width.bytes()).unwrap_or_default();
                self.device.read_config((at.offset - DEVICE) as usize, into);
                Ok(u64::from_le_bytes(bytes))
            }
            NOTIFY.. => Ok(0),
            _ => Err(BusFault::NoRegister),
        }
    }

    fn bar_write(&mut self, _: u8, at: Access, value: u64) -> Result<Effect, BusFault> {
        match at.offset {
            COMMON..ISR => return self.common_write(at, value),
            DEVICE..NOTIFY => {
                let bytes = value.to_le_bytes();
                let from = bytes.get(..at.width.bytes()).unwrap_or_default();
                self.device.write_config((at.offset - DEVICE) as usize, from);
                self.interrupts.generation.fetch_add(1, Ordering::AcqRel);
            }
            // A doorbell that did not stay in the kernel: written through the configuration window, or in tests.
            NOTIFY.. => {
                let index = (at.offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                if let Some(kick) = usize::try_from(index).ok().and_then(|index| self.kicks.get(index)) {
                    kick.signal();
                }
            }
            _ => return Err(BusFault::NoRegister),
        }
        Ok(Effect::None)
    }

    fn reset(&mut self) {
        self.reset_device();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{
        pci::assign,
        virtio::{
            ISR_CONFIG, ISR_QUEUE,
            rng::Rng,
            testing::{
                ACKNOWLEDGE, BUFFERS, DRIVER, DRIVER_OK, Driver, EVENT_IDX, FEATURES_OK, INDIRECT, NEEDS_RESET, Region,
                VERSION_1, eventually, writable,
            },
        },
    };

    fn rng() -> Driver {
        Driver::plug(Rng::new().unwrap())
    }

    /// Whatever was done to the function: a driver that starts anew gets its bytes.
    fn check_it_serves(driver: &mut Driver) {
        driver.start(VERSION_1);
        assert_eq!(driver.run(0, &[writable(BUFFERS, 64)]).bytes, 64);
        assert_eq!(driver.registers.status() & NEEDS_RESET, 0);
    }

    #[test]
    fn features_are_offered_in_halves_and_frozen_by_features_ok() {
        let mut driver = rng();
        assert_eq!(driver.offered(), VERSION_1 | EVENT_IDX | INDIRECT);
        driver.registers.write(Region::Common, 0x00, Width::B4, 2);
        assert_eq!(driver.registers.read(Region::Common, 0x04, Width::B4), 0, "no third half");
        for refused in [0, EVENT_IDX, VERSION_1 | 1, VERSION_1 | 1 << 40, u64::MAX] {
            driver.registers.reset();
            assert!(!driver.negotiate(refused), "{refused:#x}");
        }
        assert!(driver.negotiate(VERSION_1 | EVENT_IDX), "a driver may try again without a reset");
        driver.registers.write(Region::Common, 0x08, Width::B4, 0);
        driver.registers.write(Region::Common, 0x0c, Width::B4, 0);
        assert_eq!(driver.registers.read(Region::Common, 0x0c, Width::B4), EVENT_IDX);
    }

    #[test]
    fn driver_ok_without_features_ok_starts_nothing() {
        for status in [DRIVER_OK, ACKNOWLEDGE | DRIVER | DRIVER_OK] {
            let mut driver = rng();
            driver.prepare(VERSION_1, 16);
            driver.registers.reset();
            driver.set_up_queue(0, 16);
            driver.registers.set_status(status);
            assert_ne!(driver.registers.status() & NEEDS_RESET, 0, "{status:#x}");
            driver.submit(0, &[writable(BUFFERS, 64)]);
            check_it_serves(&mut driver);
        }
        let mut driver = rng();
        assert!(!driver.negotiate(EVENT_IDX));
        driver.set_up_queue(0, 16);
        driver.driver_ok();
        assert_ne!(driver.registers.status() & NEEDS_RESET, 0, "FEATURES_OK did not stick without VERSION_1");
        check_it_serves(&mut driver);
    }

    #[test]
    fn status_bits_go_by_a_reset_only() {
        let mut driver = rng();
        driver.start(VERSION_1);
        driver.registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        driver.place_queue(0, 8, [0, 0x1000, 0x2000]);
        driver.driver_ok();
        assert_eq!(driver.registers.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(driver.run(0, &[writable(BUFFERS, 64)]).bytes, 64, "served where the queue was at the first");
    }

    #[test]
    fn queue_registers_are_frozen_while_the_driver_runs() {
        let mut driver = rng();
        driver.start(VERSION_1);
        let before: Vec<u64> =
            (0x18..0x38).step_by(4).map(|at| driver.registers.read(Region::Common, at, Width::B4)).collect();
        driver.place_queue(0, 4, [0x5_0000, 0x5_1000, 0x5_2000]);
        driver.registers.write(Region::Common, 0x1c, Width::B2, 0);
        let after: Vec<u64> =
            (0x18..0x38).step_by(4).map(|at| driver.registers.read(Region::Common, at, Width::B4)).collect();
        assert_eq!(before, after);
        assert_eq!(driver.registers.read(Region::Common, 0x18, Width::B2), 16);
        assert_eq!(driver.registers.read(Region::Common, 0x1c, Width::B2), 1);
        assert_eq!(driver.run(0, &[writable(BUFFERS, 64)]).bytes, 64);
    }

    #[test]
    fn a_queue_that_is_not_in_ram_needs_a_reset() {
        let good = [0x1_0000, 0x1_1000, 0x1_2000];
        let outside =
            [0xa_0000, 0x9_fff0, (8 << 20) - 16, 8 << 20, 0xfee0_0000, 1 << 40, u64::MAX - 15, u64::MAX - 0xfff];
        let mut driver = rng();
        for (which, address) in (0..3).flat_map(|which| outside.map(|address| (which, address))) {
            driver.prepare(VERSION_1, 16);
            let mut addresses = good;
            addresses[which] = address;
            driver.place_queue(0, 16, addresses);
            driver.use_msix();
            let before = driver.messages(0);
            driver.driver_ok();
            driver.registers.kick(0);
            driver.registers.wait_needs_reset();
            assert_eq!(driver.messages(0), before + 1, "{which} at {address:#x}: the driver is told");
            check_it_serves(&mut driver);
        }
        // Not ready at all, and an available ring at zero because its address is odd.
        for addresses in [None, Some([0x1_0000, 0x1_1001, 0x1_2000])] {
            driver.registers.reset();
            assert!(driver.negotiate(VERSION_1));
            if let Some(addresses) = addresses {
                driver.place_queue(0, 16, addresses);
            }
            driver.driver_ok();
            driver.registers.wait_needs_reset();
            check_it_serves(&mut driver);
        }
    }

    #[test]
    fn a_queue_size_that_is_no_power_of_two_or_too_large_is_not_taken() {
        let mut driver = rng();
        driver.registers.reset();
        driver.registers.write(Region::Common, 0x16, Width::B2, 0);
        for (written, read) in
            [(0, 64), (3, 64), (65, 64), (128, 64), (0x8000, 64), (0xffff, 64), (1, 1), (32, 32), (33, 32)]
        {
            driver.registers.write(Region::Common, 0x18, Width::B2, written);
            assert_eq!(driver.registers.read(Region::Common, 0x18, Width::B2), read, "{written}");
        }
        driver.registers.write(Region::Common, 0x16, Width::B2, 1);
        assert_eq!(driver.registers.read(Region::Common, 0x18, Width::B2), 0, "no second queue");
        assert_eq!(driver.registers.read(Region::Common, 0x1a, Width::B2), u64::from(NO_VECTOR));
    }

    #[test]
    fn the_pin_is_high_from_a_used_buffer_until_the_isr_is_read() {
        let mut driver = rng();
        driver.start_with_pin(VERSION_1);
        assert!(!driver.pin());
        driver.run(0, &[writable(BUFFERS, 64)]);
        eventually("the pin", || driver.pin());
        assert_eq!(driver.config(0x06, Width::B2) & 8, 8, "interrupt status");
        assert_eq!(driver.isr(), ISR_QUEUE);
        assert!(!driver.pin());
        assert_eq!(driver.isr(), 0);
        driver.descriptor(0, 5, 0xa_0000, 64, 2, 0);
        driver.make_available(0, 5);
        driver.registers.kick(0);
        driver.registers.wait_needs_reset();
        eventually("the pin", || driver.pin());
        assert_eq!(driver.isr(), ISR_CONFIG);
        driver.start_with_pin(VERSION_1);
        driver.run(0, &[writable(BUFFERS, 64)]);
        eventually("the pin", || driver.pin());
        driver.registers.reset();
        assert!(!driver.pin(), "a reset lowers the pin");
        assert_eq!(driver.all_messages(), 0);
    }

    #[test]
    fn vectors_are_kept_checked_and_used() {
        let mut driver = rng();
        driver.start(VERSION_1);
        driver.run(0, &[writable(BUFFERS, 64)]);
        eventually("a message", || driver.messages(1) == 1);
        assert!(!driver.pin());
        assert_eq!(driver.isr(), 0);
        for (at, vector, kept) in [(0x10, 1, 1), (0x10, 2, 0xffff), (0x1a, 0, 0), (0x1a, 0x100, 0xffff)] {
            driver.registers.write(Region::Common, 0x16, Width::B2, 0);
            driver.registers.write(Region::Common, at, Width::B2, vector);
            assert_eq!(driver.registers.read(Region::Common, at, Width::B2), kept);
        }
        driver.run(0, &[writable(BUFFERS, 64)]);
        driver.registers.reset();
        assert_eq!((driver.all_messages(), driver.pin()), (1, false), "no vector, no interrupt");
        assert_eq!(driver.registers.read(Region::Common, 0x10, Width::B2), u64::from(NO_VECTOR));
    }

    #[test]
    fn registers_are_written_in_their_own_width_and_read_no_wider() {
        let mut driver = rng();
        driver.prepare(VERSION_1, 16);
        driver.registers.write(Region::Common, 0x20, Width::B1, 0x80);
        driver.registers.write(Region::Common, 0x18, Width::B1, 1);
        driver.registers.write(Region::Common, 0x14, Width::B4, 0);
        assert_eq!(driver.registers.read(Region::Common, 0x20, Width::B8), 0x1_0000);
        assert_eq!(driver.registers.read(Region::Common, 0x18, Width::B2), 16);
        assert_eq!(driver.registers.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        driver.registers.write(Region::Common, 0x28, Width::B8, 0x12_3456_7000);
        assert_eq!(driver.registers.read(Region::Common, 0x2c, Width::B4), 0x12);
        assert_eq!(driver.registers.read(Region::Common, 0x21, Width::B4), 0xffff_ffff);
        assert_eq!(driver.registers.read(Region::Common, 0x10, Width::B4), 0xffff_ffff);
        driver.registers.write(Region::Common, 0x00, Width::B4, 1);
        assert_eq!(driver.registers.read(Region::Common, 0x04, Width::B2), VERSION_1 >> 32);
        assert_eq!(driver.registers.read(Region::Common, 0x29, Width::B1), 0xff);
        assert_eq!(driver.registers.read(Region::Common, 0x28, Width::B2), 0x7000);
    }

    #[test]
    fn every_offset_in_every_width_is_survived() {
        const WIDTHS: [Width; 4] = [Width::B1, Width::B2, Width::B4, Width::B8];
        const VALUES: [u64; 5] = [0, 1, 0x0f0f_0f0f_0f0f_0f0f, 0x1000, u64::MAX];
        let mut driver = rng();
        for value in VALUES {
            for (region, bytes) in
                [(Region::Common, 0x48), (Region::Isr, 8), (Region::Device, 0x110), (Region::Notify, 24)]
            {
                for (offset, width) in (0..bytes).chain(0xff8..0x1000).flat_map(|at| WIDTHS.map(|width| (at, width))) {
                    driver.registers.write(region, offset, width, value);
                    driver.registers.read(region, offset, width);
                }
            }
            for (offset, width) in (0..=255).flat_map(|at| WIDTHS.map(|width| (at, width))) {
                driver.set_config(offset, width, value);
                driver.config(offset, width);
            }
            assign::assign(&mut driver.root);
            driver.set_config(0x04, Width::B2, 7);
            check_it_serves(&mut driver);
        }
    }

    #[test]
    fn the_configuration_window_reaches_the_registers() {
        let mut driver = rng();
        let window =
            driver.capabilities().into_iter().find(|(id, at)| *id == 9 && driver.config(at + 3, Width::B1) == 5);
        assert_eq!(window, Some((9, PCI_CAP_AT)));
        let point = |driver: &mut Driver, bar: u64, offset: u64, bytes: u64| {
            driver.set_config(PCI_CAP_AT + 4, Width::B1, bar);
            driver.set_config(PCI_CAP_AT + 8, Width::B4, offset);
            driver.set_config(PCI_CAP_AT + 12, Width::B4, bytes);
        };
        point(&mut driver, 4, 0x14, 1);
        driver.set_config(PCI_CAP_DATA, Width::B1, 1);
        assert_eq!(driver.config(PCI_CAP_DATA, Width::B1), 1);
        assert_eq!(driver.registers.status(), ACKNOWLEDGE);
        for (bar, offset, bytes) in [(4, u64::from(u32::MAX), 4), (4, 0x3000, 3), (1, 0, 4), (9, 0x14, 1), (4, 0x14, 8)]
        {
            point(&mut driver, bar, offset, bytes);
            driver.set_config(PCI_CAP_DATA, Width::B4, 0);
            driver.config(PCI_CAP_DATA, Width::B4);
            assert_eq!(driver.registers.status(), ACKNOWLEDGE, "{bar} {offset:#x} {bytes}");
        }
        check_it_serves(&mut driver);
    }

    #[test]
    fn a_flood_of_kicks_changes_nothing() {
        let mut driver = rng();
        driver.start(VERSION_1);
        let mut other = driver.other_vcpu();
        let flood = std::thread::spawn(move || (0..20_000).for_each(|_| other.write(Region::Notify, 0, Width::B2, 0)));
        for _ in 0..200 {
            assert_eq!(driver.run(0, &[writable(BUFFERS, 64)]).bytes, 64);
        }
        flood.join().unwrap();
        assert_eq!(driver.used_index(0), 200);
        driver.registers.reset();
        check_it_serves(&mut driver);
    }
}
