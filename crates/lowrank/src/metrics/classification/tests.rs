//! Figures beside those of scikit-learn, scipy and seqeval, and how they look.

use serde::Deserialize;
use serde_json::Value;

use super::*;

/// What `scripts/goldens_classification.py` writes: cases, and the figures of the reference tools.
#[derive(Deserialize)]
struct Goldens {
    single_label: Vec<SingleCase>,
    multi_label: Vec<MultiCase>,
    regression: Vec<NumbersCase>,
    tags: Vec<TagsCase>,
}

#[derive(Deserialize)]
struct SingleCase {
    name: String,
    labels: usize,
    gold: Vec<u32>,
    probabilities: Vec<Vec<f32>>,
    accuracy: f64,
    f1_binary: Option<f64>,
    f1_macro: f64,
    f1_micro: f64,
    f1_weighted: f64,
    matthews: f64,
    expected_calibration_error: f64,
    scores: Vec<(f64, f64, f64, u64)>,
    confusion: Vec<Vec<u64>>,
}

#[derive(Deserialize)]
struct MultiCase {
    name: String,
    gold: Vec<Vec<u8>>,
    probabilities: Vec<Vec<f32>>,
    exact_match: f64,
    f1_macro: f64,
    f1_micro: f64,
    f1_weighted: f64,
    scores: Vec<(f64, f64, f64, u64)>,
}

#[derive(Deserialize)]
struct NumbersCase {
    name: String,
    gold: Vec<Vec<f32>>,
    predicted: Vec<Vec<f32>>,
    pearson: Vec<Option<f64>>,
    spearman: Vec<Option<f64>>,
    mean_squared_error: Vec<f64>,
    mean_absolute_error: Vec<f64>,
}

#[derive(Deserialize)]
struct TagsCase {
    name: String,
    gold: Vec<String>,
    predicted: Vec<String>,
    accuracy: f64,
    micro: [f64; 3],
    #[serde(rename = "macro")]
    mean: [Option<f64>; 3],
    types: Vec<(String, f64, f64, f64, u64)>,
}

fn goldens() -> Goldens {
    serde_json::from_str(include_str!("../../../tests/goldens/classification.json")).unwrap()
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|label| format!("label {label}")).collect()
}

/// Holds figures to their goldens: to 1e-6, of their size where they are large.
fn check(case: &str, figures: &[(&str, Option<f64>)], goldens: &[Option<f64>]) {
    assert_eq!(figures.len(), goldens.len(), "{case}");
    for (&(name, ours), &golden) in figures.iter().zip(goldens) {
        let equal = match (ours, golden) {
            (Some(ours), Some(golden)) => (ours - golden).abs() <= 1e-6 * golden.abs().max(1.0),
            (ours, golden) => ours == golden,
        };
        assert!(equal, "{case}, {name}: {ours:?}, golden {golden:?}");
    }
}

fn check_scores(case: &str, ours: &[LabelScores], goldens: &[(f64, f64, f64, u64)]) {
    assert_eq!(ours.len(), goldens.len(), "{case}");
    for (ours, &(precision, recall, f1, support)) in ours.iter().zip(goldens) {
        let figures = [
            ("precision", Some(ours.precision)),
            ("recall", Some(ours.recall)),
            ("F1", Some(ours.f1)),
        ];
        let case = format!("{case}, {}", ours.label);
        check(&case, &figures, &[precision, recall, f1].map(Some));
        assert_eq!(ours.support, support, "{case}");
    }
}

/// Figures by their names are those of the JSON.
fn check_json(metrics: &impl Serialize, figures: &[(&str, Option<f64>)]) {
    let json = serde_json::to_value(metrics).unwrap();
    for (name, value) in figures {
        assert_eq!(json[name].as_f64(), *value, "{name}");
    }
}

