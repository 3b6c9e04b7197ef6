"""The pass over ``x``: the gradients of ``lora_A``.

    dA_g[r, k] = gain * sum_m dh_g[m, r] * keep_g[m, k] * x[m, k]

Grid: (column blocks of K, splits of M).
Why: the read of ``x`` is all that costs, so all siblings are in one pass. Partial results are fp32
and added in a fixed order: no atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import dot, dot_precision, triton_dtype
from .launch import Launch
from .layout import allocator, as_rows, mask_kind
from .partial_sums import PartialSum, prepare_sums
from .philox import expand_bits, load_bits
from .tile_config import (
    TileConfig,
    cached_by_shape,
    device_limits,
    padded_rank,
    tile_config_for,
    with_stages_that_fit,
)
from .tile_order import load_tile, sibling, store_tile


class _Sibling(NamedTuple):
    """Where one sibling's part begins; numbers, because computing them takes registers."""

    first_dh: int  # the element of dh
    first_byte: int  # of the mask's bits
    stride_mask: int  # from one row of them to the next


@triton.jit(do_not_specialize=["M", "threshold"])
def _input_pass_kernel(
    # tensors
    x_ptr,
    dh_ptr,  # [siblings, M, R], contiguous
    mask_ptr,  # a seed, or bits [siblings, M, ceil(K / 8)], contiguous
    partials_ptr,  # fp32: of each sibling [splits, R, K]
    siblings,
    # sizes
    M,
    K,
    R,
    rows_per_split,
    # strides, in elements
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
    first_row = tl.program_id(1) * rows_per_split
    zero = first_column * 0
    accumulators = ()
    for _ in tl.static_range(len(siblings)):
        accumulators = accumulators + (tl.zeros((BLOCK_R, BLOCK_N), tl.float32),)
    for row in range(first_row, min(first_row + rows_per_split, M), BLOCK_M):
        x = load_tile(x_ptr, stride_xm, stride_xk, row, M, first_column, K, BLOCK_M, BLOCK_N)
        x = x.to(RANK_DTYPE)
        updated = ()
        for g in tl.static_range(len(siblings)):
            kept = x
            if MASK != "none":
                mask = mask_ptr
                if MASK == "bits":
                    mask = mask_ptr + tl.cast(siblings[g].first_byte, tl.int64)
                bits = load_bits(
                    mask, siblings[g].stride_mask, row, M, first_column, K, g, threshold,
                    MASK == "seed", BLOCK_M, BLOCK_N,
                )  # fmt: skip
                kept = tl.where(expand_bits(bits, BLOCK_M, BLOCK_N), x, 0.0)
            dh_g = dh_ptr + tl.cast(siblings[g].first_dh, tl.int64)
            dh_t = load_tile(dh_g, 1, R, zero, R, row, M, BLOCK_R, BLOCK_M)
            accumulator = dot(dh_t.to(RANK_DTYPE), kept, accumulators[g], PRECISION, LONG=True)
            updated = updated + (accumulator,)
        accumulators = updated
    for g in tl.static_range(len(siblings)):
        number = g * tl.num_programs(1) + tl.program_id(1)
        store_tile(
            sibling(partials_ptr, number, R, K), K, 1, zero, R, first_column, K, accumulators[g],
            BLOCK_R, BLOCK_N,
        )  # fmt: skip


def input_pass(
    x: Tensor,
    dh: Tensor,
    outs: Sequence[Tensor],
    mask: Tensor | None = None,
    threshold: int = 0,
    *,
    gain: float = 1.0,
    rank_dtype: torch.dtype,
    config: TileConfig | None = None,
) -> None:
    """Fill ``outs[g] = gain * dh_g^T (keep_g * x)`` for every sibling, reading ``x`` once.

    Args:
        x: ``[M, K]``, any strides, or ``[..., K]``, contiguous; any float dtype.
        dh: ``[S, M, R]`` of S siblings, contiguous.
        outs: for each sibling ``[R, K]``, any strides and dtype.
        mask: uint8 bits ``[S, M, ceil(K / 8)]``, contiguous; or a seed (one int64), of which
            sibling g draws stream g; or ``None``: no dropout.
        threshold: ``round(p * 65536)``; only a seed needs it.
        gain: a factor of the result, applied to the fp32 sum.
        rank_dtype: dtype of the operands of the products.
        config: the tile; by default the tuned one, or one that runs everywhere.
    """
    run = prepare_input_pass(
        x,
        dh.shape[2],
        [out.stride() for out in outs],
        mask_kind(mask),
        threshold,
        gain=gain,
        dh_dtype=dh.dtype,
        rank_dtype=rank_dtype,
        config=config,
    )
    run(x, dh, mask, tuple(outs))


def prepare_input_pass(
    x: Tensor,
    rank: int,
    strides: Sequence[tuple[int, ...]],
    mask: str,
    threshold: int,
    *,
    gain: float = 1.0,
    dh_dtype: torch.dtype,
    rank_dtype: torch.dtype,
    config: TileConfig | None = None,
) -> Callable[[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]], None]:
    """Return ``input_pass`` as a function of ``x``, ``dh``, the mask and the results.

    It may be called with any ``x`` that is laid out in memory as this one, and results with these
    strides.
    """
    m, k, stride_xm, stride_xk = as_rows(x)
    siblings = len(strides)
    grid, rows, constants = _settings(
        config,
        x.device,
        x.dtype,
        dh_dtype,
        rank_dtype,
        m,
        k,
        rank,
        siblings,
        mask,
        dot_precision(rank_dtype),
    )
    splits = grid[1]
    launch = Launch(_input_pass_kernel, grid, constants)
    row_bytes = -(-k // 8)
    starts = tuple([_Sibling(g * m * rank, g * m * row_bytes, row_bytes) for g in range(siblings)])
    scalars = (starts, m, k, rank, rows, stride_xm, stride_xk, threshold)
    sums = [
        PartialSum(gain, g * splits * rank * k, splits, rank, k, *stride)
        for g, stride in enumerate(strides)
    ]
    add = prepare_sums(sums)
    new_scratch = allocator((siblings, splits, rank, k), torch.float32, x.device)

    def run(x: Tensor, dh: Tensor, mask: Tensor | None, outs: tuple[Tensor, ...]) -> None:
        if m == 0:
            for out in outs:
                out.zero_()
            return
        scratch = new_scratch()
        launch(x, dh, mask, scratch, *scalars)
        add(scratch, outs)

    return run


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    x_dtype: torch.dtype,
    dh_dtype: torch.dtype,
    rank_dtype: torch.dtype,
    m: int,
    k: int,
    rank: int,
    siblings: int,
    mask: str,
    precision: str,
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Return the grid, the rows of one split, and the kernel's compile-time arguments."""
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
    rows = max(1, -(-m // (config.splits * config.block_m))) * config.block_m
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_R": block_r,
        "RANK_DTYPE": triton_dtype(rank_dtype),
        "PRECISION": precision,
        "MASK": mask,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return (-(-k // config.block_n), -(-m // rows)), rows, constants
