"""Pools of a tiny model's adapters, what is in them, and requests that run.

Of the fixtures, a file names those that it uses among its own, where pytest looks for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_models import SPECS, served_model, with_adapters
from torch import nn

from fastlora import segmented
from fastlora.adapters.files import read_adapter
from fastlora.adapters.pool import AdapterPool
from fastlora.adapters.versions import Lease

MODEL = served_model()
SHAPES = {
    name: (module.out_features, module.in_features)
    for name, module in MODEL.named_modules()
    if isinstance(module, nn.Linear)
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    with_adapters(served_model(), SPECS).save_pretrained(folder)
    return {name: folder / name for name in SPECS}


def bytes_of(folders, *names) -> int:
    pool = AdapterPool(MODEL, memory="1MB")
    return sum(pool.load(name, folders[name]).bytes for name in names)


def pool_of(folders, *names: str, memory: Any = "1MB", **settings: Any) -> AdapterPool:
    pool = AdapterPool(MODEL, memory=memory, **settings)
    for name in names:
        pool.load(name, folders[name])
    return pool


def where(pool: AdapterPool) -> dict[str, str]:
    return {info.name: info.where for info in pool.list()}


@contextlib.contextmanager
def running(pool: AdapterPool, name: str | None) -> Iterator[Lease]:
    """Use an adapter as a request does that runs."""
    lease = pool.lease(name)
    assert pool.make_ready(lease)
    try:
        yield lease
    finally:
        pool.give_back(lease)


def assert_holds(pool: AdapterPool, lease: Lease, source: Any) -> None:
    """Compare what both sides of the operators read with what was saved, bit by bit."""
    expected = read_adapter("it", source, SHAPES).factors
    assert lease.slot
    for i, name in enumerate(pool.names):
        n, k = pool.shapes[name]
        by_table = segmented.unpack(pool.arena, pool.descriptors[i], [lease.slot], k, n)
        for found in (by_table.factors[0], pool.in_slots(i, (lease.slot,)).factors[0]):
            if name not in expected:
                assert found is None
                continue
            assert torch.equal(found.lora_a, expected[name].lora_a)
            assert torch.equal(found.lora_b.t(), expected[name].lora_b)
            assert found.scaling == pytest.approx(expected[name].scaling, rel=1e-6)
