"""The segmented GEMM against a loop over the adapters; interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import serving
import torch
from accuracy import assert_as_accurate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, HALVES, assert_kernel_as_accurate, padded_rows, randn
from segment_cases import (
    NONE,
    PAGE,
    Case,
    Segments,
    apply_adapters,
    make_adapters,
    make_segments,
    store,
    watch_fused,
)
from served import Captured, Served, runs_of
from torch.nn import functional

import fastlora
from fastlora import plans, segmented_ops
from fastlora.bench.shapes import MODELS
from fastlora.kernels.segmented_gemm import prepare_segmented_gemm, segmented_gemm
from fastlora.kernels.segmented_shrink import segmented_shrink
from fastlora.kernels.tile_config import TileConfig
from fastlora.segments import Segments as RealSegments

FP16 = torch.float16
EPS = torch.finfo(FP16).eps
# Blocks of 16 rows; 40 columns are two tiles of two pieces.
TILE = TileConfig(16, 32, 16, parts=2)
FOUR = TileConfig(16, 64, 16, parts=4)
SHRINK = TileConfig(16, 16, 16, splits=2)  # two planes of h
# By blocks of 16 rows: one adapter, two, two and none, none, one and none.
RUNS = (1,) * 20 + (3,) * 20 + (0,) * 24 + (2,) * 3
MIXED = (2, 0, 1, 3, 1, 1) * 3
FOUR_RANKS = ((0,), (1,), (5,), (16,))
GROUP = Case(RUNS, (NONE, (5, 5, 5), (16, 8, 1), (0, 16, 3)), ns=(40, 24, 24))
CASES = [
    pytest.param(Case((1,), ((0,), (8,))), id="one-row"),
    pytest.param(Case((), ((0,), (8,))), id="no-rows"),
    pytest.param(Case((0,) * 20, ((0,), (8,))), id="no-adapter-at-all"),
    pytest.param(Case((1,) * 32, ((0,), (8,))), id="one-adapter"),
    pytest.param(Case((3,) * 32, FOUR_RANKS, has_bias=False), id="one-adapter-scaled-up-no-bias"),
    pytest.param(Case((1,) * 18, ((0,), (8,))), id="one-adapter-ragged-block"),
    pytest.param(Case(tuple(range(16, 0, -1)), ((0,), *((8,),) * 16)), id="every-row-its-own"),
    pytest.param(Case(RUNS, FOUR_RANKS), id="long-runs"),
    pytest.param(Case(MIXED, FOUR_RANKS), id="mixed-ranks"),
    pytest.param(Case(MIXED, FOUR_RANKS, k=39, ns=(33,)), id="odd-columns"),
    pytest.param(Case(MIXED, FOUR_RANKS, k=1, ns=(1,)), id="one-column"),
    pytest.param(Case(RUNS, ((0,), (24,), (0,), (64,)), max_rank=64), id="rank-64"),
    pytest.param(Case(RUNS, ((0,), (256,), (70,), (129,)), max_rank=256), id="rank-256"),
    pytest.param(Case(MIXED, ((0, 0), (8, 3), (1, 8), (5, 0)), ns=(40, 40)), id="two-siblings"),
    pytest.param(GROUP, id="grouped-query-siblings"),
    pytest.param(replace(GROUP, slots=MIXED, k=39, ns=(39, 23, 9)), id="siblings-odd-columns"),
]


class Batch:
    """The operands of a case, and what comes of them by the definition."""

    def __init__(self, case, dtype=FP16):
        self.case, self.slots, self.dtype = case, list(case.slots), dtype
        self.adapters = make_adapters(case.ranks, case.k, case.ns, dtype)
        self.arena, self.descriptors = store(self.adapters, dtype)
        self.x = randn(len(self.slots), case.k, dtype=dtype)
        self.weights = [randn(n, case.k, dtype=dtype, scale=case.k**-0.5) for n in case.ns]
        self.biases = [randn(n, dtype=dtype) if case.has_bias else None for n in case.ns]

    @property
    def segments(self):
        return make_segments(self.slots, 16)

    def shrink(self, config=SHRINK):
        operands = self.arena, self.descriptors, self.segments
        return segmented_shrink(self.x, *operands, max_rank=self.case.max_rank, config=config)

    def operands(self, **changes):
        named = {"x": self.x, "weights": self.weights, "biases": self.biases}
        named |= {"arena": self.arena, "descriptors": self.descriptors, "segments": self.segments}
        return named | changes | ({} if "h" in changes else {"h": self.shrink()})

    def apply(self, config=TILE, **changes):
        return segmented_gemm(**self.operands(**changes), config=config)

    def by_definition(self, dtype):
        """Return the outputs by PyTorch in a dtype."""
        x, weights = self.x.to(dtype), [weight.to(dtype) for weight in self.weights]
        biases = [None if bias is None else bias.to(dtype) for bias in self.biases]
        ys = [functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        return apply_adapters(x, ys, self.adapters, self.slots)[1]

    def check(self, ys):
        native, exact = self.by_definition(self.dtype), self.by_definition(torch.float64)
        for s, results in enumerate(zip(ys, native, exact, strict=True)):
            assert_kernel_as_accurate(*results, name=f"y {s}")


def assert_alike(ys, others, rows=slice(None)):
    """Compare results that may be rounded once to either side."""
    for y, other in zip(ys, others, strict=True):
        difference = (y.double() - other.double())[rows].norm()
        assert difference <= EPS * other.double()[rows].norm()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_as_accurate_as_torch(case, dtype):
    batch = Batch(case, dtype)
    batch.check(batch.apply())


def test_four_pieces_of_a_tile_are_in_order():
    batch = Batch(replace(GROUP, ns=(72, 64, 8)))
    batch.check(batch.apply(FOUR))


# Both sides of a block; k is split, so that h has two planes.
@pytest.mark.parametrize(("rows", "k"), [(1, 40), (128, 1100), (257, 40)])
def test_default_tile_covers_everything(rows, k):
    slots = (1,) * (rows - min(rows, 18)) + MIXED[: min(rows, 18)]
    batch = Batch(replace(GROUP, slots=slots, k=k, ns=(264, 24, 24)))
    h = batch.shrink(replace(SHRINK, block_k=16 if k < 128 else 128))
    assert len(h) == SHRINK.splits
    batch.check(batch.apply(None, h=h))


@pytest.mark.parametrize("slots", [RUNS, MIXED])
def test_rows_without_an_adapter_have_every_bit_of_the_frozen_product(slots):
    """Whatever the others have; an adapter that lacks a layer is none to it."""
    batch = Batch(replace(GROUP, slots=slots))
    ys = batch.apply()
    lacking = [
        [row for row, slot in enumerate(slots) if batch.adapters[slot][s] is None] for s in range(3)
    ]
    batch.slots = [0] * len(slots)
    for y, bare, rows in zip(ys, batch.apply(), lacking, strict=True):
        assert torch.equal(y[rows], bare[rows])
    assert len(lacking[0]) > len(lacking[1]) > 0


@pytest.mark.parametrize("slots", [(3,) * 16, RUNS, MIXED])
def test_h_is_read_up_to_an_adapter_s_rank_alone(slots):
    batch = Batch(replace(GROUP, slots=slots))
    h = batch.shrink()
    assert h.isnan().any()
    ys = batch.apply(h=h)
    assert not any(y.isnan().any() for y in ys)
    for filler in (0.0, float("inf"), 1e30):
        filled = torch.where(h.isnan(), filler, h)
        assert all(map(torch.equal, ys, batch.apply(h=filled)))


def test_permuting_the_rows_permutes_the_results():
    batch = Batch(replace(GROUP, slots=RUNS))
    ys = batch.apply()
    order = torch.randperm(len(RUNS))
    batch.slots = [batch.slots[row] for row in order]
    order = order.to(DEVICE)
    batch.x = batch.x[order]
    assert_alike(batch.apply(), [y[order] for y in ys])


@pytest.mark.parametrize("slots", [RUNS, MIXED])
def test_equals_a_loop_over_the_adapters(slots):
    """Each of which computes all rows, of which its own are taken."""
    batch = Batch(replace(GROUP, slots=slots))
    ys = batch.apply()
    for slot in set(slots):
        batch.slots = [slot] * len(slots)
        rows = torch.tensor([row for row, own in enumerate(slots) if own == slot], device=DEVICE)
        assert_alike(ys, batch.apply(), rows)


def test_same_inputs_give_the_same_bits():
    batch = Batch(GROUP)
    assert all(map(torch.equal, batch.apply(), batch.apply()))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, as the interpreter
@pytest.mark.parametrize("slots", [RUNS, MIXED])
def test_what_an_adapter_ruins_is_its_own(slots):
    """NaN in both matrices of one adapter, and in the row of another."""
    batch = Batch(replace(GROUP, slots=slots))
    expected = batch.apply()
    rank = GROUP.ranks[2][1]
    for matrix, columns in enumerate((GROUP.k, GROUP.ns[1])):
        first = batch.descriptors[1, 2, matrix].item() * PAGE
        batch.arena[first : first + rank * columns] = float("nan")
    batch.x[4] = float("inf")
    found = batch.apply()
    for s in range(3):
        bad = torch.tensor([row == 4 or (s == 1 and slot == 2) for row, slot in enumerate(slots)])
        assert not found[s][bad].isfinite().any()
        assert torch.equal(found[s][~bad], expected[s][~bad])


@pytest.mark.parametrize("slots", [(1,) * 32, (1, 2) * 16])
def test_a_large_scaling_does_not_leave_the_range_of_fp16(slots):
    """``h`` is in the thousands and the scaling 64; B makes little of it again."""
    batch = Batch(Case(slots, ((0,), (4,), (4,))))
    batch.adapters = [
        [None if one is None else one._replace(a=2000 * one.a, b=1e-3 * one.b, scaling=64.0)]
        for (one,) in batch.adapters
    ]
    batch.arena, batch.descriptors = store(batch.adapters, FP16)
    (y,), exact = batch.apply(), batch.by_definition(torch.float64)[0]
    assert (64 * batch.shrink().nan_to_num().sum(0)).max() > torch.finfo(FP16).max
    # PyTorch's own loses the bits that the small B has not: fp32's are the measure.
    native = batch.by_definition(torch.float32)[0].to(FP16)
    assert_kernel_as_accurate(y, native, exact)


@pytest.mark.parametrize("slots", [(1,) * 32, (1, 2, 1, 0) * 8])
@pytest.mark.parametrize("dtype", HALVES if DEVICE.type == "cuda" else HALVES[:1])
def test_h_keeps_more_bits_than_the_adapters_have(slots, dtype):
    """Rounding h to their dtype would round half of the terms to a neighbour of what is right.

    Triton's interpreter cuts results off that are bf16.
    """
    batch = Batch(replace(GROUP, slots=slots, has_bias=False), dtype)
    for weight in batch.weights:
        weight.zero_()
    for y, exact in zip(batch.apply(), batch.by_definition(torch.float64), strict=True):
        assert (y == exact.to(dtype)).double().mean() > 0.95


@pytest.mark.parametrize("planes", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("slots", [(1,) * 16, (1, 1, 2) * 6])
def test_all_planes_are_added_and_no_others(planes, slots):
    batch = Batch(replace(GROUP, ranks=(NONE, (16, 16, 16), NONE), slots=slots))
    room = torch.full((planes + 8, 3, len(slots), 16), float("nan"), device=DEVICE)
    h = room[:planes]
    h.copy_(randn(*h.shape))
    own = torch.tensor([slot == 1 for slot in slots], device=DEVICE)[:, None]
    frozen = [functional.linear(batch.x.double(), w.double()) for w in batch.weights]
    for s, y in enumerate(batch.apply(h=h)):
        _, b, scaling = batch.adapters[1][s]
        term = scaling * (h[:, s].double().sum(0) @ b.double())
        exact = frozen[s] + batch.biases[s].double() + torch.where(own, term, 0.0)
        assert_as_accurate(y, exact.to(FP16), exact)


def test_takes_rows_of_wider_tensors_and_more_dimensions():
    batch = Batch(GROUP)
    ys = batch.apply()
    assert all(map(torch.equal, batch.apply(x=padded_rows(batch.x)), ys))
    strided = [padded_rows(weight) for weight in batch.weights]
    assert all(map(torch.equal, batch.apply(weights=strided), ys))
    batch = Batch(replace(GROUP, slots=MIXED))
    ys, h = batch.apply(), batch.shrink()
    assert all(map(torch.equal, batch.apply(x=batch.x.view(3, 6, -1), h=h), ys))


def test_a_captured_launch_serves_every_later_batch():
    """As in a CUDA graph: prepared with no adapter at all, then the same addresses rewritten."""
    first = Batch(replace(GROUP, slots=(0,) * len(RUNS)))
    slots = first.segments.slots
    segments = Segments(slots, slots[:0], slots[:0].view(4, 0), 16)
    run = prepare_segmented_gemm(**first.operands(), config=TILE)
    names = ("x", "weights", "biases", "h", "arena", "descriptors", "segments")
    frozen = first.operands(segments=segments)
    first.check(run(*(frozen[name] for name in names)))
    everyone = (NONE, (16, 16, 16), (3, 0, 8), (8, 1, 0))
    shuffled = (MIXED * 4)[: len(RUNS)]
    for of_rows, ranks in [(RUNS, everyone), ((3,) * len(RUNS), GROUP.ranks), (shuffled, everyone)]:
        # Another layer's weights, too.
        batch = Batch(replace(GROUP, slots=of_rows, ranks=ranks))
        operands = batch.operands(segments=segments, descriptors=first.descriptors)
        slots.copy_(batch.segments.slots)
        first.descriptors.copy_(batch.descriptors)
        batch.check(run(*(operands[name] for name in names)))


def test_what_disagrees_is_refused():
    batch = Batch(GROUP)
    with pytest.raises(AssertionError, match=r"operands of different dtypes"):
        batch.apply(x=batch.x.float())
    with pytest.raises(AssertionError, match="5 rows of x and 67 of h"):
        batch.apply(x=batch.x[:5])
    with pytest.raises(AssertionError, match="siblings of weights, biases, h and descriptors"):
        batch.apply(weights=batch.weights[:2])
    with pytest.raises(AssertionError, match=r"torch.float32 is not half precision"):
        Batch(GROUP, torch.float32).apply()
    h = torch.zeros(1, 5, len(RUNS), 16, device=DEVICE)
    five = {"weights": batch.weights[:1] * 5, "biases": [None] * 5, "h": h}
    with pytest.raises(AssertionError, match="5 siblings, at most 4"):
        batch.apply(**five, descriptors=batch.descriptors[:1].expand(5, -1, -1))


RANK = st.sampled_from([0, 1, 5, 8, 16, 24, 31])


@st.composite
def batches(draw):
    siblings = draw(st.integers(1, 3))
    adapters = draw(st.integers(1, 4))
    ranks = [(0,) * siblings]
    ranks += [tuple(draw(RANK) for _ in range(siblings)) for _ in range(adapters)]
    if not any(map(any, ranks)):
        ranks[-1] = (1,) * siblings
    runs = draw(st.lists(st.tuples(st.integers(0, adapters), st.integers(1, 20)), max_size=5))
    slots = tuple(slot for slot, rows in runs for _ in range(rows))
    width = st.integers(1, 40)
    ns = tuple(draw(width) for _ in range(siblings))
    return Case(slots, tuple(ranks), draw(width), ns, 32, draw(st.booleans()))


@given(case=batches())
@settings(
    max_examples=20,
    deadline=None,
    # It fills what is allocated with NaN, for every example alike.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_mix_of_adapters(case):
    batch = Batch(case)
    batch.check(batch.apply())


# The operator, and the linears of a model.


@pytest.fixture
def fused(monkeypatch):
    """Let prefills be fused, from three rows on."""
    monkeypatch.setattr(segmented_ops, "PREFILL_ROWS", 3)
    monkeypatch.setattr(segmented_ops, "DECODE_GEMM_ROWS", 0)
    with fastlora.backend("fused"), torch.no_grad():
        yield


@pytest.mark.usefixtures("fused")
def test_a_prepared_operator_is_right_for_every_layer():
    for slots in (RUNS, (MIXED * 4)[: len(RUNS)]):
        batch = Batch(replace(GROUP, slots=slots))
        segments = RealSegments.of_slots(slots, table=4, device=DEVICE)
        operands = batch.x, batch.weights, batch.biases, batch.arena, batch.descriptors, segments
        batch.check(segmented_ops.linears_with_adapters(*operands, max_rank=16))


@pytest.mark.usefixtures("fused")
def test_what_is_not_a_prefill_of_plain_halves_is_not_fused(monkeypatch):
    batch = Batch(GROUP)

    def fuses(x=batch.x, weights=batch.weights, arena=batch.arena):
        biases = [None] * len(weights)
        return segmented_ops.fuses_linears(x, weights, biases, arena, 16)

    assert fuses()
    assert not fuses(x=batch.x[:2])
    wide = batch.x.float(), [w.float() for w in batch.weights], batch.arena.float()
    assert not fuses(*wide)
    assert not fuses(arena=wide[2])
    assert not fuses(weights=[*batch.weights[:2], wide[1][2]])
    assert not fuses(weights=[weight[1:] for weight in batch.weights])  # rows of y are unaligned
    with torch.enable_grad():
        assert not fuses()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert not fuses()
    with fastlora.backend("hybrid"):
        assert not fuses()
    with monkeypatch.context() as patched:
        patched.setitem(plans._segmented, (plans.SEGMENTED_GEMM, batch.x.device), "it is wrong")
        plans._decided.cache_clear()
        assert not fuses()
    plans._decided.cache_clear()


@pytest.mark.usefixtures("fused")
def test_linears_of_a_model_are_fused_and_right(monkeypatch):
    calls = watch_fused(monkeypatch)
    model = Served(serving._tiny(), DEVICE, FP16, [(3, 8)])
    slots = model.load("adapter", 3, 8)
    inputs, rows = model.inputs(40), serving.Rows(40, model.pool)
    requests = runs_of([*slots, 0], 40)
    rows.tell(requests)
    assert model.check(model.step(inputs, None, rows, rows)(), inputs, requests) <= 1
    # q, k, v; o; gate, up; down: all siblings at once.
    assert [len(ys) for ys in calls] == [3, 1, 2, 1]
    monkeypatch.setattr(segmented_ops, "PREFILL_ROWS", 41)
    assert model.check(model.step(inputs, None, rows, rows)(), inputs, requests) <= 1
    assert calls[4:] == [None] * 4


# Real sizes.

GROUPS = {
    "q, k, v of 7B": ("q_proj", "k_proj", "v_proj"),
    "gate, up of 7B": ("gate_proj", "up_proj"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1000, 8192])
@pytest.mark.parametrize("names", GROUPS.values(), ids=GROUPS)
def test_real_sizes_in_a_graph(names, rows):
    linears = [MODELS["Qwen2.5-7B"].linears[name] for name in names]
    k, ns, siblings = linears[0].k, tuple(one.n for one in linears), len(names)
    ranks = (0, 16, 8, 64, 256)
    case = Case((), tuple((r,) * siblings for r in ranks), k, ns, 256)
    batch = Batch(case, torch.bfloat16)
    batch.x = randn(rows, k, dtype=torch.bfloat16)
    segments = RealSegments.of_slots([0] * rows, table=5, device=DEVICE)
    operands = batch.x, batch.weights, batch.biases, batch.arena, batch.descriptors, segments

    def step():
        return segmented_ops.linears_with_adapters(*operands, max_rank=256)

    captured = Captured(step, DEVICE, None)
    runs = [slot for slot, count in runs_of([1, 2, 0, 3, 4], rows) for _ in range(count)]
    mixed = torch.randint(5, (rows,)).tolist()
    for slots in (runs, [1] * rows, [0] * rows, mixed):
        told = RealSegments.of_slots(slots, table=5, device=DEVICE)
        for name in ("slots", "order", "tiles"):
            getattr(segments, name).copy_(getattr(told, name))
        captured.replay()
        batch.slots = slots
        batch.check(captured.outputs)
        assert all(map(torch.equal, captured.outputs, step()))
