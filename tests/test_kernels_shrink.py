"""The ``shrink`` kernel against its definition; interpreted where there is no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    HALVES,
    LAYOUTS,
    SMALL,
    P,
    assert_kernel_as_accurate,
    doubles,
    every_second,
    randn,
    seed_of,
    transposed,
)

from fastlora import dropout, reference
from fastlora.kernels.shrink import prepare_shrink, shrink

THRESHOLD = dropout.threshold(P)

# (rows, in features, rank, siblings, splits of K): each with its reason.
CASES = [
    pytest.param((1, 64, 16, 1, 1), id="one-row"),
    pytest.param((33, 72, 8, 1, 1), id="ragged-tiles"),
    pytest.param((0, 64, 8, 1, 1), id="no-rows"),
    pytest.param((20, 33, 1, 1, 1), id="odd-columns-rank-1"),
    pytest.param((20, 1, 5, 1, 1), id="one-column-rank-5"),
    pytest.param((17, 40, 64, 1, 1), id="rank-64"),
    pytest.param((17, 40, 128, 1, 1), id="rank-128"),
    pytest.param((17, 40, 256, 1, 1), id="rank-256"),
    pytest.param((17, 130, 8, 1, 3), id="three-splits-the-last-one-shorter"),
    pytest.param((20, 72, 8, 1, 7), id="more-splits-than-column-blocks"),
    pytest.param((20, 72, 5, 3, 1), id="siblings"),
    pytest.param((20, 72, 1, 3, 1), id="siblings-of-rank-1"),
    pytest.param((17, 71, 5, 3, 2), id="siblings-and-splits"),
    pytest.param((17, 71, 64, 3, 2), id="siblings-of-rank-64-and-splits"),
    pytest.param((0, 72, 5, 3, 2), id="siblings-no-rows"),
    pytest.param((17, 40, 8, 4, 1), id="four-siblings"),
]


def make_inputs(case, dtype=torch.float32):
    m, k, rank, siblings, splits = case
    x = randn(m, k, dtype=dtype)
    lora_as = [randn(rank, k, dtype=dtype, scale=k**-0.5) for _ in range(siblings)]
    return x, lora_as, seed_of(17 + 2**40), replace(SMALL, splits=splits)


def keep_masks(seed, x, count):
    """Return the masks of siblings: streams of one seed."""
    return [dropout.keep_mask(seed, *x.shape, P, stream=g) for g in range(count)]


def check(h, x, lora_as, keeps, rank_dtype, gain=1.0):
    """Compare with the definition on operands that were rounded to ``rank_dtype`` once."""
    for own, a, keep in zip(h, lora_as, keeps, strict=True):
        x_rank, a_rank = x.to(rank_dtype), a.to(rank_dtype)
        native = gain * reference.shrink(x_rank, a_rank, keep)
        exact = gain * reference.shrink(*doubles(x_rank, a_rank), keep)
        assert_kernel_as_accurate(own, native, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_as_accurate_as_torch(case, dtype):
    x, lora_as, _, config = make_inputs(case, dtype)
    h, bits = shrink(x, lora_as, rank_dtype=dtype, config=config)
    assert bits is None
    check(h, x, lora_as, [None] * len(lora_as), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_as_accurate_as_torch_under_dropout(case, dtype):
    x, lora_as, seed, config = make_inputs(case, dtype)
    h, bits = shrink(x, lora_as, seed, THRESHOLD, rank_dtype=dtype, config=config)
    assert bits is None
    check(h, x, lora_as, keep_masks(seed, x, len(lora_as)), dtype)


@pytest.mark.parametrize("case", CASES)
def test_bits_are_the_defined_mask(case):
    x, lora_as, seed, config = make_inputs(case)
    _, bits = shrink(
        x, lora_as, seed, THRESHOLD, rank_dtype=x.dtype, return_bits=True, config=config
    )
    for keep, mask in zip(keep_masks(seed, x, len(lora_as)), bits, strict=True):
        assert torch.equal(dropout.unpack(mask, x.shape[1]), keep)


@pytest.mark.parametrize("siblings", [2, 3, 4])
def test_siblings_are_masked_independently(siblings):
    x = torch.zeros(200, 160, device=DEVICE)
    lora_as = [randn(4, 160) for _ in range(siblings)]
    config = replace(SMALL, block_m=128, block_k=128)
    _, bits = shrink(
        x, lora_as, seed_of(3), dropout.threshold(0.5), rank_dtype=x.dtype, return_bits=True,
        config=config,
    )  # fmt: skip
    keeps = [dropout.unpack(mask, 160) for mask in bits]
    for one, two in itertools.combinations(keeps, 2):
        agreement = (one == two).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / one.numel() ** 0.5


def test_an_adapter_alone_draws_the_first_stream():
    x, lora_as, seed, config = make_inputs((17, 72, 5, 2, 1))
    options = {"rank_dtype": x.dtype, "return_bits": True, "config": config}
    (alone,), (alone_bits,) = shrink(x, lora_as[:1], seed, THRESHOLD, **options)
    (first, _), (first_bits, _) = shrink(x, lora_as, seed, THRESHOLD, **options)
    assert torch.equal(alone, first)
    assert torch.equal(alone_bits, first_bits)


def test_writing_bits_does_not_change_h():
    x, lora_as, seed, config = make_inputs((17, 72, 5, 2, 2))
    h, _ = shrink(x, lora_as, seed, THRESHOLD, rank_dtype=x.dtype, config=config)
    other, _ = shrink(
        x, lora_as, seed, THRESHOLD, rank_dtype=x.dtype, return_bits=True, config=config
    )
    assert torch.equal(h, other)


def test_no_bits_without_dropout():
    x, lora_as, *_ = make_inputs((20, 72, 5, 1, 1))
    assert shrink(x, lora_as, rank_dtype=x.dtype, return_bits=True, config=SMALL)[1] is None


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_every_layout(layout, splits):
    x, lora_as, seed, config = make_inputs((20, 72, 5, 2, splits))
    strided = layout(x), [layout(a) for a in lora_as]
    h, _ = shrink(*strided, seed, THRESHOLD, rank_dtype=x.dtype, config=config)
    check(h, x, lora_as, keep_masks(seed, x, len(lora_as)), x.dtype)


def test_siblings_may_differ_in_layout():
    x, (a, b, c), *_ = make_inputs((20, 72, 5, 3, 1))
    mixed = [transposed(a), every_second(b), c]
    h, _ = shrink(x, mixed, rank_dtype=x.dtype, config=SMALL)
    check(h, x, (a, b, c), (None, None, None), x.dtype)


def test_x_may_be_one_row_expanded():
    x, lora_as, *_ = make_inputs((1, 72, 5, 1, 1))
    h, _ = shrink(x.expand(33, 72), lora_as, rank_dtype=x.dtype, config=SMALL)
    check(h, x.expand(33, 72), lora_as, [None], x.dtype)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_contiguous_x_of_more_dimensions_is_a_matrix(splits):
    x, lora_as, seed, config = make_inputs((6, 72, 5, 2, splits))
    options = {"rank_dtype": x.dtype, "return_bits": True, "config": config}
    expected = shrink(x, lora_as, seed, THRESHOLD, **options)
    found = shrink(x.view(2, 3, 72), lora_as, seed, THRESHOLD, **options)
    assert all(map(torch.equal, found, expected))


def test_siblings_of_different_ranks_are_refused():
    x, (a, b), *_ = make_inputs((6, 72, 5, 2, 1))
    with pytest.raises(AssertionError, match="siblings of different ranks"):
        shrink(x, [a, b[:4]], rank_dtype=x.dtype, config=SMALL)


@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_is_rounded_to_half_under_autocast(half):
    x, lora_as, *_ = make_inputs((20, 72, 5, 1, 1))
    h, _ = shrink(x.to(half), lora_as, rank_dtype=half, config=SMALL)
    check(h, x.to(half), lora_as, [None], half)


@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_on_a_half_base_computes_in_fp32(half):
    x, lora_as, *_ = make_inputs((20, 72, 5, 1, 1))
    h, _ = shrink(x.to(half), lora_as, rank_dtype=torch.float32, config=SMALL)
    check(h, x.to(half), lora_as, [None], torch.float32)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("gain", [0.0, -1.5, 1 / 3, 1.7])
def test_gain_multiplies_the_sum_once(gain, splits):
    x, lora_as, _, config = make_inputs((20, 72, 5, 2, splits))
    h, _ = shrink(x, lora_as, rank_dtype=x.dtype, gain=gain, config=config)
    check(h, x, lora_as, [None, None], x.dtype, gain)


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def to_tf32(x):
    """Round to the nearest of TF32's numbers, ties away from 0, as cuBLAS does."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def test_tf32_operands_are_rounded_and_not_cut_off(tf32_allowed):
    """Tensor cores would cut them off: 2.6 times the error."""
    x, lora_as, *_ = make_inputs((200, 512, 16, 2, 1))
    h, _ = shrink(x, lora_as, rank_dtype=x.dtype, config=SMALL)
    for own, a in zip(h, lora_as, strict=True):
        operands = (x, a) if x.is_cuda else map(to_tf32, (x, a))  # only cuBLAS knows TF32
        native, exact = reference.shrink(*operands, None), reference.shrink(*doubles(x, a), None)
        assert_kernel_as_accurate(own, native, exact)
        assert (own - exact).norm() > 1e-5 * exact.norm()  # it is TF32


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, interpreted
def test_tf32_keeps_what_is_no_number(tf32_allowed):
    x, lora_as, *_ = make_inputs((20, 72, 5, 1, 1))
    quiet = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # all bits set
    x[3:5, 7] = quiet.to(DEVICE)
    x[7:9, 7] = torch.tensor([torch.inf, -torch.inf])
    (h,), _ = shrink(x, lora_as, rank_dtype=x.dtype, config=SMALL)
    native = reference.shrink(x, lora_as[0], None)
    assert torch.equal(h.isnan(), native.isnan())
    assert torch.equal(h[7:9], native[7:9])
    assert h[3:5].isnan().all()
    assert h[7:9].isinf().all()


