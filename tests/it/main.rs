//! Tests of whole processes and their seams, in one binary.

mod support;
mod web;
