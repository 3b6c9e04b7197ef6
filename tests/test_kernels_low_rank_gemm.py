"""The ``low_rank_gemm`` kernel, forward and backward form, against its definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    HALVES,
    LAYOUTS,
    MASKS,
    SMALL,
    P,
    assert_kernel_as_accurate,
    doubles,
    draw_masks,
    every_second,
    padded_rows,
    randn,
    transposed,
)

from fastlora import dropout, reference
from fastlora.kernels import low_rank_gemm as module
from fastlora.kernels.low_rank_gemm import input_grad, low_rank_gemm, low_rank_term
from fastlora.kernels.tile_config import device_limits, forget_tiles, has_descriptors

GAIN = 1.7
THRESHOLD = dropout.threshold(P)
# Nine tiles of a 33 x 72 result are walked by the interpreter's four programs, in groups of which
# the last one is not full.
TILE = replace(SMALL, group_m=2)

# (rows, in features, out features, rank): each with its reason.
CASES = [
    pytest.param((1, 40, 72, 8), id="one-row"),
    pytest.param((33, 72, 72, 8), id="ragged-tiles"),
    pytest.param((0, 40, 24, 8), id="no-rows"),
    pytest.param((20, 33, 7, 1), id="odd-sizes-rank-1"),
    pytest.param((20, 40, 23, 5), id="odd-out-features-rank-5"),
    pytest.param((20, 23, 40, 5), id="odd-in-features-rank-5"),
    pytest.param((17, 24, 24, 16), id="rank-16"),
    pytest.param((17, 24, 24, 64), id="rank-64"),
    pytest.param((17, 24, 24, 72), id="rank-in-two-ragged-chunks"),
    pytest.param((17, 24, 24, 128), id="rank-128"),
    pytest.param((17, 24, 24, 256), id="rank-256-larger-than-the-layer"),
]
PARTS = [
    pytest.param(TILE, id="one-part"),
    pytest.param(replace(TILE, parts=2), id="two-parts"),
    pytest.param(replace(TILE, block_n=64, parts=4), id="four-parts"),
]


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def descriptors(request, monkeypatch) -> Iterator[bool]:
    """Whether operands whose layout allows it are read through tensor descriptors."""
    if not request.param:
        monkeypatch.setattr(module, "has_descriptors", lambda limits: False)
    elif not has_descriptors(device_limits(DEVICE)):
        pytest.skip("this GPU has no tensor memory accelerator")
    forget_tiles()  # what a launch is made of is remembered
    yield request.param
    forget_tiles()


@pytest.fixture
def described(descriptors, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the tensors that descriptors were made of."""
    shapes = []
    make = module._descriptor

    def counted(tensor, shape, *args):
        shapes.append(tuple(shape))
        return make(tensor, shape, *args)

    monkeypatch.setattr(module, "_descriptor", counted)
    return shapes


def two_bytes_further(tensor):
    """Return the same half-precision matrix, its rows whole 16 bytes apart, begun at byte 2."""
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 8), float("nan"))
    wide[:, 1 : 1 + tensor.shape[1]] = tensor
    return wide[:, 1 : 1 + tensor.shape[1]]


def forward_inputs(case, dtype=torch.float32, rank_dtype=None):
    m, k, n, r = case
    rank_dtype = rank_dtype or dtype
    x, weight = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, scale=k**-0.5)
    bias = randn(n, dtype=dtype)
    return x, weight, bias, randn(m, r, dtype=rank_dtype), randn(n, r, scale=r**-0.5).to(rank_dtype)


def backward_inputs(case, ranks, dtype=torch.float32, rank_dtype=None):
    """One sibling for each rank, each with fewer out features than the one before."""
    m, k, n, _ = case
    rank_dtype = rank_dtype or dtype
    outs = [max(1, n - 16 * g) for g in range(len(ranks))]
    dys = [randn(m, n, dtype=dtype) for n in outs]
    weights = [randn(n, k, dtype=dtype, scale=n**-0.5) for n in outs]
    dhs = [randn(m, r, dtype=rank_dtype) for r in ranks]
    lora_as = [randn(r, k, dtype=rank_dtype, scale=r**-0.5) for r in ranks]
    return dys, weights, dhs, lora_as


def check_forward(y, x, weight, bias, h, lora_b, gain=GAIN):
    lora_b = lora_b.to(h.dtype)
    native = reference.low_rank_gemm(x, weight, bias, h, lora_b, gain).to(weight.dtype)
    exact = reference.low_rank_gemm(*doubles(x, weight, bias, h, lora_b), gain)
    assert_kernel_as_accurate(y, native, exact)


