"""What the segmented kernels read of a batch in which every row has an adapter of its own.

    arena         1-D, in pages of 64 elements: A [r, K] and B [r, N] by rows, each from a page on
    descriptors   int32 [S, slots, 4]: pages of A and of B, rank, scaling as the bits of an fp32
    slots         int32 [T]: of each row of x; slot 0 is "no adapter", and all zero in the table
    order         int32 [T]: the rows sorted by slot, the ones of a slot in their order
    tiles         int32 [4, n]: slot, first position in order, rows; of the first, how many are used
    h             fp32 [P, S, T, max_rank]: P partial sums, of an adapter's own ranks alone

Everything here may change between two launches of a CUDA graph but the shapes and addresses.
What lies behind a rank, or in the tail of a last page, may be NaN: of the arena it is never loaded,
and of h dropped by a select.
"""

from __future__ import annotations

from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from .dtypes import INTERPRETED
from .tile_config import DeviceLimits

PAGE = tl.constexpr(64)


class RowSegments(Protocol):
    """The rows of a batch by their adapters, as ``fastlora.segments.Segments`` has them."""

    @property
    def slots(self) -> Tensor:
        """``[T]`` int32."""

    @property
    def order(self) -> Tensor:
        """``[T]`` int32; not read by ``segmented_gemm``."""

    @property
    def tiles(self) -> Tensor:
        """``[4, n]`` int32, the last dimension contiguous; likewise."""

    @property
    def block_m(self) -> int:
        """Rows of a tile at most: a power of two, at least 16."""


def programs_for(processors: int, programs: int, tiles: int, items_of_tile: int) -> int:
    """Return how many programs share out the items of at most so many tiles.

    Args:
        processors: of the device.
        programs: for each of them, at most.
        tiles: at most.
        items_of_tile: of each.
    """
    return min(programs * processors, tiles * items_of_tile)


@triton.jit
def load_a(descriptors_ptr, sibling, slots, slot):
    """Return the page of A and the rank of a slot: of 16 bytes in one sector."""
    entry = descriptors_ptr + (tl.cast(sibling, tl.int64) * slots + slot) * 4
    return tl.load(entry), tl.load(entry + 2)


@triton.jit
def load_b(descriptors_ptr, sibling, slots, slot):
    """Return the page of B, the rank and the scaling of a slot."""
    entry = descriptors_ptr + (tl.cast(sibling, tl.int64) * slots + slot) * 4
    scaling = tl.load(entry + 3).to(tl.float32, bitcast=True)
    return tl.load(entry + 1), tl.load(entry + 2), scaling


@triton.jit
def items_of_program(tiles_ptr, stride, items_of_tile):
    """Return the first item of this program, and the one after its last.

    The used tiles' items are shared out in runs of equal length. How many tiles are used is known
    here alone: a grid for the most there can be, a tile for each row, would mostly start programs
    that leave.
    """
    items = tl.load(tiles_ptr + 3 * stride) * items_of_tile
    program, programs = tl.program_id(0), tl.num_programs(0)
    each, more = items // programs, items % programs
    first = program * each + min(program, more)
    return first, first + each + (program < more).to(tl.int32)


@triton.jit
def load_segment(tiles_ptr, stride, number):
    """Return slot, first position in the order, and number of rows of a tile."""
    tile = tiles_ptr + number
    return tl.load(tile), tl.load(tile + stride), tl.load(tile + 2 * stride)


@triton.jit
def page_start(arena_ptr, page):
    """Return where a page begins; 2**31 elements are 4 GiB in half precision, and arenas larger."""
    return arena_ptr + tl.cast(page, tl.int64) * PAGE


def starts_early(limits: DeviceLimits) -> bool:
    """Return whether a launch's programs may begin while the launch before it still runs.

    By programmatic dependent launch (sm_90 on). Those of an expand find their tile, and have their
    part of B fetched into the L2 cache, before they wait. What is read until then, metadata and
    adapters, was written before that launch began: the launch before an expand is the shrink, or a
    frozen product of the same step. A shrink beside ``decode_gemm`` reads x besides, which was
    there before that: a ``decode_gemm`` itself begins when all before it has ended.
    """
    return limits.capability >= 90 and not INTERPRETED.value


@triton.jit
def let_next_launch_begin():
    """Allow the next launch's programs to start once all of this launch's have come here."""
    cuda.gdc_launch_dependents()


@triton.jit
def wait_for_launch_before():
    """Wait until the launch before has ended, and all that it wrote can be read."""
    cuda.gdc_wait()


@triton.jit
def prefetch_rows(ptr, rows, stride, first_column, end_column, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):  # fmt: skip
    """Have the L2 cache fetch columns of the first rows of a matrix, at most ``COLUMNS`` of them.

    A line of the cache is asked for by one thread.
    """
    LINE: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth
    columns = first_column + tl.arange(0, COLUMNS // LINE)[None, :] * LINE
    numbers = tl.arange(0, ROWS)[:, None]
    ok = (numbers < rows) & (columns < end_column)
    lines = ptr + tl.where(ok, numbers * stride + columns, 0)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [lines],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
