//! The chipset: i440fx host bridge, PIIX3 ISA bridge with its PIRQ router, PIIX4 power management function.
//!
//! Shadow RAM is plain RAM here: PAM and SMRAM are latches that firmware writes and reads back. System management mode is
//! marked as set up at reset, so SeaBIOS does not look for it (PIIX4 DEVACTB, bit 25).

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    bus::{Access, BusFault, Effect, Width},
    irq::{IrqLine, SharedPin},
    pci::{BarSpec, CONFIG_BYTES, ConfigByte, PciFunction, PciIdentity},
    saved::{BadState, SaveState, State},
};

/// The subsystem that tells SeaBIOS that it runs on a machine with fw_cfg.
const SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);

/// A function without BARs: what all of the chipset is.
macro_rules! without_bars {
    () => {
        fn bars(&self) -> &[BarSpec] {
            &[]
        }
        fn bar_read(&mut self, _: u8, _: Access) -> Result<u64, BusFault> {
            Err(BusFault::NoRegister)
        }
        fn bar_write(&mut self, _: u8, _: Access, _: u64) -> Result<Effect, BusFault> {
            Err(BusFault::NoRegister)
        }
    };
}

fn latch(offset: u8, reset: u8) -> ConfigByte {
    ConfigByte { offset, reset, writable: 0xff }
}

/// 00:00.0, 82441FX.
pub struct HostBridge;

impl PciFunction for HostBridge {
    fn identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x8086,
            device: 0x1237,
            class: 0x060000,
            revision: 2,
            subsystem_vendor: SUBSYSTEM.0,
            subsystem: SUBSYSTEM.1,
            interrupt_pin: 0,
        }
    }
    /// PAM0 to PAM6 at 0x59, SMRAM at 0x72 (82441FX data sheet, 3.2).
    fn config_bytes(&self) -> Vec<ConfigByte> {
        (0x58..=0x5f).map(|at| latch(at, 0)).chain([latch(0x72, 2)]).collect()
    }
    without_bars!();
    fn reset(&mut self) {}
}

/// The sixteen ISA interrupts, each shared by whoever is routed to it.
#[derive(Clone)]
pub struct IsaPins(Arc<Vec<SharedPin>>);

impl IsaPins {
    /// `line` gives the interrupt controller's input of a number below 16.
    pub fn new(line: impl Fn(u32) -> IrqLine) -> IsaPins {
        IsaPins(Arc::new((0..16).map(|number| SharedPin::new(line(number))).collect()))
    }
    pub fn join(&self, number: u32) -> IrqLine {
        match self.0.get(number as usize) {
            Some(pin) => pin.join(),
            None => IrqLine::unconnected(),
        }
    }
}

/// PIRQ A to D, each leading to the ISA interrupt that PIIX3 configuration 0x60 to 0x63 names.
#[derive(Clone)]
pub struct PirqRouter(Arc<Vec<Mutex<Route>>>);

struct Route {
    asserters: u32,
    register: u8,
    target: IrqLine,
}

const PIRQ_OFF: u8 = 0x80;

impl Default for PirqRouter {
    /// Every PIRQ leads nowhere, as after reset.
    fn default() -> PirqRouter {
        let route = || Mutex::new(Route { asserters: 0, register: PIRQ_OFF, target: IrqLine::unconnected() });
        PirqRouter(Arc::new((0..4).map(|_| route()).collect()))
    }
}

impl PirqRouter {
    /// A line into PIRQ `index` (0 is A) for one device.
    pub fn join(&self, index: usize) -> IrqLine {
        let routes = Arc::clone(&self.0);
        let pin = SharedPin::new(IrqLine::new(move |high| {
            if let Some(route) = routes.get(index) {
                let mut route = route.lock().unwrap_or_else(PoisonError::into_inner);
                let before = route.asserters > 0;
                route.asserters = if high { route.asserters + 1 } else { route.asserters.saturating_sub(1) };
                if before != (route.asserters > 0) {
                    route.target.set(route.asserters > 0);
                }
            }
        }));
        pin.join()
    }

    fn registers(&self) -> [u8; 4] {
        let mut registers = [PIRQ_OFF; 4];
        for (register, route) in registers.iter_mut().zip(self.0.iter()) {
            *register = route.lock().unwrap_or_else(PoisonError::into_inner).register;
        }
        registers
    }

    fn set(&self, registers: [u8; 4], isa: &IsaPins) {
        for (route, register) in self.0.iter().zip(registers) {
            let mut route = route.lock().unwrap_or_else(PoisonError::into_inner);
            if route.register == register {
                continue;
            }
            let high = route.asserters > 0;
            if high {
                route.target.set(false);
            }
            route.register = register;
            route.target =
                if register & PIRQ_OFF != 0 { IrqLine::unconnected() } else { isa.join(u32::from(register & 15)) };
            if high {
                route.target.set(true);
            }
        }
    }
}

