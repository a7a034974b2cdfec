#!/usr/bin/env python3
"""Measures `lowrank serve` beside llama-cpp-python's server, on the same weights and the same adapter.

    pip install 'llama-cpp-python[server]' gguf numpy safetensors ml_dtypes
    scripts/bench_serve_peers.py --lowrank target/release/lowrank --model models/smollm2 [--rounds 5] [--requests 16]

The model, a Llama with a byte-level tokenizer, and a random adapter (q and v, r 4) are written as GGUF with the numbers that `lowrank serve` has: bf16 for
matrices, f32 for the adapter. Both servers run at once and are asked in turn, by `lowrank bench serve`, with prompts of 32 words and answers of 64
tokens. llama-cpp-python's answers one request at a time and knows one adapter, so eight adapters are measured for lowrank alone, against its peer's one.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors import safe_open

from bench_serve import QV, Adapters, Server
from goldens_gguf import finish, permute

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def heads_of(name, config):
    """How many heads the rows of a weight are of, where llama.cpp has them in another order."""
    if "q_proj" in name:
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if "k_proj" in name else 0


def tensors(path):
    with safe_open(path, "np") as file:
        for name in file.keys():
            yield name, np.asarray(file.get_tensor(name)).astype(np.float32)


def write_model(folder, path):
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    words = {id: word for word, id in tokenizer["model"]["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    kind = lambda id: gguf.TokenType.CONTROL if id in added else gguf.TokenType.NORMAL if id in words else gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([words.get(id, f"[PAD{id}]") for id in range(config["vocab_size"])])
    writer.add_token_types([kind(id) for id in range(config["vocab_size"])])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    for name, values in tensors(folder / "model.safetensors"):
        if heads := heads_of(name, config):
            values = permute(values, heads)
        stem = name.removeprefix("model.").removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            to = f"blk.{layer}.{NAMES[part]}.weight"
        else:
            to = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem] + ".weight"
        if values.ndim == 1:
            writer.add_tensor(to, values)
        else:
            rounded = values.astype(ml_dtypes.bfloat16).view(np.uint8)
            writer.add_tensor(to, rounded, raw_dtype=gguf.GGMLQuantizationType.BF16)
    finish(writer)


def write_adapter(folder, config, path):
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for name, values in tensors(folder / "adapter_model.safetensors"):
        heads = heads_of(name, config)
        if "lora_B" in name and heads:
            values = permute(values, heads)
        _, layer, part, module, which, _ = name.removeprefix("base_model.model.model.").split(".")
        writer.add_tensor(f"blk.{layer}.{NAMES[f'{part}.{module}']}.weight.{which.lower()}", values)
    finish(writer)


class Peer:
    """llama-cpp-python's server."""

    def __init__(self, model, adapter, lowrank):
        self.lowrank = lowrank
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        threads = str(os.cpu_count())
        command = [
            sys.executable, "-m", "llama_cpp.server", "--model", model, "--port", port, "--n_threads", threads, "--n_threads_batch", threads,
            "--interrupt_requests", "false", "--verbose", "false", "--n_ctx", 2048,
        ]  # fmt: skip
        if adapter:
            command += ["--lora_path", adapter]
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                urllib.request.urlopen(self.url + "/v1/models", timeout=5).read()
                return
            except OSError:
                time.sleep(0.2)
        sys.exit("bench_serve_peers: llama-cpp-python's server did not start")

    bench = Server.bench
    stop = Server.stop


def answer(server, model, **more):
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0, **more}
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=60).read())["choices"][0]["text"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", required=True, type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    options = parser.parse_args()
    config = json.loads((options.model / "config.json").read_text())
    adapters = Adapters(options.model)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work).resolve()
        for n in range(8):
            adapters.write(work / "adapters" / f"a{n}", QV, 4, n)
        write_model(options.model, work / "model.gguf")
        write_adapter(work / "adapters" / "a0", config, work / "a0.gguf")
        servers = []
        try:
            ours = Server(options.lowrank, options.model, "--adapter-dir", work / "adapters")
            servers.append(ours)
            bare = Peer(work / "model.gguf", None, options.lowrank)
            servers.append(bare)
            adapted = Peer(work / "model.gguf", work / "a0.gguf", options.lowrank)
            servers.append(adapted)
            for model, peer in (("base", bare), ("a0", adapted)):
                own, other = answer(ours, model), answer(peer, "x", repeat_penalty=1.0)
                if own != other:
                    sys.exit(f"bench_serve_peers: {model} says {own!r}, and its peer {other!r}")
            print("| what | lowrank tokens/s | llama-cpp-python | ratio | first token ms |\n| --- | --- | --- | --- | --- |")
            for what, model, peer, concurrency in (
                ("base, 1 client", "base", bare, 1), ("one adapter, 1 client", "a0", adapted, 1),
                ("one adapter, 8 clients", "a0", adapted, 8), ("8 adapters, 8 clients (the peer: one)", "a{N}", adapted, 8),
            ):  # fmt: skip
                work_of = ("--words", "--models", 8, "--concurrency", concurrency, "--requests", options.requests, "--prompt-tokens", 32,
                           "--max-tokens", 64, "--warmup", 1)  # fmt: skip
                runs = [(ours.bench("--model", model, *work_of), peer.bench("--model", "x", *work_of)) for _ in range(options.rounds)]
                speed = lambda run: run["output_tokens_per_second"]
                ratio = statistics.median(speed(own) / speed(other) for own, other in runs)
                own, other = (statistics.median(map(speed, column)) for column in zip(*runs))
                firsts = [statistics.median(run["time_to_first_token"]["p50"] for run in column) for column in zip(*runs)]
                print(f"| {what} | {own:.1f} | {other:.1f} | {ratio:.2f} | {firsts[0]:.0f} and {firsts[1]:.0f} |", flush=True)
        finally:
            for server in servers:
                server.stop()


if __name__ == "__main__":
    main()
