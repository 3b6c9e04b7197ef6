"""GEMM with a low-rank term: frozen linear layers and their adapters, forward or backward.

    forward     y_g = scale_g * (x W_g^T + gain_g * h_g B_g^T) + bias_g        for every sibling g
    backward    dx  = sum_g dy_g W_g + sum_g keep_g * (dh_g A_g)

Either form works without its frozen products: what the hybrid plan writes before cuBLAS adds them.

Grid: persistent, one program for each processor, each walking tiles of the outputs, one sibling's
after the other's. Why siblings share a launch forward too: k and v of a grouped-query model have
too few tiles to fill a device alone (N = 512 and M = 2048: 32 tiles of 128 x 256, 132 processors).
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

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import dot_precision
from .gemm_tile import (
    column_parts,
    frozen_product,
    low_rank_product,
    next_first_tile,
    store_part,
)
from .launch import Launch, describe, form_of
from .layout import are_aligned, as_rows, mask_kind
from .philox import expand_bits, load_bits
from .tile_config import (
    TileConfig,
    cached_by_shape,
    device_limits,
    has_descriptors,
    padded_rank,
    tile_config_for,
)
from .tile_order import grouped_tile, store_tile

# How much of the rank enters one product. At 64, fp32 terms need more tensor memory than sm_100
# has, and half-precision ones spill 8 to 16 bytes a thread under autocast (sm_90).
_MAX_BLOCK_R = 32
_MAX_FP32_BLOCK_R = 16


# The operands of the frozen products and the outputs are arguments of their own, because Triton's
# launcher takes no descriptor inside a tuple (3.4 to 3.7); the absent ones are None.
MAX_SIBLINGS = 4


class _Frozen(NamedTuple):
    """Strides of one frozen product ``left [M, depth] @ right``, in elements."""

    stride_lm: int
    stride_lk: int
    stride_rn: int  # right is stored [N, depth] in the forward form, [depth, N] in the backward
    stride_rk: int
    depth: int


class _LowRank(NamedTuple):
    """One low-rank product ``h_g [M, R] @ q [R, N]``.

    Where its part of h and of the mask begins is given, because computing it in the kernel takes
    registers: three siblings with bits then spill 8 bytes a thread in 128 x 256 (sm_90).
    """

    q: Tensor
    stride_qr: int
    stride_qn: int
    first_h: int  # the element of h at which h_g begins
    first_byte: int  # of the mask's bits
    stride_mask: int  # from one row of them to the next


class _Output(NamedTuple):
    """What one output needs beside the products."""

    columns: int
    gain: float
    bias: Tensor | None = None
    scale: Tensor | None = None  # of each column (DoRA), fp32
    unscaled: Tensor | None = None  # [M, N], contiguous: also written, before scale and bias


@triton.jit(do_not_specialize=["M", "threshold"])
def _low_rank_gemm_kernel(
    # of each product and output, see the tuples above
    frozen,
    outputs,
    low_rank,
    # tensors, contiguous
    h_ptr,  # [siblings, M, R]
    mask_ptr,  # a seed, or bits [siblings, M, ceil(N / 8)]
    # sizes
    M,
    R,
    # run-time scalar
    threshold,
    # operands of the frozen products, of up to four siblings, and outputs: descriptors or pointers
    left_0,  # forward the only one
    left_1,
    left_2,
    left_3,
    right_0,
    right_1,
    right_2,
    right_3,
    out_0,
    out_1,
    out_2,
    out_3,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    SIBLINGS: tl.constexpr,
    FORWARD: tl.constexpr,  # an output for each sibling; right is transposed
    HAS_FROZEN: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bits" or "seed"
    USE_DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PART_N: tl.constexpr = BLOCK_N // PARTS
    lefts, rights = (left_0, left_1, left_2, left_3), (right_0, right_1, right_2, right_3)
    outs = (out_0, out_1, out_2, out_3)
    first_tile = tl.program_id(0)
    # SIBLINGS and not len(): before Triton 3.7 a tuple that holds None has no length.
    for o in tl.static_range(SIBLINGS if FORWARD else 1):
        output, out = outputs[o], outs[o]
        N = output.columns
        row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
        tiles = row_blocks * column_blocks
        for tile in range(first_tile, tiles, tl.num_programs(0)):
            row_block, column_block = grouped_tile(tile, row_blocks, column_blocks, GROUP_M)
            first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
            accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for g in tl.static_range(SIBLINGS if HAS_FROZEN else 0):
                if not FORWARD or g == o:
                    left = left_0 if FORWARD else lefts[g]
                    accumulator = frozen_product(
                        accumulator, left, rights[g], frozen[g], first_row, M, first_column, N,
                        BLOCK_M, BLOCK_N, BLOCK_K, FORWARD, USE_DESCRIPTORS, PRECISION,
                    )  # fmt: skip
            if MASK == "none":
                if HAS_FROZEN:  # zeros need no division, and the term alone any gain
                    accumulator = accumulator * (1.0 / output.gain)
                for g in tl.static_range(SIBLINGS):
                    if not FORWARD or g == o:
                        accumulator = low_rank_product(
                            accumulator, h_ptr, low_rank[g], first_row, M, first_column, N, R,
                            BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
                        )  # fmt: skip
                accumulator = accumulator * output.gain
            parts = column_parts(accumulator, PARTS)
            for number in tl.static_range(PARTS):
                part = parts[number]
                column = first_column + number * PART_N
                if MASK != "none":
                    for g in tl.static_range(SIBLINGS):
                        zeros = tl.zeros((BLOCK_M, PART_N), tl.float32)
                        term = low_rank_product(
                            zeros, h_ptr, low_rank[g], first_row, M, column, N, R,
                            BLOCK_M, PART_N, BLOCK_R, PRECISION,
                        )  # fmt: skip
                        mask = mask_ptr
                        if MASK == "bits":
                            mask = mask_ptr + tl.cast(low_rank[g].first_byte, tl.int64)
                        bits = load_bits(
                            mask, low_rank[g].stride_mask, first_row, M, column, N, g, threshold,
                            MASK == "seed", BLOCK_M, PART_N,
                        )  # fmt: skip
                        part += tl.where(expand_bits(bits, BLOCK_M, PART_N), term, 0.0)
                if output.unscaled is not None:
                    store_tile(
                        output.unscaled, N, 1, first_row, M, column, N, part, BLOCK_M, PART_N
                    )
                if output.scale is not None:
                    columns = column + tl.arange(0, PART_N)
                    scale = tl.load(output.scale + columns, mask=columns < N, other=0.0)
                    part *= scale.to(tl.float32)[None, :]
                store_part(
                    out, part, output.bias, first_row, M, column, N,
                    BLOCK_M, PART_N, USE_DESCRIPTORS,
                )  # fmt: skip
        first_tile = next_first_tile(first_tile, tiles)


def low_rank_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    h: Tensor,
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    *,
    aligned: bool | None = None,
    config: TileConfig | None = None,
) -> list[Tensor]:
    """Launch the forward form: ``y_g = x weight_g^T + gain_g * h_g lora_b_g^T + bias_g``.

    Args:
        x: ``[M, K]`` in the dtype of the weights, any strides.
        weights: for each sibling, at most four, ``[N_g, K]``, any strides.
        biases: for each ``[N_g]``, contiguous, or ``None``.
        h: ``[S, M, R]`` of S siblings, contiguous, in the dtype of the low-rank product.
        lora_bs: for each ``[N_g, R]``, any strides and float dtype.
        gains: for each the factor of its low-rank term, whose inverse must be an fp32 number.
        aligned: what ``has_aligned_rows`` says of x, weights and results, if the caller knows.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        For each ``[M, N_g]`` in the dtype of the weights, rounded once.
    """
    m = as_rows(x)[0]
    ys = [x.new_empty((m, weight.shape[0])) for weight in weights]
    run = prepare_low_rank_gemm(
        x, weights, biases, lora_bs, gains, rank_dtype=h.dtype, aligned=aligned, config=config
    )
    run(x, h, ys)
    return ys


def prepare_low_rank_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    *,
    rank_dtype: torch.dtype,
    aligned: bool | None = None,
    config: TileConfig | None = None,
) -> Callable[[Tensor, Tensor, Sequence[Tensor]], None]:
    """Return ``low_rank_gemm`` for these weights, as a function of ``x``, ``h`` and the results.

    It may be called with any ``x`` that is laid out in memory as this one. The results are
    contiguous, of any leading dimensions.
    """
    run = _prepare_forward(x, weights, biases, lora_bs, gains, rank_dtype, aligned, config)
    return lambda x, h, ys: run((x,), h, None, ys)


def prepare_scaled_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    *,
    rank_dtype: torch.dtype,
    aligned: bool | None = None,
    config: TileConfig | None = None,
) -> Callable[..., None]:
    """Return the forward form with scaled columns, as a function of what a call brings.

        y_g = scale_g * (x weight_g^T + gain_g * h_g lora_b_g^T) + bias_g

    That is of ``x``, ``h``, the results, for each a scale ``[N_g]`` (fp32, contiguous), and for
    each where to write the result without scale and bias as well, or ``None`` for all (see
    ``prepare_low_rank_gemm`` for the rest).
    """
    outputs = _outputs(weights, biases, gains)
    launches: dict[bool, Callable[..., None]] = {}  # what is written is compiled in

    def run(
        x: Tensor,
        h: Tensor,
        ys: Sequence[Tensor],
        scales: Sequence[Tensor],
        unscaled: Sequence[Tensor] | None,
    ) -> None:
        kept: Sequence[Tensor | None] = unscaled or [None] * len(scales)
        each = zip(outputs, scales, kept, strict=True)
        scaled = tuple([output._replace(scale=c, unscaled=u) for output, c, u in each])
        keeps = unscaled is not None
        if keeps not in launches:
            launches[keeps] = _prepare_forward(
                x, weights, biases, lora_bs, gains, rank_dtype, aligned, config
            )
        launches[keeps]((x,), h, None, ys, scaled)

    return run


def low_rank_term(
    h: Tensor,
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gains: Sequence[float],
    *,
    dtype: torch.dtype,
    config: TileConfig | None = None,
) -> list[Tensor]:
    """Launch the forward form without frozen products: ``gain_g * h_g lora_b_g^T + bias_g``.

    Args:
        h: ``[S, M, R]`` of S siblings, contiguous, in the dtype of the product.
        lora_bs: for each sibling ``[N_g, R]``, any strides and float dtype.
        biases: for each ``[N_g]``, contiguous, or ``None``.
        gains: for each the factor of its product, any number.
        dtype: of the results.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        For each ``[M, N_g]``, contiguous, rounded once.
    """
    ys = [h.new_empty((h.shape[1], lora_b.shape[0]), dtype=dtype) for lora_b in lora_bs]
    run = prepare_low_rank_term(
        lora_bs, biases, gains, m=h.shape[1], dtype=dtype, rank_dtype=h.dtype, config=config
    )
    run(h, ys)
    return ys


def prepare_low_rank_term(
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gains: Sequence[float],
    *,
    m: int,
    dtype: torch.dtype,
    rank_dtype: torch.dtype,
    config: TileConfig | None = None,
) -> Callable[[Tensor, Sequence[Tensor]], None]:
    """Return ``low_rank_term`` for these adapters, as a function of ``h`` and the results."""
    aligned = are_aligned(dtype, [lora_b.shape[0] for lora_b in lora_bs])
    run = _prepare(
        [], [], _outputs(lora_bs, biases, gains), _terms(lora_bs, m), m, device=lora_bs[0].device,
        rank_dtype=rank_dtype, forward=True, aligned=aligned, config=config,
    )  # fmt: skip
    return lambda h, ys: run((), h, None, ys)


def input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dh: Tensor,
    lora_as: Sequence[Tensor],
    mask: Tensor | None = None,
    threshold: int = 0,
    *,
    grad_dtype: torch.dtype,
    aligned: bool | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Launch the backward form: ``dx = sum_g dy_g weight_g + sum_g keep_g * (dh_g lora_a_g)``.

    Args:
        dys: for each sibling, at most four, ``[M, N_g]`` in the dtype of the weights, any strides;
            may be empty, with ``weights``, which leaves the low-rank terms alone.
        weights: for each sibling ``[N_g, K]``, any strides.
        dh: ``[S, M, R]`` of S siblings, contiguous.
        lora_as: for each sibling ``[R, K]``, any strides and float dtype.
        mask: uint8 bits ``[S, M, ceil(K / 8)]``, contiguous; or a seed (one int64), of which
            sibling g draws stream g; or ``None``: no dropout.
        threshold: ``round(p * 65536)``; only a seed needs it.
        grad_dtype: of the result.
        aligned: what ``has_aligned_rows`` says of the dys, weights and the result, if known.
        config: the tile; by default the tuned one, or one that runs everywhere.

    Returns:
        ``[M, K]`` in ``grad_dtype``.
    """
    dx = dh.new_empty((dh.shape[1], lora_as[0].shape[1]), dtype=grad_dtype)
    run = prepare_input_grad(
        dys, weights, lora_as, mask_kind(mask), threshold, m=dh.shape[1], rank_dtype=dh.dtype,
        grad_dtype=grad_dtype, aligned=aligned, config=config,
    )  # fmt: skip
    run(dys, dh, mask, dx)
    return dx


