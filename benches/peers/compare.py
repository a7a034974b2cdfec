#!/usr/bin/env python3
"""Compares training by lowrank with training by PyTorch + PEFT on this machine, and prints a table of ratios.

For each setting the peer's configurations are tried first, in short runs, and the fastest is compared with. Then the two
run in turn, `--pairs` times. A pair gives one ratio of speed and one of peak memory, ours over theirs; the table has the
smallest, the median and the largest of them beside the target. Only ratios are printed: what a machine does in a second
says nothing about another one.

    python3 compare.py --lowrank ../../target/release/lowrank --peer-python VENV/bin/python \\
        --model-bf16 DIR --model-f32 DIR --data rows.jsonl --encoder DIR --labelled rows.tsv

Needs nothing but Python; README.md beside this file says how to install the peer. Exit status: 0 if every median
reaches its target, 1 if one does not or a command fails, 2 for misuse.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

PEER_SCRIPT = Path(__file__).resolve().parent / "peft_train.py"
PEER_PACKAGES = ("torch", "transformers", "peft")
# A configuration whose try takes so many times as long as the shortest is given up, as bf16 is on a processor without units for it.
GIVE_UP = 3

CPU_INFO = Path("/proc/cpuinfo")
# Flags of a processor that multiplies bf16, and all those that --json keeps.
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
# What keeps both sides to AVX2: lowrank, then PyTorch's own kernels and the libraries that multiply for it.
AVX2_ALONE = {"LOWRANK_CPU": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
AVX2_FLAGS = ("avx2", "fma")
KEPT_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_int8", *BF16_FLAGS)


@dataclass(frozen=True)
class Machine:
    """The processor, as far as it decides what is compared."""

    name: str
    cores: int
    flags: tuple[str, ...]

    @classmethod
    def this(cls):
        """This machine; without flags where the system does not have /proc/cpuinfo."""
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace") if CPU_INFO.is_file() else ""
        return cls.read(text, os.cpu_count() or 1)

    @classmethod
    def read(cls, cpu_info, cores):
        """The first processor that /proc/cpuinfo lists."""
        fields = {}
        for line in cpu_info.splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        found = fields.get("flags", "").split()
        name = fields.get("model name") or platform.processor() or platform.machine()
        return cls(name, cores, tuple(flag for flag in KEPT_FLAGS if flag in found))

    def with_avx2_alone(self):
        """What the machine is while AVX2_ALONE is in the environment."""
        return Machine(self.name, self.cores, tuple(flag for flag in self.flags if flag in AVX2_FLAGS))

    @property
    def has_bf16(self):
        return any(flag in self.flags for flag in BF16_FLAGS)

    @property
    def column(self):
        """The name of the column of targets."""
        return "with bf16 units" if self.has_bf16 else "without bf16 units"


@dataclass(frozen=True)
class Configuration:
    """One of the ways in which the peer's users would run a setting."""

    name: str
    title: str
    options: tuple[str, ...] = ()
    # Tried with --try-compile alone: compiling takes minutes.
    compiles: bool = False

    @property
    def in_bf16(self):
        return "bf16" in self.options


GROUP, AUTOCAST, COMPILE = ("--group-by-length",), ("--autocast",), ("--compile",)
BF16 = ("--weights", "bf16", *AUTOCAST)
F32 = Configuration("f32", "f32")
GROUPED = Configuration("grouped", "f32, grouped by length", GROUP)
FOR_ROWS = (
    F32,
    GROUPED,
    Configuration("bf16", "bf16, grouped by length", (*GROUP, *BF16)),
    Configuration("bf16-compiled", "bf16, grouped by length, compiled", (*GROUP, *BF16, *COMPILE), compiles=True),
)
# Rows of one length need no grouping.
FOR_RANDOM = (
    F32,
    Configuration("bf16", "bf16", BF16),
    Configuration("bf16-compiled", "bf16, compiled", (*BF16, *COMPILE), compiles=True),
)
# AdamW on weights in bf16 loses small updates and is another training than lowrank's, so the weights that are trained stay in f32.
FOR_FULL = (
    F32,
    GROUPED,
    Configuration("autocast", "f32 weights, autocast to bf16, grouped by length", (*GROUP, *AUTOCAST)),
    Configuration("autocast-compiled", "f32 weights, autocast to bf16, grouped by length, compiled", (*GROUP, *AUTOCAST, *COMPILE),
                  compiles=True),
)


@dataclass(frozen=True)
class Target:
    """What the ratios of speed (at least) and memory (at most) should be."""

    speed: float
    memory: float


