"""Why an adapter is refused, and how that is said."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 160


class AdapterError(ValueError):
    """An adapter that cannot be used, and why; the message begins with the adapter's name."""


class Refusal(Exception):
    """The reason; ``read_adapter`` puts the name before it, and where it was found."""

    where = ""


def shown(value: object) -> str:
    """Return a value as it is printed in errors: escaped, and cut where it is long."""
    return _repr.repr(value)


@contextlib.contextmanager
def about(where: str) -> Iterator[None]:
    """Say of what is refused inside, and has no place yet, that it was found there."""
    try:
        yield
    except Refusal as refusal:
        refusal.where = refusal.where or f"{where}: "
        raise
