"""The autograd nodes: forward and backward of linears that share their input, as one operation.

    apply_call        what was prepared (``prepared.py``), the usual case
    apply_scaled      the same with DoRA's scaled outputs
    apply_siblings    by the operators, one after the other: what is traced, and whatever is unusual

Callers have made all checks. Everything that a backward pass reads is saved by autograd, so that
hooks on saved tensors (offloading, FSDP, checkpointing) see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastlora import dropout, ops
from fastlora.prepared import Call, Options, autocast_dtype, options_for

DropoutMask = Literal["bits", "recompute"]


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
    """Apply one linear: ``lora_linear`` without its checks."""
    tensors = (weight, bias, lora_a, lora_b)
    return _apply(x, tensors, (scaling,), dropout_p, seed, dropout_mask)[0]


def apply_call(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    """Apply several linears with adapters to the same ``x``: one autograd node, and no checks.

    ``x`` is read once for all ``lora_as`` and once for all their gradients, and the gradient of
    ``x`` is accumulated in one tensor. Every sibling has a dropout mask of its own: sibling g draws
    stream g of one seed (``dropout.py``).

    Args:
        call: what ``Siblings.call_for`` returned for ``x``.
        x: ``[..., K]``.

    Returns:
        Of each sibling ``[..., N_g]``.
    """
    if not ops.is_current(call.device):  # a model that is spread over several
        with torch.cuda.device(call.device):
            return apply_call(call, x)
    if torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _apply_prepared(call, x, *call.siblings.adapters)
        return outputs
    return call.forward(x)[0]


def apply_scaled(call: Call, x: Tensor, scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``apply_call`` for DoRA: ``y_g = scale_g * (x W_g^T + gain_g x A_g^T B_g^T) + bias_g``.

    Args:
        call: of scaled siblings, without dropout.
        x: ``[..., K]``.
        scales: of each sibling ``[N_g]``, fp32; they receive gradients.
    """
    if not ops.is_current(call.device):
        with torch.cuda.device(call.device):
            return apply_scaled(call, x, scales)
    if torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _apply_scaled(call, x, *call.siblings.adapters, *scales)
        return outputs
    return call.forward_scaled(x, scales, False)[0]


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
    """``apply_call`` for a call that was not prepared.

    Args:
        x: ``[..., K]``, as in ``lora_linear``; likewise everything that is not said here.
        weights: of each sibling ``[N_g, K]``, all in one dtype.
        biases: of each sibling ``[N_g]`` or ``None``.
        lora_as: of each sibling ``[R, K]``, all of one rank and dtype.
        lora_bs: of each sibling ``[N_g, R]``, likewise.
        scalings: of each sibling.
        dropout_p: of all.
        seed: of all.
        dropout_mask: of all.
    """
    tensors = (*weights, *biases, *lora_as, *lora_bs)
    return _apply(x, tensors, scalings, dropout_p, seed, dropout_mask)


def _apply(
    x: Tensor,
    tensors: tuple[Any, ...],
    scalings: tuple[float, ...],
    dropout_p: float,
    seed: Tensor | None,
    dropout_mask: DropoutMask,
) -> tuple[Tensor, ...]:
    """Apply siblings by the operators, one after the other: what is traced, and the unusual."""
    n = len(scalings)
    autocast = autocast_dtype(x.device.type)
    save_bits = dropout_mask == "bits"
    options = options_for(tensors[0], tensors[2 * n], scalings, dropout_p, save_bits, autocast)
    if not options.dropout_p:
        seed = None
    elif seed is None:
        seed = dropout.draw_seed(x.device)
    if torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _SiblingsFunction.apply(*options, x, seed, *tensors)
        return outputs
    ys, _, _ = _forward(options, x, seed, tensors, False)
    return tuple(ys)


