"""Versions of adapters, one for every load of a name, packed as they lie in the arena; leases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fastlora.adapters.adapter import Adapter
from fastlora.adapters.errors import AdapterError
from fastlora.adapters.pages import Placement
from fastlora.segments import PAGE, pages_of

# By how much one linear may multiply its input; trained adapters do by 1 to 1000. Below it nothing
# overflows in fp32 or bf16, in a model that does not by itself: with 1e4 for the norm of an input,
# gate times up is at most 1e24 for each of some 1e4 features, and down_proj makes 1e34 of them. A
# NaN would reach other requests, whose attention is masked by adding to the scores of all of them.
_LARGEST_CHANGE = 1e8


@dataclass(frozen=True)
class Block:
    """One linear's part of an adapter: A, and then B."""

    linear: int
    rank: int
    scaling: float
    k: int
    n: int


@dataclass(eq=False)
class Version:
    """One load of a name."""

    name: str
    uid: int
    source: Path | None  # to read it again from; None for a live model
    shown: str
    rank: int
    targets: str
    fingerprint: str
    blocks: list[Block]
    host: Tensor | None = None
    slot: int = 0
    placement: Placement | None = None
    leases: int = 0
    held: int = 0  # leases of requests that run: it stays where it is
    pinned: bool = False
    used: int = 0
    free_from: int = 0  # the step from which on no launch reads it any more
    named: bool = True

    @cached_property
    def pages(self) -> tuple[int, ...]:
        """Pages of every block, A and B."""
        return tuple(
            pages
            for block in self.blocks
            for pages in (pages_of(block.rank * block.k), pages_of(block.rank * block.n))
        )

    @cached_property
    def size(self) -> int:
        """Pages of all of them; whoever makes room asks it of every adapter."""
        return sum(self.pages)


@dataclass(eq=False)
class Lease:
    """The right to use one version of an adapter, until it is given back.

    Attributes:
        name: of the adapter, ``None`` for the base model.
        uid: of the version; another one for every load, also of the same name.
    """

    name: str | None
    uid: int
    _version: Version | None = field(default=None, repr=False)
    _holds: bool = field(default=False, repr=False)

    @property
    def slot(self) -> int:
        """Its place in the tables; 0 for the base model, or while it is not on the device."""
        version = self._version
        return 0 if version is None else version.slot


def blocks_of(adapter: Adapter, index: Mapping[str, int]) -> list[Block]:
    """Return the blocks of an adapter.

    Args:
        adapter: that was read.
        index: the number of each linear in the pool's tables, by its path.

    Raises:
        AdapterError: its weights are so large that they might reach other requests.
    """
    for path, factors in adapter.factors.items():
        # The largest of what is computed one after the other: x A, that times B, and scaled.
        change = _norm(factors.lora_a) * max(
            1.0, _norm(factors.lora_b) * max(1.0, abs(factors.scaling))
        )
        if not change <= _LARGEST_CHANGE:
            raise AdapterError(
                f"{adapter.name}: the weights of {path} are too large: they may multiply its input "
                f"by {change:.0e}, and at most {_LARGEST_CHANGE:.0e} is allowed"
            )
    return [
        Block(
            index[path],
            factors.lora_a.shape[0],
            factors.scaling,
            factors.lora_a.shape[1],
            factors.lora_b.shape[0],
        )
        for path, factors in adapter.factors.items()
    ]


def packed(adapter: Adapter, pages: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Return an adapter as it will lie in the arena: A and B of each block, in the arena's dtype.

    fp32 weights of a model in 16 bits are rounded here, once.

    Args:
        adapter: that was read.
        pages: that it takes.
        dtype: of the arena.
        pinned: whether a GPU is to read it.

    Raises:
        AdapterError: the dtype cannot hold its numbers.
    """
    values = torch.zeros(pages * PAGE, dtype=dtype, pin_memory=pinned)
    at = 0
    for path, factors in adapter.factors.items():
        for part, what in ((factors.lora_a, "lora_A"), (factors.lora_b.t(), "lora_B")):
            place = values[at : at + part.numel()].view(part.shape)
            place.copy_(part)
            if dtype == torch.float16 and not bool(place.isfinite().all()):
                raise AdapterError(
                    f"{adapter.name}: {path}.{what} has values beyond the range of float16, "
                    "the model's dtype"
                )
            at += pages_of(part.numel()) * PAGE
    return values


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32))