def check_backward(dx, dys, weights, dhs, lora_as, keeps):
    """Compare with the sum over the siblings, computed by torch in the dtype of the result."""
    lora_as = [a.to(dh.dtype) for a, dh in zip(lora_as, dhs, strict=True)]
    results = []
    for dtype in (dx.dtype, torch.float64):
        siblings = zip(dys, weights, dhs, lora_as, keeps, strict=True)
        terms = [
            reference.input_grad(*(t.to(dtype) for t in tensors), keep)
            for *tensors, keep in siblings
        ]
        results.append(torch.stack(terms).sum(0))
    assert_kernel_as_accurate(dx, *results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_as_accurate_as_torch(case, dtype):
    inputs = forward_inputs(case, dtype)
    check_forward(low_rank_gemm(*inputs, GAIN, config=replace(TILE, parts=2)), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_without_bias(dtype):
    x, weight, _, h, lora_b = forward_inputs((33, 40, 24, 8), dtype)
    y = low_rank_gemm(x, weight, None, h, lora_b, GAIN, config=TILE)
    check_forward(y, x, weight, None, h, lora_b)


@pytest.mark.parametrize("config", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_in_parts(config, dtype, descriptors):
    inputs = forward_inputs((33, 72, 72, 8), dtype)
    check_forward(low_rank_gemm(*inputs, GAIN, config=config), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_backward_is_as_accurate_as_torch(case, dtype):
    m, k, _, r = case
    inputs = backward_inputs(case, [r], dtype)
    mask, keeps = draw_masks("bits", 1, m, k)
    dx = input_grad(*inputs, mask, THRESHOLD, grad_dtype=dtype, config=TILE)
    check_backward(dx, *inputs, keeps)


@pytest.mark.parametrize("config", PARTS)
@pytest.mark.parametrize("mask", MASKS)
def test_backward_of_siblings_in_parts(mask, config):
    inputs = backward_inputs((17, 72, 24, 0), [5, 72], torch.float16)
    mask, keeps = draw_masks(mask, 2, 17, 72)
    dx = input_grad(*inputs, mask, THRESHOLD, grad_dtype=torch.float16, config=config)
    check_backward(dx, *inputs, keeps)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("siblings", [1, 3, 4])
def test_backward_of_a_group(siblings, mask):
    """Each sibling has 16 out features less than the one before, the fourth of them one alone."""
    inputs = backward_inputs((20, 40, 40, 0), [8] * siblings)
    mask, keeps = draw_masks(mask, siblings, 20, 40)
    dx = input_grad(*inputs, mask, THRESHOLD, grad_dtype=torch.float32, config=TILE)
    check_backward(dx, *inputs, keeps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_siblings_read_either_way(dtype, descriptors):
    inputs = backward_inputs((33, 72, 40, 0), [5, 16], dtype)
    dx = input_grad(*inputs, grad_dtype=dtype, config=TILE)
    check_backward(dx, *inputs, [None, None])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("columns", [72, 71], ids=["described-result", "odd-columns"])
def test_backward_without_a_frozen_product(mask, columns):
    """What remains of dx when the frozen part is a quantised layer's own."""
    _, _, dhs, lora_as = backward_inputs((33, columns, 1, 0), [5, 16])
    mask, keeps = draw_masks(mask, 2, 33, columns)
    dx = input_grad([], [], dhs, lora_as, mask, THRESHOLD, grad_dtype=torch.float32, config=TILE)
    zeros = [torch.zeros(33, 1, device=DEVICE)] * 2
    check_backward(dx, zeros, [zero[:1].expand(1, columns) for zero in zeros], dhs, lora_as, keeps)


def check_term(y, h, lora_b, bias, gain, dtype):
    """Compare with torch in fp32 (or the wider of the dtypes), rounded to the result's once."""
    lora_b = lora_b.to(h.dtype)
    results = []
    for wide in (torch.float32, torch.float64):
        term = gain * (h.to(wide) @ lora_b.to(wide).t())
        results.append(term if bias is None else term + bias.to(wide))
    assert_kernel_as_accurate(y, results[0].to(dtype), results[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_without_a_frozen_product(case, dtype):
    """What the hybrid plan writes before cuBLAS adds the rest."""
    _, _, bias, h, lora_b = forward_inputs(case, dtype)
    y = low_rank_term(h, lora_b, bias, GAIN, dtype=dtype, config=TILE)
    check_term(y, h, lora_b, bias, GAIN, dtype)


# 1e-42 is no normal fp32 number, and its inverse none at all.
@pytest.mark.parametrize("gain", [0.0, -2.0, 1 / 3, 1e-42, 1e30])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_low_rank_term_of_any_gain(gain, with_bias):
    _, _, bias, h, lora_b = forward_inputs((20, 40, 40, 5))
    bias = bias if with_bias else None
    y = low_rank_term(h, lora_b, bias, gain, dtype=torch.float32, config=TILE)
    check_term(y, h, lora_b, bias, gain, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("half", HALVES)
def test_low_rank_term_of_fp32_operands_is_rounded_to_half_once(half, layout):
    _, _, bias, h, lora_b = forward_inputs((33, 40, 72, 8))
    y = low_rank_term(padded_rows(h), layout(lora_b), bias, GAIN, dtype=half, config=TILE)
    check_term(y, h, lora_b, bias, GAIN, half)
    h = h.to(half)  # as under autocast
    y = low_rank_term(h, lora_b, bias, GAIN, dtype=half, config=TILE)
    check_term(y, h, lora_b, bias, GAIN, half)


def test_low_rank_term_is_stored_either_way(described, descriptors):
    _, _, bias, h, lora_b = forward_inputs((20, 40, 24, 5), torch.float16)
    y = low_rank_term(h, lora_b, bias, GAIN, dtype=torch.float16)
    assert described == ([(20, 24)] if descriptors else [])
    check_term(y, h, lora_b, bias, GAIN, torch.float16)


def test_rows_of_whole_16_bytes_are_read_by_descriptors(described, descriptors):
    inputs = forward_inputs((20, 40, 24, 5), torch.float16)
    low_rank_gemm(*inputs, GAIN, config=TILE)
    shapes = [(20, 40), (24, 40), (20, 24)] if descriptors else []
    assert sorted(described) == sorted(shapes)


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param((20, 36, 24, 5), None, id="rows-of-72-bytes"),
        pytest.param((20, 40, 20, 5), None, id="result-with-rows-of-40-bytes"),
        pytest.param((20, 40, 24, 5), transposed, id="columns-contiguous"),
        pytest.param((20, 40, 24, 5), every_second, id="every-second-column"),
        pytest.param((20, 40, 24, 5), lambda x: padded_rows(x, 1), id="rows-82-bytes-apart"),
        pytest.param((20, 40, 24, 5), lambda x: x[:1].expand_as(x), id="expanded"),
        pytest.param((20, 40, 24, 5), two_bytes_further, id="not-aligned"),
    ],
)
def test_what_descriptors_cannot_describe_is_read_by_pointers(case, layout, described):
    x, weight, bias, h, lora_b = forward_inputs(case, torch.float16)
    x = x if layout is None else layout(x)
    y = low_rank_gemm(x, weight, bias, h, lora_b, GAIN, config=TILE)
    assert described == []
    check_forward(y, x, weight, bias, h, lora_b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_takes_every_layout(layout):
    x, weight, bias, h, lora_b = forward_inputs((33, 72, 40, 5))
    strided = layout(x), layout(weight), bias, padded_rows(h), layout(lora_b)
    check_forward(low_rank_gemm(*strided, GAIN, config=TILE), x, weight, bias, h, lora_b)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_takes_every_layout(layout, mask):
    dys, weights, dhs, lora_as = backward_inputs((33, 72, 40, 0), [5])
    mask, keeps = draw_masks(mask, 1, 33, 72)
    if mask == "bits":
        wide = torch.full((33, 12), 0x5A, dtype=torch.uint8, device=DEVICE)
        wide[:, :9] = mask[0]
        mask = [wide[:, :9]]
    strided = (
        [change(tensors[0])]
        for change, tensors in (
            (layout, dys),
            (layout, weights),
            (padded_rows, dhs),
            (layout, lora_as),
        )
    )
    dx = input_grad(*strided, mask, THRESHOLD, grad_dtype=torch.float32, config=TILE)
    check_backward(dx, dys, weights, dhs, lora_as, keeps)


def test_dy_may_be_expanded():
    """The gradient of a sum is one number with both strides 0."""
    dys, *others = backward_inputs((33, 72, 40, 0), [5])
    dys = [dys[0][:1, :1].expand(33, 40)]
    dx = input_grad(dys, *others, grad_dtype=torch.float32, config=TILE)
    check_backward(dx, dys, *others, [None])


# 0 leaves the term out; the others are divided by and multiplied with, one of them inexactly.
@pytest.mark.parametrize("gain", [0.0, -2.0, 1 / 3, 1e-6, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_gain(gain, dtype):
    inputs = forward_inputs((20, 40, 40, 5), dtype)
    check_forward(low_rank_gemm(*inputs, gain, config=TILE), *inputs, gain)


@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_is_rounded_to_half_under_autocast(half):
    x, weight, bias, h, _ = forward_inputs((20, 40, 40, 5), half)
    lora_b, lora_a = randn(40, 5), randn(5, 40)
    check_forward(
        low_rank_gemm(x, weight, bias, h, lora_b, GAIN, config=TILE), x, weight, bias, h, lora_b
    )
    dx = input_grad([x], [weight], [h], [lora_a], grad_dtype=half, config=TILE)
    check_backward(dx, [x], [weight], [h], [lora_a], [None])


@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_on_a_half_base_is_added_before_the_only_rounding(half):
    inputs = forward_inputs((20, 40, 40, 5), half, rank_dtype=torch.float32)
    check_forward(low_rank_gemm(*inputs, GAIN, config=TILE), *inputs)
    inputs = backward_inputs((20, 40, 40, 0), [5, 16], half, rank_dtype=torch.float32)
    dx = input_grad(*inputs, grad_dtype=half, config=TILE)
    check_backward(dx, *inputs, [None, None])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("half", HALVES)
def test_fp32_gradient_of_half_operands_is_not_rounded_to_half(half, mask):
    inputs = backward_inputs((33, 72, 40, 0), [5], half)
    mask, keeps = draw_masks(mask, 1, 33, 72)
    dx = input_grad(*inputs, mask, THRESHOLD, grad_dtype=torch.float32, config=TILE)
    check_backward(dx, *inputs, keeps)


def test_same_inputs_give_the_same_bits():
    forward, backward = forward_inputs((33, 40, 72, 8)), backward_inputs((33, 40, 40, 0), [8, 5])
    mask, _ = draw_masks("seed", 2, 33, 40)
    runs = [
        (
            low_rank_gemm(*forward, GAIN, config=TILE),
            low_rank_term(*forward[3:], None, GAIN, dtype=torch.float32, config=TILE),
            input_grad(*backward, mask, THRESHOLD, grad_dtype=torch.float32, config=TILE),
        )
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_default_tiles_cover_everything(dtype, mask):
    """Half precision has tiles of 128 x 256, narrowed to 128 x 128 where a seed is drawn from."""
    inputs = forward_inputs((70, 40, 136, 70), dtype)
    check_forward(low_rank_gemm(*inputs, GAIN), *inputs)
    inputs = backward_inputs((70, 136, 40, 0), [70], dtype)
    mask, keeps = draw_masks(mask, 1, 70, 136)
    check_backward(input_grad(*inputs, mask, THRESHOLD, grad_dtype=dtype), *inputs, keeps)


@pytest.mark.parametrize(("mask", "width"), [("none", 256), ("bits", 256), ("seed", 128)])
def test_drawing_a_mask_narrows_the_tile(mask, width, monkeypatch):
    """Wider, the draw spills registers on sm_90; the result would be the same."""
    widths = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **constants: widths.append(constants["BLOCK_N"])

    monkeypatch.setattr(module, "_low_rank_gemm_kernel", Launch())
    mask, _ = draw_masks(mask, 1, 8, 24)
    config = replace(TILE, block_n=256)
    inputs = backward_inputs((8, 24, 40, 0), [5])
    input_grad(*inputs, mask, THRESHOLD, grad_dtype=torch.float32, config=config)
    assert widths == [width]


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [5, 16, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_as_accurate_as_torch_at_real_sizes(dtype, rank, descriptors):
    inputs = forward_inputs((1000, 4096, 4096, rank), dtype)
    check_forward(low_rank_gemm(*inputs, GAIN), *inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [5, 16, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_term_at_real_sizes(dtype, rank):
    _, _, bias, h, lora_b = forward_inputs((1000, 64, 4096, rank), dtype)
    y = low_rank_term(h, lora_b, bias, GAIN, dtype=dtype)
    check_term(y, h, lora_b, bias, GAIN, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("ranks", [(5,), (16,), (64,), (128,), (256,), (16, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_is_as_accurate_as_torch_at_real_sizes(dtype, ranks, mask, descriptors):
    inputs = backward_inputs((1000, 4096, 4096, 0), ranks, dtype)
    mask, keeps = draw_masks(mask, len(ranks), 1000, 4096)
    dx = input_grad(*inputs, mask, THRESHOLD, grad_dtype=dtype)
    check_backward(dx, *inputs, keeps)


@pytest.mark.gpu
@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_at_real_sizes(half, descriptors):
    """Three TF32 products stand in for the fp32 one here."""
    inputs = forward_inputs((1000, 4096, 4096, 16), half, rank_dtype=torch.float32)
    check_forward(low_rank_gemm(*inputs, GAIN), *inputs)
    inputs = backward_inputs((1000, 4096, 4096, 0), (16, 16), half, rank_dtype=torch.float32)
    check_backward(input_grad(*inputs, grad_dtype=half), *inputs, [None, None])
