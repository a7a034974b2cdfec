//! The YAML file of a comparison, and what it comes to for a model: methods of a solved size with settings that `train`
//! takes.

use std::path::{Path, PathBuf};

use anyhow::Context;
use lowrank::base::Source;
use lowrank::compare::{self, Budget, Unit};
use lowrank::data::{
    DataOptions, Dataset, Labels, ProblemType, Split, TaskType, is_read_once, split_file, task_of,
};
use lowrank::model::{ModelConfig, Purpose};
use lowrank::settings::{REQUIRED, TrainConfig};
use lowrank::train::{purpose_of, split_columns};
use lowrank::tuning;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::failure::Misuse;
use crate::settings::train::{self as training, Resolved};
use crate::settings::{self, File};

/// The file as it is written; `train`, `sweep` and a method's own keys are settings of `lowrank train`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    title: Option<String>,
    model: Option<String>,
    data: Option<PathBuf>,
    #[serde(default = "default_seeds")]
    seeds: Vec<u64>,
    budget: Option<Value>,
    #[serde(default)]
    train: Map<String, Value>,
    #[serde(default)]
    sweep: Map<String, Value>,
    texts: Option<Texts>,
    metrics: Option<Vec<String>>,
    #[serde(default)]
    cost: CostSettings,
    #[serde(default)]
    methods: Vec<Map<String, Value>>,
}

fn default_seeds() -> Vec<u64> {
    vec![42]
}

/// How texts are made and scored; each key is a flag of `lowrank eval`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Texts {
    /// Names of text metrics.
    pub metrics: Vec<String>,
    /// Distinct prompts that are continued.
    pub limit: Option<usize>,
    /// New tokens at most.
    pub max_new_tokens: Option<usize>,
    /// Beams of the search.
    pub num_beams: Option<usize>,
    /// The power of a beam's length that its score is divided by.
    pub length_penalty: Option<f64>,
    /// Runs of tokens that may not come twice.
    pub no_repeat_ngram_size: Option<usize>,
    /// How texts are cut into tokens.
    pub tokenize: Option<String>,
    /// Whether they are scored in lower case.
    #[serde(default)]
    pub lowercase: bool,
}

impl Texts {
    /// The flags of `lowrank eval`.
    pub(super) fn flags(&self) -> Vec<String> {
        let mut flags = vec![format!("--metrics={}", self.metrics.join(","))];
        let mut add = |name: &str, value: Option<String>| {
            flags.extend(value.map(|value| format!("--{name}={value}")));
        };
        add("limit", self.limit.map(|n| n.to_string()));
        add("max-new-tokens", self.max_new_tokens.map(|n| n.to_string()));
        add("num-beams", self.num_beams.map(|n| n.to_string()));
        add("length-penalty", self.length_penalty.map(|x| x.to_string()));
        let size = self.no_repeat_ngram_size;
        add("no-repeat-ngram-size", size.map(|n| n.to_string()));
        add("tokenize", self.tokenize.clone());
        if self.lowercase {
            flags.push("--lowercase".to_owned());
        }
        flags
    }

    /// The same in words.
    pub(super) fn describe(&self) -> String {
        let mut words = vec![match self.limit {
            Some(limit) => format!("the first {limit} prompts"),
            None => "every prompt".to_owned(),
        }];
        words.push(match self.num_beams {
            Some(beams) if beams > 1 => format!("{beams} beams"),
            _ => "the likeliest token each time".to_owned(),
        });
        if let Some(penalty) = self.length_penalty {
            words.push(format!("length penalty {penalty}"));
        }
        if let Some(size) = self.no_repeat_ngram_size.filter(|&size| size > 0) {
            words.push(format!("no run of {size} tokens twice"));
        }
        if let Some(tokens) = self.max_new_tokens {
            words.push(format!("{tokens} new tokens at most"));
        }
        let tokens = self.tokenize.as_deref().unwrap_or("13a");
        let case = if self.lowercase { ", lower case" } else { "" };
        words.push(format!("scored on tokens by {tokens}{case}"));
        words.join(", ")
    }
}

