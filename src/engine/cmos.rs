//! CMOS memory and real-time clock, ports 0x70 and 0x71 (MC146818A data sheet; PC use of the memory bytes).
//!
//! The clock is the host's, in UTC, plus the difference that the guest has set. Nothing runs between accesses: the flags of
//! register C are computed when they are looked at, and the alarm thread sleeps unless the guest asked for interrupts.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{
    bus::{Access, BusDevice, BusFault, Effect, SharedDevice, Width},
    facts::MachineFacts,
    irq::IrqLine,
    saved::{BadState, SaveState, State},
    timer::{Alarm, AlarmBell, Clock},
};

const CMOS_BYTES: usize = 128;
const NS: i64 = 1_000_000_000;

/// Registers of the clock.
mod reg {
    pub(super) const SECONDS: usize = 0;
    pub(super) const SECONDS_ALARM: usize = 1;
    pub(super) const MINUTES: usize = 2;
    pub(super) const MINUTES_ALARM: usize = 3;
    pub(super) const HOURS: usize = 4;
    pub(super) const HOURS_ALARM: usize = 5;
    pub(super) const WEEKDAY: usize = 6;
    pub(super) const DAY: usize = 7;
    pub(super) const MONTH: usize = 8;
    pub(super) const YEAR: usize = 9;
    pub(super) const A: usize = 0xa;
    pub(super) const B: usize = 0xb;
    pub(super) const C: usize = 0xc;
    pub(super) const D: usize = 0xd;
    /// Named by the FADT.
    pub(super) const CENTURY: usize = 0x32;
}

/// Where the FADT says the century is.
pub const CENTURY_REGISTER: u8 = reg::CENTURY as u8;

/// Register A: update in progress, divider, rate.
const UIP: u8 = 1 << 7;
const DIVIDER_RESET: u8 = 6 << 4;
const DIVIDER_RUNS: u8 = 2 << 4;
const RATE: u8 = 0xf;
/// Register B.
const SET: u8 = 1 << 7;
const PIE: u8 = 1 << 6;
const AIE: u8 = 1 << 5;
const UIE: u8 = 1 << 4;
const SQWE: u8 = 1 << 3;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Register C. PF, AF and UF have the places of their enables in B.
const IRQF: u8 = 1 << 7;
const FLAGS: u8 = PIE | AIE | UIE;
/// Register D: the battery is good.
const VRT: u8 = 1 << 7;
/// With either bit set an alarm byte matches everything.
const ALARM_ANY: u8 = 0xc0;
/// Hours in 12-hour mode: afternoon.
const PM: u8 = 1 << 7;
/// UIP shows this long before each second: 244 µs of warning and 1948 µs of update.
const UPDATE_NS: i64 = 2_192_000;

/// The device. Cloning gives another handle on the same clock.
#[derive(Clone)]
pub struct Cmos {
    rtc: Arc<Mutex<Rtc>>,
    _alarm: Arc<Alarm>,
}

impl Cmos {
    /// `wall` counts nanoseconds since 1970 (UTC); `irq` is the RTC's pin. Errors: no thread can be started.
    pub fn new(facts: &MachineFacts, wall: Clock, irq: IrqLine) -> std::io::Result<Cmos> {
        let bell = AlarmBell::new();
        let rtc = Arc::new(Mutex::new(Rtc::new(memory_bytes(facts), wall, irq, bell.clone())));
        let watched: Weak<Mutex<Rtc>> = Arc::downgrade(&rtc);
        let alarm = Alarm::start("rtc", bell, move || lock(&*watched.upgrade()?).tick())?;
        Ok(Cmos { rtc, _alarm: Arc::new(alarm) })
    }

    /// The two ports, `layout::CMOS`.
    pub fn ports(&self) -> SharedDevice {
        Arc::new(Mutex::new(Ports(self.clone())))
    }

    /// What a reset line does: interrupts are off, time and memory stay.
    pub fn reset(&self) {
        let mut rtc = lock(&self.rtc);
        rtc.ram[reg::B] &= !(SET | PIE | AIE | UIE | SQWE);
        rtc.ram[reg::A] = rtc.ram[reg::A] & RATE | DIVIDER_RUNS;
        rtc.frozen = false;
        rtc.flags = 0;
        rtc.sync_irq();
    }
}

