"""The segmented kernels against a loop over the adapters; interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, DTYPES, doubles, padded_rows, randn
from segment_cases import (
    NONE,
    PAGE,
    Case,
    Segments,
    apply_adapters,
    make_adapters,
    make_segments,
    store,
)

from fastlora.kernels.segmented_expand import prepare_segmented_expand, segmented_expand
from fastlora.kernels.segmented_shrink import prepare_segmented_shrink, segmented_shrink
from fastlora.kernels.tile_config import INTERPRETER, TileConfig, default_tile

FAR = 2**31  # elements


@dataclass(frozen=True)
class Variant:
    """Tiles of both kernels, smaller than the default ones, and the rows of a segment's tile."""

    shrink: TileConfig
    expand: TileConfig
    block_m: int


# 40 columns are two splits, of one step and of two.
DECODE = Variant(TileConfig(16, 16, 16, splits=2), TileConfig(16, 32, 16), 16)
PREFILL = Variant(TileConfig(64, 32, 32), TileConfig(64, 32, 32), 64)
VARIANTS = [
    pytest.param(DECODE, id="decode"),
    pytest.param(PREFILL, id="prefill"),
]
every_variant = pytest.mark.parametrize("variant", VARIANTS)

MIXED = (2, 0, 1, 3, 1, 1)
GROUP = Case(MIXED, (NONE, (5, 5, 5), (16, 8, 1), (0, 16, 3)), ns=(40, 24, 24))
CASES = [
    pytest.param(Case((1,), ((0,), (8,))), id="one-row"),
    pytest.param(Case((), ((0,), (8,))), id="no-rows"),
    pytest.param(Case((0,) * 6, ((0,), (8,))), id="no-adapter-at-all"),
    pytest.param(Case((1,) * 18, ((0,), (8,))), id="one-adapter-ragged-tile"),
    pytest.param(Case((4, 2, 1, 5, 3), ((0,), *((8,),) * 5)), id="every-row-its-own"),
    pytest.param(Case(MIXED, ((0,), (1,), (5,), (16,))), id="mixed-ranks"),
    pytest.param(Case(MIXED, ((0,), (1,), (5,), (16,)), k=39, ns=(33,)), id="odd-columns"),
    pytest.param(Case(MIXED, ((0,), (5,), (1,), (16,)), k=1, ns=(1,)), id="one-column"),
    pytest.param(Case(MIXED, ((0,), (24,), (0,), (64,)), max_rank=64), id="rank-64"),
    pytest.param(Case((1, 2, 1), ((0,), (256,), (70,)), max_rank=256), id="rank-256"),
    pytest.param(Case(MIXED, ((0, 0), (8, 3), (1, 8), (5, 0)), ns=(40, 40)), id="two-siblings"),
    pytest.param(GROUP, id="grouped-query-siblings"),
    pytest.param(replace(GROUP, k=39, ns=(39, 23, 9)), id="siblings-odd-columns"),
    pytest.param(
        replace(GROUP, ranks=(NONE, (48, 5, 24), (0, 0, 33), (1, 48, 0)), max_rank=48),
        id="siblings-some-without-this-chunk",
    ),
]


class Batch:
    """The operands of a case, and what comes of them by the definition."""

    def __init__(self, case, dtype=torch.float32, y_dtype=None):
        self.case, self.slots, siblings = case, list(case.slots), len(case.ns)
        self.adapters = make_adapters([r[:siblings] for r in case.ranks], case.k, case.ns, dtype)
        self.arena, self.descriptors = store(self.adapters, dtype)
        self.x = randn(len(self.slots), case.k, dtype=dtype)
        self.ys = [randn(len(self.slots), n, dtype=y_dtype or dtype) for n in case.ns]

    def segments(self, variant):
        return make_segments(self.slots, variant.block_m)

    def shrink(self, variant, **changes):
        options = {"x": self.x, "segments": self.segments(variant), "config": variant.shrink}
        options |= changes
        return segmented_shrink(
            arena=self.arena, descriptors=self.descriptors, max_rank=self.case.max_rank, **options
        )

    def expand(self, variant, h, **changes):
        options = {"ys": [y.clone() for y in self.ys], "segments": self.segments(variant)}
        options |= {"config": variant.expand, **changes}
        segmented_expand(h=h, arena=self.arena, descriptors=self.descriptors, **options)
        return options["ys"]

    def apply(self, variant):
        h = self.shrink(variant)
        return h, self.expand(variant, h)

    def adapter_of(self, s, row):
        return self.adapters[self.slots[row]][s]


