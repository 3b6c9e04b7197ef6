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
def dot(left, right, accumulator, PRECISION: tl.constexpr):
    """``accumulator + left @ right`` in fp32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision=PRECISION)