def test_same_inputs_give_the_same_bits():
    x, lora_as, seed, config = make_inputs((20, 72, 5, 2, 3), torch.float16)
    runs = [
        shrink(x, lora_as, seed, THRESHOLD, rank_dtype=x.dtype, return_bits=True, config=config)
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dropped", [False, True], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("splits", [1, 3])
def test_what_is_prepared_once_takes_another_x_and_seed(splits, dropped):
    x, lora_as, seed, config = make_inputs((20, 72, 5, 2, splits))
    options = {"rank_dtype": x.dtype, "return_bits": dropped, "gain": 1.7, "config": config}
    run = prepare_shrink(x, lora_as, THRESHOLD, dropped=dropped, **options)
    calls = [(x, seed), (randn(20, 72), seed_of(18))]
    calls = [(each, seed if dropped else None) for each, seed in calls]
    found = [run(*call) for call in calls]  # both before either is looked at
    for (each, seed), (h, bits) in zip(calls, found, strict=True):
        expected_h, expected_bits = shrink(each, lora_as, seed, THRESHOLD, **options)
        assert torch.equal(h, expected_h)
        assert torch.equal(bits, expected_bits) if dropped else bits is None


@pytest.mark.parametrize(("rank", "siblings"), [(8, 2), (70, 1), (70, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tile_covers_everything(dtype, rank, siblings):
    x, lora_as, seed, _ = make_inputs((70, 40, rank, siblings, 1), dtype)
    h, _ = shrink(x, lora_as, seed, THRESHOLD, rank_dtype=dtype)
    check(h, x, lora_as, keep_masks(seed, x, siblings), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, P], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize(
    ("rank", "siblings"), [(5, 1), (16, 1), (64, 1), (128, 1), (256, 1), (16, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tile_is_as_accurate_as_torch_at_real_sizes(dtype, rank, siblings, p):
    x, lora_as, seed, _ = make_inputs((1000, 4096, rank, siblings, 1), dtype)
    assert x.device.type == DEVICE.type
    h, _ = shrink(x, lora_as, seed if p else None, THRESHOLD, rank_dtype=dtype)
    keeps = keep_masks(seed, x, siblings) if p else [None] * siblings
    check(h, x, lora_as, keeps, dtype)
