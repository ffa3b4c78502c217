//! What takes long: work in the background with progress, a log and cancel. Each task is a row; the work gets a [`Progress`].

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use crate::{
    changes::{Change, Changes},
    error::{Error, Result},
    store::{
        Store,
        tasks::{self, LogRow, TaskRow, TaskState},
    },
    types::Id,
};

/// Progress is written and told at most this often.
pub const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// The list shows this many.
pub const LIST_LEN: u32 = 100;

/// What a task is, said once at its start.
#[derive(Debug, Clone)]
pub struct NewTask {
    /// `fetch_image`, `copy_disk`, …
    pub kind: &'static str,
    /// "Fetch debian-12.iso".
    pub title: String,
    /// The path of the page of what it works on, or "".
    pub subject: String,
    pub who: String,
}

#[derive(Clone)]
pub struct Tasks(Arc<Inner>);

struct Inner {
    store: Arc<Store>,
    changes: Changes,
    runtime: Handle,
    /// Cancel flags of what runs.
    running: Mutex<HashMap<Id, Arc<AtomicBool>>>,
    count: AtomicU64,
}

impl Tasks {
    /// Tasks of a server that starts: what its predecessor left running is `interrupted` now.
    ///
    /// `runtime` carries the work; it must live as long as the server.
    pub fn start(store: Arc<Store>, changes: Changes, runtime: Handle) -> Result<Tasks> {
        let left = store.write(tasks::interrupt_running)?;
        if left > 0 {
            tracing::warn!(left, "tasks were interrupted by the end of the server");
        }
        Ok(Tasks(Arc::new(Inner { store, changes, runtime, running: Mutex::default(), count: AtomicU64::new(0) })))
    }

    /// Begins a task; the caller does the work and ends it.
    pub async fn begin(&self, new: NewTask) -> Result<Progress> {
        let id = Id::random();
        let row = id.clone();
        self.0.store.writing(move |tx| tasks::insert(tx, &row, new.kind, &new.title, &new.subject, &new.who)).await?;
        let cancel = Arc::new(AtomicBool::new(false));
        self.running().insert(id.clone(), Arc::clone(&cancel));
        self.0.count.fetch_add(1, Relaxed);
        self.0.changes.tell(Change::Task(id.clone()));
        Ok(Progress { id, tasks: self.clone(), cancel, last: None, ended: false })
    }

    /// Runs `work` on a thread that may block, and ends `progress` by its result.
    pub fn run(&self, mut progress: Progress, work: impl FnOnce(&mut Progress) -> Result<()> + Send + 'static) {
        self.0.runtime.spawn_blocking(move || {
            let result = work(&mut progress);
            progress.end(result);
        });
    }

    /// Asks a task to stop; it does so at its next report.
    ///
    /// Errors: `NotFound`; `Conflict` when it has ended.
    pub async fn cancel(&self, id: &Id) -> Result<()> {
        let row = self.get(id).await?.0;
        match self.running().get(id) {
            Some(cancel) => cancel.store(true, Relaxed),
            None => return Err(Error::conflict(format!("\"{}\" has ended already.", row.title))),
        }
        Ok(())
    }

    /// Asks all to stop: the server ends.
    pub fn cancel_all(&self) {
        self.running().values().for_each(|cancel| cancel.store(true, Relaxed));
    }

    /// Newest first.
    pub async fn list(&self) -> Result<Vec<TaskRow>> {
        self.0.store.reading(|tx| tasks::list(tx, LIST_LEN)).await
    }

    /// One with its log.
    pub async fn get(&self, id: &Id) -> Result<(TaskRow, Vec<LogRow>)> {
        let id = id.clone();
        self.0
            .store
            .reading(move |tx| {
                let row = tasks::by_id(tx, &id)?.ok_or_else(|| Error::not_found("There is no such task."))?;
                Ok((row, tasks::log_of(tx, &id)?))
            })
            .await
    }

