#!/usr/bin/env python3
"""Trains and merges what `--method top` and `--method bitfit` change, and has transformers load the merged folders.

    pip install torch transformers
    python scripts/check_methods.py --lowrank target/release/lowrank

The models are the built-in one, a tied Llama, and a GPT-2 with random weights and its tokenizer; the rows are those of one
of its tasks. transformers must find every tensor of a merged folder and lose on the rows what lowrank loses with the
adapter, and the adapter must have changed that loss. Exit status: 0 if all agree, 1 if not.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

BUILTIN = Path(__file__).resolve().parent.parent / "crates/lowrank/builtin"
DATA = BUILTIN / "tasks/cards"
METHODS = {
    "top": ["--method", "top", "--top-layers", "1"],
    "head": ["--method", "top", "--head-only"],
    "bitfit": ["--method", "bitfit"],
}
TOLERANCE = 1e-4


def gpt2(folder):
    """Writes a GPT-2 whose every weight, biases too, is random, with the tokenizer of the built-in model."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_positions=512, n_embd=64, n_layer=3, n_head=4,
                                       bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]:
        shutil.copy(BUILTIN / name, folder)
    return folder


def run(arguments, *command):
    """A command's JSON."""
    done = subprocess.run([arguments.lowrank, *map(str, command), "--json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def transformers_loss(folder, rows):
    """The loss of a merged folder; every tensor must have a place."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    unused = {key: names for key, names in found.items() if names}
    assert not unused, unused
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in rows:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            labels = torch.tensor(labels)[1:]
            total += functional.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowrank", default="target/release/lowrank", help="the binary")
    arguments = parser.parse_args()
    preview = run(arguments, "data", "preview", "--model", BUILTIN, "--data", DATA / "valid.jsonl")
    rows = [(row["ids"], row["labels"]) for row in preview["examples"]]
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        lines = (DATA / "valid.jsonl").read_text().splitlines()[:len(rows)]
        held_out = place / "rows.jsonl"
        held_out.write_text("\n".join(lines) + "\n")
        for family, model in [("llama", BUILTIN), ("gpt2", gpt2(place / "gpt2"))]:
            evaluate = ["eval", "--model", model, "--data", held_out, "--base-dtype", "f32"]
            base = run(arguments, *evaluate)["loss"]
            for method, flags in METHODS.items():
                name = f"{family}-{method}"
                adapter, merged = place / name, place / f"{name}-merged"
                run(arguments, "train", "--model", model, "--data", DATA, "--output", adapter, "--max-steps", 5,
                    "--learning-rate", "1e-3", *flags)
                run(arguments, "merge", "--model", model, "--adapter", adapter, "--output", merged, "--dtype", "f32")
                ours = run(arguments, *evaluate, "--adapter", adapter)["loss"]
                theirs = transformers_loss(merged, rows)
                fine = abs(ours - theirs) < TOLERANCE < abs(ours - base)
                failed |= not fine
                print(f"{name}: lowrank {base:.6f}, with the adapter {ours:.6f}, transformers merged {theirs:.6f}"
                      f"{'' if fine else '  DIFFERS'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
