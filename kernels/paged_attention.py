"""Attention of sequences of any lengths over keys and values that lie in pages.

    out[t, h] = sum_j softmax_j(scaling * q[t, h] . k[j, g]) v[j, g],   g = h // (H / G)

over the tokens j of the sequence of t that do not come after t, nor ``window`` or more before it. A
sequence is its cached tokens, which are read where they lie, and then the tokens of this batch,
which are read from ``k`` and ``v`` and written to the pages on the way.

Grid: (blocks of queries of one sequence, heads of k, splits of the cached tokens). The query heads
of one head of k stand in one tile, so k and v are read once for all of them. The number of blocks
is bounded by the sizes T and S; each program looks up on the device whose block it is, and those
beyond the last one of a sequence leave at once. So one launch is right for every batch of its size,
as a CUDA graph needs.
Why splits: a few sequences that generate have no other parallelism; their results are put together
in a fixed order by a second kernel, never by atomics. Why new tokens are not read back from the
pages: no program then waits for what another one writes, and one launch does both.
The softmax is the online one, base 2: Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import dot, dot_precision
from .tile_config import (
    DeviceLimits,
    TileConfig,
    cached_by_shape,
    device_limits,
    with_stages_that_fit,
)

MAX_HEAD_DIM = 256

_LOG2_E = 1 / math.log(2)
_SEARCH = tl.constexpr(256)  # starts of sequences that are compared at once
# A split has a multiple of _SPLIT_KEYS cached tokens, whatever the tile: 256 tokens of 128 numbers
# are 128 KiB, beside which its own result of 4 heads (2 KiB, written and read) is little.
_SPLIT_KEYS = tl.constexpr(256)
_MAX_SPLITS = 64
_MAX_SPLIT_KEYS = 4096  # where few programs are wanted: a long sequence shall not end last
_MAX_PARTIAL_BYTES = 128 << 20


class _Rows(NamedTuple):
    """``[T, heads, D]``, contiguous in D."""

    tensor: Tensor
    stride_t: int
    stride_h: int


class _Pages(NamedTuple):
    """Two ``[places, heads, D]`` that are contiguous but for the places."""

    k: Tensor
    v: Tensor
    stride: int


class _Places(NamedTuple):
    """Where tokens lie in the pages: one by one, or by the pages of every sequence."""

    read: Tensor  # int64, of every key; or int32 [S, pages]
    stride: int  # of a sequence's pages
    write: Tensor | None  # int64 [T], of the new tokens; None: they are not written here


@triton.jit
def _sequence_of(starts_ptr, S, number, SIZE: tl.constexpr, IS_BLOCK: tl.constexpr):
    """Return the last i in ``[0, S]`` that starts at ``number`` or before; S stands for padding.

    Sequence i starts at token ``starts[i]``, or at block ``starts[i] // SIZE + i``: so many blocks
    have the sequences before it at most.
    """
    count = tl.zeros((), tl.int32)
    for first in range(0, S + 1, _SEARCH):
        i = first + tl.arange(0, _SEARCH)
        start = tl.load(starts_ptr + i, mask=i <= S, other=0)
        if IS_BLOCK:
            start = start // SIZE + i
        count += tl.sum(((start <= number) & (i <= S)).to(tl.int32), 0)
    return count - 1


@triton.jit
def _lengths(starts, S, T, sequence):
    """Return the first query of a sequence, its number of queries and of cached tokens."""
    starts_q, starts_k = starts
    first = tl.load(starts_q + sequence)
    is_real = sequence < S
    queries = tl.load(starts_q + sequence + 1, mask=is_real, other=0)
    queries = tl.where(is_real, queries, T) - first
    keys = tl.load(starts_k + sequence + 1, mask=is_real, other=0)
    keys -= tl.load(starts_k + sequence, mask=is_real, other=0)
    return first, queries, tl.where(is_real, keys - queries, 0)


@triton.jit
def _split_keys(cached, splits):
    """Return how many cached tokens each split of a sequence has; some may then have none."""
    return max(1, tl.cdiv(tl.cdiv(cached, splits), _SPLIT_KEYS)) * _SPLIT_KEYS


@triton.jit
def _places_of(places, sequence, first_key, keys, ok, PAGE_SIZE: tl.constexpr):
    """Return where cached tokens lie: listed one by one, or by the pages of a sequence."""
    if PAGE_SIZE == 0:
        return tl.load(places.read + first_key + keys, mask=ok, other=0)
    row = places.read + tl.cast(sequence, tl.int64) * places.stride
    page = tl.load(row + keys // PAGE_SIZE, mask=ok, other=0).to(tl.int64)
    return page * PAGE_SIZE + keys % PAGE_SIZE


@triton.jit
def _attend(q, k, v, visible, acc, highest, total, scale, MAY_SEE_NONE: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Add a block of keys to the unfinished softmax of every row."""
    scores = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
    scores = dot(q, tl.trans(k), scores, PRECISION) * scale
    scores = tl.where(visible, scores, -float("inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = new_highest
    if MAY_SEE_NONE:  # -inf - -inf is NaN
        base = tl.where(new_highest == -float("inf"), 0.0, new_highest)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(highest - base)
    total = total * kept + tl.sum(weights, 1)
    acc = dot(weights.to(v.dtype), v, acc * kept[:, None], PRECISION)
    return acc, new_highest, total


@triton.jit
def _load_rows(x, first, head, rows, columns, ok):
    """Load rows of one head that follow ``first``, by 32-bit offsets from there."""
    corner = x.tensor + tl.cast(first, tl.int64) * x.stride_t + tl.cast(head, tl.int64) * x.stride_h
    tile = corner + (rows * x.stride_t)[:, None] + columns[None, :]
    return tl.load(tile, mask=ok, other=0.0)


@triton.jit
def _store_rows(ptr, rows, columns, value, ok, HEAD_DIM: tl.constexpr):
    """Store rows of heads, rounded; the addresses are not kept in registers until then."""
    tile = ptr + rows[:, None] * HEAD_DIM + columns[None, :]
    tl.store(tile, value.to(ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["T", "S", "scale"])
def _paged_attention_kernel(
    # tensors
    q,
    k,
    v,
    pages,
    out_ptr,  # [T, H, D], contiguous
    partials,  # fp32 [splits, T, H, D] and [splits, T, H] (base-2 log of the sum); None: one split
    starts,  # int32 [S + 1] twice: of the sequences among the queries, and among all keys
    places,
    # sizes
    T,
    S,
    # run-time scalars
    scale,
    window,  # None: no window
    # tile
    GROUP: tl.constexpr,  # query heads of one head of k
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: places are listed one by one
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # The last blocks of a prompt see the most keys: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    sequence = _sequence_of(starts[0], S, block, BLOCK_Q, True)
    first_q, queries, cached = _lengths(starts, S, T, sequence)
    first = (block - first_q // BLOCK_Q - sequence) * BLOCK_Q
    split_keys = _split_keys(cached, tl.num_programs(2))
    if (first >= queries) | ((split > 0) & (split * split_keys >= cached)):
        return

    rows = tl.arange(0, BLOCK_M)
    tokens = first + rows // GROUP  # in the sequence's part of this batch
    heads = tl.cast(kv_head, tl.int64) * GROUP + rows % GROUP
    columns = tl.arange(0, BLOCK_D)
    row_ok = (rows < BLOCK_Q * GROUP) & (tokens < queries)
    column_ok = columns[None, :] < HEAD_DIM
    tile_ok = row_ok[:, None] & column_ok
    batch_rows = (first_q + tokens).to(tl.int64)
    out_rows = batch_rows * (tl.num_programs(1) * GROUP) + heads
    if sequence == S:
        zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        _store_rows(out_ptr, out_rows, columns, zeros, tile_ok, HEAD_DIM)
        return

    q_rows = batch_rows * q.stride_t + heads * q.stride_h
    q_tile = tl.load(q.tensor + q_rows[:, None] + columns[None, :], mask=tile_ok, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.zeros((BLOCK_M,), tl.float32) - float("inf")

    begin = split * split_keys
    end = min(begin + split_keys, cached)
    if window is not None:
        begin = max(begin, (cached + first + 1 - window) // BLOCK_N * BLOCK_N)
    first_key = tl.load(starts[1] + sequence)
    head_of_pages = kv_head * HEAD_DIM + columns[None, :]
    # Triton shares the stages out between the places and what lies there: as far ahead as below.
    for key in tl.range(begin, end, BLOCK_N, num_stages=2 * STAGES - 1):
        keys = key + tl.arange(0, BLOCK_N)
        key_ok = keys < end
        place = _places_of(places, sequence, first_key, keys, key_ok, PAGE_SIZE)
        offsets = (place * pages.stride)[:, None] + head_of_pages
        ok = key_ok[:, None] & column_ok
        k_tile = tl.load(pages.k + offsets, mask=ok, other=0.0)
        v_tile = tl.load(pages.v + offsets, mask=ok, other=0.0)
        visible = key_ok[None, :]
        if window is not None:
            visible = visible & (keys[None, :] > (cached + tokens - window)[:, None])
        acc, highest, total = _attend(
            q_tile, k_tile, v_tile, visible, acc, highest, total, scale,
            window is not None, PRECISION,
        )  # fmt: skip

    end = tl.where(split == 0, min(first + BLOCK_Q, queries), 0)
    begin = 0
    if window is not None:
        begin = max(0, (first + 1 - window) // BLOCK_N * BLOCK_N)
    for key in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        keys = key + tl.arange(0, BLOCK_N)
        ok = (keys < end)[:, None] & column_ok
        k_tile = _load_rows(k, first_q + key, kv_head, tl.arange(0, BLOCK_N), columns, ok)
        v_tile = _load_rows(v, first_q + key, kv_head, tl.arange(0, BLOCK_N), columns, ok)
        visible = keys[None, :] <= tokens[:, None]
        if window is not None:
            visible = visible & (keys[None, :] > (tokens - window)[:, None])
        acc, highest, total = _attend(
            q_tile, k_tile, v_tile, visible, acc, highest, total, scale,
            window is not None, PRECISION,
        )  # fmt: skip

    if window is not None:
        total = tl.where(total == 0.0, 1.0, total)  # a split that a row sees nothing of
    result = acc / total[:, None]
    if cached <= split_keys:  # the only split of this sequence
        _store_rows(out_ptr, out_rows, columns, result, tile_ok, HEAD_DIM)
    elif partials is not None:
        part_rows = tl.cast(split, tl.int64) * T * (tl.num_programs(1) * GROUP) + out_rows
        _store_rows(partials[0], part_rows, columns, result, tile_ok, HEAD_DIM)
        tl.store(partials[1] + part_rows, highest + tl.log2(total), mask=row_ok)

    if places.write is not None:
        row_ok = row_ok & (rows % GROUP == 0) & (split == 0)  # every token once
        if PAGE_SIZE == 0:
            place = tl.load(places.write + batch_rows, mask=row_ok, other=0)
        else:
            place = _places_of(places, sequence, 0, cached + tokens, row_ok, PAGE_SIZE)
        offsets = (place * pages.stride)[:, None] + head_of_pages
        ok = row_ok[:, None] & column_ok
        k_tile = _load_rows(k, first_q + first, kv_head, rows // GROUP, columns, ok)
        v_tile = _load_rows(v, first_q + first, kv_head, rows // GROUP, columns, ok)
        tl.store(pages.k + offsets, k_tile, mask=ok)
        tl.store(pages.v + offsets, v_tile, mask=ok)


@triton.jit(do_not_specialize=["T", "S", "splits"])
def _join_splits_kernel(
    out_ptr,  # [T, H, D], contiguous
    partials,
    starts,
    # sizes
    T,
    S,
    splits,
    # tile
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the splits of one token and head, each weighted by its share of the whole sum."""
    token, head = tl.program_id(0), tl.program_id(1)
    sequence = _sequence_of(starts[0], S, token, 1, False)
    _, _, cached = _lengths(starts, S, T, sequence)
    split_keys = _split_keys(cached, splits)
    if cached <= split_keys:  # of padding too: it was written where it was computed
        return
    values_ptr, logs_ptr = partials
    split = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    split_ok = split < tl.cdiv(cached, split_keys)
    row = tl.cast(token, tl.int64) * tl.num_programs(1) + head
    rows = split.to(tl.int64) * T * tl.num_programs(1) + row
    logs = tl.load(logs_ptr + rows, mask=split_ok, other=-float("inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    ok = split_ok[:, None] & (columns < HEAD_DIM)[None, :]
    values = tl.load(values_ptr + rows[:, None] * HEAD_DIM + columns[None, :], mask=ok, other=0.0)
    result = tl.sum(values * (weights / tl.sum(weights, 0))[:, None], 0)
    out = out_ptr + row * HEAD_DIM + columns
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    *,
    scaling: float,
    longest: int,
    read_index: Tensor | None = None,
    write_index: Tensor | None = None,
    block_table: Tensor | None = None,
    page_size: int = 0,
    window: int | None = None,
    is_ring: bool = False,
    config: TileConfig | None = None,
) -> Tensor:
    """Launch the attention of T tokens, and write their keys and values into the pages.

    What is on the device may differ from launch to launch of a captured graph: lengths, places and
    pages. Sequences without queries may follow the last one, and tokens of no sequence the last
    token: nothing is written of them, and their result is zero. Places that no list names are
    never read.

    Args:
        q: ``[T, H, D]``, contiguous in D: fp32, fp16 or bf16.
        k: ``[T, G, D]``, likewise; H is a multiple of G.
        v: likewise.
        k_pages: ``[places, G, D]`` in the dtype of ``k``, contiguous but for the places.
        v_pages: likewise, with the same strides.
        starts_q: ``[S + 1]`` int32, the first token of every sequence and the end of the last.
        starts_k: ``[S + 1]`` int32, the same of the cached tokens and the new ones together.
        scaling: of the scores.
        longest: at least the cached and new tokens of any sequence, now and whenever a graph is
            replayed; with it the number of splits is chosen.
        read_index: int64, the place of every key at ``starts_k``; only those of cached tokens are
            read. ``None`` or empty: no sequence has cached tokens.
        write_index: ``[T]`` int64, the places of the new tokens.
        block_table: instead of both: ``[S, pages]`` int32, contiguous in the last dimension, the
            pages of every sequence in their order.
        page_size: places of a page of ``block_table``.
        window: tokens that one sees, itself included.
        is_ring: new tokens may go where cached ones of the same batch lie, so they are written
            after all were read, by a launch for each of k and v. Needs ``write_index``.
        config: the tile and the splits; by default ones that run everywhere.

    Returns:
        ``[T, H, D]``, contiguous, summed in fp32 and rounded once.
    """
    tokens, heads, head_dim = q.shape
    sequences = starts_q.shape[0] - 1
    assert heads % k.shape[1] == 0, f"{heads} query heads for {k.shape[1]} of k"
    assert k_pages.stride() == v_pages.stride(), "k and v lie in different ways"
    assert k_pages.stride()[1:] == (head_dim, 1), f"pages with strides {k_pages.stride()}"
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    grid, constants, join = _settings(
        config,
        q.device,
        q.dtype,
        tokens,
        sequences,
        k.shape[1],
        heads // k.shape[1],
        head_dim,
        longest,
        dot_precision(q.dtype),
    )
    partials = _partials(grid[2], q) if grid[2] > 1 else None
    places = _places(read_index, write_index, block_table, is_ring)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    starts = starts_q, starts_k
    _paged_attention_kernel[grid](
        _Rows(q, *q.stride()[:2]),
        _Rows(k, *k.stride()[:2]),
        _Rows(v, *v.stride()[:2]),
        _Pages(k_pages, v_pages, k_pages.stride(0)),
        out,
        partials,
        starts,
        places,
        tokens,
        sequences,
        scaling * _LOG2_E,
        window,
        PAGE_SIZE=0 if block_table is None else page_size,
        **constants,
    )
    if partials is not None:
        _join_splits_kernel[(tokens, heads)](
            out, partials, starts, tokens, sequences, grid[2], HEAD_DIM=head_dim, **join
        )
    if is_ring:
        assert write_index is not None
        k_pages.index_copy_(0, write_index, k)
        v_pages.index_copy_(0, write_index, v)
    return out


def _partials(splits: int, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for the results of all splits: values, and the logarithms of their weights."""
    tokens, heads, head_dim = q.shape
    rows = (splits, tokens, heads)
    values = torch.empty((*rows, head_dim), dtype=torch.float32, device=q.device)
    return values, torch.empty(rows, dtype=torch.float32, device=q.device)


def _places(
    read_index: Tensor | None,
    write_index: Tensor | None,
    block_table: Tensor | None,
    is_ring: bool,
) -> _Places:
    """Return where keys and values lie, and where those of new tokens go."""
    if block_table is not None:
        assert not is_ring, "a ring is not described by its pages"
        return _Places(block_table, block_table.stride(0), block_table)
    assert write_index is not None, "neither write_index nor block_table"
    # Where nothing is cached, the place of no key is looked up.
    read = write_index if read_index is None or read_index.numel() == 0 else read_index
    return _Places(read, 0, None if is_ring else write_index)


@cached_by_shape
def _settings(
    config: TileConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    sequences: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    longest: int,
    precision: str,
) -> tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]]:
    """Return the grid and the compile-time arguments of both kernels."""
    limits = device_limits(device)
    if config is None:
        config = _default_tile(limits, dtype, tokens, group, head_dim)
        splits = _default_splits(
            limits, tokens, sequences, kv_heads, group * kv_heads * head_dim, longest
        )
    else:
        splits = config.splits
    block_d = max(16, triton.next_power_of_2(head_dim))
    config = with_stages_that_fit(
        config,
        limits,
        2 * config.block_n * block_d * dtype.itemsize,
        config.block_m * (block_d + config.block_n) * dtype.itemsize,
    )
    blocks = tokens // (config.block_m // group) + sequences + 1
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d,
        "STAGES": config.num_stages,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    join = {"BLOCK_S": triton.next_power_of_2(splits), "BLOCK_D": block_d, "num_warps": 4}
    return (blocks, kv_heads, splits), constants, join


def _default_tile(
    limits: DeviceLimits, dtype: torch.dtype, tokens: int, group: int, head_dim: int
) -> TileConfig:
    """Return a tile that fits every supported device; see ``benchmarks/targets.py``.

    Few tokens are sequences that generate, with one query each: the smallest tile that the tensor
    cores take. Many are prompts. Between them are batches of both, and tiles of which several
    programs fit a processor.
    """
    least = max(16, triton.next_power_of_2(group))
    wide_heads = head_dim > 128
    if dtype == torch.float32:  # 16 x 32 in four warps spills 328 bytes a thread (sm_90)
        block_n, warps = (16, 16) if wide_heads else (32, 8)
        return TileConfig(least, block_n, num_warps=warps, num_stages=2)
    odd = head_dim % 8 > 0  # loads of single elements, which take an address each
    if (tokens <= 256 or odd) and least <= 32:
        small = wide_heads or odd or limits.shared_bytes < 160 * 1024
        return TileConfig(least, 32 if small else 64, num_warps=4, num_stages=3)
    if wide_heads:  # 64 rows in four warps spill 64 bytes (sm_90), in eight 8 (sm_80)
        block_m = 64 if limits.capability in (90, 100) else 32
        return TileConfig(max(block_m, least), 32, num_warps=8, num_stages=3)
    # Of the largest tile 128 x 32 spills 64 bytes on sm_120.
    if (tokens <= 2048 or limits.capability == 120) and least <= 64:
        # 64 x 64 spills 88 bytes with 7 heads in a group (sm_90), four warps 16 (sm_80, sm_100).
        warps = 4 if limits.capability == 90 else 8
        return TileConfig(64, 32, num_warps=warps, num_stages=3)
    # 64 keys spill 24 bytes on sm_100 and up to 152 on the others.
    block_n = 64 if limits.capability == 90 else 32
    return TileConfig(max(128, least), block_n, num_warps=8, num_stages=3)


def _default_splits(
    limits: DeviceLimits, tokens: int, sequences: int, kv_heads: int, width: int, longest: int
) -> int:
    """Return in how many parts the cached tokens of a sequence are split at most.

    So many that one query of every sequence fills the device, that no part is very long, and that
    the partial results of all tokens have room.
    """
    wanted = max(4 * limits.processors // (sequences * kv_heads), -(-longest // _MAX_SPLIT_KEYS))
    most = min(_MAX_SPLITS, -(-longest // _SPLIT_KEYS.value))
    room = _MAX_PARTIAL_BYTES // (4 * tokens * width)
    return max(1, min(wanted, most, room))
