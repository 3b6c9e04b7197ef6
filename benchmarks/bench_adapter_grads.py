"""``dh``, ``dA`` and ``dB`` of one linear, by pytest-benchmark: each plan, and three plain matmuls.

    .venv/bench/bin/pytest benchmarks/bench_adapter_grads.py --benchmark-columns=median,iqr,rounds

Without a GPU: q_proj of Qwen2.5-0.5B on the CPU, where the only plan is the plain one. With a GPU:
q_proj of Qwen3-8B.
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
# An operation without a GEMM has two: hybrid is the same as fused.
PLANS = [plans.PLAIN, plans.FUSED] if ON_GPU else [plans.PLAIN]
GAIN = 2.0
DROPOUTS = pytest.mark.parametrize("p", [0.0, DROPOUT], ids=["p0", f"p{DROPOUT}"])


def draw(*shape):
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE)


def operands(p):
    """Return dy, x, h, B and the mask (``None`` without dropout)."""
    seed = torch.full((), 20251122, dtype=torch.int64, device=DEVICE)
    keep = dropout.keep_mask(seed, TOKENS, SHAPE.k, p) if p else None
    x, dy = draw(TOKENS, SHAPE.k), draw(TOKENS, SHAPE.n)
    return dy, x, draw(TOKENS, RANK), draw(SHAPE.n, RANK), keep


def run(plan, p):
    """Return the timed function, which ends when the device has finished."""
    dy, x, h, b, keep = operands(p)
    mask = None if keep is None else dropout.pack(keep)[None]

    def adapter_grads():
        if plan == "matmuls":
            # What autograd runs for peft, whose dropped-out input was saved.
            dh = dy @ b
            result = dh, dh.t() @ x, dy.t() @ h
        else:
            tensors = [dy], x, h[None], [b], mask, [GAIN]
            grads = ops.adapter_grads(*tensors, p, rank_dtype=DTYPE, grad_dtype=DTYPE)
            result = tuple(of_one for (of_one,) in grads)
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    return adapter_grads


@DROPOUTS
@pytest.mark.parametrize("plan", ["matmuls", *PLANS])
def test_adapter_grads(benchmark, p, plan):
    benchmark.group = (
        f"adapter_grads {TOKENS} rows, {SHAPE}, r = {RANK}, p = {p}, {DTYPE}, {DEVICE}"
    )
    benchmark.extra_info["torch"] = torch.__version__
    with fastlora.backend("auto" if plan == "matmuls" else plan):
        benchmark(run(plan, p))


@DROPOUTS
@pytest.mark.parametrize("plan", PLANS)
def test_providers_compute_the_same(p, plan):
    """Nothing is timed that is wrong: as accurate as the reference in the same dtype."""
    dy, x, h, b, keep = operands(p)
    with fastlora.backend(plan):
        found = run(plan, p)()
    native = reference.adapter_grads(dy, x, h, b, keep, GAIN)
    exact = reference.adapter_grads(*(t.double() for t in (dy, x, h, b)), keep, GAIN)
    for value, near, right in zip(found, native, exact, strict=True):
        errors = [((one.double() - right).norm() / right.norm()).item() for one in (value, near)]
        assert errors[0] <= 1.2 * errors[1] + torch.finfo(DTYPE).eps
