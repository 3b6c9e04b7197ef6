"""The pages of an arena: which are free, and where the parts of an adapter go.

An adapter is a list of blocks, an ``A`` or a ``B`` of one linear each. Every block is in one piece;
the adapter need not be, so that memory which was given back in pieces can be used again.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the blocks of an adapter are.

    Attributes:
        blocks: the first page of each.
        extents: first page and number of pages of each piece of memory that they fill, in the same
            order.
    """

    blocks: tuple[int, ...]
    extents: tuple[tuple[int, int], ...]


class PageAllocator:
    """Hands out the pages of one arena.

    Args:
        pages: that it has.

    Attributes:
        pages: likewise.
        free: pages that nobody has.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.free = pages
        self._extents: list[tuple[int, int]] = [(0, pages)] if pages else []  # by first page

    def copy(self) -> PageAllocator:
        """Return another one, to try something with."""
        other = PageAllocator(self.pages)
        other.free, other._extents = self.free, list(self._extents)
        return other

    def place(self, blocks: Sequence[int]) -> Placement | None:
        """Take room for blocks of that many pages each; ``None`` if there is not enough.

        All in the smallest piece that holds them, else in the largest ones.
        """
        whole = sum(blocks)
        if whole > self.free:
            return None
        fitting = [extent for extent in self._extents if extent[1] >= whole]
        if fitting:
            pieces = [min(fitting, key=lambda extent: extent[1])]
        else:
            pieces = sorted(self._extents, key=lambda extent: -extent[1])
        found: list[int] = []
        taken: list[tuple[int, int]] = []
        rest = list(blocks)
        for first, pages in pieces:
            used = 0
            while rest and used + rest[0] <= pages:
                found.append(first + used)
                used += rest.pop(0)
            if used:
                taken.append((first, used))
            if not rest:
                break
        if rest:
            return None
        for first, used in taken:
            self._take(first, used)
        return Placement(tuple(found), tuple(taken))

    def give_back(self, placement: Placement) -> None:
        """Free the pages of an adapter, once."""
        for first, pages in placement.extents:
            self._give(first, pages)

    def _take(self, first: int, pages: int) -> None:
        at = bisect.bisect_right(self._extents, (first, self.pages + 1)) - 1
        start, length = self._extents[at]
        assert start == first, "a piece is taken from its beginning"
        self._extents[at : at + 1] = [(start + pages, length - pages)] if length > pages else []
        self.free -= pages

    def _give(self, first: int, pages: int) -> None:
        at = bisect.bisect_left(self._extents, (first, 0))
        last, self.free = first + pages, self.free + pages
        if at < len(self._extents) and self._extents[at][0] == last:
            last += self._extents.pop(at)[1]
        if at and sum(self._extents[at - 1]) == first:
            first = self._extents.pop(at - 1)[0]
            at -= 1
        self._extents.insert(at, (first, last - first))
