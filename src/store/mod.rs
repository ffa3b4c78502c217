//! The database: one SQLite file in the state directory. Nothing outside `store/` names SQLite.
//!
//! One writer and one reader connection, each behind a mutex; WAL lets the reader go on while the writer waits for the disk.
//! Queries are free functions on `&Tx`, so that they compose in one transaction. Absence is `Ok(None)`, and only absence.

pub mod guests;
pub mod images;
pub mod tasks;
pub mod users;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, Transaction, TransactionBehavior, types::FromSql};

use crate::{
    error::{Error, ErrorKind, Result},
    types::now_ms,
};

/// The file's name in the state directory.
pub const FILE: &str = "innkeeper.db";
const MIGRATIONS: &[&str] = &[
    include_str!("migrations/0001_first.sql"),
    include_str!("migrations/0002_secure_boot.sql"),
    include_str!("migrations/0003_boot_order.sql"),
    include_str!("migrations/0004_nvme_e1000.sql"),
    include_str!("migrations/0005_topology.sql"),
    include_str!("migrations/0006_watchdog.sql"),
    include_str!("migrations/0007_suspended.sql"),
    include_str!("migrations/0008_processor.sql"),
    include_str!("migrations/0009_usb_disks.sql"),
    include_str!("migrations/0010_disk_limits.sql"),
    include_str!("migrations/0011_plugged_disks.sql"),
    include_str!("migrations/0012_graphics_keyboard.sql"),
    include_str!("migrations/0013_tpm.sql"),
];
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

pub struct Store {
    writer: Mutex<Connection>,
    reader: Mutex<Connection>,
}

/// One transaction, with the one clock reading everything in it shares.
pub struct Tx<'a> {
    sql: Transaction<'a>,
    pub now_ms: i64,
}

impl Store {
    /// Opens the database of a state directory, makes it when it is not there, and migrates it.
    ///
    /// Errors: `Conflict` when the file is of a newer release; `Internal` when it cannot be opened or is damaged.
    pub fn open(state_dir: &Path) -> Result<Store> {
        let path = state_dir.join(FILE);
        let mut writer = connect(&path)?;
        let cannot = |error| Error::internal(format!("Cannot keep {} private.", path.display()), error);
        crate::state_files::make_private(&path).map_err(cannot)?;
        migrate(&mut writer, &path)?;
        let reader = connect(&path)?;
        reader.pragma_update(None, "query_only", true)?;
        Ok(Store { writer: Mutex::new(writer), reader: Mutex::new(reader) })
    }

    /// Runs `work` in one immediate transaction; commits on `Ok`, rolls back on `Err` and on panic. Blocks.
    pub fn write<T>(&self, work: impl FnOnce(&Tx) -> Result<T>) -> Result<T> {
        let mut db = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let sql = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let tx = Tx { sql, now_ms: now_ms() };
        let out = work(&tx)?;
        tx.sql.commit()?;
        Ok(out)
    }

    /// Runs `work` on one consistent view; writing in it fails. Blocks, for as long as other readers take.
    pub fn read<T>(&self, work: impl FnOnce(&Tx) -> Result<T>) -> Result<T> {
        let mut db = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let tx = Tx { sql: db.transaction_with_behavior(TransactionBehavior::Deferred)?, now_ms: now_ms() };
        work(&tx)
    }

    /// [`Store::write`] for async callers, on a thread that may block.
    pub async fn writing<T: Send + 'static>(
        self: &Arc<Store>,
        work: impl FnOnce(&Tx) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = Arc::clone(self);
        blocking(move || store.write(work)).await
    }

    /// [`Store::read`] for async callers, on a thread that may block.
    pub async fn reading<T: Send + 'static>(
        self: &Arc<Store>,
        work: impl FnOnce(&Tx) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = Arc::clone(self);
        blocking(move || store.read(work)).await
    }

    /// What SQLite finds wrong with the file; empty when nothing is.
    pub fn check(&self) -> Result<Vec<String>> {
        let db = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = Vec::new();
        for pragma in ["PRAGMA integrity_check", "PRAGMA foreign_key_check"] {
            let mut query = db.prepare(pragma)?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                let line: String = row.get(0)?;
                if line != "ok" {
                    found.push(line);
                }
            }
        }
        Ok(found)
    }

    /// Rebuilds indexes and writes the file anew as `into`, which must not exist.
    pub fn rebuild(&self, into: &Path) -> Result<()> {
        let db = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        db.execute_batch("REINDEX")?;
        db.execute("VACUUM INTO ?1", [into.to_string_lossy()])?;
        Ok(())
    }
}

