//! Which rows of the embedding an adapter has as its own (`trainable_token_indices`).

use std::collections::HashSet;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::json::show;

/// What a tensor of such rows is called behind its module's name.
pub const TOKEN_ROWS: &str = "token_adapter.trainable_tokens_delta";

/// Ids of tokens whose rows are an adapter's own. The rows of the file stand in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenIndices {
    /// Of the model's embedding.
    Embedding(Vec<u32>),
    /// Of tables by the ends of their names, such as `embed_tokens` and `lm_head`.
    Tables(Vec<(String, Vec<u32>)>),
}

impl TokenIndices {
    /// From a list of ids, or an object of such lists.
    ///
    /// # Errors
    /// A line for each problem, which calls the value `key`.
    pub fn from_json(key: &str, value: &Value) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let indices = match value {
            Value::Object(map) => Self::Tables(
                map.iter()
                    .map(|(name, list)| {
                        let ids = ids(&format!("{key}.{name}"), list, &mut problems);
                        (name.clone(), ids)
                    })
                    .collect(),
            ),
            list => Self::Embedding(ids(key, list, &mut problems)),
        };
        if problems.is_empty() {
            Ok(indices)
        } else {
            Err(problems)
        }
    }

    /// As PEFT writes it.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Embedding(ids) => json!(ids),
            Self::Tables(tables) => {
                let tables = tables.iter().map(|(name, ids)| (name.clone(), json!(ids)));
                Value::Object(tables.collect::<Map<_, _>>())
            }
        }
    }
}

fn ids(key: &str, value: &Value, problems: &mut Vec<String>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let list = value
        .as_array()
        .and_then(|list| list.iter().map(id).collect::<Option<Vec<_>>>());
    let Some(list) = list else {
        problems.push(format!(
            "`{key}` is {}; accepted: a list of token ids, an object of module names and such lists, or null",
            show(value)
        ));
        return Vec::new();
    };
    if list.is_empty() {
        problems.push(format!("`{key}` names no token; give ids, or leave it out"));
    }
    let mut seen = HashSet::new();
    for id in &list {
        if !seen.insert(*id) {
            problems.push(format!(
                "`{key}`: {id} is named twice; each token has one row"
            ));
        }
    }
    list
}

impl FromStr for TokenIndices {
    type Err = String;

    /// Ids between commas, of the embedding.
    fn from_str(text: &str) -> Result<Self, String> {
        let ids = text.split(',').map(|id| {
            let id = id.trim();
            id.parse::<u32>().map_err(|_| {
                format!("`{id}` is not the id of a token; give ids between commas, such as 5,17")
            })
        });
        let ids = ids.collect::<Result<Vec<_>, _>>()?;
        Self::from_json("trainable_token_indices", &json!(ids))
            .map_err(|problems| problems.join("; "))
    }
}

impl Serialize for TokenIndices {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for TokenIndices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let read = Self::from_json("trainable_token_indices", &value);
        read.map_err(|problems| serde::de::Error::custom(problems.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_a_list_or_lists_by_module() {
        let list = TokenIndices::Embedding(vec![5, 17]);
        assert_eq!("5, 17".parse(), Ok(list.clone()));
        let read = |text: &str| serde_json::from_str::<TokenIndices>(text);
        assert_eq!(read("[5,17]").unwrap(), list);
        let tables = TokenIndices::Tables(vec![("lm_head".into(), vec![1])]);
        assert_eq!(read(r#"{"lm_head":[1]}"#).unwrap(), tables);
        assert_eq!(
            serde_json::to_string(&tables).unwrap(),
            r#"{"lm_head":[1]}"#
        );
        for (text, words) in [
            ("5,,6", "`` is not the id"),
            ("-1", "`-1` is not the id"),
            ("5000000000", "`5000000000` is not the id"),
            ("3,4,3", "3 is named twice"),
        ] {
            let problem = text.parse::<TokenIndices>().unwrap_err();
            assert!(problem.contains(words), "{problem}");
        }
        assert!(
            read("[]")
                .unwrap_err()
                .to_string()
                .contains("names no token")
        );
    }
}
