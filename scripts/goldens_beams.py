"""Makes crates/lowrank/tests/goldens/beams.json: what transformers' beam search finds with the golden models.

It needs torch and transformers. Run it from the repository's root: python scripts/goldens_beams.py [--check]
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

FOLDER = Path("crates/lowrank/tests/goldens")
PROMPTS = [[5, 17, 90, 17], [3, 3, 4, 60, 3, 3, 4, 61, 12, 80], [44]]
SETTINGS = [
    {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 4, "max_new_tokens": 12, "stop_ids": [96]},
    {"num_beams": 10, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "max_new_tokens": 12, "stop_ids": [9, 70]},
    {"num_beams": 2, "length_penalty": 1.0, "no_repeat_ngram_size": 2, "max_new_tokens": 16, "stop_ids": []},
    {"num_beams": 3, "length_penalty": -0.5, "no_repeat_ngram_size": 1, "max_new_tokens": 10, "stop_ids": [11, 52, 81]},
    {"num_beams": 5, "length_penalty": 2.0, "no_repeat_ngram_size": 0, "max_new_tokens": 12, "stop_ids": list(range(5, 97, 7))},
    {"num_beams": 5, "length_penalty": 0.0, "no_repeat_ngram_size": 3, "max_new_tokens": 12, "stop_ids": list(range(5, 97, 7))},
]


@torch.no_grad()
def search(model, prompt, setting):
    stop = setting["stop_ids"]
    options = {key: setting[key] for key in ("num_beams", "length_penalty", "no_repeat_ngram_size", "max_new_tokens")}
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = stop or None
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        early_stopping=False,
        pad_token_id=0,
        **options,
    )[0].tolist()[len(prompt) :]
    return out[: next((at for at, token in enumerate(out) if token in stop), len(out))]


def main():
    cases = []
    for name in ["llama", "gpt2", "qwen3"]:
        model = AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32).eval()
        for setting in SETTINGS:
            made = [search(model, prompt, setting) for prompt in PROMPTS]
            cases.append({"model": name, **setting, "prompts": PROMPTS, "made": made})
    text = "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n"
    path = FOLDER / "beams.json"
    if "--check" in sys.argv[1:]:
        assert path.read_text() == text, f"{path} differs"
    else:
        path.write_text(text)


if __name__ == "__main__":
    main()