impl Tx<'_> {
    /// Runs one statement; how many rows it changed.
    fn run(&self, sql: &str, values: impl rusqlite::Params) -> Result<usize> {
        Ok(self.sql.prepare_cached(sql)?.execute(values)?)
    }

    /// The first row, when there is one.
    fn one<T>(
        &self,
        sql: &str,
        values: impl rusqlite::Params,
        row: impl FnOnce(&Row) -> rusqlite::Result<T>,
    ) -> Result<Option<T>> {
        Ok(self.sql.prepare_cached(sql)?.query_row(values, row).optional()?)
    }

    fn all<T>(
        &self,
        sql: &str,
        values: impl rusqlite::Params,
        row: impl FnMut(&Row) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        let mut query = self.sql.prepare_cached(sql)?;
        let rows = query.query_map(values, row)?;
        Ok(rows.collect::<rusqlite::Result<Vec<T>>>()?)
    }

    fn count(&self, sql: &str, values: impl rusqlite::Params) -> Result<u64> {
        let count: Option<i64> = self.one(sql, values, |row| row.get(0))?;
        Ok(count.and_then(|count| u64::try_from(count).ok()).unwrap_or(0))
    }
}

/// A column that is stored as text and parsed into a type of ours. A row that does not parse is damage, not absence.
fn parsed<T>(row: &Row, column: &str) -> rusqlite::Result<T>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let text: String = row.get(column)?;
    text.parse().map_err(|error| damaged(row, column, error))
}

/// Like `parsed`, for a column that may be NULL.
fn maybe_parsed<T>(row: &Row, column: &str) -> rusqlite::Result<Option<T>>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let text: Option<String> = row.get(column)?;
    text.map(|text| text.parse().map_err(|error| damaged(row, column, error))).transpose()
}

/// A size or count: never negative in the file.
fn unsigned<T: TryFrom<i64>>(row: &Row, column: &str) -> rusqlite::Result<T>
where
    T::Error: std::error::Error + Send + Sync + 'static,
{
    let number: i64 = get(row, column)?;
    T::try_from(number).map_err(|error| damaged(row, column, error))
}

fn get<T: FromSql>(row: &Row, column: &str) -> rusqlite::Result<T> {
    row.get(column)
}

fn damaged(row: &Row, column: &str, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    let index = row.as_ref().column_index(column).unwrap_or(0);
    rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Text, Box::new(error))
}

/// SQLite's integers are signed; nothing of ours comes near the limit.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Error {
        let kind = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => {
                return Error::new(ErrorKind::NoCapacity, "The disk that holds the state directory is full.")
                    .because(error);
            }
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                return Error::new(ErrorKind::Unavailable, "The database is busy; try again.").because(error);
            }
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                "The database is damaged; \"innkeeper admin check-database\" says more."
            }
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                "The database cannot be opened for writing."
            }
            _ => "The database did not do as asked.",
        };
        Error::internal(kind, error)
    }
}

/// Runs `work` on a thread that may block. A panic in it becomes an `Internal` error.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::internal("Something went wrong inside the server.", error)),
    }
}

fn connect(path: &PathBuf) -> Result<Connection> {
    let open = || -> rusqlite::Result<Connection> {
        let db = Connection::open(path)?;
        db.busy_timeout(BUSY_TIMEOUT)?;
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "synchronous", "FULL")?;
        db.pragma_update(None, "foreign_keys", true)?;
        db.pragma_update(None, "trusted_schema", false)?;
        Ok(db)
    };
    open().map_err(|error| Error::internal(format!("Cannot open the database {}.", path.display()), error))
}

