"""Versions of adapters, one for every load of a name, and leases of those who use one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from fastlora.adapters.pages import Placement
from fastlora.segments import pages_of


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
