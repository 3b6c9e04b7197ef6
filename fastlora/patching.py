"""Attaching to peft: ``patch``, ``unpatch``, ``explain``, and the ways in for code that is not
yours.

``patch`` swaps the class of exactly ``peft.tuners.lora.layer.Linear``, never of a subclass (those
are quantized or otherwise special), and of ``LoraModel``, so that layers which peft adds later are
fused too, and registers two hooks on each module whose projections are computed together. Nothing
global changes: other models, and other libraries, never notice.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from fastlora import plans
from fastlora.autograd import DropoutMask
from fastlora.functional import DROPOUT_MASKS
from fastlora.layers import FUSED, LoRALinear
from fastlora.rules import is_sharded, state_reason
from fastlora.siblings import (
    group_children,
    group_siblings,
    groups_of,
    possible_groups,
    ungroup_siblings,
)

_NAMES_SHOWN = 8  # for each reason in a report, abridged, so that it fits on one screen


@dataclass(frozen=True)
class PatchReport:
    """Which LoRA layers of a model are fused, and why the others are not.

    Attributes:
        model: the class name of the model.
        fused: names of the layers that are fused as the model stands.
        fallback: name and reason of each patched layer that would go to peft's forward now. They
            are asked again at every call.
        untouched: name and reason of each LoRA layer of another class, which ``patch`` leaves
            alone.
        groups: the fused or sharded layers that share their input and are computed together (q, k
            and v; gate and up).
        apart: names and reason of each group that could be one, but whose members differ.
        sharded: names of the patched layers whose weights FSDP2 shards between calls: whether they
            are fused is only known when they are called.
        unpatched: names of the LoRA linears that ``patch`` has not been called on.
        notes: what else a reader should know, for example that later layers will not be fused.
    """

    model: str
    fused: tuple[str, ...] = ()
    fallback: Mapping[str, str] = field(default_factory=dict)
    untouched: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    apart: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    sharded: tuple[str, ...] = ()
    unpatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The report in one screen: a line of counts, then one line for each reason."""
        return self.text(_NAMES_SHOWN)

    def text(self, names_shown: int | None = None) -> str:
        """Return the report with that many abridged names for each reason, by default in full."""
        linears = sum(map(len, (self.fused, self.fallback, self.sharded, self.unpatched)))
        if not linears and not self.untouched:
            return (
                f"{self.model} has no LoRA layers: fastlora fuses what peft.get_peft_model (or "
                "model.add_adapter) has put there, so call it first"
            )
        count = len(self.groups)
        in_groups = f" in {count} group{'s' * (count > 1)}" if count else ""
        lines = [
            f"fused {len(self.fused)} of {linears} LoRA linears{in_groups}; "
            f"{len(self.fallback)} fall back"
        ]
        if self.sharded:
            lines[0] += f"; {len(self.sharded)} sharded, decided when they are called"
        if self.unpatched:
            lines[0] += f"; {len(self.unpatched)} not patched"
        for title, layers in (
            ("falls back to peft", self.fallback),
            ("fused one by one", {_joined(names): why for names, why in self.apart.items()}),
            ("left alone", self.untouched),
            (
                "not patched",
                dict.fromkeys(self.unpatched, "fastlora.patch has not been called on it"),
            ),
        ):
            lines += [f"  {title}: {line}" for line in _by_reason(layers, names_shown)]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _by_reason(layers: Mapping[str, str], names_shown: int | None) -> Iterator[str]:
    names_of: dict[str, list[str]] = {}
    for name, reason in layers.items():
        names_of.setdefault(reason, []).append(name)
    for reason, names in sorted(names_of.items(), key=lambda item: -len(item[1])):
        listed = names if names_shown is None else _abridged(names)
        shown = listed[:names_shown]
        more = f", and {len(listed) - len(shown)} more" if len(listed) > len(shown) else ""
        count = f"{len(names)} layers: " if len(names) > len(listed) else ""
        yield f"{reason} ({count}{', '.join(shown)}{more})"


