//! Adapters that are combined and pruned as files: against PEFT's goldens, and what cannot be.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lowrank::lora_files::{
    Combination, CombineOptions, FileDtype, Keep, LoraFile, LoraModule, MajoritySign, PruneOptions,
    combine, prune,
};
use lowrank::model::Adapter;
use lowrank::tuning::lora::{self, InitLoraWeights};
use lowrank::tuning::{self, BaseMark};
use lowrank::{Error, merge};
use lowrank_formats::peft::ADAPTER_CONFIG;
use lowrank_formats::{Checkpoint, StoredDType, TensorEntry, TensorSpec, write_safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::common::{assert_says, decoder, failure, golden, lora_config};

fn folder(name: &str) -> PathBuf {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens_combine");
    goldens.join(name)
}

/// ΔW, row after row.
fn delta(module: &LoraModule) -> Vec<f64> {
    let (a, b) = (module.a.to_vec(), module.b.to_vec());
    let (rank, inputs) = (module.a.rows(), module.a.cols());
    let mut delta = vec![0.0; module.b.rows() * inputs];
    for (row, line) in delta.chunks_mut(inputs).enumerate() {
        for k in 0..rank {
            let left = module.scale * f64::from(b[row * rank + k]);
            for (sum, right) in line.iter_mut().zip(&a[k * inputs..][..inputs]) {
                *sum += left * f64::from(*right);
            }
        }
    }
    delta
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// ‖one - other‖ / ‖other‖
fn distance(one: &[f64], other: &[f64]) -> f64 {
    assert_eq!(one.len(), other.len());
    let difference: Vec<f64> = one.iter().zip(other).map(|(a, b)| a - b).collect();
    norm(&difference) / norm(other)
}

fn module<'a>(file: &'a LoraFile, end: &str) -> &'a LoraModule {
    let mut modules = file.modules.iter();
    modules
        .find(|module| module.name.ends_with(end))
        .expect("it is adapted")
}

struct Case {
    adapters: Vec<PathBuf>,
    weights: Vec<f64>,
    combination: Combination,
    density: Option<f64>,
    majority_sign: Option<MajoritySign>,
    svd_rank: Option<usize>,
}

impl Case {
    fn read(case: &Value) -> Self {
        let combinations = [
            Combination::Cat,
            Combination::Svd,
            Combination::Linear,
            Combination::Ties,
            Combination::TiesSvd,
            Combination::DareLinear,
            Combination::DareTies,
            Combination::DareLinearSvd,
            Combination::DareTiesSvd,
            Combination::MagnitudePrune,
            Combination::MagnitudePruneSvd,
        ];
        let name = case["combine"].as_str().expect("a name");
        let options = &case["options"];
        let list = |key: &str| case[key].as_array().expect("a list").iter();
        Self {
            adapters: list("adapters")
                .map(|name| folder(name.as_str().expect("a name")))
                .collect(),
            weights: list("weights")
                .map(|weight| weight.as_f64().expect("a number"))
                .collect(),
            combination: combinations
                .into_iter()
                .find(|c| c.name() == name)
                .expect("it is known"),
            density: options["density"].as_f64(),
            majority_sign: options["majority_sign"].as_str().map(|sign| {
                assert_eq!(sign, "frequency");
                MajoritySign::Frequency
            }),
            svd_rank: options["svd_rank"].as_u64().map(|rank| rank as usize),
        }
    }

    fn options<'a>(&'a self, output: &'a Path) -> CombineOptions<'a> {
        CombineOptions {
            weights: &self.weights,
            combination: self.combination,
            density: self.density,
            majority_sign: self.majority_sign,
            svd_rank: self.svd_rank,
            ..CombineOptions::new(&self.adapters, output)
        }
    }
}