#[test]
fn single_labels_are_scored_as_by_scikit_learn() {
    let cases = goldens().single_label;
    assert!(cases.len() >= 18);
    for case in cases {
        let mut all = SingleLabel::new(names(case.labels));
        all.add(&case.gold, &case.probabilities.concat()).unwrap();
        let metrics = all.metrics().unwrap();
        let mut wanted = vec![
            case.accuracy,
            case.f1_macro,
            case.f1_micro,
            case.f1_weighted,
            case.matthews,
            case.expected_calibration_error,
        ];
        if let Some(f1) = case.f1_binary {
            wanted.insert(1, f1);
        }
        let wanted: Vec<_> = wanted.into_iter().map(Some).collect();
        let figures = metrics.figures();
        check(&case.name, &figures, &wanted);
        check_json(&metrics, &figures);
        check_scores(&case.name, &metrics.labels, &case.scores);
        for (gold, line) in (0..).zip(&case.confusion) {
            for (predicted, &count) in (0..).zip(line) {
                assert_eq!(
                    metrics.confusion.count(gold, predicted),
                    count,
                    "{}",
                    case.name
                );
            }
        }
        let mut batches = SingleLabel::new(names(case.labels));
        let rows = case.probabilities.chunks(3);
        for (gold, probabilities) in case.gold.chunks(3).zip(rows) {
            batches.add(gold, &probabilities.concat()).unwrap();
        }
        assert_eq!(batches.metrics().unwrap(), metrics, "{}", case.name);
    }
}

#[test]
fn several_labels_are_scored_as_by_scikit_learn() {
    let cases = goldens().multi_label;
    assert!(cases.len() >= 8);
    for case in cases {
        let gold: Vec<Vec<bool>> = case
            .gold
            .iter()
            .map(|row| row.iter().map(|&label| label == 1).collect())
            .collect();
        let mut batches = MultiLabel::new(names(gold[0].len()));
        for (gold, probabilities) in gold.chunks(7).zip(case.probabilities.chunks(7)) {
            batches
                .add(&gold.concat(), &probabilities.concat())
                .unwrap();
        }
        let metrics = batches.metrics().unwrap();
        let wanted = [
            case.exact_match,
            case.f1_macro,
            case.f1_micro,
            case.f1_weighted,
        ];
        let figures = metrics.figures();
        check(&case.name, &figures, &wanted.map(Some));
        check_json(&metrics, &figures);
        check_scores(&case.name, &metrics.labels, &case.scores);
    }
}

#[test]
fn numbers_are_scored_as_by_scipy_and_scikit_learn() {
    let cases = goldens().regression;
    assert!(cases.len() >= 13);
    for case in cases {
        let mut batches = Regression::new(names(case.gold[0].len()));
        for (gold, predicted) in case.gold.chunks(7).zip(case.predicted.chunks(7)) {
            batches.add(&gold.concat(), &predicted.concat()).unwrap();
        }
        let metrics = batches.metrics().unwrap();
        for (index, output) in metrics.outputs.iter().enumerate() {
            check(
                &format!("{}, {}", case.name, output.output),
                &[
                    ("Pearson", output.pearson),
                    ("Spearman", output.spearman),
                    ("squared", Some(output.mean_squared_error)),
                    ("absolute", Some(output.mean_absolute_error)),
                ],
                &[
                    case.pearson[index],
                    case.spearman[index],
                    Some(case.mean_squared_error[index]),
                    Some(case.mean_absolute_error[index]),
                ],
            );
            assert_eq!(
                output.pearson.is_none(),
                output.undefined_because.is_some(),
                "{}",
                case.name
            );
        }
        let of_all = |values: &[Option<f64>]| {
            let values: Option<Vec<f64>> = values.iter().copied().collect();
            values.map(|values| values.iter().sum::<f64>() / values.len() as f64)
        };
        let some = |values: &[f64]| of_all(&values.iter().copied().map(Some).collect::<Vec<_>>());
        let figures = metrics.figures();
        check(
            &case.name,
            &figures,
            &[
                of_all(&case.pearson),
                of_all(&case.spearman),
                some(&case.mean_squared_error),
                some(&case.mean_absolute_error),
            ],
        );
        check_json(&metrics, &figures);
    }
}