def _abridged(names: Iterable[str]) -> list[str]:
    """Name every layer in few words: ``layers.0-27.mlp.(gate_proj, up_proj)`` are 56 of them."""
    # First the last words of what is otherwise one name, then the numbers.
    last_words: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        last_words.setdefault(parent, []).append(last)
    numbers: dict[tuple[str, ...], list[list[str]]] = {}
    for parent, lasts in last_words.items():
        name = _joined([f"{parent}.{last}" if parent else last for last in lasts])
        numbers.setdefault(tuple(_NUMBER.split(name)), []).append(_NUMBER.findall(name))
    abridged = []
    for words, found in numbers.items():
        columns = [list(dict.fromkeys(column)) for column in zip(*found, strict=True)]
        if math.prod(map(len, columns)) == len(found):
            found = [list(map(_range, columns))]
        # Else some combination of the numbers is missing.
        abridged += ["".join(chain(*zip_longest(words, each, fillvalue=""))) for each in found]
    return abridged


def _joined(siblings: Sequence[str]) -> str:
    """Name the children of one module at once: ``mlp.(gate_proj, up_proj)``."""
    if len(siblings) == 1:
        return siblings[0]
    parent, dot, _ = siblings[0].rpartition(".")
    return f"{parent}{dot}({', '.join(name.rpartition('.')[2] for name in siblings)})"


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name


def _range(numbers: list[str]) -> str:
    """Write consecutive numbers as ``0-27``, others one by one."""
    first = int(numbers[0])
    if len(numbers) > 2 and numbers == [str(first + n) for n in range(len(numbers))]:
        return f"{first}-{numbers[-1]}"
    return ",".join(numbers)


