"""The operators ``torch.ops.fastlora.*``: schema, shapes for tracing, and the choice of a plan.

This is the one place where devices meet. Each operator is registered once, for every device
(``CompositeExplicitAutograd``); it asks ``plans.py`` and goes to ``plain.py`` or a Triton kernel.
The operators have no autograd formula: the backward pass is two of them, called by the
``autograd.Function``s in ``autograd.py`` (27-32 us a call against 76-97 us for
``torch.library.custom_op`` with ``register_autograd``, torch 2.13, CPU).

They work on *siblings*: linears that read the same ``x``, whose adapters have the same rank and
dropout. A single linear is a group of one. What the S of them have of one shape is one tensor:
``h`` and ``dh`` ``[S, M, R]``, the mask's bits ``[S, M, ceil(K / 8)]``. Everything else is a
matrix: leading dimensions are flattened by the caller.

Each has two halves. ``prepare_*`` chooses the plan and works out all that depends on shapes,
strides and dtypes; what it returns takes the tensors of a call. An operator does both at once;
``prepared.py`` keeps the first half from call to call.

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
from torch.autograd import forward_ad

from fastlora import dropout, plain, plans
from fastlora.kernels.layout import are_aligned, as_rows, mask_kind

_SCHEMAS = {
    "shrink": (
        "(Tensor x, Tensor[] lora_as, Tensor? seed, float dropout_p, bool return_bits, *, "
        "ScalarType rank_dtype) -> (Tensor h, Tensor bits)"
    ),
    "low_rank_gemm": (
        "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor h, Tensor[] lora_bs, float[] gains, "
        "*, ScalarType dtype) -> Tensor[] ys"
    ),
    "adapter_grads": (
        "(Tensor[] dys, Tensor? x, Tensor? h, Tensor[] lora_bs, Tensor? mask, float[] gains, "
        "float dropout_p, *, bool need_dh=True, ScalarType rank_dtype, ScalarType grad_dtype) "
        "-> (Tensor dh, Tensor[] das, Tensor[] dbs)"
    ),
    "input_grad": (
        "(Tensor[] dys, Tensor[] weights, Tensor dh, Tensor[] lora_as, Tensor? mask, "
        "float dropout_p, *, ScalarType dtype, ScalarType grad_dtype) -> Tensor dx"
    ),
    # Of a batch whose rows have adapters of their own; it has no backward pass.
}

Shrink = Callable[[Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]
# With DoRA: the scale of each output's columns, and where the unscaled results are to be written.
ScaledGemm = Callable[
    [Tensor, Tensor, Sequence[Tensor], Sequence[Tensor], "Sequence[Tensor] | None"], None
]
LowRankGemm = Callable[[Tensor, Tensor, Sequence[Tensor]], None]
Grads = tuple[Tensor, "list[Tensor] | None", "list[Tensor] | None"]
AdapterGrads = Callable[
    [Sequence[Tensor], "Tensor | None", "Tensor | None", "Tensor | None"], Grads
]
InputGrad = Callable[[Sequence[Tensor], Tensor, "Tensor | None", Tensor], None]


@functools.cache
def _launchers() -> SimpleNamespace:
    """Import the kernels, and triton with them, when the first of them is launched."""
    from fastlora.kernels.adapter_grads import prepare_adapter_grads
    from fastlora.kernels.low_rank_gemm import (
        prepare_input_grad,
        prepare_low_rank_gemm,
        prepare_low_rank_term,
        prepare_scaled_gemm,
    )
    from fastlora.kernels.shrink import prepare_shrink

    return SimpleNamespace(
        shrink=prepare_shrink,
        low_rank_gemm=prepare_low_rank_gemm,
        low_rank_term=prepare_low_rank_term,
        scaled_gemm=prepare_scaled_gemm,
        adapter_grads=prepare_adapter_grads,
        input_grad=prepare_input_grad,
    )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one: Triton launches there, wherever its operands are."""
    return _NOTHING if is_current(device) else torch.cuda.device(device)


