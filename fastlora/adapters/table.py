"""What is told of the adapters of a pool: a table, and sizes as they are written and printed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(I?)B", re.IGNORECASE)


@dataclass(frozen=True)
class AdapterInfo:
    """What ``AdapterPool.list`` says of an adapter.

    Attributes:
        name: that requests give.
        source: where it was loaded from.
        rank: the largest of its ranks.
        targets: names of the linears that it changes.
        bytes: that it takes on the device.
        where: ``"device"``, ``"host"`` or ``"disk"``.
        requests: that use it now, or wait for it.
        pinned: stays on the device, once it is there.
        active: used by requests that name no adapter.
    """

    name: str
    source: str
    rank: int
    targets: str
    bytes: int
    where: str
    requests: int
    pinned: bool
    active: bool


def table_of(adapters: Sequence[AdapterInfo]) -> list[str]:
    """Return the lines of a table of adapters, the first with its heads."""
    rows = [("adapter", "rank", "size", "targets", "where", "requests", "")]
    for info in adapters:
        marks = ", ".join(
            word for word, holds in (("active", info.active), ("pinned", info.pinned)) if holds
        )
        size, rank, requests = size_of(info.bytes), str(info.rank), str(info.requests)
        rows.append((info.name, rank, size, info.targets, info.where, requests, marks))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def bytes_of(size: int | str) -> int:
    """Return how many bytes a size is.

    Raises:
        ValueError: it is none.
    """
    if isinstance(size, (int, float)):
        return int(size)
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ValueError(f'a size is bytes, or such as "2GB" or "512MiB", not {size!r}')
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def size_of(count: int) -> str:
    """Return a number of bytes as it is printed."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
