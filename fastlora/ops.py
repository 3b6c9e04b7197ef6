"""The operators ``torch.ops.fastlora.*``: schema, shapes for tracing, and the choice of a plan.

This is the one place where devices meet. Each operator is registered once, for every device
(``CompositeExplicitAutograd``); it asks ``plans.py`` and goes to ``plain.py`` or a Triton kernel.
The operators have no autograd formula: the backward pass is two of them, called by the
``autograd.Function`` in ``functional.py`` (27-32 us a call against 76-97 us for
``torch.library.custom_op`` with ``register_autograd``, torch 2.13, CPU).

Nothing here reads a tensor back, and the launches go to the device of the operands, whichever
device is current.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastlora import dropout, plain, plans

_SCHEMAS = {
    "shrink": (
        "(Tensor x, Tensor lora_a, Tensor? seed, float dropout_p, bool return_bits, *, "
        "ScalarType rank_dtype) -> (Tensor h, Tensor bits)"
    ),
    "low_rank_gemm": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor lora_b, float gain, *, "
        "ScalarType dtype) -> Tensor"
    ),
    "adapter_grads": (
        "(Tensor dy, Tensor? x, Tensor? h, Tensor lora_b, Tensor? mask, float gain, "
        "float dropout_p, *, bool need_dh=True, ScalarType rank_dtype, ScalarType grad_dtype) "
        "-> (Tensor dh, Tensor da, Tensor db)"
    ),
    "input_grad": (
        "(Tensor dy, Tensor weight, Tensor dh, Tensor lora_a, Tensor? mask, float dropout_p, *, "
        "ScalarType dtype, ScalarType grad_dtype) -> Tensor"
    ),
}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one: Triton launches there, wherever its operands are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _aligned(row_bytes: int, *matrices: Tensor) -> bool:
    """Return whether rows are contiguous, apart from each other, and start on 16-byte boundaries.

    What a fused GEMM needs to move whole vectors (and tiles by TMA); cuBLAS takes the rest.

    Args:
        row_bytes: of the result, which is contiguous.
        matrices: the operands.
    """
    if row_bytes % 16:
        return False
    for matrix in matrices:
        row, column = matrix.stride()
        if (
            column != 1
            or row < matrix.shape[1]
            or row * matrix.element_size() % 16
            or matrix.data_ptr() % 16
        ):
            return False
    return True


def _shrink(
    x: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    return_bits: bool,
    *,
    rank_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rank, k = lora_a.shape
    m = x.numel() // k
    plan = plans.plan_for("shrink", x.device, rank_dtype, m, 0, k, rank, masked=seed is not None)
    if plan == plans.PLAIN:
        return plain.shrink(x, lora_a, seed, dropout_p, return_bits, rank_dtype=rank_dtype)
    from fastlora.kernels.shrink import shrink as launch

    with _on(x.device):
        (h,), bits = launch(
            plain.rows(x),
            [lora_a],
            None if seed is None else [seed],
            dropout.threshold(dropout_p),
            rank_dtype=rank_dtype,
            return_bits=return_bits,
        )
    lead = x.shape[:-1]
    if not bits:
        return h.view(*lead, rank), x.new_empty((0, -(-k // dropout.LANES)), dtype=torch.uint8)
    return h.view(*lead, rank), bits[0].view(*lead, bits[0].shape[1])


def _low_rank_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    gain: float,
    *,
    dtype: torch.dtype,
) -> Tensor:
    n, k = weight.shape
    rows, rank = plain.rows(x), lora_b.shape[1]
    plan = plans.plan_for(
        "low_rank_gemm",
        x.device,
        _gemm_dtype(dtype, h),
        rows.shape[0],
        n,
        k,
        rank,
    )
    if (
        plan != plans.FUSED
        or not _LEAST_GAIN < abs(gain) < 1 / _LEAST_GAIN
        or not _aligned(n * dtype.itemsize, rows, weight)
    ):
        # cuBLAS and an in-place addmm_: the hybrid plan is the plain code here.
        return plain.low_rank_gemm(x, weight, bias, h, lora_b, gain, dtype=dtype)
    from fastlora.kernels.low_rank_gemm import low_rank_gemm as launch

    with _on(x.device):
        y = launch(rows.to(dtype), weight.to(dtype), bias, plain.rows(h), lora_b, gain)
    return y.view(*x.shape[:-1], n)


# The fused kernel divides its accumulator by the gain and multiplies it again. Within these bounds
# no fp32 sum of half-precision products can leave fp32's range on the way.
_LEAST_GAIN = 2.0**-40


def _gemm_dtype(dtype: torch.dtype, h: Tensor) -> torch.dtype:
    """Return the dtype that decides on a GEMM's plan: fp64 anywhere leaves it to PyTorch."""
    return torch.float64 if h.dtype == torch.float64 else dtype


