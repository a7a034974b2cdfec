//! The routes of files and jobs. All of them need the right to change what is served.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body as Answer, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Multipart, Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use lowrank::formats::atomic::{write_file, write_folder};
use lowrank::formats::{FormatError, peft};
use serde_json::{Map, Value, json};

use super::events::{Event, Level};
use super::files::{self, LARGEST_BODY};
use super::job::{Job, Record, Status, save};
use super::{Jobs, is_id, preview, settings};
use crate::api::{Body, events, fields, whole};
use crate::error::ApiError;
use crate::objects::{new_id, now};
use crate::server::Server;
use crate::sync::{blocking, lock};

type Shared = State<Arc<Server>>;
type Found = Result<Json<Value>, ApiError>;

/// Adds the routes.
pub(crate) fn add(router: Router<Arc<Server>>) -> Router<Arc<Server>> {
    let upload = post(upload).layer(DefaultBodyLimit::max(LARGEST_BODY));
    router
        .route("/v1/files", upload.get(list_files))
        .route("/v1/files/{id}", get(file).delete(delete_file))
        .route("/v1/files/{id}/content", get(content))
        .route("/v1/files/{id}/preview", get(file_preview))
        .route("/v1/fine_tuning/jobs", post(create).get(list))
        .route("/v1/fine_tuning/jobs/{id}", get(job))
        .route("/v1/fine_tuning/jobs/{id}/cancel", post(cancel))
        .route("/v1/fine_tuning/jobs/{id}/pause", post(pause))
        .route("/v1/fine_tuning/jobs/{id}/resume", post(resume))
        .route("/v1/fine_tuning/jobs/{id}/events", get(list_events))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(checkpoints))
}

/// The jobs, for callers who may have them.
fn enter(server: &Server, headers: &HeaderMap) -> Result<Arc<Jobs>, ApiError> {
    server.keys.caller(headers)?.require_admin()?;
    server.jobs.clone()
}

/// The parameters of a path, as they stand behind its question mark.
type Asked = Result<Query<Map<String, Value>>, QueryRejection>;

/// A parameter that a path does not have.
fn no_parameter(name: &str, known: &[&str]) -> ApiError {
    ApiError {
        code: "unknown_parameter",
        ..ApiError::invalid(
            name,
            format!(
                "there is no parameter {name:?} here, only {}",
                known.join(", ")
            ),
        )
    }
}

/// What a list is asked for. Fields that are not known are an error, as everywhere.
#[derive(Debug, Default)]
struct Listing {
    limit: Option<usize>,
    after: Option<String>,
    order: Option<String>,
    purpose: Option<String>,
    stream: Option<bool>,
    rows: Option<usize>,
}

impl Listing {
    /// Reads parameters, of which those in `known` are allowed.
    fn read(query: Asked, known: &[&str]) -> Result<Self, ApiError> {
        let Query(query) =
            query.map_err(|error| ApiError::bad_request("invalid_query", error.body_text()))?;
        let mut listing = Self::default();
        for (name, value) in query {
            if !known.contains(&name.as_str()) {
                return Err(no_parameter(&name, known));
            }
            listing.set(&name, value.as_str().unwrap_or_default())?;
        }
        Ok(listing)
    }

    fn set(&mut self, name: &str, text: &str) -> Result<(), ApiError> {
        let wrong =
            |what: &str| ApiError::invalid(name, format!("{name} must be {what}, not {text:?}"));
        let number = || text.parse().map_err(|_| wrong("a whole number"));
        match name {
            "limit" => self.limit = Some(number()?),
            "rows" => self.rows = Some(number()?),
            "stream" => {
                let stream = text.parse().map_err(|_| wrong("true or false"))?;
                self.stream = Some(stream);
            }
            "after" => self.after = Some(text.to_owned()),
            "order" => self.order = Some(text.to_owned()),
            _ => self.purpose = Some(text.to_owned()),
        }
        Ok(())
    }

