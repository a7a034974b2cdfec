//! Rows with labels.

use serde_json::json;

use super::*;
use crate::data::task::{Label, ProblemType};

/// Rows as lines.
fn rows(rows: &[Value]) -> String {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    lines.join("\n")
}

fn labels_of(data: &Dataset) -> Vec<Label> {
    let labels = data.examples.iter().map(|example| example.label.clone());
    labels.collect::<Option<_>>().unwrap()
}

#[test]
fn texts_with_labels_become_classes() {
    let text = rows(&[
        json!({"text": "hello", "label": "pos", "idx": 0}),
        json!({"text": "ab", "label": "neg", "idx": 1}),
        json!({"text": "abc", "label": "pos", "idx": 2}),
    ]);
    let data = load(&text).unwrap();
    assert_eq!(data.kind, RowKind::Labelled);
    assert_eq!(data.labels.as_ref().unwrap().names, ["neg", "pos"]);
    assert_eq!(
        labels_of(&data),
        [Label::Class(1), Label::Class(0), Label::Class(1)]
    );
    let example = &data.examples[0];
    let hello = fixture::tokenizer().encode("hello", false).unwrap();
    assert_eq!(example.ids, hello, "no end token is put behind the text");
    assert!(example.supervised.is_empty());
    let shown = data.report.to_string();
    assert!(
        shown.contains(
            "train.jsonl: 3 rows, text and label, to classify texts (SEQ_CLS)\n  3 examples, 6 tokens, the longest 3\n  \
             2 labels: neg 1, pos 2\n  labels that come once: \"neg\"\n  fields that are not used: idx"
        ),
        "{shown}"
    );
    // Trained as a text, the row has a field that is not used.
    let options = DataOptions {
        task: Some(TaskType::CausalLm),
        ..DataOptions::default()
    };
    let data = load_with(&text, &options).unwrap();
    assert_eq!((data.kind, data.labels), (RowKind::Text, None));
    assert_eq!(data.report.unused_fields, ["idx", "label"]);
}

#[test]
fn held_out_rows_are_read_by_the_labels_of_the_training_rows() {
    let train = load(&rows(&[
        json!({"text": "a", "label": "b"}),
        json!({"text": "a", "label": "c"}),
    ]));
    let options = DataOptions {
        labels: train.unwrap().labels,
        ..DataOptions::default()
    };
    let valid = rows(&[
        json!({"text": "a", "label": "c"}),
        json!({"text": "a", "label": "a"}),
    ]);
    let data = load_with(valid.lines().next().unwrap(), &options).unwrap();
    assert_eq!(labels_of(&data), [Label::Class(1)]);
    assert!(
        data.report
            .to_string()
            .contains("labels that no row has: \"b\"")
    );
    let error = load_with(&valid, &options).unwrap_err();
    assert_eq!(
        error,
        "data/train.jsonl, line 2: the label \"a\" is unknown; known are \"b\", \"c\""
    );
    let skipping = DataOptions {
        on_bad_row: OnBadRow::Skip,
        ..options
    };
    let data = load_with(&valid, &skipping).unwrap();
    assert_eq!((data.report.kept, data.report.skipped[0].line), (1, 2));
}

