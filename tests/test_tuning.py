"""``fastlora tune``: the command, what it measures, and that later calls follow its table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import assert_as_accurate
from tiny_models import tiny_model, tiny_peft

import fastlora
from fastlora import cli, plans, reference, tuning
from fastlora.kernels import tile_config
from fastlora.kernels.tile_config import DeviceLimits, TileConfig
from fastlora.tuning import GroupShape, LinearShape

CPU = torch.device("cpu")
H200 = DeviceLimits("NVIDIA H200", capability=90, shared_bytes=232448, processors=132)
interpreted = pytest.mark.skipif(not plans.interpreting(), reason="runs on the interpreter")
TUNE = ["tune", "--device", "cpu", "--dtype", "float16", "--tokens", "32", "--rounds", "1"]


@pytest.fixture
def few_candidates(monkeypatch):
    """One tile instead of ten: the interpreter takes a tenth of a second for each."""
    tile = TileConfig(32, 32, 32)
    monkeypatch.setattr(tuning, "gemm_candidates", lambda *_: iter([tile]))
    monkeypatch.setattr(tuning, "thin_candidates", lambda operation, default: iter([default]))
    yield
    plans.forget_measurements()


@interpreted
def test_the_command_writes_a_table_that_calls_follow(
    few_candidates, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main([*TUNE, "--shape", "48", "64"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "fastlora" / "tuned" / "interpreter.json"
    assert "[1/1] N=48 K=64 M=32 r=16: low_rank_gemm " in printed
    assert f"written to {path}" in printed
    table = json.loads(path.read_text())
    found = {entry["key"]["operation"]: entry for entry in table["entries"]}
    assert set(found) == {
        "shrink", "low_rank_gemm", "input_grad", "output_pass", "input_pass"
    }  # fmt: skip
    gemm = found["low_rank_gemm"]
    assert gemm["plan"] == ("fused" if gemm["fused_us"] < gemm["hybrid_us"] else "hybrid")
    tile = tile_config.tile_config_for("low_rank_gemm", CPU, torch.float16, 32, n=48, k=64, r=16)
    assert tile == TileConfig(32, 32, 32)


@interpreted
def test_tuning_again_adds_to_the_table(few_candidates, tmp_path):
    out = tmp_path / "table.json"
    for n in ("48", "80"):
        assert cli.main([*TUNE, "--shape", n, "64", "--out", str(out)]) == 0
    keys = tile_config.read_table(out)
    assert {key.n for key in keys if key.operation == "low_rank_gemm"} == {48, 80}


@interpreted
def test_tuning_again_with_another_triton_starts_anew(few_candidates, tmp_path):
    out = tmp_path / "table.json"
    assert cli.main([*TUNE, "--shape", "48", "64", "--out", str(out)]) == 0
    out.write_text(json.dumps(json.loads(out.read_text()) | {"triton": "2.1.0"}))
    assert cli.main([*TUNE, "--shape", "80", "64", "--out", str(out)]) == 0
    keys = tile_config.read_table(out)
    assert {key.n for key in keys if key.operation == "low_rank_gemm"} == {80}


@interpreted
def test_the_function_takes_a_model(few_candidates, tmp_path, monkeypatch):
    # The clock is not what this is about, and every kernel would run twice as often.
    monkeypatch.setattr(
        tuning, "measure_us", lambda functions, *_: {name: [1.0] for name in functions}
    )
    lines = []
    path = fastlora.tune(
        tiny_peft(),
        tokens=[32],
        rank=4,
        dtype=torch.float16,
        device="cpu",
        rounds=1,
        out=tmp_path / "table.json",
        progress=lines.append,
    )
    model = tiny_model()
    singles, groups = tuning.linear_shapes(model), tuning.group_shapes(model)
    assert len(lines) == len(singles) + len(groups)
    keys = set(tile_config.read_table(path))
    for group in groups:
        for operation in ("shrink", "output_pass", "input_pass", "low_rank_gemm", "input_grad"):
            n, siblings = sum(group.ns), len(group.ns)
            key = tile_config.tile_key(operation, torch.float16, 32, n, group.k, 4, siblings)
            assert key in keys
    alone = {key.n for key in keys if key.operation == "low_rank_gemm" and key.siblings == 1}
    assert alone == {shape.n for shape in singles}


@interpreted
@pytest.mark.parametrize("winner", ["fused", "hybrid"])
def test_a_group_takes_the_plan_and_the_tiles_that_were_measured_for_it(
    few_candidates, tmp_path, monkeypatch, winner
):
    """And its members, where they run alone, do not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = {"fused": 2.0, "hybrid": 2.0, "base": 1.0, winner: 1.5}
    monkeypatch.setattr(
        tuning,
        "measure_us",
        lambda functions, *_: {name: [times.get(name, 1)] for name in functions},
    )
    group = GroupShape((48, 16, 16), 64)
    options = {"tokens": [64], "dtype": torch.float16, "device": "cpu", "progress": lambda _: None}
    fastlora.tune(shapes=[group], **options)
    monkeypatch.setattr(plans, "interpreting", lambda: True)
    sizes = {"n": 80, "k": 64, "r": 16}
    for operation in ("low_rank_gemm", "input_grad"):
        for siblings, tile in ((3, TileConfig(32, 32, 32)), (1, None)):
            found = tile_config.tile_config_for(
                operation, CPU, torch.float16, 64, **sizes, siblings=siblings
            )
            assert (found == tile) == (tile is not None)
        for siblings, plan in ((3, winner), (1, "hybrid")):
            arguments = (operation, CPU, torch.float16, 64, 80, 64, 16, True, siblings)
            assert plans._automatic(*arguments) == plan


