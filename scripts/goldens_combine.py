#!/usr/bin/env python3
"""Writes what `adapter merge` and `adapter prune` are compared with: crates/lowrank/tests/goldens_combine.

    pip install torch transformers peft safetensors
    python scripts/goldens_combine.py                    # rewrite the goldens
    python scripts/goldens_combine.py --check            # make them again and compare
    python scripts/goldens_combine.py --check LOWRANK    # also run the program, and load what it wrote with PEFT

The other folders are adapters of a tiny random Llama as PEFT saves them, with other alphas, ranks and targets. `cases.json` lists
combinations, and `golden.safetensors` has the ΔW [out, in] of every module of a case, named CASE.MODULE. They come from PEFT's
add_weighted_adapter. With rank-stabilised LoRA PEFT's result has a wrong scale, so there ("by": "definition") they are computed
with matrices from what the combination means. DARE's random numbers are PyTorch's own, so its cases drop none (density 1).
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).resolve().parent.parent / "crates/lowrank/tests/goldens_combine"
TOLERANCE = 1e-4
ALL = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "plain": dict(r=4, lora_alpha=6, target_modules=ALL),
    "low": dict(r=4, lora_alpha=3, target_modules=ALL),
    "narrow": dict(r=2, lora_alpha=5, target_modules=["q_proj", "o_proj"]),
    "rslora": dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True),
    "high": dict(r=4, lora_alpha=8, target_modules=ALL),
    "patterns": dict(r=4, lora_alpha=6, target_modules=ALL, rank_pattern={"v_proj": 3}, alpha_pattern={"down_proj": 10}),
}


def case(adapters, weights, combine, by="peft", **options):
    return dict(adapters=adapters, weights=weights, combine=combine, by=by, options=options)


CASES = {
    "cat": case(["plain", "low"], [1, 1], "cat"),
    "cat_of_three": case(["plain", "low", "narrow"], [0.75, -0.5, 1.5], "cat"),
    "svd": case(["plain", "low", "narrow"], [0.75, -0.5, 1.5], "svd"),
    "svd_3": case(["plain", "low"], [1, -2], "svd", svd_rank=3),
    "linear": case(["plain", "low"], [1, 1], "linear"),
    "linear_negative": case(["plain", "low"], [1.5, -0.5], "linear"),
    "ties": case(["plain", "low", "high"], [1, 0.5, 2], "ties", density=0.5),
    "ties_frequency": case(["plain", "low", "high"], [1, 0.5, -2], "ties", density=0.75, majority_sign="frequency"),
    "ties_svd": case(["plain", "low", "high"], [1, 0.5, -2], "ties_svd", density=0.5),
    "ties_svd_frequency": case(["plain", "low", "narrow"], [1, 0.5, 2], "ties_svd", density=0.75, majority_sign="frequency", svd_rank=5),
    "dare_linear": case(["plain", "low"], [1, -0.5], "dare_linear", density=1),
    "dare_ties": case(["plain", "low", "high"], [1, -0.5, 1], "dare_ties", density=1),
    "dare_linear_svd": case(["plain", "low", "narrow"], [1, -0.5, 1], "dare_linear_svd", density=1),
    "dare_ties_svd": case(["plain", "low", "narrow"], [1, -0.5, 1], "dare_ties_svd", density=1),
    "magnitude_prune": case(["plain", "low"], [1, -0.5], "magnitude_prune", density=0.375),
    "magnitude_prune_svd": case(["plain", "low", "narrow"], [1, -0.5, 2], "magnitude_prune_svd", density=0.375, svd_rank=3),
    "rslora_cat": case(["rslora", "plain", "narrow"], [1, -0.5, 1], "cat", by="definition"),
    "rslora_svd": case(["rslora", "plain"], [1, -0.5], "svd", by="definition"),
    "rslora_linear": case(["rslora"], [-2], "linear", by="definition"),
    "patterns_cat": case(["patterns", "plain"], [1, 2], "cat", by="definition"),
}


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=17, max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def deltas(model, name):
    """ΔW of every module that an adapter acts on."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and name in module.lora_A:
            found[path] = module.get_delta_weight(name).detach().clone().contiguous()
    assert found, name
    return found


