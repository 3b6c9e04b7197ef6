"""``h = dropout(x) A^T`` of one linear, by pytest-benchmark: PyTorch, and each plan of fastlora.

.venv/bench/bin/pytest benchmarks/bench_shrink.py --benchmark-only
"""

from __future__ import annotations

import pytest
from cases import DROPOUTS, providers_of, time_operation


@DROPOUTS
@pytest.mark.parametrize("provider", providers_of("shrink"))
def test_shrink(benchmark, provider, p):
    time_operation(benchmark, "shrink", provider, p)
