"""Gradients of the adapters: two passes, one over ``dy`` and one over ``x``.

    output pass    dh = gain * dy B            [M, R]
                   dB = gain * dy^T h          [N, R]
    input pass     dA_g = dh_g^T (keep_g * x)  [R, K], for one adapter or several siblings

Grid of the output pass: (row blocks, splits of N). A tile of ``dy`` is read once and enters both
products. ``dh`` is summed over the columns of the program and written as one fp32 partial result
for each split; ``dB`` of a tile is complete over its BLOCK_M rows and written as one partial result
for each row block. Grid of the input pass: (column blocks of K, splits of M).
Why: the reads of ``dy`` and ``x`` are all that costs. Partial results are fp32 and added in a fixed
order: no atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import dot, dot_precision, triton_dtype
from .partial_sums import PartialSum, add_partials
from .philox import expand_bits, load_bits
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


@triton.jit(do_not_specialize=["M"])
def _adapter_grads_kernel(
    # tensors
    dy_ptr,
    b_ptr,
    h_ptr,
    dh_ptr,  # fp32 [splits, M, R]
    db_ptr,  # fp32 [row blocks, R, N]
    # sizes
    M,
    N,
    R,
    columns_per_split,
    # strides, in elements; partial results are contiguous
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_br,
    stride_hm,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, split = tl.program_id(0), tl.program_id(1)
    first_row = row_block * BLOCK_M
    first_column = split * columns_per_split
    zero = row_block * 0
    h_t = load_tile(h_ptr, 1, stride_hm, zero, R, first_row, M, BLOCK_R, BLOCK_M)
    h_t = h_t.to(RANK_DTYPE)
    dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    db_block_ptr = db_ptr + row_block.to(tl.int64) * R * N
    for column in range(first_column, min(first_column + columns_per_split, N), BLOCK_N):
        dy = load_tile(dy_ptr, stride_dym, stride_dyn, first_row, M, column, N, BLOCK_M, BLOCK_N)
        dy = dy.to(RANK_DTYPE)
        b = load_tile(b_ptr, stride_bn, stride_br, column, N, zero, R, BLOCK_N, BLOCK_R)
        dh = dot(dy, b.to(RANK_DTYPE), dh, PRECISION)
        db = dot(h_t, dy, tl.zeros((BLOCK_R, BLOCK_N), tl.float32), PRECISION)
        store_tile(db_block_ptr, N, 1, zero, R, column, N, db, BLOCK_R, BLOCK_N)
    dh_split_ptr = dh_ptr + split.to(tl.int64) * R * M
    store_tile(dh_split_ptr, R, 1, first_row, M, zero, R, dh, BLOCK_M, BLOCK_R)


class _Projection(NamedTuple):
    """What the input pass needs of one adapter."""

    dh: Tensor  # [M, R], rows contiguous
    stride_dhm: int
    rank: int
    partials: Tensor  # fp32 [splits, R, K]
    mask: Tensor  # seed, bytes, or anything where MASK is "none"
    stride_mask: int


@triton.jit(do_not_specialize=["M", "threshold"])
def _input_pass_kernel(
    # tensors
    x_ptr,
    projections,
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
    split = tl.program_id(1)
    first_row = split * rows_per_split
    zero = first_column * 0
    accumulators = ()
    for _ in tl.static_range(len(projections)):
        accumulators = accumulators + (tl.zeros((BLOCK_R, BLOCK_N), tl.float32),)
    for row in range(first_row, min(first_row + rows_per_split, M), BLOCK_M):
        x = load_tile(x_ptr, stride_xm, stride_xk, row, M, first_column, K, BLOCK_M, BLOCK_N)
        x = x.to(RANK_DTYPE)
        updated = ()
        for g in tl.static_range(len(projections)):
            projection = projections[g]
            kept = x
            if MASK != "none":
                bits = load_bits(
                    projection.mask, projection.stride_mask, row, M, first_column, K, threshold,
                    MASK == "seed", BLOCK_M, BLOCK_N,
                )  # fmt: skip
                kept = tl.where(expand_bits(bits, BLOCK_M, BLOCK_N), x, 0.0)
            dh_t = load_tile(
                projection.dh, 1, projection.stride_dhm, zero, projection.rank, row, M,
                BLOCK_R, BLOCK_M,
            )  # fmt: skip
            updated = updated + (dot(dh_t.to(RANK_DTYPE), kept, accumulators[g], PRECISION),)
        accumulators = updated
    for g in tl.static_range(len(projections)):
        projection = projections[g]
        partial_ptr = projection.partials + split.to(tl.int64) * projection.rank * K
        store_tile(
            partial_ptr, K, 1, zero, projection.rank, first_column, K, accumulators[g],
            BLOCK_R, BLOCK_N,
        )  # fmt: skip


def adapter_grads(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    lora_b: Tensor,
    mask: Tensor | None,
    gain: float,
    threshold: int = 0,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    output_config: TileConfig | None = None,
    input_config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the passes that are needed for the gradients that are asked for.

    Args:
        dy: ``[M, N]``, any strides (an expanded one too) and float dtype; cast as it is loaded.
        x: ``[M, K]``, likewise, or ``None`` to leave ``dA`` out.
        h: ``[M, R]``, rows contiguous, or ``None`` to leave ``dB`` out.
        lora_b: ``[N, R]``, any strides and float dtype.
        mask: uint8 bits ``[M, ceil(K / 8)]``, a seed (one int64), or ``None`` without dropout.
        gain: scaling / (1 - p).
        threshold: ``round(p * 65536)``; only a seed needs it.
        need_dh: compute ``dh``; without it ``x`` must be ``None``.
        rank_dtype: dtype of the operands of the products and of ``dh``.
        grad_dtype: of ``dA`` and ``dB``, rounded from the fp32 sum.
        output_config: tile of the pass over ``dy``; by default the tuned one or the default.
        input_config: tile of the pass over ``x``; likewise.

    Returns:
        ``dh [M, R]`` (empty if not needed), ``dA [R, K]`` or ``None``, ``dB [N, R]`` or ``None``.
    """
    (m, n), rank = dy.shape, lora_b.shape[1]
    dh = dy.new_empty((m if need_dh else 0, rank), dtype=rank_dtype)
    db = None if h is None else dy.new_empty((n, rank), dtype=grad_dtype)
    if m == 0:
        da = None if x is None else dy.new_zeros((rank, x.shape[1]), dtype=grad_dtype)
        return dh, da, None if db is None else db.zero_()
    fp32 = rank_dtype == torch.float32
    max_rank = _MAX_FP32_RANK_IN_ONE_PASS if fp32 else _MAX_RANK_IN_ONE_PASS
    low_block = 32 if fp32 else 256 if has_aligned_rows(dy) else 64  # of the default tiles
    partial_bytes = 4 * -(-m // low_block) * n * rank
    fits = output_config is not None or partial_bytes <= _MAX_PARTIAL_BYTES
    if need_dh and db is not None and h is not None and rank <= max_rank and fits:
        _output_pass(dy, lora_b, h, dh, db, gain, rank_dtype, output_config)
    else:
        if need_dh:
            (dh,), _ = shrink(dy, [lora_b.t()], rank_dtype=rank_dtype, gain=gain)
        if db is not None and h is not None:
            input_pass(dy, [h], [db.t()], gain=gain, rank_dtype=rank_dtype)
    if x is None:
        return dh, None, db
    da = dy.new_empty((rank, x.shape[1]), dtype=grad_dtype)
    masks = None if mask is None else [mask]
    input_pass(x, [dh], [da], masks, threshold, rank_dtype=rank_dtype, config=input_config)
    return dh, da, db


def _output_pass(
    dy: Tensor,
    lora_b: Tensor,
    h: Tensor,
    dh: Tensor,
    db: Tensor,
    gain: float,
    rank_dtype: torch.dtype,
    config: TileConfig | None,
) -> None:
    """Fill ``dh`` and ``db`` from one pass over ``dy``."""
    (m, n), rank = dy.shape, lora_b.shape[1]
    grid, columns, constants = _output_settings(
        config,
        dy.device,
        (dy.dtype, lora_b.dtype, rank_dtype),
        (m, n, rank),
        has_aligned_rows(dy),
        dot_precision(rank_dtype),
    )
    row_blocks, splits = grid
    dh_partials = dy.new_empty((splits, m, rank), dtype=torch.float32)
    db_partials = dy.new_empty((row_blocks, rank, n), dtype=torch.float32)
    strides = (*dy.stride(), *lora_b.stride(), h.stride(0))
    _adapter_grads_kernel[grid](
        dy, lora_b, h, dh_partials, db_partials, m, n, rank, columns, *strides, **constants
    )
    add_partials([PartialSum(dh_partials, dh, gain), PartialSum(db_partials, db.t(), gain)])


@cached_by_shape
def _output_settings(
    config: TileConfig | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    sizes: tuple[int, int, int],
    aligned: bool,
    precision: str,
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Return the grid, the columns of one split, and the kernel's compile-time arguments."""
    (dy_dtype, b_dtype, rank_dtype), (m, n, rank) = dtypes, sizes
    block_r = padded_rank(rank)
    config = config or tile_config_for(
        "output_pass", device, rank_dtype, m, n=n, r=rank, aligned=aligned
    )
    stage_bytes = config.block_n * (config.block_m * dy_dtype.itemsize + block_r * b_dtype.itemsize)
    kept_bytes = config.block_m * (config.block_n + block_r) * rank_dtype.itemsize
    config = with_stages_that_fit(config, device_limits(device), stage_bytes, kept_bytes)
    columns = -(-n // (config.splits * config.block_n)) * config.block_n
    grid = (-(-m // config.block_m), -(-n // columns))
    return grid, columns, _constants(config, block_r, rank_dtype, precision)


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
    masks: Sequence[Tensor] | None = None,
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
        masks: for each adapter uint8 bits ``[M, ceil(K / 8)]`` or its seed; ``None``: no dropout.
        threshold: ``round(p * 65536)``; only a seed needs it.
        gain: a factor of the result, applied to the fp32 sum.
        rank_dtype: dtype of the operands of the products.
        config: the tile; by default the tuned one, or one that runs everywhere.
    """
    (m, k), rank = x.shape, max(dh.shape[1] for dh in dhs)
    if m == 0:
        for out in outs:
            out.zero_()
        return
    grid, rows, constants = _input_settings(
        config,
        x.device,
        (x.dtype, dhs[0].dtype, rank_dtype),
        (m, k, rank, len(dhs)),
        dot_precision(rank_dtype),
    )
    splits = grid[1]
    partials = [x.new_empty((splits, *out.shape), dtype=torch.float32) for out in outs]
    mask_kind = "none" if masks is None else "bits" if masks[0].dtype == torch.uint8 else "seed"
    projections = tuple(
        _Projection(
            dh,
            dh.stride(0),
            dh.shape[1],
            partials[g],
            dh if masks is None else masks[g],
            masks[g].stride(0) if masks is not None and mask_kind == "bits" else 0,
        )
        for g, dh in enumerate(dhs)
    )
    _input_pass_kernel[grid](
        x, projections, m, k, rows, *x.stride(), threshold, MASK=mask_kind, **constants
    )
    add_partials([PartialSum(p, out, gain) for p, out in zip(partials, outs, strict=True)])


@cached_by_shape
def _input_settings(
    config: TileConfig | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    sizes: tuple[int, int, int, int],
    precision: str,
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Return the grid, the rows of one split, and the kernel's compile-time arguments."""
    (x_dtype, dh_dtype, rank_dtype), (m, k, rank, adapters) = dtypes, sizes
    block_r = padded_rank(rank)
    together = block_r * adapters
    config = config or tile_config_for("input_pass", device, rank_dtype, m, k=k, r=together)
    stage_bytes = config.block_m * (
        config.block_n * x_dtype.itemsize + together * dh_dtype.itemsize
    )
    kept_bytes = config.block_m * config.block_n * rank_dtype.itemsize
    config = with_stages_that_fit(config, device_limits(device), stage_bytes, kept_bytes)
    rows = -(-m // (config.splits * config.block_m)) * config.block_m
    grid = (-(-k // config.block_n), -(-m // rows))
    return grid, rows, _constants(config, block_r, rank_dtype, precision)
