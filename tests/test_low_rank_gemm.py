"""``low_rank_gemm`` and its backward form ``input_grad``: the operators and their definitions."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate

from fastlora import dropout, ops, reference

GAINS = [1.7, -0.5, 3.0]

# (rows, in features, out features of the first sibling, rank): each with its reason.
CASES = [
    pytest.param((30, 40, 24, 5), id="ordinary"),
    pytest.param((1, 33, 7, 1), id="one-row-odd-sizes-rank-1"),
    pytest.param((0, 40, 24, 5), id="no-rows"),
    pytest.param((200, 64, 64, 64), id="rank-as-large-as-the-layer"),
]
# Out features of the others.
SIBLINGS = [pytest.param([], id="alone"), pytest.param([8, 9], id="siblings")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BIASES = {
    "biases": lambda biases: biases,
    "no-biases": lambda biases: [None] * len(biases),
    "some": lambda biases: [None if g == 0 else bias for g, bias in enumerate(biases)],
}


def make_inputs(case, others, dtype=torch.float32):
    """Return the operator's arguments."""
    m, k, n, r = case
    ns = [n, *others]
    weights = [torch.randn(n, k) * k**-0.5 for n in ns]
    biases, lora_bs = [torch.randn(n) for n in ns], [torch.randn(n, r) for n in ns]
    x, h = torch.randn(m, k), torch.randn(len(ns), m, r)
    weights, biases, lora_bs = ([t.to(dtype) for t in ts] for ts in (weights, biases, lora_bs))
    return x.to(dtype), weights, biases, h.to(dtype), lora_bs, GAINS[: len(ns)]


def doubles(*tensors):
    return (tensor.double() if tensor is not None else None for tensor in tensors)


@pytest.mark.parametrize("others", SIBLINGS)
@pytest.mark.parametrize("biases_of", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_as_accurate_as_its_definition(case, dtype, biases_of, others):
    x, weights, biases, h, lora_bs, gains = make_inputs(case, others, dtype)
    biases = biases_of(biases)
    ys = ops.low_rank_gemm(x, weights, biases, h, lora_bs, gains, dtype=dtype)
    siblings = zip(weights, biases, h, lora_bs, strict=True)
    for y, own, gain in zip(ys, siblings, gains, strict=True):
        native = reference.low_rank_gemm(x, *own, gain)
        exact = reference.low_rank_gemm(*doubles(x, *own), gain)
        assert_as_accurate(y, native, exact)


@pytest.mark.parametrize("others", SIBLINGS)
def test_wide_rank_is_added_before_the_only_rounding(others):
    """fp32 adapters on a bf16 base: the sum is rounded once, as peft rounds it."""
    x, weights, biases, h, lora_bs, gains = make_inputs((30, 40, 24, 5), others)
    x, weights, biases = (
        x.bfloat16(),
        *([tensor.bfloat16() for tensor in tensors] for tensors in (weights, biases)),
    )
    ys = ops.low_rank_gemm(x, weights, biases, h, lora_bs, gains, dtype=torch.bfloat16)
    siblings = zip(weights, biases, h, lora_bs, gains, strict=True)
    for y, (weight, bias, own_h, lora_b, gain) in zip(ys, siblings, strict=True):
        base = torch.nn.functional.linear(x, weight, bias)
        exact = base.double() + gain * own_h.double() @ lora_b.double().t()
        assert torch.equal(y, exact.to(torch.bfloat16))


def make_siblings(case, others, p, dtype=torch.float32):
    """Return the operator's first five arguments with masks as bits, the seed, and the keeps."""
    m, k, n, r = case
    ns = [n, *others]
    seed = torch.tensor(2)
    keeps = [dropout.keep_mask(seed, m, k, p, stream=g) if p else None for g in range(len(ns))]
    dys, weights, lora_as = (
        [torch.randn(size).to(dtype) for size in sizes]
        for sizes in ([(m, n) for n in ns], [(n, k) for n in ns], [(r, k) for _ in ns])
    )
    dh = torch.randn(len(ns), m, r).to(dtype)
    bits = torch.stack([dropout.pack(keep) for keep in keeps]) if p else None
    return [dys, weights, dh, lora_as, bits], seed, keeps


def sum_of_definitions(arguments, keeps, wide=None):
    """Return the sum of each sibling's gradient, cast to ``wide`` before it is added."""
    dys, weights, dh, lora_as, _ = arguments
    terms = [
        reference.input_grad(*each) for each in zip(dys, weights, dh, lora_as, keeps, strict=True)
    ]
    return sum(term if wide is None else term.to(wide) for term in terms)


def in_fp64(arguments):
    dys, weights, dh, lora_as, bits = arguments
    dys, weights, lora_as = ([t.double() for t in ts] for ts in (dys, weights, lora_as))
    return dys, weights, dh.double(), lora_as, bits


@pytest.mark.parametrize("others", SIBLINGS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_backward_is_as_accurate_as_its_definition(case, dtype, p, others):
    arguments, seed, keeps = make_siblings(case, others, p, dtype)
    dx = ops.input_grad(*arguments, p, dtype=dtype, grad_dtype=dtype)
    exact = sum_of_definitions(in_fp64(arguments), keeps)
    assert_as_accurate(dx, sum_of_definitions(arguments, keeps), exact)
    if p:
        from_seed = ops.input_grad(*arguments[:4], seed, p, dtype=dtype, grad_dtype=dtype)
        assert torch.equal(dx, from_seed)


def test_gradient_of_a_wide_input_is_summed_in_its_dtype():
    """Under autocast x may be fp32: what the siblings add to its gradient is not rounded again."""
    arguments, _, keeps = make_siblings((30, 40, 24, 5), [8, 9], 0.3, torch.bfloat16)
    dx = ops.input_grad(*arguments, 0.3, dtype=torch.bfloat16, grad_dtype=torch.float32)
    native = sum_of_definitions(arguments, keeps, torch.float32)
    assert_as_accurate(dx, native, sum_of_definitions(in_fp64(arguments), keeps))
    assert dx.dtype == torch.float32


@pytest.mark.parametrize("others", SIBLINGS)
@pytest.mark.parametrize("case", CASES)
def test_operators_are_well_formed(case, others):
    fp32 = torch.float32
    arguments = make_inputs(case, others)
    for biases_of in BIASES.values():
        x, weights, biases, *rest = arguments
        torch.library.opcheck(
            ops.low_rank_gemm, (x, weights, biases_of(biases), *rest), {"dtype": fp32}
        )
    arguments, seed, _ = make_siblings(case, others, 0.1)
    for mask in (None, seed, arguments[4]):
        torch.library.opcheck(
            ops.input_grad, (*arguments[:4], mask, 0.1), {"dtype": fp32, "grad_dtype": fp32}
        )
