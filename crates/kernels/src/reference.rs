//! Naive versions of the operations, in f64: one loop after another, as the formulas are written.
