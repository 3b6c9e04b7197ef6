"""Add fp32 partial results in a fixed order: the second step of every split reduction.

    out[i] = gain * sum_s partials[s, i]

Grid: (blocks of elements, sums). Several sums share one launch, because a launch costs more than
any of them, and one scratch tensor, because each allocation costs the host 1 to 2 us. The order of
the sum is that of the splits: same inputs, same bits, always.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
# Four elements a thread. With eight, the four sums of two siblings spill 8 bytes a thread on sm_90:
# ptxas keeps to 32 registers, which lets a multiprocessor run all the threads it can hold.
_WARPS = 8


class PartialSum(NamedTuple):
    """One sum: ``[splits, rows, columns]``, contiguous somewhere in a scratch tensor, into ``out``.

    The sizes are given as numbers, because those who launch know them for each shape: reading one
    from a tensor takes 0.1 to 0.3 us of the host's time.
    """

    partials: Tensor  # fp32
    out: Tensor  # any dtype
    gain: float
    first: int  # the element of partials at which the sum begins
    splits: int
    rows: int
    columns: int
    stride_row: int  # of out, in elements
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
            first = job.partials + tl.cast(job.first, tl.int64)
            total = tl.zeros((BLOCK,), tl.float32)
            for split in range(job.splits):
                partial = first + tl.cast(split, tl.int64) * elements
                total += tl.load(partial + index, mask=inside, other=0.0)
            offsets = (index // job.columns) * job.stride_row
            offsets += (index % job.columns) * job.stride_column
            value = (total * job.gain).to(job.out.dtype.element_ty)
            tl.store(job.out + offsets, value, mask=inside)


def add_partials(sums: tuple[PartialSum, ...]) -> None:
    """Launch all the sums at once; see the module's formula."""
    elements = 0
    for job in sums:
        elements = max(elements, job.rows * job.columns)
    grid = (-(-elements // _BLOCK), len(sums))
    _add_partials_kernel[grid](sums, BLOCK=_BLOCK, num_warps=_WARPS)
