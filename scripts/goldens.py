#!/usr/bin/env python3
"""Writes the golden files that `crates/lowrank/tests` compares the engine with.

    pip install torch transformers peft safetensors
    python scripts/goldens.py            # rewrite crates/lowrank/tests/goldens
    python scripts/goldens.py --check    # regenerate elsewhere, compare, exit 1 if anything differs

Everything is float32 on one thread, from seeds derived from names, with eager attention and no dropout, so two runs
on one machine write the same bytes. `--check` allows 1e-6 of a tensor's largest value; a gradient that is zero but for
rounding is measured against the largest gradient of its file. Rounding itself, measured against float64, is up to 5e-6,
so on another processor or with another PyTorch check with `--tolerance 1e-5`.

A model has a folder: `config.json` and `model.safetensors` as transformers saves them (tiny and random, with large
enough weights, norms away from one and biases away from zero that every part shows in the logits), and
`golden.safetensors`:

    ids.N, labels.N    i32 [T]      rows of different lengths, never padded; labels as in transformers: -100 carries
                                    no loss, the label at position t is predicted from position t - 1
    logits.N           f32 [T, V]
    greedy.N           i32 [<= 12]  the greedy continuation of ids.N, cut before a choice too close to be sure of
    loss               f32 [1]      mean cross-entropy over the supervised tokens of all rows together
    grad.NAME          f32          d loss / d weight, for the models that are also fully tuned; NAME as in
    grad_norm          f32 [1]      model.safetensors (a tied weight has one gradient, the sum of its two uses)
    losses             f32 [10]     the loss before each of ten steps of AdamW over all rows as one batch

Below it, each adapter has a folder: `adapter_config.json` and `adapter_model.safetensors` as PEFT saves them (A and B
random, alpha never equal to r), and its own `golden.safetensors` with logits, greedy, loss, grad_norm and losses as
above under the adapter, and:

    grad.KEY           f32          d loss / d tensor, KEY as in adapter_model.safetensors
    final.KEY          f32          the tensor after the ten steps
    smoothed.loss, smoothed.grad.KEY, smoothed.grad_norm      the same with label smoothing 0.1, in one case

The folders of `PROMPT_ADAPTERS` are the same for PEFT's prefix and prompt tuning; their one tensor is `prompt_embeddings`,
and the logits are those of the text alone, without the virtual tokens.

The folders of `TOKEN_ADAPTERS` are those of adapters with rows of tokens of their own (`trainable_token_indices`).

The folders of `IA3_ADAPTERS` are the same for PEFT's IA3, the factors moved away from one.

`gpt2/q_v_parts` adapts the query and the value part of the fused c_attn separately, as the LoRA paper does. Its keys
are PEFT's with the part's name after the module's (`...attn.c_attn.q.lora_A.weight`), the tensors before training are
`init.KEY`, and its adapter folder holds the same change as one PEFT adapter of twice the rank: A stacked, B block
diagonal with zeros for the key rows. That both give the same logits is asserted here.
"""

import argparse
import json
import os
import sys
import tempfile
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, Glm4Config, GPT2Config, GraniteConfig, LlamaConfig, Ministral3Config,
    MistralConfig, Olmo2Config, Olmo3Config, Phi3Config, Qwen2Config, Qwen3Config, SmolLM3Config,
)
from transformers.trainer_pt_utils import LabelSmoother

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "crates/lowrank/tests/goldens"
IGNORED = -100
GREEDY_TOKENS = 12
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# No two sizes agree by accident and several are not multiples of a vector's width (the vocabulary is odd), so a
# swapped dimension or a forgotten loop tail shows.
LLAMA_SHAPE = dict(
    hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=97, max_position_embeddings=64, rms_norm_eps=1e-3, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)
