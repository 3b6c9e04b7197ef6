"""Every kernel compiles for every target and fits it, and the checker sees what does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import targets
from kernel_calls import Case
from machine_code import GEMM_KERNEL as GEMM
from machine_code import INSTRUCTIONS, TARGETS, Report

SCRIPT = Path(targets.__file__)

# One process compiles for all of them: about 20 s.

# A made-up table of tuned tiles: one that fits sm_90, for two numbers of rows; one of eight stages
# of 48 KiB that does not; and one shape that cuBLAS won.
TILE = {"block_m": 64, "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 3}
TOO_LARGE = {"block_m": 128, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 8}
KEY = {"operation": "low_rank_gemm", "dtype": "bfloat16", "n": 4096, "k": 4096, "r": 16}
ENTRIES = [
    {"key": {**KEY, "m": 8192}, "tile": TILE},
    {"key": {**KEY, "m": 2048}, "tile": TILE},
    {"key": {**KEY, "m": 4096}, "tile": TOO_LARGE},
    {"key": {**KEY, "m": 64}, "tile": None},
]


def compiling_environment(folder: Path) -> dict[str, str]:
    """Return an environment in which Triton compiles, and has not compiled anything before."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "TRITON_CACHE_DIR": str(folder / "cache")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Compile the quick cases and the made-up tables; ``args[-1]`` is the report's path."""
    folder = tmp_path_factory.mktemp("targets")
    for name, capability in (("hopper", 90), ("unlisted", 75)):
        table = {"capability": capability, "entries": ENTRIES}
        (folder / f"{name}.json").write_text(json.dumps(table))
    (folder / "out").mkdir()
    command = [sys.executable, SCRIPT, "--quick", "--jobs", "1", "--tuned", folder]
    command += ["--json", folder / "out/report.json"]
    return subprocess.run(
        command, env=compiling_environment(folder), capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def result(run: subprocess.CompletedProcess[str]) -> dict:
    path = Path(run.args[-1])
    assert path.exists(), run.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def defaults(result: dict) -> list[dict]:
    return [report for report in result["reports"] if not report["case"].startswith("hopper")]


def test_default_tiles_have_no_problem_on_any_target(result, defaults):
    assert [problem for problem in result["problems"] if " hopper " not in problem] == []
    assert {report["target"] for report in defaults} == {t.name for t in TARGETS}
    kernels = {(report["target"], report["kernel"]) for report in defaults}
    for target in TARGETS:
        for kernel in ("_shrink_kernel", GEMM, "_output_pass_kernel", "_add_partials_kernel"):
            assert (target.name, kernel) in kernels
    segmented = ("segmented_shrink", "segmented_expand", "segmented_gemm", "decode_gemm")
    for stem in ("input_pass", *segmented):
        assert ("sm_90", f"_{stem}_kernel") in kernels


def test_a_shrink_beside_a_product_waits_for_it(defaults):
    waits = {
        (report["case"].partition(", ")[2], report["kernel"]): report["instructions"]["waits"]
        for report in defaults
        if report["target"] == "sm_90"
    }
    assert waits["decode_gemm none", "_decode_gemm_kernel"] == 0
    assert waits["decode_gemm none", "_segmented_shrink_kernel"] == 1
    assert waits["segmented_shrink none", "_segmented_shrink_kernel"] == 0
    assert waits["segmented_expand none", "_segmented_expand_kernel"] > 0


@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        ("sm_80", ("mma.sync", "cp.async")),
        ("sm_89", ("mma.sync", "cp.async")),
        ("sm_90", ("wgmma", "TMA load", "TMA store")),
        ("sm_100", ("tcgen05.mma", "TMA load", "TMA store")),
        ("sm_120", ("mma.sync", "TMA load", "TMA store")),
        ("gfx942", ("mfma",)),
    ],
)
def test_fused_gemm_uses_the_units_of_its_target(defaults, target, instructions):
    gemms = [r for r in defaults if r["target"] == target and r["kernel"] == GEMM]
    assert len(gemms) == 2  # forward and backward
    for gemm in gemms:
        for name in instructions:
            assert gemm["instructions"][name] > 0, (gemm["case"], name)


def test_no_kernel_spills_adds_atomically_or_outgrows_its_shared_memory(defaults):
    for report in defaults:
        assert report["instructions"]["atomics"] == 0, report
        assert 0 <= report["shared_bytes"] <= report["shared_limit"], report
        assert 0 < report["registers"] <= (255 if report["target"] != "gfx942" else 512), report
        if report["target"] != "gfx942":
            assert report["local_bytes"] == 0, report


