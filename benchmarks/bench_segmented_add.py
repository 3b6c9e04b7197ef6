"""One linear of a batch whose rows have adapters of their own, by pytest-benchmark.

.venv/bench/bin/pytest benchmarks/bench_segmented_add.py --benchmark-only

q_proj of Qwen2.5-0.5B on the CPU (of Qwen3-8B on a GPU), 16 rows, rank 16, 1 or 16 distinct
adapters: the bare linear, peft's ``adapter_names=``, and the same on a patched layer.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import DEVICE, DTYPE, LINEARS, time_step
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from fastlora.layers import LoRALinear

ROWS, RANK = 16, 16


def make_layer(distinct: int) -> tuple[PeftLinear, Tensor, list[str]]:
    """Return q_proj with that many adapters, an input, and the adapter of each row."""
    shape, generator = LINEARS["q_proj"], torch.manual_seed(0)
    base = nn.Linear(shape.k, shape.n, bias=False)
    config = LoraConfig(r=RANK, init_lora_weights=False)
    layer = PeftLinear(base, "a0", config=config, r=RANK, lora_alpha=RANK)
    for i in range(1, distinct):
        layer.update_layer(f"a{i}", r=RANK, lora_alpha=RANK, config=config)
    x = torch.randn(ROWS, shape.k, generator=generator)
    return (
        layer.to(DEVICE, DTYPE).eval(),
        x.to(DEVICE, DTYPE),
        [f"a{i % distinct}" for i in range(ROWS)],
    )


@pytest.mark.parametrize("distinct", [1, 16])
@pytest.mark.parametrize("provider", ["frozen", "peft", "fastlora"])
def test_segmented_add(benchmark, provider, distinct):
    layer, x, names = make_layer(distinct)
    ours = copy.deepcopy(layer)
    ours.__class__ = LoRALinear
    with torch.no_grad():
        right = layer(x, adapter_names=names)
        factor = 2 * torch.finfo(DTYPE).eps ** 0.5
        assert (ours(x, adapter_names=names) - right).norm() <= factor * right.norm()
    steps = {
        "frozen": lambda: layer.base_layer(x),
        "peft": lambda: layer(x, adapter_names=names),
        "fastlora": lambda: ours(x, adapter_names=names),
    }

    def step() -> None:
        with torch.no_grad():
            steps[provider]()

    time_step(benchmark, f"q_proj, {ROWS} rows, {distinct} adapters", step)