@dataclass(frozen=True)
class Setting:
    """One job for both sides."""

    name: str
    title: str
    # Targets with bf16 units, and without.
    targets: tuple[Target, Target]
    batch_size: int
    # What is tried of the peer.
    configurations: tuple[Configuration, ...] = FOR_ROWS
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

    def target(self, machine):
        with_bf16, without = self.targets
        return with_bf16 if machine.has_bf16 else without

    def work(self, rows, steps, method):
        """The arguments that both sides understand."""
        source = ["--data", str(rows)] if self.seq_length is None else ["--seq-length", str(self.seq_length)]
        return [*source, "--batch-size", str(self.batch_size), "--steps", str(steps), *method]


QUERY_VALUE = ("--method", "lora", "--r", "8", "--target-modules", "query,value")
ALL_LINEAR = ("--method", "lora", "--r", "8", "--target-modules", "all-linear")
SETTINGS = (
    Setting("e2e-qv", "E2E rows, LoRA q and v, r 4, batch 8", (Target(2.0, 1 / 5), Target(1.6, 1 / 6)), 8),
    Setting("e2e-all", "E2E rows, LoRA all-linear, r 8, batch 8", (Target(2.2, 1 / 5), Target(1.7, 1 / 6)), 8, method=ALL_LINEAR),
    Setting("random-256", "random tokens, LoRA q and v, r 4, batch 4 x 256", (Target(1.7, 1 / 5), Target(1.3, 1 / 6)), 4, FOR_RANDOM,
            seq_length=256),
    Setting("random-1024", "random tokens, LoRA q and v, r 4, batch 2 x 1024", (Target(1.6, 1 / 5), Target(1.3, 1 / 6)), 2, FOR_RANDOM,
            seq_length=1024),
    Setting("e2e-full", "E2E rows, full fine-tuning, batch 8", (Target(1.7, 0.6), Target(1.5, 0.6)), 8, FOR_FULL, method=("--method", "full")),
    Setting("e2e-shared", "E2E rows by prompt, LoRA q and v, r 4, batch 16, --share-prompts", (Target(3.5, 1 / 5), Target(3.0, 1 / 6)), 16,
            share_prompts=True),
    Setting("sst2-lora", "SST-2 rows by length, classifier, LoRA query and value, r 8, batch 32", (Target(2.5, 1 / 3),) * 2, 32, (F32,),
            classifies=True, method=QUERY_VALUE),
    Setting("sst2-head", "SST-2 rows by length, classifier alone, batch 32", (Target(2.5, 1 / 3),) * 2, 32, (F32,), classifies=True,
            method=("--method", "top", "--head-only"), peer_method=("--method", "head")),
)
CONFIGURATIONS = sorted({configuration.name for setting in SETTINGS for configuration in setting.configurations})


class Failure(Exception):
    """Something that the person who runs this has to mend."""


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowrank", required=True, type=Path, help="the binary, built with --release")
    parser.add_argument("--peer-python", required=True, type=Path, help="a Python that has torch, transformers and peft")
    parser.add_argument("--model-bf16", type=Path, help="the model for lowrank, stored in bf16, and for the peer where it has bf16 weights")
    parser.add_argument("--model-f32", type=Path, help="the same model, stored in f32, for the peer where it has f32 weights")
    parser.add_argument("--data", type=Path, help="JSONL of {prompt, completion}, or lines of meaning||text")
    parser.add_argument("--encoder", type=Path, help="an encoder for both, such as MiniLM")
    parser.add_argument("--labelled", type=Path, help="lines of text, tab, label")
    parser.add_argument("--only", action="append", choices=[setting.name for setting in SETTINGS], metavar="SETTING",
                        help="one of " + ", ".join(setting.name for setting in SETTINGS) + "; may be repeated")
    parser.add_argument("--peer-config", choices=CONFIGURATIONS, metavar="NAME",
                        help="compare with this configuration of the peer, and try none: one of " + ", ".join(CONFIGURATIONS))
    parser.add_argument("--try-compile", action="store_true", help="also try the peer with torch.compile, which takes minutes")
    parser.add_argument("--tries", type=positive, default=2, help="how often each configuration of the peer is tried [2]")
    parser.add_argument("--try-steps", type=positive, default=5, help="steps of a try that are counted [5]")
    parser.add_argument("--pairs", type=positive, default=5, help="how often the two take turns [5]")
    parser.add_argument("--steps", type=positive, default=10, help="steps of a run that are counted [10]")
    parser.add_argument("--pause", type=float, default=10, help="seconds of rest before each run [10]")
    parser.add_argument("--threads", type=positive, help="of both sides [each side's own choice]")
    parser.add_argument("--avx2", action="store_true", help="keep both sides to AVX2, as on a processor that has no more")
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


