"""peft's ``adapter_names=``: a batch whose rows have adapters of their own, on the model's layers.

    model.generate(**batch, adapter_names=["emoji", "__base__", "support"])

peft walks the adapters, and gathers the rows of each anew in every layer; here they are multiplied
as one batch (``segmented.py``), or by the segmented kernels on a GPU. peft's own checks have been
made by then. Beyond what peft takes, a packed batch ``[1, T, K]`` may name an adapter for each
token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from fastlora import plans, rules, segmented_ops
from fastlora.segmented import Adapters, Factors, pack
from fastlora.segments import Segments

BASE = "__base__"  # peft's name for no adapter


def is_packed(x: Tensor, names: Sequence[str]) -> bool:
    """Return whether a batch of one row names an adapter for each of its tokens."""
    return x.dim() == 3 and x.shape[0] == 1 and x.shape[1] == len(names) > 1


def fallback_reason(
    layer: PeftLinear,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: Sequence[str],
) -> str | None:
    """Return why a call with ``adapter_names`` is left to peft, or ``None``."""
    if reason := rules.argument_reason(args, kwargs) or rules.tracing_reason():
        return reason
    if torch.compiler.is_compiling():
        return "adapter_names= are not fused inside torch.compile"
    if type(x) is not Tensor or x.dim() < 2:
        return f"the input is a {type(x).__name__} of {x.dim()} dimensions"
    if torch.is_autocast_enabled(x.device.type):
        return "adapter_names= are not fused under autocast"
    known = layer.__dict__.get("fastlora_mixed")
    if known is None or known.names != names or not known.hold(layer):
        found = _Adapters.of(layer, names)
        if isinstance(found, str):
            return found
        layer.__dict__["fastlora_mixed"] = known = found
    if known.device is not None and known.device != x.device:
        return f"the input is on {x.device}, but an adapter is on {known.device}"
    if torch.is_grad_enabled() and (x.requires_grad or known.is_trained()):
        return "adapter_names= are fused without gradients only"
    return None


def forward(layer: PeftLinear, x: Tensor, names: Sequence[str]) -> Tensor:
    """Return the layer's output for ``x [B, ..., K]`` and an adapter for each of its B rows.

    ``fallback_reason`` has been asked for this call, and there was none.
    """
    y: Tensor = layer.base_layer(x)
    adapters: _Adapters = layer.__dict__["fastlora_mixed"]
    if adapters.device is None:
        return y
    rows = x.reshape(-1, x.shape[-1])
    each, rest = divmod(rows.shape[0], len(names))
    assert rest == 0, "peft has compared the number of names with the batch"
    segments = _segments(tuple(names), each, x.device)
    y = y.contiguous()
    arena, descriptors = adapters.packed()
    segmented_ops.add_adapters(
        [y.view(-1, y.shape[-1])],
        rows,
        arena,
        descriptors,
        segments,
        max_rank=adapters.max_rank,
        adapters=lambda _, slots: adapters.in_slots(slots),
    )
    return y


@functools.lru_cache(maxsize=64)
def _segments(names: tuple[str, ...], each: int, device: torch.device) -> Segments:
    """Return the metadata of a batch, for all layers; the slots are 1, 2, ... as names come."""
    distinct = _distinct(names)
    slot_of = {name: slot for slot, name in enumerate(distinct, 1)}
    requests = [(slot_of.get(name, 0), each) for name in names]
    return Segments.of(requests, table=len(distinct) + 1, device=device)


def _distinct(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name != BASE]


class _Adapters:
    """The adapters of one layer that some names are, as the operator takes them.

    Whether the layer still has them is asked at every call of every layer, for each adapter: in
    loops that C runs, which take a quarter of Python's time.
    """

    def __init__(self, layer: PeftLinear, names: Sequence[str]) -> None:
        self.names = list(names)
        distinct = _distinct(names)
        present = [name for name in distinct if name in layer.lora_A]
        self._absent = [name for name in distinct if name not in layer.lora_A]
        self._get = tuple(present)
        self._lora_as = [layer.lora_A[name] for name in present]
        self._lora_bs = [layer.lora_B[name] for name in present]
        self.modules = self._lora_as + self._lora_bs
        self._scalings = [layer.scaling[name] for name in present]
        self._dropouts = [
            dropout
            for dropout in (layer.lora_dropout[name] for name in present)
            if type(dropout) is not nn.Identity
        ]
        self._parameters = [module._parameters for module in self.modules]
        self.weights: list[Tensor] = list(map(_WEIGHT, self._parameters))
        self._addresses = list(map(Tensor.data_ptr, self.weights))
        # None: this layer has none of them.
        self.device = self.weights[0].device if self.weights else None
        factors = {
            name: Factors(lora_a.weight, lora_b.weight.t(), layer.scaling[name])
            for name, lora_a, lora_b in zip(present, self._lora_as, self._lora_bs, strict=True)
        }
        self.factors = [factors.get(name) for name in distinct]
        ranks = [module.weight.shape[0] for module in self._lora_as]
        self.max_rank = -(-max(ranks, default=1) // 16) * 16
        self._versions: list[int] = []
        self._packed: tuple[Tensor, Tensor] | None = None
        self._in_slots: dict[tuple[int, ...], Adapters] = {}

    @classmethod
    def of(cls, layer: PeftLinear, names: Sequence[str]) -> _Adapters | str:
        """Find them in a layer; returns the reason if one is not plain LoRA."""
        for name in _distinct(names):
            if name not in layer.lora_A:
                continue
            if name in getattr(layer, "lora_variant", {}):
                return f"{name} is not plain LoRA"
            for module in (layer.lora_A[name], layer.lora_B[name]):
                if type(module) is not nn.Linear or module.bias is not None:
                    return f"{name} has a bias, or is not a plain linear"
                if type(module.weight) is not nn.Parameter:
                    return f"the weight of {name} is a {type(module.weight).__name__}"
                if "forward" in module.__dict__:
                    return f"the forward of {name} was replaced"
        found = cls(layer, names)
        if len({(weight.dtype, weight.device) for weight in found.weights}) > 1:
            return "the adapters differ in dtype or device"
        if found._more_than_multiply():
            return "an adapter has hooks, or dropout while the layer is training"
        return found

    def is_trained(self) -> bool:
        """Return whether a weight requires a gradient."""
        return any(weight.requires_grad for weight in self.weights)

    def hold(self, layer: PeftLinear) -> bool:
        """Return whether the layer still has what was found."""
        lora_as, lora_bs = layer.lora_A._modules, layer.lora_B._modules
        get = self._get
        return (
            all(map(is_, map(lora_as.get, get), self._lora_as))
            and all(map(is_, map(lora_bs.get, get), self._lora_bs))
            and list(map(layer.scaling.get, get)) == self._scalings
            and all(map(is_, map(_WEIGHT, self._parameters), self.weights))
            and list(map(Tensor.data_ptr, self.weights)) == self._addresses
            and not self._more_than_multiply()
            and not any(name in lora_as for name in self._absent)
        )

    def _more_than_multiply(self) -> bool:
        """Return whether calling the modules would do more than multiply."""
        return (
            any(map(_HOOKS, self.modules))
            or any(map(_PRE_HOOKS, self.modules))
            or any(map(_TRAINING, self._dropouts))
        )

    def packed(self) -> tuple[Tensor, Tensor]:
        """Return arena and descriptors; PyTorch on a CPU takes the weights where they are."""
        if any(map(Tensor.is_inference, self.weights)):
            self._packed, self._in_slots = None, {}  # they do not say whether they were changed
        else:
            versions = list(map(_VERSION, self.weights))
            if versions != self._versions:  # trained since, perhaps
                self._versions, self._packed, self._in_slots = versions, None, {}
        if self.device == _CPU and not plans.interpreting():
            return _NOTHING, _NOTHING
        if self._packed is None:
            first = next(each for each in self.factors if each is not None)
            nothing = Factors(first.lora_a[:0], first.lora_b[:0], 0.0)
            self._packed = pack([each or nothing for each in self.factors])
        return self._packed

    def __reduce__(self) -> tuple[Any, ...]:
        return rules.nothing, ()  # a copy of the layer finds its own

    def in_slots(self, slots: tuple[int, ...]) -> Adapters:
        """Return the adapters of some slots, as ``packed`` has found them."""
        known = self._in_slots.get(slots)
        if known is None:
            known = self._in_slots[slots] = Adapters([self.factors[slot - 1] for slot in slots])
        return known


_WEIGHT = itemgetter("weight")
_VERSION = attrgetter("_version")
_HOOKS, _PRE_HOOKS = attrgetter("_forward_hooks"), attrgetter("_forward_pre_hooks")
_TRAINING = attrgetter("training")
_CPU = torch.device("cpu")
_NOTHING = torch.empty(0)
