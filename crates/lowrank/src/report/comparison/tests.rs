use indexmap::IndexMap;
use serde_json::json;

use super::*;
use crate::compare::{BaseResult, Cost, SeedResult, Spread};
use crate::report::page::assert_stands_alone;
use crate::tuning::Method;

const METRICS: [&str; 5] = ["bleu", "nist", "meteor", "rouge-l", "cider"];

/// A method with three seeds and everything measured; `quality` in 0..1 is how good it is.
fn result(name: &str, method: Method, trainable: u64, quality: f64) -> MethodResult {
    let spread = |mean: f64, deviation: f64| Spread {
        mean,
        deviation: Some(deviation),
        seeds: 3,
    };
    let loss = 1.62 - 0.45 * quality;
    let scores = [
        40.0 + 27.0 * quality,
        5.2 + 3.5 * quality,
        0.31 + 0.15 * quality,
        0.5 + 0.2 * quality,
        1.1 + 1.4 * quality,
    ];
    let run = |seed: u64| SeedResult {
        seed,
        loss: loss + 0.004 * (seed as f64 - 2.0),
        metrics: IndexMap::new(),
        training: Vec::new(),
        validation: (0..=20)
            .map(|point| {
                let progress = 1.0 - (-0.35 * f64::from(point) * (0.5 + quality)).exp();
                let ripple = 0.006 * (f64::from(point) * 1.3 + seed as f64 + loss * 9.0).sin();
                let value = 3.105 - (3.105 - loss) * progress;
                (
                    u64::from(point as u16) * 50,
                    value + if point > 0 { ripple } else { 0.0 },
                )
            })
            .collect(),
        seconds: 724.0,
    };
    MethodResult {
        name: name.to_owned(),
        method,
        options: match method {
            Method::Lora => vec![
                ("r", json!(4)),
                ("target_modules", json!(["q_proj", "v_proj"])),
            ],
            Method::Top => vec![("top_layers", json!(2))],
            Method::Adapter => vec![("bottleneck", json!(32))],
            _ => Vec::new(),
        }
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect(),
        trainable_parameters: trainable,
        checkpoint_bytes: Some(trainable * 4 + 1024),
        learning_rate: Some(2e-4),
        sweep: vec![
            (1e-4, Some(loss + 0.05)),
            (2e-4, Some(loss + 0.01)),
            (5e-4, Some(loss + 0.02)),
            (2e-3, None),
        ],
        runs: (1..=3).map(run).collect(),
        missing_runs: 0,
        loss: Some(spread(loss, 0.004 + 0.006 * (1.0 - quality))),
        scores: METRICS
            .iter()
            .zip(scores)
            .map(|(name, score)| ((*name).to_owned(), spread(score, 0.008 * score)))
            .collect(),
        cost: Some(Cost {
            tokens_per_second: 640.0 + 500.0 * (1.0 - trainable as f64 / 1.4e8),
            peak_memory: 800_000_000 + trainable * 16,
            milliseconds_per_token: 23.1 * (1.0 + 0.04 * quality),
            base_milliseconds_per_token: 23.1,
            mergeable: method != Method::Adapter && method != Method::Prefix,
            positions_taken: if method == Method::Prefix { 5 } else { 0 },
            switch_bytes: trainable * 4,
            switch_milliseconds: 0.2 + trainable as f64 / 4e5,
        }),
    }
}

/// A LoRA with everything measured.
pub(super) fn method(name: &str, trainable: u64) -> MethodResult {
    result(name, Method::Lora, trainable, 0.9)
}

