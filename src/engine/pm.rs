//! ACPI fixed hardware as the PIIX4 has it: power management events and control, the PM timer, and general-purpose events.
//!
//! There is no legacy mode: the FADT names no SMI command port, so SCI_EN is always one (ACPI 6.5, 4.8.2.5).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{
    bus::{Access, BusDevice, BusFault, Effect, SharedDevice, Width},
    irq::IrqLine,
    saved::{BadState, SaveState, State},
    timer::{Alarm, AlarmBell, Clock},
};

/// How many ports the block behind PMBASE has.
pub const PM_BYTES: u64 = 64;
/// The PM timer's frequency (ACPI 6.5, 4.8.2.1).
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// What `\_S5` says, and what both firmwares write to turn the machine off.
pub const SLEEP_TYPE_SOFT_OFF: u16 = 0;

/// The power management block. Cloning gives another handle on the same registers.
#[derive(Clone)]
pub struct PmBlock {
    registers: Arc<Mutex<Registers>>,
    _overflow: Arc<Alarm>,
}

/// Offsets behind PMBASE (82371AB data sheet, 7.2).
mod pm1 {
    pub(super) const STS: u64 = 0;
    pub(super) const EN: u64 = 2;
    pub(super) const CNT: u64 = 4;
    pub(super) const TMR: u64 = 8;
}

const TMR_STS: u16 = 1 << 0;
const GBL_STS: u16 = 1 << 5;
const PWRBTN_STS: u16 = 1 << 8;
const RTC_STS: u16 = 1 << 10;
/// Status bits that have an enable bit in the same place.
const EVENTS: u16 = TMR_STS | GBL_STS | PWRBTN_STS | RTC_STS;

const SCI_EN: u16 = 1 << 0;
const SLP_TYP_SHIFT: u16 = 10;
const SLP_TYP: u16 = 7 << SLP_TYP_SHIFT;
const SLP_EN: u16 = 1 << 13;
/// BM_RLD and the sleep type are kept; GBL_RLS and SLP_EN read as zero.
const CNT_KEPT: u16 = 1 << 1 | SLP_TYP;

/// The timer has 24 bits; `TMR_STS` is set whenever the highest of them changes.
const TIMER_MASK: u64 = 0xff_ffff;
const TIMER_HALF: u64 = 0x80_0000;

struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    /// Half turns of the timer that `status` already knows of.
    half_turns_seen: u64,
    /// What the timer showed more than `clock` says when the machine was restored; modulo 2^64, as all ticks are.
    ticks_ahead: u64,
    clock: Clock,
    sci: IrqLine,
    bell: AlarmBell,
}

impl PmBlock {
    /// Errors: no thread can be started.
    pub fn new(sci: IrqLine, clock: Clock) -> std::io::Result<PmBlock> {
        let bell = AlarmBell::new();
        let registers = Arc::new(Mutex::new(Registers {
            status: 0,
            enable: 0,
            control: SCI_EN,
            gpe_status: 0,
            gpe_enable: 0,
            half_turns_seen: 0,
            ticks_ahead: 0,
            clock,
            sci,
            bell: bell.clone(),
        }));
        let watched: Weak<Mutex<Registers>> = Arc::downgrade(&registers);
        let overflow = Alarm::start("pm-timer", bell, move || lock(&*watched.upgrade()?).overflow())?;
        Ok(PmBlock { registers, _overflow: Arc::new(overflow) })
    }

    /// The block behind PMBASE, `PM_BYTES` ports. The chipset maps it where the firmware wants it.
    pub fn registers(&self) -> SharedDevice {
        Arc::new(Mutex::new(PmPorts(self.clone())))
    }

    /// The general-purpose event block, `layout::GPE0`.
    pub fn gpe0(&self) -> SharedDevice {
        Arc::new(Mutex::new(GpePorts(self.clone())))
    }

    /// A person pressed the power button. Called by the control thread.
    pub fn press_power_button(&self) {
        let mut registers = lock(&self.registers);
        registers.status |= PWRBTN_STS;
        registers.sync_sci();
    }