/// How speed, memory and latency are measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct CostSettings {
    /// Training steps that are timed.
    pub steps: u64,
    /// Tokens of the random prompt that latency is measured behind.
    pub prompt_tokens: usize,
    /// Tokens that are generated for it.
    pub new_tokens: usize,
}

impl Default for CostSettings {
    fn default() -> Self {
        Self {
            steps: 10,
            prompt_tokens: 64,
            new_tokens: 32,
        }
    }
}

/// What wins over the file.
#[derive(Debug, Clone, Default)]
pub(super) struct Overrides {
    /// The base model.
    pub model: Option<String>,
    /// The rows.
    pub data: Option<PathBuf>,
    /// Names of the only methods that are wanted.
    pub only: Vec<String>,
}

/// A comparison that can be run.
#[derive(Debug)]
pub(super) struct Config {
    /// The heading.
    pub title: String,
    /// The base model.
    pub model: String,
    /// What it is for with these rows.
    pub purpose: Purpose,
    /// What the outputs of its classifier mean.
    pub labels: Option<Labels>,
    /// Its shapes.
    pub shapes: ModelConfig,
    /// The rows.
    pub data: PathBuf,
    /// The file of rows that losses and texts are measured on.
    pub held_out: PathBuf,
    /// How texts are made, if they are.
    pub texts: Option<Texts>,
    /// Names of a classifier's metrics.
    pub metrics: Vec<String>,
    /// How cost is measured.
    pub cost: CostSettings,
    /// The methods.
    pub entries: Vec<Entry>,
}

/// A method with everything decided but the learning rate.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Its name.
    pub name: String,
    /// The name as a folder's.
    pub slug: String,
    /// The method.
    pub method: tuning::Method,
    /// What it does not share with the others.
    pub options: Map<String, Value>,
    /// Settings of a training; learning rate, seed and output are put in for each.
    pub settings: Map<String, Value>,
    /// The same for a training that only tries a learning rate.
    pub sweep: Map<String, Value>,
    /// Learning rates: one, or those that are tried.
    pub rates: Vec<f64>,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// Values that are trained.
    pub trainable: u64,
    /// Positions of the context that virtual tokens take.
    pub positions: usize,
}

impl Written {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let file = File::read(path)?;
        let shown = path.display();
        if let Some(seeds) = file.values.get("seeds")
            && serde_json::from_value::<Vec<u64>>(seeds.clone()).is_err()
        {
            return Err(Misuse::new(format!(
                "{shown}: seeds must be a list of whole numbers, 0 or greater, such as [1, 2, 3], not {seeds}"
            ))
            .into());
        }
        let written = serde_json::from_value(Value::Object(file.values));
        Ok(written.map_err(|error| {
            Misuse::new(format!(
                "{shown}: {}",
                lowrank::fields::plain(&error.to_string())
            ))
        })?)
    }
}

