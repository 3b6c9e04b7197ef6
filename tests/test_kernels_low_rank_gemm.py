"""The ``low_rank_gemm`` kernel, forward and backward form, against its definition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import triton.language as tl
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
    other_mask,
    padded_rows,
    randn,
    transposed,
)

from fastlora import dropout, reference
from fastlora.kernels import low_rank_gemm as module
from fastlora.kernels.low_rank_gemm import (
    input_grad,
    low_rank_gemm,
    low_rank_term,
    prepare_input_grad,
    prepare_low_rank_gemm,
    prepare_low_rank_term,
)
from fastlora.kernels.tile_config import device_limits, forget_tiles, has_descriptors

# Of the siblings: divided by and multiplied with, all but -0.5 inexactly.
GAINS = [1.7, -0.5, 1 / 3, 3.0]
THRESHOLD = dropout.threshold(P)
# Nine tiles of a 33 x 72 result are walked by the interpreter's four programs, in groups of which
# the last one is not full.
TILE = replace(SMALL, group_m=2)

# (rows, in features, out features, rank): each with its reason. Several out features are those of
# siblings.
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
# Out features of a group, each with its reason. Tiles are 16 x 32.
GROUPS = [
    pytest.param((40,), id="one-sibling"),
    pytest.param((72, 24), id="two"),
    pytest.param((72, 7, 16), id="q-k-v-two-of-them-narrower-than-a-tile"),
    pytest.param((72, 8, 16), id="three-with-rows-of-whole-16-bytes"),
    pytest.param((8, 72, 1, 17), id="four-the-largest-in-the-middle"),
]
QKV = (3584, 512, 512)  # q, k and v of Qwen2.5-7B
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
    make = module.describe

    def counted(tensor, form):
        shapes.append(tuple(form["shape"]))
        return make(tensor, form)

    monkeypatch.setattr(module, "describe", counted)
    return shapes


@pytest.fixture
def set_processors(monkeypatch) -> Iterator[Callable[[int], None]]:
    """Return a function that makes launches believe in so many processors."""
    limits = device_limits(DEVICE)

    def set_them(number):
        monkeypatch.setattr(module, "device_limits", lambda _: replace(limits, processors=number))
        forget_tiles()  # what a launch is made of is remembered

    yield set_them
    forget_tiles()


@pytest.fixture
def launches(monkeypatch) -> list[tuple[int, ...]]:
    """The grids of the kernel's launches."""
    grids, kernel = [], module._low_rank_gemm_kernel

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_low_rank_gemm_kernel", Counted())
    return grids


def two_bytes_further(tensor):
    """Return the same half-precision matrix, its rows whole 16 bytes apart, begun at byte 2."""
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 8), float("nan"))
    wide[:, 1 : 1 + tensor.shape[1]] = tensor
    return wide[:, 1 : 1 + tensor.shape[1]]


def forward_inputs(case, dtype=torch.float32, rank_dtype=None):
    """Return the arguments of ``low_rank_gemm``; the siblings are as many as the out features."""
    m, k, ns, r = case
    ns = ns if isinstance(ns, tuple) else (ns,)
    rank_dtype = rank_dtype or dtype
    weights = [randn(n, k, dtype=dtype, scale=k**-0.5) for n in ns]
    biases = [randn(n, dtype=dtype) for n in ns]
    lora_bs = [randn(n, r, scale=r**-0.5).to(rank_dtype) for n in ns]
    x, h = randn(m, k, dtype=dtype), randn(len(ns), m, r, dtype=rank_dtype)
    return x, weights, biases, h, lora_bs, GAINS[: len(ns)]


def term_inputs(case, dtype=torch.float32, rank_dtype=None):
    """Return the arguments of ``low_rank_term`` likewise."""
    _, _, biases, h, lora_bs, gains = forward_inputs(case, dtype, rank_dtype)
    return h, lora_bs, biases, gains


def backward_inputs(case, siblings=1, dtype=torch.float32, rank_dtype=None):
    """Each sibling has 16 out features less than the one before."""
    m, k, n, r = case
    rank_dtype = rank_dtype or dtype
    outs = [max(1, n - 16 * g) for g in range(siblings)]
    dys = [randn(m, n, dtype=dtype) for n in outs]
    weights = [randn(n, k, dtype=dtype, scale=n**-0.5) for n in outs]
    lora_as = [randn(r, k, dtype=rank_dtype, scale=r**-0.5) for _ in outs]
    return dys, weights, randn(siblings, m, r, dtype=rank_dtype), lora_as