def patch(
    model: nn.Module, *, dropout_mask: DropoutMask = "bits", strict: bool = False
) -> PatchReport:
    """Make the LoRA linears of a model run fused, in place.

    Works on a ``PeftModel``, a ``PeftMixedModel``, a transformers model with ``model.add_adapter``,
    and any module that holds peft LoRA layers; before or after ``.to(device)``; as often as you
    like. The model keeps every name, parameter and method; ``save_pretrained`` writes an ordinary
    adapter.

    Args:
        model: holds peft LoRA layers.
        dropout_mask: how the backward pass finds the dropout mask again: ``"bits"`` saves one bit
            for each element of a layer's input; ``"recompute"`` saves a seed and draws the mask
            again.
        strict: raise, and change nothing, unless every LoRA layer is fused as the model stands now
            (layers that FSDP2 shards count as fused).

    Returns:
        A report whose text says how many layers are fused and why the others are not.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``dropout_mask`` is neither of the two; or ``strict`` and the model has no LoRA
            layer or one that would not be fused (the message lists them).

    Warns:
        UserWarning: the model has no LoRA layers.
        RuntimeWarning: a Triton kernel gives wrong results on a device of the model and will not be
            used there.
    """
    if dropout_mask not in DROPOUT_MASKS:
        raise ValueError(f"dropout_mask must be one of {DROPOUT_MASKS}, got {dropout_mask!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    expected = _report(model, as_if_patched=True)
    patched = len(expected.fused) + len(expected.sharded)
    others = len(expected.fallback) + len(expected.untouched)
    if strict and (others or not patched):
        raise ValueError(f"strict patch refused, nothing was changed: {expected.text()}")
    if not (patched or others):
        warnings.warn(str(expected), stacklevel=2)
    for module in model.modules():
        if type(module) is PeftLinear:
            module.__class__ = LoRALinear
        elif type(module) is LoraModel:
            module.__class__ = FastLoraModel
        if isinstance(module, (LoRALinear, FastLoraModel)):
            module.__dict__["fastlora_dropout_mask"] = dropout_mask
    group_siblings(model)
    for device in _devices(model):
        # Here and not at the first call, which may come while a CUDA graph is captured.
        if device.type == "cuda" and plans.unsupported_reason(device) is None:
            plans.check_device(device)
    return _report(model)


def _devices(model: nn.Module) -> list[torch.device]:
    """Return where the patched layers' base weights are, in the order of their names."""
    layers = (module for module in model.modules() if isinstance(module, LoRALinear))
    weights = (getattr(layer.base_layer, "weight", None) for layer in layers)
    return list(dict.fromkeys(weight.device for weight in weights if weight is not None))


def unpatch(model: nn.Module) -> None:
    """Give every layer back to peft, exactly as it was before ``patch``.

    Warns:
        UserWarning: a layer was wrapped by itself after ``patch`` (``fully_shard(layer)``): its
            class cannot be changed back, and it stays fused.
    """
    ungroup_siblings(model)
    for module in model.modules():
        if isinstance(module, LoRALinear) and type(module) is not LoRALinear:
            warnings.warn(
                f"a {type(module).__name__} cannot be unpatched: it was wrapped after patch",
                stacklevel=2,
            )
        if type(module) is LoRALinear:
            module.__class__ = PeftLinear
            for name in ("forward", "_old_forward"):  # where accelerate's hooks keep a forward
                bound = module.__dict__.get(name)
                if getattr(bound, "__func__", None) is LoRALinear.forward:
                    module.__dict__[name] = PeftLinear.forward.__get__(module)
        elif type(module) is FastLoraModel:
            module.__class__ = LoraModel
        else:
            continue
        for name in (
            "fastlora_dropout_mask",
            "fastlora_last_call",
            "fastlora_operands",
            "fastlora_known",
        ):
            module.__dict__.pop(name, None)


def explain(model: nn.Module) -> str:
    """Say in one screen what runs fused and why the rest does not, as the model stands now.

    Beside the state of each layer it tells where the *last call* went to peft for a reason of its
    own (an input's dtype, ``adapter_names=``, tracing, ...). Under ``torch.compile`` no call is
    recorded. The last lines say, for each CUDA device (or wherever a plan is forced), whether
    Triton kernels, cuBLAS or plain PyTorch compute what is fused, and why.
    """
    report = _report(model)
    decided_when_called = {*report.fused, *report.sharded}
    last_calls = {
        name: module.fastlora_last_call
        for name, module in model.named_modules()
        if name in decided_when_called and isinstance(module, LoRALinear)
    }
    went_to_peft = {name: call for name, call in last_calls.items() if call not in (None, FUSED)}
    lines = [f"  last call went to peft: {line}" for line in _by_reason(went_to_peft, _NAMES_SHOWN)]
    if count := sum(last_calls[name] == FUSED for name in report.sharded):
        lines.append(f"  last call was fused: {count} of {len(report.sharded)} sharded layers")
    forced = plans.requested() != "auto"
    lines += [
        f"  plan on {plans.describe(device)}"
        for device in _devices(model)
        if forced or device.type == "cuda"
    ]
    return "\n".join([str(report), *lines])


def _report(model: nn.Module, as_if_patched: bool = False) -> PatchReport:
    fused: list[str] = []
    sharded: list[str] = []
    unpatched: list[str] = []
    fallback: dict[str, str] = {}
    untouched: dict[str, str] = {}
    notes: list[str] = []
    later_layers_too = False
    fsdp_units: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraModel if as_if_patched else FastLoraModel):
            later_layers_too = True
        if _is_fsdp_unit(module):
            fsdp_units.append(name)
        if not isinstance(module, LoraLayer):
            continue
        if type(module) is PeftLinear and not as_if_patched:
            unpatched.append(name)
        elif type(module) is not PeftLinear and not isinstance(module, LoRALinear):
            untouched[name] = f"{type(module).__name__} is not peft's plain LoRA Linear"
            if name in fsdp_units:
                untouched[name] += " (patch before fully_shard)"
        elif reason := state_reason(module, between_calls=_lies_in(name, fsdp_units)):
            fallback[name] = reason
        elif is_sharded(module):
            sharded.append(name)
        else:
            fused.append(name)
    adapters_can_be_added = getattr(model, "peft_config", None) is not None
    if (fused or fallback or sharded) and adapters_can_be_added and not later_layers_too:
        notes.append(
            f"LoRA layers added to this {type(model).__name__} later run as peft "
            "until the next patch"
        )
    if fused and not as_if_patched and any(map(_lacks_groups, model.modules())):
        notes.append("siblings (q, k and v, ...) are computed one by one until the next patch")
    groups, apart = _groups(model, {*fused, *sharded})
    return PatchReport(
        model=type(model).__name__,
        fused=tuple(fused),
        groups=groups,
        apart=apart,
        fallback=fallback,
        untouched=untouched,
        sharded=tuple(sharded),
        unpatched=tuple(unpatched),
        notes=tuple(notes),
    )


