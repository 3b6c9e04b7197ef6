"""The one rule for numbers: not worse than PyTorch (or peft) in the same dtypes, against fp64."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 1.2


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return ``||value - exact|| / ||exact||`` (or ``||value||`` where ``exact`` is zero)."""
    norm = exact.double().norm().item()
    return (value.double() - exact.double()).norm().item() / (norm or 1.0)


def allowed_error(native: float, dtype: torch.dtype, factor: float = FACTOR) -> float:
    """Return how far from fp64 a result of this dtype may be where ``native`` is that far."""
    return factor * native + torch.finfo(dtype).eps
