"""Add fp32 partial results in a fixed order: the second step of every split reduction.

    out[i] = gain * sum_s partials[s, i]

Grid: (blocks of elements, sums). Several sums share one launch, because a launch costs more than
any of them. The order of the sum is that of the splits: same inputs, same bits, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


class PartialSum(NamedTuple):
    """One sum: ``partials [splits, rows, columns]`` fp32 and contiguous, into ``out``."""

    partials: Tensor
    out: Tensor  # [rows, columns], any strides and dtype
    gain: float


class _Sum(NamedTuple):
    partials: Tensor
    out: Tensor
    gain: float
    splits: int
    rows: int
    columns: int
    stride_row: int
    stride_column: int


@triton.jit
def _add_partials_kernel(sums, BLOCK: tl.constexpr):
    for number in tl.static_range(len(sums)):
        if tl.program_id(1) == number:
            job = sums[number]
            # A result has less than 2**31 elements (rank 256, 8 million rows); all its partials
            # together may have more.
            elements = job.rows * job.columns
            index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            inside = index < elements
            total = tl.zeros((BLOCK,), tl.float32)
            for split in range(job.splits):
                partial = job.partials + tl.cast(split, tl.int64) * elements
                total += tl.load(partial + index, mask=inside, other=0.0)
            offsets = (index // job.columns) * job.stride_row
            offsets += (index % job.columns) * job.stride_column
            value = (total * job.gain).to(job.out.dtype.element_ty)
            tl.store(job.out + offsets, value, mask=inside)


def add_partials(sums: Sequence[PartialSum]) -> None:
    """Launch all the sums at once; see the module's formula."""
    jobs = tuple(
        _Sum(
            partials,
            out,
            gain,
            partials.shape[0],
            out.shape[0],
            out.shape[1],
            out.stride(0),
            out.stride(1),
        )
        for partials, out, gain in sums
    )
    blocks = -(-max(out.numel() for _, out, _ in sums) // _BLOCK)
    _add_partials_kernel[(blocks, len(jobs))](jobs, BLOCK=_BLOCK, num_warps=4)
