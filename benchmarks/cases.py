"""What the ``bench_<stem>.py`` have in common: their sizes, and the gate before anything is timed.

Without a GPU: Qwen2.5-0.5B on the CPU, fp32, one thread. With a GPU: Qwen3-8B in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from fastlora.bench import modules, operations, providers
from fastlora.bench.environment import facts
from fastlora.bench.measuring import synchronize
from fastlora.bench.shapes import DROPOUT, MODELS, RANK, Linear

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
MODEL = "Qwen3-8B" if ON_GPU else "Qwen2.5-0.5B"
LINEARS = MODELS[MODEL].linears
TOKENS = 8192 if ON_GPU else 256
DROPOUTS = pytest.mark.parametrize("p", [0.0, DROPOUT], ids=["p0", f"p{DROPOUT}"])


def with_dropouts(names: Sequence[str]) -> Any:
    """Return a mark for every provider with every dropout that it has."""
    chosen = [
        pytest.param(name, p, id=f"{name}-p{p:g}")
        for p in (0.0, DROPOUT)
        for name in names
        if providers.find(name).has_dropout or not p
    ]
    return pytest.mark.parametrize(("provider", "p"), chosen)


def providers_of(operation: str) -> list[str]:
    """Return who computes an operator."""
    tiny = operations.build(operation, Linear(16, 16), 16, 16, 0.0, DEVICE, DTYPE)
    return list(tiny.runs)


def time_operation(benchmark: Any, operation: str, provider: str, p: float) -> None:
    """Check one operator of q_proj, then time it."""
    built = operations.build(operation, LINEARS["q_proj"], TOKENS, RANK, p, DEVICE, DTYPE)
    built.check(provider)
    _time(benchmark, f"{operation} of q_proj", p, built.runs[provider])


def time_module(
    benchmark: Any, case: str, linears: Mapping[str, Linear], provider: str, p: float
) -> None:
    """Check a linear or the linears of a layer, then time forward and backward."""
    built = modules.Case(linears, TOKENS, RANK, p, DEVICE, DTYPE)
    _time(benchmark, case, p, built.checked_step(providers.find(provider))[0])


def _time(benchmark: Any, case: str, p: float, step: Callable[[], object]) -> None:
    time_step(benchmark, f"{case}, {TOKENS} tokens, rank {RANK}, p = {p}", step)


def time_step(benchmark: Any, case: str, step: Callable[[], object]) -> None:
    """Time something that was checked, on one thread."""

    def finished() -> None:
        step()
        synchronize(DEVICE)

    benchmark.group = f"{MODEL} {case}, {DTYPE}"
    benchmark.extra_info.update(facts(DEVICE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a CPU, so that two runs can be compared
    try:
        benchmark(finished)
    finally:
        torch.set_num_threads(threads)
