"""``adapter_grads``: the operator against its definition."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate

from fastlora import dropout, ops, reference

GAIN = 1.7

# (rows, in features, out features, rank, p): each with its reason.
CASES = [
    pytest.param((30, 40, 24, 5, 0.0), id="no-dropout"),
    pytest.param((30, 40, 24, 5, 0.3), id="dropout"),
    pytest.param((1, 33, 7, 1, 0.3), id="one-row-odd-sizes-rank-1"),
    pytest.param((0, 40, 24, 5, 0.3), id="no-rows"),
    pytest.param((300, 4096, 24, 16, 0.1), id="several-pieces"),
]


def make_inputs(case, dtype=torch.float32):
    m, k, n, r, p = case
    dy, x, h, b = torch.randn(m, n), torch.randn(m, k), torch.randn(m, r), torch.randn(n, r)
    seed = torch.tensor(23)
    keep = dropout.keep_mask(seed, m, k, p) if p else None
    return *(tensor.to(dtype) for tensor in (dy, x, h, b)), seed if p else None, keep, p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_is_as_accurate_as_its_definition(case, dtype):
    dy, x, h, b, _, keep, p = make_inputs(case, dtype)
    mask = None if keep is None else dropout.pack(keep)
    actual = ops.adapter_grads(dy, x, h, b, mask, GAIN, p, rank_dtype=dtype, grad_dtype=dtype)
    native = reference.adapter_grads(dy, x, h, b, keep, GAIN)
    exact = reference.adapter_grads(*(t.double() for t in (dy, x, h, b)), keep, GAIN)
    for name, *results in zip(("dh", "da", "db"), actual, native, exact, strict=True):
        assert_as_accurate(*results, name=name)


@pytest.mark.parametrize("case", CASES)
def test_seed_and_bits_give_the_same(case):
    dy, x, h, b, seed, keep, p = make_inputs(case)
    if seed is None:
        seed, keep = torch.tensor(1), torch.ones_like(x, dtype=torch.bool)
    options = {"rank_dtype": x.dtype, "grad_dtype": x.dtype}
    from_bits = ops.adapter_grads(dy, x, h, b, dropout.pack(keep), GAIN, p, **options)
    from_seed = ops.adapter_grads(dy, x, h, b, seed, GAIN, p, **options)
    for one, two in zip(from_bits, from_seed, strict=True):
        assert torch.equal(one, two)


def test_leaves_out_what_is_not_asked_for():
    dy, x, h, b, *_ = make_inputs((30, 40, 24, 5, 0.0))
    options = {"rank_dtype": x.dtype, "grad_dtype": x.dtype}
    all_dh, all_da, all_db = ops.adapter_grads(dy, x, h, b, None, GAIN, 0.0, **options)
    dh, da, db = ops.adapter_grads(dy, x, None, b, None, GAIN, 0.0, **options)
    assert torch.equal(dh, all_dh)
    assert torch.equal(da, all_da)
    assert db.numel() == 0
    dh, da, db = ops.adapter_grads(dy, None, h, b, None, GAIN, 0.0, **options)
    assert torch.equal(dh, all_dh)
    assert torch.equal(db, all_db)
    assert da.numel() == 0
    dh, _, db = ops.adapter_grads(dy, None, h, b, None, GAIN, 0.0, need_dh=False, **options)
    assert torch.equal(db, all_db)
    assert dh.numel() == 0


def test_gradients_come_in_the_dtype_of_the_adapter():
    dy, x, h, b, *_ = make_inputs((30, 40, 24, 5, 0.0), torch.bfloat16)
    options = {"rank_dtype": torch.bfloat16, "grad_dtype": torch.float32}
    dh, da, db = ops.adapter_grads(dy, x, h, b.float(), None, GAIN, 0.0, **options)
    assert (dh.dtype, da.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("case", CASES[:4])
def test_operator_is_well_formed(case):
    dy, x, h, b, seed, keep, p = make_inputs(case)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    masks = [None] if keep is None else [seed, dropout.pack(keep)]
    for mask in masks:
        torch.library.opcheck(ops.adapter_grads, (dy, x, h, b, mask, GAIN, p), options)
    torch.library.opcheck(ops.adapter_grads, (dy, None, None, b, None, GAIN, 0.0), options)
