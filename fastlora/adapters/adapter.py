"""An adapter that was read: the factors of every linear that it changes, and what it is called."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlora.adapters.errors import AdapterError, shown

_NAME = re.compile(r"[A-Za-z0-9._:+@-]*")
_RESERVED = {"base": "it stands for the base model", "none": "it would be taken for no adapter"}


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """What an adapter adds to one linear: ``scaling * (x A^T) B^T``.

    Attributes:
        lora_a: ``[r, K]`` on the CPU, contiguous; fp32, fp16 or bf16, as it was saved.
        lora_b: ``[N, r]`` likewise.
        scaling: finite, also in fp32.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """How many rows A has."""
        return self.lora_a.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that was read and found to fit the base model.

    Attributes:
        name: what requests call it.
        source: where it is from, to be printed.
        factors: by the path of the linear in the base model, in the order of the base model.
        fingerprint: SHA-256 of the factors: another one when what is computed has changed.
        folder: where its files lie, absolute (in the hub's cache, those of one revision); ``None``
            for a live model.
    """

    name: str
    source: str
    factors: Mapping[str, LoraFactors]
    fingerprint: str
    folder: Path | None

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, in rising order."""
        return tuple(sorted({each.rank for each in self.factors.values()}))

    @property
    def targets(self) -> str:
        """The last names of the linears, such as ``"q_proj, v_proj"``; eight at most."""
        names = list(dict.fromkeys(path.rpartition(".")[2] for path in self.factors))
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(each.lora_a.numel() + each.lora_b.numel() for each in self.factors.values())

    @property
    def files_dtype(self) -> torch.dtype:
        """The dtype it was saved in; of several, the one that holds them all."""
        dtypes = [t.dtype for each in self.factors.values() for t in (each.lora_a, each.lora_b)]
        return functools.reduce(torch.promote_types, dtypes)

    def without_weights(self) -> Adapter:
        """Return the same with tensors on the meta device: everything but the numbers."""
        factors = {
            path: LoraFactors(each.lora_a.to("meta"), each.lora_b.to("meta"), each.scaling)
            for path, each in self.factors.items()
        }
        return dataclasses.replace(self, factors=factors)


def check_name(name: str) -> str:
    """Return ``name`` if an adapter may be called so.

    Raises:
        AdapterError: it is not 1 to 128 ASCII letters, digits or ``. _ - : + @``; or it begins with
            a dot or has two in a row, which would mean something else in a path; or it is ``base``
            or ``None``, in any case.
    """
    reason = None
    if not isinstance(name, str):
        reason = f"it is a {type(name).__name__}, not a str"
    elif not 1 <= len(name) <= 128:
        reason = f"it has {len(name)} characters, and 1 to 128 are allowed"
    elif not _NAME.fullmatch(name):
        found = next(character for character in name if not _NAME.fullmatch(character))
        reason = f"it has {found!a} in it, and ASCII letters, digits and . _ - : + @ are allowed"
    elif name.startswith(".") or ".." in name:
        reason = "it begins with a dot, or has two in a row"
    elif name.lower() in _RESERVED:
        reason = _RESERVED[name.lower()]
    if reason is not None:
        raise AdapterError(f"{shown(name)} cannot be the name of an adapter: {reason}")
    return name
