"""The ``paged_attention`` kernel against its definition; interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_kernel_as_accurate, randn
from torch import Tensor

from fastlora.kernels import paged_attention as kernels
from fastlora.kernels.paged_attention import paged_attention
from fastlora.kernels.tile_config import TileConfig
from fastlora.serving.attention import plain_paged_attention

PAGE = 4
# 16 keys are four pages, and in a batch of few tokens most sequences end inside a tile.
SMALL = TileConfig(16, 16)


@dataclass
class Batch:
    """A batch as continuous batching describes it, over pages in which all else is NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    pages: Tensor  # [places, G, D]: of every page first the keys, then the values
    starts_q: Tensor
    starts_k: Tensor
    read_index: Tensor
    write_index: Tensor
    block_table: Tensor
    longest: int

    def attend(self, function, *, dtype=None, described="places", **settings):
        """Return the result, and the pages as they are left."""
        pages = self.pages.to(dtype or self.pages.dtype, copy=True)
        q, k, v = (x.to(dtype or x.dtype) for x in (self.q, self.k, self.v))
        lists = {"read_index": self.read_index, "write_index": self.write_index}
        if described == "pages":
            lists = {"block_table": self.block_table, "page_size": PAGE}
        elif self.longest_cached == 0:
            lists["read_index"] = self.read_index[:0]
        out = function(
            q, k, v, pages, pages[PAGE:], self.starts_q, self.starts_k,
            scaling=q.shape[2] ** -0.5, longest=self.longest, **lists, **settings,
        )  # fmt: skip
        return out, pages

    def places(self, end):
        """Return where all keys lie, and where the values do."""
        return self.read_index[:end], self.read_index[:end] + PAGE

    @property
    def longest_cached(self):
        lengths = torch.diff(self.starts_k) - torch.diff(self.starts_q)
        return int(lengths.max()) if len(lengths) else 0

    def check(self, described="places", window=None, is_ring=False, config=SMALL):
        """Compare result and pages with the definition; return the result."""
        settings = {"described": described, "window": window, "is_ring": is_ring}
        out, pages = self.attend(paged_attention, config=config, **settings)
        native, left = self.attend(plain_paged_attention, **settings)
        exact, _ = self.attend(plain_paged_attention, dtype=torch.float64, **settings)
        assert_kernel_as_accurate(out, native, exact)
        end = int(self.starts_q[-1])
        assert not out[end:].any()
        pages[WASTE], left[WASTE] = 0, 0
        assert torch.equal(pages.nan_to_num(7.0), left.nan_to_num(7.0))
        return out


# Where padding of a ring goes, and nothing else: the keys and the values of the first page.
TRASH = 0
WASTE = [TRASH, TRASH + PAGE]


