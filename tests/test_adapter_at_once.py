"""A pool under all calls in any order, from many threads, and on a device that fails."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_pools
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from serving_models import LINEARS, SPECS
from small_pools import assert_holds, bytes_of, pool_of, running, where
from torch import nn

from fastlora import segmented
from fastlora.adapters import reading
from fastlora.adapters.adapter import Adapter, LoraFactors
from fastlora.adapters.pool import AdapterPool
from fastlora.adapters.versions import Lease

folders = small_pools.folders


@contextlib.contextmanager
def full(monkeypatch: pytest.MonkeyPatch, method: str, calls: int) -> Iterator[None]:
    """Let a method of pools fail when it has been called so often."""
    working, left = getattr(AdapterPool, method), itertools.count(calls, -1)

    def fails(self, *args):
        if not next(left):
            raise torch.OutOfMemoryError("no memory is left")
        return working(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(AdapterPool, method, fails)
        yield


def assert_is_consistent(pool: AdapterPool) -> None:
    placed = [version for version in pool._by_uid.values() if version.slot]
    assert pool.memory_used == sum(pool._bytes_of(version) for version in placed)
    slots = [version.slot for version in placed]
    assert sorted([*slots, *pool._free_slots]) == list(range(1, pool.slots))
    assert {slot for factors in pool._factors for slot in factors} == set(slots)


@pytest.mark.parametrize(
    ("method", "calls"),
    # The first of two that leave, the second, what comes; and what comes when half of it is there.
    [("_settle", 0), ("_settle", 1), ("_settle", 2), ("_view", 5)],
)
@pytest.mark.parametrize("name", ["new", "pinned", "idle"])
def test_a_load_that_fails_on_the_device_changes_no_name(name, method, calls, folders, monkeypatch):
    sources = {"idle": "one-layer-5", "other": "qv-16", "pinned": "all-4"}
    pool = pool_of(folders, memory=bytes_of(folders, *sources.values()), slots=4)
    for each, source in sources.items():
        pool.load(each, folders[source])
    pool.pin("pinned")
    before = [(info.name, info.rank, info.pinned) for info in pool.list()]
    new = "rs-8" if name == "pinned" else "qv-16"
    with full(monkeypatch, method, calls), pytest.raises(torch.OutOfMemoryError):
        pool.load(name, folders[new])
    assert [(info.name, info.rank, info.pinned) for info in pool.list()] == before
    assert where(pool)["pinned"] == "device"
    assert_is_consistent(pool)
    for each, source in sources.items():
        with running(pool, each) as lease:
            assert_holds(pool, lease, folders[source])
    pool.load(name, folders[new])
    with running(pool, name) as lease:
        assert_holds(pool, lease, folders[new])
    assert_is_consistent(pool)


@pytest.mark.parametrize(("method", "calls"), [("_settle", 0), ("_settle", 1), ("_view", 5)])
def test_what_fails_on_its_way_to_the_device_may_come_again(method, calls, folders, monkeypatch):
    pool = pool_of(folders, "rs-8", memory=bytes_of(folders, "rs-8"))
    pool.load("all-4", folders["all-4"])
    lease = pool.lease("rs-8")
    with full(monkeypatch, method, calls), pytest.raises(torch.OutOfMemoryError):
        pool.make_ready(lease)
    assert (lease.slot, pool.slot_of(lease.uid), pool.hold(lease)) == (0, 0, False)
    assert_is_consistent(pool)
    assert pool.make_ready(lease)
    assert_holds(pool, lease, folders["rs-8"])


# At once.


def test_threads_load_use_and_unload_at_once(folders):
    sources = list(SPECS)
    pool = pool_of(folders, *sources, memory=bytes_of(folders, "all-4", "rs-8"), host_memory=20000)
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(25):
                pick = int(torch.randint(len(sources), (), generator=generator))
                name = sources[pick]
                with contextlib.suppress(KeyError):
                    lease = pool.lease(name)
                    try:
                        if pool.make_ready(lease):
                            assert_holds(pool, lease, folders[name])
                    finally:
                        pool.give_back(lease)
                if pick == 0:
                    pool.load(name, folders[name])
                elif pick == 1:
                    with contextlib.suppress(KeyError):
                        pool.unload(name)
                    pool.load(name, folders[name])
                elif pick == 2:
                    with contextlib.suppress(RuntimeError, KeyError):
                        pool.pin(name)
                    pool.unpin(name)
                repr(pool)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(info.requests == 0 for info in pool.list())
    for name in sources:
        pool.unload(name)
    assert (pool.memory_used, pool.host_memory_used) == (0, 0)
    assert len(pool._free_slots) == pool.slots - 1


class Pool(RuleBasedStateMachine):
    """Any sequence of calls, with what each held lease has to read."""

    NAMES = st.sampled_from(["x", "y", "z"])
    SOURCES = st.sampled_from([0, 1, 2, 3])

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.sources = [self._source(rank, paths) for rank, paths in self.KINDS]
        self.pool = AdapterPool(self.MODEL, memory=4 * 64 * 14, host_memory=4 * 64 * 8, slots=4)
        self.current: dict[str, int] = {}
        self.leases: list[tuple[Lease, int]] = []

    MODEL = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 40), nn.Linear(40, 40))
    KINDS = ((3, ("0", "1")), (1, ("1",)), (5, ("0", "2")), (2, ("0", "1", "2")))

    def _source(self, rank: int, paths: tuple[str, ...]) -> dict[str, LoraFactors]:
        linears = {path: self.MODEL[int(path)] for path in paths}
        return {
            path: LoraFactors(
                torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank), rank
            )
            for path, linear in linears.items()
        }

    @rule(name=NAMES, source=SOURCES)
    def load(self, name, source):
        self.pool.load(name, source)
        self.current[name] = source

    @precondition(lambda self: self.current)
    @rule(name=NAMES)
    def unload(self, name):
        if name in self.current:
            self.pool.unload(name)
            del self.current[name]

    @rule(name=NAMES)
    def pin(self, name):
        if name in self.current:
            with contextlib.suppress(RuntimeError):
                self.pool.pin(name)

    @rule(name=NAMES)
    def unpin(self, name):
        if name in self.current:
            self.pool.unpin(name)

    @rule(name=NAMES)
    def lease(self, name):
        if name in self.current:
            self.leases.append((self.pool.lease(name), self.current[name]))

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99), hold=st.booleans())
    def make_ready(self, which, hold):
        lease, _ = self.leases[which % len(self.leases)]
        if hold:
            self.pool.hold(lease)
        else:
            with contextlib.suppress(RuntimeError):
                self.pool.make_ready(lease)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99))
    def give_back(self, which):
        lease, _ = self.leases.pop(which % len(self.leases))
        self.pool.give_back(lease)

    @rule()
    def advance(self):
        self.pool.advance()

    @invariant()
    def held_leases_read_what_they_began_with(self):
        for lease, source in self.leases:
            if not lease.slot:
                assert not lease._holds
                continue
            for i, name in enumerate(self.pool.names):
                n, k = self.pool.shapes[name]
                table = self.pool.descriptors[i]
                found = segmented.unpack(self.pool.arena, table, [lease.slot], k, n).factors[0]
                expected = self.sources[source].get(name)
                assert (found is None) == (expected is None)
                if found is not None:
                    assert torch.equal(found.lora_a, expected.lora_a)
                    assert torch.equal(found.lora_b.t(), expected.lora_b)

    @invariant()
    def memory_is_what_the_versions_take(self):
        versions = self.pool._by_uid.values()
        on_device = sum(self.pool._bytes_of(v) for v in versions if v.slot)
        assert self.pool.memory_used == on_device <= self.pool.memory_total
        slots = [v.slot for v in versions if v.slot]
        assert sorted([*slots, *self.pool._free_slots]) == [1, 2, 3]
        leased = {lease.uid for lease, _ in self.leases}
        named = {v.uid for v in self.pool._versions.values()}
        assert {v.uid for v in versions} == leased | named

    def teardown(self):
        for lease, _ in self.leases:
            self.pool.give_back(lease)
        for name in list(self.pool):
            self.pool.unload(name)
        assert (self.pool.memory_used, self.pool.host_memory_used) == (0, 0)


def test_any_sequence_of_calls(monkeypatch):
    machines: list[Pool] = []

    class Machine(Pool):
        def __init__(self):
            super().__init__()
            machines[:] = [self]

    def read(name, source, shapes, **_):
        number = source if isinstance(source, int) else int(source.name)
        return Adapter(
            name, str(number), machines[0].sources[number], str(number), Path(str(number))
        )

    monkeypatch.setattr(reading, "read_adapter", read)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_all_linears_have_a_place(folders):
    pool = pool_of(folders)
    assert {name.rpartition(".")[2] for name in pool.names} == {*LINEARS, "lm_head"}
