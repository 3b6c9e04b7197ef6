"""Segmented GEMM: frozen linear layers with every row's own low-rank term, written once.

    y_s[t, n] = sum_k x[t, k] W_s[n, k] + bias_s[n] + scaling_s * sum_r h_s[t, r] B_s[r, n]

    scaling_s and B_s of the slot of row t; no term for rows of slot 0

What ``segmented_expand`` adds to the outputs of cuBLAS is here added before they are written, which
saves reading and writing y once more: 151 MB of 8192 rows of q, k, v of 7B.

Grid: that of ``low_rank_gemm`` forward: persistent, one program for each processor, each walking
tiles of the outputs, one sibling's after the other's. Row blocks are consecutive rows, in whatever
order the batch has them, so that tiles move by TMA. Which adapters a tile has is found in its rows'
slots alone, from the smallest up: most tiles of a prefill have one or two. The only adapter of a
tile adds ``(scaling h) B`` to the sum of the frozen product. Of several, each one's product takes
the rows of the others as zeros, is scaled, and is added to its own rows by a select, so that NaN in
one adapter does not spread to the tile; in ``parts`` pieces of the tile's columns, so that the
second accumulator is a fraction of the first.

Everything else is the expand's: the planes of h are added in a fixed order, and h, or h times the
scaling, enters the products in two parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm_tile import column_parts, frozen_product, next_first_tile, store_part
from .launch import Launch, describe, form_of
from .layout import allocator, are_aligned, as_rows
from .low_rank_gemm import MAX_SIBLINGS, frozen_layouts
from .segmented_expand import add_product, in_two, planes_at_once, sum_planes
from .segments import RowSegments, load_b, page_start, starts_early, wait_for_launch_before
from .tile_config import (
    TileConfig,
    cached_by_shape,
    device_limits,
    has_descriptors,
    padded_rank,
    tile_config_for,
)
from .tile_order import grouped_tile, load_tile, sibling

_NO_SLOT = tl.constexpr(2**31 - 1)

SegmentedGemm = Callable[
    [Tensor, Sequence[Tensor], "Sequence[Tensor | None]", Tensor, Tensor, Tensor, RowSegments],
    "list[Tensor]",
]


class _Output(NamedTuple):
    """What one output needs beside the products."""

    columns: int
    bias: Tensor | None


@triton.jit
def _next_slot(own, last):
    """Return the smallest slot of some rows above ``last``."""
    return tl.min(tl.where(own > last, own, _NO_SLOT), axis=0)


@triton.jit
def _add_product_of(
    accumulator, slot, own, planes, adapters, factor, first_column, N,
    PLANES: tl.constexpr, ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add ``factor * h B`` of one adapter's rows to a tile, and zeros to the others.

    Args:
        planes: where the tile's rows of the first plane of h begin, a plane's size, and how many.
        adapters: arena, descriptors, sibling and slots.
    """
    arena_ptr, descriptors_ptr, s, slots = adapters
    h_rows, plane_size, number = planes
    b_page, rank, _ = load_b(descriptors_ptr, s, slots, slot)
    b_ptr = page_start(arena_ptr, b_page)
    for r in tl.range(0, rank, BLOCK_R, num_stages=1):
        b = load_tile(b_ptr, N, 1, r, rank, first_column, N, BLOCK_R, BLOCK_N)
        h = sum_planes(h_rows, plane_size, number, r, rank, own == slot, PLANES, ONE_STEP, BLOCK_R)
        high, low = in_two(factor * h, b_ptr.dtype.element_ty)
        accumulator = add_product(high, low, b, accumulator, "ieee")
    return accumulator


