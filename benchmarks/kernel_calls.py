"""Call every launcher in ``kernels/`` on one shape, with operands that nothing ever touches.

Whoever calls has put something else in the place of a launch: ``targets.py`` compiles, and
``bench_launch.py`` keeps what would be launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.kernels import tile_config
from fastlora.kernels.adapter_grads import adapter_grads
from fastlora.kernels.decode_gemm import decode_gemm
from fastlora.kernels.input_pass import input_pass
from fastlora.kernels.low_rank_gemm import (
    input_grad,
    low_rank_gemm,
    low_rank_term,
    prepare_scaled_gemm,
)
from fastlora.kernels.paged_attention import paged_attention
from fastlora.kernels.segmented_expand import segmented_expand
from fastlora.kernels.segmented_gemm import segmented_gemm
from fastlora.kernels.segmented_shrink import prepare_segmented_shrink, segmented_shrink
from fastlora.kernels.segments import PAGE
from fastlora.kernels.shrink import shrink
from fastlora.kernels.tile_config import TileConfig

THRESHOLD = 6554  # p = 0.1

OPERATIONS = ("shrink", "low_rank_gemm", "input_grad", "output_pass", "input_pass")
# The low-rank term of y and of dx alone: in the hybrid plan cuBLAS adds the frozen product to it.
TERMS = ("low_rank_term", "input_grad_term")
SCALED = ("scaled_gemm",)  # DoRA's
SEGMENTED = ("segmented_shrink", "segmented_expand")  # an adapter for each row
MASKS = ("none", "bits", "seed")


class Segments(NamedTuple):
    """Which adapter every row has: never looked at."""

    slots: Tensor
    order: Tensor
    tiles: Tensor
    block_m: int


@dataclass(frozen=True)
class Case:
    """Calls of the launchers on one shape: q_proj of Qwen3-8B unless said otherwise."""

    name: str
    m: int = 8192
    ns: tuple[int, ...] = (4096,)  # out features of the siblings
    k: int = 4096
    r: int = 16
    dtype: torch.dtype = torch.bfloat16  # of x, dy and the frozen weight
    adapter: torch.dtype = torch.bfloat16
    rank_dtype: torch.dtype = torch.bfloat16
    operations: tuple[str, ...] = OPERATIONS
    masks: tuple[str, ...] = MASKS
    aligned: bool = True  # rows begin at 16 bytes, as the TMA and cp.async need
    config: TileConfig | None = None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an operand: never touched, so its memory is never really taken."""
        return torch.empty(shape, dtype=dtype or self.dtype)

    def stacked(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return what the siblings have in one tensor."""
        return self.empty(len(self.ns), *shape, dtype=dtype)

    def x(self) -> Tensor:
        """Return the activations that the siblings share."""
        return self.empty(self.m, self.k)

    def h(self) -> Tensor:
        """Return the activations of rank ``r``, or their gradients."""
        return self.stacked(self.m, self.r, dtype=self.rank_dtype)

    def ys(self) -> list[Tensor]:
        """Return the outputs, or their gradients."""
        return [self.empty(self.m, n) for n in self.ns]

    def weights(self) -> list[Tensor]:
        """Return the frozen weights."""
        return [self.empty(n, self.k) for n in self.ns]

    def biases(self) -> list[Tensor]:
        """Return the frozen biases."""
        return [self.empty(n) for n in self.ns]

    def lora_as(self) -> list[Tensor]:
        """Return A of every sibling."""
        return [self.empty(self.r, self.k, dtype=self.adapter) for _ in self.ns]

    def lora_bs(self) -> list[Tensor]:
        """Return B of every sibling."""
        return [self.empty(n, self.r, dtype=self.adapter) for n in self.ns]

    def scalings(self) -> list[float]:
        """Return alpha / r of every sibling."""
        return [1.5] * len(self.ns)

    def mask(self, kind: str) -> Tensor | None:
        """Return the dropout masks of the siblings, as the launchers take them."""
        if kind == "none":
            return None
        if kind == "seed":
            return torch.zeros((), dtype=torch.int64)
        return self.stacked(self.m, -(-self.k // 8), dtype=torch.uint8)

    def segmented(self) -> tuple[Tensor, Tensor, Segments]:
        """Return the arena of the adapters, their descriptors, and the rows by adapter."""
        slots, order = (self.empty(self.m, dtype=torch.int32) for _ in range(2))
        block_m = 16 if self.m <= tile_config.DECODE_ROWS else 64
        tiles = self.empty(4, -(-self.m // block_m), dtype=torch.int32)
        descriptors = self.stacked(65, 4, dtype=torch.int32)
        arena = self.empty(PAGE.value, dtype=self.adapter)
        return arena, descriptors, Segments(slots, order, tiles, block_m)


@dataclass(frozen=True)
class AttentionCase(Case):
    """One layer's attention of a batch of ``m`` tokens: of Qwen3-8B unless said otherwise."""

    masks: tuple[str, ...] = ("none",)
    operations: tuple[str, ...] = ("paged_attention",)
    sequences: int = 256
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    longest: int = 32768  # with few tokens its sequences are split
    by_pages: bool = False
    window: int | None = None  # in a ring


def call_launcher(case: Case, operation: str, mask: str) -> None:
    """Call the launcher of an operation with one of the ``MASKS``.

    What knows no mask is called with the first of the case's, and not again.
    """
    if operation in _WITH_MASK:
        _WITH_MASK[operation](case, mask)
    elif mask == case.masks[0]:
        _WITHOUT_MASK[operation](case)


def _shrink(case: Case, mask: str) -> None:
    if mask == "bits":  # it writes them; reading is for the backward pass
        return
    shrink(
        case.x(),
        case.lora_as(),
        case.mask(mask),
        THRESHOLD,
        rank_dtype=case.rank_dtype,
        return_bits=mask == "seed",
        config=case.config,
    )


def _input_grad(case: Case, mask: str, *, has_product: bool = True) -> None:
    input_grad(
        case.ys() if has_product else [],
        case.weights() if has_product else [],
        case.h(),
        case.lora_as(),
        case.mask(mask),
        THRESHOLD,
        grad_dtype=case.dtype,
        config=case.config,
    )


def _input_pass(case: Case, mask: str) -> None:
    input_pass(
        case.x(),
        case.h(),
        case.lora_as(),
        case.mask(mask),
        THRESHOLD,
        rank_dtype=case.rank_dtype,
        config=case.config,
    )


def _low_rank_gemm(case: Case) -> None:
    low_rank_gemm(
        case.x(),
        case.weights(),
        case.biases(),
        case.h(),
        case.lora_bs(),
        case.scalings(),
        config=case.config,
    )


def _scaled_gemm(case: Case) -> None:
    x = case.x()
    run = prepare_scaled_gemm(
        x,
        case.weights(),
        case.biases(),
        case.lora_bs(),
        case.scalings(),
        rank_dtype=case.rank_dtype,
        config=case.config,
    )
    scales = [case.empty(n, dtype=torch.float32) for n in case.ns]
    for unscaled in (None, case.ys()):
        run(x, case.h(), case.ys(), scales, unscaled)


def _low_rank_term(case: Case) -> None:
    for biases in ([None] * len(case.ns), case.biases()):
        low_rank_term(
            case.h(),
            case.lora_bs(),
            biases,
            case.scalings(),
            dtype=case.dtype,
            config=case.config,
        )


def _output_pass(case: Case) -> None:
    adapter_grads(
        case.ys(),
        None,
        case.h(),
        case.lora_bs(),
        None,
        case.scalings(),
        rank_dtype=case.rank_dtype,
        grad_dtype=case.adapter,
        output_config=case.config,
    )


def _segmented_shrink(case: Case) -> None:
    segmented_shrink(case.x(), *case.segmented(), max_rank=case.r, config=case.config)


def _segmented_expand(case: Case) -> None:
    operands = case.segmented()
    h = segmented_shrink(case.x(), *operands, max_rank=case.r)  # for its number of planes
    segmented_expand(case.ys(), h, *operands, config=case.config)


def _segmented_gemm(case: Case) -> None:
    planes = 1 if case.m > 4096 else 8
    h = case.empty(planes, len(case.ns), case.m, case.r, dtype=torch.float32)
    segmented_gemm(
        case.x(), case.weights(), case.biases(), h, *case.segmented(), config=case.config
    )


def _decode_gemm(case: Case) -> None:
    x, operands = case.x(), case.segmented()
    decode_gemm(x, case.weights(), case.biases(), config=case.config)
    # What runs beside it is code of its own.
    beside = prepare_segmented_shrink(x, *operands, max_rank=case.r, beside=True)
    beside(x, *operands)


def _paged_attention(case: Case) -> None:
    assert isinstance(case, AttentionCase)
    group, places = case.kv_heads, 1 << 18
    joined = case.empty(case.m, case.heads + 2 * group, case.head_dim)
    q, k, v = joined.split((case.heads, group, group), 1)
    starts_q, starts_k = (case.empty(case.sequences + 1, dtype=torch.int32) for _ in range(2))
    # PyTorch writes a ring, even here: to place 0.
    lists = {"read_index": case.empty(1 << 20, dtype=torch.int64)}
    lists["write_index"] = torch.zeros(case.m, dtype=torch.int64)
    if case.by_pages:
        lists = {"block_table": case.empty(case.sequences, 128, dtype=torch.int32)}
    paged_attention(
        q,
        k,
        v,
        case.empty(places, group, case.head_dim),
        case.empty(places, group, case.head_dim),
        starts_q,
        starts_k,
        scaling=0.1,
        longest=case.longest,
        page_size=256 if case.by_pages else 0,
        window=case.window,
        is_ring=case.window is not None,
        config=case.config,
        **lists,
    )


_WITH_MASK: Mapping[str, Callable[[Case, str], None]] = {
    "shrink": _shrink,
    "input_grad": _input_grad,
    "input_grad_term": functools.partial(_input_grad, has_product=False),
    "input_pass": _input_pass,
}
_WITHOUT_MASK: Mapping[str, Callable[[Case], None]] = {
    "low_rank_gemm": _low_rank_gemm,
    "low_rank_term": _low_rank_term,
    "scaled_gemm": _scaled_gemm,
    "output_pass": _output_pass,
    "segmented_shrink": _segmented_shrink,
    "segmented_expand": _segmented_expand,
    "segmented_gemm": _segmented_gemm,
    "decode_gemm": _decode_gemm,
    "paged_attention": _paged_attention,
}
