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
) -> tuple[Tensor, Tensor]:
    h, bits = shrink_outputs(x, lora_as, seed, dropout_p, return_bits, rank_dtype=rank_dtype)
    a_ts = [lora_a.to(rank_dtype).t() for lora_a in lora_as]
    if seed is None:
        wide = x.to(rank_dtype)
        for g, a_t in enumerate(a_ts):
            torch.mm(wide, a_t, out=h[g])
        return h, bits
    for piece in _masked_pieces(x):
        part = x[piece].to(rank_dtype)
        for g, a_t in enumerate(a_ts):
            keep = dropout.keep_rows(seed, piece, part.shape[1], dropout_p, g)
            torch.mm(part * keep, a_t, out=h[g, piece])
            if return_bits:
                bits[g, piece] = dropout.pack(keep)
    return h, bits


def shrink_outputs(
    x: Tensor,
    lora_as: Sequence[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    return_bits: bool,
    *,
    rank_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    siblings, blocks = len(lora_as), -(-k // dropout.LANES)
    h = x.new_empty((siblings, m, lora_as[0].shape[0]), dtype=rank_dtype)
    # An operator returns a tensor for each of its results: nothing is an empty one.
    bits_shape = (siblings, m, blocks) if return_bits and seed is not None else (0,)
    return h, x.new_empty(bits_shape, dtype=torch.uint8)


def low_rank_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    h: Tensor,
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    *,
    dtype: torch.dtype,
) -> list[Tensor]:
    ys = low_rank_gemm_outputs(x, weights, biases, h, lora_bs, gains, dtype=dtype)
    fill_low_rank_gemm(ys, x, weights, biases, h, lora_bs, gains)
    return ys


def fill_low_rank_gemm(
    ys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    h: Tensor,
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
) -> None:
    """``low_rank_gemm`` into results that exist: for each sibling ``[M, N_g]``."""
    dtype = ys[0].dtype
    x = x.to(dtype)
    for g, (y, weight, bias) in enumerate(zip(ys, weights, biases, strict=True)):
        weight_t = weight.to(dtype).t()
        if bias is None:
            torch.mm(x, weight_t, out=y)
        else:
            torch.addmm(bias.to(dtype), x, weight_t, out=y)
        _add_product(y, h[g], lora_bs[g].to(h.dtype).t(), gains[g])


def low_rank_gemm_outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    h: Tensor,
    lora_bs: Sequence[Tensor],
    gains: Sequence[float],
    *,
    dtype: torch.dtype,
) -> list[Tensor]:
    return [x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype) for weight in weights]


def fill_scaled(y: Tensor, unscaled: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Compute ``y = scale * unscaled + bias``, rounded once, in one pass."""
    if bias is None:
        torch.mul(unscaled, scale, out=y)
    else:
        torch.addcmul(bias, unscaled, scale, out=y)


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
    h: Tensor | None,
    lora_bs: Sequence[Tensor],
    mask: Tensor | None,
    gains: Sequence[float],
    dropout_p: float,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dh, das, dbs = adapter_grads_outputs(
        dys,
        x,
        h,
        lora_bs,
        mask,
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
            torch.addmm(dh[g], dy, lora_bs[g].to(rank_dtype), beta=0, alpha=gain, out=dh[g])
        if h is not None:
            # Into the rank's dtype first: a GEMM cannot store fp32 from half-precision operands.
            product = dbs[g].to(rank_dtype)
            dbs[g].copy_(product.addmm_(dy.t(), h[g], beta=0, alpha=gain))
    if x is not None:
        _fill_das(das, dh, x, mask, dropout_p)
    return dh, das, dbs


def adapter_grads_outputs(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    lora_bs: Sequence[Tensor],
    mask: Tensor | None,
    gains: Sequence[float],
    dropout_p: float,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    m, rank, new_empty = dys[0].shape[0], lora_bs[0].shape[1], dys[0].new_empty
    dh = new_empty((len(dys), m if need_dh else 0, rank), dtype=rank_dtype)
    das = [] if x is None else [new_empty((rank, x.shape[1]), dtype=grad_dtype) for _ in dys]
    dbs = [] if h is None else [new_empty((b.shape[0], rank), dtype=grad_dtype) for b in lora_bs]
    return dh, das, dbs


def _fill_das(
    das: Sequence[Tensor], dh: Tensor, x: Tensor, mask: Tensor | None, dropout_p: float
) -> None:
    """Compute ``dA_g = dh_g^T (keep_g * x)``: ``[R, K]`` for every sibling."""
    if mask is None:
        wide = x.to(dh.dtype)
        for g, da in enumerate(das):
            da.copy_(dh[g].t() @ wide)
        return
    # The pieces are summed in fp32 at least: rounding a running sum to bf16 would add up.
    total_dtype = torch.promote_types(dh.dtype, torch.float32)
    totals = [da.new_zeros(da.shape, dtype=total_dtype) for da in das]
    for piece in _masked_pieces(x):
        part = x[piece].to(dh.dtype)
        for g, total in enumerate(totals):
            keep = dropout.keep_rows(mask, piece, part.shape[1], dropout_p, g)
            total += dh[g, piece].t() @ (part * keep)
    for da, total in zip(das, totals, strict=True):
        da.copy_(total)


def input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dh: Tensor,
    lora_as: Sequence[Tensor],
    mask: Tensor | None,
    dropout_p: float,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> Tensor:
    options = {"dtype": dtype, "grad_dtype": grad_dtype}
    dx = input_grad_output(dys, weights, dh, lora_as, mask, dropout_p, **options)
    fill_input_grad(dx, dys, weights, dh, lora_as, mask, dropout_p, dtype=dtype)
    return dx


def fill_input_grad(
    dx: Tensor,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dh: Tensor,
    lora_as: Sequence[Tensor],
    mask: Tensor | None,
    dropout_p: float,
    *,
    dtype: torch.dtype,
) -> None:
    """``input_grad`` into a result that exists: ``[M, K]``."""
    for g, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        dy, weight = dy.to(dtype), weight.to(dtype)
        if dx.dtype != dtype:
            product = dy @ weight
            dx = dx.copy_(product) if g == 0 else dx.add_(product)
        elif g == 0:
            torch.mm(dy, weight, out=dx)
        else:
            dx.addmm_(dy, weight)
    adapters = [a.to(dh.dtype) for a in lora_as]
    if mask is None:
        for g, a in enumerate(adapters):
            _add_product(dx, dh[g], a, 1.0)
        return
    for piece in _masked_pieces(dx):
        for g, a in enumerate(adapters):
            low_rank = dh[g, piece] @ a
            keep = dropout.keep_rows(mask, piece, low_rank.shape[1], dropout_p, g)
            dx[piece] += low_rank.mul_(keep)


def input_grad_output(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dh: Tensor,
    lora_as: Sequence[Tensor],
    mask: Tensor | None,
    dropout_p: float,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> Tensor:
    return dys[0].new_empty((dys[0].shape[0], lora_as[0].shape[1]), dtype=grad_dtype)
