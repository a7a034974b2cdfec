#!/usr/bin/env python3
"""Compare our tokenizer with transformers: check_import_tokenizer.py FOLDER CASES.json

FOLDER holds the tokenizer files. CASES.json is what the test `data_reference` of the crate lowrank writes, or a plain
object of {text: ids}. Prints what differs; exits 1 if anything does.
"""
import json
import sys

from transformers import AutoTokenizer


def assistant_mask(render, encoding, messages):
    """The tokens of every assistant turn, from renders that end before and after it; None where the template rewrites turns."""
    mask = [False] * len(encoding.input_ids)
    whole = render(messages)
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(messages[:at], add_generation_prompt=True), render(messages[: at + 1])
        if not (after.startswith(before) and whole.startswith(after)):
            return None
        start, end = len(before), len(after.rstrip("\n"))
        reached = 0
        for token, (_, last) in enumerate(encoding.offset_mapping):
            # GPT-2's offsets leave out a leading space, so a token begins where the one before it ended.
            if last > start and reached < end:
                mask[token] = True
            reached = max(reached, last)
    return mask


def main():
    folder, path = sys.argv[1:3]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(path, encoding="utf-8") as file:
        cases = json.load(file)
    if "texts" not in cases:
        cases = {"texts": [{"text": text, "ids": ids} for text, ids in cases.items()], "chats": []}
    wrong = 0

    def check(what, where, ours, theirs):
        nonlocal wrong
        if ours != theirs:
            wrong += 1
            if wrong <= 10:
                print(f"{what} differs for {where!r}\n  ours   {ours!r}\n  theirs {theirs!r}")

    for name in ("eos", "bos"):
        if name in cases:
            check(name, folder, cases[name], getattr(tokenizer, name + "_token_id"))
    for case in cases["texts"]:
        text = case["text"]
        check("ids", text, case["ids"], tokenizer(text, add_special_tokens=False).input_ids)
        if "special_ids" in case:
            check("ids with special tokens", text, case["special_ids"], tokenizer(text).input_ids)
            check("decoded text", text, case["decoded"], tokenizer.decode(case["ids"]))
    eos = tokenizer.eos_token_id
    for case in cases.get("pairs", []):
        both = tokenizer(case["prompt"] + case["completion"], add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = both.input_ids, [end for _, end in both.offset_mapping]
        prefix = [id for id in tokenizer("").input_ids if id != eos and ids[:1] != [id]]
        given = len(prefix) + sum(end <= len(case["prompt"]) for end in ends)
        ids = prefix + ids + ([] if ids[-1] == eos else [eos])
        check("row", case["prompt"], case["ids"], ids)
        check("row's mask", case["prompt"], case["supervised"], [0 < at >= given for at in range(len(ids))])
    masks, refused = 0, 0
    for case in cases["chats"]:
        messages, tools = case["messages"], case["tools"]

        def render(messages, **options):
            try:
                return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
            except Exception:  # whatever the template says
                return None

        text = render(messages)
        check("chat text", messages, case["text"], text)
        check("prompt", messages, case["prompt"], render(messages[:-1], add_generation_prompt=True))
        if case["error"]:
            refused += 1
            if text is not None and refused <= 5:
                print(f"refused: {case['error']}")
            continue
        ids = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
        check("chat ids", messages, case["ids"], ids)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = assistant_mask(render, encoding, messages)
        if mask is not None:
            masks += 1
            check("mask", messages, case["supervised"], mask)
    print(f"{refused} conversations refused by us, {masks} masks compared")
    print(f"{len(cases['texts'])} texts, {len(cases.get('pairs', []))} rows, {len(cases['chats'])} conversations, {wrong} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
