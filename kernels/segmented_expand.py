"""Segmented expand: add every row's own low-rank term to the outputs of the frozen layers.

    y_s[t, n] += scaling_s * sum_r (sum_p h[p, s, t, r]) * B_s[r, n]    B_s of the slot of row t

One launch for all siblings, also of different widths: a fixed number of programs share out (tile of
rows, column block). The column blocks of a program follow each other. Of all those of one tile in
one sibling it loads the tile, the descriptor and h once, and then walks B and y as a pipeline: with
one block at a time the same loads and sums were five times the instructions of the product, and two
thirds of the time (H200, 64 rows with 16 adapters, gate and up of 7B: 24.6 us, 12.5 by walking).
Where an adapter may have more ranks than a step, h is loaded anew for each block and step.

B is stored by rank, so that a row of it is read in whole lines, and no more of them than the
adapter's rank.

The planes of h are added in a fixed order, in fp32. A product on tensor cores takes h in the dtype
of B, in two parts: ``h = hi + lo``, one product each. That is 17 bits of h for bf16's 8 and costs
one more product of a thin operand, in a kernel that waits for y: 8192 rows, N = 4096 and rank 64
are 134 MB of y (31 us on an H200) and twice 4.3 GFLOP (11 us). So a row's result hardly depends on
which tile computed it, in a prefill or a decode step. The scaling is applied to the fp32 sum, and
y is rounded once. Rows without an adapter are not written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import dot, dot_precision
from .launch import Launch
from .layout import are_aligned, as_rows
from .segments import (
    RowSegments,
    items_of_program,
    load_b,
    load_segment,
    page_start,
    prefetch_rows,
    programs_for,
    starts_early,
    wait_for_launch_before,
)
from .tile_config import (
    TileConfig,
    cached_by_shape,
    device_limits,
    tile_config_for,
)
from .tile_order import sibling

Expand = Callable[[Sequence[Tensor], Tensor, Tensor, Tensor, RowSegments], None]


class _Output(NamedTuple):
    """What the kernel needs of one sibling beside y."""

    columns: int
    stride_yt: int


@triton.jit
def _column_block(ys, outputs, block, BLOCK_N: tl.constexpr):
    """Return what a column block is of: sibling, y, its columns and row stride.

    And the block's first column, and how many blocks the sibling has from there on.

    Chosen by selects, not by branches: the code of a tile is there once, however many siblings.
    """
    y, columns, stride = ys[0], outputs[0].columns, outputs[0].stride_yt
    s, first, before = 0, 0, 0
    for later in tl.static_range(1, len(ys)):
        before += tl.cdiv(outputs[later - 1].columns, BLOCK_N)
        is_later = block >= before
        y = tl.where(is_later, ys[later], y)
        columns = tl.where(is_later, outputs[later].columns, columns)
        stride = tl.where(is_later, outputs[later].stride_yt, stride)
        s, first = tl.where(is_later, later, s), tl.where(is_later, before, first)
    block -= first
    return s, y, columns, stride, block * BLOCK_N, tl.cdiv(columns, BLOCK_N) - block


@triton.jit
def sum_planes(h_ptr, size, planes, first_rank, rank, row_ok, PLANES: tl.constexpr,
                ONE_STEP: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Load and add the planes of h: ``[rows, BLOCK_R]``, zero beyond the rank.

    As many at once as the registers hold, by one load and one sum, whose order is fixed when it is
    compiled. Added one by one, Triton 3.7 changes the layout of each plane before it adds it (64
    loads from shared memory a thread, for eight planes of 16 x 32).
    """
    ranks = first_rank + tl.arange(0, BLOCK_R)
    # In whole vectors: the mask is the same for 16 ranks, and the ones too many are dropped below.
    loaded = row_ok[:, None] & (ranks < tl.cdiv(rank, 16) * 16)[None, :]
    places = (h_ptr[:, None] + ranks[None, :])[None, :, :]
    total = tl.zeros((row_ok.shape[0], BLOCK_R), tl.float32)
    # Without a loop where one step is enough: unrolled, it takes the registers of several.
    for plane in range(0, PLANES if ONE_STEP else planes, PLANES):
        numbers = plane + tl.arange(0, PLANES)
        mask = (numbers < planes)[:, None, None] & loaded[None, :, :]
        offsets = numbers[:, None, None] * size
        total += tl.sum(tl.load(places + offsets, mask=mask, other=0.0), axis=0)
    return tl.where((ranks < rank)[None, :], total, 0.0)


