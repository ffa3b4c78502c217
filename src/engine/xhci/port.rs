//! Root hub ports (xHCI 1.1, 4.19 and 5.4.8): what is plugged in, and the registers that tell of it.

use std::sync::Arc;

use crate::engine::{
    event::Event,
    usb::{Device, Speed},
};

const CONNECTED: u32 = 1;
const ENABLED: u32 = 1 << 1;
const RESET: u32 = 1 << 4;
const LINK_SHIFT: u32 = 5;
const LINK: u32 = 0xf << LINK_SHIFT;
/// Always: there are no power switches.
const POWER: u32 = 1 << 9;
const SPEED_SHIFT: u32 = 10;
const LINK_WRITE: u32 = 1 << 16;
const CONNECT_CHANGE: u32 = 1 << 17;
const WARM_RESET_CHANGE: u32 = 1 << 19;
const RESET_CHANGE: u32 = 1 << 21;
const LINK_CHANGE: u32 = 1 << 22;
/// All seven, each cleared by writing 1.
const CHANGES: u32 = 0x7f << 17;
/// Wake on connect, disconnect and over-current: kept, without meaning.
const WAKES: u32 = 0x7 << 25;
const WARM_RESET: u32 = 1 << 31;

// Port link states (5.4.8).
const U0: u32 = 0;
const U3: u32 = 3;
const DISABLED: u32 = 4;
const RX_DETECT: u32 = 5;
const POLLING: u32 = 7;
const RESUME: u32 = 15;

/// PORTPMSC: what a driver may write of it, which is kept and means nothing to a device without a link.
const POWER_MANAGEMENT_KEPT: u32 = 0x1_ffff;
/// Bits that the stored register may have; `CONNECTED` and `POWER` are computed.
const STORED: u32 = ENABLED | LINK | 0xf << SPEED_SHIFT | CHANGES | WAKES;

pub(super) struct Port {
    /// A USB 3 port; a USB 2 port otherwise.
    pub(super) is_super: bool,
    /// PORTSC without what is computed.
    pub(super) status: u32,
    pub(super) power_management: u32,
    /// Something changed, and no event has told of it.
    pub(super) changed: bool,
    pub(super) device: Option<Device>,
    /// Wakes the worker of a disk.
    pub(super) kick: Option<Arc<Event>>,
}

impl Port {
    pub(super) fn new(is_super: bool, device: Option<Device>, kick: Option<Arc<Event>>) -> Port {
        let mut port = Port { is_super, status: 0, power_management: 0, changed: false, device, kick };
        port.power_on();
        port
    }

    /// After power on or a reset of the controller. A USB 3 port trains its link by itself; a USB 2 port wants a reset.
    pub(super) fn power_on(&mut self) {
        self.power_management = 0;
        self.changed = false;
        let Some(device) = &mut self.device else {
            self.status = RX_DETECT << LINK_SHIFT;
            return;
        };
        device.reset();
        let (speed, link, enabled) = match device.speed() {
            Speed::High => (3, POLLING, 0),
            Speed::Super => (4, U0, ENABLED),
        };
        self.status = speed << SPEED_SHIFT | link << LINK_SHIFT | enabled;
        self.raise(CONNECT_CHANGE);
    }

    pub(super) fn read(&self, register: u64) -> u32 {
        match register {
            0 => self.status | POWER | if self.device.is_some() { CONNECTED } else { 0 },
            4 => self.power_management,
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, register: u64, value: u32) {
        match register {
            0 => self.write_status(value),
            4 => self.power_management = value & POWER_MANAGEMENT_KEPT,
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        self.status = self.status & !(value & CHANGES) & !WAKES | value & WAKES;
        let warm = value & WARM_RESET != 0 && self.is_super;
        if value & RESET != 0 || warm {
            return self.reset(warm);
        }
        if value & ENABLED != 0 && self.status & ENABLED != 0 {
            self.status &= !ENABLED;
            self.set_link(if self.is_super { DISABLED } else { POLLING });
        } else if value & LINK_WRITE != 0 {
            self.write_link((value & LINK) >> LINK_SHIFT);
        }
    }

    /// Done at once, so that the reset bit never reads as set.
    fn reset(&mut self, warm: bool) {
        let Some(device) = &mut self.device else { return };
        device.reset();
        self.status |= ENABLED;
        self.set_link(U0);
        self.raise(if warm { RESET_CHANGE | WARM_RESET_CHANGE } else { RESET_CHANGE });
    }

    /// Suspend and resume (4.15).
    fn write_link(&mut self, wanted: u32) {
        match (self.link(), wanted) {
            (U0, U3) if self.status & ENABLED != 0 => self.set_link(U3),
            (U3, RESUME) if !self.is_super => self.set_link(RESUME),
            (U3 | RESUME, U0) => {
                self.set_link(U0);
                self.raise(LINK_CHANGE);
            }
            (DISABLED, RX_DETECT) if self.is_super => self.reset(false),
            _ => {}
        }
    }

    /// The device wants to be heard although the port is suspended (4.15.2.2).
    pub(super) fn wake(&mut self) {
        if self.link() == U3 {
            self.set_link(RESUME);
            self.raise(LINK_CHANGE);
        }
    }

    /// Whether packets can go to the device.
    pub(super) fn is_active(&self) -> bool {
        self.is_enabled() && self.link() == U0
    }
    pub(super) fn is_enabled(&self) -> bool {
        self.device.is_some() && self.status & ENABLED != 0
    }
    /// Suspended, or on the way back: the device is there and cannot be talked to.
    pub(super) fn is_suspended(&self) -> bool {
        self.is_enabled() && self.link() != U0
    }
    /// PSCEG: a change that the driver has not cleared (4.19.2).
    pub(super) fn has_changes(&self) -> bool {
        self.status & CHANGES != 0
    }

    fn link(&self) -> u32 {
        (self.status & LINK) >> LINK_SHIFT
    }
    fn set_link(&mut self, link: u32) {
        self.status = self.status & !LINK | link << LINK_SHIFT;
    }
    fn raise(&mut self, changes: u32) {
        self.changed |= changes & !self.status != 0;
        self.status |= changes;
    }

    pub(super) fn restore(&mut self, status: u32, power_management: u32, changed: bool) -> Result<(), &'static str> {
        if status & !STORED != 0 || power_management & !POWER_MANAGEMENT_KEPT != 0 {
            return Err("bits of a port that are not there");
        }
        if self.device.is_none() && status & ENABLED != 0 {
            return Err("an enabled port without a device");
        }
        (self.status, self.power_management, self.changed) = (status, power_management, changed);
        Ok(())
    }
}
