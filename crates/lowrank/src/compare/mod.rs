//! Methods on equal terms: one budget of trained values for all of them, and what a comparison came to.

mod budget;
mod results;

pub use budget::{Budget, solve};
pub use results::{BaseResult, Comparison, Cost, MethodResult, SeedResult, Spread, Unit};
