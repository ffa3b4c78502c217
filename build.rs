//! Builds what the crate embeds and cargo cannot: the front end (`static/`) and the built-in test guest.
//!
//! `UI_DIST=DIR` takes a front end that is already built (`node static/build.mjs DIR`), for builds without npm. The feature
//! `no-ui` leaves it out: pages then come without style and script.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    front_end(&out);
    test_guest(&out);
}

/// Leaves `OUT_DIR/manifest.rs`, and the folder it embeds from in `INNKEEPER_UI`.
fn front_end(out: &Path) {
    println!("cargo:rerun-if-changed=static");
    println!("cargo:rerun-if-env-changed=UI_DIST");
    let manifest = out.join("manifest.rs");
    if env::var_os("CARGO_FEATURE_NO_UI").is_some() {
        let empty = "pub(super) static URLS: &[(&str, &str)] = &[];\npub(super) static ASSETS: &[Asset] = &[];\npub(super) static PACKAGES: &[Package] = &[];\n";
        return write(&manifest, empty.as_bytes());
    }
    let dist = match env::var_os("UI_DIST") {
        Some(given) => {
            fs::canonicalize(&given).unwrap_or_else(|error| fail(&format!("UI_DIST={}: {error}", given.display())))
        }
        None => {
            let dist = out.join("ui");
            let mut node = Command::new("node");
            run(
                node.arg("static/build.mjs").arg(&dist).arg(target_dir(out).join("ui-cache")),
                "it needs node 18 or newer and npm; UI_DIST or --features no-ui build without them",
            );
            dist
        }
    };
    println!("cargo:rustc-env=INNKEEPER_UI={}", dist.display());
    let described = dist.join("manifest.rs");
    write(&manifest, &fs::read(&described).unwrap_or_else(|error| fail(&format!("{}: {error}", described.display()))));
}

/// Assembles the built-in guest into `OUT_DIR/testguest.bin`, when its source is there.
fn test_guest(out: &Path) {
    let source = Path::new("src/engine/testguest.S");
    println!("cargo:rerun-if-changed={}", source.display());
    if !source.exists() {
        return;
    }
    let (object, image) = (out.join("testguest.o"), out.join("testguest.bin"));
    let needs = "it needs as and ld (package binutils)";
    run(Command::new("as").arg("--32").arg("-o").arg(&object).arg(source), needs);
    run(
        Command::new("ld")
            .args(["-m", "elf_i386", "--oformat", "binary", "-Ttext=0x7c00", "-o"])
            .arg(&image)
            .arg(&object),
        needs,
    );
}

/// cargo's target folder, which outlives one build: the folder with its tag above `OUT_DIR`.
fn target_dir(out: &Path) -> PathBuf {
    out.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists()).unwrap_or(out).to_owned()
}

fn run(command: &mut Command, needs: &str) {
    let said = format!("{command:?}");
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("{said} ended with {status}; {needs}")),
        Err(error) => fail(&format!("{said}: {error}; {needs}")),
    }
}

fn write(path: &Path, bytes: &[u8]) {
    if let Err(error) = fs::write(path, bytes) {
        fail(&format!("{}: {error}", path.display()));
    }
}

fn fail(why: &str) -> ! {
    eprintln!("innkeeper build: {why}");
    exit(1)
}
