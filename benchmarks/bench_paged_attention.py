"""The attention of a step that generates, by pytest-benchmark: by pages, and as sdpa is given it.

.venv/bench/bin/pytest benchmarks/bench_paged_attention.py --benchmark-only

16 sequences of 128 cached tokens on the CPU (64 of 2,048 on a GPU), heads of Qwen2.5-0.5B (of
Qwen3-8B on a GPU). ``sdpa`` is transformers' way without flash-attn: keys and values of all
sequences gathered from the pages, and a mask of every token times every key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE, DTYPE, ON_GPU, time_step
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastlora.serving.attention import plain_paged_attention

SEQUENCES, CACHED = (64, 2048) if ON_GPU else (16, 128)
HEADS, KEY_HEADS, WIDTH = (32, 8, 128) if ON_GPU else (14, 2, 64)


def make_step() -> dict[str, Callable[[], Tensor]]:
    """Return both ways to attend, for the same sequences in shuffled pages."""
    generator = torch.Generator().manual_seed(0)
    length = CACHED + 1
    places = torch.randperm(SEQUENCES * length, generator=generator).to(DEVICE)

    def draw(rows: int, heads: int) -> Tensor:
        drawn = torch.randn(rows, heads, WIDTH, generator=generator)
        return drawn.to(DEVICE, DTYPE)

    k_pages, v_pages = draw(SEQUENCES * length, KEY_HEADS), draw(SEQUENCES * length, KEY_HEADS)
    q = draw(SEQUENCES, HEADS)
    write = places.view(SEQUENCES, length)[:, -1].contiguous()
    k, v = k_pages[write], v_pages[write]
    starts = torch.arange(SEQUENCES + 1, dtype=torch.int32, device=DEVICE)
    tensors = (q, k, v, k_pages, v_pages, starts, starts * length)
    options: dict[str, Any] = {
        "scaling": WIDTH**-0.5,
        "longest": length,
        "read_index": places,
        "write_index": write,
    }
    owner = torch.arange(SEQUENCES, device=DEVICE)
    mask = owner[:, None] == owner.repeat_interleave(length)[None]

    def sdpa() -> Tensor:
        keys, values = k_pages[places], v_pages[places]
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)

    steps = {"sdpa": sdpa, "plain": lambda: plain_paged_attention(*tensors, **options)}
    if ON_GPU:
        from fastlora.kernels.paged_attention import paged_attention

        steps["fastlora"] = lambda: paged_attention(*tensors, **options)
    return steps


@pytest.mark.parametrize("provider", ["sdpa", "plain", *(["fastlora"] if ON_GPU else [])])
def test_paged_attention(benchmark, provider):
    steps = make_step()
    with torch.no_grad():
        right, got = steps["sdpa"](), steps[provider]()
        assert (got - right).norm() <= 2 * torch.finfo(DTYPE).eps ** 0.5 * right.norm()
    case = f"attention, {SEQUENCES} sequences of {CACHED} tokens"
    time_step(benchmark, case, steps[provider])
