"""Which cases a run has: its options, and what follows from them and from the kind of device."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from small_session import CPU, GPU, TINY, names, options_for

from fastlora.bench import (
    planning,
)
from fastlora.bench.planning import LEVELS, Options
from fastlora.bench.providers import PROVIDERS
from fastlora.bench.shapes import MODELS, NAMES, Linear


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ["layer", "kernel"]}, "there is no level 'kernel'; there are counts, layer, "),
        ({"tokens": [8, 0]}, r"must be positive, got tokens \[8, 0\], rank \[4\] and 480 s"),
        ({"ranks": [-3]}, r"must be positive, got tokens \[16\], rank \[-3\]"),
        ({"seconds": 0.0}, "must be positive, got .* and 0 s"),
        ({"seconds": -60.0}, "must be positive, got .* and -60 s"),
        ({"dropouts": [0.0, 1.0]}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropouts": [-0.1]}, r"dropout must lie in \[0, 1\), got -0.1"),
        ({"dropouts": [float("nan")]}, r"dropout must lie in \[0, 1\), got nan"),
        ({"rounds": 4}, "rounds must be at least 5 for a spread, got 4"),
        ({"providers": ["peft", "best"]}, "there is no provider 'best'; there are frozen, peft"),
    ],
)
def test_a_bad_option_is_refused_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        options_for(**changes)


@pytest.fixture
def no_device(monkeypatch):
    """Plan for a GPU that is not there."""
    facts = lambda device, commit=None: {"gpu": str(device), "commit": commit or ""}  # noqa: E731
    monkeypatch.setattr(planning, "facts", facts)


def levels_of(items: list[planning.Item]) -> list[str]:
    return [level for level, _ in itertools.groupby(item.row.level for item in items)]


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_a_plan_has_every_level_in_order_and_the_roofs_first(no_device, device):
    items = planning.plan(Options(models=[MODELS["Qwen3-0.6B"]], device=device))
    assert levels_of(items) == ["roof", *LEVELS]
    backwards = Options(models=[TINY], levels=["operation", "counts"], device=device)
    assert levels_of(planning.plan(backwards)) == ["roof", "counts", "operation"]
    assert all(item.ticks >= 1 for item in items)
    assert all(item.row.gpu == str(device) for item in items)


def test_where_nothing_is_timed_no_roof_is_measured():
    assert levels_of(planning.plan(options_for(levels=["counts"]))) == ["counts"]


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_the_same_options_give_the_same_cases(no_device, device):
    def make() -> list[planning.Item]:
        models = list(MODELS.values())
        return planning.plan(Options(models=models, tokens=(8192, 512), device=device))

    assert make() == make()


def test_on_a_cpu_neither_plans_nor_the_compiler_are_timed():
    options = options_for(device=CPU)
    eager = ["frozen", "peft", "peft-bf16", "addmm", "fastlora", "fastlora-bf16"]
    for level in ("layer", "linear", "step"):
        assert names(options, level, 0.0) == eager
        assert names(options, level, 0.1) == [name for name in eager if name != "addmm"]


def test_on_a_gpu_all_are_timed_and_the_compiler_with_layers_alone():
    options = options_for(device=GPU)
    assert names(options, "layer", 0.0) == list(PROVIDERS)
    assert names(options, "layer", 0.1) == [name for name in PROVIDERS if name != "addmm"]
    for level in ("linear", "step"):
        assert names(options, level, 0.0) == [n for n in PROVIDERS if n != "peft-compiled"]


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_named_providers_are_timed_anywhere_beside_the_bare_linears_and_fastlora(device):
    options = options_for(device=device, providers=["addmm", "peft-compiled", "fastlora", "addmm"])
    for level in ("layer", "linear"):
        assert names(options, level, 0.0) == ["frozen", "addmm", "peft-compiled", "fastlora"]
        assert names(options, level, 0.1) == ["frozen", "peft-compiled", "fastlora"]
    for device in ("H200", "cpu"):
        names_of = [one.name for one in options.countable(0.0, device)]
        assert names_of == ["frozen", "addmm", "fastlora"]


def test_every_plan_is_counted_on_any_machine():
    options = options_for(device=CPU)
    counted = [one.name for one in options.countable(0.0, "H200")]
    assert counted == [name for name in PROVIDERS if name != "peft-compiled"]
    assert "addmm" not in [one.name for one in options.countable(0.1, "H200")]
    assert [one.name for one in options.countable(0.0, "cpu")] == names(options, "layer", 0.0)


# Of three sizes: 15, 233 and 866 million weights in a layer.
SIZED = [MODELS[name] for name in ("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-72B")]


def test_a_cpu_times_fewer_tokens_and_counts_all_of_them(no_device):
    options = Options(models=SIZED, tokens=(8192, 2048, 64), device=CPU)
    items = planning.plan(options)
    counts = [item.row for item in items if item.row.level == "counts"]
    counted = {(row.model, row.tokens) for row in counts if row.counted_as == "H200"}
    assert counted == {(model.name, m) for model in SIZED for m in options.tokens}
    for level in ("layer", "linear", "operation"):
        timed = {(i.row.model, i.row.tokens) for i in items if i.row.level == level}
        assert timed == {("Qwen2.5-0.5B", 256), ("Qwen2.5-0.5B", 64), ("Qwen2.5-7B", 64)}
    assert {item.row.dtype for item in items if item.row.level != "counts"} == {"float32"}
    assert {row.dtype for row in counts if row.counted_as == "H200"} == {"bfloat16"}
    # What is timed is counted as it is timed.
    layers = [item.row for item in items if item.row.level == "layer"]
    as_timed = [row for row in counts if row.counted_as == "cpu"]
    assert [row.setting for row in as_timed] == [row.setting for row in layers]
    assert [row.counted_as for row in counts] == ["H200"] * 18 + ["cpu"] * 6
    assert planning.left_out(options) == [
        "Qwen2.5-0.5B is timed with 256 of 8,192 tokens on a CPU.",
        "Qwen2.5-0.5B is timed with 256 of 2,048 tokens on a CPU.",
        "Qwen2.5-7B is timed with 64 of 8,192 tokens on a CPU.",
        "Qwen2.5-7B is timed with 64 of 2,048 tokens on a CPU.",
        "Qwen2.5-72B is not timed on a CPU: its layers are too large.",
    ]
    assert planning.left_out(replace(options, levels=["counts"])) == []


def test_a_gpu_times_all_models_with_all_tokens(no_device):
    options = Options(models=SIZED, tokens=(8192, 2048), device=GPU, dtype=torch.bfloat16)
    items = planning.plan(options)
    for level in ("counts", "layer", "linear", "operation"):
        timed = {(i.row.model, i.row.tokens) for i in items if i.row.level == level}
        assert timed == {(model.name, m) for model in SIZED for m in (8192, 2048)}
    assert planning.left_out(options) == []


def test_every_rank_and_dropout_is_a_case_of_its_own(no_device):
    options = options_for(ranks=(4, 8), dropouts=(0.0, 0.05, 0.1), levels=["layer", "counts"])
    for level in ("layer", "counts"):
        rows = [item.row for item in planning.plan(options) if item.row.level == level]
        found = [(row.rank, row.dropout) for row in rows if row.counted_as != "cpu"]
        assert found == [(r, p) for r in (4, 8) for p in (0.0, 0.05, 0.1)]


def test_linears_of_one_size_are_one_case_that_says_how_many_they_are():
    items = planning.plan(options_for(levels=["linear"]))[1:]
    assert [(i.row.case, i.row.count, i.row.n, i.row.k) for i in items] == [
        ("q_proj", 1, 32, 32),
        ("k_proj/v_proj", 2, 16, 32),
        ("o_proj", 1, 32, 32),  # it has no bias
        ("gate_proj/up_proj", 2, 48, 32),
        ("down_proj", 1, 32, 48),
    ]
    assert all(list(item.linears) == [item.row.case] for item in items)


def test_single_linears_are_timed_with_as_many_tokens_as_a_cpu_can_take():
    linears = {"5 x 7": Linear(5, 7), "large": Linear(8192, 8192), "huge": Linear(30000, 30000)}
    options = options_for(models=[], linears=linears, levels=["linear"], tokens=[512, 8])
    rows = [item.row for item in planning.plan(options) if item.row.level == "linear"]
    first = rows[0]
    assert (first.model, first.case, first.tokens, first.n, first.k) == (
        "5 x 7",
        "linear",
        256,
        5,
        7,
    )
    tokens = [(row.model, row.tokens) for row in rows]
    assert tokens == [("5 x 7", 256), ("5 x 7", 8), ("large", 64), ("large", 8)]
    assert planning.left_out(options) == [
        "5 x 7 is timed with 256 of 512 tokens on a CPU.",
        "large is timed with 64 of 512 tokens on a CPU.",
        "huge is not timed on a CPU: it is too large.",
    ]


def test_operators_are_those_of_three_linears_and_dropout_is_left_out_of_the_gemm():
    def cases(**changes: object) -> list[tuple[str, float]]:
        items = planning.plan(options_for(levels=["operation"], **changes))[1:]
        return [(item.row.case, item.row.dropout) for item in items]

    names = ("q_proj", "gate_proj", "down_proj")
    operations = ("shrink", "low_rank_gemm", "input_grad", "adapter_grads")
    assert cases(dropouts=[0.1]) == [(f"{o} of {n}", 0.1) for n in names for o in operations]
    assert cases(dropouts=[0.1, 0.0]) == [
        (f"{o} of {n}", p)
        for p in (0.1, 0.0)
        for n in names
        for o in operations
        if not (o == "low_rank_gemm" and p)
    ]
    same = replace(TINY, linears={name: Linear(32, 32) for name in NAMES})
    assert {case for case, _ in cases(models=[same])} == {f"{o} of q_proj" for o in operations}


def test_steps_have_dropout_where_there_is_any_and_the_first_number_of_tokens(no_device):
    def settings(**changes: object) -> list[tuple[str, str, int, float]]:
        items = planning.plan(options_for(levels=["step"], tokens=(64, 16), **changes))[1:]
        return [(i.row.model, i.row.case, i.row.tokens, i.row.dropout) for i in items]

    tiny = "tiny (2 of 2 layers, vocabulary 64)"
    variants = ("step", "step, checkpointing")
    assert settings(dropouts=(0.1, 0.0)) == [(tiny, case, 64, 0.1) for case in variants]
    assert settings(dropouts=(0.0,)) == [(tiny, case, 64, 0.0) for case in variants]
    assert settings(stepped=[]) == []


def test_on_a_gpu_steps_are_of_whole_models_and_liger_s_come_last(no_device, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    items = planning.plan(options_for(models=SIZED, levels=["step"], device=GPU))[1:]
    cases = ("step", "step, checkpointing", "step, Liger", "step, checkpointing, Liger")
    found = [(i.row.case, i.row.model, i.model) for i in items]
    assert found == [(case, model.name, model) for case in cases for model in SIZED]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    items = planning.plan(options_for(levels=["step"], device=GPU))[1:]
    assert [i.row.case for i in items] == list(cases[:2])