/// 00:01.0, PIIX3: ISA bridge and PIRQ router.
pub struct Piix3 {
    pub router: PirqRouter,
    pub isa: IsaPins,
}

impl PciFunction for Piix3 {
    fn identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x8086,
            device: 0x7000,
            class: 0x060100,
            revision: 0,
            subsystem_vendor: SUBSYSTEM.0,
            subsystem: SUBSYSTEM.1,
            interrupt_pin: 0,
        }
    }
    fn config_bytes(&self) -> Vec<ConfigByte> {
        let pirq = (0x60..=0x63).map(|at| latch(at, PIRQ_OFF));
        pirq.chain((0x4c..=0x4f).chain(0x69..=0x6b).chain(0x80..=0x83).map(|at| latch(at, 0))).collect()
    }
    fn config_written(&mut self, config: &[u8; CONFIG_BYTES], _: u8, _: Width) {
        self.router.set([config[0x60], config[0x61], config[0x62], config[0x63]], &self.isa);
    }
    without_bars!();
    fn reset(&mut self) {}
}

/// 00:01.3, PIIX4: where the power management ports are.
pub struct Piix4Pm {
    place: Box<dyn FnMut(Option<u16>) + Send>,
    at: Option<u16>,
}

const PMBA: usize = 0x40;
/// The base's bits; the block has 64 ports.
const PMBA_BITS: u16 = 0xffc0;
const PMREGMISC: usize = 0x80;

impl Piix4Pm {
    /// `place` moves the PM block to a port, or takes it away.
    pub fn new(place: impl FnMut(Option<u16>) + Send + 'static) -> Piix4Pm {
        Piix4Pm { place: Box::new(place), at: None }
    }

    fn move_to(&mut self, at: Option<u16>) {
        if at != self.at {
            self.at = at;
            (self.place)(at);
        }
    }
}

impl PciFunction for Piix4Pm {
    fn identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x8086,
            device: 0x7113,
            class: 0x068000,
            revision: 3,
            subsystem_vendor: SUBSYSTEM.0,
            subsystem: SUBSYSTEM.1,
            interrupt_pin: 1,
        }
    }
    fn config_bytes(&self) -> Vec<ConfigByte> {
        let base = [
            ConfigByte { offset: 0x40, reset: 1, writable: 0xc0 },
            ConfigByte { offset: 0x41, reset: 0, writable: 0xff },
            ConfigByte { offset: 0x5b, reset: 2, writable: 0xff },
            ConfigByte { offset: 0x90, reset: 1, writable: 0xf0 },
            ConfigByte { offset: 0x91, reset: 0, writable: 0xff },
        ];
        base.into_iter().chain([0x58, 0x59, 0x5a, 0x80, 0xd2].map(|at| latch(at, 0))).collect()
    }
    fn config_written(&mut self, config: &[u8; CONFIG_BYTES], _: u8, _: Width) {
        let base = u16::from_le_bytes([config[PMBA], config[PMBA + 1]]) & PMBA_BITS;
        let now = (config[PMREGMISC] & 1 != 0 && base != 0).then_some(base);
        self.move_to(now);
    }
    without_bars!();
    fn reset(&mut self) {}
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const HOST_BRIDGE: &str = "host-bridge";
    pub(super) const PIIX3: &str = "piix3";
    pub(super) const PIIX4_PM: &str = "piix4-pm";

    /// The latches are in configuration space, which is saved with it; so are these, but routes and places must not depend on
    /// which of the two is restored first.
    #[derive(Serialize, Deserialize)]
    pub(super) struct Piix3V1 {
        /// The routes of PIRQ A to D.
        pub(super) pirq: [u8; 4],
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct Piix4PmV1 {
        pub(super) at: Option<u16>,
    }
}

impl SaveState for HostBridge {
    fn save(&self) -> State {
        let HostBridge = self;
        State::nothing(saved::HOST_BRIDGE)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        state.expect_nothing(saved::HOST_BRIDGE)
    }
}

impl SaveState for Piix3 {
    fn save(&self) -> State {
        let Piix3 { router, isa: _ } = self;
        State::new(saved::PIIX3, 1, &saved::Piix3V1 { pirq: router.registers() })
    }

    /// A pin that a device holds high already goes where it leads now.
    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::Piix3V1 { pirq } = state.fields(saved::PIIX3, 1)?;
        self.router.set(pirq, &self.isa);
        Ok(())
    }
}

