"""What the kernel tests share: the device, layouts of a matrix, and the rule for one kernel.

Without a GPU the kernels run in Triton's interpreter, with one GPU natively: same tests.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from torch import Tensor

from fastlora import dropout
from fastlora.kernels.tile_config import TileConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
HALVES = DTYPES[1:]
MASKS = ["none", "bits", "seed"]
P = 0.3
# 33 rows are three tiles of it and 72 columns are three too, with a ragged last one.
SMALL = TileConfig(16, 32, 32)

# An element of a single kernel may be twice as far off as the worst of torch's.
_ELEMENT_FACTOR = 2


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Draw a tensor on the tests' device, rounded to ``dtype``."""
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def seed_of(number: int) -> Tensor:
    """Return a dropout seed on the tests' device."""
    return torch.tensor(number, dtype=torch.int64, device=DEVICE)


def draw_masks(
    kind: str, siblings: int, rows: int, columns: int
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the siblings' masks twice: as a kernel takes them (bits or a seed) and as bools."""
    if kind == "none":
        return None, [None] * siblings
    seed = seed_of(5 + 2**40)
    keeps = [dropout.keep_mask(seed, rows, columns, P, stream=g) for g in range(siblings)]
    return (torch.stack(list(map(dropout.pack, keeps))) if kind == "bits" else seed), keeps


def other_mask(mask: Tensor | None) -> Tensor | None:
    """Return another mask of the same kind and shape."""
    return None if mask is None else 255 - mask if mask.dtype == torch.uint8 else mask + 1


def padded_rows(tensor: Tensor, padding: int = 8) -> Tensor:
    """Return the same matrix with NaN between its rows."""
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + padding), float("nan"))
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def every_second(tensor: Tensor) -> Tensor:
    """Return the same matrix with NaN between its columns."""
    wide = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1]), float("nan"))
    wide[:, ::2] = tensor
    return wide[:, ::2]


def transposed(tensor: Tensor) -> Tensor:
    """Return the same matrix, stored by columns."""
    return tensor.t().contiguous().t()


LAYOUTS = [padded_rows, every_second, transposed]


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors in fp64."""
    return [None if tensor is None else tensor.double() for tensor in tensors]


def assert_kernel_as_accurate(
    actual: Tensor, native: Tensor, exact: Tensor, name: str = "result"
) -> None:
    """Assert the norm-wise rule of ``accuracy.py`` and, for the worst element, twice torch's error.

    Args:
        actual: what the kernel computed.
        native: the reference in the same dtypes.
        exact: the reference in fp64.
        name: what the message calls it.
    """
    assert_as_accurate(actual, native, exact, name=name)
    if actual.numel() == 0:
        return
    error, native_error = ((value.double() - exact).abs().max() for value in (actual, native))
    eps = torch.finfo(actual.dtype).eps
    allowed = _ELEMENT_FACTOR * native_error + eps * exact.abs().max()
    assert error <= allowed, f"{name}: an element is off by {error:.3e}, allowed {allowed:.3e}"
