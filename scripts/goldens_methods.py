#!/usr/bin/env python3
"""Writes the golden files of the methods that PEFT does not have: top layers, BitFit and adapter layers.

    pip install torch transformers peft safetensors
    python scripts/goldens_methods.py            # rewrite crates/lowrank/tests/goldens_methods
    python scripts/goldens_methods.py --check    # regenerate elsewhere, compare, exit 1 if anything differs

The models, their rows and the rules are those of `goldens.py`. Each method is written out here on the transformers model:
weights that are trained, biases that are added, layers that hooks put behind the sublayers. `MODEL/CASE/` holds the
adapter as lowrank saves it (`adapter_config.json`, `adapter_model.safetensors`, every value random, so that each
shows), and `golden.safetensors`:

    logits.N           f32 [T, V]
    greedy.N           i32 [<= 12]  the greedy continuation
    loss               f32 [1]      mean cross-entropy over the supervised tokens of all rows together
    grad.KEY           f32          d loss / d tensor, KEY as in adapter_model.safetensors
    grad_norm          f32 [1]
    losses             f32 [10]     the loss before each of ten steps of AdamW (1e-2; 1e-3 for weights) over all rows
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from goldens import MODELS, differences, generator, gradients, make_model, make_rows, outputs, ten_losses, write_tensors
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "crates/lowrank/tests/goldens_methods"
BOTTLENECK = 5
CASES = {
    "top": dict(peft_type="LOWRANK_TOP", top_layers=1),
    "head": dict(peft_type="LOWRANK_TOP", head_only=True),
    "bitfit": dict(peft_type="LOWRANK_BITFIT"),
    "houlsby": dict(peft_type="LOWRANK_ADAPTER", adapter_kind="houlsby", bottleneck=BOTTLENECK),
    "lin": dict(peft_type="LOWRANK_ADAPTER", adapter_kind="lin", bottleneck=BOTTLENECK),
    "pfeiffer": dict(peft_type="LOWRANK_ADAPTER", adapter_kind="pfeiffer", bottleneck=BOTTLENECK),
}
FAMILIES = ["llama", "gpt2"]


class AdapterLayer(nn.Module):
    """y + act(D n + b) U + c, where n is y or its layer norm."""

    def __init__(self, width, normed, activation):
        super().__init__()
        if normed:
            self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, BOTTLENECK)
        self.up = nn.Linear(BOTTLENECK, width)
        self.activation = activation

    def forward(self, y):
        n = self.norm(y) if hasattr(self, "norm") else y
        return y + self.up(self.activation(self.down(n)))


def gelu(x):
    return functional.gelu(x, approximate="tanh")


def hook(module, layer):
    """Puts `layer` behind a module; some of transformers' modules return a tuple."""
    def behind(_module, _inputs, output):
        return (layer(output[0]), *output[1:]) if isinstance(output, tuple) else layer(output)

    module.register_forward_hook(behind)


def add_layers(family, model, kind):
    """The trained tensors of the adapter layers that are put into the model."""
    gpt2 = family == "gpt2"
    blocks, prefix = (model.transformer.h, "transformer.h") if gpt2 else (model.model.layers, "model.layers")
    width = MODELS[family].hidden_size
    parameters = {}
    for index, block in enumerate(blocks):
        attention = block.attn.c_proj if gpt2 else block.self_attn.o_proj
        places = {"houlsby": [("attention", attention), ("mlp", block.mlp)], "pfeiffer": [("mlp", block.mlp)],
                  "lin": [("mlp", block)]}[kind]
        for place, module in places:
            layer = AdapterLayer(width, kind == "lin", gelu if kind == "houlsby" else functional.relu)
            hook(module, layer)
            name = f"{prefix}.{index}.{place}_adapter"
            parameters |= {f"{name}.{key}": value for key, value in layer.named_parameters()}
    return parameters


def with_biases(model):
    """The same Llama with a bias on each of its linears."""
    config = copy.deepcopy(model.config)
    config.attention_bias = config.mlp_bias = True
    biased = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    missing = biased.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(key.endswith(".bias") for key in missing.missing_keys)
    return biased


def build(family, case):
    """A model with a method's tensors, and these by their keys."""
    model = make_model(family)
    if case == "bitfit" and family == "llama":
        model = with_biases(model)
    model.requires_grad_(False)
    if case == "head" and model.config.tie_word_embeddings:
        model.config = copy.deepcopy(model.config)  # the family's is shared by every case
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    weights = dict(model.named_parameters())
    last = "transformer.h.1." if family == "gpt2" else "model.layers.1."
    final = "transformer.ln_f." if family == "gpt2" else "model.norm."
    if case == "top":
        return model, {key: x for key, x in weights.items() if key.startswith((last, final))}
    if case == "head":
        return model, {"lm_head.weight": model.lm_head.weight}
    if case == "bitfit":
        return model, {key: x for key, x in weights.items() if key.endswith(".bias")}
    return model, add_layers(family, model, case)


def randomise(parameters, name):
    """Values that all show; those of the base are moved, since they are random already."""
    random = generator(name)
    with torch.no_grad():
        for key, value in parameters.items():
            noise = torch.randn(value.shape, generator=random)
            if "_adapter." not in key:
                value.add_(0.1 * noise)
            else:
                value.copy_(1 + 0.3 * noise if key.endswith("norm.weight") else 0.3 * noise)


def write_case(folder, family, case):
    """An adapter's folder, and what PyTorch computes with it."""
    folder.mkdir(parents=True)
    rows = make_rows(family)
    model, parameters = build(family, case)
    randomise(parameters, f"{family}/{case}")
    for value in parameters.values():
        value.requires_grad_(True)
    config = CASES[case] | dict(base_model_name_or_path=family, inference_mode=True, task_type="CAUSAL_LM")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    write_tensors(folder / "adapter_model.safetensors", parameters)
    found = outputs(model, rows) | gradients(model, rows, parameters)
    found["losses"] = ten_losses(model, rows, parameters, 1e-3 if case in ("top", "head") else 1e-2)
    write_tensors(folder / "golden.safetensors", found)


def write_all(folder):
    for family in FAMILIES:
        for case in CASES:
            write_case(folder / family / case, family, case)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--check", action="store_true", help="compare instead of writing; exit 1 if anything differs")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="of --check, relative; default 1e-6")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as temporary:
        write_all(Path(temporary))
        if arguments.check:
            problems = differences(arguments.folder, Path(temporary), arguments.tolerance)
            print("\n".join(problems) or f"{arguments.folder} is up to date")
            return 1 if problems else 0
        for path in Path(temporary).rglob("*.*"):
            target = arguments.folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    print(f"wrote {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
