//! What keeps the repository: it regenerates the files of the built-in model and checks tidiness.

pub mod builtin;
pub mod corpus;
pub mod edges;
pub mod pretrain;
pub mod random;
pub mod tasks;
pub mod tidy;
pub mod tokenizer;
