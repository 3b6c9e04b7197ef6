"""``lora_linear``: argument checks, and the ``autograd.Function`` over the operators."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from fastlora import dropout, ops, reference

DropoutMask = Literal["bits", "recompute"]
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


def apply_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    dropout_mask: DropoutMask,
) -> Tensor:
    """``lora_linear`` without its checks, for callers that have made them."""
    operands = ((weight,), (bias,), (lora_a,), (lora_b,))
    return apply_siblings(x, *operands, (scaling,), dropout_p, seed, dropout_mask)[0]


def apply_siblings(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    lora_as: tuple[Tensor, ...],
    lora_bs: tuple[Tensor, ...],
    scalings: tuple[float, ...],
    dropout_p: float,
    seed: Tensor | None,
    dropout_mask: DropoutMask,
) -> tuple[Tensor, ...]:
    """Apply several linears with adapters to the same ``x``: one autograd node, and no checks.

    ``x`` is read once for all ``lora_as`` and once for all their gradients, and the gradient of
    ``x`` is accumulated in one tensor. Every sibling has a dropout mask of its own.

    Args:
        x: ``[..., K]``, as in ``lora_linear``; likewise everything that is not said here.
        weights: of each sibling ``[N_g, K]``, all in one dtype.
        biases: of each sibling ``[N_g]`` or ``None``.
        lora_as: of each sibling ``[R, K]``, all of one rank and dtype.
        lora_bs: of each sibling ``[N_g, R]``, likewise.
        scalings: of each sibling.
        dropout_p: of all.
        seed: of all; sibling g draws stream g of it (``dropout.py``).
        dropout_mask: of all.

    Returns:
        Of each sibling ``[..., N_g]``.
    """
    device_type = x.device.type
    # torch raises when it is asked about the meta device.
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    if autocast:
        dtype = rank_dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype, rank_dtype = weights[0].dtype, lora_as[0].dtype
    if dropout_p == 0.0 or dropout.threshold(dropout_p) == 0:
        dropout_p, seed = 0.0, None
        gains = scalings
    else:
        if seed is None:
            seed = dropout.draw_seed(x.device)
        gains = tuple([reference.gain(scaling, dropout_p) for scaling in scalings])
    options = (gains, dropout_p, dropout_mask == "bits", dtype, rank_dtype)
    tensors = (x, seed, *weights, *biases, *lora_as, *lora_bs)
    call = ops.for_call(x)
    if torch.is_grad_enabled():
        apply = _apply_directly if call is ops.DIRECT else _SiblingsFunction.apply
        outputs: tuple[Tensor, ...] = apply(*options, *tensors)
        return outputs
    with _without_autocast(device_type):
        rows = _rows(x)
        hs, _ = call.shrink(rows, lora_as, seed, dropout_p, False, rank_dtype=rank_dtype)
        return tuple(_project(call, x, rows, weights, biases, hs, lora_bs, gains, dtype))


def _rows(tensor: Tensor) -> Tensor:
    """Flatten all leading dimensions: ``[M, last]``."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """Give rows ``[M, last]`` the leading dimensions of a tensor."""
    if tensor.dim() == 2:
        return rows
    # Not view(): autograd refuses to change a view that a Function made in place (y.add_(...)).
    return torch.ops.aten._unsafe_view.default(rows, (*tensor.shape[:-1], rows.shape[1]))


def _project(
    call: Any,
    x: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    hs: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the outputs of all siblings, with the leading dimensions of ``x``."""
    lead, ys = x.shape[:-1], []
    for w, bias, h, b, gain in zip(weights, biases, hs, lora_bs, gains, strict=True):
        if call is ops.DIRECT:
            # Made in their final shape: _unsafe_view takes the host 3 us (a whole nn.Linear 9).
            y = x.new_empty((*lead, w.shape[0]), dtype=dtype)
            call.low_rank_gemm(rows, w, bias, h, b, gain, dtype=dtype, out=y)
        else:
            y = _like(call.low_rank_gemm(rows, w, bias, h, b, gain, dtype=dtype), x)
        ys.append(y)
    return ys


