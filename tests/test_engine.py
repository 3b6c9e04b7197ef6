"""The engine: prompts and options, requests under way, and the model that it leaves as it was."""

from __future__ import annotations

import contextlib
import gc
import itertools
import shutil
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_models import (
    NAMES,
    PATIENCE,
    SPECS,
    Judge,
    ask,
    bytes_tokenizer,
    changed,
    engine_of,
    patiently,
    prompts_of,
    served_model,
    state_of,
    with_adapters,
)
from torch import nn
from torch.nn import functional
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import fastlora
from fastlora.adapters.errors import AdapterError
from fastlora.adapters.pool import AdapterPool
from fastlora.segments import Segments
from fastlora.serving import batching, linears
from fastlora.serving import engine as engine_module
from fastlora.serving.engine import Engine
from fastlora.serving.requests import Request, Result
from fastlora.serving.sampling import SamplingProcessors

TOKENIZER = bytes_tokenizer()
WORDS = {"vocab_size": 264}
LONG = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 400}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("adapters"), **WORDS)


def make(
    judge: Judge | None = None, *names: str, attention: str = "sdpa", **options: Any
) -> Engine:
    """Return an engine with some of the judge's adapters, or all."""
    folders = {} if judge is None else judge.folders
    folders = {name: folders[name] for name in names or folders}
    options = {"memory": "1MB", "num_blocks": 128, **options}
    engine = engine_of(served_model(attention=attention, **WORDS), folders, **options)
    engine.tokenizer = TOKENIZER
    return engine


@pytest.fixture(scope="module")
def shared(judge: Judge) -> Iterator[Engine]:
    """An engine for tests that leave it as it is."""
    with make(judge) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test no request is open, and no lease."""
    yield
    if "shared" in request.fixturenames:
        engine = request.getfixturevalue("shared")
        assert until(lambda: len(engine._requests) == 0)
        assert all(info.requests == 0 for info in engine.adapters.list())


def until(holds: Any) -> bool:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(holds())


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastlora")]


def prompt_of(length: int, seed: int = 7) -> list[int]:
    return prompts_of(length, seed=seed, vocabulary=256)[0]


@contextlib.contextmanager
def waiting_forever(engine: Engine) -> Iterator[list[Request]]:
    """Keep the engine's adapters on the device by requests that run."""
    requests = [engine.submit(prompt_of(5), name, **LONG) for name in engine.adapters]
    yield requests
    for request in requests:
        request.cancel()


# What a prompt is.


def test_strings_tokens_and_messages_are_prompts(shared, judge):
    text = "état"
    tokens = TOKENIZER(text)["input_ids"]
    assert len(tokens) == 5
    messages = [{"role": "user", "content": "hi"}]
    chat = TOKENIZER("user: hi\nassistant:")["input_ids"]
    expected = [judge.answer(each, "all-4", 6) for each in (tokens, tokens, chat)]
    assert ask(shared, [text, tokens, messages], "all-4", 6) == expected
    for one, answer in ((text, 0), (tokens, 1), (messages, 2)):
        assert ask(shared, one, "all-4", 6) == [expected[answer]]


def test_tensors_and_arrays_are_prompts(shared, judge):
    tokens = prompt_of(6)
    expected = judge.answer(tokens, None, 4)
    for prompts in (
        torch.tensor(tokens),
        torch.tensor([tokens]),
        [torch.tensor(tokens)],
        tuple(tokens),
        iter([tokens]),
        torch.tensor(tokens).numpy(),
    ):
        assert ask(shared, prompts, None, 4) == [expected]


def test_a_result_says_all(shared, judge):
    tokens = prompt_of(6)
    (result,) = shared.generate([tokens], "qv-16", do_sample=False, max_new_tokens=5)
    expected = judge.answer(tokens, "qv-16", 5)
    assert result == Result(
        TOKENIZER.decode(expected, skip_special_tokens=True), expected, "qv-16", "length", None, 6
    )