fn comparison(methods: Vec<MethodResult>) -> Comparison {
    Comparison {
        title: "E2E on SmolLM2-135M".to_owned(),
        model: "SmolLM2-135M-Instruct".to_owned(),
        base_parameters: 134_515_008,
        held_out: "740 rows of data/e2e/test.jsonl".to_owned(),
        decoding: "beam search with 4 beams, length penalty 0.9".to_owned(),
        machine: "2 cores of an x86-64 server with AVX2, 8 GiB".to_owned(),
        metrics: METRICS.map(str::to_owned).to_vec(),
        unit: Unit::Token,
        base: BaseResult {
            loss: Some(3.105),
            metrics: METRICS
                .iter()
                .zip([4.21, 0.873, 0.181, 0.243, 0.054])
                .map(|(name, score)| ((*name).to_owned(), score))
                .collect(),
            milliseconds_per_token: Some(23.12),
        },
        methods,
    }
}

/// Nine methods as a paper would compare them.
fn nine() -> Comparison {
    let mut methods = vec![
        result("Full fine-tuning", Method::Full, 134_515_008, 0.93),
        result("Top 2 blocks", Method::Top, 7_081_344, 0.55),
        result("BitFit", Method::Bitfit, 138_240, 0.3),
        result("Adapter H", Method::Adapter, 2_267_520, 0.86),
        result("Adapter L", Method::Adapter, 1_133_760, 0.84),
        result("Prefix tuning", Method::Prefix, 115_200, 0.2),
        result("Prefix embeddings", Method::Prefix, 2_880, 0.05),
        result("LoRA q,v", Method::Lora, 460_800, 0.97),
        result("LoRA all linears", Method::Lora, 4_884_480, 1.0),
    ];
    methods[6].missing_runs = 1;
    methods[6].runs.pop();
    if let Some(cost) = &mut methods[7].cost {
        cost.milliseconds_per_token = 23.0;
    }
    methods[5].sweep = vec![(1e-2, Some(1.6)), (2e-2, Some(1.55))];
    methods[5].learning_rate = Some(2e-2);
    comparison(methods)
}

/// The text of a table's cells, row by row, tags left out.
fn rows(page: &str) -> Vec<Vec<String>> {
    let tags = regex::Regex::new("<[^>]*>").unwrap();
    let body = page.split("<tbody>").nth(1).unwrap();
    let body = body.split("</tbody>").next().unwrap();
    body.split("</tr>")
        .filter(|row| row.contains("<t"))
        .map(|row| {
            let row = row.replace("<small", " <small");
            let cells = row.split("</td>").flat_map(|cell| cell.split("</th>"));
            cells
                .map(|cell| tags.replace_all(cell, "").trim().to_owned())
                .filter(|cell| !cell.is_empty())
                .collect()
        })
        .collect()
}

#[test]
fn the_page_stands_alone() {
    let page = html(&nine());
    assert_stands_alone(&page);
    assert_eq!(page.matches("<figure").count(), 7 + 3);
    assert!(page.contains(
        "9 methods on SmolLM2-135M-Instruct (134,515,008 parameters), measured on 740 rows of data/e2e/test.jsonl; \
         the lowest held-out loss is 1.170, with LoRA all linears, against 3.105 before training."
    ));
    let rows = rows(&page);
    assert_eq!(rows.len(), 10);
    assert_eq!(
        rows[0],
        [
            "Base model",
            "–",
            "–",
            "–",
            "3.105",
            "4.21",
            "0.873",
            "0.1810",
            "0.2430",
            "0.054",
            "–",
            "–",
            "– 23.12 ms",
            "–",
            "–"
        ]
    );
    assert_eq!(
        rows[8],
        [
            "LoRA q,v",
            "460,800 0.34 %",
            "1.8 MiB",
            "2e-4",
            "1.183 ± 0.004 (3)",
            "66.19 ± 0.53 (3)",
            "8.595 ± 0.069 (3)",
            "0.4555 ± 0.0036 (3)",
            "0.6940 ± 0.0056 (3)",
            "2.458 ± 0.020 (3)",
            "1,138",
            "770.0 MiB",
            "−0.4 % merged: none",
            "0",
            "1.8 MiB 1.35 ms"
        ]
    );
    // Loss and five metrics in the table, a learning rate of each method below.
    assert_eq!(page.matches("<td class=\"best\">").count(), 6 + 9);
    assert!(rows[9][4].starts_with("1.170") && page.contains("<strong>1.170</strong>"));
    assert!(page.contains("2 of 3 runs finished") && page.contains("1 run is not finished"));
    assert!(page.contains("diverged"));
    // Where curves are cut there is no whole step, but none is shown as a fraction.
    assert!(page.contains("start cut off") && page.contains("<title>step 1000: Full fine-tuning "));
    assert!(!regex::Regex::new(r"step \d+\.").unwrap().is_match(&page));
    assert!(page.contains("<code>target_modules: q_proj, v_proj</code>"));
    // For looking at it: LOWRANK_REPORT_OUT=FOLDER cargo test -p lowrank report::comparison
    if let Some(folder) = std::env::var_os("LOWRANK_REPORT_OUT") {
        let folder = std::path::Path::new(&folder);
        std::fs::write(folder.join("comparison.html"), page).unwrap();
        let twelve = html(&comparison(twelve()));
        std::fs::write(folder.join("twelve.html"), twelve).unwrap();
    }
}

