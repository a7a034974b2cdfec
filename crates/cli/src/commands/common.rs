//! Arguments and steps that several commands share.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use lowrank::base::{Base, Source};
use lowrank::data::{
    Boundary, DataOptions, Dataset, Labels, OnBadRow, Split, TaskType, Tokenizer,
    is_standard_input, split_file, why_missing,
};
use lowrank::model::{Adapter, AdapterSet, LoadIn, ModelConfig, Weights};
use lowrank::train::{BaseDtype, split_columns};
use lowrank::tuning::{self, Loaded};

use crate::failure::{Misuse, paragraph};
use crate::settings::paths::why_no_adapter;

/// Which model, and how it is held.
#[derive(Debug, Clone, Args)]
pub struct BaseArgs {
    /// The model: a folder in the Hugging Face layout, a GGUF file, an id of the Hub, or builtin:tiny
    #[arg(long, value_name = "MODEL")]
    pub model: String,

    /// How the model's weights are stored
    #[arg(
        long,
        value_name = "DTYPE",
        default_value = "bf16",
        help_heading = "Machine"
    )]
    pub base_dtype: BaseDtype,

    /// Quantize the matrices of the model's blocks while they are loaded, to NF4 or to int8
    #[arg(long, value_name = "BITS", help_heading = "Machine")]
    pub load_in: Option<LoadIn>,

    /// Threads to compute with [default: one a core]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub threads: Option<usize>,
}

impl BaseArgs {
    /// The files of the model.
    ///
    /// # Errors
    /// When there is no such model, or it cannot be quantized.
    pub fn source(&self) -> Result<Source, lowrank::Error> {
        Source::find(&self.model)?.load_in(self.load_in)
    }

    /// Loads the model, with the tokens that these adapters bring.
    ///
    /// # Errors
    /// When there is no such model or its files cannot be used; adapters that do not bring the same tokens.
    pub fn load(&self, adapters: &[&Path]) -> anyhow::Result<Base> {
        let source = self.source()?;
        for folder in adapters {
            check_is_adapter(folder)?;
        }
        let source = source.with_tokens_of(adapters)?;
        Ok(source.load(self.base_dtype.into())?)
    }
}

/// How exactly tokens are generated.
#[derive(Debug, Clone, Args)]
pub struct ExactArgs {
    /// Multiply with f32 numbers beside quantized weights, too
    ///
    /// By default what is multiplied with a quantized weight while tokens are generated is rounded to 16 bits, 32 numbers with a scale of their
    /// own, and in prompts to bf16 where the processor gains by it. It is several times as fast. Training and evaluation are never rounded so.
    #[arg(long, help_heading = "Machine")]
    pub exact: bool,
}

impl ExactArgs {
    /// Lets a model generate so.
    ///
    /// # Errors
    /// When it would generate so anyway.
    pub fn apply(&self, base: &Base) -> Result<(), Misuse> {
        if self.exact && !base.decoder.weights().has_integers() {
            return Err(Misuse::new(format!(
                "--exact: {} has no weights beside which anything is rounded (NF4 and FP4 are none); leave it out",
                base.source
            )));
        }
        base.decoder.set_exact(self.exact);
        Ok(())
    }
}

/// Which rows, and how they become tokens.
#[derive(Debug, Clone, Args)]
pub struct RowsArgs {
    /// A folder with train.jsonl, valid.jsonl or test.jsonl, one file, or - for standard input
    #[arg(long, value_name = "PATH", help_heading = "Data")]
    pub data: PathBuf,

    /// Which file of the folder
    #[arg(long, value_name = "SPLIT", help_heading = "Data")]
    pub split: Option<Split>,

    /// Names of the columns of a CSV or TSV file without a header, such as text,label
    #[arg(long, value_name = "NAMES", help_heading = "Data")]
    pub columns: Option<String>,

