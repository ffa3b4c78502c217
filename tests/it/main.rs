//! Tests of whole processes and their seams, in one binary.
#![allow(unreachable_pub, reason = "a binary of tests has no outside")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod appliance;
mod cli;
mod console;
mod fake_engine;
mod library;
mod lifecycle;
mod native;
mod network;
mod support;
mod tidy;
mod web;
