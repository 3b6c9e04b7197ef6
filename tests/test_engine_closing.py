"""Errors of the engine itself, and its end: the model is what it was, and no thread is left."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import small_engines
import torch
from serving_models import PATIENCE, SPECS, ask, engine_of, served_model, state_of, with_adapters
from small_engines import LONG, WORDS, make, one_at_a_time, own_threads, prompt_of, until
from transformers.generation.continuous_batching import continuous_api

import fastlora
from fastlora.adapters.errors import AdapterError
from fastlora.adapters.pool import AdapterPool
from fastlora.serving import batching, linears

judge = small_engines.judge


# Errors of the engine itself.


def test_an_error_ends_requests_with_its_reason_and_the_engine_begins_again(judge):
    prompt, threads = prompt_of(5), own_threads()
    with make(judge, "all-4", "rs-8", attention="eager") as engine:
        ask(engine, [prompt], "all-4", 2)
        requests = [
            engine.submit(prompt, name, num_return_sequences=2, **LONG) for name in ("all-4", None)
        ]

        def broken(*args):
            raise RuntimeError("out of something")

        engine._running().batch_processor.scheduler.schedule_batch = broken
        for request in requests:
            for result in request.results(PATIENCE):
                assert result.finish_reason == "error"
                assert "out of something" in result.error
        assert ask(engine, [prompt], "rs-8", 4) == [judge.answer(prompt, "rs-8", 4)]
        assert all(info.requests == 0 for info in engine.adapters.list())
        assert own_threads() == [*threads, "fastlora-engine"]
    assert engine.model.config._attn_implementation == "eager"


def test_an_engine_that_was_made_in_inference_mode_loads_and_answers(judge):
    """Its threads are not in that mode, nor is whoever loads."""
    with torch.inference_mode():
        engine = one_at_a_time(judge, "rs-8", "all-4")
        prompts, names = [prompt_of(5)] * 3, ["rs-8", "all-4", None]
        found = [ask(engine, prompts, names, 4)]
    with engine:
        found.append(ask(engine, prompts, names, 4))
        engine.adapters.load("rs-8", judge.folders["rs-8"])
        found.append(ask(engine, prompts, names, 4))
        engine.adapters.unload("all-4")
    assert found == [judge.answers(prompts, names, 4)] * 3


def test_an_error_of_giving_back_ends_neither_the_engine_nor_the_patience_of_others(
    judge, monkeypatch, caplog
):
    """It is told, and the request has its answer."""

    def broken(self, version):
        raise RuntimeError("an unspecified launch failure")

    with make(judge, "all-4", "rs-8") as engine:
        request = engine.submit(prompt_of(5), "rs-8", **{**LONG, "max_new_tokens": 60})
        with monkeypatch.context() as patched:
            patched.setattr(AdapterPool, "_evict", broken)
            engine.adapters.unload("rs-8")
            result = request.result(PATIENCE)
        assert result.token_ids == judge.answer(prompt_of(5), "rs-8", 60)
        assert "launch failure" in caplog.text
        assert request.id in caplog.text
        manager = engine._manager
        assert ask(engine, [prompt_of(5)], "all-4", 4) == [judge.answer(prompt_of(5), "all-4", 4)]
        assert engine._manager is manager


def test_an_engine_that_cannot_begin_says_why(judge, monkeypatch):
    def broken(*args, **kwargs):
        raise MemoryError("no room for keys")

    with make(judge) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(continuous_api, "PagedAttentionCache", broken)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="the engine has stopped: no room for keys"):
                    engine.submit(prompt_of(5), "all-4")
        assert ask(engine, [prompt_of(5)], None, 2) == [judge.answer(prompt_of(5), None, 2)]


def test_settings_that_cannot_be_leave_the_model_alone(judge):
    with make(judge, attention="eager", page_size=1) as engine:
        before = state_of(engine.model)
        for _ in range(2):
            with pytest.raises(ValueError, match="page_size must be at least"):
                engine.generate([prompt_of(5)])
        assert state_of(engine.model) == before


def test_a_request_that_comes_when_the_engine_dies_ends(judge):
    """Between the check that it runs and the end of its thread."""
    with make(judge) as engine:
        manager = engine._running()
        put = manager.input_queue.put

        def late(state, timeout):
            manager.background_thread_status.request_stop(2, 0)
            manager._generation_thread.join(PATIENCE)
            put(state, timeout=timeout)

        manager.input_queue.put = late
        with pytest.raises(RuntimeError, match="The background thread is stopping"):
            engine.submit(prompt_of(5), "all-4")
        assert len(engine._requests) == 0
        assert all(info.requests == 0 for info in engine.adapters.list())


# The end.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_closing_makes_the_model_what_it_was(attention, judge):
    model = served_model(attention=attention, **WORDS)
    model.model.layers[1].train()
    ids = torch.tensor([prompt_of(9)])
    before = state_of(model), model(ids).logits
    engine = engine_of(model, judge.folders)
    assert state_of(model) != before[0]
    assert not model.model.layers[1].training
    ask(engine, [prompt_of(5)], "all-4", 4)
    assert type(model.model.layers[0].mlp.up_proj) is linears.RoutedLinear
    engine.close()
    engine.close()
    assert state_of(model) == before[0]
    assert torch.equal(model(ids).logits, before[1])
    with engine_of(model, judge.folders) as engine:
        found = ask(engine, [prompt_of(5)], "all-4", 4)
    assert found == [judge.answer(prompt_of(5), "all-4", 4)]


def test_closing_frees_the_memory_of_adapters_whoever_has_the_engine(judge):
    engine = one_at_a_time(judge, "rs-8", "all-4")
    ask(engine, [prompt_of(5)] * 2, ["rs-8", "all-4"], 4)
    request = engine.submit(prompt_of(5), "all-4", **LONG)
    arena = weakref.ref(engine.adapters.arena)
    engine.close()
    assert request.result(0).finish_reason == "cancelled"
    assert arena() is None
    assert engine.adapters.memory_total == 0
    assert [info.where for info in engine.adapters.list()] == ["disk", "disk"]
    assert repr(engine).endswith("closed")
    with pytest.raises(RuntimeError, match="the adapter pool is closed"):
        engine.adapters.load("rs-8", judge.folders["rs-8"])


def test_whoever_calls_the_model_beside_the_engine_gets_the_base(judge):
    model = served_model(**WORDS)
    ids = torch.tensor([prompt_of(9)])
    before = model(ids).logits
    with engine_of(model, judge.folders) as engine:
        ask(engine, [prompt_of(5)], "all-4", 4)
        assert torch.equal(model(ids).logits, before)
        assert repr(model.model.layers[0].self_attn.q_proj).startswith("Linear(in_features=32,")
        assert set(model.state_dict()) == set(served_model(**WORDS).state_dict())


def test_forwards_of_others_take_turns_with_the_engine_s(judge):
    """transformers changes the model's config for as long as one runs."""
    model = served_model(**WORDS)
    ids = torch.tensor([prompt_of(9)])
    model.config.is_causal = True
    before, config = model(ids).logits, model.config.to_dict()
    with engine_of(model, judge.folders) as engine:
        request = engine.submit(prompt_of(5), "all-4", **LONG)
        calls = 0
        while not request.is_over:
            assert torch.equal(model(ids).logits, before)
            calls += 1
        assert calls > 3
        assert request.result().token_ids == judge.answer(prompt_of(5), "all-4", 400)
    assert model.config.to_dict() == config


