//! A USB tablet: a pointer that says where it is, so that the pointers of page and guest agree (HID 1.11).

use std::collections::VecDeque;

use super::{
    Setup, Stall,
    descriptors::Standard,
    hid::{Asked, Hid, Report},
};
use crate::engine::{
    input::POINTER_MAX,
    saved::{BadState, SaveState, State},
};

const KIND: &str = "usb-tablet";

/// Three buttons, X and Y of 16 bits from 0 to 32767, a wheel that counts notches.
const REPORT_DESCRIPTOR: [u8; 72] = [
    0x05, 0x01, 0x09, 0x02, 0xa1, 0x01, 0x09, 0x01, 0xa1, 0x00, // generic desktop, mouse, pointer
    0x05, 0x09, 0x19, 0x01, 0x29, 0x03, 0x15, 0x00, 0x25, 0x01, 0x95, 0x03, 0x75, 0x01, 0x81, 0x02, // buttons
    0x95, 0x01, 0x75, 0x05, 0x81, 0x01, // padding
    0x05, 0x01, 0x09, 0x30, 0x09, 0x31, 0x15, 0x00, 0x26, 0xff, 0x7f, 0x35, 0x00, 0x46, 0xff, 0x7f, // X, Y
    0x75, 0x10, 0x95, 0x02, 0x81, 0x02, //
    0x09, 0x38, 0x15, 0x81, 0x25, 0x7f, 0x35, 0x00, 0x45, 0x00, 0x75, 0x08, 0x95, 0x01, 0x81, 0x06, // wheel
    0xc0, 0xc0,
];

const BUTTONS: u8 = 0b111;
/// Reports that wait; when there are more, the last one is made right and those in the middle are lost.
const REPORTS_MAX: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Position {
    x: u16,
    y: u16,
    buttons: u8,
    wheel: i8,
}

impl Position {
    fn bytes(self) -> [u8; 6] {
        let ([x0, x1], [y0, y1]) = (self.x.to_le_bytes(), self.y.to_le_bytes());
        [self.buttons, x0, x1, y0, y1, self.wheel.to_le_bytes()[0]]
    }
}

pub struct Tablet {
    hid: Hid,
    now: Position,
    reports: VecDeque<Position>,
}

impl Default for Tablet {
    fn default() -> Tablet {
        Tablet::new()
    }
}

impl Tablet {
    pub fn new() -> Tablet {
        let hid = Hid::new(0x0003, "USB Tablet", [0, 0], &REPORT_DESCRIPTOR);
        Tablet { hid, now: Position::default(), reports: VecDeque::new() }
    }

    /// As `InputSink::pointer`.
    pub fn pointer(&mut self, x: u16, y: u16, buttons: u8, wheel: i8) {
        let now = Position {
            x: x.min(POINTER_MAX),
            y: y.min(POINTER_MAX),
            buttons: buttons & BUTTONS,
            wheel: wheel.max(-i8::MAX),
        };
        if now == (Position { wheel: 0, ..self.now }) {
            return;
        }
        self.now = now;
        let full = self.reports.len() >= REPORTS_MAX;
        match self.reports.back_mut() {
            // Where the pointer was on its way is of no use to a host that has not asked meanwhile.
            Some(last) if full || last.buttons == now.buttons && (last.wheel == 0 || now.wheel == 0) => {
                let wheel = last.wheel.saturating_add(now.wheel).max(-i8::MAX);
                *last = Position { wheel, ..now };
            }
            _ => self.reports.push_back(now),
        }
    }

    pub(super) fn report(&self) -> Option<Report> {
        self.reports.front().map(|position| Report::new(&position.bytes()))
    }
    pub(super) fn report_taken(&mut self) {
        self.reports.pop_front();
    }
    pub(super) fn standard(&self) -> &Standard {
        &self.hid.standard
    }

    pub(super) fn reset(&mut self) {
        self.hid.reset();
        self.reports.clear();
    }

    pub(super) fn control(&mut self, setup: Setup, _: &[u8]) -> Result<Vec<u8>, Stall> {
        match self.hid.control(setup)? {
            Asked::Done(bytes) => Ok(bytes),
            Asked::Input => Ok(Position { wheel: 0, ..self.now }.bytes().to_vec()),
            Asked::Output => Err(Stall),
        }
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use super::super::hid::saved::HidV1;

    #[derive(Serialize, Deserialize)]
    pub(super) struct PositionV1 {
        pub(super) x: u16,
        pub(super) y: u16,
        pub(super) buttons: u8,
        pub(super) wheel: i8,
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) hid: HidV1,
        pub(super) now: PositionV1,
        pub(super) reports: Vec<PositionV1>,
    }
}

