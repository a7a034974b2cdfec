//! The functions of feed-forward layers and of classifiers.

/// The function of a feed-forward layer or of a classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// x · Φ(x), with the normal distribution's own Φ.
    Gelu,
    /// x · (1 + tanh(√(2/π)·(x + 0.044715·x³))) / 2; "gelu_new" and "gelu_pytorch_tanh".
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// tanh(x).
    Tanh,
}
