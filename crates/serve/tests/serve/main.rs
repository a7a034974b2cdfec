//! A server as its clients meet it: many adapters on one base, every answer the one that its request gets alone, and nothing that a request or a
//! folder holds brings it down.

mod access;
mod adapters;
mod answers;
#[path = "../common/client.rs"]
mod client;
mod exactness;
mod files;
mod gather;
mod golden;
mod hostile;
mod house;
mod leaving;
mod scheduling;
mod tools;
