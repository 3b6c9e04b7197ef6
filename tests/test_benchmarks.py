"""The benchmarks still run, and the memory that they promise is kept."""

from __future__ import annotations

import bench_cpu_step
import bench_decode
import bench_host
import bench_quickstart
import bench_saved_memory
import pytest
import torch
from tiny_models import tiny_peft, token_ids

from fastlora.bench import results
from fastlora.bench.measuring import Timing


@pytest.mark.parametrize("case", bench_saved_memory.CASES, ids=lambda case: case.name)
def test_saved_bytes_stay_within_the_promised_limits(case):
    rows = bench_saved_memory.count(case, tokens=64)
    assert rows["fastlora, recompute"] < rows["fastlora"] < rows["peft, bf16 adapters"]
    for limit, ours, theirs in (
        (case.limit_default, "fastlora", "peft"),
        (case.limit_bf16, "fastlora, bf16 adapters", "peft, bf16 adapters"),
    ):
        if limit is not None:
            assert rows[ours] <= limit * rows[theirs]


def test_cpu_step_times_both_providers_on_the_same_model(spy):
    rounds = 2
    peft, fast = bench_cpu_step.compare(tiny_peft(lora_dropout=0.1).train(), token_ids(), rounds)
    assert len(peft) == len(fast) == rounds
    assert min(peft + fast) > 0
    assert (spy.fused, spy.peft) == (14 * (rounds + 1), 0)


def test_decode_benchmark_checks_and_times_everyone(monkeypatch, tmp_path, capsys):
    arguments = ["--rounds", "5", "--turns", "1", "--distinct", "3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench_decode.py", *arguments])
    bench_decode.main()
    rows = results.read(tmp_path / "decode.csv")
    assert [row.provider for row in rows] == ["frozen", "peft", "fastlora", "fastlora-engine"]
    assert all(row.to_frozen is not None and row.case == "3 adapters" for row in rows)
    assert "3 adapters: peft " in capsys.readouterr().out


def test_decode_benchmark_refuses_wrong_results():
    right = torch.ones(2, 3)
    steps = {
        "frozen": lambda: right - 1,
        "peft": lambda: right,
        "fastlora": lambda: right,
        "fastlora-engine": lambda: 1.01 * right,
    }
    with pytest.raises(AssertionError, match="not close"):
        bench_decode.check(steps)
    with pytest.raises(AssertionError, match="change nothing"):
        bench_decode.check({**steps, "frozen": lambda: right})


@pytest.mark.parametrize("dtype", bench_host.SETTINGS.values(), ids=str)
def test_host_benchmark_calls_fastlora_fused_and_in_groups(spy, dtype):
    with bench_host.null_launches():
        calls = bench_host.build_layers(dtype)
        for number, (_, both) in enumerate(calls.values(), start=1):
            both()
            both()
            # Twice each: the first two providers are nn.Linear and peft, then every other one ours.
            ours = number // 3 + number // 5
            assert (spy.fused, spy.together, spy.peft) == (14 * ours, 10 * ours, 0)


@pytest.mark.parametrize(
    ("ours", "peft", "verdict"),
    [
        pytest.param(3.5, 8.75, "kept / kept", id="both-to-the-limit"),
        pytest.param(3.6, 20.0, "EXCEEDED / kept", id="bare"),
        pytest.param(3.0, 7.0, "kept / EXCEEDED", id="peft"),
    ],
)
def test_host_benchmark_compares_with_the_bare_linears_and_with_peft_of_the_same_dropout(
    monkeypatch, capsys, ours, peft, verdict
):
    us = {"peft": peft, "peft, p = 0.1": 80.0, "fastlora": ours, "fastlora, p = 0.1": 3.0}

    def measure(functions, rounds, calls):
        return {(name, i): Timing(((7 * us.get(name, 1.0),),)) for name, i in functions}

    monkeypatch.setattr(bench_host, "measure", measure)
    bench_host.compare_layers("fp32, without autocast", 1, 1)
    lines = capsys.readouterr().out.splitlines()
    ends = ("kept", "EXCEEDED")
    verdicts = {
        line[:20].strip(): " ".join(line.split()[-3:]) for line in lines if line.endswith(ends)
    }
    assert verdicts["fastlora"] == verdict
    assert verdicts["fastlora, p = 0.1"] == "kept / kept"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A quickstart that says what ``fastlora.patch`` is, and fails if it is asked to."""
    (tmp_path / "quickstart.py").write_text(
        "import sys, fastlora\n"
        "def main():\n"
        "    print('patch is from', fastlora.patch.__module__)\n"
        "    sys.exit('fail' in sys.argv)\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    monkeypatch.setattr(bench_quickstart, "EXAMPLES", tmp_path)


@pytest.mark.parametrize(
    ("provider", "module"), [("fastlora", "fastlora.patching"), ("peft", "__main__")]
)
def test_the_quickstart_is_timed_with_the_patch_and_without_it(script, provider, module):
    with pytest.raises(RuntimeError, match=f"(?s){provider}: the script failed.*{module}"):
        bench_quickstart.seconds_of(provider, ["fail"])


def test_the_quickstart_s_time_is_that_of_its_process(script):
    assert 0 < bench_quickstart.seconds_of("peft", []) < 60


def test_the_quickstart_takes_turns_and_its_ratio_is_of_the_same_round(monkeypatch, capsys):
    order = []

    def seconds_of(provider, arguments):
        order.append(provider)
        drift = 2 ** ((len(order) - 1) // 2)
        return drift * {"fastlora": 2.0, "peft": 3.0}[provider]

    monkeypatch.setattr(bench_quickstart, "seconds_of", seconds_of)
    rows = {row.provider: row for row in bench_quickstart.rows_of(bench_quickstart.compare(5, []))}
    assert order[:4] == ["fastlora", "peft", "peft", "fastlora"]
    peft = rows["peft"].to_fastlora
    assert (peft.value, peft.low, peft.high) == (1.5, 1.5, 1.5)
    assert rows["fastlora"].median_us == 8e6
