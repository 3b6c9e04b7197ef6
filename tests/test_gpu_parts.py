"""``benchmarks/gpu.py`` runs without a GPU, so that its first run on one is not for debugging."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_train
import pytest
import torch
from shapes import MODELS, Linear

ROOT = Path(__file__).parent.parent


def run(*arguments, check=True):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu.py", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=check,
    )


@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_runs_and_leaves_its_files(part, tmp_path):
    run("--part", part, "--out", tmp_path, "--smoke", "--commit", "abc1234")
    log = (tmp_path / f"{part}.log").read_text()
    assert "commit=abc1234 device=smoke" in log
    if part == "tests":
        assert " passed" in log
    if part == "tune":
        entries = json.loads((tmp_path / "tuned.json").read_text())["entries"]
        assert {entry["key"]["siblings"] for entry in entries} == {1, 2}
    if part == "train":
        rows = list(csv.DictReader((tmp_path / "train.csv").read_text().splitlines()))
        seen = {}
        for row in rows:
            key = (row["provider"], float(row["p"]), row["plan"])
            seen.setdefault(row["linear"], []).append(key)
        assert list(seen) == ["grouped layer", "/".join(MODELS["Qwen3-8B"]), "sum of linears"]
        timed = (gpu_train.TIMED_LAYERS, gpu_train.TIMED, gpu_train.TIMED)
        assert [tuple(keys) for keys in seen.values()] == list(timed)
        assert all(float(row["graph_us"]) > 0 for row in rows)
        assert "was not timed" not in log


def test_results_are_filed_under_their_device(tmp_path, monkeypatch):
    from fastlora.kernels import tile_config

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.csv").write_text("device,graph_us\nNVIDIA H200,1.0\n")
    (tmp_path / "in" / "train.log").write_text("log\n")
    table = {"device": "NVIDIA H200", "entries": []}
    (tmp_path / "in" / "tuned.json").write_text(json.dumps(table))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(tile_config, "TUNED", tmp_path / "tuned")
    assert gpu.import_results(tmp_path / "in") == 0
    results = tmp_path / "benchmarks" / "results" / "nvidia-h200"
    assert sorted(path.name for path in results.iterdir()) == ["train.csv", "train.log"]
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
    assert set(gpu_train.PROMISES) == set(MODELS)
    assert set(gpu_train.LAYER_PROMISES) == {(m, 8192) for m in MODELS} | {("Qwen2.5-0.5B", 2048)}
    for needed in (("fastlora", 0.1, "auto"), ("peft", 0.1, "auto"), ("peft-bf16", 0.1, "auto")):
        assert needed in gpu_train.TIMED_LAYERS
        assert needed in gpu_train.TIMED


class _FakeRun:
    """What ``_time_layers`` takes of a run; it keeps what is said."""

    smoke, device, facts = True, torch.device("cpu"), {}

    def __init__(self, *, late=False):
        self.late, self.said = late, []

    def say(self, line):
        self.said.append(line)

    def out_of_time(self):
        return self.late


@pytest.fixture
def fake_times(monkeypatch):
    """Bare linears take 100 us, fastlora 110, peft 150: nothing is run."""

    def time_steps(run, steps, rounds):
        us = {"frozen": 100.0, "fastlora": 110.0}
        return {key: {"graph_us": us.get(key[0], 150.0), "eager_us": 1.0} for key in steps}

    monkeypatch.setattr(gpu_train, "_time_steps", time_steps)
    monkeypatch.setattr(gpu_train, "_layer_fraction", lambda *_: 0.97)


TINY = dict.fromkeys(MODELS["Qwen3-8B"], Linear(16, 16))


@pytest.mark.parametrize(("promised", "verdict"), [(1.10, "kept"), (1.09, "NOT kept")])
def test_a_layer_s_promise_is_held_against_what_was_timed(
    fake_times, monkeypatch, promised, verdict
):
    monkeypatch.setitem(gpu_train.LAYER_PROMISES, ("tiny", 32), promised)
    run, rows = _FakeRun(), []
    assert gpu_train._time_layers(run, rows.append, "tiny", TINY, 32) is (verdict == "kept")
    assert run.said[0].endswith(f": {verdict} (fastlora/frozen at most {promised})")
    assert "fused GEMMs at 0.970 of cuBLAS" in run.said[0]
    ratios = {(row["provider"], row["plan"]): row["ratio_to_frozen"] for row in rows}
    assert ratios["frozen", "auto"] == 1.0
    assert ratios["fastlora", "hybrid"] == 1.1


def test_a_layer_that_does_not_run_is_named_and_the_rest_goes_on(fake_times, monkeypatch):
    monkeypatch.setattr(gpu_train, "_time_steps", lambda *_: 1 / 0)
    run = _FakeRun()
    assert gpu_train._time_layers(run, [].append, "tiny", TINY, 32) is False
    assert run.said[0].startswith("tiny M=32, a layer was not timed:\nTraceback")


def test_nothing_begins_after_the_time_is_up():
    run = _FakeRun(late=True)
    assert gpu_train._time_layers(run, [].append, "tiny", TINY, 32) is None
    assert gpu_train._time_linears(run, [].append, "tiny", TINY, 32) is None


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