LLAMA3_ROPE = dict(
    # Head size 8 has wavelengths 6, 63, 628 and 6283: one kept, one blended, two scaled.
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
YARN_ROPE = dict(
    # Of the frequencies of a head of 8 one is kept, one blended and two are divided.
    rope_type="yarn", rope_theta=1e2, factor=4.0, original_max_position_embeddings=8, beta_fast=1.0, beta_slow=0.2,
)
# Two of three layers slide, and the rows are longer than the window. The heads' size is not hidden_size / num_attention_heads.
GEMMA_SHAPE = LLAMA_SHAPE | dict(
    num_hidden_layers=3, head_dim=10, query_pre_attn_scalar=20, sliding_window=5, tie_word_embeddings=True,
)
MODELS = {
    "llama": LlamaConfig(**LLAMA_SHAPE, tie_word_embeddings=False),
    "llama3": LlamaConfig(**LLAMA_SHAPE | dict(max_position_embeddings=1024), tie_word_embeddings=True,
                          rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**LLAMA_SHAPE | dict(hidden_size=40), head_dim=10, sliding_window=None,
                             tie_word_embeddings=False),
    "qwen2": Qwen2Config(**LLAMA_SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA_SHAPE, head_dim=12, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(
        **GEMMA_SHAPE, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e4),
            sliding_attention=dict(rope_type="default", rope_theta=1e2),
        ),
    ),
    # Caps that many scores and logits come near to.
    "gemma2": Gemma2Config(**GEMMA_SHAPE, attn_logit_softcapping=2.0, final_logit_softcapping=4.0),
    "smollm3": SmolLM3Config(
        **LLAMA_SHAPE | dict(num_hidden_layers=4), no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5,
        mlp_bias=True, tie_word_embeddings=True,
    ),
    "granite": GraniteConfig(
        **LLAMA_SHAPE, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.7, logits_scaling=1.6,
        attention_bias=True, tie_word_embeddings=True,
    ),
    "olmo2": Olmo2Config(**LLAMA_SHAPE),
    "olmo3": Olmo3Config(
        **LLAMA_SHAPE | dict(num_hidden_layers=3), sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(
            full_attention=YARN_ROPE | dict(attention_factor=1.3),
            sliding_attention=dict(rope_type="default", rope_theta=1e2),
        ),
    ),
    # Three quarters of a head of 16 are rotated: six pairs.
    "phi3": Phi3Config(
        **LLAMA_SHAPE | dict(hidden_size=64, pad_token_id=0, max_position_embeddings=256), sliding_window=6,
        original_max_position_embeddings=64, rope_parameters=dict(
            rope_type="longrope", rope_theta=1e3, partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.3, 1.7, 2.0, 2.5], long_factor=[2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
        ),
    ),
    # Positions from 8 on have larger queries.
    "ministral3": Ministral3Config(
        **LLAMA_SHAPE | dict(hidden_size=40), head_dim=10, tie_word_embeddings=True,
        rope_parameters=YARN_ROPE | dict(mscale=1.0, mscale_all_dim=0.5, llama_4_scaling_beta=0.4),
    ),
    "glm4": Glm4Config(
        **LLAMA_SHAPE | dict(pad_token_id=0), head_dim=12, attention_bias=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e2, partial_rotary_factor=0.5),
    ),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=40, vocab_size=97, layer_norm_epsilon=1e-3, bos_token_id=2,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}
FULLY_TUNED = ["llama", "qwen2", "gemma3", "gemma2", "granite", "olmo2", "phi3", "glm4", "gpt2"]

