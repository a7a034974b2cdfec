"""Makes crates/kernels/tests/goldens/quantize.bin with llama.cpp's own quantizer, `ggml_quantize_chunk` of libggml-base.

The file is rows of 256 f32 numbers, and behind them their blocks in Q4_0, Q8_0, Q4_K, Q6_K, Q5_0, Q4_1, Q5_1 and Q5_K, one format after the
other.

Run it from the repository's root: python scripts/goldens_quantize.py [--library libggml-base.so]. The library is that of the package
llama-cpp-python where none is given. The same seed gives the same bytes; --check compares them with the file.

With `--model FOLDER --out FOLDER` it quantizes every tensor of a model instead, whole blocks of it, and writes numbers.f32 and a file for
each format; `LOWRANK_QUANTIZED=FOLDER cargo test -p lowrank-kernels --test quantize` then compares them.
"""

import argparse
import ctypes
import sys
import time
from pathlib import Path

import numpy as np

GOLDENS = Path("crates/kernels/tests/goldens/quantize.bin")
ROW = 256
# ggml's number of each type, bytes of a block and its numbers.
TYPES = {
    "Q4_0": (2, 18, 32), "Q8_0": (8, 34, 32), "Q4_K": (12, 144, 256), "Q6_K": (14, 210, 256), "Q5_0": (6, 22, 32), "Q4_1": (3, 20, 32),
    "Q5_1": (7, 24, 32), "Q5_K": (13, 176, 256),
}


def library(path):
    if path is None:
        import llama_cpp

        path = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]
    return ggml


def quantized(ggml, name, numbers):
    kind, size, length = TYPES[name]
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    blocks = np.zeros(numbers.size // length * size, dtype=np.uint8)
    written = ggml.ggml_quantize_chunk(kind, numbers.ctypes.data, blocks.ctypes.data, 0, numbers.size // ROW, ROW, None)
    assert written == blocks.size, (name, written, blocks.size)
    return blocks.tobytes()


def rows():
    """Rows of every kind that a quantizer treats in a way of its own."""
    rng = np.random.default_rng(3)
    normal = rng.normal
    ramp = np.arange(ROW)
    outlier = normal(0, 0.02, ROW)
    outlier[77] = 9.5
    mixed = normal(0, 1, ROW) * np.repeat(10.0 ** rng.uniform(-6, 3, 16), 16)
    parts = normal(0, 0.1, ROW)
    parts[:32], parts[32:64], parts[64:80] = 0, -0.25, 0.125
    sparse = normal(0, 1, ROW) * (rng.random(ROW) < 0.05)
    tiny_parts = normal(0, 1, ROW)
    tiny_parts[16:32] *= 1e-17
    tiny_parts[128:160] *= 1e-30
    return np.stack([
        normal(0, 0.02, ROW), normal(0, 1, ROW), normal(3, 1, ROW), normal(-40, 0.5, ROW),
        rng.standard_t(2, ROW) * 0.02, rng.standard_cauchy(ROW), rng.laplace(0, 0.1, ROW), rng.uniform(-1, 1, ROW),
        -np.abs(normal(0, 0.3, ROW)), np.abs(normal(0, 0.3, ROW)), np.zeros(ROW), np.full(ROW, -0.0),
        np.full(ROW, 0.7), np.full(ROW, -0.7), outlier, mixed, parts, sparse, tiny_parts,
        normal(0, 1, ROW) * 1e-30, normal(0, 1, ROW) * 1e-39, np.full(ROW, 1e-12), normal(0, 1, ROW) * 1e-7,
        normal(0, 1, ROW) * 1e4, np.sign(normal(0, 1, ROW)), ramp / 16 - 8, np.round(normal(0, 4, ROW)) / 2, ramp % 16 * 0.5,
    ]).astype(np.float32)


def golden(ggml):
    numbers = rows()
    return numbers.tobytes() + b"".join(quantized(ggml, name, numbers) for name in TYPES)


def of_model(ggml, folder, out):
    from safetensors import safe_open

    out.mkdir(parents=True, exist_ok=True)
    numbers = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():
                values = tensors.get_tensor(name).float().numpy().ravel()
                numbers.append(values[:values.size // ROW * ROW])
    numbers = np.concatenate(numbers)
    (out / "numbers.f32").write_bytes(numbers.tobytes())
    for name in TYPES:
        begin = time.time()
        blocks = quantized(ggml, name, numbers)
        print(f"{name}: {numbers.size} numbers in {time.time() - begin:.2f} s on one thread")
        (out / name).write_bytes(blocks)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ggml = library(args.library)
    if args.model:
        of_model(ggml, args.model, args.out)
    elif args.check:
        if GOLDENS.read_bytes() != golden(ggml):
            sys.exit(f"{GOLDENS} is not what the library makes")
    else:
        GOLDENS.parent.mkdir(parents=True, exist_ok=True)
        GOLDENS.write_bytes(golden(ggml))


if __name__ == "__main__":
    main()
