//! The saved state of all devices, by their names in the machine.

use std::sync::PoisonError;

use super::{Devices, lock};
use crate::engine::{
    saved::{BadState, SaveState, State},
    suspend::States,
};

impl Devices {
    /// The state of every part, by name. Everything is held.
    pub fn save(&self) -> States {
        let mut states: States = Vec::new();
        self.each_fixed(&mut |name, part| {
            states.push((name.to_owned(), part.save()));
            Ok(())
        })
        .expect("saving refuses nothing");
        states.extend(self.pci.lock().unwrap_or_else(PoisonError::into_inner).save());
        states.push(("scrollback".into(), self.hub.save()));
        states
    }

    /// Onto devices as after power on, held. `take` gives, and takes away, the state of a name.
    pub fn restore(&self, take: &mut dyn FnMut(&str) -> Result<State, BadState>) -> Result<(), BadState> {
        self.each_fixed(&mut |name, part| part.restore(&take(name)?))?;
        self.pci.lock().unwrap_or_else(PoisonError::into_inner).restore(take)?;
        self.hub.restore(&take("scrollback")?)
    }

    /// The parts that are not behind PCI.
    fn each_fixed(
        &self,
        visit: &mut dyn FnMut(&str, &mut dyn SaveState) -> Result<(), BadState>,
    ) -> Result<(), BadState> {
        visit("uart", &mut *lock(&self.uart))?;
        visit("i8042", &mut self.i8042.clone())?;
        visit("cmos", &mut self.cmos.clone())?;
        visit("pm", &mut self.pm.clone())?;
        visit("pci-hotplug", &mut self.hotplug.clone())?;
        // Before fw_cfg, which shows the id in a file.
        visit("generation", &mut self.generation.clone())?;
        visit("fw-cfg", &mut *lock(&self.fw_cfg))?;
        visit("system-control", &mut *lock(&self.system_control))?;
        visit("reset-control", &mut *lock(&self.reset_control))?;
        visit("debug-console", &mut *lock(&self.debug_console))?;
        visit("agent", &mut self.agent.clone())?;
        visit("panic-port", &mut *lock(&self.panic_port))?;
        if let Some(tpm) = &self.tpm {
            visit("tpm", &mut *lock(tpm))?;
        }
        match &self.flash {
            Some((_, flash)) => visit("flash", &mut *lock(flash)),
            None => Ok(()),
        }
    }
}
