"""Gradients of the adapters of one or several siblings: a pass over every ``dy``, one over ``x``.

    output pass    dh_g = gain_g * dy_g B_g, dB_g = gain_g * dy_g^T h_g    (``output_pass.py``)
    input pass     dA_g = dh_g^T (keep_g * x)                              (``input_pass.py``)

Where one pass over ``dy`` would not pay, or only one of its results is wanted, the two are computed
by the kernels of the other products, which have the same form: ``dh`` is a shrink of ``dy``, and
``dB`` an input pass over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .input_pass import input_pass, prepare_input_pass
from .layout import allocator, as_rows
from .output_pass import prepare_output_pass
from .philox import mask_kind
from .shrink import shrink
from .tile_config import TileConfig

Grads = tuple[Tensor, "list[Tensor] | None", "list[Tensor] | None"]


def adapter_grads(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    lora_bs: Sequence[Tensor],
    mask: Tensor | None,
    gains: Sequence[float],
    threshold: int = 0,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    output_config: TileConfig | None = None,
    input_config: TileConfig | None = None,
) -> Grads:
    """Launch the passes that are needed for the gradients that are asked for.

    Everything takes four launches for any number of siblings, up to rank 64 (16 in fp32); above
    it, and where the partial results would take more than 256 MiB, a sibling takes up to four of
    its own for ``dh`` and ``dB``.

    Args:
        dys: for each sibling ``[M, N_g]``, any strides (an expanded one too) and float dtype; cast
            as it is loaded.
        x: ``[M, K]``, likewise, the input of all, or ``None`` to leave ``dA`` out.
        h: ``[S, M, R]`` of S siblings, contiguous, or ``None`` to leave ``dB`` out.
        lora_bs: for each sibling ``[N_g, R]``, any strides and float dtype; all of one rank.
        mask: uint8 bits ``[S, M, ceil(K / 8)]``, contiguous; or a seed (one int64), of which
            sibling g draws stream g; or ``None`` without dropout.
        gains: for each sibling scaling / (1 - p).
        threshold: ``round(p * 65536)``; only a seed needs it.
        need_dh: compute ``dh``; without it ``x`` must be ``None``.
        rank_dtype: dtype of the operands of the products and of ``dh``.
        grad_dtype: of ``dA`` and ``dB``, rounded from the fp32 sum.
        output_config: tile of the pass over the dys; by default the tuned one or the default.
        input_config: tile of the pass over ``x``; likewise.

    Returns:
        ``dh [S, M, R]`` (empty if not needed), for each sibling ``dA [R, K]`` or ``None`` instead
        of the list, and for each ``dB [N_g, R]`` or ``None`` likewise.
    """
    run = prepare_adapter_grads(
        dys,
        x,
        lora_bs,
        mask_kind(mask),
        gains,
        threshold,
        need_dh=need_dh,
        need_db=h is not None,
        rank_dtype=rank_dtype,
        grad_dtype=grad_dtype,
        output_config=output_config,
        input_config=input_config,
    )
    return run(dys, x, h, mask)


def prepare_adapter_grads(
    dys: Sequence[Tensor],
    x: Tensor | None,
    lora_bs: Sequence[Tensor],
    mask: str,
    gains: Sequence[float],
    threshold: int = 0,
    *,
    need_dh: bool = True,
    need_db: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    output_config: TileConfig | None = None,
    input_config: TileConfig | None = None,
) -> Callable[[Sequence[Tensor], Tensor | None, Tensor | None, Tensor | None], Grads]:
    """Return ``adapter_grads`` for these adapters, as a function of dys, ``x``, ``h`` and mask.

    It may be called with any dys and ``x`` that are laid out in memory as these.
    """
    rank = lora_bs[0].shape[1]
    assert all(lora_b.shape[1] == rank for lora_b in lora_bs), "siblings of different ranks"
    together = None
    if need_dh and need_db:
        together = prepare_output_pass(
            dys, lora_bs, gains, rank_dtype=rank_dtype, grad_dtype=grad_dtype, config=output_config
        )
    over_x = new_da = None
    if x is not None:
        k = as_rows(x)[1]
        new_da = allocator((rank, k), grad_dtype, x.device)
        over_x = prepare_input_pass(
            x,
            rank,
            [(k, 1)] * len(dys),
            mask,
            threshold,
            dh_dtype=rank_dtype,
            rank_dtype=rank_dtype,
            config=input_config,
        )

    def run(
        dys: Sequence[Tensor], x: Tensor | None, h: Tensor | None, mask: Tensor | None
    ) -> Grads:
        dbs: list[Tensor] | None
        if together is not None and h is not None:
            dh, dbs = together(dys, h)
        else:
            dh, dbs = _one_by_one(dys, h, lora_bs, gains, need_dh, rank_dtype, grad_dtype)
        if x is None or over_x is None or new_da is None:
            return dh, None, dbs
        das = [new_da() for _ in dys]
        over_x(x, dh, mask, tuple(das))
        return dh, das, dbs

    return run


def _one_by_one(
    dys: Sequence[Tensor],
    h: Tensor | None,
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    need_dh: bool,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor] | None]:
    """Return every ``dh`` and ``dB``, each sibling by itself: one alone may fit in one pass."""
    dhs, dbs = [], []
    for g, (dy, lora_b, gain) in enumerate(zip(dys, lora_bs, gains, strict=True)):
        own_h = None if h is None else h[g : g + 1]
        if len(dys) > 1:
            grads = adapter_grads(
                [dy],
                None,
                own_h,
                [lora_b],
                None,
                [gain],
                need_dh=need_dh,
                rank_dtype=rank_dtype,
                grad_dtype=grad_dtype,
            )
            dhs.append(grads[0])
            dbs += grads[2] or []
            continue
        n, rank = lora_b.shape
        if need_dh:
            dhs.append(shrink(dy, [lora_b.t()], rank_dtype=rank_dtype, gain=gain)[0])
        else:
            dhs.append(dy.new_empty((1, 0, rank), dtype=rank_dtype))
        if own_h is not None:
            dbs.append(dy.new_empty((n, rank), dtype=grad_dtype))
            input_pass(dy, own_h, [dbs[0].t()], gain=gain, rank_dtype=rank_dtype)
    # A copy of M R numbers a sibling, beside passes over M N of them.
    dh = dhs[0] if len(dhs) == 1 else torch.cat(dhs)
    return dh, None if h is None else dbs
