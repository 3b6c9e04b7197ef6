"""The kernels of ``adapter_grads`` against the definition: the pass over dy and the one over x."""

from __future__ import annotations

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
    draw_mask,
    padded_rows,
    randn,
)

from fastlora import dropout, reference
from fastlora.kernels import adapter_grads as module
from fastlora.kernels.adapter_grads import adapter_grads, input_pass

GAIN = 1.7
THRESHOLD = dropout.threshold(P)
SPLIT = replace(SMALL, splits=2)
TILES = {"output_config": SPLIT, "input_config": SPLIT}

# (rows, in features, out features, rank): each with its reason.
CASES = [
    pytest.param((1, 40, 72, 8), id="one-row"),
    pytest.param((33, 72, 40, 8), id="ragged-tiles"),
    pytest.param((0, 40, 24, 8), id="no-rows"),
    pytest.param((20, 33, 7, 1), id="odd-sizes-rank-1"),
    pytest.param((20, 1, 1, 5), id="one-feature-rank-5"),
    pytest.param((17, 24, 40, 16), id="rank-16-the-last-in-one-pass-in-fp32"),
    pytest.param((17, 24, 40, 17), id="rank-17-in-two-passes-in-fp32"),
    pytest.param((17, 24, 40, 64), id="rank-64-the-last-in-one-pass-in-half"),
    pytest.param((17, 24, 40, 65), id="rank-65-in-two-passes"),
    pytest.param((17, 24, 40, 128), id="rank-128"),
    pytest.param((17, 24, 40, 256), id="rank-256"),
]


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The names of the passes that were launched."""
    names = []

    def counted(name):
        launch = getattr(module, name)

        def launch_and_count(*args, **options):
            names.append(name)
            return launch(*args, **options)

        return launch_and_count

    for name in ("_output_pass", "shrink", "input_pass"):
        monkeypatch.setattr(module, name, counted(name))
    return names


def make_inputs(case, dtype=torch.float32, rank_dtype=None):
    m, k, n, r = case
    rank_dtype = rank_dtype or dtype
    dy, x = randn(m, n, dtype=dtype, scale=n**-0.5), randn(m, k, dtype=dtype)
    return dy, x, randn(m, r, dtype=rank_dtype), randn(n, r, dtype=rank_dtype)


def check(grads, inputs, keep, rank_dtype, grad_dtype, gain=GAIN):
    """Compare with the definition on operands that were rounded to ``rank_dtype`` once.

    In wider gradients of half operands only dh, which is compared itself, is rounded to half: dA
    is compared with the product of the dh at hand.
    """
    operands = [tensor.to(rank_dtype) for tensor in inputs]
    native = reference.adapter_grads(*operands, keep, gain)
    exact = reference.adapter_grads(*doubles(*operands), keep, gain)
    if grad_dtype != rank_dtype:
        (_, _, db), (exact_dh, _, exact_db) = (
            reference.adapter_grads(*(tensor.to(dtype) for tensor in operands), keep, gain)
            for dtype in (grad_dtype, torch.float64)
        )
        kept = operands[1] if keep is None else operands[1] * keep
        da, exact_da = (grads[0].t().to(t) @ kept.to(t) for t in (grad_dtype, torch.float64))
        native, exact = (native[0], da, db), (exact_dh, exact_da, exact_db)
    for name, *values in zip(("dh", "da", "db"), grads, native, exact, strict=True):
        assert_kernel_as_accurate(*values, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_as_accurate_as_torch(case, dtype):
    m, k, *_ = case
    inputs = make_inputs(case, dtype)
    mask, keep = draw_mask("bits", 3, m, k)
    grads = adapter_grads(
        *inputs, mask, GAIN, THRESHOLD, rank_dtype=dtype, grad_dtype=dtype, **TILES
    )
    check(grads, inputs, keep, dtype, dtype)


@pytest.mark.parametrize(
    ("dtype", "rank", "expected"),
    [
        (torch.float32, 16, ["_output_pass", "input_pass"]),
        (torch.float32, 17, ["shrink", "input_pass", "input_pass"]),
        (torch.float16, 64, ["_output_pass", "input_pass"]),
        (torch.float16, 65, ["shrink", "input_pass", "input_pass"]),
    ],
    ids=str,
)
def test_small_ranks_read_dy_once(dtype, rank, expected, passes):
    inputs = make_inputs((17, 24, 40, rank), dtype)
    adapter_grads(*inputs, None, GAIN, rank_dtype=dtype, grad_dtype=dtype)
    assert passes == expected


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("splits", [1, 3, 9], ids=["one-split", "three", "more-than-blocks"])
def test_any_number_of_splits(splits, mask):
    inputs = make_inputs((33, 40, 72, 5))
    config = replace(SMALL, splits=splits)
    mask, keep = draw_mask(mask, 3, 33, 40)
    grads = adapter_grads(
        *inputs, mask, GAIN, THRESHOLD, rank_dtype=torch.float32, grad_dtype=torch.float32,
        output_config=config, input_config=config,
    )  # fmt: skip
    check(grads, inputs, keep, torch.float32, torch.float32)


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_every_layout(layout, rank):
    dy, x, h, lora_b = make_inputs((33, 72, 40, rank))
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    bits, keep = draw_mask("bits", 3, 33, 72)
    wide_bits = torch.full((33, 12), 0x5A, dtype=torch.uint8, device=DEVICE)
    wide_bits[:, :9] = bits
    strided = layout(dy), layout(x), padded_rows(h), layout(lora_b), wide_bits[:, :9]
    grads = adapter_grads(*strided, GAIN, **options, **TILES)
    check(grads, (dy, x, h, lora_b), keep, **options)


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
def test_dy_may_be_expanded(rank):
    """The gradient of a sum is one number with both strides 0."""
    dy, *others = make_inputs((33, 72, 40, rank))
    inputs = (dy[:1, :1].expand(33, 40), *others)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    grads = adapter_grads(*inputs, None, GAIN, **options, **TILES)
    check(grads, inputs, None, **options)


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
def test_what_is_not_asked_for_is_left_out(rank, passes):
    dy, x, h, lora_b = make_inputs((33, 72, 40, rank))
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    exact = reference.adapter_grads(*doubles(dy, x, h, lora_b), None, GAIN)
    native = reference.adapter_grads(dy, x, h, lora_b, None, GAIN)

    dh, da, db = adapter_grads(dy, None, h, lora_b, None, GAIN, **options)
    assert da is None
    assert_kernel_as_accurate(dh, native[0], exact[0], "dh")
    assert_kernel_as_accurate(db, native[2], exact[2], "db")

    dh, da, db = adapter_grads(dy, x, None, lora_b, None, GAIN, **options)
    assert db is None
    assert_kernel_as_accurate(dh, native[0], exact[0], "dh")
    assert_kernel_as_accurate(da, native[1], exact[1], "da")

    passes.clear()
    dh, da, db = adapter_grads(dy, None, h, lora_b, None, GAIN, need_dh=False, **options)
    assert dh.numel() == 0
    assert da is None
    assert_kernel_as_accurate(db, native[2], exact[2], "db")
    assert passes == ["input_pass"]

    passes.clear()
    dh, da, db = adapter_grads(dy, None, None, lora_b, None, GAIN, need_dh=False, **options)
    assert (dh.numel(), da, db, passes) == (0, None, None, [])


def test_no_rows_give_zero_gradients_of_what_is_asked_for():
    dy, x, h, lora_b = make_inputs((0, 40, 24, 8))
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    dh, da, db = adapter_grads(dy, x, h, lora_b, None, GAIN, **options)
    assert dh.shape == (0, 8)
    assert torch.equal(da, torch.zeros(8, 40, device=DEVICE))
    assert torch.equal(db, torch.zeros(24, 8, device=DEVICE))
    _, da, db = adapter_grads(dy, None, None, lora_b, None, GAIN, **options)
    assert (da, db) == (None, None)


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("gain", [0.0, -2.0, 1 / 3])
def test_any_gain(gain, rank):
    inputs = make_inputs((33, 40, 24, rank))
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    grads = adapter_grads(*inputs, None, gain, **options, **TILES)
    check(grads, inputs, None, **options, gain=gain)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rank", [5, 70], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_under_autocast_gets_gradients_that_are_not_rounded_to_half(half, rank, mask):
    dy, x, h, _ = make_inputs((33, 72, 40, rank), half)
    inputs = (dy, x, h, randn(40, rank))
    mask, keep = draw_mask(mask, 3, 33, 72)
    grads = adapter_grads(
        *inputs, mask, GAIN, THRESHOLD, rank_dtype=half, grad_dtype=torch.float32, **TILES
    )
    check(grads, inputs, keep, half, torch.float32)


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_on_a_half_base_computes_in_fp32(half, rank):
    inputs = make_inputs((33, 72, 40, rank), half, rank_dtype=torch.float32)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    grads = adapter_grads(*inputs, None, GAIN, **options, **TILES)
    check(grads, inputs, None, **options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_siblings_share_one_pass_over_x(dtype, mask):
    """Different ranks and layouts of the results; M is split in three."""
    x, dhs = randn(33, 40, dtype=dtype), [randn(33, r, dtype=dtype) for r in (5, 64, 16)]
    masks, keeps = zip(*(draw_mask(mask, g, 33, 40) for g in range(3)), strict=True)
    outs = [x.new_full((r, 40), float("nan")) for r in (5, 64)]
    outs.append(x.new_full((40, 16), float("nan")).t())
    input_pass(
        x, dhs, outs, None if mask == "none" else masks, THRESHOLD, gain=GAIN, rank_dtype=dtype,
        config=replace(SMALL, splits=3),
    )  # fmt: skip
    for dh, out, keep in zip(dhs, outs, keeps, strict=True):
        native, exact = (
            GAIN * tensors[1].t() @ (tensors[0] if keep is None else tensors[0] * keep)
            for tensors in ((x, dh), doubles(x, dh))
        )
        assert_kernel_as_accurate(out, native, exact)


@pytest.mark.parametrize("rank", [5, 70], ids=["one-pass", "two-passes"])
def test_same_inputs_give_the_same_bits(rank):
    inputs = make_inputs((33, 40, 70, rank), torch.float16)
    seed, _ = draw_mask("seed", 3, 33, 40)
    options = {"rank_dtype": torch.float16, "grad_dtype": torch.float32}
    runs = [adapter_grads(*inputs, seed, GAIN, THRESHOLD, **options, **TILES) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tiles_cover_everything(dtype):
    inputs = make_inputs((130, 40, 70, 8), dtype)
    seed, keep = draw_mask("seed", 3, 130, 40)
    options = {"rank_dtype": dtype, "grad_dtype": dtype}
    grads = adapter_grads(*inputs, seed, GAIN, THRESHOLD, **options)
    check(grads, inputs, keep, **options)


def test_a_batch_whose_partial_results_would_be_huge_takes_two_passes(passes, monkeypatch):
    monkeypatch.setattr(module, "_MAX_PARTIAL_BYTES", 4 * 24 * 8)  # one row block of N = 24, R = 8
    options = {"rank_dtype": torch.float16, "grad_dtype": torch.float32}
    b = randn(24, 8, dtype=torch.float16)
    for m, expected in ((20, ["_output_pass"]), (300, ["shrink", "input_pass"])):
        dy, h = randn(m, 24, dtype=torch.float16), randn(m, 8, dtype=torch.float16)
        passes.clear()
        _, _, db = adapter_grads(dy, None, h, b, None, GAIN, **options)
        assert passes == expected
        assert_kernel_as_accurate(
            db, GAIN * (dy.float().t() @ h.float()), GAIN * (dy.double().t() @ h.double())
        )


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rank", [5, 16, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tiles_are_as_accurate_as_torch_at_real_sizes(dtype, rank, mask):
    inputs = make_inputs((1000, 4096, 4096, rank), dtype)
    mask, keep = draw_mask(mask, 3, 1000, 4096)
    options = {"rank_dtype": dtype, "grad_dtype": dtype}
    grads = adapter_grads(*inputs, mask, GAIN, THRESHOLD, **options)
    check(grads, inputs, keep, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_at_real_sizes(half):
    dy, x, h, _ = make_inputs((1000, 4096, 4096, 16), half)
    inputs = (dy, x, h, randn(4096, 16))
    options = {"rank_dtype": half, "grad_dtype": torch.float32}
    check(adapter_grads(*inputs, None, GAIN, **options), inputs, None, **options)
    inputs = make_inputs((1000, 4096, 4096, 16), half, rank_dtype=torch.float32)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    check(adapter_grads(*inputs, None, GAIN, **options), inputs, None, **options)
