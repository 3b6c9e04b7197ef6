"""Calls that are prepared once: all that a group of linears does with inputs of one kind.

    siblings.call_for(x, ...)    the call for this shape, dtype, mode of autocast, plan, ...
    call.forward(x)              the outputs, and what the backward pass needs of them
    call.backward(dys, ...)      the gradients

Choosing plans and tiles, and describing operands to kernels, takes the host longer than a small
layer takes a GPU. It depends on no value of a tensor, so it is done once for each kind of input and
kept beside the operands, whose life it shares. What is not the usual case (an input that is not
contiguous, operands that have to be cast, somebody who watches operators) is never prepared:
``autograd.py`` computes it by the same operators, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import dropout, ops, plans, reference
from fastlora.kernels.layout import allocator, are_as_before, look_at, mask_kind
from fastlora.kernels.tile_config import allows_tf32

# Kinds of input that are remembered for a group. Batches of many lengths take turns; beyond it all
# are forgotten and the next ones prepared anew, which costs what it costs once.
MAX_CALLS = 64


class Options(NamedTuple):
    """What a call depends on beside its tensors."""

    gains: tuple[float, ...]  # of each sibling scaling / (1 - p)
    dropout_p: float  # 0 where it is rounded to nothing
    save_bits: bool  # of the mask, for the backward pass; without them the seed
    dtype: torch.dtype  # of the frozen products and their results
    rank_dtype: torch.dtype  # of whatever touches the rank


def options_for(
    weight: Tensor,
    lora_a: Tensor,
    scalings: tuple[float, ...],
    dropout_p: float,
    save_bits: bool,
    autocast: torch.dtype | None,
) -> Options:
    """Work out the options of a call.

    Args:
        weight: of any sibling; they share a dtype.
        lora_a: likewise.
        scalings: of each sibling.
        dropout_p: of all.
        save_bits: as in ``Options``.
        autocast: its dtype where it is on.
    """
    if dropout_p == 0.0 or dropout.threshold(dropout_p) == 0:
        gains, dropout_p = scalings, 0.0
    else:
        gains = tuple([reference.gain(scaling, dropout_p) for scaling in scalings])
    return Options(gains, dropout_p, save_bits, autocast or weight.dtype, autocast or lora_a.dtype)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype of autocast where it is on, else ``None``."""
    # torch raises when it is asked about the meta device.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


class Siblings:
    """Linears with adapters that share their input, and the calls prepared for them.

    Attributes:
        weights: of each ``[N_g, K]``, frozen, all in one dtype.
        biases: of each ``[N_g]`` or ``None``.
        lora_as: of each ``[R, K]``, all of one rank and dtype.
        lora_bs: of each ``[N_g, R]``, likewise.
        scaled: the columns of the outputs are scaled before the bias is added (DoRA).
        adapters: ``lora_as`` and ``lora_bs``, flat.
        facts: what weights and adapters looked like (``layout.py``).
    """

    __slots__ = ("_calls", "adapters", "biases", "facts", "lora_as", "lora_bs", "scaled", "weights")

    def __init__(
        self,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        lora_as: tuple[Tensor, ...],
        lora_bs: tuple[Tensor, ...],
        *,
        scaled: bool = False,
    ) -> None:
        self.weights, self.biases, self.scaled = weights, biases, scaled
        self.lora_as, self.lora_bs = lora_as, lora_bs
        self.adapters = (*lora_as, *lora_bs)
        self.facts = look_at((*weights, *self.adapters))
        self._calls: dict[tuple[Any, ...], Call | None] = {}

    @classmethod
    def of(cls, groups: Sequence[Siblings]) -> Siblings:
        """Return the members of several groups, all scaled or none, as one."""
        fields = ("weights", "biases", "lora_as", "lora_bs")
        together = [
            tuple(tensor for group in groups for tensor in getattr(group, field))
            for field in fields
        ]
        return cls(*together, scaled=groups[0].scaled)

    def call_for(
        self, x: Tensor, scalings: tuple[float, ...], dropout_p: float, dropout_mask: str
    ) -> Call | None:
        """Return the prepared call for any ``x``, or ``None`` where it is not the usual case.

        It is usual only if every rule about inputs is kept: callers ask them after a ``None``.
        """
        # Kernels read whole vectors.
        if ops.is_watched(x) or not x.is_contiguous() or x.data_ptr() % 16:
            return None
        device = x.device
        autocast = autocast_dtype(device.type)
        key = (
            x.shape,
            x.dtype,
            device,
            scalings,
            dropout_p,
            dropout_mask,
            autocast,
            torch.is_grad_enabled(),
            self.circumstances(x, autocast),
        )
        try:
            return self._calls[key]
        except KeyError:
            call = self._prepare(x, *key[3:8])
        if len(self._calls) >= MAX_CALLS:
            self._calls.clear()
        # The first call of a device checks it, after which circumstances are others.
        self._calls[(*key[:-1], self.circumstances(x, autocast))] = call
        return call

    def circumstances(self, x: Tensor, autocast: torch.dtype | None) -> tuple[Any, ...]:
        """Return what the plans of a pass, and the precision of its products, depend on."""
        fp32 = x.dtype is torch.float32 or (
            autocast is None and self.lora_as[0].dtype is torch.float32
        )
        tf32 = fp32 and x.device.type == "cuda" and allows_tf32()
        return plans.requested(), plans.generation(), tf32

    def _prepare(
        self,
        x: Tensor,
        scalings: tuple[float, ...],
        dropout_p: float,
        dropout_mask: str,
        autocast: torch.dtype | None,
        grad: bool,
    ) -> Call | None:
        save_bits = grad and dropout_mask == "bits"
        options = options_for(
            self.weights[0], self.lora_as[0], scalings, dropout_p, save_bits, autocast
        )
        weight = self.weights[0]
        if autocast is not None and self.lora_as[0].dtype == torch.float64:
            return None
        if not x.dtype == weight.dtype == options.dtype or x.device != weight.device:
            return None
        if x.numel() == 0 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
            return None
        for bias in self.biases:  # of one that is not contiguous a copy would be kept
            if bias is not None and (bias.requires_grad or not bias.is_contiguous()):
                return None
        return Call(self, x, options)