def prepare_input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    mask: str,
    threshold: int,
    *,
    m: int,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    aligned: bool | None = None,
    config: TileConfig | None = None,
) -> Callable[[Sequence[Tensor], Tensor, Tensor | None, Tensor], None]:
    """Return ``input_grad`` for these weights, as a function of dys, ``dh``, mask and the result.

    It may be called with any dys that are laid out in memory as these. The result is contiguous, of
    any leading dimensions.
    """
    k = lora_as[0].shape[1]
    if aligned is None:
        aligned = are_aligned(grad_dtype, [k], (*dys, *weights))
    terms: tuple[_LowRank, ...] = ()
    for g, a in enumerate(lora_as):
        stride_ar, stride_ak = a.stride()
        row_bytes = -(-k // 8)
        first = g * m * a.shape[0], g * m * row_bytes
        terms += (_LowRank(a, stride_ar, stride_ak, *first, row_bytes),)
    run = _prepare(
        dys, weights, (_Output(k, 1.0),), terms, m, mask, threshold,
        device=lora_as[0].device, rank_dtype=rank_dtype, forward=False, aligned=aligned,
        config=config,
    )  # fmt: skip
    return lambda dys, dh, mask, dx: run(dys, dh, mask, (dx,))


def _prepare_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    rank_dtype: torch.dtype,
    aligned: bool | None,
    config: TileConfig | None,
) -> Callable[..., None]:
    m = as_rows(x)[0]
    if aligned is None:
        aligned = are_aligned(x.dtype, [weight.shape[0] for weight in weights], (x, *weights))
    return _prepare(
        [x], weights, _outputs(weights, biases, gains), _terms(lora_bs, m), m, device=x.device,
        rank_dtype=rank_dtype, forward=True, aligned=aligned, config=config,
    )  # fmt: skip