#[test]
fn combinations_are_those_of_peft() {
    let place = tempfile::tempdir().expect("a folder");
    let cases = fs::read_to_string(folder("cases.json")).expect("the list");
    let cases: Value = serde_json::from_str(&cases).expect("JSON");
    let golden = Checkpoint::open(&folder("golden.safetensors")).expect("the golden");
    let cases = cases.as_object().expect("cases by name");
    assert_eq!(cases.len(), 20);
    for (name, case) in cases {
        let case = Case::read(case);
        let output = place.path().join(name);
        let report = combine(&case.options(&output)).expect("it can be combined");
        let made = LoraFile::read(&output).expect("it is read");
        assert_eq!(report.modules.len(), made.modules.len());
        let prefix = format!("{name}.");
        let expected = golden
            .names()
            .filter(|key| key.starts_with(&prefix))
            .count();
        assert_eq!(made.modules.len(), expected, "{name}");
        for (module, report) in made.modules.iter().zip(&report.modules) {
            let place = format!("{name}.{}", module.name);
            let expected = golden.get(&place).expect("the module's golden");
            assert_eq!(expected.shape, [module.b.rows(), module.a.cols()]);
            let expected: Vec<f64> = expected
                .to_f32()
                .unwrap()
                .into_iter()
                .map(f64::from)
                .collect();
            let found = delta(module);
            let off = distance(&found, &expected);
            assert!(off < 1e-5, "{place} is off by {off}");
            assert_eq!((&report.module, report.rank), (&module.name, module.rank()));
            assert!((report.norm / norm(&found) - 1.0).abs() < 1e-6, "{place}");
            assert_eq!(module.scale, 1.0, "{place}");
        }
        assert!(!made.config.use_rslora, "{name}");
    }
}

#[test]
fn the_error_is_that_of_what_was_written() {
    let place = tempfile::tempdir().expect("a folder");
    let adapters = [folder("plain"), folder("rslora")];
    let (exact, cut) = (place.path().join("exact"), place.path().join("cut"));
    let weights = [2.0, -1.0];
    let with = |combination, output, svd_rank, dtype| {
        let options = CombineOptions {
            weights: &weights,
            combination,
            svd_rank,
            dtype,
            ..CombineOptions::new(&adapters, output)
        };
        combine(&options).expect("it can be combined")
    };
    let sum = with(Combination::Cat, &exact, None, FileDtype::F32);
    assert!(sum.relative_error.unwrap() < 1e-6);
    assert_eq!(sum.modules[0].ranks.len(), 2);
    let down = sum
        .modules
        .iter()
        .find(|m| m.module.ends_with("down_proj"))
        .unwrap();
    assert_eq!((&down.ranks[..], down.rank), (&[Some(4), None][..], 4));
    let report = with(Combination::Svd, &cut, Some(2), FileDtype::F16);
    let (exact, cut) = (
        LoraFile::read(&exact).unwrap(),
        LoraFile::read(&cut).unwrap(),
    );
    let (mut errors, mut sizes) = (0.0, 0.0);
    for ((one, other), report) in cut.modules.iter().zip(&exact.modules).zip(&report.modules) {
        let off = distance(&delta(one), &delta(other));
        assert!(
            (off - report.relative_error.unwrap()).abs() < 1e-6,
            "{off} {report:?}"
        );
        let size = norm(&delta(other));
        errors += (off * size).powi(2);
        sizes += size * size;
    }
    let total = (errors / sizes).sqrt();
    assert!(
        total > 0.05 && (total - report.relative_error.unwrap()).abs() < 1e-6,
        "{total}"
    );
    // The sum of A's and of B's is something else, and the report says how much.
    let linear = place.path().join("linear");
    assert!(
        with(Combination::Linear, &linear, None, FileDtype::F32)
            .relative_error
            .unwrap()
            > 0.1
    );
}