@triton.jit(
    do_not_specialize=["T", "slots", "planes"],
    do_not_specialize_on_alignment=["descriptors_ptr", "slots_ptr"],
)
def _segmented_gemm_kernel(
    # of each product and output, see the tuples
    frozen,
    outputs,
    # tensors, see segments.py
    h_ptr,
    arena_ptr,
    descriptors_ptr,
    slots_ptr,
    # sizes
    T,
    slots,
    max_rank,
    planes,
    # operands of the frozen products, and outputs: descriptors or pointers
    x,
    right_0,
    right_1,
    right_2,
    right_3,
    out_0,
    out_1,
    out_2,
    out_3,
    # tile
    PLANES: tl.constexpr,
    ONE_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    SIBLINGS: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    PART_N: tl.constexpr = BLOCK_N // PARTS
    rights, outs = (right_0, right_1, right_2, right_3), (out_0, out_1, out_2, out_3)
    plane_size = tl.cast(T, tl.int64) * SIBLINGS * max_rank
    first_tile = tl.program_id(0)
    for s in tl.static_range(SIBLINGS):
        output, out = outputs[s], outs[s]
        N = output.columns
        row_blocks, column_blocks = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
        tiles = row_blocks * column_blocks
        for tile in range(first_tile, tiles, tl.num_programs(0)):
            row_block, column_block = grouped_tile(tile, row_blocks, column_blocks, GROUP_M)
            first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
            rows = first_row + tl.arange(0, BLOCK_M)
            own = tl.load(slots_ptr + rows, mask=rows < T, other=0)
            first = tl.load(slots_ptr + first_row)
            accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            accumulator = frozen_product(
                accumulator, x, rights[s], frozen[s], first_row, T, first_column, N,
                BLOCK_M, BLOCK_N, BLOCK_K, True, USE_DESCRIPTORS, "ieee",
            )  # fmt: skip
            if DEPENDENT:
                wait_for_launch_before()
            h_rows = sibling(h_ptr, s, T, max_rank) + rows.to(tl.int64) * max_rank
            h_planes = h_rows, plane_size, planes
            adapters = arena_ptr, descriptors_ptr, s, slots
            _, _, scaling = load_b(descriptors_ptr, s, slots, first)
            is_alone = tl.max((own != first).to(tl.int32), axis=0) == 0
            if arena_ptr.dtype.element_ty == tl.float16:
                # A larger h may leave its range, and the low part of a smaller one be lost.
                size = tl.abs(scaling)
                is_alone = is_alone & (size <= 1.0) & (size >= 0.25)
            slot = _NO_SLOT
            if is_alone:
                accumulator = _add_product_of(
                    accumulator, first, own, h_planes, adapters, scaling, first_column, N,
                    PLANES, ONE_STEP, BLOCK_N, BLOCK_R,
                )  # fmt: skip
            else:
                slot = _next_slot(own, 0)
            parts = column_parts(accumulator, PARTS)
            for number in tl.static_range(PARTS):
                part, column = parts[number], first_column + number * PART_N
                next_slot = slot
                while next_slot < _NO_SLOT:
                    _, _, scaling = load_b(descriptors_ptr, s, slots, next_slot)
                    term = _add_product_of(
                        tl.zeros((BLOCK_M, PART_N), tl.float32), next_slot, own, h_planes, adapters,
                        1.0, column, N, PLANES, ONE_STEP, PART_N, BLOCK_R,
                    )  # fmt: skip
                    part += scaling * tl.where((own == next_slot)[:, None], term, 0.0)
                    next_slot = _next_slot(own, next_slot)
                store_part(
                    out, part, output.bias, first_row, T, column, N,
                    BLOCK_M, PART_N, USE_DESCRIPTORS,
                )  # fmt: skip
        first_tile = next_first_tile(first_tile, tiles)


def segmented_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    h: Tensor,
    arena: Tensor,
    descriptors: Tensor,
    segments: RowSegments,
    *,
    config: TileConfig | None = None,
) -> list[Tensor]:
    """Launch the segmented GEMM: ``y_s[t] = x[t] W_s^T + bias_s + scaling_s * h_s[t] B_s``.

    With the adapter of row t; a row of slot 0 has no term.

    Args:
        x: ``[T, K]``, fp16 or bf16, any strides, or ``[..., K]``, contiguous.
        weights: for each of S siblings, at most four, ``[N_s, K]`` in the dtype of ``x``, any
            strides.
        biases: for each ``[N_s]``, contiguous, or ``None``.
        h: ``[P, S, T, max_rank]`` fp32, contiguous, from ``segmented_shrink``.
        arena: every adapter's A and B, in the dtype of ``x``, see ``segments.py``.
        descriptors: ``[S, slots, 4]`` int32, contiguous.
        segments: which adapter every row has, of which only ``slots`` is read.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        For each ``[T, N_s]`` in the dtype of ``x``, contiguous, rounded once.
    """
    operands = (x, weights, biases, h, arena, descriptors, segments)
    return prepare_segmented_gemm(*operands, config=config)(*operands)


