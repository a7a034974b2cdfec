//! Settings that are declared once: a field is a key of YAML, a flag, a default, a range and a text of help.
//!
//! ```text
//! fields! {
//!     /// What LoRA is told.
//!     pub struct Settings {
//!         /// Rank of the matrices A and B
//!         #[arg(value_name = "N", help_heading = "LoRA")]
//!         #[range(COUNT)]
//!         #[fixes(Shape)]
//!         pub r: usize = 8,
//!     }
//! }
//! ```
//!
//! makes a struct with this field, whose `Default` has r 8 and which implements [`Fields`]. With the feature `clap` it is a
//! `clap::Args` as well, where the field is `--r <N>` and the documentation its help. A field has, in this order:
//!
//! | | |
//! | --- | --- |
//! | documentation | the help |
//! | `#[command(flatten)]` | the field is a group, another struct of `fields!`, whose keys stand among the others |
//! | `#[arg(…)]` | the rest of what clap's derive is to know; `long` and the default are put in |
//! | `#[switch(…)]` | the same for a boolean: `--name`, `--name=false` |
//! | `#[range(NAME)]` | numbers that it takes, a constant of [`Range`] |
//! | `#[fixes(WHAT)]` | what of an adapter it fixes, of [`Fixes`] |
//! | `#[written(TYPE)]` | a wrapper that serde writes and reads it with |
//! | `#[absent(VALUE)]` | what a file means that is older than the field, and does not have it |
//! | `pub name: type = default` | without `= default`, the type's own, such as `None`; a file may then leave it out |

mod range;
mod text;

use serde::de::MapAccess;
use serde::ser::SerializeMap;

pub use crate::names::{Keys, Names};
pub use range::{Limit, Number, Range};
pub use text::{
    AsBytes, AsMap, finite, finite_pattern, nearest, parse_bytes, parse_pattern, plain,
};

/// A struct that `fields!` made.
pub trait Fields: Default {
    /// What is known of every field, those of groups among them.
    fn fields() -> Vec<Field>;

    /// Sets the field of this key to the map's next value; `false` if there is no such field.
    ///
    /// # Errors
    /// A value that is not the field's.
    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error>;

    /// Writes every field under its key.
    ///
    /// # Errors
    /// The serializer's own.
    fn write<M: SerializeMap>(&self, map: &mut M) -> Result<(), M::Error>;

    /// Sets what a file may leave out to what that means.
    fn set_absent(&mut self);

    /// Adds every number that is out of its range to `problems`.
    fn check_ranges(&self, names: &dyn Names, problems: &mut Vec<String>);
}

/// What is known of a field.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its key.
    pub key: &'static str,
    /// The numbers that it takes.
    pub range: Option<Range>,
    /// What of an adapter it fixes.
    pub fixes: Option<Fixes>,
    /// Whether a file may be without it.
    pub may_be_absent: bool,
}

/// What a setting fixes for good: an adapter that a training starts from decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fixes {
    /// Which values are trained, and how many.
    Shape,
    /// How they act.
    Action,
}

