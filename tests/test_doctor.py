"""What ``fastlora doctor`` finds, in packages, devices, tables and plans, and its commands."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from tiny_models import tiny_model

import fastlora
from fastlora import cli, doctor, plans
from fastlora.bench import environment
from fastlora.kernels import tile_config
from fastlora.serving import batching

QWEN = "Qwen/Qwen2.5-7B-Instruct"
H200 = "NVIDIA H200"
OURS = "fastlora-kernels"
NEEDS = {need.name: need for need in map(Requirement, doctor.declared()[1])}
MODEL_OPTIONS = "--rank 16 --dtype bfloat16 --dropout 0.1 --tokens 8192 2048"


def examine(model=None, tokens=(8192, 2048), rank=16, dtype=torch.bfloat16, dropout_p=0.1):
    return doctor.examine(model, tokens, rank, dtype, dropout_p)


def about(report, words):
    """Return the one finding that says something."""
    (finding,) = [each for each in report.findings if words in each.what]
    return finding


def start_anew():
    plans.unsupported_reason.cache_clear()
    plans.forget_measurements()


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """Without a GPU, a driver, tables and variables, whatever the machine of the test has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tile_config, "TUNED", tmp_path / "committed")
    for name in (plans.ENVIRONMENT, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    # Not the variable: kernels that are imported without it are compiled in every later test.
    monkeypatch.setattr(plans, "interpreting", lambda: False)
    monkeypatch.setattr(environment, "driver_version", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(plans, "_failures", {})
    start_anew()
    yield
    start_anew()


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages have other versions, or none."""

    def pretend(versions):
        real = importlib.metadata.version

        def version(name):
            if versions.get(name, "") is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions.get(name) or real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are CUDA devices, whose check gave what is said of each kernel."""

    def pretend(*names, major=9, reasons=None):
        properties = [
            SimpleNamespace(
                name=name,
                major=major,
                minor=0,
                total_memory=140 * 2**30,
                multi_processor_count=132,
                shared_memory_per_block_optin=232448,
            )
            for name in names
        ]
        monkeypatch.setattr(environment, "driver_version", lambda: "580.95")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: properties[device.index]
        )
        reason_against = (reasons or {}).get
        monkeypatch.setattr(plans, "_reason_against", lambda kernel, _: reason_against(kernel))
        start_anew()

    return pretend


def write_table(folder, plan="fused", triton=None, **key):
    triton = triton or importlib.metadata.version("triton")
    key = {"operation": "low_rank_gemm", "dtype": "bfloat16", "r": 16, "m": 8192} | key
    folder.mkdir(parents=True, exist_ok=True)
    table = {"triton": triton, "entries": [{"key": key, "plan": plan, "tile": None}]}
    path = folder / "nvidia-h200.json"
    path.write_text(json.dumps(table))
    return path


QKV = {"n": 3584 + 512 + 512, "k": 3584, "siblings": 3}  # of Qwen2.5-7B


def row(report, m, linears):
    """Return forward, backward and thin products of a group."""
    start = f"{m:6}  {linears:8} "
    (finding,) = [each for each in report.findings if each.what.startswith(start)]
    line = finding.what.removeprefix(start)
    return line[:18].strip(), line[18:36].strip(), line[36:].strip()


# Packages


def test_a_sound_environment_has_no_problems():
    report = examine()
    for name in ("fastlora", "python", *(n for n, need in NEEDS.items() if not need.marker)):
        assert about(report, f"{name:14}").kind == "ok"
    assert about(report, "torch  ").what.split()[1] == importlib.metadata.version("torch")
    assert not report.broken
    assert str(report).endswith("\nno problems found")


@pytest.mark.parametrize(("name", "version"), [("torch", "2.1.0"), ("peft", "0.1.0")])
def test_a_version_out_of_range_is_broken_and_has_its_command(installed, name, version):
    installed({name: version})
    report = examine()
    found = about(report, f"{name:14}{version}")
    assert (found.kind, found.remedy) == ("broken", f'pip install "{name}{NEEDS[name].specifier}"')
    assert report.broken
    assert str(report).endswith(f"what to do\n  1. {found.remedy}")


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_a_missing_package_is_broken_and_has_its_command(installed, name):
    installed({name: None})
    found = about(examine(), f"{name:14}missing")
    assert (found.kind, found.remedy) == ("broken", f'pip install "{name}{NEEDS[name].specifier}"')


def test_ranges_are_those_that_the_distribution_declares(monkeypatch):
    declared = ["torch<99", 'peft>=99; python_version >= "3"', 'gguf>=99; extra == "demo"']
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: {"Requires-Python": ">=3.10"})
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared)
    report = examine()
    assert about(report, "torch  ").what.split()[3].startswith("<99")
    assert about(report, "peft  ").remedy == 'pip install "peft>=99"'
    assert not [finding for finding in report.findings if finding.what.startswith("gguf")]


