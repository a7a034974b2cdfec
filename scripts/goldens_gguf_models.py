"""Makes the goldens of crates/lowrank/tests/goldens_gguf: a tiny GGUF file of every architecture that can be imported.

NAME.gguf: a random model of transformers', converted as llama.cpp's convert_hf_to_gguf.py does it (names from the `gguf` package; keys,
permutations and shifts from the converter's `conversion/`), with a small tokenizer of the kind that the family's files have.
models.json: by name the config.json that transformers writes of the original model, ids, and which texts' ids are the tokenizer's.
models.safetensors: NAME.logits f32 [6, V], what transformers says of the original model after the last six ids.
tokenizers.json: texts, and their ids by tokenizer. They are those of SentencePiece itself where the text holds no special token, and of
transformers' and tokenizers' own classes otherwise; where there are both, they are asserted to agree.

Run it from the repository's root: python scripts/goldens_gguf_models.py [folder]. It needs gguf, torch, transformers, tokenizers and
sentencepiece. Two runs write the same bytes.

    python scripts/goldens_gguf_models.py --check LOWRANK

imports every file with the program LOWRANK and compares what transformers makes of the folder with the goldens: logits to 1e-5 of the
largest, tensors' names, and ids.
"""

import io
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma3TextConfig, Glm4Config, GPT2Config, GraniteConfig, LlamaConfig, Ministral3Config,
    MistralConfig, Olmo2Config, Olmo3Config, Phi3Config, Qwen2Config, Qwen3Config, SmolLM3Config,
)
from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

FOLDER = Path(__file__).resolve().parent.parent / "crates/lowrank/tests/goldens_gguf"
Kind = gguf.TokenType

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox doesn't.",
    "Low-rank adapters are trained beside frozen weights, and the weights stay what they were.",
    "Der schnelle braune Fuchs springt über den faulen Hund. Größe, Maß und Straße.",
    "Le renard brun saute par-dessus le chien paresseux, où l'été s'achève à Noël.",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "素早い茶色の狐がのろまな犬を飛び越える。日本語の文章です。",
    "敏捷的棕色狐狸跳过了懒狗。今天是2024年11月29日。",
    "    def f(x):\n        return x + 1\n\n\n    if x:\n            pass\n\t\tend\n",
    "1 12 123 1234 12345 3.14159, 2024-11-29, 100% of $5",
    "CamelCase HTTPServer getURL iPhone XMLHttpRequest ÉCOLE",
] * 4
TEXTS = [
    "", " ", "  ", "   ", "          ", " " * 40, "\n", "\n\n\n", "\n" * 12, "\t", "\t\t\t", "\r\n \r\n", "hello", " hello", "  hello", "hello ",
    "Hello World", "The quick brown fox", "the the  the   the    the", "don't DON'T we'll I'M 're", "a\nb\n\nc \n d\n \n e",
    "  def f(x):\n        return x\n", "1234567 12 1 1,000.50 x1y22z333", "getURL HTTPServerX iPhone XMLHttp ÉCOLEs",
    "Größe über Straße", "où l'été à Noël", "быстрая лиса", "日本語の文章", "2024年11月29日。", "한국어 문장", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया",
    "สวัสดีชาวโลก", "👍👩\u200d👩\u200d👧🇩🇪 🚀🚀", "e\u0301 n\u0303 \ufb01 Å", "▁a ▁▁b", "a\u00a0b\u3000c\u200bd", "…\uff21", "!!! ??? --- ((([[[{{{ ///", "\x00\x01\x7f",
    "<|im_start|>user\nhi<|im_end|>\n", "<s>a</s> b", "<bos>x<eos>", "<start_of_turn>user\nhi<end_of_turn>\n", "<|user|>\n hi<|end|>  \n<|assistant|>",
    "a<unk>b<pad>", " <|im_end|> <|im_end|>", "<table>x</table>", "[PAD300] <0x41> <unused1>",
]
SPECIALS = ["<|im", "<s>", "</s>", "<bos>", "<eos>", "_of_turn>", "<|", "<unk>", "<pad>", "table>", "<unused"]


def has_special(text):
    return any(special in text for special in SPECIALS)


# ---- tokenizers: what the converter writes of each, and its ids ----

GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(regex):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), behavior="isolated"), BYTES])


