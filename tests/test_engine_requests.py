"""Requests under way: streamed, asked by many, cancelled; and what is left of them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import small_engines
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_models import PATIENCE
from small_engines import LONG, TOKENIZER, make, prompt_of, until
from transformers.generation.continuous_batching import continuous_api

from fastlora.serving.requests import Request

judge = small_engines.judge
running = small_engines.running
shared = small_engines.shared


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
        _stops=None,
        _decode=TOKENIZER.decode,
        _cancel=lambda request, names: None,
    )


def test_a_stream_whose_engine_ends_says_so(judge):
    """What has come by then is not taken for the whole answer."""
    for kill, message in (
        (lambda engine: engine.close(), "the engine was closed before the answer was complete"),
        (fail_the_next_batch, "it is broken"),
    ):
        engine = make(judge)
        request = engine.submit(prompt_of(5), "all-4", stream=True, **LONG)
        pieces = iter(request)
        next(pieces)
        kill(engine)
        with pytest.raises(RuntimeError, match=message):
            list(pieces)
        with pytest.raises(RuntimeError, match=message):
            list(request)
        engine.close()


def fail_the_next_batch(engine: Any) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("it is broken")

    engine._manager.batch_processor.model_runner.compute_batch = fail


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
