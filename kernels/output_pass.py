"""The pass over every ``dy``: the gradients of ``h`` and of ``lora_B``.

    dh_g = gain_g * dy_g B_g        [M, R]
    dB_g = gain_g * dy_g^T h_g      [N_g, R]

Grid: (row blocks, splits of every N_g, one sibling's after the other's). A program belongs to one
sibling. A tile of ``dy`` is read once and enters both products. ``dh`` is summed over the columns
of the program and written as one fp32 partial result for each split; ``dB`` of a tile is complete
over its BLOCK_M rows and written as one partial result for each row block.
Why: the reads of ``dy`` are all that costs. Partial results are added in a fixed order: no atomics,
so the same inputs give the same bits. Why all siblings in one pass: k and v of a grouped-query
model (N = 512 beside q's 3584) are too small to fill a device alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import dot, dot_precision, triton_dtype
from .launch import Launch
from .layout import allocator, as_rows, has_aligned_rows
from .partial_sums import PartialSum, prepare_sums
from .tile_config import (
    TileConfig,
    cached_by_shape,
    device_limits,
    padded_rank,
    tile_config_for,
    with_stages_that_fit,
)
from .tile_order import load_tile, sibling, store_tile

# Above it one partial dB for each row block is more traffic than reading dy a second time: at rank
# 128, row blocks of 128 write and read 8 bytes for every 2 bytes of dy.
_MAX_RANK = 64
# Beyond it the partial dB of a very long batch would take gigabytes: 131,072 rows, N = 25,600 and
# rank 64 are 3.4. Two passes over dy take none.
_MAX_PARTIAL_BYTES = 256 << 20
# fp32 products have no tensor cores: two accumulators of rank 64 spill 24 to 128 bytes a thread.
_MAX_FP32_RANK = 16


class _Output(NamedTuple):
    """What the kernel needs of one sibling."""

    stride_dym: int  # of dy [M, N], any strides
    stride_dyn: int
    b: Tensor  # [N, R], any strides
    stride_bn: int
    stride_br: int
    n: int
    columns_per_split: int


@triton.jit(do_not_specialize=["M"])
def _output_pass_kernel(
    # tensors
    dys,
    h_ptr,  # [siblings, M, R], contiguous
    outputs,
    partials_ptr,  # fp32: of each sibling's dB [row blocks, R, N], then of all dh [splits, M, R]
    # sizes
    M,
    R,
    first_dh,  # the element of partials_ptr at which those of dh begin
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dh_ptr = sibling(partials_ptr + tl.cast(first_dh, tl.int64), tl.program_id(1), M, R)
    db_ptr = partials_ptr
    first_split = 0
    for g in tl.static_range(len(outputs)):
        output = outputs[g]
        splits = tl.cdiv(output.n, output.columns_per_split)
        split = tl.program_id(1) - first_split
        if (split >= 0) & (split < splits):
            _output_tiles(
                dys[g], sibling(h_ptr, g, M, R), output, dh_ptr,
                sibling(db_ptr, tl.program_id(0), R, output.n), M, R, split,
                BLOCK_M, BLOCK_N, BLOCK_R, RANK_DTYPE, PRECISION,
            )  # fmt: skip
        first_split += splits
        db_ptr = sibling(db_ptr, tl.num_programs(0), R, output.n)


@triton.jit
def _output_tiles(
    dy_ptr, h_ptr, output, dh_ptr, db_ptr, M, R, split, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, RANK_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the columns of one split and write its partial ``dh``, and ``dB`` of a row block."""
    N = output.n
    first_row = tl.program_id(0) * BLOCK_M
    first_column = split * output.columns_per_split
    end = min(first_column + output.columns_per_split, N)
    zero = first_row * 0
    h_t = load_tile(h_ptr, 1, R, zero, R, first_row, M, BLOCK_R, BLOCK_M)
    h_t = h_t.to(RANK_DTYPE)
    dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for column in range(first_column, end, BLOCK_N):
        dy = load_tile(
            dy_ptr, output.stride_dym, output.stride_dyn, first_row, M, column, N,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dy = dy.to(RANK_DTYPE)
        b = load_tile(
            output.b, output.stride_bn, output.stride_br, column, N, zero, R, BLOCK_N, BLOCK_R
        )
        dh = dot(dy, b.to(RANK_DTYPE), dh, PRECISION, LONG=True)
        db = dot(h_t, dy, tl.zeros((BLOCK_R, BLOCK_N), tl.float32), PRECISION)
        store_tile(db_ptr, N, 1, zero, R, column, N, db, BLOCK_R, BLOCK_N)
    store_tile(dh_ptr, R, 1, first_row, M, zero, R, dh, BLOCK_M, BLOCK_R)


def prepare_output_pass(
    dys: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    *,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    config: TileConfig | None = None,
) -> Callable[[Sequence[Tensor], Tensor], tuple[Tensor, list[Tensor]]] | None:
    """Return a function of the dys and ``h`` that computes every ``dh`` and ``dB``.

    It may be called with any dys that are laid out in memory as these.

    Args:
        dys: for each sibling ``[M, N_g]``, any strides (an expanded one too) and float dtype; cast
            as it is loaded.
        lora_bs: for each ``[N_g, R]``, any strides and float dtype.
        gains: for each scaling / (1 - p).
        rank_dtype: dtype of the operands of the products, of ``h`` and ``dh``.
        grad_dtype: of ``dB``, rounded from the fp32 sum.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        A function that takes ``h [S, M, R]``, contiguous, and returns ``dh`` likewise and for each
        sibling ``dB [N_g, R]``; ``None`` where one pass would not pay.
    """
    rows = [as_rows(dy) for dy in dys]
    m, rank, dy = rows[0][0], lora_bs[0].shape[1], dys[0]
    ns = tuple([n for _, n, *_ in rows])
    if m == 0:
        return None
    aligned = all(map(has_aligned_rows, dys))
    dtypes = (dy.dtype, lora_bs[0].dtype, rank_dtype)
    precision = dot_precision(rank_dtype)
    settings = _settings(config, dy.device, *dtypes, m, ns, rank, aligned, precision)
    if settings is None:
        return None
    grid, scratch_size, first_dh, columns, sizes, constants = settings
    outputs: tuple[_Output, ...] = ()
    for (_, n, dym, dyn), b, width in zip(rows, lora_bs, columns, strict=True):
        bn, br = b.stride()
        outputs += (_Output(dym, dyn, b, bn, br, n, width),)
    launch = Launch(_output_pass_kernel, grid, constants)
    of_dh, of_db = sizes
    add = prepare_sums(
        [
            *[PartialSum(gain, *each) for gain, each in zip(gains, of_dh, strict=True)],
            *[PartialSum(gain, *each) for gain, each in zip(gains, of_db, strict=True)],
        ]
    )
    siblings, device = len(ns), dy.device
    new_scratch = allocator((scratch_size,), torch.float32, device)
    new_dh = allocator((siblings, m, rank), rank_dtype, device)
    new_dbs = [allocator((n, rank), grad_dtype, device) for n in ns]

    def run(dys: Sequence[Tensor], h: Tensor) -> tuple[Tensor, list[Tensor]]:
        scratch, dh, dbs = new_scratch(), new_dh(), [new_db() for new_db in new_dbs]
        launch(tuple(dys), h, outputs, scratch, m, rank, first_dh)
        add(scratch, (*(dh,) * siblings, *dbs))
        return dh, dbs

    return run


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    dy_dtype: torch.dtype,
    b_dtype: torch.dtype,
    rank_dtype: torch.dtype,
    m: int,
    ns: tuple[int, ...],
    rank: int,
    aligned: bool,
    precision: str,
) -> tuple[tuple[int, int], int, int, list[int], tuple[Any, Any], dict[str, Any]] | None:
    """Return what a launch is made of, or ``None`` where one pass would not pay.

    The grid, the elements of the scratch, where dh's begin in it, for each sibling its columns of
    one split, the sizes of the sums of dh and of dB (see ``PartialSum``), and the compile-time
    arguments.
    """
    fp32, n = rank_dtype == torch.float32, sum(ns)
    if rank > (_MAX_FP32_RANK if fp32 else _MAX_RANK):
        return None
    limits, block_r = device_limits(device), padded_rank(rank)
    tile = config or tile_config_for(
        "output_pass", device, rank_dtype, m, n=n, r=rank, siblings=len(ns), aligned=aligned
    )
    row_blocks = -(-m // tile.block_m)
    if config is None and 4 * row_blocks * n * rank > _MAX_PARTIAL_BYTES:
        return None
    stage_bytes = tile.block_n * (tile.block_m * dy_dtype.itemsize + block_r * b_dtype.itemsize)
    kept_bytes = tile.block_m * (tile.block_n + block_r) * rank_dtype.itemsize
    tile = with_stages_that_fit(tile, limits, stage_bytes, kept_bytes)
    columns = _columns_per_split(ns, tile)
    splits = [-(-each // width) for each, width in zip(ns, columns, strict=True)]
    *firsts_db, first_dh = accumulate((row_blocks * rank * each for each in ns), initial=0)
    *firsts_dh, size = accumulate((each * m * rank for each in splits), initial=first_dh)
    of_dh = [
        (first, each, m, rank, rank, 1, g * m * rank)
        for g, (first, each) in enumerate(zip(firsts_dh, splits, strict=True))
    ]
    of_db = [
        (first, row_blocks, rank, each, 1, rank) for first, each in zip(firsts_db, ns, strict=True)
    ]
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_R": block_r,
        "RANK_DTYPE": triton_dtype(rank_dtype),
        "PRECISION": precision,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return (row_blocks, sum(splits)), size, first_dh, columns, (of_dh, of_db), constants


def _columns_per_split(ns: tuple[int, ...], tile: TileConfig) -> list[int]:
    """Share the tile's splits out in proportion to N, and return the columns of each one's.

    Every sibling has at least one. Rounded to the nearest: q's 3584 columns beside twice 512 take 3
    of 4 splits, and 3 + 1 + 1 finish before 2 + 1 + 1, whose longest walks 1792 columns.
    """
    shares = [max(1, round(tile.splits * n / sum(ns))) for n in ns]
    return [
        -(-n // (share * tile.block_n)) * tile.block_n for n, share in zip(ns, shares, strict=True)
    ]
