//! Waiting for a task of the server, with its progress on a terminal.

use std::{
    io::{self, IsTerminal, Write},
    thread::sleep,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{Failure, Outcome, client::Client, client::encode};
use crate::types::show_size;

const POLL: Duration = Duration::from_millis(200);
/// How often a line of progress is written again.
const SHOW: Duration = Duration::from_millis(500);

/// The part of a task that matters here.
#[derive(Debug, Deserialize, Serialize)]
struct Task {
    state: String,
    #[serde(default)]
    title: String,
    #[serde(default)]
    step: String,
    #[serde(default)]
    done: u64,
    total: Option<u64>,
    error: Option<String>,
}

/// Returns when the task has ended well. Errors: its own sentence, when it has not.
pub fn wait(client: &Client, id: &str) -> Outcome {
    let mut line = ProgressLine::default();
    loop {
        let task: Task = client.get(&format!("/api/v1/tasks/{}", encode(id)))?;
        match task.state.as_str() {
            "running" => {
                let step = if task.step.is_empty() { &task.title } else { &task.step };
                line.show(step, task.done, task.total);
                sleep(POLL);
            }
            "done" => return Ok(()),
            other => {
                let why = task.error.filter(|why| !why.is_empty());
                return Err(Failure::failed(why.unwrap_or_else(|| format!("{}: {other}.", task.title))));
            }
        }
    }
}

/// One line on standard error that is written over itself; nothing when that is not a terminal.
pub struct ProgressLine {
    shown: Option<Instant>,
    terminal: bool,
}

impl Default for ProgressLine {
    fn default() -> ProgressLine {
        ProgressLine { shown: None, terminal: io::stderr().is_terminal() }
    }
}

impl ProgressLine {
    pub fn show(&mut self, step: &str, done: u64, total: Option<u64>) {
        if !self.terminal || self.shown.is_some_and(|shown| shown.elapsed() < SHOW) {
            return;
        }
        self.shown = Some(Instant::now());
        let step: String = step.chars().filter(|c| !c.is_control()).take(50).collect();
        let amount = match total {
            Some(total) if total > 0 => {
                let percent = u128::from(done.min(total)) * 100 / u128::from(total);
                format!("{percent} % of {}", show_size(total))
            }
            _ => show_size(done),
        };
        let _ = write!(io::stderr(), "\r\x1b[K{step}: {amount}");
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.terminal && self.shown.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
