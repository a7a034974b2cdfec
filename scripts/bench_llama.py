#!/usr/bin/env python3
"""Generating by lowrank beside llama.cpp, in turn, on this machine.

    pip install cmake ninja scikit-build-core gguf numpy diskcache jinja2
    pip install --no-build-isolation llama-cpp-python
    python convert_hf_to_gguf.py models/smollm2 --outtype bf16 --outfile smollm2.gguf      # of llama.cpp
    python scripts/bench_llama.py --lowrank target/release/lowrank --model models/smollm2 --gguf smollm2.gguf

The GGUF file must have the numbers of the model in the format that lowrank holds them in: bf16, unless `--base-dtype` says f32. Both continue
prompts of random tokens greedily, one alone and then several together, with one thread a core. Printed are new tokens a second of the median
pass, tokens of prompts a second, and ours over theirs. llama.cpp keeps its cache of keys and values as f16, its default; lowrank's is f32.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--gguf", required=True, type=Path)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama-cpp-python and numpy [this one]")
    parser.add_argument("--base-dtype", default="bf16", choices=["bf16", "f32"])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer", type=int, metavar="PROMPTS", help=argparse.SUPPRESS)
    return parser.parse_args()


def of_peer(args, prompts):
    """What llama.cpp makes of so many prompts, in this process: prompt tokens and new tokens a second."""
    import numpy as np
    from llama_cpp import llama_cpp as api

    api.llama_backend_init()
    model_params = api.llama_model_default_params()
    model = api.llama_model_load_from_file(str(args.gguf).encode(), model_params)
    if not model:
        sys.exit(f"{args.gguf} cannot be loaded")
    total = prompts * args.prompt_tokens
    params = api.llama_context_default_params()
    params.n_ctx = prompts * (args.prompt_tokens + args.new_tokens + 8)
    params.n_batch = max(total, 512)
    params.n_seq_max = prompts
    params.n_threads = params.n_threads_batch = args.threads
    context = api.llama_init_from_model(model, params)
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    rng = random.Random(1)
    batch = api.llama_batch_init(params.n_batch, 0, 1)

    def put(at, token, position, sequence, scored):
        batch.token[at], batch.pos[at] = token, position
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        batch.logits[at] = scored

    def decode(count):
        batch.n_tokens = count
        if api.llama_decode(context, batch) != 0:
            sys.exit("llama_decode failed")

    def best(at):
        logits = api.llama_get_logits_ith(context, at)
        return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    def run(new_tokens):
        """Seconds of the prompts, and of each pass."""
        api.llama_memory_clear(api.llama_get_memory(context), True)
        last = {}
        for sequence in range(prompts):
            for position in range(args.prompt_tokens):
                at = sequence * args.prompt_tokens + position
                put(at, rng.randrange(vocabulary), position, sequence, position + 1 == args.prompt_tokens)
            last[sequence] = at
        begun = time.perf_counter()
        decode(total)
        tokens = [best(last[sequence]) for sequence in range(prompts)]
        prefill, passes = time.perf_counter() - begun, []
        for step in range(new_tokens - 1):
            begun = time.perf_counter()
            for sequence, token in enumerate(tokens):
                put(sequence, token, args.prompt_tokens + step, sequence, True)
            decode(prompts)
            tokens = [best(sequence) for sequence in range(prompts)]
            passes.append(time.perf_counter() - begun)
        return prefill, passes

    run(2)
    prefill, passes = run(args.new_tokens)
    return {"prefill": total / prefill, "tokens": prompts / statistics.median(passes)}


def of_ours(args, prompts):
    command = [
        args.lowrank.resolve(), "bench", "generate", "--model", args.model, "--batch-size", prompts, "--base-dtype", args.base_dtype,
        "--prompt-tokens", args.prompt_tokens, "--new-tokens", args.new_tokens, "--threads", args.threads, "--json",
    ]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout)["batches"][-1]
    return {"prefill": figures["prefill_tokens_per_second"], "tokens": figures["tokens_per_second"]}


def main():
    args = parse_arguments()
    if args.peer:
        print(json.dumps(of_peer(args, args.peer)))
        return
    if not args.lowrank or not args.model:
        sys.exit("--lowrank and --model are needed")
    print("| Prompts | New tokens/s: ours, theirs | ours over theirs: min, median, max | Prompt tokens/s: ours, theirs | ours over theirs: median |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for prompts in args.batch_sizes:
        ours, theirs = [], []
        for _ in range(args.pairs):
            ours.append(of_ours(args, prompts))
            command = [args.peer_python, __file__, "--gguf", args.gguf, "--prompt-tokens", args.prompt_tokens, "--new-tokens", args.new_tokens,
                       "--threads", args.threads, "--peer", prompts]
            done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
            theirs.append(json.loads(done.stdout.splitlines()[-1]))
        of = lambda side, what: statistics.median(run[what] for run in side)
        ratios = {what: [a[what] / b[what] for a, b in zip(ours, theirs)] for what in ("tokens", "prefill")}
        spread = ratios["tokens"]
        print(f"| {prompts} | {of(ours, 'tokens'):.0f}, {of(theirs, 'tokens'):.0f} "
              f"| {min(spread):.2f} / {statistics.median(spread):.2f} / {max(spread):.2f} "
              f"| {of(ours, 'prefill'):.0f}, {of(theirs, 'prefill'):.0f} | {statistics.median(ratios['prefill']):.2f} |", flush=True)


if __name__ == "__main__":
    main()