impl Config {
    /// Reads the file and works out every method.
    ///
    /// # Errors
    /// With every problem that was found.
    pub(super) fn read(path: &Path, overrides: &Overrides) -> anyhow::Result<Self> {
        let written = Written::read(path)?;
        let shown = path.display();
        let mut problems = Misuse::default();
        let model = overrides.model.clone().or(written.model);
        let data = overrides.data.clone().or(written.data);
        problems.require(model.is_some(), || {
            format!("{shown} names no model; give it one, or --model")
        });
        problems.require(data.is_some(), || {
            format!("{shown} names no data; give it some, or --data")
        });
        for (name, settings) in [("train", &written.train), ("sweep", &written.sweep)] {
            problems.require(!settings.contains_key("output"), || {
                format!("{shown}: {name}: output cannot be set, since every training has a folder of its own in --output; leave it out")
            });
        }
        problems.require(!written.methods.is_empty(), || {
            format!("{shown} lists no methods; give at least one, such as {{method: lora, r: 4}}")
        });
        problems.require(
            written.cost.steps > 1 && written.cost.new_tokens > 1,
            || format!("{shown}: steps and new_tokens of cost must be 2 or greater"),
        );
        let (Some(model), Some(data)) = (model, data) else {
            return Err(problems
                .or(())
                .map_or_else(Into::into, |()| anyhow::anyhow!("no model")));
        };
        let source = Source::find(&model)?;
        let (purpose, labels) = purpose(&source, &data, &written.train)?;
        let shapes = source.shapes_for(purpose)?;
        let metrics = check_metrics(
            written.metrics,
            (purpose, labels.as_ref(), written.texts.is_some()),
            &mut problems,
        );
        let room = shapes.longest_sequence();
        let cost = written.cost;
        let new_tokens = if labels.is_some() { 0 } else { cost.new_tokens };
        problems.require(
            cost.prompt_tokens.saturating_add(new_tokens) <= room,
            || format!("{shown}: prompt_tokens and new_tokens of cost are more than the {room} tokens that the model was made for"),
        );
        let budget = written.budget.as_ref();
        let budget = read_budget(budget, &format!("{shown}"), &mut problems);
        let common = Common {
            file: path,
            model: &model,
            data: &data,
            shapes: &shapes,
            seeds: &written.seeds,
            budget,
            train: &written.train,
            sweep: &written.sweep,
        };
        let entries = common.entries(written.methods, &mut problems);
        if let Some(texts) = &written.texts
            && let Err(problem) = check_texts(texts)
        {
            problems.push(format!("{shown}: texts: {problem}"));
        }
        let held_out = held_out(&data, &written.train);
        check_rows(&data, &entries, held_out.is_some(), &mut problems);
        for name in &overrides.only {
            problems.require(entries.iter().any(|entry| entry.is_called(name)), || {
                let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
                format!(
                    "--only: no method is called {name}; there are {}",
                    names.join(", ")
                )
            });
        }
        problems.or(())?;
        Ok(Self {
            title: written.title.unwrap_or_else(|| {
                let stem = path.file_stem().unwrap_or_default();
                stem.to_string_lossy().into_owned()
            }),
            model,
            purpose,
            labels,
            shapes,
            data,
            held_out: held_out.unwrap_or_default(),
            texts: written.texts,
            metrics,
            cost: written.cost,
            entries,
        })
    }
}

/// Says what is wrong with the rows.
fn check_rows(data: &Path, entries: &[Entry], has_held_out: bool, problems: &mut Misuse) {
    let swept = entries.iter().find(|entry| entry.rates.len() > 1);
    if let Some(entry) = swept
        && !has_validation(data, &entry.sweep)
    {
        problems.push(format!(
            "{}: several learning rates are compared on validation rows, and {} has none; add valid.jsonl or valid_data",
            entry.name,
            data.display()
        ));
    }
    problems.require(!is_read_once(data), || {
        format!(
            "{}: the rows are read again for every training, and a pipe can be read only once; save them to a file",
            data.display()
        )
    });
    problems.require(has_held_out || entries.is_empty(), || {
        format!(
            "{} has no rows to compare methods on; add test.jsonl or valid.jsonl, or give valid_data under train",
            data.display()
        )
    });
}

/// What the model is for with these rows, and the labels that they have.
fn purpose(
    source: &Source,
    data: &Path,
    train: &Map<String, Value>,
) -> anyhow::Result<(Purpose, Option<Labels>)> {
    let columns = train.get("columns").and_then(Value::as_str);
    let columns = columns.map(split_columns);
    let asked = train.get("task_type").cloned().unwrap_or_default();
    let asked: Option<TaskType> = serde_json::from_value(asked).unwrap_or_default();
    let task = match asked {
        Some(task) => task,
        // A pipe can be read only once, which is said later on.
        None if is_read_once(data) => TaskType::CausalLm,
        None => task_of(data, Split::Train, columns.as_deref())?,
    };
    if task == TaskType::CausalLm {
        return Ok((Purpose::LanguageModel, None));
    }
    let on_bad_row = train.get("on_bad_row").cloned().unwrap_or_default();
    let options = DataOptions {
        task: Some(task),
        on_bad_row: serde_json::from_value(on_bad_row).unwrap_or_default(),
        columns,
        ..DataOptions::default()
    };
    let rows = Dataset::load(data, Split::Train, &source.tokenizer()?, &options)?;
    Ok((purpose_of(task, rows.labels.as_ref()), rows.labels))
}

