"""Pages of an arena are handed out once, and all of them come back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastlora.adapters.pages import PageAllocator, Placement

BLOCKS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def pages_of(placement: Placement, blocks: list[int]) -> list[int]:
    """Return all pages of a placement, one block after the other."""
    return [
        page
        for first, count in zip(placement.blocks, blocks, strict=True)
        for page in range(first, first + count)
    ]


def assert_is_right(placement: Placement, blocks: list[int]) -> None:
    """The extents are the pages of all blocks, in their order: what is copied there is in it."""
    by_extent = [page for first, n in placement.extents for page in range(first, first + n)]
    assert by_extent == pages_of(placement, blocks)


@given(
    pages=st.integers(0, 60),
    steps=st.lists(st.one_of(BLOCKS, st.integers(0, 20)), max_size=40),
)
def test_no_page_has_two_owners_and_none_is_lost(pages, steps):
    allocator = PageAllocator(pages)
    owned: list[tuple[Placement, list[int]]] = []
    for step in steps:
        if isinstance(step, int):
            if owned:
                placement, _ = owned.pop(step % len(owned))
                allocator.give_back(placement)
        else:
            before = allocator.free
            placement = allocator.place(step)
            if placement is None:
                assert allocator.free == before
            else:
                assert_is_right(placement, step)
                owned.append((placement, step))
        taken = [page for placement, blocks in owned for page in pages_of(placement, blocks)]
        assert len(set(taken)) == len(taken) == pages - allocator.free
        assert all(0 <= page < pages for page in taken)
    for placement, _ in owned:
        allocator.give_back(placement)
    # Again in one piece.
    assert allocator.free == pages
    assert allocator.place([pages]) if pages else allocator.place([1]) is None


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=12), kept=st.sets(st.integers(0, 11)))
def test_pieces_that_were_given_back_are_used_together(sizes, kept):
    allocator = PageAllocator(sum(sizes))
    placements = [allocator.place([size]) for size in sizes]
    for i, placement in enumerate(placements):
        if i not in kept:
            allocator.give_back(placement)
    rest = allocator.free
    # Blocks of one page fit wherever there are pages.
    placement = allocator.place([1] * rest)
    assert placement is not None
    assert_is_right(placement, [1] * rest)
    assert allocator.free == 0


def test_the_smallest_piece_that_fits_is_taken():
    allocator = PageAllocator(30)
    first, small, second, large = (allocator.place([n]) for n in (10, 3, 7, 10))
    allocator.give_back(first)
    allocator.give_back(small)
    allocator.give_back(large)
    assert allocator.place([10]) == large
    allocator.give_back(second)
    assert allocator.place([12]) == Placement((0,), ((0, 12),))


def test_a_block_is_in_one_piece_or_nowhere():
    allocator = PageAllocator(9)
    parts = [allocator.place([3]) for _ in range(3)]
    allocator.give_back(parts[0])
    allocator.give_back(parts[2])
    assert allocator.place([4]) is None
    assert allocator.free == 6
    assert allocator.place([2, 3]) == Placement((0, 6), ((0, 2), (6, 3)))


def test_what_is_tried_on_a_copy_changes_nothing():
    allocator = PageAllocator(8)
    placement = allocator.place([3])
    other = allocator.copy()
    assert other.place([5])
    other.give_back(placement)
    assert (allocator.free, other.free) == (5, 3)
    assert allocator.place([5]) == Placement((3,), ((3, 5),))