    /// How many are wanted.
    fn limit(&self, default: usize, most: usize) -> Result<usize, ApiError> {
        match self.limit {
            None => Ok(default),
            Some(limit) if (1..=most).contains(&limit) => Ok(limit),
            Some(limit) => {
                let message = format!("limit must be from 1 to {most}, not {limit}");
                Err(ApiError::invalid("limit", message))
            }
        }
    }

    /// The page of a list, which begins behind `after`, and whether there is more.
    fn page<T>(
        &self,
        all: Vec<T>,
        id: impl Fn(&T) -> &str,
        limit: usize,
    ) -> Result<(Vec<T>, bool), ApiError> {
        let start = match &self.after {
            None => 0,
            Some(after) => {
                let found = all.iter().position(|one| id(one) == after);
                1 + found.ok_or_else(|| {
                    ApiError::invalid("after", format!("there is no {after:?} in this list"))
                })?
            }
        };
        let has_more = all.len() > start + limit;
        Ok((all.into_iter().skip(start).take(limit).collect(), has_more))
    }
}

/// A page of objects as a list object.
fn list_object(data: &[Value], has_more: bool) -> Json<Value> {
    let id = |one: Option<&Value>| one.and_then(|one| one.get("id")).cloned();
    let (first, last) = (id(data.first()), id(data.last()));
    Json(json!({
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": first,
        "last_id": last,
    }))
}

async fn upload(
    State(server): Shared,
    headers: HeaderMap,
    parts: Result<Multipart, axum::extract::multipart::MultipartRejection>,
) -> Found {
    let jobs = enter(&server, &headers)?;
    let parts = parts.map_err(|error| {
        let message = format!(
            "an upload is a form with the fields purpose and file: {}",
            error.body_text()
        );
        ApiError::bad_request("invalid_multipart", message)
    })?;
    Ok(Json(jobs.files.upload(parts).await?.object()))
}

async fn list_files(State(server): Shared, headers: HeaderMap, query: Asked) -> Found {
    let jobs = enter(&server, &headers)?;
    let listing = Listing::read(query, &["limit", "after", "order", "purpose"])?;
    let limit = listing.limit(10_000, 10_000)?;
    let mut all = jobs.files.all();
    match listing.order.as_deref() {
        None | Some("desc") => all.reverse(),
        Some("asc") => {}
        Some(other) => {
            return Err(ApiError::invalid(
                "order",
                format!("order must be asc or desc, not {other:?}"),
            ));
        }
    }
    let mut objects: Vec<Value> = all.iter().map(files::File::object).collect();
    if let Some(purpose) = &listing.purpose {
        objects.retain(|object| object["purpose"] == purpose.as_str());
    }
    let (data, has_more) = listing.page(
        objects,
        |object| object["id"].as_str().unwrap_or_default(),
        limit,
    )?;
    Ok(list_object(&data, has_more))
}

async fn file(State(server): Shared, headers: HeaderMap, Path(id): Path<String>) -> Found {
    let jobs = enter(&server, &headers)?;
    Ok(Json(jobs.files.get(&id, "file_id")?.object()))
}

async fn delete_file(State(server): Shared, headers: HeaderMap, Path(id): Path<String>) -> Found {
    let jobs = enter(&server, &headers)?;
    files::check_id(&id)?;
    let user = jobs.all().into_iter().find(|job| {
        let record = job.record();
        let uses = record.training_file == id || record.validation_file.as_deref() == Some(&id);
        uses && !record.status.is_over()
    });
    if let Some(job) = user {
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            "file_in_use",
            format!("the job {} trains on this file; cancel it first", job.id),
        ));
    }
    let deleted = blocking(move || jobs.files.delete(&id)).await?;
    Ok(Json(deleted))
}

/// A file of the disk, piece by piece.
struct Content(std::fs::File);