    /// Cut longer rows to so many tokens, from the end
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 2048,
        help_heading = "Data"
    )]
    pub max_seq_length: usize,

    /// Let the loss fall on prompts too, not on completions alone
    #[arg(long, help_heading = "Data")]
    pub train_on_prompt: bool,

    /// What to do with a row that cannot be used
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "error",
        help_heading = "Data"
    )]
    pub on_bad_row: OnBadRow,

    /// Encode prompt and completion as one text, as TRL does, or each by itself
    #[arg(
        long,
        value_name = "HOW",
        default_value = "joint",
        help_heading = "Data"
    )]
    pub completion_boundary: Boundary,
}

impl RowsArgs {
    /// Reads the rows. Without `--split`, the first of `preferred` that the folder holds is meant.
    ///
    /// # Errors
    /// When the file is missing or a row cannot be used.
    pub fn load(&self, tokenizer: &Tokenizer, preferred: &[Split]) -> anyhow::Result<Dataset> {
        self.load_for(tokenizer, preferred, Some(TaskType::CausalLm), None)
    }

    /// The same for a task, or for whichever the rows are for; with labels, those of the rows must be among them.
    ///
    /// # Errors
    /// When the file is missing or a row cannot be used.
    pub fn load_for(
        &self,
        tokenizer: &Tokenizer,
        preferred: &[Split],
        task: Option<TaskType>,
        labels: Option<Labels>,
    ) -> anyhow::Result<Dataset> {
        if self.max_seq_length < 2 {
            return Err(Misuse::new("--max-seq-length must be 2 or greater").into());
        }
        let options = DataOptions {
            max_seq_length: self.max_seq_length,
            train_on_prompt: self.train_on_prompt,
            on_bad_row: self.on_bad_row,
            completion_boundary: self.completion_boundary,
            task,
            labels,
            order: None,
            columns: self.columns.as_deref().map(split_columns),
        };
        let split = choose_split(&self.data, self.split, preferred)?;
        Ok(Dataset::load(&self.data, split, tokenizer, &options)?)
    }
}

/// The split that is meant: the one asked for, a single file, or the first of `preferred` that the folder holds.
///
/// # Errors
/// When there is nothing at the path, or a split is asked for of a single file.
pub fn choose_split(
    data: &Path,
    asked: Option<Split>,
    preferred: &[Split],
) -> anyhow::Result<Split> {
    if !data.exists() && !is_standard_input(data) {
        let reason = why_missing(data).unwrap_or_else(|| "does not exist".to_owned());
        return Err(Misuse::new(format!("--data: {} {reason}", data.display())).into());
    }
    match asked {
        Some(_) if !data.is_dir() => Err(Misuse::new(format!(
            "--split goes with a folder of rows, and --data {} is one file; leave --split out",
            data.display()
        ))
        .into()),
        Some(split) => Ok(split),
        None if !data.is_dir() => Ok(Split::File),
        None => {
            for &split in preferred {
                if split_file(data, split)?.is_some() {
                    return Ok(split);
                }
            }
            let train = Split::Train;
            if let Some(file) = split_file(data, train)?
                && !preferred.contains(&Split::Train)
            {
                let names: Vec<&str> = preferred
                    .iter()
                    .flat_map(|&split| split.stems())
                    .copied()
                    .collect();
                return Err(Misuse::new(format!(
                    "--data {} has no file of held-out rows ({}); it has {}, which --split train reads",
                    data.display(),
                    names.join(", "),
                    file.file_name().unwrap_or_default().display()
                ))
                .into());
            }
            // The library's own message lists what the folder holds.
            Ok(preferred.first().copied().unwrap_or(Split::Train))
        }
    }
}

/// An adapter's folder with the name that it goes by: `NAME=DIR`, or `DIR`, whose last part is then the name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterArg {
    /// The name.
    pub name: String,
    /// The folder.
    pub path: PathBuf,
}

impl AdapterArg {
    /// The folders.
    pub fn paths(args: &[Self]) -> Vec<&Path> {
        args.iter().map(|arg| arg.path.as_path()).collect()
    }
}

