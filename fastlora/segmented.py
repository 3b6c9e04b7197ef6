"""The segmented operators in plain PyTorch: a batch whose rows have adapters of their own.

On a CPU, and for whatever the kernels do not take. Adapters are multiplied as one batch where they
have about equally many rows (a batch that generates: one each), and one by one where a few have
nearly all (prompts). Nothing is rounded that peft does not round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.segments import PAGE, Batched, Runs, pages_of


class Factors(NamedTuple):
    """An adapter of one linear.

    Attributes:
        lora_a: ``[R, K]``.
        lora_b: ``[R, N]``, by rank: the transpose of peft's ``lora_B.weight``.
        scaling: of the product.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class Adapters:
    """Adapters of one linear that a batch uses, ready to be multiplied.

    Args:
        factors: of each of the batch's slots; ``None`` where an adapter lacks this linear. All of
            one dtype.
    """

    __slots__ = ("_stacked", "factors", "present")

    def __init__(self, factors: Sequence[Factors | None]) -> None:
        self.factors = factors
        self.present = [each for each in factors if each is not None]
        self._stacked: _Stacked | None = None

    def stacked(self) -> _Stacked:
        """Return them as one tensor; small ones are kept, for as long as this object lives."""
        if self._stacked is not None:
            return self._stacked
        stacked = _stack(self.factors, self.present)
        size = stacked.lora_a.numel() + stacked.lora_b.numel()
        if size * stacked.lora_a.element_size() <= _KEPT_BYTES:
            self._stacked = stacked
        return stacked


# Stacking 16 adapters of rank 16 for 256 features takes a third of what adding them does; for
# thousands of features next to nothing, and the copies would take as much memory again.
_KEPT_BYTES = 1 << 20


class _Stacked(NamedTuple):
    """D adapters as one batch of matrices, with zeros beyond an adapter's rank."""

    lora_a: Tensor  # [D, K, R]
    lora_b: Tensor  # [D, R, N]
    scaling: float | Tensor  # of all, or [D, 1, 1]


def add_adapters(y: Tensor, x: Tensor, adapters: Adapters, runs: Runs) -> None:
    """Add each row's low-rank term to it: ``y[t] += scaling x[t] A^T B`` of its adapter.

    Args:
        y: ``[T, N]``, changed in place.
        x: ``[T, K]``; cast to the adapters' dtype where that is another.
        adapters: of ``runs.slots``.
        runs: the rows of each.
    """
    if not adapters.present:
        return
    dtype = adapters.present[0].lora_a.dtype
    x = x if x.dtype == dtype else x.to(dtype)
    batched = runs.batched()
    if batched is not None:
        _add_batched(y, x, adapters.stacked(), batched)
        return
    for each, rows in zip(adapters.factors, runs.rows, strict=True):
        if each is None:
            continue
        h = x[rows] @ each.lora_a.t()
        if isinstance(rows, slice) and y.dtype == dtype:
            y[rows].addmm_(h, each.lora_b, alpha=each.scaling)
        else:
            y[rows] += ((h @ each.lora_b) * each.scaling).to(y.dtype)


def _add_batched(y: Tensor, x: Tensor, stacked: _Stacked, batched: Batched) -> None:
    """``add_adapters`` in two products of as many matrices as there are adapters."""
    adapters, columns = stacked.lora_a.shape[0], y.shape[1]
    if batched.gather is not None:
        x = x.index_select(0, batched.gather)
    h = torch.bmm(x.view(adapters, batched.longest, -1), stacked.lora_a)
    alpha = 1.0
    if isinstance(stacked.scaling, float):
        alpha = stacked.scaling
    else:
        h *= stacked.scaling
    if batched.gather is None and batched.real is None and y.dtype == h.dtype:
        y.view(adapters, batched.longest, columns).baddbmm_(h, stacked.lora_b, alpha=alpha)
        return
    term = torch.bmm(h, stacked.lora_b).view(-1, columns)
    if alpha != 1.0:
        term *= alpha
    if batched.real is not None:
        term = term.index_select(0, batched.real)
    y.index_add_(0, batched.rows, term.to(y.dtype))


def _stack(factors: Sequence[Factors | None], present: Sequence[Factors]) -> _Stacked:
    scalings = [0.0 if each is None else each.scaling for each in factors]
    first = present[0]
    scaling: float | Tensor = float(scalings[0])
    if len(set(scalings)) > 1:
        scaling = torch.tensor(scalings, dtype=first.lora_a.dtype, device=first.lora_a.device)
        scaling = scaling.view(-1, 1, 1)
    if len(present) == len(factors) and len({each.lora_a.shape[0] for each in present}) == 1:
        lora_a = torch.stack([each.lora_a for each in present])
        if first.lora_b.is_contiguous():
            lora_b = torch.stack([each.lora_b for each in present])
        else:  # peft's, transposed: copied as they lie in memory
            lora_b = torch.stack([each.lora_b.t() for each in present]).transpose(1, 2)
        return _Stacked(lora_a.transpose(1, 2), lora_b, scaling)
    rank = max(each.lora_a.shape[0] for each in present)
    lora_a = first.lora_a.new_zeros((len(factors), rank, first.lora_a.shape[1]))
    lora_b = first.lora_b.new_zeros((len(factors), rank, first.lora_b.shape[1]))
    for i, each in enumerate(factors):
        if each is not None:
            own = each.lora_a.shape[0]
            lora_a[i, :own], lora_b[i, :own] = each.lora_a, each.lora_b
    return _Stacked(lora_a.transpose(1, 2), lora_b, scaling)


def pack(adapters: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Return an arena with the adapters of one linear, and where in it they are.

    Args:
        adapters: of one dtype and device; they get the slots 1, 2, ...

    Returns:
        The arena, and descriptors ``[1, slots, 4]``; see ``kernels/segments.py``.
    """
    rows, matrices, at = [[0, 0, 0, 0]], [], 0
    for each in adapters:
        starts = []
        for matrix in (each.lora_a, each.lora_b):
            starts.append(at)
            pages = pages_of(matrix.numel())
            padded = matrix.new_zeros(pages * PAGE)
            padded[: matrix.numel()].view(matrix.shape).copy_(matrix)
            matrices.append(padded)
            at += pages
        bits = torch.tensor(each.scaling, dtype=torch.float32).view(torch.int32)
        rows.append([*starts, each.lora_a.shape[0], int(bits)])
    arena = torch.cat(matrices)
    return arena, torch.tensor([rows], dtype=torch.int32).to(arena.device)


def unpack(arena: Tensor, table: Tensor, slots: Sequence[int], k: int, n: int) -> Adapters:
    """Return the adapters in some slots of one linear, as views of the arena.

    This waits for the device, to read where they are.

    Args:
        arena: see ``pack``.
        table: ``[slots, 4]`` int32, the descriptors of the linear.
        slots: of the adapters.
        k: in features of the linear.
        n: its out features.
    """
    found: list[Factors | None] = []
    scalings = table[:, 3].contiguous().view(torch.float32).tolist()
    rows = table.tolist()
    for slot in slots:
        page_a, page_b, rank, _ = rows[slot]
        if rank == 0:
            found.append(None)
            continue
        lora_a = arena[page_a * PAGE :][: rank * k].view(rank, k)
        lora_b = arena[page_b * PAGE :][: rank * n].view(rank, n)
        found.append(Factors(lora_a, lora_b, scalings[slot]))
    return Adapters(found)