#[test]
fn dare_drops_by_its_seed_and_needs_its_density() {
    let place = tempfile::tempdir().expect("a folder");
    let adapters = [folder("plain"), folder("low")];
    let run = |name: &str, combination, density, seed| {
        let output = place.path().join(name);
        let options = CombineOptions {
            combination,
            density: Some(density),
            seed: Some(seed),
            ..CombineOptions::new(&adapters, &output)
        };
        combine(&options).expect("it can be combined");
        fs::read(output.join("adapter_model.safetensors")).expect("the weights")
    };
    for combination in [Combination::DareLinear, Combination::DareTiesSvd] {
        let name = |at: &str| format!("{}{at}", combination.name());
        let first = run(&name("1"), combination, 0.5, 7);
        assert!(first == run(&name("2"), combination, 0.5, 7));
        assert!(first != run(&name("3"), combination, 0.5, 8));
        let all = run(&name("4"), combination, 1.0, 7);
        assert!(first != all && all == run(&name("5"), combination, 1.0, 8));
    }
}

#[test]
fn a_quantile_limits_the_numbers() {
    let place = tempfile::tempdir().expect("a folder");
    let adapters = [folder("plain"), folder("low")];
    let largest = |name: &str, clamp| {
        let output = place.path().join(name);
        let options = CombineOptions {
            combination: Combination::Svd,
            clamp,
            ..CombineOptions::new(&adapters, &output)
        };
        let error = combine(&options)
            .expect("it can be combined")
            .relative_error;
        let made = LoraFile::read(&output).expect("it is read");
        let of = |module: &LoraModule| {
            let all = [module.a.to_vec(), module.b.to_vec()].concat().into_iter();
            let mut all: Vec<f32> = all.map(f32::abs).collect();
            all.sort_by(f32::total_cmp);
            all
        };
        (of(module(&made, "q_proj")), error.unwrap())
    };
    let (whole, exact) = largest("whole", None);
    let (same, _) = largest("same", Some(1.0));
    let (limited, error) = largest("limited", Some(0.9));
    assert_eq!(whole, same);
    // Of the numbers with both signs a tenth is above it, so a fifth of the magnitudes is.
    let above = whole
        .iter()
        .filter(|value| *value > limited.last().unwrap())
        .count();
    assert!(
        (above as f64 / whole.len() as f64 - 0.2).abs() < 0.02,
        "{above}"
    );
    assert!(error > exact + 0.01);
}

fn options_fail(change: impl FnOnce(&mut CombineOptions)) -> String {
    let place = tempfile::tempdir().expect("a folder");
    let adapters = [folder("plain"), folder("low")];
    let output = place.path().join("out");
    let mut options = CombineOptions::new(&adapters, &output);
    change(&mut options);
    let error = combine(&options).expect_err("it must be refused");
    assert!(matches!(error, Error::Settings(_)), "{error}");
    assert!(!output.exists());
    error.to_string()
}

#[test]
fn options_that_do_nothing_or_are_missing_are_refused() {
    let text = options_fail(|options| {
        options.density = Some(0.5);
        options.seed = Some(1);
        options.clamp = Some(0.9);
        options.majority_sign = Some(MajoritySign::Total);
        options.svd_rank = Some(4);
        options.weights = &[1.0];
    });
    for key in [
        "density",
        "seed",
        "clamp",
        "majority_sign",
        "svd_rank",
        "weights says 1 numbers for 2",
    ] {
        assert!(text.contains(key), "{text}");
    }
    let text = options_fail(|options| options.combination = Combination::Ties);
    assert_says(&text, &["`ties`", "density"]);
    let text = options_fail(|options| {
        options.combination = Combination::TiesSvd;
        (options.density, options.svd_rank, options.clamp) = (Some(0.0), Some(0), Some(0.5));
    });
    assert_says(&text, &["density is 0", "svd_rank is 0", "clamp is 0.5"]);
    let text = options_fail(|options| options.weights = &[1.0, f64::NAN]);
    assert_says(&text, &["NaN", "not finite"]);
    for (combination, density) in [
        (Combination::Cat, None),
        (Combination::Svd, None),
        (Combination::Linear, None),
        (Combination::TiesSvd, Some(0.5)),
    ] {
        let text = options_fail(|options| {
            (options.combination, options.density) = (combination, density);
            options.weights = &[1e300, 1.0];
        });
        assert_says(&text, &["_proj: ", "too large for F32", "weights"]);
    }
    let text = options_fail(|options| {
        (options.weights, options.dtype) = (&[1e6, 1.0], FileDtype::F16);
    });
    assert_says(&text, &["too large for F16", "store f32"]);
}

