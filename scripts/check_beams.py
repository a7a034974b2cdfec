"""Compares `lowrank generate --num-beams` with transformers' beam search on prompts of a JSONL file.

python scripts/check_beams.py BINARY MODEL ROWS.jsonl [--count 50] [--max-new-tokens 48] [--threads 2]

MODEL is a Hugging Face folder, computed in f32 by both; a row has a "prompt". Where texts differ, the scores that
transformers gives to both are printed: equal to 1e-4 they are a tie that rounding decides. The exit code is 1 if a text
differs otherwise.
"""

import argparse
import json
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SETTINGS = [
    {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 4},
    {"num_beams": 10, "length_penalty": 1.0, "no_repeat_ngram_size": 0},
    {"num_beams": 2, "length_penalty": 1.0, "no_repeat_ngram_size": 0},
]


def ours(args, rows, setting):
    command = [args.binary, "generate", "--model", args.model, "--data", rows, "--base-dtype", "f32", "--json", "--quiet"]
    command += ["--max-new-tokens", str(args.max_new_tokens), "--threads", str(args.threads)]
    for key, value in setting.items():
        command += ["--" + key.replace("_", "-"), str(value)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [one["text"] for one in json.loads(done.stdout)["generations"]]


@torch.no_grad()
def worth(model, ids, made, setting):
    """The mean log-probability of a continuation as beam search counts it."""
    logits = model(torch.cat([ids, made[None]], 1)).logits[0, ids.shape[1] - 1 : -1]
    each = torch.log_softmax(logits.float(), -1).gather(1, made[:, None])
    return each.sum().item() / len(made) ** setting["length_penalty"]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in open(args.rows, encoding="utf-8")))[: args.count]
    failed = 0
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as rows:
        rows.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        rows.flush()
        for setting in SETTINGS:
            found = ours(args, rows.name, setting)
            equal, ties = 0, 0
            for prompt, text in zip(prompts, found, strict=True):
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                made = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    early_stopping=False,
                    max_new_tokens=args.max_new_tokens,
                    pad_token_id=tokenizer.eos_token_id,
                    **setting,
                )[0, ids.shape[1] :]
                theirs = tokenizer.decode(made, skip_special_tokens=True)
                if theirs == text:
                    equal += 1
                    continue
                other = tokenizer(text, return_tensors="pt").input_ids[0]
                if len(other) < args.max_new_tokens:
                    other = torch.cat([other, torch.tensor([tokenizer.eos_token_id])])
                scores = worth(model, ids, made, setting), worth(model, ids, other, setting)
                tie = abs(scores[0] - scores[1]) < 1e-4
                ties += tie
                failed += not tie
                print(f"{setting}\n  prompt {prompt!r}\n  ours   {text!r}\n  theirs {theirs!r}\n  scores {scores}")
            print(f"{setting}: {equal} of {len(prompts)} equal, {ties} ties", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
