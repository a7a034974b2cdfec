#!/usr/bin/env python3
"""Asks a `lowrank serve` thousands of things at once, rightly and wrongly, and fails where an answer is not what it is alone.

    scripts/soak_serve.py --lowrank target/release/lowrank [--model MODEL_FOLDER] [--requests 10000] [--seed 1]

The script starts a server of the model (the built-in one where none is given) with random adapters, and asks each of its questions once, alone: text, token
log-probabilities and reason to end are the reference. Then so many requests are sent by 16 clients. 10 % are dropped by the client
while they are answered, 5 % have bodies that no server should take; meanwhile adapters are loaded, swapped and unloaded, also those that are being asked
for, which are then found again in their folder. In the end:

- every answer equals its reference, bit for bit, and none is missing;
- what was wrong was answered with a status from 400 to 499, or, where the body never came, not at all;
- the server has nothing running and nothing waiting;
- its memory at the end is within 10 % of what it was after a quarter of the requests, where these were at least 5,000.

Exit status: 0 if all holds, 1 if not.
"""

import argparse
import http.client
import json
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path

from bench_serve import LINEAR, QV, Adapters, Server

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = 16
CLIENTS = 16


def questions(rng, count, vocabulary):
    """Requests whose answers depend on nothing but themselves."""
    shared = [[rng.randrange(10, vocabulary) for _ in range(140)] for _ in range(4)]
    for _ in range(count):
        prompt = [rng.randrange(10, vocabulary) for _ in range(rng.randrange(1, 120))]
        if rng.random() < 0.4:
            prompt = rng.choice(shared) + prompt
        body = {
            "model": rng.choice(["base"] + [f"a{n}" for n in range(ADAPTERS)]),
            "prompt": prompt,
            "max_tokens": rng.randrange(1, 40),
            "temperature": rng.choice([0, 0.8, 1.3]),
            "seed": rng.randrange(1 << 30),
            "logprobs": rng.choice([0, 2]),
            "stream": rng.random() < 0.5,
        }
        if rng.random() < 0.2:
            body["repetition_penalty"] = 1.2
        if rng.random() < 0.2:
            body["top_k"] = 20
        yield body


def hostile(rng):
    """Bodies that must be refused: raw bytes."""
    good = {"model": "base", "prompt": "a", "max_tokens": 2}
    kind = rng.randrange(9)
    if kind == 0:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    if kind == 1:
        return json.dumps(good)[: rng.randrange(1, 30)].encode()
    if kind == 2:
        return b"[" * rng.randrange(1, 100000)
    if kind == 3:
        key = rng.choice(["max_tokens", "temperature", "n", "seed", "logprobs", "stop", "prompt", "model", "stream"])
        bad = rng.choice([-1, 1e300, {}, {"a": []}, [[[]]], "x" * 10, -(2**70)])
        if key in ("stop", "prompt", "model") and isinstance(bad, str):
            bad = {}
        if key == "seed" and bad == -1:
            bad = {}
        return json.dumps({**good, key: bad}).encode()
    if kind == 4:
        return json.dumps({**good, "no_such_field": 1}).encode()
    if kind == 5:
        return json.dumps({**good, "prompt": [rng.choice([-1, 10**9, 2**40])]}).encode()
    if kind == 6:
        return json.dumps({**good, "model": rng.choice(["nobody", "../a0", "a0/../a1", "\x00", "a" * 5000])}).encode()
    if kind == 7:
        return b'{"model": "base", "prompt": "\xff\xfe"}'
    return json.dumps({**good, "prompt": [5] * 100000}).encode()


