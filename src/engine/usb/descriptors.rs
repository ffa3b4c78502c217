//! Descriptors and standard requests, the same for all devices (USB 2.0, chapter 9; USB 3.1, chapter 9).

use super::{ENDPOINT_IN, Setup, Speed, Stall};

// bRequest of standard requests (USB 2.0, table 9-4; USB 3.1, table 9-5).
const GET_STATUS: u8 = 0;
const CLEAR_FEATURE: u8 = 1;
const SET_FEATURE: u8 = 3;
const GET_DESCRIPTOR: u8 = 6;
const GET_CONFIGURATION: u8 = 8;
const SET_CONFIGURATION: u8 = 9;
const GET_INTERFACE: u8 = 10;
const SET_INTERFACE: u8 = 11;
const SET_SEL: u8 = 0x30;
const SET_ISOCH_DELAY: u8 = 0x31;

// Descriptor types (USB 2.0, table 9-5; HID 1.11, 7.1).
const DEVICE: u8 = 1;
const CONFIGURATION: u8 = 2;
const STRING: u8 = 3;
const INTERFACE: u8 = 4;
const ENDPOINT: u8 = 5;
const DEVICE_QUALIFIER: u8 = 6;
const OTHER_SPEED_CONFIGURATION: u8 = 7;
const BINARY_OBJECT_STORE: u8 = 15;
const HID: u8 = 0x21;
const HID_REPORT: u8 = 0x22;
const ENDPOINT_COMPANION: u8 = 48;

const FEATURE_ENDPOINT_HALT: u16 = 0;
const FEATURE_REMOTE_WAKEUP: u16 = 1;
/// USB 3.1, table 9-7: U1, U2 and latency tolerance, which mean nothing to a device without a link.
const FEATURES_SUPER_SPEED: std::ops::RangeInclusive<u16> = 48..=50;
const FEATURE_FUNCTION_SUSPEND: u16 = 0;

const ATTRIBUTE_ONE: u8 = 0x80;
const ATTRIBUTE_SELF_POWERED: u8 = 0x40;
const ATTRIBUTE_REMOTE_WAKEUP: u8 = 0x20;

/// The language of all strings: English (United States).
const LANGUAGE: u16 = 0x0409;
/// QEMU's number, which nobody else has. QEMU's own tablet says 0627:0001, which systemd lets sleep after two seconds.
const VENDOR: u16 = 0x46f4;
const MANUFACTURER: &str = "Innkeeper";

/// An endpoint beside 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct EndpointDescriptor {
    pub(super) address: u8,
    /// 2 for bulk, 3 for interrupt.
    pub(super) attributes: u8,
    pub(super) packet_bytes: u16,
    /// Of an interrupt endpoint at high speed: 2^(n-1) times 125 µs.
    pub(super) interval: u8,
}

/// What a device says of itself.
pub(super) struct Description {
    pub(super) speed: Speed,
    pub(super) product_id: u16,
    pub(super) product: &'static str,
    pub(super) serial: String,
    /// Class, subclass and protocol of the only interface.
    pub(super) interface: [u8; 3],
    /// Of a HID device.
    pub(super) report: &'static [u8],
    pub(super) endpoints: Vec<EndpointDescriptor>,
}

impl Description {
    /// USB 2.0, 9.6.1.
    fn device(&self) -> Vec<u8> {
        let (version, packet_bytes) = self.version();
        let mut bytes = vec![18, DEVICE];
        bytes.extend(version.to_le_bytes());
        bytes.extend([0, 0, 0, packet_bytes]);
        bytes.extend(VENDOR.to_le_bytes());
        bytes.extend(self.product_id.to_le_bytes());
        bytes.extend([0, 1, 1, 2, 3, 1]); // release 1.00, strings 1 to 3, one configuration
        bytes
    }

    /// The version of the specification, and the packet size of endpoint 0: from 3.0 on an exponent.
    fn version(&self) -> (u16, u8) {
        match self.speed {
            Speed::High => (0x0200, 64),
            Speed::Super => (0x0300, 9),
        }
    }

    /// USB 2.0, 9.6.2: of a device at high speed, what it would be at full speed.
    fn qualifier(&self) -> Vec<u8> {
        vec![10, DEVICE_QUALIFIER, 0, 2, 0, 0, 0, 64, 1, 0]
    }