/// Twelve methods, nearly equal, with odd and with long names.
fn twelve() -> Vec<MethodResult> {
    (0..12u32)
        .map(|index| {
            let name = match index {
                3 => "a <b> & \"c\", d".to_owned(),
                7 => "LoRA on every linear of the upper half, rank 16".to_owned(),
                _ => format!("LoRA r={}", 1 << index),
            };
            let mut one = method(&name, 60_000 + 15_000 * u64::from(index));
            one.loss = Some(Spread {
                mean: 1.2 + 0.0004 * f64::from(index),
                deviation: Some(0.001),
                seeds: 3,
            });
            one
        })
        .collect()
}

#[test]
fn twelve_methods_with_odd_names() {
    let page = html(&comparison(twelve()));
    assert_stands_alone(&page);
    assert_eq!(rows(&page).len(), 13);
    assert!(page.contains("a &lt;b&gt; &amp; &quot;c&quot;, d") && !page.contains("a <b>"));
    // The last method's colour is the second's, with another kind of dash.
    assert!(page.contains("class=\"k1 d1\"") && page.contains("class=\"k1 d2\""));
    // Only losses differ, and two of them look the same.
    assert_eq!(page.matches("<td class=\"best\"><strong>1.200").count(), 2);
    assert!(!page.contains("<strong>64.30"));
    let csv = csv(&comparison(twelve()));
    assert!(csv.contains("\r\n\"a <b> & \"\"c\"\", d\",lora,105000,"));
}

#[test]
fn what_is_missing_is_a_dash_and_never_a_number() {
    let mut bare = method("bare", 0);
    bare.checkpoint_bytes = None;
    bare.learning_rate = None;
    bare.sweep = Vec::new();
    bare.runs = Vec::new();
    bare.missing_runs = 2;
    bare.loss = None;
    bare.scores = IndexMap::new();
    bare.cost = None;
    bare.options = serde_json::Map::new();
    let mut all = comparison(vec![bare]);
    all.base = BaseResult::default();
    all.base_parameters = 0;
    let page = html(&all);
    assert_stands_alone(&page);
    assert!(!page.contains("<svg") && !page.contains("Learning rates tried"));
    assert!(page.contains("were not measured") && page.contains("2 runs are not finished"));
    let rows = rows(&page);
    assert_eq!(rows[0], [&["Base model"][..], &[NONE; 14]].concat());
    let method = [&["bare no run is finished", "0"][..], &[NONE; 13]].concat();
    assert_eq!(rows[1], method);
    let text = csv(&all);
    let last = text.lines().last().unwrap();
    assert_eq!(last, format!("bare,lora,0,,,,0,2{}", ",".repeat(18 + 9)));
}