ADAPTERS = {
    "llama/all_linear": dict(r=3, lora_alpha=7, target_modules=ALL_LINEAR),
    "llama/patterns": dict(
        r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 5},
        alpha_pattern={"layers.0.self_attn.q_proj": 4, "down_proj": 9},
    ),
    "llama3/rslora": dict(r=4, lora_alpha=3, target_modules=["q_proj", "k_proj", "v_proj"], use_rslora=True),
    "mistral/q_v": dict(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"]),
    "qwen2/attention": dict(r=2, lora_alpha=5, target_modules=r".*\.self_attn\.[qkvo]_proj"),
    "qwen3/all_linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "gemma3/all_linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "gemma2/all_linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "smollm3/all_linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "granite/all_linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "olmo2/all_linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "olmo3/all_linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "phi3/all_linear": dict(r=2, lora_alpha=3, target_modules="all-linear"),
    "ministral3/all_linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "glm4/all_linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "gpt2/c_attn": dict(r=4, lora_alpha=10, target_modules=["c_attn"], fan_in_fan_out=True),
    "gpt2/all_linear": dict(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "llama/dora": dict(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True),
    # Biases, which magnitudes leave alone.
    "qwen2/dora": dict(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "o_proj"], use_dora=True, use_rslora=True),
    "gpt2/dora": dict(r=2, lora_alpha=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True),
}
PROMPT_ADAPTERS = {
    "llama/prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "llama/prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "qwen3/prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "gemma3/prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "granite/prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "gpt2/prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "gpt2/prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
IA3_ADAPTERS = {
    "llama/ia3": dict(),
    "qwen2/ia3": dict(target_modules=r".*\.(q|v|up|down)_proj", feedforward_modules=r".*\.mlp\..*"),
    "gpt2/ia3": dict(fan_in_fan_out=True),
}
TOKEN_ADAPTERS = {
    # An untied head stays frozen; tied, it has the embedding's rows; with names, each table has its own.
    "llama/tokens": dict(trainable_token_indices=[86, 3, 40, 11]),
    "llama/token_tables": dict(trainable_token_indices={"embed_tokens": [62, 40], "lm_head": [26, 5, 86]}),
    "qwen2/tokens": dict(trainable_token_indices=[31, 96, 12]),
    "qwen2/token_tables": dict(trainable_token_indices={"embed_tokens": [31, 41], "lm_head": [12]}),
    "gemma2/tokens": dict(trainable_token_indices=[92, 77]),
    "granite/tokens": dict(trainable_token_indices={"model.embed_tokens": [90, 17]}),
    "gpt2/tokens": dict(trainable_token_indices=[93, 33, 0], target_modules=["c_attn"], fan_in_fan_out=True),
}
SMOOTHED_ADAPTER = "llama/all_linear"
PARTS_CASE, PARTS_RANK, PARTS_ALPHA = "gpt2/q_v_parts", 2, 5


def generator(name):
    """A random generator whose seed is the case's name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def randomise(model, name):
    """Overwrites every weight so that each shows in the logits: zero biases and unit norms would hide a bug."""
    random = generator(name)
    center = 0 if name.startswith("gemma") else 1  # of the weights of norms: Gemma's are used as 1 + w
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=random)
            is_norm = "norm" in key or ".ln_" in key
            value.copy_(center + 0.3 * noise if is_norm and key.endswith("weight") else 0.25 * noise)


def make_model(name):
    """The tiny random model of a family, in evaluation mode."""
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager", dtype=torch.float32)
    randomise(model, name)
    return model.eval()


def make_rows(name):
    """Three (ids, labels) rows: a prompt and its completion, plain text, and two turns with a gap between."""
    random = generator(name + " rows")
    ids = [torch.randint(3, MODELS[name].vocab_size, (length,), generator=random) for length in (24, 7, 13)]
    labels = [row.clone() for row in ids]
    labels[0][:9] = IGNORED
    labels[2][:4] = IGNORED
    labels[2][7:10] = IGNORED
    return list(zip(ids, labels))


def row_logits(model, rows):
    """Logits [T, V] a row; each row runs alone, so nothing is padded or masked. Those of virtual tokens are left out."""
    return [model(input_ids=ids[None], use_cache=False).logits[0, -len(ids):] for ids, _ in rows]


def mean_loss(model, rows, smoothing=0.0):
    """Mean loss over the supervised tokens of all rows together."""
    logits = torch.cat([x[:-1] for x in row_logits(model, rows)])
    labels = torch.cat([labels[1:] for _, labels in rows])
    if smoothing > 0:
        return LabelSmoother(epsilon=smoothing, ignore_index=IGNORED)({"logits": logits[None]}, labels[None])
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED)


def greedy(model, ids):
    """The likeliest tokens after `ids`, at most GREEDY_TOKENS, stopping before a choice that rounding could turn."""
    row = ids.tolist()
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            last = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
            best, second = last.topk(2).values.tolist()
            if best - second < 0.01:
                break
            row.append(int(last.argmax()))
    return torch.tensor(row[len(ids):], dtype=torch.int32)


def outputs(model, rows):
    """What a model says of the rows before any training."""
    with torch.no_grad():
        found = {f"logits.{i}": x for i, x in enumerate(row_logits(model, rows))}
        found["loss"] = mean_loss(model, rows)
    return found | {f"greedy.{i}": greedy(model, ids) for i, (ids, _) in enumerate(rows)}


def gradients(model, rows, parameters, smoothing=0.0, prefix=""):
    """The loss, the gradient of every named parameter and their joint norm."""
    loss = mean_loss(model, rows, smoothing)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    found = {f"{prefix}grad.{key}": g for key, g in zip(parameters, grads)}
    return found | {f"{prefix}loss": loss.detach(), f"{prefix}grad_norm": norm}


def ten_losses(model, rows, parameters, learning_rate):
    """The loss before each of ten AdamW steps; the parameters are left as trained."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = mean_loss(model, rows)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def lora_golden(model, rows, parameters, smoothing=0.0):
    """Everything that is recorded of an adapted model whose trainable tensors are `parameters`."""
    found = outputs(model, rows) | gradients(model, rows, parameters)
    if smoothing > 0:
        found |= gradients(model, rows, parameters, smoothing, "smoothed.")
    found["losses"] = ten_losses(model, rows, parameters, learning_rate=1e-2)
    return found | {f"final.{key}": value for key, value in parameters.items()}


def write_tensors(path, tensors):
    """Saves integers as i32, the rest as f32, scalars as one element."""
    def plain(value):
        value = value.detach().clone().contiguous()
        value = value.float() if value.is_floating_point() else value.int()
        return value.reshape(1) if value.dim() == 0 else value

    save_file({key: plain(value) for key, value in tensors.items()}, path)


def write_model(folder, name):
    """A model's folder: config, weights, and what transformers computes with them."""
    model, rows = make_model(name), make_rows(name)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    found = {f"ids.{i}": ids for i, (ids, _) in enumerate(rows)}
    found |= {f"labels.{i}": labels for i, (_, labels) in enumerate(rows)}
    found |= outputs(model, rows)
    if name in FULLY_TUNED:
        parameters = dict(model.named_parameters())
        found |= gradients(model, rows, parameters)
        found["losses"] = ten_losses(model, rows, parameters, learning_rate=1e-3)
    write_tensors(folder / "golden.safetensors", found)


def save_adapter(peft_model, folder):
    """PEFT's own files, with its set of target modules sorted: their order would change from run to run."""
    peft_model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def lora_parameters(peft_model):
    """The trainable tensors by their keys in adapter_model.safetensors."""
    parameters = {name.replace(".default", ""): x for name, x in peft_model.named_parameters() if x.requires_grad}
    # PEFT saves magnitudes without the name of the parameter that holds them.
    parameters = {name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector"): x for name, x in parameters.items()}
    assert set(parameters) == set(get_peft_model_state_dict(peft_model))
    return parameters


def randomise_lora(parameters, name):
    """Random A and B, and magnitudes away from the norms; PEFT's zero B would hide every mistake in A's path."""
    random = generator(name)
    with torch.no_grad():
        for key, value in parameters.items():
            if key.endswith(".lora_magnitude_vector"):
                value.mul_(1 + 0.2 * torch.randn(value.shape, generator=random))
                continue
            value.copy_((0.3 if ".lora_A." in key else 0.15) * torch.randn(value.shape, generator=random))


def write_adapter(folder, name):
    """A PEFT adapter's folder and what PEFT computes with it."""
    family = name.split("/")[0]
    rows = make_rows(family)
    options = ADAPTERS.get(name) or dict(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"]) | TOKEN_ADAPTERS[name]
    model = get_peft_model(make_model(family), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    parameters = lora_parameters(model)
    randomise_lora(parameters, name)
    save_adapter(model, folder)
    smoothing = 0.1 if name == SMOOTHED_ADAPTER else 0.0
    write_tensors(folder / "golden.safetensors", lora_golden(model, rows, parameters, smoothing))


def write_prompt_adapter(folder, name):
    """The folder of a prefix or prompt tuning, and what PEFT computes with it."""
    family = name.split("/")[0]
    model = get_peft_model(make_model(family), PROMPT_ADAPTERS[name]).eval()
    parameters = {"prompt_embeddings": model.prompt_encoder["default"].embedding.weight}
    with torch.no_grad():
        for value in parameters.values():
            value.copy_(0.5 * torch.randn(value.shape, generator=generator(name)))
    save_adapter(model, folder)
    write_tensors(folder / "golden.safetensors", lora_golden(model, make_rows(family), parameters))


def write_ia3_adapter(folder, name):
    """The folder of an IA3, and what PEFT computes with it."""
    family = name.split("/")[0]
    model = get_peft_model(make_model(family), IA3Config(task_type="CAUSAL_LM", **IA3_ADAPTERS[name])).eval()
    parameters = lora_parameters(model)
    random = generator(name)
    with torch.no_grad():
        for value in parameters.values():
            value.copy_(1 + 0.3 * torch.randn(value.shape, generator=random))
    save_adapter(model, folder)
    write_tensors(folder / "golden.safetensors", lora_golden(model, make_rows(family), parameters))


class PartsLinear(nn.Module):
    """GPT-2's fused c_attn as three frozen parts, of which q and v have a low-rank change of their own."""

    def __init__(self, fused):
        super().__init__()
        width = fused.weight.shape[0]
        self.parts = list(zip(fused.weight.split(width, dim=1), fused.bias.split(width)))
        self.q, self.v = (
            nn.ParameterDict(dict(lora_A=torch.zeros(PARTS_RANK, width), lora_B=torch.zeros(width, PARTS_RANK)))
            for _ in "qv"
        )

    def forward(self, x):
        scale = PARTS_ALPHA / PARTS_RANK
        q, k, v = (x @ weight + bias for weight, bias in self.parts)
        q = q + scale * (x @ self.q["lora_A"].T @ self.q["lora_B"].T)
        v = v + scale * (x @ self.v["lora_A"].T @ self.v["lora_B"].T)
        return torch.cat([q, k, v], dim=-1)


def write_parts(folder):
    """`gpt2/q_v_parts`: written by hand, since PEFT can't adapt part of a fused matrix, and checked against PEFT."""
    rows = make_rows("gpt2")
    model = make_model("gpt2").requires_grad_(False)
    parameters = {}
    for layer, block in enumerate(model.transformer.h):
        block.attn.c_attn = parts = PartsLinear(block.attn.c_attn)
        for part, pair in (("q", parts.q), ("v", parts.v)):
            for half, value in pair.items():
                parameters[f"base_model.model.transformer.h.{layer}.attn.c_attn.{part}.{half}.weight"] = value
    randomise_lora(parameters, PARTS_CASE)
    initial = {f"init.{key}": value.detach().clone() for key, value in parameters.items()}

    stacked = get_peft_model(make_model("gpt2"), LoraConfig(
        task_type="CAUSAL_LM", r=2 * PARTS_RANK, lora_alpha=2 * PARTS_ALPHA, target_modules=["c_attn"],
        fan_in_fan_out=True)).eval()
    with torch.no_grad():
        for key, value in lora_parameters(stacked).items():
            module, half = key.rsplit(".", 2)[0], key.rsplit(".", 2)[1]
            q, v = (parameters[f"{module}.{part}.{half}.weight"] for part in "qv")
            if half == "lora_A":
                value.copy_(torch.cat([q, v]))
            else:
                value.copy_(torch.block_diag(q, q.new_zeros(len(q), 0), v))  # q's rows, zeros for k's, v's rows
        for ours, pefts in zip(row_logits(model, rows), row_logits(stacked, rows)):
            torch.testing.assert_close(ours, pefts, rtol=1e-4, atol=1e-5)
    save_adapter(stacked, folder)
    write_tensors(folder / "golden.safetensors", initial | lora_golden(model, rows, parameters))


def write_all(folder):
    """Writes every case below `folder`."""
    for name in MODELS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_model(folder / name, name)
    for name in ADAPTERS | TOKEN_ADAPTERS:
        write_adapter(folder / name, name)
    for name in PROMPT_ADAPTERS:
        write_prompt_adapter(folder / name, name)
    for name in IA3_ADAPTERS:
        write_ia3_adapter(folder / name, name)
    write_parts(folder / PARTS_CASE)


def differences(expected, found, tolerance):
    """What differs between two folders of goldens, a line each."""
    here, there = ({str(p.relative_to(folder)) for p in folder.rglob("*.*")} for folder in (expected, found))
    problems = [f"{name}: only in {expected}" for name in sorted(here - there)]
    problems += [f"{name}: missing from {expected}" for name in sorted(there - here)]
    for name in sorted(here & there):
        if name.endswith(".json"):
            a, b = (json.loads((folder / name).read_text()) for folder in (expected, found))
            versions = ("transformers_version", "peft_version")
            problems += [f"{name}: {key} is {a.get(key)!r}, now {b.get(key)!r}" for key in sorted(a.keys() | b.keys())
                         if key not in versions and a.get(key) != b.get(key)]
            continue
        a, b = load_file(expected / name), load_file(found / name)
        if a.keys() != b.keys() or any(a[key].shape != b[key].shape for key in a):
            problems.append(f"{name}: other tensors or shapes")
            continue
        gradient_size = max((x.abs().max().item() for key, x in a.items() if "grad." in key), default=0.0)
        for key in sorted(a):
            size = max(a[key].abs().max().item(), gradient_size if "grad." in key else 0.0)
            worst = (a[key].double() - b[key].double()).abs().max().item()
            if not worst <= tolerance * size:
                problems.append(f"{name}: {key} differs by {worst:.1e} where its largest value is {size:.1e}")
    return problems


def command(description, default_folder, write_all):
    """The command line of a script whose `write_all(folder)` writes goldens; returns the exit status."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=default_folder)
    parser.add_argument("--check", action="store_true", help="compare instead of writing; exit 1 if anything differs")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="of --check, relative; default 1e-6")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if not arguments.check:
        write_all(arguments.folder)
        size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
        print(f"wrote {arguments.folder}: {size / 1e6:.2f} MB")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        write_all(Path(temporary))
        problems = differences(arguments.folder, Path(temporary), arguments.tolerance)
    print("\n".join(problems) or f"{arguments.folder} is up to date")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(command(__doc__, DEFAULT_FOLDER, write_all))