    /// Whether the guest listens to the power button, so that a shutdown request has a chance.
    pub fn power_button_heard(&self) -> bool {
        lock(&self.registers).enable & PWRBTN_STS != 0
    }

    /// General-purpose event `number`, 0 to 15, has happened. Called by any thread.
    pub fn raise_gpe(&self, number: u8) {
        assert!(number < 16, "the block has sixteen events");
        let mut registers = lock(&self.registers);
        registers.gpe_status |= 1 << number;
        registers.sync_sci();
    }

    /// Back to the state after power on. The timer counts on.
    pub fn reset(&self) {
        let mut registers = lock(&self.registers);
        registers.status = 0;
        registers.enable = 0;
        registers.control = SCI_EN;
        registers.gpe_status = 0;
        registers.gpe_enable = 0;
        registers.sync_sci();
    }
}

fn lock(registers: &Mutex<Registers>) -> MutexGuard<'_, Registers> {
    registers.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registers {
    /// Ticks of the timer since its start, not cut to 24 bits.
    fn ticks(&self) -> u64 {
        let ticks = u128::from(self.clock.now_ns()) * u128::from(PM_TIMER_HZ) / 1_000_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX).wrapping_add(self.ticks_ahead)
    }

    /// Sets TMR_STS when the highest bit of the timer has changed since the last look.
    fn look_at_timer(&mut self) {
        let half_turns = self.ticks() / TIMER_HALF;
        if half_turns != self.half_turns_seen {
            self.half_turns_seen = half_turns;
            self.status |= TMR_STS;
        }
    }

    fn sync_sci(&self) {
        let fixed = self.status & self.enable & EVENTS != 0;
        self.sci.set(fixed || self.gpe_status & self.gpe_enable != 0);
    }

    /// The alarm's work: nanoseconds to the next half turn while the guest wants to hear of it and has not yet.
    fn overflow(&mut self) -> Option<u64> {
        self.look_at_timer();
        self.sync_sci();
        if self.enable & TMR_STS == 0 || self.status & TMR_STS != 0 {
            return None;
        }
        let left = TIMER_HALF - self.ticks() % TIMER_HALF;
        Some((left + 1) * 1_000_000_000 / PM_TIMER_HZ)
    }

    fn write_status(&mut self, ones: u16) {
        self.look_at_timer();
        self.status &= !ones; // write one to clear
        self.sync_sci();
        if ones & TMR_STS != 0 && self.enable & TMR_STS != 0 {
            self.bell.ring();
        }
    }

    fn write_enable(&mut self, value: u16) {
        self.look_at_timer();
        let before = self.enable;
        self.enable = value & EVENTS;
        self.sync_sci();
        if self.enable & !before & TMR_STS != 0 {
            self.bell.ring();
        }
    }

    fn write_control(&mut self, value: u16) -> Effect {
        self.control = value & CNT_KEPT | SCI_EN;
        let soft_off = value & SLP_TYP == SLEEP_TYPE_SOFT_OFF << SLP_TYP_SHIFT;
        // Other sleep types are not in our tables; a guest that tries them stays awake.
        if value & SLP_EN != 0 && soft_off { Effect::PowerOff } else { Effect::None }
    }
}

struct PmPorts(PmBlock);