class _SiblingsFunction(torch.autograd.Function):
    """One autograd node for a group: saves x, h, the dropout masks, and refers to A, B and W."""

    @staticmethod
    def forward(
        ctx: Any,
        gains: tuple[float, ...],
        dropout_p: float,
        save_bits: bool,
        dtype: torch.dtype,
        rank_dtype: torch.dtype,
        x: Tensor,
        seed: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n = len(gains)
        weights, biases, lora_as, lora_bs = _in_groups(tensors, n)
        need_x, _, need_a, need_b = _needs(ctx.needs_input_grad, n)
        mask_is_read = seed is not None and (need_x or need_a)
        call = ops.for_call(x)
        with _without_autocast(x.device.type):
            rows = _rows(x)
            hs, bits = call.shrink(
                rows, lora_as, seed, dropout_p, mask_is_read and save_bits, rank_dtype=rank_dtype
            )
            ys = _project(call, x, rows, weights, biases, hs, lora_bs, gains, dtype)
        # Only what some gradient needs, and only here: hooks on saved tensors (offloading, FSDP,
        # checkpointing) never see a tensor that hangs on ctx.
        nothing = (None,) * n
        ctx.save_for_backward(
            x if need_a else None,
            seed if mask_is_read and not save_bits else None,
            *(weights if need_x else nothing),
            *(lora_as if need_x else nothing),
            *lora_bs,
            *(hs if need_b else nothing),
            *(bits or nothing),
        )
        ctx.options = (gains, dropout_p, dtype, rank_dtype)
        ctx.grad_dtypes = (
            x.dtype,
            lora_as[0].dtype,
            [None if b is None else b.dtype for b in biases],
        )
        if n > 1:
            ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _backward(ctx, dys)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return grads
        # create_graph=True. The gradients depend on x, A and B but carry no graph: a penalty on
        # them would silently train nothing. (torch's once_differentiable says so only where dy
        # has a graph of its own.)
        refuse: Any = torch._C._functions.DelayedError(_NOT_TWICE, len(grads))
        return tuple(refuse(*(None if g is None else g.detach().requires_grad_() for g in grads)))


# Function.apply looks for wrappers of torch.func in every argument, and for its transforms, which
# takes 4 us of a call's 15 for three siblings (torch 2.13, CPU). for_call has looked.
_apply_directly = super(torch.autograd.Function, _SiblingsFunction).apply

_NOT_TWICE = (
    b"fastlora's lora_linear cannot be differentiated twice; call fastlora.unpatch(model) before "
    b"the forward pass to have peft's layers, which can"
)
_OPTIONS = 5  # arguments of the Function before x


def _in_groups(tensors: Sequence[Any], n: int) -> list[Any]:
    """Split a flat sequence into parts of one tensor for each of n siblings."""
    return [tensors[start : start + n] for start in range(0, len(tensors), n)]


def _needs(needs_input_grad: tuple[bool, ...], n: int) -> tuple[bool, bool, bool, bool]:
    """Return whether a gradient is wanted of x, and of any bias, A and B."""
    of_x, _, *others = needs_input_grad[_OPTIONS:]
    _, of_bias, of_a, of_b = map(any, _in_groups(others, n))
    return of_x, of_bias, of_a, of_b


def _backward(ctx: Any, dys: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    gains, dropout_p, dtype, rank_dtype = ctx.options
    n = len(gains)
    need_x, need_bias, need_a, need_b = _needs(ctx.needs_input_grad, n)
    x, seed, *others = ctx.saved_tensors
    weights, lora_as, lora_bs, hs, bits = _in_groups(others, n)
    x_dtype, adapter_dtype, bias_dtypes = ctx.grad_dtypes
    first = next((dy for dy in dys if dy is not None), None)
    if first is None:
        return (None,) * len(ctx.needs_input_grad)
    masks = [seed] if seed is not None else bits if bits[0] is not None else []
    rows: list[Tensor] = []
    for g, dy in enumerate(dys):
        if dy is not None:
            rows.append(_rows(dy))
            continue
        # Nobody used this sibling's output. It takes part as nothing, so that the others keep their
        # numbers (and masks), and its adapters get no gradient, not a zero one.
        zero = first.new_zeros((), dtype=dtype)
        rows.append(zero.expand(first.numel() // first.shape[-1], lora_bs[g].shape[0]))
        if need_x:
            weights[g] = zero.expand(weights[g].shape)
            lora_as[g] = zero.expand(lora_as[g].shape)
    dx, das, dbs = None, [], []
    dbiases: list[Tensor | None] = [None] * n
    call = ops.for_call(first)
    with _without_autocast(first.device.type):
        if need_x or need_a or need_b:
            dhs, das, dbs = call.adapter_grads(
                rows,
                None if x is None else _rows(x),
                hs if need_b else [],
                lora_bs,
                masks,
                gains,
                dropout_p,
                need_dh=need_x or need_a,
                rank_dtype=rank_dtype,
                grad_dtype=adapter_dtype,
            )
        if need_x:
            operands = (rows, weights, dhs, lora_as, masks, dropout_p)
            if call is ops.DIRECT:
                dx = first.new_empty((*first.shape[:-1], lora_as[0].shape[1]), dtype=x_dtype)
                call.input_grad(*operands, dtype=dtype, grad_dtype=x_dtype, out=dx)
            else:
                dx = _like(call.input_grad(*operands, dtype=dtype, grad_dtype=x_dtype), first)
        if need_bias:
            dbiases = [
                None if bias_dtype is None else dy.sum(0, dtype=bias_dtype)
                for dy, bias_dtype in zip(rows, bias_dtypes, strict=True)
            ]
    grads = (
        *(None,) * _OPTIONS,
        dx,
        *(None,) * (1 + n),
        *dbiases,
        *(das or (None,) * n),
        *(dbs or (None,) * n),
    )
    skipped = [dy is None for dy in dys]
    if not any(skipped) and all(ctx.needs_input_grad[_OPTIONS + 2 + n :]):
        return grads
    left_out = [False] * (_OPTIONS + 2) + skipped * 4
    return tuple(
        grad if needed and not unused else None
        for grad, needed, unused in zip(grads, ctx.needs_input_grad, left_out, strict=True)
    )


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switch autocast off: the operators are told their dtypes and cast by themselves."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return _NOTHING
    if torch.compiler.is_compiling():
        return torch.autocast(device_type, enabled=False)
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


_NOTHING = nullcontext()


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
