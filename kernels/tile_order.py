"""Program id -> tile of the output, and the loads that depend on it.

Tiles are walked in groups of ``GROUP_M`` row blocks: inside a group all row blocks of one column
block come first, so that the programs that run at the same time share operands in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(tile, row_blocks, column_blocks, GROUP_M: tl.constexpr):
    """Return ``(row block, column block)`` of a tile number in ``[0, row_blocks * column_blocks)``.

    The order is the one of Triton's matmul tutorial.
    """
    group_size = GROUP_M * column_blocks
    first = (tile // group_size) * GROUP_M
    height = min(row_blocks - first, GROUP_M)
    inside = tile % group_size
    return first + inside % height, inside // height


@triton.jit
def sibling(ptr, number, rows, columns):
    """Return where the matrix of a sibling begins in a contiguous ``[siblings, rows, columns]``."""
    return ptr + tl.cast(number, tl.int64) * rows * columns


@triton.jit
def _corner(ptr, stride_row, stride_column, first_row, first_column):
    # tl.cast, not .to(): a loop variable is a Python int in the interpreter, and a 1 a constexpr.
    down = tl.cast(first_row, tl.int64) * stride_row
    return ptr + down + tl.cast(first_column, tl.int64) * stride_column


@triton.jit
def load_tile(ptr, stride_row, stride_column, first_row, rows, first_column, columns,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Load a tile ``[ROWS, COLUMNS]`` by pointers; what lies outside is zero.

    The tile's corner is a 64-bit scalar and the offsets inside it are 32-bit: tensors with more
    than 2**31 elements are addressed right, without a 64-bit register for every element.
    """
    corner = _corner(ptr, stride_row, stride_column, first_row, first_column)
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (first_row + r < rows) & (first_column + c < columns)
    return tl.load(corner + r * stride_row + c * stride_column, mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, stride_row, stride_column, first_row, rows, first_column, columns, tile,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Store a tile ``[ROWS, COLUMNS]`` by pointers, rounded to the dtype of ``ptr``."""
    corner = _corner(ptr, stride_row, stride_column, first_row, first_column)
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (first_row + r < rows) & (first_column + c < columns)
    value = tile.to(ptr.dtype.element_ty)
    tl.store(corner + r * stride_row + c * stride_column, value, mask=inside)
