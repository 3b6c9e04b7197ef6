"""The operators in plain PyTorch: for CPUs, and for whatever the kernels do not take.

They compute what ``reference.py`` defines, with one rounding for the frozen GEMM and one for the
sum (under dropout, dx rounds its low-rank term too, as peft does). They walk the rows in pieces
wherever a dropout mask is drawn or read.

Dtypes: every tensor is taken as it is stored. ``dtype`` and ``rank_dtype`` say what to compute in,
so that autocast casts an fp32 adapter inside the operator and no cast copy is ever saved.

    dtype        of the frozen GEMM: the base weight's, or autocast's
    rank_dtype   of everything that touches the rank: the adapter's, or autocast's
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlora import dropout

# 65,536 Philox counters are 0.5 MiB of int64: the generator's temporaries stay in the L2 cache of a
# CPU core (1024 x 1536 on two cores: 5.4 ms, against 7.2 ms in one piece and 10.9 ms for
# nn.Dropout).
_COUNTERS_PER_CPU_PIECE = 1 << 16
# Elsewhere larger pieces keep the launches few and the temporaries, 9 bytes an element, small.
_COUNTERS_PER_PIECE = 1 << 22


def _masked_pieces(matrix: Tensor) -> Iterator[slice]:
    """Split the rows of a masked operand into pieces for whose mask there is room."""
    rows, columns = matrix.shape
    counters = _COUNTERS_PER_CPU_PIECE if matrix.device.type == "cpu" else _COUNTERS_PER_PIECE
    step = max(1, counters * dropout.LANES // columns)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def shrink(
    x: Tensor,
    lora_as: Sequence[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    return_bits: bool,
    *,
    rank_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    hs, bits = shrink_outputs(x, lora_as, seed, dropout_p, return_bits, rank_dtype=rank_dtype)
    a_ts = [lora_a.to(rank_dtype).t() for lora_a in lora_as]
    if seed is None:
        wide = x.to(rank_dtype)
        for h, a_t in zip(hs, a_ts, strict=True):
            torch.mm(wide, a_t, out=h)
        return hs, bits
    for piece in _masked_pieces(x):
        part = x[piece].to(rank_dtype)
        for g, (h, a_t) in enumerate(zip(hs, a_ts, strict=True)):
            keep = dropout.keep_rows(seed, piece, part.shape[1], dropout_p, g)
            torch.mm(part * keep, a_t, out=h[piece])
            if bits:
                bits[g][piece] = dropout.pack(keep)
    return hs, bits


def shrink_outputs(
    x: Tensor,
    lora_as: Sequence[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    return_bits: bool,
    *,
    rank_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    m, k = x.shape
    blocks = -(-k // dropout.LANES)
    hs = [x.new_empty((m, lora_a.shape[0]), dtype=rank_dtype) for lora_a in lora_as]
    if not return_bits or seed is None:
        return hs, []
    return hs, [x.new_empty((m, blocks), dtype=torch.uint8) for _ in lora_as]


def low_rank_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    gain: float,
    *,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = low_rank_gemm_output(x, weight, bias, h, lora_b, gain, dtype=dtype)
    y = out.view(-1, out.shape[-1])
    x, weight_t = x.to(dtype), weight.to(dtype).t()
    if bias is None:
        torch.mm(x, weight_t, out=y)
    else:
        torch.addmm(bias.to(dtype), x, weight_t, out=y)
    _add_product(y, h, lora_b.to(h.dtype).t(), gain)
    return out


def low_rank_gemm_output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    gain: float,
    *,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


def _add_product(out: Tensor, left: Tensor, right: Tensor, gain: float) -> None:
    """Compute ``out += gain * left @ right`` in the wider of the two dtypes, rounded once."""
    wide = torch.promote_types(out.dtype, left.dtype)
    left, right = left.to(wide), right.to(wide)
    if wide == out.dtype:
        out.addmm_(left, right, alpha=gain)
    else:
        out.copy_(out.to(wide).addmm_(left, right, alpha=gain))


def adapter_grads(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor],
    gains: Sequence[float],
    dropout_p: float,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    dhs, das, dbs = adapter_grads_outputs(
        dys,
        x,
        hs,
        lora_bs,
        masks,
        gains,
        dropout_p,
        need_dh=need_dh,
        rank_dtype=rank_dtype,
        grad_dtype=grad_dtype,
    )
    for g, (dy, gain) in enumerate(zip(dys, gains, strict=True)):
        dy = dy.to(rank_dtype)
        if need_dh:
            # beta = 0: the product is scaled before it is rounded, and what dh held is not read.
            torch.addmm(dhs[g], dy, lora_bs[g].to(rank_dtype), beta=0, alpha=gain, out=dhs[g])
        if hs:
            # Into the rank's dtype first: a GEMM cannot store fp32 from half-precision operands.
            product = dbs[g].to(rank_dtype)
            dbs[g].copy_(product.addmm_(dy.t(), hs[g], beta=0, alpha=gain))
    if x is not None:
        _fill_das(das, dhs, x, masks, dropout_p)
    return dhs, das, dbs


def adapter_grads_outputs(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor],
    gains: Sequence[float],
    dropout_p: float,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    m, rank, new_empty = dys[0].shape[0], lora_bs[0].shape[1], dys[0].new_empty
    dhs = [new_empty((m, rank), dtype=rank_dtype) for _ in dys] if need_dh else []
    das = [] if x is None else [new_empty((rank, x.shape[1]), dtype=grad_dtype) for _ in dys]
    dbs = [new_empty((b.shape[0], rank), dtype=grad_dtype) for b in lora_bs] if hs else []
    return dhs, das, dbs


def _fill_das(
    das: Sequence[Tensor],
    dhs: Sequence[Tensor],
    x: Tensor,
    masks: Sequence[Tensor],
    dropout_p: float,
) -> None:
    """Compute ``dA_g = dh_g^T (keep_g * x)``: ``[R, K]`` for every sibling."""
    if not masks:
        wide = x.to(dhs[0].dtype)
        for da, dh in zip(das, dhs, strict=True):
            da.copy_(dh.t() @ wide)
        return
    # The pieces are summed in fp32 at least: rounding a running sum to bf16 would add up.
    total_dtype = torch.promote_types(dhs[0].dtype, torch.float32)
    totals = [da.new_zeros(da.shape, dtype=total_dtype) for da in das]
    for piece in _masked_pieces(x):
        part = x[piece].to(dhs[0].dtype)
        for g, (total, dh) in enumerate(zip(totals, dhs, strict=True)):
            keep = _keep(masks, g, piece, part.shape[1], dropout_p)
            total += dh[piece].t() @ (part * keep)
    for da, total in zip(das, totals, strict=True):
        da.copy_(total)


def _keep(masks: Sequence[Tensor], g: int, piece: slice, k: int, dropout_p: float) -> Tensor:
    """Return some rows of a sibling's keep mask; one seed draws those of all siblings."""
    mask = masks[g] if masks[0].dtype == torch.uint8 else masks[0]
    return dropout.keep_rows(mask, piece, k, dropout_p, g)


