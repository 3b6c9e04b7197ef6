"""The operators ``torch.ops.fastlora.*``: schema, shapes for tracing, and the choice of a plan.

This is the one place where devices meet. Each operator is registered once, for every device
(``CompositeExplicitAutograd``); it asks ``plans.py`` and goes to ``plain.py`` or a Triton kernel.
The operators have no autograd formula: the backward pass is two of them, called by the
``autograd.Function`` in ``functional.py`` (27-32 us a call against 76-97 us for
``torch.library.custom_op`` with ``register_autograd``, torch 2.13, CPU).

They work on *siblings*: linears that read the same ``x``, whose adapters have the same rank and
dropout. A single linear is a group of one. Everything is a matrix: leading dimensions are flattened
by the caller.

Nothing here reads a tensor back, and the launches go to the device of the operands, whichever
device is current.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastlora import dropout, plain, plans
from fastlora.kernels.tile_config import has_aligned_rows

_SCHEMAS = {
    "shrink": (
        "(Tensor x, Tensor[] lora_as, Tensor? seed, float dropout_p, bool return_bits, *, "
        "ScalarType rank_dtype) -> (Tensor[] hs, Tensor[] bits)"
    ),
    "low_rank_gemm": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor lora_b, float gain, *, "
        "ScalarType dtype) -> Tensor"
    ),
    "adapter_grads": (
        "(Tensor[] dys, Tensor? x, Tensor[] hs, Tensor[] lora_bs, Tensor[] masks, float[] gains, "
        "float dropout_p, *, bool need_dh=True, ScalarType rank_dtype, ScalarType grad_dtype) "
        "-> (Tensor[] dhs, Tensor[] das, Tensor[] dbs)"
    ),
    "input_grad": (
        "(Tensor[] dys, Tensor[] weights, Tensor[] dhs, Tensor[] lora_as, Tensor[] masks, "
        "float dropout_p, *, ScalarType dtype, ScalarType grad_dtype) -> Tensor"
    ),
}


@functools.cache
def _launchers() -> SimpleNamespace:
    """Import the kernels, and triton with them, when the first of them is launched."""
    from fastlora.kernels.adapter_grads import adapter_grads
    from fastlora.kernels.low_rank_gemm import input_grad, low_rank_gemm, low_rank_term
    from fastlora.kernels.shrink import shrink

    return SimpleNamespace(
        shrink=shrink,
        low_rank_gemm=low_rank_gemm,
        low_rank_term=low_rank_term,
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


def _aligned(row_bytes: int, *matrices: Tensor) -> bool:
    """Return whether a fused GEMM can move whole vectors (and tiles by TMA); cuBLAS takes the rest.

    Args:
        row_bytes: of the result, which is contiguous.
        matrices: the operands.
    """
    return row_bytes % 16 == 0 and all(map(has_aligned_rows, matrices))


def _kernel_mask(masks: Sequence[Tensor]) -> Sequence[Tensor] | Tensor | None:
    """Return the masks as launchers take them: bits for each sibling, one seed, or nothing."""
    if not masks:
        return None
    return masks if masks[0].dtype == torch.uint8 else masks[0]


def _shrink(
    x: Tensor,
    lora_as: Sequence[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    return_bits: bool,
    *,
    rank_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    m, k = x.shape
    plan = plans.plan_for(
        "shrink",
        x.device,
        rank_dtype,
        m,
        0,
        k,
        lora_as[0].shape[0],
        masked=seed is not None,
        siblings=len(lora_as),
    )
    if plan == plans.PLAIN:
        return plain.shrink(x, lora_as, seed, dropout_p, return_bits, rank_dtype=rank_dtype)

    with _on(x.device):
        hs, bits = _launchers().shrink(
            x,
            lora_as,
            seed,
            dropout.threshold(dropout_p),
            rank_dtype=rank_dtype,
            return_bits=return_bits,
        )
    return hs, bits


def _low_rank_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    gain: float,
    *,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    (n, k), rank = weight.shape, lora_b.shape[1]
    plan = plans.plan_for("low_rank_gemm", x.device, _gemm_dtype(dtype, h), x.shape[0], n, k, rank)
    if plan == plans.PLAIN:
        return plain.low_rank_gemm(x, weight, bias, h, lora_b, gain, dtype=dtype, out=out)

    x, weight = _cast(x, dtype), _cast(weight, dtype)
    if bias is not None:
        bias = bias.contiguous()
    with _on(x.device):
        if (
            plan == plans.FUSED
            and _LEAST_GAIN < abs(gain) < 1 / _LEAST_GAIN
            and _aligned(n * dtype.itemsize, x, weight)
        ):
            return _launchers().low_rank_gemm(
                x, weight, bias, h, lora_b, gain, aligned=True, out=out
            )
        # The low-rank term is written first, so that cuBLAS adds the large product to it in fp32,
        # and no cast copy of B is made.
        y: Tensor = _launchers().low_rank_term(h, lora_b, bias, gain, dtype=dtype, out=out)
        (y if y.dim() == 2 else y.view(-1, n)).addmm_(x, weight.t())
        return y


# The fused kernel divides its accumulator by the gain and multiplies it again. Within these bounds
# only sums beyond 2**88 could leave fp32's range on the way.
_LEAST_GAIN = 2.0**-40


def _gemm_dtype(dtype: torch.dtype, h: Tensor) -> torch.dtype:
    """Return the dtype that decides on a GEMM's plan: fp64 anywhere leaves it to PyTorch."""
    return torch.float64 if h.dtype == torch.float64 else dtype