class Client:
    def __init__(self, url):
        parts = urllib.parse.urlsplit(url)
        self.address = (parts.hostname, parts.port)
        self.connection = None

    def post(self, body):
        if self.connection is None:
            self.connection = http.client.HTTPConnection(*self.address, timeout=300)
        try:
            self.connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            return self.connection.getresponse()
        except OSError:
            self.connection.close()
            self.connection = None
            raise

    def answer(self, question):
        response = self.post(json.dumps(question))
        data = response.read().decode()
        if response.status != 200:
            return f"{response.status}: {data}"
        if not question["stream"]:
            choice = json.loads(data)["choices"][0]
            return choice["text"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        text, logprobs, reason = "", [], None
        if not data.rstrip().endswith("data: [DONE]"):
            return "the stream broke off"
        for line in data.splitlines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return json.dumps(event)
                choice = event["choices"][0]
                text += choice["text"]
                if choice.get("logprobs"):
                    logprobs += choice["logprobs"]["token_logprobs"]
                reason = choice["finish_reason"] or reason
        return text, logprobs, reason

    def drop(self, question, rng):
        """Sends a request and goes away, at once or after some of the answer."""
        body = json.dumps({**question, "stream": True, "max_tokens": 200}).encode()
        with socket.create_connection(self.address, timeout=300) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode())
            if rng.random() < 0.2:
                connection.sendall(body[: len(body) // 2])
                return
            connection.sendall(body)
            if rng.random() < 0.7:
                connection.recv(rng.randrange(1, 3000))


class Soak:
    def __init__(self, server, folder, options):
        self.server, self.folder = server, folder
        self.rng = random.Random(options.seed)
        self.count = options.requests
        self.next = 0
        self.lock = threading.Lock()
        self.counts, self.wrong, self.memory = Counter(), [], {}
        self.questions = list(questions(self.rng, 300, options.vocabulary))
        alone = Client(server.url)
        self.references = [alone.answer(question) for question in self.questions]
        for reference in self.references:
            if isinstance(reference, str):
                sys.exit(f"soak_serve: a question is refused: {reference}")

    def take(self):
        with self.lock:
            index = self.next
            self.next += 1
            if index in (self.count // 4, self.count // 2, 3 * self.count // 4):
                self.memory[index] = resident(self.server)
            return index

    def client(self):
        client = Client(self.server.url)
        while (index := self.take()) < self.count:
            rng = random.Random(index)
            which = rng.randrange(len(self.questions))
            question, kind = self.questions[which], rng.random()
            try:
                if kind < 0.1:
                    client.drop(question, rng)
                    self.note("dropped")
                elif kind < 0.15:
                    body = hostile(rng)
                    response = client.post(body)
                    text = response.read()
                    self.note("refused")
                    if not 400 <= response.status < 500:
                        self.note("wrong", f"{body[:200]!r} was answered with {response.status}: {text[:200]!r}")
                else:
                    found = client.answer(question)
                    self.note("answered")
                    if found != self.references[which]:
                        self.note("wrong", f"{question} has {found}, alone {self.references[which]}")
            except Exception as error:
                self.note("wrong", f"request {index}: {type(error).__name__}: {error}")

    def note(self, what, detail=None):
        with self.lock:
            self.counts[what] += 1
            if detail:
                self.wrong.append(detail)

    def change(self, stop):
        """Loads, swaps and unloads; what is being asked for, too."""
        rng = random.Random(5)
        client = Client(self.server.url)
        while not stop.is_set():
            path = lambda n: str(self.folder / f"a{n}")
            one, other = rng.sample(range(ADAPTERS), 2)
            for route, body, statuses in (
                ("load", {"lora_name": "x", "lora_path": path(one)}, (200,)),
                ("load", {"lora_name": "x", "lora_path": path(other), "load_inplace": True}, (200,)),
                ("unload", {"lora_name": "x"}, (200,)),
                ("unload", {"lora_name": f"a{one}"}, (200, 404)),
                ("load", {"lora_name": "y", "lora_path": str(self.folder / "nowhere")}, (400, 404)),
            ):
                connection = http.client.HTTPConnection(*client.address, timeout=300)
                connection.request("POST", f"/v1/{route}_lora_adapter", json.dumps(body), {"content-type": "application/json"})
                response = connection.getresponse()
                text = response.read()
                connection.close()
                self.note("changes")
                if response.status not in statuses:
                    self.note("wrong", f"{route} {body}: {response.status}: {text[:300]!r}")
                time.sleep(0.02)

    def run(self):
        stop = threading.Event()
        changes = threading.Thread(target=self.change, args=(stop,))
        clients = [threading.Thread(target=self.client) for _ in range(CLIENTS)]
        begun = time.monotonic()
        for thread in [changes, *clients]:
            thread.start()
        for thread in clients:
            thread.join()
        stop.set()
        changes.join()
        return time.monotonic() - begun


def resident(server):
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def idle(server):
    """Whether nothing runs and nothing waits, at most a few seconds later."""
    for _ in range(50):
        text = server.call("/metrics")
        lines = [line.split() for line in text.splitlines() if line.startswith("vllm:num_requests_")]
        if lines and all(float(value) == 0 for _, value in lines):
            return True
        time.sleep(0.1)
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", required=True, type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "crates/lowrank/builtin")
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    folder = Path(tempfile.mkdtemp()).resolve()
    adapters = Adapters(options.model)
    for n in range(ADAPTERS):
        adapters.write(folder / f"a{n}", *((QV, 4) if n % 2 else (LINEAR, 8)), n)
    small = sum(adapters.bytes(QV, 4) for _ in range(6))
    server = Server(options.lowrank, options.model, "--adapter-dir", folder, "--adapter-memory", small, "--max-waiting", 1000)
    try:
        soak = Soak(server, folder, options)
        seconds = soak.run()
        soak.memory[options.requests] = resident(server)
        counts = ", ".join(f"{soak.counts[what]} {what}" for what in ("answered", "dropped", "refused", "changes", "wrong"))
        print(f"{options.requests} requests in {seconds:.0f} s: {counts}")
        print("resident after so many requests:", ", ".join(f"{n}: {bytes / 1e6:.1f} MB" for n, bytes in soak.memory.items()))
        for detail in soak.wrong[:10]:
            print(f"wrong: {detail[:2000]}")
        failed = bool(soak.wrong)
        if server.process.poll() is not None:
            sys.exit("soak_serve: the server is gone")
        if not idle(server):
            failed, _ = True, print("wrong: something still runs or waits")
        if options.requests >= 5000 and soak.memory[options.requests] > 1.1 * soak.memory[options.requests // 4]:
            failed, _ = True, print("wrong: the memory has grown")
        sys.exit(int(failed))
    finally:
        server.stop()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
