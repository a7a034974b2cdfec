#!/usr/bin/env python3
"""What `train --add-tokens` writes loses the same in transformers with PEFT, and so does the merged model.

    pip install torch transformers peft safetensors
    python scripts/check_added_tokens.py --lowrank target/release/lowrank

The models are the built-in one, whose head is the embedding, the same with a head of its own, and both with an embedding of more rows
than there are tokens. Exit status: 0 if all losses, ids and sizes agree, 1 if not.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

BUILTIN = Path(__file__).resolve().parent.parent / "crates/lowrank/builtin"
TOLERANCE = 1e-4
# The last one is in the vocabulary, and keeps its id.
TOKENS = ["<sensor>", "<unit>", " kelvin", "Zürich", "Q"]
TEXTS = [
    "<sensor> reads 4 <unit> in Zürich.",
    "In Zürich Q the <sensor> reads 7 kelvin<unit>.",
    "the weather of Zürich, by <sensor>: 12 <unit>",
    "A day without any of them.",
]
# Whether the head is the embedding, and how many rows there are beyond the tokens.
MODELS = {"tied": (True, 0), "untied": (False, 0), "tied, spare rows": (True, 2), "untied, spare rows": (False, 9)}


def run(arguments, *command):
    """A command's JSON."""
    done = subprocess.run([arguments.lowrank, *command, "--json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout)


def write_model(folder, tied, spare):
    """A folder of the built-in model, changed."""
    model = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    if not tied:
        head = model.lm_head.weight.detach().clone()
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head + 0.01 * torch.randn(head.shape))
    if spare:
        model.resize_token_embeddings(model.config.vocab_size + spare, mean_resizing=False)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUILTIN / name, folder / name)


def loss_of(model, tokenizer):
    """The mean loss of the texts' tokens and their ends, and how many there are."""
    total, count = 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text).input_ids + [tokenizer.eos_token_id]])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            total += functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return total / count, count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowrank", required=True, help="the binary")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    problems = 0

    def check(name, agree, words):
        nonlocal problems
        problems += not agree
        print(f"{name}: {words}{'' if agree else '  DIFFERENT'}")

    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        rows = work / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        as_lines, as_list = work / "tokens.txt", work / "tokens.json"
        as_lines.write_text("\n".join(TOKENS) + "\n")
        as_list.write_text(json.dumps(TOKENS))
        for n, (name, (tied, spare)) in enumerate(MODELS.items()):
            folder, trained, merged = (work / f"{kind}{n}" for kind in ("model", "run", "merged"))
            write_model(folder, tied, spare)
            run(arguments, "train", "--model", str(folder), "--data", str(rows), "--output", str(trained), "--max-steps", "6",
                "--learning-rate", "0.02", "--base-dtype", "f32", "--add-tokens", str(as_list if n % 2 else as_lines))

            # What transformers makes of the same list.
            expected = AutoTokenizer.from_pretrained(folder)
            expected.add_tokens(TOKENS)
            tokenizer = AutoTokenizer.from_pretrained(trained)
            same = [expected(text).input_ids == tokenizer(text).input_ids for text in TEXTS]
            check(name, all(same) and len(tokenizer) == len(expected), f"{len(tokenizer)} tokens, ids of {len(same)} texts")

            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            # To fewer rows it would only take away the logits of rows that no token has.
            base.resize_token_embeddings(max(len(tokenizer), base.config.vocab_size))
            tuned = PeftModel.from_pretrained(base, trained).eval()
            theirs, count = loss_of(tuned, tokenizer)
            command = ["eval", "--model", str(folder), "--adapter", str(trained), "--data", str(rows), "--base-dtype", "f32"]
            ours = run(arguments, *command)["loss"]
            check(name, abs(ours - theirs) <= TOLERANCE * theirs, f"lowrank {ours:.6f}, PEFT {theirs:.6f} over {count} tokens")

            run(arguments, "merge", "--model", str(folder), "--adapter", str(trained), "--output", str(merged))
            model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
            alone, _ = loss_of(model, AutoTokenizer.from_pretrained(merged))
            wanted = max(2048 + spare, len(tokenizer))
            check(name, model.config.vocab_size == wanted, f"{model.config.vocab_size} rows when merged")
            check(name, model.config.tie_word_embeddings == tied, f"tied: {model.config.tie_word_embeddings}")
            check(name, abs(alone - ours) <= TOLERANCE * ours, f"merged {alone:.6f}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