    /// How many run now.
    pub fn running_count(&self) -> usize {
        usize::try_from(self.0.count.load(Relaxed)).unwrap_or(usize::MAX)
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<Id, Arc<AtomicBool>>> {
        self.0.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The work was cancelled; `?` turns it into an error, which ends the task as `cancelled`.
#[derive(Debug)]
pub struct Cancelled;

impl From<Cancelled> for Error {
    fn from(_: Cancelled) -> Error {
        Error::conflict("This was cancelled.")
    }
}

/// Handed to the work. Ends the task even if the work panics.
pub struct Progress {
    id: Id,
    tasks: Tasks,
    cancel: Arc<AtomicBool>,
    last: Option<Instant>,
    ended: bool,
}

impl Progress {
    pub fn id(&self) -> &Id {
        &self.id
    }

    /// Says how far the work is, and learns whether to stop. Blocks for one write to the database at most twice a second.
    pub fn report(&mut self, step: &str, done: u64, total: Option<u64>) -> Result<(), Cancelled> {
        if self.cancel.load(Relaxed) {
            return Err(Cancelled);
        }
        if self.last.is_none_or(|last| last.elapsed() >= PROGRESS_INTERVAL) {
            self.last = Some(Instant::now());
            self.keep(|store, id| store.write(|tx| tasks::set_progress(tx, id, step, done, total)));
        }
        Ok(())
    }

    /// Whether the work should stop. For work that has nothing to report.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.load(Relaxed)
    }

    /// Adds a line to the task's log.
    pub fn log(&self, text: &str) {
        self.keep(|store, id| store.write(|tx| tasks::log(tx, id, text)));
    }

    /// Ends the task by the result of its work.
    pub fn end(mut self, result: Result<()>) {
        match result {
            Ok(()) => self.finish(TaskState::Done, None),
            Err(_) if self.is_cancelled() => self.finish(TaskState::Cancelled, None),
            Err(error) => {
                tracing::warn!(task = %self.id, error = %error.for_log(), "a task failed");
                self.finish(TaskState::Failed, Some(&error.to_string()));
            }
        }
    }

    fn finish(&mut self, state: TaskState, error: Option<&str>) {
        self.ended = true;
        self.tasks.running().remove(&self.id);
        self.tasks.0.count.fetch_sub(1, Relaxed);
        self.keep(|store, id| store.write(|tx| tasks::finish(tx, id, state, error)));
    }

    /// Writes to the row and tells everybody. The work goes on when the database does not.
    fn keep(&self, write: impl FnOnce(&Store, &Id) -> Result<()>) {
        if let Err(error) = write(&self.tasks.0.store, &self.id) {
            tracing::error!(task = %self.id, error = %error.for_log(), "cannot note the progress of a task");
        }
        self.tasks.0.changes.tell(Change::Task(self.id.clone()));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if !self.ended {
            self.finish(TaskState::Interrupted, Some("The work ended without a word; the server's log says more."));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (tempfile::TempDir, Arc<Store>, Tasks) {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path()).unwrap());
        let tasks = Tasks::start(Arc::clone(&store), Changes::default(), Handle::current()).unwrap();
        (dir, store, tasks)
    }

    fn new(title: &str) -> NewTask {
        NewTask { kind: "test", title: title.into(), subject: String::new(), who: "ada".into() }
    }

    async fn ended(tasks: &Tasks, id: &Id) -> TaskRow {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let row = tasks.get(id).await.unwrap().0;
            if row.state != TaskState::Running {
                return row;
            }
            assert!(Instant::now() < deadline, "{row:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[actix_rt::test]
    async fn a_task_ends_as_its_work_does_even_by_panic() {
        let (_dir, _store, tasks) = sample();
        let mut ids = Vec::new();
        type Work = fn(&mut Progress) -> Result<()>;
        let works: [Work; 4] = [
            |progress| {
                progress.log("one line");
                Ok(progress.report("half", 1, Some(2))?)
            },
            |_| Err(Error::conflict("It did not fit.")),
            |progress| loop {
                progress.report("waiting", 0, None)?;
                std::thread::sleep(Duration::from_millis(1));
            },
            |_| panic!("a bug"),
        ];
        for work in works {
            let progress = tasks.begin(new("work")).await.unwrap();
            ids.push(progress.id().clone());
            tasks.run(progress, work);
        }
        tasks.cancel(&ids[2]).await.unwrap();
        let mut states = Vec::new();
        for id in &ids {
            let row = ended(&tasks, id).await;
            states.push((row.state, row.error));
        }
        assert_eq!(states[0], (TaskState::Done, None));
        assert_eq!(states[1], (TaskState::Failed, Some("It did not fit.".into())));
        assert_eq!(states[2], (TaskState::Cancelled, None));
        assert_eq!(states[3].0, TaskState::Interrupted);
        let (row, log) = tasks.get(&ids[0]).await.unwrap();
        assert_eq!((row.step.as_str(), row.done, row.total, log.len()), ("half", 1, Some(2), 1));
        assert_eq!(tasks.running_count(), 0);
        assert!(tasks.cancel(&ids[0]).await.is_err(), "what has ended cannot be cancelled");
    }

    #[actix_rt::test]
    async fn a_new_server_finds_the_old_ones_tasks_interrupted() {
        let (_dir, store, tasks) = sample();
        let progress = tasks.begin(new("left")).await.unwrap();
        let id = progress.id().clone();
        let tasks = Tasks::start(store, Changes::default(), Handle::current()).unwrap();
        assert_eq!(tasks.get(&id).await.unwrap().0.state, TaskState::Interrupted);
        drop(progress);
    }
}