def is_current(device: torch.device) -> bool:
    """Return whether launches go to a device as it stands."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


_NOTHING = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switch autocast off around PyTorch's operations: they are told what to compute in."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return _NOTHING
    return _AutocastOff(device_type)


class _AutocastOff:
    """``torch.autocast(enabled=False)`` where it is on, for 0.7 us of the host's time and not 3."""

    __slots__ = ("_device_type",)

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *exception: object) -> None:
        torch.set_autocast_enabled(self._device_type, True)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking first: .to() takes 0.6 us of the host's time even where there is nothing to do.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def matrix(tensor: Tensor) -> Tensor:
    """Flatten all leading dimensions: ``[M, last]``."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [matrix(tensor) for tensor in tensors]


def _sum_of_rows(matrices: Sequence[Tensor]) -> int:
    """Return the out features of a group: what plans and tiles are looked up by."""
    return sum(matrix.shape[0] for matrix in matrices)


def prepare_shrink(
    x: Tensor,
    lora_as: Sequence[Tensor],
    dropout_p: float,
    *,
    dropped: bool,
    return_bits: bool,
    rank_dtype: torch.dtype,
) -> Shrink:
    """Return ``shrink`` as a function of ``x`` and the seed; without bits it returns ``None``."""
    (m, k, *_), rank, siblings = as_rows(x), lora_as[0].shape[0], len(lora_as)
    plan = plans.plan_for(
        "shrink", x.device, rank_dtype, m, 0, k, rank, masked=dropped, siblings=siblings
    )
    return_bits = return_bits and dropped
    if plan == plans.PLAIN:

        def run(x: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
            operands = (matrix(x), lora_as, seed, dropout_p, return_bits)
            with without_autocast(x.device.type):
                h, bits = plain.shrink(*operands, rank_dtype=rank_dtype)
            return h, bits if return_bits else None

        return run
    launch: Shrink = _launchers().shrink(
        x,
        lora_as,
        dropout.threshold(dropout_p),
        dropped=dropped,
        return_bits=return_bits,
        rank_dtype=rank_dtype,
    )
    return launch


def _shrink(
    x: Tensor,
    lora_as: Sequence[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    return_bits: bool,
    *,
    rank_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dropped = seed is not None
    with on_device(x.device):
        run = prepare_shrink(
            x, lora_as, dropout_p, dropped=dropped, return_bits=return_bits, rank_dtype=rank_dtype
        )
        h, bits = run(x, seed)
    return h, x.new_empty((0,), dtype=torch.uint8) if bits is None else bits


def prepare_low_rank_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    *,
    rank_dtype: torch.dtype,
) -> LowRankGemm:
    """Return ``low_rank_gemm`` as a function of ``x``, ``h`` and the results, made by the caller.

    ``x`` and the weights have the dtype of the results, ``h`` the one of the rank.
    """
    m, dtype = as_rows(x)[0], x.dtype
    plan = _gemm_plan(x, weights, lora_bs[0], gains, rank_dtype)
    if plan == plans.PLAIN:

        def run(x: Tensor, h: Tensor, ys: Sequence[Tensor]) -> None:
            operands = (_matrices(ys), matrix(x), weights, biases, h, lora_bs, gains)
            with without_autocast(x.device.type):
                plain.fill_low_rank_gemm(*operands)

        return run
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    if plan == plans.FUSED:
        launch: LowRankGemm = _launchers().low_rank_gemm(
            x, weights, biases, lora_bs, gains, rank_dtype=rank_dtype, aligned=True
        )
        return launch
    # The low-rank term is written first, so that cuBLAS adds the large product to it in fp32, and
    # no cast copy of B is made.
    term = _launchers().low_rank_term(
        lora_bs, biases, gains, m=m, dtype=dtype, rank_dtype=rank_dtype
    )

    def run_hybrid(x: Tensor, h: Tensor, ys: Sequence[Tensor]) -> None:
        term(h, ys)
        rows = matrix(x)
        with without_autocast(x.device.type):
            for y, weight in zip(ys, weights, strict=True):
                matrix(y).addmm_(rows, weight.t())

    return run_hybrid


def prepare_scaled_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    *,
    rank_dtype: torch.dtype,
) -> ScaledGemm:
    """Return ``prepare_low_rank_gemm`` for DoRA: ``y_g = scale_g * (...) + bias_g``.

    In one launch where the GEMM is fused, else by one more pass over the result.
    """
    if _gemm_plan(x, weights, lora_bs[0], gains, rank_dtype) == plans.FUSED:
        contiguous = [None if bias is None else bias.contiguous() for bias in biases]
        launch: ScaledGemm = _launchers().scaled_gemm(
            x, weights, contiguous, lora_bs, gains, rank_dtype=rank_dtype, aligned=True
        )
        return launch
    nothing = [None] * len(biases)
    unscaled_gemm = prepare_low_rank_gemm(
        x, weights, nothing, lora_bs, gains, rank_dtype=rank_dtype
    )

    def run(
        x: Tensor,
        h: Tensor,
        ys: Sequence[Tensor],
        scales: Sequence[Tensor],
        unscaled: Sequence[Tensor] | None,
    ) -> None:
        us = ys if unscaled is None else unscaled
        unscaled_gemm(x, h, us)
        with without_autocast(x.device.type):
            for y, u, scale, bias in zip(ys, us, scales, biases, strict=True):
                plain.fill_scaled(y, u, scale, bias)

    return run


def _gemm_plan(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_b: Tensor,
    gains: Sequence[float],
    rank_dtype: torch.dtype,
) -> plans.Plan:
    """Return the plan of a forward GEMM; fused only if these operands can be."""
    (m, k, *_), dtype = as_rows(x), x.dtype
    plan = plans.plan_for(
        "low_rank_gemm",
        x.device,
        _gemm_dtype(dtype, rank_dtype),
        m,
        _sum_of_rows(weights),
        k,
        lora_b.shape[1],
        siblings=len(weights),
    )
    if plan != plans.FUSED:
        return plan
    in_range = all(_LEAST_GAIN < abs(gain) < 1 / _LEAST_GAIN for gain in gains)
    # A fused GEMM moves whole vectors (and tiles by TMA); cuBLAS takes the rest.
    aligned = are_aligned(dtype, [weight.shape[0] for weight in weights], (x, *weights))
    return plan if in_range and aligned else plans.HYBRID


# The fused kernel divides its accumulator by the gain and multiplies it again. Within these bounds
# only sums beyond 2**88 could leave fp32's range on the way.
_LEAST_GAIN = 2.0**-40


def _gemm_dtype(dtype: torch.dtype, rank_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that decides on a GEMM's plan: fp64 anywhere leaves it to PyTorch."""
    return torch.float64 if rank_dtype == torch.float64 else dtype


