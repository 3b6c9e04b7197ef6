"""What happens to one tile of a GEMM with low-rank terms: the products, its pieces, its store.

Of ``low_rank_gemm`` and ``segmented_gemm``; ``decode_gemm`` has the product alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dtypes import dot
from .tile_order import load_tile, store_tile


@triton.jit
def frozen_product(
    accumulator, left_source, right_source, layout, first_row, M, first_column, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RIGHT_IS_TRANSPOSED: tl.constexpr, USE_DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``left @ right`` to a tile; the sources are descriptors or pointers."""
    for k in range(0, layout.depth, BLOCK_K):
        if USE_DESCRIPTORS:
            left = left_source.load([first_row, k])
            if RIGHT_IS_TRANSPOSED:
                right = right_source.load([first_column, k]).T
            else:
                right = right_source.load([k, first_column])
        else:
            left = load_tile(
                left_source, layout.stride_lm, layout.stride_lk, first_row, M, k, layout.depth,
                BLOCK_M, BLOCK_K,
            )  # fmt: skip
            right = load_tile(
                right_source, layout.stride_rk, layout.stride_rn, k, layout.depth, first_column, N,
                BLOCK_K, BLOCK_N,
            )  # fmt: skip
        accumulator = dot(left, right, accumulator, PRECISION, LONG=True)
    return accumulator


@triton.jit
def low_rank_product(
    accumulator, h_ptr, term, first_row, M, first_column, N, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``h @ q`` to a tile, in chunks of the rank; ``q`` is cast to the dtype of ``h``."""
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        h_g = h_ptr + tl.cast(term.first_h, tl.int64)
        h = load_tile(h_g, R, 1, first_row, M, r, R, BLOCK_M, BLOCK_R)
        q = load_tile(
            term.q, term.stride_qr, term.stride_qn, r, R, first_column, N, BLOCK_R, BLOCK_N
        )
        accumulator = dot(h, q.to(h.dtype), accumulator, PRECISION)
    return accumulator


@triton.jit
def column_parts(tile, PARTS: tl.constexpr):
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


@triton.jit
def store_part(
    out, part, bias_ptr, first_row, M, column, N,
    BLOCK_M: tl.constexpr, PART_N: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add the bias to a piece of a tile, round it and store it; ``out``: descriptor or pointer."""
    if bias_ptr is not None:
        columns = column + tl.arange(0, PART_N)
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        part += bias.to(tl.float32)[None, :]
    if USE_DESCRIPTORS:
        out.store([first_row, column], part.to(out.dtype))
    else:
        store_tile(out, N, 1, first_row, M, column, N, part, BLOCK_M, PART_N)


@triton.jit
def next_first_tile(first_tile, tiles):
    """Return this program's first tile of the next output.

    They go on where this output's ended: no program takes two more than another.
    """
    programs = tl.num_programs(0)
    return (first_tile + programs - tiles % programs) % programs