#[test]
fn numbers_that_are_none_are_not_shown() {
    let mut bad = method("bad", 460_800);
    let none = Spread {
        mean: f64::NAN,
        deviation: Some(f64::INFINITY),
        seeds: 3,
    };
    bad.loss = Some(none);
    bad.scores.insert("bleu".to_owned(), none);
    bad.learning_rate = Some(f64::NAN);
    bad.sweep = vec![(f64::NAN, Some(1.0)), (1e-3, Some(f64::INFINITY))];
    for run in &mut bad.runs {
        run.loss = f64::NAN;
        run.seconds = f64::NAN;
        run.validation[3].1 = f64::NAN;
    }
    if let Some(cost) = &mut bad.cost {
        cost.tokens_per_second = f64::NAN;
        cost.base_milliseconds_per_token = 0.0;
        cost.switch_milliseconds = f64::INFINITY;
    }
    let mut all = comparison(vec![bad, method("good", 1000)]);
    all.base.loss = Some(f64::NAN);
    let page = html(&all);
    assert_stands_alone(&page);
    let rows = rows(&page);
    assert_eq!(
        (&rows[0][4][..], &rows[1][4][..], &rows[1][5][..]),
        (NONE, NONE, NONE)
    );
    assert_eq!(rows[1][12], "– merged: none");
    assert!(page.contains("the lowest held-out loss is 1.215, with good."));
    let text = csv(&all);
    assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
}

#[test]
fn one_method_with_one_seed() {
    let mut one = method("LoRA", 460_800);
    one.runs.truncate(1);
    one.loss = Some(Spread {
        mean: 1.2,
        deviation: None,
        seeds: 1,
    });
    let mut all = comparison(vec![one]);
    all.metrics = Vec::new();
    let page = html(&all);
    assert_stands_alone(&page);
    assert!(page.contains("1 method on") && page.contains("seed 1; 12 min 4 s<"));
    assert_eq!(rows(&page)[1][4], "1.200 (1)");
    assert_eq!(page.matches("<figure").count(), 2 + 3);
}

#[test]
fn nothing_at_all_is_a_page() {
    let mut all = comparison(Vec::new());
    all.title = String::new();
    let page = html(&all);
    assert_stands_alone(&page);
    assert_eq!(rows(&page).len(), 1);
    assert_eq!(csv(&all).lines().count(), 2);
}

#[test]
fn csv_has_a_row_a_method_in_full_precision() {
    let mut one = method("LoRA, \"q\"\nand v", 460_800);
    one.loss = Some(Spread {
        mean: 1.203_456_789_012_345_5,
        deviation: None,
        seeds: 1,
    });
    one.scores.clear();
    one.scores.insert(
        "ROUGE-L".to_owned(),
        Spread {
            mean: 0.7,
            deviation: Some(1e-7),
            seeds: 2,
        },
    );
    one.missing_runs = 1;
    one.cost = one.cost.map(|cost| Cost {
        tokens_per_second: 1000.5,
        milliseconds_per_token: 30.0,
        base_milliseconds_per_token: 24.0,
        switch_milliseconds: 1.25,
        ..cost
    });
    let mut all = comparison(vec![one]);
    all.metrics = vec!["ROUGE-L".to_owned()];
    all.base.metrics = [("ROUGE-L".to_owned(), 0.25)].into_iter().collect();
    all.base_parameters = 46_080_000;
    assert_eq!(
        csv(&all),
        "method,kind,trainable_parameters,trainable_percent,checkpoint_bytes,learning_rate,runs,missing_runs,\
         loss_mean,loss_deviation,loss_seeds,rouge_l_mean,rouge_l_deviation,rouge_l_seeds,\
         tokens_per_second,peak_memory_bytes,milliseconds_per_token,base_milliseconds_per_token,\
         added_latency_percent,mergeable,positions_taken,switch_bytes,switch_milliseconds\r\n\
         base model,base,,,,,,,3.105,,,0.25,,,,,23.12,,,,,,\r\n\
         \"LoRA, \"\"q\"\"\nand v\",lora,460800,1,1844224,0.0002,3,1,\
         1.2034567890123455,,1,0.7,0.0000001,2,\
         1000.5,807372800,30,24,25,true,0,1843200,1.25\r\n"
    );
}
