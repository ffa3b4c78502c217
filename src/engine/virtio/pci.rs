//! The virtio-pci transport (virtio 1.2, 4.1): status, feature selection, queue registers, vectors, ISR. Modern only.
//!
//! ```text
//! BAR 1  MSI-X                BAR 4, 16 KiB:  0000 common   1000 ISR   2000 device   3000 doorbells, 4 bytes a queue
//! ```
//!
//! Queue registers are frozen from DRIVER_OK on: what the device uses was validated and moved out at that moment.

use std::sync::{Arc, atomic::Ordering};

use virtio_queue::{Queue, QueueT};

use super::{COMMON_FEATURES, Features, Interrupts, Kind, NO_VECTOR, Running, VirtioDevice, queue::VirtQueue};
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
    config_generation: u8,
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
            config_generation: 0,
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

    fn queue(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    fn reset_device(&mut self) {
        self.device.worker().reset();
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
        self.status = status & !STATUS_NEEDS_RESET;
        // Features that were not offered, or an old driver without VERSION_1: FEATURES_OK does not stick.
        if self.accepted & !self.offered() != 0 || self.accepted & 1 << 32 == 0 {
            self.status &= !STATUS_FEATURES_OK;
        }
        if self.running() && !was_running {
            self.activate();
        }
    }

    fn activate(&mut self) {
        let event_idx = self.accepted & 1 << 29 != 0;
        let map = self.ram.map();
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, (queue, kick)) in self.queues.iter().zip(&self.kicks).enumerate() {
            let (state, Ok(kick)) = (queue.state(), kick.try_clone()) else { return self.interrupts.set_needs_reset() };
            let Ok(mut mine) = Queue::try_from(state) else { return self.interrupts.set_needs_reset() };
            mine.set_event_idx(event_idx);
            if mine.ready() && !mine.is_valid(map) {
                return self.interrupts.set_needs_reset();
            }
            if mine.ready() {
                queues.push(VirtQueue::new(mine, index, kick));
            } else if index == 0 {
                // Every device here needs its first queue.
                return self.interrupts.set_needs_reset();
            }
        }
        let interrupts = Arc::clone(&self.interrupts);
        let running = Running { ram: self.ram.clone(), queues, interrupts, features: self.accepted };
        self.device.worker().activate(running);
    }

    fn common_read(&mut self, at: Access) -> Result<u64, BusFault> {
        let offered = self.offered();
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        let interrupts = Arc::clone(&self.interrupts);
        let vector = usize::from(self.queue_select);
        Ok(match at.offset {
            0x00 => u64::from(self.device_feature_select),
            0x04 => half(offered, self.device_feature_select),
            0x08 => u64::from(self.driver_feature_select),
            0x0c => half(self.accepted, self.driver_feature_select),
            0x10 => u64::from(interrupts.config_vector.load(Ordering::Acquire)),
            0x12 => self.queues.len() as u64,
            0x14 => {
                let broken = interrupts.needs_reset.load(Ordering::Acquire);
                u64::from(self.status | if broken { STATUS_NEEDS_RESET } else { 0 })
            }
            0x15 => u64::from(self.config_generation),
            0x16 => u64::from(self.queue_select),
            0x18 => self.queue().map_or(0, |queue| u64::from(queue.size())),
            0x1a => interrupts
                .queue_vectors
                .get(vector)
                .map_or(u64::from(NO_VECTOR), |vector| u64::from(vector.load(Ordering::Acquire))),
            0x1c => self.queue().map_or(0, |queue| u64::from(queue.ready())),
            0x1e => u64::from(self.queue_select),
            0x20..=0x37 => return self.ring_address(at),
            _ => return Err(BusFault::NoRegister),
        })
    }

    fn ring_address(&mut self, at: Access) -> Result<u64, BusFault> {
        let Some(queue) = self.queue() else { return Ok(0) };
        let address = match at.offset & 0x38 {
            0x20 => queue.desc_table(),
            0x28 => queue.avail_ring(),
            _ => queue.used_ring(),
        };
        Ok(if at.offset & 4 != 0 { address >> 32 } else { address })
    }

    fn common_write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
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
                if let Some(vector) = self.interrupts.queue_vectors.get(usize::from(self.queue_select)) {
                    vector.store(checked, Ordering::Release);
                }
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
        let Some(queue) = self.queue() else { return };
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
                Kind::Entropy => 0x00ff00,
                Kind::Input => 0x098000,
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
                self.config_generation = self.config_generation.wrapping_add(1);
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
