//! The card's saved state. What is in the EEPROM follows from the specification; frames that are half received or half sent are
//! kept, so that nothing is lost that the guest or its peer believes done.

use serde::{Deserialize, Serialize};

use super::{
    super::saved::{BadState, SaveState, State, hex},
    E1000,
    phy::WRITABLE,
    worker::Frames,
};

const KIND: &str = "e1000";

#[derive(Serialize, Deserialize)]
struct V1 {
    registers: RegistersV1,
    interrupts: InterruptsV1,
    eeprom: EepromV1,
    /// The PHY's registers that a driver can write, in the order of their numbers.
    phy: [u16; WRITABLE.len()],
    mdic: u32,
    io_address: u32,
    transmitter: TransmitterV1,
    receiver: Option<ReceivedV1>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct RegistersV1 {
    /// Offset and value of each that is not zero.
    pub(super) words: Vec<(u32, u32)>,
    pub(super) octets: [u64; 4],
}

#[derive(Serialize, Deserialize)]
pub(super) struct InterruptsV1 {
    pub(super) causes: u32,
    pub(super) mask: u32,
}

#[derive(Serialize, Deserialize)]
pub(super) struct EepromV1 {
    pub(super) pins: u32,
    pub(super) chip: ChipV1,
    pub(super) eerd: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ChipV1 {
    Command { bits: u16, count: u8 },
    Reading { word: u16, left: u8 },
    Done,
}

#[derive(Serialize, Deserialize)]
pub(super) struct TransmitterV1 {
    /// For checksums alone, and for segmentation.
    pub(super) contexts: [Option<ContextV1>; 2],
    pub(super) outgoing: OutgoingV1,
    pub(super) last: Option<DescriptorV1>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct ContextV1 {
    pub(super) ip_start: u8,
    pub(super) ip_checksum_at: u8,
    pub(super) ip_end: u16,
    pub(super) l4_start: u8,
    pub(super) l4_checksum_at: u8,
    pub(super) l4_end: u16,
    pub(super) header_bytes: u8,
    pub(super) mss_bytes: u16,
    pub(super) is_tcp: bool,
    pub(super) is_ipv4: bool,
}

#[derive(Serialize, Deserialize)]
pub(super) struct OffloadsV1 {
    pub(super) context: Option<ContextV1>,
    pub(super) ip_checksum: bool,
    pub(super) l4_checksum: bool,
    pub(super) segment: bool,
    pub(super) legacy_checksum: Option<(u8, u8)>,
    pub(super) vlan: Option<u16>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct OutgoingV1 {
    #[serde(with = "hex")]
    pub(super) packet: Vec<u8>,
    pub(super) is_too_long: bool,
    pub(super) offloads: OffloadsV1,
    pub(super) taken: u32,
    pub(super) segments: u16,
    #[serde(with = "hex")]
    pub(super) frame: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct DescriptorV1 {
    pub(super) index: u16,
    pub(super) at: u64,
    pub(super) low: u64,
    pub(super) high: u64,
}

/// A frame that waits for descriptors.
#[derive(Serialize, Deserialize)]
pub(super) struct ReceivedV1 {
    #[serde(with = "hex")]
    pub(super) frame: Vec<u8>,
    pub(super) wire_bytes: u16,
    pub(super) status: u8,
    pub(super) errors: u8,
    pub(super) special: u16,
    /// RXO was told for it.
    pub(super) is_refused: bool,
}

/// Unless `good`: `what` cannot be.
pub(super) fn check(good: bool, what: &str) -> Result<(), BadState> {
    BadState::unless(good, KIND, what)
}

impl SaveState for E1000 {
    fn save(&self) -> State {
        let E1000 { shared, eeprom, phy, mdic, io_address } = self;
        let (transmitter, receiver) = shared.while_still(|frames| {
            let Frames { ram: _, backend: _, transmitter, receiver } = frames;
            (transmitter.save(), receiver.save())
        });
        let fields = V1 {
            registers: shared.registers.save(),
            interrupts: shared.interrupts.save(),
            eeprom: eeprom.save(),
            phy: phy.save(),
            mdic: *mdic,
            io_address: *io_address,
            transmitter,
            receiver,
        };
        State::new(KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let V1 { registers, interrupts, eeprom, phy, mdic, io_address, transmitter, receiver } =
            state.fields(KIND, 1)?;
        self.eeprom.restore(eeprom)?;
        self.phy.restore(phy)?;
        (self.mdic, self.io_address) = (mdic, io_address);
        // All of it while the worker is out, which looks at everything when it is released.
        self.shared.while_still(|frames| {
            self.shared.registers.restore(registers)?;
            frames.transmitter.restore(transmitter)?;
            frames.receiver.restore(receiver)?;
            self.shared.interrupts.restore(interrupts)
        })
    }
}
