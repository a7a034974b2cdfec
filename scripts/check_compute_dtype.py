#!/usr/bin/env python3
"""Trains with factors in bf16 and in f32, and compares the losses on rows that were held out.

    python scripts/check_compute_dtype.py --lowrank target/release/lowrank --model models/smollm2 \\
        --data train.jsonl --valid-data valid.jsonl --steps 300 -- --r 4 --batch-size 8

What stands behind `--` goes to `lowrank train`. Every format is trained with each seed from the same beginning, and evaluated, which is
always in f32. Exit status: 0 if the means over the seeds are within --tolerance (0.001) of the first format's, 1 if not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def held_out(args, folder, dtype, seed):
    """The loss on the held-out rows after the last step."""
    output = folder / f"{dtype}-{seed}"
    command = [
        args.lowrank, "train", "--model", args.model, "--data", args.data, "--valid-data", args.valid_data,
        "--output", output, "--max-steps", args.steps, "--eval-steps", args.steps, "--seed", seed,
        "--compute-dtype", dtype, *args.rest,
    ]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", required=True, type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--valid-data", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dtypes", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("rest", nargs="*")
    args = parser.parse_args()
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for dtype in args.dtypes:
                loss = held_out(args, Path(folder), dtype, seed)
                losses.setdefault(dtype, []).append(loss)
                print(f"seed {seed}  {dtype:7} {loss:.6f}", flush=True)
    first = statistics.mean(losses[args.dtypes[0]])
    worst = 0.0
    for dtype in args.dtypes:
        mean = statistics.mean(losses[dtype])
        apart = mean / first - 1
        of_seeds = [100 * (ours / theirs - 1) for ours, theirs in zip(losses[dtype], losses[args.dtypes[0]])]
        print(f"{dtype:7} mean {mean:.6f}, {100 * apart:+.4f} %; by seed " + ", ".join(f"{x:+.4f} %" for x in of_seeds))
        worst = max(worst, abs(apart))
    return int(worst > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
