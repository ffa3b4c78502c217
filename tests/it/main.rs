//! Tests of whole processes and their seams, in one binary.

mod network;
mod library;
mod support;
mod tidy;
mod web;
