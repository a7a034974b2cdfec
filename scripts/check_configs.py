#!/usr/bin/env python3
"""Compares what a config.json means here and in transformers, where it says a thing twice, or not at all.

    pip install torch transformers safetensors
    python scripts/check_configs.py --lowrank target/release/lowrank

Tiny models with random weights are written, config.json and tensors are changed, and transformers and `lowrank eval` give
the loss of the same rows. The losses must agree, or lowrank must refuse the model with the words that are expected here. Then adapters
are merged into some of them, and transformers must find every tensor of the merged folder and lose what lowrank loses with the adapter;
so must a model that was trained in full. NAMEs choose among the variants. Exit status: 0 if all is as expected, 1 if not.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import torch
import transformers
from transformers.utils import logging
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

BUILTIN = Path(__file__).resolve().parent.parent / "crates/lowrank/builtin"
TOLERANCE = 1e-5
logging.disable_progress_bar()
SIZES = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
TEXTS = ["The ferry leaves at noon. It takes forty minutes, and in winter there is one a day.",
         "Two and two are four; three and three are six."]


def model(kind):
    """A model of a family; `kind` is what is said of it in `KINDS`."""
    torch.manual_seed(0)
    family, own = KINDS[kind]
    sizes = dict(SIZES)
    if family == "GPT2":
        sizes = {"vocab_size": 2048, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 0,
                 "eos_token_id": 0, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **own})
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return getattr(transformers, name)(config).to(torch.float32)


KINDS = {
    "llama": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "untied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "wide": ("Llama", {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}),
    "biased": ("Llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8, "tie_word_embeddings": False}),
    "mistral8": ("Mistral", {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False}),
    "gpt2": ("GPT2", {}),
}


class Variants:
    """Makes one variant after the other and counts those that are not as expected."""

    def __init__(self, arguments, folder):
        self.binary, self.wanted, self.folder, self.wrong = arguments.lowrank, arguments.names, folder, 0
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def base(self, kind):
        """The unchanged model of a kind."""
        folder = self.folder / f"base-{kind}"
        if not folder.exists():
            made = model(kind)
            with torch.no_grad():
                for name, value in made.named_parameters():
                    if name.endswith("bias"):
                        value.add_(0.1 * torch.randn_like(value))
            made.save_pretrained(folder)
            for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]:
                shutil.copy(BUILTIN / name, folder)
        return folder

    def make(self, name, kind, config, tensors):
        folder = self.folder / name
        shutil.copytree(self.base(kind), folder)
        if config:
            path = folder / "config.json"
            values = json.loads(path.read_text())
            config(values)
            path.write_text(json.dumps(values, indent=1))
        if tensors:
            path = folder / "model.safetensors"
            values = load_file(path)
            values = tensors(values) or values
            save_file({key: value.contiguous() for key, value in values.items()}, path, metadata={"format": "pt"})
        return folder

    def transformers_loss(self, folder, strict=False):
        loaded, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if strict:
            unused = {key: names for key, names in found.items() if names}
            assert not unused, unused
        tokenizer = AutoTokenizer.from_pretrained(folder)
        total = count = 0
        with torch.no_grad():
            for text in TEXTS:
                ids = torch.tensor([tokenizer(text)["input_ids"] + [0]])
                logits = loaded(ids).logits[0, :-1].float()
                total += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                count += ids.shape[1] - 1
        return total / count

    def run(self, *command):
        return subprocess.run([self.binary, *map(str, command)], capture_output=True, text=True)

    def lowrank_loss(self, folder, *more):
        done = self.run("eval", "--model", folder, "--data", self.rows, "--base-dtype", "f32", "--json", *more)
        return (json.loads(done.stdout)["loss"], "") if done.returncode == 0 else (None, done.stderr.strip())

    def report(self, name, fine, text):
        self.wrong += not fine
        print(f"{'ok' if fine else 'WRONG':6}{name:26}{text}")

    def check(self, name, kind, config=None, tensors=None, refused=None):
        """One variant. `refused`: words of the message that lowrank must refuse it with."""
        if self.wanted and name not in self.wanted:
            return
        folder = self.make(name, kind, config, tensors)
        try:
            want = self.transformers_loss(folder)
        except Exception as error:
            want = f"{type(error).__name__}: {str(error)[:60]!r}"
        got, message = self.lowrank_loss(folder)
        if refused:
            fine = got is None and all(word in message for word in refused.split("|"))
        else:
            fine = got is not None and isinstance(want, float) and abs(want - got) < TOLERANCE
        self.report(name, fine, f"transformers {want}  lowrank {message[:300] if got is None else got}")

    def check_written(self, name, kind, config=None, tensors=None):
        """A merge, and a training in full: transformers must lose on what is written what lowrank loses."""
        if self.wanted and name not in self.wanted:
            return
        folder = self.make(name, kind, config, tensors)
        for method in [["--method", "lora"], ["--method", "top", "--head-only"], ["--method", "full"]]:
            label, out = f"{name}, {method[1]}", self.folder / f"{name}-{method[1]}"
            merged = self.folder / f"{name}-{method[1]}-merged"
            done = self.run("train", "--model", folder, "--data", self.rows, "--output", out, "--max-steps", 3, *method,
                            "--learning-rate", 0.01, "--base-dtype", "f32")
            if done.returncode != 0:
                self.report(label, False, done.stderr.strip()[-300:])
                continue
            adapter = [] if method[1] == "full" else ["--adapter", out]
            got, message = self.lowrank_loss(out if method[1] == "full" else folder, *adapter)
            if adapter:
                done = self.run("merge", "--model", folder, *adapter, "--output", merged, "--dtype", "f32")
                message = message or done.stderr.strip()[-300:] if done.returncode else ""
            try:
                want = self.transformers_loss(merged if adapter else out, strict=True)
            except Exception as error:
                want = f"{type(error).__name__}: {str(error)[:200]!r}"
            fine = got is not None and isinstance(want, float) and abs(want - got) < 1e-4
            self.report(label, fine, f"transformers {want}  lowrank {got} {message}")


def old_rope(config, scaling=None, theta=10000.0):
    """Rotary settings as transformers 4 wrote them."""
    config.pop("rope_parameters", None)
    config["rope_theta"] = theta
    if scaling is not None:
        config["rope_scaling"] = scaling


def variants(all):
    check = all.check
    for kind in KINDS:
        check(f"plain-{kind}", kind)

    put = lambda **values: lambda config: config.update(values)
    drop = lambda *keys: lambda config: [config.pop(key, None) for key in keys]
    head = "lm_head.weight"
    embedding = "model.embed_tokens.weight"
    other = lambda like: 0.3 * torch.randn(like.shape, generator=torch.Generator().manual_seed(5))

    # The head: in the file or not, the same or another, and what the config says.
    check("tied-other-head", "untied", put(tie_word_embeddings=True))
    check("tied-same-head", "llama", tensors=lambda t: t.update({head: t[embedding].clone()}))
    check("tied-only-head", "llama", tensors=lambda t: t.update({head: t.pop(embedding)}))
    check("tied-neither", "llama", tensors=lambda t: [t.pop(embedding), None][1], refused=f"{embedding}: missing")
    check("untied-no-head", "llama", put(tie_word_embeddings=False), refused=f"{head}: missing|tie_word_embeddings")
    check("absent-no-head", "llama", drop("tie_word_embeddings"), refused=f"{head}: missing|tie_word_embeddings")
    check("absent-head", "untied", drop("tie_word_embeddings"))
    check("gpt2-tied-other-head", "gpt2", tensors=lambda t: t.update({head: other(t["transformer.wte.weight"])}))
    check("gpt2-untied-head", "gpt2", put(tie_word_embeddings=False), lambda t: t.update({head: other(t["transformer.wte.weight"])}))
    check("gpt2-absent", "gpt2", drop("tie_word_embeddings"))
    check("qwen2-tied-other-head", "qwen2", put(tie_word_embeddings=True))
    check("head-elsewhere", "llama", tensors=lambda t: t.update({f"model.{head}": other(t[embedding])}), refused=f"model.{head}")
    check("tied-other-type", "untied", put(tie_word_embeddings=True), lambda t: t.update({head: t[embedding].half()}))
    check("bare-tied-other-head", "untied", put(tie_word_embeddings=True), lambda t: {k.removeprefix("model."): v for k, v in t.items()})

    # Rotary positions, in the words of transformers 4 and 5.
    linear = {"type": "linear", "factor": 2.0}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    check("rope-old", "llama", lambda c: old_rope(c, linear))
    check("rope-old-theta", "llama", lambda c: old_rope(c, theta=500000))
    check("rope-both-kinds", "llama", lambda c: old_rope(c, {"type": "dynamic", "rope_type": "linear", "factor": 2.0}))
    check("rope-scaling-wins", "llama", put(rope_scaling=linear))
    check("rope-scaling-wins-theta", "llama", lambda c: c.update(rope_scaling=linear, rope_parameters={"rope_type": "default", "rope_theta": 300.0}))
    check("rope-scaling-own-theta", "llama", put(rope_scaling={**linear, "rope_theta": 300.0}, rope_theta=700.0))
    check("rope-scaling-top-theta", "llama", put(rope_scaling=linear, rope_theta=700.0))
    check("rope-scaling-empty", "llama", put(rope_scaling={}, rope_parameters={**linear, "rope_theta": 300.0}))
    check("rope-scaling-null", "llama", put(rope_scaling=None))
    check("rope-parameters-theta", "llama", put(rope_theta=700.0))
    check("rope-parameters-no-theta", "llama", put(rope_parameters={"rope_type": "default"}, rope_theta=700.0))
    check("rope-nowhere", "llama", drop("rope_parameters"))
    check("rope-llama3", "llama", lambda c: old_rope(c, {**llama3, "original_max_position_embeddings": 64}))
    check("rope-llama3-no-original", "llama", lambda c: old_rope(c, llama3))
    check("rope-llama3-beside", "llama", lambda c: (old_rope(c, {**llama3, "original_max_position_embeddings": 32}),
                                                    c.update(original_max_position_embeddings=64)))
    check("rope-no-type", "llama", lambda c: old_rope(c, {"factor": 4.0}))
    check("rope-dynamic", "llama", lambda c: old_rope(c, {"type": "dynamic", "factor": 2.0}))
    check("rope-yarn", "llama", lambda c: old_rope(c, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}))
    check("rope-unknown", "llama", lambda c: old_rope(c, {"rope_type": "proportional", "factor": 2.0}), refused="rope_type")
    check("rope-partial", "llama", put(partial_rotary_factor=0.5), refused="partial_rotary_factor")
    check("rope-by-layer-type", "qwen3", put(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 300.0}}),
          refused="rope_parameters")

    # Types and quantization.
    check("dtype-both", "llama", put(dtype="float32", torch_dtype="float16"))
    check("dtype-old", "llama", lambda c: (c.pop("dtype", None), c.update(torch_dtype="float16")))
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    check("quantized-config", "llama", put(quantization_config=bnb), refused="quantization_config|remove the key")
    check("quantization-null", "llama", put(quantization_config=None))
    check("quantized-tensors", "llama", put(quantization_config=bnb),
          lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(4096, 1, dtype=torch.uint8)}), refused="quantization_config")
    check("quantized-unsaid", "llama", None,
          lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64, dtype=torch.uint8)}), refused="is stored as U8")
    check("quantized-mlx", "llama", put(quantization={"group_size": 64, "bits": 4}), refused="quantization|MLX")

    # Shapes that are said twice or left out.
    check("head-dim-absent", "llama", drop("head_dim"))
    check("head-dim-null", "llama", put(head_dim=None))
    check("head-dim-other", "wide")
    check("head-dim-wrong", "llama", put(head_dim=32), refused="q_proj.weight: shape [64, 64], expected [128, 64]")
    check("kv-absent", "untied", drop("num_key_value_heads"))
    check("kv-null", "untied", put(num_key_value_heads=None))
    check("kv-null-qwen2", "qwen2", put(num_key_value_heads=None), refused="k_proj")
    check("kv-absent-mistral", "mistral8", drop("num_key_value_heads"))
    check("kv-absent-qwen2", "qwen2", drop("num_key_value_heads"), refused="num_key_value_heads")
    check("gpt2-alias-alone", "gpt2", lambda c: (c.update(hidden_size=c.pop("n_embd"), num_hidden_layers=c.pop("n_layer"),
          num_attention_heads=c.pop("n_head"), max_position_embeddings=c.pop("n_positions"))))
    check("gpt2-alias-heads", "gpt2", put(num_attention_heads=2))
    check("gpt2-alias-layers", "gpt2", put(num_hidden_layers=1), refused="transformer.h.1")
    check("gpt2-alias-width", "gpt2", put(hidden_size=32), refused="transformer.wte.weight: shape")
    check("gpt2-alias-positions", "gpt2", put(max_position_embeddings=128), refused="transformer.wpe.weight: shape")
    check("gpt2-head-dim", "gpt2", put(head_dim=8))
    check("gpt2-context", "gpt2", put(n_ctx=99))
    check("gpt2-inner", "gpt2", put(n_inner=None))
    check("positions-alias", "llama", put(n_positions=7, n_embd=9, n_head=9))
    check("positions-absent", "llama", drop("max_position_embeddings"))
    check("vocabulary-smaller", "llama", put(vocab_size=2047), refused="2047")
    check("vocabulary-larger", "llama", put(vocab_size=2050), refused="embed_tokens.weight: shape [2048, 64], expected [2050, 64]")
    check("layers-fewer", "llama", put(num_hidden_layers=1), refused="model.layers.1|num_hidden_layers is 1")
    check("layers-more", "llama", put(num_hidden_layers=3), refused="model.layers.2")

    # Attention.
    check("window-absent", "mistral", drop("sliding_window"))
    check("window-null", "mistral", put(sliding_window=None))
    check("window-unused-switch", "mistral", put(use_sliding_window=False))
    check("window-layers-full", "mistral", put(layer_types=["full_attention"] * 2))
    check("window-layers-sliding", "mistral", put(layer_types=["sliding_attention"] * 2))
    check("window-layers-mixed", "mistral", put(layer_types=["sliding_attention", "full_attention"]), refused="layer_types")
    check("window-zero", "mistral", put(sliding_window=0), refused="sliding_window")
    check("window-one", "mistral", put(sliding_window=1))
    check("window-llama", "llama", put(sliding_window=4))
    check("window-off-qwen2", "qwen2", put(use_sliding_window=False, sliding_window=4, max_window_layers=0, layer_types=None))
    check("window-on-qwen2", "qwen2", put(use_sliding_window=True, sliding_window=4, max_window_layers=0, layer_types=None),
          refused="use_sliding_window|max_window_layers")
    check("window-above-qwen2", "qwen2", put(use_sliding_window=True, sliding_window=4, max_window_layers=2, layer_types=None))
    check("window-null-qwen2", "qwen2", put(use_sliding_window=True, sliding_window=None, max_window_layers=0, layer_types=None))
    check("layer-types-win", "qwen2", put(use_sliding_window=True, sliding_window=4, max_window_layers=0))
    check("layer-types-sliding", "qwen3", put(layer_types=["full_attention", "sliding_attention"]), refused="layer_types")
    check("layer-types-short", "qwen3", put(layer_types=["full_attention"]), refused="layer_types|num_hidden_layers")
    check("bias-unsaid", "biased", put(attention_bias=False, mlp_bias=False), refused="q_proj.bias|attention_bias")
    check("bias-missing", "llama", put(attention_bias=True), refused="q_proj.bias: missing")
    check("bias-mistral", "mistral", put(attention_bias=True), refused="attention_bias")
    check("bias-qwen2", "qwen2", put(attention_bias=False))

    # Names of the whole.
    check("parallel", "llama", put(pretraining_tp=2))
    check("arch-classifier", "llama", put(architectures=["LlamaForSequenceClassification"]))
    check("arch-mistral", "llama", put(architectures=["MistralForCausalLM"]))
    check("type-absent", "llama", drop("model_type"), refused="model_type")
    check("text-config", "llama", put(text_config={"hidden_size": 32}), refused="text_config")
    check("activation-other-name", "llama", put(hidden_activation="gelu"))
    check("activation-gelu", "llama", put(hidden_act="gelu"))
    check("epsilon-absent", "llama", drop("rms_norm_eps"))
    check("theta-infinite", "llama", lambda c: old_rope(c, theta=float("inf")), refused="rope_theta|Infinity")

    written = all.check_written
    written("write-tied", "llama")
    written("write-tied-other-head", "untied", put(tie_word_embeddings=True))
    written("write-tied-only-head", "llama", tensors=lambda t: t.update({head: t.pop(embedding)}))
    written("write-untied", "untied")
    written("write-dtypes", "llama", put(dtype="bfloat16", torch_dtype="float16"))
    written("write-gpt2", "gpt2")
    written("write-gpt2-other-head", "gpt2", tensors=lambda t: t.update({head: other(t["transformer.wte.weight"])}))
    written("write-rope", "llama", put(rope_scaling=linear, rope_theta=700.0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lowrank", required=True, help="the binary")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these variants")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        all = Variants(arguments, Path(folder))
        variants(all)
    print(f"{all.wrong} not as expected" if all.wrong else "all as expected")
    sys.exit(bool(all.wrong))


if __name__ == "__main__":
    main()