def test_no_prompts_no_results(shared):
    assert shared.generate([]) == []
    assert shared.generate([], []) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "a prompt has no tokens"),
        ("", "a prompt has no tokens"),
        ([3, 264], "a prompt has the token 264, and the vocabulary 264"),
        ([-1], "a prompt has the token -1"),
        ([1.5, 2.0], "a prompt is a string, a list of token ids or .* not \\[1.5, 2.0\\]"),
        (None, "a prompt is a string, .* not None"),
        ({"role": "user"}, "a prompt is a string, .* not {'role'"),
        (list(range(200)) * 3, "has 600 tokens, and the model's longest sequence 512"),
    ],
)
def test_what_is_no_prompt_is_refused_and_nothing_is_begun(prompt, message, shared):
    begun = next(shared._numbers)
    with pytest.raises(ValueError, match=message):
        shared.generate([prompt_of(4), prompt], max_new_tokens=4)
    assert next(shared._numbers) == begun + 1


def test_without_a_tokenizer_prompts_are_tokens(judge):
    with make(judge) as engine:
        engine.tokenizer = None
        for prompt, what in (("hi", "a string"), ([{"role": "user", "content": "hi"}], "chat")):
            with pytest.raises(ValueError, match=f"a prompt is {what}.*Engine\\(..., tokenizer="):
                engine.generate([prompt])
        (result,) = engine.generate([[1, 2]], max_new_tokens=3, ignore_eos=True)
        assert (result.text, len(result.token_ids)) == ("", 3)


# Adapters.


def test_one_adapter_for_all_or_one_for_each(shared, judge):
    prompts = [prompt_of(5), prompt_of(9)]
    for name in NAMES:
        assert ask(shared, prompts, name, 4) == judge.answers(prompts, [name, name], 4)
    names = ["rs-8", None]
    assert ask(shared, prompts, names, 4) == judge.answers(prompts, names, 4)
    with pytest.raises(ValueError, match="3 adapters were named for 2 prompts"):
        shared.generate(prompts, [None, None, None])


def test_the_active_adapter_answers_where_none_is_named(judge):
    prompt = prompt_of(5)
    with make(judge) as engine:
        options = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 4}

        def answered(*adapter):
            (result,) = engine.generate([prompt], *adapter, **options)
            assert result.token_ids == judge.answer(prompt, result.adapter, 4)
            return result.adapter

        assert answered() is None
        engine.adapters.activate("qv-16")
        assert answered() == "qv-16"
        assert answered(None) is None
        assert answered("all-4") == "all-4"
        assert engine.submit(prompt, **options).adapter == "qv-16"
        engine.adapters.deactivate()
        assert answered() is None


def test_an_adapter_that_is_not_loaded_is_told_and_nothing_is_begun(shared):
    with pytest.raises(KeyError, match="no adapter is called 'none'"):
        shared.generate([prompt_of(4)] * 3, ["all-4", "none", None])
    with pytest.raises(KeyError, match="no adapter is called 'none'"):
        shared.submit(prompt_of(4), "none")
    with pytest.raises(KeyError, match="no adapter is called 'none'"):
        next(shared.stream(prompt_of(4), "none"))


# Options.


def test_an_answer_ends_with_an_end_of_sequence_token(shared, judge):
    prompt = prompt_of(5)
    answer = judge.answer(prompt, "all-4", 12)
    end = answer[4]
    expected = answer[: answer.index(end) + 1]
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": end}
    for eos in (end, [end], [263, end]):
        (result,) = shared.generate([prompt], "all-4", **{**options, "eos_token_id": eos})
        assert (result.token_ids, result.finish_reason) == (expected, "stop")
    (result,) = shared.generate([prompt], "all-4", **options, ignore_eos=True)
    assert (result.token_ids, result.finish_reason) == (answer, "length")
    # At the very last token.
    options["max_new_tokens"] = len(expected)
    (result,) = shared.generate([prompt], "all-4", **options)
    assert (result.token_ids, result.finish_reason) == (expected, "stop")


def test_defaults_are_those_of_the_model(judge):
    prompt = prompt_of(5)
    answer = judge.answer(prompt, "all-4", 12)
    model = served_model(**WORDS)
    defaults = model.generation_config
    defaults.eos_token_id, defaults.max_new_tokens = [answer[3], 263], 9
    with engine_of(model, judge.folders) as engine:
        (result,) = engine.generate([prompt], "all-4")
        assert result.token_ids == answer[: answer.index(answer[3]) + 1]
        (result,) = engine.generate([prompt], "all-4", ignore_eos=True)
        assert result.token_ids == answer[:9]
        defaults.do_sample, defaults.temperature, defaults.top_k = True, 5.0, 0
        sampled = ask(engine, [prompt] * 4, "all-4", 9, do_sample=None)
        assert len(set(map(tuple, sampled))) == 4


