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


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_backward_is_as_accurate_as_its_definition(case, dtype, p):
    x, weight, _, dh, _ = make_inputs(case, dtype)
    m, k = x.shape
    dy, a = torch.randn(m, weight.shape[0]).to(dtype), torch.randn(dh.shape[1], k).to(dtype)
    keep = dropout.keep_mask(torch.tensor(2), m, k, p) if p else None
    mask = dropout.pack(keep) if p else None
    dx = ops.input_grad(dy, weight, dh, a, mask, p, dtype=dtype, grad_dtype=dtype)
    native = reference.input_grad(dy, weight, dh, a, keep)
    assert_as_accurate(dx, native, reference.input_grad(*doubles(dy, weight, dh, a), keep))


@pytest.mark.parametrize("case", CASES)
def test_operators_are_well_formed(case):
    x, weight, b, h, lora_b = make_inputs(case)
    torch.library.opcheck(
        ops.low_rank_gemm, (x, weight, b, h, lora_b, GAIN), {"dtype": torch.float32}
    )
    dy, a = torch.randn(x.shape[0], weight.shape[0]), torch.randn(h.shape[1], x.shape[1])
    for mask in (
        None,
        torch.tensor(3),
        dropout.pack(dropout.keep_mask(torch.tensor(3), *x.shape, 0.1)),
    ):
        torch.library.opcheck(
            ops.input_grad,
            (dy, weight, h, a, mask, 0.1),
            {"dtype": torch.float32, "grad_dtype": torch.float32},
        )
