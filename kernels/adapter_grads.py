"""Gradients of the adapters of one or several siblings: a pass over every ``dy``, one over ``x``.

    output pass    dh_g = gain_g * dy_g B_g        [M, R]
                   dB_g = gain_g * dy_g^T h_g      [N_g, R]
    input pass     dA_g = dh_g^T (keep_g * x)      [R, K]

Grid of the output pass: (row blocks, splits of every N_g, one sibling's after the other's). A
program belongs to one sibling. A tile of ``dy`` is read once and enters both products. ``dh`` is
summed over the columns of the program and written as one fp32 partial result for each split; ``dB``
of a tile is complete over its BLOCK_M rows and written as one partial result for each row block.
Grid of the input pass: (column blocks of K, splits of M).
Why: the reads of ``dy`` and ``x`` are all that costs. Partial results are fp32 and added in a fixed
order: no atomics, so the same inputs give the same bits. Why all siblings in one pass: it takes
four launches whatever their number, and k and v of a grouped-query model (N = 512 beside q's 3584)
are too small to fill a device alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import dot, dot_precision, triton_dtype
from .partial_sums import PartialSum, add_partials
from .philox import expand_bits, load_bits, mask_kind
from .shrink import shrink
from .tile_config import (
    TileConfig,
    cached_by_shape,
    device_limits,
    has_aligned_rows,
    padded_rank,
    tile_config_for,
    with_stages_that_fit,
)
from .tile_order import load_tile, store_tile

# Above it one partial dB for each row block is more traffic than reading dy a second time: at rank
# 128, row blocks of 128 write and read 8 bytes for every 2 bytes of dy.
_MAX_RANK_IN_ONE_PASS = 64
# Beyond it the partial dB of a very long batch would take gigabytes: 131,072 rows, N = 25,600 and
# rank 64 are 3.4. Two passes over dy take none.
_MAX_PARTIAL_BYTES = 256 << 20
# fp32 products have no tensor cores: two accumulators of rank 64 spill 24 to 128 bytes a thread.
_MAX_FP32_RANK_IN_ONE_PASS = 16


class _Output(NamedTuple):
    """What the output pass needs of one sibling."""

    dy: Tensor  # [M, N], any strides
    stride_dym: int
    stride_dyn: int
    b: Tensor  # [N, R], any strides
    stride_bn: int
    stride_br: int
    h: Tensor  # [M, R], rows contiguous
    stride_hm: int
    n: int
    columns_per_split: int


@triton.jit(do_not_specialize=["M"])
def _adapter_grads_kernel(
    # tensors
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
    row_block = tl.program_id(0).to(tl.int64)
    dh_ptr = partials_ptr + tl.cast(first_dh, tl.int64) + tl.program_id(1).to(tl.int64) * R * M
    db_ptr = partials_ptr
    first_split = 0
    for g in tl.static_range(len(outputs)):
        output = outputs[g]
        splits = tl.cdiv(output.n, output.columns_per_split)
        split = tl.program_id(1) - first_split
        if (split >= 0) & (split < splits):
            _output_tiles(
                output, dh_ptr, db_ptr + row_block * R * output.n, M, R, split,
                BLOCK_M, BLOCK_N, BLOCK_R, RANK_DTYPE, PRECISION,
            )  # fmt: skip
        first_split += splits
        db_ptr += tl.num_programs(0).to(tl.int64) * R * output.n


@triton.jit
def _output_tiles(
    output, dh_ptr, db_ptr, M, R, split, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the columns of one split and write its partial ``dh``, and ``dB`` of a row block."""
    N = output.n
    first_row = tl.program_id(0) * BLOCK_M
    first_column = split * output.columns_per_split
    end = min(first_column + output.columns_per_split, N)
    zero = first_row * 0
    h_t = load_tile(output.h, 1, output.stride_hm, zero, R, first_row, M, BLOCK_R, BLOCK_M)
    h_t = h_t.to(RANK_DTYPE)
    dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for column in range(first_column, end, BLOCK_N):
        dy = load_tile(
            output.dy, output.stride_dym, output.stride_dyn, first_row, M, column, N,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dy = dy.to(RANK_DTYPE)
        b = load_tile(
            output.b, output.stride_bn, output.stride_br, column, N, zero, R, BLOCK_N, BLOCK_R
        )
        dh = dot(dy, b.to(RANK_DTYPE), dh, PRECISION)
        db = dot(h_t, dy, tl.zeros((BLOCK_R, BLOCK_N), tl.float32), PRECISION)
        store_tile(db_ptr, N, 1, zero, R, column, N, db, BLOCK_R, BLOCK_N)
    store_tile(dh_ptr, R, 1, first_row, M, zero, R, dh, BLOCK_M, BLOCK_R)


class _Input(NamedTuple):
    """What the input pass needs of one sibling."""

    dh: Tensor  # [M, R], rows contiguous
    stride_dhm: int
    rank: int
    mask: Tensor  # seed, bytes, or anything where MASK is "none"
    stride_mask: int


@triton.jit(do_not_specialize=["M", "threshold"])
def _input_pass_kernel(
    # tensors
    x_ptr,
    inputs,
    partials_ptr,  # fp32: of each sibling [splits, R, K]
    # sizes
    M,
    K,
    rows_per_split,
    # strides, in elements; partial results are contiguous
    stride_xm,
    stride_xk,
    # run-time scalar
    threshold,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bits" or "seed"
):
    first_column = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(1) * rows_per_split
    zero = first_column * 0
    accumulators = ()
    for _ in tl.static_range(len(inputs)):
        accumulators = accumulators + (tl.zeros((BLOCK_R, BLOCK_N), tl.float32),)
    for row in range(first_row, min(first_row + rows_per_split, M), BLOCK_M):
        x = load_tile(x_ptr, stride_xm, stride_xk, row, M, first_column, K, BLOCK_M, BLOCK_N)
        x = x.to(RANK_DTYPE)
        updated = ()
        for g in tl.static_range(len(inputs)):
            sibling = inputs[g]
            kept = x
            if MASK != "none":
                bits = load_bits(
                    sibling.mask, sibling.stride_mask, row, M, first_column, K, g, threshold,
                    MASK == "seed", BLOCK_M, BLOCK_N,
                )  # fmt: skip
                kept = tl.where(expand_bits(bits, BLOCK_M, BLOCK_N), x, 0.0)
            dh_t = load_tile(
                sibling.dh, 1, sibling.stride_dhm, zero, sibling.rank, row, M, BLOCK_R, BLOCK_M
            )
            updated = updated + (dot(dh_t.to(RANK_DTYPE), kept, accumulators[g], PRECISION),)
        accumulators = updated
    for g in tl.static_range(len(inputs)):
        rank = inputs[g].rank
        store_tile(
            partials_ptr + split * rank * K, K, 1, zero, rank, first_column, K, accumulators[g],
            BLOCK_R, BLOCK_N,
        )  # fmt: skip
        partials_ptr += tl.num_programs(1).to(tl.int64) * rank * K


def adapter_grads(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor] | None,
    lora_bs: Sequence[Tensor],
    mask: Sequence[Tensor] | Tensor | None,
    gains: Sequence[float],
    threshold: int = 0,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    output_config: TileConfig | None = None,
    input_config: TileConfig | None = None,
) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor] | None]:
    """Launch the passes that are needed for the gradients that are asked for.

    Everything takes four launches for any number of siblings, up to rank 64 (16 in fp32); above
    it, and where the partial results would take more than 256 MiB, a sibling takes up to four of
    its own for ``dh`` and ``dB``.

    Args:
        dys: for each sibling ``[M, N_g]``, any strides (an expanded one too) and float dtype; cast
            as it is loaded.
        x: ``[M, K]``, likewise, the input of all, or ``None`` to leave ``dA`` out.
        hs: for each sibling ``[M, R]``, rows contiguous, or ``None`` to leave ``dB`` out.
        lora_bs: for each sibling ``[N_g, R]``, any strides and float dtype; all of one rank.
        mask: for each sibling uint8 bits ``[M, ceil(K / 8)]``; or a seed (one int64), of which
            sibling g draws stream g; or ``None`` without dropout.
        gains: for each sibling scaling / (1 - p).
        threshold: ``round(p * 65536)``; only a seed needs it.
        need_dh: compute ``dh``; without it ``x`` must be ``None``.
        rank_dtype: dtype of the operands of the products and of ``dh``.
        grad_dtype: of ``dA`` and ``dB``, rounded from the fp32 sum.
        output_config: tile of the pass over the dys; by default the tuned one or the default.
        input_config: tile of the pass over ``x``; likewise.

    Returns:
        Lists with an element for each sibling: ``dh [M, R]`` (empty if not needed), ``dA [R, K]``
        or ``None`` instead of the list, ``dB [N_g, R]`` or ``None`` likewise.
    """
    found = None
    if hs is not None and need_dh:
        found = _output_pass(dys, hs, lora_bs, gains, rank_dtype, grad_dtype, output_config)
    if found is not None:
        dhs, dbs = found
    elif len(dys) == 1:
        h = None if hs is None else hs[0]
        dhs, dbs = _two_passes(dys[0], h, lora_bs[0], gains[0], need_dh, rank_dtype, grad_dtype)
    else:
        dhs, dbs = _one_by_one(
            dys, hs, lora_bs, gains, need_dh, rank_dtype, grad_dtype, output_config
        )
    if x is None:
        return dhs, None, dbs
    das = []
    for dh in dhs:
        das.append(x.new_empty((dh.shape[1], x.shape[1]), dtype=grad_dtype))
    input_pass(x, dhs, das, mask, threshold, rank_dtype=rank_dtype, config=input_config)
    return dhs, das, dbs