def test_how_long_answers_are(judge):
    with make(judge, num_blocks=30) as engine:
        options = {"ignore_eos": True, "do_sample": False}
        # 256 by default, or what the cache has room for: here 30 pages of 8.
        (result,) = engine.generate([prompt_of(5)], **options)
        assert (len(result.token_ids), result.finish_reason) == (235, "length")
        with pytest.raises(
            ValueError, match="5 tokens and 236 new ones do not fit the cache of 240"
        ):
            engine.generate([prompt_of(5), prompt_of(5)], max_new_tokens=236, **options)
    with make(judge) as engine:
        (result,) = engine.generate([prompt_of(500)], max_new_tokens=100, **options)
        assert len(result.token_ids) == 12, "the model's longest sequence has 512 tokens"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be positive, got 0"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be positive, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0 or more, got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature must be 0 or more, got inf"),
        ({"top_k": -3}, ValueError, "top_k must be 0 or more, got -3"),
        ({"top_p": 0.0}, ValueError, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"max_tokens": 3}, TypeError, "max_tokens: no such option here; there are do_sample"),
    ],
)
def test_senseless_options_are_refused(options, error, message, shared):
    for begin in (shared.generate, shared.submit):
        with pytest.raises(error, match=message):
            begin(prompt_of(4), do_sample=True, **options) if "top" in message else begin(
                prompt_of(4), **options
            )


def test_settings_that_are_not_computed_are_told(judge):
    model = served_model(**WORDS)
    model.generation_config.repetition_penalty = 1.1
    with pytest.warns(UserWarning, match=r"asks for repetition_penalty=1.1, which the engine does"):
        engine_of(model).close()


# Sampling.


def test_every_request_is_sampled_as_it_says(shared, judge):
    """Greedy rows of a sampled batch are those of greedy ones; who came first decides nothing."""
    prompts = [prompt_of(n) for n in (5, 9, 14, 14, 14, 7)]
    names = ["all-4", None, "rs-8", "rs-8", "rs-8", "qv-16"]
    options = [
        {"do_sample": True, "temperature": 4.0},
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "temperature": 5.0, "top_k": 1},
        {"do_sample": True, "temperature": 5.0, "top_p": 1e-6},
        {"do_sample": False, "temperature": 7.0, "top_p": 0.3},
    ]
    requests = [
        shared.submit(prompt, name, max_new_tokens=8, ignore_eos=True, **each)
        for prompt, name, each in zip(prompts, names, options, strict=True)
    ]
    found = [request.result(PATIENCE).token_ids for request in requests]
    expected = judge.answers(prompts, names, 8)
    assert found[1:] == expected[1:]
    assert found[0] != expected[0]


def test_samples_follow_temperature_top_k_and_top_p(shared, judge):
    prompt, draws = prompt_of(5), 400
    logits = judge.logits(prompt, "all-4").double()
    cases = {
        "temperature": ({"temperature": 2.0}, (logits / 2.0).softmax(-1)),
        "top_k": ({"temperature": 2.0, "top_k": 3}, None),
        "top_p": ({"temperature": 2.0, "top_p": 0.5}, None),
    }
    probabilities = cases["temperature"][1]
    order = probabilities.argsort(descending=True)
    kept = {"temperature": order, "top_k": order[:3]}
    before = probabilities[order].cumsum(0) - probabilities[order]
    kept["top_p"] = order[before < 0.5]
    requests = {
        case: shared.submit(
            prompt, "all-4", do_sample=True, max_new_tokens=1, num_return_sequences=draws, **options
        )
        for case, (options, _) in cases.items()
    }
    for case, request in requests.items():
        drawn = torch.tensor([result.token_ids[0] for result in request.results(PATIENCE)])
        expected = torch.zeros_like(probabilities)
        expected[kept[case]] = probabilities[kept[case]]
        expected /= expected.sum()
        found = torch.bincount(drawn, minlength=264) / draws
        assert set(drawn.tolist()) <= set(kept[case].tolist()), case
        # Three standard deviations of the mean distance of so many draws.
        allowed = 3 * (expected * (1 - expected) / draws).sqrt().sum()
        assert (found - expected).abs().sum() < allowed, case


