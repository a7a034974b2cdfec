//! What generation rounds beside weights in blocks, and what that does to the model.

use std::env;

use lowrank::base::Source;
use lowrank::bench::write_random_gguf;
use lowrank::model::{AdapterSet, Batch, Decoder, KvCache};
use lowrank::{DType, Workspace};
use lowrank_kernels::{ComputeDType, Segment};

use super::common::{difference, ids, logits};
use super::gguf::{network, small};

/// Logits of every token of a sequence that a cache takes up in pieces of these lengths, as rows of a prompt or as generated ones.
fn cached(model: &Decoder, ids: &[u32], pieces: &[usize], generated: bool) -> Vec<f32> {
    let ws = Workspace::new();
    let mut cache = KvCache::new(model.config(), KvCache::blocks_for(ids.len()));
    let place = cache.take(ids.len()).unwrap();
    let (mut all, mut first) = (Vec::new(), 0);
    for piece in pieces {
        let rows = first..first + piece;
        let mut batch = Batch {
            ids: ids[rows.clone()].to_vec(),
            positions: rows.clone().map(|at| at as u32).collect(),
            generated: if generated { *piece } else { 0 },
            ..Batch::default()
        };
        batch.appends.extend(place.appends(0, rows.clone()));
        // A generated row is the only one of its segment.
        let queries = if generated { 1 } else { *piece };
        for start in (0..*piece).step_by(queries) {
            batch.segments.push(Segment {
                queries: start..start + queries,
                keys: place.places(0..first + start + queries).collect(),
                causal: true,
            });
        }
        let wanted: Vec<u32> = (0..*piece as u32).collect();
        let found = model.logits(&batch, AdapterSet::none(), &wanted, Some(&mut cache), &ws);
        all.extend(found.to_vec());
        first += piece;
    }
    assert_eq!(first, ids.len());
    all
}

#[test]
fn generation_rounds_unless_it_is_to_be_exact() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("model.gguf");
    let ids = ids(40, 3);
    for kind in ["Q4_K", "Q8_0", "Q4_1", "BF16"] {
        write_random_gguf(&path, &small(), &|_, _| kind).unwrap();
        let model = network(&path, DType::Bf16).unwrap().decoder;
        let expected = logits(&model, None, &ids);
        let off = |generated| difference(&cached(&model, &ids, &[40], generated), &expected);
        let (prompt, generated) = (off(false), off(true));
        model.set_exact(true);
        let exact = off(false).max(off(true));
        assert!(exact < 1e-5, "{kind}: {exact:e}");
        if kind == "BF16" {
            assert!(prompt.max(generated) < 1e-5, "{prompt:e} {generated:e}");
            continue;
        }
        assert!(
            1e-5 < generated && generated < 0.05,
            "{kind}: {generated:e}"
        );
        assert_eq!(
            prompt > 1e-5,
            ComputeDType::Bf16.here() == ComputeDType::Bf16,
            "{kind}: {prompt:e}"
        );
        assert!(prompt < 0.05, "{kind}: {prompt:e}");
    }
}

#[test]
fn rounded_rows_have_the_bits_that_they_have_alone() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("model.gguf");
    let ids = ids(40, 3);
    for kind in ["Q4_K", "Q8_0", "Q4_1"] {
        write_random_gguf(&path, &small(), &|_, _| kind).unwrap();
        let model = network(&path, DType::Bf16).unwrap().decoder;
        for generated in [false, true] {
            let whole = cached(&model, &ids, &[40], generated);
            for pieces in [&[1, 39][..], &[17, 5, 18], &[1; 40]] {
                let found = cached(&model, &ids, pieces, generated);
                assert!(found == whole, "{kind}, {generated}, {pieces:?}");
            }
        }
    }
}

/// The mean loss in nats of the tokens behind the first of each sequence.
fn loss(sequences: &[Vec<u32>], logits: impl Fn(&[u32]) -> Vec<f32>) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for ids in sequences {
        let all = logits(ids);
        for (row, next) in all.chunks_exact(all.len() / ids.len()).zip(&ids[1..]) {
            let most = row.iter().copied().fold(f32::MIN, f32::max);
            let total: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
            sum += total.ln() - f64::from(row[*next as usize] - most);
            count += 1;
        }
    }
    sum / f64::from(count)
}

/// The perplexity of a model on a text: with what is rounded to 8 bits and in prompts, within a thousandth of the exact one.
#[test]
fn rounding_leaves_the_perplexity_of_a_real_model() {
    let (Some(gguf), Some(text)) = (
        env::var_os("LOWRANK_TEST_GGUF"),
        env::var_os("LOWRANK_TEST_TEXT"),
    ) else {
        eprintln!(
            "skipped: set LOWRANK_TEST_GGUF to a quantized GGUF file and LOWRANK_TEST_TEXT to a text file"
        );
        return;
    };
    let source = Source::find(gguf.to_str().unwrap()).unwrap();
    let base = source.load(DType::Bf16).unwrap();
    let text = std::fs::read_to_string(text).unwrap();
    let ids = base.tokenizer.encode(&text, false).unwrap();
    let sequences: Vec<Vec<u32>> = ids
        .chunks_exact(256)
        .take(40)
        .map(<[u32]>::to_vec)
        .collect();
    let model = &base.decoder;
    let of = |generated| loss(&sequences, |ids| cached(model, ids, &[256], generated));
    let (prompt, generated) = (of(false).exp(), of(true).exp());
    model.set_exact(true);
    let exact = of(true).exp();
    eprintln!(
        "{} tokens: perplexity {exact:.4} exact, {generated:.4} generated ({:+.4} %), {prompt:.4} as prompts ({:+.4} %)",
        256 * sequences.len(),
        100.0 * (generated / exact - 1.0),
        100.0 * (prompt / exact - 1.0)
    );
    for found in [prompt, generated] {
        assert!((found / exact - 1.0).abs() < 1e-3, "{found} {exact}");
    }
}
