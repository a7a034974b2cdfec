#!/usr/bin/env python3
"""Checks exported adapters and models with the programs that they are for.

    python3 scripts/check_adapter_travel.py --lowrank target/release/lowrank --model model.gguf --adapter runs/mine \
        --data rows.jsonl --work travel

`--model` is a GGUF file, `--adapter` a LoRA of it that `lowrank train` wrote, `--data` JSON Lines of prompt and completion. It needs llama-cpp-python, gguf, torch,
PEFT and safetensors. What is compared:

- llama.cpp with `--lora`: greedy texts of 32 prompts, and the loss of their completions, beside what both programs make of the model alone;
- the file's tensors with those that llama.cpp's own rules give (rows of q and k interleaved);
- round trips PEFT -> gguf, mlx, loralib -> PEFT: the largest difference of B A times its scale;
- mlx-lm's files, read with safetensors and multiplied as mlx-lm does.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys

import numpy as np


def lowrank(args, *words):
    """Runs the program; what comes of it is what it printed."""
    done = subprocess.run([args.lowrank, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"lowrank {' '.join(map(str, words))}: {done.returncode}\n{done.stderr}")
    return done.stdout


def log_softmax(row):
    row = row.astype(np.float64)
    row -= row.max()
    return row - np.log(np.exp(row).sum())


class Llama:
    """llama.cpp with a model and, perhaps, an adapter."""

    def __init__(self, model, lora=None):
        from llama_cpp import Llama as Inner

        self.inner = Inner(model_path=model, lora_path=lora, n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2)

    def ids(self, text):
        return self.inner.tokenize(text.encode(), add_bos=False, special=True)

    def loss(self, prompt, completion):
        """Sum of the completion's losses, and its tokens."""
        before, after = self.ids(prompt), self.ids(completion) + [self.inner.token_eos()]
        self.inner.reset()
        self.inner.eval(before + after)
        rows = self.inner.scores[len(before) - 1 : len(before) + len(after) - 1]
        return -sum(log_softmax(row)[id] for row, id in zip(rows, after)), len(after)

    def greedy(self, prompt, count):
        """The greedy tokens, and how far each was ahead of the next best."""
        ids = self.ids(prompt)
        self.inner.reset()
        self.inner.eval(ids)
        ends = {self.inner.token_eos(), self.inner.token_bos()}
        made, gaps = [], []
        for _ in range(count):
            row = self.inner.scores[self.inner.n_tokens - 1]
            best, second = np.sort(row)[-1], np.sort(row)[-2]
            id = int(row.argmax())
            if id in ends:
                break
            made.append(id)
            gaps.append(float(best - second))
            self.inner.eval([id])
        return self.inner.detokenize(made).decode("utf-8", "replace"), gaps


def rows_of(args):
    with open(args.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: args.prompts]
    path = os.path.join(args.work, "rows.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return rows, path


def ours(args, rows, adapter, exact, model=None, wide=False):
    """Our greedy texts and losses; `wide` keeps f32 weights as they are."""
    dtype = ["--base-dtype", "f32"] if wide else []
    words = ["generate", "--model", model or args.model, "--data", rows, "--temperature", 0, "--max-new-tokens", args.tokens, "--json"]
    words += ["--adapter", adapter] if adapter else []
    words += (["--exact"] if exact else []) + dtype
    out = json.loads(lowrank(args, *words))
    texts = [made["text"] for made in out["generations"]]
    words = ["eval", "--model", model or args.model, "--data", rows, "--json"]
    words += (["--adapter", adapter] if adapter else []) + dtype
    return texts, json.loads(lowrank(args, *words))["loss"]


def compare(args, name, texts, loss, rows, llama):
    """Prints how llama.cpp differs."""
    total, count, same, gaps = 0.0, 0, 0, []
    for row, text in zip(rows, texts):
        sum_, tokens = llama.loss(row["prompt"], row["completion"])
        total, count = total + sum_, count + tokens
        theirs, ahead = llama.greedy(row["prompt"], args.tokens)
        if theirs.strip() == text.strip():
            same += 1
            continue
        # How close a call it was where the two part.
        common = os.path.commonprefix([theirs, text])
        gaps.append(min(ahead[max(0, len(llama.ids(common)) - 2) : len(llama.ids(common)) + 2], default=float("nan")))
    close = f", least lead where they part {', '.join(f'{gap:.3f}' for gap in gaps)}" if gaps else ""
    print(f"{name}: {same} of {len(rows)} greedy texts equal{close}; loss {loss:.5f} here, {total / count:.5f} with llama.cpp")
    return same, total / count


def delta(folder):
    """Each module's update of a PEFT folder."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(folder)
    tensors = load_file(os.path.join(folder, "adapter_model.safetensors"))
    import re

    def of(pattern, name, usual):
        for key, value in pattern.items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return usual

    deltas = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        stem = key[: -len(".lora_A.weight")]
        name = stem.removeprefix("base_model.model.")
        r, alpha = of(config.rank_pattern, name, config.r), of(config.alpha_pattern, name, config.lora_alpha)
        scale = alpha / (r**0.5 if config.use_rslora else r)
        deltas[name] = scale * tensors[stem + ".lora_B.weight"].double() @ tensors[key].double()
    return deltas


def largest(one, other):
    if one.keys() != other.keys():
        sys.exit(f"modules differ: {sorted(one.keys() ^ other.keys())[:5]}")
    scale = max(float(d.abs().max()) for d in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale


def round_trips(args):
    here = delta(args.adapter)
    for to in ["gguf", "mlx", "loralib", "peft"]:
        out = os.path.join(args.work, {"gguf": "mine.gguf", "loralib": "mine.safetensors"}.get(to, to))
        back = os.path.join(args.work, f"back-{to}")
        lowrank(args, "adapter", "export", args.adapter, "--to", to, "--output", out, "--model", args.model, "--overwrite")
        lowrank(args, "adapter", "import", out, "--output", back, "--model", args.model, "--overwrite")
        print(f"PEFT -> {to} -> PEFT: largest difference of an update {largest(here, delta(back)):.1e} of the largest value")
    mlx(args, here)
    return os.path.join(args.work, "mine.gguf")


def mlx(args, here):
    """y = x W' + scale (x a) b, as mlx-lm's LoRALinear."""
    from safetensors.torch import load_file

    folder = os.path.join(args.work, "mlx")
    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
        scale = json.load(file)["lora_parameters"]["scale"]
    tensors = load_file(os.path.join(folder, "adapters.safetensors"))
    there = {}
    for key in tensors:
        if key.endswith(".lora_a"):
            stem = key[: -len(".lora_a")]
            there[stem] = scale * (tensors[key].double() @ tensors[stem + ".lora_b"].double()).T
    print(f"mlx-lm's files: largest difference of an update {largest(here, there):.1e} of the largest value")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", default="target/release/lowrank")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--merged", help="a GGUF file of the merged model, which is run alone")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    exported = round_trips(args)
    rows, path = rows_of(args)
    for name, adapter, lora in [("model alone", None, None), ("with the adapter", args.adapter, exported)]:
        llama = Llama(args.model, lora)
        for exact in [False, True]:
            texts, loss = ours(args, path, adapter, exact)
            compare(args, f"{name}{', exact here' if exact else ''}", texts, loss, rows, llama)
    if args.merged:
        texts, loss = ours(args, path, None, False, args.merged)
        compare(args, "the merged file", texts, loss, rows, Llama(args.merged))
    shutil.rmtree(os.path.join(args.work, "peft"), ignore_errors=True)


if __name__ == "__main__":
    main()
