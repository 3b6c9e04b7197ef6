"""Segmented shrink: every row's own adapter projects it down to that adapter's rank.

    sum_p h[p, s, t, r] = sum_k x[t, k] * A_s[r, k]      A_s of the slot of row t, r < its rank

Two kernels, chosen by the number of rows alone (``config.block_m``):

One program for each row (up to 16 rows). Grid: (siblings x chunks of ranks x splits of K, rows).
A program is one tile ``[ranks, columns]`` of A, all of it in flight at once, times a piece of x in
fp32: no tensor cores, and no sorted rows.

Tiles of rows of one adapter, gathered by ``order``; each adapter is read once for every ``block_m``
of its rows. Grid: a fixed number of programs, which share out the items (tile, split of K, sibling,
chunk of ranks) of the tiles that are used: how many is known on the device alone, and a grid for
the most there can be (a tile for each row) would mostly start programs that leave. Up to 256 rows a
sibling is an item, of which a decode step has too few; above, an item is all siblings, so that x is
read once for them.

K is split so that the smallest batch fills the device; the partial sums are planes of h, which the
expand adds: no atomics, nothing to zero. At most 64 ranks of an adapter are chunks of their own,
and the ones above are walked: a pool for rank 256 costs an adapter of rank 16 only 3 empty ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import dot, dot_precision
from .launch import Launch
from .layout import allocator, are_aligned, as_rows
from .segments import (
    RowSegments,
    items_of_program,
    load_a,
    load_segment,
    padded_tiles,
    page_start,
    programs_for,
)
from .tile_config import (
    TileConfig,
    cached_by_shape,
    device_limits,
    tile_config_for,
    with_stages_that_fit,
)
from .tile_order import sibling

_RANKS_AT_ONCE = 64

Shrink = Callable[[Tensor, Tensor, Tensor, RowSegments], Tensor]


@triton.jit(
    do_not_specialize=["T", "slots"],
    do_not_specialize_on_alignment=["descriptors_ptr", "slots_ptr"],
)
def _row_shrink_kernel(
    # tensors, see segments.py
    x_ptr,
    arena_ptr,
    descriptors_ptr,
    slots_ptr,
    h_ptr,
    # sizes
    T,
    K,
    slots,
    max_rank,
    # stride, in elements
    stride_xt,
    # tile
    SIBLINGS: tl.constexpr,
    CHUNKS: tl.constexpr,  # programs that share out the ranks of an adapter
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row, number = tl.program_id(1), tl.program_id(0)
    s, chunk = number % SIBLINGS, number // SIBLINGS % CHUNKS
    split = number // (SIBLINGS * CHUNKS)
    slot = tl.load(slots_ptr + row)
    a_page, rank = load_a(descriptors_ptr, s, slots, slot)
    if chunk * BLOCK_R >= rank:  # nor has slot 0 any
        return
    columns = split * BLOCK_K + tl.arange(0, BLOCK_K)
    column_ok = columns < K
    x = tl.load(x_ptr + row.to(tl.int64) * stride_xt + columns, mask=column_ok, other=0.0)
    a_ptr = page_start(arena_ptr, a_page)
    h_row = sibling(h_ptr, split * SIBLINGS + s, T, max_rank) + row.to(tl.int64) * max_rank
    for first_rank in range(chunk * BLOCK_R, rank, CHUNKS * BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        rank_ok = ranks < rank
        a = tl.load(
            a_ptr + ranks[:, None] * K + columns[None, :],
            mask=rank_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        h = tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        tl.store(h_row + ranks, h, mask=rank_ok)


@triton.jit(
    do_not_specialize=["T", "slots", "splits", "tiles", "stride_tiles"],
    do_not_specialize_on_alignment=["descriptors_ptr", "order_ptr", "tiles_ptr"],
)
def _segmented_shrink_kernel(
    # tensors, see segments.py
    x_ptr,
    arena_ptr,
    descriptors_ptr,
    order_ptr,
    tiles_ptr,
    h_ptr,
    # sizes
    T,
    K,
    slots,
    max_rank,
    splits,
    columns_per_split,
    tiles,
    # strides, in elements
    stride_xt,
    stride_tiles,
    # tile
    SIBLINGS: tl.constexpr,
    TOGETHER: tl.constexpr,  # siblings of one item
    CHUNKS: tl.constexpr,
    MAX_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    GROUPS: tl.constexpr = SIBLINGS // TOGETHER
    items_of_tile = splits * (GROUPS * CHUNKS)
    first_item, end_item = items_of_program(
        tiles_ptr, stride_tiles, tiles, items_of_tile, MAX_TILES
    )
    for item in range(first_item, end_item):
        # Chunks follow each other, so that every program has its share of those beyond a rank.
        number = item % items_of_tile
        chunk, first_s = number % CHUNKS, (number // CHUNKS % GROUPS) * TOGETHER
        split = number // (CHUNKS * GROUPS)
        slot, first, count = load_segment(tiles_ptr, stride_tiles, item // items_of_tile)
        row_ok = tl.arange(0, BLOCK_M) < count
        rows = tl.load(order_ptr + first + tl.arange(0, BLOCK_M), mask=row_ok, other=0)
        rows = rows.to(tl.int64)
        x_rows = x_ptr + rows[:, None] * stride_xt
        starts, own_ranks = (), ()
        most = 0
        for g in tl.static_range(TOGETHER):
            a_page, rank = load_a(descriptors_ptr, first_s + g, slots, slot)
            starts = starts + (page_start(arena_ptr, a_page),)
            own_ranks = own_ranks + (rank,)
            most = max(most, rank)
        first_column = split * columns_per_split
        end = min(first_column + columns_per_split, K)
        for first_rank in range(chunk * BLOCK_R, most, CHUNKS * BLOCK_R):
            ranks = first_rank + tl.arange(0, BLOCK_R)
            accumulators = ()
            for _ in tl.static_range(TOGETHER):
                accumulators = accumulators + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
            for column in range(first_column, end, BLOCK_K):
                columns = column + tl.arange(0, BLOCK_K)
                column_ok = columns < K
                x_ok = row_ok[:, None] & column_ok[None, :]
                x = tl.load(x_rows + columns[None, :], mask=x_ok, other=0.0)
                updated = ()
                for g in tl.static_range(TOGETHER):
                    a_t = tl.load(
                        starts[g] + ranks[None, :] * K + columns[:, None],
                        mask=(ranks < own_ranks[g])[None, :] & column_ok[:, None],
                        other=0.0,
                    )
                    updated = updated + (dot(x, a_t, accumulators[g], PRECISION),)
                accumulators = updated
            for g in tl.static_range(TOGETHER):
                h = sibling(h_ptr, split * SIBLINGS + first_s + g, T, max_rank)
                h_ok = row_ok[:, None] & (ranks < own_ranks[g])[None, :]
                places = h + rows[:, None] * max_rank + ranks[None, :]
                tl.store(places, accumulators[g], mask=h_ok)


def segmented_shrink(
    x: Tensor,
    arena: Tensor,
    descriptors: Tensor,
    segments: RowSegments,
    *,
    max_rank: int,
    config: TileConfig | None = None,
) -> Tensor:
    """Launch the segmented shrink: ``h_s[t] = x[t] A_s^T`` with the adapter of row t.

    Args:
        x: ``[T, K]`` in the dtype of the arena, of any row stride, or ``[..., K]``, contiguous.
        arena: every adapter's A and B, see ``segments.py``.
        descriptors: ``[S, slots, 4]`` int32, contiguous, of S linear layers that share ``x``.
        segments: which adapter every row has.
        max_rank: ranks that ``h`` has room for, a multiple of 16, at most 256; no adapter has more.
        config: the tile; by default the tuned one, or one that runs everywhere. ``block_m`` of 1: a
            program for each row; otherwise tiles are as high as those of ``segments``. ``block_n``:
            ranks of a program. Nothing else of it changes what is computed but the order of sums.

    Returns:
        ``h [P, S, T, max_rank]`` fp32, in P parts to be added; written for rows with an adapter and
        up to its rank alone.
    """
    run = prepare_segmented_shrink(
        x, arena, descriptors, segments, max_rank=max_rank, config=config
    )
    return run(x, arena, descriptors, segments)


def prepare_segmented_shrink(
    x: Tensor,
    arena: Tensor,
    descriptors: Tensor,
    segments: RowSegments,
    *,
    max_rank: int,
    config: TileConfig | None = None,
) -> Shrink:
    """Return ``segmented_shrink`` as a function of the tensors of a call.

    It may be called with any that are laid out in memory as these: those of another layer of the
    same shape too.
    """
    t, k, stride_xt, stride_xk = as_rows(x)
    siblings, slots, _ = descriptors.shape
    assert stride_xk == 1 or k == 1, "the columns of x are not contiguous"
    assert x.dtype == arena.dtype, f"x is {x.dtype} and the adapters are {arena.dtype}"
    precision, tiles = dot_precision(x.dtype), segments.tiles.shape[1]
    aligned = are_aligned(arena.dtype, (k,), (x,))
    shape = (t, k, siblings, max_rank, segments.block_m, tiles, aligned)
    grid, splits, columns, constants = _settings(config, x.device, x.dtype, *shape, precision)
    new_h = allocator((splits, siblings, t, max_rank), torch.float32, x.device)
    if 0 in grid:
        return lambda x, arena, descriptors, segments: new_h()

    if "BLOCK_M" not in constants:
        row_launch = Launch(_row_shrink_kernel, grid, constants)

        def run_rows(
            x: Tensor, arena: Tensor, descriptors: Tensor, segments: RowSegments
        ) -> Tensor:
            h = new_h()
            tensors = (x, arena, descriptors, segments.slots, h)
            row_launch(*tensors, t, k, slots, max_rank, stride_xt)
            return h

        return run_rows
    launch = Launch(_segmented_shrink_kernel, grid, constants)
    scalars = (t, k, slots, max_rank, splits, columns, tiles, stride_xt, segments.tiles.stride(0))

    def run(x: Tensor, arena: Tensor, descriptors: Tensor, segments: RowSegments) -> Tensor:
        h = new_h()
        launch(x, arena, descriptors, segments.order, segments.tiles, h, *scalars)
        return h

    return run


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    t: int,
    k: int,
    siblings: int,
    max_rank: int,
    block_m: int,
    tiles: int,
    aligned: bool,
    precision: str,
) -> tuple[tuple[int, ...], int, int, dict[str, Any]]:
    """Return the grid, the splits of K, their columns, and the kernel's compile-time arguments.

    Without a ``BLOCK_M`` they are those of the kernel for single rows.
    """
    config = config or tile_config_for(
        "segmented_shrink", device, dtype, t, k=k, r=max_rank, siblings=siblings, aligned=aligned
    )
    block_r, block_k = config.block_n, config.block_k
    chunks = -(-min(max_rank, max(_RANKS_AT_ONCE, block_r)) // block_r)
    constants: dict[str, Any] = {"SIBLINGS": siblings, "CHUNKS": chunks}
    constants |= {"BLOCK_K": block_k, "BLOCK_R": block_r, "num_warps": config.num_warps}
    if config.block_m == 1:
        splits = -(-k // block_k)
        return (siblings * chunks * splits, t), splits, block_k, constants
    # A decode step needs the programs, and a long batch has enough without.
    together = siblings if block_m > 16 else 1
    stage_bytes = block_k * (block_m + together * block_r) * dtype.itemsize
    limits = device_limits(device)
    config = with_stages_that_fit(config, limits, stage_bytes, 0)
    columns = -(-k // (config.splits * block_k)) * block_k
    splits = -(-k // columns)
    constants |= {
        "TOGETHER": together,
        "MAX_TILES": padded_tiles(tiles),
        "BLOCK_M": block_m,
        "PRECISION": precision,
        "num_stages": config.num_stages,
    }
    items = siblings // together * chunks * splits
    return (programs_for(limits.processors, tiles, items),), splits, columns, constants
