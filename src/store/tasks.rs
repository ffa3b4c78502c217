//! Tasks and their logs as rows.

use std::{fmt, str::FromStr};

use rusqlite::{Row, named_params, params};
use serde::{Deserialize, Serialize};

use super::{Tx, get, parsed, signed, unsigned};
use crate::{
    error::Result,
    types::{BadValue, Id},
};

/// How a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    Running,
    Done,
    Failed,
    Cancelled,
    /// The server ended while it ran.
    Interrupted,
}

impl TaskState {
    const ALL: [TaskState; 5] =
        [TaskState::Running, TaskState::Done, TaskState::Failed, TaskState::Cancelled, TaskState::Interrupted];

    pub fn as_str(self) -> &'static str {
        match self {
            TaskState::Running => "running",
            TaskState::Done => "done",
            TaskState::Failed => "failed",
            TaskState::Cancelled => "cancelled",
            TaskState::Interrupted => "interrupted",
        }
    }
}
impl fmt::Display for TaskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
impl FromStr for TaskState {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<TaskState, BadValue> {
        TaskState::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| BadValue(format!("\"{text}\" is no state of a task")))
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct TaskRow {
    pub id: Id,
    /// `fetch_image`, `copy_disk`, …
    pub kind: String,
    /// "Fetch debian-12.iso".
    pub title: String,
    /// The path of the page of what it works on, or "".
    pub subject: String,
    pub who: String,
    pub state: TaskState,
    pub step: String,
    pub done: u64,
    pub total: Option<u64>,
    pub started_ms: i64,
    pub ended_ms: Option<i64>,
    pub error: Option<String>,
}

fn task(row: &Row) -> rusqlite::Result<TaskRow> {
    let total: Option<i64> = get(row, "total")?;
    Ok(TaskRow {
        id: parsed(row, "id")?,
        kind: get(row, "kind")?,
        title: get(row, "title")?,
        subject: get(row, "subject")?,
        who: get(row, "who")?,
        state: parsed(row, "state")?,
        step: get(row, "step")?,
        done: unsigned(row, "done")?,
        total: total.and_then(|total| u64::try_from(total).ok()),
        started_ms: get(row, "started_ms")?,
        ended_ms: get(row, "ended_ms")?,
        error: get(row, "error")?,
    })
}

/// The list keeps this many ended tasks.
pub const TASKS_LEN_MAX: i64 = 500;

/// A new, running task. Forgets the oldest ended ones beyond `TASKS_LEN_MAX`.
pub fn insert(tx: &Tx, id: &Id, kind: &str, title: &str, subject: &str, who: &str) -> Result<()> {
    tx.run(
        "INSERT INTO tasks (id, kind, title, subject, who, state, started_ms)
         VALUES (:id, :kind, :title, :subject, :who, 'running', :now)",
        named_params! {":id": id.as_str(), ":kind": kind, ":title": title, ":subject": subject, ":who": who,
        ":now": tx.now_ms},
    )?;
    tx.run(
        "DELETE FROM tasks WHERE state <> 'running' AND id NOT IN
             (SELECT id FROM tasks ORDER BY started_ms DESC, rowid DESC LIMIT ?1)",
        [TASKS_LEN_MAX],
    )?;
    Ok(())
}

pub fn set_progress(tx: &Tx, id: &Id, step: &str, done: u64, total: Option<u64>) -> Result<()> {
    tx.run(
        "UPDATE tasks SET step = ?2, done = ?3, total = ?4 WHERE id = ?1 AND state = 'running'",
        params![id.as_str(), step, signed(done), total.map(signed)],
    )?;
    Ok(())
}

/// Ends a running task; ending it again changes nothing.
pub fn finish(tx: &Tx, id: &Id, state: TaskState, error: Option<&str>) -> Result<()> {
    tx.run(
        "UPDATE tasks SET state = ?2, error = ?3, ended_ms = ?4 WHERE id = ?1 AND state = 'running'",
        params![id.as_str(), state.as_str(), error, tx.now_ms],
    )?;
    Ok(())
}

/// At start of the server: what it was doing when it ended.
pub fn interrupt_running(tx: &Tx) -> Result<usize> {
    tx.run(
        "UPDATE tasks SET state = 'interrupted', ended_ms = ?1, error = 'The server ended while this ran.'
         WHERE state = 'running'",
        [tx.now_ms],
    )
}

pub fn by_id(tx: &Tx, id: &Id) -> Result<Option<TaskRow>> {
    tx.one("SELECT * FROM tasks WHERE id = ?1", [id.as_str()], task)
}

/// Newest first.
pub fn list(tx: &Tx, at_most: u32) -> Result<Vec<TaskRow>> {
    tx.all("SELECT * FROM tasks ORDER BY started_ms DESC, rowid DESC LIMIT ?1", [at_most], task)
}

pub fn running(tx: &Tx) -> Result<u64> {
    tx.count("SELECT count(*) FROM tasks WHERE state = 'running'", [])
}

/// One line of a task's log.
#[derive(Debug, Clone, Serialize)]
pub struct LogRow {
    pub at_ms: i64,
    pub text: String,
}

pub fn log(tx: &Tx, id: &Id, text: &str) -> Result<()> {
    tx.run("INSERT INTO task_log (task_id, at_ms, text) VALUES (?1, ?2, ?3)", params![id.as_str(), tx.now_ms, text])?;
    Ok(())
}

pub fn log_of(tx: &Tx, id: &Id) -> Result<Vec<LogRow>> {
    tx.all("SELECT at_ms, text FROM task_log WHERE task_id = ?1 ORDER BY rowid", [id.as_str()], |row| {
        Ok(LogRow { at_ms: get(row, "at_ms")?, text: get(row, "text")? })
    })
}