/// A golden adapter in a folder of its own, changed.
fn changed(place: &TempDir, name: &str, of: &str, change: impl FnOnce(&mut LoraFile)) -> PathBuf {
    let path = place.path().join(name);
    fs::create_dir(&path).expect("a folder");
    let mut file = LoraFile::read(&folder(of)).expect("the golden");
    change(&mut file);
    file.write(&path, StoredDType::F32).expect("written");
    path
}

fn combined(adapters: &[PathBuf], combination: Combination) -> Result<LoraFile, Error> {
    let place = tempfile::tempdir().expect("a folder");
    let output = place.path().join("out");
    combine(&CombineOptions {
        combination,
        ..CombineOptions::new(adapters, &output)
    })?;
    LoraFile::read(&output)
}

#[test]
fn ranks_that_differ_need_cat_or_svd() {
    let adapters = [folder("plain"), folder("narrow"), folder("patterns")];
    let text = failure(combined(&adapters, Combination::Linear));
    assert_says(
        &text,
        &[
            "self_attn.q_proj: rank 4 in ",
            "2 in ",
            "v_proj: rank 4 in ",
            "3 in ",
            "`cat` or `svd`",
        ],
    );
    let made = combined(&adapters, Combination::Svd).expect("ranks may differ");
    let ranks = |end: &str| module(&made, end).rank();
    // Without a rank, a module has the largest of those that adapt it.
    assert_eq!(
        [ranks("q_proj"), ranks("v_proj"), ranks("o_proj")],
        [4, 4, 2]
    );
}

#[test]
fn adapters_of_different_bases_need_force() {
    let place = tempfile::tempdir().expect("a folder");
    let mark = |file: &mut LoraFile, print: &str, name: &str| {
        file.metadata
            .insert("lowrank.base_fingerprint".to_owned(), print.to_owned());
        file.config.base_model_name_or_path = Some(name.to_owned());
    };
    let one = changed(&place, "one", "plain", |file| mark(file, "x", "here"));
    let moved = changed(&place, "moved", "low", |file| mark(file, "x", "there"));
    let other = changed(&place, "other", "low", |file| mark(file, "y", "here"));
    let unknown = changed(&place, "unknown", "low", |file| {
        file.config.base_model_name_or_path = Some("elsewhere".to_owned());
    });
    let fingerprint = |file: &LoraFile| file.metadata.get("lowrank.base_fingerprint").cloned();
    let made = combined(&[one.clone(), moved], Combination::Cat).expect("one base of two names");
    assert_eq!(fingerprint(&made).as_deref(), Some("x"));
    let text = failure(combined(&[one.clone(), other.clone()], Combination::Cat));
    assert_says(&text, &["fingerprint", "x in ", "y in ", "force"]);
    let text = failure(combined(&[one.clone(), unknown], Combination::Cat));
    assert_says(
        &text,
        &["base_model_name_or_path", "here in", "elsewhere in"],
    );
    let (output, adapters) = (place.path().join("out"), [one, other]);
    let forced = CombineOptions {
        force: true,
        ..CombineOptions::new(&adapters, &output)
    };
    combine(&forced).expect("it is forced");
    assert_eq!(fingerprint(&LoraFile::read(&output).unwrap()), None);
}

/// A vector as an adapter's file holds it.
fn tensor(name: &str, values: &[f32]) -> TensorEntry {
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("one.safetensors");
    let spec = TensorSpec {
        name: name.to_owned(),
        dtype: StoredDType::F32,
        shape: vec![values.len()],
    };
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    write_safetensors(&path, &[spec], &BTreeMap::new(), |_, out| {
        out.write_all(&bytes)
    })
    .expect("written");
    let file = Checkpoint::open(&path).expect("it is read");
    file.get(name).expect("the tensor")
}