def written(batch, h):
    """Return the sum of the planes and where it may be written."""
    where = torch.zeros(h.shape[1:], dtype=torch.bool, device=h.device)
    for s in range(h.shape[1]):
        for row in range(h.shape[2]):
            if adapter := batch.adapter_of(s, row):
                where[s, row, : adapter.a.shape[0]] = True
    return h.sum(0), where


def check(batch, h, ys):
    """Compare h with fp32's error, and y with that of the dtype's own products."""
    x, own_ys = batch.x, batch.ys
    exact_h, exact = apply_adapters(x.double(), doubles(*own_ys), batch.adapters, batch.slots)
    native_h, _ = apply_adapters(x.float(), own_ys, batch.adapters, batch.slots)
    _, native = apply_adapters(x, own_ys, batch.adapters, batch.slots)
    found, where = written(batch, h)
    assert h[:, ~where].isnan().all(), "h is written beyond an adapter's ranks"
    where, found = where[:, :, : exact_h.shape[2]], found[:, :, : exact_h.shape[2]]
    assert_as_accurate(found[where], native_h[where], exact_h[where], name="h")
    for y, before, *others in zip(ys, own_ys, native, exact, strict=True):
        # Beside what it was added to: a sum near zero is no more exact than its summands.
        actual, *expected = (torch.cat([value, before.to(value.dtype)]) for value in (y, *others))
        assert_as_accurate(actual, *expected, name="y")


@every_variant
@pytest.mark.parametrize("dtype", DTYPES if DEVICE.type == "cuda" else DTYPES[:2])
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_as_accurate_as_torch(case, dtype, variant):
    batch = Batch(case, dtype)
    check(batch, *batch.apply(variant))


# Both sides of each limit, and batches that split K.
@pytest.mark.parametrize(("rows", "k"), [(1, 2100), (16, 40), (17, 1100), (256, 40), (257, 1100)])
def test_default_tiles_cover_everything(rows, k):
    slots = (1,) * (rows - min(rows, 16)) + (MIXED * 3)[: min(rows, 16)]
    batch = Batch(Case(slots, GROUP.ranks, k, GROUP.ns), torch.float16)
    variant = Variant(None, None, 64 if rows > 256 else 16)
    check(batch, *batch.apply(variant))


@pytest.mark.parametrize(("rows", "block_m"), [(1, 16), (256, 16), (257, 64)])
def test_the_number_of_rows_chooses_the_tile(rows, block_m):
    for operation in ("segmented_shrink", "segmented_expand"):
        tile = default_tile(operation, INTERPRETER, torch.float16, rows, 4096, 4096, 64)
        assert tile.block_m == block_m


@every_variant
def test_rows_without_an_adapter_keep_every_bit(variant):
    """Neither another NaN nor another zero; and an adapter that lacks a layer is none to it."""
    batch = Batch(GROUP)
    strange = torch.tensor([-0.0, float("nan"), float("inf")], device=DEVICE)
    strange.view(torch.int32)[1] = 0x7FC12345
    lacking = [
        [row for row in range(len(batch.slots)) if batch.adapter_of(s, row) is None]
        for s in range(3)
    ]
    for y, rows in zip(batch.ys, lacking, strict=True):
        y[rows] = strange.repeat(14)[: y.shape[1]]
    for y, before, rows in zip(batch.apply(variant)[1], batch.ys, lacking, strict=True):
        assert torch.equal(y[rows].view(torch.int32), before[rows].view(torch.int32))
    assert len(lacking[0]) > len(lacking[1]) > 0


@every_variant
def test_permuting_the_rows_permutes_the_results(variant):
    batch = Batch(GROUP, torch.float16)
    h, ys = batch.apply(variant)
    order = torch.randperm(len(batch.slots))
    batch.slots = [batch.slots[row] for row in order]
    order = order.to(DEVICE)
    batch.x, batch.ys = batch.x[order], [y[order] for y in batch.ys]
    other_h, other_ys = batch.apply(variant)
    where = written(batch, other_h)[1]
    assert torch.equal(other_h[:, where], h[:, :, order][:, where])
    assert all(map(torch.equal, other_ys, [y[order] for y in ys]))


@every_variant
def test_a_row_does_not_depend_on_its_batch(variant):
    """Beside other adapters, or alone with one of its own tile's rows."""
    batch = Batch(GROUP, torch.float16)
    _, ys = batch.apply(variant)
    few = [2, 5]
    batch.slots = [batch.slots[row] for row in few]
    batch.x, batch.ys = batch.x[few], [y[few] for y in batch.ys]
    assert all(map(torch.equal, batch.apply(variant)[1], [y[few] for y in ys]))


@every_variant
def test_same_inputs_give_the_same_bits(variant):
    batch = Batch(GROUP, torch.float16)
    (h, ys), (other_h, other_ys) = (batch.apply(variant) for _ in range(2))
    where = written(batch, h)[1]
    assert torch.equal(h[:, where], other_h[:, where])
    assert all(map(torch.equal, ys, other_ys))


