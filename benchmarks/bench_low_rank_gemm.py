"""The GEMM with its low-rank term, forward and backward, by pytest-benchmark: each plan.

    .venv/bench/bin/pytest benchmarks/bench_low_rank_gemm.py --benchmark-columns=median,iqr,rounds

"frozen" is the GEMM alone, the floor. Without a GPU: q_proj of Qwen2.5-0.5B on the CPU, where the
only plan is the plain one. With a GPU: q_proj of Qwen3-8B.
"""

from __future__ import annotations

import pytest
import torch
from shapes import DROPOUT, MODELS, RANK

import fastlora
from fastlora import dropout, ops, plans, reference

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPE = MODELS["Qwen3-8B" if ON_GPU else "Qwen2.5-0.5B"]["q_proj"]
TOKENS = 8192 if ON_GPU else 512
PLANS = list(plans.PLANS) if ON_GPU else [plans.PLAIN]
GAIN = 2.0
DROPOUTS = pytest.mark.parametrize("p", [0.0, DROPOUT], ids=["p0", f"p{DROPOUT}"])


def draw(*shape, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(DTYPE)


def operands():
    """Return x, W, bias, h, B for the forward and dy, dh, A, the mask for the backward."""
    n, k = SHAPE.n, SHAPE.k
    forward = (
        draw(TOKENS, k),
        draw(n, k, scale=k**-0.5),
        draw(n) if SHAPE.has_bias else None,
        draw(TOKENS, RANK),
        draw(n, RANK),
    )
    seed = torch.full((), 20251122, dtype=torch.int64, device=DEVICE)
    keep = dropout.keep_mask(seed, TOKENS, k, DROPOUT)
    return forward, draw(TOKENS, n), draw(TOKENS, RANK), draw(RANK, k, scale=k**-0.5), keep


def finished(function):
    """Let a timed function end when the device has finished."""

    def run():
        result = function()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    return run


def forward_of(plan):
    (x, weight, bias, h, b), *_ = operands()
    if plan == "frozen":
        return finished(lambda: torch.nn.functional.linear(x, weight, bias))
    tensors = x, [weight], [bias], h[None], [b]
    return finished(lambda: ops.low_rank_gemm(*tensors, [GAIN], dtype=DTYPE)[0])


def backward_of(plan, p):
    (_, weight, *_), dy, dh, a, keep = operands()
    if plan == "frozen":
        return finished(lambda: dy @ weight)
    tensors = [dy], [weight], dh[None], [a], dropout.pack(keep)[None] if p else None
    return finished(lambda: ops.input_grad(*tensors, p, dtype=DTYPE, grad_dtype=DTYPE))


def describe(benchmark, operation):
    benchmark.group = f"{operation}: {TOKENS} rows, {SHAPE}, r = {RANK}, {DTYPE}, {DEVICE}"
    benchmark.extra_info["torch"] = torch.__version__


@pytest.mark.parametrize("plan", ["frozen", *PLANS])
def test_forward(benchmark, plan):
    describe(benchmark, "y")
    with fastlora.backend("auto" if plan == "frozen" else plan):
        benchmark(forward_of(plan))


@DROPOUTS
@pytest.mark.parametrize("plan", ["frozen", *PLANS])
def test_input_grad(benchmark, p, plan):
    describe(benchmark, f"dx, p = {p}")
    with fastlora.backend("auto" if plan == "frozen" else plan):
        benchmark(backward_of(plan, p))


def assert_as_accurate(value, native, exact):
    errors = [((one.double() - exact).norm() / exact.norm()).item() for one in (value, native)]
    assert errors[0] <= 1.2 * errors[1] + torch.finfo(DTYPE).eps


@DROPOUTS
@pytest.mark.parametrize("plan", PLANS)
def test_providers_compute_the_same(p, plan):
    """Nothing is timed that is wrong: as accurate as the reference in the same dtype."""
    (x, weight, bias, h, b), dy, dh, a, keep = operands()
    kept = keep if p else None
    with fastlora.backend(plan):
        y, dx = forward_of(plan)(), backward_of(plan, p)()
    doubles = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, h, b)]
    assert_as_accurate(
        y,
        reference.low_rank_gemm(x, weight, bias, h, b, GAIN),
        reference.low_rank_gemm(*doubles, GAIN),
    )
    assert_as_accurate(
        dx,
        reference.input_grad(dy, weight, dh, a, kept),
        reference.input_grad(dy.double(), weight.double(), dh.double(), a.double(), kept),
    )
