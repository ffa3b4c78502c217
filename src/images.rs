//! The image library: what guests boot from and copy. Files arrive by upload, by address or stay where they are on the host.
//!
//! A library file is `images/ID.part` while it arrives and `images/ID.raw` once it is whole; its row says `uploading` until
//! then, which reserves the name. Whatever ends early leaves neither file nor row.

pub mod convert;
pub mod detect;
pub mod fetch;
pub mod part;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle};
use tokio_util::bytes::Bytes;

use self::{
    detect::{Detected, HEAD_BYTES, detect},
    part::{Part, check_room},
};
use crate::{
    changes::{Change, Changes},
    error::{Error, ErrorKind, Result},
    host_client::HostClient,
    store::{
        Store, blocking,
        images::{self, ImageKind, ImageRow},
    },
    tasks::{NewTask, Progress, Tasks},
    types::{Id, NAME_LEN_MAX, Name, now_ms},
    wire::{HostAnswer, HostRequest, Place},
};

const FOLDER: &str = "images";
/// Pieces of an upload that wait for the disk.
const PIECES_WAITING: usize = 8;
const SHA256_LEN: usize = 64;
/// PATH_MAX of the kernel: no file has a longer path.
const PATH_BYTES_MAX: usize = 4096;

/// An image with the names of the guests that use it.
#[derive(Debug, Clone)]
pub struct Listed {
    pub row: ImageRow,
    pub used_by: Vec<String>,
}

/// What an image is to be, as typed.
#[derive(Debug, Clone, Default)]
pub struct NewImage {
    /// "" takes the file's own name.
    pub name: String,
    /// What the file is called where it comes from.
    pub file_name: String,
    /// "" compares nothing.
    pub sha256: String,
    pub kind: Option<ImageKind>,
    pub who: String,
}

/// The image, and the task that still works on it.
#[derive(Debug, Clone)]
pub struct Added {
    pub image: Id,
    pub task: Option<Id>,
}

#[derive(Clone)]
pub struct Images(Arc<Inner>);

struct Inner {
    store: Arc<Store>,
    changes: Changes,
    tasks: Tasks,
    host: HostClient,
    folder: PathBuf,
}

