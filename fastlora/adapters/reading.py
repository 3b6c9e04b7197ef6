"""Adapters read for one pool: packed as they will lie in its arena, in its dtype."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.adapter import Adapter
from fastlora.adapters.errors import AdapterError
from fastlora.adapters.files import read_adapter
from fastlora.adapters.groups import parameter_of
from fastlora.adapters.table import size_of
from fastlora.adapters.versions import Block, Version
from fastlora.segments import PAGE, pages_of

MAX_RANK = 256
# By how much one linear may multiply its input; trained adapters do by 1 to 1000. Below it nothing
# overflows in fp32 or bf16, in a model that does not by itself: with 1e4 for the norm of an input,
# gate times up is at most 1e24 for each of some 1e4 features, and down_proj makes 1e34 of them. A
# NaN would reach other requests, whose attention is masked by adding to the scores of all of them.
_LARGEST_CHANGE = 1e8


class Reader:
    """Reads adapters for one pool.

    Args:
        model: the base model, which is not kept alive.
        shapes: out and in features of the linears, by their paths, in the order of the tables.
        dtype: of the arena.
        pinned: whether a GPU is to read what was packed.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype,
        *,
        pinned: bool,
    ) -> None:
        self._model = weakref.ref(model)
        self._shapes, self._dtype, self._pinned = shapes, dtype, pinned
        self._index = {name: i for i, name in enumerate(shapes)}

    def read(self, name: str, source: Any, pages: int) -> Version:
        """Read and pack an adapter under a name; see ``AdapterPool.load``.

        Args:
            name: of the adapter.
            source: a folder, a hub id or a live model.
            pages: that the arena has.

        Raises:
            AdapterError: it cannot be used, or takes more.
        """
        adapter = self._read(name, source)
        version = Version(
            name=name,
            uid=secrets.randbits(62) | 1,
            source=adapter.folder,
            shown=adapter.source,
            rank=adapter.rank,
            targets=adapter.targets,
            fingerprint=adapter.fingerprint,
            blocks=_blocks_of(adapter, self._index),
        )
        if version.size > pages:
            page = PAGE * self._dtype.itemsize
            raise AdapterError(
                f"{name}: it takes {size_of(version.size * page)} in {self._dtype}, and the pool "
                f"has {size_of(pages * page)} in all: give it more (adapter_memory)"
            )
        version.host = self._pack(adapter, version)
        return version

    def read_again(self, version: Version) -> Tensor:
        """Return a version packed, from where it was read.

        Raises:
            AdapterError: it is not there any more, or is another now.
        """
        assert version.source is not None, "what cannot be read again is never dropped"
        adapter = self._read(version.name, version.source)
        if adapter.fingerprint != version.fingerprint:
            raise AdapterError(
                f"{version.name}: {version.shown} has changed since it was loaded; load it again "
                "to use what is there now"
            )
        return self._pack(adapter, version)

    def _read(self, name: str, source: Any) -> Adapter:
        def own_weight(parameter: str) -> Tensor | None:
            model = self._model()
            return None if model is None else parameter_of(model, parameter)

        return read_adapter(name, source, self._shapes, max_rank=MAX_RANK, own_weight=own_weight)

    def _pack(self, adapter: Adapter, version: Version) -> Tensor:
        return _packed(adapter, version.size, self._dtype, pinned=self._pinned)


def _blocks_of(adapter: Adapter, index: Mapping[str, int]) -> list[Block]:
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


def _packed(adapter: Adapter, pages: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
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
