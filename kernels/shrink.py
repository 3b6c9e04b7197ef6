"""Shrink: project activations from the model width down to the rank of one or more adapters.

    h_g[m, r] = sum_k keep_g[m, k] * x[m, k] * A_g[r, k]

Grid: (row blocks, splits of K); each program owns BLOCK_M rows of every ``h_g``.
Why: all ranks fit one tile, so ``x``, the only large operand, is read once for all siblings, and
the mask is drawn where ``x`` already is. A batch with too few row blocks to fill the device splits
K; the fp32 partial results are then added in a fixed order, never by atomics.
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
    h: Tensor  # [M, R], or fp32 partial results [splits, M, R]
    stride_hs: int
    stride_hm: int
    seed: Tensor  # one int64, or anything without dropout
    bits: Tensor  # [M, ceil(K / 8)] uint8, or anything if they are not written
    stride_bm: int


@triton.jit(do_not_specialize=["M", "gain", "threshold"])
def _shrink_kernel(
    # tensors
    x_ptr,
    adapters,
    # sizes
    M,
    K,
    columns_per_split,
    # strides, in elements
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
                    adapter.seed, 0, first_row, M, column, K, threshold, True, BLOCK_M, BLOCK_K
                )
                kept = tl.where(expand_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
                if WRITE_BITS:
                    store_tile(
                        adapter.bits, adapter.stride_bm, 1, first_row, M, column // 8,
                        tl.cdiv(K, 8), bits, BLOCK_M, BLOCK_K // 8,
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
        h_ptr = adapter.h + split.to(tl.int64) * adapter.stride_hs
        store_tile(
            h_ptr, adapter.stride_hm, 1, first_row, M, zero, adapter.rank,
            accumulators[g] * gain, BLOCK_M, BLOCK_R,
        )  # fmt: skip


def shrink(
    x: Tensor,
    lora_as: Sequence[Tensor],
    seeds: Sequence[Tensor] | None = None,
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
        seeds: for each adapter its dropout seed, one int64 on the device; ``None``: no dropout.
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
    hs = [x.new_empty((m, a.shape[0]), dtype=rank_dtype) for a in lora_as]
    write_bits = return_bits and seeds is not None
    bits = [x.new_empty((m, -(-k // 8)), dtype=torch.uint8) for _ in lora_as if write_bits]
    if m == 0:
        return hs, bits
    rank = max(a.shape[0] for a in lora_as)
    dtypes = (x.dtype, lora_as[0].dtype, rank_dtype)
    masks = (seeds is not None, write_bits)
    sizes = (m, k, rank, len(lora_as))
    precision = dot_precision(rank_dtype)
    grid, columns, constants = _settings(config, x.device, dtypes, sizes, masks, precision)
    splits = grid[1]
    targets = hs
    if splits > 1:
        targets = [x.new_empty((splits, *h.shape), dtype=torch.float32) for h in hs]
    adapters = tuple(
        _Adapter(
            a,
            a.stride(0),
            a.stride(1),
            a.shape[0],
            target,
            target.stride(0) if splits > 1 else 0,
            a.shape[0],
            x if seeds is None else seeds[g],
            bits[g] if write_bits else target,
            -(-k // 8) if write_bits else 0,
        )
        for g, (a, target) in enumerate(zip(lora_as, targets, strict=True))
    )
    _shrink_kernel[grid](x, adapters, m, k, columns, *x.stride(), gain, threshold, **constants)
    if splits > 1:
        add_partials([PartialSum(target, h, 1.0) for target, h in zip(targets, hs, strict=True)])
    return hs, bits


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    sizes: tuple[int, int, int, int],
    masks: tuple[bool, bool],
    precision: str,
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Return the grid, the columns of one split, and the kernel's compile-time arguments."""
    (x_dtype, a_dtype, rank_dtype), (m, k, rank, adapters) = dtypes, sizes
    block_r = padded_rank(rank)
    together = block_r * adapters
    config = config or tile_config_for("shrink", device, rank_dtype, m, k=k, r=together)
    stage_bytes = config.block_k * (config.block_m * x_dtype.itemsize + together * a_dtype.itemsize)
    kept_bytes = config.block_m * config.block_k * rank_dtype.itemsize
    config = with_stages_that_fit(config, device_limits(device), stage_bytes, kept_bytes)
    columns = -(-k // (config.splits * config.block_k)) * config.block_k
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_R": block_r,
        "RANK_DTYPE": triton_dtype(rank_dtype),
        "PRECISION": precision,
        "HAS_DROPOUT": masks[0],
        "WRITE_BITS": masks[1],
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return (-(-m // config.block_m), -(-k // columns)), columns, constants
