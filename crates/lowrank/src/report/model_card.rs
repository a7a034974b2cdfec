//! `README.md` of a run's folder: a model card with the front matter that the Hugging Face Hub reads.

use std::fmt::Write;

use crate::data::ProblemType;
use crate::tuning::Method;
use crate::units::grouped;

/// Where the base model came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseModel<'a> {
    /// A model of the Hub by its id, `owner/name`. Only such a base is named in the front matter, where the Hub
    /// makes a link of it and refuses anything else.
    Hub(&'a str),
    /// A folder on the trainer's machine, or a built-in model. Give the folder's name: a card is published, and a
    /// path tells readers nothing about the model and too much about the machine.
    Local(&'a str),
}

impl<'a> BaseModel<'a> {
    fn name(self) -> &'a str {
        match self {
            Self::Hub(name) | Self::Local(name) => name,
        }
    }
}

/// What the folder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CardKind {
    /// An adapter of this method.
    Adapter(Method),
    /// A whole model in the Hugging Face layout.
    Model,
}

/// Everything the card says.
#[derive(Debug, Clone, Copy)]
pub struct ModelCard<'a> {
    /// The heading, usually the name of the folder.
    pub name: &'a str,
    /// What was written.
    pub kind: CardKind,
    /// Whether transformers loads the folder, or PEFT that of an adapter.
    pub python: bool,
    /// The model that was adapted.
    pub base: BaseModel<'a>,
    /// Whether tokens were added, so that the folder has a tokenizer of its own.
    pub new_tokens: bool,
    /// The method's name in a sentence, such as "LoRA" or "full fine-tuning".
    pub method: &'a str,
    /// Values that were trained.
    pub trainable_parameters: u64,
    /// Values of the base model.
    pub base_parameters: u64,
    /// Optimizer steps taken.
    pub steps: u64,
    /// Mean training loss of the last steps, in nats a supervised token.
    pub train_loss: Option<f64>,
    /// Held-out loss of the base model.
    pub eval_loss_before: Option<f64>,
    /// Held-out loss of what was written.
    pub eval_loss_after: Option<f64>,
    /// What a classifier says; `None` of a language model.
    pub classifier: Option<CardClassifier<'a>>,
    /// Settings as (key, value), in the order shown.
    pub settings: &'a [(String, String)],
}

/// What a classifier says.
#[derive(Debug, Clone, Copy)]
pub struct CardClassifier<'a> {
    /// The names of its outputs.
    pub labels: &'a [String],
    /// Whether it classifies tokens and not texts.
    pub of_tokens: bool,
    /// What the outputs mean.
    pub problem_type: ProblemType,
}

impl ModelCard<'_> {
    /// Where the tokenizer is, and what then becomes of the model in Python.
    fn tokenizer<'a>(&self, base: &'a str) -> (&'a str, &'static str) {
        if self.new_tokens {
            (
                "ADAPTER",
                "model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))\n",
            )
        } else {
            (base, "")
        }
    }
}

impl CardClassifier<'_> {
    /// The end of transformers' auto class.
    fn class(self) -> &'static str {
        if self.of_tokens {
            "TokenClassification"
        } else {
            "SequenceClassification"
        }
    }

    fn pipeline(self) -> &'static str {
        if self.of_tokens {
            "token-classification"
        } else {
            "text-classification"
        }
    }
}

