#!/usr/bin/env python3
"""Compares first values that are made of the weights (PiSSA, OLoRA) with PEFT's, on a model of real size.

    pip install torch transformers peft safetensors numpy
    python scripts/check_initial.py --lowrank BINARY --model FOLDER [--layers 0,15,29] [--r 8]

BINARY trains one step with each of `pissa`, `olora` and `pissa_niter_4` on all linears. What it saves is LoRA of twice the rank:
[A; A0] and [B, -B0]. For the modules of some layers A0, B0 and s*B0*A0 are compared with what PEFT's `get_peft_model` makes,
after the same rule of signs (the largest element of each column of B is positive); of `pissa_niter_4`, which is random, how much of
the weight is left. PEFT then loads the folder, and its s*B*A is compared with that of the file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4
# PEFT decomposes in f32. Where singular values are near to each other its A0 and B0 are off by so much from those of f64;
# on SmolLM2's worst module by 1.2e-4, and those of lowrank by 5e-7.
TOLERANCE_OF_VECTORS = 3e-4
ALPHA = 16


def turn_signs(a, b):
    signs = b[b.abs().argmax(dim=0), torch.arange(b.shape[1])].sign()
    return a * signs[:, None], b * signs


def apart(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def train(arguments, init, output):
    data = output.parent / "data"
    data.mkdir(exist_ok=True)
    rows = [json.dumps({"prompt": f"say {n}", "completion": f"{n} and {n + 1}"}) for n in range(8)]
    for name in ("train.jsonl", "valid.jsonl"):
        (data / name).write_text("\n".join(rows))
    begin = time.time()
    subprocess.run([arguments.lowrank, "train", "--model", arguments.model, "--data", data, "--output", output,
                    "--init-lora-weights", init, "--r", str(arguments.r), "--lora-alpha", str(ALPHA),
                    "--target-modules", "all-linear", "--max-steps", "1", "--base-dtype", "f32"],
                   check=True, capture_output=True)
    print(f"{init}: {time.time() - begin:.1f} s with one step of training")


def pefts(arguments, init, layers):
    """A and B of some layers as PEFT makes them, and the weights as they were."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    weights = {name: x.detach().clone() for name, x in model.named_parameters()
               if any(f".layers.{layer}." in name for layer in layers)}
    config = LoraConfig(r=arguments.r, lora_alpha=ALPHA, init_lora_weights=init, task_type="CAUSAL_LM",
                        layers_to_transform=layers,
                        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    return dict(get_peft_model(model, config).named_parameters()), weights


def compare(arguments, init, folder, layers):
    saved = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    r, scale = arguments.r, ALPHA / arguments.r
    assert config["r"] == 2 * r and config["lora_alpha"] == 2 * ALPHA and config["init_lora_weights"] is True, config
    theirs, weights = pefts(arguments, init, layers)
    worst, count = {}, 0
    for key in saved:
        if "lora_A" not in key or not any(f".layers.{layer}." in key for layer in layers):
            continue
        a0 = saved[key][r:]
        b0 = -saved[key.replace("lora_A", "lora_B")][:, r:]
        name = key.replace(".weight", ".default.weight")
        a, b = turn_signs(theirs[name].detach(), theirs[name.replace("lora_A", "lora_B")].detach())
        found = {"s·B0·A0": apart(scale * b0 @ a0, scale * b @ a)}
        if "niter" in init:
            weight = weights[key.removeprefix("base_model.model.").replace(".lora_A", "")]
            left = [(weight - scale * x @ y).norm().item() for x, y in ((b0, a0), (b, a))]
            found = {"‖W − s·B0·A0‖ beside PEFT's": abs(left[0] / left[1] - 1)}
        else:
            found |= {"A0": apart(a0, a), "B0": apart(b0, b)}
        for what, value in found.items():
            if value > worst.get(what, (-1, ""))[0]:
                worst[what] = (value, key)
        count += 1
    tolerance = 1e-2 if "niter" in init else TOLERANCE
    fine = count > 0
    for what, (value, key) in worst.items():
        fine &= value <= (TOLERANCE_OF_VECTORS if what in ("A0", "B0") else tolerance)
        print(f"{init}: {what}: {value:.1e} at most over {count} modules ({key})")
    return fine


def loads(arguments, folder):
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder)
    saved, scale, worst = load_file(folder / "adapter_model.safetensors"), ALPHA / arguments.r, 0.0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {}):
            a, b = (saved[f"{name}.lora_{part}.weight"] for part in "AB")
            worst = max(worst, (module.get_delta_weight("default") - scale * b @ a).abs().max().item())
    print(f"PEFT loads the folder; its ΔW is apart by {worst:.1e}")
    return worst < 1e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowrank", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", default="0,15,29")
    parser.add_argument("--r", type=int, default=8)
    arguments = parser.parse_args()
    layers = [int(layer) for layer in arguments.layers.split(",")]
    fine = True
    with tempfile.TemporaryDirectory() as temporary:
        for init in ("pissa", "olora", "pissa_niter_4"):
            folder = Path(temporary) / init
            train(arguments, init, folder)
            fine &= compare(arguments, init, folder, layers)
            fine &= loads(arguments, folder)
    print("all within tolerance" if fine else "NOT within tolerance")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
