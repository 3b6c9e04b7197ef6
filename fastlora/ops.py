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

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastlora import dropout, plain, plans
from fastlora.kernels.tile_config import has_aligned_rows

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


@functools.cache
def _launchers() -> SimpleNamespace:
    """Import the kernels, and triton with them, when the first of them is launched."""
    from fastlora.kernels.adapter_grads import adapter_grads
    from fastlora.kernels.low_rank_gemm import input_grad, low_rank_gemm
    from fastlora.kernels.shrink import shrink

    return SimpleNamespace(
        shrink=shrink,
        low_rank_gemm=low_rank_gemm,
        adapter_grads=adapter_grads,
        input_grad=input_grad,
    )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one: Triton launches there, wherever its operands are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = nullcontext()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking first: .to() takes 0.6 us of the host's time even where there is nothing to do.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """Give rows ``[M, last]`` the leading dimensions of a tensor."""
    if tensor.dim() == 2:
        return rows
    # Not view(): autograd refuses to change a view that a Function made in place (y.add_(...)).
    return torch.ops.aten._unsafe_view.default(rows, (*tensor.shape[:-1], rows.shape[1]))


def _aligned(row_bytes: int, *matrices: Tensor) -> bool:
    """Return whether a fused GEMM can move whole vectors (and tiles by TMA); cuBLAS takes the rest.

    Args:
        row_bytes: of the result, which is contiguous.
        matrices: the operands.
    """
    return row_bytes % 16 == 0 and all(map(has_aligned_rows, matrices))


def _shrink(
    x: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    return_bits: bool,
    *,
    rank_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    rank, k = lora_a.shape
    m = x.numel() // k
    plan = plans.plan_for("shrink", x.device, rank_dtype, m, 0, k, rank, masked=seed is not None)
    if plan == plans.PLAIN:
        return plain.shrink(x, lora_a, seed, dropout_p, return_bits, rank_dtype=rank_dtype)

    with _on(x.device):
        (h,), bits = _launchers().shrink(
            plain.rows(x),
            [lora_a],
            None if seed is None else [seed],
            dropout.threshold(dropout_p),
            rank_dtype=rank_dtype,
            return_bits=return_bits,
        )
    return _like(h, x), _like(bits[0], x) if bits else None


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
    fused = plan == plans.FUSED and _LEAST_GAIN < abs(gain) < 1 / _LEAST_GAIN
    if fused:
        rows, weight = _cast(rows, dtype), _cast(weight, dtype)
    if not fused or not _aligned(n * dtype.itemsize, rows, weight):
        # cuBLAS and an in-place addmm_: the hybrid plan is the plain code here.
        return plain.low_rank_gemm(x, weight, bias, h, lora_b, gain, dtype=dtype)

    with _on(x.device):
        y = _launchers().low_rank_gemm(
            rows,
            weight,
            None if bias is None else bias.contiguous(),
            plain.rows(h),
            lora_b,
            gain,
            aligned=True,
        )
    return _like(y, x)


# The fused kernel divides its accumulator by the gain and multiplies it again. Within these bounds
# only sums beyond 2**88 could leave fp32's range on the way.
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
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

    with _on(dy.device):
        dh, da, db = _launchers().adapter_grads(
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
    return _like(dh, dy) if need_dh else dh, da, db


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
    if plan == plans.FUSED:
        rows, weight = _cast(rows, dtype), _cast(weight, dtype)
        if not _aligned(k * grad_dtype.itemsize, rows, weight):
            plan = plans.HYBRID
    if plan == plans.PLAIN or (plan == plans.HYBRID and mask is None):
        return plain.input_grad(
            dy, weight, dh, lora_a, mask, dropout_p, dtype=dtype, grad_dtype=grad_dtype
        )

    fused = plan == plans.FUSED
    rows, weight = _cast(rows, dtype), _cast(weight, dtype)
    with _on(dy.device):
        dx = _launchers().input_grad(
            [rows] if fused else [],
            [weight] if fused else [],
            [plain.rows(dh)],
            [lora_a],
            None if mask is None else [plain.mask_rows(mask)],
            dropout.threshold(dropout_p),
            grad_dtype=grad_dtype,
            aligned=True if fused else None,
        )
    if not fused:
        # The masked term was written first, so that cuBLAS adds the large product to it in fp32.
        if grad_dtype == dtype:
            dx.addmm_(rows, weight)
        else:
            dx += rows @ weight
    return _like(dx, dy)


def _whole_shrink(
    x: Tensor, lora_a: Tensor, *args: Any, rank_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``_shrink`` as an operator, which returns a tensor for everything."""
    h, bits = _shrink(x, lora_a, *args, rank_dtype=rank_dtype)
    if bits is None:
        bits = x.new_empty((0, -(-x.shape[-1] // dropout.LANES)), dtype=torch.uint8)
    return h, bits


def _whole_adapter_grads(
    dy: Tensor, x: Tensor | None, h: Tensor | None, lora_b: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``_adapter_grads`` as an operator, which returns a tensor for everything."""
    dh, da, db = _adapter_grads(dy, x, h, lora_b, *args, **kwargs)
    dtype, rank = kwargs["grad_dtype"], lora_b.shape[1]
    return (
        dh,
        dy.new_empty((0, 0), dtype=dtype) if da is None else da,
        dy.new_empty((0, rank), dtype=dtype) if db is None else db,
    )


_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")


def _register(
    name: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    _LIBRARY.define(name + _SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastlora, name).default


shrink = _register("shrink", _whole_shrink, plain.shrink_outputs)
low_rank_gemm = _register("low_rank_gemm", _low_rank_gemm, plain.low_rank_gemm_output)
adapter_grads = _register("adapter_grads", _whole_adapter_grads, plain.adapter_grads_outputs)
input_grad = _register("input_grad", _input_grad, plain.input_grad_output)

DISPATCHED = SimpleNamespace(
    shrink=shrink,
    low_rank_gemm=low_rank_gemm,
    adapter_grads=adapter_grads,
    input_grad=input_grad,
)
DIRECT = SimpleNamespace(
    shrink=_shrink,
    low_rank_gemm=_low_rank_gemm,
    adapter_grads=_adapter_grads,
    input_grad=_input_grad,
)


def for_call(x: Tensor) -> SimpleNamespace:
    """Return the four operators as an eager call may use them: without torch's dispatcher.

    The dispatcher costs 10 us an operator and 20 where ``x`` requires a gradient, a third of what a
    layer costs the host (torch 2.13). Whatever watches or rewrites operators (compiling, dispatch
    modes, tensor subclasses, transforms of ``torch.func``) sees the registered ones.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN_TENSORS
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return DISPATCHED
    return DIRECT


_PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))
