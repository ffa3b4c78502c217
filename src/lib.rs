//! Innkeeper: one Linux machine as a virtualization appliance, run from a browser.

pub mod engine;
pub mod error;
pub mod guests;
pub mod spec;
pub mod types;
pub mod wire;