/// Declares settings; the module says how.
macro_rules! fields {
    // A field's default.
    (@default $value:expr) => { $value };
    (@default) => { Default::default() };
    // Whether a file may be without a field: where it is said what that means, or where nothing stands for nothing.
    (@may_be_absent [$absent:expr] [$($default:expr)?]) => { true };
    (@may_be_absent [] [$default:expr]) => { false };
    (@may_be_absent [] []) => { true };
    // What an optional property is.
    (@some $value:expr) => { Some($value) };
    (@some) => { None };
    // Each of the functions for one field: of a group, with a wrapper, or plain.
    (@describe $all:ident $field:ident: $type:ty, group $flat:ident $($rest:tt)*) => {
        $all.extend(<$type as $crate::fields::Fields>::fields());
    };
    (@describe $all:ident $field:ident: $type:ty, [$($range:ident)?] [$($fixes:ident)?] [$($absent:expr)?] [$($default:expr)?]) => {
        $all.extend([$crate::fields::Field {
            key: stringify!($field),
            range: $crate::fields::fields!(@some $($crate::fields::Range::$range)?),
            fixes: $crate::fields::fields!(@some $($crate::fields::Fixes::$fixes)?),
            may_be_absent: $crate::fields::fields!(@may_be_absent [$($absent)?] [$($default)?]),
        }]);
    };
    (@read $place:expr, $key:ident $map:ident $field:ident, group $flat:ident) => {
        if $crate::fields::Fields::read(&mut $place, $key, $map)? {
            return Ok(true);
        }
    };
    (@read $place:expr, $key:ident $map:ident $field:ident, as $written:ident) => {
        if $key == stringify!($field) {
            $place = $map.next_value::<$crate::fields::$written<_>>()?.0;
            return Ok(true);
        }
    };
    (@read $place:expr, $key:ident $map:ident $field:ident,) => {
        if $key == stringify!($field) {
            $place = $map.next_value()?;
            return Ok(true);
        }
    };
    (@write $place:expr, $map:ident $field:ident, group $flat:ident) => {
        $crate::fields::Fields::write(&$place, $map)?;
    };
    (@write $place:expr, $map:ident $field:ident, as $written:ident) => {
        $map.serialize_entry(stringify!($field), &$crate::fields::$written(&$place))?;
    };
    (@write $place:expr, $map:ident $field:ident,) => {
        $map.serialize_entry(stringify!($field), &$place)?;
    };
    (@absent $place:expr, group $flat:ident []) => {
        $crate::fields::Fields::set_absent(&mut $place);
    };
    (@absent $place:expr, [$absent:expr]) => {
        $place = $absent;
    };
    (@absent $place:expr, []) => {};
    (@check $place:expr, $names:ident $problems:ident $field:ident, group $flat:ident $($rest:tt)*) => {
        $crate::fields::Fields::check_ranges(&$place, $names, $problems);
    };
    (@check $place:expr, $names:ident $problems:ident $field:ident, [$range:ident]) => {
        $crate::fields::Number::check(
            &$place,
            $crate::fields::Range::$range,
            &|| $names.given(stringify!($field)),
            $problems,
        );
    };
    (@check $place:expr, $names:ident $problems:ident $field:ident, []) => {};

    (
        $(#[doc = $about:tt])+
        pub struct $name:ident {
            $(
                $(#[doc = $doc:tt])+
                $(#[command($flat:ident)])?
                $(#[arg($($arg:tt)*)])?
                $(#[switch($($switch:tt)*)])?
                $(#[range($range:ident)])?
                $(#[fixes($fixes:ident)])?
                $(#[written($written:ident)])?
                $(#[absent($absent:expr)])?
                pub $field:ident: $type:ty $(= $default:expr)?,
            )*
            $(
                // Not settings: no flags, and no keys but those that the struct's own code reads and writes.
                beside {
                    $($(#[doc = $note:tt])+ pub $beside:ident: $beside_type:ty,)+
                }
            )?
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq)]
        #[cfg_attr(feature = "clap", derive(clap::Args), group(skip))]
        #[allow(clippy::struct_excessive_bools, reason = "each is a setting of its own")]
        pub struct $name {
            $(
                $(#[doc = $doc])+
                $(#[cfg_attr(feature = "clap", command($flat))])?
                $(#[cfg_attr(feature = "clap", arg(default_value_t = $default))])?
                $(#[cfg_attr(feature = "clap", arg(long, $($arg)*))])?
                $(#[cfg_attr(feature = "clap", arg(
                    long, value_name = "BOOL", action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true,
                    default_missing_value = "true", hide_default_value = true, hide_possible_values = true, $($switch)*
                ))])?
                pub $field: $type,
            )*
            $($(
                $(#[doc = $note])+
                #[cfg_attr(feature = "clap", arg(skip))]
                pub $beside: $beside_type,
            )+)?
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $($field: $crate::fields::fields!(@default $($default)?),)*
                    $($($beside: Default::default(),)+)?
                }
            }
        }

        #[allow(unused_variables, unused_mut, reason = "a method may have no settings")]
        impl $crate::fields::Fields for $name {
            fn fields() -> Vec<$crate::fields::Field> {
                let mut all = Vec::new();
                $($crate::fields::fields!(
                    @describe all $field: $type, $(group $flat)? [$($range)?] [$($fixes)?] [$($absent)?] [$($default)?]
                );)*
                all
            }

            fn read<'de, A: serde::de::MapAccess<'de>>(
                &mut self,
                key: &str,
                map: &mut A,
            ) -> Result<bool, A::Error> {
                $($crate::fields::fields!(@read self.$field, key map $field, $(group $flat)? $(as $written)?);)*
                Ok(false)
            }

            fn write<M: serde::ser::SerializeMap>(&self, map: &mut M) -> Result<(), M::Error> {
                $($crate::fields::fields!(@write self.$field, map $field, $(group $flat)? $(as $written)?);)*
                Ok(())
            }

            fn set_absent(&mut self) {
                $($crate::fields::fields!(@absent self.$field, $(group $flat)? [$($absent)?]);)*
            }

            fn check_ranges(&self, names: &dyn $crate::fields::Names, problems: &mut Vec<String>) {
                $($crate::fields::fields!(@check self.$field, names problems $field, $(group $flat)? [$($range)?]);)*
            }
        }
    };
}

pub(crate) use fields;
