"""Linears that no adapter has targeted are the base model's: nothing is launched for them."""

from __future__ import annotations

from typing import Any

import pytest
from serving_models import Judge, ask, engine_of, prompts_of, served_model, with_adapters

from fastlora.serving import linears


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collect how many linears a group has that gets adapters, and for which rank."""
    seen: list[tuple[int, int]] = []

    def add_adapters(ys: Any, *args: Any, max_rank: int, **kwargs: Any) -> None:
        seen.append((len(ys), max_rank))
        add(ys, *args, max_rank=max_rank, **kwargs)

    add = linears.segmented_ops.add_adapters
    monkeypatch.setattr(linears.segmented_ops, "add_adapters", add_adapters)
    return seen


def test_groups_are_computed_with_adapters_once_one_has_targeted_their_kind(judge, added):
    """In every layer, and not the head: of two layers, ``one-layer-5`` changes the second."""
    (prompt,) = prompts_of(5)
    with engine_of(served_model(), {}) as engine:
        for name, groups in (
            ("qv-16", [3]),
            ("one-layer-5", [3, 1]),
            ("all-4", [3, 1, 2, 1]),
            ("qv-16", [3, 1, 2, 1]),
        ):
            engine.adapters.load(name, judge.folders[name])
            added.clear()
            assert ask(engine, [prompt], name, 2) == judge.answers([prompt], [name], 2)
            assert [linears for linears, _ in added] == groups * 2 * 2, name


def test_launches_of_a_batch_are_alike_whatever_is_loaded_meanwhile(judge, added, tmp_path):
    """Half a CUDA graph must not be for another rank, or for more groups."""
    spec = {"r": 40, "target_modules": ["o_proj"], "init_lora_weights": False}
    with_adapters(served_model(), {"wide": spec}).save_pretrained(tmp_path)
    with engine_of(served_model(), {"qv-16": judge.folders["qv-16"]}) as engine:

        def load_within(ys: Any, *args: Any, **kwargs: Any) -> None:
            add(ys, *args, **kwargs)
            if len(added) == 1:
                engine.adapters.load("wide", tmp_path / "wide")

        add, linears.segmented_ops.add_adapters = linears.segmented_ops.add_adapters, load_within
        ask(engine, prompts_of(5), "qv-16", 2)
    assert added == [(3, 16)] * 2 + [(3, 64), (1, 64)] * 2


def test_a_graph_is_another_once_adapters_have_reached_more(judge):
    seen: list[tuple[int, ...]] = []
    prompts = prompts_of(5, 9)
    with engine_of(served_model(), {}) as engine:
        manager = engine._running()
        io = manager.batch_processor.inputs_and_outputs
        get_model_kwargs = io.get_model_kwargs

        def watched(use_padding: bool = False) -> Any:
            kwargs = get_model_kwargs(use_padding=use_padding)
            seen.append(io._get_graph_key())
            return kwargs

        def key_of(name: str | None) -> tuple[int, ...]:
            """Return that of the last batch of some requests."""
            manager.batch_processor.cache.evict_cached_blocks()  # so that batches are as large
            ask(engine, prompts, name, 2)
            return seen[-1]

        io.get_model_kwargs = watched
        engine.adapters.load("qv-16", judge.folders["qv-16"])
        before = key_of("qv-16")
        engine.adapters.load("all-4", judge.folders["all-4"])
        after = key_of("all-4")
        assert key_of("qv-16") == after != before
        assert key_of(None) not in (before, after)
