"""The engine with the attention of its own that it takes on a GPU without flash-attn, on a CPU."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from serving_models import NAMES, Judge, ask, engine_of, prompts_of, served_model

from fastlora.serving import attention, batching, engine

NEW = 8
PROMPTS = prompts_of(5, 37, 3, 20, 9)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def own_attention(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let engines take it here too; what they call is noted: whether by pages."""
    by_pages: list[bool] = []
    plain = attention.plain_paged_attention

    def noted(*args, **kwargs):
        by_pages.append(kwargs["block_table"] is not None)
        return plain(*args, **kwargs)

    monkeypatch.setattr(engine, "needs_paged_attention", lambda model: True)
    monkeypatch.setattr(attention, "plain_paged_attention", noted)
    return by_pages


@pytest.mark.parametrize("setup", [{}, {"max_batch_tokens": 24}, {"num_blocks": 17}])
def test_answers_are_peft_s_and_steps_that_generate_are_described_by_pages(
    judge, own_attention, setup
):
    model = served_model()
    with engine_of(model, judge.folders, **setup) as served:
        found = ask(served, PROMPTS, NAMES, NEW)
        again = ask(served, PROMPTS[1], NAMES[1], NEW)  # a prefix that is shared
        assert model.config._attn_implementation == attention.NAME
        with pytest.raises(RuntimeError, match="an engine serves this model"):
            model(torch.tensor([[1, 2, 3]]))
    assert found == judge.answers(PROMPTS, NAMES, NEW)
    assert again == [found[1]]
    assert set(own_attention) == {True, False}
    assert model.config._attn_implementation == "sdpa"
    model(torch.tensor([[1, 2, 3]]))


def test_a_manager_that_died_leaves_the_attention_to_the_next(judge, own_attention, monkeypatch):
    model = served_model()
    with engine_of(model, judge.folders) as served:
        ask(served, PROMPTS, NAMES, NEW)
        with monkeypatch.context() as broken:
            broken.setattr(attention, "plain_paged_attention", lambda *_, **__: 1 / 0)
            broken.setattr("logging.Logger.error", lambda *_, **__: None)
            results = served.generate(PROMPTS, NAMES, max_new_tokens=2, progress=False)
            assert {result.finish_reason for result in results} == {"error"}
        assert ask(served, PROMPTS, NAMES, NEW) == judge.answers(PROMPTS, NAMES, NEW)
    assert model.config._attn_implementation == "sdpa"


def test_a_manager_that_could_not_be_made_leaves_the_model_as_it_was(own_attention, monkeypatch):
    model = served_model()
    monkeypatch.setattr(attention, "read_by_block_tables", lambda *_: 1 / 0)
    with engine_of(model) as served:
        with pytest.raises(ZeroDivisionError):
            served.generate(PROMPTS, None, progress=False)
        assert model.config._attn_implementation == "sdpa"


MODEL = SimpleNamespace(
    device=torch.device("cuda"),
    config=SimpleNamespace(_attn_implementation="sdpa"),
    _supports_flash_attn=True,
)


@pytest.mark.parametrize(
    ("change", "installed", "expected"),
    [
        pytest.param({}, (), True, id="on-a-gpu"),
        pytest.param({}, ("flash_attn",), False, id="flash-attn-2"),
        pytest.param({}, ("flash_attn_interface",), False, id="flash-attn-3"),
        pytest.param({"device": torch.device("cpu")}, (), False, id="on-a-cpu"),
        pytest.param({"_supports_flash_attn": False}, (), False, id="cannot-be-exchanged"),
        pytest.param(
            {"config": SimpleNamespace(_attn_implementation="eager")}, (), False, id="chosen"
        ),
    ],
)
def test_it_is_taken_where_nothing_better_is_there(monkeypatch, change, installed, expected):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name in installed else None
    )
    model = SimpleNamespace(**{**vars(MODEL), **change})
    assert engine.needs_paged_attention(model) is expected


def test_the_longest_sequence_by_pages_is_as_long_as_with_flash_attn(judge, own_attention):
    with engine_of(served_model(), judge.folders, page_size=16) as served:
        ask(served, PROMPTS[:1], None, 2)
        config = served._manager.continuous_batching_config
        assert config.max_blocks_per_request * 16 == batching._LONGEST_BY_PAGES
