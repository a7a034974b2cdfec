"""Makes crates/kernels/tests/goldens/bitsandbytes.bin with bitsandbytes' functions for CPUs.

The file has f32 numbers, 5 rows of 192, and then for NF4 and for FP4: with blocks of 64 and of 128 what is packed, the scales, and the
numbers that are dequantized; and the same with blocks of 64 and double quantization, whose scales are bytes, and behind them the map, the
nested scales and the offset. Last come 700 scales that are quantized themselves, and what they are again.

Run it from the repository's root: python scripts/goldens_bnb.py. The same seed gives the same bytes; --check compares them with the file.

With `--model FOLDER --out FOLDER` it quantizes every matrix of a model with columns of whole blocks instead, and writes numbers.f32 and
what NF4 and FP4 make of them; `LOWRANK_FOUR_BIT=FOLDER cargo test -p lowrank-kernels --test operations bitsandbytes` then compares them.
"""

import argparse
import sys
from pathlib import Path

import torch
from bitsandbytes import functional

GOLDENS = Path("crates/kernels/tests/goldens/bitsandbytes.bin")
KINDS = ["nf4", "fp4"]


def raw(tensor):
    return tensor.contiguous().reshape(-1).numpy().tobytes()


def numbers():
    torch.manual_seed(4)
    x = torch.randn(15, 64)
    x[1] *= 0.02
    x[2] = 0
    x[3] *= 1e-39
    x[4] = torch.linspace(-1, 1, 64)
    x[5] *= 1e38 / 4
    x[6] = -x[6].abs()
    x[7, 5] = 40
    x[8] = 0.3
    # In the middle of two values.
    x[9, 0] = 1
    for row, kind in [(9, "nf4"), (10, "fp4")]:
        values = functional.get_4bit_type(kind, device="cpu").sort().values
        x[row, 0] = 1
        x[row, 1:16] = (values[1:] + values[:-1]) / 2
        x[row, 17:33] = values
    x[11] = torch.sign(x[11])
    return x.reshape(5, 192)


def golden():
    x = numbers()
    out = [raw(x)]
    for kind in KINDS:
        for block, nested in [(64, False), (128, False), (64, True)]:
            packed, state = functional.quantize_4bit(
                x, blocksize=block, quant_type=kind, compress_statistics=nested
            )
            out += [raw(packed), raw(state.absmax)]
            if nested:
                out += [raw(state.state2.code), raw(state.state2.absmax), raw(state.offset)]
            out.append(raw(functional.dequantize_4bit(packed, state)))
    scales = torch.rand(700) * 3 + 0.05
    offset = scales.mean()
    stored, state = functional.quantize_blockwise(scales - offset, blocksize=256)
    out += [raw(stored), raw(state.absmax), raw(offset), raw(functional.dequantize_blockwise(stored, state) + offset)]
    return b"".join(out)


def of_model(folder, out):
    from safetensors import safe_open

    out.mkdir(parents=True, exist_ok=True)
    files = {name: (out / name).open("wb") for name in ["numbers.f32", *KINDS]}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():
                x = tensors.get_tensor(name).float()
                if x.ndim != 2 or x.shape[1] % 64:
                    continue
                files["numbers.f32"].write(raw(x))
                for kind in KINDS:
                    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind)
                    files[kind].write(raw(functional.dequantize_4bit(packed, state)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.model:
        of_model(args.model, args.out)
    elif args.check:
        if GOLDENS.read_bytes() != golden():
            sys.exit(f"{GOLDENS} is not what bitsandbytes makes")
    else:
        GOLDENS.parent.mkdir(parents=True, exist_ok=True)
        GOLDENS.write_bytes(golden())


if __name__ == "__main__":
    main()
