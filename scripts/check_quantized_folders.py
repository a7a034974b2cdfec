#!/usr/bin/env python3
"""Checks folders of quantized models with bitsandbytes, transformers and PEFT.

    python3 scripts/check_quantized_folders.py --lowrank target/release/lowrank --model models/smollm2-bf16 --data rows.jsonl --work quantized

`--model` is a Hugging Face folder of a llama. It needs torch, transformers, PEFT, bitsandbytes and gguf. transformers saves the model in NF4 (with double
quantization), FP4 and int8. Then

- every number that lowrank reads from these folders is compared with bitsandbytes' own, in f32 (`lowrank model export --type F32`);
- the folders that `lowrank model quantize` writes are compared with transformers', tensor by tensor;
- PEFT (QLoRA, computing in f32) and lowrank train the same adapter on the NF4 folder, with all rows in each of twenty steps, and their losses, times and peaks are
  compared. Rows are {"prompt", "completion"}; give few.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "benches/peers"))

STEPS = 20
RATE = 1e-3
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def configs():
    import torch
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    return {
        "NF4": BitsAndBytesConfig(**four, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "FP4": BitsAndBytesConfig(**four, bnb_4bit_quant_type="fp4"),
        "INT8": BitsAndBytesConfig(load_in_8bit=True),
    }


def save(model, folder, config):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"quantization_config": config, "device_map": "cpu", "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(model, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def dequantized(file, name):
    """bitsandbytes' numbers of a matrix, in f32."""
    import torch
    from bitsandbytes import functional

    weight, keys = file.get_tensor(name), list(file.keys())
    scales = name.removesuffix("weight") + "SCB"
    if scales in keys:
        return (weight * file.get_tensor(scales).view(-1, 1) * 7.874015718698502e-3).numpy()
    parts = {key.removeprefix(name + "."): file.get_tensor(key) for key in keys if key.startswith(name + ".")}
    state = functional.QuantState.from_dict(parts, device="cpu")
    state.dtype = torch.float32
    return functional.dequantize_4bit(weight, state).numpy()


def interleaved(rows, heads):
    """Rows of q and k in the order of llama.cpp."""
    count = len(rows)
    return rows.reshape(heads, 2, count // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def check_numbers(lowrank, folder, file):
    import numpy
    from gguf import GGUFReader
    from safetensors import safe_open

    subprocess.run([lowrank, "model", "export", folder, "--type", "F32", "--output", file, "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    config = json.loads((folder / "config.json").read_text())
    stored = safe_open(folder / "model.safetensors", "pt")
    written = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    different, numbers = 0, 0
    for name in filter(lambda name: name.endswith("_proj.weight"), stored.keys()):
        layer, module = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        expected = dequantized(stored, name)
        heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}.get(module)
        if heads:
            expected = interleaved(expected, config[heads])
        found = numpy.array(written[f"blk.{layer}.{PARTS[module]}.weight"].data).reshape(expected.shape)
        different += int((found.view("u4") != expected.view("u4")).sum())
        numbers += expected.size
    return different, numbers


def check_written(ours, theirs):
    from safetensors import safe_open

    ours, theirs = (safe_open(folder / "model.safetensors", "pt") for folder in (ours, theirs))
    if set(ours.keys()) != set(theirs.keys()):
        return f"other tensors: {sorted(set(ours.keys()) ^ set(theirs.keys()))[:3]}"
    different, elements = 0, 0
    for name in ours.keys():
        a, b = ours.get_tensor(name), theirs.get_tensor(name)
        if ".quant_state." in name:
            different += json.loads(bytes(a.numpy())) != json.loads(bytes(b.numpy()))
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"{name}: {a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}"
        else:
            different += int((a != b).sum())
        elements += a.numel()
    return f"{different} of {elements} elements differ"


def peft_losses(folder, data, adapter):
    """Losses of PEFT, from the adapter that it saves first, seconds of all steps but the first, and peak memory. Runs in a process of its own."""
    import peft
    import torch
    import transformers
    from peft_train import collate, first, read_examples

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    end = first(model.config.eos_token_id)
    examples = read_examples(data, transformers.AutoTokenizer.from_pretrained(folder), end)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.01)
    model.save_pretrained(adapter)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses, times = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        loss = model(**collate(torch, examples, end)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.perf_counter() - began)
    print(json.dumps({"losses": losses, "seconds": sum(times[1:]), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def our_losses(lowrank, folder, data, adapter, run):
    rows = sum(1 for line in open(data, encoding="utf-8") if line.strip())
    options = {
        "model": folder, "init-adapter": adapter, "data": data, "output": run, "batch-size": rows, "max-steps": STEPS, "learning-rate": RATE,
        "lr-scheduler-type": "constant", "warmup-steps": 0, "weight-decay": 0, "max-grad-norm": 1e9, "logging-steps": 1, "compute-dtype": "f32",
    }
    command = [lowrank, "train", "--overwrite", *(f"--{key}={value}" for key, value in options.items())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in open(run / "metrics.jsonl", encoding="utf-8")]
    steps = [line for line in lines if "loss" in line and "step" in line and "eval_loss" not in line]
    return steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", required=True, type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--peft", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    adapter = args.work / "adapter"
    if args.peft:
        return peft_losses(args.model, args.data, adapter)
    lowrank = args.lowrank.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    failed = False
    for kind, config in configs().items():
        theirs, ours = args.work / f"theirs-{kind}", args.work / f"ours-{kind}"
        save(args.model, theirs, config)
        different, numbers = check_numbers(lowrank, theirs, args.work / f"{kind}.gguf")
        failed |= different > 0
        print(f"{kind}: {different} of {numbers} numbers differ from bitsandbytes'")
        subprocess.run([lowrank, "model", "quantize", args.model, "--type", kind, "--output", ours, "--overwrite"], check=True, stdout=subprocess.DEVNULL)
        # transformers was not asked to quantize FP4's scales, which lowrank does.
        if kind != "FP4":
            written = check_written(ours, theirs)
            failed |= not written.startswith("0 of ")
            print(f"{kind}, written by lowrank: {written}")
    folder = args.work / "theirs-NF4"
    command = [sys.executable, __file__, "--peft", f"--lowrank={lowrank}", f"--model={folder}", f"--data={args.data}", f"--work={args.work}"]
    theirs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    steps = our_losses(lowrank, folder, args.data, adapter, args.work / "run")
    losses = [step["loss"] for step in steps]
    off = max(abs(a - b) for a, b in zip(losses, theirs["losses"], strict=True))
    failed |= off > 1e-3
    print(f"losses of {STEPS} steps: from {losses[0]:.4f} to {losses[-1]:.4f}, at most {off:.1e} from PEFT's")
    seconds = sum(step["tokens"] / step["tokens_per_second"] for step in steps[1:])
    print(f"time of PEFT ÷ ours: {theirs['seconds'] / seconds:.2f}")
    print(f"peak memory, ours ÷ PEFT's: {max(step['peak_rss'] for step in steps) / theirs['peak']:.2f}")
    sys.exit(1 if failed else None)


main()