class Call:
    """What a group does with one kind of input.

    Attributes:
        siblings: the group.
        options: of the call.
        device: of everything.
    """

    __slots__ = (
        "_autocast",
        "_backward",
        "_gemm",
        "_new_dx",
        "_new_ys",
        "_shape",
        "_shrink",
        "device",
        "options",
        "siblings",
    )

    def __init__(self, siblings: Siblings, x: Tensor, options: Options) -> None:
        self.siblings, self.options = siblings, options
        self.device, self._shape = x.device, x.shape
        self._autocast = autocast_dtype(x.device.type)
        gains, p, save_bits, dtype, rank_dtype = options
        self._shrink = ops.prepare_shrink(
            x, siblings.lora_as, p, dropped=p > 0.0, return_bits=save_bits, rank_dtype=rank_dtype
        )
        frozen = (siblings.weights, siblings.biases)
        prepare: Any = ops.prepare_scaled_gemm if siblings.scaled else ops.prepare_low_rank_gemm
        self._gemm = prepare(x, *frozen, siblings.lora_bs, gains, rank_dtype=rank_dtype)
        lead = x.shape[:-1]
        self._new_ys = [
            allocator((*lead, weight.shape[0]), dtype, x.device) for weight in siblings.weights
        ]
        self._new_dx = allocator((*lead, x.shape[-1]), dtype, x.device)
        # By the circumstances of a backward pass, which are its own.
        self._backward: dict[Any, tuple[ops.AdapterGrads, ops.InputGrad]] = {}

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Return the outputs, ``h``, and the dropout mask (its bits, or the seed)."""
        seed = dropout.draw_seed(self.device) if self.options.dropout_p else None
        h, bits = self._shrink(x, seed)
        ys = tuple([new_y() for new_y in self._new_ys])
        self._gemm(x, h, ys)
        return ys, h, seed if bits is None else bits

    def forward_scaled(
        self, x: Tensor, scales: Sequence[Tensor], keep_unscaled: bool
    ) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
        """Return the outputs, ``h``, and if wanted the outputs without scale and bias (DoRA)."""
        h, _ = self._shrink(x, None)
        ys = tuple([new_y() for new_y in self._new_ys])
        unscaled = tuple([new_y() for new_y in self._new_ys]) if keep_unscaled else None
        self._gemm(x, h, ys, scales, unscaled)
        return ys, h, unscaled or ()

    def fits(
        self,
        dys: Sequence[Tensor | None],
        x: Tensor,
        h: Tensor,
        mask: Tensor | None,
        *operands: Tensor,
    ) -> bool:
        """Return whether ``backward`` may be called with these.

        Hooks on saved tensors (offloading) may have put others in the place of what was saved.
        """
        siblings, (_, _, _, dtype, rank_dtype) = self.siblings, self.options
        if ops.is_watched(x) or not ops.is_current(self.device):
            return False
        for dy in dys:
            if dy is None or dy.dtype is not dtype or not dy.is_contiguous() or dy.data_ptr() % 16:
                return False
        for own, saved in zip((*siblings.weights, *siblings.adapters), operands, strict=True):
            if own is not saved:
                return False
        if x.dtype is not dtype or x.shape != self._shape or h.dtype is not rank_dtype:
            return False
        for saved in (x, h) if mask is None else (x, h, mask):
            if not saved.is_contiguous() or saved.data_ptr() % 16 or saved.device != self.device:
                return False
        return are_as_before(siblings.facts)

    def backward(
        self, dys: Sequence[Tensor], x: Tensor, h: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """Return the gradients of ``x``, of every ``lora_a`` and of every ``lora_b``."""
        circumstances = self.siblings.circumstances(x, self._autocast)
        try:
            adapter_grads, input_grad = self._backward[circumstances]
        except KeyError:
            adapter_grads, input_grad = self._prepare_backward(dys, x, mask)
            self._backward = {circumstances: (adapter_grads, input_grad)}
        dh, das, dbs = adapter_grads(dys, x, h, mask)
        dx = self._new_dx()
        input_grad(dys, dh, mask, dx)
        return dx, das or (), dbs or ()  # both are there, since x and h are

    def _prepare_backward(
        self, dys: Sequence[Tensor], x: Tensor, mask: Tensor | None
    ) -> tuple[ops.AdapterGrads, ops.InputGrad]:
        siblings, (gains, p, _, dtype, rank_dtype) = self.siblings, self.options
        kind = mask_kind(mask)
        adapter_grads = ops.prepare_adapter_grads(
            dys,
            x,
            siblings.lora_bs,
            kind,
            gains,
            p,
            rank_dtype=rank_dtype,
            grad_dtype=siblings.lora_as[0].dtype,
        )
        input_grad = ops.prepare_input_grad(
            dys,
            siblings.weights,
            siblings.lora_as,
            kind,
            p,
            rank_dtype=rank_dtype,
            grad_dtype=dtype,
        )
        return adapter_grads, input_grad