    /// USB 2.0, 9.6.3, with all that belongs to it.
    fn configuration(&self, kind: u8) -> Vec<u8> {
        let [class, subclass, protocol] = self.interface;
        let mut attributes = ATTRIBUTE_ONE | ATTRIBUTE_SELF_POWERED;
        if !self.report.is_empty() {
            attributes |= ATTRIBUTE_REMOTE_WAKEUP;
        }
        let mut bytes = vec![9, kind, 0, 0, 1, 1, 0, attributes, 0];
        bytes.extend([9, INTERFACE, 0, 0, self.endpoints.len() as u8, class, subclass, protocol, 0]);
        bytes.extend(self.hid());
        for endpoint in &self.endpoints {
            // At full speed an interval is in milliseconds.
            let interval = if kind == OTHER_SPEED_CONFIGURATION { 8 } else { endpoint.interval };
            let [low, high] = endpoint.packet_bytes.to_le_bytes();
            bytes.extend([7, ENDPOINT, endpoint.address, endpoint.attributes, low, high, interval]);
            if self.speed == Speed::Super {
                bytes.extend([6, ENDPOINT_COMPANION, 15, 0, 0, 0]); // bursts of 16 packets
            }
        }
        let total = (bytes.len() as u16).to_le_bytes();
        bytes.splice(2..4, total);
        bytes
    }

    /// HID 1.11, 6.2.1.
    fn hid(&self) -> Vec<u8> {
        if self.report.is_empty() {
            return Vec::new();
        }
        let [low, high] = (self.report.len() as u16).to_le_bytes();
        vec![9, HID, 0x11, 0x01, 0, 1, HID_REPORT, low, high]
    }

    /// USB 3.1, 9.6.2: no link power management, and only super speed.
    fn object_store(&self) -> Vec<u8> {
        let mut bytes = vec![5, BINARY_OBJECT_STORE, 22, 0, 2];
        bytes.extend([7, 0x10, 2, 0, 0, 0, 0]);
        bytes.extend([10, 0x10, 3, 0, 0x08, 0, 3, 0, 0, 0]);
        bytes
    }

    fn string(&self, index: u8) -> Option<Vec<u8>> {
        let text = match index {
            0 => return Some([4, STRING].into_iter().chain(LANGUAGE.to_le_bytes()).collect()),
            1 => MANUFACTURER,
            2 => self.product,
            3 => &self.serial,
            _ => return None,
        };
        let units: Vec<u8> = text.encode_utf16().take(STRING_UNITS_MAX).flat_map(u16::to_le_bytes).collect();
        Some([units.len() as u8 + 2, STRING].into_iter().chain(units).collect())
    }

    fn descriptor(&self, kind: u8, index: u8) -> Option<Vec<u8>> {
        let high = self.speed == Speed::High;
        match kind {
            DEVICE => Some(self.device()),
            CONFIGURATION if index == 0 => Some(self.configuration(kind)),
            OTHER_SPEED_CONFIGURATION if index == 0 && high => Some(self.configuration(kind)),
            DEVICE_QUALIFIER if high => Some(self.qualifier()),
            BINARY_OBJECT_STORE if !high => Some(self.object_store()),
            STRING => self.string(index),
            _ => None,
        }
    }

    /// What a class asks of the interface (HID 1.11, 7.1.1).
    fn interface_descriptor(&self, kind: u8) -> Option<Vec<u8>> {
        match kind {
            HID if !self.report.is_empty() => Some(self.hid()),
            HID_REPORT if !self.report.is_empty() => Some(self.report.to_vec()),
            _ => None,
        }
    }
}

/// A string descriptor has 255 bytes at most.
const STRING_UNITS_MAX: usize = 126;

/// The part of a device that chapter 9 is about.
pub(super) struct Standard {
    description: Description,
    pub(super) configuration: u8,
    pub(super) remote_wakeup: bool,
    /// Endpoints with the halt feature, by `halt_bit`.
    pub(super) halted: u32,
}

impl Standard {
    pub(super) fn new(description: Description) -> Standard {
        Standard { description, configuration: 0, remote_wakeup: false, halted: 0 }
    }

    pub(super) fn reset(&mut self) {
        (self.configuration, self.remote_wakeup, self.halted) = (0, false, 0);
    }

    pub(super) fn is_configured(&self) -> bool {
        self.configuration != 0
    }

    pub(super) fn is_halted(&self, endpoint: u8) -> bool {
        self.halted & halt_bit(endpoint) != 0
    }

    pub(super) fn set_halted(&mut self, endpoint: u8, halted: bool) {
        if halted {
            self.halted |= halt_bit(endpoint);
        } else {
            self.halted &= !halt_bit(endpoint);
        }
    }