fn lock(rtc: &Mutex<Rtc>) -> MutexGuard<'_, Rtc> {
    rtc.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bytes that firmware and old systems read as a description of the machine.
fn memory_bytes(facts: &MachineFacts) -> [u8; CMOS_BYTES] {
    let mut ram = [0; CMOS_BYTES];
    let mut word = |at: usize, value: u64| {
        ram[at] = value as u8;
        ram[at + 1] = (value >> 8) as u8;
    };
    let (low, high) = facts.ram_split();
    let base_kib = (low >> 10).min(640);
    let extended_kib = (low >> 10).saturating_sub(1024).min(0xfc00); // up to 64 MiB
    let above_16m = (low >> 16).saturating_sub(256).min(0xffff);
    word(0x15, base_kib);
    word(0x17, extended_kib);
    word(0x30, extended_kib);
    word(0x34, above_16m);
    word(0x5b, (high >> 16).min(0xff_ffff));
    ram[0x5d] = ((high >> 16).min(0xff_ffff) >> 16) as u8;
    ram[0x5f] = u8::try_from(facts.cpus.saturating_sub(1)).unwrap_or(u8::MAX);
    ram[0x14] = 0x06; // equipment: coprocessor, PS/2 mouse, no floppy; the display has its own ROM
    // Disk first or CD first, then the other. SeaBIOS lets the list in fw_cfg go before these.
    ram[0x3d] = if facts.boots_from_cd_first() { 0x23 } else { 0x32 };
    ram[0x38] = 0x01; // no floppy signature check
    let sum: u16 = ram[0x10..0x2e].iter().map(|byte| u16::from(*byte)).sum();
    ram[0x2e] = (sum >> 8) as u8;
    ram[0x2f] = sum as u8;
    ram[reg::A] = DIVIDER_RUNS | 6; // 1024 Hz
    ram[reg::B] = HOURS_24;
    ram
}

struct Rtc {
    /// Memory; of the clock's registers only A, B, the alarms and, while frozen, the time live here.
    ram: [u8; CMOS_BYTES],
    /// Guest time minus host time.
    offset_ns: i64,
    /// SET or a stopped divider: time stands and the guest writes it register by register.
    frozen: bool,
    /// What port 0x70 has chosen. Bit 7 of the port is the NMI mask, which the machine does not have.
    index: usize,
    /// PF, AF, UF.
    flags: u8,
    /// The guest time up to which the flags are known.
    seen_ns: i64,
    wall: Clock,
    irq: IrqLine,
    bell: AlarmBell,
}

impl Rtc {
    fn new(ram: [u8; CMOS_BYTES], wall: Clock, irq: IrqLine, bell: AlarmBell) -> Rtc {
        let mut rtc = Rtc { ram, offset_ns: 0, frozen: false, index: 0, flags: 0, seen_ns: 0, wall, irq, bell };
        rtc.seen_ns = rtc.now_ns();
        rtc
    }

    fn host_ns(&self) -> i64 {
        i64::try_from(self.wall.now_ns()).unwrap_or(i64::MAX)
    }

    /// Guest time in nanoseconds since 1970.
    fn now_ns(&self) -> i64 {
        self.host_ns().saturating_add(self.offset_ns)
    }

    /// Brings PF, AF and UF up to now.
    fn look_at_clock(&mut self) {
        let (from, now) = (self.seen_ns, self.now_ns());
        self.seen_ns = now;
        if self.frozen || now <= from {
            return; // the host's clock may have stepped back
        }
        if let Some(shift) = self.period_shift()
            && ticks_32k(from) >> shift != ticks_32k(now) >> shift
        {
            self.flags |= PIE;
        }
        let (first, last) = (from.div_euclid(NS) + 1, now.div_euclid(NS));
        if first <= last {
            self.flags |= UIE;
            if self.next_alarm(first).is_some_and(|alarm| alarm <= last) {
                self.flags |= AIE;
            }
        }
    }

