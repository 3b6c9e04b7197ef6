"""``low_rank_gemm`` and its backward form ``input_grad``: the operators and their definitions."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate

from fastlora import dropout, ops, reference

GAIN = 1.7

# (rows, in features, out features, rank): each with its reason.
CASES = [
    pytest.param((30, 40, 24, 5), id="ordinary"),
    pytest.param((1, 33, 7, 1), id="one-row-odd-sizes-rank-1"),
    pytest.param((0, 40, 24, 5), id="no-rows"),
    pytest.param((200, 64, 64, 64), id="rank-as-large-as-the-layer"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_inputs(case, dtype=torch.float32):
    m, k, n, r = case
    weight = torch.randn(n, k) * k**-0.5
    tensors = (torch.randn(m, k), weight, torch.randn(n), torch.randn(m, r), torch.randn(n, r))
    return tuple(tensor.to(dtype) for tensor in tensors)


def doubles(*tensors):
    return (tensor.double() if tensor is not None else None for tensor in tensors)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_as_accurate_as_its_definition(case, dtype, bias):
    x, weight, b, h, lora_b = make_inputs(case, dtype)
    b = b if bias else None
    y = ops.low_rank_gemm(x, weight, b, h, lora_b, GAIN, dtype=dtype)
    native = reference.low_rank_gemm(x, weight, b, h, lora_b, GAIN)
    exact = reference.low_rank_gemm(*doubles(x, weight, b, h, lora_b), GAIN)
    assert_as_accurate(y, native, exact)


def test_wide_rank_is_added_before_the_only_rounding():
    """fp32 adapters on a bf16 base: the sum is rounded once, as peft rounds it."""
    x, weight, b, h, lora_b = make_inputs((30, 40, 24, 5))
    x, weight, b = x.bfloat16(), weight.bfloat16(), b.bfloat16()
    y = ops.low_rank_gemm(x, weight, b, h, lora_b, GAIN, dtype=torch.bfloat16)
    base = torch.nn.functional.linear(x, weight, b)
    exact = base.double() + GAIN * h.double() @ lora_b.double().t()
    assert torch.equal(y, exact.to(torch.bfloat16))


def make_siblings(case, ns, p, dtype=torch.float32):
    """Return the operator's first five arguments with masks as bits, the seed, and the keeps."""
    m, k, _, r = case
    seed = torch.tensor(2)
    keeps = [dropout.keep_mask(seed, m, k, p, stream=g) if p else None for g in range(len(ns))]
    dys, weights, dhs, lora_as = (
        [torch.randn(size).to(dtype) for size in sizes]
        for sizes in (
            [(m, n) for n in ns],
            [(n, k) for n in ns],
            [(m, r) for _ in ns],
            [(r, k) for _ in ns],
        )
    )
    bits = [dropout.pack(keep) for keep in keeps if keep is not None]
    return [dys, weights, dhs, lora_as, bits], seed, keeps


def sum_of_definitions(arguments, keeps):
    dys, weights, dhs, lora_as, _ = arguments
    return sum(
        reference.input_grad(*each) for each in zip(dys, weights, dhs, lora_as, keeps, strict=True)
    )


SIBLINGS = [pytest.param([24], id="alone"), pytest.param([24, 8, 9], id="siblings")]


@pytest.mark.parametrize("ns", SIBLINGS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_backward_is_as_accurate_as_its_definition(case, dtype, p, ns):
    arguments, seed, keeps = make_siblings(case, ns, p, dtype)
    dx = ops.input_grad(*arguments, p, dtype=dtype, grad_dtype=dtype)
    exact_arguments = [[t.double() for t in tensors] for tensors in arguments]
    exact = sum_of_definitions(exact_arguments, keeps)
    assert_as_accurate(dx, sum_of_definitions(arguments, keeps), exact)
    if p:
        from_seed = ops.input_grad(*arguments[:4], [seed], p, dtype=dtype, grad_dtype=dtype)
        assert torch.equal(dx, from_seed)


def test_gradient_of_a_wide_input_is_summed_in_its_dtype():
    """Under autocast x may be fp32: what the siblings add to its gradient is not rounded again."""
    arguments, _, keeps = make_siblings((30, 40, 24, 5), [24, 8, 9], 0.3, torch.bfloat16)
    dx = ops.input_grad(*arguments, 0.3, dtype=torch.bfloat16, grad_dtype=torch.float32)
    dys, weights, dhs, lora_as, _ = arguments
    native = sum(
        reference.input_grad(*each).float()
        for each in zip(dys, weights, dhs, lora_as, keeps, strict=True)
    )
    exact_arguments = [[t.double() for t in tensors] for tensors in arguments]
    assert_as_accurate(dx, native, sum_of_definitions(exact_arguments, keeps))
    assert dx.dtype == torch.float32


@pytest.mark.parametrize("ns", SIBLINGS)
@pytest.mark.parametrize("case", CASES)
def test_operators_are_well_formed(case, ns):
    x, weight, b, h, lora_b = make_inputs(case)
    torch.library.opcheck(
        ops.low_rank_gemm, (x, weight, b, h, lora_b, GAIN), {"dtype": torch.float32}
    )
    arguments, seed, _ = make_siblings(case, ns, 0.1)
    for masks in ([], [seed], arguments[4]):
        torch.library.opcheck(
            ops.input_grad,
            (*arguments[:4], masks, 0.1),
            {"dtype": torch.float32, "grad_dtype": torch.float32},
        )
