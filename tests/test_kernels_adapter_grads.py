"""The kernels of ``adapter_grads`` against the definition: the pass over dy and the one over x.

Most tests take one projection; what a group of siblings adds has tests of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    other_mask,
    randn,
)

from fastlora import dropout, reference
from fastlora.kernels import input_pass as input_module
from fastlora.kernels import output_pass as output_module
from fastlora.kernels import partial_sums, tile_config
from fastlora.kernels import shrink as shrink_module
from fastlora.kernels.adapter_grads import adapter_grads, prepare_adapter_grads
from fastlora.kernels.input_pass import input_pass, prepare_input_pass
from fastlora.kernels.output_pass import prepare_output_pass
from fastlora.kernels.tile_config import DeviceLimits, TileConfig, forget_tiles

GAIN = 1.7
THRESHOLD = dropout.threshold(P)
SHRINK, ADD_PARTIALS = "_shrink_kernel", "_add_partials_kernel"
OUTPUT_PASS, INPUT_PASS = "_output_pass_kernel", "_input_pass_kernel"
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
def launches(monkeypatch) -> list[str]:
    """The names of the kernels that were launched."""
    found = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            found.append(self.name)
            return self.kernel[grid]

    for owner in (output_module, input_module, shrink_module, partial_sums):
        for name in [name for name in vars(owner) if name.endswith("_kernel")]:
            monkeypatch.setattr(owner, name, Counted(name, getattr(owner, name)))
    return found


@pytest.fixture
def fresh_settings() -> Iterator[None]:
    """Forget what launches of a shape are made of, before and after the test."""
    forget_tiles()
    yield
    forget_tiles()


@pytest.fixture
def passes(launches) -> Callable[[], list[str]]:
    """Return, and forget, the names of the kernels that read a wide operand."""

    def take():
        names = [name for name in launches if name != "_add_partials_kernel"]
        launches.clear()
        return names

    return take


def make_inputs(case, dtype=torch.float32, rank_dtype=None):
    m, k, n, r = case
    rank_dtype = rank_dtype or dtype
    dy, x = randn(m, n, dtype=dtype, scale=n**-0.5), randn(m, k, dtype=dtype)
    return dy, x, randn(m, r, dtype=rank_dtype), randn(n, r, dtype=rank_dtype)


def one_adapter_grads(dy, x, h, lora_b, mask, gain, threshold=0, **options):
    """Call the launcher with a group of one: matrices instead of lists and a stacked ``h``."""
    stacked = None if h is None else h[None]
    results = adapter_grads([dy], x, stacked, [lora_b], mask, [gain], threshold, **options)
    for tensors in results:
        assert tensors is None or len(tensors) == 1
    return [None if tensors is None else tensors[0] for tensors in results]


def make_group(m, k, ns, rank, dtype=torch.float32, b_dtype=None):
    """Siblings with out features of their own and one input."""
    dys = [randn(m, n, dtype=dtype, scale=n**-0.5) for n in ns]
    h = randn(len(ns), m, rank, dtype=dtype)
    lora_bs = [randn(n, rank, dtype=b_dtype or dtype) for n in ns]
    return dys, randn(m, k, dtype=dtype), h, lora_bs


def wide_product(left, right):
    """Multiply half-precision matrices, and do not round the fp32 sums, as torch does it.

    On a GPU by the tensor cores, which drop the lower bits at every step: after 1000 terms their
    sums are 5 to 10 times as far off as those of the same operands in fp32 (H200).
    """
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def check(grads, inputs, keep, rank_dtype, grad_dtype, gain=GAIN):
    """Compare with the definition on operands that were rounded to ``rank_dtype`` once.

    In wider gradients of half operands only dh, which is compared itself, is rounded to half: dA
    is compared with the product of the dh at hand.
    """
    operands = [tensor.to(rank_dtype) for tensor in inputs]
    native = reference.adapter_grads(*operands, keep, gain)
    exact = reference.adapter_grads(*doubles(*operands), keep, gain)
    if grad_dtype != rank_dtype:
        dy, x, h, _ = operands
        kept = x if keep is None else x * keep
        da, db = wide_product(grads[0].t(), kept), gain * wide_product(dy.t(), h)
        native = (native[0], da, db)
        exact = (exact[0], grads[0].t().double() @ kept.double(), exact[2])
    for name, *values in zip(("dh", "da", "db"), grads, native, exact, strict=True):
        assert_kernel_as_accurate(*values, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_as_accurate_as_torch(case, dtype):
    m, k, *_ = case
    inputs = make_inputs(case, dtype)
    mask, (keep,) = draw_masks("bits", 1, m, k)
    grads = one_adapter_grads(
        *inputs, mask, GAIN, THRESHOLD, rank_dtype=dtype, grad_dtype=dtype, **TILES
    )
    check(grads, inputs, keep, dtype, dtype)


@pytest.mark.parametrize(
    ("dtype", "rank", "expected"),
    [
        (torch.float32, 16, [OUTPUT_PASS, INPUT_PASS]),
        (torch.float32, 17, [SHRINK, INPUT_PASS, INPUT_PASS]),
        (torch.float16, 64, [OUTPUT_PASS, INPUT_PASS]),
        (torch.float16, 65, [SHRINK, INPUT_PASS, INPUT_PASS]),
    ],
    ids=["fp32-16", "fp32-17", "fp16-64", "fp16-65"],
)
def test_small_ranks_read_dy_once(dtype, rank, expected, passes):
    inputs = make_inputs((17, 24, 40, rank), dtype)
    one_adapter_grads(*inputs, None, GAIN, rank_dtype=dtype, grad_dtype=dtype)
    assert passes() == expected


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("splits", [1, 3, 9], ids=["one-split", "three", "more-than-blocks"])
def test_any_number_of_splits(splits, mask):
    inputs = make_inputs((33, 40, 72, 5))
    config = replace(SMALL, splits=splits)
    mask, (keep,) = draw_masks(mask, 1, 33, 40)
    grads = one_adapter_grads(
        *inputs, mask, GAIN, THRESHOLD, rank_dtype=torch.float32, grad_dtype=torch.float32,
        output_config=config, input_config=config,
    )  # fmt: skip
    check(grads, inputs, keep, torch.float32, torch.float32)


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_every_layout(layout, rank):
    dy, x, h, lora_b = make_inputs((33, 72, 40, rank))
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    bits, (keep,) = draw_masks("bits", 1, 33, 72)
    strided = layout(dy), layout(x), h, layout(lora_b)
    grads = one_adapter_grads(*strided, bits, GAIN, **options, **TILES)
    check(grads, (dy, x, h, lora_b), keep, **options)


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
def test_dy_may_be_expanded(rank):
    """The gradient of a sum is one number with both strides 0."""
    dy, *others = make_inputs((33, 72, 40, rank))
    inputs = (dy[:1, :1].expand(33, 40), *others)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    grads = one_adapter_grads(*inputs, None, GAIN, **options, **TILES)
    check(grads, inputs, None, **options)


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
def test_what_is_not_asked_for_is_left_out(rank, passes):
    dy, x, h, lora_b = make_inputs((33, 72, 40, rank))
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    exact = reference.adapter_grads(*doubles(dy, x, h, lora_b), None, GAIN)
    native = reference.adapter_grads(dy, x, h, lora_b, None, GAIN)

    dh, da, db = one_adapter_grads(dy, None, h, lora_b, None, GAIN, **options)
    assert da is None
    assert_kernel_as_accurate(dh, native[0], exact[0], "dh")
    assert_kernel_as_accurate(db, native[2], exact[2], "db")

    dh, da, db = one_adapter_grads(dy, x, None, lora_b, None, GAIN, **options)
    assert db is None
    assert_kernel_as_accurate(dh, native[0], exact[0], "dh")
    assert_kernel_as_accurate(da, native[1], exact[1], "da")

    passes()
    dh, da, db = one_adapter_grads(dy, None, h, lora_b, None, GAIN, need_dh=False, **options)
    assert dh.numel() == 0
    assert da is None
    assert_kernel_as_accurate(db, native[2], exact[2], "db")
    assert passes() == [INPUT_PASS]

    passes()
    dh, da, db = one_adapter_grads(dy, None, None, lora_b, None, GAIN, need_dh=False, **options)
    assert (dh.numel(), da, db, passes()) == (0, None, None, [])


def test_no_rows_give_zero_gradients_of_what_is_asked_for():
    dy, x, h, lora_b = make_inputs((0, 40, 24, 8))
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    dh, da, db = one_adapter_grads(dy, x, h, lora_b, None, GAIN, **options)
    assert dh.shape == (0, 8)
    assert torch.equal(da, torch.zeros(8, 40, device=DEVICE))
    assert torch.equal(db, torch.zeros(24, 8, device=DEVICE))
    _, da, db = one_adapter_grads(dy, None, None, lora_b, None, GAIN, **options)
    assert (da, db) == (None, None)


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("gain", [0.0, -2.0, 1 / 3])
def test_any_gain(gain, rank):
    inputs = make_inputs((33, 40, 24, rank))
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    grads = one_adapter_grads(*inputs, None, gain, **options, **TILES)
    check(grads, inputs, None, **options, gain=gain)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rank", [5, 70], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_under_autocast_gets_gradients_that_are_not_rounded_to_half(half, rank, mask):
    dy, x, h, _ = make_inputs((33, 72, 40, rank), half)
    inputs = (dy, x, h, randn(40, rank))
    mask, (keep,) = draw_masks(mask, 1, 33, 72)
    grads = one_adapter_grads(
        *inputs, mask, GAIN, THRESHOLD, rank_dtype=half, grad_dtype=torch.float32, **TILES
    )
    check(grads, inputs, keep, half, torch.float32)


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_on_a_half_base_computes_in_fp32(half, rank):
    inputs = make_inputs((33, 72, 40, rank), half, rank_dtype=torch.float32)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    grads = one_adapter_grads(*inputs, None, GAIN, **options, **TILES)
    check(grads, inputs, None, **options)


@pytest.mark.parametrize("rank", [5, 64])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_siblings_share_one_pass_over_x(dtype, mask, rank):
    """Different layouts of the results; M is split in three."""
    x, dh = randn(33, 40, dtype=dtype), randn(3, 33, rank, dtype=dtype)
    mask, keeps = draw_masks(mask, 3, 33, 40)
    outs = [x.new_full((rank, 40), float("nan")) for _ in range(2)]
    outs.append(x.new_full((40, rank), float("nan")).t())
    input_pass(
        x, dh, outs, mask, THRESHOLD, gain=GAIN, rank_dtype=dtype, config=replace(SMALL, splits=3)
    )
    for own_dh, out, keep in zip(dh, outs, keeps, strict=True):
        native, exact = (
            GAIN * tensors[1].t() @ (tensors[0] if keep is None else tensors[0] * keep)
            for tensors in ((x, own_dh), doubles(x, own_dh))
        )
        assert_kernel_as_accurate(out, native, exact)


# Out features of a group, each with its reason. Tiles are 16 x 32 and in two splits together.
GROUPS = [
    pytest.param((40,), id="one-sibling"),
    pytest.param((72, 24), id="two"),
    pytest.param((72, 7, 16), id="q-k-v-two-of-them-narrower-than-a-tile"),
    pytest.param((8, 72, 1, 17), id="four-the-largest-in-the-middle"),
]


def check_group(grads, group, keeps, gains, rank_dtype, grad_dtype):
    """Compare every sibling with the definition, as if it were alone."""
    dys, x, h, lora_bs = group
    assert [len(tensors) for tensors in grads] == [len(dys)] * 3
    siblings = zip(dys, h, lora_bs, keeps, gains, strict=True)
    for g, (dy, own_h, b, keep, gain) in enumerate(siblings):
        one = [tensors[g] for tensors in grads]
        check(one, (dy, x, own_h, b), keep, rank_dtype, grad_dtype, gain)


@pytest.mark.parametrize(
    ("rank", "mask"),
    [(5, "none"), (5, "bits"), (5, "seed"), (20, "seed")],
    ids=["one-pass-none", "one-pass-bits", "one-pass-seed", "two-passes-seed"],
)
@pytest.mark.parametrize("ns", GROUPS)
def test_siblings_get_what_each_would_get_alone(ns, rank, mask):
    group, fp32 = make_group(20, 24, ns, rank), torch.float32
    mask, keeps = draw_masks(mask, len(ns), 20, 24)
    dys, x, h, lora_bs = group
    gains = [GAIN, -0.5, 0.0, 1 / 3][: len(ns)]
    grads = adapter_grads(
        dys, x, h, lora_bs, mask, gains, THRESHOLD, rank_dtype=fp32, grad_dtype=fp32, **TILES
    )
    check_group(grads, group, keeps, gains, fp32, fp32)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("splits", [1, 8])
def test_siblings_under_autocast_in_any_number_of_splits(splits, half):
    ns, fp32 = (104, 24, 24), torch.float32
    group = make_group(20, 24, ns, 8, half, fp32)
    seed, keeps = draw_masks("seed", 3, 20, 24)
    dys, x, h, lora_bs = group
    config = replace(SMALL, splits=splits)
    grads = adapter_grads(
        dys, x, h, lora_bs, seed, [GAIN] * 3, THRESHOLD, rank_dtype=half, grad_dtype=fp32,
        output_config=config, input_config=config,
    )  # fmt: skip
    check_group(grads, group, keeps, [GAIN] * 3, half, fp32)


@pytest.mark.parametrize("ns", GROUPS)
def test_a_group_of_any_size_takes_four_launches(ns, launches):
    dys, x, h, lora_bs = make_group(17, 24, ns, 16)
    mask, _ = draw_masks("bits", len(ns), 17, 24)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    adapter_grads(dys, x, h, lora_bs, mask, [GAIN] * len(ns), **options)
    assert launches == [OUTPUT_PASS, ADD_PARTIALS, INPUT_PASS, ADD_PARTIALS]


@pytest.mark.parametrize(
    ("ns", "splits", "columns"),
    [
        pytest.param((4096,), 4, [1024], id="alone"),
        pytest.param((3584, 512, 512), 4, [1216, 512, 512], id="7B-three-of-four-for-q"),
        pytest.param((896, 128, 128), 2, [448, 128, 128], id="half-B-two-for-q"),
        pytest.param((12288, 12288), 4, [6144, 6144], id="gate-and-up-alike"),
        pytest.param((512, 512, 512), 1, [512, 512, 512], id="at-least-one-each"),
    ],
)
def test_splits_are_shared_out_in_proportion(ns, splits, columns):
    tile = TileConfig(256, 64, splits=splits)
    assert output_module._columns_per_split(ns, tile) == columns


@pytest.mark.parametrize("m", [1000, 8192, 100_000])
def test_splits_of_a_group_fill_the_device_once(m, monkeypatch, fresh_settings):
    """The siblings' splits are those of one projection as wide as all, and one each at least."""
    device = DeviceLimits("H200", 90, 232448, 132)
    monkeypatch.setattr(output_module, "device_limits", lambda _: device)
    monkeypatch.setattr(tile_config, "device_limits", lambda _: device)
    half, grids = torch.float16, []
    for ns in ((4608,), (3584, 512, 512)):
        grid, *_ = output_module._settings(
            None, torch.device("cuda"), half, half, half, m, ns, 16, True, "ieee"
        )
        grids.append(grid)
    (row_blocks, alone), (group_blocks, together) = grids
    assert group_blocks == row_blocks
    assert alone <= together <= alone + 2
    assert row_blocks * alone <= 1.5 * 132 or alone == 1


