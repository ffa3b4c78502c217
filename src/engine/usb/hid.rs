//! What human interface devices have in common (Device Class Definition for HID 1.11).

use super::{
    ENDPOINT_IN, Setup, Stall,
    descriptors::{Description, EndpointDescriptor, Standard},
};

/// The largest report: the boot keyboard's.
pub const REPORT_BYTES_MAX: usize = 8;
/// The interrupt endpoint of every HID device here.
pub(super) const INTERRUPT_IN: u8 = ENDPOINT_IN | 1;
/// 2^(4-1) times 125 µs: how soon a real bus would ask again. Here a report goes out as soon as there is a buffer.
const INTERVAL: u8 = 4;

// bRequest of class requests (HID 1.11, 7.2).
const GET_REPORT: u8 = 0x01;
const GET_IDLE: u8 = 0x02;
const GET_PROTOCOL: u8 = 0x03;
const SET_REPORT: u8 = 0x09;
const SET_IDLE: u8 = 0x0a;
const SET_PROTOCOL: u8 = 0x0b;
const TO_HOST: u8 = 0xa1;
const FROM_HOST: u8 = 0x21;
const REPORT_INPUT: u16 = 1;
const REPORT_OUTPUT: u16 = 2;

const PROTOCOL_REPORT: u8 = 1;

/// An input report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    bytes: [u8; REPORT_BYTES_MAX],
    len: usize,
}

impl Report {
    pub(super) fn new(from: &[u8]) -> Report {
        let mut bytes = [0; REPORT_BYTES_MAX];
        let len = from.len().min(REPORT_BYTES_MAX);
        for (to, from) in bytes.iter_mut().zip(from) {
            *to = *from;
        }
        Report { bytes, len }
    }
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// What a request to a HID device asks for, beyond what is done here.
pub(super) enum Asked {
    /// Done; the data stage's bytes.
    Done(Vec<u8>),
    /// The current input report.
    Input,
    /// The host sent an output report.
    Output,
}

/// The state that all HID devices have.
pub(super) struct Hid {
    pub(super) standard: Standard,
    /// In 4 ms; 0 to be asked only for what changed.
    pub(super) idle: u8,
    /// 0 for the boot protocol. The reports are the same in both.
    pub(super) protocol: u8,
}

impl Hid {
    /// `kind` is subclass and protocol of the interface: 1, 1 is a keyboard with boot protocol.
    pub(super) fn new(product_id: u16, product: &'static str, kind: [u8; 2], report: &'static [u8]) -> Hid {
        let interrupt = EndpointDescriptor {
            address: INTERRUPT_IN,
            attributes: 3,
            packet_bytes: REPORT_BYTES_MAX as u16,
            interval: INTERVAL,
        };
        let description = Description {
            speed: super::Speed::High,
            product_id,
            product,
            serial: "1".into(),
            interface: [3, kind[0], kind[1]],
            report,
            endpoints: vec![interrupt],
        };
        Hid { standard: Standard::new(description), idle: 0, protocol: PROTOCOL_REPORT }
    }

    pub(super) fn reset(&mut self) {
        self.standard.reset();
        (self.idle, self.protocol) = (0, PROTOCOL_REPORT);
    }

    pub(super) fn control(&mut self, setup: Setup) -> Result<Asked, Stall> {
        let [low, high] = setup.value.to_le_bytes();
        match (setup.request_type, setup.request) {
            (TO_HOST | FROM_HOST, _) if setup.index != 0 => Err(Stall),
            (TO_HOST, GET_REPORT) if u16::from(high) == REPORT_INPUT => Ok(Asked::Input),
            (FROM_HOST, SET_REPORT) if u16::from(high) == REPORT_OUTPUT => Ok(Asked::Output),
            (TO_HOST, GET_IDLE) => Ok(Asked::Done(vec![self.idle])),
            (FROM_HOST, SET_IDLE) => {
                self.idle = high;
                Ok(Asked::Done(Vec::new()))
            }
            (TO_HOST, GET_PROTOCOL) => Ok(Asked::Done(vec![self.protocol])),
            (FROM_HOST, SET_PROTOCOL) if setup.value <= 1 => {
                self.protocol = low;
                Ok(Asked::Done(Vec::new()))
            }
            (TO_HOST | FROM_HOST, _) => Err(Stall),
            _ => self.standard.request(setup).map(Asked::Done),
        }
    }

    pub(super) fn save(&self) -> saved::HidV1 {
        let Hid { standard, idle, protocol } = self;
        saved::HidV1 { standard: standard.save(), idle: *idle, protocol: *protocol }
    }

    /// Says what cannot be.
    pub(super) fn restore(&mut self, state: &saved::HidV1) -> Result<(), &'static str> {
        if state.protocol > 1 {
            return Err("a protocol that is not there");
        }
        self.standard.restore(&state.standard)?;
        (self.idle, self.protocol) = (state.idle, state.protocol);
        Ok(())
    }
}

/// The saved state of the common part; each device's version holds one.
pub(super) mod saved {
    use serde::{Deserialize, Serialize};

    use super::super::descriptors::saved::StandardV1;

    #[derive(Serialize, Deserialize)]
    pub(in super::super) struct HidV1 {
        pub(super) standard: StandardV1,
        pub(super) idle: u8,
        pub(super) protocol: u8,
    }
}