def test_rows_without_finite_scores_do_not_stop_the_others():
    processors = SamplingProcessors(8)
    processors.sampling = True
    scores = torch.randn(4, 8)
    scores[0, 3] = float("nan")
    scores[1, 2] = float("inf")
    scores[2] = float("nan")
    requests = [_State({"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9})] * 4
    arguments = torch.zeros((4, 4), dtype=torch.int32)
    processors.prepare_tensor_args(requests, arguments)
    processed = processors(torch.zeros(4, dtype=torch.long), scores, arguments)
    drawn = torch.multinomial(processed.softmax(-1), 1)[:, 0].tolist()
    assert drawn[1] == 2
    assert processed[3].isfinite().sum() <= 3


class _State:
    """Of a request, as much as the processors look at."""

    has_new_token = True

    def __init__(self, options: dict[str, Any]) -> None:
        self.state = self
        self.logit_processor_kwargs = options


def test_temperatures_next_to_nothing_are_greedy(shared, judge):
    prompt = prompt_of(5)
    for temperature in (1e-6, 1e-42, 5e-324):
        found = ask(shared, [prompt], "all-4", 4, do_sample=True, temperature=temperature)
        assert found == [judge.answer(prompt, "all-4", 4)]


def test_the_seed_is_the_callers(judge):
    """Starting the engine draws nothing from torch's generator, and does not seed it."""
    prompt = prompt_of(5)
    with make(judge) as engine:
        answers = []
        for _ in range(2):
            torch.manual_seed(3)
            answers += ask(engine, [prompt], "all-4", 8, do_sample=True, temperature=3.0)
        assert answers[0] == answers[1]


# Requests under way.


def test_text_comes_as_it_is_generated(shared, judge):
    prompt = prompt_of(7)
    pieces = list(shared.stream(prompt, "all-4", do_sample=False, max_new_tokens=40))
    expected = judge.answer(prompt, "all-4", 40)
    assert "".join(pieces) == TOKENIZER.decode(expected, skip_special_tokens=True)
    assert len(pieces) > 5
    assert all(pieces)


class _Feed:
    """A request's condition, that gives it more tokens whenever somebody waits for them."""

    def __init__(self, request: Request, cuts: list[int], tokens: list[int]) -> None:
        self._steps = [
            lambda cut=cut: request._tokens.update({request.id: tokens[:cut]}) for cut in cuts
        ]
        self._steps.append(lambda: request.end(request.id, tokens, "length", None))
        self._next = iter(self._steps)

    def wait(self) -> None:
        next(self._next)()

    def wait_for(self, predicate: Any, timeout: float | None = None) -> bool:
        return predicate()

    def notify_all(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def streamed(tokens: list[int], cuts: list[int], decode: Any) -> tuple[list[str], Request]:
    request = _request()
    request._decode = decode
    request._changed = _Feed(request, cuts, tokens)
    return list(request), request


@settings(max_examples=60)
@given(
    tokens=st.one_of(
        st.text(max_size=12).map(lambda text: TOKENIZER(text)["input_ids"]),
        st.lists(st.integers(0, 256), max_size=12),
    ),
    data=st.data(),
)
def test_pieces_are_whole_characters_and_together_the_text(tokens, data):
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=6).map(sorted))
    pieces, request = streamed(tokens, cuts, TOKENIZER.decode)
    assert "".join(pieces) == request.result().text == TOKENIZER.decode(tokens)
    assert all(pieces)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])
    # And again.
    assert "".join(request) == request.result().text


def test_pieces_of_tokens_whose_text_depends_on_those_before():
    """As of tokenizers that write a space before all words but the first."""

    def decode(tokens):
        return "".join(f" w{token}" for token in tokens).lstrip()

    pieces, _ = streamed([3, 1, 4, 1], [1, 2, 3], decode)
    assert pieces == ["w3", " w1", " w4", " w1"]


def _request(sequences: int = 1) -> Request:
    return Request(
        id="request-0",
        adapter=None,
        prompt=[1],
        sequences=sequences,
        _lease=None,
        _eos=frozenset(),
        _decode=TOKENIZER.decode,
        _cancel=lambda request: None,
    )


def test_one_answer_can_be_streamed(shared):
    with pytest.raises(ValueError, match="one answer can be streamed, not 2"):
        shared.submit([1, 2], stream=True, num_return_sequences=2)


def test_a_stream_that_is_left_is_cancelled(shared):
    stream = shared.stream(prompt_of(5), "all-4", **LONG)
    next(stream)
    (request,) = shared._requests._open.values()
    stream.close()
    assert request.result(PATIENCE).finish_reason == "cancelled"


