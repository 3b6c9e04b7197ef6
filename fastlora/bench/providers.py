"""What is compared: LoRA linears by several providers, with the same weights.

========================  ==========================================================================
frozen                    the bare ``nn.Linear``: the limit
peft                      peft as its users have it: fp32 adapters, autocast to the base's dtype
peft-bf16                 peft with adapters in the base's dtype, without autocast
peft-compiled             the first by ``torch.compile``
addmm                     cuBLAS and in-place ``addmm_``, without dropout (see ``addmm_linear``)
fastlora                  fastlora as its users have it: fp32 adapters, autocast, plans by itself
fastlora-fused, -hybrid   the same, held to a plan
fastlora-bf16             fastlora with adapters in the base's dtype, without autocast
========================  ==========================================================================

Another library joins by ``register``, or on the command line by ``--provider package.module:name``
where ``name`` is a ``Provider``. It is given peft's own layer, converts it, and is checked like all
the others before it is timed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

import fastlora
from fastlora.bench.results import is_ours
from fastlora.bench.shapes import GROUPS, Linear
from fastlora.layers import LoRALinear
from fastlora.siblings import groups_of

SCALING = 2.0


def _as_it_is(module: nn.Module) -> nn.Module:
    return module


@dataclass(frozen=True)
class Provider:
    """One way to compute LoRA linears.

    Attributes:
        name: what tables and rows call it; those that begin with ``fastlora`` are fastlora's own.
        about: what it is, in a line.
        convert: makes this provider's linear of peft's (``base_layer``, ``lora_A["default"]``,
            ``lora_B["default"]``, ``scaling``, ``lora_dropout``), whose parameters it must keep as
            they are: their gradients are compared. A dropout mask must come from torch's generator,
            and ``eval()`` must switch it off.
        finish: makes what is called of the whole, once its linears are in place: a linear, or the
            linears of a decoder layer.
        mixed: its adapters are fp32 and it runs under autocast to the base's dtype; else they have
            the base's dtype. (With an fp32 base there is no autocast.)
        has_dropout: whether it can be used with dropout.
        plan: which plan fastlora is held to while it runs.
        countable: it runs on tensors that have no data, so that it can be counted.
        levels: where it is measured if nobody names it; ``peft-compiled`` takes too long for more.
    """

    name: str
    about: str
    convert: Callable[[PeftLinear], nn.Module] = _as_it_is
    finish: Callable[[nn.Module], nn.Module] = _as_it_is
    mixed: bool = True
    has_dropout: bool = True
    plan: str = "auto"
    countable: bool = True
    levels: tuple[str, ...] = ("layer", "step", "linear")


def _patched(module: nn.Module) -> nn.Module:
    fastlora.patch(module)
    if isinstance(module, DecoderLayer):
        groups = [group.names for _, _, group in groups_of(module)]
        assert groups == [names for names in GROUPS if len(names) > 1], groups
    return module


def _compiled(module: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(module, dynamic=False)
    return compiled


PROVIDERS: dict[str, Provider] = {}


def register(provider: Provider) -> None:
    """Add a provider, which is then measured wherever providers are.

    Raises:
        ValueError: there is one of that name.
    """
    if provider.name in PROVIDERS:
        raise ValueError(f"there is a provider {provider.name!r} already")
    PROVIDERS[provider.name] = provider


def load(path: str) -> Provider:
    """Import ``package.module:name`` and register what it names.

    Raises:
        ValueError: there is no such module or name, or it is no ``Provider``, or it would be taken
            for fastlora itself.
    """
    module, _, name = path.partition(":")
    try:
        provider = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module of somebody else's raises while it is imported
        raise ValueError(
            f"{path!r} cannot be imported (package.module:name, on PYTHONPATH): {error}"
        ) from error
    if not isinstance(provider, Provider):
        raise ValueError(f"{path!r} is a {type(provider).__name__}, not a fastlora.bench Provider")
    if is_ours(provider.name):
        raise ValueError(f"{path!r} is called {provider.name!r}, as fastlora's own providers are")
    register(provider)
    return provider


def find(name: str) -> Provider:
    """Return a provider by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PROVIDERS:
        raise ValueError(f"there is no provider {name!r}; there are {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


@dataclass(frozen=True)
class Weights:
    """The weights of one linear, which all providers share."""

    base: nn.Linear
    lora_a: Tensor
    lora_b: Tensor


def draw_weights(
    linears: Mapping[str, Linear], r: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> dict[str, Weights]:
    """Draw the weights of linears: the base's in ``dtype``, ``A`` and ``B`` in fp32.

    The values of ``A`` and ``B`` are those of ``dtype``, so that a provider that casts them loses
    nothing, and all compute the same.
    """
    torch.manual_seed(seed)
    drawn = {}
    for name, shape in linears.items():
        base = nn.Linear(shape.k, shape.n, bias=shape.has_bias, device=device, dtype=dtype)
        a, b = (
            nn.Linear(*size, bias=False, device=device).weight.detach().to(dtype).float()
            for size in ((shape.k, r), (r, shape.n))
        )
        drawn[name] = Weights(base.requires_grad_(False), a, b)
    return drawn


def build(provider: Provider | str, weights: Weights, p: float) -> tuple[nn.Module, list[Tensor]]:
    """Build one linear of a provider.

    Args:
        provider: which.
        weights: the base is shared, the adapter copied.
        p: dropout.

    Returns:
        The layer, called with ``x [.., k]``, and its trainable parameters (``A``, then ``B``).

    Raises:
        ValueError: there is no such provider, or it has no dropout.
    """
    provider = _checked(provider, p)
    layer = _linear(provider, weights, p)
    return _finished(provider, layer, weights.base.weight.dtype), _trainable(layer)


def build_layer(
    provider: Provider | str, weights: Mapping[str, Weights], p: float
) -> tuple[nn.Module, list[Tensor]]:
    """Build the linears of one decoder layer, and nothing else of it.

    Args:
        provider: which.
        weights: of the seven, by their names in Qwen2; the bases are shared.
        p: dropout.

    Returns:
        A module and its trainable parameters. The module is called with the inputs of
        ``shapes.INPUTS`` (q, k and v share one; gate and up another) and returns the seven outputs,
        in the order of ``weights``. In between, where a model has its attention and activation, is
        nothing: the inputs of ``o_proj`` and ``down_proj`` are its arguments.

    Raises:
        ValueError: there is no such provider, or it has no dropout.
    """
    provider = _checked(provider, p)
    layer = DecoderLayer({name: _linear(provider, one, p) for name, one in weights.items()})
    parameters = _trainable(layer)
    dtype = next(iter(weights.values())).base.weight.dtype
    return _finished(provider, layer, dtype), parameters


class _Attention(nn.Module):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(self, x: Tensor, heads: Tensor) -> tuple[Tensor, ...]:
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q, k, v, self.o_proj(heads)


class _Mlp(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor, activated: Tensor) -> tuple[Tensor, ...]:
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        return gate, up, self.down_proj(activated)


class DecoderLayer(nn.Module):
    """The seven linears of a decoder layer, as a model calls them."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(), _Mlp()
        for name, linear in linears.items():
            parent = self.self_attn if name[0] in "qkvo" else self.mlp
            parent.add_module(name, linear)

    def forward(
        self, x: Tensor, heads: Tensor, normed: Tensor, activated: Tensor
    ) -> tuple[Tensor, ...]:
        return (*self.self_attn(x, heads), *self.mlp(normed, activated))


def _checked(provider: Provider | str, p: float) -> Provider:
    provider = find(provider) if isinstance(provider, str) else provider
    if p and not provider.has_dropout:
        raise ValueError(f"{provider.name} has no dropout, got p = {p}")
    return provider


def _linear(provider: Provider, weights: Weights, p: float) -> nn.Module:
    r = weights.lora_a.shape[0]
    layer: Any = LoRALinear.from_linear(
        weights.base, r=r, lora_alpha=SCALING * r, lora_dropout=p, init_lora_weights=False
    )
    dtype = torch.float32 if provider.mixed else weights.base.weight.dtype
    for module, weight in (
        (layer.lora_A["default"], weights.lora_a),
        (layer.lora_B["default"], weights.lora_b),
    ):
        module.weight = nn.Parameter(weight.to(dtype, copy=True))
    fastlora.unpatch(layer)
    assert type(layer) is PeftLinear
    return provider.convert(layer).train()


def _trainable(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _finished(provider: Provider, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Finish a module, and run it under autocast where the provider's users do."""
    module = provider.finish(module)
    mixed = provider.mixed and dtype in (torch.bfloat16, torch.float16)
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


def _bare(layer: PeftLinear) -> nn.Module:
    base: nn.Module = layer.base_layer
    return base


for _provider in (
    Provider("frozen", "the bare nn.Linear: the limit", _bare, mixed=False),
    Provider("peft", "peft's default: fp32 adapters, autocast"),
    Provider("peft-bf16", "peft, adapters in the base's dtype", mixed=False),
    Provider(
        "peft-compiled",
        "peft's default by torch.compile",
        finish=_compiled,
        countable=False,
        levels=("layer",),
    ),
    Provider("addmm", "cuBLAS and in-place addmm_", _Addmm, has_dropout=False),
    Provider("fastlora", "fastlora, its plans chosen by itself", finish=_patched),
    Provider("fastlora-fused", "fastlora, held to the fused plan", plan="fused", finish=_patched),
    Provider(
        "fastlora-hybrid", "fastlora, held to the hybrid plan", plan="hybrid", finish=_patched
    ),
    Provider(
        "fastlora-bf16", "fastlora, adapters in the base's dtype", mixed=False, finish=_patched
    ),
):
    register(_provider)
