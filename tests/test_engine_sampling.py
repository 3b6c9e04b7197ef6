"""Every request is sampled as it says, in one batch with the others."""

from __future__ import annotations

from typing import Any

import small_engines
import torch
from serving_models import PATIENCE, ask
from small_engines import make, prompt_of

from fastlora.serving.penalties import RepetitionPenalty
from fastlora.serving.sampling import SamplingProcessors

judge = small_engines.judge
running = small_engines.running
shared = small_engines.shared


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
        "min_p": ({"temperature": 2.0, "min_p": 0.2}, None),
    }
    probabilities = cases["temperature"][1]
    order = probabilities.argsort(descending=True)
    kept = {"temperature": order, "top_k": order[:3]}
    before = probabilities[order].cumsum(0) - probabilities[order]
    kept["top_p"] = order[before < 0.5]
    kept["min_p"] = order[probabilities[order] >= 0.2 * probabilities.max()]
    assert len({len(tokens) for tokens in kept.values()}) == len(kept)
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
    processors = SamplingProcessors(8, RepetitionPenalty(8, torch.device("cpu")))
    processors.sampling = True
    scores = torch.randn(4, 8)
    scores[0, 3] = float("nan")
    scores[1, 2] = float("inf")
    scores[2] = float("nan")
    requests = [_State({"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9})] * 4
    arguments = torch.zeros((6, 4), dtype=torch.int32)
    processors.prepare_tensor_args(requests, arguments)
    processed = processors(torch.zeros(4, dtype=torch.long), scores, arguments)
    drawn = torch.multinomial(processed.softmax(-1), 1)[:, 0].tolist()
    assert drawn[1] == 2
    assert processed[3].isfinite().sum() <= 3


def test_nothing_is_written_for_batches_that_are_plainly_greedy():
    processors = SamplingProcessors(8, RepetitionPenalty(8, torch.device("cpu")))
    arguments = torch.full((6, 4), 7, dtype=torch.int32)
    greedy = _State({"adapter": 3})
    processors.prepare_tensor_args([greedy] * 4, arguments)
    assert (arguments == 7).all()
    scores = torch.randn(4, 8)
    assert processors(torch.zeros(4, dtype=torch.long), scores, arguments) is scores
    processors.prepare_tensor_args([greedy, _State({"do_sample": True})], arguments)
    assert arguments[-1].tolist() == [0, 1, 7, 7]


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