def make_adapters():
    """A PEFT model with all adapters, A and B random."""
    model = None
    for index, (name, options) in enumerate(ADAPTERS.items()):
        config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="tiny", **options)
        if model is None:
            model = get_peft_model(base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        # PEFT puts the model's own name there, which is empty.
        model.peft_config[name].base_model_name_or_path = "tiny"
        random = torch.Generator().manual_seed(100 + index)
        for path, module in sorted(model.named_modules()):
            if hasattr(module, "lora_A") and name in module.lora_A:
                for part in (module.lora_A, module.lora_B):
                    weight = part[name].weight
                    weight.data = torch.randn(weight.shape, generator=random)
    return model


def by_definition(model, case):
    """Σ wᵢ ΔWᵢ from A, B and the scale that the config gives; cut to the largest rank for `svd`."""
    total, ranks = {}, {}
    for name, weight in zip(case["adapters"], case["weights"]):
        for path, delta in deltas(model, name).items():
            total[path] = total.get(path, 0) + weight * delta.double()
            module = model.get_base_model().get_submodule(path)
            ranks[path] = max(ranks.get(path, 0), module.r[name])
    if case["combine"] == "svd":
        for path, delta in total.items():
            u, s, v = torch.linalg.svd(delta, full_matrices=False)
            k = ranks[path]
            total[path] = u[:, :k] * s[:k] @ v[:k]
    return {path: delta.float().contiguous() for path, delta in total.items()}


def by_peft(model, name, case):
    options = dict(case["options"])
    if "majority_sign" in options:
        options["majority_sign_method"] = options.pop("majority_sign")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(case["adapters"], case["weights"], name, combination_type=case["combine"], **options)
    found = deltas(model, name)
    model.delete_adapter(name)
    return found


def make(folder):
    model = make_adapters()
    model.save_pretrained(folder, selected_adapters=list(ADAPTERS))
    (folder / "README.md").unlink(missing_ok=True)
    for name in ADAPTERS:
        (folder / name / "README.md").unlink(missing_ok=True)
        # Sets have no order, so lists are written sorted.
        path = folder / name / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"] = sorted(config["target_modules"])
        path.write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    for name, case in CASES.items():
        found = by_definition(model, case) if case["by"] == "definition" else by_peft(model, name, case)
        tensors |= {f"{name}.{path}": delta for path, delta in found.items()}
    (folder / "cases.json").write_text(json.dumps(CASES, indent=1) + "\n")
    save_file(tensors, folder / "golden.safetensors")


def distance(one, other):
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def compare_files(folder):
    wrong = []
    for old in sorted(path for path in FOLDER.rglob("*") if path.is_file()):
        new = folder / old.relative_to(FOLDER)
        if old.suffix != ".safetensors":
            if old.read_text() != new.read_text():
                wrong.append(f"{new.name}: differs")
            continue
        one, other = load_file(old), load_file(new)
        if one.keys() != other.keys():
            wrong.append(f"{old}: other tensors")
            continue
        wrong += [f"{old.name}: {name}" for name in one if distance(other[name], one[name]) > 1e-5]
    return wrong


def read_back(folder):
    """ΔW of an adapter as PEFT loads it. That a tensor is missing is only a warning there, and here an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected|mismatch).*")
        return deltas(PeftModel.from_pretrained(base(), folder), "default")


def check_program(program, work):
    """Every case through the program, loaded with PEFT; and pruning."""
    expected, wrong, worst = load_file(FOLDER / "golden.safetensors"), [], 0.0
    run = lambda *args: json.loads(subprocess.run([program, "adapter", *args, "--json"], check=True, stdout=subprocess.PIPE).stdout)
    for name, case in CASES.items():
        output = work / name
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in case["options"].items()]
        weights = ",".join(str(weight) for weight in case["weights"])
        adapters = [str(FOLDER / adapter) for adapter in case["adapters"]]
        run("merge", *adapters, f"--weights={weights}", "--combine", case["combine"], "--output", str(output), *flags)
        found = read_back(output)
        names = {key.removeprefix(f"{name}.") for key in expected if key.startswith(f"{name}.")}
        if found.keys() != names:
            wrong.append(f"{name}: modules {sorted(found)} in place of {sorted(names)}")
            continue
        for path, delta in found.items():
            off = distance(delta, expected[f"{name}.{path}"])
            worst = max(worst, off)
            if off > TOLERANCE:
                wrong.append(f"{name}: {path} is off by {off:.2e}")
    for name, flag in [("plain", "--rank=2"), ("rslora", "--rank=3"), ("patterns", "--error=0.5")]:
        output = work / f"pruned_{name}"
        report = run("prune", str(FOLDER / name), flag, "--output", str(output))
        before, after = read_back(FOLDER / name), read_back(output)
        for module in report["modules"]:
            path, rank = module["module"], module["rank"]
            u, s, v = torch.linalg.svd(before[path], full_matrices=False)
            off = distance(after[path], u[:, :rank] * s[:rank] @ v[:rank])
            error = float(s[rank:].norm() / s.norm())
            worst = max(worst, off)
            if off > TOLERANCE or abs(error - module["relative_error"]) > 1e-5:
                wrong.append(f"pruned {name}: {path} is off by {off:.2e}, error {module['relative_error']} and not {error}")
    print(f"{len(CASES)} combinations and 3 prunings, loaded with PEFT: ΔW is off by {worst:.1e} at most")
    return wrong


def main():
    torch.set_num_threads(1)
    args = sys.argv[1:]
    if args[:1] != ["--check"]:
        FOLDER.mkdir(parents=True, exist_ok=True)
        return make(FOLDER)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        made = work / "made"
        made.mkdir()
        make(made)
        wrong = compare_files(made)
        if len(args) > 1:
            wrong += check_program(args[1], work)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