# As in the tokenizer.json of SmolLM2 and Granite 3; of Llama 3, SmolLM3, Phi-4, OLMo 2 and GLM-4; of Qwen; of Phi-4-mini; of Mistral Nemo.
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_WORDS])
BYTE_LEVEL = {
    "smollm": dict(pre_tokenizer=DIGITS),
    "refact": dict(pre_tokenizer=DIGITS),
    "llama-bpe": dict(pre_tokenizer=split(mapping._LLAMA3_SPLIT), ignore_merges=True, add_bos=True),
    "smaug-bpe": dict(pre_tokenizer=split(mapping._LLAMA3_SPLIT), ignore_merges=True),
    "dbrx": dict(pre_tokenizer=split(mapping._LLAMA3_SPLIT)),
    "glm4": dict(pre_tokenizer=split(mapping._LLAMA3_SPLIT)),
    "gpt-4o": dict(pre_tokenizer=split(mapping._GPT4O_SPLIT)),
    "tekken": dict(pre_tokenizer=split(mapping._TEKKEN_SPLIT), ignore_merges=True, add_bos=True),
    "qwen2": dict(pre_tokenizer=split(mapping._QWEN2_SPLIT), normalizer=normalizers.NFC()),
    "gpt-2": dict(pre_tokenizer=GPT2_WORDS),
}


def byte_level(pre, pre_tokenizer, normalizer=None, ignore_merges=False, add_bos=False):
    """A tokenizer of the family's own kind, trained small, as `_set_vocab_gpt2` writes it, and the tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoders.ByteLevel()
    # Special tokens in front, a user-defined one behind, then one that only fills up.
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    types = [Kind.CONTROL if id < 3 else Kind.NORMAL for id in range(len(tokens))]
    if ignore_merges:
        # A word that no merges make: only a tokenizer that takes whole words finds it.
        tokens.append("ĠXMLHttp")
        types.append(Kind.NORMAL)
        state["model"]["vocab"]["ĠXMLHttp"] = len(tokens) - 1
    tokens += ["<table>", "[PAD300]"]
    types += [Kind.USER_DEFINED, Kind.UNUSED]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken("<table>", normalized=False)])
    assert tokenizer.token_to_id("<table>") == len(tokens) - 2
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    keys = dict(model="gpt2", pre=pre, tokens=tokens, types=types, merges=merges, bos=0, eos=2, pad=0, eot=2)
    return keys, lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids


def train_pieces(**more):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, num_threads=1, **more)
    return model.getvalue()


def pieces(model):
    """Tokens, scores and types as `_create_vocab_sentencepiece` reads them from a model's file."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens, scores, types = [], [], []
    for id in range(processor.vocab_size()):
        kind = Kind.NORMAL
        if processor.IsUnknown(id):
            kind = Kind.UNKNOWN
        elif processor.IsControl(id):
            kind = Kind.CONTROL
        elif processor.IsUnused(id):
            kind = Kind.UNUSED
        elif processor.IsByte(id):
            kind = Kind.BYTE
        tokens.append(processor.IdToPiece(id))
        scores.append(processor.GetScore(id))
        types.append(kind)
    return processor, tokens, scores, types


def generate_merges(vocab, scores):
    """The merges of Llama 2's tokenizer.json: transformers' function before it looked at lengths."""
    merges = []
    for piece, score in scores.items():
        ways = [(piece[:at], piece[at:], score) for at in range(1, len(piece)) if piece[:at] in vocab and piece[at:] in vocab]
        merges += sorted(ways, key=lambda way: (vocab[way[0]], vocab[way[1]]))
    return [way[:2] for way in sorted(merges, key=lambda way: way[2], reverse=True)]


