"""Shrink: project activations from the model width down to the rank of one or more adapters.

    h_g[m, r] = sum_k keep_g[m, k] * x[m, k] * A_g[r, k]

Grid: (row blocks, splits of K); each program owns BLOCK_M rows of every ``h_g``.
Why: all ranks fit one tile, so ``x``, the only large operand, is read once for all siblings, and
the mask is drawn where ``x`` already is: sibling g draws stream g of the one seed. A batch with too
few row blocks to fill the device splits K; the fp32 partial results are then added in a fixed
order, never by atomics.
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
from .philox import expand_bits, load_bits
from .tile_config import (
    TileConfig,
    cached_by_shape,
    device_limits,
    padded_rank,
    tile_config_for,
    with_stages_that_fit,
)
from .tile_order import load_tile, store_tile


class _Adapter(NamedTuple):
    """What the kernel needs of one adapter."""

    a: Tensor  # [R, K], any strides
    stride_ar: int
    stride_ak: int
    rank: int
    h: Tensor  # [M, R], or the scratch of all adapters' partial results
    first: int  # the element of the scratch at which this adapter's [splits, M, R] begin
    bits: Tensor  # [M, ceil(K / 8)] uint8, or anything if they are not written


@triton.jit(do_not_specialize=["M", "gain", "threshold"])
def _shrink_kernel(
    # tensors
    x_ptr,
    seed_ptr,  # one int64; None without dropout
    adapters,
    # sizes
    M,
    K,
    columns_per_split,
    # strides, in elements; results and partial results are contiguous
    stride_xm,
    stride_xk,
    # run-time scalars
    gain,
    threshold,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WRITE_BITS: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    first_column = split * columns_per_split
    end = min(first_column + columns_per_split, K)
    zero = first_row * 0
    accumulators = ()
    for _ in tl.static_range(len(adapters)):
        accumulators = accumulators + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
    for column in range(first_column, end, BLOCK_K):
        x = load_tile(x_ptr, stride_xm, stride_xk, first_row, M, column, K, BLOCK_M, BLOCK_K)
        x = x.to(RANK_DTYPE)
        updated = ()
        for g in tl.static_range(len(adapters)):
            adapter = adapters[g]
            kept = x
            if HAS_DROPOUT:
                bits = load_bits(
                    seed_ptr, 0, first_row, M, column, K, g, threshold, True, BLOCK_M, BLOCK_K
                )
                kept = tl.where(expand_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
                if WRITE_BITS:
                    row_bytes = tl.cdiv(K, 8)
                    store_tile(
                        adapter.bits, row_bytes, 1, first_row, M, column // 8, row_bytes, bits,
                        BLOCK_M, BLOCK_K // 8,
                    )  # fmt: skip
            a_t = load_tile(
                adapter.a, adapter.stride_ak, adapter.stride_ar, column, K, zero, adapter.rank,
                BLOCK_K, BLOCK_R,
            )  # fmt: skip
            a_t = a_t.to(RANK_DTYPE)
            accumulator = dot(kept, a_t, accumulators[g], PRECISION)
            updated = updated + (accumulator,)
        accumulators = updated
    for g in tl.static_range(len(adapters)):
        adapter = adapters[g]
        offset = tl.cast(adapter.first, tl.int64) + split.to(tl.int64) * adapter.rank * M
        store_tile(
            adapter.h + offset, adapter.rank, 1, first_row, M, zero, adapter.rank,
            accumulators[g] * gain, BLOCK_M, BLOCK_R,
        )  # fmt: skip


def shrink(
    x: Tensor,
    lora_as: Sequence[Tensor],
    seed: Tensor | None = None,
    threshold: int = 0,
    *,
    rank_dtype: torch.dtype,
    return_bits: bool = False,
    gain: float = 1.0,
    config: TileConfig | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Launch the shrink kernel: ``h_g = gain * (keep_g * x) A_g^T`` for every adapter g.

    Args:
        x: ``[M, K]``, any strides and float dtype; cast to ``rank_dtype`` as it is loaded.
        lora_as: for each adapter ``[R_g, K]``, any strides and float dtype, likewise.
        seed: of dropout, one int64 on the device, of which adapter g draws stream g; ``None``: no
            dropout.
        threshold: ``round(p * 65536)``.
        rank_dtype: dtype of the operands of the products and of ``h``.
        return_bits: also write the masks.
        gain: a factor of the result, applied to the fp32 sum.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        For each adapter ``h_g [M, R_g]``, and for each ``bits_g [M, ceil(K / 8)]`` uint8 (an empty
        list unless ``return_bits``).
    """
    m, k = x.shape
    dropped = seed is not None
    write_bits = return_bits and dropped
    hs, bits, ranks = [], [], ()
    for a in lora_as:
        rank = a.shape[0]
        ranks += (rank,)
        hs.append(x.new_empty((m, rank), dtype=rank_dtype))
        if write_bits:
            bits.append(x.new_empty((m, -(-k // 8)), dtype=torch.uint8))
    if m == 0:
        return hs, bits
    dtypes = (x.dtype, lora_as[0].dtype, rank_dtype)
    precision = dot_precision(rank_dtype)
    grid, columns, scratch_size, firsts, constants = _settings(
        config, x.device, *dtypes, m, k, ranks, dropped, write_bits, precision
    )
    scratch = x.new_empty(scratch_size, dtype=torch.float32) if scratch_size else None
    adapters, sums = (), ()
    for g, a in enumerate(lora_as):
        h, rank, first = hs[g], ranks[g], firsts[g]
        target = h if scratch is None else scratch
        stride_ar, stride_ak = a.stride()
        adapters += (
            _Adapter(a, stride_ar, stride_ak, rank, target, first, bits[g] if write_bits else h),
        )
        if scratch is not None:
            sums += (PartialSum(scratch, h, 1.0, first, grid[1], m, rank, rank, 1),)
    _shrink_kernel[grid](
        x, seed, adapters, m, k, columns, *x.stride(), gain, threshold, **constants
    )
    if sums:
        add_partials(sums)
    return hs, bits


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    rank_dtype: torch.dtype,
    m: int,
    k: int,
    ranks: tuple[int, ...],
    has_dropout: bool,
    write_bits: bool,
    precision: str,
) -> tuple[tuple[int, int], int, int, tuple[int, ...], dict[str, Any]]:
    """Return what a launch is made of.

    The grid, the columns of one split, the elements of the scratch (0 without splits), where each
    adapter's begin, and the kernel's compile-time arguments.
    """
    rank, siblings = max(ranks), len(ranks)
    block_r = padded_rank(rank)
    config = config or tile_config_for(
        "shrink", device, rank_dtype, m, k=k, r=rank, siblings=siblings
    )
    together = block_r * siblings
    stage_bytes = config.block_k * (config.block_m * x_dtype.itemsize + together * a_dtype.itemsize)
    kept_bytes = config.block_m * config.block_k * rank_dtype.itemsize
    config = with_stages_that_fit(config, device_limits(device), stage_bytes, kept_bytes)
    columns = -(-k // (config.splits * config.block_k)) * config.block_k
    splits = -(-k // columns)
    *firsts, size = accumulate((splits * m * each for each in ranks), initial=0)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_R": block_r,
        "RANK_DTYPE": triton_dtype(rank_dtype),
        "PRECISION": precision,
        "HAS_DROPOUT": has_dropout,
        "WRITE_BITS": write_bits,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    grid = (-(-m // config.block_m), splits)
    if splits == 1:
        return grid, columns, 0, (0,) * siblings, constants
    return grid, columns, size, tuple(firsts), constants