/// The metrics of a classifier: those that the file lists, or what is usual for its labels.
fn check_metrics(
    listed: Option<Vec<String>>,
    (purpose, labels, makes_texts): (Purpose, Option<&Labels>, bool),
    problems: &mut Misuse,
) -> Vec<String> {
    let Some(labels) = labels else {
        problems.require(listed.is_none(), || {
            "metrics are those of classifiers; those of texts stand under texts".to_owned()
        });
        return Vec::new();
    };
    problems.require(!makes_texts, || {
        "texts are made by language models, and these rows have labels; leave texts out".to_owned()
    });
    let (usual, others): (&[&str], &[&str]) = match (purpose, labels.problem_type) {
        (Purpose::TokenClassifier { .. }, _) => (
            &["f1_micro", "accuracy"],
            &["f1_macro", "precision_micro", "recall_micro"],
        ),
        (_, ProblemType::SingleLabelClassification) => (
            &["accuracy", "f1_macro", "matthews"],
            &[
                "f1_binary",
                "f1_micro",
                "f1_weighted",
                "expected_calibration_error",
            ],
        ),
        (_, ProblemType::MultiLabelClassification) => {
            (&["exact_match", "f1_micro", "f1_macro"], &["f1_weighted"])
        }
        (_, ProblemType::Regression) => (
            &["pearson", "spearman"],
            &["mean_squared_error", "mean_absolute_error"],
        ),
    };
    let known = |name: &String| usual.iter().chain(others).any(|known| known == name);
    let usually = || usual.iter().map(ToString::to_string).collect();
    let metrics = listed.unwrap_or_else(usually);
    if let Some(name) = metrics.iter().find(|name| !known(name)) {
        let known: Vec<&str> = usual.iter().chain(others).copied().collect();
        problems.push(format!(
            "metrics: rows with these labels have no {name}; there are {}",
            known.join(", ")
        ));
    }
    metrics
}

impl Config {
    /// What losses and times are counted by.
    pub(super) fn unit(&self) -> Unit {
        if self.labels.is_some() {
            Unit::Row
        } else {
            Unit::Token
        }
    }

    /// Whether the model by itself can be scored: a new classifier says nothing.
    pub(super) fn has_base(&self) -> bool {
        self.labels.is_none()
    }

    /// Settings that are the same for all methods: how the base is held and rows are cut.
    ///
    /// # Errors
    /// Never for a comparison that was read.
    pub(super) fn shared(&self) -> anyhow::Result<TrainConfig> {
        let settings = self.entries.first().map(|entry| &entry.settings);
        train_config(settings.context("there are no methods")?)
    }
}

impl Entry {
    /// Whether `--only NAME` means this method.
    pub(super) fn is_called(&self, name: &str) -> bool {
        self.name == name || self.slug == name
    }
}

/// What all methods of a file share.
struct Common<'a> {
    file: &'a Path,
    model: &'a str,
    data: &'a Path,
    shapes: &'a ModelConfig,
    seeds: &'a [u64],
    budget: Option<Budget>,
    train: &'a Map<String, Value>,
    sweep: &'a Map<String, Value>,
}

