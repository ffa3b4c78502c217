//! The pages of the image library and of tasks.

use super::*;

/// What an image can be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    Cd,
    Disk,
    /// A kernel, an initrd, or something that is not known.
    File,
}

impl ImageKind {
    pub fn word(self) -> &'static str {
        match self {
            ImageKind::Cd => "CD",
            ImageKind::Disk => "disk",
            ImageKind::File => "file",
        }
    }

    pub fn icon(self) -> &'static str {
        match self {
            ImageKind::Cd => "disc-3",
            ImageKind::Disk => "hard-drive",
            ImageKind::File => "file-text",
        }
    }
}

/// One image of the library.
#[derive(Clone, Debug)]
pub struct ImageLine {
    pub id: String,
    pub name: String,
    pub kind: ImageKind,
    /// Its file is complete.
    pub ready: bool,
    pub size: Bytes,
    /// Lower-case hexadecimal, when known.
    pub sha256: Option<String>,
    pub added: Moment,
    /// Names of the guests that use it; it cannot be deleted while there are any.
    pub used_by: Vec<String>,
    /// Where it came from: "upload", an address, a path.
    pub origin: String,
    /// While it is being fetched or converted: the task's id.
    pub task: Option<String>,
}

/// `/images`, and again with errors (422) after its POSTs. Live: `image-rows`.
#[derive(Template)]
#[template(path = "images.html", blocks = ["rows"])]
pub struct ImagesPage {
    pub chrome: Chrome,
    pub images: Vec<ImageLine>,
    /// Free space where images are kept.
    pub free: Bytes,
    /// "upload", "fetch" or "host": the form that was sent, opened again with its errors.
    pub open_form: &'static str,
    pub errors: FieldErrors,
    pub fields: ImageFields,
}

/// What the forms of the image page held, as typed.
#[derive(Clone, Debug, Default)]
pub struct ImageFields {
    pub name: String,
    pub url: String,
    pub sha256: String,
    pub path: String,
}

live!(ImagesPage: "image-rows" => as_rows);

/// How a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskState {
    Queued,
    Running,
    Done,
    Failed,
    Cancelled,
    /// The server ended while it ran.
    Interrupted,
}

impl TaskState {
    pub fn word(self) -> &'static str {
        match self {
            TaskState::Queued => "queued",
            TaskState::Running => "running",
            TaskState::Done => "done",
            TaskState::Failed => "failed",
            TaskState::Cancelled => "cancelled",
            TaskState::Interrupted => "interrupted",
        }
    }

    /// The state of a guest with the same shape and colour.
    pub fn css(self) -> &'static str {
        match self {
            TaskState::Queued => "unknown",
            TaskState::Running => "starting",
            TaskState::Done => "running",
            TaskState::Failed | TaskState::Interrupted => "failed",
            TaskState::Cancelled => "stopped",
        }
    }

    pub fn is_over(self) -> bool {
        !matches!(self, TaskState::Queued | TaskState::Running)
    }
}

/// One task.
#[derive(Clone, Debug)]
pub struct TaskLine {
    pub id: String,
    /// "Fetch debian-12.iso".
    pub title: String,
    /// Label and path of what it works on.
    pub subject: Option<(String, String)>,
    pub who: String,
    pub state: TaskState,
    /// What it does now: "Writing", "1.2 of 3.4 GiB, 84 MiB/s, 25 s left".
    pub step: String,
    /// Unknown for a task without a total.
    pub done: Option<Percent>,
    pub started: Moment,
    pub ended: Option<Moment>,
    /// What, why and what next.
    pub error: Option<String>,
    pub can_cancel: bool,
}

/// `/tasks`. Live: `task-rows`.
#[derive(Template)]
#[template(path = "tasks/list.html", blocks = ["rows"])]
pub struct TasksPage {
    pub chrome: Chrome,
    pub tasks: Vec<TaskLine>,
}

live!(TasksPage: "task-rows" => as_rows);

/// One line of a task's log.
#[derive(Clone, Debug)]
pub struct LogLine {
    pub at: Moment,
    pub text: String,
}

/// `/tasks/{id}`. Live: `task-live`.
#[derive(Template)]
#[template(path = "tasks/task.html", blocks = ["live"])]
pub struct TaskPage {
    pub chrome: Chrome,
    pub task: TaskLine,
    pub log: Vec<LogLine>,
}

live!(TaskPage: "task-live" => as_live);
