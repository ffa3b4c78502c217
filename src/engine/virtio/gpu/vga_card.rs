//! The graphics card as a guest has it: one PCI function that is a VGA, for firmware and systems without a driver, and the virtio card
//! that a driver takes over (QEMU's `virtio-vga`). Two functions would be two cards and two screens to a desktop.
//!
//! ```text
//! BAR 0  video memory, as the VGA's      BAR 2  the VGA's registers
//! BAR 1  MSI-X                           BAR 4  virtio's registers
//! ```

use super::Gpu;
use crate::engine::{
    bus::{Access, BusFault, Effect, Width},
    pci::{BarSpec, CONFIG_BYTES, Capability, ConfigByte, Doorbell, PciFunction, PciIdentity},
    saved::{BadState, SaveState, State},
    vga::VgaFunction,
    virtio::pci::VirtioPci,
};

/// A VGA-compatible display controller (PCI Code and ID Assignment 1.11, 1.4).
const CLASS_VGA: u32 = 0x03_0000;

pub struct VgaCard {
    vga: VgaFunction,
    virtio: VirtioPci<Gpu>,
    bars: Vec<BarSpec>,
}

impl VgaCard {
    pub fn new(vga: VgaFunction, virtio: VirtioPci<Gpu>) -> VgaCard {
        let bars = vga.bars().iter().chain(virtio.bars()).copied().collect();
        VgaCard { vga, virtio, bars }
    }

    fn is_of_vga(&self, bar: u8) -> bool {
        self.vga.bars().iter().any(|of_vga| of_vga.index == bar)
    }
}

impl PciFunction for VgaCard {
    fn identity(&self) -> PciIdentity {
        PciIdentity { class: CLASS_VGA, ..self.virtio.identity() }
    }

    fn bars(&self) -> &[BarSpec] {
        &self.bars
    }

    fn capabilities(&self) -> Vec<Capability> {
        self.virtio.capabilities()
    }

    fn config_bytes(&self) -> Vec<ConfigByte> {
        self.virtio.config_bytes()
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        self.virtio.doorbells()
    }

    fn config_read(&mut self, config: &[u8; CONFIG_BYTES], offset: u8, width: Width) -> Option<u64> {
        self.virtio.config_read(config, offset, width)
    }

    fn config_written(&mut self, config: &[u8; CONFIG_BYTES], offset: u8, width: Width) {
        self.virtio.config_written(config, offset, width);
    }

    fn bar_read(&mut self, bar: u8, at: Access) -> Result<u64, BusFault> {
        if self.is_of_vga(bar) { self.vga.bar_read(bar, at) } else { self.virtio.bar_read(bar, at) }
    }

    fn bar_write(&mut self, bar: u8, at: Access, value: u64) -> Result<Effect, BusFault> {
        if self.is_of_vga(bar) { self.vga.bar_write(bar, at, value) } else { self.virtio.bar_write(bar, at, value) }
    }

    fn reset(&mut self) {
        self.vga.reset();
        self.virtio.reset();
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use super::State;

    pub(super) const KIND: &str = "virtio-vga";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) vga: Part,
        pub(super) virtio: Part,
    }

    /// The state of one of the two.
    #[derive(Serialize, Deserialize)]
    pub(super) struct Part {
        kind: String,
        version: u32,
        fields: serde_json::Value,
    }

    impl Part {
        pub(super) fn of(state: &State) -> Part {
            let fields = serde_json::from_slice(&state.bytes).expect("saved states are JSON");
            Part { kind: state.kind.clone(), version: state.version, fields }
        }

        pub(super) fn state(&self) -> State {
            State::new(&self.kind, self.version, &self.fields)
        }
    }
}

impl SaveState for VgaCard {
    fn save(&self) -> State {
        let [vga, virtio] = [self.vga.save(), self.virtio.save()].map(|state| saved::Part::of(&state));
        State::new(saved::KIND, 1, &saved::V1 { vga, virtio })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { vga, virtio } = state.fields(saved::KIND, 1)?;
        self.vga.restore(&vga.state())?;
        self.virtio.restore(&virtio.state())
    }
}
