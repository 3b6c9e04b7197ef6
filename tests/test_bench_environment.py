"""What a row was made with."""

from __future__ import annotations

import importlib.metadata
import platform
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
