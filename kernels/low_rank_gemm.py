"""GEMM with a low-rank term: a frozen linear layer and its adapters, forward or backward.

    forward     y  = x W^T + gain * h B^T + bias
    backward    dx = sum_g dy_g W_g + sum_g keep_g * (dh_g A_g)

Grid: persistent, one program for each processor, each walking tiles of the output.
Why the low-rank product comes after the loop over the depth: there its operands reuse the idle
buffers of the pipeline. Before the loop they add 12 KiB of shared memory at rank 16 and over 100 at
rank 256, and 128 x 256 x 64 does not launch from rank 64 on. Why it needs no buffer and no
rounding of ``gain * B``: the fp32 accumulator is divided by the gain before the product and
multiplied after it.

Under a dropout mask the low-rank product cannot share the accumulator. It is finished in ``parts``
columns pieces of the tile, so that the second accumulator is a fraction of the first.

The split at ``h`` is LoRAFusion's idea (Zhu et al., 2025, https://arxiv.org/abs/2510.00206).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .dtypes import dot, dot_precision
from .philox import expand_bits, load_bits
from .tile_config import (
    DeviceLimits,
    TileConfig,
    device_limits,
    has_descriptors,
    padded_rank,
    tile_config_for,
)
from .tile_order import grouped_tile, load_tile, store_tile

# How much of the rank enters one product: (128 + 256) x 64 bf16 operands are 48 KiB, less than the
# pipeline's buffers that they reuse.
_MAX_BLOCK_R = 64


class _Frozen(NamedTuple):
    """One frozen product ``left [M, depth] @ right``: tensors, or descriptors of them."""

    left: Any
    stride_lm: int
    stride_lk: int
    right: Any  # stored [N, depth] in the forward form, [depth, N] in the backward
    stride_rn: int
    stride_rk: int
    depth: int


class _LowRank(NamedTuple):
    """One low-rank product ``h [M, R] @ q [R, N]`` and the mask on it."""

    h: Tensor
    stride_hm: int
    q: Tensor
    stride_qr: int
    stride_qn: int
    rank: int
    mask: Tensor  # seed, bytes, or anything where MASK is "none"
    stride_mask: int


@triton.jit
def _frozen_product(
    accumulator, frozen, first_row, M, first_column, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RIGHT_IS_TRANSPOSED: tl.constexpr, USE_DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``left @ right`` to a tile."""
    for k in range(0, frozen.depth, BLOCK_K):
        if USE_DESCRIPTORS:
            left = frozen.left.load([first_row, k])
            if RIGHT_IS_TRANSPOSED:
                right = frozen.right.load([first_column, k]).T
            else:
                right = frozen.right.load([k, first_column])
        else:
            left = load_tile(
                frozen.left, frozen.stride_lm, frozen.stride_lk, first_row, M, k, frozen.depth,
                BLOCK_M, BLOCK_K,
            )  # fmt: skip
            right = load_tile(
                frozen.right, frozen.stride_rk, frozen.stride_rn, k, frozen.depth, first_column, N,
                BLOCK_K, BLOCK_N,
            )  # fmt: skip
        accumulator = dot(left, right, accumulator, PRECISION)
    return accumulator


