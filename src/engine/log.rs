//! The guest's log: what the engine and the firmware had to say, in a bounded file that outlives both.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    sync::{Arc, Mutex, PoisonError},
};

use time::{OffsetDateTime, macros::format_description};

/// The file never grows beyond; the older half goes then.
pub const LOG_BYTES_MAX: u64 = 1 << 20;

/// Cloning gives another handle on the same log.
#[derive(Clone)]
pub struct GuestLog(Arc<Mutex<File>>);

impl GuestLog {
    /// `file` is open for reading and appending.
    pub fn new(file: File) -> GuestLog {
        GuestLog(Arc::new(Mutex::new(file)))
    }

    /// Adds lines, each with the time. A log that cannot be written is no reason to stop a guest.
    pub fn say(&self, text: &str) {
        let now = OffsetDateTime::now_utc();
        let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second].[subsecond digits:3]");
        let stamp = now.format(format).unwrap_or_default();
        let mut lines = String::new();
        for line in text.lines() {
            lines += &format!("{stamp} {line}\n");
        }
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = file.write_all(lines.as_bytes()).and_then(|()| shorten(&mut file));
    }
}

/// Keeps the newer half, from the start of a line.
fn shorten(file: &mut File) -> std::io::Result<()> {
    if file.metadata()?.len() <= LOG_BYTES_MAX {
        return Ok(());
    }
    let mut kept = Vec::new();
    file.seek(SeekFrom::End(-(LOG_BYTES_MAX as i64 / 2)))?;
    file.read_to_end(&mut kept)?;
    let start = kept.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    file.set_len(0)?;
    file.write_all(kept.get(start..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_its_newest_lines_and_its_bound() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let file = File::options().create(true).read(true).append(true).open(&path).unwrap();
        let log = GuestLog::new(file);
        for number in 0..30_000 {
            log.say(&format!("line {number} of many, long enough to fill the file at some time"));
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() as u64 <= LOG_BYTES_MAX, "{}", text.len());
        assert!(text.ends_with("line 29999 of many, long enough to fill the file at some time\n"));
        assert!(text.starts_with("20"), "begins with a whole line: {}", &text[..40]);
    }
}
