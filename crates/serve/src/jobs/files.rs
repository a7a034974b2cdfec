//! Files of rows: uploaded a piece at a time, kept in a folder each, and shown as what a model would learn from them.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use axum::extract::Multipart;
use axum::extract::multipart::{Field, MultipartError};
use axum::http::StatusCode;
use lowrank::data::{Split, task_of};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{is_id, without_paths};
use crate::error::ApiError;
use crate::objects::{new_id, now};
use crate::sync::{blocking, lock};

/// Bytes of a file at most.
pub(super) const LARGEST: usize = 512 << 20;
/// Bytes of a request that uploads one: the parts around the file are small.
pub(super) const LARGEST_BODY: usize = LARGEST + (1 << 20);
/// The only purpose that this server has files for.
const PURPOSE: &str = "fine-tune";
const ABOUT: &str = "file.json";
/// Endings that tell the reader of rows what a file is.
const ENDINGS: [&str; 9] = [
    ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", ".gz", ".zst", ".parquet",
];

/// An uploaded file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct File {
    pub(super) id: String,
    pub(super) filename: String,
    purpose: String,
    bytes: u64,
    created_at: u64,
    /// The name of its content in its folder.
    data: String,
}

/// The files of a server, newest last.
pub(super) struct Files {
    folder: PathBuf,
    all: Mutex<Vec<File>>,
}

impl File {
    pub(super) fn object(&self) -> Value {
        json!({
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": null,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": null,
        })
    }
}

impl Files {
    /// The files in a folder, which is made if need be.
    pub(super) fn open(folder: PathBuf) -> std::io::Result<Self> {
        fs::create_dir_all(&folder)?;
        super::sweep(&folder);
        let mut all = Vec::new();
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let text = fs::read_to_string(path.join(ABOUT));
            let read = text.ok().and_then(|text| serde_json::from_str(&text).ok());
            if let Some(file) = read {
                all.push(file);
            } else {
                tracing::warn!("{} is no uploaded file; it is left alone", path.display());
            }
        }
        all.sort_by(|a: &File, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        let all = Mutex::new(all);
        Ok(Self { folder, all })
    }

    pub(super) fn all(&self) -> Vec<File> {
        lock(&self.all).clone()
    }

    /// The file of an id that a request gave as `param`.
    pub(super) fn get(&self, id: &str, param: &str) -> Result<File, ApiError> {
        let found = lock(&self.all).iter().find(|file| file.id == id).cloned();
        found.ok_or_else(|| ApiError {
            param: Some(param.to_owned()),
            ..ApiError::not_found(
                "file_not_found",
                format!("there is no file {id:?}; GET /v1/files lists them"),
            )
        })
    }

    /// Where the content of a file is.
    pub(super) fn path(&self, file: &File) -> PathBuf {
        self.folder.join(&file.id).join(&file.data)
    }

    pub(super) fn delete(&self, id: &str) -> Result<Value, ApiError> {
        self.get(id, "file_id")?;
        lock(&self.all).retain(|file| file.id != id);
        // Renamed first: what is deleted by halves is swept at the next start.
        let folder = self.folder.join(id);
        let aside = self.folder.join(format!(".{id}.tmp"));
        let done = fs::rename(&folder, &aside).and_then(|()| fs::remove_dir_all(&aside));
        done.map_err(|error| ApiError::storage("the file cannot be deleted", error))?;
        Ok(json!({"id": id, "object": "file", "deleted": true}))
    }

    /// Takes the body of an upload to the disk.
    pub(super) async fn upload(&self, mut parts: Multipart) -> Result<File, ApiError> {
        let (mut purpose, mut kept) = (None, None);
        while let Some(part) = parts.next_field().await.map_err(|error| broken(&error))? {
            match part.name().unwrap_or_default() {
                "purpose" => purpose = Some(part.text().await.map_err(|error| broken(&error))?),
                "file" if kept.is_none() => kept = Some(self.keep(part).await?),
                "expires_after[anchor]" | "expires_after[seconds]" => {
                    let message = "files of this server do not expire; delete them when they are no longer needed";
                    return Err(ApiError::invalid("expires_after", message));
                }
                name => {
                    let message = format!(
                        "the form has the fields purpose and file, each once, and not {name:?}"
                    );
                    return Err(ApiError::invalid(name, message));
                }
            }
        }
        let purpose = purpose.ok_or_else(|| crate::api::fields::missing("purpose"))?;
        if purpose != PURPOSE {
            let message = format!(
                "purpose must be {PURPOSE:?}: this server has no use for files of {purpose:?}"
            );
            return Err(ApiError::invalid("purpose", message));
        }
        let Some((file, folder)) = kept else {
            return Err(crate::api::fields::missing("file"));
        };
        let target = self.folder.join(&file.id);
        let file = blocking(move || {
            finish(&file, folder, &target)?;
            Ok(file)
        })
        .await?;
        lock(&self.all).push(file.clone());
        Ok(file)
    }

