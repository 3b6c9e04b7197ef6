"""Segmented shrink: every row's own adapter projects it down to that adapter's rank.

    sum_p h[p, s, t, r] = sum_k x[t, k] * A_s[r, k]      A_s of the slot of row t, r < its rank

Tiles of rows of one adapter, gathered by ``order``; each adapter is read once for every ``block_m``
of its rows. Grid: a fixed number of programs, which share out the items (tile, split of K, sibling,
chunk of ranks) of the tiles that are used: how many is known on the device alone, and a grid for
the most there can be (a tile for each row) would mostly start programs that leave. Up to 256 rows a
sibling is an item, of which a decode step has too few; above, an item is all siblings, so that x is
read once for them.

A row that is the only one of its adapter is a tile too, 15 of whose rows are empty. A kernel of its
own for up to 16 rows, one program for each and no tensor cores, took 1.0 to 4.6 times as long with
its expand (H200, linears of 7B, 1 and 16 adapters): its sums go through all threads of a program.

K is split so that the smallest batch fills the device; the partial sums are planes of h, which the
expand adds: no atomics, nothing to zero. At most 64 ranks of an adapter are chunks of their own,
and the ones above are walked: a pool for rank 256 costs an adapter of rank 16 only 3 empty ones.

In a step that generates it may run beside ``decode_gemm``, on the processors and in the bandwidth
that one leaves. Nothing of that one's is read here, but the expand reads both and waits for this
launch alone: so one program of this launch ends no sooner than that one.
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
    let_next_launch_begin,
    load_a,
    load_segment,
    page_start,
    programs_for,
    starts_early,
    wait_for_launch_before,
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
    do_not_specialize=["T", "slots", "splits", "stride_tiles"],
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
    # strides, in elements
    stride_xt,
    stride_tiles,
    # tile
    SIBLINGS: tl.constexpr,
    TOGETHER: tl.constexpr,  # siblings of one item
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDED_ON: tl.constexpr,
    BESIDE: tl.constexpr,
):
    if DEPENDED_ON:
        let_next_launch_begin()
    GROUPS: tl.constexpr = SIBLINGS // TOGETHER
    items_of_tile = splits * (GROUPS * CHUNKS)
    first_item, end_item = items_of_program(tiles_ptr, stride_tiles, items_of_tile)
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
                    updated = updated + (dot(x, a_t, accumulators[g], PRECISION, LONG=True),)
                accumulators = updated
            for g in tl.static_range(TOGETHER):
                h = sibling(h_ptr, split * SIBLINGS + first_s + g, T, max_rank)
                h_ok = row_ok[:, None] & (ranks < own_ranks[g])[None, :]
                places = h + rows[:, None] * max_rank + ranks[None, :]
                tl.store(places, accumulators[g], mask=h_ok)
    # Whoever waits for this launch has then waited for the one before too.
    if BESIDE:  # noqa: SIM102  (compiled in)
        if tl.program_id(0) == 0:
            wait_for_launch_before()


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
        config: the tile, as high as those of ``segments``; by default the tuned one, or one that
            runs everywhere. ``block_n``: ranks of a program. Nothing of it changes what is computed
            but the order of sums.

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
    beside: bool = False,
    config: TileConfig | None = None,
) -> Shrink:
    """Return ``segmented_shrink`` as a function of the tensors of a call.

    It may be called with any that are laid out in memory as these: those of another layer of the
    same shape too. ``beside``: the launch before is a ``decode_gemm``, and writes nothing that this
    one reads. It then runs beside that one (sm_90 on), and ends after it.
    """
    t, k, stride_xt, stride_xk = as_rows(x)
    siblings, slots, _ = descriptors.shape
    assert stride_xk == 1 or k == 1, "the columns of x are not contiguous"
    assert x.dtype == arena.dtype, f"x is {x.dtype} and the adapters are {arena.dtype}"
    precision, tiles = dot_precision(x.dtype), segments.tiles.shape[1]
    aligned = are_aligned(arena.dtype, (k,), (x,))
    shape = (t, k, siblings, max_rank, segments.block_m, tiles, aligned)
    grid, splits, columns, constants = _settings(
        config, x.device, x.dtype, *shape, precision, beside
    )
    new_h = allocator((splits, siblings, t, max_rank), torch.float32, x.device)
    if 0 in grid:
        return lambda x, arena, descriptors, segments: new_h()

    launch = Launch(_segmented_shrink_kernel, grid, constants)
    scalars = (t, k, slots, max_rank, splits, columns, stride_xt, segments.tiles.stride(0))

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
    beside: bool,
) -> tuple[tuple[int, ...], int, int, dict[str, Any]]:
    """Return the grid, the splits of K, their columns, and the kernel's compile-time arguments."""
    config = config or tile_config_for(
        "segmented_shrink", device, dtype, t, k=k, r=max_rank, siblings=siblings, aligned=aligned
    )
    block_r, block_k = config.block_n, config.block_k
    chunks = -(-min(max_rank, max(_RANKS_AT_ONCE, block_r)) // block_r)
    constants: dict[str, Any] = {"SIBLINGS": siblings, "CHUNKS": chunks}
    constants |= {"BLOCK_K": block_k, "BLOCK_R": block_r, "num_warps": config.num_warps}
    # A decode step needs the programs, and a long batch has enough without.
    together = siblings if block_m > 16 else 1
    stage_bytes = block_k * (block_m + together * block_r) * dtype.itemsize
    limits = device_limits(device)
    config = with_stages_that_fit(config, limits, stage_bytes, 0)
    columns = -(-k // (config.splits * block_k)) * block_k
    splits = -(-k // columns)
    constants |= {
        "TOGETHER": together,
        "BLOCK_M": block_m,
        "PRECISION": precision,
        "DEPENDED_ON": starts_early(limits),
        "BESIDE": beside and starts_early(limits),
        "num_stages": config.num_stages,
    }
    if constants["BESIDE"]:
        constants["launch_pdl"] = True
    items = siblings // together * chunks * splits
    grid = (programs_for(limits.processors, config.programs, tiles, items),)
    return grid, splits, columns, constants
