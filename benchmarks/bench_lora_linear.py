"""Forward and backward of one LoRA linear, and of a decoder layer's seven, by pytest-benchmark.

    .venv/bench/bin/pytest benchmarks/bench_lora_linear.py --benchmark-only
    .venv/bench/bin/pytest benchmarks --benchmark-only --benchmark-autosave --benchmark-compare

The second line runs every operator too, and compares with the run before. pytest-benchmark runs the
cases one after the other, so read its ratios with the noise of the machine in mind; ``fastlora
bench`` interleaves.
"""

from __future__ import annotations

import pytest
from cases import LINEARS, time_module, with_dropouts

PROVIDERS = with_dropouts(("frozen", "peft", "peft-bf16", "addmm", "fastlora"))


@PROVIDERS
@pytest.mark.parametrize("linear", ["q_proj", "gate_proj"])
def test_lora_linear(benchmark, linear, provider, p):
    time_module(benchmark, linear, {linear: LINEARS[linear]}, provider, p)


@PROVIDERS
def test_layer(benchmark, provider, p):
    time_module(benchmark, "layer", LINEARS, provider, p)
