"""What both segmented kernels read of a batch in which every row has an adapter of its own.

    arena         1-D, in pages of 64 elements: A [r, K] and B [r, N] by rows, each from a page on
    descriptors   int32 [S, slots, 4]: pages of A and of B, rank, scaling as the bits of an fp32
    slots         int32 [T]: of each row of x; slot 0 is "no adapter", and all zero in the table
    order         int32 [T]: the rows sorted by slot, the ones of a slot in their order
    tiles         int32 [3, n]: slot, first position in order, rows; without rows a tile is unused
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

PAGE = tl.constexpr(64)

# Programs of a grid for each processor, at most. As many as its registers hold run at once, 2 to 8
# in the default tiles on sm_90; enough for several rounds, so that the last one is short.
_PROGRAMS = 12


class RowSegments(Protocol):
    """The rows of a batch by their adapters, as ``fastlora.segments.Segments`` has them."""

    @property
    def slots(self) -> Tensor:
        """``[T]`` int32."""

    @property
    def order(self) -> Tensor:
        """``[T]`` int32; not read where every row is a tile of its own."""

    @property
    def tiles(self) -> Tensor:
        """``[3, n]`` int32, the last dimension contiguous; likewise."""

    @property
    def block_m(self) -> int:
        """Rows of a tile at most: a power of two, at least 16."""


def programs_for(processors: int, tiles: int, items_of_tile: int) -> int:
    """Return how many programs share out the items of at most so many tiles."""
    return min(_PROGRAMS * processors, tiles * items_of_tile)


def padded_tiles(tiles: int) -> int:
    """Return a power of two, at least the tiles; 256 are enough for any decode step."""
    return max(256, 1 << (tiles - 1).bit_length())


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
def items_of_program(tiles_ptr, stride, tiles, items_of_tile, MAX_TILES: tl.constexpr):
    """Return the first item of this program, and the one after its last.

    The used tiles' items are shared out in runs of equal length. How many tiles are used is known
    here alone: they stand first.
    """
    places = tl.arange(0, MAX_TILES)
    counts = tl.load(tiles_ptr + 2 * stride + places, mask=places < tiles, other=0)
    items = tl.sum((counts > 0).to(tl.int32), axis=0) * items_of_tile
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
