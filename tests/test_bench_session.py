"""A run: its plan, its models, its rows, and that one failure does not cost the rest."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import fastlora
from fastlora import plans
from fastlora.bench import (
    counting,
    environment,
    measuring,
    modules,
    planning,
    providers,
    results,
    session,
    shapes,
    steps,
)
from fastlora.bench.checking import WrongResult
from fastlora.bench.measuring import Timing
from fastlora.bench.planning import LEVELS, Options
from fastlora.bench.providers import PROVIDERS, Provider, find
from fastlora.bench.session import Session
from fastlora.bench.shapes import GROUPS, INPUTS, MAIN_MODELS, MODELS, NAMES, Linear, Model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
TINY = Model(
    "tiny",
    {
        "q_proj": Linear(32, 32, True),
        "k_proj": Linear(16, 32, True),
        "v_proj": Linear(16, 32, True),
        "o_proj": Linear(32, 32),
        "gate_proj": Linear(48, 32),
        "up_proj": Linear(48, 32),
        "down_proj": Linear(32, 48),
    },
    2,
    {"model_type": "qwen2", **SIZES},
)


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Override the fixture of all tests: filling what fastlora allocates would be counted."""


@pytest.fixture(autouse=True)
def same_providers():
    """Leave the providers as they were."""
    before = dict(PROVIDERS)
    yield
    PROVIDERS.clear()
    PROVIDERS.update(before)


@pytest.fixture(scope="module")
def fast():
    """Time everything once a round; interpret no kernels; collect no garbage (0.2 s a case)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "turns_for", lambda steps, device, rounds, seconds: 1)
        patch.setattr(session, "gc", SimpleNamespace(collect=lambda: None))
        patch.setattr(plans, "interpreting", lambda: False)
        plans.unsupported_reason.cache_clear()
        yield
    plans.unsupported_reason.cache_clear()


@pytest.fixture
def short(fast, monkeypatch):
    """The same, and do not measure the machine's roofs, which takes a second."""
    roof = Timing(((1.0,),) * 5)
    monkeypatch.setattr(measuring, "copy_and_product", lambda device, dtype: (roof, roof, 1, 1))


def options_for(**changes: object) -> Options:
    settings = {
        "models": [TINY], "levels": ["layer"], "tokens": [16], "ranks": [4], "dropouts": [0.1],
        "rounds": 5,
    }  # fmt: skip
    return Options(**settings | changes)


# Options.


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


# The plan.


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


def names(options: Options, level: str, p: float) -> list[str]:
    return [provider.name for provider in options.providers_for(level, p)]


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
    assert [one.name for one in options.countable(0.0)] == ["frozen", "addmm", "fastlora"]


def test_every_plan_is_counted_on_any_machine():
    counted = [one.name for one in options_for(device=CPU).countable(0.0)]
    assert counted == [name for name in PROVIDERS if name != "peft-compiled"]
    assert "addmm" not in [one.name for one in options_for(device=CPU).countable(0.1)]


# Of three sizes: 15, 233 and 866 million weights in a layer.
SIZED = [MODELS[name] for name in ("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-72B")]


def test_a_cpu_times_fewer_tokens_and_counts_all_of_them(no_device):
    options = Options(models=SIZED, tokens=(8192, 2048, 64), device=CPU)
    items = planning.plan(options)
    counted = {(i.row.model, i.row.tokens) for i in items if i.row.level == "counts"}
    assert counted == {(model.name, m) for model in SIZED for m in options.tokens}
    for level in ("layer", "linear", "operation"):
        timed = {(i.row.model, i.row.tokens) for i in items if i.row.level == level}
        assert timed == {("Qwen2.5-0.5B", 256), ("Qwen2.5-0.5B", 64), ("Qwen2.5-7B", 64)}
    assert {item.row.dtype for item in items if item.row.level != "counts"} == {"float32"}
    assert {item.row.dtype for item in items if item.row.level == "counts"} == {"bfloat16"}
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
        found = [
            (i.row.rank, i.row.dropout) for i in planning.plan(options) if i.row.level == level
        ]
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


# Models.


