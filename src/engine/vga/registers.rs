//! VGA registers as ports see them: sequencer, CRTC, graphics and attribute controllers, DAC.
//!
//! Source: IBM VGA Technical Reference (video subsystem). Values are kept as written, within the bits that exist; `render.rs`
//! and `window.rs` give them their meaning.

use std::time::{Duration, Instant};

use super::{dispi::Dispi, saved::PortsV1};

/// Everything that decides what the screen shows, apart from video memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(super) misc: u8,
    pub(super) sequencer: [u8; 5],
    pub(super) crtc: [u8; 25],
    pub(super) graphics: [u8; 9],
    pub(super) attribute: [u8; 21],
    /// Bit 5 of the attribute index, "palette address source": while it is off the screen is blank.
    pub(super) palette_on: bool,
    pub(super) dac: [u8; 768],
    pub(super) dac_mask: u8,
    pub(super) dispi: Dispi,
}

impl Default for Registers {
    fn default() -> Registers {
        Registers {
            misc: 0,
            sequencer: [0; 5],
            crtc: [0; 25],
            graphics: [0; 9],
            attribute: [0; 21],
            palette_on: false,
            dac: [0; 768],
            dac_mask: 0xff,
            dispi: Dispi::default(),
        }
    }
}

/// The bits that exist in each register.
pub(super) const SEQUENCER_BITS: [u8; 5] = [0x03, 0x3d, 0x0f, 0x3f, 0x0e];
pub(super) const GRAPHICS_BITS: [u8; 9] = [0x0f, 0x0f, 0x0f, 0x1f, 0x03, 0x7b, 0x0f, 0x0f, 0xff];

/// Index registers, flip-flops and what else a port access moves.
#[derive(Debug, Default)]
pub(super) struct Ports {
    sequencer_index: u8,
    crtc_index: u8,
    graphics_index: u8,
    attribute_index: u8,
    /// The next write to 0x3c0 is data; any read of input status 1 turns it back.
    attribute_data_next: bool,
    dac_read_at: u8,
    dac_write_at: u8,
    dac_component: u8,
    dac_last_was_read: bool,
    feature: u8,
    enabled: u8,
    beam: Beam,
}

/// The beam of a picture of 70 Hz, as input status 1 tells of it.
#[derive(Debug)]
struct Beam {
    since: Instant,
    /// The first frame whose retrace nobody has seen.
    unseen_frame: u64,
    in_line_blank: bool,
}

/// 449 lines at 31.5 kHz, of which the last 49 are blank and the last two the retrace (IBM VGA, 400-line modes).
const FRAME_US: u64 = 14_268;
const BLANK_US: u64 = 49 * FRAME_US / 449;
const RETRACE_US: u64 = 2 * FRAME_US / 449;

/// Red, green, blue.
pub(super) const DAC_COMPONENTS: u8 = 3;

const DISPLAY_DISABLED: u8 = 0x01;
const VERTICAL_RETRACE: u8 = 0x08;

impl Default for Beam {
    fn default() -> Beam {
        Beam { since: Instant::now(), unseen_frame: 0, in_line_blank: false }
    }
}

impl Beam {
    /// Input status 1 at a time since power on.
    ///
    /// Programs read this in a loop, and each read is an exit: what is shorter than an exit must not be missed. A retrace that came
    /// and went between two reads is told late, once; the blank at the end of each line comes at every other read.
    fn status(&mut self, time: Duration) -> u8 {
        let time_us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let (frame, in_frame_us) = (time_us / FRAME_US, time_us % FRAME_US);
        let retrace_now = in_frame_us >= FRAME_US - RETRACE_US;
        let retrace = retrace_now || self.unseen_frame < frame;
        self.unseen_frame = self.unseen_frame.max(if retrace_now { frame + 1 } else { frame });
        self.in_line_blank = !self.in_line_blank;
        let blank = retrace || in_frame_us >= FRAME_US - BLANK_US || self.in_line_blank;
        (if blank { DISPLAY_DISABLED } else { 0 }) | if retrace { VERTICAL_RETRACE } else { 0 }
    }
}

impl Ports {
    pub(super) fn save(&self) -> PortsV1 {
        let Ports {
            sequencer_index,
            crtc_index,
            graphics_index,
            attribute_index,
            attribute_data_next,
            dac_read_at,
            dac_write_at,
            dac_component,
            dac_last_was_read,
            feature,
            enabled,
            beam: _, // a new picture begins when the guest goes on
        } = *self;
        PortsV1 {
            sequencer_index,
            crtc_index,
            graphics_index,
            attribute_index,
            attribute_data_next,
            dac_read_at,
            dac_write_at,
            dac_component,
            dac_last_was_read,
            feature,
            enabled,
        }
    }