#[test]
fn tags_are_scored_as_by_seqeval() {
    let cases = goldens().tags;
    assert!(cases.len() >= 16);
    for case in cases {
        let mut rows = Tags::new();
        for (gold, predicted) in case.gold.iter().zip(&case.predicted) {
            let words = |row: &str| {
                row.split_whitespace()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            rows.add(&words(gold), &words(predicted)).unwrap();
        }
        let metrics = rows.metrics().unwrap();
        let mut wanted = vec![Some(case.accuracy)];
        wanted.extend(case.micro.map(Some));
        wanted.extend(case.mean);
        let figures = metrics.figures();
        check(&case.name, &figures, &wanted);
        check_json(&metrics, &figures);
        let types: Vec<&str> = metrics.types.iter().map(|t| t.label.as_str()).collect();
        let golden: Vec<&str> = case.types.iter().map(|t| t.0.as_str()).collect();
        assert_eq!(types, golden, "{}", case.name);
        let scores: Vec<_> = case.types.iter().map(|t| (t.1, t.2, t.3, t.4)).collect();
        check_scores(&case.name, &metrics.types, &scores);
    }
}

#[test]
fn what_cannot_be_scored_says_where_and_is_not_counted() {
    let mut single = SingleLabel::new(vec!["ham".into(), "spam".into()]);
    assert_eq!(single.metrics(), Err(ClassificationError::Empty));
    single.add(&[0, 1], &[0.9, 0.1, 0.2, 0.8]).unwrap();
    let before = single.metrics().unwrap();
    for (gold, probabilities, expected) in [
        (
            &[1, 2][..],
            &[0.5, 0.5, 0.5, 0.5][..],
            "row 4: gold label 2 is not in the label map, which has labels 0 to 1",
        ),
        (
            &[1],
            &[0.5],
            "a batch has 1 probabilities, but its 1 rows need 2",
        ),
        (
            &[1],
            &[0.1, f32::NAN],
            "row 3: the probability of label \"spam\" is NaN",
        ),
        (
            &[1],
            &[-0.1, 1.1],
            "row 3: the probability of label \"ham\" is -0.1",
        ),
        (
            &[1],
            &[0.7, 0.7],
            "row 3: the probabilities of its labels add up to 1.4000, and must",
        ),
    ] {
        let error = single.add(gold, probabilities).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    assert_eq!(single.metrics().unwrap(), before);

    let mut several = MultiLabel::new(vec!["a".into(), "b".into()]);
    assert_eq!(several.metrics(), Err(ClassificationError::Empty));
    for (gold, probabilities, expected) in [
        (
            &[true; 3][..],
            &[0.5; 3][..],
            "a batch has 3 gold values, but its 2 rows need 4",
        ),
        (
            &[true; 4],
            &[0.5; 2],
            "a batch has 2 probabilities, but its 2 rows need 4",
        ),
        (
            &[true; 4],
            &[0.5, 0.5, 0.5, f32::INFINITY],
            "row 2: the probability of label \"b\" is inf",
        ),
    ] {
        let error = several.add(gold, probabilities).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    assert_eq!(several.metrics(), Err(ClassificationError::Empty));

    let mut numbers = Regression::new(vec!["score".into()]);
    numbers.add(&[1.0], &[2.0]).unwrap();
    for (gold, predicted, expected) in [
        (
            [1.0, f32::NAN],
            [0.0, 0.0],
            "row 3: the gold value of output \"score\" is NaN, and must be finite",
        ),
        (
            [1.0, 2.0],
            [f32::INFINITY, 0.0],
            "row 2: the predicted value of output \"score\" is inf",
        ),
    ] {
        let error = numbers.add(&gold, &predicted).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    assert_eq!(numbers.metrics().unwrap().rows, 1);

    let mut tags = Tags::new();
    tags.add::<&str>(&[], &[]).unwrap();
    assert_eq!(tags.metrics(), Err(ClassificationError::Empty));
    let error = tags.add(&["O", "O"], &["O"]).unwrap_err().to_string();
    assert_eq!(
        error,
        "row 2: 2 gold tags but 1 predicted ones; each token needs both"
    );
}

#[test]
fn json_names_what_is_counted() {
    let mut rows = SingleLabel::new(vec!["ham".into(), "spam".into()]);
    rows.add(&[0, 0, 1], &[0.75, 0.25, 0.25, 0.75, 0.0, 1.0])
        .unwrap();
    let json = serde_json::to_value(rows.metrics().unwrap()).unwrap();
    assert_eq!(
        json["confusion"],
        serde_json::json!({"ham": {"ham": 1, "spam": 1}, "spam": {"spam": 1}})
    );
    assert_eq!(json["labels"][1]["label"], "spam");
    assert_eq!(json["labels"][1]["support"], 1);

    let mut numbers = Regression::new(vec!["score".into()]);
    numbers.add(&[1.0, 2.0], &[0.5, 0.5]).unwrap();
    let json = serde_json::to_value(numbers.metrics().unwrap()).unwrap();
    assert_eq!(json["pearson"], Value::Null);
    assert_eq!(
        json["outputs"][0]["undefined_because"],
        "every prediction is 0.5"
    );
}

#[test]
fn figures_are_a_short_table() {
    let mut rows = SingleLabel::new(vec!["negative".into(), "positive".into()]);
    let probabilities = [0.9, 0.1, 0.6, 0.4, 0.2, 0.8, 0.7, 0.3, 0.1, 0.9];
    rows.add(&[0, 0, 1, 1, 1], &probabilities).unwrap();
    insta::assert_snapshot!(rows.metrics().unwrap(), @r"
    rows               5
    accuracy           0.8000
    F1 (label 1)       0.8000
    F1 (macro)         0.8000
    F1 (micro)         0.8000
    F1 (weighted)      0.8000
    Matthews           0.6667
    calibration error  0.3000

    label     precision  recall      F1  gold
    negative     0.6667  1.0000  0.8000     2
    positive     1.0000  0.6667  0.8000     3
    ");

    let mut rows = MultiLabel::new(vec!["joy".into(), "anger".into()]);
    rows.add(&[false, true, true, true], &[0.9, 0.1, 0.6, 0.8])
        .unwrap();
    insta::assert_snapshot!(rows.metrics().unwrap(), @r"
    rows           2
    exact match    0.5000
    F1 (macro)     0.6667
    F1 (micro)     0.6667
    F1 (weighted)  0.6667

    label  precision  recall      F1  gold
    joy       0.5000  1.0000  0.6667     1
    anger     1.0000  0.5000  0.6667     2
    ");

    let mut rows = Regression::new(vec!["valence".into(), "arousal".into()]);
    rows.add(&[0., 1., 3., 2., 4., 3.], &[0.9, 0.5, 0.6, 0.5, 2., 0.5])
        .unwrap();
    insta::assert_snapshot!(rows.metrics().unwrap(), @r"
    rows                 3
    Pearson              undefined
    Spearman             undefined
    mean squared error   3.22
    mean absolute error  1.633

    output     Pearson   Spearman  squared error  absolute error
    valence     0.5322     0.5000          3.523           1.767
    arousal  undefined  undefined          2.917             1.5
    The correlations of arousal are undefined: every prediction is 0.5.
    ");

    let mut rows = Tags::new();
    rows.add(&["O", "O"], &["O", "O"]).unwrap();
    let nothing = rows.metrics().unwrap().to_string();
    assert!(
        nothing.contains("F1 (macro)         undefined\n"),
        "{nothing}"
    );
    assert!(
        nothing.ends_with("There are no entities, neither gold nor predicted.\n"),
        "{nothing}"
    );
    rows.add(&["O", "B-PER"], &["O", "O"]).unwrap();
    rows.add(&["O", "B-LOC"], &["O", "I-LOC"]).unwrap();
    insta::assert_snapshot!(rows.metrics().unwrap(), @r"
    tokens             6
    accuracy           0.6667
    precision (micro)  1.0000
    recall (micro)     0.5000
    F1 (micro)         0.6667
    precision (macro)  0.5000
    recall (macro)     0.5000
    F1 (macro)         0.5000

    type  precision  recall      F1  gold
    LOC      1.0000  1.0000  1.0000     1
    PER      0.0000  0.0000  0.0000     1
    ");
}
