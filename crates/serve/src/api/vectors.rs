//! `/v1/embeddings` of encoders, and `/v1/classify` of classifiers, with vLLM's requests and answers.

use std::ops::ControlFlow;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use lowrank::Workspace;
use lowrank::classify::{embed, predict, probabilities, tags};
use lowrank::data::{
    Example, Labels, ProblemType, TaskType, UnlabelledOptions, UnlabelledRow, Word,
};
use lowrank::metrics::classification::top_label;
use lowrank::model::{Decoder, HeadKind, Pooling};
use serde_json::{Value, json};

use super::fields::{self, Field, Kind, field, kind_of, missing};
use super::wanted::{Wanted, too_long, unsupported};
use super::{Body, whole};
use crate::error::ApiError;
use crate::objects::{new_id, now};
use crate::server::{Model, Server};
use crate::sync::blocking;

type Shared = State<Arc<Server>>;

const INPUT: &str = r#"{"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "array", "items": {"type": "integer"}}, {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}]}"#;

/// Fields of `/v1/embeddings`.
pub(crate) const EMBEDDINGS: &[Field] = &[
    field("model", Kind::Text, "The base's name or an adapter's"),
    field(
        "input",
        Kind::Other(INPUT),
        "A text, texts, token ids, or lists of token ids",
    ),
    field("encoding_format", Kind::Text, "float or base64 [float]"),
    field(
        "dimensions",
        Kind::Integer(1..=i64::MAX),
        "As many as the model has",
    ),
    field("pooling", Kind::Text, "mean, cls or last [mean]"),
    field(
        "normalize",
        Kind::Bool,
        "Whether vectors are made as long as one [true]",
    ),
    field("user", Kind::Ignored, "Ignored"),
];

/// Fields of `/v1/classify`.
pub(crate) const CLASSIFY: &[Field] = &[
    field("model", Kind::Text, "The base's name or an adapter's"),
    field(
        "input",
        Kind::Other(INPUT),
        "A text, texts, token ids, or lists of token ids",
    ),
    field("user", Kind::Ignored, "Ignored"),
];

/// Texts of a request at most.
const MOST: usize = 2048;

/// Vectors of texts, of an encoder.
pub(super) async fn embeddings(
    State(server): Shared,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let caller = server.keys.caller(&headers)?;
    let _turn = server.keys.enter(&caller, server.caps.requests_per_key)?;
    let body = fields::Body::read(&whole(body)?, &[EMBEDDINGS])?;
    let size = server.base.decoder.config().hidden_size;
    if let Some(dimensions) = body.count("dimensions")
        && dimensions != size
    {
        return Err(unsupported(
            "dimensions",
            format!("the model's vectors have {size} dimensions"),
        ));
    }
    let base64 = match body.text("encoding_format") {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            return Err(ApiError::invalid(
                "encoding_format",
                "encoding_format must be float or base64",
            ));
        }
    };
    let pooling = match body.text("pooling") {
        None | Some("mean") => Pooling::Mean,
        Some("cls") => Pooling::First,
        Some("last") => Pooling::Last,
        Some(_) => {
            return Err(ApiError::invalid(
                "pooling",
                "pooling must be mean, cls or last",
            ));
        }
    };
    let normalize = body.bool("normalize").unwrap_or(true);
    let (model, rows) = rows(&server, &body, example).await?;
    if server.base.decoder.config().head != HeadKind::None {
        return Err(unsupported_by(
            &server,
            "is no encoder, and vectors are an encoder's",
        ));
    }
    let tokens = tokens(&rows);
    let adapter = model.adapter();
    let vectors = on_engine(&server, move |decoder, ws| {
        embed(decoder, adapter.as_deref(), &rows, pooling, normalize, ws)
    })
    .await?;
    let data = vectors.iter().enumerate().map(|(index, vector)| {
        let embedding = if base64 {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            json!(BASE64_STANDARD.encode(bytes))
        } else {
            json!(vector)
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    });
    Ok(Json(json!({
        "id": new_id("embd-"),
        "object": "list",
        "created": now(),
        "model": &*model.name,
        "data": data.collect::<Vec<_>>(),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    })))
}

/// Labels of texts, of a classifier.
pub(super) async fn classify(
    State(server): Shared,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let caller = server.keys.caller(&headers)?;
    let _turn = server.keys.enter(&caller, server.caps.requests_per_key)?;
    let body = fields::Body::read(&whole(body)?, &[CLASSIFY])?;
    let classifier = server.base.decoder.config().classifier();
    let (Some(labels), Some(classifier)) = (&server.labels, classifier) else {
        return Err(unsupported_by(&server, "has no classifier"));
    };
    let tags_words = classifier.pooling == Pooling::Each;
    let read = if tags_words { passage } else { whole_text };
    let (model, rows) = rows(&server, &body, read).await?;
    if let Some(name) = server
        .base
        .decoder
        .weights()
        .untrained(model.adapter().as_deref())
    {
        return Err(unsupported_by(
            &server,
            &format!("has no trained classifier ({name}); ask for an adapter that has"),
        ));
    }
    let (examples, words): (Vec<Example>, Vec<Vec<Word>>) =
        rows.into_iter().map(|row| (row.example, row.words)).unzip();
    let tokens = tokens(&examples);
    let adapter = model.adapter();
    let outputs = on_engine(&server, move |decoder, ws| {
        let mut outputs = Vec::with_capacity(examples.len());
        predict(decoder, adapter.as_deref(), &examples, ws, |_, found| {
            outputs.extend(found);
            ControlFlow::Continue(())
        });
        outputs
    })
    .await?;
    let data = outputs.into_iter().zip(words).enumerate();
    let data = data.map(|(index, (values, words))| {
        if tags_words {
            json!({"index": index, "words": tagged(labels, &words, &values)})
        } else {
            labelled(labels, index, values)
        }
    });
    Ok(Json(json!({
        "id": new_id("classify-"),
        "object": "list",
        "created": now(),
        "model": &*model.name,
        "labels": labels.names,
        "data": data.collect::<Vec<_>>(),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    })))
}

