"""How inference engines quantize activations: the reciprocal form, as a second reference.

A kernel that runs for every token avoids divisions. vLLM, TensorRT-LLM and FlashInfer multiply by reciprocals instead:

    division form    (what training and export compute)        reciprocal form    (here)
    block scale      amax_b / (6 * s2)                         gs * (amax_b * (1/6)),  gs = 1 / s2
    element          x / (block_scale * s2)                    x * (1 / (block_scale * (1 / gs)))

In real numbers they are the same. In float32 each reciprocal adds a rounding, which shows only where the exact quotient
is a tie between two representable values: with BF16 and FP16 inputs every other quotient is too far from a tie for the
last bits of a float32 to matter. There the results are one step apart. Blocks too small for the smallest block scale
differ too: the division form holds them at 2**-9, engines store scale 0 and lose the block. A block of zeros has block
scale 1 there and 0 here, which is the same tensor.

The formula is vLLM's ``ref_nvfp4_quant``, what its emulation runs on hardware without NVFP4. The GPU kernels replace
the reciprocals by approximate ones, good to an ulp, and so agree with this file to the same extent as it with ours.
Megaqad trains with the division form; this file measures what that leaves to the engine.
"""

import torch
from torch import Tensor

from megaqad.nvfp4.format import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, NVFP4Tensor, global_scale_from_amax, tensor_amax
from megaqad.nvfp4.reference import encode_e2m1


def quantize(x: Tensor, amax: Tensor | None = None) -> NVFP4Tensor:
    """``x`` [..., K] to NVFP4 as an engine does it, given the checkpoint's ``input_scale = amax / 2688``.

    Arguments and result as in ``megaqad.nvfp4.quantize``. Block scales may be 0 here, with codes 0; minus zero never
    occurs, because engines and emulations differ in it and every reader takes it for 0.
    """
    input_scale = global_scale_from_amax(tensor_amax(x) if amax is None else amax)
    gs = _reciprocal(input_scale)
    blocks = x.detach().float().unflatten(-1, (-1, BLOCK_SIZE))  # [..., B, 16]

    ideal = gs * (blocks.abs().amax(-1) * (1.0 / E2M1_MAX))
    block_scales = ideal.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)

    output_scale = _reciprocal(block_scales.float() * _reciprocal(gs))
    scaled = (blocks * output_scale.unsqueeze(-1)).clamp(-E2M1_MAX, E2M1_MAX)
    codes = encode_e2m1(scaled).flatten(-2)
    codes = torch.where(codes == 8, 0, codes)
    return NVFP4Tensor(codes[..., 0::2] | (codes[..., 1::2] << 4), block_scales, input_scale)


def _reciprocal(x: Tensor) -> Tensor:
    """``1 / x``, and 0 where ``x`` is 0."""
    return torch.where(x == 0, 0.0, 1.0 / x)
