//! Features (NVM Express 1.4, section 5.21.1): what Set Features keeps, until the next reset of the controller.

use super::{
    IO_QUEUES,
    command::{Command, Status},
    identify::{TEMPERATURE_KELVIN, WARNING_KELVIN},
    saved::FeaturesV1,
};

const ARBITRATION: u8 = 0x01;
const POWER_MANAGEMENT: u8 = 0x02;
const TEMPERATURE_THRESHOLD: u8 = 0x04;
const ERROR_RECOVERY: u8 = 0x05;
pub(super) const WRITE_CACHE: u8 = 0x06;
const NUMBER_OF_QUEUES: u8 = 0x07;
const COALESCING: u8 = 0x08;
const VECTOR_CONFIGURATION: u8 = 0x09;
const WRITE_ATOMICITY: u8 = 0x0a;
const EVENT_CONFIGURATION: u8 = 0x0b;

/// Both counts, one less each.
const QUEUES_GRANTED: u32 = (IO_QUEUES as u32 - 1) << 16 | (IO_QUEUES as u32 - 1);

/// Values as the driver sees them. Arbitration and coalescing are kept and change nothing: queues are served in turn, and each
/// completion interrupts at once.
pub(super) struct Features {
    arbitration: u32,
    over_kelvin: u16,
    under_kelvin: u16,
    error_recovery: u16,
    pub(super) write_cache: bool,
    coalescing: u16,
    /// Vectors whose interrupts are not to be coalesced, a bit each.
    uncoalesced: u32,
    write_atomicity: bool,
    /// Critical warnings that are told as events; other notices are not offered.
    warnings: u8,
}

impl Default for Features {
    fn default() -> Features {
        Features {
            arbitration: 0,
            over_kelvin: WARNING_KELVIN,
            under_kelvin: 0,
            error_recovery: 0,
            write_cache: true,
            coalescing: 0,
            uncoalesced: 0,
            write_atomicity: false,
            warnings: 0,
        }
    }
}

impl Features {
    pub(super) fn save(&self) -> FeaturesV1 {
        let Features {
            arbitration,
            over_kelvin,
            under_kelvin,
            error_recovery,
            write_cache,
            coalescing,
            uncoalesced,
            write_atomicity,
            warnings,
        } = *self;
        FeaturesV1 {
            arbitration,
            over_kelvin,
            under_kelvin,
            error_recovery,
            write_cache,
            coalescing,
            uncoalesced,
            write_atomicity,
            warnings,
        }
    }

    /// A driver may have set any of it.
    pub(super) fn restore(saved: FeaturesV1) -> Features {
        let FeaturesV1 {
            arbitration,
            over_kelvin,
            under_kelvin,
            error_recovery,
            write_cache,
            coalescing,
            uncoalesced,
            write_atomicity,
            warnings,
        } = saved;
        Features {
            arbitration,
            over_kelvin,
            under_kelvin,
            error_recovery,
            write_cache,
            coalescing,
            uncoalesced,
            write_atomicity,
            warnings,
        }
    }

    /// Critical warning, bit 1: the temperature, which never changes, is past a threshold.
    pub(super) fn temperature_warning(&self) -> bool {
        TEMPERATURE_KELVIN >= self.over_kelvin || TEMPERATURE_KELVIN <= self.under_kelvin
    }

    pub(super) fn temperature_event(&self) -> bool {
        self.temperature_warning() && self.warnings & 1 << 1 != 0
    }

    /// Get Features: dword 0 of the completion. Selecting other than the current value is not offered.
    pub(super) fn get(&self, command: &Command, vectors: u16) -> Result<u32, Status> {
        let [select, value, ..] = command.words;
        if select & 0x700 != 0 {
            return Err(Status::INVALID_FIELD);
        }
        Ok(match select as u8 {
            ARBITRATION => self.arbitration,
            POWER_MANAGEMENT => 0,
            TEMPERATURE_THRESHOLD => match threshold(value)? {
                Threshold::Over => u32::from(self.over_kelvin),
                Threshold::Under => u32::from(self.under_kelvin),
            },
            ERROR_RECOVERY => u32::from(self.error_recovery),
            WRITE_CACHE => u32::from(self.write_cache),
            NUMBER_OF_QUEUES => QUEUES_GRANTED,
            COALESCING => u32::from(self.coalescing),
            VECTOR_CONFIGURATION => {
                let vector = checked_vector(value, vectors)?;
                u32::from(vector) | (self.uncoalesced >> vector & 1) << 16
            }
            WRITE_ATOMICITY => u32::from(self.write_atomicity),
            EVENT_CONFIGURATION => u32::from(self.warnings),
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    /// Set Features: dword 0 of the completion. `queues_exist` is whether the driver has made I/O queues.
    pub(super) fn set(&mut self, command: &Command, vectors: u16, queues_exist: bool) -> Result<u32, Status> {
        const SAVE: u32 = 1 << 31;
        let [select, value, ..] = command.words;
        if select & SAVE != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        match select as u8 {
            ARBITRATION => self.arbitration = value,
            POWER_MANAGEMENT if value & 0x1f == 0 => {} // the only power state
            TEMPERATURE_THRESHOLD => match threshold(value)? {
                Threshold::Over => self.over_kelvin = value as u16,
                Threshold::Under => self.under_kelvin = value as u16,
            },
            ERROR_RECOVERY => self.error_recovery = value as u16,
            WRITE_CACHE => self.write_cache = value & 1 != 0,
            NUMBER_OF_QUEUES => {
                if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                    return Err(Status::INVALID_FIELD);
                }
                if queues_exist {
                    return Err(Status::SEQUENCE_ERROR);
                }
                return Ok(QUEUES_GRANTED);
            }
            COALESCING => self.coalescing = value as u16,
            VECTOR_CONFIGURATION => {
                let bit = 1 << checked_vector(value, vectors)?;
                self.uncoalesced = self.uncoalesced & !bit | if value & 1 << 16 != 0 { bit } else { 0 };
            }
            WRITE_ATOMICITY => self.write_atomicity = value & 1 != 0,
            EVENT_CONFIGURATION => self.warnings = value as u8,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }
}

enum Threshold {
    Over,
    Under,
}

/// Which threshold a command means; only the composite temperature has any, and all sensors are that one.
fn threshold(value: u32) -> Result<Threshold, Status> {
    match (value >> 16 & 0xf, value >> 20 & 3) {
        (0 | 15, 0) => Ok(Threshold::Over),
        (0 | 15, 1) => Ok(Threshold::Under),
        _ => Err(Status::INVALID_FIELD),
    }
}

fn checked_vector(value: u32, vectors: u16) -> Result<u16, Status> {
    let vector = value as u16;
    if vector < vectors { Ok(vector) } else { Err(Status::INVALID_FIELD) }
}
