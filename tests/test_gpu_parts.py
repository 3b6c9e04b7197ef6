"""``benchmarks/gpu.py`` runs without a GPU, so that its first run on one is not for debugging."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu
import promises
import pytest
import serving_steps
import torch
from served import Rows, Served, in_turns
from serving_counts import LAUNCHES, PREFILL, PROMISED, PROMISED_MODEL
from serving_promises import PROVIDERS, verdicts
from serving_session import SIZES, SMOKE, TINY, Session
from warm_scripts import run_script

import fastlora
from fastlora import plans
from fastlora.bench import results
from fastlora.bench.checking import WrongResult
from fastlora.bench.command import write_about
from fastlora.bench.results import Row
from fastlora.bench.shapes import MAIN_MODELS

ROOT = Path(__file__).parent.parent


SCRIPT = ROOT / "benchmarks/gpu.py"


# Of the smoke run of serving: case and provider.
SERVED = {
    ("copy", "torch"),
    ("an empty launch of 528 programs", "triton"),
    ("decode", "frozen"),
    ("decode, 2 adapters", "fastlora"),
    ("decode, 2 adapters", "fastlora-in-turn"),
    ("decode, 2 adapters", "fastlora-added"),
    ("decode, launches that do nothing", "empty"),
    ("decode of q and v, 16 adapters", "fastlora"),
    ("decode of q and v, 16 adapters", "fastlora-all"),
    ("frozen product of gate_proj/up_proj", "fastlora"),
    ("segmented_shrink of q_proj/k_proj/v_proj, 2 adapters", "fastlora"),
    ("segmented_expand of down_proj, 2 adapters", "fastlora"),
    ("prefill", "frozen"),
    ("prefill, 2 adapters", "fastlora"),
    ("prefill, 2 adapters", "fastlora-fused"),
    ("decode of one layer, 2 adapters", "peft"),
    ("kernels, 16 adapters of rank 8 to 64", "fastlora-mixed"),
    ("engine, 3 requests, 3 adapters", "fastlora"),
}


@pytest.mark.parametrize("part", gpu._RUN)
def test_a_part_runs_and_leaves_its_files(part, tmp_path):
    arguments = ["--part", part, "--out", tmp_path, "--smoke", "--commit", "abc1234"]
    status = run_script(SCRIPT, *arguments, log=tmp_path / "printed")
    assert status == 0, (tmp_path / "printed").read_text()
    log = (tmp_path / f"{part}.log").read_text()
    assert "commit=abc1234 device=smoke" in log
    if part == "tests":
        assert " passed" in log
    if part == "tune":
        entries = json.loads((tmp_path / "tuned.json").read_text())["entries"]
        assert {entry["key"]["siblings"] for entry in entries} == {1, 2}
    if part == "sweep":
        lines = (tmp_path / "sweep.csv").read_text().splitlines()
        kernels = [line.split(",")[3] for line in lines[1:]]
        assert collections.Counter(kernels) == {"shrink": 1, "expand": 1, "pair": 2}
    if part == "serve":
        rows = results.read(tmp_path / "serve.csv")
        assert not [row for row in rows if row.refused]
        assert {(row.level, row.commit) for row in rows} == {("serve", "abc1234")}
        assert json.loads((tmp_path / "run.json").read_text())["command"].endswith(
            "PART=serve OUT=folder"
        )
        assert "Failed" not in log
        assert {(row.case, row.provider) for row in rows} >= SERVED
        checked = [row for row in rows if row.provider.startswith("fastlora") and row.to_frozen]
        gates = [row.gate for row in checked if row.case.startswith(("decode, 2", "prefill"))]
        # Of a decode, and of a prefill in a graph and without one.
        assert len(gates) == len(serving_steps.VARIANTS) + 2 * len(
            serving_steps.prefill_providers(65)
        )
        assert all(0 < gate <= 1 for gate in gates)
    if part in ("bench", "compiled"):
        rows = results.read_folder(tmp_path)
        assert not [row for row in rows if row.refused]
        assert all(row.commit == "abc1234" for row in rows)
        command = json.loads((tmp_path / "run.json").read_text())["command"]
        assert command == f"make gpu PART={part} OUT=folder"
        seen = {(row.level, row.provider) for row in rows}
        assert {("layer", name) for name in ("frozen", "peft", "fastlora")} <= seen
        if part == "bench":
            levels = {"roof", "layer", "linear", "step", "operation"}
            assert {row.level for row in rows} == levels
            assert ("operation", "fastlora-fused") in seen


def test_results_are_filed_under_their_device(tmp_path, monkeypatch):
    from fastlora.kernels import tile_config

    (tmp_path / "in").mkdir()
    results.writer(tmp_path / "in" / "layer.csv")(Row(gpu="NVIDIA H200", level="layer"))
    (tmp_path / "in" / "dram.csv").write_text("device,case\nNVIDIA H200,q_proj\n")
    (tmp_path / "in" / "bench.log").write_text("log\n")
    write_about(tmp_path / "in", "make gpu PART=bench OUT=folder", [])
    table = {"device": "NVIDIA H200", "entries": []}
    (tmp_path / "in" / "tuned.json").write_text(json.dumps(table))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(tile_config, "TUNED", tmp_path / "tuned")
    assert gpu.import_results(tmp_path / "in") == 0
    filed = tmp_path / "benchmarks" / "results" / "nvidia-h200"
    assert sorted(path.name for path in filed.iterdir()) == [
        *("bench.log", "dram.csv", "layer.csv", "run.json"),
    ]
    assert json.loads((tmp_path / "tuned" / "nvidia-h200.json").read_text()) == table


def test_a_log_alone_says_where_it_belongs(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "tests.log").write_text(
        "date=2026-11-22 commit=abc device=NVIDIA H100 80GB HBM3 torch=2.11.0 triton=3.6.0\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.import_results(tmp_path / "in") == 0
    assert (tmp_path / "benchmarks/results/nvidia-h100-80gb-hbm3/tests.log").exists()


def test_results_of_no_device_are_refused(tmp_path, capsys):
    assert gpu.import_results(tmp_path) == 1
    assert "no device" in capsys.readouterr().out


def test_what_is_promised_is_what_is_timed():
    assert set(promises.LINEARS) == set(MAIN_MODELS)
    assert set(promises.LAYERS) == {(m, 8192) for m in MAIN_MODELS} | {("Qwen2.5-0.5B", 2048)}

    class OnGpu:
        smoke, only, device, facts = False, [], torch.device("cuda", 0), {"commit": "abc"}

        def seconds_left(self):
            return 60.0

    options = promises._options(OnGpu(), "bench")
    assert {model.name for model in options.models} == set(MAIN_MODELS)
    assert {m for _, m in promises.LAYERS} == set(options.tokens)
    compared = {provider.name for provider in options.providers_for("linear", 0.0)}
    assert {"frozen", "peft", "peft-bf16", "addmm", "fastlora", "fastlora-fused"} <= compared
    assert "peft-compiled" not in compared
    compiled = promises._options(OnGpu(), "compiled")
    assert "peft-compiled" in {one.name for one in compiled.providers_for("layer", 0.1)}


LAYER = Row(
    level="layer", model="Qwen3-8B", case="layer", tokens=8192, rank=16, dropout=0.1,
    provider="fastlora", median_us=10.0, over_frozen=1.07,
)  # fmt: skip


@pytest.mark.parametrize(("over_frozen", "kept"), [(1.07, True), (1.071, False)])
def test_a_layer_s_promise_is_held_against_what_was_timed(over_frozen, kept):
    (verdict,) = promises.verdicts([replace(LAYER, over_frozen=over_frozen)])
    assert verdict.is_kept is kept
    word = "kept" if kept else "NOT kept"
    assert str(verdict).endswith(f": over frozen: {over_frozen:.3f}, {word} (<= 1.07)")


@pytest.mark.parametrize(
    "change", [{"dropout": 0.0}, {"tokens": 2048}, {"rank": 64}, {"provider": "fastlora-fused"}]
)
def test_nothing_is_held_against_what_it_does_not_speak_of(change):
    assert promises.verdicts([replace(LAYER, **change)]) == []


def test_linears_are_added_up_as_often_as_a_layer_has_them():
    linear = replace(LAYER, level="linear", over_frozen=None)
    us = {"frozen": (100.0, 300.0), "peft": (150.0, 450.0), "fastlora": (100.0, 350.0)}
    rows = [
        replace(linear, provider=name, case=case, count=count, median_us=time)
        for name, times in us.items()
        for (case, count), time in zip((("q_proj", 2), ("down_proj", 1)), times, strict=True)
    ]
    over_frozen, over_peft = promises.verdicts(rows)
    assert (over_frozen.seen, over_frozen.is_kept) == (550 / 500, True)
    assert (over_peft.seen, over_peft.is_kept) == (pytest.approx(750 / 550), False)


def test_the_fused_gemm_is_held_against_cublas_and_linears_against_addmm():
    gemm = replace(
        LAYER, level="operation", case="input_grad of q_proj", provider="fastlora-fused",
        over_frozen=1.04,
    )  # fmt: skip
    addmm = replace(LAYER, level="linear", provider="addmm", dropout=0.0, over_fastlora=0.98)
    cases = [gemm, replace(gemm, over_frozen=1.02), addmm, replace(addmm, over_fastlora=1.0)]
    assert [promises.verdicts([row])[0].is_kept for row in cases] == [False, True, False, True]


def test_without_a_gpu_and_without_smoke_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, SCRIPT, "--part", "tune", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "there is no CUDA device; --smoke runs without one" in result.stderr


def test_metrics_of_all_kernels_are_added_up():
    read, write = gpu.DRAM_METRICS
    output = "\n".join(
        [
            "==PROF== noise",
            f'"ID","{read}","{write}"',
            '"","Mbyte","byte"',
            '"0","1.5","1,000"',
            '"1","0.5","24"',
        ]
    )
    assert gpu._sum_metrics(output) == {read: 2e6, write: 1024.0}


class OnCpu:
    """A run of a part, as a session of serving sees it."""

    smoke, device, facts = True, torch.device("cpu"), {"commit": "abc1234"}

    def __init__(self, out):
        self.out, self.lines, self.late = out, [], False

    def say(self, line):
        self.lines.append(line)

    def out_of_time(self):
        return self.late


@pytest.fixture
def session(tmp_path):
    return Session(OnCpu(tmp_path), SMOKE)


SHARE = Row(
    level="serve", model="Qwen2.5-7B", case="decode, 16 adapters", tokens=32, rank=16,
    provider="fastlora", timer="graph", median_us=10.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({}, 0.85),
        ({"case": "decode, 1 adapter", "tokens": 64}, 0.92),
        ({"case": "decode, 64 adapters", "tokens": 64}, 0.68),
        ({"case": "decode, 64 adapters", "provider": "fastlora-in-turn"}, 0.65),
        ({"case": "prefill, 1 adapter", "tokens": 8192, "timer": "eager"}, 0.92),
        ({"case": "prefill, 16 adapters", "tokens": 512}, 0.90),
    ],
)
def test_serving_is_held_to_its_share_of_the_base_model_s_speed(change, least):
    row = replace(SHARE, **change)
    for share, kept in ((least + 0.001, True), (least - 0.001, False)):
        (verdict,) = verdicts([replace(row, over_frozen=1 / share)])
        assert (verdict.limit, verdict.is_kept) == (least, kept)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "Qwen3-8B"},
        {"rank": 64},
        {"provider": "empty"},
        {"case": "decode, 4 adapters"},
        {"over_frozen": None},
    ],
)
def test_nothing_was_promised_of_other_ways_to_serve(change):
    assert verdicts([replace(SHARE, **{"over_frozen": 9.0, **change})]) == []


@pytest.mark.parametrize(("median_us", "kept"), [(7.12, True), (7.13, False)])
def test_a_kernel_is_held_to_its_bytes_at_four_fifths_of_a_copy_and_one_launch(median_us, kept):
    copy = Row(level="serve", case="copy", moved_gib=1.0, median_us=256.0)  # 4.2 TB/s
    kernel = replace(
        SHARE, case="segmented_expand of o_proj, 16 adapters", moved_gib=0.016, median_us=median_us
    )
    (verdict,) = verdicts([kernel, copy])
    assert (verdict.limit, verdict.is_kept) == (7.12, kept)
    assert verdicts([kernel]) == []


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"provider": "fastlora-mixed", "over_fastlora": 1.1}, True),
        ({"provider": "fastlora-mixed", "over_fastlora": 1.11}, False),
        ({"case": "launches of a decoder layer", "launches": 8}, True),
        ({"case": "launches of a decoder layer", "launches": 9}, False),
        ({"case": "launches for metadata", "launches": 0}, True),
        ({"case": "launches for metadata", "launches": 1}, False),
    ],
)
def test_mixed_ranks_and_launches_have_a_limit(change, kept):
    (verdict,) = verdicts([replace(SHARE, **change)])
    assert verdict.is_kept is kept


def test_all_that_serving_promises_is_timed():
    assert SIZES.models[0].name == PROMISED_MODEL
    for promised in PROMISED.values():
        assert {distinct for distinct, _ in SIZES.decode} == set(promised)
    assert SIZES.distinct == tuple(PREFILL)
    assert SIZES.prefill == (512, 8192)
    assert PROVIDERS[LAUNCHES] in serving_steps.VARIANTS


def test_launches_are_what_adapters_add_and_others_are_named(session, monkeypatch):
    served = Served(TINY, session.device, session.dtype, [(2, 16)])
    bare = collections.Counter({"gemm": 7})
    # The frozen products are no part of what adapters add, whoever computes them.
    ours = collections.Counter(
        {
            "gemm": 2,
            "_decode_gemm_kernel": 3,
            "_segmented_shrink_kernel": 4,
            "_segmented_expand_kernel": 4,
            "argsort": 1,
        }
    )
    found = iter([bare, ours])
    monkeypatch.setattr(serving_steps, "launched", lambda step, device: next(found))
    session.on_gpu = True
    serving_steps.count_launches(session, served, served.load("adapter", 2, 16))
    assert {row.case: row.launches for row in session.rows} == {
        "launches of a decoder layer": 9,
        "launches for metadata": 1,
    }
    assert "'argsort': 1" in session.run.lines[-1]


interpreted = pytest.mark.skipif(not plans.interpreting(), reason="it interprets kernels")


@interpreted
def test_serving_is_not_timed_where_it_is_wrong(session, monkeypatch):
    """Adapters are told after the capture: a graph that forgets them, or mixes them up."""
    served = Served(TINY, session.device, session.dtype, [(3, 16)])
    slots = served.load("adapter", 3, 16)
    inputs, rows = served.inputs(4), Rows(4, served.pool)
    with fastlora.backend("fused"):
        step = session.capture(served.step(inputs, None, rows, rows), None)
        requests = in_turns(slots[:2], 4)
        assert session.checked(served, step, [(rows, requests)], inputs, {"case": "right"})
        # The last row has another adapter than it should, or none.
        for number, wrong in enumerate((slots[2], 0)):
            rows.tell([*requests[:-1], (wrong, 1)])
            step.replay()
            with pytest.raises(WrongResult, match="layer 0, q_proj"):
                served.check(step.outputs, inputs, requests)
            monkeypatch.setattr(rows, "tell", lambda requests: None)
            row = {"case": f"wrong {number}"}
            assert not session.checked(served, step, [(rows, requests)], inputs, row)
            monkeypatch.undo()
    refused = [row.refused for row in session.rows]
    assert len(refused) == 2
    assert all("from fp64, allowed are" in reason for reason in refused)


def test_one_wrong_row_of_thousands_is_seen(session):
    served = Served(TINY, session.device, session.dtype, [(1, 16)])
    served.load("adapter", 1, 16)
    x = torch.randn(8192, 32).half()
    exact = torch.randn(8192, 48).double()
    for change, what in ((0.0, None), (0.05, "q_proj, row 5000")):
        y = exact.half()
        y[5000] *= 1 + change
        operands = (x, y, exact.half(), exact.clone(), [(0, 8192)])
        if what is None:
            assert served.compare("q_proj", 0, *operands) <= 1
        else:
            with pytest.raises(WrongResult, match=what):
                served.compare("q_proj", 0, *operands)


def test_one_failure_does_not_cost_the_rest_of_serving(session):
    def fails():
        raise RuntimeError("no such device")

    session.section("one", fails)
    session.section("two", lambda: session.add(case="two", provider="fastlora"))
    session.run.late = True
    session.section("three", lambda: session.add(case="three", provider="fastlora"))
    assert session.failed
    assert session.notes == [
        "Failed: one (RuntimeError: no such device).",
        "Out of time: three.",
    ]
    assert [row.case for row in results.read(session.run.out / "serve.csv")] == ["two"]
