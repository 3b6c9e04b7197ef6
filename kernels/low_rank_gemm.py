"""GEMM with a low-rank term: a frozen linear layer and its adapters, forward or backward.

    forward     y  = x W^T + gain * h B^T + bias
    backward    dx = sum_g dy_g W_g + sum_g keep_g * (dh_g A_g)

Either form works without its frozen products: what the hybrid plan writes before cuBLAS adds them.

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

from .dtypes import dot_precision
from .gemm_tile import column_parts, frozen_product, low_rank_product
from .philox import expand_bits, load_bits, mask_kind
from .tile_config import (
    TileConfig,
    cached_by_shape,
    device_limits,
    has_aligned_rows,
    has_descriptors,
    padded_rank,
    tile_config_for,
)
from .tile_order import grouped_tile, store_tile

# How much of the rank enters one product. At 64, fp32 terms need more tensor memory than sm_100
# has, and half-precision ones spill 8 to 16 bytes a thread under autocast (sm_90).
_MAX_BLOCK_R = 32
_MAX_FP32_BLOCK_R = 16


# The operands of the frozen products are arguments of their own, because Triton's launcher takes no
# descriptor inside a tuple (3.4 to 3.7); the absent ones are None.
MAX_SIBLINGS = 4


class _Layout(NamedTuple):
    """Strides of one frozen product ``left [M, depth] @ right``, in elements."""

    stride_lm: int
    stride_lk: int
    stride_rn: int  # right is stored [N, depth] in the forward form, [depth, N] in the backward
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


@triton.jit(do_not_specialize=["M", "gain", "threshold"])
def _low_rank_gemm_kernel(
    # operands of the frozen products, of up to four siblings: descriptors or pointers
    left_0,
    right_0,
    left_1,
    right_1,
    left_2,
    right_2,
    left_3,
    right_3,
    layouts,
    # tensors; out and every h are contiguous
    out,
    low_rank,
    bias_ptr,
    # sizes
    M,
    N,
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
    MASK: tl.constexpr,  # "none", "bits" or "seed"; "absent" where there is no low-rank term
    USE_DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    lefts, rights = (left_0, left_1, left_2, left_3), (right_0, right_1, right_2, right_3)
    for tile in range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        row_block, column_block = grouped_tile(tile, row_blocks, column_blocks, GROUP_M)
        first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for g in tl.static_range(len(layouts)):
            accumulator = frozen_product(
                accumulator, lefts[g], rights[g], layouts[g], first_row, M, first_column, N,
                BLOCK_M, BLOCK_N, BLOCK_K, RIGHT_IS_TRANSPOSED, USE_DESCRIPTORS, PRECISION,
            )  # fmt: skip
        if MASK == "none":
            if left_0 is not None:  # zeros need no division, and the term alone any gain
                accumulator = accumulator * (1.0 / gain)
            for g in tl.static_range(len(low_rank)):
                accumulator = low_rank_product(
                    accumulator, low_rank[g], first_row, M, first_column, N,
                    BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
                )  # fmt: skip
            accumulator = accumulator * gain
        parts = column_parts(accumulator, PARTS)
        for number in tl.static_range(PARTS):
            part = parts[number]
            column = first_column + number * PART_N
            if MASK == "bits" or MASK == "seed":
                for g in tl.static_range(len(low_rank)):
                    zeros = tl.zeros((BLOCK_M, PART_N), tl.float32)
                    term = low_rank_product(
                        zeros, low_rank[g], first_row, M, column, N,
                        BLOCK_M, PART_N, BLOCK_R, PRECISION,
                    )  # fmt: skip
                    bits = load_bits(
                        low_rank[g].mask, low_rank[g].stride_mask, first_row, M, column, N, g,
                        threshold, MASK == "seed", BLOCK_M, PART_N,
                    )  # fmt: skip
                    keep = expand_bits(bits, BLOCK_M, PART_N)
                    part += gain * tl.where(keep, term, 0.0)
            if bias_ptr is not None:
                columns = column + tl.arange(0, PART_N)
                bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
                part += bias.to(tl.float32)[None, :]
            if USE_DESCRIPTORS:
                out.store([first_row, column], part.to(out.dtype))
            else:
                store_tile(out, N, 1, first_row, M, column, N, part, BLOCK_M, PART_N)


def low_rank_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    gain: float,
    *,
    aligned: bool | None = None,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Launch the forward form: ``y = x weight^T + gain * h lora_b^T + bias``, rounded once.

    Args:
        x: ``[M, K]`` in the dtype of ``weight``, any strides.
        weight: ``[N, K]``, any strides.
        bias: ``[N]``, contiguous, or ``None``.
        h: ``[M, R]``, rows contiguous, in the dtype of the low-rank product.
        lora_b: ``[N, R]``, any strides and float dtype.
        gain: factor of the low-rank term; 0 leaves it out. Its inverse must be an fp32 number.
        aligned: what ``has_aligned_rows`` says of x, weight and the result, if the caller knows.
        out: the result if the caller has made it: ``[..., N]``, contiguous, M rows in all.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        ``[M, N]`` in the dtype of ``weight``.
    """
    y = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
    terms, kind, rank = (), "absent", lora_b.shape[1]
    if gain:
        stride_bn, stride_br = lora_b.stride()
        terms = (_LowRank(h, h.stride(0), lora_b, stride_br, stride_bn, rank, h, 0),)
        kind = "none"
    _launch(y, (x,), (weight,), terms, bias, gain, 0, True, rank, kind, aligned, config)
    return y