def spm_llama(added=(), phi3=False):
    """SentencePiece's BPE as Llama 2 has it, and as Phi-3 does with tokens added by hand."""
    model = train_pieces(
        model_type="bpe", vocab_size=400, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=0.99)
    processor, tokens, scores, types = pieces(model)
    normal = {token: id for id, token in enumerate(tokens)}
    real = {token: score for token, score, kind in zip(tokens, scores, types) if kind == Kind.NORMAL}
    reference = Tokenizer(models.BPE(normal, generate_merges({token: normal[token] for token in real}, real),
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    reference.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    reference.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    strips = lambda token: phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
    for token, special in added:
        tokens.append(token)
        scores.append(-1000.0)
        types.append(Kind.CONTROL if special else Kind.USER_DEFINED)
    for id, (token, kind) in enumerate(zip(tokens, types)):
        if kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED):
            special = kind != Kind.USER_DEFINED
            reference.add_tokens([AddedToken(token, special=special, normalized=False, rstrip=strips(token))])
            assert reference.token_to_id(token) == id
    tokens.append(f"[PAD{len(tokens)}]")
    scores.append(-10000.0)
    types.append(Kind.UNUSED)
    keys = dict(model="llama", pre="default", tokens=tokens, scores=scores, types=types, bos=1, eos=2, unk=0)

    def encode(text, special):
        ids = reference.encode(text, add_special_tokens=special).ids
        # SentencePiece has no special tokens in texts, puts no space before an empty one, and ends a text at a NUL.
        if not has_special(text) and text and "\0" not in text:
            assert ids[special:] == processor.encode(text), (text, ids, processor.encode(text))
        return ids

    return keys, encode


def spm_gemma(architecture):
    """SentencePiece's BPE as Gemma has it: user-defined runs of blanks, no space in front."""
    runs = [char * length for char in "\n▁" for length in range(2 if char == "▁" else 1, 9)]
    model = train_pieces(
        model_type="bpe", vocab_size=430, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
        eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>", character_coverage=0.99,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", *runs, "<table>", "</table>"])
    processor, tokens, scores, types = pieces(model)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    # What tokenizer_config.json lists is written over with -1000; ▁ becomes a space there.
    for id, piece in enumerate(proto.pieces):
        if piece.type == 4:
            types[id] = Kind.CONTROL if "_of_turn>" in piece.piece else Kind.USER_DEFINED
            scores[id] = -1000.0
            if types[id] == Kind.USER_DEFINED:
                tokens[id] = tokens[id].replace("▁", " ")
    keys = dict(model="llama", pre="default", tokens=tokens, scores=scores, types=types, bos=2, eos=1, unk=3, pad=0, eot=5,
                add_bos=True, add_eos=False, add_space_prefix=False)
    # transformers' reader of GGUF, but for the order of merges, which is that of the proto's scores.
    spelled = [piece.piece for piece in proto.pieces]
    vocab = {token: id for id, token in enumerate(spelled)}
    by_score = {piece.piece: piece.score for piece in proto.pieces if piece.type in (1, 4)}
    from transformers import GemmaTokenizer
    from transformers.tokenization_utils_base import generate_merges as newer
    reference = GemmaTokenizer(vocab=vocab, merges=newer({token: vocab[token] for token in by_score}, by_score))
    known = mapping.gemma_tokenizer(dict(tokens=tokens))
    for tokenizer in (reference, known):
        mapping.add_gguf_special_tokens(tokenizer, dict(tokens=spelled, token_type=types, tokenizer_type="llama"))

    def encode(text, special):
        ids = reference.backend_tokenizer.encode(text, add_special_tokens=False).ids
        # Of a run that is longer than any piece Gemma 3's tokenizer.json takes the longest piece first, as the scores in its model say;
        # that reader merges by twos, since it goes by the pieces' order.
        is_long = " " * 9 in text
        assert is_long or ids == known.backend_tokenizer.encode(text, add_special_tokens=False).ids, text
        if not has_special(text) and "\0" not in text and "▁" not in text:
            assert ids == processor.encode(text), (text, ids, processor.encode(text))
        return [2] * special + ids

    return keys, encode


