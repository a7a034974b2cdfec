//! The program as its users meet it: exit codes, messages, streams and the files it leaves.

mod bad_input;
mod classify;
mod combining;
mod compare;
mod demo;
mod ends;
mod hub;
mod misuse;
mod plans;
mod quantized;
mod ranks;
mod resumes;
mod runs;
mod serves;
mod shell;
mod support;
mod texts;
mod travelling;
mod virtual_tokens;
