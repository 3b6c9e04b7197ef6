"""How tensors lie in memory: matrices, aligned rows, and contiguous tensors to be made.

Nothing here imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor


def as_rows(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return rows, columns and both strides of a matrix, or of a contiguous ``[..., K]`` as one.

    Making a view of the latter takes the host 1 us; its last dimension is a row all the same.
    """
    if tensor.dim() == 2:
        return *tensor.shape, *tensor.stride()
    columns = tensor.shape[-1]
    return tensor.numel() // columns, columns, columns, 1


def has_aligned_rows(matrix: Tensor) -> bool:
    """Return whether rows are contiguous, apart from each other, and start on 16-byte boundaries.

    What whole vectors, and the tensor memory accelerator, need. The rows of an expanded gradient
    (stride 0) are not apart.
    """
    _, columns, row, column = as_rows(matrix)
    return (
        column == 1
        and row >= columns
        and row * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def allocator(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """Return a function that makes contiguous tensors without values on the current device.

    What compiled code of torch's own uses takes 0.4 us of the host's time, ``torch.empty`` 1.5. It
    goes past torch's dispatcher, so it is not for calls that somebody watches.
    """
    strides: tuple[int, ...] = ()
    size = 1
    for length in reversed(shape):
        strides = (size, *strides)
        size *= length or 1
    fast = _FAST.get(device.type)
    if fast is None or torch._C._len_torch_dispatch_stack():
        return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
    return partial(fast, shape, strides, dtype)


_GUARDS = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_FAST = {
    device_type: function
    for device_type in ("cpu", "cuda")
    if (function := getattr(_GUARDS, f"_empty_strided_{device_type}", None))
}


def are_aligned(dtype: torch.dtype, widths: Sequence[int], operands: Sequence[Tensor] = ()) -> bool:
    """Return whether results of these widths, and the operands, can be moved in whole vectors.

    Args:
        dtype: of the results, which are contiguous.
        widths: their columns.
        operands: see ``has_aligned_rows``.
    """
    rows = all(width * dtype.itemsize % 16 == 0 for width in widths)
    return rows and all(map(has_aligned_rows, operands))


def mask_kind(mask: Tensor | None) -> str:
    """Return what a dropout mask is: ``"none"``, ``"bits"`` (bytes) or ``"seed"`` (one int64)."""
    return "none" if mask is None else "bits" if mask.dtype == torch.uint8 else "seed"


# Of a tensor: itself, type, dtype, device, shape, strides, and its address.
Facts = tuple[tuple[Tensor, type, torch.dtype, torch.device, torch.Size, tuple[int, ...], int], ...]


def look_at(tensors: Sequence[Tensor]) -> Facts:
    """Return what a prepared launch takes for granted of tensors; see ``are_as_before``."""
    return tuple(
        [(t, type(t), t.dtype, t.device, t.shape, t.stride(), t.data_ptr()) for t in tensors]
    )


def are_as_before(facts: Facts) -> bool:
    """Return whether tensors look as they did, wherever they lie now.

    ``x.data = y`` (model.to, FSDP, ZeRO) and swap_tensors keep the object and change the rest.
    """
    for tensor, kind, dtype, device, shape, strides, address in facts:
        if (
            tensor.dtype is not dtype
            or tensor.shape != shape
            or tensor.stride() != strides
            or type(tensor) is not kind
        ):
            return False
        # Where it has not moved it is on its device. Kernels read whole vectors of aligned memory.
        now = tensor.data_ptr()
        if now != address and (now % 16 != address % 16 or tensor.device != device):
            return False
    return True
