"""``repetition_penalty``: every request has its own, and the tokens that it has had."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import small_engines
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_models import PATIENCE, ask, engine_of, served_model
from small_engines import WORDS, make, prompt_of
from transformers import RepetitionPenaltyLogitsProcessor

from fastlora.serving import batching
from fastlora.serving import engine as engine_module
from fastlora.serving.penalties import RepetitionPenalty
from fastlora.serving.sampling import SamplingProcessors

judge = small_engines.judge
running = small_engines.running
shared = small_engines.shared

CPU = torch.device("cpu")
NEW = 24  # enough for the model to repeat itself
PENALTIES = [1.3, 1.0, 0.8, 2.5, 1.3, 1.0, 1.1]
ADAPTERS = ["all-4", None, "qv-16", "rs-8", None, "all-4", "one-layer-5"]
PROMPTS = [prompt_of(n, seed=n) for n in (5, 37, 3, 61, 20, 9, 44)]


def expected_of(judge: Any) -> list[list[int]]:
    each = zip(PROMPTS, ADAPTERS, PENALTIES, strict=True)
    return [judge.answer(p, name, NEW, repetition_penalty=penalty) for p, name, penalty in each]


@pytest.mark.parametrize(
    "batching",
    [
        {},
        {"max_batch_tokens": 24},
        {"num_blocks": 22, "max_batch_tokens": 32, "safety_margin": 0.0},
        {"max_requests_per_batch": 2},
    ],
    ids=["one-shot", "chunked-prefill", "starved-cache", "two-at-a-time"],
)
def test_a_mixed_batch_says_what_peft_says_with_each_penalty(judge, batching):
    with make(judge, **batching) as engine:
        requests = [
            engine.submit(
                prompt, name, repetition_penalty=penalty, max_new_tokens=NEW, ignore_eos=True
            )
            for prompt, name, penalty in zip(PROMPTS, ADAPTERS, PENALTIES, strict=True)
        ]
        found = [request.result(PATIENCE) for request in requests]
    assert [result.error for result in found] == [None] * len(found)
    expected = expected_of(judge)
    assert [result.token_ids for result in found] == expected
    without = judge.answers(PROMPTS, ADAPTERS, NEW)
    assert [a == b for a, b in zip(expected, without, strict=True)] == [
        penalty == 1.0 for penalty in PENALTIES
    ]


def test_answers_that_fork_have_what_came_before(shared, judge):
    prompt, options = PROMPTS[0], {"do_sample": True, "temperature": 5.0, "top_k": 1}
    found = ask(
        shared, [prompt], "rs-8", NEW, repetition_penalty=1.4, num_return_sequences=3, **options
    )
    assert found == [judge.answer(prompt, "rs-8", NEW, repetition_penalty=1.4)] * 3


def test_the_penalty_of_the_model_s_own_config_is_followed(judge):
    """Qwen2.5's has one."""
    model = served_model(**WORDS)
    model.generation_config.repetition_penalty = 1.3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with engine_of(model, judge.folders) as engine:
            found = ask(engine, PROMPTS[:2], "all-4", NEW)
            assert ask(engine, PROMPTS[:1], None, NEW, repetition_penalty=1.0) == [
                judge.answer(PROMPTS[0], None, NEW)
            ]
    assert found == [judge.answer(p, "all-4", NEW, repetition_penalty=1.3) for p in PROMPTS[:2]]


def test_without_continuous_batching_it_is_the_same(judge, monkeypatch):
    """Prompts are padded with tokens of their own: before transformers 5.23 padding counted."""
    monkeypatch.setattr(batching, "unsupported_reason", lambda: "this one is not known")
    monkeypatch.setattr(engine_module, "_warned", set())
    model, given = served_model(**WORDS), []
    generate = model.generate
    model.generate = lambda ids, **kwargs: given.extend(ids.tolist()) or generate(ids, **kwargs)
    with engine_of(model, judge.folders) as engine, pytest.warns(UserWarning, match="not known"):
        found = ask(engine, PROMPTS, ADAPTERS, NEW, repetition_penalty=1.3)
    assert found == [
        judge.answer(prompt, name, NEW, repetition_penalty=1.3)
        for prompt, name in zip(PROMPTS, ADAPTERS, strict=True)
    ]
    assert [set(row) for row in given] == [set(prompt) for prompt in PROMPTS]


# The processor.


def _request(name: str, tokens: list[int], factor: float) -> Any:
    state = SimpleNamespace(
        request_id=name,
        initial_tokens=tokens[:1],
        generated_tokens=tokens[1:],
        logit_processor_kwargs={} if factor == 1.0 else {"repetition_penalty": factor},
    )
    return SimpleNamespace(state=state, has_new_token=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_places_change_hands_and_scores_are_those_of_transformers(data):
    """Requests come, pause and come back in any order; at most two at a time, of twelve."""
    vocabulary, names = 19, "abcdefghijkl"
    penalty = RepetitionPenalty(vocabulary + 3, CPU)
    penalty.rows = 2
    processors = SamplingProcessors(vocabulary, penalty)
    factors = {name: data.draw(st.sampled_from([1.7, 0.5, 1.5]), name) for name in names[1:]}
    factors[names[0]] = 1.0
    had = {name: [i, 2 * i] for i, name in enumerate(names)}
    storage = torch.full((6, 8), 7, dtype=torch.int32)
    for _ in range(data.draw(st.integers(8, 20), "batches")):
        batch = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
        requests = [_request(name, had[name], factors[name]) for name in batch]
        processors.penalizing = any(factors[name] != 1.0 for name in batch)
        processors.prepare_tensor_args(requests, storage)
        penalty.upload()
        # A graph has rows of padding, too; and the token that comes next is known to the device.
        last = [data.draw(st.integers(0, vocabulary - 1)) for _ in batch] + [0, 0]
        scores = torch.randn(len(last), vocabulary)
        found = processors(torch.tensor(last), scores.clone(), storage[:, : len(last)])
        for row, name in enumerate(batch):
            had[name].append(last[row])
            judge = RepetitionPenaltyLogitsProcessor(factors[name])
            expected = judge(torch.tensor([had[name]]), scores[row : row + 1].clone())
            torch.testing.assert_close(found[row : row + 1], expected)
        assert torch.equal(found[len(batch) :], scores[len(batch) :])


def test_more_requests_than_places_take_turns_with_them(judge, monkeypatch):
    """Three of a batch of one; what pauses comes to another place with all that it has had."""
    given_up: list[str] = []
    free_place = RepetitionPenalty._free_place

    def watched(self):
        before = set(self._places)
        place = free_place(self)
        given_up.extend(before - set(self._places))
        return place

    monkeypatch.setattr(RepetitionPenalty, "_free_place", watched)
    prompts = [prompt_of(5 + n, seed=n) for n in range(8)]
    with make(judge, max_requests_per_batch=1) as engine:
        found = ask(engine, prompts, "all-4", NEW, repetition_penalty=1.3)
    assert found == [judge.answer(p, "all-4", NEW, repetition_penalty=1.3) for p in prompts]
    assert given_up


def test_a_batch_without_penalties_takes_no_memory_for_them():
    with make() as engine:
        ask(engine, PROMPTS[:2], None, 3)
        assert engine._manager.logit_processor.penalty._seen is None
        ask(engine, PROMPTS[:2], None, 3, repetition_penalty=1.2)
        assert engine._manager.logit_processor.penalty._seen is not None