def unigram(byte_fallback):
    """SentencePiece's unigrams, as the converter writes T5's, or with bytes as a last resort."""
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.tsv"
        # A small table of characters in place of NFKC, which is large.
        table = {"…": "...", "ï": "i", "\uff21": "A", "\n": " ", "\t": " ", "\u00a0": " "}
        rules.write_text("".join(f"{ord(old):X}\t{' '.join(f'{ord(one):X}' for one in new)}\n" for old, new in table.items()))
        options = dict(normalization_rule_tsv=str(rules)) if not byte_fallback else dict(normalization_rule_name="identity")
        model = train_pieces(
            model_type="unigram", vocab_size=420 if byte_fallback else 180, byte_fallback=byte_fallback, character_coverage=0.99,
            remove_extra_whitespaces=not byte_fallback, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", **options)
    processor, tokens, scores, types = pieces(model)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    keys = dict(model="t5", pre="default", tokens=tokens, scores=scores, types=types, eos=1, unk=2, pad=0, add_bos=False, add_eos=True,
                add_space_prefix=True, remove_extra_whitespaces=not byte_fallback, charsmap=proto.normalizer_spec.precompiled_charsmap)

    def encode(text, special):
        # No special tokens in texts: none of transformers' classes has these habits.
        return None if has_special(text) or "\0" in text or not text.strip() else processor.encode(text) + [1] * special

    return keys, encode


def tokenizers():
    named = {pre: byte_level(pre, **kind) for pre, kind in BYTE_LEVEL.items()}
    chat = [("<|endoftext|>", True), ("<|assistant|>", True), ("<|end|>", True), ("<|user|>", True), ("<table>", False)]
    return named | {
        "llama": spm_llama(), "phi3": spm_llama(chat, phi3=True), "gemma": spm_gemma("gemma3"),
        "unigram": unigram(False), "unigram_bytes": unigram(True),
    }


# ---- models ----

SHAPE = dict(
    hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
YARN = dict(rope_type="yarn", rope_theta=1e2, factor=4.0, original_max_position_embeddings=16, beta_fast=1.0, beta_slow=0.2)
LONGROPE = dict(rope_type="longrope", rope_theta=1e3, short_factor=[1.0, 1.1, 1.3], long_factor=[2.0, 2.5, 3.0])
DEFAULT = dict(rope_type="default", rope_theta=1e4)
GEMMA = SHAPE | dict(num_hidden_layers=7, head_dim=6, query_pre_attn_scalar=6, sliding_window=5, tie_word_embeddings=True)
ARCH = gguf.MODEL_ARCH
# Of so many rows the logits are kept.
LAST = 6

# By name: config, llama.cpp's architecture, tokenizer.
MODELS = {
    "llama": (lambda: LlamaConfig(**SHAPE | dict(max_position_embeddings=16384), head_dim=8, rope_parameters=LLAMA3_ROPE, attention_bias=True, mlp_bias=True), ARCH.LLAMA, "llama"),
    "llama_unigram": (lambda: LlamaConfig(**SHAPE, rope_parameters=DEFAULT | dict(rope_type="linear", factor=2.0), tie_word_embeddings=True), ARCH.LLAMA, "unigram"),
    "llama_bytes": (lambda: LlamaConfig(**SHAPE), ARCH.LLAMA, "unigram_bytes"),
    "llama_bpe": (lambda: LlamaConfig(**SHAPE), ARCH.LLAMA, "llama-bpe"),
    "smollm2": (lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True), ARCH.LLAMA, "smollm"),
    "qwen2": (lambda: Qwen2Config(**SHAPE, rope_parameters=YARN, tie_word_embeddings=True), ARCH.QWEN2, "qwen2"),
    "qwen3": (lambda: Qwen3Config(**SHAPE, head_dim=6, rope_parameters=DEFAULT | dict(rope_theta=1e6)), ARCH.QWEN3, "qwen2"),
    "gemma2": (lambda: Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=4.0), ARCH.GEMMA2, "gemma"),
    "gemma3": (lambda: Gemma3TextConfig(**GEMMA, rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e4), sliding_attention=dict(rope_type="default", rope_theta=1e2))), ARCH.GEMMA3, "gemma"),
    # Three quarters of a head of 8 are rotated: three pairs.
    "phi3": (lambda: Phi3Config(**SHAPE | dict(hidden_size=32, pad_token_id=0, max_position_embeddings=128), sliding_window=6, original_max_position_embeddings=32, rope_parameters=LONGROPE | dict(partial_rotary_factor=0.75)), ARCH.PHI3, "phi3"),
    "phi4": (lambda: Phi3Config(**SHAPE | dict(pad_token_id=0), original_max_position_embeddings=64, rope_parameters=DEFAULT, tie_word_embeddings=True), ARCH.PHI3, "gpt-4o"),
    "granite": (lambda: GraniteConfig(**SHAPE, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.7, logits_scaling=1.6, attention_bias=True, tie_word_embeddings=True), ARCH.GRANITE, "refact"),
    "smollm3": (lambda: SmolLM3Config(**SHAPE | dict(num_hidden_layers=5), rope_parameters=DEFAULT | dict(rope_theta=1e3), tie_word_embeddings=True), ARCH.SMOLLM3, "smaug-bpe"),
    "olmo2": (lambda: Olmo2Config(**SHAPE), ARCH.OLMO2, "dbrx"),
    "olmo3": (lambda: Olmo3Config(**SHAPE | dict(num_hidden_layers=4), sliding_window=5, rope_parameters=dict(full_attention=YARN | dict(attention_factor=1.3), sliding_attention=dict(rope_type="default", rope_theta=1e2))), ARCH.OLMO2, "dbrx"),
    "glm4": (lambda: Glm4Config(**SHAPE | dict(pad_token_id=0), head_dim=8, attention_bias=True, rope_parameters=DEFAULT | dict(partial_rotary_factor=0.5)), ARCH.GLM4, "glm4"),
    "ministral3": (lambda: Ministral3Config(**SHAPE, head_dim=8, tie_word_embeddings=True, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5, llama_4_scaling_beta=0.4)), ARCH.MISTRAL3, "tekken"),
    "mistral3": (lambda: MistralConfig(**SHAPE, head_dim=8, sliding_window=None, rope_parameters=DEFAULT | dict(rope_theta=1e8)), ARCH.MISTRAL3, "tekken"),
    "gpt2": (lambda: GPT2Config(n_embd=16, n_inner=20, n_layer=2, n_head=4, n_positions=64), ARCH.GPT2, "gpt-2"),
}
# The architectures whose converter is LlamaModel's or made from it.
PERMUTED = (ARCH.LLAMA, ARCH.GRANITE, ARCH.SMOLLM3, ARCH.MISTRAL3)