def test_no_rows_give_every_sibling_zero_gradients(launches):
    dys, x, h, lora_bs = make_group(0, 40, (24, 7), 8)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    dh, das, dbs = adapter_grads(dys, x, h, lora_bs, None, [GAIN, 1.0], **options)
    assert dh.shape == (2, 0, 8)
    assert all(torch.equal(da, torch.zeros(8, 40, device=DEVICE)) for da in das)
    for db, n in zip(dbs, (24, 7), strict=True):
        assert torch.equal(db, torch.zeros(n, 8, device=DEVICE))
    assert launches == []


def test_siblings_may_leave_gradients_out():
    group, fp32 = make_group(20, 24, (40, 24), 5), torch.float32
    dys, x, h, lora_bs = group
    options = {"rank_dtype": fp32, "grad_dtype": fp32}
    full = adapter_grads(dys, x, h, lora_bs, None, [GAIN] * 2, **options, **TILES)
    dh, das, dbs = adapter_grads(dys, None, h, lora_bs, None, [GAIN] * 2, **options, **TILES)
    assert das is None
    check_group((dh, full[1], dbs), group, [None] * 2, [GAIN] * 2, fp32, fp32)
    dh, das, dbs = adapter_grads(dys, x, None, lora_bs, None, [GAIN] * 2, **options, **TILES)
    assert dbs is None
    check_group((dh, das, full[2]), group, [None] * 2, [GAIN] * 2, fp32, fp32)
    dh, das, dbs = adapter_grads(
        dys, None, h, lora_bs, None, [GAIN] * 2, need_dh=False, **options, **TILES
    )
    assert (dh.shape, das) == ((2, 0, 5), None)
    check_group((full[0], full[1], dbs), group, [None] * 2, [GAIN] * 2, fp32, fp32)