impl BusDevice for PmPorts {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        let mut registers = lock(&self.0.registers);
        if at.offset & !3 == pm1::TMR {
            return Ok((registers.ticks() & TIMER_MASK) >> (8 * (at.offset & 3)));
        }
        registers.look_at_timer();
        let words =
            u64::from(registers.status) | u64::from(registers.enable) << 16 | u64::from(registers.control) << 32;
        Ok(if at.offset < 8 { words >> (8 * at.offset) } else { 0 })
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let mut registers = lock(&self.0.registers);
        match (at.offset, at.width) {
            (pm1::STS, Width::B2) => registers.write_status(value as u16),
            (pm1::STS, Width::B4) => {
                registers.write_enable((value >> 16) as u16);
                registers.write_status(value as u16);
            }
            (pm1::STS, Width::B1) => registers.write_status(value as u16 & 0xff),
            (1, Width::B1) => registers.write_status((value as u16) << 8),
            (pm1::EN, Width::B2) => registers.write_enable(value as u16),
            (pm1::EN, Width::B1) => {
                let merged = registers.enable & 0xff00 | value as u16 & 0xff;
                registers.write_enable(merged);
            }
            (3, Width::B1) => {
                let merged = registers.enable & 0x00ff | (value as u16) << 8;
                registers.write_enable(merged);
            }
            (pm1::CNT, Width::B2 | Width::B4) => return Ok(registers.write_control(value as u16)),
            (pm1::CNT, Width::B1) => {
                let merged = registers.control & 0xff00 | value as u16 & 0xff;
                return Ok(registers.write_control(merged));
            }
            (5, Width::B1) => {
                let merged = registers.control & 0x00ff | (value as u16) << 8;
                return Ok(registers.write_control(merged));
            }
            (pm1::STS..=5, _) => return Err(BusFault::BadWidth),
            // The rest of the PIIX4's block (global status, processor control) is not there; writes are of no consequence.
            _ => {}
        }
        Ok(Effect::None)
    }
}

/// GPE0: two bytes of status, two of enable (ACPI 6.5, 4.8.4.1).
struct GpePorts(PmBlock);

impl BusDevice for GpePorts {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        let registers = lock(&self.0.registers);
        let words = u64::from(registers.gpe_status) | u64::from(registers.gpe_enable) << 16;
        Ok(if at.offset < 4 { words >> (8 * at.offset) } else { 0 })
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let mut registers = lock(&self.0.registers);
        if at.offset >= 4 {
            return Err(BusFault::NoRegister);
        }
        let shift = 8 * at.offset;
        let touched = (at.width.mask() << shift) as u32;
        let written = (value << shift) as u32 & touched;
        registers.gpe_status &= !(written as u16);
        let (touched, written) = ((touched >> 16) as u16, (written >> 16) as u16);
        registers.gpe_enable = registers.gpe_enable & !touched | written;
        registers.sync_sci();
        Ok(Effect::None)
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const KIND: &str = "pm";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) status: u16,
        pub(super) enable: u16,
        pub(super) control: u16,
        pub(super) gpe_status: u16,
        pub(super) gpe_enable: u16,
        /// Its 24 bits.
        pub(super) timer: u32,
    }
}

impl SaveState for PmBlock {
    fn save(&self) -> State {
        let mut registers = lock(&self.registers);
        // A half turn that nobody has noticed yet becomes its status bit, so that the timer's value is all there is to keep.
        registers.look_at_timer();
        let timer = (registers.ticks() & TIMER_MASK) as u32;
        let Registers {
            status,
            enable,
            control,
            gpe_status,
            gpe_enable,
            half_turns_seen: _,
            ticks_ahead: _,
            clock: _,
            sci: _,
            bell: _,
        } = &*registers;
        let fields = saved::V1 {
            status: *status,
            enable: *enable,
            control: *control,
            gpe_status: *gpe_status,
            gpe_enable: *gpe_enable,
            timer,
        };
        State::new(saved::KIND, 1, &fields)
    }