@triton.jit
def _low_rank_product(
    accumulator, term, first_row, M, first_column, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``h @ q`` to a tile, in chunks of the rank; ``q`` is cast to the dtype of ``h``."""
    for r in tl.range(0, term.rank, BLOCK_R, num_stages=1):
        h = load_tile(term.h, term.stride_hm, 1, first_row, M, r, term.rank, BLOCK_M, BLOCK_R)
        q = load_tile(
            term.q, term.stride_qr, term.stride_qn, r, term.rank, first_column, N, BLOCK_R, BLOCK_N
        )
        accumulator = dot(h, q.to(h.dtype), accumulator, PRECISION)
    return accumulator


@triton.jit
def _column_parts(tile, PARTS: tl.constexpr):
    """Split a tile into 1, 2 or 4 pieces of its columns, from left to right."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4)
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))
        if PARTS == 2:
            parts = (left, right)
        else:
            a, b = tl.split(tl.permute(tl.reshape(left, (M, 2, N // 4)), (0, 2, 1)))
            c, d = tl.split(tl.permute(tl.reshape(right, (M, 2, N // 4)), (0, 2, 1)))
            parts = (a, b, c, d)
    return parts


@triton.jit(do_not_specialize=["M", "gain", "threshold"])
def _low_rank_gemm_kernel(
    # tensors
    out,
    frozen,
    low_rank,
    bias_ptr,
    # sizes
    M,
    N,
    # strides, in elements; the last dimension of out and of every h is contiguous
    stride_om,
    # run-time scalars
    gain,
    threshold,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    RIGHT_IS_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bits" or "seed"
    USE_DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    for tile in range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        row_block, column_block = grouped_tile(tile, row_blocks, column_blocks, GROUP_M)
        first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for g in tl.static_range(len(frozen)):
            accumulator = _frozen_product(
                accumulator, frozen[g], first_row, M, first_column, N, BLOCK_M, BLOCK_N, BLOCK_K,
                RIGHT_IS_TRANSPOSED, USE_DESCRIPTORS, PRECISION,
            )  # fmt: skip
        if MASK == "none" and len(low_rank) > 0:
            accumulator = accumulator * (1.0 / gain)
            for g in tl.static_range(len(low_rank)):
                accumulator = _low_rank_product(
                    accumulator, low_rank[g], first_row, M, first_column, N,
                    BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
                )  # fmt: skip
            accumulator = accumulator * gain
        parts = _column_parts(accumulator, PARTS)
        for number in tl.static_range(PARTS):
            part = parts[number]
            column = first_column + number * PART_N
            if MASK != "none":
                for g in tl.static_range(len(low_rank)):
                    zeros = tl.zeros((BLOCK_M, PART_N), tl.float32)
                    term = _low_rank_product(
                        zeros, low_rank[g], first_row, M, column, N,
                        BLOCK_M, PART_N, BLOCK_R, PRECISION,
                    )  # fmt: skip
                    bits = load_bits(
                        low_rank[g].mask, low_rank[g].stride_mask, first_row, M, column, N,
                        threshold, MASK == "seed", BLOCK_M, PART_N,
                    )  # fmt: skip
                    keep = expand_bits(bits, BLOCK_M, PART_N)
                    part += gain * tl.where(keep, term, 0.0)
            if HAS_BIAS:
                columns = column + tl.arange(0, PART_N)
                bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
                part += bias.to(tl.float32)[None, :]
            if USE_DESCRIPTORS:
                out.store([first_row, column], part.to(out.dtype))
            else:
                store_tile(out, stride_om, 1, first_row, M, column, N, part, BLOCK_M, PART_N)


def low_rank_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    gain: float,
    *,
    config: TileConfig | None = None,
) -> Tensor:
    """Launch the forward form: ``y = x weight^T + gain * h lora_b^T + bias``, rounded once.

    Args:
        x: ``[M, K]`` in the dtype of ``weight``, any strides.
        weight: ``[N, K]``, any strides.
        bias: ``[N]`` or ``None``.
        h: ``[M, R]``, rows contiguous, in the dtype of the low-rank product.
        lora_b: ``[N, R]``, any strides and float dtype.
        gain: factor of the low-rank term; 0 leaves it out.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        ``[M, N]`` in the dtype of ``weight``.
    """
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty((m, n))
    config = config or tile_config_for(
        "low_rank_gemm", x.device, x.dtype, m, n=n, k=k, r=lora_b.shape[1]
    )
    terms = [_LowRank(h, h.stride(0), lora_b, lora_b.stride(1), lora_b.stride(0), h.shape[1], h, 0)]
    _launch(y, [(x, weight)], terms if gain else [], bias, gain, "none", 0, True, config)
    return y


def input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dhs: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    masks: Sequence[Tensor] | None = None,
    threshold: int = 0,
    *,
    grad_dtype: torch.dtype,
    config: TileConfig | None = None,
) -> Tensor:
    """Launch the backward form: ``dx = sum_g dy_g weight_g + sum_g keep_g * (dh_g lora_a_g)``.

    Args:
        dys: for each adapter ``[M, N_g]`` in the dtype of the weights, any strides; may be empty,
            with ``weights``, which leaves the low-rank term alone.
        weights: for each adapter ``[N_g, K]``, any strides.
        dhs: for each adapter ``[M, R_g]``, rows contiguous.
        lora_as: for each adapter ``[R_g, K]``, any strides and float dtype.
        masks: for each adapter uint8 bits ``[M, ceil(K / 8)]`` or its seed (int64); ``None``: no
            dropout.
        threshold: ``round(p * 65536)``; only a seed needs it.
        grad_dtype: of the result.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        ``[M, K]`` in ``grad_dtype``.
    """
    m, k = dhs[0].shape[0], lora_as[0].shape[1]
    dx = dhs[0].new_empty((m, k), dtype=grad_dtype)
    dtype = weights[0].dtype if weights else dhs[0].dtype
    depth = weights[0].shape[0] if weights else 0
    rank = max(a.shape[0] for a in lora_as)
    config = config or tile_config_for("input_grad", dx.device, dtype, m, n=depth, k=k, r=rank)
    mask_kind = "none" if masks is None else "bits" if masks[0].dtype == torch.uint8 else "seed"
    if mask_kind == "seed" and config.block_n > 128:
        # Drawing takes registers: 128 x 256 would spill 400 bytes a thread (sm_90, 8 warps).
        config = replace(config, block_n=128)
    terms = [
        _LowRank(
            dh,
            dh.stride(0),
            a,
            a.stride(0),
            a.stride(1),
            a.shape[0],
            dh if masks is None else masks[g],
            masks[g].stride(0) if masks is not None and mask_kind == "bits" else 0,
        )
        for g, (dh, a) in enumerate(zip(dhs, lora_as, strict=True))
    ]
    products = list(zip(dys, weights, strict=True))
    _launch(dx, products, terms, None, 1.0, mask_kind, threshold, False, config)
    return dx


def _launch(
    out: Tensor,
    products: Sequence[tuple[Tensor, Tensor]],
    terms: Sequence[_LowRank],
    bias: Tensor | None,
    gain: float,
    mask: str,
    threshold: int,
    forward: bool,
    config: TileConfig,
) -> None:
    m, n = out.shape
    if m == 0:
        return
    limits = device_limits(out.device)
    operands = (out, *(tensor for pair in products for tensor in pair))
    descriptors = has_descriptors(limits) and all(map(_can_be_described, operands))
    frozen = tuple(_frozen(left, right, forward, descriptors, config) for left, right in products)
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    part = [config.block_m, config.block_n // config.parts]
    _low_rank_gemm_kernel[(min(tiles, limits.processors),)](
        TensorDescriptor.from_tensor(out, part) if descriptors else out,
        frozen,
        tuple(terms),
        out if bias is None else bias,
        m,
        n,
        out.stride(0),
        gain,
        threshold,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=min(_MAX_BLOCK_R, max((padded_rank(term.rank) for term in terms), default=16)),
        GROUP_M=config.group_m,
        PARTS=config.parts,
        RIGHT_IS_TRANSPOSED=forward,
        HAS_BIAS=bias is not None,
        MASK=mask,
        USE_DESCRIPTORS=descriptors,
        PRECISION=_precision(limits, products, terms),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _precision(
    limits: DeviceLimits, products: Sequence[tuple[Tensor, Tensor]], terms: Sequence[_LowRank]
) -> str:
    if limits.capability >= 80 and products and products[0][0].dtype != torch.float32:
        # An fp32 low-rank term of a half-precision result: three TF32 products keep 22 bits of it,
        # and exact fp32 would spill (no tensor cores).
        return "tf32x3"
    return dot_precision(terms[0].h.dtype if terms else torch.float32)


def _frozen(
    left: Tensor, right: Tensor, forward: bool, descriptors: bool, config: TileConfig
) -> _Frozen:
    depth = left.shape[1]
    along_n, along_k = (0, 1) if forward else (1, 0)
    strides = (left.stride(0), left.stride(1)), (right.stride(along_n), right.stride(along_k))
    if not descriptors:
        return _Frozen(left, *strides[0], right, *strides[1], depth)
    right_tile = [config.block_n, config.block_k] if forward else [config.block_k, config.block_n]
    return _Frozen(
        TensorDescriptor.from_tensor(left, [config.block_m, config.block_k]),
        *strides[0],
        TensorDescriptor.from_tensor(right, right_tile),
        *strides[1],
        depth,
    )


def _can_be_described(tensor: Tensor) -> bool:
    """Return whether the tensor memory accelerator can copy tiles of it: 16-byte aligned rows."""
    row, column = tensor.stride()
    return (
        column == 1
        and row >= tensor.shape[1]  # an expanded gradient has rows with stride 0
        and row * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        and tensor.shape[1] > 0
    )
