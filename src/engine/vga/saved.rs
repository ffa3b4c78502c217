//! What of the display device is saved: every register. Video memory is saved by the machine, as RAM is.

use serde::{Deserialize, Serialize};

use super::{
    VRAM_BYTES, Vga, VgaFunction,
    dispi::{Dispi, HEIGHT_MAX, ID_FIRST, ID_LAST, VIRTUAL_WIDTH_MAX, WIDTH_MAX},
    lock,
    registers::{DAC_COMPONENTS, GRAPHICS_BITS, Ports, Registers, SEQUENCER_BITS},
};
use crate::engine::saved::{BadState, SaveState, State, hex};

const KIND: &str = "vga";

#[derive(Serialize, Deserialize)]
struct V1 {
    misc: u8,
    sequencer: [u8; 5],
    #[serde(with = "hex")]
    crtc: Vec<u8>,
    graphics: [u8; 9],
    #[serde(with = "hex")]
    attribute: Vec<u8>,
    palette_on: bool,
    #[serde(with = "hex")]
    dac: Vec<u8>,
    dac_mask: u8,
    dispi: DispiV1,
    dispi_index: u16,
    ports: PortsV1,
    latches: u32,
}

/// The registers of the Bochs display interface.
#[derive(Serialize, Deserialize)]
pub(super) struct DispiV1 {
    pub(super) id: u16,
    pub(super) width: u16,
    pub(super) height: u16,
    pub(super) bits_per_pixel: u16,
    pub(super) enable: u16,
    pub(super) bank: u16,
    pub(super) virtual_width: u16,
    pub(super) x_offset: u16,
    pub(super) y_offset: u16,
}

/// Index registers and flip-flops.
#[derive(Serialize, Deserialize)]
pub(super) struct PortsV1 {
    pub(super) sequencer_index: u8,
    pub(super) crtc_index: u8,
    pub(super) graphics_index: u8,
    pub(super) attribute_index: u8,
    pub(super) attribute_data_next: bool,
    pub(super) dac_read_at: u8,
    pub(super) dac_write_at: u8,
    pub(super) dac_component: u8,
    pub(super) dac_last_was_read: bool,
    pub(super) feature: u8,
    pub(super) enabled: u8,
}

/// The registers that the screen shows, checked.
fn checked_registers(fields: &V1) -> Result<Registers, &'static str> {
    let mut sequencer = fields.sequencer;
    let mut graphics = fields.graphics;
    let masks = SEQUENCER_BITS.iter().chain(&GRAPHICS_BITS);
    for (register, bits) in sequencer.iter_mut().chain(&mut graphics).zip(masks) {
        *register &= bits;
    }
    Ok(Registers {
        misc: fields.misc & !0x10,
        sequencer,
        crtc: fields.crtc.as_slice().try_into().map_err(|_| "the CRT controller has 25 registers")?,
        graphics,
        attribute: fields.attribute.as_slice().try_into().map_err(|_| "the attribute controller has 21 registers")?,
        palette_on: fields.palette_on,
        dac: fields.dac.as_slice().try_into().map_err(|_| "the DAC has 256 colours")?,
        dac_mask: fields.dac_mask,
        dispi: Dispi::restored(&fields.dispi)?,
    })
}

impl Dispi {
    /// What the guest could have set, or what is wrong with it.
    fn restored(fields: &DispiV1) -> Result<Dispi, &'static str> {
        if fields.width > WIDTH_MAX || fields.height > HEIGHT_MAX || fields.virtual_width > VIRTUAL_WIDTH_MAX {
            return Err("there is no mode of that size");
        }
        if !(ID_FIRST..=ID_LAST).contains(&fields.id) || fields.bits_per_pixel == 0 {
            return Err("the display interface never has such registers");
        }
        Ok(Dispi::from_saved(fields))
    }
}

impl Ports {
    fn check(fields: &PortsV1) -> Result<(), &'static str> {
        if fields.dac_component >= DAC_COMPONENTS {
            return Err("a colour has three components");
        }
        Ok(())
    }
}

impl SaveState for Vga {
    fn save(&self) -> State {
        // The machine saves video memory, and after a restore all of it is drawn.
        let Vga { registers, ports, dispi_index, latches, vram: _, dirty: _ } = self;
        let Registers { misc, sequencer, crtc, graphics, attribute, palette_on, dac, dac_mask, dispi } = registers;
        let fields = V1 {
            misc: *misc,
            sequencer: *sequencer,
            crtc: crtc.to_vec(),
            graphics: *graphics,
            attribute: attribute.to_vec(),
            palette_on: *palette_on,
            dac: dac.to_vec(),
            dac_mask: *dac_mask,
            dispi: dispi.save(),
            dispi_index: *dispi_index,
            ports: ports.save(),
            latches: *latches,
        };
        State::new(KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let fields: V1 = state.fields(KIND, 1)?;
        let bad = |why: &'static str| BadState::new(KIND, why);
        let registers = checked_registers(&fields).map_err(bad)?;
        Ports::check(&fields.ports).map_err(bad)?;
        self.registers = registers;
        self.ports = Ports::from_saved(&fields.ports);
        self.dispi_index = fields.dispi_index;
        self.latches = fields.latches;
        self.vram_changed(VRAM_BYTES);
        Ok(())
    }
}

/// The device behind the function.
impl SaveState for VgaFunction {
    fn save(&self) -> State {
        let VgaFunction { vga, edid: _ } = self;
        lock(vga).save()
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        lock(&self.vga).restore(state)
    }
}
