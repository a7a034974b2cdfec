//! What runs leave behind for people: `metrics.jsonl`, `report.html`, the model card, and the page of a comparison.
//!
//! [`metrics`] is the file's line types with a writer that survives being killed and a reader that forgives it;
//! [`html`], [`comparison`] and [`model_card`] are pure functions from plain data to text, so that they can be tested and reused
//! without a run. Writing the text to disk is the caller's business.

#[cfg(feature = "compare")]
pub mod comparison;
#[cfg(feature = "compare")]
pub mod heatmap;
pub mod html;
pub mod inspect;
pub mod metrics;
pub mod model_card;
mod page;
#[cfg_attr(
    not(feature = "compare"),
    expect(dead_code, unused_imports, reason = "most plots are a comparison's")
)]
mod svg;

pub use metrics::{
    EvalMetrics, Metrics, MetricsError, MetricsLine, MetricsWriter, StepMetrics,
    read as read_metrics,
};
