//! The image library as rows.

use std::{fmt, path::PathBuf, str::FromStr};

use rusqlite::{Row, named_params, params};
use serde::{Deserialize, Serialize};

use super::{Tx, get, maybe_parsed, parsed, signed, unsigned};
use crate::{
    error::Result,
    types::{BadValue, Id, Name},
};

/// What an image can be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageKind {
    /// A CD.
    Iso,
    /// A raw disk.
    Disk,
    Kernel,
    Initrd,
    Other,
}

impl ImageKind {
    pub const ALL: [ImageKind; 5] =
        [ImageKind::Iso, ImageKind::Disk, ImageKind::Kernel, ImageKind::Initrd, ImageKind::Other];

    pub fn as_str(self) -> &'static str {
        match self {
            ImageKind::Iso => "iso",
            ImageKind::Disk => "disk",
            ImageKind::Kernel => "kernel",
            ImageKind::Initrd => "initrd",
            ImageKind::Other => "other",
        }
    }
}
impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
impl FromStr for ImageKind {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<ImageKind, BadValue> {
        ImageKind::ALL
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| BadValue("An image is an iso, disk, kernel, initrd or other.".into()))
    }
}

#[derive(Debug, Clone)]
pub struct ImageRow {
    pub id: Id,
    pub name: Name,
    pub kind: ImageKind,
    /// Its file is complete.
    pub ready: bool,
    pub size_bytes: u64,
    /// Lower-case hexadecimal; of what was received, before a conversion.
    pub sha256: Option<String>,
    /// "upload", an address, "host file".
    pub source: String,
    /// The file it is, when it is not in the library's folder.
    pub host_path: Option<PathBuf>,
    /// What fills it.
    pub task_id: Option<Id>,
    pub created_ms: i64,
}

fn image(row: &Row) -> rusqlite::Result<ImageRow> {
    let state: String = get(row, "state")?;
    let host_path: Option<String> = get(row, "host_path")?;
    Ok(ImageRow {
        id: parsed(row, "id")?,
        name: parsed(row, "name")?,
        kind: parsed(row, "kind")?,
        ready: state == "ready",
        size_bytes: unsigned(row, "size_bytes")?,
        sha256: get(row, "sha256")?,
        source: get(row, "source")?,
        host_path: host_path.map(PathBuf::from),
        task_id: maybe_parsed(row, "task_id")?,
        created_ms: get(row, "created_ms")?,
    })
}

pub fn list(tx: &Tx) -> Result<Vec<ImageRow>> {
    tx.all("SELECT * FROM images ORDER BY name", [], image)
}

pub fn by_id(tx: &Tx, id: &Id) -> Result<Option<ImageRow>> {
    tx.one("SELECT * FROM images WHERE id = ?1", [id.as_str()], image)
}

pub fn by_name(tx: &Tx, name: &str) -> Result<Option<ImageRow>> {
    tx.one("SELECT * FROM images WHERE name = ?1", [name], image)
}

/// By id, or else by name: what a person or a script says.
pub fn named(tx: &Tx, id_or_name: &str) -> Result<Option<ImageRow>> {
    tx.one("SELECT * FROM images WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC", [id_or_name], image)
}

pub fn by_host_path(tx: &Tx, path: &str) -> Result<Option<ImageRow>> {
    tx.one("SELECT * FROM images WHERE host_path = ?1", [path], image)
}

pub fn insert(tx: &Tx, row: &ImageRow) -> Result<()> {
    tx.run(
        "INSERT INTO images (id, name, kind, state, size_bytes, sha256, source, host_path, task_id, created_ms)
         VALUES (:id, :name, :kind, :state, :size_bytes, :sha256, :source, :host_path, :task_id, :created_ms)",
        named_params! {
            ":id": row.id.as_str(), ":name": row.name.as_str(), ":kind": row.kind.as_str(),
            ":state": if row.ready { "ready" } else { "uploading" }, ":size_bytes": signed(row.size_bytes),
            ":sha256": row.sha256, ":source": row.source,
            ":host_path": row.host_path.as_ref().and_then(|path| path.to_str()),
            ":task_id": row.task_id.as_ref().map(Id::as_str), ":created_ms": row.created_ms,
        },
    )?;
    Ok(())
}

/// The file is in its place: says what it is. False when the image is gone meanwhile.
pub fn set_ready(tx: &Tx, id: &Id, kind: ImageKind, size_bytes: u64, sha256: Option<&str>) -> Result<bool> {
    let changed = tx.run(
        "UPDATE images SET state = 'ready', kind = ?2, size_bytes = ?3, sha256 = ?4, task_id = NULL WHERE id = ?1",
        params![id.as_str(), kind.as_str(), signed(size_bytes), sha256],
    )?;
    Ok(changed > 0)
}

pub fn delete(tx: &Tx, id: &Id) -> Result<()> {
    tx.run("DELETE FROM images WHERE id = ?1", [id.as_str()])?;
    Ok(())
}

/// Names of the guests that use an image, sorted.
pub fn used_by(tx: &Tx, id: &Id) -> Result<Vec<String>> {
    tx.all(
        "SELECT name FROM guests WHERE ?1 IN (kernel_image_id, initrd_image_id, cd_image_id)
             OR id IN (SELECT guest_id FROM disks WHERE image_id = ?1) ORDER BY name",
        [id.as_str()],
        |row| row.get(0),
    )
}

/// Forgets images that were being received when the server ended; which ones.
pub fn delete_unfinished(tx: &Tx) -> Result<Vec<Id>> {
    tx.all("DELETE FROM images WHERE state = 'uploading' RETURNING id", [], |row| parsed(row, "id"))
}
