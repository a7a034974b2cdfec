//! What the table of methods makes: [`Method`](super::Method), [`AdapterConfig`](super::AdapterConfig) and
//! [`MethodOptions`](super::MethodOptions). Both enums do nothing but find the method's module and ask it.

/// Makes the types from lines `Variant => module`; the module's name is the method's.
macro_rules! methods {
    ($($variant:ident => $module:ident,)+) => {
        /// A way to adapt a model.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum Method {
            $(#[doc = concat!("[`", stringify!($module), "`]")] $variant,)+
        }

        impl Method {
            /// Every method.
            pub const ALL: [Self; [$(stringify!($module)),+].len()] = [$(Self::$variant),+];

            /// Its name, as flags and files write it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($module),)+
                }
            }

            /// The method itself.
            pub(super) fn spec(self) -> &'static dyn $crate::tuning::MethodSpec {
                match self {
                    $(Self::$variant => &$module::Spec,)+
                }
            }
        }

        /// What an adapter's files say of its method.
        #[derive(Clone, Debug, PartialEq)]
        pub enum AdapterConfig {
            $(#[doc = concat!("Of [`", stringify!($module), "`].")] $variant($module::Config),)+
        }

        impl AdapterConfig {
            /// The method.
            pub fn method(&self) -> Method {
                match self {
                    $(Self::$variant(_) => Method::$variant,)+
                }
            }

            /// What it says.
            pub(super) fn inner(&self) -> &dyn $crate::tuning::MethodConfig {
                match self {
                    $(Self::$variant(config) => config,)+
                }
            }
        }

        $crate::fields::fields! {
            /// The options of all methods; those of another than a run's own mean nothing to it.
            pub struct MethodOptions {
                /// Which modules are adapted, for the methods that choose
                #[command(flatten)]
                pub targets: $crate::tuning::targets::Settings,
                /// Which modules are trained as a whole beside that
                #[command(flatten)]
                pub saved: $crate::tuning::saved::Settings,
                $(
                    /// The options of one method alone
                    #[command(flatten)]
                    pub $module: $module::Settings,
                )+
            }
        }

        impl MethodOptions {
            /// Adds what does not go together to `problems`.
            pub(crate) fn check_together(
                &self,
                names: &dyn $crate::fields::Names,
                problems: &mut Vec<String>,
            ) {
                for method in Method::ALL {
                    method.spec().check(self, names, problems);
                }
                self.targets.check(names, problems);
            }
        }
    };
}

pub(super) use methods;
