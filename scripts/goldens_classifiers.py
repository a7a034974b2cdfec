#!/usr/bin/env python3
"""Writes the golden files of encoders and classifiers that `crates/lowrank/tests/peers` compares the engine with.

    pip install torch transformers peft safetensors
    python scripts/goldens_classifiers.py            # rewrite crates/lowrank/tests/goldens_classifiers
    python scripts/goldens_classifiers.py --check    # regenerate elsewhere, compare, exit 1 if anything differs

As in `goldens.py`, models are tiny and random, everything is float32 on one thread and without dropout, and each row runs alone,
so that nothing is padded. A model has a folder: `config.json` and `model.safetensors` as transformers saves them, and
`golden.safetensors`:

    ids.N, types.N     i32 [T]      rows of different lengths, and which of two texts each token belongs to (all 0 where the
                                    family has no such table)
    label.N            i32 or f32   the number of the label; or a value for each label; or for classifiers of tokens a number a
                                    token, -100 where there is none
    hidden.N           f32 [T, C]   the last hidden states
    logits.N           f32 [labels] or [T, labels]
    loss               f32 [1]      transformers' loss, the mean of the rows' (of classifiers of tokens: of all labels)
    grad.NAME          f32          d loss / d weight, for the models that are fully tuned, and grad_norm
    losses             f32 [10]     the loss before each of ten steps of AdamW over all rows

Below it, `lora` is an adapter as PEFT saves it, with the classifier in `modules_to_save`; its `golden.safetensors` has logits,
loss, losses, grad.KEY and final.KEY as those of `goldens.py`. `prompt` and `ia3` are the same of PEFT's prompt tuning and IA3, for some models.
"""

import sys
from pathlib import Path

import goldens
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification, AutoModelForTokenClassification, BertConfig, DebertaV2Config,
    DistilBertConfig, GPT2Config, LlamaConfig, ModernBertConfig, RobertaConfig, XLMRobertaConfig,
)

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "crates/lowrank/tests/goldens_classifiers"
VOCABULARY, LABELS, IGNORED = 61, 3, -100

