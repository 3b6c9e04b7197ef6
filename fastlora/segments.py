"""Which adapter each row of a batch has: what the segmented operators are told beside tensors.

A row is a token. Adapters are numbered by the slots that they take in a table; slot 0 is none. For
kernels that work on tiles of rows with one adapter, the rows are listed in the order of their
slots, and each tile is a slot, a place in that list and a number of rows:

    slots   0 2 1 2         order   2 | 1 3          tiles   (1, 1, 1)  (2, 2, 2)
                                  0 at the front, in no tile

The first tile also says how many there are.

All of it depends on the batch, and none of the sizes do: a launch that was captured in a CUDA graph
is right for the next batch of as many rows. Nothing here imports triton.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of one adapter that a program takes. Few tokens are a batch that generates, in which an
# adapter has a few rows; many are prompts, in which it has long runs.
_FEW_ROWS, _MANY_ROWS = 16, 64
MAX_DECODE_TOKENS = 256
# Rows of a batch's tiles, and of all its metadata: beside tiles ``slots`` and ``order``.
TILE_ROWS = 4
METADATA_ROWS = 2 + TILE_ROWS
# Elements of a page of an arena, where every matrix of an adapter begins: 128 bytes in 16 bits, a
# line of a GPU's cache.
PAGE = 64


def pages_of(elements: int) -> int:
    """Return how many pages hold that many elements."""
    return -(-elements // PAGE)


def rows_of_a_tile(tokens: int) -> int:
    """Return how many rows a tile has at most, which depends on the size of the batch alone."""
    return _FEW_ROWS if tokens <= MAX_DECODE_TOKENS else _MANY_ROWS


def tile_count(tokens: int, slots: int) -> int:
    """Return how many tiles a batch of that many tokens can have.

    Every adapter has at most one tile that is not full, and every tile has a row.
    """
    return min(tokens, tokens // rows_of_a_tile(tokens) + min(tokens, slots - 1))


class Runs:
    """The rows of each adapter, on the host: what PyTorch's side of the operators walks.

    Attributes:
        slots: of the adapters that have rows, in the order in which they first appear.
        rows: of each, int64 on the device of the batch, or a slice where they are consecutive.
        tokens: rows of the batch.
    """

    __slots__ = ("_batched", "_device", "_places", "rows", "slots", "tokens")

    def __init__(
        self, requests: Iterable[tuple[int, int]], device: torch.device | None = None
    ) -> None:
        """Make them of consecutive ``(slot, rows)``; slots may come again."""
        places: dict[int, list[int]] = {}
        tokens = 0
        for slot, rows in requests:
            if slot and rows:
                places.setdefault(slot, []).extend(range(tokens, tokens + rows))
            tokens += rows
        self.slots, self.tokens = tuple(places), tokens
        self._places, self._device = list(places.values()), device
        self.rows: tuple[Tensor | slice, ...] = tuple(map(self._index, self._places))
        self._batched: Batched | None = None

    @classmethod
    def of_slots(cls, slots: Sequence[int], device: torch.device | None = None) -> Runs:
        """Make them of the slot of every row."""
        return cls(((slot, 1) for slot in slots), device)

    def batched(self) -> Batched | None:
        """Return the rows as one batch of equally many for each adapter.

        ``None`` where one adapter has all of them, or so many that padding the others would more
        than double the work: there each adapter is multiplied by itself.
        """
        if self._batched is None and len(self.slots) > 1:
            longest = max(map(len, self._places))
            if len(self.slots) * longest <= 2 * sum(map(len, self._places)):
                self._batched = self._make_batched(longest)
        return self._batched

    def _make_batched(self, longest: int) -> Batched:
        padded = [row for rows in self._places for row in rows + rows[:1] * (longest - len(rows))]
        real = [
            adapter * longest + i
            for adapter, rows in enumerate(self._places)
            for i in range(len(rows))
        ]
        rows = [row for places in self._places for row in places]
        return Batched(
            longest,
            None if padded == list(range(self.tokens)) else self._tensor(padded),
            None if len(real) == len(padded) else self._tensor(real),
            self._tensor(rows),
        )

    def _index(self, rows: list[int]) -> Tensor | slice:
        if rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1)
        return self._tensor(rows)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


@dataclass(frozen=True, slots=True)
class Batched:
    """Rows of D adapters as one batch, L for each; those with fewer repeat their first.

    Attributes:
        longest: L.
        gather: ``[D L]`` rows of the input, or ``None`` where they are all its rows in order.
        real: places among them that are no repetition, or ``None`` where all are.
        rows: of the output, one for each real place.
    """

    longest: int
    gather: Tensor | None
    real: Tensor | None
    rows: Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """The metadata of a batch, on its device.

    Attributes:
        slots: ``[T]`` int32, the slot of every row; padding has slot 0.
        order: ``[T]`` int32, the rows sorted by slot, in each slot as they come.
        tiles: ``[4, n]`` int32, contiguous in the last dimension: slot, first place in ``order``,
            number of rows, and of the first tile how many are used; these stand first. ``n`` is
            ``tile_count``.
        block_m: rows of a tile at most, ``rows_of_a_tile``.
        runs: the same for PyTorch's operations, where somebody has made them; else they are read
            back from ``slots``.
    """

    slots: Tensor
    order: Tensor
    tiles: Tensor
    block_m: int
    runs: Runs | None = None

    @classmethod
    def of_slots(
        cls, slots: Sequence[int], *, table: int, device: torch.device | str = "cpu"
    ) -> Segments:
        """Make them of the slot of every row, for a table of that many slots."""
        return cls.of(((slot, 1) for slot in slots), table=table, device=device)

    @classmethod
    def of(
        cls, requests: Iterable[tuple[int, int]], *, table: int, device: torch.device | str = "cpu"
    ) -> Segments:
        """Make them of consecutive ``(slot, rows)``, for a table of that many slots."""
        requests = list(requests)
        tokens = sum(rows for _, rows in requests)
        device = torch.device(device)
        packed = torch.zeros((2, tokens), dtype=torch.int32)
        tiles = torch.zeros((TILE_ROWS, tile_count(tokens, table)), dtype=torch.int32)
        fill(requests, packed[0], packed[1], tiles, rows_of_a_tile(tokens))
        packed = packed.to(device)
        return cls(
            slots=packed[0],
            order=packed[1],
            tiles=tiles.to(device),
            block_m=rows_of_a_tile(tokens),
            runs=Runs(requests, device),
        )

    def on_host(self) -> Runs:
        """Return the runs; where they have not been made this waits for the device."""
        if self.runs is not None:
            return self.runs
        return Runs.of_slots(self.slots.tolist(), self.slots.device)


def fill(
    requests: Iterable[tuple[int, int]], slots: Tensor, order: Tensor, tiles: Tensor, block_m: int
) -> None:
    """Write the metadata of a batch into tensors on the host, every element of them.

    Args:
        requests: consecutive ``(slot, rows)``; rows beyond their sum are padding.
        slots: ``[T]`` int32.
        order: ``[T]`` int32.
        tiles: ``[4, n]`` int32.
        block_m: rows of a tile at most.
    """
    requests = list(requests)
    used = sum(rows for _, rows in requests)
    by_request = torch.tensor([slot for slot, _ in requests], dtype=torch.int32)
    lengths = torch.tensor([rows for _, rows in requests], dtype=torch.int64)
    slots[:used] = torch.repeat_interleave(by_request, lengths)
    slots[used:] = 0
    order.copy_(torch.argsort(slots, stable=True))
    totals: dict[int, int] = {}
    for slot, rows in requests:
        totals[slot] = totals.get(slot, 0) + rows
    first = totals.pop(0, 0) + len(slots) - used
    listed: list[tuple[int, int, int]] = []
    for slot in sorted(totals):
        last = first + totals[slot]
        for start in range(first, last, block_m):
            listed.append((slot, start, min(block_m, last - start)))
        first = last
    tiles.zero_()
    if listed:
        tiles[:3, : len(listed)] = torch.tensor(listed, dtype=torch.int32).t()
        tiles[3, 0] = len(listed)