def test_an_old_python_is_broken(monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.8.1")
    found = about(examine(), "python  ")
    assert found.kind == "broken"
    assert found.remedy.startswith('in an environment of "python>=')


@pytest.fixture
def without_distribution(monkeypatch, installed):
    """Pretend that fastlora was put on the path, and not installed."""

    def metadata(name):
        raise importlib.metadata.PackageNotFoundError(name)

    installed({OURS: None})
    monkeypatch.setattr(importlib.metadata, "metadata", metadata)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no pyproject.toml")
def test_a_checkout_on_the_path_needs_what_its_project_file_says(without_distribution, installed):
    installed({"torch": "2.1.0"})
    report = examine()
    found = about(report, "fastlora  ")
    assert (found.kind, found.what.split()[1]) == ("ok", fastlora.__version__)
    assert found.what.endswith(f"in {doctor.PACKAGE}, which is on the path, not installed")
    assert about(report, "python  ").what.endswith("needs >=3.10")
    assert about(report, "torch  ").remedy == f'pip install "torch{NEEDS["torch"].specifier}"'
    assert [each.what.split()[0] for each in report.findings if each.kind == "broken"] == ["torch"]


@pytest.mark.parametrize("project", [None, "[tool.ruff]", "[project]\nname = 'theirs'"])
def test_a_package_without_distribution_and_checkout_is_broken(
    project, monkeypatch, tmp_path, without_distribution
):
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path / "fastlora")
    if project:
        (tmp_path / "pyproject.toml").write_text(project)
    found = about(examine(), f"PackageNotFoundError: No package metadata was found for {OURS}")
    assert (found.kind, found.remedy) == ("broken", f"{doctor._reinstall()} packaging")


def test_the_triton_that_does_not_compile_the_gemm_is_advice(installed):
    installed({"triton": "3.5.1"})
    report = examine()
    found = about(report, "does not compile the GEMM")
    assert (found.kind, found.remedy) == ("advice", doctor.ANOTHER_TRITON)
    assert not report.broken


def test_packages_beside_it_are_named_where_they_are_installed(installed):
    installed({"liger-kernel": "0.6.2", "trl": None})
    report = examine()
    assert about(report, "liger-kernel").what.split()[1:] == [
        "0.6.2",
        "works",
        "beside",
        "fastlora",
    ]
    assert "trl" not in str(report)


def test_the_other_project_of_this_name_is_broken(installed):
    installed({"fastlora": "4.2.1"})
    found = about(examine(), "fastlora 4.2.1, another project")
    assert found.kind == "broken"
    assert found.remedy == f"pip uninstall -y fastlora {OURS} && {doctor._reinstall()}"


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, f"--no-deps {OURS}"),
        ({"url": "file:///a/check out", "dir_info": {}}, "--no-deps 'file:///a/check out'"),
    ],
)
def test_it_is_installed_again_from_where_it_came(monkeypatch, tmp_path, origin, command):
    files = SimpleNamespace(version="0.1.0", read_text=lambda name: origin and json.dumps(origin))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: files)
    assert doctor._reinstall() == f"pip install -e {doctor.PACKAGE.parent}"
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path / "fastlora")
    assert doctor._reinstall() == f"pip install --force-reinstall {command}"


