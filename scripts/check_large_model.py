#!/usr/bin/env python3
"""Trains a model that is larger than a rank may hold, as stages of a pipeline.

The model has the shapes of Llama 3 8B in bf16, 16 GB, and zeros for weights, so its file takes no room on the disk. Each rank runs under a limit on
its addresses (ulimit -v) that the whole model does not fit in.

    scripts/check_large_model.py --lowrank target/release/lowrank --folder DIR [--layers 32]

It needs mpirun and about as much free memory as the model has bytes. What is printed: for 1, 2 and 4 ranks, whether the run was refused, and the
largest resident memory of each rank.
"""

import argparse
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

GIB = 1 << 30


def tensors(layers, hidden=4096, inner=14336, vocab=128256, kv=1024):
    """Names and shapes of the model's tensors."""
    yield "model.embed_tokens.weight", [vocab, hidden]
    for n in range(layers):
        block = f"model.layers.{n}"
        yield f"{block}.input_layernorm.weight", [hidden]
        yield f"{block}.self_attn.q_proj.weight", [hidden, hidden]
        yield f"{block}.self_attn.k_proj.weight", [kv, hidden]
        yield f"{block}.self_attn.v_proj.weight", [kv, hidden]
        yield f"{block}.self_attn.o_proj.weight", [hidden, hidden]
        yield f"{block}.post_attention_layernorm.weight", [hidden]
        yield f"{block}.mlp.gate_proj.weight", [inner, hidden]
        yield f"{block}.mlp.up_proj.weight", [inner, hidden]
        yield f"{block}.mlp.down_proj.weight", [hidden, inner]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [vocab, hidden]


def write_shard(path, part):
    """A safetensors file of zeros that is a hole but for its header."""
    header, end = {}, 0
    for name, shape in part:
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def make_model(folder, tokenizer, layers):
    folder.mkdir(parents=True)
    shards, total, index = [[]], 0, {}
    for name, shape in tensors(layers):
        size = 2
        for n in shape:
            size *= n
        if total + size > 4 * GIB:
            shards.append([])
            total = 0
        total += size
        shards[-1].append((name, shape))
    all_bytes = 0
    for n, part in enumerate(shards, 1):
        name = f"model-{n:05}-of-{len(shards):05}.safetensors"
        all_bytes += write_shard(folder / name, part)
        index.update({tensor: name for tensor, _ in part})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    text = json.dumps({"metadata": {"total_size": all_bytes}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    return all_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", required=True, type=pathlib.Path)
    parser.add_argument("--folder", required=True, type=pathlib.Path, help="a new folder to work in")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--method", default="lora")
    args = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parent.parent
    lowrank = args.lowrank.resolve()
    args.folder.mkdir(parents=True)
    size = make_model(args.folder / "model", root / "crates/lowrank/builtin", args.layers)
    print(f"the model has {size / GIB:.2f} GiB in {args.layers} blocks")
    rows = [{"prompt": f"say {n}", "completion": f" {n} it is"} for n in range(4)]
    (args.folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    failed = False
    for ranks in [1, 2, 4]:
        limit = int(size / max(ranks, 2) * 1.15 + 1.5 * GIB)
        run = args.folder / f"run{ranks}"
        train = (
            f"ulimit -v {limit // 1024}; exec /usr/bin/env {lowrank} train --model {args.folder}/model --data {args.folder}/train.jsonl"
            f" --output {run} --method {args.method} --batch-size 1 --gradient-accumulation-steps 4 --max-steps 1 --threads 1"
            f" --pipeline-stages {ranks}"
        )
        # Each rank says for itself what it took.
        report = (
            f"({train}) & pid=$!; while kill -0 $pid 2>/dev/null; do"
            " grep -H VmHWM /proc/$pid/status 2>/dev/null | tail -n 1 > \"$0\"; sleep 0.2; done; wait $pid"
        )
        command = ["mpirun", "-n", str(ranks), "--oversubscribe", "--bind-to", "none"] if ranks > 1 else []
        command += ["bash", "-c", report.replace('"$0"', f"{args.folder}/peak{ranks}.${{OMPI_COMM_WORLD_RANK:-0}}")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
        peaks = []
        for path in sorted(args.folder.glob(f"peak{ranks}.*")):
            words = path.read_text().split()
            peaks.append(f"{int(words[-2]) / 2**20:.2f}" if len(words) > 1 else "?")
        verdict = "trained" if done.returncode == 0 else f"exit code {done.returncode}"
        print(f"{ranks} ranks, {limit / GIB:.2f} GiB of addresses each: {verdict}; peaks of {', '.join(peaks)} GiB")
        lines = done.stderr.strip().splitlines()
        if (done.returncode == 0) != (ranks > 1):
            failed = True
            print("\n".join(lines[-20:]))
        elif ranks == 1:
            print("  " + lines[-1])
    sys.exit(failed)


if __name__ == "__main__":
    main()
