"""The dropout generator: Philox-4x32-7 with 16-bit lanes, written in torch integer operations.

The keep decision of element ``(row, column)`` is a pure function of a 64-bit seed:

    lanes = philox(counter=(row, column // 8, stream, 0), key=(seed_lo, seed_hi))
    keep  = lanes[column % 8] >= round(p * 65536)                       8 lanes of 16 bits

Projections that share their input (q, k, v) share the seed, and each has a stream of its own: its
number among them. A projection alone has stream 0.

Why a counter and not torch's stream: the backward pass can rebuild the mask from the seed alone, a
kernel can draw it in registers, and the same seed gives the same bits on every device. Why 16-bit
lanes and 7 rounds: one call serves 8 elements; 7 is the fewest rounds at which Philox-4x32 passes
BigCrush (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011, table 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 8  # 16-bit lanes in one 128-bit Philox block: columns served by one counter
LEVELS = 1 << 16  # p is rounded to multiples of 1 / LEVELS

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_UINT32 = 0xFFFFFFFF
_SEED_END = (1 << 63) - 1

# A byte holds the bits of 8 columns. Multiplying 8 bools, read as one little-endian int64, by this
# number gathers them in the top byte, the first column in the lowest bit.
_GATHER_BITS = 0x0102040810204080


def threshold(dropout_p: float) -> int:
    """Return ``p`` as the 16-bit threshold below which a lane drops its element (at most 65535)."""
    return min(round(dropout_p * LEVELS), LEVELS - 1)


def inverse_keep_probability(dropout_p: float) -> float:
    """Return ``1 / (1 - p)`` for the ``p`` that is really applied, a multiple of 1/65536."""
    return LEVELS / (LEVELS - threshold(dropout_p))


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed from torch's generator of ``device``: an int64 scalar tensor, never read by the
    host.

    Taking it from torch's generator is what makes ``torch.manual_seed``, the recomputation of
    ``torch.utils.checkpoint`` and the replay of a CUDA graph behave as they do with ``nn.Dropout``.
    """
    return torch.randint(_SEED_END, (), dtype=torch.int64, device=device)


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply Philox-4x32 to broadcastable int64 tensors that hold unsigned 32-bit words.

    Args:
        counter: four int64 tensors, each in ``[0, 2**32)``.
        key: two int64 tensors, likewise.
        rounds: number of rounds; 7 for dropout, 10 for the published known answers.

    Returns:
        Four int64 tensors in ``[0, 2**32)``, of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # A 64-bit product of two 32-bit words wraps around in int64, but keeps every bit.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) ^ (c1 ^ k0)) & _UINT32, product1 & _UINT32
        c2, c3 = ((product0 >> 32) ^ (c3 ^ k1)) & _UINT32, product0 & _UINT32
        k0, k1 = (k0 + _KEY_STEPS[0]) & _UINT32, (k1 + _KEY_STEPS[1]) & _UINT32
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor,
    rows: int,
    columns: int,
    dropout_p: float,
    *,
    first_row: int = 0,
    stream: int = 0,
) -> Tensor:
    """Return which elements survive dropout: a bool tensor ``[rows, columns]``.

    Args:
        seed: int64 scalar tensor; the mask lives on its device.
        rows: number of rows.
        columns: number of columns, any number.
        dropout_p: probability of dropping, in ``[0, 1)``, rounded to multiples of 1/65536.
        first_row: the row of the whole mask at which this part begins.
        stream: number of the mask among the independent ones of this seed, in ``[0, 2**32)``.
    """
    blocks = -(-columns // LANES)
    row = torch.arange(first_row, first_row + rows, device=seed.device).view(-1, 1)
    block = torch.arange(blocks, device=seed.device).view(1, -1)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = philox_4x32((row, block, zero + stream, zero), (seed & _UINT32, (seed >> 32) & _UINT32))
    lanes = torch.stack([word.to(torch.int32) for word in words], dim=-1).view(torch.int16)
    # int16 compares as signed: flipping the sign bit turns the order of unsigned lanes into it.
    keep = (lanes ^ -(LEVELS // 2)) >= threshold(dropout_p) - LEVELS // 2
    return keep.view(rows, blocks * LANES)[:, :columns]


def pack(keep: Tensor) -> Tensor:
    """Pack a bool mask ``[rows, columns]`` into bits: uint8 ``[rows, ceil(columns / 8)]``."""
    rows, columns = keep.shape
    blocks = -(-columns // LANES)
    if columns != blocks * LANES or not keep.is_contiguous():
        padded = keep.new_zeros(rows, blocks * LANES)
        padded[:, :columns] = keep
        keep = padded
    gathered = keep.view(rows, blocks, LANES).view(torch.int64) * _GATHER_BITS
    return ((gathered >> 56) & 0xFF).to(torch.uint8).view(rows, blocks)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """Unpack bits ``[rows, ceil(columns / 8)]`` into a bool mask ``[rows, columns]``."""
    # Looking a byte up as eight bools at once takes a seventh of the time of shifting and masking
    # (0.15 ms against 1.0 ms for 1024 x 1536 on two cores).
    byte = torch.arange(256, dtype=torch.uint8, device=bits.device).unsqueeze(-1)
    lane = torch.arange(LANES, dtype=torch.uint8, device=bits.device)
    eight_bools = ((byte >> lane) & 1).view(torch.int64).view(-1)
    keep = eight_bools.index_select(0, bits.reshape(-1).to(torch.int32)).view(torch.bool)
    return keep.view(bits.shape[0], bits.shape[1] * LANES)[:, :columns]


def keep_rows(mask: Tensor, rows: slice, columns: int, dropout_p: float, stream: int = 0) -> Tensor:
    """Return some rows of a keep mask that was saved as packed bits or as the seed that draws it.

    Args:
        mask: uint8 bits ``[streams, all rows, ceil(columns / 8)]``, or an int64 seed (scalar).
        rows: the rows wanted, ``slice(first, end)``.
        columns: number of columns.
        dropout_p: the probability to read a seed with; bits do not need it.
        stream: which of the masks.

    Returns:
        bool ``[end - first, columns]``.
    """
    if mask.dtype == torch.uint8:
        return unpack(mask[stream, rows], columns)
    count = rows.stop - rows.start
    return keep_mask(mask, count, columns, dropout_p, first_row=rows.start, stream=stream)