def _terms(lora_bs: Sequence[Tensor], m: int) -> tuple[_LowRank, ...]:
    terms: tuple[_LowRank, ...] = ()
    for g, b in enumerate(lora_bs):
        stride_bn, stride_br = b.stride()
        terms += (_LowRank(b, stride_br, stride_bn, g * m * b.shape[1], 0, 0),)
    return terms


def _outputs(
    matrices: Sequence[Tensor], biases: Sequence[Tensor | None], gains: Sequence[float]
) -> tuple[_Output, ...]:
    triples = zip(matrices, biases, gains, strict=True)
    return tuple([_Output(matrix.shape[0], gain, bias) for matrix, bias, gain in triples])


def _prepare(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    outputs: tuple[_Output, ...],
    terms: tuple[_LowRank, ...],
    m: int,
    mask: str = "none",
    threshold: int = 0,
    *,
    device: torch.device,
    rank_dtype: torch.dtype,
    forward: bool,
    aligned: bool,
    config: TileConfig | None,
) -> Callable[..., None]:
    """Return the launch as a function of the left operands, ``h``, the mask and the results.

    And of outputs that differ from the given ones in their scales.
    """
    assert len(terms) <= MAX_SIBLINGS, f"{len(terms)} siblings, at most {MAX_SIBLINGS}"
    rank, *others = (term.q.shape[1 if forward else 0] for term in terms)
    assert all(other == rank for other in others), "siblings of different ranks"
    layouts = [as_rows(left) for left in lefts]
    frozen = frozen_layouts(layouts, rights, forward)
    ns = tuple([output.columns for output in outputs])
    dtype = lefts[0].dtype if lefts else rank_dtype
    grid, described, (out_tile, left_tile, right_tile), constants = _settings(
        config, device, dtype, m, ns, sum(depth for _, depth, *_ in layouts), rank, len(terms),
        forward, mask, aligned, rank_dtype == torch.float32,
        dot_precision(torch.float32 if rank_dtype == torch.float32 else dtype),
    )  # fmt: skip
    sources = _described(rights, right_tile) if described else rights
    left_forms = [form_of(rows, columns, strides, left_tile) for rows, columns, *strides in layouts]
    out_forms = [form_of(m, n, (n, 1), out_tile) for n in ns]
    # What stands between the left operands and the outputs, and what comes after them.
    between = (*[None] * (MAX_SIBLINGS - len(lefts)), *sources)
    between += (None,) * (MAX_SIBLINGS - len(sources))
    after = (None,) * (MAX_SIBLINGS - len(ns))
    launch = Launch(_low_rank_gemm_kernel, grid, constants)

    def run(
        lefts: Sequence[Any],
        h: Tensor,
        mask: Tensor | None,
        outs: Sequence[Any],
        outputs: tuple[_Output, ...] = outputs,
    ) -> None:
        if described:
            lefts = list(map(describe, lefts, left_forms))
            outs = list(map(describe, outs, out_forms))
        launch(frozen, outputs, terms, h, mask, m, rank, threshold, *lefts, *between, *outs, *after)

    return run if m else _nothing


