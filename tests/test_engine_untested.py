"""With a transformers that the engine is not known to run on: told, and without batching."""

from __future__ import annotations

import threading
import warnings

import pytest
import small_engines
from serving_models import (
    PATIENCE,
    Judge,
    ask,
    engine_of,
    patiently,
    prompts_of,
    served_model,
)
from small_engines import LONG, TOKENIZER, WORDS, make, make_pool, one_at_a_time, prompt_of, until
from torch import nn
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from fastlora.serving import batching
from fastlora.serving import engine as engine_module
from fastlora.serving.requests import Result
from fastlora.serving.rows import RowsGenerator

judge = small_engines.judge

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


def test_without_continuous_batching_nobody_waits_for_what_is_pinned(judge, untested):
    sizes = {info.name: info.bytes for info in make_pool(judge).list()}
    names = ["large", "small", "all-4"]
    with make(judge, "all-4", memory=sizes["all-4"] + sizes["one-layer-5"]) as engine:
        engine.adapters.pin("all-4")
        for name, source in (("small", "one-layer-5"), ("large", "all-4")):
            engine.adapters.load(name, judge.folders[source])
        options = {**LONG, "max_new_tokens": 4}
        results = patiently(engine.generate, [prompt_of(5)] * 3, names, **options)
        assert "there is too little beside what is pinned" in results[0].error
        for result, source in zip(results[1:], ["one-layer-5", "all-4"], strict=True):
            assert result.token_ids == judge.answer(prompt_of(5), source, 4)


def test_without_continuous_batching_what_others_hold_is_waited_for(judge, untested):
    """As ``pin`` does for a moment."""
    with one_at_a_time(judge, "rs-8", "all-4") as engine:
        lease = engine.adapters.lease("rs-8")
        assert engine.adapters.make_ready(lease)
        threading.Timer(0.2, engine.adapters.give_back, [lease]).start()
        assert ask(engine, [prompt_of(5)], "all-4", 4) == [judge.answer(prompt_of(5), "all-4", 4)]


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

    run_rows = RowsGenerator._run
    monkeypatch.setattr(RowsGenerator, "_run", slow)
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
    assert until(lambda: engine._in_rows._closed)
    go_on.set()
    for each in (closing, thread):
        each.join(PATIENCE)
        assert not each.is_alive()
    assert [result.finish_reason for result in results] == ["length", "cancelled"]
    assert type(engine.model.lm_head) is nn.Linear


def test_layers_that_cannot_be_batched_continuously_are_generated_in_rows(tmp_path, monkeypatch):
    """Those with a state instead of keys and values, as in Qwen3-Next and 3.5."""
    monkeypatch.setattr(engine_module, "_warned", set())
    specs = {"all": {"r": 4, "target_modules": ["q_proj", "in_proj_qkvz", "out_proj"]}}
    judge = Judge(tmp_path, specs, "qwen3-next")
    reason = r"Qwen3NextForCausalLM has layers \(linear_attention\) that cannot be batched"
    prompts, names = prompts_of(5, 9, 5), ["all", None, "all"]
    with engine_of(served_model("qwen3-next"), judge.folders) as engine:
        with pytest.warns(UserWarning, match=reason):
            assert ask(engine, prompts, names, 6) == judge.answers(prompts, names, 6)
        with pytest.raises(RuntimeError, match=f"{reason}.*generate.* works without"):
            engine.submit(prompts[0])


def test_the_warning_is_given_once(judge, untested, monkeypatch):
    monkeypatch.setattr(engine_module, "_warned", set())
    with make(judge) as engine, warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            engine.generate([[1, 2]], max_new_tokens=1, do_sample=False)
    assert len(given) == 1
    assert given[0].filename == __file__
