"""Reads what the Rust writers wrote with safetensors, transformers and PEFT, and fails on any
error, warning about a file, or difference.

Run it from the repository's root: python scripts/check_formats.py [FILE.gguf]
"""

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        command = ["cargo", "run", "--quiet", "--package", "lowrank", "--example", "write_samples", "--"]
        subprocess.run([*command, str(folder), *sys.argv[1:]], check=True)
        # What PEFT says about a file it reads. Deprecations between PEFT and transformers are theirs.
        warnings.simplefilter("error", UserWarning)
        check(folder / "model", folder / "adapter")
    print("PEFT, transformers and safetensors read what we wrote")


def check(model_folder, adapter_folder):
    with safe_open(model_folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, file.metadata()
        stored = {name: file.get_tensor(name) for name in file.keys()}
    model, report = AutoModelForCausalLM.from_pretrained(model_folder, output_loading_info=True)
    for kind, names in report.items():
        assert not names, f"{kind}: {names}"
    state = model.state_dict()
    for name, values in stored.items():
        assert torch.equal(state[name], values), name
    print("rope:", model.config.rope_parameters)

    with safe_open(adapter_folder / "adapter_model.safetensors", "pt") as file:
        adapter = {name: file.get_tensor(name) for name in file.keys()}
    tuned = PeftModel.from_pretrained(model, adapter_folder)
    state = {name.replace(".default", ""): values for name, values in tuned.state_dict().items() if "lora_" in name}
    assert state.keys() == adapter.keys(), state.keys() ^ adapter.keys()
    for name, values in adapter.items():
        assert torch.equal(state[name], values), name
    ranks = {name: m.r["default"] for name, m in tuned.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    assert sorted(set(ranks.values())) == [2, 4], ranks


if __name__ == "__main__":
    main()