    /// Takes registers on that were checked.
    pub(super) fn from_saved(fields: &PortsV1) -> Ports {
        Ports {
            sequencer_index: fields.sequencer_index & 7,
            crtc_index: fields.crtc_index,
            graphics_index: fields.graphics_index & 0xf,
            attribute_index: fields.attribute_index & 0x1f,
            attribute_data_next: fields.attribute_data_next,
            dac_read_at: fields.dac_read_at,
            dac_write_at: fields.dac_write_at,
            dac_component: fields.dac_component,
            dac_last_was_read: fields.dac_last_was_read,
            feature: fields.feature & 0x10,
            enabled: fields.enabled & 1,
            beam: Beam::default(),
        }
    }

    /// Reads one byte of port `port` (0x3b4 to 0x3df). Nothing there reads as ones.
    pub(super) fn read(&mut self, registers: &Registers, port: u16) -> u8 {
        let get = |file: &[u8], index: u8| file.get(usize::from(index)).copied().unwrap_or(0);
        match port {
            0x3b4 | 0x3b5 | 0x3ba if color(registers) => 0xff,
            0x3d4 | 0x3d5 | 0x3da if !color(registers) => 0xff,
            0x3c0 => self.attribute_index | u8::from(registers.palette_on) << 5,
            0x3c1 => get(&registers.attribute, self.attribute_index),
            0x3c2 => 0,
            0x3c3 => self.enabled,
            0x3c4 => self.sequencer_index,
            0x3c5 => get(&registers.sequencer, self.sequencer_index),
            0x3c6 => registers.dac_mask,
            0x3c7 => {
                if self.dac_last_was_read {
                    3
                } else {
                    0
                }
            }
            0x3c8 => self.dac_write_at,
            0x3c9 => self.read_dac(registers),
            0x3ca => self.feature,
            0x3cc => registers.misc,
            0x3ce => self.graphics_index,
            0x3cf => get(&registers.graphics, self.graphics_index),
            0x3b4 | 0x3d4 => self.crtc_index,
            0x3b5 | 0x3d5 => get(&registers.crtc, self.crtc_index),
            0x3ba | 0x3da => {
                self.attribute_data_next = false;
                self.beam.status(self.beam.since.elapsed())
            }
            _ => 0xff,
        }
    }

    /// Writes one byte to port `port`. Nothing there drops it.
    pub(super) fn write(&mut self, registers: &mut Registers, port: u16, value: u8) {
        match port {
            0x3b4 | 0x3b5 | 0x3ba if color(registers) => {}
            0x3d4 | 0x3d5 | 0x3da if !color(registers) => {}
            0x3c0 => self.write_attribute(registers, value),
            0x3c2 => registers.misc = value & !0x10,
            0x3c3 => self.enabled = value & 1,
            0x3c4 => self.sequencer_index = value & 7,
            0x3c5 => set(&mut registers.sequencer, self.sequencer_index, value, &SEQUENCER_BITS),
            0x3c6 => registers.dac_mask = value,
            0x3c7 => {
                self.dac_read_at = value;
                self.dac_component = 0;
                self.dac_last_was_read = true;
            }
            0x3c8 => {
                self.dac_write_at = value;
                self.dac_component = 0;
                self.dac_last_was_read = false;
            }
            0x3c9 => self.write_dac(registers, value),
            0x3ce => self.graphics_index = value & 0xf,
            0x3cf => set(&mut registers.graphics, self.graphics_index, value, &GRAPHICS_BITS),
            0x3b4 | 0x3d4 => self.crtc_index = value,
            0x3b5 | 0x3d5 => self.write_crtc(registers, value),
            0x3ba | 0x3da => self.feature = value & 0x10,
            _ => {}
        }
    }

    fn write_attribute(&mut self, registers: &mut Registers, value: u8) {
        if self.attribute_data_next {
            let bits = match self.attribute_index {
                0..=0xf => 0x3f,
                0x10 => 0xef,
                0x12 => 0x3f,
                0x13 | 0x14 => 0x0f,
                _ => 0xff,
            };
            if let Some(register) = registers.attribute.get_mut(usize::from(self.attribute_index)) {
                *register = value & bits;
            }
        } else {
            self.attribute_index = value & 0x1f;
            registers.palette_on = value & 0x20 != 0;
        }
        self.attribute_data_next = !self.attribute_data_next;
    }

