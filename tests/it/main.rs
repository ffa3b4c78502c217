//! Tests of whole processes and their seams, in one binary.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod library;
mod network;
mod support;
mod web;