/// The card as Markdown with YAML front matter.
pub fn render(card: &ModelCard<'_>) -> String {
    let mut text = String::from("---\n");
    // Writing to a String cannot fail, so the results of `write!` are dropped throughout.
    if let BaseModel::Hub(id) = card.base {
        let _ = writeln!(text, "base_model: {}", quote(id));
    }
    let (library, relation) = match card.kind {
        CardKind::Adapter(_) if card.python => ("peft", "adapter"),
        // No library of the Hub reads the files of the other methods.
        CardKind::Adapter(_) => ("lowrank", "adapter"),
        CardKind::Model => ("transformers", "finetune"),
    };
    let _ = writeln!(
        text,
        "library_name: {library}\npipeline_tag: {}\ntags:",
        card.classifier
            .map_or("text-generation", CardClassifier::pipeline)
    );
    if let BaseModel::Hub(id) = card.base {
        let _ = writeln!(text, "- {}", quote(&format!("base_model:{relation}:{id}")));
    }
    if let CardKind::Adapter(method) = card.kind
        && let Some(tag) = method.hub_tag()
    {
        let _ = writeln!(text, "- {tag}");
    }
    text.push_str("- lowrank\n---\n\n");

    let what = match card.kind {
        CardKind::Adapter(_) => "An adapter for",
        CardKind::Model => "A fine-tuned version of",
    };
    let base = match card.base {
        BaseModel::Hub(id) => format!("[{id}](https://huggingface.co/{id})"),
        BaseModel::Local(name) => format!("`{name}`"),
    };
    let _ = writeln!(
        text,
        "# {}\n\n{what} {base}, trained with {} by [lowrank](https://github.com/lowrank/lowrank) {}.\n",
        card.name,
        card.method,
        env!("CARGO_PKG_VERSION")
    );
    figures(card, &mut text);
    how_to_load(card, &mut text);
    if !card.settings.is_empty() {
        text.push_str("\n## Settings\n\n`config.yaml` in this folder holds them in the form that trains again.\n\n");
        table(
            &mut text,
            ["Setting", "Value"],
            card.settings
                .iter()
                .map(|(key, value)| (key.clone(), format!("`{value}`"))),
        );
    }
    text
}

fn figures(card: &ModelCard<'_>, text: &mut String) {
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push((name.to_string(), value));
    let share = 100.0 * card.trainable_parameters as f64 / card.base_parameters.max(1) as f64;
    row(
        "Trainable parameters",
        format!(
            "{} ({share:.3} % of the base's {})",
            grouped(card.trainable_parameters),
            grouped(card.base_parameters)
        ),
    );
    row("Optimizer steps", grouped(card.steps));
    let loss = |value: f64| match card.classifier {
        None => format!("{value:.4} (perplexity {:.3})", value.exp()),
        Some(_) => format!("{value:.4}"),
    };
    if let Some(value) = card.train_loss {
        row("Training loss, last steps", loss(value));
    }
    if let Some(value) = card.eval_loss_before {
        row("Held-out loss before", loss(value));
    }
    if let Some(value) = card.eval_loss_after {
        row("Held-out loss after", loss(value));
    }
    if let Some(classifier) = card.classifier {
        row("Labels", classifier.labels.join(", "));
        text.push_str("## Figures\n\nLosses are means over the labels.\n\n");
    } else {
        text.push_str("## Figures\n\nLosses are means in nats over the supervised tokens.\n\n");
    }
    table(text, ["Figure", "Value"], rows.into_iter());
}

fn how_to_load(card: &ModelCard<'_>, text: &mut String) {
    let base = card.base.name();
    let local = matches!(card.base, BaseModel::Local(_));
    let hint = if local {
        "; `BASE` is the folder of the base model"
    } else {
        ""
    };
    let base = if local { "BASE" } else { base };
    if let Some(classifier) = card.classifier {
        how_to_classify(card, classifier, (base, hint), text);
        return;
    }
    match card.kind {
        CardKind::Adapter(method) => {
            let _ = write!(
                text,
                "\n## Use\n\n`ADAPTER` is this folder{hint}.\n\n```sh\n\
                 lowrank generate --model {base} --adapter ADAPTER --prompt \"Hello\"\n"
            );
            if method.merges() {
                let _ = writeln!(
                    text,
                    "lowrank merge --model {base} --adapter ADAPTER --output merged"
                );
            }
            text.push_str("```\n");
            if card.python {
                let (files, resize) = card.tokenizer(base);
                let _ = write!(
                    text,
                    "\n```python\n\
                     from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                     tokenizer = AutoTokenizer.from_pretrained(\"{files}\")\n\
                     model = AutoModelForCausalLM.from_pretrained(\"{base}\")\n{resize}\
                     model = PeftModel.from_pretrained(model, \"ADAPTER\")\n```\n"
                );
            }
        }
        CardKind::Model => text.push_str(
            "\n## Use\n\n`MODEL` is this folder.\n\n```sh\n\
             lowrank generate --model MODEL --prompt \"Hello\"\n```\n\n```python\n\
             from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             tokenizer = AutoTokenizer.from_pretrained(\"MODEL\")\n\
             model = AutoModelForCausalLM.from_pretrained(\"MODEL\")\n```\n",
        ),
    }
}

