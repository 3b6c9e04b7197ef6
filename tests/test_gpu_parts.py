"""``benchmarks/gpu.py`` runs without a GPU, so that its first run on one is not for debugging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu
import promises
import pytest
import torch

from fastlora.bench import results
from fastlora.bench.command import write_about
from fastlora.bench.results import Row
from fastlora.bench.shapes import MAIN_MODELS

ROOT = Path(__file__).parent.parent


def run(*arguments, check=True):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu.py", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=check,
    )


@pytest.mark.parametrize("part", gpu._RUN)
def test_a_part_runs_and_leaves_its_files(part, tmp_path):
    run("--part", part, "--out", tmp_path, "--smoke", "--commit", "abc1234")
    log = (tmp_path / f"{part}.log").read_text()
    assert "commit=abc1234 device=smoke" in log
    if part == "tests":
        assert " passed" in log
    if part == "tune":
        entries = json.loads((tmp_path / "tuned.json").read_text())["entries"]
        assert {entry["key"]["siblings"] for entry in entries} == {1, 2}
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
        smoke, device, facts = False, torch.device("cuda", 0), {"commit": "abc"}

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
    result = run("--part", "tune", "--out", tmp_path, check=False)
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
