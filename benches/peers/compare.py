#!/usr/bin/env python3
"""Compares training by lowrank with training by PyTorch + PEFT on this machine, and prints a table of ratios.

For each setting the two run in turn, `--pairs` times. A pair gives one ratio of speed and one of peak memory, ours over
theirs; the table has the smallest, the median and the largest of them beside the target. Only ratios are printed: what
a machine does in a second says nothing about another one.

    python3 compare.py --lowrank ../../target/release/lowrank --peer-python VENV/bin/python \\
        --model-bf16 DIR --model-f32 DIR --data rows.jsonl --encoder DIR --labelled rows.tsv

Needs nothing but Python; README.md beside this file says how to install the peer. Exit status: 0 if every median
reaches its target, 1 if one does not or a command fails, 2 for misuse.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PEER_SCRIPT = Path(__file__).resolve().parent / "peft_train.py"
PEER_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Setting:
    """One job for both sides, and what the ratios of speed (at least) and memory (at most) should be."""

    name: str
    title: str
    speed_target: float
    memory_target: float
    batch_size: int
    # Tokens of a random row; None: rows of --data.
    seq_length: int | None = None
    method: tuple[str, ...] = ("--method", "lora", "--r", "4", "--target-modules", "q_proj,v_proj")
    # The steps in which lowrank computes each prompt once; then examples are what is counted.
    share_prompts: bool = False
    # A classifier on --encoder and --labelled; then rows are what is counted.
    classifies: bool = False
    # What the peer calls the method, where that is another name.
    peer_method: tuple[str, ...] | None = None

    @property
    def unit(self):
        return "examples_per_second" if self.share_prompts or self.classifies else "tokens_per_second"

    def work(self, rows, steps, method):
        """The arguments that both sides understand."""
        source = ["--data", str(rows)] if self.seq_length is None else ["--seq-length", str(self.seq_length)]
        return [*source, "--batch-size", str(self.batch_size), "--steps", str(steps), *method]


QUERY_VALUE = ("--method", "lora", "--r", "8", "--target-modules", "query,value")
ALL_LINEAR = ("--method", "lora", "--r", "8", "--target-modules", "all-linear")
SETTINGS = (
    Setting("e2e-qv", "E2E rows, LoRA q and v, r 4, batch 8", 2.3, 1 / 6, 8),
    Setting("e2e-all", "E2E rows, LoRA all-linear, r 8, batch 8", 2.5, 1 / 6, 8, method=ALL_LINEAR),
    Setting("random-256", "random tokens, LoRA q and v, r 4, batch 4 x 256", 1.5, 1 / 5, 4, seq_length=256),
    Setting("random-1024", "random tokens, LoRA q and v, r 4, batch 2 x 1024", 1.4, 1 / 5, 2, seq_length=1024),
    Setting("e2e-full", "E2E rows, full fine-tuning, batch 8", 1.8, 0.6, 8, method=("--method", "full")),
    Setting("e2e-shared", "E2E rows by prompt, LoRA q and v, r 4, batch 16, --share-prompts", 4.0, 0.5, 16, share_prompts=True),
    Setting("sst2-lora", "SST-2 rows by length, classifier, LoRA query and value, r 8, batch 32", 2.5, 1 / 3, 32,
            classifies=True, method=QUERY_VALUE),
    Setting("sst2-head", "SST-2 rows by length, classifier alone, batch 32", 2.5, 1 / 3, 32, classifies=True,
            method=("--method", "top", "--head-only"), peer_method=("--method", "head")),
)


class Failure(Exception):
    """Something that the person who runs this has to mend."""


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", required=True, type=Path, help="the binary, built with --release")
    parser.add_argument("--peer-python", required=True, type=Path, help="a Python that has torch, transformers and peft")
    parser.add_argument("--model-bf16", type=Path, help="the model for lowrank, stored in bf16")
    parser.add_argument("--model-f32", type=Path, help="the same model for the peer, stored in f32")
    parser.add_argument("--data", type=Path, help="JSONL of {prompt, completion}, or lines of meaning||text")
    parser.add_argument("--encoder", type=Path, help="an encoder for both, such as MiniLM")
    parser.add_argument("--labelled", type=Path, help="lines of text, tab, label")
    parser.add_argument("--only", action="append", choices=[setting.name for setting in SETTINGS], metavar="SETTING",
                        help="one of " + ", ".join(setting.name for setting in SETTINGS) + "; may be repeated")
    parser.add_argument("--pairs", type=positive, default=5, help="how often the two take turns [5]")
    parser.add_argument("--steps", type=positive, default=10, help="steps of a run that are counted [10]")
    parser.add_argument("--pause", type=float, default=10, help="seconds of rest before each run [10]")
    parser.add_argument("--threads", type=positive, help="of both sides [each side's own choice]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every run here")
    return parser.parse_args()


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or greater")
    return value


def check_peer(python):
    """Refuses a Python that lacks a package, and says how to install them."""
    install = "install them as benches/peers/README.md says"
    code = f"import importlib.util as u; print(*[n for n in {PEER_PACKAGES!r} if u.find_spec(n) is None])"
    try:
        missing = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failure(f"--peer-python {python} does not run ({error}); {install}") from None
    if missing:
        raise Failure(f"{python} has no {', '.join(missing)}; {install}")


def read_rows(path):
    """The rows of a file: prompt and completion each."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if line.lstrip().startswith("{"):
            row = json.loads(line)
            if not {"prompt", "completion"} <= row.keys():
                raise Failure(f"{path}:{number} has no prompt and completion")
            rows.append({"prompt": row["prompt"], "completion": row["completion"]})
        elif "||" in line:
            meaning, text = line.split("||", 1)
            rows.append({"prompt": meaning.strip() + "\n", "completion": text.strip()})
        else:
            raise Failure(f"{path}:{number} is neither JSON nor meaning||text")
    return rows


def read_labelled(path):
    """The rows of a table without a header: text and label each."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text, tab, label = line.rpartition("\t")
        if not tab:
            raise Failure(f"{path}:{number} has no tab between text and label")
        rows.append({"text": text, "label": label})
    return rows


def write_rows(rows, setting, steps, folder):
    """The rows that a setting's steps take, in their order, as a file."""
    if setting.share_prompts:
        rows = sorted(rows, key=lambda row: row["prompt"])
    path = folder / f"{setting.name}.jsonl"
    wanted = rows[: (steps + 1) * setting.batch_size]
    if setting.classifies:
        # Rows of like length share a batch, so that the peer pads little.
        wanted = sorted(wanted, key=lambda row: len(row["text"].split()))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in wanted), encoding="utf-8")
    return path


