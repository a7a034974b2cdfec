"""Makes crates/lowrank/tests/goldens/*/diff.json: what `adapter diff` measures, computed with numpy from dense matrices.

Run it from the repository's root: python scripts/goldens_diff.py [--check]
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path("crates/lowrank/tests/goldens")
PAIRS = {"llama": ("all_linear", "patterns"), "gpt2": ("c_attn", "all_linear")}


def rank(values, size):
    return int((values > values[0] * size * np.finfo(np.float32).eps).sum()) if values[0] > 0 else 0


def vectors(matrix):
    """Left and right singular vectors as columns, and the values, without what is nought but for rounding."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    k = rank(values, max(matrix.shape))
    return left[:, :k], values[:k], right[:k].T


def overlap(u, v):
    product = u.T @ v
    return [
        [float((product[: i + 1, : j + 1] ** 2).sum() / (min(i, j) + 1)) for j in range(v.shape[1])]
        for i in range(u.shape[1])
    ]


def effective_rank(values):
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def read(folder):
    """Per module A, B and the scale of the module, which the adapters of the goldens give by pattern or for all."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {}
    for key, value in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        find = lambda patterns, default: next(
            (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), default
        )
        r, alpha = find(config["rank_pattern"], config["r"]), find(config["alpha_pattern"], config["lora_alpha"])
        assert value.shape[0] == r, name
        scale = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
        b = tensors[key.replace("lora_A", "lora_B")]
        modules[name] = (value.astype(np.float64), b.astype(np.float64), scale)
    return modules


def change(a, b, scale, w):
    u, values, v = vectors(scale * b @ a)
    norm, k = float(np.linalg.norm(values)), len(values)
    projected = float(np.linalg.norm(u.T @ w @ v))
    return {
        "norm": norm,
        "singular_values": values.tolist(),
        "effective_rank": effective_rank(values),
        "weight": {
            "norm": float(np.linalg.norm(w)),
            "projected": projected,
            "projected_on_own": float(np.linalg.norm(np.linalg.svd(w, compute_uv=False)[:k])),
            "projected_on_random": float(np.linalg.norm(w) * k / math.sqrt(w.size)),
            "amplification": norm / projected,
        },
    }


def compare(name, first, second):
    one, other = read(FOLDER / name / first), read(FOLDER / name / second)
    weights = load_file(FOLDER / name / "model.safetensors")
    modules = []
    for module in one:
        if module not in other:
            continue
        (a1, b1, s1), (a2, b2, s2) = one[module], other[module]
        w = weights[module + ".weight"].astype(np.float64)
        if name == "gpt2":
            w = w.T
        d1, d2 = s1 * b1 @ a1, s2 * b2 @ a2
        modules.append(
            {
                "module": module,
                "of_a": overlap(vectors(a1)[2], vectors(a2)[2]),
                "of_b": overlap(vectors(b1)[0], vectors(b2)[0]),
                "of_delta": overlap(vectors(d1)[2], vectors(d2)[2]),
                "cosine": float((d1 * d2).sum() / np.linalg.norm(d1) / np.linalg.norm(d2)),
                "first": change(a1, b1, s1, w),
                "second": change(a2, b2, s2, w),
            }
        )
    assert modules, f"{name}: {first} and {second} share no module"
    return {"first": first, "second": second, "modules": sorted(modules, key=lambda m: m["module"])}


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other))
    return one == other if isinstance(one, str) else math.isclose(one, other, rel_tol=1e-8, abs_tol=1e-10)


def main():
    check, wrong = "--check" in sys.argv[1:], []
    for name, pair in PAIRS.items():
        path = FOLDER / name / "diff.json"
        made = compare(name, *pair)
        if not check:
            path.write_text(json.dumps(made, indent=1) + "\n")
        elif not same(json.loads(path.read_text()), made):
            wrong.append(str(path))
    if wrong:
        sys.exit("differ: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