impl Images {
    /// Opens the library; removes what its predecessor left unfinished.
    pub fn start(
        store: Arc<Store>,
        changes: Changes,
        tasks: Tasks,
        host: HostClient,
        state_dir: &Path,
    ) -> Result<Images> {
        let folder = state_dir.join(FOLDER);
        fs::create_dir_all(&folder).map_err(|error| part::cannot_write(&folder, error))?;
        let left = store.write(images::delete_unfinished)?;
        for entry in fs::read_dir(&folder).map_err(|error| part::cannot_write(&folder, error))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let unfinished = name.ends_with(".part") || left.iter().any(|id| name == format!("{id}.raw"));
            if unfinished && let Err(error) = fs::remove_file(entry.path()) {
                tracing::warn!(%name, %error, "cannot remove an unfinished file");
            }
        }
        Ok(Images(Arc::new(Inner { store, changes, tasks, host, folder })))
    }

    pub async fn list(&self) -> Result<Vec<Listed>> {
        let listed = |tx: &crate::store::Tx| {
            let rows = images::list(tx)?.into_iter();
            rows.map(|row| Ok(Listed { used_by: images::used_by(tx, &row.id)?, row })).collect()
        };
        self.0.store.reading(listed).await
    }

    /// By id or name.
    pub async fn get(&self, id_or_name: &str) -> Result<Listed> {
        let named = id_or_name.to_owned();
        self.0
            .store
            .reading(move |tx| {
                let row = images::named(tx, &named)?.ok_or_else(|| no_such(&named))?;
                Ok(Listed { used_by: images::used_by(tx, &row.id)?, row })
            })
            .await
    }

    /// Free space where images are kept.
    pub fn free_bytes(&self) -> u64 {
        part::free_bytes(&self.0.folder).unwrap_or(0)
    }

    /// Opens an image for reading, wherever it is.
    ///
    /// Errors: `Conflict` while it arrives; what `hostd` says of a host file.
    pub async fn open(&self, row: &ImageRow) -> Result<File> {
        if !row.ready {
            return Err(Error::conflict(format!("\"{}\" is still arriving.", row.name)));
        }
        let place = match &row.host_path {
            Some(path) => Place::Host(path.clone()),
            None => Place::Image(row.id.clone()),
        };
        Ok(self.0.open_on_host(place).await?.0)
    }

    /// Begins an upload; the name is reserved and the room checked before a byte is read.
    ///
    /// Errors: `Invalid` at `name` or `sha256`, `Conflict` at `name`, `NoCapacity`.
    pub async fn receive(&self, new: NewImage, length: Option<u64>) -> Result<Incoming> {
        if length == Some(0) {
            return Err(empty());
        }
        let sha256 = checked_sha256(&new.sha256)?;
        check_room(&self.0.folder, length.unwrap_or(0))?;
        let row = self.0.reserve(&new, "upload", None).await?;
        let part = Part::create(&self.0.folder, &row.id);
        let (pieces, arriving) = mpsc::channel(PIECES_WAITING);
        let reserved = Reserved { library: self.clone(), id: row.id.clone(), kept: false, runtime: Handle::current() };
        let part = part?;
        let writer = tokio::task::spawn_blocking(move || write_pieces(part, arriving));
        Ok(Incoming { reserved, pieces: Some(pieces), writer: Some(writer), new, sha256, length })
    }

    /// Fetches an address in a task.
    ///
    /// Errors: `Invalid` at `url`, `name` or `sha256`, `Conflict` at `name`.
    pub async fn fetch(&self, url: &str, mut new: NewImage) -> Result<Added> {
        let uri = fetch::check_url(url.trim())?;
        let sha256 = checked_sha256(&new.sha256)?;
        new.file_name = fetch::file_name(&uri).to_owned();
        let progress = self.0.task("fetch_image", format!("Fetch {}", new.title()), &new.who).await?;
        let task = progress.id().clone();
        let row = match self.0.reserve(&new, &uri.to_string(), Some(task.clone())).await {
            Ok(row) => row,
            Err(error) => {
                progress.end(Err(Error::new(error.kind(), error.to_string())));
                return Err(error);
            }
        };
        let image = row.id.clone();
        let reserved = Reserved { library: self.clone(), id: row.id, kept: false, runtime: Handle::current() };
        let inner = Arc::clone(&self.0);
        self.0.tasks.run(progress, move |progress| {
            let part = fetch::fetch(&uri, &inner.folder, &reserved.id, progress)?;
            complete(reserved, part, &new, sha256.as_deref(), progress)
        });
        Ok(Added { image, task: Some(task) })
    }

    /// Takes a file of the host. A raw one stays where it is; a qcow2 one is converted into the library by a task.
    ///
    /// Errors: `Invalid` at `path`, `Conflict` when it is registered already.
    pub async fn register(&self, path: &str, mut new: NewImage) -> Result<Added> {
        let path = path.trim().to_owned();
        if !path.starts_with('/') || path.contains('\0') {
            return Err(Error::invalid("path", "A path on the host begins with \"/\"."));
        }
        if path.len() > PATH_BYTES_MAX {
            return Err(Error::invalid("path", "No path is that long."));
        }
        let place = Place::Host(PathBuf::from(&path));
        let (file, size_bytes) = self.0.open_on_host(place).await.map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::Invalid | ErrorKind::Forbidden => {
                Error::invalid("path", error.to_string())
            }
            _ => error,
        })?;
        new.file_name = path.rsplit('/').next().unwrap_or("").to_owned();
        let named = path.clone();
        if let Some(known) = self.0.store.reading(move |tx| images::by_host_path(tx, &named)).await? {
            return Err(
                Error::conflict(format!("This file is in the library already, as \"{}\".", known.name)).at("path")
            );
        }
        let (file, head) = blocking(move || read_head(file, size_bytes)).await?;
        match detect(&head, size_bytes, &new.file_name, new.kind).map_err(|error| error.at("path"))? {
            Detected::As(kind) => {
                let mut row = new.row("host file")?;
                (row.kind, row.ready, row.size_bytes, row.host_path) = (kind, true, size_bytes, Some(path.into()));
                let image = row.id.clone();
                self.0.store.writing(move |tx| insert(tx, &row)).await?;
                self.0.changes.tell(Change::Images);
                Ok(Added { image, task: None })
            }
            Detected::Qcow2 => {
                convert::check_header(&file).map_err(|error| error.at("path"))?;
                let progress = self.0.task("convert_image", format!("Convert {}", new.title()), &new.who).await?;
                let task = progress.id().clone();
                let row = match self.0.reserve(&new, &path, Some(task.clone())).await {
                    Ok(row) => row,
                    Err(error) => {
                        progress.end(Err(Error::new(error.kind(), error.to_string())));
                        return Err(error);
                    }
                };
                let image = row.id.clone();
                let reserved = Reserved { library: self.clone(), id: row.id, kept: false, runtime: Handle::current() };
                self.0.tasks.run(progress, move |progress| convert_into(reserved, file, None, progress));
                Ok(Added { image, task: Some(task) })
            }
        }
    }

    /// Deletes an image with its file; a host file stays.
    ///
    /// Errors: `Conflict` while a guest uses it, which is named, or while it arrives.
    pub async fn delete(&self, id_or_name: &str) -> Result<ImageRow> {
        let named = id_or_name.to_owned();
        let row = self
            .0
            .store
            .writing(move |tx| {
                let row = images::named(tx, &named)?.ok_or_else(|| no_such(&named))?;
                if !row.ready {
                    return Err(Error::conflict(format!("\"{}\" is still arriving; cancel that first.", row.name)));
                }
                let used_by = images::used_by(tx, &row.id)?;
                if !used_by.is_empty() {
                    return Err(Error::conflict(format!("\"{}\" is used by {}.", row.name, used_by.join(", "))));
                }
                images::delete(tx, &row.id)?;
                Ok(row)
            })
            .await?;
        if row.host_path.is_none() {
            let path = self.0.path(&row.id);
            blocking(move || fs::remove_file(&path).map_err(|error| part::cannot_write(&path, error))).await?;
        }
        self.0.changes.tell(Change::Images);
        Ok(row)
    }
}