fn how_to_classify(
    card: &ModelCard<'_>,
    classifier: CardClassifier<'_>,
    (base, hint): (&str, &str),
    text: &mut String,
) {
    let class = classifier.class();
    match card.kind {
        CardKind::Adapter(_) => {
            let _ = write!(
                text,
                "\n## Use\n\n`ADAPTER` is this folder{hint}.\n\n```sh\n\
                 lowrank classify --model {base} --adapter ADAPTER --text \"Hello\"\n```\n"
            );
            if card.python {
                let labels = serde_json::json!(classifier.labels);
                // Without it a pipeline takes the outputs for those of one right label.
                let problem = match classifier.problem_type {
                    ProblemType::SingleLabelClassification => String::new(),
                    problem => format!(", problem_type={}", serde_json::json!(problem)),
                };
                let (files, resize) = card.tokenizer(base);
                let _ = write!(
                    text,
                    "\n```python\n\
                     from peft import PeftModel\nfrom transformers import AutoModelFor{class}, AutoTokenizer\n\n\
                     labels = {labels}\n\
                     tokenizer = AutoTokenizer.from_pretrained(\"{files}\")\n\
                     model = AutoModelFor{class}.from_pretrained(\"{base}\", id2label=dict(enumerate(labels)){problem})\n{resize}\
                     model = PeftModel.from_pretrained(model, \"ADAPTER\")\n```\n"
                );
            }
        }
        CardKind::Model => {
            let _ = write!(
                text,
                "\n## Use\n\n`MODEL` is this folder.\n\n```sh\n\
                 lowrank classify --model MODEL --text \"Hello\"\n```\n"
            );
            if card.python {
                let _ = write!(
                    text,
                    "\n```python\nfrom transformers import pipeline\n\n\
                     classify = pipeline(\"{}\", model=\"MODEL\")\n```\n",
                    classifier.pipeline()
                );
            }
        }
    }
}

/// A Markdown table of two columns.
fn table(text: &mut String, head: [&str; 2], rows: impl Iterator<Item = (String, String)>) {
    let _ = writeln!(text, "| {} | {} |\n| --- | --- |", head[0], head[1]);
    for (name, value) in rows {
        let cell = |cell: String| cell.replace('|', "\\|").replace(['\n', '\r'], " ");
        let _ = writeln!(text, "| {} | {} |", cell(name), cell(value));
    }
}