    /// The periodic rate as a shift of the 32768 Hz clock (data sheet, table 5), if one is chosen.
    fn period_shift(&self) -> Option<u32> {
        match self.ram[reg::A] & RATE {
            0 => None,
            rate @ (1 | 2) => Some(u32::from(rate) + 6),
            rate => Some(u32::from(rate) - 1),
        }
    }

    /// The first second from `from_s` on that the alarm bytes match; within a day, or never.
    fn next_alarm(&self, from_s: i64) -> Option<i64> {
        let wanted = |register: usize, value: i64, hours: bool| {
            let alarm = self.ram[register];
            if alarm & ALARM_ANY == ALARM_ANY {
                return true;
            }
            let shown = if hours { self.encode_hours(value) } else { self.encode(value) };
            alarm == shown
        };
        let mut at = from_s;
        let end = from_s.saturating_add(2 * 86_400);
        // At most 24 + 60 + 60 steps a day: an hour, a minute or a second that does not match is skipped whole.
        while at < end {
            let second_of_day = at.rem_euclid(86_400);
            if !wanted(reg::HOURS_ALARM, second_of_day / 3600, true) {
                at += 3600 - second_of_day % 3600;
            } else if !wanted(reg::MINUTES_ALARM, second_of_day / 60 % 60, false) {
                at += 60 - second_of_day % 60;
            } else if !wanted(reg::SECONDS_ALARM, second_of_day % 60, false) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }

    fn sync_irq(&self) {
        self.irq.set(self.flags & self.ram[reg::B] & FLAGS != 0);
    }

    /// The alarm's work: raises what is due and says how long until the next event that the guest waits for.
    fn tick(&mut self) -> Option<u64> {
        self.look_at_clock();
        self.sync_irq();
        let waiting = self.ram[reg::B] & FLAGS & !self.flags;
        if self.frozen || waiting == 0 {
            return None;
        }
        let now = self.now_ns();
        let second = now.div_euclid(NS);
        let mut next = i64::MAX;
        if waiting & PIE != 0
            && let Some(shift) = self.period_shift()
        {
            let tick = ((ticks_32k(now) >> shift) + 1) << shift;
            next = next.min(i64::try_from(i128::from(tick) * i128::from(NS) / 32_768 + 1).unwrap_or(i64::MAX));
        }
        if waiting & UIE != 0 {
            next = next.min((second + 1).saturating_mul(NS));
        }
        if waiting & AIE != 0
            && let Some(alarm) = self.next_alarm(second + 1)
        {
            next = next.min(alarm.saturating_mul(NS));
        }
        (next != i64::MAX).then(|| u64::try_from(next.saturating_sub(now)).unwrap_or(0))
    }

    fn read(&mut self, index: usize) -> u8 {
        match index {
            reg::SECONDS
            | reg::MINUTES
            | reg::HOURS
            | reg::WEEKDAY
            | reg::DAY
            | reg::MONTH
            | reg::YEAR
            | reg::CENTURY
                if !self.frozen =>
            {
                self.show_time(self.now_ns())[time_slot(index)]
            }
            reg::A => {
                let left = NS - self.now_ns().rem_euclid(NS);
                let uip = if !self.frozen && left <= UPDATE_NS { UIP } else { 0 };
                self.ram[reg::A] & !UIP | uip
            }
            reg::C => {
                self.look_at_clock();
                let asks = self.flags & self.ram[reg::B] & FLAGS != 0;
                let shown = self.flags | if asks { IRQF } else { 0 };
                self.flags = 0;
                self.sync_irq();
                if self.ram[reg::B] & FLAGS != 0 {
                    self.bell.ring();
                }
                shown
            }
            reg::D => VRT,
            index => self.ram.get(index).copied().unwrap_or(0xff),
        }
    }

    fn write(&mut self, index: usize, value: u8) {
        match index {
            reg::SECONDS
            | reg::MINUTES
            | reg::HOURS
            | reg::WEEKDAY
            | reg::DAY
            | reg::MONTH
            | reg::YEAR
            | reg::CENTURY => self.write_time(index, value),
            reg::A => {
                self.look_at_clock();
                let stopped_before = self.divider_stopped();
                self.ram[reg::A] = value & !UIP;
                // After the divider starts, the first update comes half a second later (data sheet, "Divider control").
                self.freeze_or_run(stopped_before.then_some(NS / 2));
                self.after_control();
            }
            reg::B => {
                self.look_at_clock();
                self.ram[reg::B] = if value & SET != 0 { value & !UIE } else { value };
                self.freeze_or_run(None);
                self.after_control();
            }
            reg::C | reg::D => {}
            reg::SECONDS_ALARM | reg::MINUTES_ALARM | reg::HOURS_ALARM => {
                self.look_at_clock();
                self.ram[index] = value;
                self.after_control();
            }
            index => {
                if let Some(byte) = self.ram.get_mut(index) {
                    *byte = value;
                }
            }
        }
    }

    fn after_control(&mut self) {
        self.sync_irq();
        if self.ram[reg::B] & FLAGS != 0 {
            self.bell.ring();
        }
    }

    fn divider_stopped(&self) -> bool {
        self.ram[reg::A] & DIVIDER_RESET == DIVIDER_RESET
    }

    /// Takes the time into the registers when it stops, and out of them when it runs again. `fraction_ns` is the part of a
    /// second to start with; without it the host's fraction goes on.
    fn freeze_or_run(&mut self, fraction_ns: Option<i64>) {
        let freeze = self.ram[reg::B] & SET != 0 || self.divider_stopped();
        if freeze && !self.frozen {
            self.store_time();
        } else if !freeze && self.frozen {
            self.set_time(fraction_ns);
        }
        self.frozen = freeze;
    }

    fn write_time(&mut self, index: usize, value: u8) {
        if self.frozen {
            self.ram[index] = value;
            return;
        }
        self.look_at_clock();
        self.store_time();
        self.ram[index] = value;
        self.set_time(None);
        self.after_control();
    }

    fn store_time(&mut self) {
        let shown = self.show_time(self.now_ns());
        for index in TIME_REGISTERS {
            self.ram[index] = shown[time_slot(index)];
        }
    }

    /// Computes the offset that makes the clock show what is in the registers. Nonsense values are carried over, as by `mktime`.
    fn set_time(&mut self, fraction_ns: Option<i64>) {
        let field = |index: usize| self.decode(self.ram[index]);
        let year = field(reg::CENTURY) * 100 + field(reg::YEAR);
        let days = days_from_civil(year, field(reg::MONTH), field(reg::DAY));
        let hours = self.decode_hours(self.ram[reg::HOURS]);
        let seconds = days * 86_400 + hours * 3600 + field(reg::MINUTES) * 60 + field(reg::SECONDS);
        let fraction = fraction_ns.unwrap_or(self.now_ns().rem_euclid(NS));
        self.offset_ns = seconds.saturating_mul(NS).saturating_add(fraction).saturating_sub(self.host_ns());
        self.seen_ns = self.now_ns();
    }

    /// The time registers, in the order of `TIME_REGISTERS`.
    fn show_time(&self, at_ns: i64) -> [u8; TIME_REGISTERS.len()] {
        let seconds = at_ns.div_euclid(NS);
        let days = seconds.div_euclid(86_400);
        let second_of_day = seconds.rem_euclid(86_400);
        let (year, month, day) = civil_from_days(days);
        [
            self.encode(second_of_day % 60),
            self.encode(second_of_day / 60 % 60),
            self.encode_hours(second_of_day / 3600),
            self.encode((days + 4).rem_euclid(7) + 1), // 1970-01-01 was a Thursday; Sunday is 1
            self.encode(day),
            self.encode(month),
            self.encode(year.rem_euclid(100)),
            self.encode(year.div_euclid(100).rem_euclid(100)),
        ]
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value as u8; // below 100
        if self.ram[reg::B] & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, byte: u8) -> i64 {
        if self.ram[reg::B] & BINARY != 0 { i64::from(byte) } else { i64::from(byte >> 4) * 10 + i64::from(byte & 0xf) }
    }

    fn encode_hours(&self, hour: i64) -> u8 {
        if self.ram[reg::B] & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hours(&self, byte: u8) -> i64 {
        if self.ram[reg::B] & HOURS_24 != 0 {
            return self.decode(byte);
        }
        self.decode(byte & !PM) % 12 + if byte & PM != 0 { 12 } else { 0 }
    }
}

const TIME_REGISTERS: [usize; 8] =
    [reg::SECONDS, reg::MINUTES, reg::HOURS, reg::WEEKDAY, reg::DAY, reg::MONTH, reg::YEAR, reg::CENTURY];

/// Where a time register is in `TIME_REGISTERS`.
fn time_slot(index: usize) -> usize {
    TIME_REGISTERS.iter().position(|register| *register == index).unwrap_or(0)
}

/// Ticks of the 32768 Hz crystal since 1970.
fn ticks_32k(ns: i64) -> i64 {
    (i128::from(ns) * 32_768).div_euclid(i128::from(NS)) as i64
}

/// Days since 1970-01-01 of a date in the Gregorian calendar; months and days out of range carry over.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let months = year * 12 + month - 1;
    let (year, month) = (months.div_euclid(12), months.rem_euclid(12)); // month 0 is January
    let (year, month) = if month < 2 { (year - 1, month + 10) } else { (year, month - 2) }; // March first
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * month + 2) / 5;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year + day - 1 - 719_468
}

