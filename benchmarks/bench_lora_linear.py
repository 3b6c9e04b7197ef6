"""Forward and backward of one LoRA linear, and of a decoder layer's seven, by pytest-benchmark.

    .venv/bench/bin/pytest benchmarks/bench_lora_linear.py --benchmark-only
    .venv/bench/bin/pytest benchmarks --benchmark-only --benchmark-autosave --benchmark-compare

The second line runs every operator too, and compares with the run before. pytest-benchmark runs the
cases one after the other, so read its ratios with the noise of the machine in mind; ``fastlora
bench`` interleaves.
"""

from __future__ import annotations

import pytest
from cases import DROPOUTS, LINEARS, time_module

PROVIDERS = ("frozen", "peft", "peft-bf16", "addmm", "fastlora")


@DROPOUTS
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("linear", ["q_proj", "gate_proj"])
def test_lora_linear(benchmark, linear, provider, p):
    time_module(benchmark, linear, {linear: LINEARS[linear]}, provider, p)


@DROPOUTS
@pytest.mark.parametrize("provider", PROVIDERS)
def test_layer(benchmark, provider, p):
    time_module(benchmark, "layer", LINEARS, provider, p)