impl futures_core::Stream for Content {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut piece = vec![0; 1 << 16];
        let read = io::Read::read(&mut self.0, &mut piece);
        Poll::Ready(match read {
            Ok(0) => None,
            Ok(count) => {
                piece.truncate(count);
                Some(Ok(piece.into()))
            }
            Err(error) => Some(Err(error)),
        })
    }
}

async fn content(
    State(server): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let jobs = enter(&server, &headers)?;
    let file = jobs.files.get(&id, "file_id")?;
    let opened = std::fs::File::open(jobs.files.path(&file));
    let opened = opened.map_err(|error| ApiError::storage("the file cannot be read", error))?;
    let mut response = Response::new(Answer::from_stream(Content(opened)));
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, kind);
    let plain: String = file
        .filename
        .chars()
        .map(|c| {
            if c.is_ascii_graphic() && c != '"' && c != '\\' {
                c
            } else {
                '_'
            }
        })
        .collect();
    if let Ok(value) = HeaderValue::from_str(&format!("attachment; filename=\"{plain}\"")) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    Ok(response)
}

async fn file_preview(
    State(server): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
    query: Asked,
) -> Found {
    let jobs = enter(&server, &headers)?;
    let rows = Listing::read(query, &["rows"])?.rows.unwrap_or(3);
    if rows > 100 {
        return Err(ApiError::invalid(
            "rows",
            format!("rows must be from 0 to 100, not {rows}"),
        ));
    }
    let file = jobs.files.get(&id, "file_id")?;
    let path = jobs.files.path(&file);
    let shown = blocking(move || preview::preview(&jobs.base.source, &path, &file.filename, rows));
    Ok(Json(shown.await?))
}

async fn create(State(server): Shared, headers: HeaderMap, body: Body) -> Found {
    let jobs = enter(&server, &headers)?;
    let body = fields::Body::read(&whole(body)?, &[settings::CREATE])?;
    let model = body.require_text("model")?.to_owned();
    jobs.files
        .get(body.require_text("training_file")?, "training_file")?;
    if let Some(id) = body.text("validation_file") {
        jobs.files.get(id, "validation_file")?;
    }
    if let Some(suffix) = body.text("suffix")
        && (suffix.is_empty() || suffix.chars().count() > 64)
    {
        return Err(ApiError::invalid(
            "suffix",
            "a suffix has 1 to 64 characters",
        ));
    }
    if jobs.is_stopping() {
        return Err(ApiError {
            retry_after: Some(5),
            ..ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "shutting_down",
                "the server is going down",
            )
        });
    }
    // Loaded, so that an adapter that is of no use is refused here.
    let lease = if model == server.name {
        None
    } else {
        Some(server.registry.lease(&model).await?)
    };
    let adapter = lease
        .as_ref()
        .and_then(|lease| server.registry.path_of(&lease.name));
    let job = blocking(move || begin(&jobs, &body, model, adapter.as_deref())).await?;
    drop(lease);
    Ok(Json(job.object()))
}

