"""Where adapters are, on the device, in host memory or on disk: who leaves, stays or waits."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import pytest
import small_pools
import torch
from serving_models import QKV, SPECS, changed, served_model, with_adapters
from small_pools import MODEL, assert_holds, bytes_of, pool_of, running, where
from torch import nn

from fastlora import segments
from fastlora.adapters import reading, versions
from fastlora.adapters.adapter import Adapter, LoraFactors
from fastlora.adapters.errors import AdapterError
from fastlora.adapters.files import read_adapter
from fastlora.adapters.pool import AdapterPool

folders = small_pools.folders


PINNED = r" needs .* of .*, and there is too little beside what is pinned$"


# Room.


def test_the_least_recently_used_leaves_first(folders):
    pool = pool_of(folders, memory=3 * bytes_of(folders, "all-4"))
    for name in ("a", "b", "c"):
        pool.load(name, folders["all-4"])
    with running(pool, "a"):
        pass
    for name, leaves in (("d", "b"), ("e", "c"), ("f", "a")):
        pool.load(name, folders["all-4"])
        places = where(pool)
        assert (places[name], places[leaves]) == ("device", "disk")
        assert list(places.values()).count("device") == 3
    assert pool.memory_used == pool.memory_total


def test_pages_are_counted_when_an_adapter_is_loaded_and_not_of_all_when_one_leaves(
    folders, monkeypatch
):
    pool = pool_of(folders, memory=20 * bytes_of(folders, "one-layer-5"))
    for i in range(20):
        pool.load(f"it-{i}", folders["one-layer-5"])
    leases = [pool.lease(f"it-{i}") for i in range(20)]
    counted = []

    def pages_of(numel):
        counted.append(numel)
        return segments.pages_of(numel)

    monkeypatch.setattr(versions, "pages_of", pages_of)
    pool.load("new", folders["one-layer-5"])
    assert len(counted) == 2 * 2  # A and B of two linears
    pool.make_ready(leases[0])
    assert len(counted) == 2 * 2


def test_nobody_leaves_for_nothing(folders):
    memory = bytes_of(folders, "all-4", "qv-16")
    pool = pool_of(folders, "all-4", "qv-16", memory=memory)
    pool.pin("all-4")
    assert pool.load("rs-8", folders["rs-8"]).where == "disk"
    assert where(pool) == {"all-4": "device", "qv-16": "device", "rs-8": "disk"}


def test_nobody_leaves_for_pieces_that_are_too_small():
    """All that may leave together have the pages, but no piece of them is large enough."""
    pool = AdapterPool(MODEL, memory=64 * 4 * 100)

    class Fixed:
        free = 10

        def copy(self):
            return self

        def place(self, pages):
            return None

        def give_back(self, placement):
            pass

    pool._allocator = Fixed()
    assert pool._who_leaves_for([1]) is None


def test_what_is_used_or_pinned_does_not_leave(folders):
    memory = bytes_of(folders, "all-4", "qv-16")
    pool = pool_of(folders, "all-4", "qv-16", memory=memory)
    waiting = pool.lease("all-4")
    pool.pin("qv-16")
    with running(pool, "all-4") as lease:
        pool.load("other", folders["all-4"])
        assert where(pool) == {"all-4": "device", "qv-16": "device", "other": "disk"}
        other = pool.lease("other")
        assert not pool.hold(other)
        assert not pool.make_ready(other)
        with pytest.raises(RuntimeError, match=r"other needs .* the rest is pinned, or in use"):
            pool.pin("other")
        assert_holds(pool, lease, folders["all-4"])
    pool.unpin("qv-16")
    # What only waits does not keep others waiting, and loses nothing.
    assert pool.make_ready(other)
    assert where(pool) == {"all-4": "host", "qv-16": "disk", "other": "device"}
    pool.give_back(other)
    assert pool.make_ready(waiting)
    assert_holds(pool, waiting, folders["all-4"])


def test_waiting_for_what_is_pinned_would_last_for_ever(folders):
    pool = pool_of(folders, "all-4", memory=bytes_of(folders, "all-4"))
    pool.pin("all-4")
    pool.load("qv-16", folders["qv-16"])
    lease = pool.lease("qv-16")
    for call in (lambda: pool.make_ready(lease), lambda: pool.pin("qv-16")):
        with pytest.raises(RuntimeError, match=PINNED):
            call()
    pool.unpin("all-4")
    assert pool.make_ready(lease)


def test_one_that_may_leave_makes_nobody_wait_for_what_is_pinned(folders):
    """When it has left, there is still too little room."""
    pool = pool_of(folders, memory=bytes_of(folders, "all-4", "one-layer-5"))
    for name, source in (("large", "all-4"), ("small", "one-layer-5"), ("other", "all-4")):
        pool.load(name, folders[source])
        if name == "large":
            pool.pin(name)
    lease = pool.lease("other")
    for used in (None, "small", "large"):
        with running(pool, used):
            for call in (lambda: pool.make_ready(lease), lambda: pool.pin("other")):
                with pytest.raises(RuntimeError, match=PINNED):
                    call()
    assert where(pool) == {"large": "device", "small": "device", "other": "host"}
    with running(pool, "large"):
        # What is in use leaves some day, if it is not pinned, too.
        pool.unpin("large")
        assert not pool.make_ready(lease)
        with pytest.raises(RuntimeError, match=r"the rest is pinned, or in use by requests$"):
            pool.pin("other")
        # What has lost its name is not pinned any more.
        pool.pin("large")
        pool.unload("large")
        assert not pool.make_ready(lease)
    assert pool.make_ready(lease)
    assert_holds(pool, lease, folders["all-4"])


@pytest.mark.parametrize(("pages", "slots"), [(10, 9), (99, 3)])
def test_neither_pieces_nor_slots_are_waited_for_that_pinned_ones_keep(pages, slots, monkeypatch):
    """Pages 4 to 7 of 10 are pinned: 4 and 2 are left for blocks of 1 and 5; or all slots are."""
    features = {"0": (64, 192), "1": (64, 320)}
    model = nn.Sequential(*(nn.Linear(*each) for each in features.values()))

    def read(name, path, *_, **__):
        k, n = features[path]
        factors = {path: LoraFactors(torch.randn(1, k), torch.randn(n, 1), 1.0)}
        return Adapter(name, path, factors, path, Path(path))

    monkeypatch.setattr(reading, "read_adapter", read)
    pool = AdapterPool(model, memory=pages * 64 * 4, host_memory="1MB", slots=slots)
    for name in ("first", "second"):
        pool.load(name, "0")
    pool.pin("second")
    pool.load("large", "1")
    if slots == 3:
        assert where(pool) == {"first": "host", "second": "device", "large": "device"}
        pool.pin("large")
        waiting = pool.lease("first")
    else:
        assert where(pool) == {"first": "device", "second": "device", "large": "host"}
        waiting = pool.lease("large")
    with pytest.raises(RuntimeError, match=PINNED):
        pool.make_ready(waiting)
    pool.unpin("second")
    assert pool.make_ready(waiting)


def test_a_pinned_adapter_stays_where_it_is(folders):
    pool = pool_of(folders, "all-4", "qv-16", memory=bytes_of(folders, "all-4", "rs-8"))
    pool.pin("qv-16")
    for name in ("rs-8", "one-layer-5", "all-4", "rs-8"):
        pool.load(name, folders[name])
        assert where(pool)["qv-16"] == "device"
    pool.unload("qv-16")
    assert "qv-16" not in pool


def test_pinning_brings_an_adapter_back(folders):
    pool = pool_of(folders, "all-4", memory=bytes_of(folders, "all-4"))
    pool.load("qv-16", folders["qv-16"])
    assert where(pool)["all-4"] == "disk"
    pool.pin("all-4")
    assert where(pool) == {"all-4": "device", "qv-16": "disk"}
    assert pool.list()[0].requests == 0


@pytest.mark.parametrize("room", [0, 1, 2])
def test_copies_in_host_memory_are_bounded(room, folders):
    """The least recently used are on the disk alone."""
    each = bytes_of(folders, "all-4")
    pool = pool_of(folders, memory=each, host_memory=room * each)
    for i in range(4):
        pool.load(f"it-{i}", folders["all-4"])
        assert pool.host_memory_used <= room * each
    places = ["disk", "disk", "host" if room > 1 else "disk", "device"]
    assert list(where(pool).values()) == places
    for i in (0, 3, 1):
        with running(pool, f"it-{i}") as lease:
            assert_holds(pool, lease, folders["all-4"])
    assert pool.host_memory_used <= room * each


def test_files_that_have_changed_are_not_read_under_the_old_name(folders, tmp_path):
    folder = shutil.copytree(folders["all-4"], tmp_path / "it")
    pool = pool_of(folders, memory=bytes_of(folders, "all-4"))
    pool.load("it", folder)
    pool.load("other", folders["all-4"])
    shutil.rmtree(folder)
    changed(folders["all-4"], folder, lambda name, tensor: tensor * 2)
    lease = pool.lease("it")
    with pytest.raises(
        AdapterError, match=r"it: .* has changed since it was loaded; load it again"
    ):
        pool.make_ready(lease)
    shutil.rmtree(folder)
    with pytest.raises(AdapterError, match="it: there is no folder"):
        pool.make_ready(lease)
    pool.give_back(lease)
    assert where(pool) == {"it": "disk", "other": "device"}


def test_who_waits_does_not_depend_on_the_disk_any_more(folders, tmp_path):
    folder = shutil.copytree(folders["all-4"], tmp_path / "it")
    pool = pool_of(folders, memory=bytes_of(folders, "all-4"))
    pool.load("it", folder)
    waiting = pool.lease("it")
    pool.unload("it")
    shutil.rmtree(folder)
    pool.load("other", folders["all-4"])
    assert where(pool) == {"other": "device"}
    assert pool.host_memory_used
    assert pool.make_ready(waiting)
    assert_holds(pool, waiting, folders["all-4"])
    pool.give_back(waiting)
    assert (pool.memory_used, pool.host_memory_used) == (0, 0)


def test_steps_for_which_a_batch_may_still_read_what_has_ended(folders):
    pool = pool_of(folders, "all-4", memory=bytes_of(folders, "all-4"))
    pool.grace = 2
    pool.load("qv-16", folders["qv-16"])
    with running(pool, "qv-16"):
        pass
    other = pool.lease("all-4")
    for _ in range(2):
        assert not pool.make_ready(other)
        pool.advance()
    assert pool.make_ready(other)
    pool.unload("all-4")
    pool.give_back(other)
    for _ in range(2):
        assert pool.memory_used
        pool.advance()
    assert pool.memory_used == 0


def test_the_rank_that_launches_are_for_grows(folders, tmp_path):
    pool = pool_of(folders, "all-4", "qv-16")
    assert pool.reach.max_rank == 16
    spec = {"r": 33, "target_modules": ["o_proj"]}
    with_adapters(served_model(), {"it": spec}).save_pretrained(tmp_path)
    pool.load("it", tmp_path / "it")
    assert pool.reach.max_rank == 64


def test_the_groups_that_have_launches_are_of_the_kinds_that_adapters_had(folders):
    """In all layers, so that they grow a few times at most, and a graph is captured as often."""
    pool = pool_of(folders)
    assert pool.reach.targeted == frozenset()
    kinds = {
        group.first: tuple(name.rpartition(".")[2] for name in group.names) for group in pool.groups
    }
    pool.load("qv-16", folders["qv-16"])
    assert sorted(kinds[first] for first in pool.reach.targeted) == [tuple(QKV)] * 2
    pool.load("one-layer-5", folders["one-layer-5"])  # its k_proj and down_proj
    found = sorted(kinds[first] for first in pool.reach.targeted)
    assert found == [("down_proj",)] * 2 + [tuple(QKV)] * 2
    before = pool.reach
    for name in list(pool):
        pool.unload(name)
    pool.load("qv-16", folders["qv-16"])
    assert pool.reach == before


@pytest.mark.parametrize("mode", [True, False])
def test_inference_mode_is_of_a_call_and_not_of_the_pool(mode, folders):
    """What was made in it may be written outside of it, and the other way round."""
    with torch.inference_mode(mode):
        pool = pool_of(folders, "all-4", memory=bytes_of(folders, "all-4"), host_memory="1MB")
        pool.load("live", with_adapters(served_model(), {"live": SPECS["all-4"]}))
        lease = pool.lease("all-4")
    for inside in (not mode, mode, not mode):
        with torch.inference_mode(inside):
            assert pool.make_ready(lease)
            assert_holds(pool, lease, folders["all-4"])
            pool.give_back(lease)
            with running(pool, "live"):
                assert where(pool) == {"all-4": "host", "live": "device"}
            lease = pool.lease("all-4")


def test_a_name_that_is_loaded_while_it_is_pinned_is_pinned(folders, monkeypatch):
    pool = pool_of(folders, "all-4")
    make_ready = AdapterPool.make_ready

    def late(self, lease):
        monkeypatch.undo()
        pool.load("all-4", folders["rs-8"])
        return make_ready(self, lease)

    monkeypatch.setattr(AdapterPool, "make_ready", late)
    pool.pin("all-4")
    (info,) = pool.list()
    assert (info.rank, info.pinned, info.where) == (8, True, "device")


def test_copies_for_those_that_wait_go_with_them(folders):
    pool = pool_of(folders, "rs-8", memory=bytes_of(folders, "rs-8"), host_memory=0)
    with running(pool, "rs-8"):
        pool.load("all-4", folders["all-4"])
        waits = pool.lease("all-4")
        assert not pool.make_ready(waits)
        assert pool.host_memory_used
        pool.give_back(waits)
        assert not pool.host_memory_used


def test_a_closed_pool_has_no_memory_and_still_names(folders):
    names = ["all-4", "qv-16", "rs-8"]
    memory = bytes_of(folders, *names[:2])
    pool = pool_of(folders, *names[:2], memory=memory, host_memory="1MB")
    pool.grace = 1
    held, waiting, leaving = pool.lease("all-4"), pool.lease("qv-16"), pool.lease("qv-16")
    assert pool.make_ready(held)
    assert pool.make_ready(leaving)
    pool.load("qv-16", folders["rs-8"])
    pool.give_back(leaving)
    pool.load("rs-8", with_adapters(served_model(), {"it": SPECS["rs-8"]}))
    pool.activate("rs-8")
    assert pool.host_memory_used
    tensors = [weakref.ref(tensor) for tensor in (pool.arena, pool.descriptors)]
    tensors += [weakref.ref(v.host) for v in pool._by_uid.values() if v.host is not None]
    with pytest.raises(RuntimeError, match="requests use adapters of this pool: close their eng"):
        pool.close()
    assert all(each() is not None for each in tensors)
    for close in (pool._close, pool.close):  # the first as an engine does
        close()
        assert [each() for each in tensors] == [None] * len(tensors)
        assert (pool.memory_total, pool.memory_used, pool.host_memory_used) == (0, 0, 0)
    assert where(pool) == dict.fromkeys(["all-4", "qv-16", "rs-8"], "disk")
    assert [info.requests for info in pool.list()] == [1, 0, 0]
    assert repr(pool).splitlines()[-1] == "closed"
    assert (held.slot, pool.slot_of(held.uid), pool.has_adapters(0)) == (0, 0, False)
    for call in (
        lambda: pool.load("new", folders["all-4"]),
        lambda: pool.pin("all-4"),
        lambda: pool.lease("all-4"),
        lambda: pool.make_ready(waiting),
    ):
        with pytest.raises(RuntimeError, match="the adapter pool is closed"):
            call()
    for lease in (held, waiting):
        pool.give_back(lease)
    for _ in range(2):
        pool.advance()
    pool.deactivate()
    for name in names:
        pool.unload(name)
    assert not pool._by_uid
    assert repr(pool).splitlines()[-1] == "closed"


def test_what_is_read_while_the_pool_is_closed_is_forgotten(folders, monkeypatch):
    pool = pool_of(folders, "all-4", memory=bytes_of(folders, "all-4"))
    pool.load("other", folders["all-4"])
    lease = pool.lease("all-4")

    def slow(*args, **kwargs):
        adapter = read_adapter(*args, **kwargs)
        pool.close()
        return adapter

    monkeypatch.setattr(reading, "read_adapter", slow)
    with pytest.raises(RuntimeError, match="the adapter pool is closed"):
        pool.make_ready(lease)
    assert pool.host_memory_used == 0
