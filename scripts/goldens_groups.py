#!/usr/bin/env python3
"""Writes what groups of learning rates and weight decays are compared with: crates/lowrank/tests/goldens/groups.json.

    pip install torch transformers peft safetensors
    python scripts/goldens_groups.py            # rewrite the golden
    python scripts/goldens_groups.py --check    # make it again and compare; exit 1 if anything differs

Each case trains the adapter in `llama/dora` for ten steps, as `goldens.py` does. `loraplus` takes the optimizer of PEFT's
`create_loraplus_optimizer`, and `patterns` PyTorch's AdamW with three groups. `losses` are the losses before each step, and `moved` has
the norm of what the steps changed of each tensor.
"""

import json
import sys
from pathlib import Path

import torch
from goldens import lora_parameters, make_model, make_rows, mean_loss
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer

GOLDENS = Path(__file__).resolve().parent.parent / "crates/lowrank/tests/goldens"
FILE = GOLDENS / "groups.json"
RATE, DECAY = 3e-3, 0.05


def loraplus(model, parameters):
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=8, loraplus_weight_decay=DECAY,
    )


def patterns(model, parameters):
    """lr_pattern: {"lora_B": 4, "layers.1": 0.5}; weight_decay_pattern: {"lora_magnitude_vector": 0, "q_proj.lora_A": 0.5}."""
    groups = {}
    for key, value in parameters.items():
        rate = 4 * RATE if ".lora_B." in key else 0.5 * RATE if ".layers.1." in key else RATE
        decay = 0.0 if "magnitude" in key else 0.5 if "q_proj.lora_A" in key else DECAY
        groups.setdefault((rate, decay), []).append(value)
    groups = [dict(params=values, lr=rate, weight_decay=decay) for (rate, decay), values in groups.items()]
    return torch.optim.AdamW(groups)


def train(make_optimizer):
    model = PeftModel.from_pretrained(make_model("llama"), GOLDENS / "llama/dora", is_trainable=True).eval()
    parameters, rows = lora_parameters(model), make_rows("llama")
    start = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer, losses = make_optimizer(model, parameters), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = mean_loss(model, rows)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = {key: torch.linalg.vector_norm(value.detach() - start[key]).item() for key, value in parameters.items()}
    return dict(losses=losses, moved=moved)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    made = dict(loraplus=train(loraplus), patterns=train(patterns))
    if "--check" not in sys.argv:
        FILE.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
        print(f"wrote {FILE}")
        return 0
    there = json.loads(FILE.read_text())

    def numbers(case):
        return [*case["losses"], *(case["moved"][key] for key in sorted(case["moved"]))]

    close = all(
        abs(one - other) <= 1e-4 * abs(other)
        for name in made for one, other in zip(numbers(made[name]), numbers(there[name]), strict=True)
    )
    print(f"{FILE} is up to date" if close else f"{FILE} differs")
    return 0 if close else 1


if __name__ == "__main__":
    sys.exit(main())
