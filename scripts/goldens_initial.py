#!/usr/bin/env python3
"""Writes the golden files of first values that are made of the weights: PiSSA, OLoRA and LoftQ, as PEFT makes them.

    pip install torch transformers peft safetensors bitsandbytes
    python scripts/goldens_initial.py            # rewrite crates/lowrank/tests/goldens_initial
    python scripts/goldens_initial.py --check    # regenerate elsewhere, compare, exit 1 if anything differs

The models and their rows are those of `goldens.py`. `MODEL-INIT/golden.safetensors` holds

    init.KEY           f32          A and B before training, KEY as in adapter_model.safetensors
    loss, grad.KEY, grad_norm, losses, final.KEY   as of `goldens.py`

Singular vectors have no sign: the largest element of each column of B is made positive, and the row of A turned with it.
GPT-2 has no OLoRA: PEFT decomposes its transposed weights as they lie.

`loftq/golden.safetensors` holds a matrix (`weight`) and what PEFT's `loftq_init` makes of it with NF4 in N iterations:
`N.a`, `N.b`, and `N.quantized`, which is widened.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from goldens import differences, generator, gradients, lora_parameters, make_model, make_rows, ten_losses, write_tensors
from peft import LoraConfig, get_peft_model
from peft.utils import loftq_utils

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "crates/lowrank/tests/goldens_initial"
CASES = {
    "llama-pissa": dict(target_modules=["q_proj", "v_proj"]),
    "llama-olora": dict(target_modules=["q_proj", "v_proj"]),
    "gpt2-pissa": dict(target_modules=["c_attn"]),
}
LOFTQ_SHAPE, LOFTQ_RANK, LOFTQ_ITERATIONS = (48, 64), 6, (1, 5)


def turn_signs(a, b):
    """Makes the largest element of each column of B positive."""
    columns = torch.arange(b.shape[1])
    signs = b[b.abs().argmax(dim=0), columns].sign()
    return a * signs[:, None], b * signs


def write_case(folder, name, options):
    family, init = name.split("-")
    model = make_model(family)
    config = LoraConfig(r=3, lora_alpha=7, init_lora_weights=init, task_type="CAUSAL_LM",
                        fan_in_fan_out=family == "gpt2", **options)
    parameters = lora_parameters(get_peft_model(model, config).eval())
    with torch.no_grad():
        for key, a in parameters.items():
            if "lora_A" in key:
                b = parameters[key.replace("lora_A", "lora_B")]
                turned = turn_signs(a, b)
                a.copy_(turned[0])
                b.copy_(turned[1])
    rows = make_rows(family)
    found = {f"init.{key}": x.detach().clone() for key, x in parameters.items()}
    found |= gradients(model, rows, parameters)
    found["losses"] = ten_losses(model, rows, parameters, 1e-2)
    found |= {f"final.{key}": x for key, x in parameters.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "golden.safetensors", found)


def on_the_cpu(function):
    """PEFT names a GPU for the computation; the same is done on the CPU."""
    to = torch.Tensor.to

    def here(tensor, *args, **kwargs):
        args = tuple("cpu" if x in ("cuda", "xpu") else x for x in args if not isinstance(x, torch.Tensor)) or args
        if kwargs.get("device") in ("cuda", "xpu"):
            kwargs["device"] = "cpu"
        return to(tensor, *args, **kwargs)

    torch.Tensor.to = here
    import bitsandbytes as bnb
    params_to = bnb.nn.Params4bit.to

    def params_here(tensor, *args, **kwargs):
        return params_to(tensor, *("cpu" if x in ("cuda", "xpu") else x for x in args), **kwargs)

    bnb.nn.Params4bit.to = params_here
    try:
        return function()
    finally:
        torch.Tensor.to, bnb.nn.Params4bit.to = to, params_to


def write_loftq(folder):
    weight = torch.randn(LOFTQ_SHAPE, generator=generator("loftq")) * 0.05
    found = {"weight": weight}
    for iterations in LOFTQ_ITERATIONS:
        made = on_the_cpu(lambda: loftq_utils.loftq_init(weight, 4, LOFTQ_RANK, iterations))
        quantized, a, b = (x.float() for x in made)
        found[f"{iterations}.quantized"] = quantized
        found[f"{iterations}.a"], found[f"{iterations}.b"] = turn_signs(a, b)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "golden.safetensors", found)


def write_all(folder):
    for name, options in CASES.items():
        write_case(folder / name, name, options)
    write_loftq(folder / "loftq")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--check", action="store_true", help="compare instead of writing; exit 1 if anything differs")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of --check, relative; default 1e-5")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
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
