"""``adapter_grads``: the operator against its definition."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate

from fastlora import dropout, ops, reference

GAINS = [1.7, -0.5, 3.0]
NAMES = ("dh", "da", "db")

# (rows, in features, out features of the siblings, rank, p): each with its reason.
CASES = [
    pytest.param((30, 40, [24], 5, 0.0), id="no-dropout"),
    pytest.param((30, 40, [24], 5, 0.3), id="dropout"),
    pytest.param((1, 33, [7], 1, 0.3), id="one-row-odd-sizes-rank-1"),
    pytest.param((0, 40, [24, 8], 5, 0.3), id="no-rows"),
    pytest.param((30, 40, [24, 8, 8], 5, 0.3), id="siblings"),
    pytest.param((30, 40, [24, 8, 8], 5, 0.0), id="siblings-no-dropout"),
    pytest.param((300, 4096, [24, 24], 16, 0.1), id="several-pieces"),
]


def make_inputs(case, dtype=torch.float32):
    """Return the operator's first six arguments with masks as bits, the seed, the keeps, and p."""
    m, k, ns, r, p = case
    seed = torch.tensor(23)
    keeps = [dropout.keep_mask(seed, m, k, p, stream=g) if p else None for g in range(len(ns))]
    dys, bs = (
        [torch.randn(size).to(dtype) for size in sizes]
        for sizes in ([(m, n) for n in ns], [(n, r) for n in ns])
    )
    x, h = torch.randn(m, k).to(dtype), torch.randn(len(ns), m, r).to(dtype)
    bits = torch.stack([dropout.pack(keep) for keep in keeps]) if p else None
    return [dys, x, h, bs, bits, GAINS[: len(ns)]], seed, keeps, p


def with_mask(arguments, mask):
    return [*arguments[:4], mask, arguments[5]]


def assert_equal(actual, expected):
    (dh, *grads), (expected_dh, *expected_grads) = actual, expected
    assert torch.equal(dh, expected_dh)
    for one, two in zip(grads, expected_grads, strict=True):
        assert len(one) == len(two)
        assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_is_as_accurate_as_its_definition(case, dtype):
    arguments, _, keeps, p = make_inputs(case, dtype)
    actual = ops.adapter_grads(*arguments, p, rank_dtype=dtype, grad_dtype=dtype)
    dys, x, h, bs, _, gains = arguments
    for g, (dy, own_h, b, keep, gain) in enumerate(zip(dys, h, bs, keeps, gains, strict=True)):
        native = reference.adapter_grads(dy, x, own_h, b, keep, gain)
        exact = reference.adapter_grads(*(t.double() for t in (dy, x, own_h, b)), keep, gain)
        ours = [results[g] for results in actual]
        for name, *results in zip(NAMES, ours, native, exact, strict=True):
            assert_as_accurate(*results, name=f"{name} of sibling {g}")


@pytest.mark.parametrize("case", CASES)
def test_seed_and_bits_give_the_same(case):
    arguments, seed, _, p = make_inputs(case)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    from_bits = ops.adapter_grads(*arguments, p, **options)
    from_seed = ops.adapter_grads(*with_mask(arguments, seed if p else None), p, **options)
    assert_equal(from_bits, from_seed)


@pytest.mark.parametrize("case", [CASES[0], CASES[5]])
def test_leaves_out_what_is_not_asked_for(case):
    (dys, x, h, bs, mask, gains), *_ = make_inputs(case)
    options = {"rank_dtype": x.dtype, "grad_dtype": x.dtype}

    def run(x, h, **more):
        return ops.adapter_grads(dys, x, h, bs, mask, gains, 0.0, **options, **more)

    dh, das, dbs = run(x, h)
    assert_equal(run(x, None), (dh, das, []))
    assert_equal(run(None, h), (dh, [], dbs))
    assert_equal(run(None, h, need_dh=False), (dh[:, :0], [], dbs))
    assert_equal(run(None, None, need_dh=False), (dh[:, :0], [], []))


def test_gradients_come_in_the_dtype_of_the_adapter():
    arguments, *_ = make_inputs((30, 40, [24], 5, 0.0), torch.bfloat16)
    arguments[3] = [b.float() for b in arguments[3]]
    options = {"rank_dtype": torch.bfloat16, "grad_dtype": torch.float32}
    dh, (da,), (db,) = ops.adapter_grads(*arguments, 0.0, **options)
    assert (dh.dtype, da.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("case", CASES[:6])
def test_operator_is_well_formed(case):
    arguments, seed, _, p = make_inputs(case)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    for mask in (arguments[4], seed) if p else (None,):
        torch.library.opcheck(ops.adapter_grads, (*with_mask(arguments, mask), p), options)
    dys, _, h, bs, _, gains = arguments
    torch.library.opcheck(ops.adapter_grads, (dys, None, None, bs, None, gains, 0.0), options)
    no_dh = {**options, "need_dh": False}
    torch.library.opcheck(ops.adapter_grads, (dys, None, h, bs, None, gains, 0.0), no_dh)
