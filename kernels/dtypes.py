"""Dtypes inside the kernels: torch's names in Triton's words, and the precision of fp32 products.

Half-precision products accumulate in fp32. fp32 products are exact fp32 ("ieee") unless the user
allows TF32 by ``torch.backends.cuda.matmul``, as torch's own matmul.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tile_config import allows_tf32

_TRITON = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}

# Triton 3.7's interpreter multiplies the raw bits of bf16 operands. There, and only there, they are
# widened first; products of bf16 are exact in fp32, so nothing else changes.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of a dtype that the kernels take: fp16, bf16 or fp32."""
    return _TRITON[dtype]


def dot_precision(dtype: torch.dtype) -> str:
    """Return ``input_precision`` for ``tl.dot``; it matters to fp32 operands alone."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


@triton.jit
def dot(left, right, accumulator, PRECISION: tl.constexpr, LONG: tl.constexpr = False):
    """``accumulator + left @ right`` in fp32, of operands of one dtype.

    LONG: the accumulator is to hold a sum of thousands of terms, not of a rank's.
    """
    FP32: tl.constexpr = left.dtype == tl.float32
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    if FP32 and PRECISION == "tf32":
        left, right = _round_to_tf32(left), _round_to_tf32(right)
    if LONG and FP32 and PRECISION == "ieee":
        # The product is summed apart: one chain of thousands of FMAs is 2 to 4 times as far off as
        # cuBLAS (H200). Written as a difference, because Triton folds
        # ``accumulator + tl.dot(left, right)`` into that chain; LLVM makes it an addition again.
        product = tl.dot(left, right, input_precision=PRECISION)
        result = accumulator - product * -1.0
    else:
        result = tl.dot(left, right, accumulator, input_precision=PRECISION)
    return result


@triton.jit
def _round_to_tf32(x):
    """Round fp32 to the 10 bits of TF32, to nearest and away from 0 at ties, as ``cvt.rna.tf32``.

    Tensor cores drop the lower bits, and Triton (3.7) leaves it at that: a product is then 2.6
    times as far off as cuBLAS's, always towards 0.
    """
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # the bits of a NaN would overflow
