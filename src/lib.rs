//! Innkeeper: one Linux machine as a virtualization appliance, run from a browser.

pub mod admin;
pub mod api;
pub mod auth;
pub mod changes;
pub mod cli;
pub mod engine;
pub mod error;
pub mod guests;
pub mod host;
pub mod host_client;
pub mod hostd;
pub mod images;
pub mod spec;
pub mod state_files;
pub mod store;
pub mod switches;
pub mod tasks;
pub mod types;
pub mod web;
pub mod wire;
