"""When a LoRA layer is fused, and what it remembers of having been asked.

``state_reason`` and ``input_reason`` are the rules: why a layer, or one call of it, is left to
peft. They hold for one call, because device, dtype, autocast and the state of the adapters all
change after ``patch``. Walking through them takes the host three times as long as an ``nn.Linear``,
so what they looked at is remembered in ``Operands``, and compared again at every call, which takes
a third of one.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from fastlora import dora
from fastlora.functional import FLOAT_DTYPES
from fastlora.kernels.layout import Facts, are_as_before, look_at
from fastlora.prepared import Siblings

# Keyword arguments that peft's hooks pass to every layer; None means that nothing was asked for.
_PEFT_ARGUMENTS = frozenset(("adapter_names", "alora_offsets"))
# torch calls these four on every module; reading a weight instead of calling its module skips them.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What of a layer's own attributes and children is compared, each in one step.
_SETTINGS = itemgetter(
    "_disable_adapters",
    "merged_adapters",
    "_active_adapter",
    "fan_in_fan_out",
    "cast_input_dtype_enabled",
    "lora_variant",
)
_CHILDREN = itemgetter("base_layer", "lora_A", "lora_B", "lora_dropout")
_HOOKS_OF = itemgetter(*_HOOKS)
# torch fills these dictionaries and never replaces them.
_GLOBAL_HOOKS = tuple(getattr(nn_module, f"_global{name}") for name in _HOOKS)
# peft's hotswap to another rank leaves a bare Tensor where the Parameter was.
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))
_DEVICES = frozenset(("cpu", "cuda"))


class _Adapter:
    """One active adapter of a layer."""

    __slots__ = (
        "a",
        "b",
        "dropout",
        "lora_a",
        "lora_b",
        "lora_bias",
        "magnitude",
        "name",
    )

    def __init__(self, layer: PeftLinear, name: str) -> None:
        self.name = name
        self.a, self.b = layer.lora_A[name], layer.lora_B[name]
        self.dropout = layer.lora_dropout[name]
        self.lora_a, self.lora_b, self.lora_bias = self.a.weight, self.b.weight, self.b.bias
        # DoRA's, or None.
        self.magnitude = layer.lora_magnitude_vector[name] if is_dora(layer, name) else None


class Operands:
    """The tensors of a layer that is fused, and all that ``state_reason`` found while it said so.

    Attributes:
        weight: the frozen weight ``[N, K]`` (``[K, N]`` in a Conv1D).
        bias: ``[N]`` or ``None``.
        adapters: those that are active, in peft's order.
        simple: one adapter without a bias or magnitude on an ``nn.Linear``: the operation's own
            case.
        tensors: all of the above, flat.
        device: of all.
        features: K.
        rank: R; of several adapters the sum.
        siblings: the operands as a group of one, unless they are made anew for each call.
        magnitude: DoRA's module, or ``None``.
    """

    __slots__ = (
        "_bias_is_trained",
        "_children",
        "_contents",
        "_copies",
        "_dropouts",
        "_facts",
        "_leaves",
        "_names",
        "_settings",
        "_transposed",
        "adapters",
        "bias",
        "device",
        "features",
        "magnitude",
        "rank",
        "siblings",
        "simple",
        "tensors",
        "weight",
    )

    def __init__(self, layer: PeftLinear) -> None:
        base = layer.base_layer
        self.weight, self.bias = base.weight, base.bias
        self.adapters = tuple(_Adapter(layer, name) for name in active_adapters(layer))
        self.device = base.weight.device
        self._transposed = layer.fan_in_fan_out
        self.features = base.weight.shape[0 if self._transposed else 1]
        self.rank = sum(each.lora_a.shape[0] for each in self.adapters)
        first = self.adapters[0]
        self.magnitude = first.magnitude
        plain = first.lora_bias is None and first.magnitude is None
        self.simple = len(self.adapters) == 1 and plain and not self._transposed
        optional = [self.bias, *(each.lora_bias for each in self.adapters)]
        if self.magnitude is not None:
            optional.append(self.magnitude.weight)
        self.tensors = (
            self.weight,
            *(tensor for each in self.adapters for tensor in (each.lora_a, each.lora_b)),
            *(tensor for tensor in optional if tensor is not None),
        )
        self._facts: Facts | None = None  # not remembered
        self.siblings: Siblings | None = None

    def remember(self, layer: PeftLinear) -> bool:
        """Look at what ``hold`` compares; returns whether it holds, so that it can be relied on."""
        if any(tensor.numel() == 1 for tensor in self.tensors):
            return False  # two of them may be equal, and not the same
        try:
            self._facts = look_at(self.tensors)
        except RuntimeError:  # torch.func's tensors have no memory
            return False
        self._bias_is_trained = self.bias is not None and self.bias.requires_grad
        self._look_at(layer)
        if len(self.adapters) == 1 and self.adapters[0].lora_bias is None and not self._transposed:
            first, scaled = self.adapters[0], self.magnitude is not None
            adapter = ((first.lora_a,), (first.lora_b,))
            self.siblings = Siblings((self.weight,), (self.bias,), *adapter, scaled=scaled)
        return self.hold(layer)

    def is_of(self, layer: PeftLinear) -> bool:
        """Return whether the layer still has all the modules it had, whichever are active."""
        try:
            return _CHILDREN(layer._modules) == self._children and self._contents == self._copies
        except Exception:  # as in modules_hold
            return False

    def _look_at(self, layer: PeftLinear) -> None:
        active = layer._active_adapter
        active = active if isinstance(active, str) else list(active)
        variants = dict(layer.lora_variant)
        self._settings: tuple[Any, ...] = (False, [], active, self._transposed, True, variants)
        self._names = [each.name for each in self.adapters]
        self._children = children = _CHILDREN(layer._modules)
        leaves = [layer.base_layer]
        for each in self.adapters:
            leaves += (each.a, each.b, each.dropout)
        self._leaves = tuple((leaf, type(leaf), leaf.__dict__) for leaf in leaves)
        # From here on the dictionaries themselves: torch fills them and never replaces them.
        contents = [child._modules for child in children[1:]]
        contents += [leaf._parameters for leaf in leaves]
        self._contents = tuple([each for each in contents if each])
        self._copies = tuple([dict(each) for each in self._contents])
        self._dropouts = tuple(
            each.dropout.__dict__ for each in self.adapters if type(each.dropout) is nn.Dropout
        )

    def hold(self, layer: PeftLinear) -> bool:
        """Return whether ``state_reason`` would still say the same of the layer.

        Everything is compared that ``state_reason`` looks at.
        """
        return self.tensors_hold() and self.modules_hold(layer)

    def modules_hold(self, layer: PeftLinear) -> bool:
        """Return whether it would still say the same of the layer's settings and modules."""
        try:
            return self._modules_hold(layer)
        except Exception:
            # A KeyError: an adapter was deleted, or nn.DataParallel made a copy of the layer. Or a
            # parameter is another one, and comparing the two raises whatever tensors of their types
            # raise: a RuntimeError, mostly.
            return False

    def _modules_hold(self, layer: PeftLinear) -> bool:
        # Whole tuples and dictionaries: they are equal if each item is identical or equal, and
        # comparing them takes no step of the interpreter for an item.
        own = layer.__dict__
        if (
            _SETTINGS(own) != self._settings
            or _CHILDREN(own["_modules"]) != self._children
            or self._contents != self._copies
            or "forward" in own
            or any(_GLOBAL_HOOKS)
        ):
            return False
        for leaf, kind, of_leaf in self._leaves:
            if (
                type(leaf) is not kind
                or any(_HOOKS_OF(of_leaf))  # users do replace those
                or "forward" in of_leaf
                or "_hf_hook" in of_leaf
            ):
                return False
        scaling = own["scaling"]
        for name in self._names:
            if type(scaling[name]) not in NUMBERS:
                return False
        for of_dropout in self._dropouts:
            if of_dropout["p"] >= 1.0:
                return False
        magnitude = self.magnitude
        return magnitude is None or (
            own["_modules"]["lora_magnitude_vector"]._modules[self._names[0]] is magnitude
            and magnitude.weight is self.tensors[-1]
            and _magnitude_reason(magnitude) is None
        )

    def tensors_hold(self) -> bool:
        """Return whether the tensors look as they did, wherever they lie now."""
        if self._facts is None or self.weight.requires_grad:
            return False
        bias = self.bias
        if bias is not None and bias.requires_grad is not self._bias_is_trained:
            return False
        return are_as_before(self._facts)

    def dropout_p(self) -> float:
        """Return the dropout of a call made now; of several adapters the largest."""
        p = 0.0
        for each in self.adapters:
            dropout = each.dropout
            if type(dropout) is nn.Dropout and dropout.training and dropout.p > p:
                p = dropout.p
        return p

    def versions(self) -> int:
        """Return a number that an in-place change of any weight raises (an optimizer's step)."""
        total = 0
        for tensor in self.tensors:
            total += tensor._version
        return total

    def scalings(self, layer: PeftLinear) -> tuple[float, ...]:
        """Return the scalings of the active adapters."""
        scaling = layer.scaling
        if len(self.adapters) == 1:
            return (scaling[self.adapters[0].name],)
        return tuple([scaling[each.name] for each in self.adapters])

    def arguments(
        self, scalings: tuple[float, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float]:
        """Return weight, bias, ``lora_a``, ``lora_b`` and scaling of the one fused operation.

        A bias of ``lora_B`` goes into the frozen one, and several adapters are stacked: the sum of
        their products is one product of the sum of their ranks. Autograd takes both apart again.
        """
        weight, bias, first = self.weight, self.bias, self.adapters[0]
        lora_a, lora_b, scaling = first.lora_a, first.lora_b, scalings[0]
        if self.simple:
            return weight, bias, lora_a, lora_b, scaling
        if self.magnitude is not None:
            bias = None  # it is not scaled: finish() adds it
        if self._transposed:
            weight = weight.t()
        for each, own_scaling in zip(self.adapters, scalings, strict=True):
            if each.lora_bias is not None:
                term = each.lora_bias * own_scaling
                bias = term if bias is None else bias + term
        if len(self.adapters) > 1:
            lora_a = torch.cat([each.lora_a for each in self.adapters])
            if any(other != scaling for other in scalings):
                scaled = [each.lora_b * s for each, s in zip(self.adapters, scalings, strict=True)]
                lora_b, scaling = torch.cat(scaled, 1), 1.0
            else:
                lora_b = torch.cat([each.lora_b for each in self.adapters], 1)
        return weight, bias, lora_a, lora_b, scaling

    def finish(self, y: Tensor, scalings: tuple[float, ...]) -> Tensor:
        """Return what DoRA makes of the fused operation's result; without DoRA the result."""
        if self.magnitude is None:
            return y
        return dora.scale_columns(y, self.column_scale(scalings), self.bias)

    def column_scale(self, scalings: tuple[float, ...]) -> Tensor:
        """Return what DoRA multiplies the columns of the output by (there is DoRA)."""
        first, magnitude = self.adapters[0], self.magnitude
        assert magnitude is not None
        operands = (self.weight, first.lora_a, first.lora_b, scalings[0])
        return dora.column_scale(magnitude.weight, *operands)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled layer has other tensors: it asks the rules anew.
        return (nothing, ())


NUMBERS = frozenset((int, float))


def nothing() -> None:
    return None


def operands(layer: PeftLinear) -> Operands | str:
    """Return what a fused call of the layer reads, or why the layer is left to peft."""
    own = layer.__dict__
    remembered: Operands | None = own.get("fastlora_operands")
    if remembered is not None and remembered.hold(layer):
        return remembered
    # Of adapters that take turns, and while they are disabled, what was prepared is kept.
    known: list[Operands] = [
        each for each in own.get("fastlora_known", ()) if each is not None and each.is_of(layer)
    ]
    found = next((each for each in known if each.hold(layer)), None) or operands_now(layer)
    if isinstance(found, Operands) and (found in known or found.remember(layer)):
        others = [each for each in known if each is not found]
        own["fastlora_operands"], own["fastlora_known"] = found, [found, *others][:MAX_KNOWN]
    else:
        own["fastlora_operands"], own["fastlora_known"] = None, known
    return found


MAX_KNOWN = 4  # adapters of a layer that take turns without being asked about anew


def operands_now(layer: PeftLinear) -> Operands | str:
    """``operands`` without a memory, for tracing: dynamo would guard on it and write it back."""
    return state_reason(layer) or Operands(layer)


def active_adapters(layer: PeftLinear) -> list[str]:
    """The active adapters that this layer has; the model may have others active elsewhere."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def state_reason(layer: PeftLinear, *, between_calls: bool = False) -> str | None:
    """Return why the layer, as it stands, is left to peft, or ``None`` if it is fused.

    Args:
        layer: a LoRA linear, patched or not.
        between_calls: accept sharded weights, which FSDP2 makes whole before it calls the layer.
    """
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return f"its adapters are merged into the base weight: {', '.join(layer.merged_adapters)}"
    active = active_adapters(layer)
    if not active:
        return "none of its adapters is active"
    reason = _replaced_forward_reason(layer)
    for adapter in active:
        reason = reason or _adapter_reason(layer, adapter, between_calls)
    reason = reason or _base_reason(layer, between_calls)
    for adapter in active:
        reason = reason or _weights_reason(layer, adapter)
    return (
        reason
        or _together_reason(layer, active)
        or _dora_reason(layer, active, between_calls)
        or _global_hooks_reason()
    )


def is_sharded(layer: PeftLinear) -> bool:
    """Return whether a weight of the layer is a DTensor, as it stands."""
    return any(map(_is_dtensor, layer.parameters()))


def _is_dtensor(tensor: object) -> bool:
    # By name: importing torch.distributed.tensor takes a second that most users need not spend.
    return type(tensor).__name__ == "DTensor"


def _replaced_forward_reason(layer: PeftLinear) -> str | None:
    if "forward" not in layer.__dict__:
        return None
    # accelerate keeps the forward that it wraps, and puts it back on the instance when its hook is
    # removed; hooked after patch(), that is the fused one.
    wrapped = layer.__dict__.get("_old_forward", layer.__dict__["forward"])
    if getattr(getattr(wrapped, "__func__", None), "__module__", None) == "fastlora.layers":
        return None
    return "its forward was replaced on the instance before it was patched"


def _adapter_reason(layer: PeftLinear, adapter: str, between_calls: bool) -> str | None:
    if adapter in layer.lora_variant and not is_dora(layer, adapter):
        return f"the adapter is a LoRA variant: {type(layer.lora_variant[adapter]).__name__}"
    if not layer.cast_input_dtype_enabled:
        return "peft's input cast is switched off (cast_input_dtype_enabled = False)"
    scaling = layer.scaling[adapter]
    if not isinstance(scaling, (int, float)):
        return f"scaling is a {type(scaling).__name__}, not a number (compiled hotswap)"
    for name in ("lora_A", "lora_B"):
        module = getattr(layer, name)[adapter]
        if reason := _plain_linear_reason(module, between_calls):
            return f"{name} {reason}"
        if name == "lora_A" and module.bias is not None:
            return "lora_A has a bias"
    dropout = layer.lora_dropout[adapter]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"lora_dropout is a {type(dropout).__name__}, not an nn.Dropout"
    if "forward" in dropout.__dict__:
        return "lora_dropout had its forward replaced"
    if any(getattr(dropout, hooks) for hooks in _HOOKS):
        return "lora_dropout has hooks"
    if type(dropout) is nn.Dropout and dropout.p >= 1.0:
        return f"lora_dropout is {dropout.p}: it drops everything"
    return None


def _together_reason(layer: PeftLinear, active: list[str]) -> str | None:
    """Return why several active adapters cannot be stacked, or ``None``."""
    dtypes = {name: layer.lora_A[name].weight.dtype for name in active}
    if len(set(dtypes.values())) > 1:
        described = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        return f"{len(active)} adapters of different dtypes are active at once: {described}"
    return None


def is_dora(layer: PeftLinear, adapter: str) -> bool:
    """Return whether the adapter is a DoRA adapter of peft's plain kind."""
    variant = layer.lora_variant.get(adapter)
    return variant is not None and type(variant).__name__ == "DoraLinearVariant"


def _dora_reason(layer: PeftLinear, active: list[str], between_calls: bool) -> str | None:
    """Return why a layer with DoRA is left to peft, or ``None``; also for one without it."""
    with_dora = [name for name in active if is_dora(layer, name)]
    if not with_dora:
        return None
    if len(active) > 1:
        return f"DoRA is active beside other adapters: {', '.join(active)}"
    if layer.fan_in_fan_out:
        return "DoRA on a Conv1D (fan_in_fan_out)"
    if layer.lora_B[active[0]].bias is not None:
        return "DoRA with a bias of lora_B (lora_bias)"
    magnitude = layer.lora_magnitude_vector[active[0]]
    if reason := _magnitude_reason(magnitude, between_calls):
        return reason
    weight = magnitude.weight
    if weight.device != layer.base_layer.weight.device or weight.shape != (layer.out_features,):
        return f"DoRA's magnitude is {tuple(weight.shape)} on {weight.device}"
    return None


def _magnitude_reason(magnitude: nn.Module, between_calls: bool = False) -> str | None:
    """Return why reading DoRA's magnitude would differ from calling its module, or ``None``."""
    if type(magnitude).__name__ != "DoraLinearLayer":
        return f"DoRA's magnitude is a {type(magnitude).__name__}"
    if "forward" in magnitude.__dict__ or any(getattr(magnitude, hooks) for hooks in _HOOKS):
        return "DoRA's magnitude has hooks"
    weight = magnitude._parameters.get("weight")
    if weight is None and "_is_replica" in magnitude.__dict__:
        weight = magnitude.__dict__.get("weight")
    if type(weight) not in _PLAIN_TENSORS and not (between_calls and _is_dtensor(weight)):
        return f"DoRA's magnitude is of type {type(weight).__name__}"
    return None


def _base_reason(layer: PeftLinear, between_calls: bool) -> str | None:
    base = layer.base_layer
    expected = Conv1D if layer.fan_in_fan_out else nn.Linear
    if reason := _plain_linear_reason(base, between_calls, expected):
        return f"the base layer {reason}"
    if base.weight.requires_grad:
        return "the base weight is trained (requires_grad)"
    return None


def _plain_linear_reason(
    module: nn.Module, between_calls: bool, expected: type[nn.Module] = nn.Linear
) -> str | None:
    """Return why reading the module's weight would differ from calling it, or ``None``."""
    if type(module) is not expected:
        where = "nn.Linear" if expected is nn.Linear else "Conv1D (fan_in_fan_out)"
        return f"is a {type(module).__name__}, not an {where}".replace("an Conv", "a Conv")
    if "_hf_hook" in module.__dict__:
        return "is managed by an accelerate hook (offloading)"
    if "forward" in module.__dict__:
        return "had its forward replaced"
    weight = module._parameters.get("weight")
    if hasattr(weight, "ds_id"):  # before the hooks, which are how it gathers and would say less
        return "has a weight that DeepSpeed ZeRO-3 gathers"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks"
    if weight is None and "_is_replica" in module.__dict__:
        weight = module.__dict__.get("weight")  # nn.DataParallel's copies hold plain tensors
    if weight is None:
        return "computes its weight (parametrization, weight norm or flattened parameters)"
    for name, tensor in (("weight", weight), ("bias", module.bias)):
        plain = tensor is None or type(tensor) in _PLAIN_TENSORS
        if not plain and not (between_calls and _is_dtensor(tensor)):
            return f"has a {name} of type {type(tensor).__name__}"
    if weight.is_meta:
        return "is on the meta device"
    return None


def _weights_reason(layer: PeftLinear, adapter: str) -> str | None:
    base, a, b = layer.base_layer.weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    n, k = (0, 1) if not layer.fan_in_fan_out else (1, 0)
    if (
        a.dim() != 2
        or base.dim() != 2
        or (b.shape, a.shape[1]) != ((base.shape[n], a.shape[0]), base.shape[k])
    ):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in (base, a, b))
        return f"weight, lora_A and lora_B do not fit together: {shapes}"
    if a.dtype != b.dtype:
        return f"lora_A is {a.dtype}, but lora_B is {b.dtype}"
    if base.numel() == 0:
        return f"the base weight has no elements: {tuple(base.shape)}"
    if base.dtype not in FLOAT_DTYPES or a.dtype not in FLOAT_DTYPES:
        return f"the weights are {base.dtype} and {a.dtype}"
    bias = layer.base_layer.bias
    if bias is not None and bias.dtype != base.dtype:
        return f"the base weight is {base.dtype}, but its bias is {bias.dtype}"
    for other in (a, b) if bias is None else (a, b, bias):
        if other.device != base.device:
            return f"the base weight is on {base.device}, but another part is on {other.device}"
    if base.device.type not in _DEVICES:
        return f"fastlora has no implementation for {base.device.type}"
    return None


