"""``lora_linear``, the operation as a function: its arguments and their checks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.autograd import DropoutMask, apply_lora_linear

DROPOUT_MASKS: tuple[DropoutMask, ...] = ("bits", "recompute")
FLOAT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dropout_mask: DropoutMask = "bits",
) -> Tensor:
    """Apply a frozen linear layer and its LoRA adapter: ``x W^T + b + scaling dropout(x) A^T B^T``.

    Under autocast everything is computed in autocast's dtype, as ``nn.Linear`` would be. Without
    it, the frozen product has the dtype of ``weight``, and ``h = dropout(x) A^T`` that of the
    adapter: fp32 adapters on a half-precision base keep their precision. Sums are accumulated in
    fp32.

    Args:
        x: ``[..., K]`` activations, in the dtype of ``weight`` (any of fp32, fp16, bf16 under
            autocast). Any number of leading dimensions, any strides, zero rows included.
        weight: ``[N, K]`` frozen base weight, fp32, fp16, bf16 or fp64; receives no gradient.
        bias: ``[N]`` or ``None``; receives a gradient if it asks for one.
        lora_a: ``[R, K]``, any strides; its gradient has its own dtype.
        lora_b: ``[N, R]``, in the dtype of ``lora_a``; likewise.
        scaling: alpha / r of the adapter (alpha / sqrt(r) with rank stabilisation).
        dropout_p: probability of zeroing an element of the adapter's input, in ``[0, 1)``; it is
            rounded to a multiple of 1/65536. Zero means no dropout (evaluation).
        seed: of the dropout mask: an int in ``[0, 2**63)``, an int64 scalar tensor on the device of
            ``x``, or ``None`` to draw one from torch's generator of that device.
        dropout_mask: what the backward pass finds the mask in: ``"bits"`` saves one bit for each
            element of ``x``; ``"recompute"`` saves the seed alone and draws the mask again.

    Returns:
        ``[..., N]`` in the dtype of ``weight``, or in autocast's.

    Raises:
        ValueError: shapes, dtypes or devices disagree, ``dropout_p`` is outside ``[0, 1)``, the
            rank is 0, or ``weight`` requires a gradient; the message names both values.
        TypeError: ``scaling`` is not a number (a tensor would have to be read from the device).

    Hu et al., LoRA, 2021, https://arxiv.org/abs/2106.09685, eq. 3.
    """
    if weight.requires_grad:
        raise ValueError(
            "weight requires a gradient, but lora_linear treats it as frozen: call "
            "weight.requires_grad_(False), or use torch.nn.functional.linear for a trained weight"
        )
    _check_shapes(x, weight, bias, lora_a, lora_b)
    _check_dtypes(x, weight, bias, lora_a, lora_b)
    _check_options(scaling, dropout_p, dropout_mask)
    return apply_lora_linear(
        x, weight, bias, lora_a, lora_b, scaling, dropout_p, _as_seed(seed, x), dropout_mask
    )


def _as_seed(seed: int | Tensor | None, x: Tensor) -> Tensor | None:
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise ValueError(
                "seed must be one int64 on the device of x, got "
                f"{tuple(seed.shape)} {seed.dtype} on {seed.device} and x on {x.device}"
            )
        return seed.reshape(())
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an int, a tensor or None, got {seed!r}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must lie in [0, 2**63), got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=x.device)


def _check_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor
) -> None:
    for name, matrix in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if matrix.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(matrix.shape)}")
    (n, k), (rank, a_columns), (b_rows, b_columns) = weight.shape, lora_a.shape, lora_b.shape
    if n == 0 or k == 0:
        raise ValueError(f"weight has no elements: {(n, k)}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but weight {(n, k)} takes {k} features "
            "in its last dimension"
        )
    if rank == 0:
        raise ValueError(f"the rank is 0: lora_a has shape {(rank, a_columns)}")
    if a_columns != k:
        raise ValueError(f"lora_a {(rank, a_columns)} and weight {(n, k)} differ in in features")
    if b_rows != n:
        raise ValueError(f"lora_b {(b_rows, b_columns)} and weight {(n, k)} differ in out features")
    if b_columns != rank:
        raise ValueError(
            f"lora_b {(b_rows, b_columns)} and lora_a {(rank, a_columns)} differ in rank"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias {tuple(bias.shape)} and weight {(n, k)} differ in out features")


def _check_dtypes(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor
) -> None:
    named = {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be fp32, fp16, bf16 or fp64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
    if lora_a.dtype != lora_b.dtype:
        raise ValueError(f"lora_a is {lora_a.dtype}, but lora_b is {lora_b.dtype}")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        for name, tensor in named.items():
            if tensor is not None and tensor.dtype == torch.float64:
                raise ValueError(f"autocast leaves fp64 alone, but {name} is {tensor.dtype}")
        return
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, but weight is {weight.dtype}, and autocast is off")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype}, but weight is {weight.dtype}, and autocast is off")


def _check_options(scaling: float, dropout_p: float, dropout_mask: DropoutMask) -> None:
    for name, value in (("scaling", scaling), ("dropout_p", dropout_p)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if dropout_mask not in DROPOUT_MASKS:
        raise ValueError(f"dropout_mask must be one of {DROPOUT_MASKS}, got {dropout_mask!r}")
