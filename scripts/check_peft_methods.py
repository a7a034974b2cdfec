#!/usr/bin/env python3
"""Prefix and prompt tuning, IA3, DoRA and LoRA with rows of tokens in both directions: what lowrank trained loses the same in PEFT, and what PEFT made in lowrank.

    pip install torch transformers peft safetensors
    python scripts/check_peft_methods.py --lowrank target/release/lowrank

The model is the built-in one and the rows are those of one of its tasks. Exit status: 0 if all losses agree, 1 if not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

BUILTIN = Path(__file__).resolve().parent.parent / "crates/lowrank/builtin"
DATA = BUILTIN / "tasks/cards"
TOLERANCE = 1e-4
# For each case the flags of a training, or its settings, and PEFT's config.
CASES = {
    "layer": ("--method prefix --prefix-kind layer --num-virtual-tokens 6", PrefixTuningConfig(num_virtual_tokens=5)),
    "embedding": ("--method prefix --prefix-kind embedding --num-virtual-tokens 6",
                  PromptTuningConfig(num_virtual_tokens=5)),
    "ia3": ("--method ia3 --learning-rate 0.1", IA3Config(init_ia3_weights=False)),
    "ia3 everywhere": ("--method ia3 --learning-rate 0.1 --target-modules all-linear",
                       IA3Config(target_modules="all-linear", init_ia3_weights=False)),
    "dora": ("--learning-rate 0.02 --use-dora --target-modules all-linear --r 4",
             LoraConfig(init_lora_weights=False, use_dora=True, r=3, target_modules=["q_proj", "v_proj", "down_proj"])),
    "rows of tokens": ("--learning-rate 0.02 --trainable-token-indices 0,11,13,40,262",
                       LoraConfig(init_lora_weights=False, trainable_token_indices=[262, 11, 99])),
    "rows of two tables": (
        {"learning_rate": 0.02, "trainable_token_indices": {"embed_tokens": [0, 11], "lm_head": [0, 13, 262]}},
        LoraConfig(init_lora_weights=False, trainable_token_indices={"embed_tokens": [262, 11], "lm_head": [99]}),
    ),
}


def run(arguments, *command):
    """A command's JSON."""
    done = subprocess.run([arguments.lowrank, *command, "--json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def read_rows(arguments):
    """Token ids and labels of the first held-out rows, as lowrank lays them out."""
    file = str(DATA / "valid.jsonl")
    found = run(arguments, "data", "preview", "--model", str(BUILTIN), "--data", file)
    return [(row["ids"], row["labels"]) for row in found["examples"]]


def lowrank_loss(arguments, adapter, rows):
    """lowrank's loss on the rows in a file."""
    command = ["eval", "--model", str(BUILTIN), "--adapter", str(adapter), "--data", str(rows), "--base-dtype", "f32"]
    return run(arguments, *command)["loss"]


def peft_loss(model, rows):
    """PEFT's loss on the same rows; virtual tokens are left out."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in rows:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(ids):]
            labels = torch.tensor(labels)[1:]
            total += functional.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def base():
    """The built-in model."""
    return AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowrank", required=True, help="the binary")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = read_rows(arguments)
    problems = 0

    def compare(name, ours, theirs):
        nonlocal problems
        agree = abs(ours - theirs) <= TOLERANCE * theirs
        problems += not agree
        print(f"{name}: lowrank {ours:.6f}, PEFT {theirs:.6f}{'' if agree else '  DIFFERENT'}")

    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        few = work / "rows.jsonl"
        lines = (DATA / "valid.jsonl").read_text().splitlines()[:len(rows)]
        few.write_text("\n".join(lines) + "\n")
        for kind, (flags, config) in CASES.items():
            trained = work / kind
            if isinstance(flags, dict):
                settings = work / f"{kind}.yaml"
                settings.write_text(json.dumps(flags))
                flags = ["--config", str(settings)]
            else:
                flags = flags.split()
            run(arguments, "train", *flags, "--model", str(BUILTIN), "--data", str(few), "--output", str(trained),
                "--max-steps", "4", "--base-dtype", "f32")
            tuned = PeftModel.from_pretrained(base(), trained).eval()
            compare(f"{kind}, trained here", lowrank_loss(arguments, trained, few), peft_loss(tuned, rows))
            config.task_type = "CAUSAL_LM"
            made = get_peft_model(base(), config).eval()
            with torch.no_grad():
                for name, values in made.named_parameters():
                    if "trainable_tokens_delta" in name or "lora_magnitude_vector" in name:
                        values.add_(0.1 * torch.randn(values.shape))
            made.save_pretrained(work / f"{kind}-peft")
            theirs = peft_loss(made, rows)
            compare(f"{kind}, made by PEFT", lowrank_loss(arguments, work / f"{kind}-peft", few), theirs)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
