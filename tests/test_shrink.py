"""``shrink``: the operator against its definition."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate

from fastlora import dropout, ops, reference

# (rows, in features, rank, siblings, p): each with its reason.
CASES = [
    pytest.param((7, 40, 5, 1, 0.0), id="no-dropout"),
    pytest.param((7, 40, 5, 1, 0.3), id="dropout"),
    pytest.param((1, 33, 1, 1, 0.3), id="one-row-odd-columns-rank-1"),
    pytest.param((0, 40, 5, 2, 0.3), id="no-rows"),
    pytest.param((7, 40, 5, 3, 0.3), id="siblings"),
    pytest.param((7, 40, 5, 3, 0.0), id="siblings-no-dropout"),
    pytest.param((300, 4096, 16, 2, 0.1), id="several-pieces"),
]


def make_inputs(case, dtype=torch.float32):
    m, k, rank, siblings, p = case
    x, lora_as = torch.randn(m, k), [torch.randn(rank, k) * k**-0.5 for _ in range(siblings)]
    seed = torch.tensor(17) if p else None
    keeps = [dropout.keep_mask(seed, m, k, p, stream=g) if p else None for g in range(siblings)]
    return x.to(dtype), [a.to(dtype) for a in lora_as], seed, keeps, p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_is_as_accurate_as_its_definition(case, dtype):
    x, lora_as, seed, keeps, p = make_inputs(case, dtype)
    h, _ = ops.shrink(x, lora_as, seed, p, False, rank_dtype=dtype)
    for own, a, keep in zip(h, lora_as, keeps, strict=True):
        exact = reference.shrink(x.double(), a.double(), keep)
        assert_as_accurate(own, reference.shrink(x, a, keep), exact)


@pytest.mark.parametrize("case", CASES)
def test_returns_each_sibling_s_mask_as_bits_when_asked(case):
    x, lora_as, seed, keeps, p = make_inputs(case)
    h, bits = ops.shrink(x, lora_as, seed, p, True, rank_dtype=x.dtype)
    without, none = ops.shrink(x, lora_as, seed, p, False, rank_dtype=x.dtype)
    assert torch.equal(h, without)
    assert (none.shape, none.dtype) == ((0,), torch.uint8)
    assert bits.dtype == torch.uint8
    if p == 0:
        assert bits.shape == (0,)
        return
    for packed, keep in zip(bits, keeps, strict=True):
        assert torch.equal(dropout.unpack(packed, x.shape[-1]), keep)


def test_masks_of_siblings_are_independent():
    x, lora_as, seed, _, p = make_inputs((300, 400, 4, 3, 0.5))
    _, bits = ops.shrink(x, lora_as, seed, p, True, rank_dtype=x.dtype)
    one, two, three = (dropout.unpack(packed, 400) for packed in bits)
    for other in (two, three):
        # 120,000 fair coins agree in half of the cases, within 5 standard errors of 0.0014.
        assert abs((one == other).float().mean().item() - 0.5) < 0.0072
    assert not torch.equal(two, three)


def test_casts_to_the_dtype_of_the_rank():
    x, (a,), *_ = make_inputs((7, 40, 5, 1, 0.0))
    (half,), _ = ops.shrink(x, [a], None, 0.0, False, rank_dtype=torch.bfloat16)
    assert torch.equal(half, reference.shrink(x.bfloat16(), a.bfloat16(), None))


@pytest.mark.parametrize("case", CASES[:6])
def test_operator_is_well_formed(case):
    x, lora_as, seed, _, p = make_inputs(case)
    for return_bits in (True, False):
        arguments = (x, lora_as, seed, p, return_bits)
        torch.library.opcheck(ops.shrink, arguments, {"rank_dtype": torch.float32})
