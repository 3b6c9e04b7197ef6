"""The mathematics of the package: every operation in plain PyTorch, on one page.

A frozen linear layer with a LoRA adapter (Hu et al., 2021, https://arxiv.org/abs/2106.09685) is

    y = x W^T + b + scaling * dropout(x) A^T B^T

and everything is split at the one small tensor in the middle, ``h`` (``[M, R]``):

    forward     h  = (keep * x) A^T                         shrink
                y  = x W^T + b + gain * h B^T               low_rank_gemm
    backward    dh = gain * dy B                            adapter_grads
                dB = gain * dy^T h                          adapter_grads
                dA = dh^T (keep * x)                        adapter_grads
                dx = dy W + keep * (dh A)                   input_grad, the same GEMM backwards

``keep`` is the 0/1 dropout mask (see ``dropout.py``). The ``1 / (1 - p)`` of inverted dropout never
touches the wide tensors: it is folded, with the adapter's scaling, into ``gain = scaling / (1 -
p)``.

A batch whose rows have adapters of their own adds each one's term to the frozen layer's output:

    y[t] += scaling_i x[t] A_i^T B_i^T                      segmented_add, i the adapter of row t

These functions *define* the operations: the operators in ``ops.py`` and the kernels are tested
against them. They compute in the dtype they are given; in fp64 they are the exact result.

Sizes: ``M`` rows (all leading dimensions flattened), ``K`` in features, ``N`` out features, ``R``
    rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.dropout import inverse_keep_probability


def gain(scaling: float, dropout_p: float) -> float:
    """Return the factor of the low-rank term: the scaling and dropout's ``1 / (1 - p)``."""
    return scaling * inverse_keep_probability(dropout_p)


def shrink(x: Tensor, lora_a: Tensor, keep: Tensor | None) -> Tensor:
    """Project ``x [M, K]`` to the rank: ``h [M, R]``; ``keep`` is bool ``[M, K]`` or ``None``."""
    return (x if keep is None else x * keep) @ lora_a.t()


def low_rank_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, lora_b: Tensor, gain: float
) -> Tensor:
    """Apply the frozen layer and add the low-rank term: ``y [M, N]``."""
    y = x @ weight.t() + gain * (h @ lora_b.t())
    return y if bias is None else y + bias


def adapter_grads(
    dy: Tensor, x: Tensor, h: Tensor, lora_b: Tensor, keep: Tensor | None, gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dh [M, R]``, ``dA [R, K]`` and ``dB [N, R]``."""
    dh = gain * (dy @ lora_b)
    da = dh.t() @ (x if keep is None else x * keep)
    db = gain * (dy.t() @ h)
    return dh, da, db


def input_grad(
    dy: Tensor, weight: Tensor, dh: Tensor, lora_a: Tensor, keep: Tensor | None
) -> Tensor:
    """Return ``dx [M, K]``; the mask falls on the low-rank term alone, as in the forward."""
    low_rank = dh @ lora_a
    return dy @ weight + (low_rank if keep is None else low_rank * keep)


def segmented_add(
    y: Tensor, x: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float] | None]
) -> Tensor:
    """Add to every row of ``y [T, N]`` its own adapter's term of ``x [T, K]``.

    ``adapters`` has for every row ``A [R, K]``, ``B [N, R]`` and the scaling, or ``None``.
    """
    y = y.clone()
    for t, adapter in enumerate(adapters):
        if adapter is not None:
            lora_a, lora_b, scaling = adapter
            y[t] += scaling * ((x[t] @ lora_a.t()) @ lora_b.t())
    return y
