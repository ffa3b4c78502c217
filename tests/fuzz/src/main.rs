//! Fuzz targets for everything in the engine that a guest or a client can reach. One program has them all; `FUZZ_TARGET` says which
//! one runs, and `FUZZ_TARGET=list` prints their names.
//!
//! The engine is compiled into this crate, so nothing of it is made public for this. Its threads have their turns when an input says
//! so, and its clocks stand still in between (`engine/turns.rs`): an input does the same every time.

#![no_main]

#[allow(dead_code, unused_imports, reason = "a part of the program is not the whole")]
#[path = "../../../src/engine/mod.rs"]
mod engine;
#[allow(dead_code, reason = "a part of the program is not the whole")]
#[path = "../../../src/error.rs"]
mod error;
#[allow(dead_code, reason = "a part of the program is not the whole")]
#[path = "../../../src/spec.rs"]
mod spec;
#[allow(dead_code, reason = "a part of the program is not the whole")]
#[path = "../../../src/switches.rs"]
mod switches;
#[allow(dead_code, reason = "a part of the program is not the whole")]
#[path = "../../../src/types.rs"]
mod types;
#[allow(dead_code, reason = "a part of the program is not the whole")]
#[path = "../../../src/wire.rs"]
mod wire;

mod bench;
mod coverage;
mod drivers;
mod input;
mod machine;
mod messages;
mod targets;

use std::sync::LazyLock;

use targets::{TARGETS, Target, What};

static CHOSEN: LazyLock<&'static Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_else(|_| "list".into());
    TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| {
        TARGETS.iter().for_each(|target| println!("{}", target.name));
        std::process::exit(if name == "list" { 0 } else { 2 })
    })
});

libfuzzer_sys::fuzz_target!(init: { LazyLock::force(&CHOSEN); }, |bytes: &[u8]| {
    match CHOSEN.what {
        What::Device(ref device) => bench::run(CHOSEN.name, device, bytes),
        What::Bytes(take) => take(bytes),
    }
});