#[test]
fn what_is_saved_as_a_whole_is_one_adapter_s() {
    let place = tempfile::tempdir().expect("a folder");
    let with_head = |name: &str, of: &str, value: f32| {
        changed(&place, name, of, |file| {
            file.config.modules_to_save = vec!["lm_head".to_owned()];
            file.metadata
                .insert("lowrank.fused_parts".to_owned(), "{}".to_owned());
            file.others
                .push(tensor("base_model.model.lm_head.weight", &[value, 1.0]));
        })
    };
    let (one, same, other) = (
        with_head("one", "plain", 0.5),
        with_head("same", "low", 0.5),
        with_head("other", "low", 0.25),
    );
    for adapters in [
        [one.clone(), folder("low")],
        [folder("low"), one.clone()],
        [one.clone(), same],
    ] {
        let made = combined(&adapters, Combination::Linear).expect("one has it, or both the same");
        assert_eq!(made.config.modules_to_save, ["lm_head"]);
        assert_eq!(made.others[0].to_f32().unwrap(), [0.5, 1.0]);
        assert_eq!(made.metadata.get("lowrank.fused_parts"), None);
    }
    let text = failure(combined(&[one, other], Combination::Linear));
    assert_says(&text, &["lm_head.weight", "other values"]);
}

#[test]
fn targets_of_both_are_targets_of_the_result() {
    let made = combined(&[folder("narrow"), folder("plain")], Combination::Cat).unwrap();
    for module in &made.modules {
        assert!(made.config.matches(&module.name), "{}", module.name);
    }
    let text = made.config.target_modules.to_string();
    assert!(
        text.contains("o_proj") && !text.contains("layers"),
        "{text}"
    );
    // A regular expression and a list are named module by module.
    let place = tempfile::tempdir().expect("a folder");
    let regex = changed(&place, "regex", "plain", |_| {});
    let path = regex.join(ADAPTER_CONFIG);
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["target_modules"] = json!(".*(q_proj|v_proj|down_proj)");
    fs::write(&path, config.to_string()).unwrap();
    let made = combined(&[regex, folder("narrow")], Combination::Cat).unwrap();
    assert!(made.config.target_modules.to_string().contains("layers.0"));
    assert_eq!(made.modules.len(), 4);
}

#[test]
fn what_is_no_lora_of_linears_is_named() {
    let place = tempfile::tempdir().expect("a folder");
    let foreign = changed(&place, "foreign", "plain", |file| {
        file.others.push(tensor(
            "base_model.model.model.embed_tokens.lora_embedding_A",
            &[1.0],
        ));
    });
    let text = failure(combined(&[foreign, folder("low")], Combination::Cat));
    assert_says(
        &text,
        &["embed_tokens.lora_embedding_A", "only lora_A and lora_B"],
    );
    let narrow = changed(&place, "narrow", "plain", |file| {
        let q = file
            .modules
            .iter_mut()
            .find(|m| m.name.ends_with("q_proj"))
            .unwrap();
        q.b = lowrank::Tensor::zeros(5, q.b.cols());
    });
    let text = failure(combined(&[folder("low"), narrow], Combination::Cat));
    assert_says(
        &text,
        &["q_proj", "[12, 12] in", "[5, 12] in", "different models?"],
    );
}

#[test]
fn an_output_is_replaced_only_where_it_may_be() {
    let place = tempfile::tempdir().expect("a folder");
    let one = changed(&place, "one", "plain", |_| {});
    let output = place.path().join("out");
    let adapters = [one.clone(), folder("low")];
    let run = |output: &Path, overwrite| {
        combine(&CombineOptions {
            overwrite,
            ..CombineOptions::new(&adapters, output)
        })
        .map(|_| ())
    };
    run(&output, false).expect("it is new");
    assert_says(&failure(run(&output, false)), &["out"]);
    run(&output, true).expect("it is an adapter's folder");
    assert_says(&failure(run(&one, true)), &["is read from it"]);
    fs::write(output.join("notes.txt"), "mine").unwrap();
    assert_says(&failure(run(&output, true)), &["notes.txt"]);
}