# Of the published weights, a tied output layer counted once.
PUBLISHED_PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize("name", MODELS)
def test_known_sizes_are_those_of_the_model_that_transformers_builds(name):
    config = transformers.AutoConfig.for_model(**MODELS[name].config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(each.numel() for each in model.parameters()) == PUBLISHED_PARAMETERS[name]
    built = shapes.from_config(config, name)
    assert dict(built.linears) == dict(MODELS[name].linears)
    assert list(built.linears) == list(NAMES)
    assert built.layers == MODELS[name].layers
    assert config.vocab_size == MODELS[name].config["vocab_size"]


def test_linears_that_share_an_input_have_its_width():
    assert set(MAIN_MODELS) <= set(MODELS)
    assert INPUTS == ("q_proj", "o_proj", "gate_proj", "down_proj")
    for model in MODELS.values():
        for group in GROUPS:
            assert len({model.linears[name].k for name in group}) == 1


@pytest.mark.parametrize(
    "name",
    ["Qwen3-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base", "someone/mirror/Qwen3-8B-Instruct"],
)
def test_a_known_model_is_found_by_its_name_without_a_hub(monkeypatch, name):
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    assert shapes.find(name) is MODELS["Qwen3-8B"]


def save_config(folder: Path, kind: str = "qwen2", **changes: object) -> str:
    """Write a model's config.json; returns the folder's name."""
    config = transformers.AutoConfig.for_model(kind, **SIZES | changes)
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_folder_s_model_is_measured_by_its_config(tmp_path, kind):
    folder = save_config(tmp_path / "model", kind, num_hidden_layers=3, head_dim=8)
    model = shapes.find(folder)
    assert (model.name, model.layers) == (folder, 3)
    bias = {"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set()
    assert dict(model.linears) == {
        name: replace(linear, has_bias=name in bias) for name, linear in TINY.linears.items()
    }


def test_a_model_without_the_seven_linears_is_refused_with_what_it_has(tmp_path):
    transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"has no q_proj, .*; it has no linear layers\. .*--shape"):
        shapes.find(str(tmp_path / "gpt2"))
    opt = transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    with pytest.raises(ValueError, match=r"layer of an OPT has no o_proj, .*it has k_proj, v_proj"):
        shapes.from_config(opt, "an OPT")


def test_a_name_that_is_no_model_is_refused_by_its_name():
    with pytest.raises((OSError, ValueError), match="no-such-model"):
        shapes.find("nobody/no-such-model")


# Providers.


def test_a_name_is_registered_once():
    mine = Provider("mine", "for a test")
    providers.register(mine)
    assert find("mine") is mine
    assert options_for(providers=["mine"]).providers_for("layer", 0.1)[1] is mine
    with pytest.raises(ValueError, match="there is a provider 'mine' already"):
        providers.register(Provider("mine", "another"))
    with pytest.raises(ValueError, match="there is a provider 'peft' already"):
        providers.register(Provider("peft", "another"))


def test_a_provider_is_loaded_from_a_module(tmp_path, monkeypatch):
    (tmp_path / "their_lora.py").write_text(
        "from fastlora.bench.providers import Provider\n"
        "fast = Provider('theirs', 'for a test')\nslow = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    provider = providers.load("their_lora:fast")
    assert (provider.name, find("theirs")) == ("theirs", provider)
    with pytest.raises(ValueError, match="there is a provider 'theirs' already"):
        providers.load("their_lora:fast")
    with pytest.raises(ValueError, match="'their_lora:slow' is a int, not a fastlora"):
        providers.load("their_lora:slow")


@pytest.mark.parametrize(
    "path",
    [
        "no_such_module:name",
        "fastlora.bench.providers:no_such_name",
        "fastlora.bench.providers",
        pytest.param(
            ".bench:name",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_its_name(path):
    with pytest.raises(
        ValueError, match=f"'{path}' cannot be imported .package.module:name, on PYTHONPATH.: "
    ):
        providers.load(path)


# The environment.


def test_a_row_says_what_it_was_measured_with():
    facts = environment.facts(CPU)
    assert set(facts) <= set(results.COLUMNS)
    for package in ("torch", "triton", "peft", "transformers"):
        assert facts[package] == importlib.metadata.version(package)
    assert facts["python"] == platform.python_version()
    assert (facts["gpu"], facts["driver"]) == ("", "")
    assert facts["cpu"]
    assert facts["commit"]
    assert len(facts["date"]) == 10
    assert environment.facts(CPU, "abc1234")["commit"] == "abc1234"


def test_a_gpu_and_its_driver_are_named(monkeypatch):
    device = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    run = lambda *args, **kwargs: SimpleNamespace(stdout="555.42\n555.42\n")  # noqa: E731
    monkeypatch.setattr(environment.subprocess, "run", run)
    facts = environment.facts(device, "abc1234")
    assert (facts["gpu"], facts["driver"]) == ("GPU 7", "555.42")


def test_without_git_or_nvidia_smi_nothing_fails(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.driver_version() == ""
    assert environment._commit() == environment.version("fastlora-kernels")
    assert environment.version("no-such-package") == ""


def test_an_installation_does_not_take_its_surroundings_commit_for_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "fastlora" / "bench" / "e.py"))
    monkeypatch.setattr(environment.subprocess, "run", None)
    assert environment._commit() == environment.version("fastlora-kernels")


# A session.


@pytest.fixture(scope="module")
def whole(fast, tmp_path_factory) -> tuple[Session, Path, list[tuple[int, str]]]:
    """Every level of a tiny model on this CPU."""
    folder = tmp_path_factory.mktemp("session") / "made"
    made, ticks = Session(options_for(levels=LEVELS), folder), []
    made.run(lambda number, what: ticks.append((number, what)))
    return made, folder, ticks


def test_a_session_writes_a_file_for_every_level_with_every_row(whole):
    session, folder, _ = whole
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{level}.csv" for level in (*LEVELS, "roof")
    )
    assert {row.key for row in results.read_folder(folder)} == {row.key for row in session.rows}
    assert len(results.read_folder(folder)) == len(session.rows)
    assert len({row.key for row in session.rows}) == len(session.rows)
    assert session.notes == []


def test_every_row_says_what_it_was_measured_with(whole):
    facts = environment.facts(CPU)
    for row in whole[0].rows:
        assert {name: getattr(row, name) for name in facts} == facts


def test_every_row_was_checked_timed_in_turn_and_compared(whole):
    timed = [row for row in whole[0].rows if row.level not in ("counts", "roof")]
    ours = {"layer", "linear", "step", "operation"}
    assert {row.level for row in timed if row.provider == "fastlora"} == ours
    for row in timed:
        assert not row.refused
        assert (row.timer, row.rounds) == ("cpu", 5)
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.over_fastlora_low <= row.over_fastlora <= row.over_fastlora_high
        if row.provider == "fastlora":
            assert row.over_fastlora == row.over_fastlora_low == row.over_fastlora_high == 1.0
        unchecked = ("frozen", "torch") if row.level == "operation" else ("frozen",)
        assert row.gate is None if row.provider in unchecked else 0 <= row.gate <= 1
        of_step = 1e6 * row.tokens / row.median_us if row.level == "step" else None
        assert row.tokens_per_s == of_step
        if row.level in ("layer", "linear", "step"):
            assert row.over_frozen_low <= row.over_frozen <= row.over_frozen_high
        assert row.launches is row.eager_us is row.host_us is row.peak_mib is None


def test_counted_rows_are_what_the_counter_counts(whole):
    counted = [row for row in whole[0].rows if row.level == "counts"]
    assert [row.provider for row in counted] == [one.name for one in options_for().countable(0.1)]
    for row in counted:
        forward, backward = counting.record_layer(row.provider, TINY.linears, 16, 4, 0.1).counts
        both = forward + backward
        assert (row.launches, row.moved_gib) == (both.launches, both.bytes / 2**30)
        assert (row.saved_mib, row.tflop) == (forward.saved / 2**20, both.flops / 1e12)
        assert row.median_us is None
    counting.clear()


def test_the_roofs_of_the_device_are_measured(whole):
    copy, product = (row for row in whole[0].rows if row.level == "roof")
    assert (copy.case, product.case) == ("copy", "product")
    found = results.roofs(whole[0].rows)
    # Of this machine; the slowest that runs the tests is within these.
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e15


def test_progress_names_every_case_and_what_is_checked(whole):
    session, _, ticks = whole
    said = [what for _, what in ticks]
    for title in {item.title for item in planning.plan(session.options)}:
        assert any(what.startswith(title) for what in said)
    assert "layer, tiny layer, 16 tokens, rank 4, dropout 0.1: checking peft" in said
    assert said[-1].endswith(": 5 rounds of 1 turns")


def test_the_ticks_of_a_run_add_up(short, tmp_path):
    session, ticks = Session(options_for(levels=["layer", "linear", "step"]), tmp_path), []
    session.run(lambda number, what: ticks.append(number))
    assert sum(ticks) == session.ticks


def test_a_run_has_one_thread_and_gives_the_others_back(short, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    seen = []
    try:
        torch.set_num_threads(3)
        Session(options_for(), tmp_path).run(lambda *_: seen.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 3
        assert set(seen) == {1}

        def stop(number: int, what: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Session(options_for(), tmp_path).run(stop)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_is_not_begun_in_time_is_left_out_and_named(short, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def tick(number: int, what: str) -> None:
        clock.now += 10.0 * what.startswith("counts")
        ticks.append(number)

    ticks = []
    made = Session(
        options_for(levels=["counts", "layer", "linear"], ranks=(4, 8, 2), seconds=25.0), tmp_path
    )
    rows = made.run(tick)
    assert {(row.level, row.rank) for row in rows if row.level != "roof"} == {
        ("counts", 4), ("counts", 8), ("counts", 2),
    }  # fmt: skip
    assert made.notes == [
        "Out of time: layer, tiny layer, 16 tokens, rank 4, dropout 0.1 and 2 more of this level.",
        "Out of time: linear, tiny q_proj, 16 tokens, rank 4, dropout 0.1 and 14 more of this "
        "level.",
    ]
    assert sum(ticks) == made.ticks


def test_every_case_gets_its_share_of_the_time_that_is_left(short, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock.now))
    given = []

    def run(self, item: planning.Item, seconds: float) -> None:
        given.append((item.row.level, seconds))
        clock.now += seconds / 2  # so that the others get more

    monkeypatch.setattr(Session, "_run", run)
    Session(options_for(levels=["layer", "linear"], seconds=100.0), tmp_path).run()
    assert [level for level, _ in given] == ["roof", "layer", *["linear"] * 5]
    seconds = [each for _, each in given]
    # A layer counts 8, a linear 2, the roofs 0.5.
    assert seconds[0] == pytest.approx(100 * 0.5 / 18.5)
    assert seconds[1] == pytest.approx((100 - seconds[0] / 2) * 8 / 18)
    assert seconds[-1] == pytest.approx(100 - sum(seconds[:-1]) / 2)


def test_what_does_not_fit_the_memory_is_named_and_the_rest_goes_on(short, tmp_path, monkeypatch):
    class Large(modules.Case):
        def __init__(self, linears, *args):
            if "gate_proj/up_proj" in linears:
                raise torch.OutOfMemoryError("Tried to allocate 96 GiB.\nMore lines")
            super().__init__(linears, *args)

    monkeypatch.setattr(modules, "Case", Large)
    made = Session(options_for(levels=["layer", "linear"]), tmp_path)
    rows = made.run()
    cases = {row.case for row in rows if row.level == "linear"}
    assert cases == {"q_proj", "k_proj/v_proj", "o_proj", "down_proj"}
    assert any(row.level == "layer" for row in rows)
    assert made.notes == [
        "Too large for the memory: linear, tiny gate_proj/up_proj, 16 tokens, rank 4, dropout 0.1 "
        "(Tried to allocate 96 GiB.)."
    ]


def fails(layer: torch.nn.Module) -> torch.nn.Module:
    raise NotImplementedError("no kernel for float32\nand more")


BROKEN = Provider("broken", "for a test", fails)


@pytest.mark.parametrize("level", ["layer", "linear"])
def test_a_provider_that_does_not_run_is_refused_and_the_rest_is_timed(short, tmp_path, level):
    providers.register(BROKEN)
    made = Session(options_for(levels=[level]), tmp_path)
    rows = [row for row in made.run() if row.level == level]
    for case in {row.case for row in rows}:
        refused = [row for row in rows if row.case == case and row.refused]
        reason = "did not run: NotImplementedError: no kernel for float32"
        assert [(row.provider, row.refused) for row in refused] == [("broken", reason)]
        timed = [row.provider for row in rows if row.case == case and row.median_us]
        assert timed == names(options_for(), level, 0.1)[:-1]
    assert made.notes == []


def test_a_provider_that_cannot_be_counted_does_not_end_the_run(short, tmp_path):
    ours = PROVIDERS.pop("fastlora")
    providers.register(BROKEN)
    providers.register(ours)  # counted after it
    rows = Session(options_for(levels=["counts", "layer"]), tmp_path).run()
    for level in ("counts", "layer"):
        found = {row.provider: row.refused for row in rows if row.level == level}
        reason = "did not run: NotImplementedError: no kernel for float32"
        assert (found["broken"], found["fastlora"]) == (reason, "")


def test_a_provider_that_fails_while_it_is_timed_does_not_end_the_run(short, tmp_path, monkeypatch):
    timed = []
    in_rounds = measuring.in_rounds

    def watched(*args, **kwargs):
        timed.append(True)
        return in_rounds(*args, **kwargs)

    class Flaky(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if len(timed) == 1:
                raise ConnectionError("lost")
            return self.layer(x)

    monkeypatch.setattr(measuring, "in_rounds", watched)
    providers.register(Provider("flaky", "for a test", Flaky))
    linears = {"a": Linear(8, 8), "b": Linear(8, 8)}
    made = Session(options_for(levels=["linear"], models=[], linears=linears), tmp_path)
    rows = made.run()
    assert {row.provider for row in rows if row.model == "b"} >= {"flaky", "fastlora"}
    case = "linear, a linear, 16 tokens, rank 4, dropout 0.1"
    assert made.notes == [f"Failed while it was timed: {case} (ConnectionError: lost)."]


def test_a_provider_that_needs_too_much_memory_alone_is_left_out(short, tmp_path):
    def large(layer):
        raise torch.OutOfMemoryError("Tried to allocate 96 GiB.")

    providers.register(Provider("large", "for a test", large))
    rows = Session(options_for(), tmp_path).run()
    assert "fastlora" in {row.provider for row in rows if row.level == "layer"}


def test_without_a_terminal_progress_is_a_line_for_each_case(capsys):
    with session.progress(3) as tick:
        tick(1, "layer, a: checking peft")
        tick(1, "layer, a: 5 rounds of 2 turns")
        tick(1, "layer, b: checking peft")
    assert capsys.readouterr().err == "layer, a\nlayer, b\n"


# A training step.


def training_step(p: float = 0.0, dtype: torch.dtype = torch.float32, **changes: object):
    settings = {"model": TINY, "tokens": 16, "variant": steps.Variant(), **changes}
    return steps.TrainingStep(
        settings["model"], settings["tokens"], 4, p, CPU, dtype, settings["variant"]
    )


STEPPED = ("frozen", "peft", "peft-bf16", "fastlora")


def test_only_what_makes_whole_models_has_a_training_step():
    assert [one.name for one in steps.providers(list(PROVIDERS.values()))] == list(STEPPED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_every_provider_passes_the_gate_and_trains(dtype, checkpointing):
    built = training_step(dtype=dtype, variant=steps.Variant(checkpointing))
    losses = {}
    for name in STEPPED:
        step, gate = built.checked_step(find(name))
        if name == "frozen":
            assert gate is None
            (gradient,) = step()
            assert gradient.shape == (1, 16, 32)
            assert gradient.norm() > 0
        else:
            assert 0 <= gate <= 1
            losses[name] = [step().item() for _ in range(4)]
    for found in losses.values():
        assert found == sorted(found, reverse=True)  # the same batch, step after step
        assert found[-1] < found[0]
        # All have the same adapters and the same batch.
        assert found[0] == pytest.approx(losses["peft"][0], rel=torch.finfo(dtype).eps * 10)


@pytest.mark.parametrize("name", ["peft", "fastlora"])
def test_a_step_trains_with_dropout_and_is_checked_without(name):
    for p in (0.0, 0.5):
        losses = []
        for seed in (1, 2):
            step, gate = training_step(p).checked_step(find(name))
            assert gate <= 1
            torch.manual_seed(seed)
            losses.append(step().item())
        assert (losses[0] == losses[1]) == (p == 0.0)


def test_checkpointing_runs_the_layers_a_second_time(monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    calls = []
    forward = Qwen2MLP.forward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen2MLP, "forward", counted)
    for checkpointing, times in ((False, 1), (True, 2)):
        built = training_step(variant=steps.Variant(checkpointing))
        for name in STEPPED:
            step, _ = built.checked_step(find(name))
            calls.clear()
            step()
            assert len(calls) == times * TINY.layers


def test_the_model_is_fastlora_s_in_its_own_step_alone(spy):
    built = training_step()
    for name in STEPPED:
        spy.reset()
        step, _ = built.checked_step(find(name))
        assert (spy.fused > 0) == (name == "fastlora")
        spy.reset()
        step()
        assert spy.fused == (7 * TINY.layers if name == "fastlora" else 0)


def test_weights_are_shared_and_stay_as_they_are():
    built = training_step()
    before = {name: p.detach().clone() for name, p in built._base.named_parameters()}
    model = built._adapted(find("fastlora"))
    pointers = {p.data_ptr() for p in built._base.parameters()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.data_ptr() for p in frozen} == pointers
    for name in STEPPED:
        step, _ = built.checked_step(find(name))
        step()
    assert all(torch.equal(p, before[name]) for name, p in built._base.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_that_is_patched_wrong_is_refused(monkeypatch, dtype):
    patch = fastlora.patch

    def wrong(model, **kwargs):
        report = patch(model, **kwargs)
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        layer.scaling["default"] *= 1.5
        return report

    monkeypatch.setattr(fastlora, "patch", wrong)
    built = training_step(dtype=dtype)
    with pytest.raises(WrongResult, match=r"(loss|the gradient of all lora_[AB]) is .* from fp64"):
        built.checked_step(find("fastlora"))
    monkeypatch.undo()
    assert built.checked_step(find("fastlora"))[1] <= 1


def test_a_model_that_falls_back_is_refused(monkeypatch):
    """Else peft's own time would stand there as fastlora's."""
    build = steps._build

    def with_odd_layer(*args):
        model = build(*args)
        model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(steps, "_build", with_odd_layer)
    with pytest.raises(ValueError, match="q_proj"):
        training_step().checked_step(find("fastlora"))


def test_the_memory_that_a_step_needs_is_estimated():
    model = MODELS["Qwen2.5-0.5B"]
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**model.config)
        )
    weights = sum(parameter.numel() for parameter in whole.parameters())
    logits = 2048 * model.config["vocab_size"]
    for dtype, wider in ((torch.bfloat16, 4), (torch.float32, 8)):
        size = dtype.itemsize
        exact = weights * (size + wider) + logits * (size + 4 + 4)
        assert steps.needed_bytes(model, 2048, dtype) == pytest.approx(exact, rel=1e-3)


def test_a_cut_model_says_what_is_left_of_it():
    model = steps.cut(MODELS["Qwen3-8B"], 2, 4096)
    assert model.name == "Qwen3-8B (2 of 36 layers, vocabulary 4,096)"
    assert (model.layers, model.linears) == (2, MODELS["Qwen3-8B"].linears)
    assert (model.config["num_hidden_layers"], model.config["vocab_size"]) == (2, 4096)
    assert MODELS["Qwen3-8B"].config["num_hidden_layers"] == 36


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("llama", {"num_hidden_layers": 4}, id="four-layers-of-one-kind"),
        pytest.param(
            "qwen2", {"num_hidden_layers": 4}, id="four-layers-with-a-list-of-kinds",
        ),
        pytest.param(
            "qwen2", {"num_hidden_layers": 1}, id="a-single-layer",
        ),
        pytest.param(
            "llama", {"vocab_size": 8192, "pad_token_id": 8000}, id="a-padding-token-that-is-cut",
        ),
    ],
)  # fmt: skip
def test_a_folder_s_model_is_cut_for_the_step_of_a_cpu(tmp_path, kind, changes):
    model = shapes.find(save_config(tmp_path, kind, **changes))
    (item, _) = planning.plan(options_for(models=[model], levels=["step"]))[1:]
    step, _ = training_step(model=item.model).checked_step(find("fastlora"))
    assert step().isfinite()


def test_a_step_trains_as_many_tokens_as_its_row_says(monkeypatch):
    monkeypatch.setattr(steps, "_SEQUENCE", 8)
    for tokens, shape in ((16, (2, 8)), (12, (2, 6)), (7, (1, 7)), (1, (1, 1)), (13, (1, 13))):
        assert training_step(tokens=tokens)._ids.shape == shape


def test_a_step_trains_on_a_prime_number_of_tokens(monkeypatch):
    monkeypatch.setattr(steps, "_SEQUENCE", 8)
    step, _ = training_step(tokens=13).checked_step(find("fastlora"))
    assert step().isfinite()