@interpreted
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_is_timed_as_fused_and_as_hybrid_computes_the_same(p):
    for shape in (LinearShape(48, 64), GroupShape((48, 16), 64)):
        o = tuning._Operands(shape, 32, 16, torch.float16, p, CPU)  # whose masks keep everything
        forms = tuning._gemms(o, torch.float16)
        assert set(forms) == {"low_rank_gemm", "input_grad"}
        for operation, (fused, hybrid, base) in forms.items():
            native, exact, found, mixed, frozen = (
                list(results) if isinstance(results, (list, tuple)) else [results]
                for results in (
                    expected(operation, o, torch.float16),
                    expected(operation, o, torch.float64),
                    fused(TileConfig(32, 32, 32)),
                    hybrid(),
                    base(),
                )
            )
            for results in zip(found, native, exact, strict=True):
                assert_as_accurate(*results, name="fused")
            for results in zip(mixed, native, exact, strict=True):
                assert_as_accurate(*results, name="hybrid")
            assert [each.shape for each in frozen] == [each.shape for each in exact]


def expected(operation, o, dtype):
    """Compute a GEMM of the tuned operands by ``reference``, in a dtype."""
    if operation == "low_rank_gemm":
        siblings = zip(o.weights, o.h, o.lora_bs, strict=True)
        return [
            reference.low_rank_gemm(o.x.to(dtype), w.to(dtype), None, h.to(dtype), b.to(dtype), 1.5)
            for w, h, b in siblings
        ]
    siblings = zip(o.dys, o.weights, o.h, o.lora_as, strict=True)
    return sum(reference.input_grad(*(t.to(dtype) for t in each), None) for each in siblings)


def test_shapes_are_those_of_the_frozen_linears():
    expected = tuning.linear_shapes(tiny_model())
    assert tuning.linear_shapes(tiny_peft()) == expected  # without the adapters
    layer = tiny_model().model.layers[0]
    assert LinearShape(*layer.mlp.down_proj.weight.shape) in expected
    assert len(set(expected)) == len(expected)


def test_groups_are_those_that_share_their_input():
    model = tiny_model()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    expected = [
        GroupShape(tuple(linear.out_features for linear in linears), linears[0].in_features)
        for linears in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_proj, mlp.up_proj),
        )
    ]
    assert tuning.group_shapes(model) == expected
    assert tuning.group_shapes(tiny_peft()) == expected
    assert tuning.group_shapes(model.model.layers[0].mlp.down_proj) == []


def test_a_group_of_more_than_four_is_split_as_calls_are():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in "abcdef":
                self.add_module(name, torch.nn.Linear(8, 4))

        def forward(self, x):
            return self.a(x), self.b(x), self.c(x), self.d(x), self.e(x), self.f(x)

    assert tuning.group_shapes(Wide()) == [GroupShape((4, 4, 4, 4), 8), GroupShape((4, 4), 8)]


def test_the_output_layer_is_left_out():
    model = tiny_model()
    assert LinearShape(*model.lm_head.weight.shape) not in tuning.linear_shapes(model)


def test_a_model_is_read_from_its_config_alone(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    model = cli._model_on_meta(str(tmp_path))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert tuning.linear_shapes(model) == tuning.linear_shapes(tiny_model())


def test_candidates_fit_their_device():
    small = DeviceLimits("RTX", capability=89, shared_bytes=99 * 1024, processors=128)
    for limits, largest in ((H200, 128 * 256), (small, 128 * 128)):
        default = tile_config.default_tile(
            "low_rank_gemm", limits, torch.bfloat16, 8192, 4096, 4096, 16
        )
        first, *others = tuning.gemm_candidates(limits, default)
        assert first == default
        assert others
        assert all(tuning.fits(tile, limits) for tile in (first, *others))
        assert all(tile.block_m * tile.block_n <= largest for tile in (first, *others))


def test_a_tile_that_does_not_run_is_not_a_candidate():
    def fail():
        raise RuntimeError("out of resources")

    said = []
    name, _ = tuning._fastest({"bad": fail, "good": lambda: None}, CPU, 1, said.append)
    assert name == "good"
    assert said == ["    bad: RuntimeError"]


def test_functions_are_timed_in_turn_and_the_order_alternates():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    taken = tuning.measure_us(functions, CPU, rounds=2)
    assert order == ["a", "b", "a", "b", "b", "a"]  # one call each to warm up, then two rounds
    assert {name: len(times) for name, times in taken.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model NAME or --shape N K"),
        (["--shape", "48", "64", "--rank", "300"], r"rank must lie in \[1, 256\]"),
        (["--shape", "48", "64", "--dropout", "1"], r"dropout must lie in \[0, 1\), got 1.0"),
        (["--shape", "48", "64", "--device", "cuda"], "there is no CUDA device"),
        (["--model", "/nowhere/qwen"], "/nowhere/qwen"),
        (["--shape", "0", "64"], "out and in features must be positive"),
        (["--shape", "48", "64", "--device", "foo"], "foo"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_line(arguments, message, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main([*TUNE, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastlora tune: ")
    assert re.search(message, error)


def test_a_broken_table_is_named(tmp_path):
    path = tmp_path / "interpreter.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"interpreter\.json is not a table of tuned tiles"):
        tile_config.read_table(path)


def test_the_command_is_installed_and_says_its_version_and_help():
    command = Path(sys.executable).parent / "fastlora"
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == f"fastlora {fastlora.__version__}"
    text = subprocess.run([command, "tune", "--help"], capture_output=True, text=True, check=True)
    for option in ("--model", "--shape", "--tokens", "--rank", "--out"):
        assert option in text.stdout
