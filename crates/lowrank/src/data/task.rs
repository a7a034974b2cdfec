//! What a model is trained to do, and the labels of rows that are not text to go on with.

use serde::{Deserialize, Serialize};

/// What a model is trained to do (PEFT's `task_type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum TaskType {
    /// To say the next token.
    #[default]
    #[serde(rename = "CAUSAL_LM")]
    #[cfg_attr(feature = "clap", value(name = "CAUSAL_LM"))]
    CausalLm,
    /// To put a text, or a pair of texts, into a class, or to give it a number.
    #[serde(rename = "SEQ_CLS")]
    #[cfg_attr(feature = "clap", value(name = "SEQ_CLS"))]
    SeqCls,
    /// To put each word of a text into a class.
    #[serde(rename = "TOKEN_CLS")]
    #[cfg_attr(feature = "clap", value(name = "TOKEN_CLS"))]
    TokenCls,
    /// To give a text a vector.
    #[serde(rename = "FEATURE_EXTRACTION")]
    #[cfg_attr(feature = "clap", value(name = "FEATURE_EXTRACTION"))]
    FeatureExtraction,
}

/// What a classifier's outputs mean, and so which loss it has (`problem_type` of config.json).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemType {
    /// One of the labels is right: cross-entropy.
    SingleLabelClassification,
    /// Each label is right or wrong by itself: binary cross-entropy.
    MultiLabelClassification,
    /// The outputs are numbers: mean squared error.
    Regression,
}

/// The labels that rows have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labels {
    /// Their names, in the order of the classifier's outputs (`id2label` of config.json).
    pub names: Vec<String>,
    /// What the outputs mean.
    pub problem_type: ProblemType,
}

impl Labels {
    /// Whether rows with these labels mean those of a classifier: the same names in any order, or their numbers.
    pub fn are_those_of(&self, classifier: &Self) -> bool {
        let (own, theirs) = (&self.names, &classifier.names);
        let numbers = own.iter().enumerate();
        let are_numbers = numbers.clone().all(|(n, name)| *name == n.to_string());
        self.problem_type == classifier.problem_type
            && own.len() == theirs.len()
            && (are_numbers || own.iter().all(|name| theirs.contains(name)))
    }

    /// Whether the names are those that transformers gives where there are none: `LABEL_0` and so on.
    pub fn are_unnamed(&self) -> bool {
        let names = self.names.iter().enumerate();
        names.clone().all(|(n, name)| *name == format!("LABEL_{n}"))
    }
}

/// What a row teaches beside its text.
#[derive(Clone, Debug, PartialEq)]
pub enum Label {
    /// The number of its label.
    Class(u32),
    /// For each label 1 where it is right and 0 where it is not.
    Classes(Vec<f32>),
    /// The numbers that the outputs should be.
    Values(Vec<f32>),
    /// Tokens that have a label, ascending, and the number of it: the first of every word.
    Tags(Vec<(u32, u32)>),
}