BERT_SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=3,
    max_position_embeddings=32, layer_norm_eps=1e-3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=LABELS,
)
LLAMA_SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-3, pad_token_id=None, num_labels=LABELS,
)
GPT2_SHAPE = dict(
    vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=3, n_positions=32, layer_norm_epsilon=1e-3, resid_pdrop=0.0,
    embd_pdrop=0.0, attn_pdrop=0.0, classifier_dropout=0.0, pad_token_id=None, num_labels=LABELS,
)
MODERNBERT_SHAPE = dict(
    # Windows of two tokens to each side, and of four blocks the first and the last see everything.
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=20, num_hidden_layers=4, num_attention_heads=3,
    max_position_embeddings=32, norm_eps=1e-3, local_attention=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    cls_token_id=1, sep_token_id=2, num_labels=LABELS,
)
DEBERTA_SHAPE = BERT_SHAPE | dict(
    # Distances of 5 and more share buckets, and those of 12 and more the last one.
    relative_attention=True, position_buckets=8, max_relative_positions=12, norm_rel_ebd="layer_norm", share_att_key=True,
    pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=2,
)
MODELS = {
    "bert": BertConfig(**BERT_SHAPE),
    "bert_several": BertConfig(**BERT_SHAPE | dict(num_hidden_layers=1), problem_type="multi_label_classification"),
    "bert_values": BertConfig(**BERT_SHAPE | dict(num_hidden_layers=1, num_labels=1), problem_type="regression"),
    "bert_tokens": BertConfig(**BERT_SHAPE),
    "roberta": RobertaConfig(**BERT_SHAPE | dict(type_vocab_size=1)),
    "roberta_tokens": RobertaConfig(**BERT_SHAPE | dict(num_hidden_layers=1, type_vocab_size=1)),
    "xlm_roberta": XLMRobertaConfig(**BERT_SHAPE | dict(num_hidden_layers=1, type_vocab_size=1)),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY, dim=24, hidden_dim=28, n_layers=2, n_heads=3, max_position_embeddings=32, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=LABELS),
    "modernbert": ModernBertConfig(**MODERNBERT_SHAPE),
    "modernbert_mean": ModernBertConfig(**MODERNBERT_SHAPE | dict(
        num_hidden_layers=2, classifier_pooling="mean", classifier_bias=True, norm_bias=True, attention_bias=True, mlp_bias=True)),
    "modernbert_tokens": ModernBertConfig(**MODERNBERT_SHAPE | dict(num_hidden_layers=2)),
    "deberta": DebertaV2Config(**DEBERTA_SHAPE),
    # Absolute positions, distances without buckets, one term, no norm.
    "deberta_biased": DebertaV2Config(**DEBERTA_SHAPE | dict(
        num_hidden_layers=1, position_buckets=-1, max_relative_positions=6, norm_rel_ebd="none", pos_att_type="c2p",
        position_biased_input=True, type_vocab_size=0, pooler_hidden_act="relu")),
    "deberta_tokens": DebertaV2Config(**DEBERTA_SHAPE | dict(pos_att_type=["p2c"], max_relative_positions=-1)),
    "gpt2": GPT2Config(**GPT2_SHAPE),
    "gpt2_tokens": GPT2Config(**GPT2_SHAPE | dict(n_layer=1)),
    "llama": LlamaConfig(**LLAMA_SHAPE),
    "llama_tokens": LlamaConfig(**LLAMA_SHAPE | dict(num_hidden_layers=1)),
}
FULLY_TUNED = [
    "bert", "roberta", "distilbert", "modernbert", "modernbert_mean", "deberta", "deberta_biased", "deberta_tokens", "gpt2",
    "llama_tokens",
]
ADAPTERS = {
    # The default targets; all linears, which has BERT's pooler among them; names that match it by their ending.
    "bert": dict(r=3, lora_alpha=7),
    "bert_tokens": dict(r=2, lora_alpha=5, target_modules=["query", "dense"]),
    "bert_several": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "bert_values": dict(r=3, lora_alpha=7, target_modules=["dense"]),
    # PEFT refuses all-linear here, as it does with classifiers of tokens: it would put branches beside linears of the classifier.
    "roberta": dict(r=3, lora_alpha=7, target_modules=r".*encoder.*\.(query|key|value|dense)"),
    "roberta_tokens": dict(r=2, lora_alpha=5),
    "xlm_roberta": dict(r=3, lora_alpha=7),
    "distilbert": dict(r=3, lora_alpha=7, target_modules=["q_lin", "v_lin", "lin1"]),
    "modernbert": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "modernbert_mean": dict(r=3, lora_alpha=7, target_modules=["Wqkv", "Wi"]),
    "modernbert_tokens": dict(r=2, lora_alpha=5, target_modules=["Wqkv", "Wo"]),
    "deberta": dict(r=3, lora_alpha=7),
    "deberta_biased": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "deberta_tokens": dict(r=2, lora_alpha=5, target_modules=["query_proj", "key_proj"]),
    "gpt2": dict(r=8, lora_alpha=10, target_modules=["c_attn"], fan_in_fan_out=True),
    "gpt2_tokens": dict(r=2, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True),
    "llama": dict(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"]),
    "llama_tokens": dict(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
}
PROMPTS = ["bert", "roberta", "deberta", "deberta_biased"]
# Factors of keys are those of relative positions' keys, too.
SCALED = ["deberta"]


def of_tokens(name):
    return name.endswith("_tokens")


def make_model(name):
    """The tiny random classifier, in evaluation mode."""
    kind = AutoModelForTokenClassification if of_tokens(name) else AutoModelForSequenceClassification
    model = kind.from_config(MODELS[name], attn_implementation="eager", dtype=torch.float32)
    random = goldens.generator(name)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=random)
            is_norm = "norm" in key.lower() or ".ln_" in key
            value.copy_(1 + 0.3 * noise if is_norm and key.endswith("weight") else 0.25 * noise)
    return model.eval()


def make_rows(name):
    """Three rows (ids, types, label)."""
    config, random = MODELS[name], goldens.generator(name + " rows")
    rows = []
    for n, length in enumerate((14, 5, 9)):
        ids = torch.randint(3, VOCABULARY, (length,), generator=random)
        types = torch.zeros_like(ids)
        if getattr(config, "type_vocab_size", 0) == 2 and n != 1:
            types[length // 2:] = 1
        if of_tokens(name):
            label = torch.randint(0, LABELS, (length,), generator=random)
            label[torch.rand(length, generator=random) < 0.4] = IGNORED
            label[0] = IGNORED
        elif config.problem_type == "multi_label_classification":
            label = (torch.rand(LABELS, generator=random) < 0.5).float()
        elif config.problem_type == "regression":
            label = torch.randn(1, generator=random)
        else:
            label = torch.tensor([2, 0, 1][n])
        rows.append((ids, types, label))
    return rows


def inputs(model, ids, types):
    has_types = getattr(model.config, "type_vocab_size", 0) == 2
    return dict(input_ids=ids[None]) | (dict(token_type_ids=types[None]) if has_types else {})


def mean_loss(model, rows):
    """transformers' loss."""
    if of_tokens(model.golden_name):
        logits = torch.cat([model(**inputs(model, ids, types)).logits[0] for ids, types, _ in rows])
        return functional.cross_entropy(logits, torch.cat([label for _, _, label in rows]), ignore_index=IGNORED)
    losses = [model(**inputs(model, ids, types), labels=label[None]).loss for ids, types, label in rows]
    return torch.stack(losses).mean()


def outputs(model, rows, hidden=True):
    """What a model says of the rows before any training."""
    found = {}
    with torch.no_grad():
        for n, (ids, types, _) in enumerate(rows):
            found[f"logits.{n}"] = model(**inputs(model, ids, types)).logits[0]
            if hidden:
                found[f"hidden.{n}"] = model.base_model(**inputs(model, ids, types)).last_hidden_state[0]
        found["loss"] = mean_loss(model, rows)
    return found


def gradients(model, rows, parameters):
    """The gradient of every named parameter and their joint norm."""
    grads = torch.autograd.grad(mean_loss(model, rows), list(parameters.values()))
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    return {f"grad.{key}": g for key, g in zip(parameters, grads)} | {"grad_norm": norm}


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


def write_model(folder, name):
    model, rows = make_model(name), make_rows(name)
    model.golden_name = name
    model.save_pretrained(folder)
    found = {f"ids.{n}": ids for n, (ids, _, _) in enumerate(rows)}
    found |= {f"types.{n}": types for n, (_, types, _) in enumerate(rows)}
    found |= {f"label.{n}": label for n, (_, _, label) in enumerate(rows)}
    found |= outputs(model, rows)
    if name in FULLY_TUNED:
        parameters = dict(model.named_parameters())
        found |= gradients(model, rows, parameters)
        found["losses"] = ten_losses(model, rows, parameters, learning_rate=1e-3)
    goldens.write_tensors(folder / "golden.safetensors", found)


def saved_key(name):
    """The key that PEFT saves a parameter under: a module of modules_to_save without its wrapper's name."""
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    return name.replace("prompt_encoder.embedding.weight", "prompt_embeddings")


def write_adapter(folder, name, config):
    model = get_peft_model(make_model(name), config).eval()
    model.golden_name = name
    rows, random = make_rows(name), goldens.generator(f"{name}/{folder.name}")
    saved = get_peft_model_state_dict(model)
    parameters = {saved_key(key): value for key, value in model.named_parameters() if value.requires_grad}
    assert set(parameters) == set(saved), set(parameters) ^ set(saved)
    with torch.no_grad():
        for key, value in parameters.items():
            noise = torch.randn(value.shape, generator=random)
            if ".ia3_" in key:
                value.copy_(1 + 0.3 * noise)
            elif ".lora_" in key:
                value.copy_((0.3 if ".lora_A." in key else 0.15) * noise)
            else:
                value.copy_(0.25 * noise)
    goldens.save_adapter(model, folder)
    found = outputs(model, rows, hidden=False) | gradients(model, rows, parameters)
    found["losses"] = ten_losses(model, rows, parameters, learning_rate=1e-2)
    found |= {f"final.{key}": value for key, value in parameters.items()}
    goldens.write_tensors(folder / "golden.safetensors", found)


def write_all(folder):
    for name in MODELS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_model(folder / name, name)
        task_type = "TOKEN_CLS" if of_tokens(name) else "SEQ_CLS"
        write_adapter(folder / name / "lora", name, LoraConfig(task_type=task_type, **ADAPTERS[name]))
        if name in PROMPTS:
            write_adapter(folder / name / "prompt", name, PromptTuningConfig(task_type=task_type, num_virtual_tokens=3))
        if name in SCALED:
            write_adapter(folder / name / "ia3", name, IA3Config(task_type=task_type))


if __name__ == "__main__":
    sys.exit(goldens.command(__doc__, DEFAULT_FOLDER, write_all))