def _output_pass(
    dys: Sequence[Tensor],
    hs: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    config: TileConfig | None,
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return every ``dh`` and ``dB`` from one pass, or ``None`` where it would not pay."""
    dy, lora_b = dys[0], lora_bs[0]
    m, rank, ns, aligned = dy.shape[0], lora_b.shape[1], (), True
    for each, b in zip(dys, lora_bs, strict=True):
        n, sibling_rank = b.shape
        assert sibling_rank == rank, f"siblings of the ranks {rank} and {sibling_rank}"
        ns += (n,)
        aligned = aligned and has_aligned_rows(each)
    if m == 0:
        return None
    dtypes = (dy.dtype, lora_b.dtype, rank_dtype)
    precision = dot_precision(rank_dtype)
    settings = _output_settings(config, dy.device, *dtypes, m, ns, rank, aligned, precision)
    if settings is None:
        return None
    grid, scratch_size, first_dh, siblings, constants = settings
    scratch = dy.new_empty(scratch_size, dtype=torch.float32)
    dhs, dbs, outputs, sums = [], [], (), ()
    for each, h, b, gain, n, sizes in zip(dys, hs, lora_bs, gains, ns, siblings, strict=True):
        dh = dy.new_empty((m, rank), dtype=rank_dtype)
        db = dy.new_empty((n, rank), dtype=grad_dtype)
        dhs.append(dh)
        dbs.append(db)
        columns, dh_sizes, db_sizes = sizes
        (dym, dyn), (bn, br) = each.stride(), b.stride()
        outputs += (_Output(each, dym, dyn, b, bn, br, h, h.stride(0), n, columns),)
        sums += (
            PartialSum(scratch, dh, gain, *dh_sizes),
            PartialSum(scratch, db, gain, *db_sizes),
        )
    _adapter_grads_kernel[grid](outputs, scratch, m, rank, first_dh, **constants)
    add_partials(sums)
    return dhs, dbs


def _two_passes(
    dy: Tensor,
    h: Tensor | None,
    lora_b: Tensor,
    gain: float,
    need_dh: bool,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return one sibling's ``dh`` and ``dB``, or one of the two, by the other products' kernels."""
    n, rank = lora_b.shape
    if need_dh:
        dhs, _ = shrink(dy, [lora_b.t()], rank_dtype=rank_dtype, gain=gain)
    else:
        dhs = [dy.new_empty((0, rank), dtype=rank_dtype)]
    if h is None:
        return dhs, None
    db = dy.new_empty((n, rank), dtype=grad_dtype)
    input_pass(dy, [h], [db.t()], gain=gain, rank_dtype=rank_dtype)
    return dhs, [db]


def _one_by_one(
    dys: Sequence[Tensor],
    hs: Sequence[Tensor] | None,
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    need_dh: bool,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    config: TileConfig | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return every ``dh`` and ``dB``, each sibling by itself: one alone may fit in one pass."""
    dhs: list[Tensor] = []
    dbs: list[Tensor] = []
    for g, dy in enumerate(dys):
        dh, _, db = adapter_grads(
            [dy],
            None,
            None if hs is None else [hs[g]],
            [lora_bs[g]],
            None,
            [gains[g]],
            need_dh=need_dh,
            rank_dtype=rank_dtype,
            grad_dtype=grad_dtype,
            output_config=config,
        )
        dhs += dh
        dbs += db or []
    return dhs, None if hs is None else dbs


@cached_by_shape
def _output_settings(
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
) -> tuple[tuple[int, int], int, int, tuple[Any, ...], dict[str, Any]] | None:
    """Return what a launch is made of, or ``None`` where one pass would not pay.

    The grid, the elements of the scratch, where dh's begin in it, for each sibling its columns of
    one split and the sizes of its two sums (see ``PartialSum``), and the compile-time arguments.
    """
    fp32, n = rank_dtype == torch.float32, sum(ns)
    if rank > (_MAX_FP32_RANK_IN_ONE_PASS if fp32 else _MAX_RANK_IN_ONE_PASS):
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
    siblings = tuple(
        (
            columns[g],
            (firsts_dh[g], splits[g], m, rank, rank, 1),
            (firsts_db[g], row_blocks, rank, each, 1, rank),
        )
        for g, each in enumerate(ns)
    )
    constants = _constants(tile, block_r, rank_dtype, precision)
    return (row_blocks, sum(splits)), size, first_dh, siblings, constants


def _columns_per_split(ns: tuple[int, ...], tile: TileConfig) -> list[int]:
    """Share the tile's splits out in proportion to N, and return the columns of each one's.

    Every sibling has at least one. Rounded to the nearest: q's 3584 columns beside twice 512 take 3
    of 4 splits, and 3 + 1 + 1 finish before 2 + 1 + 1, whose longest walks 1792 columns.
    """
    shares = [max(1, round(tile.splits * n / sum(ns))) for n in ns]
    return [
        -(-n // (share * tile.block_n)) * tile.block_n for n, share in zip(ns, shares, strict=True)
    ]


def _constants(
    config: TileConfig, block_r: int, rank_dtype: torch.dtype, precision: str
) -> dict[str, Any]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_R": block_r,
        "RANK_DTYPE": triton_dtype(rank_dtype),
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def input_pass(
    x: Tensor,
    dhs: Sequence[Tensor],
    outs: Sequence[Tensor],
    mask: Sequence[Tensor] | Tensor | None = None,
    threshold: int = 0,
    *,
    gain: float = 1.0,
    rank_dtype: torch.dtype,
    config: TileConfig | None = None,
) -> None:
    """Fill ``outs[g] = gain * dh_g^T (keep_g * x)`` for every adapter, reading ``x`` once.

    Args:
        x: ``[M, K]``, any strides and float dtype.
        dhs: for each adapter ``[M, R_g]``, rows contiguous.
        outs: for each adapter ``[R_g, K]``, any strides and dtype.
        mask: for each adapter uint8 bits ``[M, ceil(K / 8)]``; or a seed (one int64), of which
            adapter g draws stream g; or ``None``: no dropout.
        threshold: ``round(p * 65536)``; only a seed needs it.
        gain: a factor of the result, applied to the fp32 sum.
        rank_dtype: dtype of the operands of the products.
        config: the tile; by default the tuned one, or one that runs everywhere.
    """
    m, k = x.shape
    if m == 0:
        for out in outs:
            out.zero_()
        return
    ranks, inputs = (), ()
    for g, dh in enumerate(dhs):
        rank = dh.shape[1]
        ranks += (rank,)
        keep, stride_mask = dh, 0
        if isinstance(mask, Tensor):
            keep = mask
        elif mask is not None:
            keep = mask[g]
            stride_mask = keep.stride(0)
        inputs += (_Input(dh, dh.stride(0), rank, keep, stride_mask),)
    grid, rows, scratch_size, firsts, constants = _input_settings(
        config,
        x.device,
        x.dtype,
        dhs[0].dtype,
        rank_dtype,
        m,
        k,
        ranks,
        mask_kind(mask),
        dot_precision(rank_dtype),
    )
    scratch = x.new_empty(scratch_size, dtype=torch.float32)
    _input_pass_kernel[grid](x, inputs, scratch, m, k, rows, *x.stride(), threshold, **constants)
    sums = ()
    for out, rank, first in zip(outs, ranks, firsts, strict=True):
        sums += (PartialSum(scratch, out, gain, first, grid[1], rank, k, *out.stride()),)
    add_partials(sums)


@cached_by_shape
def _input_settings(
    config: TileConfig | None,
    device: torch.device,
    x_dtype: torch.dtype,
    dh_dtype: torch.dtype,
    rank_dtype: torch.dtype,
    m: int,
    k: int,
    ranks: tuple[int, ...],
    mask: str,
    precision: str,
) -> tuple[tuple[int, int], int, int, tuple[int, ...], dict[str, Any]]:
    """Return what a launch is made of.

    The grid, the rows of one split, the elements of the scratch, where each adapter's begin in it,
    and the kernel's compile-time arguments.
    """
    rank, siblings = max(ranks), len(ranks)
    block_r = padded_rank(rank)
    config = config or tile_config_for(
        "input_pass", device, rank_dtype, m, k=k, r=rank, siblings=siblings
    )
    together = block_r * siblings
    stage_bytes = config.block_m * (
        config.block_n * x_dtype.itemsize + together * dh_dtype.itemsize
    )
    kept_bytes = config.block_m * config.block_n * rank_dtype.itemsize
    config = with_stages_that_fit(config, device_limits(device), stage_bytes, kept_bytes)
    rows = -(-m // (config.splits * config.block_m)) * config.block_m
    splits = -(-m // rows)
    *firsts, size = accumulate((splits * each * k for each in ranks), initial=0)
    constants = _constants(config, block_r, rank_dtype, precision) | {"MASK": mask}
    return (-(-k // config.block_n), splits), rows, size, tuple(firsts), constants