#[test]
fn what_is_wrong_with_labels_names_the_line() {
    let good = json!({"text": "a", "label": 1});
    for (row, expected) in [
        (
            json!({"text": "a", "label": null}),
            "line 2: \"label\" is null",
        ),
        (json!({"text": "", "label": 1}), "line 2: \"text\" is empty"),
        (
            json!({"text": "a"}),
            "line 2: the row has \"text\", and the file's rows are text and label; its \"label\" is missing",
        ),
        (
            json!({"text": "a", "label": "x"}),
            "line 2: the label is a name (x), and that of line 1 is a whole number",
        ),
        (
            json!({"text": "a", "label": [1]}),
            "line 2: the label is a list, and that of line 1 is one label",
        ),
        (
            json!({"text": "a", "text_pair": "b", "label": 1}),
            "line 2: this row is two texts and a label, but the file began with text and label on line 1",
        ),
    ] {
        let error = load(&rows(&[good.clone(), row])).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let array = json!([good, {"text": "a", "label": 0.5}, {"text": "a", "label": "x"}]).to_string();
    let error = load(&array).unwrap_err();
    assert!(
        error.contains("line 1: row 3 of the array: the label is a name (x)"),
        "{error}"
    );
    let only = DataOptions {
        task: Some(TaskType::TokenCls),
        ..DataOptions::default()
    };
    let error = load_with(&rows(&[good]), &only).unwrap_err();
    assert!(
        error.contains(
            "line 1: the row has \"text\", \"label\", which is no row of words to classify"
        ),
        "{error}"
    );
}

#[test]
fn no_rows_teach_vectors() {
    let options = DataOptions {
        task: Some(TaskType::FeatureExtraction),
        ..DataOptions::default()
    };
    let error = load_with(&rows(&[json!({"text": "a"})]), &options).unwrap_err();
    assert!(
        error.contains("no rows teach FEATURE_EXTRACTION"),
        "{error}"
    );
}

#[test]
fn words_and_passages_become_tags() {
    let data = load(&rows(&[
        json!({"tokens": ["hello", "ab"], "ner_tags": [3, 0]}),
        json!({"tokens": ["b", "hello"], "ner_tags": [-100, 0]}),
    ]));
    let data = data.unwrap();
    assert_eq!(data.labels.as_ref().unwrap().names, ["0", "3"]);
    assert_eq!(
        labels_of(&data),
        [Label::Tags(vec![(0, 1), (1, 0)]), Label::Tags(vec![(2, 0)])]
    );
    let data = load(&rows(&[
        json!({"text": "ab hello hello", "spans": [{"start": 3, "end": 8, "label": "GREETING"}]}),
    ]));
    let data = data.unwrap();
    assert_eq!(data.kind, RowKind::Passages);
    let names = &data.labels.as_ref().unwrap().names;
    assert_eq!(*names, ["B-GREETING", "I-GREETING", "O"]);
    assert_eq!(
        labels_of(&data),
        [Label::Tags(vec![(0, 2), (2, 0), (3, 2)])]
    );
    let options = DataOptions {
        max_seq_length: 3,
        ..DataOptions::default()
    };
    let cut = rows(&[json!({"tokens": ["ab", "hello"], "tags": ["A", "B"]})]);
    let shown = load_with(&cut, &options).unwrap().report.to_string();
    assert!(
        shown.contains("1 words lie beyond the cut at max_seq_length"),
        "{shown}"
    );
}

#[test]
fn numbers_and_lists_are_labels() {
    let data = load(&rows(&[
        json!({"sentence1": "a", "sentence2": "b", "label": 4.5}),
        json!({"sentence1": "a", "sentence2": "b", "label": 3}),
    ]));
    let data = data.unwrap();
    assert_eq!(
        data.labels.as_ref().unwrap().problem_type,
        ProblemType::Regression
    );
    assert_eq!(
        labels_of(&data),
        [Label::Values(vec![4.5]), Label::Values(vec![3.0])]
    );
    assert!(
        data.report
            .to_string()
            .contains("labels are numbers, from 3 to 4.5")
    );
    let data = load(&rows(&[
        json!({"text": "a", "labels": ["x", "y"]}),
        json!({"text": "a", "labels": []}),
    ]));
    let labels = labels_of(&data.unwrap());
    assert_eq!(
        labels,
        [
            Label::Classes(vec![1.0, 1.0]),
            Label::Classes(vec![0.0, 0.0])
        ]
    );
}

#[test]
fn tables_have_labels_and_texts_to_go_on_with() {
    let load = |name: &str, text: &str, columns: Option<&str>| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), text).unwrap();
        let columns = columns.map(|names| names.split(',').map(str::to_owned).collect());
        let options = DataOptions {
            columns,
            ..DataOptions::default()
        };
        let loaded = Dataset::load(folder.path(), Split::Train, &fixture::tokenizer(), &options);
        loaded.map_err(|error| error.to_string())
    };
    let data = load("train.csv", "text,label\nab,9\nb,10\n", None).unwrap();
    assert_eq!(data.labels.as_ref().unwrap().names, ["9", "10"]);
    assert_eq!(labels_of(&data), [Label::Class(0), Label::Class(1)]);
    let data = load("train.csv", "text,label\nab,01\nb,1\na,10\n", None).unwrap();
    assert_eq!(data.labels.as_ref().unwrap().names, ["01", "1", "10"]);
    let data = load("train.tsv", "ab\t1\nb\t0\n", Some("text,label")).unwrap();
    assert_eq!(labels_of(&data), [Label::Class(1), Label::Class(0)]);
    let data = load("train.csv", "prompt,completion\na,b\n", None).unwrap();
    assert_eq!(data.kind, RowKind::PromptCompletion);
    for (text, expected) in [
        (
            "text,label\nab,1\nb,\n",
            "train.csv, line 3: \"label\" must be a name, a number, true or false, or a list of these, but is empty",
        ),
        (
            "text,label\nab,1\n,0\n",
            "train.csv, line 3: \"text\" is empty",
        ),
        (
            "text,label\nab,1\nb,NaN\n",
            "train.csv, line 3: the label is NaN, which is no number",
        ),
        (
            "Text,Label\nab,1\n",
            "line 2: the row has \"Text\", \"Label\", which is no known kind",
        ),
    ] {
        let error = load("train.csv", text, None).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