SCRIPT = "from fastlora import doctor; print(doctor.examine(None, [8192], 16, 'float16', 0.1))"


def printed(script, folder):
    """Return what a process of its own prints, in which other modules are broken."""
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=folder
    ).stdout.splitlines()


def test_a_copy_without_kernels_is_broken(tmp_path):
    package, without = doctor.PACKAGE, shutil.ignore_patterns("kernels", "__pycache__")
    shutil.copytree(package, tmp_path / "fastlora", ignore=without)
    words = " ".join(" ".join(printed(SCRIPT, tmp_path)).split())
    assert f"broken {tmp_path}/fastlora/kernels is missing" in words
    assert "1. pip install --force-reinstall --no-deps " in words


def test_a_torch_that_cannot_be_imported_is_broken(tmp_path):
    lines = printed(f"import sys; sys.modules['torch'] = None; {SCRIPT}", tmp_path)
    assert lines[1].startswith("  broken  ")
    assert lines[-1] == "  1. pip install --force-reinstall torch"


def test_without_torch_there_is_one_thing_to_do(monkeypatch, installed):
    installed({"torch": None})
    monkeypatch.setattr(doctor, "_import_error", ModuleNotFoundError("No module named 'torch'"))
    lines = str(examine(QWEN)).splitlines()
    assert lines[-2:] == ["what to do", f'  1. pip install "torch{NEEDS["torch"].specifier}"']


# Devices


def test_without_a_gpu_it_says_that_everything_is_plain():
    report = examine()
    assert about(report, "no CUDA device: plain PyTorch").kind == "ok"
    assert "`fastlora bench`" in str(report)
    assert about(report, "with fastlora").what == "with fastlora: none"


