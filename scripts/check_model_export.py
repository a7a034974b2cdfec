#!/usr/bin/env python3
"""Checks exported models with llama.cpp.

    python3 scripts/check_model_export.py --lowrank target/release/lowrank --model models/smollm2-f32 --work export --data rows.jsonl

`--model` is a Hugging Face folder, best of f32 weights. It needs llama-cpp-python and gguf. For each type, `lowrank model export --type` is compared with
llama.cpp's own quantizer, started on our F32 file: types and bytes of every tensor. The file of the widest type then answers the prompts of `--data` greedily in both
programs, and says its loss on the completions.
"""

import argparse
import ctypes
import json
import os
import sys

from check_adapter_travel import Llama, compare, lowrank, ours, rows_of

TYPES = {
    "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_1": 9, "Q6_K": 18, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17,
}


def quantize(source, target, number):
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 2
    params.ftype = number
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp cannot quantize {source}")


def tensors(path):
    from gguf import GGUFReader

    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}


def keys(path):
    from gguf import GGUFReader

    return set(GGUFReader(path).fields)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", default="target/release/lowrank")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    whole = os.path.join(args.work, "F32.gguf")
    lowrank(args, "model", "export", args.model, "--type", "F32", "--output", whole, "--overwrite")
    for name in args.types:
        here, there = (os.path.join(args.work, f"{name}-{who}.gguf") for who in ["lowrank", "llama"])
        lowrank(args, "model", "export", args.model, "--type", name, "--output", here, "--overwrite")
        quantize(whole, there, TYPES[name])
        a, b = tensors(here), tensors(there)
        if a.keys() != b.keys():
            sys.exit(f"{name}: tensors differ: {sorted(a.keys() ^ b.keys())[:5]}")
        types = [key for key in a if a[key][0] != b[key][0]]
        other = [key for key in a if a[key][1] != b[key][1] and key not in types]
        print(f"{name}: {len(a)} tensors, {len(types)} of another type {types[:2]}, {len(other)} of other bytes {other[:2]}", flush=True)
        for path in [here, there]:
            os.remove(path)
    rows, path = rows_of(args)
    texts, loss = ours(args, path, None, False, whole, wide=True)
    compare(args, "the F32 file", texts, loss, rows, Llama(whole))


if __name__ == "__main__":
    main()
