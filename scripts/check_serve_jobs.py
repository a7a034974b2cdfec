#!/usr/bin/env python3
"""Uses the files and fine-tuning jobs of a running `lowrank serve` through openai-python's own calls.

    pip install openai
    lowrank serve --model builtin:tiny --adapter-dir DIR --port 8080
    python scripts/check_serve_jobs.py --url http://127.0.0.1:8080 --model builtin:tiny [--key KEY]

The server needs --adapter-dir. Two jobs run to their ends and one is cancelled; their adapters and files stay, but for one file.
Every answer is parsed strictly: a field that is missing, or of another type than openai-python's classes say, is an error.
Exit status: 0 if all holds, 1 if something does not.
"""

import argparse
import json
import sys
import time

import openai
from openai.types import FileDeleted, FileObject
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint


def expect(value, message):
    if not value:
        sys.exit(f"check_serve_jobs: {message}")


def strict(kind, value):
    """openai-python builds its objects without looking; pydantic then looks."""
    return kind.model_validate(value.model_dump(), strict=False)


def rows(count):
    lines = [json.dumps({"prompt": f"{a}+{a}=", "completion": str(2 * a)}) for a in range(1, count + 1)]
    return ("\n".join(lines) + "\n").encode()


def wait(client, job, limit=600):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        job = strict(FineTuningJob, client.fine_tuning.jobs.retrieve(job.id))
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.2)
    sys.exit(f"check_serve_jobs: {job.id} is still {job.status}")


def refused(call, code, part):
    try:
        call()
    except openai.APIStatusError as error:
        expect(error.code == code, f"the code is {error.code}, not {code}: {error}")
        expect(part in str(error), f"{part!r} is not in {error}")
        return
    sys.exit(f"check_serve_jobs: not refused with {code}")


def files(client):
    train = strict(FileObject, client.files.create(purpose="fine-tune", file=("rows.jsonl", rows(24))))
    valid = strict(FileObject, client.files.create(purpose="fine-tune", file=("valid.jsonl", rows(4))))
    expect(train.filename == "rows.jsonl" and train.bytes == len(rows(24)), f"the file is {train}")
    expect(client.files.retrieve(train.id).id == train.id, "the file is not found")
    expect(client.files.content(train.id).read() == rows(24), "the content is another")
    listed = [file.id for file in client.files.list(purpose="fine-tune", order="asc", limit=1)]
    expect(train.id in listed and listed.index(train.id) < listed.index(valid.id), "the list lacks the files")
    refused(lambda: client.files.create(purpose="batch", file=("a.jsonl", rows(1))), "invalid_value", "purpose")
    refused(lambda: client.files.create(purpose="fine-tune", file=("a.jsonl", b"hello\n")), "invalid_file", "a.jsonl")
    return train, valid


def succeeds(client, model, train, valid):
    jobs = client.fine_tuning.jobs
    job = jobs.create(
        model=model,
        training_file=train.id,
        validation_file=valid.id,
        suffix="check",
        seed=7,
        metadata={"who": "check"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": "auto"}},
        },
        extra_body={"lowrank": {"r": 4}},
    )
    job = strict(FineTuningJob, job)
    expect(job.status == "validating_files", f"the status is {job.status}")
    job = wait(client, job)
    expect(job.status == "succeeded", f"the job is {job.status}: {job.error}")
    expect(job.trained_tokens and job.finished_at >= job.created_at and job.seed == 7, f"the job is {job}")
    expect(job.hyperparameters.n_epochs == 2 and job.hyperparameters.batch_size == 4, f"{job.hyperparameters}")
    first = jobs.list(limit=1, metadata={"who": "check"})
    expect(first.data[0].id == job.id, "the list's first is another")
    events = [strict(FineTuningJobEvent, event) for event in jobs.list_events(job.id, limit=5)]
    metrics = [event.data for event in events if event.type == "metrics"]
    steps = [data["step"] for data in metrics if data["train_loss"] is not None]
    expect(steps == list(range(12, 0, -1)), f"the steps are {steps}")
    expect(any(data["valid_loss"] is not None for data in metrics), "no validation loss")
    expect(len({event.id for event in events}) == len(events), "ids come twice")
    points = [strict(FineTuningJobCheckpoint, one) for one in jobs.checkpoints.list(job.id, limit=1)]
    expect(points[0].step_number == 12 and points[0].metrics.train_loss > 0, f"the checkpoints are {points}")
    for name in (job.fine_tuned_model, points[-1].fine_tuned_model_checkpoint):
        answer = client.completions.create(model=name, prompt="2+2=", max_tokens=4, temperature=0)
        expect(answer.model == name, f"{answer.model} answered for {name}")
    return job


def goes_on(client, before, train):
    job = client.fine_tuning.jobs.create(
        model=before.fine_tuned_model,
        training_file=train.id,
        hyperparameters={"n_epochs": 1, "batch_size": 8},
    )
    job = wait(client, job)
    expect(job.status == "succeeded", f"the job is {job.status}: {job.error}")
    expect(job.model == before.fine_tuned_model, f"its model is {job.model}")


def ends(client, model, train):
    jobs = client.fine_tuning.jobs
    job = jobs.create(model=model, training_file=train.id, extra_body={"lowrank": {"max_steps": 1000000}})
    while not any(event.type == "metrics" for event in jobs.list_events(job.id, limit=100).data):
        time.sleep(0.1)
    refused(lambda: client.files.delete(train.id), "file_in_use", job.id)
    job = strict(FineTuningJob, jobs.cancel(job.id))
    expect(job.status == "cancelled", f"the status is {job.status}")
    refused(lambda: jobs.cancel(job.id), "invalid_status", "cancelled")


def fails(client, model):
    bad = client.files.create(purpose="fine-tune", file=("bad.jsonl", rows(2) + b'{"prompt": "x"}\n'))
    job = wait(client, client.fine_tuning.jobs.create(model=model, training_file=bad.id))
    expect(job.status == "failed", f"the status is {job.status}")
    expect(job.error.param == "training_file" and "bad.jsonl, line 3" in job.error.message, f"{job.error}")
    deleted = strict(FileDeleted, client.files.delete(bad.id))
    expect(deleted.deleted and bad.id not in [file.id for file in client.files.list()], "the file is still there")


def refuses(client, model, train):
    create = client.fine_tuning.jobs.create
    refused(lambda: create(model="none", training_file=train.id), "model_not_found", "none")
    refused(lambda: create(model=model, training_file="file-none"), "file_not_found", "file-none")
    call = lambda: create(model=model, training_file=train.id, extra_body={"lowrank": {"lora_alfa": 1}})
    refused(call, "unknown_parameter", "did you mean lora_alpha?")
    refused(lambda: client.fine_tuning.jobs.retrieve("ftjob-none"), "job_not_found", "ftjob-none")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="the base's name")
    parser.add_argument("--key", default="none")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.url.rstrip("/") + "/v1", api_key=args.key)
    train, valid = files(client)
    print("files: ok")
    job = succeeds(client, args.model, train, valid)
    print("a job and its result: ok")
    goes_on(client, job, train)
    print("a job that goes on from a result: ok")
    ends(client, args.model, train)
    print("cancelling: ok")
    fails(client, args.model)
    print("a file with a wrong row: ok")
    refuses(client, args.model, train)
    print("what is refused: ok")


if __name__ == "__main__":
    main()
