//! Rows of tokens that are trained beside the branches (`trainable_token_indices`): what PEFT's config names, as slots of an adapter.
//!
//! A list means the embedding. Names may say the output projection too; where it is the embedding's, and nothing says otherwise, it
//! has the same rows.

use lowrank_formats::peft::{TOKEN_ROWS, TokenIndices};

use super::method::SAVED_PREFIX;
use crate::model::{Adapter, HeadKind, ModelConfig, TokenRowSites, TokenRows, WeightId, families};

/// What an option or a file calls it.
const KEY: &str = "trainable_token_indices";

/// Adds slots of zeros behind the others for the rows that are named.
///
/// # Errors
/// A line for each name that means no table, and for each id that the model does not have.
pub(super) fn add(
    adapter: &mut Adapter,
    model: &ModelConfig,
    indices: Option<&TokenIndices>,
) -> Result<(), Vec<String>> {
    let Some(indices) = indices else {
        return Ok(());
    };
    let mut problems = Vec::new();
    let mut named: Vec<(WeightId, &[u32])> = Vec::new();
    match indices {
        TokenIndices::Embedding(ids) => named.push((WeightId::Embedding, ids)),
        TokenIndices::Tables(all) => {
            for (name, ids) in all {
                match table(model, name) {
                    Err(problem) => problems.push(problem),
                    Ok(id) if named.iter().any(|(known, _)| *known == id) => {
                        let table = module(model, id);
                        problems.push(format!(
                            "{KEY}: `{name}` is a second name for {table}; give one"
                        ));
                    }
                    Ok(id) => named.push((id, ids)),
                }
            }
        }
    }
    let size = model.vocab_size;
    for id in named.iter().flat_map(|(_, ids)| *ids) {
        if *id as usize >= size {
            problems.push(format!(
                "{KEY}: {id} is past the model's {size} tokens; give ids from 0 to {}",
                size - 1
            ));
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    // The embedding first; a tied head with the same rows has none of its own.
    named.sort_by_key(|(id, _)| *id != WeightId::Embedding);
    let tied = model.ties_head();
    let of = |wanted: WeightId| named.iter().find(|(id, _)| *id == wanted);
    let of = |wanted: WeightId| of(wanted).map(|(_, ids)| *ids);
    let (embedding, head) = (of(WeightId::Embedding), of(WeightId::Head));
    let own_head = head.filter(|ids| !(tied && embedding == Some(*ids)));
    let mut rows = |id: WeightId, ids: &[u32]| {
        let slot = adapter.params.slots();
        adapter.params.extend(&[(ids.len(), model.hidden_size)]);
        let table = module(model, id);
        adapter
            .names
            .push(format!("{SAVED_PREFIX}{table}.{TOKEN_ROWS}"));
        TokenRows::new(ids.to_vec(), slot)
    };
    let embedding = embedding.map(|ids| rows(WeightId::Embedding, ids));
    let head = match own_head {
        Some(ids) => Some(rows(WeightId::Head, ids)),
        None if tied => embedding.clone(),
        None => None,
    };
    adapter.token_rows = TokenRowSites { embedding, head };
    Ok(())
}

/// The rows of new tokens: of the embedding, and of an output projection of its own.
pub(crate) fn of_new_tokens(model: &ModelConfig, ids: &[u32]) -> TokenIndices {
    if model.tie_word_embeddings || model.head != HeadKind::LanguageModel {
        return TokenIndices::Embedding(ids.to_vec());
    }
    let tables = [WeightId::Embedding, WeightId::Head];
    TokenIndices::Tables(tables.map(|id| (module(model, id), ids.to_vec())).into())
}

/// The table that a name means. PEFT goes by the end of a module's name.
fn table(model: &ModelConfig, name: &str) -> Result<WeightId, String> {
    let has_head = model.head == HeadKind::LanguageModel;
    let tables = [WeightId::Embedding, WeightId::Head];
    let mut tables = tables
        .into_iter()
        .filter(|id| *id == WeightId::Embedding || has_head);
    let means = |id: &WeightId| !name.is_empty() && module(model, *id).ends_with(name);
    tables.clone().find(means).ok_or_else(|| {
        let known: Vec<String> = tables.by_ref().map(|id| module(model, id)).collect();
        format!(
            "{KEY}: `{name}` is no table of tokens; this model's are {}",
            known.join(" and ")
        )
    })
}

fn module(model: &ModelConfig, id: WeightId) -> String {
    let name = families::tensor_name(model, id);
    name.strip_suffix(".weight").unwrap_or(&name).to_owned()
}

/// How many rows there are, in words, where there are any.
pub(super) fn coverage(adapter: &Adapter) -> Option<String> {
    let tables: Vec<String> = adapter
        .token_rows
        .tables()
        .map(|(_, rows)| {
            let name = adapter.names[rows.slot()].trim_start_matches(SAVED_PREFIX);
            let table = name.strip_suffix(TOKEN_ROWS).unwrap_or(name);
            format!(
                "{} rows of {}",
                rows.ids().len(),
                table.trim_end_matches('.')
            )
        })
        .collect();
    (!tables.is_empty()).then(|| tables.join(" and "))
}
