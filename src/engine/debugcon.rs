//! Debug console, port 0x402: the firmware's log, one byte at a time.

use super::bus::{Access, BusDevice, BusFault, Effect};

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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::engine::bus::Width;

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
}