def test_siblings_of_different_ranks_are_refused():
    dys, x, h, lora_bs = make_group(17, 24, (24, 8), 8)
    lora_bs[1] = lora_bs[1][:, :4]
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    with pytest.raises(AssertionError, match="siblings of different ranks"):
        adapter_grads(dys, x, h, lora_bs, None, [GAIN] * 2, **options)


def assert_equal(found, expected):
    for one, two in zip(found, expected, strict=True):
        assert len(one) == len(two)
        assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("ns", [(40,), (40, 23)], ids=["alone", "group"])
def test_contiguous_tensors_of_more_dimensions_are_matrices(ns, rank):
    dys, x, h, lora_bs = make_group(6, 24, ns, rank)
    mask, _ = draw_masks("bits", len(ns), 6, 24)
    gains, options = [GAIN, -0.5][: len(ns)], {"rank_dtype": x.dtype, "grad_dtype": x.dtype}
    expected = adapter_grads(dys, x, h, lora_bs, mask, gains, **options, **TILES)
    dys, x = [dy.view(2, 3, -1) for dy in dys], x.view(2, 3, 24)
    assert_equal(adapter_grads(dys, x, h, lora_bs, mask, gains, **options, **TILES), expected)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rank", [5, 20], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("ns", [(40,), (40, 23)], ids=["alone", "group"])