/// A YAML scalar: plain where that is safe, otherwise as a JSON string, which YAML reads the same.
fn quote(value: &str) -> String {
    let plain = value.starts_with(|c: char| c.is_ascii_alphabetic())
        && value
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "/._-:".contains(c))
        && !value.ends_with(':')
        && value.contains('/');
    if plain {
        value.to_string()
    } else {
        serde_json::Value::from(value).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(kind: CardKind, base: BaseModel<'_>, settings: &[(String, String)]) -> String {
        card_of(None, kind, base, settings)
    }

    fn card_of(
        classifier: Option<CardClassifier<'_>>,
        kind: CardKind,
        base: BaseModel<'_>,
        settings: &[(String, String)],
    ) -> String {
        render(&ModelCard {
            classifier,
            name: "e2e-lora",
            kind,
            python: !matches!(kind, CardKind::Adapter(method) if method != Method::Lora),
            base,
            new_tokens: false,
            method: "LoRA",
            trainable_parameters: 460_800,
            base_parameters: 134_515_008,
            steps: 1200,
            train_loss: Some(1.25),
            eval_loss_before: Some(3.0),
            eval_loss_after: None,
            settings,
        })
    }

    #[test]
    fn a_classifier_is_used_as_one() {
        let labels = ["bad".to_owned(), "good".to_owned()];
        let of = |of_tokens, kind| {
            let classifier = CardClassifier {
                problem_type: ProblemType::SingleLabelClassification,
                labels: &labels,
                of_tokens,
            };
            card_of(Some(classifier), kind, BaseModel::Hub("a/b"), &[])
        };
        let text = of(false, CardKind::Adapter(Method::Lora));
        for line in [
            "pipeline_tag: text-classification",
            "| Labels | bad, good |",
            "| Training loss, last steps | 1.2500 |",
            "lowrank classify --model a/b --adapter ADAPTER --text \"Hello\"",
            "labels = [\"bad\",\"good\"]",
            "model = AutoModelForSequenceClassification.from_pretrained(\"a/b\", id2label=dict(enumerate(labels)))",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
        let text = of(true, CardKind::Model);
        assert!(
            text.contains("pipeline(\"token-classification\", model=\"MODEL\")"),
            "{text}"
        );
    }

    #[test]
    fn an_adapter_of_a_hub_model() {
        let settings = [
            ("r".to_string(), "8".to_string()),
            ("target_modules".to_string(), r".*\.(q|v)_proj".to_string()),
        ];
        insta::assert_snapshot!(card(CardKind::Adapter(Method::Lora), BaseModel::Hub("HuggingFaceTB/SmolLM2-135M"), &settings), @r#"
        ---
        base_model: HuggingFaceTB/SmolLM2-135M
        library_name: peft
        pipeline_tag: text-generation
        tags:
        - base_model:adapter:HuggingFaceTB/SmolLM2-135M
        - lora
        - lowrank
        ---

        # e2e-lora

        An adapter for [HuggingFaceTB/SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M), trained with LoRA by [lowrank](https://github.com/lowrank/lowrank) 0.1.0.

        ## Figures

        Losses are means in nats over the supervised tokens.

        | Figure | Value |
        | --- | --- |
        | Trainable parameters | 460,800 (0.343 % of the base's 134,515,008) |
        | Optimizer steps | 1,200 |
        | Training loss, last steps | 1.2500 (perplexity 3.490) |
        | Held-out loss before | 3.0000 (perplexity 20.086) |

        ## Use

        `ADAPTER` is this folder.

        ```sh
        lowrank generate --model HuggingFaceTB/SmolLM2-135M --adapter ADAPTER --prompt "Hello"
        lowrank merge --model HuggingFaceTB/SmolLM2-135M --adapter ADAPTER --output merged
        ```

        ```python
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        model = PeftModel.from_pretrained(model, "ADAPTER")
        ```

        ## Settings

        `config.yaml` in this folder holds them in the form that trains again.

        | Setting | Value |
        | --- | --- |
        | r | `8` |
        | target_modules | `.*\.(q\|v)_proj` |
        "#);
    }

    #[test]
    fn a_whole_model_from_a_folder_names_no_base_that_the_hub_would_refuse() {
        let text = card(CardKind::Model, BaseModel::Local("tiny"), &[]);
        assert!(text.starts_with("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- lowrank\n---\n"));
        assert!(text.contains("A fine-tuned version of `tiny`"));
    }

    #[test]
    fn yaml_scalars_are_quoted_where_needed() {
        assert_eq!(quote("owner/name-1.5_b"), "owner/name-1.5_b");
        assert_eq!(quote("gpt2"), "\"gpt2\"");
        assert_eq!(quote("a/b #c"), "\"a/b #c\"");
    }
}
