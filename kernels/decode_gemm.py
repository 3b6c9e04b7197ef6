"""Decode GEMM: the frozen linear layers of a step that generates, all siblings in one launch.

    y_s[t, n] = sum_k x[t, k] W_s[n, k] + bias_s[n]

With a row for each sequence a frozen product is as fast as its weights are read. cuBLAS reads those
of one linear after the other's; here a program has 64 columns of any of them (H200, 16 rows: q, k,
v of 7B in 11.7 us for 29.2, o in 9.7 for 12.1, gate and up in 65 for 76, down in 36 for 40; with 64
rows, where x is read as often as the weights, 12.3 for 27.6, 10.7 for 10.2, 71 for 73, 42 for 43).

The product is transposed, ``W x^T``: the weights are the side of a tile that tensor cores want to
be 64 rows high, and x the one that may have 16.

The launch after it may begin while it runs (programmatic dependent launch, sm_90 on), and may count
on all before it to have ended: it is no early launch itself. That is how
adapters come next to free: the shrink, which reads nothing that this writes, is computed beside it
(``segmented_shrink``, ``beside``), and what is left after it is the expand. The low-rank term in
the epilogue instead was slower: it is then a chain of small steps in each of the 56 programs that o
has, and not the work of all processors (H200, 64 rows with 16 adapters, what a layer takes beyond
the base model's: 109 us, for 18).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm_tile import frozen_product
from .launch import Launch, describe, form_of
from .layout import allocator, are_aligned, as_rows
from .low_rank_gemm import MAX_SIBLINGS
from .segments import let_next_launch_begin, starts_early
from .tile_config import (
    TileConfig,
    cached_by_shape,
    device_limits,
    has_descriptors,
    tile_config_for,
)
from .tile_order import store_tile

DecodeGemm = Callable[
    [Tensor, Sequence[Tensor], "Sequence[Tensor | None]"],
    "list[Tensor]",
]


class _Frozen(NamedTuple):
    """How the operands of ``W x^T`` lie in memory; they may be descriptors."""

    stride_lm: int
    stride_lk: int
    stride_rn: int
    stride_rk: int
    depth: int


class _Output(NamedTuple):
    """What one output needs beside the product."""

    columns: int
    bias: Tensor | None


@triton.jit(do_not_specialize=["T"])
def _decode_gemm_kernel(
    # of each product and output, see the tuples
    frozen,
    outputs,
    # size
    T,
    # operands of the products: descriptors or pointers; and outputs
    x,
    left_0,
    left_1,
    left_2,
    left_3,
    out_0,
    out_1,
    out_2,
    out_3,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIBLINGS: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    DEPENDED_ON: tl.constexpr,
):
    if DEPENDED_ON:
        let_next_launch_begin()
    lefts, outs = (left_0, left_1, left_2, left_3), (out_0, out_1, out_2, out_3)
    row_blocks = tl.cdiv(T, BLOCK_M)
    tile = tl.program_id(0)
    for s in tl.static_range(SIBLINGS):
        output, N = outputs[s], outputs[s].columns
        tiles = row_blocks * tl.cdiv(N, BLOCK_N)
        if (tile >= 0) & (tile < tiles):
            # Row blocks of the same weights follow each other.
            first_row, first_column = (tile % row_blocks) * BLOCK_M, (tile // row_blocks) * BLOCK_N
            accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            accumulator = frozen_product(
                accumulator, lefts[s], x, frozen[s], first_column, N, first_row, T,
                BLOCK_N, BLOCK_M, BLOCK_K, True, USE_DESCRIPTORS, "ieee",
            )  # fmt: skip
            if output.bias is not None:
                columns = first_column + tl.arange(0, BLOCK_N)
                bias = tl.load(output.bias + columns, mask=columns < N, other=0.0)
                accumulator += bias.to(tl.float32)[:, None]
            store_tile(outs[s], 1, N, first_column, N, first_row, T, accumulator, BLOCK_N, BLOCK_M)
        tile -= tiles


def decode_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    config: TileConfig | None = None,
) -> list[Tensor]:
    """Launch the decode GEMM: ``y_s = x W_s^T + bias_s``.

    Args:
        x: ``[T, K]``, fp16 or bf16, any strides, or ``[..., K]``, contiguous. Right for any T, and
            fast up to 64.
        weights: for each of S siblings, at most four, ``[N_s, K]`` in the dtype of ``x``, any
            strides.
        biases: for each ``[N_s]``, contiguous, or ``None``.
        config: the tile; by default the tuned one, or one that runs everywhere. ``block_m``: rows
            of x.

    Returns:
        For each ``[T, N_s]`` in the dtype of ``x``, contiguous, rounded once.
    """
    return prepare_decode_gemm(x, weights, biases, config=config)(x, weights, biases)


def prepare_decode_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    config: TileConfig | None = None,
) -> DecodeGemm:
    """Return ``decode_gemm`` as a function of the tensors of a call.

    It may be called with any that are laid out in memory as these, with biases where these have
    some: those of another layer of the same shape too.
    """
    t, k, stride_xt, stride_xk = as_rows(x)
    assert len(weights) == len(biases), f"{len(weights)} weights and {len(biases)} biases"
    assert len(weights) <= MAX_SIBLINGS, f"{len(weights)} siblings, at most {MAX_SIBLINGS}"
    dtypes = {x.dtype, *(weight.dtype for weight in weights)}
    assert len(dtypes) == 1, f"operands of different dtypes: {dtypes}"
    assert x.dtype in (torch.float16, torch.bfloat16), f"{x.dtype} is not half precision"
    ns = tuple([weight.shape[0] for weight in weights])
    aligned = are_aligned(x.dtype, ns, (x, *weights))
    grid, described, x_tile, weight_tile, constants = _settings(
        config, x.device, x.dtype, t, ns, k, aligned
    )
    frozen = tuple([_Frozen(w.stride(0), w.stride(1), stride_xt, stride_xk, k) for w in weights])
    x_form = form_of(t, k, (stride_xt, stride_xk), x_tile)
    weight_forms = [
        form_of(n, k, w.stride(), weight_tile) for n, w in zip(ns, weights, strict=True)
    ]
    new_outputs = [allocator((t, n), x.dtype, x.device) for n in ns]
    if 0 in grid:
        return lambda *operands: [new() for new in new_outputs]

    launch = Launch(_decode_gemm_kernel, grid, constants)
    absent = (None,) * (MAX_SIBLINGS - len(ns))

    def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
        ys = [new() for new in new_outputs]
        lefts: Sequence[Any] = weights
        right: Any = x
        if described:
            lefts, right = list(map(describe, weights, weight_forms)), describe(x, x_form)
        outputs = tuple(map(_Output, ns, biases))
        launch(frozen, outputs, t, right, *lefts, *absent, *ys, *absent)
        return ys

    return run


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    t: int,
    ns: tuple[int, ...],
    k: int,
    aligned: bool,
) -> tuple[tuple[int], bool, list[int], list[int], dict[str, Any]]:
    """Return what a launch is made of.

    The grid, whether tiles are copied by descriptors, the tiles of x and of the weights, and the
    kernel's compile-time arguments.
    """
    limits = device_limits(device)
    config = config or tile_config_for(
        "decode_gemm", device, dtype, t, n=sum(ns), k=k, r=1, siblings=len(ns), aligned=aligned
    )
    described = aligned and has_descriptors(limits)
    constants: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SIBLINGS": len(ns),
        "USE_DESCRIPTORS": described,
        "DEPENDED_ON": starts_early(limits),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    x_tile, weight_tile = [config.block_m, config.block_k], [config.block_n, config.block_k]
    tiles = sum(-(-t // config.block_m) * -(-n // config.block_n) for n in ns)
    return (tiles,), described, x_tile, weight_tile, constants
