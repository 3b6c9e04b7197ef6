"""``dh``, ``dA`` and ``dB`` of one linear, by pytest-benchmark: three matmuls, and each plan.

.venv/bench/bin/pytest benchmarks/bench_adapter_grads.py --benchmark-only
"""

from __future__ import annotations

import pytest
from cases import DROPOUTS, providers_of, time_operation


@DROPOUTS
@pytest.mark.parametrize("provider", providers_of("adapter_grads"))
def test_adapter_grads(benchmark, provider, p):
    time_operation(benchmark, "adapter_grads", provider, p)
