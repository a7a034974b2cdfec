"""Makes crates/kernels/tests/goldens/grouped.bin with the packers of AutoAWQ 0.2.9 and AutoGPTQ 0.7.1, and what both make of the numbers.

Three matrices of 32 outputs and 64 inputs in groups of 32: AWQ's, GPTQ's, and GPTQ's with inputs in another order (`desc_act`). Each has
qweight and qzeros (words of 32 bits), scales (16 bits), g_idx (words of 32 bits), and the numbers [out, in] that they stand for, f32.

Both packages need CUDA to be installed whole, so this takes their sources, unpacked:
`python scripts/goldens_grouped.py --awq autoawq-0.2.9 --gptq auto_gptq-0.7.1`, from the repository's root. The same seed gives the same
bytes; --check compares them with the file.
"""

import argparse
import importlib.util
import sys
import types
from pathlib import Path

import torch

GOLDENS = Path("crates/kernels/tests/goldens/grouped.bin")
OUTS, INPUTS, GROUP = 32, 64, 32


def module(name, path):
    """A module by its file, without the packages around it."""
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


def package(name, **names):
    found = types.ModuleType(name)
    found.__path__ = []
    vars(found).update(names)
    sys.modules[name] = found


def raw(tensor):
    return tensor.contiguous().numpy().tobytes()


def quantized():
    """A linear whose weights are integers of four bits, and their scales and zeros [groups, out]."""
    groups = INPUTS // GROUP
    scales = (torch.rand(groups, OUTS) * 0.02 + 0.001).half()
    zeros = torch.randint(1, 16, (groups, OUTS))
    q = torch.randint(0, 16, (INPUTS, OUTS))
    return scales, zeros, q


def linear(weight):
    made = torch.nn.Linear(INPUTS, OUTS, bias=False)
    made.weight.data = weight.t().contiguous()
    return made


def awq(sources):
    package("awq"), package("awq.utils")
    packing = module("awq.utils.packing_utils", sources / "awq/utils/packing_utils.py")
    package("awq.utils.module", try_import=lambda name: (None, ""))
    package("awq.utils.utils", get_best_device=lambda: "cpu")
    gemm = module("awq_gemm", sources / "awq/modules/linear/gemm.py")
    scales, zeros, q = quantized()
    spread = lambda x: x.repeat_interleave(GROUP, dim=0)
    weight = (q - spread(zeros)).float() * spread(scales).float()
    packed = gemm.WQLinear_GEMM.from_linear(linear(weight), 4, GROUP, scales=scales.float(), zeros=zeros.float())
    wide = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, GROUP)
    groups = torch.arange(INPUTS, dtype=torch.int32) // GROUP
    return packed, groups, wide.t()


def gptq(sources, shuffled):
    cuda = module("qlinear_cuda", sources / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    scales, zeros, q = quantized()
    groups = torch.arange(INPUTS, dtype=torch.int32) // GROUP
    if shuffled:
        groups = groups[torch.randperm(INPUTS)]
    at = groups.long()
    weight = (q - zeros[at]).float() * scales[at].float()
    packed = cuda.QuantLinear(4, GROUP, INPUTS, OUTS, False, weight_dtype=torch.float16)
    made = linear(weight)
    packed.pack(made, scales.t().float().clone(), zeros.t().float().clone(), groups)
    packed.scales = packed.scales.half()
    # What its forward multiplies with: the identity through it, in f32.
    packed.scales, half = packed.scales.float(), packed.scales
    wide = packed(torch.eye(INPUTS))
    packed.scales = half
    return packed, groups, wide.t()


def goldens(args):
    torch.manual_seed(7)
    made = [awq(args.awq), gptq(args.gptq, False), gptq(args.gptq, True)]
    data = b""
    for packed, groups, wide in made:
        assert packed.scales.dtype == torch.float16 and wide.shape == (OUTS, INPUTS)
        parts = [packed.qweight.int(), packed.qzeros.int(), packed.scales, groups.int(), wide.float()]
        data += b"".join(raw(part.detach()) for part in parts)
    return data


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--awq", type=Path, required=True, help="AutoAWQ's sources")
    parser.add_argument("--gptq", type=Path, required=True, help="AutoGPTQ's sources")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    data = goldens(args)
    if args.check:
        sys.exit(None if GOLDENS.read_bytes() == data else f"{GOLDENS} is not what this makes")
    GOLDENS.write_bytes(data)


main()
