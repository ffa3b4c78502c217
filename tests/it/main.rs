//! Tests of whole processes and their seams, in one binary.

mod cli;
mod console;
mod fake_engine;
mod lifecycle;
mod support;
mod web;
