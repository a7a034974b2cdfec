//! What is trained beside, or instead of, the base's weights.
//!
//! A method turns its options into an [`Adapter`](crate::model::Adapter): named f32 parameters in one arena and a table that
//! says where in the model each of them acts. The decoder knows the table's kinds of entry and nothing of the methods.
//!
//! A new method is a module here with a `Spec` ([`MethodSpec`]), `Settings` and a `Config` ([`MethodConfig`]), and a line in
//! the table below; where it acts at a point that no method has used before, a new kind of entry as well.

pub mod adapter;
pub mod bitfit;
mod files;
pub mod full;
pub mod ia3;
pub mod lora;
mod method;
pub mod prefix;
pub mod saved;
mod table;
pub mod targets;
pub mod top;

pub use files::{BaseMark, Loaded, Task, base_of, load, save, task_of};
pub use method::{FirstText, MethodConfig, MethodSpec, Size, Started, Starting};

table::methods! {
    Lora => lora,
    Full => full,
    Top => top,
    Bitfit => bitfit,
    Adapter => adapter,
    Prefix => prefix,
    Ia3 => ia3,
}