impl Common<'_> {
    /// Every method that can be used; what is wrong with the others is a problem.
    fn entries(&self, written: Vec<Map<String, Value>>, problems: &mut Misuse) -> Vec<Entry> {
        let mut entries: Vec<Entry> = Vec::new();
        for (index, method) in written.into_iter().enumerate() {
            let place = match method.get("name").and_then(Value::as_str) {
                Some(name) => name.to_owned(),
                None => format!("method {}", index + 1),
            };
            match self.entry(method) {
                Ok(entry) => {
                    if let Some(other) = entries.iter().find(|other| other.slug == entry.slug) {
                        problems.push(format!(
                            "two methods are called {} (as a folder's name, {}); give each a name of its own",
                            other.name, entry.slug
                        ));
                    }
                    entries.push(entry);
                }
                Err(error) => match error.downcast::<Misuse>() {
                    Ok(misuse) => {
                        for problem in misuse.problems() {
                            problems.push(format!("{place}: {problem}"));
                        }
                    }
                    Err(error) => problems.push(format!("{place}: {error:#}")),
                },
            }
        }
        entries
    }

    fn entry(&self, mut written: Map<String, Value>) -> anyhow::Result<Entry> {
        let mut problems = Misuse::default();
        let name = match written.remove("name") {
            Some(Value::String(name)) if !slug(&name).is_empty() => Some(name),
            None => None,
            Some(other) => {
                return Err(Misuse::new(format!("name must be words, not {other}")).into());
            }
        };
        let seeds = match written.remove("seeds") {
            None => self.seeds.to_vec(),
            Some(value) => serde_json::from_value(value).map_err(|_| {
                Misuse::new("seeds must be a list of whole numbers, such as [1, 2, 3]")
            })?,
        };
        problems.require(!seeds.is_empty(), || {
            "seeds must list at least one".to_owned()
        });
        let distinct: std::collections::BTreeSet<u64> = seeds.iter().copied().collect();
        problems.require(distinct.len() == seeds.len(), || {
            "seeds must differ from each other".to_owned()
        });
        let own_budget = read_budget(written.remove("budget").as_ref(), "budget", &mut problems);
        for key in [
            "model",
            "data",
            "output",
            "seed",
            "threads",
            "base_dtype",
            "load_in",
            "valid_data",
            "max_seq_length",
            "task_type",
            "columns",
            "new_classifier",
            "train_on_prompt",
            "on_bad_row",
            "completion_boundary",
        ] {
            problems.require(!written.contains_key(key), || {
                format!("{key} is not a method's to decide; it is the same for all, and stands above or under train")
            });
            written.remove(key);
        }
        let rates = match written.get("learning_rate") {
            Some(Value::Array(rates)) => {
                let rates: Option<Vec<f64>> = rates.iter().map(Value::as_f64).collect();
                written.remove("learning_rate");
                rates.filter(|rates| rates.iter().all(|&rate| rate > 0.0 && rate.is_finite()))
            }
            _ => Some(Vec::new()),
        };
        let Some(mut rates) = rates.filter(|rates| !has_twins(rates)) else {
            return Err(Misuse::new(
                "learning_rate must be a number greater than 0, or a list of different ones to try",
            )
            .into());
        };
        problems.or(())?;

        let mut resolved = self.resolve(&[self.train, &written])?;
        let mut sweep = self.resolve(&[self.train, self.sweep, &written])?;
        let mut config = train_config(&resolved.values)?;
        if let Some(size) = self.size(&config, own_budget, &resolved)? {
            for values in [&mut resolved.values, &mut sweep.values, &mut written] {
                values.extend(size.clone());
            }
            config = train_config(&resolved.values)?;
        }
        if rates.is_empty() {
            rates.push(config.learning_rate);
        }
        let adapter = config.lay_out(self.shapes)?;
        let name = name.unwrap_or_else(|| config.method.label(&config.options));
        written.remove("method");
        written.remove("learning_rate");
        Ok(Entry {
            slug: slug(&name),
            name,
            method: config.method,
            options: written,
            settings: resolved.values,
            sweep: sweep.values,
            rates,
            seeds,
            trainable: adapter.parameters() as u64,
            positions: adapter.virtual_tokens().total(),
        })
    }

    /// Settings of `lowrank train` from layers of the file, later ones stronger.
    fn resolve(&self, layers: &[&Map<String, Value>]) -> Result<Resolved, Misuse> {
        let parsed = TrainConfig {
            model: self.model.to_owned(),
            data: self.data.to_path_buf(),
            output: PathBuf::from("-"),
            ..training::defaults()
        };
        let matches = training::command()
            .try_get_matches_from(["train"])
            .map_err(|error| Misuse::new(error.to_string()))?;
        let files = layers.iter().map(|values| File {
            path: self.file.to_path_buf(),
            values: (*values).clone(),
        });
        let mut layered = settings::layer(parsed, &matches, files.collect());
        layered.count_as_given(&REQUIRED);
        training::resolve(layered)
    }

    /// The settings that a budget decides.
    fn size(
        &self,
        config: &TrainConfig,
        own: Option<Budget>,
        resolved: &Resolved,
    ) -> anyhow::Result<Option<Map<String, Value>>> {
        let size = config.method.size();
        let given = size.filter(|size| resolved.given.contains(size.key));
        let budget = match (own, given, size) {
            (Some(_), Some(size), _) => {
                return Err(Misuse::new(format!(
                    "{} and a budget are both given; the budget decides it, so leave one of them out",
                    size.key
                ))
                .into());
            }
            (Some(own), None, _) => own,
            (None, None, Some(_)) => match self.budget {
                Some(budget) => budget,
                None => return Ok(None),
            },
            (None, ..) => return Ok(None),
        };
        let values = budget.values(self.shapes.parameters() as u64);
        let solved = compare::solve(config, self.shapes, values)?;
        let mut decided = Map::new();
        if let Some(size) = size {
            decided.insert(size.key.to_owned(), solved.into());
        }
        if let Some((key, factor)) = size.and_then(|size| size.follower)
            && !resolved.given.contains(key)
        {
            decided.insert(key.to_owned(), (factor * solved as f64).into());
        }
        Ok(Some(decided))
    }
}