    /// Writes the content of a part into a folder beside the others, which is gone unless it is finished.
    async fn keep(&self, mut part: Field<'_>) -> Result<(File, tempfile::TempDir), ApiError> {
        let given = part.file_name().unwrap_or_default();
        let filename: String = given
            .rsplit(['/', '\\'])
            .next()
            .unwrap_or_default()
            .chars()
            .filter(|c| !c.is_control())
            .take(200)
            .collect();
        let filename = if filename.is_empty() {
            "rows.jsonl".to_owned()
        } else {
            filename
        };
        let data = format!("rows{}", endings(&filename));
        let folder = tempfile::Builder::new()
            .prefix(".upload-")
            .suffix(".tmp")
            .tempdir_in(&self.folder)
            .map_err(|error| unwritten(&error))?;
        let mut out =
            fs::File::create(folder.path().join(&data)).map_err(|error| unwritten(&error))?;
        let mut bytes = 0;
        while let Some(piece) = part.chunk().await.map_err(|error| broken(&error))? {
            bytes += piece.len();
            if bytes > LARGEST {
                return Err(too_large());
            }
            out.write_all(&piece).map_err(|error| unwritten(&error))?;
        }
        let file = File {
            id: new_id("file-"),
            filename,
            purpose: PURPOSE.to_owned(),
            bytes: bytes as u64,
            created_at: now(),
            data,
        };
        Ok((file, folder))
    }
}

/// Looks at the rows of an upload, makes sure that it is on the disk, and gives it its name.
fn finish(file: &File, folder: tempfile::TempDir, target: &Path) -> Result<(), ApiError> {
    let data = folder.path().join(&file.data);
    task_of(&data, Split::File, None).map_err(|error| ApiError {
        code: "invalid_file",
        ..ApiError::invalid(
            "file",
            without_paths(&error.to_string(), &data, &file.filename),
        )
    })?;
    let text = serde_json::to_string_pretty(file).map_err(|e| ApiError::internal(e.to_string()))?;
    lowrank::write_text(&folder.path().join(ABOUT), &text)
        .map_err(|error| ApiError::internal(error.to_string()))?;
    // Opened for writing, since some systems sync nothing else.
    let content = fs::OpenOptions::new().append(true).open(&data);
    content
        .and_then(|out| out.sync_all())
        .map_err(|error| unwritten(&error))?;
    fs::rename(folder.path(), target).map_err(|error| unwritten(&error))?;
    let _ = folder.keep();
    Ok(())
}

/// The endings of a name that mean something to the reader of rows: `.jsonl`, `.csv.gz`.
fn endings(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    let (mut rest, mut found) = (name.as_str(), String::new());
    while let Some(ending) = ENDINGS.iter().find(|ending| rest.ends_with(**ending)) {
        found.insert_str(0, ending);
        rest = &rest[..rest.len() - ending.len()];
        if found.matches('.').count() == 2 {
            break;
        }
    }
    if found.is_empty() {
        ".jsonl".to_owned()
    } else {
        found
    }
}

fn unwritten(error: &std::io::Error) -> ApiError {
    ApiError::storage("the file cannot be kept", error)
}

fn too_large() -> ApiError {
    ApiError {
        param: Some("file".to_owned()),
        ..ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "file_too_large",
            format!(
                "a file may have {} MiB; compress it (.gz, .zst) or take fewer rows",
                LARGEST >> 20
            ),
        )
    }
}

fn broken(error: &MultipartError) -> ApiError {
    if error.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return too_large();
    }
    ApiError::bad_request("invalid_multipart", error.body_text())
}

/// The id of a file as a request gives it.
pub(super) fn check_id(id: &str) -> Result<(), ApiError> {
    if is_id(id, "file-") {
        return Ok(());
    }
    Err(ApiError::not_found(
        "file_not_found",
        "there is no such file; GET /v1/files lists them",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_tell_what_a_file_is() {
        for (name, expected) in [
            ("rows.jsonl", ".jsonl"),
            ("a.b.CSV.gz", ".csv.gz"),
            ("rows", ".jsonl"),
            ("..", ".jsonl"),
            ("x.gz", ".gz"),
            ("x.gz.gz.gz", ".gz.gz"),
        ] {
            assert_eq!(endings(name), expected, "{name}");
        }
    }

    #[test]
    fn what_was_left_by_halves_is_gone_after_a_start() {
        let place = tempfile::tempdir().expect("a folder");
        let folder = place.path().join("files");
        fs::create_dir_all(folder.join(".upload-x.tmp")).expect("a folder");
        fs::create_dir_all(folder.join("file-1")).expect("a folder");
        let files = Files::open(folder.clone()).expect("files");
        assert!(files.all().is_empty());
        assert!(!folder.join(".upload-x.tmp").exists());
        assert!(
            folder.join("file-1").exists(),
            "what it did not write stays"
        );
    }
}
