//! Many adapters on one base model, behind OpenAI's API.

pub mod grammar;
pub mod tools;