def _low_rank_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    h: Tensor,
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    *,
    dtype: torch.dtype,
) -> list[Tensor]:
    x, weights = _cast(x, dtype), [_cast(weight, dtype) for weight in weights]
    ys = [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]
    with on_device(x.device):
        run = prepare_low_rank_gemm(x, weights, biases, lora_bs, gains, rank_dtype=h.dtype)
        run(x, h, ys)
    return ys


def prepare_adapter_grads(
    dys: Sequence[Tensor],
    x: Tensor | None,
    lora_bs: Sequence[Tensor],
    mask: str,
    gains: Sequence[float],
    dropout_p: float,
    *,
    need_dh: bool = True,
    need_db: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> AdapterGrads:
    """Return ``adapter_grads`` as a function of dys, ``x``, ``h`` and the mask."""
    device = dys[0].device  # a name of its own: what is returned must not keep a tensor alive
    plan = plans.plan_for(
        "adapter_grads",
        device,
        rank_dtype,
        as_rows(dys[0])[0],
        _sum_of_rows(lora_bs),
        0 if x is None else x.shape[-1],
        lora_bs[0].shape[1],
        masked=mask != "none",
        siblings=len(dys),
    )
    options: dict[str, Any] = {
        "need_dh": need_dh,
        "rank_dtype": rank_dtype,
        "grad_dtype": grad_dtype,
    }
    if plan == plans.PLAIN:

        def run(
            dys: Sequence[Tensor], x: Tensor | None, h: Tensor | None, mask: Tensor | None
        ) -> Grads:
            rows = None if x is None else matrix(x)
            operands = (_matrices(dys), rows, h, lora_bs, mask, gains, dropout_p)
            with without_autocast(device.type):
                return plain.adapter_grads(*operands, **options)

        return run
    threshold = dropout.threshold(dropout_p)
    launch: AdapterGrads = _launchers().adapter_grads(
        dys, x, lora_bs, mask, gains, threshold, need_db=need_db, **options
    )
    return launch


def _adapter_grads(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    lora_bs: Sequence[Tensor],
    mask: Tensor | None,
    gains: Sequence[float],
    dropout_p: float,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    with on_device(dys[0].device):
        run = prepare_adapter_grads(
            dys,
            x,
            lora_bs,
            mask_kind(mask),
            gains,
            dropout_p,
            need_dh=need_dh,
            need_db=h is not None,
            rank_dtype=rank_dtype,
            grad_dtype=grad_dtype,
        )
        dh, das, dbs = run(dys, x, h, mask)
    return dh, das or [], dbs or []


def prepare_input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    mask: str,
    dropout_p: float,
    *,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> InputGrad:
    """Return ``input_grad`` as a function of dys, ``dh``, the mask and the result.

    The dys and the weights have one dtype, ``dh`` the one of the rank; the caller makes the result,
    contiguous, in ``grad_dtype``.
    """
    (rank, k), m, dtype = lora_as[0].shape, as_rows(dys[0])[0], dys[0].dtype
    device, siblings = dys[0].device, len(dys)
    plan = plans.plan_for(
        "input_grad",
        device,
        _gemm_dtype(dtype, rank_dtype),
        m,
        _sum_of_rows(weights),
        k,
        rank,
        masked=mask != "none",
        siblings=siblings,
    )
    if plan == plans.PLAIN:

        def run(dys: Sequence[Tensor], dh: Tensor, mask: Tensor | None, dx: Tensor) -> None:
            operands = (matrix(dx), _matrices(dys), weights, dh, lora_as, mask, dropout_p)
            with without_autocast(device.type):
                plain.fill_input_grad(*operands, dtype=dtype)

        return run
    # The terms of four siblings in fp32 spill 8 to 112 bytes a thread (sm_89, sm_120).
    wide = siblings > 3 and rank_dtype == torch.float32 and dtype != torch.float32
    fused = plan == plans.FUSED and not wide
    fused = fused and are_aligned(grad_dtype, [k], (*dys, *weights))
    launch: InputGrad = _launchers().input_grad(
        dys if fused else [],
        weights if fused else [],
        lora_as,
        mask,
        dropout.threshold(dropout_p),
        m=m,
        rank_dtype=rank_dtype,
        grad_dtype=grad_dtype,
        aligned=True if fused else None,
    )
    if fused:
        return launch

    def run_hybrid(dys: Sequence[Tensor], dh: Tensor, mask: Tensor | None, dx: Tensor) -> None:
        # As in the forward pass: the low-rank terms first, of all siblings at once.
        launch([], dh, mask, dx)
        rows = matrix(dx)
        with without_autocast(device.type):
            for dy, weight in zip(_matrices(dys), weights, strict=True):
                if grad_dtype == dtype:
                    rows.addmm_(dy, weight)
                else:
                    rows += dy @ weight

    return run_hybrid


def _input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dh: Tensor,
    lora_as: Sequence[Tensor],
    mask: Tensor | None,
    dropout_p: float,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> Tensor:
    dys, weights = [_cast(dy, dtype) for dy in dys], [_cast(weight, dtype) for weight in weights]
    dx = dys[0].new_empty((dys[0].shape[0], lora_as[0].shape[1]), dtype=grad_dtype)
    options = {"rank_dtype": dh.dtype, "grad_dtype": grad_dtype}
    with on_device(dx.device):
        run = prepare_input_grad(dys, weights, lora_as, mask_kind(mask), dropout_p, **options)
        run(dys, dh, mask, dx)
    return dx


_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")


def register(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an operator for every device, with what it returns while it is traced."""
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastlora, name).default


def _registered(implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = implementation.__name__.removeprefix("_")
    return register(name, _SCHEMAS[name], implementation, fake)


shrink = _registered(_shrink, plain.shrink_outputs)
low_rank_gemm = _registered(_low_rank_gemm, plain.low_rank_gemm_outputs)
adapter_grads = _registered(_adapter_grads, plain.adapter_grads_outputs)
input_grad = _registered(_input_grad, plain.input_grad_output)

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


def is_watched(x: Tensor) -> bool:
    """Return whether somebody watches or rewrites what is called.

    Compiling and tracing, dispatch modes, tensor subclasses, torch.func, forward-mode derivatives.
    Without any of them an eager call goes past torch's dispatcher, which costs 10 us an operator
    and 20 where ``x`` requires a gradient, a third of what a layer costs the host (torch 2.13).
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in PLAIN_TENSORS
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def for_call(x: Tensor) -> SimpleNamespace:
    """Return the four operators as a call may use them: registered if somebody watches them."""
    return DISPATCHED if is_watched(x) else DIRECT


PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))