impl SaveState for Piix4Pm {
    fn save(&self) -> State {
        let Piix4Pm { place: _, at } = self;
        State::new(saved::PIIX4_PM, 1, &saved::Piix4PmV1 { at: *at })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::Piix4PmV1 { at } = state.fields(saved::PIIX4_PM, 1)?;
        let good = at.is_none_or(|base| base != 0 && base & !PMBA_BITS == 0);
        BadState::unless(good, saved::PIIX4_PM, "the PM block cannot be at such a port")?;
        self.move_to(at);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::saved::testing;

    #[test]
    fn an_asserted_pirq_follows_its_route() {
        let levels: Arc<Mutex<Vec<(u32, bool)>>> = Arc::default();
        let sink = Arc::clone(&levels);
        let isa = IsaPins::new(move |number| {
            let sink = Arc::clone(&sink);
            IrqLine::new(move |high| sink.lock().unwrap().push((number, high)))
        });
        let router = PirqRouter::default();
        let mut piix = Piix3 { router: router.clone(), isa };
        let mut config = [0u8; CONFIG_BYTES];
        let (first, second) = (router.join(0), router.join(0));
        first.set(true);
        second.set(true);
        config[0x60..0x64].copy_from_slice(&[10, 10, 11, 11]);
        piix.config_written(&config, 0x60, Width::B4);
        router.join(1).set(true);
        config[0x60] = 5;
        piix.config_written(&config, 0x60, Width::B1);
        first.set(false);
        second.set(false);
        config[0x60] = 0x80;
        piix.config_written(&config, 0x60, Width::B1);
        // IRQ 10 stays high for PIRQ B when PIRQ A leaves it.
        assert_eq!(*levels.lock().unwrap(), [(10, true), (5, true), (5, false)]);
    }

    #[test]
    fn the_pm_block_is_placed_when_base_and_enable_are_set() {
        let places: Arc<Mutex<Vec<Option<u16>>>> = Arc::default();
        let sink = Arc::clone(&places);
        let mut pm = Piix4Pm::new(move |at| sink.lock().unwrap().push(at));
        let mut config = [0u8; CONFIG_BYTES];
        config[0x40..0x42].copy_from_slice(&0x0601u16.to_le_bytes());
        pm.config_written(&config, 0x40, Width::B4);
        config[0x80] = 1;
        pm.config_written(&config, 0x80, Width::B1);
        pm.config_written(&config, 0x80, Width::B1);
        config[0x41] = 0xb0;
        config[0x40] = 1;
        pm.config_written(&config, 0x40, Width::B4);
        config[0x80] = 0;
        pm.config_written(&config, 0x80, Width::B1);
        assert_eq!(*places.lock().unwrap(), [Some(0x600), Some(0xb000), None]);
    }

    #[test]
    fn restored_routes_lead_a_pin_that_is_high_where_it_led() {
        let wired = || {
            let levels: Arc<Mutex<Vec<(u32, bool)>>> = Arc::default();
            let sink = Arc::clone(&levels);
            let isa = IsaPins::new(move |number| {
                let sink = Arc::clone(&sink);
                IrqLine::new(move |high| sink.lock().unwrap().push((number, high)))
            });
            (Piix3 { router: PirqRouter::default(), isa }, levels)
        };
        let mut config = [0u8; CONFIG_BYTES];
        config[0x60..0x64].copy_from_slice(&[10, 11, PIRQ_OFF, 5]);
        let (mut first, _) = wired();
        first.config_written(&config, 0x60, Width::B4);
        let state = testing::matches_golden(&first.save());
        for (before, after) in [(true, false), (false, true)] {
            let (mut second, levels) = wired();
            let pin = second.router.join(1);
            pin.set(before);
            second.restore(&state).unwrap();
            second.config_written(&config, 0x60, Width::B4);
            if after {
                pin.set(true);
            }
            assert_eq!(*levels.lock().unwrap(), [(11, true)]);
        }
        testing::spoil(&state, |bad| {
            let (mut piix, _) = wired();
            let pins: Vec<_> = (0..4).map(|index| piix.router.join(index)).collect();
            pins.iter().for_each(|pin| pin.set(true));
            let _ = piix.restore(bad);
            pins.iter().for_each(|pin| pin.set(false));
        });
        let bridge = testing::matches_golden(&HostBridge.save());
        HostBridge.restore(&bridge).unwrap();
        testing::spoil(&bridge, |bad| drop(HostBridge.restore(bad)));
    }

    #[test]
    fn a_restored_pm_block_is_where_it_was() {
        let placed = || {
            let places: Arc<Mutex<Vec<Option<u16>>>> = Arc::default();
            let sink = Arc::clone(&places);
            (Piix4Pm::new(move |at| sink.lock().unwrap().push(at)), places)
        };
        let mut config = [0u8; CONFIG_BYTES];
        config[0x40..0x42].copy_from_slice(&0xb001u16.to_le_bytes());
        config[0x80] = 1;
        let (mut first, _) = placed();
        first.config_written(&config, 0x40, Width::B4);
        let state = testing::matches_golden(&first.save());
        let (mut second, places) = placed();
        second.restore(&state).unwrap();
        second.config_written(&config, 0x40, Width::B4);
        assert_eq!(*places.lock().unwrap(), [Some(0xb000)], "once, whoever is first");
        testing::spoil(&state, |bad| {
            let (mut pm, places) = placed();
            let _ = pm.restore(bad);
            assert!(places.lock().unwrap().iter().flatten().all(|at| at % 64 == 0 && *at != 0));
        });
    }
}
