"""The dropout mask inside a kernel: drawn from a seed, or read back as packed bits.

    lanes = philox(counter=(row, column // 8, stream, 0), key=seed)     8 lanes of 16 bits, 7 rounds
    keep  = lanes[column % 8] >= threshold

The definition, with its reasons and source, is ``fastlora/dropout.py``; the two give the same bits.
Eight neighbouring columns are one byte. A tile of the mask is always built from such bytes, drawn
or loaded, so that the two cannot differ: 10 instructions an element when drawn, against 58 for
``tl.rand`` (counted in sm_90 code), and 1/16 of the bytes of a bf16 operand when loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keep_pair(word, threshold):
    """Compare the two lanes of a 32-bit word: bit 0 for the low half, bit 1 for the high half."""
    low = ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32)
    high = ((word >> 16).to(tl.int32) >= threshold).to(tl.int32)
    return low | (high << 1)


@triton.jit
def draw_bits(seed, rows, blocks, stream, threshold):
    """Draw the keep bits of 8 columns a counter: int32 in ``[0, 256)``, of the broadcast shape."""
    zeros = rows * 0 + blocks * 0
    words = tl.philox(seed, rows + zeros, blocks + zeros, zeros + stream, zeros, n_rounds=7)
    bits = _keep_pair(words[0], threshold) | (_keep_pair(words[1], threshold) << 2)
    return bits | (_keep_pair(words[2], threshold) << 4) | (_keep_pair(words[3], threshold) << 6)


@triton.jit
def expand_bits(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Turn bytes ``[ROWS, COLUMNS / 8]`` into a bool tile ``[ROWS, COLUMNS]``."""
    lanes = tl.arange(0, 8)[None, None, :]
    return tl.reshape(((bits[:, :, None] >> lanes) & 1) != 0, (ROWS, COLUMNS))


@triton.jit
def load_bits(mask_ptr, stride_mask, first_row, M, first_column, N, stream, threshold,
              FROM_SEED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Return the keep bits of a tile as bytes ``[ROWS, COLUMNS / 8]``, drawn or loaded.

    Args:
        mask_ptr: the seed (one int64), or bytes ``[M, ceil(N / 8)]``.
        stride_mask: bytes from one row to the next; unused with a seed.
        first_row: first row of the tile.
        M: rows of the whole mask.
        first_column: first column of the tile, a multiple of 8.
        N: columns of the whole mask.
        stream: number of the sibling; unused with bytes, of which each sibling has its own.
        threshold: ``round(p * 65536)``; unused with bytes.
        FROM_SEED: draw instead of load.
        ROWS: of the tile.
        COLUMNS: of the tile, a multiple of 8.
    """
    rows = first_row + tl.arange(0, ROWS)[:, None]
    blocks = first_column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    if FROM_SEED:
        bits = draw_bits(tl.load(mask_ptr), rows, blocks, stream, threshold)
    else:
        inside = (rows < M) & (blocks * 8 < N)
        offsets = rows.to(tl.int64) * stride_mask + blocks
        bits = tl.load(mask_ptr + offsets, mask=inside, other=0).to(tl.int32)
    return bits
