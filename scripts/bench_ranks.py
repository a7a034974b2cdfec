#!/usr/bin/env python3
"""What ranks cost on one machine: runs in turn, in pairs, and the ratios of their steps.

    scripts/bench_ranks.py LOWRANK [--model FOLDER] [--launcher mpirun.openmpi] [--pairs 10] [--steps 30] [--wait 600]

1. One rank under the launcher against none. The median of the ratios should be below 1.01.
2. Two ranks of one thread against one process of two threads.

For a quiet machine with two cores: --wait waits so many seconds at most until its load is below 0.5, and the load is printed. A step's time is that of
metrics.jsonl, so starting the launcher does not count. The first steps of a run are left out.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

CARDS = pathlib.Path(__file__).resolve().parent.parent / "crates/lowrank/builtin/tasks/cards/train.jsonl"
LEFT_OUT = 2


def wait_for_quiet(seconds):
    end = time.monotonic() + seconds
    while os.getloadavg()[0] >= 0.5 and time.monotonic() < end:
        time.sleep(5)
    load = os.getloadavg()[0]
    print(f"load {load:.2f}" + (", which is not quiet: take the figures with care" if load >= 0.5 else ""))


def step_seconds(command, output):
    """The median seconds of a step of one run."""
    shutil.rmtree(output, ignore_errors=True)
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    with open(output / "metrics.jsonl") as lines:
        steps = [step for step in map(json.loads, lines) if "tokens_per_second" in step]
    return statistics.median(step["tokens"] / step["tokens_per_second"] for step in steps[LEFT_OUT:])


def compare(title, first, second, pairs, output):
    """Runs both in turn, each first in every other pair."""
    times = []
    for pair in range(pairs):
        order = [0, 1] if pair % 2 == 0 else [1, 0]
        both = [0.0, 0.0]
        for which in order:
            both[which] = step_seconds([first, second][which], output)
        times.append(both)
    ratios = sorted(b / a for a, b in times)
    a, b = (1000 * statistics.median(column) for column in zip(*times))
    print(f"{title}: {b:.2f} ms against {a:.2f} ms a step; ratios: median {statistics.median(ratios):.4f}, {ratios[0]:.4f} to {ratios[-1]:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lowrank")
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--launcher", default="mpirun.openmpi")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--wait", type=int, default=600)
    arguments = parser.parse_args()
    lowrank = os.path.realpath(arguments.lowrank)
    binding = ["-bind-to", "none"] if "mpich" in arguments.launcher else ["--oversubscribe", "--bind-to", "none"]
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "run"
        data = pathlib.Path(folder) / "data"
        data.mkdir()
        (data / "train.jsonl").write_text("".join(CARDS.read_text().splitlines(keepends=True)[:60]))
        run = [lowrank, "train", "--model", arguments.model, "--data", str(data), "--output", str(output), "--quiet"]
        run += ["--batch-size", "2", "--gradient-accumulation-steps", "8", "--max-steps", str(arguments.steps)]
        run += ["--recompute", "none", "--save-steps", "1000"]

        def ranks(count, threads):
            return [arguments.launcher, *binding, "-n", str(count), *run, "--threads", str(threads)]

        wait_for_quiet(arguments.wait)
        compare("one rank against no launcher, two threads", [*run, "--threads", "2"], ranks(1, 2), arguments.pairs, output)
        compare("two ranks of one thread against one of two", [*run, "--threads", "2"], ranks(2, 1), arguments.pairs, output)
        print(f"load {os.getloadavg()[0]:.2f} at the end")


main()