def check_forward(ys, x, weights, biases, h, lora_bs, gains):
    siblings = zip(weights, biases, h, lora_bs, strict=True)
    for y, (weight, bias, own_h, lora_b), gain in zip(ys, siblings, gains, strict=True):
        own = x, weight, bias, own_h, lora_b.to(h.dtype)
        native = reference.low_rank_gemm(*own, gain).to(weight.dtype)
        exact = reference.low_rank_gemm(*doubles(*own), gain)
        assert_kernel_as_accurate(y, native, exact)


def check_backward(dx, dys, weights, dh, lora_as, keeps):
    """Compare with the sum over the siblings, computed by torch in the dtype of the result."""
    lora_as = [a.to(dh.dtype) for a in lora_as]
    results = []
    for dtype in (dx.dtype, torch.float64):
        siblings = zip(dys, weights, dh, lora_as, keeps, strict=True)
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
    check_forward(low_rank_gemm(*inputs, config=replace(TILE, parts=2)), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_without_bias(dtype):
    x, weights, _, *others = forward_inputs((33, 40, 24, 8), dtype)
    inputs = x, weights, [None], *others
    check_forward(low_rank_gemm(*inputs, config=TILE), *inputs)


@pytest.mark.parametrize("config", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_in_parts(config, dtype, descriptors):
    inputs = forward_inputs((33, 72, (72, 16), 8), dtype)
    check_forward(low_rank_gemm(*inputs, config=config), *inputs)


@pytest.mark.parametrize("ns", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_of_a_group(dtype, ns):
    """The gains differ; a rank of 40 enters in several chunks, the last one ragged."""
    inputs = forward_inputs((33, 72, ns, 40), dtype)
    check_forward(low_rank_gemm(*inputs, config=TILE), *inputs)


@pytest.mark.parametrize("with_bias", ["first", "others", "last"])
def test_some_siblings_may_have_a_bias(with_bias):
    x, weights, biases, h, lora_bs, gains = forward_inputs((33, 40, (72, 24, 7), 5))
    chosen = {"first": (0,), "others": (1, 2), "last": (2,)}[with_bias]
    biases = [bias if g in chosen else None for g, bias in enumerate(biases)]
    ys = low_rank_gemm(x, weights, biases, h, lora_bs, gains, config=TILE)
    check_forward(ys, x, weights, biases, h, lora_bs, gains)
    term = h, lora_bs, biases, gains
    check_term(low_rank_term(*term, dtype=h.dtype, config=TILE), *term, h.dtype)


@pytest.mark.parametrize("ns", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_siblings_get_what_each_would_get_alone_bit_for_bit(dtype, ns):
    x, weights, biases, h, lora_bs, gains = forward_inputs((17, 40, ns, 5), dtype)
    biases = [None if g == 1 else bias for g, bias in enumerate(biases)]
    options = {"aligned": all(n % 8 == 0 for n in ns), "config": replace(TILE, parts=2)}
    ys = low_rank_gemm(x, weights, biases, h, lora_bs, gains, **options)
    terms = low_rank_term(h, lora_bs, biases, gains, dtype=dtype, config=TILE)
    assert len(ys) == len(terms) == len(ns)
    for g in range(len(ns)):
        one = slice(g, g + 1)
        own = h[one], lora_bs[one], biases[one], gains[one]
        (y,) = low_rank_gemm(
            x, weights[one], biases[one], h[one], lora_bs[one], gains[one], **options
        )
        assert torch.equal(ys[g], y)
        assert torch.equal(terms[g], low_rank_term(*own, dtype=dtype, config=TILE)[0])


# Three row blocks of 5 and 6 column blocks are 15 and 18 tiles.
@pytest.mark.parametrize("processors", [1, 4, 7, 64])
@pytest.mark.parametrize("ns", [(72, 7, 16), (8, 72, 1, 17)], ids=["three", "four"])
def test_any_number_of_programs_writes_all_tiles(ns, processors, set_processors, launches):
    """Fewer programs than tiles, and more than a sibling or the whole group has."""
    set_processors(processors)
    x, weights, biases, h, lora_bs, gains = forward_inputs((33, 24, ns, 5))
    ys = low_rank_gemm(x, weights, biases, h, lora_bs, gains, config=TILE)
    check_forward(ys, x, weights, biases, h, lora_bs, gains)
    term = h, lora_bs, biases, gains
    check_term(low_rank_term(*term, dtype=h.dtype, config=TILE), *term, h.dtype)
    tiles = 3 * sum(-(-n // 32) for n in ns)
    assert launches == [(min(tiles, processors),), (min(tiles, 8 * processors),)]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="it watches the interpreter")
@pytest.mark.parametrize("processors", [1, 4, 7, 64])
@pytest.mark.parametrize("ns", GROUPS)
def test_tiles_are_walked_once_each_and_shared_out_evenly(
    ns, processors, set_processors, monkeypatch
):
    set_processors(processors)
    walked, take = [], module.grouped_tile

    def watched(tile, row_blocks, column_blocks, group):
        block = take(tile, row_blocks, column_blocks, group)
        program, row, column = (int(number.handle.data[0]) for number in (tl.program_id(0), *block))
        walked.append((program, row, column))
        return block

    monkeypatch.setattr(module, "grouped_tile", watched)
    low_rank_gemm(*forward_inputs((33, 24, ns, 5)), config=TILE)
    tiles = [(row, column) for n in ns for row in range(3) for column in range(-(-n // 32))]
    assert sorted((row, column) for _, row, column in walked) == sorted(tiles)
    taken = Counter(program for program, *_ in walked)
    assert len(taken) == min(processors, len(tiles))
    assert max(taken.values()) - min(taken.values()) <= 1


@pytest.mark.parametrize("siblings", [1, 4])
def test_a_group_of_any_size_takes_one_launch(siblings, launches):
    ns = (40, 24, 8, 7)[:siblings]
    low_rank_gemm(*forward_inputs((33, 40, ns, 5)), config=TILE)
    assert len(launches) == 1
    low_rank_term(*term_inputs((33, 40, ns, 5)), dtype=torch.float32, config=TILE)
    assert len(launches) == 2
    backward = backward_inputs((33, 40, 40, 5), siblings)
    input_grad(*backward, grad_dtype=torch.float32, config=TILE)
    assert len(launches) == 3


def test_no_rows_of_a_group_take_no_launch(launches):
    ns = (40, 7)
    ys = low_rank_gemm(*forward_inputs((0, 40, ns, 5)), config=TILE)
    terms = low_rank_term(*term_inputs((0, 40, ns, 5)), dtype=torch.float32, config=TILE)
    dx = input_grad(*backward_inputs((0, 40, 40, 5), 2), grad_dtype=torch.float32, config=TILE)
    assert [y.shape for y in (*ys, *terms)] == [(0, 40), (0, 7)] * 2
    assert dx.shape == (0, 40)
    assert launches == []


def test_more_than_four_siblings_are_refused():
    *inputs, _ = forward_inputs((8, 40, (8,) * 5, 5))
    with pytest.raises(AssertionError, match="5 siblings, at most 4"):
        low_rank_gemm(*inputs, [1.7] * 5, config=TILE)
    inputs = backward_inputs((8, 40, 40, 5), 5)
    with pytest.raises(AssertionError, match="5 siblings, at most 4"):
        input_grad(*inputs, grad_dtype=torch.float32, config=TILE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_backward_is_as_accurate_as_torch(case, dtype):
    m, k, *_ = case
    inputs = backward_inputs(case, 1, dtype)
    mask, keeps = draw_masks("bits", 1, m, k)
    dx = input_grad(*inputs, mask, THRESHOLD, grad_dtype=dtype, config=TILE)
    check_backward(dx, *inputs, keeps)


@pytest.mark.parametrize("rank", [5, 72])
@pytest.mark.parametrize("config", PARTS)
@pytest.mark.parametrize("mask", MASKS)
def test_backward_of_siblings_in_parts(mask, config, rank):
    inputs = backward_inputs((17, 72, 24, rank), 2, torch.float16)
    mask, keeps = draw_masks(mask, 2, 17, 72)
    dx = input_grad(*inputs, mask, THRESHOLD, grad_dtype=torch.float16, config=config)
    check_backward(dx, *inputs, keeps)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("siblings", [1, 3, 4])
def test_backward_of_a_group(siblings, mask):
    """They have 40, 24, 8 and 1 out features."""
    inputs = backward_inputs((20, 40, 40, 8), siblings)
    mask, keeps = draw_masks(mask, siblings, 20, 40)
    dx = input_grad(*inputs, mask, THRESHOLD, grad_dtype=torch.float32, config=TILE)
    check_backward(dx, *inputs, keeps)


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_siblings_read_either_way(dtype, rank, descriptors):
    inputs = backward_inputs((33, 72, 40, rank), 2, dtype)
    dx = input_grad(*inputs, grad_dtype=dtype, config=TILE)
    check_backward(dx, *inputs, [None, None])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rank", [5, 40], ids=["rank-5", "rank-in-three-chunks"])
@pytest.mark.parametrize("columns", [72, 71], ids=["described-result", "odd-columns"])
def test_backward_without_a_frozen_product(mask, columns, rank):
    """What remains of dx when the frozen part is a quantised layer's own."""
    _, _, dh, lora_as = backward_inputs((33, columns, 1, rank), 2)
    mask, keeps = draw_masks(mask, 2, 33, columns)
    dx = input_grad([], [], dh, lora_as, mask, THRESHOLD, grad_dtype=torch.float32, config=TILE)
    zeros = [torch.zeros(33, 1, device=DEVICE)] * 2
    check_backward(dx, zeros, [zero[:1].expand(1, columns) for zero in zeros], dh, lora_as, keeps)


def check_term(ys, h, lora_bs, biases, gains, dtype):
    """Compare with torch in fp32 (or the wider of the dtypes), rounded to the result's once."""
    siblings = zip(h, lora_bs, biases, gains, strict=True)
    for y, (own_h, lora_b, bias, gain) in zip(ys, siblings, strict=True):
        results = []
        for wide in (torch.float32, torch.float64):
            term = gain * (own_h.to(wide) @ lora_b.to(h.dtype).to(wide).t())
            results.append(term if bias is None else term + bias.to(wide))
        assert_kernel_as_accurate(y, results[0].to(dtype), results[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_without_a_frozen_product(case, dtype):
    """What the hybrid plan writes before cuBLAS adds the rest."""
    inputs = term_inputs(case, dtype)
    check_term(low_rank_term(*inputs, dtype=dtype, config=TILE), *inputs, dtype)


@pytest.mark.parametrize("ns", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_term_of_a_group(dtype, ns):
    inputs = term_inputs((33, 1, ns, 40), dtype)
    check_term(low_rank_term(*inputs, dtype=dtype, config=TILE), *inputs, dtype)


# 1e-42 is no normal fp32 number, and its inverse none at all.
@pytest.mark.parametrize("gain", [0.0, -2.0, 1 / 3, 1e-42, 1e30])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_low_rank_term_of_any_gain(gain, with_bias):
    h, lora_bs, biases, _ = term_inputs((20, 40, (40, 24), 5))
    inputs = h, lora_bs, biases if with_bias else [None, None], [gain, 1.7]
    ys = low_rank_term(*inputs, dtype=torch.float32, config=TILE)
    check_term(ys, *inputs, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("half", HALVES)
def test_low_rank_term_of_fp32_operands_is_rounded_to_half_once(half, layout):
    h, lora_bs, *others = term_inputs((33, 40, (72, 24), 8))
    strided = [layout(lora_b) for lora_b in lora_bs]
    ys = low_rank_term(h, strided, *others, dtype=half, config=TILE)
    check_term(ys, h, lora_bs, *others, half)
    h = h.to(half)  # as under autocast
    ys = low_rank_term(h, lora_bs, *others, dtype=half, config=TILE)
    check_term(ys, h, lora_bs, *others, half)


def test_low_rank_term_is_stored_either_way(described, descriptors):
    inputs = term_inputs((20, 40, (24, 8), 5), torch.float16)
    ys = low_rank_term(*inputs, dtype=torch.float16)
    assert described == ([(20, 24), (20, 8)] if descriptors else [])
    check_term(ys, *inputs, torch.float16)


def test_rows_of_whole_16_bytes_are_read_by_descriptors(described, descriptors):
    """One of x for all siblings, and of each sibling one of its weight and one of its result."""
    inputs = forward_inputs((20, 40, (24, 8), 5), torch.float16)
    low_rank_gemm(*inputs, config=TILE)
    shapes = [(20, 40), (24, 40), (20, 24), (8, 40), (20, 8)] if descriptors else []
    assert sorted(described) == sorted(shapes)


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param((20, 36, 24, 5), None, id="rows-of-72-bytes"),
        pytest.param((20, 40, 20, 5), None, id="result-with-rows-of-40-bytes"),
        pytest.param((20, 40, (24, 20), 5), None, id="one-of-two-results-with-rows-of-40-bytes"),
        pytest.param((20, 40, 24, 5), transposed, id="columns-contiguous"),
        pytest.param((20, 40, 24, 5), every_second, id="every-second-column"),
        pytest.param((20, 40, 24, 5), lambda x: padded_rows(x, 1), id="rows-82-bytes-apart"),
        pytest.param((20, 40, 24, 5), lambda x: x[:1].expand_as(x), id="expanded"),
        pytest.param((20, 40, 24, 5), two_bytes_further, id="not-aligned"),
    ],
)
def test_what_descriptors_cannot_describe_is_read_by_pointers(case, layout, described):
    x, *others = forward_inputs(case, torch.float16)
    x = x if layout is None else layout(x)
    ys = low_rank_gemm(x, *others, config=TILE)
    assert described == []
    check_forward(ys, x, *others)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_takes_every_layout(layout):
    x, weights, biases, h, lora_bs, gains = forward_inputs((33, 72, (40, 24), 5))
    strided = layout(x), [layout(weight) for weight in weights], biases, h
    ys = low_rank_gemm(*strided, [layout(lora_b) for lora_b in lora_bs], gains, config=TILE)
    check_forward(ys, x, weights, biases, h, lora_bs, gains)


def test_siblings_may_differ_in_layout():
    x, weights, biases, h, lora_bs, gains = forward_inputs((33, 72, (40, 24, 8), 5))
    mixed = [
        [layout(tensor) for layout, tensor in zip(layouts, tensors, strict=True)]
        for layouts, tensors in (
            ((transposed, every_second, padded_rows), weights),
            ((padded_rows, transposed, every_second), lora_bs),
        )
    ]
    ys = low_rank_gemm(x, mixed[0], biases, h, mixed[1], gains, config=TILE)
    check_forward(ys, x, weights, biases, h, lora_bs, gains)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_takes_every_layout(layout, mask):
    dys, weights, dh, lora_as = backward_inputs((33, 72, 40, 5), 2)
    mask, keeps = draw_masks(mask, 2, 33, 72)
    strided_dys, strided_weights, strided_as = (
        [layout(tensor) for tensor in tensors] for tensors in (dys, weights, lora_as)
    )
    dx = input_grad(
        strided_dys, strided_weights, dh, strided_as, mask, THRESHOLD, grad_dtype=torch.float32,
        config=TILE,
    )  # fmt: skip
    check_backward(dx, dys, weights, dh, lora_as, keeps)


def test_dy_may_be_expanded():
    """The gradient of a sum is one number with both strides 0."""
    dys, *others = backward_inputs((33, 72, 40, 5))
    dys = [dys[0][:1, :1].expand(33, 40)]
    dx = input_grad(dys, *others, grad_dtype=torch.float32, config=TILE)
    check_backward(dx, dys, *others, [None])


@pytest.mark.parametrize("ns", [(24,), (24, 8), (23, 8)], ids=["alone", "group", "odd"])
def test_contiguous_tensors_of_more_dimensions_are_matrices(ns, descriptors):
    """Inputs and results; the odd one is read and stored by pointers."""
    half = torch.float16
    x, weights, biases, h, lora_bs, gains = forward_inputs((6, 40, ns, 5), half)
    expected = low_rank_gemm(x, weights, biases, h, lora_bs, gains, config=TILE)
    operands, x = (weights, biases, lora_bs, gains), x.view(2, 3, 40)
    ys = [x.new_full((2, 3, n), float("nan")) for n in ns]
    prepare_low_rank_gemm(x, *operands, rank_dtype=half, config=TILE)(x, h, ys)
    assert all(torch.equal(y.view(6, -1), other) for y, other in zip(ys, expected, strict=True))

    expected = low_rank_term(h, lora_bs, biases, gains, dtype=half, config=TILE)
    ys = [x.new_full((2, 3, n), float("nan")) for n in ns]
    options = {"m": 6, "dtype": half, "rank_dtype": half, "config": TILE}
    prepare_low_rank_term(lora_bs, biases, gains, **options)(h, ys)
    assert all(torch.equal(y.view(6, -1), other) for y, other in zip(ys, expected, strict=True))

    dys, lora_as = [randn(6, n, dtype=half) for n in ns], [randn(5, 40, dtype=half) for _ in ns]
    options = {"grad_dtype": half, "config": TILE}
    expected = input_grad(dys, weights, h, lora_as, **options)
    dys, dx = [dy.view(2, 3, -1) for dy in dys], x.new_full((2, 3, 40), float("nan"))
    assert torch.equal(input_grad(dys, weights, h, lora_as, **options), expected)
    run = prepare_input_grad(dys, weights, lora_as, "none", 0, m=6, rank_dtype=half, **options)
    run(dys, h, None, dx)
    assert torch.equal(dx.view(6, 40), expected)


@pytest.mark.parametrize("ns", [(24,), (24, 8), (23, 8)], ids=["alone", "group", "odd"])
def test_what_is_prepared_once_takes_other_tensors_of_the_same_layout(ns, descriptors):
    half = torch.float16
    inputs = [forward_inputs((17, 40, ns, 5), half) for _ in range(2)]
    _, weights, biases, _, lora_bs, gains = inputs[0]
    calls = [(x, h, [x.new_full((17, n), float("nan")) for n in ns]) for x, _, _, h, *_ in inputs]
    run = prepare_low_rank_gemm(
        calls[0][0], weights, biases, lora_bs, gains, rank_dtype=half, config=TILE
    )
    for call in calls:
        run(*call)
    for x, h, ys in calls:
        expected = low_rank_gemm(x, weights, biases, h, lora_bs, gains, config=TILE)
        assert all(map(torch.equal, ys, expected))

    options = {"m": 17, "dtype": half, "rank_dtype": half, "config": TILE}
    run = prepare_low_rank_term(lora_bs, biases, gains, **options)
    for _, h, ys in calls:
        run(h, ys)
    for _, h, ys in calls:
        expected = low_rank_term(h, lora_bs, biases, gains, dtype=half, config=TILE)
        assert all(map(torch.equal, ys, expected))


@pytest.mark.parametrize("mask", MASKS)
def test_a_prepared_backward_takes_other_tensors_of_the_same_layout(mask, descriptors):
    half = torch.float16
    inputs = [backward_inputs((17, 40, 24, 5), 2, half) for _ in range(2)]
    first, _ = draw_masks(mask, 2, 17, 40)
    masks = [first, other_mask(first)]
    dys, weights, _, lora_as = inputs[0]
    options = {"grad_dtype": half, "config": TILE}
    run = prepare_input_grad(
        dys, weights, lora_as, mask, THRESHOLD, m=17, rank_dtype=half, **options
    )
    dxs = [randn(17, 40, dtype=half) for _ in range(2)]
    for (dys, _, dh, _), one_mask, dx in zip(inputs, masks, dxs, strict=True):
        run(dys, dh, one_mask, dx)
    for (dys, _, dh, _), one_mask, dx in zip(inputs, masks, dxs, strict=True):
        expected = input_grad(dys, weights, dh, lora_as, one_mask, THRESHOLD, **options)
        assert torch.equal(dx, expected)


# The sum is divided by them and multiplied with them again, by most inexactly.
@pytest.mark.parametrize("gain", [-2.0, 1 / 3, 1e-6, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_gain_but_0(gain, dtype):
    *others, _ = forward_inputs((20, 40, (40, 24), 5), dtype)
    gains = [gain, 1.7]
    check_forward(low_rank_gemm(*others, gains, config=TILE), *others, gains)


@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_is_rounded_to_half_under_autocast(half):
    x, weights, biases, h, _, gains = forward_inputs((20, 40, (40, 24), 5), half)
    inputs = x, weights, biases, h, [randn(40, 5), randn(24, 5)], gains
    check_forward(low_rank_gemm(*inputs, config=TILE), *inputs)
    dys, weights, dh, _ = backward_inputs((20, 40, 40, 5), 2, half)
    inputs = dys, weights, dh, [randn(5, 40), randn(5, 40)]
    dx = input_grad(*inputs, grad_dtype=half, config=TILE)
    check_backward(dx, *inputs, [None, None])


@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_on_a_half_base_is_added_before_the_only_rounding(half):
    inputs = forward_inputs((20, 40, (40, 24), 5), half, rank_dtype=torch.float32)
    check_forward(low_rank_gemm(*inputs, config=TILE), *inputs)
    for rank in (5, 16):
        inputs = backward_inputs((20, 40, 40, rank), 2, half, rank_dtype=torch.float32)
        dx = input_grad(*inputs, grad_dtype=half, config=TILE)
        check_backward(dx, *inputs, [None, None])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("half", HALVES)
def test_fp32_gradient_of_half_operands_is_not_rounded_to_half(half, mask):
    inputs = backward_inputs((33, 72, 40, 5), 1, half)
    mask, keeps = draw_masks(mask, 1, 33, 72)
    dx = input_grad(*inputs, mask, THRESHOLD, grad_dtype=torch.float32, config=TILE)
    check_backward(dx, *inputs, keeps)


def test_same_inputs_give_the_same_bits():
    case, fp32 = (33, 40, (72, 8), 8), torch.float32
    forward, term, backward = (
        forward_inputs(case),
        term_inputs(case),
        backward_inputs((33, 40, 40, 8), 2),
    )
    mask, _ = draw_masks("seed", 2, 33, 40)
    runs = [
        (
            *low_rank_gemm(*forward, config=TILE),
            *low_rank_term(*term, dtype=fp32, config=TILE),
            input_grad(*backward, mask, THRESHOLD, grad_dtype=torch.float32, config=TILE),
        )
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_default_tiles_cover_everything(dtype, mask):
    """Half precision has tiles of 128 x 256, narrowed to 128 x 128 where a seed is drawn from."""
    for ns in (136, (136, 24)):
        inputs = forward_inputs((70, 40, ns, 70), dtype)
        check_forward(low_rank_gemm(*inputs), *inputs)
    inputs = backward_inputs((70, 136, 40, 70), 1, dtype)
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
    inputs = backward_inputs((8, 24, 40, 5))
    input_grad(*inputs, mask, THRESHOLD, grad_dtype=torch.float32, config=config)
    assert widths == [width]


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [5, 16, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_as_accurate_as_torch_at_real_sizes(dtype, rank, descriptors):
    inputs = forward_inputs((1000, 4096, 4096, rank), dtype)
    check_forward(low_rank_gemm(*inputs), *inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_of_a_group_at_real_sizes(dtype, rank, descriptors):
    inputs = forward_inputs((1000, 3584, QKV, rank), dtype)
    check_forward(low_rank_gemm(*inputs), *inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [5, 16, 64, 128, 256])
@pytest.mark.parametrize("ns", [4096, QKV], ids=["alone", "group"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_term_at_real_sizes(dtype, ns, rank):
    inputs = term_inputs((1000, 64, ns, rank), dtype)
    check_term(low_rank_term(*inputs, dtype=dtype), *inputs, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("rank", "siblings"), [(5, 1), (16, 1), (64, 1), (128, 1), (256, 1), (16, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_is_as_accurate_as_torch_at_real_sizes(dtype, rank, siblings, mask, descriptors):
    inputs = backward_inputs((1000, 4096, 4096, rank), siblings, dtype)
    mask, keeps = draw_masks(mask, siblings, 1000, 4096)
    dx = input_grad(*inputs, mask, THRESHOLD, grad_dtype=dtype)
    check_backward(dx, *inputs, keeps)


@pytest.mark.gpu
@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_at_real_sizes(half, descriptors):
    """Three TF32 products stand in for the fp32 one here."""
    for ns in (4096, QKV):
        inputs = forward_inputs((1000, 4096, ns, 16), half, rank_dtype=torch.float32)
        check_forward(low_rank_gemm(*inputs), *inputs)
    inputs = backward_inputs((1000, 4096, 4096, 16), 2, half, rank_dtype=torch.float32)
    check_backward(input_grad(*inputs, grad_dtype=half), *inputs, [None, None])
