"""Makes crates/formats/tests/goldens/peft_matching.json: which modules PEFT adapts, with which rank, alpha and scale.

Run it from the repository's root: python scripts/goldens_peft.py [file]
"""

import json
import math
import sys
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

MODULES = [
    "lm_head",
    "q_proj",
    "layers.0.q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.xq_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.10.mlp.experts.1.q_proj",
    "transformer.h.1.attn.c_attn",
    "model.encoder.layers.1.decoder.layers.2.q_proj",
]

CONFIGS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "c_attn", "lm_head"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["proj", "attn.q_proj", ".q_proj"]},
    {"target_modules": ["q.proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": "q_proj"},
    {"target_modules": "q_proj|lm_head"},
    {"target_modules": r"model\.layers\.\d+\..*proj"},
    {"target_modules": "(?i).*Q_PROJ"},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": r".*proj", "exclude_modules": "lm_head|q_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1, 10]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1, 2], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [2], "layers_pattern": ["decoder.layers"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [5]},
    {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}},
    {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.0\..*": 4, "q_proj": 2}},
    {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, r"layers\.0\..*": 4}},
    {"target_modules": ["q_proj"], "rank_pattern": {"^q_proj": 3, "attn.q_proj": 5}},
    {"target_modules": ["q_proj"], "rank_pattern": {"self_attn.(q|k)_proj": 16}, "alpha_pattern": {"q_proj": 24}},
    {"target_modules": ["q_proj"], "alpha_pattern": {"a|q_proj": 1.5, ".*": 7}},
    {"target_modules": ["q_proj"], "r": 3, "lora_alpha": 10, "use_rslora": True},
    {"target_modules": ["q_proj"], "rank_pattern": {"1.self_attn.q_proj": 2}, "lora_alpha": 5, "use_rslora": True},
]


def main():
    cases = []
    for values in CONFIGS:
        config = LoraConfig(**values)
        modules = {}
        for name in MODULES:
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
            scale = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
            modules[name] = [bool(check_target_module_exists(config, name)), rank, alpha, scale]
        cases.append({"config": {"peft_type": "LORA", **values}, "modules": modules})
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "crates/formats/tests/goldens/peft_matching.json")
    path.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
