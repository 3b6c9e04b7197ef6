"""What a row was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from types import SimpleNamespace

import torch
from small_session import CPU

from fastlora.bench import (
    environment,
    results,
)


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


def test_a_changed_checkout_is_dirty_and_one_with_new_results_is_not(monkeypatch, tmp_path):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    code = tmp_path / "fastlora" / "bench" / "environment.py"
    results = tmp_path / "benchmarks" / "results" / "layer.csv"
    for path in (code, results, tmp_path / "kernels" / "shrink.py"):
        path.parent.mkdir(parents=True)
        path.write_text("before\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "all of it")
    head = git("rev-parse", "--short", "HEAD")
    monkeypatch.setattr(environment, "__file__", str(code))
    assert environment._commit() == head
    results.write_text("after\n")
    assert environment._commit() == head
    code.write_text("after\n")
    assert environment._commit() == f"{head}-dirty"