@pytest.mark.filterwarnings("ignore:this one is not known")
@pytest.mark.parametrize("calls", ["the model", "generate"])
def test_a_forward_that_is_interrupted_ends_its_batch(calls, judge, monkeypatch):
    """Ctrl-C comes inside of it; then nobody waits for its turn, and the base is the base."""
    model = served_model(**WORDS)
    ids = torch.tensor([prompt_of(9)])
    before = model(ids).logits
    interrupts = [True]

    def interrupt(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and interrupts.pop():
            raise KeyboardInterrupt

    with engine_of(model, judge.folders) as engine:
        ask(engine, [prompt_of(5)], "all-4", 2)
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        call = functools.partial(model, ids)
        if calls == "generate":
            monkeypatch.setattr(batching, "unsupported_reason", lambda: "this one is not known")
            call = functools.partial(engine.generate, [prompt_of(5)], "all-4", max_new_tokens=3)
        with pytest.raises(KeyboardInterrupt):
            call()
        monkeypatch.undo()
        handle.remove()
        assert torch.equal(model(ids).logits, before)
        # In another thread, as the engine's own is.
        assert ask(engine, [prompt_of(5)], "all-4", 4) == [judge.answer(prompt_of(5), "all-4", 4)]


def test_who_waits_for_an_adapter_when_the_engine_has_died_is_told(judge):
    with one_at_a_time(judge, "rs-8", "all-4") as engine:
        manager = engine._running()
        held = engine.adapters.lease("rs-8")
        assert engine.adapters.make_ready(held)
        manager.background_thread_status.request_stop(2, 0)
        manager._generation_thread.join(PATIENCE)
        waits = engine.submit(prompt_of(5), "all-4", **LONG)
    assert waits.result(PATIENCE).finish_reason == "cancelled"
    engine.adapters.give_back(held)


def test_closing_cancels_what_runs_and_what_waits(judge):
    engine = one_at_a_time(judge, "rs-8", "all-4", attention="eager")
    before = state_of(served_model(attention="eager", **WORDS))
    options = {**LONG, "num_return_sequences": 2}
    requests = [
        engine.submit(prompt_of(5), name, **options) for name in ("rs-8", "all-4", None, "rs-8")
    ]
    blocked: list[Any] = []
    thread = threading.Thread(
        target=lambda: blocked.append(engine.generate([prompt_of(5)] * 2, "rs-8", **LONG))
    )
    thread.start()
    assert until(lambda: len(engine._requests) == 6)
    closing = threading.Thread(target=engine.close)
    closing.start()
    engine.close()
    for each in (closing, thread):
        each.join(PATIENCE)
        assert not each.is_alive()
    results = [result for request in requests for result in request.results(0)] + blocked[0]
    assert {result.finish_reason for result in results} == {"cancelled"}
    assert {result.error for result in results} == {None}
    assert own_threads().count("fastlora-loader") <= 1
    assert state_of(engine.model) == before
    assert all(info.requests == 0 for info in engine.adapters.list())
    assert "closed" in repr(engine)
    for begin in (engine.generate, engine.submit, lambda prompt: next(engine.stream(prompt))):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            begin(prompt_of(5))


def test_no_thread_is_left(judge):
    before = own_threads()
    with one_at_a_time(judge, "rs-8", "all-4") as engine:
        ask(engine, [prompt_of(5)] * 2, ["rs-8", "all-4"], 4)
        assert len(own_threads()) == len(before) + 2
    assert own_threads() == before


def test_an_engine_that_nobody_has_any_more_is_closed(judge):
    model = served_model(attention="eager", **WORDS)
    before, threads = state_of(model), own_threads()
    engine = engine_of(model, judge.folders)
    ask(engine, [prompt_of(5)], "all-4", 4)
    gone = weakref.ref(engine)
    # A request keeps it, until it is over and nobody has it either.
    request = engine.submit(prompt_of(5), "all-4", **{**LONG, "max_new_tokens": 60})
    del engine
    assert request.result(PATIENCE).token_ids == judge.answer(prompt_of(5), "all-4", 60)
    del request
    gc.collect()
    assert gone() is None
    assert until(lambda: own_threads() == threads)
    assert state_of(model) == before


def test_an_engine_may_end_on_its_own_thread(judge):
    """There the last one who has it may be a request that has just ended."""
    model = served_model(**WORDS)
    before, threads = state_of(model), own_threads()
    engine = engine_of(model, judge.folders)
    gone = weakref.ref(engine)
    engine.submit(prompt_of(5), "all-4", **{**LONG, "max_new_tokens": 30})
    del engine
    assert until(lambda: gone() is None)
    assert until(lambda: own_threads() == threads)
    assert until(lambda: state_of(model) == before)


def test_a_process_ends_with_an_engine_that_nobody_closed(judge):
    script = f"""
import torch
from serving_models import engine_of, served_model
engine = engine_of(served_model(vocab_size=264), {{"it": {str(judge.folders["all-4"])!r}}})
request = engine.submit([1, 2, 3], "it", stream=True, max_new_tokens=400, ignore_eos=True)
engine.submit([1, 2, 3], max_new_tokens=400, ignore_eos=True)
while not request._tokens:
    pass
print("running")
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "running\n"), run.stderr


def test_an_engine_that_is_not_made_leaves_the_model_alone(judge, tmp_path):
    model = served_model(**WORDS)
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"^it: "):
        engine_of(model, {"it": tmp_path})
    with pytest.raises(ValueError, match='a size is bytes, or such as "2GB"'):
        fastlora.Engine(model, adapter_memory="lots")
    assert state_of(model) == before
    with engine_of(model):
        attached = state_of(model)
        with pytest.raises(ValueError, match="another engine runs on this model"):
            engine_of(model)
        assert state_of(model) == attached
    assert state_of(model) == before
    with pytest.raises(ValueError, match="the model has peft layers"):
        engine_of(with_adapters(model, {"it": SPECS["qv-16"]}))
    gc.collect()
