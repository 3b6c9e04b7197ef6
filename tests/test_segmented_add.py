"""``segmented_add``: the operator, and PyTorch's side of it, against the definition."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlora
from fastlora import plans, reference, segmented_ops
from fastlora.segmented import Adapters, Factors, add_adapters, pack
from fastlora.segments import Runs, Segments, rows_of_a_tile, tile_count

K, N = 40, 24
# Slot of every row, with its reason; slots 1 to 4 have the ranks below.
RANKS = (4, 4, 1, 9)
BATCHES = {
    "each-its-own-same-rank": [1, 2],
    "each-its-own": [1, 2, 3, 4],
    "shuffled-with-rows-of-the-base": [0, 3, 1, 3, 0, 2, 1],
    "one-adapter-for-all": [2] * 6,
    "one-adapter-for-some": [0, 2, 2, 0, 2],
    "equal-runs": [1, 1, 1, 2, 2, 2],
    "runs-that-need-padding": [1, 1, 1, 2, 2, 4, 4, 4],
    "one-has-nearly-all": [1] * 9 + [2] + [1] * 9 + [3],
    "no-adapter": [0, 0, 0],
    "one-row": [4],
    "no-rows": [],
}


def make_factors(dtype, ranks=RANKS):
    made = []
    for i, rank in enumerate(ranks):
        a, b = torch.randn(rank, K) * K**-0.5, torch.randn(N, rank)
        # As peft stores B, and as the pool does.
        b_by_rank = b.to(dtype).t()
        made.append(Factors(a.to(dtype), b_by_rank if i % 2 else b_by_rank.contiguous(), 0.5 + i))
    return made


def by_row(slots, factors, dtype=None):
    rows = []
    for slot in slots:
        each = factors[slot - 1] if slot else None
        if each is None:
            rows.append(None)
            continue
        a, b = each.lora_a, each.lora_b.t()
        rows.append((a.to(dtype or a.dtype), b.to(dtype or b.dtype), each.scaling))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES)
def test_is_as_accurate_as_its_definition(slots, dtype):
    x, y, factors = torch.randn(len(slots), K), torch.randn(len(slots), N), make_factors(dtype)
    x, y = x.to(dtype), y.to(dtype)
    native = reference.segmented_add(y, x, by_row(slots, factors))
    exact = reference.segmented_add(y.double(), x.double(), by_row(slots, factors, torch.float64))
    runs = Runs.of_slots(slots)
    add_adapters(y, x, Adapters([factors[slot - 1] for slot in runs.slots]), runs)
    assert_as_accurate(y, native, exact)


@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES)
def test_the_operator_reads_packed_adapters(slots):
    factors = make_factors(torch.float32)
    arena, descriptors = pack(factors)
    segments = Segments.of_slots(slots, table=len(factors) + 1)
    x, y = torch.randn(len(slots), K), torch.randn(len(slots), N)
    exact = reference.segmented_add(y.double(), x.double(), by_row(slots, factors, torch.float64))
    native = reference.segmented_add(y, x, by_row(slots, factors))
    segmented_ops.segmented_add([y], x, arena, descriptors, *fields(segments), 16)
    assert_as_accurate(y, native, exact)


def fields(segments):
    return segments.slots, segments.order, segments.tiles, segments.block_m


def test_an_adapter_that_lacks_the_linear_adds_nothing():
    factors = make_factors(torch.float32)
    for slots in ([1, 2, 0], [1, 1, 2]):  # as a batch, and one by one
        x, y = torch.randn(3, K), torch.randn(3, N)
        expected = reference.segmented_add(y, x, by_row(slots, [None, factors[1]]))
        runs = Runs.of_slots(slots)
        add_adapters(y, x, Adapters([None, factors[1]]), runs)
        torch.testing.assert_close(y, expected)
    y = torch.randn(2, N)
    before = y.clone()
    add_adapters(y, torch.randn(2, K), Adapters([None, None]), Runs.of_slots([1, 2]))
    assert torch.equal(y, before)


def test_adapters_in_another_dtype_multiply_in_theirs():
    slots, factors = [1, 0, 2, 2], make_factors(torch.float32)
    x, y = torch.randn(4, K).bfloat16(), torch.randn(4, N).bfloat16()
    exact = reference.segmented_add(y.double(), x.double(), by_row(slots, factors, torch.float64))
    native = reference.segmented_add(y, x.float(), by_row(slots, factors))
    runs = Runs.of_slots(slots)
    add_adapters(y, x, Adapters(factors[:2]), runs)
    assert y.dtype == torch.bfloat16
    assert_as_accurate(y, native, exact)


def test_what_is_stacked_is_kept_while_it_is_small():
    small = Adapters(make_factors(torch.float32, (4, 4)))
    assert small.stacked() is small.stacked()
    wide = Factors(torch.zeros(64, 3000), torch.zeros(64, 3000), 1.0)
    large = Adapters([wide, wide])
    assert large.stacked() is not large.stacked()


@settings(max_examples=60, deadline=None)
@given(slots=st.lists(st.integers(0, 4), max_size=40), permutation=st.randoms())
def test_any_batch_equals_its_rows_one_by_one(slots, permutation):
    factors = make_factors(torch.float64)
    x, y = torch.randn(len(slots), K).double(), torch.randn(len(slots), N).double()
    expected = reference.segmented_add(y, x, by_row(slots, factors))
    order = list(range(len(slots)))
    permutation.shuffle(order)
    shuffled = [slots[i] for i in order]
    runs = Runs.of_slots(shuffled)
    mixed = y[order]
    add_adapters(mixed, x[order], Adapters([factors[slot - 1] for slot in runs.slots]), runs)
    torch.testing.assert_close(mixed, expected[order], rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), max_size=12),
    padding=st.integers(0, 9),
)
def test_the_tiles_are_every_row_with_an_adapter_once(requests, padding):
    slots = [slot for slot, rows in requests for _ in range(rows)] + [0] * padding
    segments = Segments.of([*requests, (0, padding)], table=10)
    assert segments.slots.tolist() == slots
    assert sorted(segments.order.tolist()) == list(range(len(slots)))
    assert segments.tiles.shape == (4, tile_count(len(slots), 10))
    assert segments.block_m == rows_of_a_tile(len(slots))
    seen = []
    used = int(segments.tiles[3, :1].sum())
    assert not segments.tiles[:3, used:].any()
    for slot, first, rows in segments.tiles[:3, :used].t().tolist():
        assert 0 < rows <= segments.block_m
        of_tile = segments.order[first : first + rows].tolist()
        assert all(slots[row] == slot != 0 for row in of_tile)
        seen += of_tile
    assert sorted(seen) == [row for row, slot in enumerate(slots) if slot]


@pytest.mark.parametrize("slots", [BATCHES["shuffled-with-rows-of-the-base"], [0, 0]])
def test_operator_is_well_formed(slots):
    factors = make_factors(torch.float32)
    arena, descriptors = pack(factors)
    segments = Segments.of_slots(slots, table=5)
    x, y = torch.randn(len(slots), K), torch.randn(len(slots), N)
    arguments = ([y], x, arena, descriptors, *fields(segments), 16)
    torch.library.opcheck(segmented_ops.segmented_add, arguments)


def test_compiles_without_a_break():
    factors = make_factors(torch.float32)
    arena, descriptors = pack(factors)
    slots = [1, 0, 3]
    segments = Segments.of_slots(slots, table=5)
    x, y = torch.randn(3, K), torch.randn(3, N)

    def run(y, x):
        y = y * 1.0
        segmented_ops.segmented_add([y], x, arena, descriptors, *fields(segments), 16)
        return y + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(y, x), run(y, x))


def test_packed_weights_come_back_as_they_were():
    from fastlora.segmented import unpack

    factors = make_factors(torch.float32)
    arena, descriptors = pack(
        [factors[0], factors[1], Factors(torch.zeros(0, K), torch.zeros(0, N), 0.0)]
    )
    found = unpack(arena, descriptors[0], (2, 3, 1), K, N).factors
    assert found[1] is None
    for got, own in ((found[0], factors[1]), (found[2], factors[0])):
        assert torch.equal(got.lora_a, own.lora_a)
        assert torch.equal(got.lora_b, own.lora_b)
        assert got.scaling == own.scaling


@pytest.mark.skipif(not plans.interpreting(), reason="runs on the interpreter")
def test_launches_are_kept_by_all_that_they_were_prepared_for(monkeypatch):
    """A kernel that is launched for another shape than it was made for is wrong, silently."""
    kept: dict[object, object] = {}
    monkeypatch.setattr(segmented_ops, "_shrinks", {})
    monkeypatch.setattr(segmented_ops, "_expands", kept)

    def check(slots, k=32, ns=(16,), dtype=torch.float32, stride=0, max_rank=16, y_dtype=None):
        torch.manual_seed(len(kept))
        tables = [
            [
                Factors(torch.randn(r, k).to(dtype), torch.randn(r, n).to(dtype), 0.5 + r)
                for r in (4, 9)
            ]
            for n in ns
        ]
        packed = [pack(each) for each in tables]
        arena = torch.cat([arena for arena, _ in packed])
        rows, offset = [], 0
        for own, (table,) in packed:
            table = table.clone()
            table[1:, :2] += offset
            rows.append(table)
            offset += own.numel() // 64
        segments = Segments.of_slots(slots, table=3)
        x = torch.randn(len(slots), k + stride).to(dtype)[:, :k]
        ys = [torch.randn(len(slots), n).to(y_dtype or dtype) for n in ns]
        expected = [
            reference.segmented_add(y.double(), x.double(), by_row(slots, own, torch.float64))
            for y, own in zip(ys, tables, strict=True)
        ]
        with fastlora.backend("fused"):
            segmented_ops.add_adapters(
                ys, x, arena, torch.stack(rows), segments, max_rank=max_rank, adapters=None
            )
        for y, exact in zip(ys, expected, strict=True):
            assert (y.double() - exact).norm() <= 1e-2 * exact.norm()

    shapes = [
        {"slots": [1, 2, 0]},
        {"slots": [2, 0, 1, 1]},
        {"slots": [1, 2] * 10},
        {"slots": [1, 2, 0], "k": 48},
        {"slots": [1, 2, 0], "ns": (24,)},
        {"slots": [1, 2, 0], "ns": (16, 24)},
        {"slots": [1, 2, 0], "dtype": torch.float16},
        {"slots": [1, 2, 0], "y_dtype": torch.float16},
        {"slots": [1, 2, 0], "stride": 8},
        {"slots": [1, 2, 0], "max_rank": 32},
    ]
    for shape in shapes:
        check(**shape)
    assert len(kept) == len(shapes)
    for shape in shapes:  # with what was kept, and other adapters and rows
        check(**{**shape, "slots": shape["slots"][::-1]})
    assert len(kept) == len(shapes)