impl Inner {
    fn path(&self, id: &Id) -> PathBuf {
        self.folder.join(format!("{id}.raw"))
    }

    /// Inserts the row that holds the name while the file arrives.
    async fn reserve(&self, new: &NewImage, source: &str, task: Option<Id>) -> Result<ImageRow> {
        let mut row = new.row(source)?;
        row.task_id = task;
        let kept = row.clone();
        self.store.writing(move |tx| insert(tx, &kept)).await?;
        self.changes.tell(Change::Images);
        Ok(row)
    }

    async fn task(&self, kind: &'static str, title: String, who: &str) -> Result<Progress> {
        self.tasks.begin(NewTask { kind, title, subject: "/images".into(), who: who.to_owned() }).await
    }

    async fn open_on_host(&self, place: Place) -> Result<(File, u64)> {
        let (answer, fds) = self.host.call(HostRequest::OpenFile(place)).await?;
        let (HostAnswer::File { size_bytes }, Some(fd)) = (answer, fds.into_iter().next()) else {
            return Err(Error::new(ErrorKind::Internal, "The supervisor did not hand out the file."));
        };
        Ok((File::from(fd), size_bytes))
    }
}

impl NewImage {
    /// What people see while it has no checked name.
    fn title(&self) -> String {
        if self.name.trim().is_empty() { usable_name(&self.file_name) } else { crate::types::shorten(self.name.trim()) }
    }

    fn row(&self, source: &str) -> Result<ImageRow> {
        let typed = self.name.trim();
        let name = if typed.is_empty() { usable_name(&self.file_name) } else { typed.to_owned() };
        let name: Name = name.parse().map_err(|bad| Error::invalid("name", format!("{bad}")))?;
        Ok(ImageRow {
            id: Id::random(),
            name,
            kind: ImageKind::Other,
            ready: false,
            size_bytes: 0,
            sha256: None,
            source: source.to_owned(),
            host_path: None,
            task_id: None,
            created_ms: now_ms(),
        })
    }
}

/// Holds the row of an image that arrives, and removes it unless it is kept.
struct Reserved {
    library: Images,
    id: Id,
    kept: bool,
    runtime: Handle,
}