@every_variant
def test_takes_rows_of_wider_tensors(variant):
    batch = Batch(GROUP)
    h, ys = batch.apply(variant)
    # Of one tensor with NaN between them, as q, k and v of a fused projection.
    wide = torch.full((len(batch.slots), 120), float("nan"), device=DEVICE)
    views = [wide[:, :40], wide[:, 48:72], wide[:, 78:102]]
    for view, y in zip(views, batch.ys, strict=True):
        view.copy_(y)
    strided_h = batch.shrink(variant, x=padded_rows(batch.x))
    where = written(batch, h)[1]
    assert torch.equal(strided_h[:, where], h[:, where])
    assert all(map(torch.equal, batch.expand(variant, strided_h, ys=views), ys))
    assert wide[:, 40:48].isnan().all()
    assert wide[:, 72:78].isnan().all()
    assert wide[:, 102:].isnan().all()


@every_variant
def test_contiguous_tensors_of_more_dimensions_are_matrices(variant):
    batch = Batch(GROUP)
    h, ys = batch.apply(variant)
    shaped_h = batch.shrink(variant, x=batch.x.view(2, 3, -1))
    shaped_ys = [y.clone().view(2, 3, -1) for y in batch.ys]
    batch.expand(variant, shaped_h, ys=shaped_ys)
    where = written(batch, h)[1]
    assert torch.equal(shaped_h[:, where], h[:, where])
    assert all(map(torch.equal, [y.view(6, -1) for y in shaped_ys], ys))


@every_variant
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, as the interpreter
def test_what_an_adapter_ruins_is_its_own(variant):
    """NaN in the weights of one adapter, and in the row of another."""
    batch = Batch(GROUP, torch.float16)
    expected = batch.apply(variant)[1]
    page, rank = batch.descriptors[1, 2, 0].item() * PAGE, GROUP.ranks[2][1]
    batch.arena[page : page + rank * GROUP.k] = float("nan")
    batch.x[4] = float("inf")
    found = batch.apply(variant)[1]
    ruined = [slot == 2 for slot in batch.slots]
    for s in range(3):
        bad = torch.tensor([row == 4 or (s == 1 and ruined[row]) for row in range(6)])
        assert not found[s][bad].isfinite().any()
        assert torch.equal(found[s][~bad], expected[s][~bad])


@every_variant
def test_a_captured_launch_serves_every_later_batch(variant):
    """As in a CUDA graph: prepared with no adapter at all, then the same addresses rewritten."""
    first = Batch(replace(GROUP, slots=(0,) * 6), torch.float16)
    segments = first.segments(variant)
    room = torch.zeros((4, 9), dtype=torch.int32, device=DEVICE)
    segments = Segments(segments.slots, segments.order, room, variant.block_m)
    tensors = first.arena, first.descriptors, segments
    shrink = prepare_segmented_shrink(
        first.x, *tensors, max_rank=first.case.max_rank, config=variant.shrink
    )
    h = shrink(first.x, *tensors)
    expand = prepare_segmented_expand(first.ys, h, *tensors, config=variant.expand)
    ys = [y.clone() for y in first.ys]
    expand(ys, h, *tensors)
    assert h.isnan().all()
    assert all(map(torch.equal, ys, first.ys))
    everyone = ((0, 0, 0), (16, 16, 16), (3, 0, 8), (8, 1, 0))
    for slots, ranks in [(MIXED, everyone), ((3,) * 6, GROUP.ranks)]:
        batch = Batch(replace(GROUP, slots=slots, ranks=ranks), torch.float16)
        now = batch.segments(variant)
        segments.slots.copy_(now.slots)
        segments.order.copy_(now.order)
        room.zero_()[:, : now.tiles.shape[1]] = now.tiles
        first.descriptors.copy_(batch.descriptors)
        tensors = batch.arena, first.descriptors, segments
        h, ys = shrink(batch.x, *tensors), [y.clone() for y in batch.ys]
        expand(ys, h, *tensors)
        check(batch, h, ys)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_h_keeps_more_bits_than_the_adapters_have(dtype, variant):
    """The term in fp32: rounding h to the adapters' dtype would cost 2**-9 in bf16."""
    batch = Batch(GROUP, dtype, y_dtype=torch.float32)
    ys = batch.apply(variant)[1]
    _, exact = apply_adapters(batch.x.double(), doubles(*batch.ys), batch.adapters, batch.slots)
    for y, before, own in zip(ys, batch.ys, exact, strict=True):
        term = own - before.double()
        assert (y.double() - own).norm() <= 2.0**-15 * term.norm()


