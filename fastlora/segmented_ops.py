"""Rows with adapters of their own: the operator, and its launches beside frozen layers.

``torch.ops.fastlora.segmented_add`` adds every row's low-rank term to the outputs of linears that
share their input. What serving calls knows more than the operator: the frozen products, which may
be one launch of our own (``linears_with_adapters``, ``frozen_linears``), or beside which the shrink
may run (``with_adapters``). As in ``ops.py`` nothing is read back on a GPU, and launches go to the
device of the operands.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastlora import plans, segmented
from fastlora.kernels.layout import are_aligned, as_rows
from fastlora.kernels.tile_config import allows_tf32
from fastlora.ops import PLAIN_TENSORS, is_watched, on_device, register, without_autocast
from fastlora.segmented import Adapters
from fastlora.segments import Segments

_Key = tuple[Any, ...]
# The arena, the descriptors of a group's linears, and which adapter every row has.
_Table = tuple[Tensor, Tensor, Segments]

# Shrinks run beside the frozen products: in linears_with_adapters by early launch, elsewhere on a
# stream of their own while a CUDA graph is captured (with_adapters). A decode step of the linears
# of Qwen2.5-7B, 64 rows with 16 adapters: 5.01 ms for 5.56, and 5.80 for 6.07 (H200).
OVERLAPS = True
# Batches of so few rows take linears_with_adapters: decode_gemm reads the weights of all siblings
# in one launch. With 128 rows it is as fast as cuBLAS for a layer of 7B: q, k, v in 16 us for 29,
# gate and up in 96 for 82 (H200).
DECODE_GEMM_ROWS = 64
# And batches of so many: 8,192 tokens of 16 adapters run at 94 % of the base model's speed, for 90
# with an expand after each product (H200, 7B). By arithmetic a row block whose rows have many
# adapters costs 10 us a layer for each of them: with 47, at this size, as much as all expands.
PREFILL_ROWS = 8192


@functools.cache
def _launchers() -> SimpleNamespace:
    """Import the kernels, and triton with them, when the first of them is launched."""
    from fastlora.kernels.decode_gemm import prepare_decode_gemm
    from fastlora.kernels.segmented_expand import prepare_segmented_expand
    from fastlora.kernels.segmented_gemm import prepare_segmented_gemm
    from fastlora.kernels.segmented_shrink import prepare_segmented_shrink

    return SimpleNamespace(
        shrink=prepare_segmented_shrink,
        expand=prepare_segmented_expand,
        gemm=prepare_segmented_gemm,
        decode_gemm=prepare_decode_gemm,
    )


def add_adapters(
    ys: Sequence[Tensor],
    x: Tensor,
    arena: Tensor,
    descriptors: Tensor,
    segments: Segments,
    *,
    max_rank: int,
    adapters: Callable[[int, tuple[int, ...]], Adapters],
) -> None:
    """``segmented_add``, past torch's dispatcher where nobody watches.

    Args:
        ys: for each sibling ``[T, N_s]``.
        x: ``[T, K]``.
        arena: with the weights of all adapters.
        descriptors: ``[S, slots, 4]``, where in it they are.
        segments: which adapter every row has.
        max_rank: at least every adapter's, a multiple of 16.
        adapters: returns the adapters of a sibling in some slots, for PyTorch.
    """
    if is_watched(x):
        tensors = (arena, descriptors, segments.slots, segments.order, segments.tiles)
        segmented_add(list(ys), x, *tensors, segments.block_m, max_rank)
    elif _plan(x, max_rank) == plans.PLAIN:
        runs = segments.on_host()
        with without_autocast(x.device.type):
            for s, y in enumerate(ys):
                segmented.add_adapters(y, x, adapters(s, runs.slots), runs)
    else:
        _launch(ys, x, (arena, descriptors, segments), max_rank)


def with_adapters(
    compute: Callable[[], list[Tensor]],
    x: Tensor,
    arena: Tensor,
    descriptors: Tensor,
    segments: Segments,
    *,
    max_rank: int,
    adapters: Callable[[int, tuple[int, ...]], Adapters],
) -> list[Tensor]:
    """Compute the outputs of frozen layers and add every row's low-rank term, as ``add_adapters``.

    While a CUDA graph is captured the shrink has a stream of its own, beside the frozen products:
    most of its time is that of a launch, and of four loads that wait for each other.

    Args:
        compute: returns for each sibling ``[..., N_s]``, contiguous; they are changed in place.
        x: as in ``add_adapters``, and what follows.

    Returns:
        What ``compute`` returned.
    """
    if not (OVERLAPS and _is_captured(x, max_rank)):
        ys = compute()
        flat = [y.view(-1, y.shape[-1]) for y in ys]
        add_adapters(flat, x, arena, descriptors, segments, max_rank=max_rank, adapters=adapters)
        return ys
    table = (arena, descriptors, segments)
    key = _key_of(x, table, max_rank)
    with on_device(x.device):
        main, beside = torch.cuda.current_stream(), _stream_beside(x.device)
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            h = _shrink_of(key, x, table, max_rank)(x, *table)
        try:
            ys = compute()
        finally:  # a capture that fails is to say why, and not that a stream was left open
            main.wait_stream(beside)
        flat = [y.view(-1, y.shape[-1]) for y in ys]
        _expand_of(key, flat, h, table)(flat, h, *table)
    return ys


def _is_captured(x: Tensor, max_rank: int) -> bool:
    """Return whether kernels are launched for ``x`` into a CUDA graph.

    Without one a second stream costs the host more than the device saves.
    """
    if x.device.type != "cuda":
        return False
    with on_device(x.device):
        capturing = torch.cuda.is_current_stream_capturing()
        return capturing and not is_watched(x) and _plan(x, max_rank) != plans.PLAIN


def fuses_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    arena: Tensor,
    max_rank: int,
    *,
    has_adapters: bool = True,
) -> bool:
    """Return whether frozen layers are to be computed without torch's products.

    By ``linears_with_adapters``, or without adapters by ``frozen_linears``. Not where gradients,
    autocast or a subclass of tensors mean more by the frozen product than the numbers in it.

    Args:
        x: ``[..., K]``.
        weights: for each sibling ``[N_s, K]``.
        biases: for each ``[N_s]`` or ``None``.
        arena: with the weights of all adapters.
        max_rank: at least every adapter's.
        has_adapters: of any row.
    """
    operation = _gemm_for(x)
    # First: the rest takes the host 10 us, a small linear's time on a CPU.
    if operation is None or (operation == plans.SEGMENTED_GEMM and not has_adapters):
        return False
    (t, k, *_), device, dtype = as_rows(x), x.device, x.dtype
    return (
        dtype == arena.dtype
        and all(type(w) in PLAIN_TENSORS and w.dtype == dtype for w in weights)
        and all(b is None or _is_plain_vector(b, dtype) for b in biases)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(device.type)
        and not is_watched(x)
        and are_aligned(dtype, [w.shape[0] for w in weights], (x, *weights))
        and plans.plan_for(
            operation,
            device,
            dtype,
            t,
            sum(w.shape[0] for w in weights),
            k,
            max_rank,
            siblings=len(weights),
        )
        == plans.FUSED
    )


def _is_plain_vector(bias: Tensor, dtype: torch.dtype) -> bool:
    return type(bias) in PLAIN_TENSORS and bias.dtype == dtype and bias.is_contiguous()


def _gemm_for(x: Tensor) -> str | None:
    """Return which GEMM of our own a batch may take, by its device and its rows, if any."""
    if x.device.type != "cuda" and not plans.interpreting():
        return None
    rows = x.numel() // x.shape[-1]
    if 0 < rows <= DECODE_GEMM_ROWS:
        return plans.DECODE_GEMM
    return plans.SEGMENTED_GEMM if rows >= PREFILL_ROWS else None


def frozen_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Compute frozen layers of a step that generates, which no adapter changes.

    Args:
        x: ``[T, K]``, of which ``fuses_linears`` has to be true, with what follows.
        weights: for each sibling, at most four, ``[N_s, K]``.
        biases: for each ``[N_s]`` or ``None``.

    Returns:
        For each ``[T, N_s]``, contiguous.
    """
    with on_device(x.device):
        return _decode_of(x, weights, biases)(x, weights, biases)


