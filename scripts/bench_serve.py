#!/usr/bin/env python3
"""Measures `lowrank serve` on a quiet machine: the table of docs/serving.md.

    scripts/bench_serve.py --lowrank target/release/lowrank --model models/smollm2 [--rounds 5] [--only many,bytes]
        [--work FOLDER] [--json FILE]

It makes random adapters, starts the servers and asks them with `lowrank bench serve`. What is compared is measured in turn, round
after round, and each ratio is the median of the rounds' ratios. The parts:

    many       1,000 adapters (q and v, r 4) under Zipf's law, 8 requests at once, against one adapter
    bytes      8 different adapters against 8 times the same, q and v with r 4 and all layers with r 8
    base       the base on a server with the 1,000 adapters, against a server with none
    prefix     a second request with a shared prefix of 1,024 tokens
    changes    loads, swaps and unloads under traffic
    http       8 long answers over HTTP, against `lowrank bench generate`
    training   a fine-tuning job beside traffic, against each alone

Python's own library is all it needs. The adapters take 1 GB in --work, a temporary folder unless it is given; one that is kept is used again.
"""

import argparse
import array
import json
import math
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

PARTS = ["many", "bytes", "base", "prefix", "changes", "http", "training"]
QV = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def values(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


class Adapters:
    """Random adapters in PEFT's layout, of the shapes of a Llama."""

    def __init__(self, model):
        config = json.loads((model / "config.json").read_text())
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        head = config.get("head_dim") or hidden // config["num_attention_heads"]
        queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
        self.layers = config["num_hidden_layers"]
        self.shapes = {
            "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
        }  # fmt: skip
        rng = random.Random(7)
        # Every tensor is a piece of this, from a place of its own.
        self.numbers = array.array("f", (rng.gauss(0.0, 0.02) for _ in range(1 << 20)))
        self.base_bytes = 2 * values(model / "model.safetensors")  # bf16, whatever the file has

    def bytes(self, modules, r):
        return 4 * self.layers * sum(r * sum(self.shapes[module]) for module in modules)

    def write(self, folder, modules, r, seed):
        if (folder / "adapter_config.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(seed)
        header, data = {}, bytearray()
        for layer in range(self.layers):
            for module in modules:
                block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                inputs, outputs = self.shapes[module]
                for name, shape in (("lora_A", (r, inputs)), ("lora_B", (outputs, r))):
                    count = shape[0] * shape[1]
                    start = rng.randrange(len(self.numbers) - count)
                    piece = self.numbers[start : start + count].tobytes()
                    key = f"base_model.model.model.layers.{layer}.{block}.{module}.{name}.weight"
                    header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(piece)]}
                    data += piece
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0,
            "target_modules": modules, "bias": "none", "inference_mode": True, "base_model_name_or_path": None,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))


