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

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlora import dropout

# 65,536 Philox counters are 0.5 MiB of int64: the generator's temporaries stay in the L2 cache of a
# CPU core (1024 x 1536 on two cores: 5.4 ms, against 7.2 ms in one piece and 10.9 ms for
# nn.Dropout).
_COUNTERS_PER_CPU_PIECE = 1 << 16
# Elsewhere larger pieces keep the launches few and the temporaries, 9 bytes an element, small.
_COUNTERS_PER_PIECE = 1 << 22


def rows(tensor: Tensor) -> Tensor:
    """Flatten all leading dimensions: ``[M, last]``."""
    return tensor.reshape(-1, tensor.shape[-1])


def mask_rows(mask: Tensor) -> Tensor:
    """Flatten packed bits to ``[M, ceil(K / 8)]``; a seed (int64 scalar) stays as it is."""
    return rows(mask) if mask.dtype == torch.uint8 else mask


def _masked_pieces(matrix: Tensor) -> Iterator[slice]:
    """Split the rows of a masked operand into pieces for whose mask there is room."""
    rows, columns = matrix.shape
    counters = _COUNTERS_PER_CPU_PIECE if matrix.device.type == "cpu" else _COUNTERS_PER_PIECE
    step = max(1, counters * dropout.LANES // columns)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def shrink(
    x: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    return_bits: bool,
    *,
    rank_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    h, bits = shrink_outputs(x, lora_a, seed, dropout_p, return_bits, rank_dtype=rank_dtype)
    x_rows, h_rows, bit_rows = rows(x), rows(h), rows(bits)
    a_t = lora_a.to(rank_dtype).t()
    if seed is None:
        torch.mm(x_rows.to(rank_dtype), a_t, out=h_rows)
        return h, bits
    for piece in _masked_pieces(x_rows):
        part = x_rows[piece].to(rank_dtype)
        keep = dropout.keep_rows(seed, piece, part.shape[1], dropout_p)
        torch.mm(part * keep, a_t, out=h_rows[piece])
        if return_bits:
            bit_rows[piece] = dropout.pack(keep)
    return h, bits


def shrink_outputs(
    x: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    return_bits: bool,
    *,
    rank_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    h = x.new_empty((*x.shape[:-1], lora_a.shape[0]), dtype=rank_dtype)
    blocks = -(-x.shape[-1] // dropout.LANES)
    bits_shape = (*x.shape[:-1], blocks) if return_bits else (0, blocks)
    return h, x.new_empty(bits_shape, dtype=torch.uint8)


def low_rank_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    gain: float,
    *,
    dtype: torch.dtype,
) -> Tensor:
    y = low_rank_gemm_output(x, weight, bias, h, lora_b, gain, dtype=dtype)
    y_rows, x_rows, weight_t = rows(y), rows(x).to(dtype), weight.to(dtype).t()
    if bias is None:
        torch.mm(x_rows, weight_t, out=y_rows)
    else:
        torch.addmm(bias.to(dtype), x_rows, weight_t, out=y_rows)
    _add_product(y_rows, rows(h), lora_b.to(h.dtype).t(), gain)
    return y


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
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _add_product(out: Tensor, left: Tensor, right: Tensor, gain: float) -> None:
    """Compute ``out += gain * left @ right`` in the wider of the two dtypes, rounded once."""
    wide = torch.promote_types(out.dtype, left.dtype)
    left, right = left.to(wide), right.to(wide)
    if wide == out.dtype:
        out.addmm_(left, right, alpha=gain)
    else:
        out.copy_(out.to(wide).addmm_(left, right, alpha=gain))


def adapter_grads(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    lora_b: Tensor,
    mask: Tensor | None,
    gain: float,
    dropout_p: float,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dy_rows = rows(dy).to(rank_dtype)
    dh, da, db = adapter_grads_outputs(
        dy,
        x,
        h,
        lora_b,
        mask,
        gain,
        dropout_p,
        need_dh=need_dh,
        rank_dtype=rank_dtype,
        grad_dtype=grad_dtype,
    )
    dh_rows = rows(dh)
    if need_dh:
        # beta = 0: the product is scaled before it is rounded, and what dh held is never read.
        torch.addmm(dh_rows, dy_rows, lora_b.to(rank_dtype), beta=0, alpha=gain, out=dh_rows)
    if h is not None:
        # Into the rank's dtype first: a GEMM cannot store fp32 from half-precision operands here.
        product = db.to(rank_dtype)
        db.copy_(product.addmm_(dy_rows.t(), rows(h), beta=0, alpha=gain))
    if x is not None:
        da.copy_(_masked_product(dh_rows, rows(x), mask, dropout_p))
    return dh, da, db


def adapter_grads_outputs(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    lora_b: Tensor,
    mask: Tensor | None,
    gain: float,
    dropout_p: float,
    *,
    need_dh: bool = True,
    rank_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    rank = lora_b.shape[1]
    dh = dy.new_empty((*dy.shape[:-1], rank) if need_dh else (0, rank), dtype=rank_dtype)
    da = dy.new_empty((0 if x is None else rank, 0 if x is None else x.shape[-1]), dtype=grad_dtype)
    db = dy.new_empty((0 if h is None else lora_b.shape[0], rank), dtype=grad_dtype)
    return dh, da, db


def _masked_product(
    dh_rows: Tensor, x_rows: Tensor, mask: Tensor | None, dropout_p: float
) -> Tensor:
    """Return ``dh^T (keep * x)``: ``[R, K]``."""
    if mask is None:
        return dh_rows.t() @ x_rows.to(dh_rows.dtype)
    # The pieces are summed in fp32 at least: rounding a running sum to bf16 would add up.
    wide = torch.promote_types(dh_rows.dtype, torch.float32)
    mask = mask_rows(mask)
    total = dh_rows.new_zeros((dh_rows.shape[1], x_rows.shape[1]), dtype=wide)
    for piece in _masked_pieces(x_rows):
        part = x_rows[piece].to(dh_rows.dtype)
        keep = dropout.keep_rows(mask, piece, part.shape[1], dropout_p)
        total += dh_rows[piece].t() @ (part * keep)
    return total


def input_grad(
    dy: Tensor,
    weight: Tensor,
    dh: Tensor,
    lora_a: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> Tensor:
    dx = input_grad_output(
        dy, weight, dh, lora_a, mask, dropout_p, dtype=dtype, grad_dtype=grad_dtype
    )
    dx_rows, dh_rows = rows(dx), rows(dh)
    a = lora_a.to(dh.dtype)
    if grad_dtype == dtype:
        torch.mm(rows(dy).to(dtype), weight.to(dtype), out=dx_rows)
    else:
        dx_rows.copy_(rows(dy).to(dtype) @ weight.to(dtype))
    if mask is None:
        _add_product(dx_rows, dh_rows, a, 1.0)
        return dx
    mask = mask_rows(mask)
    for piece in _masked_pieces(dx_rows):
        low_rank = dh_rows[piece] @ a
        keep = dropout.keep_rows(mask, piece, low_rank.shape[1], dropout_p)
        dx_rows[piece] += low_rank.mul_(keep)
    return dx


def input_grad_output(
    dy: Tensor,
    weight: Tensor,
    dh: Tensor,
    lora_a: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], weight.shape[1]), dtype=grad_dtype)
