#!/usr/bin/env python3
"""Writes the goldens of tokenizer folders: which ids transformers gives for what stands in which file.

    python scripts/goldens_tokenizers.py            # writes crates/lowrank/tests/goldens/tokenizers.json
    python scripts/goldens_tokenizers.py --check    # compares instead, and exits 1 if anything differs

Needs transformers, tokenizers, jinja2, sentencepiece and protobuf. Small tokenizers are trained here, and each case is one of them with other
files beside it (tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json, chat templates). What
AutoTokenizer makes of the folder is the golden: ids with and without special tokens, the special tokens' ids, decoded
text, and a rendered conversation. The test `tokenizer_folders` of the crate lowrank reads the file.

A case without a base is a folder without tokenizer.json. A case with `classified` has what classifiers read, too: texts and
pairs with the tokens around them, cut at several lengths, and texts that are split into words already, with each token's word.

A case with `refused` is one where transformers gives an answer that can't be right; the value is a part of the error
that lowrank gives instead.
"""

import argparse
import copy
import io
import json
import os
import pathlib
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import sentencepiece
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

OUT = pathlib.Path(__file__).parent.parent / "crates/lowrank/tests/goldens/tokenizers.json"

CORPUS = [
    "the low rank matrix stands beside the frozen weight and learns",
    "hello world, hello there: 12 numbers and 2024 more",
    "plain text is read as plain text\nand a second line of it",
    "[INST] what is a tool call? [/INST] it is a call of a tool",
] * 40

TEXTS = [
    "plain text",
    "  two  spaces ",
    "a <tool> b",
    "hello<tool>world <|im_end|> hello",
    "<s>hello</s> there",
    "hello<s> hello",
    "na\u00efve e\u0301 2024 \U0001f44d",
    "line\r\nand\n\nline",
    "<one><two> <image>x",
    "",
]

PAIRS = [
    ["plain text", None],
    ["hello world, hello there: 12 numbers and 2024 more", None],
    ["plain text", "is it plain text?"],
    ["what is a tool call?", "it is a call of a tool and it is a call"],
    ["na\u00efve e\u0301 2024 \U0001f44d\u4e2d\u6587", "Hello  World"],
    ["a <mask> b", "[MASK] </s> x"],
]
LENGTHS = [6, 9, 10, 64]
WORDS = [
    ["plain", "text,", "hello"],
    ["na\u00efve", "2024", "don't", "the frozen", " weight"],
    ["hello", "<mask>", "[MASK]", "world"],
]

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]

CHATML = (
    "{% for m in messages %}\n<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\n"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}\n"
)
WITH_NAMES = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}"


def byte_level(pre_tokenizer, specials, normalizer=None, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=specials, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def bases():
    """Tokenizers by name: the kinds that the supported families come with."""
    chatml = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    smol = byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), chatml)
    gpt2 = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    gpt2.post_processor = processors.ByteLevel(trim_offsets=False)
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(words, behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    llama3 = byte_level(split, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], ignore_merges=True)
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    llama3.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    qwen = byte_level(split, chatml, normalizer=normalizers.NFC())

    llama2 = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    llama2.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama2.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    llama2.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=380, special_tokens=specials, show_progress=False))
    llama2.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    # The byte tokens are part of the vocabulary, not added tokens.
    state = json.loads(llama2.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    unigram.decoder = decoders.Metaspace()
    unigram.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False))
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    bert = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert.normalizer = normalizers.BertNormalizer(lowercase=True)
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bert.decoder = decoders.WordPiece(prefix="##")
    bert.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    around = dict(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    bert.post_processor = processors.TemplateProcessing(**around)
    roberta = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    roberta.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    modernbert = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"], normalizer=normalizers.NFC())
    modernbert.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    xlmr = Tokenizer(models.Unigram())
    xlmr.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")])
    xlmr.decoder = decoders.Metaspace()
    xlmr.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], unk_token="<unk>", show_progress=False))
    xlmr.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    deberta = Tokenizer(models.Unigram())
    deberta.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    deberta.decoder = decoders.Metaspace()
    deberta.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], unk_token="[UNK]", show_progress=False))
    deberta.post_processor = processors.TemplateProcessing(**{**around, "special_tokens": [("[CLS]", 1), ("[SEP]", 2)]})
    named = dict(smol=smol, gpt2=gpt2, llama3=llama3, qwen=qwen, unigram=unigram, bert=bert, roberta=roberta, modernbert=modernbert, xlmr=xlmr, deberta=deberta)
    return {**{name: json.loads(one.to_str()) for name, one in named.items()}, "llama2": state}