def frozen_layouts(
    layouts: Sequence[tuple[int, int, int, int]], rights: Sequence[Tensor], forward: bool
) -> tuple[_Frozen, ...]:
    """Return how the operands of frozen products lie in memory; forward they share the first."""
    frozen: tuple[_Frozen, ...] = ()
    for g, right in enumerate(rights):
        _, depth, stride_lm, stride_lk = layouts[0 if forward else g]
        stride_rn, stride_rk = right.stride() if forward else reversed(right.stride())
        frozen += (_Frozen(stride_lm, stride_lk, stride_rn, stride_rk, depth),)
    return frozen


def _described(rights: Sequence[Tensor], tile: list[int]) -> list[Any]:
    forms = [
        form_of(rows, columns, strides, tile) for rows, columns, *strides in map(as_rows, rights)
    ]
    return list(map(describe, rights, forms))


def _nothing(*operands: Any) -> None:
    """Compute the result of no rows."""


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    m: int,
    ns: tuple[int, ...],
    depth: int,
    rank: int,
    siblings: int,
    forward: bool,
    mask: str,
    aligned: bool,
    fp32_term: bool,
    precision: str,
) -> tuple[tuple[int], bool, tuple[list[int], list[int], list[int]], dict[str, Any]]:
    """Return what a launch is made of.

    The grid, whether tiles are copied by descriptors, the tiles of the results and of the two
    operands, and the kernel's compile-time arguments.
    """
    limits, n = device_limits(device), sum(ns)
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
            siblings=siblings,
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
    tiles = sum(-(-m // config.block_m) * -(-n // config.block_n) for n in ns)
    described = aligned and has_descriptors(limits)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": min(_MAX_FP32_BLOCK_R if fp32_term else _MAX_BLOCK_R, padded_rank(rank)),
        "GROUP_M": config.group_m,
        "PARTS": config.parts,
        "SIBLINGS": siblings,
        "FORWARD": forward,
        "HAS_FROZEN": depth > 0,
        "MASK": mask,
        "USE_DESCRIPTORS": described,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    blocks = (
        [config.block_m, config.block_n // config.parts],
        [config.block_m, config.block_k],
        [config.block_n, config.block_k] if forward else [config.block_k, config.block_n],
    )
    return (min(tiles, limits.processors * (1 if depth else 8)),), described, blocks, constants