fn pruned(
    adapter: &str,
    keep: Keep,
    dtype: FileDtype,
) -> Result<(LoraFile, lowrank::lora_files::PruneReport), Error> {
    let place = tempfile::tempdir().expect("a folder");
    let (adapter, output) = (folder(adapter), place.path().join("out"));
    let report = prune(&PruneOptions {
        adapter: &adapter,
        keep,
        output: &output,
        dtype,
        overwrite: false,
    })?;
    Ok((LoraFile::read(&output)?, report))
}

#[test]
fn pruning_makes_the_error_that_it_reports() {
    for (name, keep, dtype) in [
        ("plain", Keep::Rank(2), FileDtype::F32),
        ("rslora", Keep::Rank(3), FileDtype::F32),
        ("rslora", Keep::Rank(1), FileDtype::Bf16),
        ("patterns", Keep::Error(0.5), FileDtype::F32),
    ] {
        let before = LoraFile::read(&folder(name)).unwrap();
        let (after, report) = pruned(name, keep, dtype).expect("it is pruned");
        assert_eq!(after.config.use_rslora, before.config.use_rslora);
        assert_eq!(report.modules.len(), before.modules.len());
        assert!(report.parameters < report.parameters_before);
        for ((new, old), report) in after
            .modules
            .iter()
            .zip(&before.modules)
            .zip(&report.modules)
        {
            assert!(
                (new.scale / old.scale - 1.0).abs() < 1e-12,
                "the scale stays"
            );
            assert_eq!((report.rank_before, report.rank), (old.rank(), new.rank()));
            let off = distance(&delta(new), &delta(old));
            let said = report.relative_error.expect("a change");
            assert!(
                (off - said).abs() < 1e-6,
                "{name} {keep:?}: {off}, not {said}"
            );
            match keep {
                Keep::Rank(rank) => assert_eq!(new.rank(), rank),
                Keep::Error(error) => assert!(off <= error),
            }
        }
    }
    // No matrix of rank 2 is closer; this one would be, if singular values were dropped from the wrong end.
    let (_, report) = pruned("plain", Keep::Rank(2), FileDtype::F32).unwrap();
    assert!(report.relative_error.unwrap() < 0.75, "{report:?}");
}

#[test]
fn a_module_of_a_lower_rank_stays_as_it_is() {
    let (after, report) = pruned("patterns", Keep::Rank(3), FileDtype::F32).unwrap();
    let before = LoraFile::read(&folder("patterns")).unwrap();
    let (new, old) = (module(&after, "v_proj"), module(&before, "v_proj"));
    assert_eq!(
        (new.a.to_vec(), new.b.to_vec()),
        (old.a.to_vec(), old.b.to_vec())
    );
    let of_v = report
        .modules
        .iter()
        .find(|m| m.module.ends_with("v_proj"))
        .unwrap();
    assert_eq!(of_v.relative_error, Some(0.0));
}

#[test]
fn pruning_that_would_do_nothing_is_refused() {
    for (keep, words) in [
        (Keep::Rank(4), &["no module's rank is greater than 4"][..]),
        (Keep::Rank(0), &["rank is 0"]),
        (Keep::Error(1e-3), &["give a larger error"]),
        (Keep::Error(1.0), &["error is 1"]),
        (Keep::Error(-0.5), &["error is -0.5"]),
    ] {
        let text = failure(pruned("plain", keep, FileDtype::F32));
        assert_says(&text, words);
    }
}

