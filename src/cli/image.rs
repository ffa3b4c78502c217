//! `innkeeper image …`, and what an IMAGE argument means: an item of the library, or a file of the host.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    Failure, Outcome, PlaceArgs,
    client::{Client, encode, open_upload},
    say, say_json,
    table::{Align, Table},
    task::{self, ProgressLine},
};
use crate::types::{NAME_LEN_MAX, show_size};

const SHA256_LEN: usize = 64;

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Put a file of this computer, or what a URL names, into the library.
    Add {
        /// A file, or an address that begins with https:// or http://.
        source: String,
        /// Its name in the library; left out: the file's name.
        #[arg(long)]
        name: Option<String>,
        /// What the file's SHA-256 must be, in hexadecimal.
        #[arg(long, value_name = "HEX")]
        sha256: Option<String>,
        /// Do not copy: use this file of the host where it is. A qcow2 disk is converted into the library all the same.
        #[arg(long, conflicts_with = "sha256")]
        in_place: bool,
        /// Print the image as JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the library.
    Ls {
        /// Print one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Delete images that no guest uses. A file of the host itself stays.
    Rm {
        /// Names or ids.
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
}

/// The part of an image that matters here; the rest is kept for `--json`.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub(super) struct Image {
    pub id: String,
    pub name: String,
    #[serde(default)]
    pub kind: String,
    #[serde(default)]
    pub size_bytes: u64,
    #[serde(default)]
    pub host_path: Option<PathBuf>,
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

pub fn run(client: &Client, place: &PlaceArgs, command: ImageCommand) -> Outcome {
    match command {
        ImageCommand::Ls { json } => list(client, json),
        ImageCommand::Rm { images } => images.iter().try_for_each(|image| remove(client, image)),
        ImageCommand::Add { source, name, sha256, in_place, json } => {
            let wanted = Wanted { name, sha256 };
            let id = if source.starts_with("https://") || source.starts_with("http://") {
                if in_place {
                    return Err(Failure::Usage("--in-place is for files of the host".into()));
                }
                fetch(client, &source, wanted)?
            } else if in_place {
                register(client, &absolute(place, &source)?, wanted.name)?
            } else {
                upload(client, Path::new(&source), wanted)?
            };
            let image: Image = client.get(&format!("/api/v1/images/{}", encode(&id)))?;
            if json { say_json(&image) } else { say(format!("{}  {}", image.name, show_size(image.size_bytes))) }
        }
    }
}

/// The id of what an IMAGE argument names. A path on the host is registered first.
///
/// Errors: neither in the library nor a file.
pub(super) fn resolve(client: &Client, place: &PlaceArgs, text: &str) -> Outcome<String> {
    let images: Vec<Image> = client.get("/api/v1/images")?;
    if let Some(image) = images.iter().find(|image| image.id == text || image.name == text) {
        return Ok(image.id.clone());
    }
    if !text.contains('/') && (place.url.is_some() || !Path::new(text).exists()) {
        return Err(Failure::failed(format!(
            "There is no image \"{text}\" in the library, and no file of that name here."
        )));
    }
    let path = absolute(place, text)?;
    if let Some(image) = images.iter().find(|image| image.host_path.as_deref() == Some(&path)) {
        return Ok(image.id.clone());
    }
    let name = free_name(&images, usable_name(&path));
    register(client, &path, Some(name))
}

/// `name`, or with a number behind it when another image has it already.
fn free_name(images: &[Image], name: String) -> String {
    let taken = |name: &str| images.iter().any(|image| image.name == name);
    let kept: String = name.chars().take(NAME_LEN_MAX - 4).collect();
    let numbered = (2..=images.len() + 1).map(|number| format!("{kept}-{number}"));
    std::iter::once(name.clone()).chain(numbered).find(|name| !taken(name)).unwrap_or(name)
}

struct Wanted {
    name: Option<String>,
    sha256: Option<String>,
}

fn list(client: &Client, json: bool) -> Outcome {
    let images: Vec<Image> = client.get("/api/v1/images")?;
    if json {
        return say_json(&images);
    }
    let mut table =
        Table::new(&[("NAME", Align::Left), ("KIND", Align::Left), ("SIZE", Align::Right), ("FILE", Align::Left)]);
    for image in images {
        let file = image.host_path.map_or_else(|| "library".into(), |path| path.display().to_string());
        table.row(&[image.name, image.kind, show_size(image.size_bytes), file]);
    }
    say(table.print())
}

fn remove(client: &Client, image: &str) -> Outcome {
    client.request("DELETE", &format!("/api/v1/images/{}", encode(image)), None)?.good()?;
    say(format!("{image} removed"))
}

/// What adding answers: the image, or the task that fetches it.
#[derive(Deserialize)]
struct Added {
    id: Option<String>,
    image: Option<String>,
    task: Option<String>,
}

fn added(client: &Client, answer: &super::client::Answer) -> Outcome<String> {
    let added: Added = answer.json()?;
    if let Some(task) = &added.task {
        task::wait(client, task)?;
    }
    added.image.or(added.id).ok_or_else(|| Failure::failed("The server did not say which image it added."))
}

fn fetch(client: &Client, url: &str, wanted: Wanted) -> Outcome<String> {
    check_sha256(wanted.sha256.as_deref())?;
    let body = json!({ "url": url, "name": wanted.name, "sha256": wanted.sha256 });
    added(client, &client.send("POST", "/api/v1/images", &body)?)
}

fn register(client: &Client, path: &Path, name: Option<String>) -> Outcome<String> {
    let body = json!({ "host_path": path, "name": name });
    added(client, &client.send("POST", "/api/v1/images", &body)?)
}

fn upload(client: &Client, path: &Path, wanted: Wanted) -> Outcome<String> {
    check_sha256(wanted.sha256.as_deref())?;
    let (mut file, length) = open_upload(path)?;
    let name = match wanted.name {
        Some(name) => name,
        None => usable_name(path),
    };
    let mut target = format!("/api/v1/images/upload?name={}", encode(&name));
    if let Some(sha256) = wanted.sha256 {
        target += &format!("&sha256={}", encode(&sha256));
    }
    let mut line = ProgressLine::default();
    let mut show = |done| line.show("Uploading", done, Some(length));
    let answer = client.upload("PUT", &target, &mut file, length, &mut show)?;
    drop(line);
    added(client, &answer)
}

/// A file's own name, made into one that the library takes.
fn usable_name(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let good = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    let name: String = name.chars().map(good).take(NAME_LEN_MAX).collect();
    name.trim_start_matches(['-', '_', '.']).to_owned()
}

fn check_sha256(text: Option<&str>) -> Outcome {
    match text {
        Some(hex) if hex.len() != SHA256_LEN || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            Err(Failure::Usage(format!("--sha256: {SHA256_LEN} hexadecimal digits are needed")))
        }
        _ => Ok(()),
    }
}

/// A path of the host. With `--url` the host is elsewhere, so only it can check.
fn absolute(place: &PlaceArgs, text: &str) -> Outcome<PathBuf> {
    let path = Path::new(text);
    if place.url.is_some() {
        return if path.is_absolute() {
            Ok(path.to_owned())
        } else {
            Err(Failure::Usage(format!("{text}: with --url a file of the host is named by its whole path")))
        };
    }
    path.canonicalize().map_err(|error| Failure::failed(format!("Cannot find {text}: {error}.")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_become_names_of_the_library() {
        let image = |name: &str| Image {
            id: "22222222".into(),
            name: name.into(),
            kind: String::new(),
            size_bytes: 1,
            host_path: None,
            rest: serde_json::Map::new(),
        };
        assert_eq!(free_name(&[image("a"), image("a-2")], "a".into()), "a-3");
        assert_eq!(free_name(&[image("a")], "b".into()), "b");
        for (path, name) in [("/a/debian 12.iso", "debian-12.iso"), ("../.hidden", "hidden"), ("/x/ä.img", "img")] {
            let usable = usable_name(Path::new(path));
            assert_eq!(usable, name);
            assert!(usable.parse::<crate::types::Name>().is_ok());
        }
    }

    #[test]
    fn a_wrong_digest_is_refused_before_anything_is_sent() {
        assert!(check_sha256(None).is_ok());
        assert!(check_sha256(Some(&"aB".repeat(32))).is_ok());
        assert!(check_sha256(Some("zz")).is_err());
    }
}
