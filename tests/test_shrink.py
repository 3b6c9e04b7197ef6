"""``shrink``: the operator against its definition."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate

from fastlora import dropout, ops, reference

# (rows, in features, rank, p): each with its reason.
CASES = [
    pytest.param((7, 40, 5, 0.0), id="no-dropout"),
    pytest.param((7, 40, 5, 0.3), id="dropout"),
    pytest.param((1, 33, 1, 0.3), id="one-row-odd-columns-rank-1"),
    pytest.param((0, 40, 5, 0.3), id="no-rows"),
    pytest.param((300, 4096, 16, 0.1), id="several-pieces"),
]


def make_inputs(case, dtype=torch.float32):
    m, k, r, p = case
    x, a = torch.randn(m, k), torch.randn(r, k) * k**-0.5
    seed = torch.tensor(17) if p else None
    keep = dropout.keep_mask(seed, m, k, p) if p else None
    return x.to(dtype), a.to(dtype), seed, keep, p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_is_as_accurate_as_its_definition(case, dtype):
    x, a, seed, keep, p = make_inputs(case, dtype)
    h, _ = ops.shrink(x, a, seed, p, False, rank_dtype=dtype)
    exact = reference.shrink(x.double(), a.double(), keep)
    assert_as_accurate(h, reference.shrink(x, a, keep), exact)


@pytest.mark.parametrize("case", CASES)
def test_returns_the_mask_as_bits_when_asked(case):
    x, a, seed, keep, p = make_inputs(case)
    h, bits = ops.shrink(x, a, seed, p, seed is not None, rank_dtype=x.dtype)
    without, none = ops.shrink(x, a, seed, p, False, rank_dtype=x.dtype)
    assert torch.equal(h, without)
    assert none.numel() == 0
    if seed is not None:
        assert torch.equal(dropout.unpack(bits, x.shape[-1]), keep)


def test_casts_to_the_dtype_of_the_rank():
    x, a, *_ = make_inputs((7, 40, 5, 0.0))
    half, _ = ops.shrink(x, a, None, 0.0, False, rank_dtype=torch.bfloat16)
    assert torch.equal(half, reference.shrink(x.bfloat16(), a.bfloat16(), None))


@pytest.mark.parametrize("case", CASES[:4])
def test_operator_is_well_formed(case):
    x, a, seed, _, p = make_inputs(case)
    torch.library.opcheck(ops.shrink, (x, a, seed, p, p > 0), {"rank_dtype": torch.float32})


def test_keeps_the_leading_dimensions():
    x, a = torch.randn(2, 3, 40), torch.randn(5, 40)
    h, bits = ops.shrink(x, a, torch.tensor(1), 0.5, True, rank_dtype=x.dtype)
    assert h.shape == (2, 3, 5)
    assert bits.shape == (2, 3, 5)
    flat, _ = ops.shrink(x.view(6, 40), a, torch.tensor(1), 0.5, True, rank_dtype=x.dtype)
    assert torch.equal(h.view(6, 5), flat)
