//! Innkeeper: one Linux machine as a virtualization appliance, run from a browser.

pub mod admin;
pub mod auth;
pub mod changes;
pub mod engine;
pub mod error;
pub mod host_client;
pub mod images;
pub mod spec;
pub mod store;
pub mod tasks;
pub mod types;
pub mod web;
pub mod wire;