impl FromStr for AdapterArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = text
            .split_once('=')
            .filter(|(name, _)| !name.contains(['/', '\\']) && !Path::new(text).exists());
        if let Some((name, path)) = named {
            if name.is_empty() || path.is_empty() {
                return Err("expected DIR or NAME=DIR".to_string());
            }
            return Ok(Self {
                name: name.to_string(),
                path: PathBuf::from(path),
            });
        }
        let path = PathBuf::from(text);
        match path.file_name() {
            Some(name) => Ok(Self {
                name: name.to_string_lossy().into_owned(),
                path,
            }),
            None if path.exists() => Ok(Self {
                name: "adapter".to_string(),
                path,
            }),
            None => Err("expected DIR or NAME=DIR".to_string()),
        }
    }
}

/// Adapters of one base under their names.
pub struct Adapters {
    /// The names, in the order given.
    pub names: Vec<String>,
    loaded: Vec<Loaded>,
}

impl Adapters {
    /// Loads every adapter.
    ///
    /// # Errors
    /// When two have the same name, or one cannot be used with this base.
    pub fn load(args: &[AdapterArg], base: &Base) -> anyhow::Result<Self> {
        let names: Vec<String> = args.iter().map(|arg| arg.name.clone()).collect();
        if let Some(twice) = names
            .iter()
            .enumerate()
            .find(|(index, name)| names[..*index].contains(name))
        {
            return Err(Misuse::new(format!(
                "two adapters are called {0}; name them: --adapter NAME=DIR",
                twice.1
            ))
            .into());
        }
        if let Some(name) = names.iter().find(|name| *name == "none" || *name == "base") {
            return Err(Misuse::new(format!(
                "an adapter cannot be called {name}, which means the model alone; name it otherwise: --adapter NAME=DIR"
            ))
            .into());
        }
        let loaded = args
            .iter()
            .map(|arg| load_adapter(&arg.path, base))
            .collect::<Result<Vec<_>, _>>()?;
        let alone = loaded
            .iter()
            .position(|one| !one.adapter.goes_with_others());
        if let (Some(index), 2..) = (alone, loaded.len()) {
            return Err(Misuse::new(format!(
                "{} replaces weights of the model ({}), so it cannot be used beside another adapter; give it alone, or merge it first (lowrank merge)",
                names[index],
                loaded[index].config.method().title()
            ))
            .into());
        }
        Ok(Self { names, loaded })
    }

    /// The adapters in the order of their names, for [`AdapterSet::new`].
    pub fn all(&self) -> Vec<&Adapter> {
        self.loaded.iter().map(|loaded| &loaded.adapter).collect()
    }
}

/// Loads an adapter and says what it covers, and whether it was trained on another base.
///
/// # Errors
/// When its files cannot be used or do not fit the base.
pub fn load_adapter(folder: &Path, base: &Base) -> anyhow::Result<Loaded> {
    check_is_adapter(folder)?;
    let loaded = tuning::load(folder, base.decoder.config())?;
    tracing::info!("{}: {}", folder.display(), loaded.coverage);
    warn_of_other_base(folder, &loaded, base.decoder.weights(), &base.source);
    Ok(loaded)
}

/// Refuses what `--adapter` cannot mean.
///
/// # Errors
/// When the folder is none of an adapter.
pub fn check_is_adapter(folder: &Path) -> Result<(), Misuse> {
    if folder.join("config.json").is_file() && !folder.join("adapter_config.json").is_file() {
        let shown = folder.display();
        return Err(Misuse::new(format!(
            "{shown} is a whole model, not an adapter; give it with --model {shown}"
        )));
    }
    match why_no_adapter(folder) {
        None => Ok(()),
        Some(reason) => Err(Misuse::new(format!(
            "--adapter: {} {reason}",
            folder.display()
        ))),
    }
}

/// Says so where an adapter was trained on another base than this one.
pub fn warn_of_other_base(folder: &Path, loaded: &Loaded, weights: &Weights, source: &Source) {
    let fingerprint = weights.fingerprint();
    if loaded
        .base_fingerprint
        .as_ref()
        .is_some_and(|recorded| *recorded != fingerprint)
    {
        tracing::warn!(
            "{} was trained on another model than {source}: it fits in shape, but expect poor results",
            folder.display()
        );
    }
}