def _lacks_groups(module: nn.Module) -> bool:
    return "fastlora_groups" not in module.__dict__ and bool(possible_groups(module))


def _groups(
    model: nn.Module, computed: set[str]
) -> tuple[tuple[tuple[str, ...], ...], dict[tuple[str, ...], str]]:
    """Return the groups of the layers that are fused, and those that are not, with the reason."""
    groups: list[tuple[str, ...]] = []
    apart: dict[tuple[str, ...], str] = {}
    for prefix, parent, group in groups_of(model):
        names = tuple(f"{prefix}.{name}" if prefix else name for name in group.names)
        # Each member that falls back says so itself.
        if not computed.issuperset(names):
            continue
        if reason := group.difference(parent):
            apart[names] = reason
        else:
            groups.append(names)
    return tuple(groups), apart


def _is_fsdp_unit(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on the module: it makes its parameters whole."""
    # By name: importing torch.distributed.fsdp takes a second that most users need not spend.
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _lies_in(name: str, units: list[str]) -> bool:
    return any(name == unit or not unit or name.startswith(f"{unit}.") for unit in units)


class FastLoraModel(LoraModel):
    """peft's ``LoraModel`` that patches the LoRA layers it is asked to add later."""

    fastlora_dropout_mask: DropoutMask = "bits"

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        super()._create_and_replace(*args, **kwargs)
        # (lora_config, adapter_name, target, target_name, parent, current_key): the same order in
        # peft 0.15 to 0.21, given by position or by name.
        target_name = args[3] if len(args) > 3 else kwargs["target_name"]
        parent = args[4] if len(args) > 4 else kwargs["parent"]
        layer = getattr(parent, target_name, None)
        if type(layer) is PeftLinear:
            layer.__class__ = LoRALinear
            layer.__dict__["fastlora_dropout_mask"] = self.fastlora_dropout_mask
            group_children(parent)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        ungroup_siblings(model)  # what is left is a model that knows nothing of adapters
        return model


FastLoraModel.__name__ = "LoraModel"  # get_model_status() reports it; pickle goes by __qualname__


class _ExactlyLinear(type):
    """Only an ``nn.Linear`` with an ordinary weight is an instance: peft looks up by isinstance.

    A subclass, or a weight that is one (torchao), has a LoRA layer of its own in peft.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        if type(instance) is not nn.Linear:
            return False
        return type(instance._parameters.get("weight")) is nn.Parameter


class _PlainLinear(metaclass=_ExactlyLinear):
    pass


def _new_layer(target: nn.Module, adapter_name: str, **kwargs: Any) -> LoRALinear | None:
    """Build a fused layer for peft, or return ``None`` to leave it to peft's own dispatchers."""
    config = kwargs.get("config")
    fan_in_fan_out = kwargs.get("fan_in_fan_out", getattr(config, "fan_in_fan_out", False))
    # peft wraps a single parameter in another class, and corrects fan_in_fan_out with a warning.
    if kwargs.get("parameter_name") is not None or fan_in_fan_out:
        return None
    return LoRALinear(target, adapter_name, **kwargs)


ConfigT = TypeVar("ConfigT", bound=LoraConfig)


def enable_for(config: ConfigT) -> ConfigT:
    """Mark a ``LoraConfig`` so that peft builds fused layers from it.

    For APIs that take a config and build the peft model themselves, such as TRL's
    ``SFTTrainer(peft_config=...)``. Only plain ``nn.Linear`` base layers with ordinary weights are
    taken over; everything else is built by peft. Siblings (q, k and v, ...) are computed one by one
    until ``fastlora.patch`` (or the callback) has seen the model. The mark is not saved with the
    adapter: a model that is loaded again needs ``fastlora.patch``.

    Args:
        config: any LoRA config; it is changed in place.

    Returns:
        The same config.

    Raises:
        TypeError: ``config`` is not a ``peft.LoraConfig``.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({_PlainLinear: _new_layer})
    return config
