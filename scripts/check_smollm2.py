#!/usr/bin/env python3
"""Compares the `lowrank` binary with transformers and PEFT on a real model, SmolLM2-135M-Instruct.

The tests' goldens are tiny models; this is the same comparison at real size, through the command line and the files
that users have. It takes most of an hour on two cores, so nothing runs it automatically.

    pip install torch transformers peft safetensors tokenizers gguf
    scripts/get-smollm2.sh DIR                       # says where the GGUF is
    python scripts/check_smollm2.py --lowrank target/release/lowrank --gguf FILE.gguf \\
        --eval-rows eval.jsonl --train-rows train.jsonl --work WORK

EVAL and TRAIN are JSONL files of `{"prompt", "completion"}` rows, a few hundred each; TRAIN needs at least 160. A row
is encode(prompt) + encode(completion) + [end token], with the loss on the completion and the end token.

`--peer-model` is the GGUF as a Hugging Face folder in float32, as transformers dequantises it; without it one is made
in WORK. transformers gives this GGUF's tokenizer a plain byte-level split where the model was trained with digits
split one by one, so the tokenizer used here is that folder's vocabulary with the split mended.

    1 import     `model import` gives transformers a folder it loads: the same weights, ids and loss
    2 greedy     32 greedy continuations of 48 tokens are the same
    3 adapters   PEFT's adapters (B not zero) lose the same in lowrank, and lowrank's in PEFT
    4 training   twenty steps from one adapter over the same rows give the same losses
    5 merge      a merged folder loses the same in transformers
    6 bf16       training on a bf16 base ends within 1 % of the f32 base's held-out loss
    7 tokens     a few hundred strings have the same ids in both

Each check prints its figure and its tolerance. Exit status: 0 if all hold, 1 if one fails, 2 for misuse. What PyTorch
computes is kept in WORK as JSON, under names that change with the inputs; a second run only runs lowrank. Without
--lowrank only that half runs. `--only 3,4` picks checks; 2, 4, 5 and 6 use what 1 and 4 write, and write it if needed.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

LOSS_TOLERANCE = 1e-4  # nats a token, of a mean over thousands of tokens in f32
STEP_TOLERANCE = 1e-3  # nats a token, of one step's batch, twenty steps in
BF16_TOLERANCE = 0.01  # of the loss
GREEDY_PROMPTS, GREEDY_TOKENS = 32, 48
STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 20, 8, 2e-4, 0.01
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "query-value": dict(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
    "all-linear": dict(r=8, lora_alpha=12, target_modules=ALL_LINEAR),
}


class CommandFailed(Exception):
    """A command of lowrank failed, or gave no JSON."""


class Report:
    """Prints each comparison as it is made, and remembers whether all of them held."""

    def __init__(self):
        self.failures = 0

    def add(self, name, passed, detail):
        self.failures += not passed
        print(f"{'ok  ' if passed else 'FAIL'}  {name}: {detail}", flush=True)

    def close(self, name, ours, theirs, tolerance):
        """Two numbers that must agree to `tolerance`; a NaN on either side fails."""
        difference = abs(ours - theirs)
        self.add(name, difference <= tolerance,
                 f"lowrank {ours:.6f}, peer {theirs:.6f}, difference {difference:.1e} (tolerance {tolerance:.0e})")

    def none(self, name, wrong, total, examples=()):
        """A count of disagreements that must be zero."""
        shown = "".join(f"\n      {example}" for example in examples)
        self.add(name, not wrong, f"{wrong} of {total} differ (tolerance 0){shown}")


def file_hash(*paths):
    """A short name for the contents of files and for plain settings."""
    state = hashlib.sha256()
    for path in paths:
        if isinstance(path, Path):
            with open(path, "rb") as file:
                state.update(hashlib.file_digest(file, "sha256").digest())
        else:
            state.update(repr(path).encode())
    return state.hexdigest()[:12]


def read_rows(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


class Peer:
    """PyTorch's half. Every result is a JSON value, kept in the work folder."""

    def __init__(self, folder, work):
        import torch
        from tokenizers import Tokenizer, pre_tokenizers

        self.torch, self.folder, self.work = torch, folder, work
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.end = json.loads((folder / "config.json").read_text())["eos_token_id"]
        self.model_hash = file_hash(folder / "model.safetensors", folder / "config.json")

    def kept(self, what, inputs, compute):
        """`compute()`, or what it gave for these inputs before."""
        path = self.work / f"peer-{what}-{file_hash(self.model_hash, *inputs)}.json"
        if not path.exists():
            print(f"      computing {path.name} with PyTorch", flush=True)
            value = compute()
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(value, ensure_ascii=False))
            temporary.rename(path)
        return json.loads(path.read_text())

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def example(self, row):
        """(ids, labels) of a row; labels are -100 where there is no loss."""
        prompt, completion = self.ids(row["prompt"]), self.ids(row["completion"]) + [self.end]
        return prompt + completion, [-100] * len(prompt) + completion

    def load(self, folder=None):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder or self.folder, dtype=self.torch.float32).eval()

    def load_adapted(self, adapter, trainable=False):
        from peft import PeftModel

        return PeftModel.from_pretrained(self.load(), adapter, is_trainable=trainable)

    def mean_loss(self, model, rows):
        """Nats a supervised token over all rows, each run alone."""
        torch, total, count = self.torch, 0.0, 0
        with torch.no_grad():
            for ids, labels in map(self.example, rows):
                logits, target = model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:])
                keep = target != -100
                total += torch.nn.functional.cross_entropy(logits[keep].double(), target[keep], reduction="sum").item()
                count += int(keep.sum())
        return total / count

    def base_loss(self, rows_path):
        return self.kept("base-loss", [rows_path], lambda: self.mean_loss(self.load(), read_rows(rows_path)))

    def folder_loss(self, folder, rows_path):
        inputs = [rows_path, folder / "config.json", folder / "model.safetensors"]
        return self.kept("folder-loss", inputs, lambda: self.mean_loss(self.load(folder), read_rows(rows_path)))

    def adapter_loss(self, adapter, rows_path):
        inputs = [rows_path, adapter / "adapter_model.safetensors", adapter / "adapter_config.json"]
        return self.kept("adapter-loss", inputs,
                         lambda: self.mean_loss(self.load_adapted(adapter).eval(), read_rows(rows_path)))

    def greedy(self, prompts):
        """For each prompt the likeliest continuation, and how far apart the two best logits of each choice were."""
        def compute():
            torch, model, found = self.torch, self.load(), []
            for prompt in prompts:
                ids = torch.tensor([self.ids(prompt)])
                output = model.generate(
                    ids, attention_mask=torch.ones_like(ids), pad_token_id=self.end, do_sample=False,
                    max_new_tokens=GREEDY_TOKENS, return_dict_in_generate=True, output_logits=True)
                new = [token for token in output.sequences[0, ids.shape[1]:].tolist() if token != self.end]
                best = [step[0].topk(2).values for step in output.logits]
                gaps = [(first - second).item() for first, second in best]
                found.append({"text": self.tokenizer.decode(new), "ids": new, "gaps": gaps})
            return found

        return self.kept("greedy", [prompts, GREEDY_TOKENS], compute)

    def make_adapter(self, name):
        """A PEFT adapter with random A and B, big enough to change the loss and small enough not to ruin it."""
        folder = self.work / f"adapter-{name}"
        if not (folder / "adapter_model.safetensors").exists():
            from peft import LoraConfig, get_peft_model

            torch, settings = self.torch, ADAPTERS[name]
            model = get_peft_model(self.load(), LoraConfig(task_type="CAUSAL_LM", **settings))
            source = torch.Generator().manual_seed(settings["r"])
            with torch.no_grad():
                for key, value in model.named_parameters():
                    if "lora_" in key:
                        size = 0.05 if "lora_A" in key else 0.01
                        value.copy_(size * torch.randn(value.shape, generator=source))
            model.save_pretrained(folder)
        return folder

    def training_losses(self, adapter, rows_path):
        """The loss of each of the first twenty steps, with padded batches as a PEFT user would run them."""
        def compute():
            torch, model = self.torch, self.load_adapted(adapter, trainable=True).train()
            trainable = [x for x in model.parameters() if x.requires_grad]
            optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
            examples, losses = [self.example(row) for row in read_rows(rows_path)], []
            for step in range(STEPS):
                batch = examples[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
                longest = max(len(ids) for ids, _ in batch)
                pad = lambda values, filler: values + [filler] * (longest - len(values))
                loss = model(
                    input_ids=torch.tensor([pad(ids, self.end) for ids, _ in batch]),
                    attention_mask=torch.tensor([pad([1] * len(ids), 0) for ids, _ in batch]),
                    labels=torch.tensor([pad(labels, -100) for _, labels in batch]),
                ).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

        settings = [STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY]
        inputs = [rows_path, adapter / "adapter_model.safetensors", adapter / "adapter_config.json", settings]
        return self.kept("training", inputs, compute)


class Lowrank:
    """The binary's half, and every command line used. What it writes is in WORK, under the binary's hash."""

    def __init__(self, binary, gguf, work):
        self.binary, self.gguf, self.work, self.version = binary, gguf, work, file_hash(binary)

    def run(self, *arguments):
        """Runs a command and gives its standard output; what it says on standard error is shown if it fails."""
        command = [str(self.binary), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if done.returncode != 0:
            raise CommandFailed(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout

    def json(self, *arguments):
        output = self.run(*arguments, "--json")
        try:
            return json.loads(output)
        except ValueError as error:
            raise CommandFailed(f"{arguments[0]} --json wrote no JSON object ({error}): {output[:200]!r}") from None

    def model(self):
        """The imported folder."""
        folder = self.work / f"imported-{self.version}"
        if not (folder / "model.safetensors").exists():
            self.run("model", "import", self.gguf, "--output", folder, "--dtype", "f32")
        return folder

    def loss(self, rows_path, adapter=None, model=None, dtype="f32"):
        adapted = ["--adapter", adapter] if adapter else []
        command = ["eval", "--model", model or self.model(), *adapted, "--data", rows_path, "--base-dtype", dtype,
                   "--completion-boundary", "apart"]
        return self.json(*command)["loss"]

    def greedy(self, prompts):
        """The continuations of all prompts, made in one batch."""
        path = self.work / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": x, "completion": "."}) + "\n" for x in prompts), encoding="utf-8")
        command = ["generate", "--model", self.model(), "--data", path, "--base-dtype", "f32"]
        made = self.json(*command, "--max-new-tokens", GREEDY_TOKENS, "--temperature", 0)["generations"]
        return [one["text"] for one in made]

    def train(self, name, initial, rows_path, dtype):
        """Trains twenty steps from `initial`, unless these inputs were trained on before; the folder and the losses."""
        inputs = file_hash(initial / "adapter_model.safetensors", rows_path)
        output = self.work / f"trained-{name}-{dtype}-{inputs}-{self.version}"
        if not (output / "adapter_model.safetensors").exists():
            self.run(
                "train", "--model", self.model(), "--data", rows_path, "--method", "lora", "--init-adapter", initial,
                "--no-shuffle", "--max-steps", STEPS, "--batch-size", BATCH_SIZE, "--learning-rate", LEARNING_RATE,
                "--completion-boundary", "apart", "--lr-scheduler-type", "constant", "--weight-decay", WEIGHT_DECAY, "--max-grad-norm", 0,
                "--base-dtype", dtype, "--output", output)
        lines = read_rows(output / "metrics.jsonl")
        return output, [line["loss"] for line in lines if "loss" in line]

    def merge(self, name, adapter, rows_path):
        output = self.work / f"merged-{name}-{file_hash(adapter / 'adapter_model.safetensors')}-{self.version}"
        if not (output / "model.safetensors").exists():
            self.run("merge", "--model", self.model(), "--adapter", adapter, "--output", output, "--dtype", "f32",
                     "--data", rows_path)
        return output

    def ids(self, strings):
        """The ids of each string, as the prompts of a data file."""
        path = self.work / "strings.jsonl"
        path.write_text("".join(json.dumps({"prompt": x, "completion": "."}) + "\n" for x in strings), encoding="utf-8")
        shown = self.json("data", "preview", "--model", self.model(), "--data", path, "--rows", len(strings),
                          "--completion-boundary", "apart")
        return [[x for x, label in zip(row["ids"], row["labels"]) if label == -100] for row in shown["examples"]]


def varied_strings(rows, count=400):
    """Strings that byte-level tokenizers get wrong: digits, runs of spaces, scripts, emoji, code, special tokens."""
    pieces = [
        " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "a", "I", "it's", "we'll", "THEY'VE", "don't", "'s", "''", "’s",
        "0", "7", "12", "1234567", "3.14", "1,000", "£30", "$5", "50%", "²", "½", "٣٤", "Ⅷ", "x1y2", "2024-01-31", "v0.1.2",
        "café", "cafe\u0301", "naïve", "Straße", "ﬁ", "Ελλάδα", "Привет", "שלום", "مرحبا", "नमस्ते", "你好", "世界，你好。", "こんにちは",
        "안녕", "ไทย", "🙂", "👩‍👩‍👧", "🇩🇪", "\u200b", "\u00a0", "\u2028", "\ufeff", "\x00", "\x7f", "…", "—", "“q”", "¿Qué?",
        "fn main() {", "\n    return x;\n}", "a_b", "camelCase", "<p>", "&amp;", "http://a.b/c?d=e#f", "user@host", "\\n", "//", "##",
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\nHi<|im_end|>\n", "<|im_", "<repo_name>", "<file_sep>",
    ]
    source = random.Random(7)
    mixed = ["".join(source.choices(pieces, k=source.randint(2, 9))) for _ in range(count // 2)]
    texts = [row[key] for row in rows for key in ("prompt", "completion")]
    return (pieces + mixed + texts)[:count]


def peer_folder(gguf, work):
    """The GGUF as a Hugging Face folder in f32, dequantised by transformers."""
    folder = work / "peer-model"
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(loaded.config)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model.float().save_pretrained(folder)
    return folder


def check_import(report, peer, lowrank, rows):
    theirs = peer.base_loss(rows.eval)
    if lowrank:
        from transformers import AutoModelForCausalLM

        model, loading = AutoModelForCausalLM.from_pretrained(
            lowrank.model(), dtype=peer.torch.float32, output_loading_info=True)
        wrong = [f"{kind}: {sorted(names)}" for kind, names in loading.items() if names]
        report.none("import, keys transformers complains of", len(wrong), len(model.state_dict()), wrong)
        ours, expected = model.state_dict(), peer.load().state_dict()
        wrong = [key for key in expected if key not in ours or not peer.torch.equal(ours[key], expected[key])]
        report.none("import, weights", len(wrong), len(expected), wrong[:5])
        report.close("import, loss", lowrank.loss(rows.eval), theirs, LOSS_TOLERANCE)


def check_greedy(report, peer, lowrank, rows):
    prompts = [row["prompt"] for row in read_rows(rows.eval)[:GREEDY_PROMPTS]]
    theirs = peer.greedy(prompts)
    if lowrank:
        examples = []
        for text, expected in zip(lowrank.greedy(prompts), theirs, strict=True):
            if text.strip() != expected["text"].strip():
                closest = min(expected["gaps"])
                examples.append(f"{text!r}\n      peer, closest choice {closest:.1e}: {expected['text']!r}")
        report.none("greedy, continuations", len(examples), len(prompts), examples[:3])


def check_adapters(report, peer, lowrank, rows):
    for name in ADAPTERS:
        adapter = peer.make_adapter(name)
        theirs = peer.adapter_loss(adapter, rows.eval)
        if lowrank:
            report.close(f"adapters, PEFT's {name}", lowrank.loss(rows.eval, adapter), theirs, LOSS_TOLERANCE)
    if lowrank:
        trained, _ = lowrank.train("query-value", peer.make_adapter("query-value"), rows.train, "f32")
        ours = lowrank.loss(rows.eval, trained)
        report.close("adapters, lowrank's", ours, peer.adapter_loss(trained, rows.eval), LOSS_TOLERANCE)


def check_training(report, peer, lowrank, rows):
    for name in ADAPTERS:
        adapter = peer.make_adapter(name)
        theirs = peer.training_losses(adapter, rows.train)
        if lowrank:
            _, ours = lowrank.train(name, adapter, rows.train, "f32")
            if len(ours) != len(theirs):
                report.add(f"training, {name}", False, f"{len(ours)} losses, expected {len(theirs)}")
                continue
            worst = max(range(STEPS), key=lambda step: abs(ours[step] - theirs[step]))
            report.close(f"training, {name}, worst step {worst + 1}", ours[worst], theirs[worst], STEP_TOLERANCE)


def check_merge(report, peer, lowrank, rows):
    if lowrank:
        adapter = peer.make_adapter("all-linear")
        merged = lowrank.merge("all-linear", adapter, rows.eval)
        report.close("merge, merged by lowrank and run by transformers, against the adapter in PEFT",
                     peer.folder_loss(merged, rows.eval), peer.adapter_loss(adapter, rows.eval), LOSS_TOLERANCE)
        report.close("merge, run by both", lowrank.loss(rows.eval, model=merged), peer.folder_loss(merged, rows.eval),
                     LOSS_TOLERANCE)


def check_bf16(report, peer, lowrank, rows):
    if lowrank:
        initial, losses = peer.make_adapter("query-value"), {}
        for dtype in ("f32", "bf16"):
            trained, _ = lowrank.train("query-value", initial, rows.train, dtype)
            losses[dtype] = lowrank.loss(rows.eval, trained, dtype=dtype)
        apart = abs(losses["bf16"] / losses["f32"] - 1)
        report.add("bf16, held-out loss after training", apart <= BF16_TOLERANCE,
                   f"{losses['bf16']:.5f}, f32 {losses['f32']:.5f}, {apart:.2%} apart (tolerance {BF16_TOLERANCE:.0%})")


def check_tokens(report, peer, lowrank, rows):
    strings = varied_strings(read_rows(rows.eval))
    if lowrank:
        from transformers import AutoTokenizer

        imported = AutoTokenizer.from_pretrained(lowrank.model())
        theirs = [imported(text, add_special_tokens=False).input_ids for text in strings]
        ours = lowrank.ids(strings)
        expected = {"transformers on the imported folder": theirs, "the trained split": [peer.ids(x) for x in strings]}
        for name, ids in expected.items():
            wrong = [f"{text!r}: {a}, peer {b}" for text, a, b in zip(strings, ours, ids, strict=True) if a != b]
            report.none(f"tokens, {name}", len(wrong), len(strings), wrong[:3])


CHECKS = {
    1: check_import, 2: check_greedy, 3: check_adapters, 4: check_training, 5: check_merge, 6: check_bf16,
    7: check_tokens,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowrank", type=Path, help="the binary; without it only PyTorch's half runs")
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct as GGUF")
    parser.add_argument("--peer-model", type=Path, help="the same as a Hugging Face folder; made in WORK if not given")
    parser.add_argument("--eval-rows", dest="eval", type=Path, required=True, help="JSONL of prompt and completion")
    parser.add_argument("--train-rows", dest="train", type=Path, required=True, help="the same, at least 160 rows")
    parser.add_argument("--work", type=Path, required=True, help="folder for results and outputs")
    parser.add_argument("--threads", type=int, help="PyTorch's threads; default: its own choice")
    parser.add_argument("--only", help="numbers of checks, as in 1,3; default: all")
    arguments = parser.parse_args()
    try:
        chosen = {int(x): CHECKS[int(x)] for x in arguments.only.split(",")} if arguments.only else CHECKS
    except (KeyError, ValueError):
        parser.error(f"--only takes numbers from 1 to {len(CHECKS)} with commas between")
    if len(read_rows(arguments.train)) < STEPS * BATCH_SIZE:
        parser.error(f"{arguments.train} has fewer than {STEPS * BATCH_SIZE} rows")
    arguments.work.mkdir(parents=True, exist_ok=True)
    peer = Peer(arguments.peer_model or peer_folder(arguments.gguf, arguments.work), arguments.work)
    if arguments.threads:
        peer.torch.set_num_threads(arguments.threads)
    lowrank = Lowrank(arguments.lowrank.resolve(), arguments.gguf, arguments.work) if arguments.lowrank else None
    report = Report()
    for number, check in chosen.items():
        try:
            check(report, peer, lowrank, arguments)
        except CommandFailed as error:  # that check has failed; the others go on
            report.add(f"check {number}", False, str(error))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