def _adapter_grads(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor],
    gains: Sequence[float],
    dropout_p: float,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    first = dys[0]
    plan = plans.plan_for(
        "adapter_grads",
        first.device,
        rank_dtype,
        first.shape[0],
        _sum_of_rows(lora_bs),
        0 if x is None else x.shape[1],
        lora_bs[0].shape[1],
        masked=bool(masks),
        siblings=len(dys),
    )
    if plan == plans.PLAIN:
        return plain.adapter_grads(
            dys,
            x,
            hs,
            lora_bs,
            masks,
            gains,
            dropout_p,
            need_dh=need_dh,
            rank_dtype=rank_dtype,
            grad_dtype=grad_dtype,
        )

    with _on(first.device):
        dhs, das, dbs = _launchers().adapter_grads(
            dys,
            x,
            hs or None,
            lora_bs,
            _kernel_mask(masks),
            gains,
            dropout.threshold(dropout_p),
            need_dh=need_dh,
            rank_dtype=rank_dtype,
            grad_dtype=grad_dtype,
        )
    return dhs, das or [], dbs or []


def _sum_of_rows(matrices: Sequence[Tensor]) -> int:
    """Return the out features of a group: what plans and tiles are looked up by."""
    if len(matrices) == 1:
        return matrices[0].shape[0]
    return sum(matrix.shape[0] for matrix in matrices)


def _input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dhs: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    masks: Sequence[Tensor],
    dropout_p: float,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    m, (rank, k) = dys[0].shape[0], lora_as[0].shape
    device = dys[0].device
    plan = plans.plan_for(
        "input_grad",
        device,
        _gemm_dtype(dtype, dhs[0]),
        m,
        _sum_of_rows(weights),
        k,
        rank,
        masked=bool(masks),
        siblings=len(dys),
    )
    if plan == plans.PLAIN:
        return plain.input_grad(
            dys,
            weights,
            dhs,
            lora_as,
            masks,
            dropout_p,
            dtype=dtype,
            grad_dtype=grad_dtype,
            out=out,
        )

    dys = [_cast(dy, dtype) for dy in dys]
    weights = [_cast(weight, dtype) for weight in weights]
    # The terms of four siblings in fp32 spill 8 to 112 bytes a thread (sm_89, sm_120).
    wide = len(dys) > 3 and dhs[0].dtype == torch.float32 and dtype != torch.float32
    fused = plan == plans.FUSED and not wide
    fused = fused and _aligned(k * grad_dtype.itemsize, *dys, *weights)
    with _on(device):
        dx: Tensor = _launchers().input_grad(
            dys if fused else [],
            weights if fused else [],
            dhs,
            lora_as,
            _kernel_mask(masks),
            dropout.threshold(dropout_p),
            grad_dtype=grad_dtype,
            aligned=True if fused else None,
            out=out,
        )
    if not fused:
        # As in the forward pass: the low-rank terms first, of all siblings at once.
        rows = dx if dx.dim() == 2 else dx.view(-1, k)
        for dy, weight in zip(dys, weights, strict=True):
            if grad_dtype == dtype:
                rows.addmm_(dy, weight)
            else:
                rows += dy @ weight
    return dx


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
