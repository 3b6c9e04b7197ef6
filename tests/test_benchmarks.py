"""The benchmarks still run, and the memory that they promise is kept."""

from __future__ import annotations

import bench_cpu_step
import bench_saved_memory
import pytest
from tiny_models import tiny_peft, token_ids


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
