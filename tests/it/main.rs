//! Tests of whole processes and their seams, in one binary.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(unreachable_pub, reason = "a binary of tests has no outside")]

mod cli;
mod console;
mod fake_engine;
mod library;
mod lifecycle;
mod network;
mod support;
mod tidy;
mod web;