    /// The timer goes on from the value it had: the guest slept without knowing.
    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let fields: saved::V1 = state.fields(saved::KIND, 1)?;
        let good = |good: bool, what: &str| BadState::unless(good, saved::KIND, what);
        good(u64::from(fields.timer) <= TIMER_MASK, "the timer has more than 24 bits")?;
        good(fields.status & !EVENTS == 0, "an event that is none")?;
        let mut registers = lock(&self.registers);
        registers.status = fields.status;
        registers.enable = fields.enable & EVENTS;
        registers.control = fields.control & CNT_KEPT | SCI_EN;
        registers.gpe_status = fields.gpe_status;
        registers.gpe_enable = fields.gpe_enable;
        registers.ticks_ahead = 0;
        registers.ticks_ahead = u64::from(fields.timer).wrapping_sub(registers.ticks());
        registers.half_turns_seen = registers.ticks() / TIMER_HALF;
        registers.sync_sci();
        registers.bell.ring();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::{Duration, Instant},
    };

    use super::*;
    use crate::engine::{
        irq::tests::recorder,
        saved::testing::{matches_golden, spoil},
        timer::tests::hand_clock,
    };

    struct Rig {
        pm: PmBlock,
        ports: SharedDevice,
        gpe: SharedDevice,
        levels: Arc<Mutex<Vec<bool>>>,
        hand: Arc<AtomicU64>,
    }

    fn rig() -> Rig {
        let (line, levels) = recorder();
        let (clock, hand) = hand_clock(0);
        let pm = PmBlock::new(line, clock).unwrap();
        Rig { ports: pm.registers(), gpe: pm.gpe0(), pm, levels, hand }
    }

    impl Rig {
        fn read(&self, offset: u64, width: Width) -> u64 {
            self.ports.lock().unwrap().read(Access::new(offset, width)).unwrap() & width.mask()
        }
        fn write(&self, offset: u64, width: Width, value: u64) -> Effect {
            self.ports.lock().unwrap().write(Access::new(offset, width), value).unwrap()
        }
        fn sci(&self) -> bool {
            self.levels.lock().unwrap().last().copied().unwrap_or(false)
        }
    }

    #[test]
    fn the_power_button_raises_the_sci_until_its_status_is_cleared() {
        let rig = rig();
        rig.pm.press_power_button();
        assert!(!rig.sci(), "not enabled yet");
        assert_eq!(rig.read(0, Width::B2), 0x100);
        assert!(!rig.pm.power_button_heard());
        rig.write(2, Width::B2, 0x120);
        assert!(rig.sci() && rig.pm.power_button_heard());
        rig.write(0, Width::B2, 0x20);
        assert!(rig.sci(), "another bit was cleared");
        rig.write(1, Width::B1, 0x01);
        assert!(!rig.sci());
        assert_eq!(rig.read(0, Width::B4), 0x120 << 16);
    }

    #[test]
    fn soft_off_powers_off_and_other_sleep_types_do_not() {
        let rig = rig();
        assert_eq!(rig.read(4, Width::B2), 1, "ACPI mode from the start");
        assert_eq!(rig.write(4, Width::B2, 0x0401), Effect::None);
        assert_eq!(rig.write(4, Width::B2, 0x2401), Effect::None, "S3 is not offered");
        assert_eq!(rig.write(4, Width::B2, 0x2000), Effect::PowerOff);
        assert_eq!(rig.read(4, Width::B2), 1, "SLP_EN reads as zero, SCI_EN as one");
        assert_eq!(rig.write(5, Width::B1, 0x20), Effect::PowerOff);
    }

    #[test]
    fn the_timer_counts_24_bits_at_its_frequency() {
        let rig = rig();
        rig.hand.store(1_000_000_000, Ordering::SeqCst);
        assert_eq!(rig.read(8, Width::B4), PM_TIMER_HZ);
        assert_eq!(rig.read(9, Width::B1), PM_TIMER_HZ >> 8 & 0xff);
        rig.hand.store(5_000_000_000, Ordering::SeqCst);
        assert_eq!(rig.read(8, Width::B4), (5 * PM_TIMER_HZ) & 0xff_ffff);
        assert_eq!(rig.read(0, Width::B2) & 1, 1, "the highest bit changed");
        rig.write(0, Width::B2, 1);
        assert_eq!(rig.read(0, Width::B2) & 1, 0);
        rig.hand.store(u64::MAX, Ordering::SeqCst);
        rig.read(8, Width::B4);
    }

    #[test]
    fn a_half_turn_of_the_timer_raises_the_sci_when_enabled() {
        let rig = rig();
        rig.write(2, Width::B2, 1);
        assert!(!rig.sci());
        rig.hand.store(3_000_000_000, Ordering::SeqCst);
        // The hand clock jumped; ring as the guest's next write would, then the alarm thread sees the half turn.
        rig.pm.registers.lock().unwrap().bell.ring();
        let deadline = Instant::now() + Duration::from_secs(5);
        while !rig.sci() {
            assert!(Instant::now() < deadline, "no SCI");
            std::thread::yield_now();
        }
        rig.write(0, Width::B2, 1);
        assert!(!rig.sci());
    }

    #[test]
    fn gpe_registers_keep_enables_and_clear_status() {
        let rig = rig();
        rig.pm.raise_gpe(1);
        rig.pm.raise_gpe(2);
        let mut gpe = rig.gpe.lock().unwrap();
        assert_eq!(gpe.write(Access::new(2, Width::B2), 0x0004), Ok(Effect::None));
        assert!(rig.sci());
        assert_eq!(gpe.read(Access::new(0, Width::B4)), Ok(0x0004_0006));
        gpe.write(Access::new(0, Width::B1), 0x04).unwrap();
        assert!(!rig.sci());
        gpe.write(Access::new(3, Width::B8), u64::MAX).unwrap();
        assert_eq!(gpe.read(Access::new(2, Width::B2)), Ok(0xff04));
    }

    #[test]
    fn odd_accesses_are_harmless_and_reset_clears_everything() {
        let rig = rig();
        for offset in 0..PM_BYTES {
            for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
                let mut ports = rig.ports.lock().unwrap();
                ports.read(Access::new(offset, width)).unwrap();
                let _ = ports.write(Access::new(offset, width), u64::MAX);
            }
        }
        rig.pm.press_power_button();
        rig.pm.reset();
        assert!(!rig.sci());
        assert_eq!(rig.read(0, Width::B4), 0);
        assert_eq!(rig.read(4, Width::B2), 1);
    }

    #[test]
    fn a_restored_timer_goes_on_from_its_value_and_events_are_kept() {
        let rig = rig();
        rig.hand.store(2_000_000_000, Ordering::SeqCst);
        rig.write(2, Width::B2, 0x101);
        rig.write(4, Width::B2, 0x0403);
        rig.gpe.lock().unwrap().write(Access::new(2, Width::B2), 0x0008).unwrap();
        rig.pm.press_power_button();
        let state = matches_golden(&rig.pm.save());
        let before = rig.read(8, Width::B4);
        // Another process: its clock is at another place, behind or ahead.
        for elsewhere in [0, 77_000_000_000, u64::MAX / 4] {
            let mut other = super::tests::rig();
            other.hand.store(elsewhere, Ordering::SeqCst);
            other.pm.restore(&state).unwrap();
            assert!(other.sci(), "the button was pressed");
            assert_eq!(other.read(8, Width::B4), before);
            assert_eq!(other.read(0, Width::B4), 0x0101_0100, "no half turn came meanwhile");
            assert_eq!(other.read(4, Width::B2), 0x0403);
            assert_eq!(other.gpe.lock().unwrap().read(Access::new(0, Width::B4)).unwrap(), 0x0008_0000);
            other.write(0, Width::B2, 0x100);
            assert!(!other.sci());
            other.hand.fetch_add(100_000_000, Ordering::SeqCst);
            assert!(other.read(8, Width::B4).abs_diff(before + PM_TIMER_HZ / 10) <= 1);
            other.hand.fetch_add(400_000_000, Ordering::SeqCst);
            assert_eq!(other.read(0, Width::B2), 1, "half a turn after 2.34 seconds, counted from the start");
            assert_eq!(other.pm.save().fields::<saved::V1>("pm", 1).unwrap().status, 1);
        }
    }

    #[test]
    fn no_saved_state_makes_it_panic() {
        let rig = rig();
        rig.write(2, Width::B2, 0x101);
        spoil(&rig.pm.save(), |bad| {
            let mut other = super::tests::rig();
            let _ = other.pm.restore(bad);
            other.hand.store(10_000_000_000, Ordering::SeqCst);
            assert_eq!(other.read(4, Width::B2) & 0x2001, 1);
            other.read(8, Width::B4);
            other.write(0, Width::B4, u64::MAX);
            other.pm.registers.lock().unwrap().overflow();
        });
    }
}