def make_batch(
    sequences, *, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, padding=(0, 0), order=None
):
    """Make a batch of (cached tokens, queries), padded by (sequences, tokens)."""
    spare_sequences, spare_tokens = padding
    queries = [q for _, q in sequences] + [0] * spare_sequences
    totals = [c + q for c, q in sequences] + [0] * spare_sequences
    tokens = sum(queries) + spare_tokens
    counts = [-(-total // PAGE) for total in totals]
    # Page 0 is a place for waste; two more at the end are free.
    number = sum(counts) + 3
    order = torch.randperm(number - 1) + 1 if order is None else order
    flat = torch.full((number * 2 * PAGE + PAGE, kv_heads, head_dim), float("nan"))
    table = torch.full((len(totals), max(counts) + 1), -1, dtype=torch.int32)
    read, write, first = [], [], 0
    contents = torch.randn(2, sum(totals), kv_heads, head_dim)
    key = 0
    for row, (total, own, count) in enumerate(zip(totals, queries, counts, strict=True)):
        mine = order[first : first + count]
        first += count
        table[row, :count] = mine * 2  # in units of PAGE places: the values stand between
        for position in range(total):
            place = int(mine[position // PAGE]) * 2 * PAGE + position % PAGE
            read.append(place)
            if position >= total - own:
                write.append(place)
            else:
                flat[place], flat[place + PAGE] = contents[:, key]
            key += 1
    write += [TRASH] * spare_tokens
    read += [TRASH] * 5

    def starts(lengths):
        sums = torch.tensor([0, *lengths]).cumsum(0)
        return sums.to(DEVICE, torch.int32)

    # As the model makes them: [1, T, heads, D] seen as [1, heads, T, D].
    return Batch(
        q=randn(tokens, heads, head_dim, dtype=dtype),
        k=randn(tokens, kv_heads, head_dim, dtype=dtype),
        v=randn(tokens, kv_heads, head_dim, dtype=dtype),
        pages=flat.to(DEVICE, dtype),
        starts_q=starts(queries),
        starts_k=starts(totals),
        read_index=torch.tensor(read, device=DEVICE),
        write_index=torch.tensor(write, device=DEVICE),
        block_table=table.to(DEVICE),
        longest=max(totals),
    )


MIXED = [(0, 5), (7, 1), (18, 3), (9, 1)]
CASES = [
    pytest.param([(0, 1)], {}, id="one-token"),
    pytest.param([(0, 37)], {}, id="one-prompt-of-several-tiles"),
    pytest.param([(21, 1)], {}, id="one-sequence-generates"),
    pytest.param([(19, 18)], {}, id="a-later-part-of-a-prompt"),
    pytest.param(MIXED, {}, id="prompts-and-generation"),
    pytest.param([(3, 1), (4, 1), (5, 1), (16, 4), (15, 2)], {}, id="page-and-tile-boundaries"),
    pytest.param(MIXED, {"padding": (3, 0)}, id="empty-sequences"),
    pytest.param(MIXED, {"padding": (2, 11)}, id="padded-tokens"),
    pytest.param([(0, 2), (0, 0), (6, 0), (5, 2)], {}, id="empty-sequences-in-between"),
    pytest.param(MIXED, {"heads": 2}, id="a-head-for-each-head"),
    pytest.param(MIXED, {"heads": 14}, id="seven-for-each-head"),
    pytest.param([(5, 2), (0, 3)], {"heads": 24, "kv_heads": 1}, id="more-than-a-tile-for-a-head"),
    pytest.param(MIXED, {"head_dim": 8}, id="head-of-8"),
    pytest.param(MIXED, {"head_dim": 33}, id="head-of-33"),
    pytest.param(MIXED, {"head_dim": 40}, id="head-of-40"),
    pytest.param(MIXED, {"head_dim": 64}, id="head-of-64"),
    pytest.param(MIXED, {"head_dim": 128}, id="head-of-128"),
    pytest.param([(5, 1), (0, 3)], {"head_dim": 256}, id="head-of-256"),
]


# In the interpreter bf16 is widened, and takes the path of fp32.
HERE = DTYPES if torch.cuda.is_available() else DTYPES[:2]


def tile_for(batch):
    group = batch.q.shape[1] // batch.k.shape[1]
    return SMALL if group <= 16 else replace(SMALL, block_m=32)


@pytest.mark.parametrize("dtype", HERE)
@pytest.mark.parametrize(("sequences", "settings"), CASES)
def test_kernel_is_as_accurate_as_torch(sequences, settings, dtype):
    batch = make_batch(sequences, dtype=dtype, **settings)
    batch.check(config=tile_for(batch))


def test_bf16():
    make_batch(MIXED, dtype=torch.bfloat16).check()


def test_more_sequences_than_are_compared_at_once():
    sequences = [(3, 1), *[(0, 0)] * 260, (2, 3)]
    make_batch(sequences, heads=2, kv_heads=1, head_dim=8, padding=(0, 2)).check()


@pytest.mark.parametrize(("sequences", "settings"), CASES[4:9])
def test_pages_of_a_table_are_as_good_as_places(sequences, settings):
    batch = make_batch(sequences, **settings)
    out = batch.check("pages")
    assert torch.equal(out, batch.check("places"))


@pytest.mark.parametrize(("splits", "described"), [(2, "places"), (5, "places"), (3, "pages")])
def test_splits_are_put_together(splits, described):
    # 256 cached tokens are one split, 257 two; 700 three.
    sequences = [(700, 1), (256, 1), (257, 1), (0, 2), (300, 3)]
    batch = make_batch(sequences, heads=2, kv_heads=1, head_dim=8, padding=(2, 3))
    config = TileConfig(16, 128, splits=splits)
    batch.check(described, config=config)


def test_splits_in_half_precision():
    batch = make_batch([(700, 1), (300, 2)], head_dim=16, dtype=torch.float16)
    batch.check(config=TileConfig(16, 128, splits=3))


def test_long_context_with_one_query():
    make_batch([(2000, 1)], heads=2, kv_heads=1, head_dim=8).check(
        config=TileConfig(16, 128, splits=4)
    )


@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_window(window):
    batch = make_batch([(0, 20), (21, 1), (18, 19), (60, 2)], head_dim=8, padding=(1, 2))
    batch.check(window=window)


def test_window_of_which_a_split_is_no_part():
    batch = make_batch([(300, 2), (600, 1)], heads=2, kv_heads=1, head_dim=8)
    batch.check(window=40, config=TileConfig(16, 64, splits=3))


def test_ring_is_read_before_it_is_written():
    # The last 8 of 12 new tokens go where the 7 cached ones lie, which the first of them still see;
    # they are of two blocks, of which the last one runs first.
    batch = make_batch([(7, 12), (3, 2)], padding=(1, 2))
    batch.write_index[:4] = TRASH
    batch.write_index[4:12] = batch.read_index[:8]
    batch.check(window=8, is_ring=True)


def test_unused_and_later_places_are_never_read():
    batch = make_batch(MIXED, padding=(1, 3))
    out = batch.check()
    batch.pages[batch.write_index] = float("inf")
    batch.read_index[int(batch.starts_k[-1]) :] = -(2**40)
    batch.block_table[batch.block_table < 0] = 2**30
    assert torch.equal(out, batch.attend(paged_attention, config=SMALL)[0])
    assert torch.equal(out, batch.attend(paged_attention, config=SMALL, described="pages")[0])


def test_order_of_pages_and_padding_change_no_bit():
    batches = [
        make_batch(MIXED),
        make_batch(MIXED, order=torch.arange(1, 99)),
        make_batch(MIXED, padding=(4, 9)),
    ]
    first, outs = batches[0], []
    tokens, end = len(first.q), int(first.starts_k[-1])
    for batch in batches:
        for name in ("q", "k", "v"):
            getattr(batch, name)[:tokens] = getattr(first, name)
        for own, other in zip(batch.places(end), first.places(end), strict=True):
            batch.pages[own] = first.pages[other]
        outs.append(batch.attend(paged_attention, config=SMALL)[0])
    assert all(torch.equal(out[:tokens], outs[0]) for out in outs)


def test_no_tokens():
    batch = make_batch([(5, 0)])
    assert paged_attention(
        batch.q, batch.k, batch.v, batch.pages, batch.pages[PAGE:], batch.starts_q, batch.starts_k,
        scaling=1.0, longest=5, write_index=batch.write_index,
    ).shape == (0, 4, 16)  # fmt: skip


def test_heads_of_one_tensor_are_read_where_they_are():
    # q, k and v side by side, and a query whose numbers are not contiguous.
    batch = make_batch(MIXED)
    joined = torch.cat((batch.q, batch.k, batch.v), 1)
    expected, _ = batch.attend(paged_attention, config=SMALL)
    batch.k, batch.v = joined[:, 4:6], joined[:, 6:]
    batch.q = batch.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(batch.attend(paged_attention, config=SMALL)[0], expected)


def test_default_tile_of_every_size():
    batch = make_batch(MIXED, dtype=torch.float16)
    batch.check(config=None)
    limits = kernels.device_limits(torch.device("cpu"))
    for tokens in (1, 256, 257, 2048, 2049):
        for group in (1, 7, 8, 100):
            tile = kernels._default_tile(limits, torch.float16, tokens, group, 128)
            assert tile.block_m >= max(16, group)
            assert kernels._SPLIT_KEYS.value % tile.block_n == 0


def test_few_long_sequences_are_split_and_many_are_not():
    limits = replace(kernels.device_limits(torch.device("cpu")), processors=132)

    def splits(tokens, sequences, longest):
        return kernels._default_splits(limits, tokens, sequences, 8, 32 * 128, longest)

    assert splits(1, 1, 32768) == 64
    assert splits(1, 1, 1024) == 4  # of 256 tokens
    assert splits(64, 64, 1024) == 1
    assert splits(64, 64, 32768) == 8  # none longer than 4096
    assert splits(8192, 1024, 32768) == 1  # 128 MiB hold no two results of so many tokens


@pytest.mark.gpu
@pytest.mark.parametrize("described", ["places", "pages"])
def test_captured_launch_is_right_for_later_batches(described):
    torch.manual_seed(5)
    batch = make_batch(
        [(700, 1), (3, 1), (0, 1)], head_dim=64, dtype=torch.bfloat16, padding=(5, 5)
    )
    batch.longest = 1024
    other = make_batch(
        [(2, 1), (5, 3), (1000, 1)], head_dim=64, dtype=torch.bfloat16, padding=(5, 3)
    )
    names = ("q", "k", "v", "starts_q", "starts_k", "read_index", "write_index", "block_table")
    number = max(len(batch.pages), len(other.pages))
    pages = torch.zeros((number, *batch.pages.shape[1:]), dtype=torch.bfloat16, device=DEVICE)
    static = {}
    for name in names:
        a, b = getattr(batch, name), getattr(other, name)
        shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
        static[name] = torch.zeros(shape, dtype=a.dtype, device=DEVICE)

    def load(source):
        pages.zero_()
        pages[: len(source.pages)] = source.pages
        for name in names:
            value = getattr(source, name)
            static[name][tuple(map(slice, value.shape))] = value

    def attend():
        lists = {"block_table": static["block_table"], "page_size": PAGE}
        if described == "places":
            lists = {name: static[name] for name in ("read_index", "write_index")}
        return paged_attention(
            *(static[name] for name in ("q", "k", "v")), pages, pages[PAGE:], static["starts_q"],
            static["starts_k"], scaling=0.125, longest=1024, **lists,
        )  # fmt: skip

    load(batch)
    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for source in (other, batch):
        load(source)
        graph.replay()
        expected, left = source.attend(paged_attention, described=described, config=None)
        assert torch.equal(out[: len(expected)], expected)
        assert torch.equal(pages[: len(left)].nan_to_num(7.0), left.nan_to_num(7.0))