def make(name, keys):
    """The random model, its weights multiples of 2⁻¹⁰ so that F16 holds them and one can be added to them."""
    config = MODELS[name][0]()
    config.vocab_size = len(keys["tokens"])
    config.bos_token_id, config.eos_token_id = keys.get("bos"), keys["eos"]
    if config.pad_token_id is not None:
        config.pad_token_id = keys.get("pad", 0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    center = 0 if name.startswith("gemma") else 1
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=random)
            noise = center + 0.3 * noise if ("norm" in key or ".ln_" in key) and key.endswith("weight") else 0.25 * noise
            value.copy_((noise * 1024).round() / 1024)
    return model.eval()


def permute(weights, heads):
    """The order of the rows of q and k in LlamaModel."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def llama3_factors(rope, dim):
    factors = []
    for frequency in 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / rope["high_freq_factor"]:
            factors.append(1)
        elif wavelength > 8192 / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (8192 / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write_keys(writer, name, model):
    """`set_gguf_parameters` of the architecture's class, and `generate_extra_tensors`."""
    config, arch = model.config.to_dict(), MODELS[name][1]
    if arch == ARCH.GPT2:
        writer.add_block_count(config["n_layer"])
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(config["n_inner"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        return
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    head_dim = config.get("head_dim")
    usual = config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if arch == ARCH.GEMMA2:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_sliding_window(config["sliding_window"])
        return
    if arch == ARCH.PHI3:
        original = config["original_max_position_embeddings"]
        dims = int(full.get("partial_rotary_factor", 1.0) * config["hidden_size"]) // config["num_attention_heads"]
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_dimension_count(dims)
        writer.add_rope_freq_base(full["rope_theta"])
        writer.add_sliding_window(config["sliding_window"] or 0)
        if "long_factor" in full:
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0)
            writer.add_tensor("rope_factors_long.weight", np.array(full["long_factor"], dtype=np.float32))
            writer.add_tensor("rope_factors_short.weight", np.array(full["short_factor"], dtype=np.float32))
        return
    if full["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
        writer.add_rope_scaling_factor(full["factor"])
    if full["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        if full.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(full["attention_factor"])
        writer.add_rope_scaling_yarn_beta_fast(full["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(full["beta_slow"])
    writer.add_rope_freq_base(full["rope_theta"])
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if head_dim is not None and arch != ARCH.GRANITE:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch in PERMUTED:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim or usual)
    if full["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(full, head_dim or usual))
    if arch == ARCH.GRANITE:
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if arch == ARCH.GEMMA3:
        writer.add_sliding_window(config["sliding_window"])
    if name == "olmo3":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if arch == ARCH.GLM4:
        writer.add_rope_dimension_count(int(head_dim * full["partial_rotary_factor"]))
    if name == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(full["mscale_all_dim"])
        writer.add_attn_temperature_scale(full["llama_4_scaling_beta"])


def write_tokenizer(writer, keys):
    writer.add_tokenizer_model(keys["model"])
    writer.add_tokenizer_pre(keys["pre"])
    writer.add_token_list(keys["tokens"])
    if "scores" in keys:
        writer.add_token_scores(keys["scores"])
    writer.add_token_types(keys["types"])
    for name, add in [
        ("merges", writer.add_token_merges), ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id), ("eot", writer.add_eot_token_id), ("add_bos", writer.add_add_bos_token), ("add_eos", writer.add_add_eos_token),
        ("add_space_prefix", writer.add_add_space_prefix), ("remove_extra_whitespaces", writer.add_remove_extra_whitespaces),
    ]:
        if keys.get(name) is not None:
            add(keys[name])
    if keys.get("charsmap"):
        writer.add_precompiled_charsmap(keys["charsmap"])


def write_model(path, name, model, keys):
    arch = MODELS[name][1]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    write_keys(writer, name, model)
    write_tokenizer(writer, keys)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        value = value.numpy()
        if arch in PERMUTED and ".q_proj." in key:
            value = permute(value, model.config.num_attention_heads)
        if arch in PERMUTED and ".k_proj." in key:
            value = permute(value, model.config.num_key_value_heads)
        if arch in (ARCH.GEMMA2, ARCH.GEMMA3) and key.endswith("norm.weight"):
            value = value + 1
        if arch == ARCH.GPT2 and key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            value = value.T
        new = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert new is not None, key
        # Vectors and positions stay f32.
        half = value.ndim > 1 and not new.startswith("position_embd")
        writer.add_tensor(new, np.ascontiguousarray(value.astype(np.float16) if half else value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rows(name, vocabulary):
    random = torch.Generator().manual_seed(zlib.crc32((name + " row").encode()))
    return torch.randint(3, vocabulary, (20,), generator=random)


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    named = tokenizers()
    configs, tensors = {}, {}
    for name, (_, _, tokenizer) in MODELS.items():
        keys, _ = named[tokenizer]
        model = make(name, keys)
        write_model(folder / f"{name}.gguf", name, model, keys)
        ids = rows(name, model.config.vocab_size)
        with torch.no_grad():
            tensors[f"{name}.logits"] = model(input_ids=ids[None], use_cache=False).logits[0, -LAST:].contiguous()
        configs[name] = {"tokenizer": tokenizer, "ids": ids.tolist(), "config": json.loads(model.config.to_json_string(use_diff=False))}
    save_file(tensors, folder / "models.safetensors")
    (folder / "models.json").write_text("{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(one)}" for name, one in configs.items()) + "\n}\n")
    ids = {
        name: {"ids": [encode(text, False) for text in TEXTS], "with_special": [encode(text, True) for text in TEXTS]}
        for name, (_, encode) in named.items()
    }
    lines = ",\n".join(f' {json.dumps(name)}: {json.dumps(one)}' for name, one in ids.items())
    (folder / "tokenizers.json").write_text(f'{{"texts": {json.dumps(TEXTS)},\n"ids": {{\n{lines}\n}}}}\n')


def check(program):
    goldens = load_file(FOLDER / "models.safetensors")
    known = json.loads((FOLDER / "models.json").read_text())
    texts = json.loads((FOLDER / "tokenizers.json").read_text())
    warnings.simplefilter("error", UserWarning)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, one in known.items():
            out = Path(folder) / name
            command = [program, "model", "import", FOLDER / f"{name}.gguf", "--output", out, "--dtype", "f32"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
            for kind, names in report.items():
                assert not names, f"{name}: {kind}: {names}"
            with torch.no_grad():
                logits = model.eval()(input_ids=torch.tensor([one["ids"]]), use_cache=False).logits[0, -LAST:]
            expected = goldens[f"{name}.logits"]
            off = ((logits - expected).abs().max() / expected.abs().max()).item()
            tokenizer = AutoTokenizer.from_pretrained(out)
            ids = texts["ids"][one["tokenizer"]]
            wrong = [
                text for text, plain, special in zip(texts["texts"], ids["ids"], ids["with_special"])
                if plain is not None and (tokenizer(text, add_special_tokens=False).input_ids != plain or tokenizer(text).input_ids != special)
            ]
            failed += off > 1e-5 or bool(wrong)
            print(f"{name}: logits off by {off:.1e}, {len(wrong)} texts differ {wrong[:3]}")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--check"]:
        sys.exit(check(sys.argv[2]))
    write(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