@pytest.mark.parametrize(
    ("cuda", "visible", "kind", "remedy"),
    [
        (None, None, "broken", "pip uninstall -y torch triton && pip install torch"),
        ("13.0", None, "broken", "nvidia-smi  # update an old driver"),
        ("13.0", "", "advice", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_driver_whose_devices_torch_does_not_find(monkeypatch, cuda, visible, kind, remedy):
    monkeypatch.setattr(environment, "driver_version", lambda: "580.95")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    report = examine()
    assert about(report, "driver 580.95").kind == "ok"
    assert [(each.kind, each.remedy) for each in report.findings if each.remedy] == [(kind, remedy)]


def test_a_device_is_described_with_its_plans(gpus):
    gpus(H200)
    report = examine()
    found = about(report, "cuda:0, NVIDIA H200, sm_90, 140 GiB: hybrid; no shape was measured")
    assert found.kind == "ok"
    assert about(report, "driver").what == "driver 580.95"
    assert not report.broken


def test_a_kernel_that_failed_its_check_is_broken_with_the_reason(gpus):
    gpus(H200, reasons={"low_rank_gemm": "y is off by 1.0e-01"})
    found = about(examine(), "GiB: hybrid; low_rank_gemm: y is off by 1.0e-01")
    assert (found.kind, found.remedy) == ("broken", doctor.ANOTHER_TRITON)


def test_the_gemm_that_a_known_triton_does_not_compile_is_advice(gpus, installed):
    installed({"triton": "3.5.1"})
    gpus(H200, reasons={"low_rank_gemm": "CompilationError"})
    report = examine()
    assert about(report, "low_rank_gemm: CompilationError").kind == "advice"
    assert str(report).count(doctor.ANOTHER_TRITON) == 1


def test_a_check_without_memory_says_nothing_of_a_kernel(gpus, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    gpus(H200)
    monkeypatch.setattr(plans, "_reason_against", fail)
    report = examine()
    assert not report.broken
    assert "  1. nvidia-smi" in str(report)


def test_a_device_that_kernels_do_not_run_on_is_plain_and_not_tuned(gpus):
    gpus("Tesla T4", major=7)
    report = examine(QWEN)
    assert about(report, "plain PyTorch; Tesla T4 is sm_70").kind == "advice"
    assert "fastlora tune" not in str(report)
    assert "plain PyTorch here" in str(report)


def test_a_device_that_raises_is_broken_and_the_others_are_examined(gpus, monkeypatch):
    gpus("NVIDIA L4", H200)
    properties = torch.cuda.get_device_properties

    def raising(device):
        if device.index == 0:
            raise RuntimeError(
                "CUDA error: uncorrectable ECC error\nCompile with TORCH_USE_CUDA_DSA"
            )
        return properties(device)

    monkeypatch.setattr(torch.cuda, "get_device_properties", raising)
    report = examine()
    found = about(report, "cuda:0")
    assert (found.kind, found.what) == (
        "broken",
        "cuda:0: RuntimeError: CUDA error: uncorrectable ECC error",
    )
    assert about(report, "cuda:1, NVIDIA H200").kind == "ok"


# Variables


def test_a_forced_plan_is_advice(monkeypatch):
    monkeypatch.setenv(plans.ENVIRONMENT, "triton")
    found = about(examine(), "FASTLORA_BACKEND: every plan is fused")
    assert (found.kind, found.remedy) == ("advice", "unset FASTLORA_BACKEND")


def test_a_plan_that_does_not_exist_is_broken_and_the_rest_is_examined(monkeypatch, gpus):
    monkeypatch.setenv(plans.ENVIRONMENT, "fast")
    gpus(H200)
    report = examine(QWEN)
    found = about(report, "FASTLORA_BACKEND must be one of")
    assert (found.kind, found.remedy) == ("broken", "unset FASTLORA_BACKEND")
    assert row(report, 8192, "down")[0] == "hybrid, by rule"


def test_interpreted_kernels_are_advice(monkeypatch):
    monkeypatch.setattr(plans, "interpreting", lambda: True)
    found = about(examine(), "TRITON_INTERPRET: kernels are interpreted")
    assert (found.kind, found.remedy) == ("advice", "unset TRITON_INTERPRET")


# Serving


def test_a_tested_transformers_has_continuous_batching():
    assert about(examine(), "Engine: continuous batching of transformers").kind == "ok"


def test_another_transformers_is_advice_and_named(monkeypatch):
    monkeypatch.setattr(batching, "unsupported_reason", lambda: "transformers 9.9.9 is installed")
    found = about(examine(), "Engine: transformers 9.9.9 is installed: generate() only")
    assert (found.kind, found.remedy) == ("advice", 'pip install "transformers==5.23.*"')


def test_on_a_gpu_it_says_whose_attention_the_engine_takes(gpus, installed):
    gpus(H200)
    assert about(examine(), "attention: its own paged attention")
    installed({"flash-attn": "2.8.0"})
    assert about(examine(), "attention: flash-attn")


# Tables


def test_without_a_table_it_gives_the_command_that_tunes(gpus, tmp_path):
    gpus(H200, "NVIDIA L4", H200)
    report = examine()
    path = tmp_path / "fastlora/tuned/nvidia-h200.json"
    assert about(report, f"yours: none ({path})").kind == "ok"
    found = about(report, "nothing was measured on NVIDIA H200")
    options = f"--model NAME_OR_FOLDER {MODEL_OPTIONS} --device cuda"
    assert (found.kind, found.remedy) == ("advice", f"fastlora tune {options}:0")
    assert about(report, "nothing was measured on NVIDIA L4").remedy == f"fastlora tune {options}:1"


def test_the_command_that_tunes_is_one_that_the_command_line_takes(gpus, tmp_path):
    folder = str(tmp_path / "my model")
    tiny_model().config.save_pretrained(folder)
    gpus("NVIDIA L4", H200)
    report = examine(folder, tokens=[32, 64], rank=8, dtype="float16", dropout_p=0.05)
    command = about(report, f"nothing was measured on {H200}").remedy
    options = vars(cli._parser().parse_args(shlex.split(command)[1:]))
    wanted = {"model": folder, "tokens": [64], "rank": 8, "dtype": "float16", "dropout": 0.05}
    assert options | wanted | {"device": "cuda:1"} == options


@pytest.mark.parametrize(
    ("folder", "whose"), [("committed", "with fastlora"), ("fastlora/tuned", "yours")]
)
def test_a_table_is_counted_and_followed(gpus, tmp_path, folder, whose):
    path = write_table(tmp_path / folder, **QKV)
    gpus(H200)
    report = examine(QWEN)
    minor = tile_config.installed_triton()
    found = about(report, f"{whose}: 1 entries, measured with Triton {minor} ({path})")
    assert found.kind == "ok"
    assert "nothing was measured" not in str(report)
    assert row(report, 8192, "q/k/v") == ("fused, measured", "hybrid, by rule", "Triton")


def test_a_stale_table_is_ignored_and_has_the_command(gpus, tmp_path):
    write_table(tmp_path / "fastlora/tuned", triton="2.1.0", **QKV)
    gpus(H200)
    report = examine(QWEN)
    found = about(report, "measured with Triton 2.1")
    assert found.kind == "advice"
    assert found.what.endswith("ignored, another Triton is installed")
    assert found.remedy == f"fastlora tune --model {QWEN} {MODEL_OPTIONS} --device cuda:0"
    assert row(report, 8192, "q/k/v")[0] == "hybrid, by rule"
    assert str(report).count(found.remedy) == 1


def test_a_committed_table_of_another_triton_is_followed_all_the_same(gpus, tmp_path):
    write_table(tmp_path / "committed", triton="2.1.0", **QKV)
    gpus(H200)
    report = examine(QWEN)
    assert about(report, "measured with Triton 2.1").kind == "ok"
    assert row(report, 8192, "q/k/v")[0] == "fused, measured"


def test_a_table_that_cannot_be_read_is_to_be_deleted(gpus, tmp_path):
    path = write_table(tmp_path / "fastlora/tuned", **QKV)
    path.write_text("{}")
    gpus(H200)
    found = about(examine(), "is not a table of tuned tiles")
    assert (found.kind, found.remedy) == ("broken", f"rm {path}")


# Plans


def test_without_a_gpu_the_plans_are_those_of_an_h200_by_the_committed_table(tmp_path):
    write_table(tmp_path / "committed", operation="input_grad", **QKV)
    write_table(tmp_path / "fastlora/tuned", **QKV)  # measured on another machine
    report = examine(QWEN)
    text = str(report)
    assert f"plans of {QWEN}, bfloat16, rank 16, dropout 0.1, on an NVIDIA H200\n" in text
    assert "by the table that comes with fastlora; plain PyTorch here" in text
    assert "with fastlora: nvidia-h200.json" in text
    for m in (8192, 2048):
        for linears in ("q/k/v", "o", "gate/up", "down"):
            measured = (m, linears) == (8192, "q/k/v")
            backward = "fused, measured" if measured else "hybrid, by rule"
            assert row(report, m, linears) == ("hybrid, by rule", backward, "Triton")
    assert text.endswith("\nno problems found")


def test_what_is_forced_on_this_machine_says_nothing_of_an_h200(monkeypatch):
    monkeypatch.setenv(plans.ENVIRONMENT, "plain")
    assert row(examine(QWEN), 8192, "o") == ("hybrid, by rule", "hybrid, by rule", "Triton")


def test_the_legend_explains_the_words_that_occur(gpus):
    gpus(H200)
    text = str(examine(QWEN, tokens=[8192]))
    assert text.count(f"hybrid        {doctor.LEGEND['hybrid']}") == 1
    assert doctor.LEGEND["by rule"] in text
    assert doctor.LEGEND["fused"] not in text
    assert doctor.LEGEND["few rows"] not in text


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.1, ("hybrid, few rows", "hybrid, few rows", "Triton")),
        (0.0, ("plain, few rows", "plain, few rows", "PyTorch")),
    ],
)
def test_few_rows_are_named_and_not_to_be_tuned(gpus, p, expected):
    gpus(H200)
    report = examine(QWEN, tokens=[63], dropout_p=p)
    assert row(report, 63, "o") == expected
    assert "not measured" not in str(report).split("plans of")[1]
    assert "--tokens" not in str(report)


def test_plans_that_were_not_measured_are_counted(gpus, tmp_path):
    write_table(tmp_path / "committed", **QKV)
    gpus(H200)
    found = about(examine(QWEN), "15 of 16 plans were not measured")
    assert found.kind == "advice"
    assert found.remedy == f"fastlora tune --model {QWEN} {MODEL_OPTIONS} --device cuda:0"


def test_a_forced_plan_is_named_so_and_not_to_be_tuned(gpus, monkeypatch, tmp_path):
    write_table(tmp_path / "committed", **QKV)
    monkeypatch.setenv(plans.ENVIRONMENT, "plain")
    gpus(H200)
    report = examine(QWEN)
    assert row(report, 8192, "o") == ("plain, forced", "plain, forced", "PyTorch")
    assert "fastlora tune" not in str(report)


def test_a_gemm_that_failed_its_check_is_not_to_be_tuned(gpus, tmp_path):
    write_table(tmp_path / "committed", **QKV)
    gpus(H200, reasons={"low_rank_gemm": "y is off"})
    report = examine(QWEN)
    assert row(report, 8192, "q/k/v") == ("hybrid, by rule", "hybrid, by rule", "Triton")
    assert "fastlora tune" not in str(report)


def test_without_triton_an_h200_s_plans_are_not_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastlora.bench.counting", None)
    report = examine(QWEN)
    assert "not known: " in str(report)
    assert not report.broken


def test_an_unknown_model_is_an_error_for_the_caller():
    with pytest.raises(OSError, match="nowhere"):
        examine("/nowhere/qwen")


def test_a_model_with_other_linears_is_an_error_for_the_caller(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no"):
        examine(str(tmp_path))


# The report


def test_what_is_broken_is_to_be_done_first_and_nothing_twice():
    findings = [
        doctor.Finding("advice", "slow", "tune"),
        doctor.Finding("broken", "a", "install"),
        doctor.Finding("broken", "b", "install"),
        doctor.Finding("ok", "c"),
    ]
    report = doctor.Report({"things": findings})
    assert report.broken
    assert str(report).splitlines() == [
        "things",
        "  advice  slow",
        "  broken  a",
        "  broken  b",
        "  ok      c",
        "what to do",
        "  1. install",
        "  2. tune",
    ]


def test_long_lines_are_wrapped_and_stay_aligned_and_paths_are_whole():
    path = "/some-folder" * 10
    what = "some-word " * 20 + path
    lines = str(doctor.Report({"": [doctor.Finding("ok", what)]})).splitlines()
    assert lines[1].startswith("  ok      some-word some-word")
    assert lines[2].startswith("          some-word")
    assert max(map(len, lines[:-2])) <= 100
    assert lines[-2] == f"          {path}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "300"], "rank must lie in"),
        (["--tokens", "0"], "tokens must be positive"),
        (["--dropout", "1"], r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(arguments, message, capsys):
    assert cli.main(["doctor", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastlora doctor: ")
    assert re.search(message, error)