/// Year, month (1 to 12) and day (1 to 31) of a day number.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153; // March first
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (year_of_era, month + 3) } else { (year_of_era + 1, month - 9) };
    (era * 400 + year, month, day)
}

struct Ports(Cmos);

impl BusDevice for Ports {
    fn read(&mut self, at: Access) -> Result<u64, BusFault> {
        let mut rtc = lock(&self.0.rtc);
        let index = rtc.index;
        match (at.offset, at.width) {
            (0, Width::B1) => Ok(0xff), // the index cannot be read back
            (1, Width::B1) => Ok(u64::from(rtc.read(index))),
            _ => Err(BusFault::BadWidth),
        }
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        let mut rtc = lock(&self.0.rtc);
        match (at.offset, at.width) {
            (0, Width::B1) => rtc.index = value as usize & 0x7f,
            (1, Width::B1) => {
                let index = rtc.index;
                rtc.write(index, value as u8);
            }
            (0, Width::B2) => {
                let index = value as usize & 0x7f;
                rtc.index = index;
                rtc.write(index, (value >> 8) as u8);
            }
            _ => return Err(BusFault::BadWidth),
        }
        Ok(Effect::None)
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use crate::engine::saved::hex;

    pub(super) const KIND: &str = "cmos";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        #[serde(with = "hex")]
        pub(super) ram: Vec<u8>,
        /// The guest's clock is the host's plus this: it goes on while the guest sleeps, as behind a battery.
        pub(super) offset_ns: i64,
        /// The guest time up to which the flags are known: an alarm that came due in the guest's sleep is found after it.
        pub(super) seen_ns: i64,
        pub(super) flags: u8,
        pub(super) index: u8,
    }
}