class Server:
    def __init__(self, lowrank, model, *arguments):
        self.lowrank = lowrank
        command = [lowrank, "serve", "--model", model, "--served-model-name", "base", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.url = None
        for line in self.process.stderr:
            found = re.search(r" at (http://\S+)", line)
            if found:
                self.url = found[1]
                break
        if self.url is None:
            sys.exit("bench_serve: the server did not start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def call(self, path, body=None, data=None, kind="application/json"):
        data = json.dumps(body).encode() if body is not None else data
        request = urllib.request.Request(self.url + path, data=data, headers={"content-type": kind})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            sys.exit(f"bench_serve: {path}: {error.read().decode()}")
        return json.loads(text) if text.startswith("{") else text

    def bench(self, *arguments):
        command = [self.lowrank, "bench", "serve", "--json", "--url", self.url, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"bench_serve: {' '.join(command)}: {done.stderr}")
        measured = json.loads(done.stdout)
        if measured["failed"]:
            sys.exit(f"bench_serve: requests failed: {measured['errors']}")
        return measured

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


def speed(measured):
    return measured["output_tokens_per_second"]


def first(measured):
    return measured["time_to_first_token"]["p50"]


def gap(measured):
    return measured["inter_token"]["p99"]


class Table:
    def __init__(self):
        self.rows = []

    def add(self, what, aim, ratios, detail=""):
        row = {"what": what, "aim": aim, "median": statistics.median(ratios), "rounds": ratios, "detail": detail}
        self.rows.append(row)
        rounds = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {what} | {aim} | {row['median']:.3f} | {detail} | {rounds} |", flush=True)


def medians(runs, figure):
    return " against ".join(f"{statistics.median(figure(run) for run in column):.0f}" for column in zip(*runs))


TRAFFIC = ("--concurrency", 8, "--requests", 64, "--prompt-tokens", 32, "--max-tokens", 64)


def many(table, server, rounds, _):
    # Each of the adapters that will be asked for is loaded before, as on a server that has run for a while.
    zipf = ("--model", "a{N}", "--models", 1000, "--zipf", 1, *TRAFFIC)
    server.bench(*zipf)
    runs = [(server.bench(*zipf), server.bench("--model", "a0", *TRAFFIC)) for _ in range(rounds)]
    table.add("1,000 adapters, tokens/s", "≥ 0.97", [speed(z) / speed(one) for z, one in runs], medians(runs, speed) + " tokens/s")
    table.add("1,000 adapters, first token", "≤ 1.1", [first(z) / first(one) for z, one in runs], medians(runs, first) + " ms")


def allowed(adapters, modules, r):
    own = adapters.bytes(modules, r)
    return (adapters.base_bytes + own) / (adapters.base_bytes + 8 * own)


def eight(table, server, rounds, adapters):
    for letter, modules, r, name in (("a", QV, 4, "q,v r 4"), ("b", LINEAR, 8, "all-linear r 8")):
        share = allowed(adapters, modules, r)
        runs = [
            (server.bench("--model", letter + "{N}", "--models", 8, *TRAFFIC), server.bench("--model", f"{letter}0", *TRAFFIC))
            for _ in range(rounds)
        ]
        ratios = [speed(different) / speed(same) / share for different, same in runs]
        table.add(f"8 different, {name}, of what the bytes allow ({share:.2f})", "≥ 0.95", ratios, medians(runs, speed) + " tokens/s")


def base(table, server, rounds, bare):
    runs = [(server.bench("--model", "base", *TRAFFIC), bare.bench("--model", "base", *TRAFFIC)) for _ in range(rounds)]
    table.add("base with 1,000 adapters", "≥ 0.99", [speed(m) / speed(b) for m, b in runs], medians(runs, speed) + " tokens/s")


def first_token(server, prompt):
    body = {"model": "base", "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    begun, seconds, cached = time.perf_counter(), None, 0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if seconds is None and event["choices"]:
                seconds = time.perf_counter() - begun
            if event.get("usage"):
                cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    return 1e3 * seconds, cached


def prefix(table, server, rounds, _):
    rng = random.Random(time.time_ns())
    runs, cached = [], 0
    for _ in range(rounds):
        shared = [rng.randrange(10, 2000) for _ in range(1024)]
        own = [[rng.randrange(10, 2000) for _ in range(16)] for _ in range(2)]
        cold, _ = first_token(server, shared + own[0])
        warm, cached = first_token(server, shared + own[1])
        runs.append((warm, cold))
    detail = medians(runs, lambda ms: ms) + f" ms; {cached} of 1,040 cached"
    table.add("second request with a prefix of 1,024", "≤ 0.15", [warm / cold for warm, cold in runs], detail)


def changes(table, server, rounds, work):
    """Every 250 ms an adapter is loaded, swapped for another of the same name, or unloaded."""
    def change(stop, count):
        while not stop.is_set():
            for path, body in (
                ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(work / "a900")}),
                ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(work / "a901"), "load_inplace": True}),
                ("/v1/unload_lora_adapter", {"lora_name": "x"}),
            ):
                server.call(path, body)
                count.append(1)
                if stop.wait(0.25):
                    break
            else:
                continue
            if path.endswith("/load_lora_adapter"):
                server.call("/v1/unload_lora_adapter", {"lora_name": "x"})

    traffic = ("--model", "a{N}", "--models", 8, *TRAFFIC)
    runs, count = [], []
    for _ in range(rounds):
        stop = threading.Event()
        thread = threading.Thread(target=change, args=(stop, count))
        thread.start()
        changed = server.bench(*traffic)
        stop.set()
        thread.join()
        runs.append((changed, server.bench(*traffic)))
    detail = f"{medians(runs, gap)} ms p99 between tokens; {len(count)} changes, no failed request"
    table.add("loads, swaps, unloads under traffic", "≤ 1.2", [gap(changed) / gap(still) for changed, still in runs], detail)
    table.add("the same, tokens/s", "", [speed(changed) / speed(still) for changed, still in runs], medians(runs, speed))


def cpu_seconds(pid):
    """Of each thread of a process, by the threads' names; on Linux alone."""
    seconds = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name, fields = re.search(r"\((.*)\) (.*)", (task / "stat").read_text()).groups()
        user, system = map(int, fields.split()[11:13])
        seconds[name] = seconds.get(name, 0) + (user + system) / os.sysconf("SC_CLK_TCK")
    return seconds