fn train_config(values: &Map<String, Value>) -> anyhow::Result<TrainConfig> {
    Ok(serde_json::from_value(Value::Object(values.clone()))?)
}

fn read_budget(value: Option<&Value>, place: &str, problems: &mut Misuse) -> Option<Budget> {
    let text = match value? {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    text.parse()
        .map_err(|problem| problems.push(format!("{place}: {problem}")))
        .ok()
}

fn has_twins(rates: &[f64]) -> bool {
    let twice = |index: usize| rates[..index].contains(&rates[index]);
    (0..rates.len()).any(twice)
}

/// The rows that nothing trains on: test rows, else validation rows.
fn held_out(data: &Path, train: &Map<String, Value>) -> Option<PathBuf> {
    let of_folder = |split| split_file(data, split).ok().flatten();
    let valid_data = || train.get("valid_data")?.as_str().map(PathBuf::from);
    of_folder(Split::Test)
        .or_else(valid_data)
        .or_else(|| of_folder(Split::Valid))
}

fn has_validation(data: &Path, settings: &Map<String, Value>) -> bool {
    settings
        .get("valid_data")
        .is_some_and(|path| !path.is_null())
        || split_file(data, Split::Valid).is_ok_and(|file| file.is_some())
}

/// Lets the parser of `lowrank eval` judge the flags, long before they are used.
fn check_texts(texts: &Texts) -> Result<(), String> {
    if texts.metrics.is_empty() {
        return Err("metrics must list at least one, such as [bleu, rouge-l]".to_owned());
    }
    let mut args = ["lowrank", "eval", "--model=m", "--data=d"]
        .map(str::to_owned)
        .to_vec();
    args.extend(texts.flags());
    crate::args::parse(args.into_iter().map(Into::into))
        .map(|_| ())
        .map_err(|error| {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            first.trim_start_matches("error: ").to_owned()
        })
}

/// A setting that is one word, as files and flags write it.
pub(super) fn word(kind: &impl Serialize) -> String {
    let value = serde_json::to_value(kind).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// Letters and digits of a name, the rest as single dashes.
fn slug(name: &str) -> String {
    let mut slug = String::new();
    for c in name.chars() {
        if c.is_alphanumeric() {
            slug.extend(c.to_lowercase());
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    slug.trim_end_matches('-').to_owned()
}
