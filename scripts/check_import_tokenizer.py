#!/usr/bin/env python3
"""Compare our tokenizer with transformers: check_import_tokenizer.py FOLDER CASES.json

FOLDER holds the tokenizer files. CASES.json is what the test `data_reference` of the crate lowrank writes, or a plain
object of {text: ids}. Prints what differs; exits 1 if anything does.
"""
import json
import sys

from transformers import AutoTokenizer


def assistant_mask(tokenizer, messages):
    """By another road than ours: the tokens of every assistant turn, counted from renders that end before and after it."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding.input_ids == ids
    mask = [False] * len(ids)
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True))
        end = len(tokenizer.apply_chat_template(messages[: at + 1], tokenize=False).rstrip("\n"))
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
    for case in cases["chats"]:
        messages = case["messages"]
        check("chat text", messages, case["text"], tokenizer.apply_chat_template(messages, tokenize=False))
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        check("prompt", messages, case["prompt"], prompt)
        check("chat ids", messages, case["ids"], tokenizer.apply_chat_template(messages, return_dict=False))
        check("mask", messages, case["supervised"], assistant_mask(tokenizer, messages))
    print(f"{len(cases['texts'])} texts, {len(cases['chats'])} conversations, {wrong} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
