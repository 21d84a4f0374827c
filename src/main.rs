//! Tollgate: an AI gateway on Pingora.
#![allow(dead_code)]

mod cli;
mod config;

fn main() {}
