"""Add fp32 partial results in a fixed order: the second step of every split reduction.

    out[i] = gain * sum_s partials[s, i]

Grid: (blocks of elements, sums). Several sums share one launch, because a launch costs more than
any of them, and one scratch tensor, because each allocation costs the host 1 to 2 us. The order of
the sum is that of the splits: same inputs, same bits, always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

_BLOCK = 1024
# Four elements a thread. With eight, the four sums of two siblings spill 8 bytes a thread on sm_90:
# ptxas keeps to 32 registers, which lets a multiprocessor run all the threads it can hold.
_WARPS = 8


class PartialSum(NamedTuple):
    """One sum: ``[splits, rows, columns]``, contiguous somewhere in a scratch tensor."""

    gain: float
    first: int  # the element of the scratch at which it begins
    splits: int
    rows: int
    columns: int
    stride_row: int  # of the result, in elements
    stride_column: int
    first_of_out: int = 0  # the element of the result's tensor at which it begins


@triton.jit
def _add_partials_kernel(
    scratch_ptr,  # fp32
    outs,  # of each sum its result, in any dtype
    sums,
    BLOCK: tl.constexpr,
):
    for number in tl.static_range(len(sums)):
        if tl.program_id(1) == number:
            job, out = sums[number], outs[number]
            # A result has less than 2**31 elements (rank 256, 8 million rows); all its partials
            # together may have more.
            elements = job.rows * job.columns
            index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            inside = index < elements
            first = scratch_ptr + tl.cast(job.first, tl.int64)
            total = tl.zeros((BLOCK,), tl.float32)
            for split in range(job.splits):
                partial = first + tl.cast(split, tl.int64) * elements
                total += tl.load(partial + index, mask=inside, other=0.0)
            offsets = (index // job.columns) * job.stride_row
            offsets += (index % job.columns) * job.stride_column
            value = (total * job.gain).to(out.dtype.element_ty)
            tl.store(out + tl.cast(job.first_of_out, tl.int64) + offsets, value, mask=inside)


def prepare_sums(sums: Sequence[PartialSum]) -> Callable[[Tensor, tuple[Tensor, ...]], None]:
    """Return a function of the scratch and of the results that launches all the sums at once."""
    elements = max(job.rows * job.columns for job in sums)
    grid = (-(-elements // _BLOCK), len(sums))
    launch = Launch(_add_partials_kernel, grid, {"BLOCK": _BLOCK, "num_warps": _WARPS})
    jobs = tuple(sums)

    def run(scratch: Tensor, outs: tuple[Tensor, ...]) -> None:
        launch(scratch, outs, jobs)

    return run