def run(command, seconds=None):
    """The JSON object that a command prints; None if it takes longer than so many seconds."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    except OSError as error:
        raise Failure(f"{command[0]} does not run: {error}") from None
    if done.returncode != 0:
        raise Failure(f"this failed with status {done.returncode}:\n{' '.join(map(str, command))}\n{done.stderr.strip()}")
    # A library may have printed something before.
    return json.loads(done.stdout[done.stdout.index("{"):])


def peer_command(setting, configuration, arguments, rows, steps):
    work = setting.work(rows, steps, setting.peer_method or setting.method)
    of_text = arguments.model_bf16 if configuration.in_bf16 else arguments.model_f32
    model = arguments.encoder if setting.classifies else of_text
    return [arguments.peer_python, PEER_SCRIPT, "--model", model, *work, *configuration.options, *threads_of(arguments)]


def threads_of(arguments):
    return ["--threads", str(arguments.threads)] if arguments.threads else []


def pinned(setting, name):
    """The configuration of that name; None where the setting has no such configuration."""
    return next((found for found in setting.configurations if found.name == name), None)


def choose(setting, arguments, rows):
    """The configuration of the peer to compare with, and what each did that was tried for it."""
    if arguments.peer_config:
        return pinned(setting, arguments.peer_config), []
    wanted = [found for found in setting.configurations if arguments.try_compile or not found.compiles]
    if len(wanted) == 1:
        return wanted[0], []
    tried, slow, least = [], [], None
    # In turn, so that a disturbance of the machine does not hit all runs of one configuration.
    for _ in range(arguments.tries):
        for configuration in wanted:
            if configuration in slow:
                continue
            time.sleep(arguments.pause)
            begun, limit = time.monotonic(), None if least is None else GIVE_UP * least
            figures = run(peer_command(setting, configuration, arguments, rows, arguments.try_steps), limit)
            if figures is None:
                say(f"{setting.name}, the peer with {configuration.title}: given up after {limit:.0f} s, since another one took {least:.0f}")
                slow.append(configuration)
                continue
            took = time.monotonic() - begun
            least = min(took, least or took)
            say(f"{setting.name}, the peer with {configuration.title}: {figures['tokens_per_second']:.0f} tokens/s")
            tried.append((configuration, figures))
    if len({figures["tokens"] for _, figures in tried}) > 1:
        raise Failure(f"{setting.name}: the peer's configurations did not train on the same tokens")
    return fastest(tried), tried


def fastest(tried):
    """The configuration of the fastest run: other work on the machine slows a run down, and nothing makes it faster than it is."""
    return max(tried, key=lambda pair: pair[1]["tokens_per_second"])[0]


def measure(setting, configuration, arguments, rows):
    """One dict a pair: what ours and the peer printed, and the ratios."""
    work = setting.work(rows, arguments.steps, setting.method)
    model = arguments.encoder if setting.classifies else arguments.model_bf16
    # Resolved: ./lowrank would lose its ./ as a Path, and then be looked for on PATH.
    ours = [arguments.lowrank.resolve(), "bench", "train", "--model", model, *work, "--warmup", "1", *threads_of(arguments), "--json"]
    if setting.share_prompts:
        ours.append("--share-prompts")
    theirs = peer_command(setting, configuration, arguments, rows, arguments.steps)
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
    for warning in differences(setting, pairs[0], arguments.steps):
        say(f"warning: {setting.name}: {warning}; the ratios compare different work")
    return pairs


def differences(setting, pair, steps):
    """In what the two did not do the same work: they train as many parameters, and on the same rows.

    lowrank takes the counted rows in file order, the first batch left out. The peer may put them into batches in another order, but they
    must be these, and then both count the same tokens but for the few that a joint text of prompt and completion saves.
    """
    ours, theirs = pair["ours"], pair["theirs"]
    figures = {"trainable parameters": (ours["trainable_parameters"], theirs["trainable_parameters"])}
    if not setting.share_prompts:
        figures["tokens"] = (ours["work"]["tokens"], theirs["tokens"])
    if setting.seq_length is None and not setting.classifies and not setting.share_prompts:
        figures["tokens with loss"] = (ours["work"]["supervised_tokens"], theirs["supervised_tokens"])
    found = [f"lowrank had {our} {what}, the peer {their}" for what, (our, their) in figures.items() if abs(our - their) > 0.01 * their]
    size, known = setting.batch_size, theirs["rows_of_file"]
    if theirs["rows"] != sorted(i % known for i in range(size, (steps + 1) * size)):
        found.append(f"the peer did not train on the {steps * size} rows after the first {size}")
    return found


def say(text):
    print(text, file=sys.stderr, flush=True)


def spread(values):
    """Smallest, median, largest."""
    return min(values), statistics.median(values), max(values)


@dataclass(frozen=True)
class Result:
    """What a setting came to."""

    setting: Setting
    configuration: Configuration
    # Configurations with the figures of each try, in the order of the runs; none where there was no choice.
    tried: list
    pairs: list

    def values(self, what):
        return [pair[what] for pair in self.pairs]

    def reached(self, machine):
        """Whether the median of speed and that of memory reach their targets."""
        target = self.setting.target(machine)
        return (statistics.median(self.values("speed")) >= target.speed, statistics.median(self.values("memory")) <= target.memory)


def table(results, machine):
    """The Markdown table."""
    lines = [
        "| Setting | Peer | Speed, ours / theirs: min, median, max | target | Peak memory, ours / theirs: min, median, max | target |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        target = result.setting.target(machine)
        fast, small = result.reached(machine)
        cells = [
            result.setting.title,
            result.configuration.title,
            " / ".join(f"{value:.2f}" for value in spread(result.values("speed"))),
            f"≥ {target.speed:.2f}{mark(fast)}",
            " / ".join(f"{value:.2f}" for value in spread(result.values("memory"))),
            f"≤ {target.memory:.2f}{mark(small)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mark(reached):
    return "" if reached else " (missed)"


def as_json(results, arguments, machine):
    return {
        "machine": {**asdict(machine), "targets": machine.column},
        "pairs": arguments.pairs,
        "steps": arguments.steps,
        "tries": arguments.tries,
        "try_steps": arguments.try_steps,
        "settings": [setting_as_json(result, machine) for result in results],
    }


def setting_as_json(result, machine):
    setting, target = result.setting, result.setting.target(machine)
    tried = [
        {**configuration_as_json(configuration), "tokens_per_second": figures["tokens_per_second"], "run": figures}
        for configuration, figures in result.tried
    ]
    return {
        "name": setting.name,
        "title": setting.title,
        "unit": setting.unit,
        "peer_config": configuration_as_json(result.configuration),
        "tried": tried,
        "speed": dict(zip(("min", "median", "max"), spread(result.values("speed")))),
        "speed_target": target.speed,
        "memory": dict(zip(("min", "median", "max"), spread(result.values("memory")))),
        "memory_target": target.memory,
        "runs": result.pairs,
    }


def configuration_as_json(configuration):
    return {"name": configuration.name, "title": configuration.title, "options": list(configuration.options)}


def main():
    arguments = parse_arguments()
    settings = [setting for setting in SETTINGS if not arguments.only or setting.name in arguments.only]
    machine = Machine.this()
    if arguments.avx2:
        machine = machine.with_avx2_alone()
        os.environ.update(AVX2_ALONE)
    say(f"{machine.name}, {machine.cores} cores, {' '.join(machine.flags) or 'flags unknown'}: targets {machine.column}")
    try:
        if arguments.peer_config:
            lacking = [setting.name for setting in settings if not pinned(setting, arguments.peer_config)]
            if lacking:
                say(f"{', '.join(lacking)}: the peer has no configuration {arguments.peer_config} there; choose settings with --only, or another:")
                for setting in settings:
                    say(f"  {setting.name}: {', '.join(found.name for found in setting.configurations)}")
                return 2
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
                steps = max(arguments.steps, arguments.try_steps if len(setting.configurations) > 1 else 0)
                path = write_rows(own, setting, steps, Path(folder)) if setting.seq_length is None else None
                configuration, tried = choose(setting, arguments, path)
                pairs = measure(setting, configuration, arguments, path)
                results.append(Result(setting, configuration, tried, pairs))
    except (Failure, OSError, ValueError, KeyError) as error:
        say(str(error) if isinstance(error, (Failure, OSError)) else f"unexpected output: {error!r}")
        return 1
    print(f"Targets {machine.column}.\n")
    print(table(results, machine))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(results, arguments, machine), indent=2) + "\n", encoding="utf-8")
    return 0 if all(all(result.reached(machine)) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
