"""The pool: what is loaded is what was saved, wherever it is, and as long as somebody uses it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
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
from serving_models import LINEARS, QKV, SPECS, changed, served_model, with_adapters
from torch import Tensor, nn

import fastlora
from fastlora import segmented, segments
from fastlora.adapters import reading, table, versions
from fastlora.adapters.adapter import Adapter, LoraFactors
from fastlora.adapters.errors import AdapterError
from fastlora.adapters.files import read_adapter
from fastlora.adapters.pool import AdapterPool
from fastlora.adapters.versions import Lease

MODEL = served_model()
PINNED = r" needs .* of .*, and there is too little beside what is pinned$"
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


# Loading.


@pytest.mark.parametrize("name", SPECS)
def test_what_was_saved_is_what_is_read(name, folders):
    pool = pool_of(folders, *SPECS)
    with running(pool, name) as lease:
        assert_holds(pool, lease, folders[name])


def test_siblings_are_neighbours_in_the_tables(folders):
    pool = pool_of(folders)
    suffixes = [tuple(name.rpartition(".")[2] for name in group.names) for group in pool.groups]
    assert suffixes[:3] == [tuple(QKV), ("gate_proj", "up_proj"), tuple(QKV)]
    assert ("lm_head",) in suffixes
    for group in pool.groups:
        assert pool.names[group.first : group.first + len(group.names)] == group.names
    assert sorted(pool.names) == sorted(SHAPES)


def test_what_is_told_of_an_adapter(folders):
    pool = pool_of(folders)
    info = pool.load("mine", folders["one-layer-5"])
    assert info == pool.list()[0]
    assert (info.name, info.source, info.rank) == ("mine", str(folders["one-layer-5"]), 5)
    assert info.targets == "k_proj, down_proj"
    assert (info.where, info.requests, info.pinned, info.active) == ("device", 0, False, False)
    # Pages of 64: A and B of rank 5 of two linears, [16, 32] and [32, 48].
    assert info.bytes == 4 * 64 * (3 + 2 + 4 + 3)
    pool.pin("mine")
    pool.activate("mine")
    with running(pool, "mine"):
        info = pool.list()[0]
    assert (info.requests, info.pinned, info.active) == (1, True, True)


def test_printed_it_is_a_table(folders):
    pool = pool_of(folders, "one-layer-5", "qv-16", memory="100KiB")
    pool.pin("one-layer-5")
    pool.activate("qv-16")
    with running(pool, "qv-16"):
        assert repr(pool).splitlines() == [
            "adapter      rank  size      targets            where   requests",
            "one-layer-5  5     3.0 KiB   k_proj, down_proj  device  0         pinned",
            "qv-16        16    14.0 KiB  q_proj, v_proj     device  1         active",
            "17.0 KiB of 100.0 KiB on cpu, float32",
        ]
    pool.pin("qv-16")
    assert repr(pool).splitlines()[2].endswith(" 0         active, pinned")
    live = with_adapters(served_model(), {"it": SPECS["qv-16"]})
    small = pool_of(folders, memory=bytes_of(folders, "qv-16"))
    small.load("it", live)
    small.load("other", folders["qv-16"])
    assert repr(small).splitlines()[-1].endswith("; 14.0 KiB of copies in host memory")


def test_memory_is_counted(folders):
    pool = pool_of(folders, "all-4", memory="100KiB")
    assert pool.memory_total == pool.arena.nbytes == 100 << 10
    assert pool.memory_used == bytes_of(folders, "all-4")
    pool.unload("all-4")
    assert pool.memory_used == 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1 << 20, 1 << 20),
        (2e6, 2 * 10**6),
        ("2GB", 2 * 10**9),
        ("1.5 MiB", 3 << 19),
        ("64kb", 64000),
    ],
)
def test_sizes(size, expected):
    assert table.bytes_of(size) == expected


@pytest.mark.parametrize("size", ["", "lots", "GB", "-1GB", "2 G", "1e9"])
def test_senseless_sizes_are_refused(size):
    with pytest.raises(ValueError, match="a size is bytes, or such as"):
        AdapterPool(MODEL, memory=size)


@pytest.mark.parametrize("settings", [{"memory": 0}, {"memory": 255}, {"slots": 1}])
def test_a_pool_without_room_is_refused(settings):
    with pytest.raises(ValueError, match="no room for an adapter"):
        AdapterPool(MODEL, **settings)


def test_a_model_with_adapters_or_without_linears_is_refused():
    with pytest.raises(ValueError, match=r"has peft layers \(.*q_proj\)"):
        AdapterPool(with_adapters(served_model(), {"it": SPECS["qv-16"]}))
    with pytest.raises(ValueError, match="ReLU has no linear layers"):
        AdapterPool(nn.ReLU())


def test_a_live_model_is_a_source(folders, tmp_path):
    live = with_adapters(served_model(), {"it": SPECS["rs-8"]})
    live.save_pretrained(tmp_path)
    pool = pool_of(folders, memory=bytes_of(folders, "rs-8"))
    pool.load("it", live)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.zero_()
    # It leaves the device, and cannot be read again.
    for _ in range(2):
        pool.load("other", folders["rs-8"])
        assert where(pool) == {"it": "host", "other": "device"}
        with running(pool, "it") as lease:
            assert where(pool) == {"it": "device", "other": "disk"}
            assert_holds(pool, lease, tmp_path / "it")


def test_an_adapter_of_the_head_is_loaded_as_peft_saves_it(folders, tmp_path):
    """With the head's own weight beside it, and also when it is read again."""
    model, folder = served_model(), tmp_path / "default" / "it"
    saved = with_adapters(served_model(), {"it": {"r": 4, "target_modules": ["lm_head"]}})
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        saved.save_pretrained(folder.parent)
    saved.save_pretrained(tmp_path, save_embedding_layers=False)
    with fastlora.Engine(model, {"it": folder}, adapter_memory="1MB") as engine:
        pool = engine.adapters
        assert type(model.lm_head) is not nn.Linear
        pool._evict(pool._versions["it"])
        pool._versions["it"].host = None
        with running(pool, "it") as lease:
            assert_holds(pool, lease, tmp_path / "it")
    # The same base in another dtype, rounded once.
    for dtype in (torch.bfloat16, torch.float16):
        other = served_model().to(dtype)
        AdapterPool(other, memory="1MB").load("it", folder)
    pool = AdapterPool(model, memory="1MB")
    pool.load("it", folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with pytest.raises(AdapterError, match="is not what the base model has there"):
        pool.load("it", folder)
    # The pool alone does not keep the model alive.
    gone = weakref.ref(model)
    del model, engine
    gc.collect()
    assert gone() is None
    with pytest.raises(AdapterError, match="no such weight to compare it with"):
        pool.load("it", folder)


# Names and versions.


def test_unknown_names_are_told_with_those_that_are_known(folders):
    pool = pool_of(folders, "all-4", "qv-16")
    for call in (pool.unload, pool.pin, pool.unpin, pool.activate, pool.lease):
        with pytest.raises(KeyError, match="no adapter is called 'none'; loaded are: all-4, qv-16"):
            call("none")
    assert list(pool) == ["all-4", "qv-16"]
    assert (len(pool), "all-4" in pool, "none" in pool) == (2, True, False)


def test_a_name_that_is_unloaded_is_gone_at_once_and_its_weights_when_nobody_uses_them(folders):
    pool = pool_of(folders, "all-4")
    with running(pool, "all-4") as lease:
        pool.unload("all-4")
        with pytest.raises(KeyError):
            pool.lease("all-4")
        assert pool.memory_used == bytes_of(folders, "all-4")
        assert_holds(pool, lease, folders["all-4"])
        slot, uid = lease.slot, lease.uid
        assert pool.slot_of(uid) == slot
    assert pool.memory_used == 0
    assert not pool.descriptors.any()
    assert pool.slot_of(uid) == 0


def test_a_name_that_is_loaded_again_is_another_version_for_new_leases_only(folders):
    pool = pool_of(folders)
    pool.load("it", folders["all-4"])
    pool.pin("it")
    pool.activate("it")
    with running(pool, "it") as old:
        pool.load("it", folders["rs-8"])
        with running(pool, "it") as new:
            assert old.uid != new.uid
            assert old.slot != new.slot
            assert_holds(pool, old, folders["all-4"])
            assert_holds(pool, new, folders["rs-8"])
        assert pool.active == "it"
        assert pool.list()[0].pinned
    assert pool.memory_used == bytes_of(folders, "rs-8")
    # The same files again are a new version, too.
    with running(pool, "it") as lease:
        uid = lease.uid
    pool.load("it", folders["rs-8"])
    with running(pool, "it") as lease:
        assert lease.uid != uid


def test_a_slot_that_is_used_again_has_nothing_of_what_was_there(folders):
    pool = pool_of(folders, "all-4", slots=2)
    pool.load("few", folders["one-layer-5"])
    with running(pool, "few") as lease:
        assert lease.slot == 1
        assert_holds(pool, lease, folders["one-layer-5"])
    assert int((pool.descriptors[:, 1, 2] > 0).sum()) == 2


def test_the_active_adapter(folders):
    pool = pool_of(folders, "all-4", "qv-16")
    assert pool.active is None
    pool.activate("qv-16")
    assert pool.active == "qv-16"
    with pytest.raises(ValueError, match="qv-16 is active: deactivate it first, or activate anoth"):
        pool.unload("qv-16")
    assert (pool.active, list(pool)) == ("qv-16", ["all-4", "qv-16"])
    pool.activate("all-4")
    pool.unload("qv-16")
    assert pool.active == "all-4"
    pool.load("all-4", folders["rs-8"])
    assert pool.active == "all-4"
    pool.deactivate()
    assert pool.active is None
    pool.unload("all-4")


def test_a_lease_of_the_base_model_is_nothing(folders):
    pool = pool_of(folders)
    lease = pool.lease(None)
    assert (lease.slot, lease.uid) == (0, 0)
    assert pool.hold(lease)
    assert pool.make_ready(lease)
    pool.give_back(lease)


def test_a_lease_ends_once(folders):
    pool = pool_of(folders, "all-4")
    first, second = pool.lease("all-4"), pool.lease("all-4")
    assert pool.hold(first)
    assert pool.hold(first)
    for _ in range(3):
        pool.give_back(first)
    assert pool.list()[0].requests == 1
    # One that has ended holds nothing.
    assert pool.hold(first)
    assert pool.make_ready(first)
    pool.give_back(second)
    assert pool._may_leave(pool._versions["all-4"])
    pool.unload("all-4")
    assert pool.memory_used == 0


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


# What cannot be used.


def not_a_number(name: str, tensor: Tensor) -> Tensor:
    tensor[0, 0] = float("nan")
    return tensor


REFUSED = [
    pytest.param(not_a_number, {}, "has NaN in it", id="nan"),
    pytest.param(lambda _, tensor: tensor * 1e25, {}, r"too large: .* by inf, and", id="overflow"),
    pytest.param(lambda _, tensor: tensor * 1e5, {}, r"q_proj are too large: .* \d", id="large"),
    pytest.param(lambda _, t: t, {"lora_alpha": 1e10}, r"q_proj are too large", id="scaling"),
    pytest.param(lambda _, t: t[:, :-1].contiguous(), {}, "has shape|of rank", id="shape"),
    pytest.param(None, {"use_dora": True}, "DoRA", id="dora"),
    pytest.param(None, {"bias": "all"}, "biases of the base model", id="bias"),
]


@pytest.mark.parametrize(("change", "fields", "reason"), REFUSED)
def test_what_cannot_be_used_is_refused_and_nothing_else_is_touched(
    change, fields, reason, folders, tmp_path
):
    folder = changed(folders["all-4"], tmp_path / "bad", change, **fields)
    pool = pool_of(folders, "all-4", "qv-16", memory=bytes_of(folders, "all-4", "qv-16"))
    before = (pool.list(), pool.descriptors.clone(), pool.arena.clone())
    for name in ("bad", "all-4"):
        with pytest.raises(AdapterError, match=f"^{name}: .*{reason}"):
            pool.load(name, folder)
    assert pool.list() == before[0]
    assert torch.equal(pool.descriptors, before[1])
    assert torch.equal(pool.arena.view(torch.int32), before[2].view(torch.int32))


def test_an_adapter_that_is_larger_than_the_pool_is_refused(folders):
    pool = pool_of(folders, "qv-16", memory=bytes_of(folders, "qv-16"))
    with pytest.raises(
        AdapterError, match=r"all-4: it takes .* in torch.float32, and the pool has"
    ):
        pool.load("all-4", folders["all-4"])
    assert where(pool) == {"qv-16": "device"}


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


def test_names_are_checked(folders):
    pool = pool_of(folders)
    for name in ("", "../up", "none", "a b"):
        with pytest.raises(AdapterError, match="cannot be the name of an adapter"):
            pool.load(name, folders["all-4"])
    assert len(pool) == 0


def test_numbers_that_a_16_bit_model_cannot_hold_are_refused(folders, tmp_path):
    def one(name, tensor):
        tensor[0, 0] = 7e4 if "lora_A" in name else 0.0
        return tensor

    folder = changed(folders["all-4"], tmp_path / "it", one)
    pool = AdapterPool(served_model().half(), memory="1MB")
    with pytest.raises(AdapterError, match=r"it: .* beyond the range of float16"):
        pool.load("it", folder)
    assert AdapterPool(served_model().bfloat16(), memory="1MB").load("it", folder)


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