/// What is said of a text, in vLLM's form.
fn labelled(labels: &Labels, index: usize, mut values: Vec<f32>) -> Value {
    probabilities(labels.problem_type, &mut values);
    let label = (labels.problem_type != ProblemType::Regression).then(|| top_label(&values));
    json!({
        "index": index,
        "label": label.and_then(|best| labels.names.get(best)),
        "probs": values,
        "num_classes": values.len(),
    })
}

/// What is said of the words of a text, as `lowrank classify --json` prints it. `logits` are those of all tokens.
fn tagged(labels: &Labels, words: &[Word], logits: &[f32]) -> Vec<Value> {
    let words = words.iter().zip(tags(labels, words, logits));
    let words = words.map(|(word, found)| {
        let mut said = json!({"word": word.text, "start": word.start, "end": word.end});
        if let Some((label, probability)) = found {
            said["label"] = json!(label);
            said["probability"] = json!(probability);
        }
        said
    });
    words.collect()
}

fn unsupported_by(server: &Server, why: &str) -> ApiError {
    ApiError::bad_request("unsupported_by_model", format!("{} {why}", server.name))
}

fn tokens(rows: &[Example]) -> usize {
    rows.iter().map(|row| row.ids.len()).sum()
}

/// The model that is asked, and the inputs, each as `read` reads it for a model of so many tokens at most.
async fn rows<T: Send + 'static>(
    server: &Arc<Server>,
    body: &fields::Body,
    read: fn(&Server, &Value, usize) -> Result<T, ApiError>,
) -> Result<(Model, Vec<T>), ApiError> {
    let wanted = Wanted::of_model(body);
    let input = body.get("input").ok_or_else(|| missing("input"))?.clone();
    let model = server.model(&wanted).await?;
    let most = server.context(&model);
    let server = Arc::clone(server);
    let rows = blocking(move || {
        let inputs = match input {
            Value::Array(items) if items.first().is_some_and(Value::is_number) => {
                vec![Value::Array(items)]
            }
            Value::Array(items) => items,
            one => vec![one],
        };
        if inputs.is_empty() {
            return Err(ApiError::invalid("input", "input is an empty list"));
        }
        if inputs.len() > MOST {
            return Err(too_long("input", inputs.len(), MOST));
        }
        inputs
            .iter()
            .map(|input| read(&server, input, most))
            .collect()
    })
    .await?;
    Ok((model, rows))
}

/// A text or ids.
fn example(server: &Server, input: &Value, most: usize) -> Result<Example, ApiError> {
    let wrong = |message: String| ApiError::invalid("input", message);
    let ids = match input {
        Value::String(text) if text.is_empty() => {
            return Err(wrong("input has an empty text".to_owned()));
        }
        Value::String(text) => {
            let encoded = server
                .tokenizer()
                .encode_classified(text, None, usize::MAX)
                .map_err(|error| wrong(error.to_string()))?;
            encoded.ids
        }
        Value::Array(ids) => {
            let vocabulary = server.base.decoder.config().vocab_size as u64;
            let ids = ids
                .iter()
                .map(|id| id.as_u64().filter(|id| *id < vocabulary));
            let ids: Option<Vec<u32>> = ids.map(|id| id.map(|id| id as u32)).collect();
            ids.filter(|ids| !ids.is_empty())
                .ok_or_else(|| wrong("input has a list that is none of token ids".to_owned()))?
        }
        other => {
            return Err(wrong(format!(
                "input must have texts or lists of token ids, not {}",
                kind_of(other)
            )));
        }
    };
    fits(ids.len(), most)?;
    Ok(Example {
        ids,
        ..Example::default()
    })
}

/// A text that a label is for.
fn whole_text(server: &Server, input: &Value, most: usize) -> Result<UnlabelledRow, ApiError> {
    Ok(UnlabelledRow {
        example: example(server, input, most)?,
        text: String::new(),
        pair: None,
        words: Vec::new(),
        label: None,
    })
}

/// A text whose words are to be tagged.
fn passage(server: &Server, input: &Value, most: usize) -> Result<UnlabelledRow, ApiError> {
    let Value::String(text) = input else {
        let message = format!(
            "input must have texts, whose words are tagged, not {}",
            kind_of(input)
        );
        return Err(ApiError::invalid("input", message));
    };
    let options = UnlabelledOptions {
        task: TaskType::TokenCls,
        max_seq_length: usize::MAX,
        columns: None,
        batch_rows: 1,
    };
    let row = UnlabelledRow::of_text(server.tokenizer(), text, None, &options)
        .map_err(|error| ApiError::invalid("input", error.to_string()))?;
    fits(row.example.ids.len(), most)?;
    Ok(row)
}

/// # Errors
/// More tokens than the model reads.
fn fits(tokens: usize, most: usize) -> Result<(), ApiError> {
    if tokens > most {
        let message = format!("an input has {tokens} tokens, and the model reads {most}");
        return Err(ApiError {
            code: "context_length_exceeded",
            ..ApiError::invalid("input", message)
        });
    }
    Ok(())
}

/// Does something with the model on the thread that has it.
async fn on_engine<T: Send + 'static>(
    server: &Server,
    work: impl FnOnce(&Decoder, &Workspace) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    server.engine.work(Box::new(move |decoder, ws| {
        if !sender.is_closed() {
            drop(sender.send(work(decoder, ws)));
        }
    }));
    receiver
        .await
        .map_err(|_| ApiError::internal("the engine has stopped"))
}
