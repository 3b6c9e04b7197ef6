"""DoRA: the output of a fused linear with its columns scaled to learned magnitudes.

    y = c * (x W^T + scaling x A^T B^T) + b,    c[n] = magnitude[n] / ||W[n] + scaling B[n] A||

The norm is a constant to the gradient (Liu et al., DoRA, 2024, https://arxiv.org/abs/2402.09353,
section 4.3). It is computed without forming ``B A``, which peft does at every call at the cost of
K rows more than the batch has (https://arxiv.org/abs/2603.22276):

    ||W[n] + s B[n] A||^2 = ||W[n]||^2 + 2 s (W A^T)[n] . B[n] + s^2 B[n] (A A^T) B[n]^T
"""

from __future__ import annotations

import torch
from torch import Tensor


def column_scale(
    magnitude: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """Return ``c``: how much DoRA scales each output column; its gradient is the magnitude's.

    Nothing is remembered from call to call, so that a base weight that was replaced is noticed. W
    is read twice; peft reads and writes it more often.

    Args:
        magnitude: ``[N]``.
        weight: ``[N, K]`` frozen weight.
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        scaling: alpha / r of the adapter.

    Returns:
        ``[N]``, fp32 at least.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        wide = torch.promote_types(lora_a.dtype, torch.float32)
        a, b = lora_a.to(wide), lora_b.to(wide)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        # In the weight's dtype, so that no wide copy of it is made.
        cross = (weight @ lora_a.to(weight.dtype).t()).to(wide)
        squares += 2 * scaling * (cross * b).sum(1)
        squares += scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
        # Rounding may leave less than nothing of a column that the adapter cancels.
        norm = squares.clamp_min_(torch.finfo(wide).tiny).sqrt_()
    return magnitude / norm


def scale_columns(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``scale * y + bias``, rounded once to the dtype of ``y``."""
    scaled = y * scale if bias is None else torch.addcmul(bias.to(scale.dtype), y, scale)
    return scaled.to(y.dtype)