def _global_hooks_reason() -> str | None:
    if any(_GLOBAL_HOOKS):
        return "hooks are registered on all modules"
    return None


def argument_reason(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return why a call with these arguments beside the input is left to peft, or ``None``."""
    if args:
        return f"it was called with {len(args)} more positional arguments"
    for name, value in kwargs.items():
        if value is not None or name not in _PEFT_ARGUMENTS:
            return f"it was called with {name}="
    return None


def input_reason(operands: Operands, x: Tensor) -> str | None:
    """Return why a call with this input is left to peft, or ``None``."""
    if type(x) not in _PLAIN_TENSORS:
        return f"the input is a {type(x).__name__}"
    weight, device = operands.weight, operands.device
    if operands.magnitude is not None and operands.dropout_p() > 0.0:
        return "DoRA with dropout: peft drops the input of the frozen product too"
    autocast = torch.is_autocast_enabled(device.type)
    adapter_dtype = operands.adapters[0].lora_a.dtype
    if operands.magnitude is not None and not autocast and adapter_dtype != weight.dtype:
        # The gradient is scaled in the base's dtype, which would cost the adapters theirs.
        return f"DoRA in {adapter_dtype} on a base in {weight.dtype}, without autocast"
    if len(operands.adapters) > 1 and operands.dropout_p() > 0.0:
        names = ", ".join(each.name for each in operands.adapters)
        return f"{len(operands.adapters)} adapters with dropout are active at once: {names}"
    if x.dim() == 0 or x.shape[-1] != operands.features:
        return (
            f"the input has shape {tuple(x.shape)}, but the layer takes {operands.features} "
            "features"
        )
    if x.device != device:
        return f"the input is on {x.device}, but the weight is on {device}"
    if autocast:
        dtypes = (x.dtype, weight.dtype, operands.adapters[0].lora_a.dtype)
        if torch.float64 in dtypes or x.dtype not in FLOAT_DTYPES:
            return "autocast is on, but input, weight and adapter are {}, {}, {}".format(*dtypes)
    elif x.dtype != weight.dtype:
        return f"the input is {x.dtype}, but the weight is {weight.dtype}, and autocast is off"
    return None


def tracing_reason() -> str | None:
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        return "the model is being exported or traced"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None