@triton.jit(
    do_not_specialize=["T", "slots", "planes", "blocks", "stride_tiles"],
    do_not_specialize_on_alignment=["descriptors_ptr", "order_ptr", "tiles_ptr"],
)
def _segmented_expand_kernel(
    # tensors, see segments.py
    ys,
    outputs,
    h_ptr,
    arena_ptr,
    descriptors_ptr,
    order_ptr,
    tiles_ptr,
    # sizes
    T,
    slots,
    max_rank,
    planes,
    blocks,  # of columns, of all siblings
    # stride, in elements
    stride_tiles,
    # tile
    PLANES: tl.constexpr,
    ONE_STEP: tl.constexpr,
    WHOLE_RANK: tl.constexpr,  # no adapter has more than BLOCK_R
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    plane_size = tl.cast(T, tl.int64) * len(ys) * max_rank
    item, end_item = items_of_program(tiles_ptr, stride_tiles, blocks)
    if DEPENDENT:
        if item < end_item:
            s, _, N, _, first_column, left = _column_block(ys, outputs, item % blocks, BLOCK_N)
            slot, _, _ = load_segment(tiles_ptr, stride_tiles, item // blocks)
            b_page, rank, _ = load_b(descriptors_ptr, s, slots, slot)
            end_column = min(first_column + min(left, end_item - item) * BLOCK_N, N)
            b_ptr = page_start(arena_ptr, b_page)
            prefetch_rows(b_ptr, rank, N, first_column, end_column, BLOCK_R, 4 * BLOCK_N)
        wait_for_launch_before()
    while item < end_item:
        s, y_ptr, N, stride_yt, first_column, left = _column_block(
            ys, outputs, item % blocks, BLOCK_N
        )
        slot, first, count = load_segment(tiles_ptr, stride_tiles, item // blocks)
        b_page, rank, scaling = load_b(descriptors_ptr, s, slots, slot)
        left = min(left, end_item - item)
        item += left
        if rank > 0:
            end_column = min(first_column + left * BLOCK_N, N)
            row_ok = tl.arange(0, BLOCK_M) < count
            rows = tl.load(order_ptr + first + tl.arange(0, BLOCK_M), mask=row_ok, other=0)
            rows = rows.to(tl.int64)
            y_rows = (y_ptr + rows * stride_yt)[:, None]
            b_ptr = page_start(arena_ptr, b_page)
            h_rows = sibling(h_ptr, s, T, max_rank) + rows * max_rank
            if WHOLE_RANK:
                ranks = tl.arange(0, BLOCK_R)
                h = sum_planes(
                    h_rows, plane_size, planes, 0, rank, row_ok, PLANES, ONE_STEP, BLOCK_R
                )
                high, low = in_two(h, b_ptr.dtype.element_ty)
                b_rows, rank_ok = b_ptr + ranks[:, None] * N, (ranks < rank)[:, None]
                for column in tl.range(first_column, end_column, BLOCK_N, num_stages=STAGES):
                    columns = (column + tl.arange(0, BLOCK_N))[None, :]
                    column_ok = columns < N
                    b = tl.load(b_rows + columns, mask=rank_ok & column_ok, other=0.0)
                    y_ok = row_ok[:, None] & column_ok
                    y = tl.load(y_rows + columns, mask=y_ok, other=0.0)
                    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    accumulator = add_product(high, low, b, accumulator, PRECISION)
                    y = y.to(tl.float32) + scaling * accumulator
                    tl.store(y_rows + columns, y.to(y_ptr.dtype.element_ty), mask=y_ok)
            else:
                # In one stage: as a pipeline, every plane of h would take shared memory.
                for column in tl.range(first_column, end_column, BLOCK_N, num_stages=1):
                    columns = (column + tl.arange(0, BLOCK_N))[None, :]
                    column_ok = columns < N
                    y_ok = row_ok[:, None] & column_ok
                    y = tl.load(y_rows + columns, mask=y_ok, other=0.0)
                    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    for first_rank in tl.range(0, rank, BLOCK_R, num_stages=1):
                        ranks = first_rank + tl.arange(0, BLOCK_R)
                        h = sum_planes(
                            h_rows, plane_size, planes, first_rank, rank, row_ok, PLANES, ONE_STEP,
                            BLOCK_R,
                        )  # fmt: skip
                        high, low = in_two(h, b_ptr.dtype.element_ty)
                        b_ok = (ranks < rank)[:, None] & column_ok
                        b = tl.load(b_ptr + ranks[:, None] * N + columns, mask=b_ok, other=0.0)
                        accumulator = add_product(high, low, b, accumulator, PRECISION)
                    y = y.to(tl.float32) + scaling * accumulator
                    tl.store(y_rows + columns, y.to(y_ptr.dtype.element_ty), mask=y_ok)


@triton.jit
def in_two(h, dtype: tl.constexpr):
    """Return h as a sum of two parts in B's dtype; the second of fp32 is zero, and not used."""
    high = h.to(dtype)
    return high, (h - high.to(tl.float32)).to(dtype)


@triton.jit
def add_product(high, low, b, accumulator, PRECISION: tl.constexpr):
    """Add ``(high + low) b`` to a tile."""
    accumulator = dot(high, b, accumulator, PRECISION)
    if b.dtype != tl.float32:
        accumulator = dot(low, b, accumulator, PRECISION)
    return accumulator


def segmented_expand(
    ys: Sequence[Tensor],
    h: Tensor,
    arena: Tensor,
    descriptors: Tensor,
    segments: RowSegments,
    *,
    config: TileConfig | None = None,
) -> None:
    """Launch the segmented expand: ``y_s[t] += scaling_s * h_s[t] B_s`` with the adapter of row t.

    Args:
        ys: of S linear layers ``[T, N_s]``, of any row stride, or ``[..., N_s]``, contiguous; one
            float dtype. Changed in place, where a row has an adapter with a rank in this layer.
        h: ``[P, S, T, max_rank]`` fp32, contiguous, from ``segmented_shrink``.
        arena: every adapter's A and B, see ``segments.py``.
        descriptors: ``[S, slots, 4]`` int32, contiguous.
        segments: which adapter every row has.
        config: the tile, as high as those of ``segments``; by default the tuned one, or one that
            runs everywhere. ``block_k``: ranks of one step.
    """
    run = prepare_segmented_expand(ys, h, arena, descriptors, segments, config=config)
    run(ys, h, arena, descriptors, segments)


def prepare_segmented_expand(
    ys: Sequence[Tensor],
    h: Tensor,
    arena: Tensor,
    descriptors: Tensor,
    segments: RowSegments,
    *,
    config: TileConfig | None = None,
) -> Expand:
    """Return ``segmented_expand`` as a function of the tensors of a call.

    It may be called with any that are laid out in memory as these: those of another layer of the
    same shape too.
    """
    planes, siblings, t, max_rank = h.shape
    assert len(ys) == siblings == descriptors.shape[0], "siblings of ys, h and descriptors differ"
    assert len({y.dtype for y in ys}) == 1, "outputs of different dtypes"
    outputs: tuple[_Output, ...] = ()
    for y in ys:
        rows, columns, stride, stride_column = as_rows(y)
        assert rows == t, f"{rows} rows of y and {t} of h"
        assert stride_column == 1 or columns == 1, "the columns of y are not contiguous"
        outputs += (_Output(columns, stride),)
    ns = tuple([output.columns for output in outputs])
    # Those of B begin where its widths say, in an arena that is aligned itself.
    aligned = are_aligned(arena.dtype, ns, ys)
    shape = (t, ns, max_rank, planes, segments.block_m, segments.tiles.shape[1], aligned)
    grid, blocks, constants = _settings(
        config, h.device, arena.dtype, *shape, dot_precision(arena.dtype)
    )
    scalars: tuple[int, ...] = (t, descriptors.shape[1], max_rank, planes)
    if 0 in grid:
        return lambda ys, h, arena, descriptors, segments: None

    launch = Launch(_segmented_expand_kernel, grid, constants)
    scalars += (blocks, segments.tiles.stride(0))

    def run(
        ys: Sequence[Tensor], h: Tensor, arena: Tensor, descriptors: Tensor, segments: RowSegments
    ) -> None:
        tensors = (h, arena, descriptors, segments.order, segments.tiles)
        launch(tuple(ys), outputs, *tensors, *scalars)

    return run


def planes_at_once(planes: int, num_warps: int, elements: int) -> tuple[int, bool]:
    """Return how many planes of so many elements are added at once, and whether that is all.

    As 16 registers of a thread hold, and rounded to powers of two: numbers of splits bring few
    kernels.
    """
    rounded = 1 << (planes - 1).bit_length()
    at_once = min(rounded, max(16 * 32 * num_warps // elements, 1))
    return at_once, at_once == rounded


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    t: int,
    ns: tuple[int, ...],
    max_rank: int,
    planes: int,
    block_m: int,
    tiles: int,
    aligned: bool,
    precision: str,
) -> tuple[tuple[int, ...], int, dict[str, Any]]:
    """Return the grid, the column blocks of all siblings, and the compile-time arguments."""
    config = config or tile_config_for(
        "segmented_expand",
        device,
        dtype,
        t,
        n=sum(ns),
        r=max_rank,
        siblings=len(ns),
        aligned=aligned,
    )
    blocks = sum(-(-n // config.block_n) for n in ns)
    at_once, one_step = planes_at_once(planes, config.num_warps, block_m * config.block_k)
    constants: dict[str, Any] = {
        "PLANES": at_once,
        "ONE_STEP": one_step,
        "BLOCK_N": config.block_n,
        "BLOCK_R": config.block_k,
        "num_warps": config.num_warps,
    }
    limits = device_limits(device)
    constants |= {
        "WHOLE_RANK": max_rank <= config.block_k,
        "BLOCK_M": block_m,
        "STAGES": config.num_stages,
        "PRECISION": precision,
        "DEPENDENT": starts_early(limits),
    }
    if constants["DEPENDENT"]:
        constants["launch_pdl"] = True
    grid = (programs_for(limits.processors, config.programs, tiles, blocks),)
    return grid, blocks, constants