def test_a_signature_is_compiled_once(result):
    # The number of rows is no part of it: m=2048 brings nothing that m=8192 did not.
    rows = [re.search(r"hopper .* m=(\d+)", report["case"]) for report in result["reports"]]
    assert [match[1] for match in rows if match] == ["8192", "4096"]


def test_quick_cases_are_at_most_fifty_compilations(result):
    assert len(result["reports"]) <= 50


def test_tuned_tiles_are_compiled_for_their_own_architecture(result):
    tuned = [r for r in result["reports"] if r["case"].startswith(("hopper", "unlisted"))]
    assert {r["target"] for r in tuned} == {"sm_90"}
    fits, too_large = sorted(tuned, key=lambda report: report["shared_bytes"])
    assert {"BLOCK_M": 64, "BLOCK_N": 128, "num_stages": 3}.items() <= fits["tile"].items()
    assert fits["problems"] == []
    # Eight stages of (128 + 256) x 64 bf16 are 384 KiB.
    assert too_large["shared_bytes"] > 8 * (128 + 256) * 64 * 2 > too_large["shared_limit"]


def test_too_large_tile_is_reported_and_fails_the_run(run, result):
    (problem,) = result["problems"]
    assert re.search(r"sm_90 hopper .* m=4096 .*bytes of shared memory of 232448", problem)
    assert run.returncode == 1
    assert run.stdout.endswith(f"1 problems\n{problem}\n")


def report(**changes) -> Report:
    fields = {
        "target": "sm_90",
        "case": "made up",
        "kernel": GEMM,
        "tile": {"BLOCK_M": 64, "num_warps": 4},
        "registers": 128,
        "local_bytes": 0,
        "shared_bytes": 1024,
        "shared_limit": 2048,
        "instructions": {"wgmma": 4, "TMA load": 2},
        "expected": ("wgmma", "TMA load"),
    }
    return Report(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"local_bytes": 8, "registers": 255}, "8 bytes of local memory a thread"),
        ({"local_bytes": 24}, "24 bytes of local memory a thread"),
        ({"shared_bytes": 2049}, "2049 bytes of shared memory of 2048"),
        ({"tensor_columns": 528}, "528 columns of tensor memory of 512"),
        ({"instructions": {"wgmma": 4, "TMA load": 2, "atomics": 3}}, "3 atomics"),
        ({"instructions": {"wgmma": 4, "TMA load": 0}}, "no TMA load"),
        ({"instructions": {}}, "no wgmma, no TMA load"),
        # The stand-in that Triton compiles lacks all of them: one complaint is enough.
        ({"instructions": {}, "tensor_columns": 528}, "528 columns of tensor memory"),
    ],
)
def test_checker_complains_about(changes, complaint):
    (problem,) = report(**changes).problems()
    assert complaint in problem
    assert problem.startswith(f"sm_90 made up {GEMM} 64 w4: ")


def test_checker_is_content_at_the_limits():
    assert report(shared_bytes=2048, tensor_columns=512).problems() == []
    assert report(local_bytes=8, judge_local=False).problems() == []


LINES = [
    ("wgmma", "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%f1}, %rd1, %rd2"),
    ("tcgen05.mma", "@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2"),
    ("mma.sync", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }"),
    (
        "TMA load",
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1]",
    ),
    ("TMA store", "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}]"),
    ("cp.async", "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2"),
    ("mfma", "v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]"),
    ("atomics", "@%p1 atom.global.gpu.acq_rel.add.f32 %f1, [ %rd1 + 0 ], %f2"),
    ("atomics", "red.global.add.f32 [%rd1], %f1"),
    ("atomics", "global_atomic_add_f32 v0, v1, s[0:1]"),
]


@pytest.mark.parametrize(("name", "line"), LINES, ids=[name for name, _ in LINES])
def test_an_instruction_counts_as_itself_alone(name, line):
    found = [key for key, words in INSTRUCTIONS.items() if re.search(words, line)]
    assert found == [name]


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stop:
        targets.main(["--quick"])
    assert stop.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_unknown_target_is_refused(capsys):
    with pytest.raises(SystemExit):
        targets.main(["--targets", "sm_90,sm_70"])
    assert "sm_70" in capsys.readouterr().err


def test_kernel_that_does_not_compile_is_a_problem(monkeypatch):
    def fail(case, operation, mask):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(targets, "call_launcher", fail)
    monkeypatch.setattr(targets.driver, "set_active", lambda driver: None)
    case = Case("made up", operations=("shrink",), masks=("seed",))
    reports, problems = targets.compile_cases(TARGETS[2], [case])
    assert reports == []
    assert problems == [
        "sm_90 made up, shrink seed: does not compile: RuntimeError('PassManager::run failed')"
    ]


def test_a_spill_that_ptxas_trades_for_occupancy_is_no_problem():
    assert report(local_bytes=16, registers=96).problems() == []