def low_rank_term(
    h: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    gain: float,
    *,
    dtype: torch.dtype,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Launch the forward form without a frozen product: ``gain * h lora_b^T + bias``, rounded once.

    Args:
        h: ``[M, R]``, rows contiguous, in the dtype of the product.
        lora_b: ``[N, R]``, any strides and float dtype.
        bias: ``[N]``, contiguous, or ``None``.
        gain: factor of the product, any number.
        dtype: of the result.
        out: the result if the caller has made it: ``[..., N]``, contiguous, M rows in all.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        ``[M, N]``, contiguous.
    """
    y = h.new_empty((h.shape[0], lora_b.shape[0]), dtype=dtype) if out is None else out
    rank, (stride_bn, stride_br) = lora_b.shape[1], lora_b.stride()
    terms = (_LowRank(h, h.stride(0), lora_b, stride_br, stride_bn, rank, h, 0),)
    _launch(y, (), (), terms, bias, gain, 0, True, rank, "none", None, config)
    return y


def input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dhs: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    mask: Sequence[Tensor] | Tensor | None = None,
    threshold: int = 0,
    *,
    grad_dtype: torch.dtype,
    aligned: bool | None = None,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Launch the backward form: ``dx = sum_g dy_g weight_g + sum_g keep_g * (dh_g lora_a_g)``.

    Args:
        dys: for each adapter, at most four, ``[M, N_g]`` in the dtype of the weights, any strides;
            may be empty, with ``weights``, which leaves the low-rank terms alone.
        weights: for each adapter ``[N_g, K]``, any strides.
        dhs: for each adapter ``[M, R_g]``, rows contiguous.
        lora_as: for each adapter ``[R_g, K]``, any strides and float dtype.
        mask: for each adapter uint8 bits ``[M, ceil(K / 8)]``; or a seed (one int64), of which
            adapter g draws stream g; or ``None``: no dropout.
        threshold: ``round(p * 65536)``; only a seed needs it.
        grad_dtype: of the result.
        aligned: what ``has_aligned_rows`` says of the dys, weights and the result, if known.
        out: the result if the caller has made it: ``[..., K]``, contiguous, M rows in all.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        ``[M, K]`` in ``grad_dtype``.
    """
    dx = out
    if dx is None:
        dx = dhs[0].new_empty((dhs[0].shape[0], lora_as[0].shape[1]), dtype=grad_dtype)
    terms, largest = (), 0
    for g, (dh, a) in enumerate(zip(dhs, lora_as, strict=True)):
        rank, stride_ar, stride_ak = a.shape[0], *a.stride()
        largest = max(largest, rank)
        keep, stride_mask = dh, 0
        if isinstance(mask, Tensor):
            keep = mask
        elif mask is not None:
            keep = mask[g]
            stride_mask = keep.stride(0)
        terms += (_LowRank(dh, dh.stride(0), a, stride_ar, stride_ak, rank, keep, stride_mask),)
    assert len(dys) <= MAX_SIBLINGS, f"{len(dys)} siblings, at most {MAX_SIBLINGS}"
    kind = mask_kind(mask)
    _launch(dx, dys, weights, terms, None, 1.0, threshold, False, largest, kind, aligned, config)
    return dx


def _launch(
    out: Tensor,
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    terms: tuple[_LowRank, ...],
    bias: Tensor | None,
    gain: float,
    threshold: int,
    forward: bool,
    rank: int,
    mask: str,
    aligned: bool | None,
    config: TileConfig | None,
) -> None:
    n = out.shape[-1]
    m = (terms[0].h if terms else lefts[0]).shape[0]
    if m == 0:
        return
    if aligned is None:
        rows_of_out = out.element_size() * n % 16 == 0 and out.data_ptr() % 16 == 0
        aligned = rows_of_out and all(map(has_aligned_rows, (*lefts, *rights)))
    h_dtype = terms[0].h.dtype if terms else out.dtype
    dtype, depth, layouts = h_dtype, 0, ()
    for left, right in zip(lefts, rights, strict=True):
        (stride_lm, stride_lk), (stride_rn, stride_rk) = left.stride(), right.stride()
        if not forward:
            stride_rn, stride_rk = stride_rk, stride_rn
        dtype, width = left.dtype, left.shape[1]
        layouts += (_Layout(stride_lm, stride_lk, stride_rn, stride_rk, width),)
        depth += width
    fp32_term = h_dtype == torch.float32
    precision = dot_precision(torch.float32 if fp32_term else dtype)
    grid, described, out_tile, left_tile, right_tile, constants = _settings(
        config,
        out.device,
        dtype,
        m,
        n,
        depth,
        rank,
        len(terms),
        forward,
        mask,
        aligned,
        fp32_term,
        precision,
    )
    sources: list[Any] = [None] * (2 * MAX_SIBLINGS)
    sources[0 : 2 * len(lefts) : 2] = lefts
    sources[1 : 2 * len(lefts) : 2] = rights
    target: Any = out
    if described:
        for g in range(0, 2 * len(lefts), 2):
            sources[g] = _describe(sources[g], left_tile)
            sources[g + 1] = _describe(sources[g + 1], right_tile)
        target = _descriptor(out, [m, n], [n, 1], out_tile)
    _low_rank_gemm_kernel[grid](
        *sources, layouts, target, terms, bias, m, n, gain, threshold, **constants
    )


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    m: int,
    n: int,
    depth: int,
    rank: int,
    siblings: int,
    forward: bool,
    mask: str,
    aligned: bool,
    fp32_term: bool,
    precision: str,
) -> tuple[tuple[int], bool, list[int], list[int], list[int], dict[str, Any]]:
    """Return what a launch is made of.

    The grid, whether tiles are copied by descriptors, the tiles of the result and of the two
    operands, and the kernel's compile-time arguments.
    """
    limits = device_limits(device)
    half = dtype != torch.float32
    if config is None:
        config = tile_config_for(
            "low_rank_gemm" if forward else "input_grad",
            device,
            dtype,
            m,
            n=n if forward else depth,
            k=depth if forward else n,
            r=rank,
            siblings=max(1, siblings),
            wide_rank=fp32_term and half,
            aligned=aligned,
        )
    if mask == "seed" and config.block_n > 128:
        # Drawing takes registers: 128 x 256 would spill 400 bytes a thread (sm_90, 8 warps).
        config = replace(config, block_n=128)
    if half and fp32_term and limits.capability >= 80:
        # An fp32 low-rank term of a half-precision result: three TF32 products keep 22 bits of it,
        # and exact fp32 would spill (no tensor cores).
        precision = "tf32x3"
    # One program fills a processor, but for the low-rank term alone: small tiles without a
    # pipeline.
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    described = aligned and has_descriptors(limits)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": min(_MAX_FP32_BLOCK_R if fp32_term else _MAX_BLOCK_R, padded_rank(rank)),
        "GROUP_M": config.group_m,
        "PARTS": config.parts,
        "RIGHT_IS_TRANSPOSED": forward,
        "MASK": mask,
        "USE_DESCRIPTORS": described,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return (
        (min(tiles, limits.processors * (1 if depth else 8)),),
        described,
        [config.block_m, config.block_n // config.parts],
        [config.block_m, config.block_k],
        [config.block_n, config.block_k] if forward else [config.block_k, config.block_n],
        constants,
    )


def _describe(matrix: Tensor, tile: list[int]) -> TensorDescriptor:
    """Return ``TensorDescriptor.from_tensor(matrix, tile)`` of a matrix with aligned rows."""
    return _descriptor(matrix, list(matrix.shape), list(matrix.stride()), tile)


def _descriptor(
    tensor: Tensor, shape: list[int], strides: list[int], tile: list[int]
) -> TensorDescriptor:
    """Return a descriptor without its own checks, which ``has_aligned_rows`` has made.

    They take 1.5 us of the host's time each, and a forward has three.
    """
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.__dict__.update(
        base=tensor,
        shape=shape,
        strides=strides,
        block_shape=tile,
        padding="zero",
        round_f32_to_tf32=False,
    )
    return descriptor