/// Makes a job of a request, and begins with its files.
fn begin(
    jobs: &Arc<Jobs>,
    body: &fields::Body,
    model: String,
    adapter: Option<&std::path::Path>,
) -> Result<Arc<Job>, ApiError> {
    let now = now();
    let decoder = &jobs.base.decoder;
    let base = settings::Base {
        name: jobs.base.source.to_string(),
        model: decoder.config(),
        dtype: decoder.weights().dtype(),
        adapter,
    };
    let wanted = settings::read(body, &base, now)?;
    let metadata = match body.get("metadata") {
        Some(other) if !other.is_object() => {
            return Err(ApiError::invalid("metadata", "metadata must be an object"));
        }
        given => given.cloned(),
    };
    let config = serde_json::to_value(&wanted.config)
        .map_err(|error| ApiError::internal(error.to_string()))?;
    let mut all = lock(&jobs.all);
    let record = Record {
        version: 1,
        id: new_id("ftjob-"),
        number: all.last().map_or(0, |job| job.record().number) + 1,
        status: Status::ValidatingFiles,
        created_at: now,
        finished_at: None,
        model,
        training_file: body.text("training_file").unwrap_or_default().to_owned(),
        validation_file: body.text("validation_file").map(str::to_owned),
        suffix: body.text("suffix").map(str::to_owned),
        hyperparameters: settings::shown(&wanted.config),
        seed: wanted.config.seed,
        metadata,
        lowrank: wanted.given,
        config,
        trained_tokens: None,
        fine_tuned_model: None,
        error: None,
    };
    let folder = jobs.folder.join("jobs").join(&record.id);
    let written = write_folder(&folder, false, |temporary| {
        if let Some(adapter) = adapter {
            let init = temporary.join("init");
            std::fs::create_dir(&init)
                .map_err(|error| FormatError::io(&init, "make the folder", error))?;
            for name in [peft::ADAPTER_CONFIG, peft::ADAPTER_WEIGHTS] {
                let bytes = std::fs::read(adapter.join(name));
                let bytes = bytes.map_err(|error| FormatError::io(adapter, "read", error))?;
                write_file(&init.join(name), |out| out.write_all(&bytes))?;
            }
        }
        save(temporary, &record).map_err(|error| FormatError::Missing {
            path: temporary.to_path_buf(),
            problem: error.message,
        })
    });
    written.map_err(|error| ApiError::storage("the job cannot be written", error))?;
    let job = Arc::new(Job::new(folder, record));
    all.push(Arc::clone(&job));
    drop(all);
    job.tell(Level::Info, format!("Created fine-tuning job: {}", job.id));
    jobs.validate(Arc::clone(&job));
    Ok(job)
}

async fn list(State(server): Shared, headers: HeaderMap, query: Asked) -> Found {
    let jobs = enter(&server, &headers)?;
    let Query(query) =
        query.map_err(|error| ApiError::bad_request("invalid_query", error.body_text()))?;
    let (listing, wanted) = of_metadata(query)?;
    let limit = listing.limit(20, 100)?;
    let mut all = jobs.all();
    all.reverse();
    all.retain(|job| {
        let metadata = job.record().metadata.unwrap_or_default();
        wanted
            .iter()
            .all(|(key, value)| metadata.get(key) == Some(value))
    });
    let (page, has_more) = listing.page(all, |job| &job.id, limit)?;
    let data: Vec<Value> = page.iter().map(|job| job.object()).collect();
    Ok(list_object(&data, has_more))
}

/// What a list of jobs is asked for: OpenAI's clients write `metadata[key]=value`.
fn of_metadata(query: Map<String, Value>) -> Result<(Listing, Map<String, Value>), ApiError> {
    let (mut listing, mut metadata) = (Listing::default(), Map::new());
    for (key, value) in query {
        let text = value.as_str().unwrap_or_default();
        let inner = key
            .strip_prefix("metadata[")
            .and_then(|key| key.strip_suffix(']'));
        match (key.as_str(), inner) {
            (_, Some(inner)) => {
                metadata.insert(inner.to_owned(), text.into());
            }
            ("limit" | "after", _) => listing.set(&key, text)?,
            _ => return Err(no_parameter(&key, &["limit", "after", "metadata[…]"])),
        }
    }
    Ok((listing, metadata))
}

/// The job of a path.
fn find(jobs: &Jobs, id: &str) -> Result<Arc<Job>, ApiError> {
    if is_id(id, "ftjob-") {
        return jobs.get(id);
    }
    Err(ApiError::not_found(
        "job_not_found",
        "there is no such job; GET /v1/fine_tuning/jobs lists them",
    ))
}

async fn job(State(server): Shared, headers: HeaderMap, Path(id): Path<String>) -> Found {
    let jobs = enter(&server, &headers)?;
    Ok(Json(find(&jobs, &id)?.object()))
}

fn conflict(job: &Job, what: &str) -> ApiError {
    ApiError::bad_request(
        "invalid_status",
        format!("the job is {}, and cannot be {what}", job.status().name()),
    )
}