impl Reserved {
    /// The file is in its place.
    fn keep(mut self, kind: ImageKind, size_bytes: u64, sha256: Option<&str>) -> Result<()> {
        let inner = &self.library.0;
        inner.store.write(|tx| images::set_ready(tx, &self.id, kind, size_bytes, sha256))?;
        self.kept = true;
        inner.changes.tell(Change::Images);
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let (library, id) = (self.library.clone(), self.id.clone());
        // May be dropped on a thread of the runtime, where the database must not be waited for.
        self.runtime.spawn_blocking(move || {
            let inner = &library.0;
            if let Err(error) = inner.store.write(|tx| images::delete(tx, &id)) {
                tracing::error!(error = %error.for_log(), "cannot forget an unfinished image");
            }
            let _ = fs::remove_file(inner.path(&id));
            inner.changes.tell(Change::Images);
        });
    }
}

/// An upload on its way. Dropping it removes everything.
pub struct Incoming {
    reserved: Reserved,
    pieces: Option<mpsc::Sender<Bytes>>,
    writer: Option<JoinHandle<Result<Part>>>,
    new: NewImage,
    sha256: Option<String>,
    length: Option<u64>,
}

impl Incoming {
    /// Adds a piece; waits for the disk.
    ///
    /// Errors: those of writing.
    pub async fn push(&mut self, piece: Bytes) -> Result<()> {
        let sent = match &self.pieces {
            Some(pieces) => pieces.send(piece).await.is_ok(),
            None => false,
        };
        if sent { Ok(()) } else { self.written().await.map(drop) }
    }

    /// The last piece has come: checks and keeps the file. A qcow2 disk is converted by a task that goes on.
    ///
    /// Errors: `Invalid` at `file` for what is empty, cut short or no image, at `sha256` when the sum differs.
    pub async fn finish(mut self) -> Result<Added> {
        self.pieces = None;
        let part = self.written().await?;
        let Incoming { reserved, new, sha256, length, .. } = self;
        if length.is_some_and(|length| length != part.size_bytes()) {
            return Err(Error::invalid("file", "The upload was cut short; nothing was kept."));
        }
        let image = reserved.id.clone();
        let detected = check(&part, &new, sha256.as_deref())?;
        match detected {
            Detected::As(kind) => {
                blocking(move || keep(reserved, part, kind)).await?;
                Ok(Added { image, task: None })
            }
            Detected::Qcow2 => {
                let inner = Arc::clone(&reserved.library.0);
                let part = blocking(move || convert::check_header(part.whole()?).map(|_| part)).await?;
                let progress = inner.task("convert_image", format!("Convert {}", new.title()), &new.who).await?;
                let task = progress.id().clone();
                inner.tasks.run(progress, move |progress| convert_part(reserved, part, progress));
                Ok(Added { image, task: Some(task) })
            }
        }
    }

    async fn written(&mut self) -> Result<Part> {
        let broken = || Error::new(ErrorKind::Internal, "The upload could not be written.");
        match self.writer.take() {
            Some(writer) => writer.await.map_err(|error| broken().because(error))?,
            None => Err(broken()),
        }
    }
}

fn write_pieces(mut part: Part, mut pieces: mpsc::Receiver<Bytes>) -> Result<Part> {
    while let Some(piece) = pieces.blocking_recv() {
        part.push(&piece)?;
    }
    Ok(part)
}

/// What has arrived, against what was promised.
fn check(part: &Part, new: &NewImage, sha256: Option<&str>) -> Result<Detected> {
    if part.size_bytes() == 0 {
        return Err(empty());
    }
    if let Some(wanted) = sha256
        && wanted != part.sha256()
    {
        let text = format!("The SHA-256 of what arrived is {}, not {wanted}; nothing was kept.", part.sha256());
        return Err(Error::invalid("sha256", text));
    }
    // The file's own name says more about its content than the name a person gave it.
    let name = if new.file_name.is_empty() { &new.name } else { &new.file_name };
    detect(part.head(), part.size_bytes(), name, new.kind)
}

fn complete(
    reserved: Reserved,
    part: Part,
    new: &NewImage,
    sha256: Option<&str>,
    progress: &mut Progress,
) -> Result<()> {
    match check(&part, new, sha256)? {
        Detected::As(kind) => keep(reserved, part, kind),
        Detected::Qcow2 => convert_part(reserved, part, progress),
    }
}

