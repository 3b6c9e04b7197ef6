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

from .input_pass import prepare_input_pass
from .layout import allocator, as_rows, mask_kind
from .output_pass import prepare_output_pass
from .shrink import prepare_shrink
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
    apart = []
    if together is None:
        for each in zip(dys, lora_bs, gains, strict=True):
            apart.append(_prepare_alone(*each, need_dh, need_db, rank_dtype, grad_dtype))
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
            dhs, dbs = [], []
            for g, (alone, dy) in enumerate(zip(apart, dys, strict=True)):
                own_dh, own_db = alone(dy, None if h is None else h[g : g + 1])
                dhs.append(own_dh)
                if own_db is not None:
                    dbs.append(own_db)
            # A copy of M R numbers a sibling, beside passes over M N of them.
            dh = dhs[0] if len(dhs) == 1 else torch.cat(dhs)
            dbs = dbs or None
        if x is None or over_x is None or new_da is None:
            return dh, None, dbs
        das = [new_da() for _ in dys]
        over_x(x, dh, mask, tuple(das))
        return dh, das, dbs

    return run


def _prepare_alone(
    dy: Tensor,
    lora_b: Tensor,
    gain: float,
    need_dh: bool,
    need_db: bool,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Return ``dh`` and ``dB`` of one sibling as a function of its dy and ``h [1, M, R]``.

    One sibling may fit in one pass where all together do not.
    """
    n, rank = lora_b.shape
    if need_dh and need_db:
        one_pass = prepare_output_pass(
            [dy], [lora_b], [gain], rank_dtype=rank_dtype, grad_dtype=grad_dtype
        )
        if one_pass is not None:
            return _of_one(one_pass)
    over_dy = to_db = None
    if need_dh:
        over_dy = prepare_shrink(
            dy,
            [lora_b],
            dropped=False,
            return_bits=False,
            rank_dtype=rank_dtype,
            gain=gain,
            transposed=True,
        )
    if need_db:
        to_db = prepare_input_pass(
            dy,
            rank,
            [(1, rank)],  # dB [N, R] is the transpose of what the pass writes
            "none",
            0,
            gain=gain,
            dh_dtype=rank_dtype,
            rank_dtype=rank_dtype,
        )
    new_db = allocator((n, rank), grad_dtype, dy.device)
    no_dh = allocator((1, 0, rank), rank_dtype, dy.device)

    def run(dy: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dh = no_dh() if over_dy is None else over_dy(dy, None)[0]
        if to_db is None or h is None:
            return dh, None
        db = new_db()
        to_db(dy, h, None, (db.t(),))
        return dh, db

    return run


def _of_one(
    one_pass: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, list[Tensor]]],
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    def run(dy: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert h is not None  # dB is wanted
        dh, (db,) = one_pass([dy], h)
        return dh, db

    return run