impl SaveState for Cmos {
    fn save(&self) -> State {
        let rtc = lock(&self.rtc);
        // Whether time stands follows from registers A and B.
        let Rtc { ram, offset_ns, frozen: _, index, flags, seen_ns, wall: _, irq: _, bell: _ } = &*rtc;
        let fields = saved::V1 {
            ram: ram.to_vec(),
            offset_ns: *offset_ns,
            seen_ns: *seen_ns,
            flags: *flags,
            index: *index as u8, // below 128
        };
        State::new(saved::KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let fields: saved::V1 = state.fields(saved::KIND, 1)?;
        let mut rtc = lock(&self.rtc);
        rtc.ram = fields.ram.try_into().map_err(|_| BadState::new(saved::KIND, "it has not 128 bytes"))?;
        rtc.ram[reg::A] &= !UIP;
        rtc.frozen = rtc.ram[reg::B] & SET != 0 || rtc.divider_stopped();
        rtc.offset_ns = fields.offset_ns;
        rtc.seen_ns = fields.seen_ns;
        rtc.flags = fields.flags & FLAGS;
        rtc.index = usize::from(fields.index & 0x7f);
        rtc.after_control();
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
        facts::tests::sample,
        irq::tests::recorder,
        saved::testing::{matches_golden, spoil},
        timer::tests::hand_clock,
    };

    /// 2024-02-29 23:59:57.5 UTC, a Thursday.
    const LEAP_NIGHT_NS: u64 = 1_709_251_197_500_000_000;

    struct Rig {
        cmos: Cmos,
        ports: SharedDevice,
        levels: Arc<Mutex<Vec<bool>>>,
        hand: Arc<AtomicU64>,
    }

    fn rig() -> Rig {
        let (line, levels) = recorder();
        let (clock, hand) = hand_clock(LEAP_NIGHT_NS);
        let cmos = Cmos::new(&sample(), clock, line).unwrap();
        Rig { ports: cmos.ports(), cmos, levels, hand }
    }

    impl Rig {
        fn get(&self, index: usize) -> u8 {
            let mut ports = self.ports.lock().unwrap();
            ports.write(Access::new(0, Width::B1), index as u64 | 0x80).unwrap();
            ports.read(Access::new(1, Width::B1)).unwrap() as u8
        }
        fn put(&self, index: usize, value: u8) {
            let mut ports = self.ports.lock().unwrap();
            ports.write(Access::new(0, Width::B1), index as u64).unwrap();
            ports.write(Access::new(1, Width::B1), u64::from(value)).unwrap();
        }
        fn pass_ms(&self, ms: u64) {
            self.hand.fetch_add(ms * 1_000_000, Ordering::SeqCst);
        }
        fn irq(&self) -> bool {
            self.levels.lock().unwrap().last().copied().unwrap_or(false)
        }
        fn wait_for_irq(&self) {
            let deadline = Instant::now() + Duration::from_secs(5);
            while !self.irq() {
                assert!(Instant::now() < deadline, "no interrupt");
                self.cmos.rtc.lock().unwrap().bell.ring(); // the hand clock moves without the thread's knowledge
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn a_driver_reads_the_time_over_a_leap_day() {
        let rig = rig();
        let time = || TIME_REGISTERS.map(|index| rig.get(index));
        assert_eq!(time(), [0x57, 0x59, 0x23, 5, 0x29, 0x02, 0x24, 0x20]);
        rig.pass_ms(2_600);
        assert_eq!(time(), [0x00, 0x00, 0x00, 6, 0x01, 0x03, 0x24, 0x20]);
        assert_eq!(rig.get(reg::D), 0x80);
        rig.put(reg::B, BINARY);
        assert_eq!(rig.get(reg::HOURS), 12, "midnight in 12-hour mode");
        assert_eq!(rig.get(reg::CENTURY), 20);
    }

    #[test]
    fn a_driver_sets_the_time_and_it_runs_on() {
        let rig = rig();
        // As Linux does it: SET, divider reset, the registers, then both back.
        rig.put(reg::B, SET | HOURS_24);
        rig.put(reg::A, 0x76);
        for (index, value) in [(0, 0x58), (2, 0x59), (4, 0x23), (7, 0x31), (8, 0x12), (9, 0x99), (reg::CENTURY, 0x19)] {
            rig.put(index, value);
        }
        rig.pass_ms(60_000);
        assert_eq!(rig.get(reg::SECONDS), 0x58, "time stands");
        rig.put(reg::B, HOURS_24);
        rig.put(reg::A, 0x26);
        rig.pass_ms(499);
        assert_eq!(rig.get(reg::SECONDS), 0x58);
        rig.pass_ms(1_002);
        assert_eq!([rig.get(reg::YEAR), rig.get(reg::CENTURY), rig.get(reg::MONTH)], [0x00, 0x20, 0x01]);
        assert_eq!(rig.get(reg::WEEKDAY), 7, "2000-01-01 was a Saturday");
        rig.cmos.reset();
        assert_eq!(rig.get(reg::YEAR), 0x00, "a reset keeps the time");
    }

    #[test]
    fn update_in_progress_shows_before_each_second() {
        let rig = rig();
        assert_eq!(rig.get(reg::A), 0x26);
        rig.pass_ms(499);
        assert_eq!(rig.get(reg::A), 0xa6);
        rig.pass_ms(1);
        assert_eq!(rig.get(reg::A), 0x26);
    }

    #[test]
    fn flags_can_be_polled_without_interrupts() {
        let rig = rig();
        assert_eq!(rig.get(reg::C), 0);
        rig.pass_ms(2);
        assert_eq!(rig.get(reg::C), PIE, "1024 Hz");
        rig.pass_ms(600);
        assert_eq!(rig.get(reg::C), PIE | UIE);
        assert_eq!(rig.get(reg::C), 0, "reading clears");
        assert!(!rig.irq());
    }

    #[test]
    fn each_interrupt_comes_when_enabled_and_ends_when_c_is_read() {
        let rig = rig();
        rig.put(reg::B, HOURS_24 | UIE);
        assert!(!rig.irq());
        rig.pass_ms(600);
        rig.wait_for_irq();
        assert_eq!(rig.get(reg::C), IRQF | UIE | PIE);
        assert!(!rig.irq());

        rig.put(reg::SECONDS_ALARM, 0x01);
        rig.put(reg::MINUTES_ALARM, 0xff);
        rig.put(reg::HOURS_ALARM, 0x00);
        rig.put(reg::B, HOURS_24 | AIE);
        rig.pass_ms(1_900);
        rig.cmos.rtc.lock().unwrap().tick();
        assert!(!rig.irq(), "one second early");
        rig.pass_ms(1_000);
        rig.wait_for_irq();
        assert_eq!(rig.get(reg::C) & (IRQF | AIE), IRQF | AIE);

        rig.put(reg::B, HOURS_24 | PIE);
        rig.pass_ms(1);
        rig.wait_for_irq();
        rig.cmos.reset();
        assert!(!rig.irq());
    }

    #[test]
    fn the_alarm_thread_has_no_deadline_unless_the_guest_waits() {
        let rig = rig();
        let tick = || rig.cmos.rtc.lock().unwrap().tick();
        assert_eq!(tick(), None);
        rig.put(reg::B, HOURS_24 | UIE);
        assert_eq!(tick(), Some(500_000_000));
        rig.put(reg::B, HOURS_24 | PIE);
        rig.get(reg::C);
        assert!(tick().unwrap() <= 976_563);
        rig.pass_ms(1);
        assert_eq!(tick(), None, "the interrupt waits for the guest, not the thread");
        rig.put(reg::A, 0x20);
        rig.get(reg::C);
        assert_eq!(tick(), None, "no rate is chosen");
    }

    #[test]
    fn memory_bytes_describe_the_machine() {
        let mut facts = sample();
        facts.memory_bytes = 5 << 30;
        facts.cpus = 4;
        let ram = memory_bytes(&facts);
        assert_eq!([ram[0x15], ram[0x16]], [0x80, 0x02]);
        assert_eq!([ram[0x30], ram[0x31]], [0x00, 0xfc]);
        assert_eq!([ram[0x34], ram[0x35]], [0x00, 0xbf]);
        assert_eq!([ram[0x5b], ram[0x5c], ram[0x5d]], [0x00, 0x80, 0x00]);
        assert_eq!(ram[0x5f], 3);
        facts.memory_bytes = 1 << 20;
        assert_eq!(memory_bytes(&facts)[0x30..0x36], [0; 6]);
    }

    #[test]
    fn nonsense_times_and_wide_accesses_do_no_harm() {
        let rig = rig();
        for index in 0..CMOS_BYTES {
            for value in [0x00, 0x7f, 0x80, 0xff] {
                rig.put(index, value);
                rig.get(index);
            }
        }
        rig.put(reg::A, 0x26);
        rig.put(reg::B, 0x72);
        for index in TIME_REGISTERS {
            rig.put(index, 0xff);
            rig.get(index);
        }
        rig.hand.store(u64::MAX, Ordering::SeqCst);
        rig.get(reg::C);
        rig.cmos.rtc.lock().unwrap().tick();
        let mut ports = rig.ports.lock().unwrap();
        assert_eq!(ports.write(Access::new(0, Width::B4), 0), Err(BusFault::BadWidth));
        assert_eq!(ports.read(Access::new(1, Width::B2)), Err(BusFault::BadWidth));
        assert_eq!(ports.write(Access::new(0, Width::B2), 0x4233), Ok(Effect::None));
        drop(ports);
        assert_eq!(rig.get(0x33), 0x42, "a word write is index and data");
    }

    #[test]
    fn the_calendar_is_right_at_its_edges() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (19_782, (2024, 2, 29)),
            (11_016, (2000, 2, 29)),
            (-1, (1969, 12, 31)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(civil_from_days(days), date);
            assert_eq!(days_from_civil(date.0, date.1, date.2), days);
        }
        assert_eq!(days_from_civil(2023, 13, 1), days_from_civil(2024, 1, 1));
    }

    /// Has set another year and an alarm for three seconds after midnight, and chosen a register.
    fn busy() -> Rig {
        let rig = rig();
        rig.put(reg::YEAR, 0x30);
        rig.put(0x40, 0xa5);
        rig.put(reg::SECONDS_ALARM, 0x03);
        rig.put(reg::MINUTES_ALARM, 0x00);
        rig.put(reg::HOURS_ALARM, 0x00);
        rig.get(reg::C);
        rig.put(reg::B, HOURS_24 | AIE);
        rig.ports.lock().unwrap().write(Access::new(0, Width::B1), 0x40).unwrap();
        rig
    }

    #[test]
    fn a_restored_clock_has_gone_on_and_its_alarm_rings_late() {
        let state = matches_golden(&busy().cmos.save());
        for slept_ms in [1_000, 3_600_000] {
            let mut other = rig();
            other.pass_ms(slept_ms);
            other.cmos.restore(&state).unwrap();
            let chosen = other.ports.lock().unwrap().read(Access::new(1, Width::B1));
            assert_eq!(chosen, Ok(0xa5), "the index was set before");
            assert_eq!(other.get(reg::YEAR), 0x30);
            assert_eq!(other.get(reg::HOURS), if slept_ms == 1_000 { 0x23 } else { 0x00 });
            if slept_ms == 1_000 {
                other.cmos.rtc.lock().unwrap().tick();
                assert!(!other.irq(), "the alarm is still to come");
                other.pass_ms(5_000);
            }
            other.wait_for_irq();
            assert_eq!(other.get(reg::C) & (IRQF | AIE), IRQF | AIE);
            assert!(!other.irq());
        }
    }

    #[test]
    fn time_that_stands_while_it_is_set_stands_after_a_restore() {
        let first = rig();
        first.put(reg::B, SET | HOURS_24);
        first.put(reg::SECONDS, 0x42);
        let mut other = rig();
        other.cmos.restore(&first.cmos.save()).unwrap();
        other.pass_ms(10_000);
        assert_eq!(other.get(reg::SECONDS), 0x42);
        other.put(reg::B, HOURS_24);
        other.pass_ms(1_000);
        assert_eq!(other.get(reg::SECONDS), 0x43);
    }

    #[test]
    fn no_saved_state_makes_it_panic() {
        spoil(&busy().cmos.save(), |bad| {
            let mut other = rig();
            let _ = other.cmos.restore(bad);
            let _ = other.ports.lock().unwrap().read(Access::new(1, Width::B1));
            for value in [0x72, 0x02] {
                for index in 0..CMOS_BYTES {
                    other.get(index);
                }
                other.put(reg::B, value);
                other.put(reg::SECONDS, 0x99);
                other.pass_ms(1_000);
                other.cmos.rtc.lock().unwrap().tick();
            }
        });
    }
}
