"""Makes the goldens of crates/formats/tests/goldens with the `gguf`, `safetensors` and `numpy` packages.

quants.gguf / quants.safetensors: random blocks of every storage type that can be read, and what gguf.quants makes of them.
llama.gguf / llama/: a small llama model, its q and k rows permuted as llama.cpp's converter does, and the original.

Run it from the repository's root: python scripts/goldens_gguf.py [folder]. The same seed gives the same bytes.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

# Where the f16 scales lie in a block; random bytes there would mostly be NaN or enormous.
SCALES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
    Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.IQ4_NL: [0], Type.IQ4_XS: [0],
}
ROWS, COLUMNS = 3, 512


def random_blocks(rng, kind):
    """ROWS x COLUMNS values of a type, as raw bytes: every bit pattern of the packed parts may occur."""
    length, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS * COLUMNS // length, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scale = rng.normal(0, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, at:at + 2] = scale.view(np.uint8)
    return blocks.reshape(ROWS, -1)


def quants(folder):
    rng = np.random.default_rng(1)
    writer = GGUFWriter(folder / "quants.gguf", "quants")
    # One key of every kind.
    writer.add_uint8("key.u8", 200)
    writer.add_int8("key.i8", -100)
    writer.add_uint16("key.u16", 60000)
    writer.add_int16("key.i16", -30000)
    writer.add_uint32("key.u32", 4000000000)
    writer.add_int32("key.i32", -2000000000)
    writer.add_uint64("key.u64", 2**63)
    writer.add_int64("key.i64", -(2**62))
    writer.add_float32("key.f32", 0.1)
    writer.add_float64("key.f64", 0.1)
    writer.add_bool("key.bool", True)
    writer.add_string("key.string", "größer ▁")
    writer.add_array("key.strings", ["a", "", "Ġb"])
    writer.add_array("key.ints", [1, -2, 3])
    writer.add_array("key.floats", [0.5, -1.5])
    writer.add_array("key.bools", [True, False])
    expected = {}
    for kind in [Type.F32, Type.F16, Type.BF16]:
        values = rng.normal(0, 1, (ROWS, COLUMNS)).astype(np.float32)
        stored = quantize(values, kind)
        expected[kind.name] = dequantize(stored, kind).reshape(ROWS, COLUMNS)
        writer.add_tensor(kind.name, stored, raw_dtype=kind)
    for kind in SCALES:
        stored = random_blocks(rng, kind)
        expected[kind.name] = dequantize(stored, kind)
        writer.add_tensor(kind.name, stored, raw_dtype=kind)
    finish(writer)
    expected = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in expected.items()}
    save_file(expected, folder / "quants.safetensors")


def permute(weights, heads):
    """llama.cpp's order of the rows of q and k."""
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def llama3_factors(theta, head_dim, factor, low, high, original):
    """What llama.cpp's converter writes into rope_freqs.weight."""
    factors = []
    for frequency in 1.0 / (theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def llama(folder):
    rng = np.random.default_rng(2)
    hidden, heads, groups, head_dim, wide, vocabulary, layers = 24, 4, 2, 8, 32, 20, 2
    theta = 500000.0
    query, key = heads * head_dim, groups * head_dim

    def weights(*shape):
        return rng.normal(0, 0.1, shape).astype(np.float16).astype(np.float32)

    writer = GGUFWriter(folder / "llama.gguf", "llama")
    writer.add_block_count(layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    expected = {}

    def add(name, gguf_name, values, interleaved=0):
        expected[name] = values
        stored = permute(values, interleaved) if interleaved else values
        # Norms and biases stay f32 in GGUF files.
        stored = stored.astype(np.float16) if values.ndim == 2 else stored
        writer.add_tensor(gguf_name, np.ascontiguousarray(stored))

    add("model.embed_tokens.weight", "token_embd.weight", weights(vocabulary, hidden))
    for n in range(layers):
        hf, gg = f"model.layers.{n}", f"blk.{n}"
        for name, gguf_name, rows, columns, interleaved in [
            ("self_attn.q_proj", "attn_q", query, hidden, heads),
            ("self_attn.k_proj", "attn_k", key, hidden, groups),
            ("self_attn.v_proj", "attn_v", key, hidden, 0),
            ("self_attn.o_proj", "attn_output", hidden, query, 0),
        ]:
            add(f"{hf}.{name}.weight", f"{gg}.{gguf_name}.weight", weights(rows, columns), interleaved)
            add(f"{hf}.{name}.bias", f"{gg}.{gguf_name}.bias", weights(rows), interleaved)
        add(f"{hf}.mlp.gate_proj.weight", f"{gg}.ffn_gate.weight", weights(wide, hidden))
        add(f"{hf}.mlp.up_proj.weight", f"{gg}.ffn_up.weight", weights(wide, hidden))
        add(f"{hf}.mlp.down_proj.weight", f"{gg}.ffn_down.weight", weights(hidden, wide))
        add(f"{hf}.input_layernorm.weight", f"{gg}.attn_norm.weight", weights(hidden))
        add(f"{hf}.post_attention_layernorm.weight", f"{gg}.ffn_norm.weight", weights(hidden))
    add("model.norm.weight", "output_norm.weight", weights(hidden))
    add("lm_head.weight", "output.weight", weights(vocabulary, hidden))
    writer.add_tensor("rope_freqs.weight", llama3_factors(theta, head_dim, 8.0, 1.0, 4.0, 8192))
    finish(writer)

    target = folder / "llama"
    target.mkdir(exist_ok=True)
    save_file(expected, target / "model.safetensors")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": True, "bos_token_id": 1, "eos_token_id": 2,
        "head_dim": head_dim, "hidden_act": "silu", "hidden_size": hidden, "intermediate_size": wide,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": heads,
        "num_hidden_layers": layers, "num_key_value_heads": groups, "rms_norm_eps": 1e-5, "rope_scaling": scaling,
        "rope_theta": theta, "tie_word_embeddings": False, "vocab_size": vocabulary,
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "crates/formats/tests/goldens")
    folder.mkdir(parents=True, exist_ok=True)
    quants(folder)
    llama(folder)


if __name__ == "__main__":
    main()
