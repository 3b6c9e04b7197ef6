"""Forward and backward of one LoRA linear on the CPU, by pytest-benchmark: peft and fastlora.

    make bench-linear        or, to compare with an earlier run:
    .venv/bench/bin/pytest benchmarks/bench_lora_linear.py --benchmark-autosave --benchmark-compare

The shapes are two linears of Qwen2.5-0.5B. pytest-benchmark runs the cases one after the other, so
read its ratios with the noise of the machine in mind; ``bench_cpu_step.py`` interleaves.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

import fastlora
from fastlora import LoRALinear

TOKENS = 512
SHAPES = {"q_proj": (896, 896), "gate_proj": (896, 4864)}  # in features, out features


def build(provider: str, shape: str, p: float) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(*SHAPES[shape])
    layer = LoRALinear.from_linear(linear, r=16, lora_dropout=p, init_lora_weights=False)
    if provider == "peft":
        fastlora.unpatch(layer)
        assert type(layer) is PeftLinear
    return layer


@pytest.mark.parametrize("provider", ["peft", "fastlora"])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark, shape, p, provider):
    layer = build(provider, shape, p)
    x = torch.randn(TOKENS, SHAPES[shape][0], requires_grad=True)
    dy = torch.randn(TOKENS, SHAPES[shape][1])
    benchmark.group = f"{shape}, {TOKENS} tokens, r = 16, p = {p}"
    benchmark.extra_info["torch"] = torch.__version__
    benchmark(lambda: layer(x).backward(dy))


@pytest.mark.parametrize("shape", SHAPES)
def test_providers_compute_the_same(shape):
    """Nothing is timed that is wrong: the two agree at p = 0."""
    fast, peft = build("fastlora", shape, 0.0), build("peft", shape, 0.0)
    exact = copy.deepcopy(peft).double()
    x = torch.randn(TOKENS, SHAPES[shape][0])
    errors = [(layer(x).double() - exact(x.double())).norm() for layer in (fast, peft)]
    assert errors[0] <= 1.2 * errors[1]
