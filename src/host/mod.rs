//! What `hostd` uses of the host: firmware files, taps, bridges, `passt`, `swtpm`, and what `doctor` says about all of it.
//!
//! `hostd` has one thread and no async runtime, so that it may spawn at any time. The kernel's network settings are therefore made by
//! running `ip` and `nft`, not through rtnetlink: the crates for that bring a runtime, and the tools' own messages say best what is wrong.

pub mod doctor;
pub mod facts;
pub mod firmware;
pub mod net;
pub mod passt;
pub mod tap;
pub mod tpm;

pub(crate) mod sys;
mod tool;

pub use doctor::doctor;
