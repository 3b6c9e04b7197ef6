"""What serving launches and moves: the counts are what the kernels do, and keep to their limits."""

from __future__ import annotations

import counts
import pytest
import serving_counts
import torch
from segment_cases import make_adapters, make_segments, store
from serving_counts import Batch
from test_counts_interpreted import Watcher

from fastlora import plans
from fastlora.bench import counting
from fastlora.bench.shapes import MODELS
from fastlora.kernels.decode_gemm import decode_gemm
from fastlora.kernels.segmented_expand import segmented_expand
from fastlora.kernels.segmented_shrink import segmented_shrink
from fastlora.kernels.tile_config import TileConfig

HALF = torch.float16
NONE = (0, 0, 0)
# Three rows without an adapter, and one adapter that has no row.
MIXED = (1, 0, 2, 3, 1, 1, 2, 0, 1, 3, 2, 0, *(1,) * 13)
GROUP = Batch(MIXED, (NONE, (5, 5, 5), (16, 8, 1), (0, 24, 3), (16, 16, 16)))
ALONE = Batch(MIXED, ((0,), (24,), (0,), (3,), (8,)))
UNIFORM = Batch.of(3, 6, 16)
BASE = Batch((0,) * 5, (NONE, (8, 8, 8)))
# Tiles of shrink and expand, and the rows of a segment's tile; a rank of 24 takes two steps.
KERNELS = {
    "tiles-of-16": (TileConfig(16, 16, 16, splits=3), TileConfig(16, 32, 16), 16),
    "tiles-of-64": (TileConfig(64, 16, 32, splits=2), TileConfig(64, 32, 16), 64),
}
BATCHES = {"group": GROUP, "alone": ALONE, "uniform": UNIFORM, "base": BASE}
interpreted = pytest.mark.skipif(not plans.interpreting(), reason="it watches the interpreter")


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Override the fixture of all tests: filling what fastlora allocates would be counted."""


def launch(batch, ns, k, kernels, new, arena, descriptors):
    """Shrink and expand with these operands; x and y from ``new``."""
    shrink, expand, block_m = kernels
    segments = make_segments(batch.slots, block_m)
    rows = len(batch.slots)
    h = segmented_shrink(new(rows, k), arena, descriptors, segments, max_rank=32, config=shrink)
    segmented_expand([new(rows, n) for n in ns], h, arena, descriptors, segments, config=expand)


@interpreted
# Of h more is read than was written, and dropped: numpy adds whatever lies there.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_kernel_touches_what_is_counted(monkeypatch, batch, kernels):
    """Every operand by its name, each byte of it once, and no other byte."""
    siblings = min(3, len(batch.ranks[0]))
    k, ns = 72, (40, 24, 24)[:siblings]
    ranks = [of_slot[:siblings] for of_slot in batch.ranks]
    arena, descriptors = store(make_adapters(ranks, k, ns, HALF), HALF)
    watcher = Watcher()
    watcher.watch(monkeypatch)

    def with_data(*shape):
        return torch.ones(shape, dtype=HALF)

    def without_data(*shape):
        return torch.empty(shape, dtype=HALF)

    launch(batch, ns, k, kernels, with_data, arena, descriptors)
    with serving_counts.recording(batch) as recorder:
        table = torch.empty(descriptors.shape, dtype=torch.int32)
        launch(batch, ns, k, kernels, without_data, without_data(*arena.shape), table)
    counted = [one for one in recorder.launches if one.name.endswith("_kernel")]
    assert [trace.name for trace in watcher.traces] == [one.name for one in counted]
    assert len(counted) == 2
    for trace, one in zip(watcher.traces, counted, strict=True):
        touched = {operand.name: operand.moved for operand in trace.operands}
        names = one.reads.keys() | one.writes.keys()
        expected = {name: one.reads.get(name, 0) + one.writes.get(name, 0) for name in names}
        assert {name: touched.pop(name) for name in expected} == expected, trace.name
        assert not any(touched.values()), f"{trace.name} touches {touched}, which is not counted"
        assert trace.strays == 0
        for operand in trace.operands:
            if operand.name in one.writes:
                assert operand.stores.max(initial=0) <= 1, f"{operand.name} is stored twice"


def test_a_mixed_batch_costs_the_bytes_of_its_own_ranks():
    for batch in (GROUP, Batch.of(2, 8, 16)):
        read, _ = serving_counts.shrink_bytes(batch, 3, 72, 1, 2, 16)
        present = set(batch.slots)
        assert read["arena_ptr"] == 2 * 72 * sum(sum(batch.ranks[s][:3]) for s in present)
    # Equal sums of ranks are equal bytes.
    mixed = Batch((1, 2, 3, 4), ((0,), (8,), (24,), (32,), (64,)))
    equal = Batch((1, 2, 3, 4), ((0,), *((32,),) * 4))
    for one, other in (
        (serving_counts.shrink_bytes(b, 1, 64, 2, 2, 16) for b in (mixed, equal)),
        (serving_counts.expand_bytes(b, (64,), 2, 2, 16) for b in (mixed, equal)),
    ):
        assert one[0]["arena_ptr"] == other[0]["arena_ptr"]


MODELS_AND_ROWS = [
    (model, rows) for model in serving_counts.COUNTED for rows in (1, 16, 17, 64, 512, 8192)
]


@pytest.mark.parametrize(("model", "rows"), MODELS_AND_ROWS)
def test_a_decoder_layer_takes_eight_launches_and_none_for_metadata(model, rows):
    found = serving_counts.count_layer(model, 1, rows)
    # Of a step that generates a group is one launch, where it has enough columns (of 0.5B gate and
    # up alone), and in a long prefill a segmented one.
    few = 6 if model == "Qwen2.5-0.5B" else 4
    frozen = few if rows <= 64 else 0 if rows >= 8192 else 7
    assert (found.frozen, found.kernels, found.others) == (frozen, serving_counts.LAUNCHES, 0)


@pytest.mark.parametrize("model", serving_counts.COUNTED)
@pytest.mark.parametrize(("distinct", "rows"), serving_counts.DECODE)
def test_a_decoder_layer_moves_the_exact_rank_rows_of_every_adapter_once(model, distinct, rows):
    found = serving_counts.count_layer(model, distinct, rows)
    linears = MODELS[model].linears
    weights = serving_counts.weight_bytes(MODELS[model], distinct)
    assert found.moved["adapters"] == weights
    assert serving_counts.exceeded(found, weights) is None
    inputs = [linears[name].k for name in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    assert found.moved["x"] == 2 * rows * sum(inputs)
    assert found.moved["y"] == 2 * 2 * rows * sum(linear.n for linear in linears.values())
    # The planes of h are a fraction of what they spare: y would be read again.
    assert found.moved["h"] < 0.2 * found.moved["y"]
    assert found.moved["metadata"] < 2e4


def test_ranks_are_not_padded_to_the_pool_s():
    eight, sixty_four = (
        serving_counts.count_layer("Qwen2.5-0.5B", 16, 16, rank).moved["adapters"]
        for rank in (8, 64)
    )
    assert sixty_four == 8 * eight


def test_bytes_and_launches_give_the_shares_that_were_worked_out_by_hand():
    """Qwen2.5-7B on an H200: 14.14 GB of weights, 5.05 MB of an adapter for each rank."""
    model = MODELS["Qwen2.5-7B"]
    assert serving_counts.base_bytes(model) / 1e9 == pytest.approx(14.14, abs=0.01)
    adapter = serving_counts.weight_bytes(model, 1)
    assert model.layers * adapter == 16 * 2 * 2_523_136
    found = serving_counts.shares(model, serving_counts.count_layer("Qwen2.5-7B", 16, 16))
    base, adapters = 14.14e9 / 4.3e12, 16 * 80.74e6 / 4.3e12
    assert found["ceiling"] == pytest.approx(base / (base + adapters), abs=1e-3)
    launches = 28 * 8 * 2e-6
    assert found["warm"] == pytest.approx(base / (base + adapters + launches), abs=1e-3)
    exposed = base / (base + adapters + launches / 2)
    assert found["warm_exposed"] == pytest.approx(exposed, abs=1e-3)
    assert found["cold"] < found["warm"]


def test_a_prefill_is_predicted_by_flops_and_bytes():
    """8192 tokens, 28 layers: 135 ms of products, and 0.5 GB in each layer; 2.2 with y twice."""
    model = MODELS["Qwen2.5-7B"]
    counted = serving_counts.count_layer("Qwen2.5-7B", 1, 8192)
    flops = 2 * 8192 * sum(one.n * one.k for one in model.linears.values())
    assert 28 * flops / 790e12 == pytest.approx(0.1354, abs=1e-4)
    assert counted.bytes / 1e9 == pytest.approx(0.497, abs=0.001)
    assert counted.moved["y"] == 0
    shorter = serving_counts.count_layer("Qwen2.5-7B", 1, 512)
    assert 16 * shorter.bytes / 1e9 == pytest.approx(2.22, abs=0.01)
    found = serving_counts.share_of_prefill(model, 8192, counted.bytes, 8)
    base, added = flops / 790e12, counted.bytes / 4.3e12 + 8 * 2e-6
    assert found == pytest.approx(base / (base + added))


def test_what_is_promised_is_what_the_arithmetic_allows():
    rows, problems = serving_counts.serving_table()
    assert problems == []
    assert len(rows) == len(serving_counts.COUNTED) * len(serving_counts.DECODE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LAUNCHES", 7, "8 launches, 0 of them for something else than the adapters' products"),
        ("PROMISED", {8: {16: 0.9}, 4: {}}, "81.5 % predicted with 8 launches, 90 promised"),
    ],
)
def test_the_command_fails_where_a_limit_is_exceeded(monkeypatch, capsys, name, value, message):
    monkeypatch.setattr(serving_counts, "COUNTED", ["Qwen2.5-7B"])
    monkeypatch.setattr(serving_counts, name, value)
    with pytest.raises(SystemExit) as stopped:
        serving_counts.main()
    assert message in str(stopped.value)


def test_padded_ranks_and_launches_for_metadata_are_seen():
    layer = serving_counts.count_layer("Qwen2.5-0.5B", 16, 16)
    weights = serving_counts.weight_bytes(MODELS["Qwen2.5-0.5B"], 16)
    padded = {**layer.moved, "adapters": 2 * weights}
    found = serving_counts.LayerCounts(7, 8, 0, padded)
    assert "bytes of adapters" in serving_counts.exceeded(found, weights)
    launches = [counting.Launch("_segmented_shrink_kernel", {}, {}, 0)] * 4
    launches += [counting.Launch("mm", {}, {}, 0)] * 7
    launches += [counting.Launch("argsort", {}, {}, 0)]
    found = serving_counts.summed(launches, ["mm"])
    assert (found.kernels, found.others) == (4, 1)
    assert "1 of them for something else" in serving_counts.exceeded(found, weights)


def test_frozen_products_read_every_weight_once():
    batch = Batch.of(2, 16)
    with serving_counts.recording(batch) as recorder:
        ns, k = (40, 24), 72
        weights = [torch.empty(n, k, dtype=HALF) for n in ns]
        decode_gemm(torch.empty(16, k, dtype=HALF), weights, [None, None])
    (launch,) = recorder.launches
    assert launch.reads == {"x": 2 * 16 * k, "weights.0": 2 * 40 * k, "weights.1": 2 * 24 * k}
    assert launch.writes == {"ys.0": 2 * 16 * 40, "ys.1": 2 * 16 * 24}
    assert serving_counts.summed([launch], [launch.name]) == serving_counts.LayerCounts(
        1, 0, 0, dict.fromkeys(("adapters", "x", "y", "h", "metadata"), 0)
    )


def test_make_counts_counts_serving_as_well(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(counts, "layers_table", lambda: ([], []))
    monkeypatch.setattr(counts, "lorafusion_table", lambda: ([], []))
    monkeypatch.setattr(serving_counts, "COUNTED", ["Qwen2.5-0.5B", "Qwen2.5-7B"])
    monkeypatch.setattr("sys.argv", ["counts.py", "--json", str(tmp_path / "counts.json")])
    counts.main()
    assert "Qwen2.5-7B" in capsys.readouterr().out
    assert '"serving": [' in (tmp_path / "counts.json").read_text()