/// The set of adapters; a set of none is the base alone.
pub fn adapter_set<'a>(adapters: &'a [&'a Adapter]) -> AdapterSet<'a> {
    if adapters.is_empty() {
        AdapterSet::none()
    } else {
        AdapterSet::new(adapters)
    }
}

/// Refuses rows and prompts that are longer than the model can take beside the virtual tokens of any of the adapters.
///
/// # Errors
/// When `longest` tokens are too many.
pub fn check_length(
    (source, model): (&Source, &ModelConfig),
    adapters: &[&Adapter],
    longest: usize,
    mend: &str,
) -> Result<(), Misuse> {
    let limit = model.longest_sequence();
    let taken = adapters.iter().map(|one| one.virtual_tokens().total());
    let taken = taken.max().unwrap_or(0);
    if longest > limit.saturating_sub(taken) {
        let virtual_tokens = match taken {
            0 => String::new(),
            _ => format!(", {taken} of them the adapter's"),
        };
        return Err(Misuse::new(format!(
            "{longest} tokens are too many for {source}, which was made for {limit}{virtual_tokens}; {mend}"
        )));
    }
    Ok(())
}

/// What a calculation that gave NaN or infinity is reported as. `what` is what came out of it.
pub fn not_finite(what: &str, base: &Base, adapter: Option<&str>) -> anyhow::Error {
    let source = &base.source;
    let common = "weights that are too large or damaged, or a config.json that does not belong to them, cause this";
    match adapter {
        None => anyhow::anyhow!("{what} of {source} is not finite (NaN or infinite); {common}"),
        Some(name) => anyhow::anyhow!(
            "{what} of {source} with the adapter {name} is not finite (NaN or infinite); {common}; \
             run it without the adapter to see which of the two is at fault"
        ),
    }
}

/// Gives the library's errors about settings the exit code of misuse.
pub fn as_misuse(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<lowrank::Error>() {
        Some(cause) if cause.is_misuse() => Misuse::new(paragraph(&error)).into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_names() {
        let parse = |text: &str| {
            text.parse::<AdapterArg>()
                .map(|arg| (arg.name, arg.path.display().to_string()))
        };
        let pair = |name: &str, path: &str| Ok((name.to_string(), path.to_string()));
        assert_eq!(parse("runs/e2e/"), pair("e2e", "runs/e2e/"));
        assert_eq!(parse("formal=runs/e2e"), pair("formal", "runs/e2e"));
        assert_eq!(parse("runs/lr=1/x"), pair("x", "runs/lr=1/x"));
        assert!(parse("=x").is_err() && parse("x=").is_err() && parse("").is_err());
    }

    #[test]
    fn a_split_needs_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("valid.jsonl");
        std::fs::write(&file, "").unwrap();
        let choose = |path: &Path, asked| choose_split(path, asked, &[Split::Test, Split::Valid]);
        assert_eq!(choose(folder.path(), None).unwrap(), Split::Valid);
        assert_eq!(choose(&file, None).unwrap(), Split::File);
        assert!(
            choose(&file, Some(Split::Test))
                .unwrap_err()
                .to_string()
                .contains("leave --split out")
        );
        let train = tempfile::tempdir().unwrap();
        std::fs::write(train.path().join("train.jsonl"), "").unwrap();
        let error = choose(train.path(), None).unwrap_err().to_string();
        assert!(
            error.contains("(test, testing, valid, validation, val, eval, dev); it has train.jsonl, which --split train"),
            "{error}"
        );
        let error = choose(Path::new("nobody/some-rows"), None).unwrap_err();
        assert!(error.is::<Misuse>(), "{error}");
        let error = error.to_string();
        assert!(error.contains("data sets are not downloaded"), "{error}");
        assert!(
            choose(&folder.path().join("none"), None)
                .unwrap_err()
                .is::<Misuse>()
        );
    }

    #[test]
    fn settings_errors_of_the_library_are_misuse() {
        let error = anyhow::Error::from(lowrank::Error::Settings("x".to_string()));
        assert!(as_misuse(error).is::<Misuse>());
        let error = anyhow::Error::from(lowrank::Error::Training("x".to_string()));
        assert!(!as_misuse(error).is::<Misuse>());
    }
}