def input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dhs: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    masks: Sequence[Tensor],
    dropout_p: float,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = input_grad_output(
            dys, weights, dhs, lora_as, masks, dropout_p, dtype=dtype, grad_dtype=grad_dtype
        )
    dx = out.view(-1, out.shape[-1])
    for g, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        dy, weight = dy.to(dtype), weight.to(dtype)
        if grad_dtype != dtype:
            product = dy @ weight
            dx = dx.copy_(product) if g == 0 else dx.add_(product)
        elif g == 0:
            torch.mm(dy, weight, out=dx)
        else:
            dx.addmm_(dy, weight)
    adapters = [a.to(dh.dtype) for a, dh in zip(lora_as, dhs, strict=True)]
    if not masks:
        for dh, a in zip(dhs, adapters, strict=True):
            _add_product(dx, dh, a, 1.0)
        return out
    for piece in _masked_pieces(dx):
        for g, (dh, a) in enumerate(zip(dhs, adapters, strict=True)):
            low_rank = dh[piece] @ a
            dx[piece] += low_rank.mul_(_keep(masks, g, piece, low_rank.shape[1], dropout_p))
    return out


def input_grad_output(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dhs: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    masks: Sequence[Tensor],
    dropout_p: float,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> Tensor:
    return dys[0].new_empty((dys[0].shape[0], lora_as[0].shape[1]), dtype=grad_dtype)
