"""``h = dropout(x) A^T`` and the packed mask, by pytest-benchmark: each plan, and what peft runs.

    .venv/bench/bin/pytest benchmarks/bench_shrink.py --benchmark-columns=median,iqr,rounds

Without a GPU: q_proj of Qwen2.5-0.5B on the CPU, where the only plan is the plain one. With a GPU:
q_proj of Qwen3-8B.
"""

from __future__ import annotations

import pytest
import torch
from shapes import DROPOUT, MODELS, RANK
from torch.nn import functional

import fastlora
from fastlora import dropout, ops, plans, reference

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPE = MODELS["Qwen3-8B" if ON_GPU else "Qwen2.5-0.5B"]["q_proj"]
TOKENS = 8192 if ON_GPU else 512
# An operation without a GEMM has two: hybrid is the same as fused.
PLANS = [plans.PLAIN, plans.FUSED] if ON_GPU else [plans.PLAIN]
DROPOUTS = pytest.mark.parametrize("p", [0.0, DROPOUT], ids=["p0", f"p{DROPOUT}"])


def operands():
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(TOKENS, SHAPE.k, generator=generator, device=DEVICE, dtype=DTYPE)
    a = torch.randn(RANK, SHAPE.k, generator=generator, device=DEVICE) * SHAPE.k**-0.5
    seed = torch.full((), 20251122, dtype=torch.int64, device=DEVICE)
    return x, a.to(DTYPE), seed


def run(plan, p):
    """Return the timed function, which ends when the device has finished."""
    x, a, seed = operands()

    def shrink():
        if plan == "peft":
            result = functional.dropout(x, p) @ a.t()
        else:
            result = ops.shrink(x, [a], seed if p else None, p, p > 0, rank_dtype=DTYPE)
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    return shrink


@DROPOUTS
@pytest.mark.parametrize("plan", ["peft", *PLANS])
def test_shrink(benchmark, p, plan):
    benchmark.group = f"shrink {TOKENS} x {SHAPE.k}, r = {RANK}, p = {p}, {DTYPE}, {DEVICE}"
    benchmark.extra_info["torch"] = torch.__version__
    with fastlora.backend("auto" if plan == "peft" else plan):
        benchmark(run(plan, p))


@DROPOUTS
@pytest.mark.parametrize("plan", PLANS)
def test_providers_compute_the_same(p, plan):
    """Nothing is timed that is wrong: as accurate as the reference, and the same mask."""
    x, a, seed = operands()
    keep = dropout.keep_mask(seed, TOKENS, SHAPE.k, p) if p else None
    with fastlora.backend(plan):
        (h,), bits = run(plan, p)()
    if p:
        assert torch.equal(bits[0], dropout.pack(keep))
    exact = reference.shrink(x.double(), a.double(), keep)
    native = reference.shrink(x, a, keep)
    errors = [((value.double() - exact).norm() / exact.norm()).item() for value in (h, native)]
    assert errors[0] <= 1.2 * errors[1] + torch.finfo(DTYPE).eps