def pieces():
    """Models of SentencePiece by name, in hexadecimal: those that XLM-RoBERTa and DeBERTa v3 come with."""
    def train(normalization, **more):
        with tempfile.TemporaryDirectory() as folder:
            rules = pathlib.Path(folder) / "rules.tsv"
            rules.write_text("".join(f"{ord(old):X}\t{' '.join(f'{ord(one):X}' for one in new)}\n" for old, new in normalization.items()))
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=60, model_type="unigram", minloglevel=2,
                **({"normalization_rule_tsv": str(rules)} if normalization else {"normalization_rule_name": "identity"}), **more)
        return model.getvalue().hex()

    xlmr = train({"\u2026": "...", "\u00ef": "i", "\uff21": "A"})
    deberta = train({}, pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]", user_defined_symbols=["<tool>"])
    return {"xlmr": xlmr, "deberta": deberta}


def token(content, **flags):
    return {"content": content, **dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True), **flags}


def cases(sizes, vocabulary, merged, models):
    """(name, base, model_type, files, changes to tokenizer.json, what lowrank says where it refuses)."""
    out = []

    def case(name, base, config=None, *, model_type="llama", files=None, json_patch=None, model_config=None, refused=None, classified=False):
        folder = {"config.json": {"model_type": model_type, **(model_config or {})}, **(files or {})}
        if config is not None:
            folder["tokenizer_config.json"] = config
        out.append(dict(name=name, base=base, files=folder, json_patch=json_patch or {}, refused=refused))
        if classified:
            out[-1]["classified"] = True

    smol, llama2, llama3 = sizes["smol"], sizes["llama2"], sizes["llama3"]
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    end = {"eos_token": "<|im_end|>"}
    spm = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

    # The class, which may rebuild what splits and normalizes.
    case("tokenizer.json alone", "smol", model_config={"eos_token_id": 2})
    case("a fast class", "smol", fast)
    case("GPT2Tokenizer in a llama folder", "smol", {**end, "tokenizer_class": "GPT2Tokenizer"})
    case("GPT2TokenizerFast with a prefix space", "smol", {**end, "tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True})
    case("gpt2 without a class", "gpt2", {}, model_type="gpt2")
    case("gpt2 with its class", "gpt2", {"tokenizer_class": "GPT2Tokenizer"}, model_type="gpt2")
    case("gpt2 with a fast class", "smol", fast, model_type="gpt2")
    case("gpt2 without a class and another split", "smol", end, model_type="gpt2")
    case("gpt2 without a class, with byte fallback off and ignore_merges on", "llama3", {"eos_token": "</s>"}, model_type="gpt2")
    case("qwen2 without a class", "qwen", end, model_type="qwen2")
    case("qwen2 with its class", "qwen", {**end, "tokenizer_class": "Qwen2Tokenizer"}, model_type="qwen2")
    case("qwen2 with a fast class", "smol", fast, model_type="qwen2")
    case("qwen2 with another's class", "qwen", {**end, "tokenizer_class": "GPT2Tokenizer"}, model_type="qwen2")
    case("qwen3 without a class", "qwen", end, model_type="qwen3")
    case("qwen3 with a fast class", "smol", fast, model_type="qwen3")
    case("qwen3 with another's class", "qwen", {**end, "tokenizer_class": "GPT2Tokenizer"}, model_type="qwen3")
    case("a llama class over bytes", "llama3", {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast"})
    case("a llama class", "llama2", {**spm, "tokenizer_class": "LlamaTokenizer"})
    case("a llama class, legacy", "llama2", {**spm, "tokenizer_class": "LlamaTokenizerFast", "legacy": True})
    case("a llama class, no prefix space", "llama2", {**spm, "tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False})
    case("a llama class, names left to it", "llama2", {"tokenizer_class": "LlamaTokenizer"})
    case("llama without a class", "llama2", spm)
    case("mistral with a llama class", "llama2", {**spm, "tokenizer_class": "LlamaTokenizer"}, model_type="mistral")
    case("mistral without a class", "llama2", spm, model_type="mistral")
    case("an unknown class", "llama2", {**spm, "tokenizer_class": "SomeTokenizer"})
    case("an unknown class in a gpt2 folder", "smol", {**end, "tokenizer_class": "SomeTokenizer"}, model_type="gpt2")
    case("a class in config.json", "llama2", spm, model_config={"tokenizer_class": "LlamaTokenizer"})
    case("a class in both", "llama2", {**spm, "tokenizer_class": "PreTrainedTokenizerFast"}, model_config={"tokenizer_class": "LlamaTokenizer"})
    case("unigram", "unigram", spm)
    case("slow class", "llama2", {**spm, "tokenizer_class": "PreTrainedTokenizer"})

    # Added tokens, wherever they are listed.
    case("added_tokens_decoder", "smol", {**fast, "added_tokens_decoder": {str(smol): token("<tool>")}})
    case("added_tokens_decoder that strips", "smol", {**fast, "added_tokens_decoder": {str(smol): token("<tool>", lstrip=True, rstrip=True)}})
    case("added_tokens_decoder, a single word", "smol", {**fast, "added_tokens_decoder": {str(smol): token("more", single_word=True, special=False)}})
    case("added_tokens_decoder, not special", "smol", {**fast, "added_tokens_decoder": {str(smol): token("<tool>", special=False)}})
    case("added_tokens_decoder, normalized", "llama2", {**spm, "added_tokens_decoder": {str(llama2): token("<tool>", normalized=True, special=False)}})
    case("added_tokens_decoder of the known", "smol", {**fast, "added_tokens_decoder": {"0": token("<|endoftext|>"), "1": token("<|im_start|>"), "2": token("<|im_end|>")}})
    case("added_tokens_decoder with other flags", "smol", {**fast, "added_tokens_decoder": {"2": token("<|im_end|>", lstrip=True)}})
    case("added_tokens_decoder in numeric order", "smol", {**fast, "added_tokens_decoder": {str(smol + 1): token("<one>"), str(smol): token("<two>")}})
    case("added_tokens_decoder of a class that rebuilds", "llama2", {**spm, "tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>"), str(llama2): token("<tool>")}})
    word = next(word for word, at in vocabulary["smol"].items() if at == 300)
    case("a word of the vocabulary as an added token", "smol", {**fast, "added_tokens_decoder": {"300": token(word, special=False)}})
    case("a word of the vocabulary with another's id", "smol", {**fast, "added_tokens_decoder": {"300": token("hello", special=False)}}, refused='"hello" is listed with the id 300')
    case("added_tokens_decoder behind a gap", "smol", {**fast, "added_tokens_decoder": {str(smol + 5): token("<tool>")}}, refused=f"\"<tool>\" is listed with the id {smol + 5}")
    case("added_tokens.json", "smol", fast, files={"added_tokens.json": {"<tool>": smol}})
    case("added_tokens.json, and a special name", "smol", {**fast, "pad_token": "<tool>"}, files={"added_tokens.json": {"<tool>": smol}})
    case("added_tokens.json beside added_tokens_decoder", "smol", {**fast, "added_tokens_decoder": {str(smol): token("<one>")}}, files={"added_tokens.json": {"<tool>": smol + 1}})
    case("added_tokens.json behind a gap", "smol", fast, files={"added_tokens.json": {"<tool>": smol + 9}}, refused=f"\"<tool>\" is listed with the id {smol + 9}")
    case("additional_special_tokens", "smol", {**fast, "additional_special_tokens": ["<tool>", "<|im_start|>"]})
    case("extra_special_tokens", "smol", {**fast, "extra_special_tokens": ["<one>", "<two>"]})
    case("extra and additional special tokens", "smol", {**fast, "extra_special_tokens": ["<one>"], "additional_special_tokens": ["<two>"]})
    case("extra_special_tokens by name", "smol", {**fast, "extra_special_tokens": {"image_token": "<image>"}, "chat_template": WITH_NAMES})
    case("a token by a name of its own", "smol", {**fast, "image_token": "<image>", "chat_template": WITH_NAMES})
    case("special_tokens_map.json with additional tokens", "smol", fast, files={"special_tokens_map.json": {"additional_special_tokens": ["<tool>"], "eos_token": "<|im_end|>"}})
    case("special_tokens_map.json and additional tokens in both", "smol", {**fast, "additional_special_tokens": ["<one>"]}, files={"special_tokens_map.json": {"additional_special_tokens": ["<two>"]}})
    case("special_tokens_map.json with extra tokens in both", "smol", {**fast, "extra_special_tokens": ["<one>"]}, files={"special_tokens_map.json": {"extra_special_tokens": ["<two>", "<one>"]}})
    case("several added tokens of several places", "smol", {**fast, "bos_token": "<s>", "pad_token": "<pad>", "extra_special_tokens": ["<one>"], "added_tokens_decoder": {str(smol): token("<tool>")}})

    # Names of special tokens.
    case("special_tokens_map.json against tokenizer_config.json", "smol", {**fast, "chat_template": WITH_NAMES}, files={"special_tokens_map.json": {"eos_token": "<|endoftext|>"}})
    case("the same with added_tokens_decoder", "smol", {**fast, "added_tokens_decoder": {"0": token("<|endoftext|>")}, "chat_template": WITH_NAMES}, files={"special_tokens_map.json": {"eos_token": "<|endoftext|>"}})
    case("special_tokens_map.json alone", "smol", {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": WITH_NAMES}, files={"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}, "bos_token": "<|im_start|>"}})
    case("null beside a name", "smol", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": None}, files={"special_tokens_map.json": {"eos_token": "<|im_end|>"}})
    case("a name beside null", "smol", fast, files={"special_tokens_map.json": {"pad_token": None}})
    case("names as objects", "smol", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"__type": "AddedToken", **token("<|im_end|>")}, "bos_token": {"__type": "AddedToken", **token("<s>", rstrip=True)}})
    case("a beginning that the vocabulary lacks", "smol", {**fast, "bos_token": "<s>", "chat_template": WITH_NAMES})
    case("a padding that the vocabulary lacks", "smol", {**fast, "pad_token": "<pad>"})
    case("an unknown token that the vocabulary lacks", "smol", {**fast, "unk_token": "<unk>"})
    case("an end that the vocabulary lacks", "smol", {**fast, "eos_token": "</s>"})
    case("gpt2's names where its class has others", "smol", end, model_type="gpt2", files={"special_tokens_map.json": {"unk_token": "<|im_start|>"}})
    case("gpt2's names, null", "smol", {**end, "bos_token": None, "chat_template": WITH_NAMES}, model_type="gpt2")
    case("qwen2's names", "qwen", {"tokenizer_class": "Qwen2Tokenizer", "chat_template": WITH_NAMES}, model_type="qwen2")

    # What stands around a text.
    none = {"post_processor": None}
    case("add_bos_token without a post-processor", "llama2", {**spm, "add_bos_token": True}, json_patch=none)
    case("add_bos_token: false beside a post-processor", "llama2", {**spm, "add_bos_token": False})
    case("add_eos_token beside a post-processor", "llama3", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True})
    case("add_bos_token of a class that rebuilds", "llama2", {**spm, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}, json_patch=none)
    case("add_bos_token of a class, with a post-processor", "llama2", {**spm, "tokenizer_class": "LlamaTokenizer", "add_bos_token": False})
    case("no post-processor", "llama2", spm, json_patch=none)
    case("split_special_tokens", "smol", {**fast, "split_special_tokens": True})
    case("clean_up_tokenization_spaces", "smol", {**fast, "clean_up_tokenization_spaces": True})
    case("add_prefix_space of a fast class", "smol", {**fast, "add_prefix_space": True})
    case("truncation and padding", "smol", fast, json_patch={
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}})

    # Chat templates.
    crlf = CHATML.replace("\n", "\r\n")
    case("a template file", "smol", fast, files={"chat_template.jinja": CHATML})
    case("a template file with CRLF", "smol", fast, files={"chat_template.jinja": crlf})
    case("a template file with CR", "smol", fast, files={"chat_template.jinja": CHATML.replace("\n", "\r")})
    case("a template in tokenizer_config.json with CRLF", "smol", {**fast, "chat_template": crlf})
    case("CRLF in a string of a template", "smol", {**fast, "chat_template": "{% for m in messages %}{{ m.content + '\r\n' }}x{{ \"a\\r\\nb\" }}{% endfor %}"})
    case("a template in both", "smol", {**fast, "chat_template": "config"}, files={"chat_template.jinja": "file {{ messages[0].content }}"})
    case("a template that begins with a byte order mark", "smol", fast, files={"chat_template.jinja": "\ufeff" + CHATML})
    case("a template with line ends at its end", "smol", fast, files={"chat_template.jinja": "{{ messages[0].content }}\n\n\n"})
    named = [{"name": "default", "template": "plain {{ messages[0].content }}"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]
    case("named templates", "smol", {**fast, "chat_template": named})
    case("named templates as an object", "smol", {**fast, "chat_template": {one["name"]: one["template"] for one in named}})
    case("named templates without a default", "smol", {**fast, "chat_template": named[1:]})
    case("a template folder", "smol", fast, files={"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools\r\nof a file"})
    case("a template folder beside tokenizer_config.json", "smol", {**fast, "chat_template": named}, files={"additional_chat_templates/tool_use.jinja": "tools of a file"})
    case("a template folder with a default", "smol", fast, files={"additional_chat_templates/default.jinja": "default of the folder"})
    case("chat_template.json, which processors read", "smol", fast, files={"chat_template.json": {"chat_template": "processor"}})
    case("special tokens in a template", "smol", {**fast, "bos_token": "<|im_start|>", "chat_template": WITH_NAMES})
    case("an empty template", "smol", {**fast, "chat_template": ""})
    case("special tokens of a class in a template", "llama2", {"tokenizer_class": "LlamaTokenizer", "chat_template": WITH_NAMES})

    # Encoders, and decoders that classify.
    def encoder(name, base, config=None, **more):
        case(name, base, config, classified=True, **more)

    encoder("bert without a class", "bert", {}, model_type="bert")
    encoder("bert with its class", "bert", {"tokenizer_class": "BertTokenizerFast", "do_lower_case": True}, model_type="bert")
    encoder("bert, cased", "bert", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}, model_type="bert")
    encoder("bert, cased, without accents", "bert", {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}, model_type="bert")
    encoder("bert, lower, with accents", "bert", {"tokenizer_class": "BertTokenizer", "strip_accents": False}, model_type="bert")
    encoder("bert with a fast class", "bert", {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False, "sep_token": "[SEP]"}, model_type="bert")
    encoder("bert, cut from the left", "bert", {"truncation_side": "left"}, model_type="bert")
    encoder("bert with other tokens around", "bert", {"cls_token": "[MASK]", "sep_token": "[PAD]"}, model_type="bert")
    encoder("distilbert with its class", "bert", {"tokenizer_class": "DistilBertTokenizer"}, model_type="distilbert")
    encoder("distilbert without a class", "bert", {}, model_type="distilbert")
    encoder("roberta without a class", "roberta", {}, model_type="roberta")
    encoder("roberta with its class", "roberta", {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True}, model_type="roberta")
    encoder("roberta with a fast class", "roberta", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}, model_type="roberta")
    encoder("roberta, mask with its space", "roberta", {"tokenizer_class": "RobertaTokenizer", "mask_token": {"__type": "AddedToken", **token("<mask>", lstrip=True, normalized=True)}}, model_type="roberta")
    encoder("xlm-roberta without a class", "xlmr", {}, model_type="xlm-roberta")
    encoder("xlm-roberta with its class", "xlmr", {"tokenizer_class": "XLMRobertaTokenizerFast"}, model_type="xlm-roberta")
    encoder("xlm-roberta without a prefix space", "xlmr", {"tokenizer_class": "XLMRobertaTokenizer", "add_prefix_space": False}, model_type="xlm-roberta")
    encoder("deberta-v2 without a class", "deberta", {}, model_type="deberta-v2")
    encoder("deberta-v2, lower, split at punctuation", "deberta", {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": True, "split_by_punct": True}, model_type="deberta-v2")
    encoder("modernbert", "modernbert", {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]"}, model_type="modernbert")
    encoder("modernbert with another's class", "modernbert", {"tokenizer_class": "GPT2Tokenizer", "sep_token": "[SEP]"}, model_type="modernbert")
    encoder("gpt2 that classifies", "gpt2", {}, model_type="gpt2")
    encoder("smollm2 that classifies", "smol", fast)
    encoder("llama2 that classifies", "llama2", spm)
    encoder("llama3 that classifies", "llama3", {"bos_token": "<s>", "eos_token": "</s>"})
    pieces = vocabulary["bert"]
    lines = "".join(f"{piece}\n" for piece in sorted(pieces, key=pieces.get))
    encoder("bert of vocab.txt", None, None, model_type="bert", files={"vocab.txt": lines})
    encoder("bert of vocab.txt, cased", None, {"do_lower_case": False}, model_type="bert", files={"vocab.txt": lines.replace("\n", "\r\n")})
    encoder("xlm-roberta of sentencepiece.bpe.model", None, None, model_type="xlm-roberta", files={"sentencepiece.bpe.model": {"hex": models["xlmr"]}})
    encoder("deberta-v2 of spm.model", None, {"do_lower_case": False, "vocab_type": "spm"}, model_type="deberta-v2", files={"spm.model": {"hex": models["deberta"]}})
    for family in ("roberta", "gpt2"):
        merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merged[family])
        encoder(f"{family} of vocab.json and merges.txt", None, {}, model_type=family, files={"vocab.json": vocabulary[family], "merges.txt": merges})
    return out


def write(folder, base, case):
    if base is not None:
        state = copy.deepcopy(base)
        state.update(case["json_patch"])
        (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    for name, content in case["files"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict) and list(content) == ["hex"]:
            path.write_bytes(bytes.fromhex(content["hex"]))
            continue
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(text.encode("utf-8"))


def before_words(tokenizer):
    """Puts a space before each word where bytes are told by it, as transformers' examples do for RoBERTa and GPT-2.

    Returns what is to be put before words by hand: where bytes are split by other rules first, the same setting would put a
    space into the middle of words."""
    state = json.loads(tokenizer._tokenizer.to_str())
    part = state["pre_tokenizer"] or {}
    if any(one["type"] == "ByteLevel" for one in part.get("pretokenizers", [])):
        return " "
    if part.get("type") == "ByteLevel":
        part["add_prefix_space"] = True
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return ""


def classified(tokenizer):
    """What a classifier reads: [ids, token types] by pair and length, and [ids, words] by text in words and length."""
    def one(text, pair, length):
        encoded = tokenizer(text, pair, truncation=True, max_length=length, return_token_type_ids=True)
        return [encoded["input_ids"], encoded["token_type_ids"]]

    pairs = [[one(text, pair, length) for length in LENGTHS] for text, pair in PAIRS]
    space = before_words(tokenizer)

    def words(text, length):
        text = [word if word.startswith(" ") else space + word for word in text]
        encoded = tokenizer(text, is_split_into_words=True, truncation=True, max_length=length)
        return [encoded["input_ids"], encoded.word_ids()]

    return {"pairs": pairs, "words": [[words(text, length) for length in LENGTHS] for text in WORDS]}


def expectation(folder, with_classified):
    """What AutoTokenizer gives, or the error it raises."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:200].replace(str(folder), "FOLDER")}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}]

    def chat(**options):
        try:
            return tokenizer.apply_chat_template(CHAT, tokenize=False, **options)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:80]}

    return {
        "class": type(tokenizer).__name__,
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in TEXTS],
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "chat": chat(),
        "tools": chat(tools=tools),
        **(classified(tokenizer) if with_classified else {}),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file in the repository")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    # Tokenizers that are in the file stay, since another version may train others.
    known = json.loads(OUT.read_text(encoding="utf-8"))
    tokenizers = known["bases"]
    models = known.get("pieces") or pieces()
    if not arguments.check:
        tokenizers = {**bases(), **tokenizers}
    # tokenizer.json's own count, from which added tokens go on.
    sizes = {name: Tokenizer.from_str(json.dumps(state)).get_vocab_size() for name, state in tokenizers.items()}
    out = {"transformers": transformers.__version__, "texts": TEXTS, "conversation": CHAT, "pairs": PAIRS, "lengths": LENGTHS, "words": WORDS, "pieces": models, "bases": tokenizers, "cases": []}
    vocabulary = {name: state["model"]["vocab"] for name, state in tokenizers.items()}
    merged = {name: state["model"].get("merges") for name, state in tokenizers.items()}
    for case in cases(sizes, vocabulary, merged, models):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            write(folder, tokenizers.get(case["base"]), case)
            out["cases"].append({**case, "expected": expectation(folder, "classified" in case)})
    # A case a line, so that a change shows as one.
    lines = ["{"]
    for key in ("transformers", "texts", "conversation", "pairs", "lengths", "words", "pieces"):
        lines.append(f"{json.dumps(key)}: {json.dumps(out[key], ensure_ascii=False)},")
    lines.append('"bases": {')
    lines.append(",\n".join(f"{json.dumps(name)}: {json.dumps(state, ensure_ascii=False, separators=(',', ':'))}" for name, state in tokenizers.items()))
    lines.append('},\n"cases": [')
    lines.append(",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in out["cases"]))
    lines.append("]\n}\n")
    text = "\n".join(lines)
    errors = [case["name"] for case in out["cases"] if "error" in case["expected"]]
    print(f"{len(out['cases'])} folders; transformers refuses {len(errors)}: {', '.join(errors) or 'none'}")
    if not arguments.check:
        OUT.write_text(text, encoding="utf-8")
        print(f"wrote {OUT.name}, {len(text.encode()) // 1024} KiB")
        return 0
    before = json.loads(OUT.read_text(encoding="utf-8"))["cases"]
    known = {case["name"]: case for case in before}
    differing = [case["name"] for case in out["cases"] if known.get(case["name"]) != json.loads(json.dumps(case))]
    print("the goldens are up to date" if not differing else f"these differ: {', '.join(differing)}")
    return 1 if differing or len(before) != len(out["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
