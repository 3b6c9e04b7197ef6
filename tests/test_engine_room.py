"""Adapters that wait for room, come, change and go while requests run."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
import time

import pytest
import small_engines
import torch
from serving_models import PATIENCE, SPECS, ask, changed, patiently
from small_engines import LONG, make, make_pool, one_at_a_time, own_threads, prompt_of, until

from fastlora.adapters.errors import AdapterError
from fastlora.adapters.pool import AdapterPool
from fastlora.serving import engine as engine_module
from fastlora.serving.requests import Result

judge = small_engines.judge


# Room for adapters.


def test_requests_take_turns_where_there_is_room_for_one_adapter(judge):
    names = ["all-4", "rs-8", "all-4", None, "qv-16", "rs-8", "all-4"]
    prompts = [prompt_of(5 + i) for i in range(len(names))]
    with one_at_a_time(judge, "all-4", "rs-8", "qv-16") as engine:
        assert ask(engine, prompts, names, 8) == judge.answers(prompts, names, 8)
        assert engine.adapters.memory_used <= engine.adapters.memory_total


def test_those_that_wait_do_not_keep_the_first_of_them_waiting(judge):
    """One waits for another adapter to leave, and behind it one for that very adapter."""
    prompt = prompt_of(5)
    options = {**LONG, "max_new_tokens": 8}
    with one_at_a_time(judge, "rs-8", "all-4") as engine:
        first = engine.submit(prompt, "all-4", **LONG)
        requests = [engine.submit(prompt, "rs-8", **options)]
        assert until(lambda: engine._requests._starved)
        requests += [engine.submit(prompt, name, **options) for name in ("all-4", "rs-8")]
        first.cancel()
        for request in requests:
            expected = judge.answer(prompt, request.adapter, 8)
            assert request.result(PATIENCE).token_ids == expected


def test_the_base_needs_no_room(judge):
    with one_at_a_time(judge, "rs-8", "all-4") as engine:
        first = engine.submit(prompt_of(5), "rs-8", **LONG)
        assert until(lambda: engine.adapters.list()[0].where == "device")
        waits = engine.submit(prompt_of(5), "all-4", **LONG)
        assert ask(engine, [prompt_of(5)], None, 4) == [judge.answer(prompt_of(5), None, 4)]
        assert not first.is_over
        assert not waits.is_over
        waits.cancel()
        assert waits.result(PATIENCE) == Result("", [], "all-4", "cancelled", None, 5)
        first.cancel()


def test_nobody_overtakes_one_that_finds_no_room(judge):
    """Or those for the adapter that is there might keep it waiting for ever."""
    options = {**LONG, "max_new_tokens": 4}
    with one_at_a_time(judge, "rs-8", "all-4") as engine:
        first = engine.submit(prompt_of(5), "rs-8", **LONG)
        assert until(lambda: engine.adapters.list()[0].where == "device")
        waits = engine.submit(prompt_of(5), "all-4", **options)
        assert until(lambda: engine._requests._starved)
        later = engine.submit(prompt_of(5), "rs-8", **options)
        assert [each.id for each, _ in engine._requests._waiting] == [waits.id, later.id]
        first.cancel()
        for request in (waits, later):
            expected = judge.answer(prompt_of(5), request.adapter, 4)
            assert request.result(PATIENCE).token_ids == expected


def test_room_that_will_never_be_is_an_error_of_the_request(judge):
    with one_at_a_time(judge, "rs-8", "all-4", "qv-16") as engine:
        engine.adapters.pin("rs-8")
        names = ["rs-8", "all-4", None, "qv-16"]
        results = patiently(
            engine.generate, [prompt_of(5)] * 4, names, **{**LONG, "max_new_tokens": 4}
        )
        assert [result.finish_reason for result in results] == [
            "length",
            "error",
            "length",
            "error",
        ]
        assert "there is too little beside what is pinned" in results[1].error
        engine.adapters.unpin("rs-8")
        assert ask(engine, [prompt_of(5)], "all-4", 4) == [judge.answer(prompt_of(5), "all-4", 4)]


def test_one_that_may_leave_makes_nobody_wait_for_what_is_pinned(judge):
    """And nobody waits behind a request that was told so."""
    sizes = {info.name: info.bytes for info in make_pool(judge).list()}
    with make(judge, "all-4", memory=sizes["all-4"] + sizes["one-layer-5"]) as engine:
        engine.adapters.pin("all-4")
        for name, source in (("small", "one-layer-5"), ("large", "all-4")):
            engine.adapters.load(name, judge.folders[source])
        assert [info.where for info in engine.adapters.list()] == ["device", "device", "disk"]
        options = {**LONG, "max_new_tokens": 4}
        names = ["large", "small", "all-4", None]
        requests = [engine.submit(prompt_of(5), name, **options) for name in names]
        results = [request.result(PATIENCE) for request in requests]
        assert "large needs" in results[0].error
        for result, source in zip(results[1:], ["one-layer-5", "all-4", None], strict=True):
            assert result.token_ids == judge.answer(prompt_of(5), source, 4)


def test_an_adapter_that_cannot_be_read_again_is_an_error_of_its_requests(judge, tmp_path):
    folder = shutil.copytree(judge.folders["all-4"], tmp_path / "it")
    with one_at_a_time(judge, "rs-8") as engine:
        engine.adapters.load("it", folder)
        engine.adapters.load("rs-8", judge.folders["rs-8"])
        shutil.rmtree(folder)
        names = ["it", "rs-8", "it", None]
        results = patiently(
            engine.generate, [prompt_of(5)] * 4, names, **{**LONG, "max_new_tokens": 4}
        )
        for result in results:
            if result.adapter == "it":
                assert result.error.startswith("it: there is no folder")
            else:
                assert result.token_ids == judge.answer(prompt_of(5), result.adapter, 4)


def test_an_adapter_that_does_not_get_to_the_device_is_an_error_of_one_request(judge, monkeypatch):
    """Neither that one nor those after it are answered by the base model, or with half of it."""
    failures = itertools.count()
    upload = AdapterPool._upload

    def fails_at_first(*args):
        if not next(failures):
            raise torch.OutOfMemoryError("no memory is left")
        upload(*args)

    with one_at_a_time(judge, "rs-8", "all-4") as engine:
        monkeypatch.setattr(AdapterPool, "_upload", fails_at_first)
        options = {**LONG, "max_new_tokens": 8}
        results = patiently(engine.generate, [prompt_of(5)] * 3, ["rs-8", "rs-8", None], **options)
        assert results[0].error == "no memory is left"
        for result in results[1:]:
            assert result.token_ids == judge.answer(prompt_of(5), result.adapter, 8)


def test_others_overtake_while_an_adapter_is_read(judge, monkeypatch):
    read, go_on = threading.Event(), threading.Event()
    read_adapter = engine_module.AdapterPool._bring_to_host

    def slow(self, version):
        if version.name == "rs-8":
            read.set()
            assert go_on.wait(PATIENCE)
        read_adapter(self, version)

    with make(judge, "all-4", "rs-8") as engine:
        with engine.adapters._lock:
            engine.adapters._evict(engine.adapters._versions["rs-8"])
        monkeypatch.setattr(AdapterPool, "_bring_to_host", slow)
        waits = engine.submit(prompt_of(5), "rs-8", **{**LONG, "max_new_tokens": 4})
        assert read.wait(PATIENCE)
        assert ask(engine, [prompt_of(5)], "all-4", 4) == [judge.answer(prompt_of(5), "all-4", 4)]
        go_on.set()
        assert waits.result(PATIENCE).token_ids == judge.answer(prompt_of(5), "rs-8", 4)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_what_is_withdrawn_while_its_adapter_is_read_takes_nobody_with_it(how, judge, monkeypatch):
    read, go_on = threading.Event(), threading.Event()
    bring_to_host = AdapterPool._bring_to_host

    def slow(self, version):
        read.set()
        assert go_on.wait(PATIENCE)
        bring_to_host(self, version)

    threads = own_threads()
    engine = one_at_a_time(judge, "rs-8", "all-4")
    with engine:
        monkeypatch.setattr(AdapterPool, "_bring_to_host", slow)
        options = {**LONG, "max_new_tokens": 4}
        requests = [engine.submit(prompt_of(5), name, **options) for name in ("rs-8", "rs-8")]
        assert read.wait(PATIENCE)
        requests[0].cancel()
        if how == "cancel":
            go_on.set()
            expected = judge.answer(prompt_of(5), "rs-8", 4)
            assert requests[1].result(PATIENCE).token_ids == expected
        else:
            threading.Timer(0.1, go_on.set).start()
            engine.close()
            assert own_threads() == threads
            assert requests[1].result(PATIENCE).finish_reason == "cancelled"
        assert requests[0].result(PATIENCE).finish_reason == "cancelled"
        assert all(info.requests == 0 for info in engine.adapters.list())


# Loading while requests run.


def test_adapters_are_loaded_and_unloaded_while_requests_run(judge):
    prompt = prompt_of(5)
    with make(judge, "all-4") as engine:
        old = engine.submit(prompt, "all-4", **{**LONG, "max_new_tokens": 60})
        engine.adapters.load("all-4", judge.folders["rs-8"])
        new = engine.submit(prompt, "all-4", **{**LONG, "max_new_tokens": 40})
        engine.adapters.unload("all-4")
        with pytest.raises(KeyError):
            engine.submit(prompt, "all-4")
        engine.adapters.load("other", judge.folders["qv-16"])
        assert ask(engine, [prompt], "other", 4) == [judge.answer(prompt, "qv-16", 4)]
        assert new.result(PATIENCE).token_ids == judge.answer(prompt, "rs-8", 40)
        assert old.result(PATIENCE).token_ids == judge.answer(prompt, "all-4", 60)
        assert until(lambda: engine.adapters.memory_used == engine.adapters.list()[0].bytes)


def test_an_adapter_that_is_refused_disturbs_nobody(judge, tmp_path):
    def ruined(name, tensor):
        tensor[0, 0] = float("nan")
        return tensor

    prompt = prompt_of(5)
    with make(judge, "all-4") as engine:
        request = engine.submit(prompt, "all-4", **{**LONG, "max_new_tokens": 60})
        bad = changed(judge.folders["all-4"], tmp_path / "bad", ruined)
        cut = shutil.copytree(judge.folders["all-4"], tmp_path / "cut")
        weights = cut / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        for folder, reason in ((bad, "has NaN in it"), (cut, "is cut off"), (tmp_path, "config")):
            for name in ("new", "all-4"):
                with pytest.raises(AdapterError, match=f"^{name}: .*{reason}"):
                    engine.adapters.load(name, folder)
        assert request.result(PATIENCE).token_ids == judge.answer(prompt, "all-4", 60)
        assert list(engine.adapters) == ["all-4"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_largest_adapter_that_is_allowed_does_not_reach_others(attention, judge, tmp_path):
    """Others' scores are masked by adding to them, which makes a NaN everybody's."""
    prompts = [prompt_of(9), prompt_of(6), prompt_of(7)]
    with make(judge, "all-4", attention=attention) as engine:
        for power in range(60, 0, -1):
            folder = tmp_path / f"{power}"
            changed(judge.folders["rs-8"], folder, lambda _, t, power=power: t * 2.0**power)
            with contextlib.suppress(AdapterError):
                engine.adapters.load("large", folder)
                break
        assert power > 5
        options = {**LONG, "max_new_tokens": 8}
        results = engine.generate(prompts, ["large", "all-4", "large"], **options)
        assert results[1].token_ids == judge.answer(prompts[1], "all-4", 8)
        options = {**options, "do_sample": True}
        assert [r.error for r in engine.generate(prompts, ["large", None, "large"], **options)] == [
            None
        ] * 3


def test_threads_submit_cancel_load_and_unload_at_once(judge):
    """What is not cancelled is the answer of one of the versions that its name had."""
    names, sources = ["x", "y", "z"], list(SPECS)
    new = 6
    prompts = [prompt_of(n) for n in (5, 12, 26)]
    expected = {
        (i, source): judge.answer(prompt, source, new)
        for i, prompt in enumerate(prompts)
        for source in [None, *sources]
    }
    stop = threading.Event()
    failures: list[BaseException] = []
    answered = itertools.count()

    def guarded(function):
        def run(seed):
            picks = iter(
                torch.randint(1000, (4000,), generator=torch.Generator().manual_seed(seed))
            )
            try:
                while not stop.is_set():
                    function(lambda n: int(next(picks)) % n)
            except StopIteration:
                pass
            except BaseException as error:
                failures.append(error)

        return run

    def user(pick):
        i, name = pick(len(prompts)), [None, *names][pick(4)]
        with contextlib.suppress(KeyError):
            request = engine.submit(
                prompts[i], name, max_new_tokens=new, ignore_eos=True, do_sample=False
            )
            if pick(4) == 0:
                request.cancel()
            result = request.result(PATIENCE)
            assert result.error is None, result.error
            if result.finish_reason == "cancelled":
                return
            possible = [expected[i, source] for source in ([None] if name is None else sources)]
            assert result.token_ids in possible
            next(answered)

    def loader(pick):
        name, source = names[pick(3)], sources[pick(4)]
        engine.adapters.load(name, judge.folders[source])
        if pick(2):
            with contextlib.suppress(KeyError):
                engine.adapters.unload(names[pick(3)])
        time.sleep(0.005)

    sizes = {info.name: info.bytes for info in make_pool(judge).list()}
    with make(memory=sizes["all-4"] + sizes["rs-8"], num_blocks=40) as engine:
        threads = [
            threading.Thread(target=guarded(function), args=(seed,))
            for seed, function in enumerate([user, user, user, loader, loader])
        ]
        for thread in threads:
            thread.start()
        time.sleep(2.0)
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
        assert not failures
        assert next(answered) > 20
        assert len(engine._requests) == 0
        assert all(info.requests == 0 for info in engine.adapters.list())
        for name in list(engine.adapters):
            engine.adapters.unload(name)
        assert engine.adapters.memory_used == 0