async fn cancel(State(server): Shared, headers: HeaderMap, Path(id): Path<String>) -> Found {
    let jobs = enter(&server, &headers)?;
    let job = find(&jobs, &id)?;
    let cancelled = blocking(move || {
        if !job.end(Status::Cancelled, |_| {})? {
            return Err(conflict(&job, "cancelled"));
        }
        job.stop.store(true, Ordering::SeqCst);
        job.tell(Level::Info, "The job was cancelled");
        jobs.wake();
        Ok(job.object())
    });
    Ok(Json(cancelled.await?))
}

async fn pause(State(server): Shared, headers: HeaderMap, Path(id): Path<String>) -> Found {
    let jobs = enter(&server, &headers)?;
    let job = find(&jobs, &id)?;
    let paused = blocking(move || {
        let moved = job.move_on(Status::Running, Status::Paused)?
            || job.move_on(Status::Queued, Status::Paused)?;
        if !moved {
            return Err(conflict(&job, "paused"));
        }
        job.stop.store(true, Ordering::SeqCst);
        job.tell(Level::Info, "The job is paused");
        Ok(job.object())
    });
    Ok(Json(paused.await?))
}

async fn resume(State(server): Shared, headers: HeaderMap, Path(id): Path<String>) -> Found {
    let jobs = enter(&server, &headers)?;
    let job = find(&jobs, &id)?;
    let resumed = blocking(move || {
        if !job.move_on(Status::Paused, Status::Queued)? {
            return Err(conflict(&job, "resumed"));
        }
        job.tell(Level::Info, "The job goes on when it is its turn");
        jobs.wake();
        Ok(job.object())
    });
    Ok(Json(resumed.await?))
}

async fn checkpoints(
    State(server): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
    query: Asked,
) -> Found {
    let jobs = enter(&server, &headers)?;
    let listing = Listing::read(query, &["limit", "after"])?;
    let limit = listing.limit(10, 100)?;
    let job = find(&jobs, &id)?;
    let all = blocking(move || Ok(jobs.checkpoints(&job))).await?;
    let (data, has_more) = listing.page(
        all,
        |object| object["id"].as_str().unwrap_or_default(),
        limit,
    )?;
    Ok(list_object(&data, has_more))
}

async fn list_events(
    State(server): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
    query: Asked,
) -> Result<Response, ApiError> {
    let jobs = enter(&server, &headers)?;
    let listing = Listing::read(query, &["limit", "after", "stream"])?;
    let job = find(&jobs, &id)?;
    if listing.stream == Some(true) {
        return Ok(follow(jobs, job));
    }
    let limit = listing.limit(20, 500)?;
    let all = blocking(move || {
        Ok(job.with_events(|all| all.iter().rev().cloned().collect::<Vec<Event>>()))
    });
    let (page, has_more) = listing.page(all.await?, Event::id, limit)?;
    let data: Vec<Value> = page.iter().map(Event::object).collect();
    Ok(list_object(&data, has_more).into_response())
}

/// All events of a job, those that come as they come, until it is over.
fn follow(jobs: Arc<Jobs>, job: Arc<Job>) -> Response {
    let (sender, response) = events();
    tokio::spawn(async move {
        let mut changes = job.watch();
        let mut sent = 0;
        loop {
            // Asked first: what is told before that is seen below.
            let is_silent = job.is_silent();
            let new: Vec<Event> = job.with_events(|all| all.iter().skip(sent).cloned().collect());
            sent += new.len();
            for event in &new {
                if !sender.send(&event.object()) {
                    return;
                }
            }
            if is_silent {
                return sender.done();
            }
            // Whoever listens to a server that goes down listens again to the next one.
            if jobs.is_stopping() || sender.is_closed() {
                return;
            }
            let pause = Duration::from_millis(250);
            drop(tokio::time::timeout(pause, changes.changed()).await);
        }
    });
    response
}