fn keep(reserved: Reserved, part: Part, kind: ImageKind) -> Result<()> {
    let (size_bytes, sha256) = (part.size_bytes(), part.sha256());
    part.keep(&reserved.library.0.path(&reserved.id))?;
    reserved.keep(kind, size_bytes, Some(&sha256))
}

fn convert_part(reserved: Reserved, part: Part, progress: &mut Progress) -> Result<()> {
    let file = part.whole()?.try_clone().map_err(|error| Error::internal("Cannot convert the disk.", error))?;
    let sha256 = part.sha256();
    convert_into(reserved, file, Some(&sha256), progress)
}

/// Converts into a second part, so that a crash never leaves a half-converted disk under the final name.
fn convert_into(reserved: Reserved, from: File, sha256: Option<&str>, progress: &mut Progress) -> Result<()> {
    let folder = reserved.library.0.folder.clone();
    let to = folder.join(format!("{}.raw.part", reserved.id));
    let path = reserved.library.0.path(&reserved.id);
    let converted = (|| {
        let file = File::create_new(&to).map_err(|error| part::cannot_write(&to, error))?;
        let size_bytes = convert::to_raw(from, &file, progress)?;
        progress.report("Writing to the disk", size_bytes, Some(size_bytes))?;
        file.sync_all().map_err(|error| part::cannot_write(&to, error))?;
        fs::rename(&to, &path).map_err(|error| part::cannot_write(&path, error))?;
        File::open(&folder).and_then(|folder| folder.sync_all()).map_err(|error| part::cannot_write(&folder, error))?;
        Ok(size_bytes)
    })();
    match converted {
        Ok(size_bytes) => reserved.keep(ImageKind::Disk, size_bytes, sha256),
        Err(error) => {
            let _ = fs::remove_file(&to);
            Err(error)
        }
    }
}

fn insert(tx: &crate::store::Tx, row: &ImageRow) -> Result<()> {
    if images::by_name(tx, row.name.as_str())?.is_some() {
        return Err(Error::conflict(format!("There is already an image \"{}\".", row.name)).at("name"));
    }
    images::insert(tx, row)
}

fn read_head(file: File, size_bytes: u64) -> Result<(File, Vec<u8>)> {
    let unreadable = |error| Error::invalid("path", "This file cannot be read.").because(error);
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(Error::invalid("path", "This is not a file; a directory or device cannot be an image."));
    }
    if size_bytes == 0 {
        return Err(empty().at("path"));
    }
    let mut head = vec![0; HEAD_BYTES];
    let mut got = 0;
    while let Some(rest) = head.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, got as u64).map_err(unreadable)? {
            0 => break,
            more => got += more,
        }
    }
    head.truncate(got);
    Ok((file, head))
}

fn empty() -> Error {
    Error::invalid("file", "This file is empty.")
}

fn no_such(named: &str) -> Error {
    Error::not_found(format!("There is no image \"{}\".", crate::types::shorten(named)))
}

/// A file's own name, made into one that the library takes; "" when nothing of it can stay.
pub fn usable_name(file_name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    let name: String = file_name.chars().map(plain).collect();
    name.trim_start_matches(['-', '_', '.']).chars().take(NAME_LEN_MAX).collect()
}

fn checked_sha256(typed: &str) -> Result<Option<String>> {
    let sum: String = typed.trim().to_ascii_lowercase();
    match sum.len() {
        0 => Ok(None),
        SHA256_LEN if sum.bytes().all(|byte| byte.is_ascii_hexdigit()) => Ok(Some(sum)),
        _ => Err(Error::invalid("sha256", format!("A SHA-256 is {SHA256_LEN} hexadecimal digits."))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_files_own_name_is_made_usable() {
        for (file, name) in [("debian 12.iso", "debian-12.iso"), ("../.x", "x"), ("ü", ""), ("..", "")] {
            assert_eq!(usable_name(file), name);
        }
        assert_eq!(usable_name(&"x".repeat(200)).len(), NAME_LEN_MAX);
    }

    #[test]
    fn a_sum_is_64_digits_or_nothing() {
        assert_eq!(checked_sha256(" ").unwrap(), None);
        assert_eq!(checked_sha256(&"AB".repeat(32)).unwrap(), Some("ab".repeat(32)));
        assert_eq!(checked_sha256("abc").unwrap_err().field(), Some("sha256"));
    }
}
