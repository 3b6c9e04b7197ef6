"""Shrink: project activations from the model width down to the rank of one or more adapters.

    h_g[m, r] = sum_k keep_g[m, k] * x[m, k] * A_g[r, k]

Grid: (row blocks, splits of K); each program owns BLOCK_M rows of every ``h_g``.
Why: all ranks fit one tile, so ``x``, the only large operand, is read once for all siblings, and
the mask is drawn where ``x`` already is: sibling g draws stream g of the one seed. A batch with too
few row blocks to fill the device splits K; the fp32 partial results are then added in a fixed
order, never by atomics.
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
from .layout import allocator, as_rows
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


class _Adapter(NamedTuple):
    """What the kernel needs of one adapter."""

    a: Tensor  # [R, K], any strides
    stride_ar: int
    stride_ak: int


@triton.jit(do_not_specialize=["M", "gain", "threshold"])
def _shrink_kernel(
    # tensors; results are contiguous
    x_ptr,
    seed_ptr,  # one int64; None without dropout
    h_ptr,  # [splits, siblings, M, R]
    bits_ptr,  # [siblings, M, ceil(K / 8)] uint8; None if they are not written
    adapters,
    # sizes
    M,
    K,
    R,
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
            if seed_ptr is not None:
                bits = load_bits(
                    seed_ptr, 0, first_row, M, column, K, g, threshold, True, BLOCK_M, BLOCK_K
                )
                kept = tl.where(expand_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
                if bits_ptr is not None:
                    row_bytes = tl.cdiv(K, 8)
                    store_tile(
                        sibling(bits_ptr, g, M, row_bytes), row_bytes, 1, first_row, M,
                        column // 8, row_bytes, bits, BLOCK_M, BLOCK_K // 8,
                    )  # fmt: skip
            a_t = load_tile(
                adapter.a, adapter.stride_ak, adapter.stride_ar, column, K, zero, R,
                BLOCK_K, BLOCK_R,
            )  # fmt: skip
            a_t = a_t.to(RANK_DTYPE)
            accumulator = dot(kept, a_t, accumulators[g], PRECISION, LONG=True)
            updated = updated + (accumulator,)
        accumulators = updated
    for g in tl.static_range(len(adapters)):
        store_tile(
            sibling(h_ptr, split * len(adapters) + g, M, R), R, 1, first_row, M, zero, R,
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
) -> tuple[Tensor, Tensor | None]:
    """Launch the shrink kernel: ``h_g = gain * (keep_g * x) A_g^T`` for every adapter g.

    Args:
        x: ``[M, K]``, any strides, or ``[..., K]``, contiguous; any float dtype, cast to
            ``rank_dtype`` as it is loaded.
        lora_as: for each adapter ``[R, K]``, any strides and float dtype, likewise.
        seed: of dropout, one int64 on the device, of which adapter g draws stream g; ``None``: no
            dropout.
        threshold: ``round(p * 65536)``.
        rank_dtype: dtype of the operands of the products and of ``h``.
        return_bits: also write the masks.
        gain: a factor of the result, applied to the fp32 sum.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        ``h [S, M, R]`` for S adapters, and ``bits [S, M, ceil(K / 8)]`` uint8 (``None`` unless
        ``return_bits``).
    """
    dropped = seed is not None
    launch = prepare_shrink(
        x,
        lora_as,
        threshold,
        dropped=dropped,
        rank_dtype=rank_dtype,
        return_bits=return_bits and dropped,
        gain=gain,
        config=config,
    )
    return launch(x, seed)


def prepare_shrink(
    x: Tensor,
    lora_as: Sequence[Tensor],
    threshold: int = 0,
    *,
    dropped: bool,
    rank_dtype: torch.dtype,
    return_bits: bool,
    gain: float = 1.0,
    transposed: bool = False,
    config: TileConfig | None = None,
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Return ``shrink`` for these adapters, as a function of ``x`` and the seed alone.

    It may be called with any ``x`` that is laid out in memory as this one. ``transposed``: the
    adapters are given as ``[K, R]`` (no view of them is kept, whose memory might be replaced).
    """
    m, k, stride_xm, stride_xk = as_rows(x)
    siblings, rank = len(lora_as), lora_as[0].shape[1 if transposed else 0]
    assert all(a.shape[1 if transposed else 0] == rank for a in lora_as), (
        "siblings of different ranks"
    )
    grid, columns, constants = _settings(
        config,
        x.device,
        x.dtype,
        lora_as[0].dtype,
        rank_dtype,
        m,
        k,
        rank,
        siblings,
        dot_precision(rank_dtype),
    )
    splits = grid[1]
    launch = Launch(_shrink_kernel, grid, constants)
    adapters: tuple[_Adapter, ...] = ()
    for a in lora_as:
        stride_ar, stride_ak = reversed(a.stride()) if transposed else a.stride()
        adapters += (_Adapter(a, stride_ar, stride_ak),)
    scalars = (adapters, m, k, rank, columns, stride_xm, stride_xk, gain, threshold)
    device, shape = x.device, (siblings, m, rank)
    new_h = allocator(shape, rank_dtype, device)
    new_bits = allocator((siblings, m, -(-k // 8)), torch.uint8, device) if return_bits else None
    if m == 0:
        return lambda x, seed: (new_h(), None if new_bits is None else new_bits())

    def run(x: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        h, bits = new_h(), None if new_bits is None else new_bits()
        launch(x, seed, h, bits, *scalars)
        return h, bits

    if splits == 1:
        return run
    new_scratch = allocator((splits, *shape), torch.float32, device)
    add = prepare_sums([PartialSum(1.0, 0, splits, siblings * m, rank, rank, 1)])

    def run_split(x: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        h, bits = new_h(), None if new_bits is None else new_bits()
        scratch = new_scratch()
        launch(x, seed, scratch, bits, *scalars)
        add(scratch, (h,))
        return h, bits

    return run_split


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    rank_dtype: torch.dtype,
    m: int,
    k: int,
    rank: int,
    siblings: int,
    precision: str,
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Return the grid, the columns of one split, and the kernel's compile-time arguments."""
    block_r = padded_rank(rank)
    config = config or tile_config_for(
        "shrink", device, rank_dtype, m, k=k, r=rank, siblings=siblings
    )
    together = block_r * siblings
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
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return (-(-m // config.block_m), -(-k // columns)), columns, constants