/// What a model gets of a combination is the sum, with parts of fused linears and rows of tokens, too.
#[test]
fn a_model_reads_what_was_combined() {
    let place = tempfile::tempdir().expect("a folder");
    let parts = |name: &str, targets: &[&str], seed| {
        let (path, model) = (place.path().join(name), decoder("gpt2"));
        fs::create_dir(&path).expect("a folder");
        let config = lora_config(targets);
        let random = InitLoraWeights::Random;
        let (adapter, _) = lora::inject(model.config(), &config, random, seed).expect("injected");
        lora::save(
            &path,
            model.config(),
            &config,
            &adapter,
            BaseMark::default(),
        )
        .expect("saved");
        path
    };
    let gpt2 = [
        parts("parts", &["c_attn.q", "c_attn.v"], 1),
        parts("whole", &["c_attn", "c_proj"], 2),
    ];
    let llama = [
        golden("llama").join("tokens"),
        golden("llama").join("patterns"),
    ];
    for (family, adapters) in [("gpt2", gpt2), ("llama", llama)] {
        let output = place.path().join(family);
        let weights = [1.0, -0.5];
        let options = CombineOptions {
            weights: &weights,
            ..CombineOptions::new(&adapters, &output)
        };
        let report = combine(&options).expect("it can be combined");
        assert_eq!(report.taken_over.len(), usize::from(family == "llama"));
        let model = decoder(family);
        let load = |folder: &Path| {
            tuning::load(folder, model.config())
                .expect("it is loaded")
                .adapter
        };
        let (one, two, made) = (load(&adapters[0]), load(&adapters[1]), load(&output));
        let mut changed = 0;
        for id in model.config().linears() {
            let of = |adapter: &Adapter| -> Vec<f64> {
                let delta = merge::delta(&model, adapter, id).to_vec();
                delta.into_iter().map(f64::from).collect()
            };
            let sum = of(&one).into_iter().zip(of(&two));
            let sum: Vec<f64> = sum.map(|(a, b)| a - 0.5 * b).collect();
            if norm(&sum) > 0.0 {
                changed += 1;
                assert!(distance(&of(&made), &sum) < 1e-6, "{family}: {id:?}");
            } else {
                assert_eq!(norm(&of(&made)), 0.0, "{family}: {id:?}");
            }
        }
        assert_eq!(changed, report.modules.len());
        let rows = |adapter: &Adapter| adapter.token_rows.tables().count();
        assert_eq!(
            (rows(&made), rows(&one)),
            (report.taken_over.len(), report.taken_over.len())
        );
    }
}

#[test]
fn added_tokens_go_along() {
    let place = tempfile::tempdir().expect("a folder");
    let with_tokenizer = |name: &str, text: &str| {
        let path = place.path().join(name);
        fs::create_dir(&path).expect("a folder");
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(golden("llama").join("tokens").join(file), path.join(file)).expect("copied");
        }
        fs::write(path.join("tokenizer.json"), text).expect("written");
        path
    };
    let (one, same, other) = (
        with_tokenizer("one", "{}"),
        with_tokenizer("same", "{}"),
        with_tokenizer("other", "[]"),
    );
    let output = place.path().join("out");
    let run = |adapters: &[PathBuf]| {
        combine(&CombineOptions {
            overwrite: true,
            ..CombineOptions::new(adapters, &output)
        })
    };
    let tokenizer = || fs::read_to_string(output.join("tokenizer.json")).ok();
    run(&[golden("llama").join("patterns"), one.clone()]).expect("one has it");
    assert_eq!(tokenizer().as_deref(), Some("{}"));
    run(&[one.clone(), same]).expect("both have the same");
    assert_eq!(tokenizer().as_deref(), Some("{}"));
    let text = failure(run(&[one.clone(), other]));
    assert_says(&text, &["tokenizer.json", "not the same"]);
    let small = place.path().join("small");
    prune(&PruneOptions {
        adapter: &one,
        keep: Keep::Rank(1),
        output: &small,
        dtype: FileDtype::F32,
        overwrite: false,
    })
    .expect("it is pruned");
    assert!(small.join("tokenizer.json").exists());
    let (before, after) = (
        LoraFile::read(&one).unwrap(),
        LoraFile::read(&small).unwrap(),
    );
    assert_eq!(
        after.config.trainable_token_indices,
        before.config.trainable_token_indices
    );
    assert_eq!(after.others.len(), before.others.len());
}
