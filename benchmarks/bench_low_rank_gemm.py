"""The GEMM with its low-rank term, forward and backward, by pytest-benchmark.

    .venv/bench/bin/pytest benchmarks/bench_low_rank_gemm.py --benchmark-only

"frozen" is the GEMM alone, the limit.
"""

from __future__ import annotations

import pytest
from cases import DROPOUTS, providers_of, time_operation


@pytest.mark.parametrize("provider", providers_of("low_rank_gemm"))
def test_low_rank_gemm(benchmark, provider):
    time_operation(benchmark, "low_rank_gemm", provider, 0.0)


@DROPOUTS
@pytest.mark.parametrize("provider", providers_of("input_grad"))
def test_input_grad(benchmark, provider, p):
    time_operation(benchmark, "input_grad", provider, p)