fn migrate(db: &mut Connection, path: &Path) -> Result<()> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let done: usize = tx.pragma_query_value(None, "user_version", |row| unsigned(row, "user_version"))?;
    let Some(pending) = MIGRATIONS.get(done..) else {
        return Err(Error::conflict(format!(
            "The database {} has version {done}; this release knows up to {}. Start a newer release of Innkeeper.",
            path.display(),
            MIGRATIONS.len()
        )));
    };
    for sql in pending {
        tx.execute_batch(sql)?;
    }
    if !pending.is_empty() {
        tx.pragma_update(None, "user_version", signed(MIGRATIONS.len() as u64))?;
    }
    Ok(tx.commit()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database in a folder that goes with the test.
    pub(crate) fn sample() -> (tempfile::TempDir, Arc<Store>) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        (dir, Arc::new(store))
    }

    #[test]
    fn a_new_file_is_strict_durable_and_whole() {
        let (_dir, store) = sample();
        assert_eq!(store.check().unwrap(), Vec::<String>::new());
        let db = store.writer.lock().unwrap();
        let pragma =
            |name: &str| db.pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0)).unwrap();
        assert_eq!(pragma("journal_mode"), rusqlite::types::Value::Text("wal".into()));
        assert_eq!(pragma("synchronous"), rusqlite::types::Value::Integer(2));
        assert_eq!(pragma("foreign_keys"), rusqlite::types::Value::Integer(1));
        let loose: i64 = db
            .query_row("SELECT count(*) FROM pragma_table_list WHERE schema='main' AND type='table' AND strict=0 AND name NOT LIKE 'sqlite_%'", [], |row| row.get(0))
            .unwrap();
        assert_eq!(loose, 0);
    }

    #[test]
    fn guests_and_disks_of_an_older_release_are_all_there_after_it_was_migrated() {
        let dir = tempfile::tempdir().unwrap();
        let db = connect(&dir.path().join(FILE)).unwrap();
        for sql in &MIGRATIONS[..2] {
            db.execute_batch(sql).unwrap();
        }
        db.execute_batch(
            "PRAGMA user_version = 2;
             INSERT INTO guests (id, name, machine, desired, cpus, memory_bytes, boot, secure_boot, network, mac, created_ms)
                 VALUES ('guest222', 'old', 'pc-1', 'on', 4, 1048576, 'uefi', 1, 'nat', '52:54:00:00:00:01', 1);
             INSERT INTO disks (id, guest_id, position, bus, size_bytes, ready, created_ms)
                 VALUES ('desk2222', 'guest222', 0, 'ahci', 512, 1, 1), ('desk3333', 'guest222', 1, 'virtio', 1024, 0, 9);",
        )
        .unwrap();
        drop(db);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.check().unwrap(), Vec::<String>::new());
        let (rows, disks) = store.read(|tx| Ok((guests::list(tx)?, guests::all_disks(tx)?))).unwrap();
        let [row] = rows.as_slice() else { panic!("one guest: {rows:?}") };
        assert_eq!((row.cpus, row.sockets, row.threads, row.boot_order.len()), (4, 1, 1, 0));
        let seen: Vec<_> =
            disks.iter().map(|disk| (disk.id.as_str(), disk.bus.as_str(), disk.size_bytes, disk.ready)).collect();
        assert_eq!(seen, [("desk2222", "ahci", 512, true), ("desk3333", "virtio", 1024, false)]);
    }

    #[test]
    fn a_newer_file_is_refused_by_name() {
        let (dir, store) = sample();
        store.writer.lock().unwrap().pragma_update(None, "user_version", 99).unwrap();
        drop(store);
        let error = Store::open(dir.path()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(error.to_string().contains("innkeeper.db has version 99"), "{error}");
    }

    #[test]
    fn an_error_rolls_everything_back() {
        let (dir, store) = sample();
        let failed: Result<()> = store.write(|tx| {
            users::set_setting(tx, "colour", "green")?;
            Err(Error::conflict("changed my mind"))
        });
        assert!(failed.is_err());
        assert_eq!(store.read(|tx| users::setting(tx, "colour")).unwrap(), None);
        store.write(|tx| users::set_setting(tx, "colour", "red")).unwrap();
        drop(store);
        let again = Store::open(dir.path()).unwrap();
        assert_eq!(again.read(|tx| users::setting(tx, "colour")).unwrap().as_deref(), Some("red"));
        assert!(again.read(|tx| users::set_setting(tx, "colour", "blue")).is_err(), "a reader cannot write");
    }
}