def run(command):
    """The JSON object that a command prints."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError as error:
        raise Failure(f"{command[0]} does not run: {error}") from None
    if done.returncode != 0:
        raise Failure(f"this failed with status {done.returncode}:\n{' '.join(map(str, command))}\n{done.stderr.strip()}")
    # A library may have printed something before.
    return json.loads(done.stdout[done.stdout.index("{"):])


def measure(setting, arguments, rows):
    """One dict a pair: what ours and the peer printed, and the ratios."""
    work = setting.work(rows, arguments.steps, setting.method)
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    our_model, their_model = (arguments.encoder, arguments.encoder) if setting.classifies else (arguments.model_bf16, arguments.model_f32)
    # Resolved: ./lowrank would lose its ./ as a Path, and then be looked for on PATH.
    ours = [arguments.lowrank.resolve(), "bench", "train", "--model", our_model, *work, "--warmup", "1", *threads, "--json"]
    if setting.share_prompts:
        ours.append("--share-prompts")
    work = setting.work(rows, arguments.steps, setting.peer_method or setting.method)
    theirs = [arguments.peer_python, PEER_SCRIPT, "--model", their_model, *work, *threads]
    pairs = []
    for number in range(1, arguments.pairs + 1):
        pair = {}
        for side, command in (("ours", ours), ("theirs", theirs)):
            # The system goes on clearing gigabytes for a while after the peer has ended.
            time.sleep(arguments.pause)
            pair[side] = run(command)
        pair["speed"] = pair["ours"][setting.unit] / pair["theirs"][setting.unit]
        pair["memory"] = pair["ours"]["peak_rss"] / pair["theirs"]["peak_rss"]
        say(f"{setting.name}, pair {number} of {arguments.pairs}: speed {pair['speed']:.2f}, memory {pair['memory']:.2f}")
        pairs.append(pair)
    check_same_work(setting, pairs[0])
    return pairs


def check_same_work(setting, pair):
    """Says so where the two did not train on as many tokens, or not on as many parameters."""
    ours, theirs = pair["ours"], pair["theirs"]
    figures = {"trainable parameters": (ours["trainable_parameters"], theirs["trainable_parameters"])}
    if not setting.share_prompts:
        figures["tokens"] = (ours["work"]["tokens"], theirs["tokens"])
    for what, (our, their) in figures.items():
        if abs(our - their) > 0.01 * their:
            say(f"warning: {setting.name}: lowrank had {our} {what}, the peer {their}; the ratios compare different work")


def say(text):
    print(text, file=sys.stderr, flush=True)


def spread(values):
    """Smallest, median, largest."""
    return min(values), statistics.median(values), max(values)


def table(results):
    """The Markdown table."""
    lines = [
        "| Setting | Speed, ours / theirs: min, median, max | target | Peak memory, ours / theirs: min, median, max | target |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for setting, pairs in results:
        speed = spread([pair["speed"] for pair in pairs])
        memory = spread([pair["memory"] for pair in pairs])
        cells = [
            setting.title,
            " / ".join(f"{value:.2f}" for value in speed),
            f"≥ {setting.speed_target:.2f}{mark(speed[1] >= setting.speed_target)}",
            " / ".join(f"{value:.2f}" for value in memory),
            f"≤ {setting.memory_target:.2f}{mark(memory[1] <= setting.memory_target)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mark(reached):
    return "" if reached else " (missed)"


def reached(setting, pairs):
    speed = statistics.median(pair["speed"] for pair in pairs)
    memory = statistics.median(pair["memory"] for pair in pairs)
    return speed >= setting.speed_target and memory <= setting.memory_target


def as_json(results, arguments):
    return {
        "pairs": arguments.pairs,
        "steps": arguments.steps,
        "settings": [
            {
                "name": setting.name,
                "title": setting.title,
                "unit": setting.unit,
                "speed": dict(zip(("min", "median", "max"), spread([pair["speed"] for pair in pairs]))),
                "speed_target": setting.speed_target,
                "memory": dict(zip(("min", "median", "max"), spread([pair["memory"] for pair in pairs]))),
                "memory_target": setting.memory_target,
                "runs": pairs,
            }
            for setting, pairs in results
        ],
    }


def main():
    arguments = parse_arguments()
    settings = [setting for setting in SETTINGS if not arguments.only or setting.name in arguments.only]
    try:
        classify = [setting.name for setting in settings if setting.classifies]
        others = [setting.name for setting in settings if not setting.classifies]
        needs_data = [setting.name for setting in settings if setting.seq_length is None and not setting.classifies]
        for names, wanted in ((needs_data, ("data",)), (classify, ("encoder", "labelled")), (others, ("model_bf16", "model_f32"))):
            missing = [f"--{name.replace('_', '-')}" for name in wanted if names and not getattr(arguments, name)]
            if missing:
                say(f"{', '.join(names)}: give {' and '.join(missing)}, or choose others with --only")
                return 2
        folders = [arguments.encoder] if classify else []
        folders += [arguments.model_bf16, arguments.model_f32] if others else []
        for folder in folders:
            if not (folder / "config.json").is_file():
                say(f"{folder} is no model folder: it has no config.json")
                return 2
        check_peer(arguments.peer_python)
        rows = read_rows(arguments.data) if needs_data else []
        labelled = read_labelled(arguments.labelled) if classify else []
        results = []
        with tempfile.TemporaryDirectory() as folder:
            for setting in settings:
                own = labelled if setting.classifies else rows
                path = write_rows(own, setting, arguments.steps, Path(folder)) if setting.seq_length is None else None
                results.append((setting, measure(setting, arguments, path)))
    except (Failure, OSError, ValueError, KeyError) as error:
        say(str(error) if isinstance(error, (Failure, OSError)) else f"unexpected output: {error!r}")
        return 1
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(results, arguments), indent=2) + "\n", encoding="utf-8")
    return 0 if all(reached(setting, pairs) for setting, pairs in results) else 1


if __name__ == "__main__":
    sys.exit(main())