def linears_with_adapters(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    arena: Tensor,
    descriptors: Tensor,
    segments: Segments,
    *,
    max_rank: int,
) -> list[Tensor]:
    """Compute frozen layers with every row's low-rank term, in launches of our own alone.

    A step that generates: ``decode_gemm``, the shrink beside it, and the expand. A prefill: the
    shrink and ``segmented_gemm``.

    Args:
        x: ``[T, K]``, of which ``fuses_linears`` has to be true, with what follows.
        weights: for each sibling, at most four, ``[N_s, K]``.
        biases: for each ``[N_s]`` or ``None``.
        arena: as in ``add_adapters``, and what follows.

    Returns:
        For each ``[T, N_s]``, contiguous.
    """
    table = (arena, descriptors, segments)
    key = _key_of(x, table, max_rank)
    with on_device(x.device):
        if x.shape[0] <= DECODE_GEMM_ROWS:
            ys = _decode_of(x, weights, biases)(x, weights, biases)
            _shrink_and_expand(key, ys, x, table, max_rank, beside=OVERLAPS)
            return ys
        h = _shrink_of(key, x, table, max_rank)(x, *table)
        gemm = _gemm_of(key, x, weights, biases, h, table)
        return gemm(x, weights, biases, h, *table)


def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of this thread: two threads may capture at once."""
    streams: dict[torch.device, torch.cuda.Stream] = _local.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


_local = threading.local()


def _plan(x: Tensor, max_rank: int) -> plans.Plan:
    t, k = x.shape
    return plans.plan_for("segmented_add", x.device, x.dtype, t, 0, k, max_rank)


def _launch(ys: Sequence[Tensor], x: Tensor, table: _Table, max_rank: int) -> None:
    key = _key_of(x, table, max_rank)
    with on_device(x.device):
        _shrink_and_expand(key, ys, x, table, max_rank)


def _shrink_and_expand(
    key: _Key,
    ys: Sequence[Tensor],
    x: Tensor,
    table: _Table,
    max_rank: int,
    *,
    beside: bool = False,
) -> None:
    h = _shrink_of(key, x, table, max_rank, beside=beside)(x, *table)
    _expand_of(key, ys, h, table)(ys, h, *table)


def _key_of(x: Tensor, table: _Table, max_rank: int) -> _Key:
    """Return all that a shrink is prepared for: the layers of a model take turns with one."""
    arena, descriptors, segments = table
    tiles = segments.tiles
    return (
        *_key_of_input(x),
        arena.data_ptr() % 16,
        descriptors.shape,
        max_rank,
        segments.block_m,
        tiles.shape,
        tiles.stride(),
    )


def _key_of_input(x: Tensor) -> _Key:
    return (
        plans.generation(),
        x.dtype == torch.float32 and allows_tf32(),
        x.device,
        x.dtype,
        x.shape,
        x.stride(),
        x.data_ptr() % 16,
    )


def _shrink_of(
    key: _Key, x: Tensor, table: _Table, max_rank: int, *, beside: bool = False
) -> Callable[..., Tensor]:
    key += (beside,)
    shrink = _shrinks.get(key)
    if shrink is None:
        shrink = _launchers().shrink(x, *table, max_rank=max_rank, beside=beside)
        _keep(_shrinks, key, shrink)
    return shrink


def _expand_of(key: _Key, ys: Sequence[Tensor], h: Tensor, table: _Table) -> Callable[..., None]:
    key += tuple([(y.dtype, y.shape[1], y.stride(), y.data_ptr() % 16) for y in ys])
    expand = _expands.get(key)
    if expand is None:
        expand = _launchers().expand(ys, h, *table)
        _keep(_expands, key, expand)
    return expand


def _gemm_of(
    key: _Key,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    h: Tensor,
    table: _Table,
) -> Callable[..., list[Tensor]]:
    key += (OVERLAPS, *_layout_of(weights, biases))
    gemm = _gemms.get(key)
    if gemm is None:
        *_, segments = table
        after_shrink = OVERLAPS and segments.tiles.shape[1] > 0  # else none is launched
        gemm = _launchers().gemm(x, weights, biases, h, *table, after_shrink=after_shrink)
        _keep(_gemms, key, gemm)
    return gemm


def _decode_of(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Callable[..., list[Tensor]]:
    key = (*_key_of_input(x), *_layout_of(weights, biases))
    decode = _decodes.get(key)
    if decode is None:
        decode = _launchers().decode_gemm(x, weights, biases)
        _keep(_decodes, key, decode)
    return decode


def _layout_of(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> _Key:
    """Return what a product with frozen weights is prepared for."""
    return (
        *[(w.shape[0], w.stride(), w.data_ptr() % 16) for w in weights],
        *[None if b is None else b.data_ptr() % 16 for b in biases],
    )


def _keep(kept: dict[_Key, Any], key: _Key, launch: Any) -> None:
    if len(kept) >= _MAX_LAUNCHES:
        kept.clear()
    kept[key] = launch


_shrinks: dict[_Key, Callable[..., Tensor]] = {}
_expands: dict[_Key, Callable[..., None]] = {}
_gemms: dict[_Key, Callable[..., list[Tensor]]] = {}
_decodes: dict[_Key, Callable[..., list[Tensor]]] = {}
_MAX_LAUNCHES = 1024  # four groups of a model, at 256 sizes of a batch


def _segmented_add(
    ys: list[Tensor],
    x: Tensor,
    arena: Tensor,
    descriptors: Tensor,
    slots: Tensor,
    order: Tensor,
    tiles: Tensor,
    block_m: int,
    max_rank: int,
) -> None:
    segments = Segments(slots, order, tiles, block_m)
    if _plan(x, max_rank) != plans.PLAIN:
        _launch(ys, x, (arena, descriptors, segments), max_rank)
        return
    runs = segments.on_host()
    with without_autocast(x.device.type):
        for y, table in zip(ys, descriptors, strict=True):
            found = segmented.unpack(arena, table, runs.slots, x.shape[1], y.shape[1])
            segmented.add_adapters(y, x, found, runs)


def _no_outputs(*operands: Any) -> None:
    """Return nothing: the outputs are operands."""


segmented_add = register(
    "segmented_add",
    "(Tensor(a!)[] ys, Tensor x, Tensor arena, Tensor descriptors, Tensor slots, Tensor order, "
    "Tensor tiles, int block_m, int max_rank) -> ()",
    _segmented_add,
    _no_outputs,
)
