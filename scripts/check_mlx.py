#!/usr/bin/env python3
"""Checks adapters that were exported for mlx-lm with mlx-lm itself: its logits are to be PEFT's.

    pip install mlx-lm 'mlx[cpu]'          # 'mlx[cpu]' on Linux; on a Mac mlx-lm alone
    python scripts/check_mlx.py --lowrank target/release/lowrank --model FOLDER --peft-python PYTHON --work mlx

`--model` is a folder of a model that mlx-lm has, in f32, and `--peft-python` a Python with torch, transformers and peft, since mlx-lm wants
versions of its own. PEFT makes a LoRA and a DoRA of random values and writes their logits; `lowrank adapter export --to mlx` turns the adapters
into mlx-lm's, which loads them beside the same model. It exits with 1 where logits differ by more than `--tolerance` of the largest change that
the adapter makes, or where the adapter changes nothing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

NAMES = ["lora", "dora"]
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
ROWS, TOKENS = 4, 24


def rows(vocabulary):
    return np.random.default_rng(5).integers(5, vocabulary, (ROWS, TOKENS))


def write_with_peft(args):
    """An adapter folder of each kind, and logits of the model alone and beside each, in `peft.npz`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    def logits(model):
        with torch.no_grad():
            return model(torch.tensor(ids)).logits.numpy()

    model = load()
    ids = rows(model.config.vocab_size)
    found = {"base": logits(model)}
    for name in NAMES:
        config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, use_dora=name == "dora", task_type="CAUSAL_LM")
        torch.manual_seed(7)
        adapted = get_peft_model(load(), config).eval()
        for key, values in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(values, std=0.02)
            elif "lora_magnitude_vector" in key:
                values.data *= 0.9 + 0.2 * torch.rand_like(values)
        found[name] = logits(adapted)
        adapted.save_pretrained(args.work / name)
    np.savez(args.work / "peft.npz", **found)


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stderr}")


def mlx_logits(args, adapter=None):
    import mlx.core as mx
    from mlx_lm import load

    # A graphics chip multiplies f32 numbers with fewer bits.
    mx.set_default_device(mx.cpu)
    # What mlx-lm reads of a config.json that transformers 5 wrote.
    own = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    theta = own.get("rope_parameters", {}).get("rope_theta")
    changes = {"rope_theta": theta} if theta else {}
    adapter = adapter and str(adapter)
    model, _, config = load(str(args.model), adapter_path=adapter, model_config=changes, return_config=True)
    model.eval()
    return np.array(model(mx.array(rows(config["vocab_size"]))).astype(mx.float32))


def check(args):
    run([args.peft_python, Path(__file__).resolve(), "--model", args.model, "--work", args.work, "--write"])
    expected = np.load(args.work / "peft.npz")
    alone = mlx_logits(args)
    print(f"model alone: logits differ by {np.abs(alone - expected['base']).max():.1e} at most")
    is_wrong = False
    for name in NAMES:
        output = args.work / f"{name}-mlx"
        run([args.lowrank, "adapter", "export", args.work / name, "--to", "mlx", "--output", output, "--model", args.model, "--overwrite"])
        found = mlx_logits(args, output)
        change = np.abs(expected[name] - expected["base"]).max()
        off = np.abs(found - expected[name]).max()
        print(f"{name}: it changes logits by up to {change:.2f}; mlx-lm and PEFT differ by {off:.1e} at most")
        is_wrong |= not off <= args.tolerance * change
    return is_wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", type=Path, default="target/release/lowrank")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peft-python", default=sys.executable)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.write:
        return write_with_peft(args)
    return check(args)


if __name__ == "__main__":
    sys.exit(main())