def test_what_is_prepared_once_takes_other_tensors_of_the_same_layout(ns, rank, mask):
    groups = [make_group(20, 24, ns, rank) for _ in range(2)]
    first, _ = draw_masks(mask, len(ns), 20, 24)
    masks, gains = [first, other_mask(first)], [GAIN, -0.5][: len(ns)]
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32, **TILES}
    dys, x, _, lora_bs = groups[0]
    run = prepare_adapter_grads(dys, x, lora_bs, mask, gains, THRESHOLD, **options)
    calls = [(*group[:3], one_mask) for group, one_mask in zip(groups, masks, strict=True)]
    found = [run(*call) for call in calls]  # both before either is looked at
    for (dys, x, h, one_mask), grads in zip(calls, found, strict=True):
        expected = adapter_grads(dys, x, h, lora_bs, one_mask, gains, THRESHOLD, **options)
        assert_equal(grads, expected)


def test_a_prepared_output_pass_takes_other_tensors_of_the_same_layout():
    groups = [make_group(20, 24, (40, 23), 5) for _ in range(2)]
    dys, _, _, lora_bs = groups[0]
    gains, options = [GAIN, -0.5], {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    run = prepare_output_pass(dys, lora_bs, gains, **options, config=SPLIT)
    found = [run(dys, h) for dys, _, h, _ in groups]
    for (dys, _, h, _), grads in zip(groups, found, strict=True):
        dh, _, dbs = adapter_grads(dys, None, h, lora_bs, None, gains, **options, **TILES)
        assert_equal(grads, (dh, dbs))


@pytest.mark.parametrize("mask", MASKS)
def test_a_prepared_input_pass_takes_other_tensors_of_the_same_layout(mask):
    """The results have strides of their own, and may be anywhere."""
    first, _ = draw_masks(mask, 2, 20, 24)
    calls = [
        (
            randn(20, 24),
            randn(2, 20, 5),
            one_mask,
            (randn(5, 24), randn(24, 5).t()),
        )
        for one_mask in (first, other_mask(first))
    ]
    options = {"gain": GAIN, "rank_dtype": torch.float32, "config": SPLIT}
    run = prepare_input_pass(
        calls[0][0], 5, [(24, 1), (1, 5)], mask, THRESHOLD, dh_dtype=torch.float32, **options
    )
    for call in calls:
        run(*call)
    for x, dh, one_mask, outs in calls:
        expected = [torch.full_like(out, float("nan")) for out in outs]
        input_pass(x, dh, expected, one_mask, THRESHOLD, **options)
        assert all(map(torch.equal, outs, expected))


def test_a_group_whose_partial_results_would_be_huge_is_taken_one_by_one(
    launches, monkeypatch, fresh_settings
):
    monkeypatch.setattr(
        output_module, "_MAX_PARTIAL_BYTES", 4 * 24 * 8
    )  # one row block of N = 24, R = 8
    group, half = make_group(20, 40, (24, 48, 16), 8, torch.float16), torch.float16
    dys, x, h, lora_bs = group
    options = {"rank_dtype": half, "grad_dtype": torch.float32}
    grads = adapter_grads(dys, x, h, lora_bs, None, [GAIN] * 3, **options)
    check_group(grads, group, [None] * 3, [GAIN] * 3, **options)
    own = [OUTPUT_PASS, ADD_PARTIALS]
    assert launches == [*own, SHRINK, INPUT_PASS, ADD_PARTIALS, *own, INPUT_PASS, ADD_PARTIALS]


@pytest.mark.parametrize("mask", ["bits", "seed"])
def test_a_group_gives_the_same_bits_every_time(mask):
    dys, x, h, lora_bs = make_group(20, 24, (70, 8, 8), 8, torch.float16)
    mask, _ = draw_masks(mask, 3, 20, 24)
    options = {"rank_dtype": torch.float16, "grad_dtype": torch.float32}
    runs = [
        adapter_grads(dys, x, h, lora_bs, mask, [GAIN] * 3, THRESHOLD, **options, **TILES)
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("rank", [5, 70], ids=["one-pass", "two-passes"])
def test_same_inputs_give_the_same_bits(rank):
    inputs = make_inputs((33, 40, 70, rank), torch.float16)
    seed, _ = draw_masks("seed", 1, 33, 40)
    options = {"rank_dtype": torch.float16, "grad_dtype": torch.float32}
    runs = [one_adapter_grads(*inputs, seed, GAIN, THRESHOLD, **options, **TILES) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tiles_cover_everything(dtype):
    inputs = make_inputs((130, 40, 70, 8), dtype)
    seed, (keep,) = draw_masks("seed", 1, 130, 40)
    options = {"rank_dtype": dtype, "grad_dtype": dtype}
    grads = one_adapter_grads(*inputs, seed, GAIN, THRESHOLD, **options)
    check(grads, inputs, keep, **options)


def test_a_batch_whose_partial_results_would_be_huge_takes_two_passes(
    passes, monkeypatch, fresh_settings
):
    monkeypatch.setattr(
        output_module, "_MAX_PARTIAL_BYTES", 4 * 24 * 8
    )  # one row block of N = 24, R = 8
    options = {"rank_dtype": torch.float16, "grad_dtype": torch.float32}
    b = randn(24, 8, dtype=torch.float16)
    for m, expected in ((20, [OUTPUT_PASS]), (300, [SHRINK, INPUT_PASS])):
        dy, h = randn(m, 24, dtype=torch.float16), randn(m, 8, dtype=torch.float16)
        passes()
        _, _, db = one_adapter_grads(dy, None, h, b, None, GAIN, **options)
        assert passes() == expected
        assert_kernel_as_accurate(
            db, GAIN * (dy.float().t() @ h.float()), GAIN * (dy.double().t() @ h.double())
        )


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rank", [5, 16, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tiles_are_as_accurate_as_torch_at_real_sizes(dtype, rank, mask):
    inputs = make_inputs((1000, 4096, 4096, rank), dtype)
    mask, (keep,) = draw_masks(mask, 1, 1000, 4096)
    options = {"rank_dtype": dtype, "grad_dtype": dtype}
    grads = one_adapter_grads(*inputs, mask, GAIN, THRESHOLD, **options)
    check(grads, inputs, keep, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_siblings_are_as_accurate_as_torch_at_real_sizes(dtype, mask):
    ns = (3584, 512, 512)  # q, k and v of Qwen2.5-7B
    group = make_group(1000, 3584, ns, 16, dtype)
    mask, keeps = draw_masks(mask, 3, 1000, 3584)
    dys, x, h, lora_bs = group
    options = {"rank_dtype": dtype, "grad_dtype": dtype}
    grads = adapter_grads(dys, x, h, lora_bs, mask, [GAIN] * 3, THRESHOLD, **options)
    check_group(grads, group, keeps, [GAIN] * 3, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("half", HALVES)
def test_fp32_adapter_at_real_sizes(half):
    dy, x, h, _ = make_inputs((1000, 4096, 4096, 16), half)
    inputs = (dy, x, h, randn(4096, 16))
    options = {"rank_dtype": half, "grad_dtype": torch.float32}
    check(one_adapter_grads(*inputs, None, GAIN, **options), inputs, None, **options)
    inputs = make_inputs((1000, 4096, 4096, 16), half, rank_dtype=torch.float32)
    options = {"rank_dtype": torch.float32, "grad_dtype": torch.float32}
    check(one_adapter_grads(*inputs, None, GAIN, **options), inputs, None, **options)
