"""The pool: what is loaded is what was saved, under a name, in versions, while it is used."""

from __future__ import annotations

import gc
import weakref

import pytest
import small_pools
import torch
from serving_models import QKV, SPECS, changed, served_model, with_adapters
from small_pools import MODEL, SHAPES, assert_holds, bytes_of, pool_of, running, where
from torch import Tensor, nn

import fastlora
from fastlora.adapters import table
from fastlora.adapters.errors import AdapterError
from fastlora.adapters.pool import AdapterPool

folders = small_pools.folders


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
