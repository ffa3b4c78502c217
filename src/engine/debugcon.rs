//! Debug console, port 0x402: the firmware's log, one byte at a time.

use super::{
    bus::{Access, BusDevice, BusFault, Effect},
    saved::{BadState, SaveState, State},
};

/// What a read gives; SeaBIOS and OVMF look for it before they write.
const PRESENT: u64 = 0xe9;
/// A longer line is cut here.
const LINE_BYTES_MAX: usize = 512;

/// Collects bytes into lines and hands each line, without its end and without control characters, to `sink`.
///
/// `sink` is called by a vCPU thread and must not block; it is where the rate is limited.
pub struct DebugConsole {
    line: Vec<u8>,
    sink: Box<dyn FnMut(&str) + Send>,
}

impl DebugConsole {
    pub fn new(sink: impl FnMut(&str) + Send + 'static) -> DebugConsole {
        DebugConsole { line: Vec::new(), sink: Box::new(sink) }
    }

    /// Hands out what is left of the last line.
    pub fn reset(&mut self) {
        if !self.line.is_empty() {
            self.end_line();
        }
    }

    fn end_line(&mut self) {
        let text: String = String::from_utf8_lossy(&self.line)
            .chars()
            .map(|c| if c.is_control() && c != '\t' { '.' } else { c })
            .collect();
        (self.sink)(&text);
        self.line.clear();
    }
}

impl BusDevice for DebugConsole {
    fn read(&mut self, _: Access) -> Result<u64, BusFault> {
        Ok(PRESENT)
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        if at.width.bytes() != 1 {
            return Err(BusFault::BadWidth);
        }
        match value as u8 {
            b'\n' => self.end_line(),
            b'\r' => {}
            byte => {
                self.line.push(byte);
                if self.line.len() >= LINE_BYTES_MAX {
                    self.end_line();
                }
            }
        }
        Ok(Effect::None)
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use crate::engine::saved::hex;

    pub(super) const KIND: &str = "debug-console";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        #[serde(with = "hex")]
        pub(super) line: Vec<u8>,
    }
}

impl SaveState for DebugConsole {
    fn save(&self) -> State {
        let DebugConsole { line, sink: _ } = self;
        State::new(saved::KIND, 1, &saved::V1 { line: line.clone() })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { line } = state.fields(saved::KIND, 1)?;
        BadState::unless(line.len() < LINE_BYTES_MAX, saved::KIND, "its line is too long")?;
        self.line = line;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::engine::{bus::Width, saved::testing};

    fn console() -> (DebugConsole, Arc<Mutex<Vec<String>>>) {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        (DebugConsole::new(move |line| sink.lock().unwrap().push(line.to_owned())), lines)
    }

    fn print(console: &mut DebugConsole, bytes: &[u8]) {
        for byte in bytes {
            console.write(Access::new(0, Width::B1), u64::from(*byte)).unwrap();
        }
    }

    #[test]
    fn firmware_finds_the_console_and_its_lines_arrive_whole() {
        let (mut console, lines) = console();
        assert_eq!(console.read(Access::new(0, Width::B1)), Ok(0xe9));
        print(&mut console, b"SeaBIOS\r\n\x1b[1mhalf");
        assert_eq!(*lines.lock().unwrap(), ["SeaBIOS"]);
        console.reset();
        assert_eq!(*lines.lock().unwrap(), ["SeaBIOS", ".[1mhalf"]);
        console.reset();
        assert_eq!(lines.lock().unwrap().len(), 2, "nothing was left");
    }

    #[test]
    fn an_endless_line_is_cut_and_wide_writes_are_refused() {
        let (mut console, lines) = console();
        print(&mut console, &[0xff; LINE_BYTES_MAX + 1]);
        assert_eq!(lines.lock().unwrap().len(), 1);
        assert_eq!(console.write(Access::new(0, Width::B4), 0x41), Err(BusFault::BadWidth));
    }

    #[test]
    fn half_a_line_is_ended_after_a_restore() {
        let (mut first, _) = console();
        print(&mut first, b"begun ");
        let state = testing::matches_golden(&first.save());
        let (mut second, lines) = console();
        second.restore(&state).unwrap();
        print(&mut second, b"and ended\n");
        assert_eq!(*lines.lock().unwrap(), ["begun and ended"]);
        testing::spoil(&state, |bad| {
            let (mut console, _) = console();
            let _ = console.restore(bad);
            print(&mut console, &[b'x'; LINE_BYTES_MAX]);
            assert!(console.line.len() < LINE_BYTES_MAX);
        });
    }
}