    /// Which bits of `halted` there can be.
    pub(super) fn halts_possible(&self) -> u32 {
        self.description.endpoints.iter().fold(0, |bits, endpoint| bits | halt_bit(endpoint.address))
    }

    /// A standard request to the device, its interface or an endpoint.
    pub(super) fn request(&mut self, setup: Setup) -> Result<Vec<u8>, Stall> {
        let [index_low, _] = setup.index.to_le_bytes();
        let [value_low, value_high] = setup.value.to_le_bytes();
        match (setup.request_type, setup.request) {
            (0x80, GET_DESCRIPTOR) => self.description.descriptor(value_high, value_low).ok_or(Stall),
            (0x81, GET_DESCRIPTOR) if setup.index == 0 => {
                self.description.interface_descriptor(value_high).ok_or(Stall)
            }
            (0x80, GET_CONFIGURATION) => Ok(vec![self.configuration]),
            (0x00, SET_CONFIGURATION) if setup.value <= 1 => {
                self.configuration = value_low;
                self.halted = 0;
                Ok(Vec::new())
            }
            (0x80, GET_STATUS) => Ok(vec![1 | u8::from(self.remote_wakeup) << 1, 0]),
            (0x81, GET_STATUS) => self.interface(setup).map(|()| vec![0, 0]),
            (0x82, GET_STATUS) if self.has(index_low) => Ok(vec![u8::from(self.is_halted(index_low)), 0]),
            (0x00, CLEAR_FEATURE | SET_FEATURE) => self.device_feature(setup),
            (0x01, CLEAR_FEATURE | SET_FEATURE) if self.is_super() && setup.value == FEATURE_FUNCTION_SUSPEND => {
                Ok(Vec::new())
            }
            (0x02, CLEAR_FEATURE | SET_FEATURE) if setup.value == FEATURE_ENDPOINT_HALT && self.has(index_low) => {
                self.set_halted(index_low, setup.request == SET_FEATURE);
                Ok(Vec::new())
            }
            (0x81, GET_INTERFACE) => self.interface(setup).map(|()| vec![0]),
            (0x01, SET_INTERFACE) if setup.value == 0 => self.interface(setup).map(|()| {
                self.halted = 0;
                Vec::new()
            }),
            (0x00, SET_SEL | SET_ISOCH_DELAY) if self.is_super() => Ok(Vec::new()),
            _ => Err(Stall),
        }
    }

    fn device_feature(&mut self, setup: Setup) -> Result<Vec<u8>, Stall> {
        match setup.value {
            FEATURE_REMOTE_WAKEUP if !self.description.report.is_empty() => {
                self.remote_wakeup = setup.request == SET_FEATURE;
            }
            value if self.is_super() && FEATURES_SUPER_SPEED.contains(&value) => {}
            _ => return Err(Stall),
        }
        Ok(Vec::new())
    }

    /// Checks that the request is to the interface that there is.
    fn interface(&self, setup: Setup) -> Result<(), Stall> {
        if setup.index == 0 && self.is_configured() { Ok(()) } else { Err(Stall) }
    }

    /// Endpoint 0 is there in both directions, and never halted.
    fn has(&self, endpoint: u8) -> bool {
        endpoint & !ENDPOINT_IN == 0 || self.description.endpoints.iter().any(|known| known.address == endpoint)
    }

    fn is_super(&self) -> bool {
        self.description.speed == Speed::Super
    }
}

fn halt_bit(endpoint: u8) -> u32 {
    match endpoint & 0x0f {
        0 => 0,
        number => 1 << (u32::from(number) + u32::from(endpoint >> 7) * 16),
    }
}

/// The saved state of the standard part; each device's version holds one.
pub(super) mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(in super::super) struct StandardV1 {
        pub(super) configuration: u8,
        pub(super) remote_wakeup: bool,
        pub(super) halted: u32,
    }
}

impl Standard {
    pub(super) fn save(&self) -> saved::StandardV1 {
        let Standard { description: _, configuration, remote_wakeup, halted } = self;
        saved::StandardV1 { configuration: *configuration, remote_wakeup: *remote_wakeup, halted: *halted }
    }

    /// Says what cannot be.
    pub(super) fn restore(&mut self, state: &saved::StandardV1) -> Result<(), &'static str> {
        if state.configuration > 1 {
            return Err("a configuration that is not there");
        }
        if state.halted & !self.halts_possible() != 0 {
            return Err("a halted endpoint that is not there");
        }
        self.configuration = state.configuration;
        self.remote_wakeup = state.remote_wakeup;
        self.halted = state.halted;
        Ok(())
    }
}
