#!/usr/bin/env python3
"""Trains with PyTorch, transformers and PEFT on the CPU, the way their users do, and prints one JSON object.

AdamW over what is trained, gradients clipped to norm 1, and each batch padded to its longest row. Weights are in float32 and rows
are taken in file order, round and round, unless an option says otherwise. The first step is run but not counted: it pays for
warming up.

    python peft_train.py --model DIR --data rows.jsonl --method lora --r 4 --target-modules q_proj,v_proj
    python peft_train.py --model DIR --data rows.jsonl --group-by-length --weights bf16 --autocast
    python peft_train.py --model DIR --seq-length 256 --batch-size 4 --method full

Rows of {text, label} train a classifier: with LoRA, as a whole, or with everything frozen but the classifier (--method head).
"""

import argparse
import json
import os
import random
import resource
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NO_LOSS = -100
LEARNING_RATES = {"lora": 2e-4, "full": 2e-5, "head": 1e-3}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in the Hugging Face layout")
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--data", help="JSONL of {prompt, completion} or of {text, label}")
    work.add_argument("--seq-length", type=int, help="random tokens, so many a row, that all carry loss")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="steps that are counted, after one that is not")
    parser.add_argument("--method", choices=sorted(LEARNING_RATES), default="lora")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--target-modules", default="q_proj,v_proj", help="names with commas between, or all-linear")
    parser.add_argument("--weights", choices=("f32", "bf16"), default="f32", help="the type of the model's weights [f32]")
    parser.add_argument("--autocast", action="store_true", help="compute under autocast to bf16")
    parser.add_argument("--group-by-length", action="store_true", help="let rows of like length share a batch, so that little is padded")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    return parser.parse_args()


def read_examples(path, tokenizer, end):
    """(ids, labels) of every row: prompt, completion and end token, with loss on the last two."""
    examples = []
    with open(path, encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            row = json.loads(line)
            prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [end]
            examples.append((prompt + completion, [NO_LOSS] * len(prompt) + completion))
    return examples


def read_labelled(path, tokenizer):
    """(ids, number of the label) of every row, and how many labels there are."""
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in filter(str.strip, lines)]
    names = sorted({row["label"] for row in rows})
    encoded = tokenizer([row["text"] for row in rows])["input_ids"]
    return [(ids, names.index(row["label"])) for ids, row in zip(encoded, rows)], len(names)


def has_labels(path):
    with open(path, encoding="utf-8") as lines:
        return "label" in json.loads(lines.readline())


def random_examples(torch, vocabulary, rows, length):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, length), generator=generator).tolist()
    return [(row, row) for row in ids]


def collate(torch, examples, padding):
    """Ids, attention mask and labels, padded on the right to the longest row."""
    longest = max(len(ids) for ids, _ in examples)
    fill = lambda values, with_what: values + [with_what] * (longest - len(values))
    return {
        "input_ids": torch.tensor([fill(ids, padding) for ids, _ in examples]),
        "attention_mask": torch.tensor([fill([1] * len(ids), 0) for ids, _ in examples]),
        "labels": torch.tensor([fill(labels, NO_LOSS) if isinstance(labels, list) else labels for _, labels in examples]),
    }


def batches_of(lengths, size, steps, group_by_length):
    """The rows of each step, as indices: those of the first step, which is not counted, and then of the counted ones.

    Grouping changes which of the counted rows share a batch, and never which rows are counted. As in the Trainer, the groups
    come in a random order.
    """
    order = [i % len(lengths) for i in range((steps + 1) * size)]
    uncounted, counted = order[:size], order[size:]
    if group_by_length:
        counted.sort(key=lambda row: lengths[row])
    batches = [counted[start : start + size] for start in range(0, len(counted), size)]
    if group_by_length:
        random.Random(0).shuffle(batches)
    return uncounted, batches


def first(value):
    return value[0] if isinstance(value, list) else value


def main():
    arguments = parse_arguments()
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        sys.exit(f"{error.name} is not installed in {sys.executable}; README.md beside this file says how")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()

    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[arguments.weights]
    classifies = bool(arguments.data) and has_labels(arguments.data)
    if classifies:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
        examples, labels = read_labelled(arguments.data, tokenizer)
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        model = load(arguments.model, num_labels=labels, dtype=dtype)
        end = tokenizer.pad_token_id
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        model.config.use_cache = False
        end = first(model.config.eos_token_id)
        if arguments.data:
            tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
            examples = read_examples(arguments.data, tokenizer, end)
        else:
            rows = (arguments.steps + 1) * arguments.batch_size
            examples = random_examples(torch, model.config.vocab_size, rows, arguments.seq_length)
    if arguments.method == "lora":
        targets = arguments.target_modules
        config = peft.LoraConfig(
            task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
            r=arguments.r,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules=targets if targets == "all-linear" else targets.split(","),
        )
        model = peft.get_peft_model(model, config)
    if arguments.method == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("classifier.")
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATES[arguments.method], weight_decay=0.0)

    run = torch.compile(model, dynamic=True) if arguments.compile else model

    def take_step(rows):
        batch = collate(torch, rows, end)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.autocast):
            loss = run(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), batch["input_ids"].numel()

    lengths = [len(ids) for ids, _ in examples]
    warmup, batches = batches_of(lengths, arguments.batch_size, arguments.steps, arguments.group_by_length)
    # The first time that the length of a batch changes, it is compiled again.
    uncounted = [warmup, batches[0]] if arguments.compile else [warmup]
    losses = [take_step([examples[i] for i in chosen])[0] for chosen in uncounted]
    tokens, padded, supervised, times = 0, 0, 0, []
    for chosen in batches:
        rows = [examples[i] for i in chosen]
        begun = time.perf_counter()
        loss, size = take_step(rows)
        times.append(time.perf_counter() - begun)
        losses.append(loss)
        padded += size
        tokens += sum(len(ids) for ids, _ in rows)
        # The first token of a row has nothing before it that could predict it.
        supervised += sum(len(labels[1:]) - labels[1:].count(NO_LOSS) if isinstance(labels, list) else 1 for _, labels in rows)

    seconds = sum(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "threads": torch.get_num_threads(),
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "steps": arguments.steps,
        # How many rows there are, and the indices of those that were counted.
        "rows_of_file": len(examples),
        "rows": sorted(row for chosen in batches for row in chosen),
        "tokens": tokens,
        "tokens_with_padding": padded,
        "supervised_tokens": supervised,
        "tokens_per_second": tokens / seconds,
        "examples_per_second": arguments.steps * arguments.batch_size / seconds,
        "seconds_per_step": seconds / arguments.steps,
        "seconds": times,
        # Linux counts in KiB, macOS in bytes.
        "peak_rss": peak if sys.platform == "darwin" else peak * 1024,
        "losses": losses,
    }))


if __name__ == "__main__":
    main()