@every_variant
@pytest.mark.parametrize("planes", [1, 2, 3, 5, 9])
def test_all_planes_are_added_and_no_others(planes, variant):
    batch = Batch(replace(GROUP, ranks=(NONE, (16, 16, 16)), slots=(1,) * 6))
    room = torch.full((planes + 8, 3, 6, 16), float("nan"), device=DEVICE)
    h = room[:planes]
    h.copy_(randn(*h.shape))
    for s, (y, before) in enumerate(zip(batch.expand(variant, h), batch.ys, strict=True)):
        _, b, scaling = batch.adapter_of(s, 0)
        native = before + scaling * (h[:, s].sum(0) @ b)
        exact = before.double() + scaling * (h[:, s].double().sum(0) @ b.double())
        assert_as_accurate(y, native, exact)


@pytest.fixture(scope="module")
def far_buffer():
    """8 GiB of addresses: an offset of 2**31 from the middle that wraps around stays inside."""
    size = 2 * FAR + 2**20
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 2 * size + 2**30:
        pytest.skip("not enough free memory on the GPU")
    try:
        return torch.empty(size, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no 8 GiB of addresses: {error}")


@every_variant
def test_pages_and_rows_beyond_32_bits_are_found(far_buffer, variant):
    batch = Batch(GROUP, torch.float16)
    expected = batch.apply(variant)[1]
    middle = far_buffer[FAR:]
    middle[FAR : FAR + batch.arena.numel()] = batch.arena
    has_adapter = batch.descriptors[:, :, 2:3] > 0
    batch.descriptors[:, :, :2] += torch.where(has_adapter, FAR // PAGE, 0).int()
    batch.arena = middle
    assert all(map(torch.equal, batch.apply(variant)[1], expected))


@every_variant
def test_rows_beyond_32_bits_are_found(far_buffer, variant):
    batch = Batch(replace(GROUP, slots=(1, 2, 1)), torch.float16)
    h, expected = batch.apply(variant)
    middle = far_buffer[FAR:]
    # Rows 0 and 2 are 2**31 elements apart.
    x, *ys = (
        middle[2**12 * place :].as_strided((3, n), (FAR // 2, 1))
        for place, n in enumerate((GROUP.k, *GROUP.ns))
    )
    x.copy_(batch.x)
    for y, before in zip(ys, batch.ys, strict=True):
        y.copy_(before)
    far_h = batch.shrink(variant, x=x)
    where = written(batch, h)[1]
    assert torch.equal(far_h[:, where], h[:, where])
    assert all(map(torch.equal, batch.expand(variant, far_h, ys=ys), expected))


def test_what_disagrees_is_refused():
    batch = Batch(GROUP)
    with pytest.raises(AssertionError, match=r"x is torch\.float16 and the adapters are"):
        batch.shrink(DECODE, x=batch.x.half())
    with pytest.raises(AssertionError, match="columns of x are not contiguous"):
        batch.shrink(DECODE, x=batch.x.t().contiguous().t())
    h = batch.shrink(DECODE)
    with pytest.raises(AssertionError, match="columns of y are not contiguous"):
        batch.expand(DECODE, h, ys=[y.t().contiguous().t() for y in batch.ys])
    with pytest.raises(AssertionError, match="5 rows of y and 6 of h"):
        batch.expand(DECODE, h, ys=[y[:5] for y in batch.ys])
    with pytest.raises(AssertionError, match="siblings of ys, h and descriptors differ"):
        batch.expand(DECODE, h, ys=batch.ys[:2])
    with pytest.raises(AssertionError, match="outputs of different dtypes"):
        batch.expand(DECODE, h, ys=[batch.ys[0].half(), *batch.ys[1:]])


RANK = st.sampled_from([0, 1, 5, 8, 16, 24, 31])


@st.composite
def batches(draw):
    siblings = draw(st.integers(1, 3))
    adapters = draw(st.integers(1, 4))
    ranks = [(0,) * siblings]
    ranks += [tuple(draw(RANK) for _ in range(siblings)) for _ in range(adapters)]
    if not any(map(any, ranks)):
        ranks[-1] = (1,) * siblings
    slots = draw(st.lists(st.integers(0, adapters), max_size=24))
    width = st.integers(1, 40)
    ns = tuple(draw(width) for _ in range(siblings))
    return Case(tuple(slots), tuple(ranks), draw(width), ns, max_rank=32)


@given(
    case=batches(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    variant=st.sampled_from([DECODE, PREFILL]),
)
@settings(
    max_examples=30,
    deadline=None,
    # It fills what is allocated with NaN, for every example alike.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_mix_of_adapters(case, dtype, variant):
    batch = Batch(case, dtype)
    check(batch, *batch.apply(variant))