def http(table, server, rounds, model):
    """The client is on the same cores, so the times of both sides are beside what the server's own threads take that do not compute."""
    runs, shares = [], []
    for _ in range(rounds):
        before = cpu_seconds(server.process.pid)
        over = server.bench(
            "--model", "base", "--concurrency", 8, "--requests", 8, "--prompt-tokens", 64, "--max-tokens", 256, "--warmup", 0
        )
        spent = {name: max(0, now - before.get(name, 0)) for name, now in cpu_seconds(server.process.pid).items()}
        compute = sum(time for name, time in spent.items() if name.startswith("compute"))
        shares.append(sum(spent.values()) / compute - 1)
        command = [server.lowrank, "bench", "generate", "--json", "--model", model, "--batch-size", "8", "--new-tokens", "256"]
        inside = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        # The time between tokens leaves the prompts out on both sides.
        runs.append((8e3 / over["inter_token"]["p50"], inside["batches"][-1]["tokens_per_second"]))
    table.add("CPU time of HTTP and scheduling over that of computing", "≤ 0.02", shares)
    detail = medians(runs, lambda value: value) + " tokens/s, the client on the same cores"
    table.add("8 long answers over HTTP against in-process", "≥ 0.98", [over / inside for over, inside in runs], detail)


def upload(server, rows):
    edge = "bench-serve-edge"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    data = (
        f'--{edge}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        f'--{edge}\r\ncontent-disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n{text}\r\n--{edge}--\r\n'
    ).encode()
    return server.call("/v1/files", data=data, kind=f"multipart/form-data; boundary={edge}")["id"]


def trained(server):
    """Tokens that jobs have trained on."""
    found = re.search(r"^lowrank_train_tokens_total (\d+)", server.call("/metrics"), re.MULTILINE)
    return int(found[1]) if found else 0


def training(table, server, rounds, _):
    """A client asks for an answer of half a second every 2.5 seconds; it is told how fast its tokens come, and the job how much it trains all the while."""
    words = [f"word{n}" for n in range(40)]
    rng = random.Random(3)
    rows = [{"prompt": " ".join(rng.choices(words, k=24)), "completion": " " + " ".join(rng.choices(words, k=24))} for _ in range(512)]
    file = upload(server, rows)
    traffic = ("--model", "a0", "--concurrency", 4, "--rate", 0.4, "--requests", 12, "--prompt-tokens", 32, "--max-tokens", 64, "--warmup", 1)
    gaps, means, speeds, paired = [], [], [], []

    def pace(work):
        begun, before = time.monotonic(), trained(server)
        result = work()
        return (trained(server) - before) / (time.monotonic() - begun), result

    for _ in range(rounds):
        still = server.bench(*traffic)
        own = {"max_steps": 100000, "r": 4, "batch_size": 4, "target_modules": QV}
        before = trained(server)
        job = server.call("/v1/fine_tuning/jobs", {"model": "base", "training_file": file, "suffix": "bench", "lowrank": own})["id"]
        while trained(server) == before:
            time.sleep(0.2)
        alone, _ = pace(lambda: time.sleep(30))
        beside, busy = pace(lambda: server.bench(*traffic))
        server.call(f"/v1/fine_tuning/jobs/{job}/cancel", {})
        gaps.append(gap(busy) / gap(still))
        means.append(busy["inter_token"]["mean"] / still["inter_token"]["mean"])
        speeds.append(beside / alone)
        paired.append((busy, still))
    table.add("a job beside traffic, between tokens p99", "≤ 1.5", gaps, medians(paired, gap) + " ms")
    table.add("the same, between tokens mean", "≤ 1.5", means, medians(paired, lambda run: run["inter_token"]["mean"]) + " ms")
    table.add("the job's tokens a second", "≥ 0.75", speeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", required=True, type=Path)
    parser.add_argument("--model", required=True, type=Path, help="a Llama in the Hugging Face layout, in one file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    work = (options.work or Path(tempfile.mkdtemp())).resolve()
    folder = work / "adapters"
    adapters = Adapters(options.model)
    for n in range(1000):
        adapters.write(folder / f"a{n}", QV, 4, n)
    for n in range(8):
        adapters.write(folder / f"b{n}", LINEAR, 8, 1000 + n)
    # What servers before have left: their jobs, and the names that they knew.
    shutil.rmtree(folder / ".lowrank-serve", ignore_errors=True)
    (folder / ".lowrank-registry.json").unlink(missing_ok=True)
    table = Table()
    print("| what | aim | median | figures | rounds |\n| --- | --- | --- | --- | --- |", flush=True)
    server = Server(options.lowrank, options.model, "--adapter-dir", folder, "--adapter-memory", "2GiB")
    bare = None
    try:
        for n in range(1000):
            server.call("/v1/load_lora_adapter", {"lora_name": f"a{n}", "lora_path": str(folder / f"a{n}")})
        for part in parts:
            if part == "base" and bare is None:
                bare = Server(options.lowrank, options.model)
            call, extra = {
                "many": (many, None), "bytes": (eight, adapters), "base": (base, bare), "prefix": (prefix, None),
                "changes": (changes, folder), "http": (http, options.model), "training": (training, None),
            }[part]  # fmt: skip
            call(table, server, options.rounds, extra)
    finally:
        for running in (server, bare):
            if running:
                running.stop()
        if options.json:
            options.json.write_text(json.dumps(table.rows, indent=1))
        if not options.work:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