impl From<Position> for saved::PositionV1 {
    fn from(Position { x, y, buttons, wheel }: Position) -> saved::PositionV1 {
        saved::PositionV1 { x, y, buttons, wheel }
    }
}

impl From<saved::PositionV1> for Position {
    /// A position like any that a viewer sends.
    fn from(saved::PositionV1 { x, y, buttons, wheel }: saved::PositionV1) -> Position {
        let (x, y) = (x.min(POINTER_MAX), y.min(POINTER_MAX));
        Position { x, y, buttons: buttons & BUTTONS, wheel: wheel.max(-i8::MAX) }
    }
}

impl SaveState for Tablet {
    fn save(&self) -> State {
        let Tablet { hid, now, reports } = self;
        // Whoever held the buttons is gone when the guest comes back: the last report lets them go.
        let mut reports: Vec<saved::PositionV1> = reports.iter().map(|report| (*report).into()).collect();
        let free = Position { buttons: 0, wheel: 0, ..*now };
        if now.buttons != 0 {
            reports.push(free.into());
        }
        State::new(KIND, 1, &saved::V1 { hid: hid.save(), now: free.into(), reports })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { hid, now, reports } = state.fields(KIND, 1)?;
        BadState::unless(reports.len() <= REPORTS_MAX + 1, KIND, "more reports than can wait")?;
        self.hid.restore(&hid).map_err(|what| BadState::new(KIND, what))?;
        self.now = now.into();
        self.reports = reports.into_iter().map(Position::from).collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::saved::testing::{matches_golden, spoil};

    fn take(tablet: &mut Tablet) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(report) = tablet.report() {
            all.push(report.bytes().to_vec());
            tablet.report_taken();
        }
        all
    }

    #[test]
    fn moves_are_gathered_and_clicks_are_not() {
        let mut tablet = Tablet::new();
        tablet.pointer(1, 2, 0, 0);
        tablet.pointer(0x1234, u16::MAX, 0, 0);
        tablet.pointer(0x1234, u16::MAX, 0xff, 0);
        tablet.pointer(0x1234, u16::MAX, 0, 0);
        tablet.pointer(0x1234, u16::MAX, 0, 0);
        assert_eq!(
            take(&mut tablet),
            [[0, 0x34, 0x12, 0xff, 0x7f, 0], [7, 0x34, 0x12, 0xff, 0x7f, 0], [0, 0x34, 0x12, 0xff, 0x7f, 0]]
        );
        tablet.pointer(0x1234, u16::MAX, 0, -1);
        tablet.pointer(0x1234, u16::MAX, 0, -1);
        tablet.pointer(5, 6, 0, 0);
        assert_eq!(take(&mut tablet), [[0, 0x34, 0x12, 0xff, 0x7f, 0xff], [0, 5, 0, 6, 0, 0xff]]);
        for _ in 0..1000 {
            tablet.pointer(1, 1, 1, i8::MIN);
            tablet.pointer(2, 2, 0, 0);
        }
        let all = take(&mut tablet);
        assert_eq!((all.len(), all.last().unwrap()), (REPORTS_MAX, &vec![0, 2, 0, 2, 0, 0x81]));
    }

    #[test]
    fn a_saved_tablet_lets_its_buttons_go() {
        let mut tablet = Tablet::new();
        tablet.control(Setup { request_type: 0, request: 9, value: 1, ..Setup::default() }, &[]).unwrap();
        tablet.control(Setup { request_type: 0, request: 3, value: 1, ..Setup::default() }, &[]).unwrap();
        tablet.pointer(100, 200, 1, -3);
        let state = matches_golden(&tablet.save());
        let mut second = Tablet::new();
        second.restore(&state).unwrap();
        assert!(second.standard().remote_wakeup);
        assert_eq!(take(&mut second), [[1, 100, 0, 200, 0, 0xfd], [0, 100, 0, 200, 0, 0]]);
        spoil(&state, |bad| {
            let mut fresh = Tablet::new();
            let _ = fresh.restore(bad);
            fresh.pointer(1, 1, 1, 1);
            take(&mut fresh);
        });
    }
}