def _forward(
    options: Options,
    x: Tensor,
    seed: Tensor | None,
    tensors: Sequence[Any],
    return_bits: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the outputs, ``h`` and the bits of the mask."""
    gains, dropout_p, _, dtype, rank_dtype = options
    weights, biases, lora_as, lora_bs = _in_groups(tensors, len(gains))
    call, rows = ops.for_call(x), ops.matrix(x)
    h, bits = call.shrink(rows, lora_as, seed, dropout_p, return_bits, rank_dtype=rank_dtype)
    ys = call.low_rank_gemm(rows, weights, biases, h, lora_bs, gains, dtype=dtype)
    return [_like(y, x) for y in ys], h, bits


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """Give rows ``[M, last]`` the leading dimensions of a tensor."""
    if tensor.dim() == 2:
        return rows
    # Not view(): autograd refuses to change a view that a Function made in place (y.add_(...)).
    return torch.ops.aten._unsafe_view.default(rows, (*tensor.shape[:-1], rows.shape[1]))


def _in_groups(tensors: Sequence[Any], n: int) -> list[Any]:
    """Split a flat sequence into parts of one tensor for each of n siblings."""
    return [tensors[start : start + n] for start in range(0, len(tensors), n)]


class _Needs(NamedTuple):
    """Which gradients are wanted: of x, of any A, of any B."""

    x: bool
    a: bool
    b: bool


def _kept(
    needs: _Needs,
    x: Tensor,
    h: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Return what ``_gradients`` reads, without what no gradient needs."""
    nothing = (None,) * len(weights)
    return (
        x if needs.a else None,
        h if needs.b else None,
        mask if needs.x or needs.a else None,
        *(weights if needs.x else nothing),
        *(lora_as if needs.x else nothing),
        *lora_bs,
    )


class _PreparedFunction(torch.autograd.Function):
    """The usual case: one node for a group, whose passes were prepared."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        ys, h, mask = call.forward(x)
        ctx.call = call
        ctx.set_materialize_grads(False)
        siblings = call.siblings
        kept: tuple[Tensor | None, ...] = (x, h, mask, *siblings.weights, *adapters)
        if not all(ctx.needs_input_grad[1:]):
            needs = _PreparedFunction._needs(ctx)
            kept = _kept(needs, x, h, mask, siblings.weights, siblings.lora_as, siblings.lora_bs)
        ctx.save_for_backward(*kept)
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        saved = ctx.saved_tensors
        usual = all(ctx.needs_input_grad[1:]) and not torch.is_grad_enabled()
        if usual and call.fits(dys, *saved):
            of_x, of_as, of_bs = call.backward(dys, *saved[:3])
            return (None, of_x, *of_as, *of_bs)
        needs, siblings = _PreparedFunction._needs(ctx), call.siblings
        dtypes = (call.options.dtype, siblings.lora_as[0].dtype)
        with torch.no_grad():
            dx, das, dbs, _ = _gradients(call.options, needs, dys, saved, *dtypes)
        return _as_asked(ctx, dys, (None, dx), das, dbs)

    @staticmethod
    def _needs(ctx: Any) -> _Needs:
        _, of_x, *others = ctx.needs_input_grad
        return _Needs(of_x, *map(any, _in_groups(others, len(others) // 2)))


class _ScaledFunction(torch.autograd.Function):
    """The usual case with DoRA: the same with scaled outputs."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        n, siblings = len(call.siblings.weights), call.siblings
        scales = tensors[2 * n :]
        need_x, need_a, need_b, need_scale = _ScaledFunction._needs(ctx, n)
        ys, h, unscaled = call.forward_scaled(x, scales, need_scale)
        needs = _Needs(need_x, need_a, need_b)
        kept = _kept(needs, x, h, None, siblings.weights, siblings.lora_as, siblings.lora_bs)
        ctx.save_for_backward(*scales, *(unscaled or (None,) * n), *kept)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        n, dtype = len(dys), call.options.dtype
        tensors = ctx.saved_tensors
        scales, unscaled, saved = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        needs = _Needs(*_ScaledFunction._needs(ctx, n)[:3])
        dtypes = (dtype, call.siblings.lora_as[0].dtype)
        inner: list[Any] = [None] * n  # the gradients of the unscaled outputs
        dscales: list[Tensor | None] = [None] * n
        with torch.no_grad():
            for g, (dy, scale, u) in enumerate(zip(dys, scales, unscaled, strict=True)):
                if dy is None:
                    continue
                inner[g] = torch.mul(dy, scale, out=dy.new_empty(dy.shape, dtype=dtype))
                if u is not None:
                    dscales[g] = (ops.matrix(dy) * ops.matrix(u).to(scale.dtype)).sum(0)
            if all(ctx.needs_input_grad[1:]) and call.fits(inner, *saved):
                grads: Any = call.backward(inner, *saved[:3])
            else:
                grads = _gradients(call.options, needs, inner, saved, *dtypes)
        return _as_asked(ctx, dys, (None, grads[0]), *grads[1:3], dscales)

    @staticmethod
    def _needs(ctx: Any, n: int) -> tuple[bool, bool, bool, bool]:
        _, of_x, *others = ctx.needs_input_grad
        of_a, of_b, of_scale = map(any, _in_groups(others, n))
        return of_x, of_a, of_b, of_scale


class _SiblingsFunction(torch.autograd.Function):
    """Any other case: one node for a group, of operators that are called one after the other."""

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
        options = Options(gains, dropout_p, save_bits, dtype, rank_dtype)
        weights, biases, lora_as, lora_bs = _in_groups(tensors, len(gains))
        needs, _ = _SiblingsFunction._needs(ctx, len(gains))
        return_bits = seed is not None and save_bits and (needs.x or needs.a)
        ys, h, bits = _forward(options, x, seed, tensors, return_bits)
        mask = bits if return_bits else seed
        ctx.save_for_backward(*_kept(needs, x, h, mask, weights, lora_as, lora_bs))
        ctx.options = options
        ctx.dtypes = (x.dtype, lora_as[0].dtype)
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        if len(gains) > 1:
            ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(dys)
        needs, need_bias = _SiblingsFunction._needs(ctx, n)
        dbiases: list[Tensor | None] = [None] * n
        with torch.no_grad():
            dx, das, dbs, rows = _gradients(ctx.options, needs, dys, ctx.saved_tensors, *ctx.dtypes)
            if need_bias:
                for g, (dy, bias_dtype) in enumerate(zip(rows, ctx.bias_dtypes, strict=False)):
                    dbiases[g] = None if bias_dtype is None else dy.sum(0, dtype=bias_dtype)
        nothing = (None,) * n
        before = (*(None,) * _OPTIONS, dx, None)
        return _as_asked(ctx, dys, before, nothing, dbiases, das, dbs)

    @staticmethod
    def _needs(ctx: Any, n: int) -> tuple[_Needs, bool]:
        of_x, _, *others = ctx.needs_input_grad[_OPTIONS:]
        _, of_bias, of_a, of_b = map(any, _in_groups(others, n))
        return _Needs(of_x, of_a, of_b), of_bias


# Function.apply looks for wrappers of torch.func in every argument, and for its transforms, which
# takes 4 us of a call's 15 for three siblings (torch 2.13, CPU). call_for has looked.
_apply_prepared = super(torch.autograd.Function, _PreparedFunction).apply
_apply_scaled = super(torch.autograd.Function, _ScaledFunction).apply

_NOT_TWICE = (
    b"fastlora's lora_linear cannot be differentiated twice; call fastlora.unpatch(model) before "
    b"the forward pass to have peft's layers, which can"
)
_OPTIONS = 5  # arguments of the second Function before x


def _gradients(
    options: Options,
    needs: _Needs,
    dys: Sequence[Tensor | None],
    saved: Sequence[Any],
    x_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None], list[Tensor]]:
    """Return the gradients that are wanted by the operators, and every dy as a matrix."""
    gains, dropout_p, _, dtype, rank_dtype = options
    x, h, mask, *operands = saved
    weights, lora_as, lora_bs = _in_groups(operands, len(dys))
    nothing = (None,) * len(dys)
    first = next((dy for dy in dys if dy is not None), None)
    if first is None:
        return None, nothing, nothing, []
    rows: list[Tensor] = []
    for g, dy in enumerate(dys):
        if dy is not None:
            rows.append(ops.matrix(dy))
            continue
        # Nobody used this sibling's output. It takes part as nothing, so that the others keep their
        # numbers (and masks), and its adapters get no gradient, not a zero one.
        zero = first.new_zeros((), dtype=dtype)
        rows.append(zero.expand(first.numel() // first.shape[-1], lora_bs[g].shape[0]))
        if needs.x:
            weights[g] = zero.expand(weights[g].shape)
            lora_as[g] = zero.expand(lora_as[g].shape)
    call = ops.for_call(first)
    dx, das, dbs = None, (), ()
    if any(needs):
        dh, das, dbs = call.adapter_grads(
            rows,
            None if x is None else ops.matrix(x),
            h,
            lora_bs,
            mask,
            gains,
            dropout_p,
            need_dh=needs.x or needs.a,
            rank_dtype=rank_dtype,
            grad_dtype=adapter_dtype,
        )
    if needs.x:
        dx = call.input_grad(
            rows, weights, dh, lora_as, mask, dropout_p, dtype=dtype, grad_dtype=x_dtype
        )
        dx = _like(dx, first)
    return dx, das or nothing, dbs or nothing, rows


def _as_asked(
    ctx: Any, dys: Sequence[Tensor | None], before: Any, *groups: Any
) -> tuple[Tensor | None, ...]:
    """Return gradients as autograd wants them: none that is not needed, or of an unused output.

    Args:
        ctx: of the backward pass.
        dys: of every output; ``None`` where it was not used.
        before: the gradients of the arguments that come before those of the siblings.
        groups: of every kind of operand the gradients, one for each sibling.
    """
    of_siblings = [
        None if dy is None else grad
        for group in groups
        for grad, dy in zip(group, dys, strict=True)
    ]
    grads = tuple(
        grad if needed else None
        for grad, needed in zip((*before, *of_siblings), ctx.needs_input_grad, strict=True)
    )
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    # create_graph=True. The gradients depend on x, A and B but carry no graph: a penalty on them
    # would silently train nothing. (torch's once_differentiable says so only where dy has a graph
    # of its own.)
    refuse: Any = torch._C._functions.DelayedError(_NOT_TWICE, len(grads))
    return tuple(refuse(*(None if g is None else g.detach().requires_grad_() for g in grads)))
