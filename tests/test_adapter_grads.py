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
    dys, hs, bs = (
        [torch.randn(size).to(dtype) for size in sizes]
        for sizes in ([(m, n) for n in ns], [(m, r) for _ in ns], [(n, r) for n in ns])
    )
    bits = [dropout.pack(keep) for keep in keeps if keep is not None]
    arguments = [dys, torch.randn(m, k).to(dtype), hs, bs, bits, GAINS[: len(ns)]]
    return arguments, seed, keeps, p


def with_masks(arguments, masks):
    return [*arguments[:4], masks, arguments[5]]


def assert_equal(actual, expected):
    for one, two in zip(actual, expected, strict=True):
        assert len(one) == len(two)
        assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_is_as_accurate_as_its_definition(case, dtype):
    arguments, _, keeps, p = make_inputs(case, dtype)
    actual = ops.adapter_grads(*arguments, p, rank_dtype=dtype, grad_dtype=dtype)
    dys, x, hs, bs, _, gains = arguments
    for g, (dy, h, b, keep, gain) in enumerate(zip(dys, hs, bs, keeps, gains, strict=True)):
        native = reference.adapter_grads(dy, x, h, b, keep, gain)
        exact = reference.adapter_grads(*(t.double() for t in (dy, x, h, b)), keep, gain)
        ours = [results[g] for results in actual]
        for name, *results in zip(NAMES, ours, native, exact, strict=True):
            assert_as_accurate(*results, name=f"{name} of sibling {g}")


@pytest.mark.parametrize("case", CASES)
def test_seed_and_bits_give_the_same(case):
    arguments, seed, _, p = make_inputs(case)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    from_bits = ops.adapter_grads(*arguments, p, **options)
    masks = [seed] if p else []
    assert_equal(from_bits, ops.adapter_grads(*with_masks(arguments, masks), p, **options))


@pytest.mark.parametrize("case", [CASES[0], CASES[5]])
def test_leaves_out_what_is_not_asked_for(case):
    (dys, x, hs, bs, masks, gains), *_ = make_inputs(case)
    options = {"rank_dtype": x.dtype, "grad_dtype": x.dtype}

    def run(x, hs, **more):
        return ops.adapter_grads(dys, x, hs, bs, masks, gains, 0.0, **options, **more)

    dhs, das, dbs = run(x, hs)
    assert_equal(run(x, []), (dhs, das, []))
    assert_equal(run(None, hs), (dhs, [], dbs))
    assert_equal(run(None, hs, need_dh=False), ([], [], dbs))


def test_gradients_come_in_the_dtype_of_the_adapter():
    arguments, *_ = make_inputs((30, 40, [24], 5, 0.0), torch.bfloat16)
    arguments[3] = [b.float() for b in arguments[3]]
    options = {"rank_dtype": torch.bfloat16, "grad_dtype": torch.float32}
    (dh,), (da,), (db,) = ops.adapter_grads(*arguments, 0.0, **options)
    assert (dh.dtype, da.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("case", CASES[:6])
def test_operator_is_well_formed(case):
    arguments, seed, _, p = make_inputs(case)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    for masks in (arguments[4], [seed]) if p else ([],):
        torch.library.opcheck(ops.adapter_grads, (*with_masks(arguments, masks), p), options)
    dys, _, _, bs, _, gains = arguments
    torch.library.opcheck(ops.adapter_grads, (dys, None, [], bs, [], gains, 0.0), options)
