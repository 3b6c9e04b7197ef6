"""What fastlora is measured against: LoRA linears by several providers, with the same weights.

``build`` makes one linear, ``build_layer`` the seven of a decoder layer, which share their inputs
as in Qwen2.

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
from fastlora.siblings import groups_of

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
    _check(provider, p)
    torch.manual_seed(seed)
    layer = _linear(provider, shape, r, p, device, dtype)
    parameters = _trainable(layer)
    return _as_trained(provider, layer, dtype), parameters


def build_layer(
    provider: str,
    linears: dict[str, Linear],
    r: int,
    p: float,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int = 0,
) -> tuple[nn.Module, list[nn.Parameter]]:
    """Build the linears of one decoder layer, and nothing else of it.

    Args:
        provider: one of ``PROVIDERS``.
        linears: the seven, by their names in Qwen2.
        r: rank.
        p: dropout; must be 0 for ``addmm``.
        device: where they live.
        dtype: as in ``build``.
        seed: likewise.

    Returns:
        A module and its trainable parameters. The module is called with the inputs of
        ``shapes.INPUTS`` (q, k and v share one; gate and up another) and returns the seven outputs,
        in the order of ``linears``. In between, where a model has its attention and activation, is
        nothing: the inputs of ``o_proj`` and ``down_proj`` are its arguments.

    Raises:
        ValueError: there is no such provider, or it has no dropout.
    """
    _check(provider, p)
    torch.manual_seed(seed)
    built = {name: _linear(provider, shape, r, p, device, dtype) for name, shape in linears.items()}
    layer = _DecoderLayer(built)
    parameters = _trainable(layer)
    if provider.startswith("fastlora"):
        fastlora.patch(layer)
        groups = [group.names for _, _, group in groups_of(layer)]
        assert groups == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")], groups
    return _as_trained(provider, layer, dtype), parameters


class _Attention(nn.Module):
    def forward(self, x: Tensor, heads: Tensor) -> tuple[Tensor, ...]:
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q, k, v, self.o_proj(heads)


class _Mlp(nn.Module):
    def forward(self, x: Tensor, activated: Tensor) -> tuple[Tensor, ...]:
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        return gate, up, self.down_proj(activated)


class _DecoderLayer(nn.Module):
    def __init__(self, linears: dict[str, nn.Module]) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(), _Mlp()
        for name, linear in linears.items():
            parent = self.self_attn if name[0] in "qkvo" else self.mlp
            parent.add_module(name, linear)

    def forward(
        self, x: Tensor, heads: Tensor, normed: Tensor, activated: Tensor
    ) -> tuple[Tensor, ...]:
        return (*self.self_attn(x, heads), *self.mlp(normed, activated))


def _check(provider: str, p: float) -> None:
    if provider not in PROVIDERS:
        raise ValueError(f"provider must be one of {PROVIDERS}, got {provider!r}")
    if provider == "addmm" and p:
        raise ValueError(f"addmm has no dropout, got p = {p}")


def _linear(
    provider: str, shape: Linear, r: int, p: float, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    base = nn.Linear(shape.k, shape.n, bias=shape.has_bias, device=device, dtype=dtype)
    base.requires_grad_(False)
    if provider == "frozen":
        return base
    layer = LoRALinear.from_linear(
        base, r=r, lora_alpha=SCALING * r, lora_dropout=p, init_lora_weights=False
    ).train()
    for module in (layer.lora_A["default"], layer.lora_B["default"]):
        module.to(dtype if provider.endswith("-bf16") else torch.float32)
    if not provider.startswith("fastlora"):
        fastlora.unpatch(layer)
        assert type(layer) is PeftLinear
    return _Addmm(layer) if provider == "addmm" else layer


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _as_trained(provider: str, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Run a module under autocast where the provider's users do."""
    mixed = provider in ("peft", "fastlora") and dtype != torch.float32
    return UnderAutocast(module, dtype) if mixed else module


class UnderAutocast(nn.Module):
    """A module whose forward runs under autocast to a dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(inputs[0].device.type, self.dtype):
            return self.module(*inputs)


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