def test_a_request_can_be_asked_by_many_and_again(shared, judge):
    prompt = prompt_of(5)
    request = shared.submit(prompt, "rs-8", do_sample=False, ignore_eos=True, max_new_tokens=30)
    with pytest.raises(TimeoutError, match=r"request-\d+ is not over after 0.0 s"):
        request.result(timeout=0.0)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append((request.result().text, "".join(request))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    text = TOKENIZER.decode(judge.answer(prompt, "rs-8", 30))
    assert found == [(text, text)] * 3
    assert request.result() == request.result()


def test_what_was_generated_is_the_result_of_what_is_cancelled(shared, judge):
    prompt = prompt_of(5)
    request = shared.submit(prompt, "all-4", stream=True, **LONG)
    next(iter(request))
    request.cancel()
    result = request.result(PATIENCE)
    assert (result.finish_reason, result.error) == ("cancelled", None)
    assert 0 < len(result.token_ids) < 400
    assert result.token_ids == judge.answer(prompt, "all-4", len(result.token_ids))
    request.cancel()
    assert request.result() == result


def test_each_answer_that_is_cancelled_keeps_its_own_tokens(shared):
    options = {**LONG, "do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
    request = shared.submit(prompt_of(5), "all-4", **options)
    scheduler = shared._running().batch_processor.scheduler
    assert until(lambda: len(scheduler.active_requests) == 3)
    assert until(
        lambda: min(len(s.generated_tokens) for s in list(scheduler.active_requests.values())) > 4
    )
    request.cancel()
    results = request.results(PATIENCE)
    assert [result.finish_reason for result in results] == ["cancelled"] * 3
    assert len({tuple(result.token_ids) for result in results}) == 3
    assert all(result.token_ids for result in results)


@pytest.mark.parametrize("sequences", [1, 3])
def test_cancelled_before_it_was_begun(sequences, shared, monkeypatch):
    """transformers looks for new requests before it looks for those that are cancelled."""
    manager = shared._running()
    late = []

    def drain(queue):
        if queue is manager.input_queue and not queue.empty() and not late:
            late.append(queue)
            return []
        return drain_queue(queue)

    drain_queue = continuous_api.drain_queue
    with manager.pause():
        monkeypatch.setattr(continuous_api, "drain_queue", drain)
        options = {**LONG, "num_return_sequences": sequences}
        request = shared.submit(prompt_of(5), "all-4", **options)
        request.cancel()
    assert [each.finish_reason for each in request.results(PATIENCE)] == ["cancelled"] * sequences
    assert late


def test_an_answer_that_cannot_be_decoded_is_its_own_matter(judge):
    class Broken:
        def decode(self, tokens, **options):
            if tokens == broken:
                raise RuntimeError("no text for these")
            return TOKENIZER.decode(tokens, **options)

    prompts = [prompt_of(5), prompt_of(9)]
    broken, fine = judge.answers(prompts, ["all-4", "rs-8"], 5)
    with make(judge) as engine:
        engine.tokenizer = Broken()
        options = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 5}
        names = ["all-4", "rs-8"]
        requests = [engine.submit(*each, **options) for each in zip(prompts, names, strict=True)]
        assert requests[1].result(PATIENCE).token_ids == fine
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no text for these"):
                requests[0].result(PATIENCE)


def test_ctrl_c_cancels_what_was_asked(shared, monkeypatch):
    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    begin = shared._requests.begin
    begun: list[Request] = []
    monkeypatch.setattr(
        shared._requests, "begin", lambda *args: (begun.append(args[0]), begin(*args))
    )
    with monkeypatch.context() as patched:
        patched.setattr(Request, "results", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shared.generate([prompt_of(5)] * 3, ["all-4", None, "rs-8"], **LONG)
    assert [request.result(PATIENCE).finish_reason for request in begun] == ["cancelled"] * 3


# Room for adapters.


def one_at_a_time(judge: Judge, *names: str, **options: Any) -> Engine:
    """Return an engine whose device holds only the largest of some adapters."""
    pool = AdapterPool(served_model(**WORDS), memory="1MB")
    sizes = [pool.load(name, judge.folders[name]).bytes for name in names]
    return make(judge, *names, memory=max(sizes), **options)


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
        assert "what is on the device is pinned" in results[1].error
        engine.adapters.unpin("rs-8")
        assert ask(engine, [prompt_of(5)], "all-4", 4) == [judge.answer(prompt_of(5), "all-4", 4)]


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


def make_pool(judge: Judge) -> AdapterPool:
    pool = AdapterPool(served_model(**WORDS), memory="1MB")
    for name, folder in judge.folders.items():
        pool.load(name, folder)
    return pool


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

        def late(state):
            manager.background_thread_status.request_stop(2, 0)
            manager._generation_thread.join(PATIENCE)
            put(state)

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


def test_whoever_calls_the_model_beside_the_engine_gets_the_base(judge):
    model = served_model(**WORDS)
    ids = torch.tensor([prompt_of(9)])
    before = model(ids).logits
    with engine_of(model, judge.folders) as engine:
        ask(engine, [prompt_of(5)], "all-4", 4)
        assert torch.equal(model(ids).logits, before)
        assert repr(model.model.layers[0].self_attn.q_proj).startswith("Linear(in_features=32,")
        assert set(model.state_dict()) == set(served_model(**WORDS).state_dict())


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


# Models.


def test_a_folder_is_a_model(judge, tmp_path):
    served_model(**WORDS).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with fastlora.Engine(
        tmp_path, judge.folders, adapter_memory="1MB", dtype=torch.float32, device="cpu"
    ) as engine:
        prompt = TOKENIZER("hi")["input_ids"]
        assert ask(engine, ["hi"], "rs-8", 5) == [judge.answer(prompt, "rs-8", 5)]
        assert str(tmp_path) in repr(engine)
    for dtype in (torch.bfloat16, "bfloat16"):
        model = served_model(**WORDS)
        with fastlora.Engine(model, adapter_memory="1MB", dtype=dtype) as engine:
            assert engine.adapters.dtype == torch.bfloat16


def test_on_a_cpu_the_cache_is_bounded():
    """transformers would take more than half of what is free."""
    for asked in (None, transformers.ContinuousBatchingConfig(page_size=64)):
        with fastlora.Engine(served_model(), adapter_memory="1MB", batching=asked) as engine:
            manager = engine._running()
            assert manager.room == 32768
            assert manager.batch_processor.cache.cache_tensor.nbytes < 2**25
        assert asked is None or asked.num_blocks is None


class _Scaled(nn.Linear):
    """Stands for a linear of another library, such as a quantized one."""

    def forward(self, input):
        return functional.linear(input, self.weight * 0.5, self.bias)


@pytest.mark.parametrize("kind", ["subclass", "replaced forward"])
def test_linears_that_others_made_keep_what_they_do(kind, tmp_path):
    def model():
        made = served_model()
        layer = made.model.layers[1].self_attn
        for linear in (layer.k_proj, layer.o_proj):
            if kind == "subclass":
                linear.__class__ = _Scaled
            else:
                linear.forward = lambda x, own=linear: functional.linear(
                    x, own.weight * 0.5, own.bias
                )
        return made

    judge = Judge(tmp_path, {"all-4": SPECS["all-4"]})
    base = model()
    state = state_of(base)
    prompt = prompts_of(9)[0]
    before = base(torch.tensor([prompt])).logits
    with engine_of(base, judge.folders) as engine:
        plain = ask(engine, [prompt], None, 6)
        (found,) = ask(engine, [prompt], "all-4", 6)
    assert state_of(base) == state
    assert torch.equal(base(torch.tensor([prompt])).logits, before)
    # The weights halved, and then plain linears: the same.
    halved = served_model()
    with torch.no_grad():
        for linear in (
            halved.model.layers[1].self_attn.k_proj,
            halved.model.layers[1].self_attn.o_proj,
        ):
            linear.weight *= 0.5
    with engine_of(halved, judge.folders) as engine:
        assert [found] == ask(engine, [prompt], "all-4", 6)
        assert plain == ask(engine, [prompt], None, 6)
    assert plain != [found]


def test_linears_that_are_called_with_other_rows(judge, tmp_path):
    """As experts are: allowed as long as no adapter changes them."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.first(x)
            return torch.cat([self.second(y[:1]), y[1:]])

    model = Half()
    x = torch.randn(4, 8)
    before = model(x)
    pool = AdapterPool(model, memory="64KiB")
    for name in ("first", "second"):
        spec = {"r": 2, "target_modules": [name], "init_lora_weights": False}
        with_adapters(Half(), {name: spec}).save_pretrained(tmp_path)
        pool.load(name, tmp_path / name)
    routing = linears.attach(model, pool)
    lease = pool.lease("first")
    assert pool.hold(lease)
    batch = linears.RowsOfSequences([lease.slot, 0], pool)
    with routing.batch(batch), torch.no_grad():
        with pytest.raises(linears.OtherRows, match="1 rows in a batch of 2 sequences"):
            model(x)
        pool.unload("second")
        found = model(x)
    assert not torch.equal(found[1], before[1])
    assert torch.equal(found[2:], before[2:])
    linears.detach(model)
    assert torch.equal(model(x), before)


def test_siblings_are_computed_once_unless_their_input_has_changed(judge):
    """q, k and v are computed together, and again where somebody changed x in between."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q(x), self.k(x)

    model = Attention()
    pool = AdapterPool(model, memory="64KiB")
    spec = {"r": 2, "target_modules": ["q", "k"], "init_lora_weights": False}
    pool.load("it", with_adapters(Attention(), {"it": spec}))
    assert [group.names for group in pool.groups] == [("q", "k")]
    routing = linears.attach(model, pool)
    lease = pool.lease("it")
    assert pool.hold(lease)
    batch = linears.RowsOfSequences([lease.slot], pool)
    x, other = torch.randn(3, 8), torch.randn(3, 8)
    with torch.no_grad(), routing.batch(batch):
        expected = model.k(other.clone())
        model.q(x)
        assert len(batch.pending) == 1
        x.copy_(other)
        assert torch.equal(model.k(x), expected)
        model(x)
        with torch.inference_mode():
            assert torch.equal(model(other.clone())[1], expected)
    assert not batch.pending
    linears.detach(model)


def test_a_compiled_model_asks_every_batch(tmp_path):
    """Which adapters a batch has is no constant of what was compiled for another one."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q(x) + self.k(x)

    model = Attention()
    pool = AdapterPool(model, memory="64KiB")
    for name, rank in (("one", 2), ("two", 3)):
        spec = {"r": rank, "target_modules": ["q", "k"], "init_lora_weights": False}
        pool.load(name, with_adapters(Attention(), {name: spec}))
    leases = [pool.lease(name) for name in ("one", "two")]
    assert all(map(pool.hold, leases))
    one, two = (lease.slot for lease in leases)
    routing = linears.attach(model, pool)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 8)
    with torch.no_grad():
        for slots in ([one, 0], [two, one], [0, two], [0, 0]):
            tokens = [slot for slot in slots for _ in range(2)]
            segments = Segments.of_slots(tokens, table=pool.slots)
            with routing.batch(linears.RowsOfTokens(segments, segments, pool.reach)):
                found = compiled(x)
            expected = model(x)
            for row, slot in enumerate(tokens):
                for linear in range(2) if slot else ():
                    (factors,) = pool.in_slots(linear, (slot,)).factors
                    h = factors.lora_a @ x[row]
                    expected[row] += factors.scaling * (factors.lora_b.t() @ h)
            torch.testing.assert_close(found, expected)
    linears.detach(model)


# Other versions of transformers.

UNTESTED = "transformers 4.57.6 is installed, and 5.23.x was tested"


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "unsupported_reason", lambda: UNTESTED)
    monkeypatch.setattr(engine_module, "_warned", {UNTESTED})


def test_other_versions_of_transformers_are_told(monkeypatch):
    unsupported_reason = batching.unsupported_reason.__wrapped__
    assert unsupported_reason() is None
    monkeypatch.setattr(batching.transformers, "__version__", "5.24.1")
    assert unsupported_reason() == "transformers 5.24.1 is installed, and 5.23.x was tested"
    monkeypatch.setattr(batching.transformers, "__version__", "5.23.9")
    assert unsupported_reason() is None
    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", lambda self, prompt: 0)
    assert "5.23.9 is not as it was: " in unsupported_reason()
    monkeypatch.delattr(PagedAttentionCache, "mark_complete_blocks")
    assert "mark_complete_blocks" in unsupported_reason()


def test_the_batches_of_an_untested_transformers_are_those_of_generate(
    judge, untested, monkeypatch
):
    monkeypatch.setattr(engine_module, "_warned", set())
    prompts = [prompt_of(n) for n in (5, 37, 3, 12, 12)]
    names = ["all-4", "qv-16", None, "rs-8", "one-layer-5"]
    expected = judge.answers(prompts, names, 10)
    model = served_model(**WORDS)
    # What it is not told generate takes from the model, and some versions what is a default, too.
    model.generation_config.do_sample, model.generation_config.temperature = True, 9.0
    defaults = model.generation_config
    with engine_of(model, judge.folders) as engine:
        with pytest.warns(UserWarning, match=f"{UNTESTED}: fastlora's engine generates without"):
            assert ask(engine, prompts, names, 10) == expected
        assert ask(engine, prompts[:2], names[:2], 10) == expected[:2]
        assert model.generation_config is defaults
        assert engine._manager is None


def test_without_continuous_batching_adapters_take_turns(judge, untested):
    names = ["rs-8", "all-4", None, "qv-16", "rs-8"]
    prompts = [prompt_of(5 + i) for i in range(5)]
    with one_at_a_time(judge, "rs-8", "all-4", "qv-16") as engine:
        assert ask(engine, prompts, names, 6) == judge.answers(prompts, names, 6)
        engine.adapters.pin("rs-8")
        results = engine.generate(prompts, names, **{**LONG, "max_new_tokens": 6})
        assert [result.finish_reason == "error" for result in results] == [
            name in ("all-4", "qv-16") for name in names
        ]
        assert results[0].token_ids == judge.answer(prompts[0], "rs-8", 6)
        assert all(info.requests == 0 for info in engine.adapters.list())


def test_without_continuous_batching_options_mean_the_same(judge, untested):
    prompt = prompt_of(5)
    answer = judge.answer(prompt, "all-4", 12)
    with make(judge) as engine:
        other = judge.answer(prompt, None, 12)
        assert answer[4] not in other
        results = engine.generate(
            [prompt] * 2,
            ["all-4", None],
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=answer[4],
        )
        expected = answer[: answer.index(answer[4]) + 1]
        assert (results[0].token_ids, results[0].finish_reason) == (expected, "stop")
        assert results[0].text == TOKENIZER.decode(expected)
        assert (results[1].token_ids, results[1].finish_reason) == (other, "length")
        found = ask(engine, [prompt, prompt], ["all-4", None], 6, num_return_sequences=2)
        base = judge.answer(prompt, None, 6)
        assert found == [answer[:6], answer[:6], base, base]
        options = {"do_sample": True, "temperature": 5.0, "num_return_sequences": 3}
        found = ask(engine, [prompt, prompt], ["all-4", None], 6, **options)
        assert len(set(map(tuple, found))) == 6
        found = ask(engine, [prompt, prompt], ["all-4", None], 6, **options, top_k=1)
        assert found == [answer[:6]] * 3 + [base] * 3
        for temperature in (0.0, 1e-42):
            found = ask(engine, [prompt], "all-4", 6, do_sample=True, temperature=temperature)
            assert found == [answer[:6]]


def test_without_continuous_batching_there_is_no_streaming(judge, untested):
    with make(judge) as engine:
        for begin in (engine.submit, lambda prompt: next(engine.stream(prompt))):
            with pytest.raises(RuntimeError, match=f"{UNTESTED}: .* needs transformers 5.23.x"):
                begin([1, 2])
        engine.close()
        with pytest.raises(RuntimeError, match="the engine is closed"):
            engine.generate([[1, 2]])


def test_without_continuous_batching_closing_does_not_wait_for_all(judge, untested, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slow(self, rows, slots):
        begun.set()
        assert go_on.wait(PATIENCE)
        return run_rows(self, rows, slots)

    run_rows = Engine._run_rows
    monkeypatch.setattr(Engine, "_run_rows", slow)
    engine = one_at_a_time(judge, "rs-8", "all-4")
    results: list[Result] = []
    thread = threading.Thread(
        target=lambda: results.extend(
            engine.generate([[1, 2]] * 2, ["rs-8", "all-4"], **{**LONG, "max_new_tokens": 2})
        )
    )
    thread.start()
    assert begun.wait(PATIENCE)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert until(lambda: engine._closed)
    go_on.set()
    for each in (closing, thread):
        each.join(PATIENCE)
        assert not each.is_alive()
    assert [result.finish_reason for result in results] == ["length", "cancelled"]
    assert type(engine.model.lm_head) is nn.Linear


def test_the_warning_is_given_once(judge, untested, monkeypatch):
    monkeypatch.setattr(engine_module, "_warned", set())
    with make(judge) as engine, warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            engine.generate([[1, 2]], max_new_tokens=1, do_sample=False)
    assert len(given) == 1
    assert given[0].filename == __file__
