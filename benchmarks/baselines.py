"""What fastlora is measured against: one LoRA linear by several providers, with the same weights.

frozen           nn.Linear alone: the floor
peft             peft's Linear as its users have it: fp32 adapters, autocast to the base's dtype
peft-bf16        the same with adapters in the base's dtype, no autocast
addmm            cuBLAS and in-place addmm_, p = 0 only (see ``addmm_linear``)
fastlora         LoRALinear, fp32 adapters, autocast
fastlora-bf16    LoRALinear, adapters in the base's dtype, no autocast
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from shapes import Linear
from torch import Tensor, nn

import fastlora
from fastlora import LoRALinear

PROVIDERS = ("frozen", "peft", "peft-bf16", "addmm", "fastlora", "fastlora-bf16")
SCALING = 2.0


def build(
    provider: str,
    shape: Linear,
    r: int,
    p: float,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int = 0,
) -> tuple[nn.Module, list[nn.Parameter]]:
    """Build one linear of a provider.

    Args:
        provider: one of ``PROVIDERS``.
        shape: of the linear.
        r: rank.
        p: dropout; must be 0 for ``addmm``.
        device: where it lives.
        dtype: of the base weight, and of autocast where the provider uses it (not for fp32).
        seed: of the weights: the same seed makes the same layer for every provider.

    Returns:
        The layer, called with ``x [.., k]``, and its trainable parameters (``A``, then ``B``).

    Raises:
        ValueError: there is no such provider, or it has no dropout.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"provider must be one of {PROVIDERS}, got {provider!r}")
    if provider == "addmm" and p:
        raise ValueError(f"addmm has no dropout, got p = {p}")
    torch.manual_seed(seed)
    base = nn.Linear(shape.k, shape.n, bias=shape.has_bias, device=device, dtype=dtype)
    base.requires_grad_(False)
    if provider == "frozen":
        return base, []
    layer = LoRALinear.from_linear(
        base, r=r, lora_alpha=SCALING * r, lora_dropout=p, init_lora_weights=False
    ).train()
    lora_a, lora_b = layer.lora_A["default"], layer.lora_B["default"]
    mixed = not provider.endswith("-bf16")
    for module in (lora_a, lora_b):
        module.to(torch.float32 if mixed else dtype)
    parameters = [lora_a.weight, lora_b.weight]
    if provider == "addmm":
        return _Addmm(layer), parameters
    if provider.startswith("peft"):
        fastlora.unpatch(layer)
        assert type(layer) is PeftLinear
    if mixed and dtype != torch.float32:
        return _UnderAutocast(layer, dtype), parameters
    return layer, parameters


class _UnderAutocast(nn.Module):
    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return self.layer(x)


class _Addmm(nn.Module):
    def __init__(self, layer: PeftLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        base = self.layer.base_layer
        a, b = self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight
        rows = addmm_linear(
            x.reshape(-1, x.shape[-1]), base.weight, base.bias, a, b, self.layer.scaling["default"]
        )
        return rows.view(*x.shape[:-1], rows.shape[1])


def addmm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """Apply a LoRA linear by cuBLAS alone: what Unsloth and Axolotl do, written anew for one layer.

    The low-rank term is added in place (``addmm_``), the adapters are cast to the dtype of ``x`` at
    every call, and ``x A^T`` is not saved but computed again for ``dB``.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``, frozen, in the dtype of ``x``.
        bias: ``[N]``, frozen, or ``None``.
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        scaling: of the low-rank term.
    """
    return _AddmmLinear.apply(x, weight, bias, lora_a, lora_b, scaling)


class _AddmmLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scaling = scaling
        with _without_autocast(x.device.type):
            y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
            return y.addmm_(x @ lora_a.to(x.dtype).t(), lora_b.to(x.dtype).t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b = ctx.saved_tensors
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        with _without_autocast(dy.device.type):
            dh = dy @ b
            da = torch.empty_like(a).addmm_(dh.t(), x, beta=0, alpha=ctx.scaling)
            db = torch.empty_like(b).addmm_(dy.t(), x @ a.t(), beta=0, alpha=ctx.scaling)
            dx = (dy @ weight).addmm_(dh, a, alpha=ctx.scaling)
        return dx, None, None, da.to(lora_a.dtype), db.to(lora_b.dtype), None


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False)
