//! What the engine expects of its package's build: an image of the built-in guest, which no target runs.

use std::{env, fs, path::Path};

fn main() {
    println!("cargo:rustc-check-cfg=cfg(fuzzing)");
    println!("cargo:rustc-cfg=fuzzing");
    println!("cargo:rerun-if-changed=build.rs");
    let out = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(Path::new(&out).join("testguest.bin"), []).expect("OUT_DIR can be written");
}
