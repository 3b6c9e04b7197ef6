"""Batches in which every row has an adapter of its own, as the segmented kernels read them.

Everything that is stored nowhere is NaN: ranks beyond an adapter's, the tails of its last pages,
and the pages between adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from kernel_cases import DEVICE, randn
from torch import Tensor

from fastlora.serving.linears import Routing

PAGE = 64
FIELDS = 4
NONE = (0, 0, 0)  # ranks of three siblings that no adapter changes


@dataclass(frozen=True)
class Case:
    """A batch: the slot of each row, the ranks of each slot's siblings, in and out features."""

    slots: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    k: int = 40
    ns: tuple[int, ...] = (40,)
    max_rank: int = 16
    has_bias: bool = True  # of frozen layers that are computed with it


class Adapter(NamedTuple):
    """One adapter of one linear layer."""

    a: Tensor  # [R, K]
    b: Tensor  # [R, N], by ranks
    scaling: float


@dataclass(frozen=True)
class Segments:
    """What ``fastlora.kernels.segments.RowSegments`` describes."""

    slots: Tensor
    order: Tensor
    tiles: Tensor
    block_m: int


def make_adapters(
    ranks: Sequence[Sequence[int]], k: int, ns: Sequence[int], dtype: torch.dtype
) -> list[list[Adapter | None]]:
    """Draw for each slot an adapter of each sibling; of rank 0 there is none.

    Args:
        ranks: for each slot, the first of which is "no adapter", the rank in each sibling.
        k: in features.
        ns: out features of the siblings.
        dtype: of the arena.
    """
    return [
        [
            Adapter(
                randn(rank, k, dtype=dtype, scale=k**-0.5),
                randn(rank, n, dtype=dtype, scale=rank**-0.5),
                0.5 + 0.25 * slot - 0.1 * s,
            )
            if rank
            else None
            for s, (rank, n) in enumerate(zip(of_slot, ns, strict=True))
        ]
        for slot, of_slot in enumerate(ranks)
    ]


def store(
    adapters: Sequence[Sequence[Adapter | None]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the arena and the descriptors of adapters; a page of NaN lies before each matrix."""
    siblings = len(adapters[0])
    descriptors = torch.zeros((siblings, len(adapters), FIELDS), dtype=torch.int32)
    pieces: list[Tensor] = []
    page = 0
    for slot, of_slot in enumerate(adapters):
        for s, adapter in enumerate(of_slot):
            if adapter is None:
                continue
            pages = []
            for matrix in (adapter.a, adapter.b):
                piece = torch.full((-(-matrix.numel() // PAGE) + 1, PAGE), float("nan"))
                piece[1:].view(-1)[: matrix.numel()] = matrix.float().cpu().reshape(-1)
                pieces.append(piece)
                pages.append(page + 1)
                page += len(piece)
            bits = torch.tensor(adapter.scaling).view(torch.int32)
            rank = adapter.a.shape[0]
            descriptors[s, slot] = torch.tensor([*pages, rank, bits], dtype=torch.int32)
    pieces.append(torch.full((1, PAGE), float("nan")))
    return torch.cat(pieces).view(-1).to(DEVICE, dtype), descriptors.to(DEVICE)


def make_segments(slots: Sequence[int], block_m: int, unused: int = 2) -> Segments:
    """Sort the rows of a batch into tiles; some unused ones, full of rubbish, come last."""
    order = sorted(range(len(slots)), key=lambda row: slots[row])
    tiles = []
    for slot in sorted(set(slots) - {0}):
        rows = [place for place, row in enumerate(order) if slots[row] == slot]
        tiles += [
            (slot, first, min(block_m, rows[-1] + 1 - first))
            for first in range(rows[0], rows[-1] + 1, block_m)
        ]
    tiles += [(1, 0, 0)] * unused
    # Rows of a longer tensor, as a part of all the metadata of a batch.
    wide = torch.zeros((4, len(tiles) + 5), dtype=torch.int32, device=DEVICE)
    wide[3, 0] = len(tiles) - unused
    wide[:3, : len(tiles)] = torch.tensor(tiles, dtype=torch.int32).view(-1, 3).t()
    metadata = [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (slots, order)]
    return Segments(*metadata, wide[:, : len(tiles)], block_m)


def apply_adapters(
    x: Tensor,
    ys: Sequence[Tensor],
    adapters: Sequence[Sequence[Adapter | None]],
    slots: Sequence[int],
) -> tuple[Tensor, list[Tensor]]:
    """Compute h and the outputs in the dtype of x, row by row as peft would; h is NaN elsewhere."""
    most = max(a.a.shape[0] for of_slot in adapters for a in of_slot if a is not None)
    h = x.new_full((len(ys), len(slots), most), float("nan"))
    ys = [y.clone() for y in ys]
    for s, y in enumerate(ys):
        for slot in set(slots):
            adapter = adapters[slot][s]
            if adapter is None:
                continue
            rows = torch.tensor([r for r, own in enumerate(slots) if own == slot], device=x.device)
            own = x[rows] @ adapter.a.to(x.dtype).t()
            h[s, rows, : own.shape[1]] = own
            y[rows] += (own @ adapter.b.to(x.dtype)) * adapter.scaling
    return h, ys


def watch_fused(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor] | None]:
    """Return a list that fills with what groups of linears get from products of our own."""
    calls: list[list[Tensor] | None] = []
    run = Routing.fused

    def watched(*args):
        calls.append(run(*args))
        return calls[-1]

    monkeypatch.setattr(Routing, "fused", watched)
    return calls