def _adapter_grads(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    lora_b: Tensor,
    mask: Tensor | None,
    gain: float,
    dropout_p: float,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    n, rank = lora_b.shape
    m, k = dy.numel() // n, 0 if x is None else x.shape[-1]
    masked = mask is not None
    plan = plans.plan_for("adapter_grads", dy.device, rank_dtype, m, n, k, rank, masked=masked)
    if plan == plans.PLAIN:
        return plain.adapter_grads(
            dy,
            x,
            h,
            lora_b,
            mask,
            gain,
            dropout_p,
            need_dh=need_dh,
            rank_dtype=rank_dtype,
            grad_dtype=grad_dtype,
        )
    from fastlora.kernels.adapter_grads import adapter_grads as launch

    with _on(dy.device):
        dh, da, db = launch(
            plain.rows(dy),
            None if x is None else plain.rows(x),
            None if h is None else plain.rows(h),
            lora_b,
            None if mask is None else plain.mask_rows(mask),
            gain,
            dropout.threshold(dropout_p),
            need_dh=need_dh,
            rank_dtype=rank_dtype,
            grad_dtype=grad_dtype,
        )
    return (
        dh.view(*dy.shape[:-1], rank) if need_dh else dh,
        dy.new_empty((0, 0), dtype=grad_dtype) if da is None else da,
        dy.new_empty((0, rank), dtype=grad_dtype) if db is None else db,
    )


def _input_grad(
    dy: Tensor,
    weight: Tensor,
    dh: Tensor,
    lora_a: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> Tensor:
    n, k = weight.shape
    rows, rank = plain.rows(dy), lora_a.shape[0]
    plan = plans.plan_for(
        "input_grad",
        dy.device,
        _gemm_dtype(dtype, dh),
        rows.shape[0],
        n,
        k,
        rank,
        masked=mask is not None,
    )
    if plan == plans.FUSED and not _aligned(k * grad_dtype.itemsize, rows, weight):
        plan = plans.HYBRID
    if plan == plans.PLAIN or (plan == plans.HYBRID and mask is None):
        return plain.input_grad(
            dy, weight, dh, lora_a, mask, dropout_p, dtype=dtype, grad_dtype=grad_dtype
        )
    from fastlora.kernels.low_rank_gemm import input_grad as launch

    fused = plan == plans.FUSED
    rows, weight = rows.to(dtype), weight.to(dtype)
    with _on(dy.device):
        dx = launch(
            [rows] if fused else [],
            [weight] if fused else [],
            [plain.rows(dh)],
            [lora_a],
            None if mask is None else [plain.mask_rows(mask)],
            dropout.threshold(dropout_p),
            grad_dtype=grad_dtype,
        )
    if not fused:
        # The masked term was written first, so that cuBLAS adds the large product to it in fp32.
        if grad_dtype == dtype:
            dx.addmm_(rows, weight)
        else:
            dx += rows @ weight
    return dx.view(*dy.shape[:-1], k)


_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")


def _register(
    name: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    _LIBRARY.define(name + _SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastlora, name).default


shrink = _register("shrink", _shrink, plain.shrink_outputs)
low_rank_gemm = _register("low_rank_gemm", _low_rank_gemm, plain.low_rank_gemm_output)
adapter_grads = _register("adapter_grads", _adapter_grads, plain.adapter_grads_outputs)
input_grad = _register("input_grad", _input_grad, plain.input_grad_output)
