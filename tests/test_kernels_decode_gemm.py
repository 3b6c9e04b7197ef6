"""The decode GEMM, and a step that generates by it; interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, HALVES, assert_kernel_as_accurate, padded_rows, randn
from segment_cases import NONE, Case, watch_fused
from served import Captured, Rows, Served, in_turns, path_of
from serving_session import TINY
from test_kernels_segmented_gemm import Batch
from torch.nn import functional

import fastlora
from fastlora import plans, segmented_ops
from fastlora.adapters.groups import Reach
from fastlora.bench.shapes import MODELS
from fastlora.kernels import segmented_shrink
from fastlora.kernels.decode_gemm import decode_gemm, prepare_decode_gemm
from fastlora.kernels.tile_config import DeviceLimits, TileConfig, default_tile
from fastlora.segments import Segments

FP16 = torch.float16
# Blocks of 16 rows and 32 columns; K of 40 takes two steps and a half.
TILE = TileConfig(16, 32, 16)
ROWS = (1, 3, 16, 17, 40, 70)
NS = {"one": (40,), "grouped-query": (40, 24, 24), "four": (8, 72, 33, 1), "narrow": (1,)}
SLOTS = (2, 0, 1, 3, 1, 1)


class Product:
    """The operands of frozen products, and what comes of them by the definition."""

    def __init__(self, rows, ns, k=40, dtype=FP16, has_bias=True):
        self.x = randn(rows, k, dtype=dtype)
        self.weights = [randn(n, k, dtype=dtype, scale=k**-0.5) for n in ns]
        # Some siblings have a bias and some do not, as Qwen2.5's q, k, v and o.
        self.biases = [
            randn(n, dtype=dtype) if has_bias and i != 1 else None for i, n in enumerate(ns)
        ]

    @property
    def operands(self):
        return self.x, self.weights, self.biases

    def by_definition(self, dtype):
        biases = [None if bias is None else bias.to(dtype) for bias in self.biases]
        weights = [weight.to(dtype) for weight in self.weights]
        return list(map(partial(functional.linear, self.x.to(dtype)), weights, biases))

    def check(self, ys):
        native, exact = self.by_definition(self.x.dtype), self.by_definition(torch.float64)
        for s, results in enumerate(zip(ys, native, exact, strict=True)):
            assert_kernel_as_accurate(*results, name=f"y {s}")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("ns", NS.values(), ids=NS)
def test_kernel_is_as_accurate_as_torch(ns, rows, dtype):
    product = Product(rows, ns, dtype=dtype)
    product.check(decode_gemm(*product.operands, config=TILE))


@pytest.mark.parametrize("k", [1, 39, 64])
@pytest.mark.parametrize("has_bias", [True, False])
def test_default_tile_covers_everything(k, has_bias):
    product = Product(18, (72, 24), k=k, has_bias=has_bias)
    product.check(decode_gemm(*product.operands))


def test_no_rows_are_no_launch():
    product = Product(0, NS["grouped-query"])
    assert [y.shape for y in decode_gemm(*product.operands)] == [(0, n) for n in (40, 24, 24)]


def test_operands_of_any_strides():
    product = Product(17, (40, 24))
    product.x = padded_rows(product.x)
    product.weights = [product.weights[0].t().contiguous().t(), padded_rows(product.weights[1])]
    product.check(decode_gemm(*product.operands, config=TILE))
    product.x = randn(2, 9, 40, dtype=FP16)
    ys = decode_gemm(*product.operands, config=TILE)
    product.x = product.x.view(18, 40)
    product.check(ys)


def test_a_prepared_launch_is_right_for_other_tensors():
    first, other = Product(17, NS["four"]), Product(17, NS["four"])
    run = prepare_decode_gemm(*first.operands, config=TILE)
    for product in (first, other, first):
        product.check(run(*product.operands))


def test_a_row_has_the_same_bits_wherever_it_stands():
    product = Product(40, (72, 24))
    ys = decode_gemm(*product.operands, config=TILE)
    order = torch.randperm(40)
    product.x = product.x[order.to(DEVICE)]
    for y, moved in zip(ys, decode_gemm(*product.operands, config=TILE), strict=True):
        assert torch.equal(y[order.to(DEVICE)], moved)


def test_a_row_that_diverged_stays_alone():
    product = Product(18, (40,))
    product.x[3, 5] = float("nan")
    (y,) = decode_gemm(*product.operands, config=TILE)
    assert y[3].isnan().all()
    assert not torch.cat([y[:3], y[4:]]).isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"biases": [None]}, "1 biases"),
        ({"weights": [torch.zeros(8, 40)] * 2}, "different dtypes"),
        ({"x": torch.zeros(2, 40), "weights": [torch.zeros(8, 40)] * 2}, "not half precision"),
        ({"weights": [torch.zeros(8, 40, dtype=FP16)] * 5, "biases": [None] * 5}, "at most 4"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    named = {"x": torch.zeros(2, 40, dtype=FP16)}
    named |= {"weights": [torch.zeros(8, 40, dtype=FP16)] * 2, "biases": [None] * 2}
    with pytest.raises(AssertionError, match=message):
        decode_gemm(**named | change)


H200 = DeviceLimits("H200", capability=90, shared_bytes=232448, processors=132)


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 64, 100])
@pytest.mark.parametrize(("n", "programs"), [(3584, 1), (37888, 3)])
def test_tiles_fill_the_memory_of_a_processor(rows, n, programs):
    """With one program where there are few columns, and with three where there are many."""
    tile = default_tile("decode_gemm", H200, FP16, rows, n, 3584, 1)
    assert tile.block_m == min(64, max(16, 1 << (rows - 1).bit_length()))
    stages = 2 * (tile.block_m + tile.block_n) * tile.block_k * tile.num_stages
    assert 0.6 * H200.shared_bytes <= programs * stages <= H200.shared_bytes


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("capability", [80, 90])
def test_a_shrink_is_launched_early_beside_a_product_alone(monkeypatch, beside, capability):
    limits = replace(H200, capability=capability)
    early = capability == 90
    monkeypatch.setattr(segmented_shrink, "device_limits", lambda device: limits)
    monkeypatch.setattr(segmented_shrink, "starts_early", lambda limits: early)
    shape = (64, 3584, 3, 16, 16, 64, True, "ieee", beside)
    *_, constants = segmented_shrink._settings.__wrapped__(None, DEVICE, FP16, *shape)
    assert constants["BESIDE"] is (beside and early)
    assert constants.get("launch_pdl", False) is (beside and early)


# A step: the product, the shrink beside it, and the expand.

BATCH = Case(SLOTS * 3, (NONE, (5, 5, 5), (16, 8, 1), (0, 16, 3)), ns=(40, 24, 24))


@pytest.fixture
def fused():
    with fastlora.backend("fused"), torch.no_grad():
        yield


def operands_of(batch, slots):
    segments = Segments.of_slots(slots, table=len(batch.case.ranks), device=DEVICE)
    return batch.x, batch.weights, batch.biases, batch.arena, batch.descriptors, segments


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_step_is_as_accurate_as_torch(has_bias):
    """And what is prepared for one layer is right for the next."""
    for slots in (SLOTS * 3, (0,) * 18, (1,) * 18):
        batch = Batch(replace(BATCH, slots=slots, has_bias=has_bias))
        ys = segmented_ops.linears_with_adapters(*operands_of(batch, slots), max_rank=16)
        batch.check(ys)


@pytest.mark.usefixtures("fused")
def test_rows_without_an_adapter_have_every_bit_of_the_frozen_product():
    batch = Batch(BATCH)
    ys = segmented_ops.linears_with_adapters(*operands_of(batch, batch.slots), max_rank=16)
    alone = decode_gemm(batch.x, batch.weights, batch.biases)
    for s, (y, frozen) in enumerate(zip(ys, alone, strict=True)):
        lacking = [t for t, slot in enumerate(batch.slots) if batch.adapters[slot][s] is None]
        assert lacking
        assert torch.equal(y[lacking], frozen[lacking])
        assert not torch.equal(y, frozen)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(slots=st.lists(st.integers(0, 3), min_size=1, max_size=20), r=st.integers(0, 24))
@pytest.mark.usefixtures("fused")
def test_any_mix_of_adapters(slots, r):
    case = Case(tuple(slots), (NONE, (5, 5, 5), (r, 8, 1), (0, 16, 3)), ns=(40, 24, 24))
    batch = Batch(replace(case, max_rank=32))
    batch.check(segmented_ops.linears_with_adapters(*operands_of(batch, slots), max_rank=32))


def fuses(rows, bias=None, n=16, **named):
    x, weight = torch.zeros(rows, 40, dtype=FP16, device=DEVICE), randn(n, 40, dtype=FP16)
    return segmented_ops.fuses_linears(x, [weight], [bias], weight, 16, **named)


@pytest.fixture
def forgetful():
    yield
    plans._decided.cache_clear()


@pytest.mark.usefixtures("fused", "forgetful")
def test_more_rows_than_a_step_has_are_for_torch(monkeypatch):
    most, least = segmented_ops.DECODE_GEMM_ROWS, segmented_ops.PREFILL_ROWS
    found = [fuses(rows) for rows in (1, most, most + 1, least - 1, least)]
    assert found == [True, True, False, False, True]
    # Without adapters a prefill is torch's, and rows that are none are always.
    assert not fuses(least, has_adapters=False)
    assert [fuses(rows, has_adapters=False) for rows in (0, 1, most)] == [False, True, True]
    device = torch.zeros(1, device=DEVICE).device  # with its number
    monkeypatch.setitem(plans._segmented, (plans.DECODE_GEMM, device), "it is wrong")
    plans._decided.cache_clear()
    assert [fuses(1), fuses(least)] == [False, True]


def test_a_cpu_is_not_asked_for_every_layer(monkeypatch):
    monkeypatch.setattr(plans, "interpreting", lambda: False)
    # Of a weight at a time, far into the question.
    monkeypatch.setattr(segmented_ops, "are_aligned", lambda *_: pytest.fail("it was asked"))
    cpu = torch.device("cpu")
    model = Served(TINY, cpu, torch.float32, [(2, 8)])
    slots = model.load("adapter", 2, 8)
    inputs, rows = model.inputs(4), Rows(4, model.pool)
    rows.tell(in_turns(slots, 4))
    assert len(model.step(inputs, None, rows, rows)()) == 7


@pytest.mark.usefixtures("fused")
def test_biases_that_are_no_plain_vectors_are_for_torch():
    bias = randn(32, dtype=FP16)
    assert fuses(4, bias[:16])
    assert not fuses(4, bias[::2])
    assert not fuses(4, bias[:1].expand(16))
    assert not fuses(4, bias[:16].float())


@pytest.mark.usefixtures("fused")
def test_linears_of_a_model_take_it(monkeypatch):
    calls = watch_fused(monkeypatch)
    model = Served(TINY, DEVICE, FP16, [(3, 8)])
    slots = model.load("adapter", 3, 8)
    for count in (4, 20):
        inputs, rows = model.inputs(count), Rows(count, model.pool)
        requests = in_turns([*slots, 0], count)
        rows.tell(requests)
        assert model.check(model.step(inputs, None, rows, rows)(), inputs, requests) <= 1
    # q, k, v; o; gate, up; down: all siblings at once.
    assert [len(ys) for ys in calls] == [3, 1, 2, 1] * 2


@pytest.mark.usefixtures("fused")
def test_groups_that_no_adapter_has_targeted_have_the_product_alone(monkeypatch):
    calls, shrinks = watch_fused(monkeypatch), []
    with_them = segmented_ops.linears_with_adapters
    monkeypatch.setattr(
        segmented_ops,
        "linears_with_adapters",
        lambda *args, **named: shrinks.append(len(args[1])) or with_them(*args, **named),
    )
    model = Served(TINY, DEVICE, FP16, [(2, 8)])
    slots = model.load("adapter", 2, 8)
    first = {names: groups[0].first for names, groups in model.groups.items()}
    q_k_v = ("q_proj", "k_proj", "v_proj")
    model.pool.reach = Reach(16, frozenset({first[q_k_v]}))
    inputs, rows = model.inputs(5), Rows(5, model.pool)
    rows.tell(in_turns(slots, 5))
    ys = dict(zip(model.model.linears, model.step(inputs, None, rows, rows)(), strict=True))
    by_input = dict(zip(GROUPS.values(), inputs, strict=True))
    assert shrinks == [3]
    assert [len(found) for found in calls] == [3, 1, 2, 1]
    for names, x in by_input.items():
        parts = [model.module.get_submodule(path_of(0, name)) for name in names]
        alone = decode_gemm(x, [part.weight for part in parts], [part.bias for part in parts])
        for name, frozen in zip(names, alone, strict=True):
            assert torch.equal(ys[name], frozen) is (names != q_k_v), name


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("overlaps", [True, False])
def test_the_shrink_is_told_of_the_product_before_it(monkeypatch, overlaps):
    told = []
    prepare = segmented_shrink.prepare_segmented_shrink

    def watched(*args, **named):
        told.append(named["beside"])
        return prepare(*args, **named)

    monkeypatch.setattr(segmented_ops, "OVERLAPS", overlaps)
    monkeypatch.setattr(segmented_ops._launchers(), "shrink", watched)
    monkeypatch.setattr(segmented_ops, "_shrinks", {})
    batch = Batch(BATCH)
    operands = operands_of(batch, batch.slots)
    batch.check(segmented_ops.linears_with_adapters(*operands, max_rank=16))
    ys = [y.clone() for y in decode_gemm(batch.x, batch.weights, batch.biases)]
    x, _, _, *rest = operands
    segmented_ops.add_adapters(ys, x, *rest, max_rank=16, adapters=None)
    batch.check(ys)
    # After anything else the shrink waits.
    assert told == ([True, False] if overlaps else [False])


# Real sizes.

GROUPS = {
    "q, k, v of 7B": ("q_proj", "k_proj", "v_proj"),
    "o of 7B": ("o_proj",),
    "gate, up of 7B": ("gate_proj", "up_proj"),
    "down of 7B": ("down_proj",),
}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5, 16, 32, 64])
@pytest.mark.parametrize("names", GROUPS.values(), ids=GROUPS)
def test_real_sizes_in_a_graph(names, rows, monkeypatch):
    """Captured without any adapter, and as often as it takes: nothing is read before its time.

    Without the fixture that fills memory: what it launches would wait.
    """
    monkeypatch.undo()
    plans.forget_measurements()
    linears = [MODELS["Qwen2.5-7B"].linears[name] for name in names]
    k, ns, siblings = linears[0].k, tuple(one.n for one in linears), len(names)
    ranks = (0, 16, 8, 64, 256)
    batch = Batch(Case((), tuple((r,) * siblings for r in ranks), k, ns, 256), torch.bfloat16)
    batch.x = randn(rows, k, dtype=torch.bfloat16)
    segments = Segments.of_slots([0] * rows, table=5, device=DEVICE)
    operands = batch.x, batch.weights, batch.biases, batch.arena, batch.descriptors, segments

    def step():
        # x is written by the launch before, and y read by the one after.
        x = operands[0] * 1.0
        ys = segmented_ops.linears_with_adapters(x, *operands[1:], max_rank=256)
        return [y * 1.0 for y in ys]

    with torch.no_grad():
        beside = Captured(step, DEVICE, None)
        with mock.patch.object(segmented_ops, "OVERLAPS", False):
            in_turn = Captured(step, DEVICE, None)
    for slots in ([1] * rows, [t % 5 for t in range(rows)], [0] * rows):
        told = Segments.of_slots(slots, table=5, device=DEVICE)
        for name in ("slots", "order", "tiles"):
            getattr(segments, name).copy_(getattr(told, name))
        for _ in range(20):
            batch.x.normal_()
            for captured in (in_turn, beside):
                captured.replay()
            assert all(map(torch.equal, beside.outputs, in_turn.outputs))
        batch.slots = slots
        batch.check(beside.outputs)