    fn write_crtc(&mut self, registers: &mut Registers, value: u8) {
        let protected = registers.crtc[0x11] & 0x80 != 0;
        match self.crtc_index {
            // The protection of 0 to 7 leaves bit 8 of the line compare writable.
            7 if protected => registers.crtc[7] = registers.crtc[7] & !0x10 | value & 0x10,
            0..=6 if protected => {}
            index => {
                if let Some(register) = registers.crtc.get_mut(usize::from(index)) {
                    *register = value;
                }
            }
        }
    }

    fn read_dac(&mut self, registers: &Registers) -> u8 {
        let at = usize::from(self.dac_read_at) * 3 + usize::from(self.dac_component);
        self.dac_component = (self.dac_component + 1) % DAC_COMPONENTS;
        if self.dac_component == 0 {
            self.dac_read_at = self.dac_read_at.wrapping_add(1);
        }
        registers.dac.get(at).copied().unwrap_or(0)
    }

    fn write_dac(&mut self, registers: &mut Registers, value: u8) {
        let at = usize::from(self.dac_write_at) * 3 + usize::from(self.dac_component);
        self.dac_component = (self.dac_component + 1) % DAC_COMPONENTS;
        if self.dac_component == 0 {
            self.dac_write_at = self.dac_write_at.wrapping_add(1);
        }
        let bits = if registers.dispi.dac_is_8_bit() { 0xff } else { 0x3f };
        if let Some(part) = registers.dac.get_mut(at) {
            *part = value & bits;
        }
    }
}

/// Bit 0 of the miscellaneous output register: CRTC and status are at 0x3dx, not 0x3bx.
fn color(registers: &Registers) -> bool {
    registers.misc & 1 != 0
}

fn set(file: &mut [u8], index: u8, value: u8, bits: &[u8]) {
    let index = usize::from(index);
    if let (Some(register), Some(bits)) = (file.get_mut(index), bits.get(index)) {
        *register = value & bits;
    }
}

impl Registers {
    /// The DAC entry as 0x00RRGGBB.
    pub(super) fn color(&self, index: u8) -> u32 {
        let at = usize::from(index & self.dac_mask) * 3;
        let eight = self.dispi.dac_is_8_bit();
        let part = |offset: usize| {
            let value = self.dac.get(at + offset).copied().unwrap_or(0);
            u32::from(if eight { value } else { value << 2 | value >> 4 })
        };
        part(0) << 16 | part(1) << 8 | part(2)
    }

    /// The colour of one of the 16 attribute palette registers.
    pub(super) fn color16(&self, index: u8) -> u32 {
        let enabled = index & self.attribute[0x12] & 0xf;
        let palette = self.attribute.get(usize::from(enabled)).copied().unwrap_or(0);
        let select = self.attribute[0x14];
        self.color(if self.attribute[0x10] & 0x80 != 0 {
            select << 4 | palette & 0xf
        } else {
            (select & 0xc) << 4 | palette & 0x3f
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_retrace_comes_with_each_frame_and_is_never_missed() {
        let at = |us: u64| Duration::from_micros(us);
        let retrace = |beam: &mut Beam, us: u64| beam.status(at(us)) & VERTICAL_RETRACE != 0;
        let mut beam = Beam::default();
        let seen: Vec<u64> = (0..4 * FRAME_US).step_by(10).filter(|us| retrace(&mut beam, *us)).collect();
        assert!(seen.iter().all(|us| us % FRAME_US >= FRAME_US - RETRACE_US));
        assert_eq!(seen.chunk_by(|a, b| b - a == 10).count(), 4, "once a frame");

        let mut beam = Beam::default();
        assert!(!retrace(&mut beam, 0));
        assert!(retrace(&mut beam, FRAME_US + 1), "late");
        assert!(!retrace(&mut beam, FRAME_US + 2), "once");
        assert!(retrace(&mut beam, 9 * FRAME_US), "one for many");
        assert!(!retrace(&mut beam, 9 * FRAME_US + 1));
        assert!(retrace(&mut beam, 10 * FRAME_US - 1));
        assert!(!retrace(&mut beam, 10 * FRAME_US), "seen in time, so not told again");
    }

    #[test]
    fn lines_end_at_every_other_read_and_a_retrace_is_blank() {
        let mut beam = Beam::default();
        let seen: Vec<u8> = (0..6).map(|us| beam.status(Duration::from_micros(us))).collect();
        assert_eq!(seen, [1, 0, 1, 0, 1, 0]);
        let end = Duration::from_micros(FRAME_US - 1);
        assert_eq!([beam.status(end), beam.status(end)], [9, 9]);
    }
}