def prepare_segmented_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    h: Tensor,
    arena: Tensor,
    descriptors: Tensor,
    segments: RowSegments,
    *,
    after_shrink: bool = False,
    config: TileConfig | None = None,
) -> SegmentedGemm:
    """Return ``segmented_gemm`` as a function of the tensors of a call.

    It may be called with any that are laid out in memory as these, with biases where these have
    some: those of another layer of the same shape too. ``after_shrink``: the launch before is the
    shrink that writes ``h``, beside which the frozen product may then begin (sm_90 on): ``x`` and
    the slots were there before it.
    """
    layout = t, k, *stride_x = as_rows(x)
    planes, siblings, rows, max_rank = h.shape
    assert t == rows, f"{t} rows of x and {rows} of h"
    assert len(weights) == len(biases) == siblings == descriptors.shape[0], (
        "siblings of weights, biases, h and descriptors differ"
    )
    assert siblings <= MAX_SIBLINGS, f"{siblings} siblings, at most {MAX_SIBLINGS}"
    dtypes = {x.dtype, arena.dtype, *(weight.dtype for weight in weights)}
    assert len(dtypes) == 1, f"operands of different dtypes: {dtypes}"
    assert x.dtype in (torch.float16, torch.bfloat16), f"{x.dtype} is not half precision"
    ns = tuple([weight.shape[0] for weight in weights])
    aligned = are_aligned(x.dtype, ns, (x, *weights))
    grid, described, tiles, constants = _settings(
        config, x.device, x.dtype, t, ns, k, max_rank, planes, aligned, after_shrink
    )
    frozen = frozen_layouts([layout], weights, True)
    out_tile, x_tile, weight_tile = tiles
    x_form = form_of(t, k, stride_x, x_tile)
    weight_forms = [
        form_of(n, k, w.stride(), weight_tile) for n, w in zip(ns, weights, strict=True)
    ]
    out_forms = [form_of(t, n, (n, 1), out_tile) for n in ns]
    new_outputs = [allocator((t, n), x.dtype, x.device) for n in ns]
    if 0 in grid:
        return lambda *operands: [new() for new in new_outputs]

    launch = Launch(_segmented_gemm_kernel, grid, constants)
    scalars = (t, descriptors.shape[1], max_rank, planes)
    absent = (None,) * (MAX_SIBLINGS - siblings)

    def run(
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        h: Tensor,
        arena: Tensor,
        descriptors: Tensor,
        segments: RowSegments,
    ) -> list[Tensor]:
        ys = [new() for new in new_outputs]
        outputs = tuple(map(_Output, ns, biases))
        operands: tuple[Any, ...] = (x, *weights, *absent, *ys, *absent)
        if described:
            operands = (
                describe(x, x_form),
                *map(describe, weights, weight_forms),
                *absent,
                *map(describe, ys, out_forms),
                *absent,
            )
        tensors = (h, arena, descriptors, segments.slots)
        launch(frozen, outputs, *tensors, *scalars, *operands)
        return ys

    return run


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    t: int,
    ns: tuple[int, ...],
    k: int,
    max_rank: int,
    planes: int,
    aligned: bool,
    after_shrink: bool,
) -> tuple[tuple[int], bool, tuple[list[int], list[int], list[int]], dict[str, Any]]:
    """Return what a launch is made of.

    The grid, whether tiles are copied by descriptors, the tiles of the results, of x and of the
    weights, and the kernel's compile-time arguments.
    """
    limits = device_limits(device)
    config = config or tile_config_for(
        "segmented_gemm", device, dtype, t, n=sum(ns), k=k, r=max_rank, siblings=len(ns),
        aligned=aligned,
    )  # fmt: skip
    # 32 ranks spill 56 to 80 bytes a thread with several planes, and 24 unaligned (sm_90).
    block_r = 32 if planes == 1 and aligned else 16
    block_r = min(block_r, padded_rank(max_rank))
    at_once, one_step = planes_at_once(planes, config.num_warps, config.block_m * block_r)
    described = aligned and has_descriptors(limits)
    constants: dict[str, Any] = {
        "PLANES": at_once,
        "ONE_STEP": one_step,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": block_r,
        "GROUP_M": config.group_m,
        "PARTS": config.parts,
        "SIBLINGS": len(ns),
        "USE_DESCRIPTORS": described,
        "DEPENDENT": after_shrink and starts_early(limits),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if constants["DEPENDENT"]:
        constants["launch_pdl"] = True
    blocks = (
        [config.block_m, config.block_n // config.parts],
        [config.block_m, config.block_k],
        [config.block_n, config.block_k],
    )
    tiles = sum(-(-t // config.block_m) * -(-n // config.block_n) for n in ns)
    return (min(tiles, limits.processors),), described, blocks, constants
