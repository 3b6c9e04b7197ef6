"""``LoRALinear``: peft's LoRA ``Linear`` with a fused forward, and the rules of when it is taken.

The class adds no parameter, buffer or submodule and changes nothing but ``forward``, so a layer
becomes one by ``layer.__class__ = LoRALinear`` and everything else that peft does with it (saving,
merging, switching adapters, ...) is peft's own code. Whatever is not the plain case is handed to
peft's ``forward``; the decision is made at every call, because device, dtype, autocast and the
state of the adapters all change after ``patch``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from fastlora.functional import FLOAT_DTYPES, DropoutMask, apply_lora_linear

# Keyword arguments that peft's hooks pass to every layer; None means that nothing was asked for.
_PEFT_ARGUMENTS = frozenset(("adapter_names", "alora_offsets"))
# torch calls these four on every module; reading a weight instead of calling its module skips them.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# peft's hotswap to another rank leaves a bare Tensor where the Parameter was.
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))
_DEVICES = frozenset(("cpu", "cuda"))
FUSED = "fused"  # what is recorded of a call that did not go to peft


class LoRALinear(PeftLinear):
    """A frozen linear layer with LoRA adapters, computed as one operation.

    :math:`y = xW^T + b + s\\,\\mathrm{dropout}(x)A^TB^T` of Hu et al., 2021
    (https://arxiv.org/abs/2106.09685), by ``fastlora.lora_linear``. It *is* peft's
    ``peft.tuners.lora.layer.Linear`` in every other respect: same constructor, attributes and
    ``state_dict`` keys. ``fastlora.patch`` makes these out of the layers of a peft model;
    ``LoRALinear.from_linear`` makes one without a peft model.
    """

    # Instance attributes of the same names shadow these; none of them is part of the state_dict.
    fastlora_dropout_mask: DropoutMask = "bits"
    fastlora_takes_adapter_files: bool = False
    fastlora_last_call: str | None = None  # FUSED, or why it went to peft; None before the first

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        adapter_name: str = "default",
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> LoRALinear:
        """Put a LoRA adapter on a linear layer, without a peft model.

        Args:
            linear: the base layer, kept as ``base_layer`` and frozen (``requires_grad_(False)``). A
                subclass, which may keep its weight in another form, is refused.
            r: rank of the adapter, at least 1.
            lora_alpha: the adapter's scaling is ``lora_alpha / r``.
            lora_dropout: probability of zeroing an element of the adapter's input, in ``[0, 1)``.
            adapter_name: the name in the ``state_dict``: ``lora_A.<adapter_name>.weight``.
            use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.
            init_lora_weights: as in ``peft.LoraConfig``; ``True`` makes the adapter a no-op at
                first.

        Returns:
            A layer whose adapter alone is trainable, in the base layer's dtype and on its device.
            Its ``state_dict`` has the keys of the same layer inside a peft model, and
            ``load_state_dict`` also takes an adapter file's ``lora_A.weight`` and
            ``lora_B.weight``.

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear``.
            ValueError: the rank is not positive, or ``lora_dropout`` is outside ``[0, 1)``.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear must be a plain torch.nn.Linear, got {type(linear).__name__}")
        if r < 1:
            raise ValueError(f"r must be a positive integer, got {r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {lora_dropout}")
        options = {
            "lora_dropout": lora_dropout,
            "use_rslora": use_rslora,
            "init_lora_weights": init_lora_weights,
        }
        # peft 0.19 gathered the options into a config; before, they were arguments.
        if "config" in inspect.signature(PeftLinear.__init__).parameters:
            options = {"config": LoraConfig(r=r, lora_alpha=lora_alpha, **options)}
        layer = cls(linear, adapter_name, r=r, lora_alpha=lora_alpha, **options)
        linear.requires_grad_(False)
        layer.fastlora_takes_adapter_files = True
        return layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``x [..., K]`` to ``[..., N]``, fused, or by peft where a rule says so."""
        reason = _tracing_reason() or state_reason(self) or call_reason(self, x, args, kwargs)
        if not torch.compiler.is_compiling():
            self.__dict__["fastlora_last_call"] = reason or FUSED  # what explain() reports
        if reason is not None:
            return super().forward(x, *args, **kwargs)
        adapter = _active_adapters(self)[0]
        dropout = self.lora_dropout[adapter]
        base = self.base_layer
        return apply_lora_linear(
            x,
            base.weight,
            base.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
            None,
            self.fastlora_dropout_mask,
        )

    def _get_name(self) -> str:
        # peft's repr, get_layer_status() and get_model_status() report the class by this name.
        return "Linear"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # peft's adapter files leave the adapter's name out of their keys. In a peft model peft
        # itself puts it back.
        if self.fastlora_takes_adapter_files and len(self.lora_A) == 1:
            (adapter,) = self.lora_A
            for part in ("lora_A", "lora_B"):
                if (key := f"{prefix}{part}.weight") in state_dict:
                    state_dict[f"{prefix}{part}.{adapter}.weight"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _active_adapters(layer: PeftLinear) -> list[str]:
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
    active = _active_adapters(layer)
    if len(active) != 1:
        if not active:
            return "none of its adapters is active"
        return f"{len(active)} adapters are active at once: {', '.join(active)}"
    return (
        _replaced_forward_reason(layer)
        or _adapter_reason(layer, active[0], between_calls)
        or _base_reason(layer.base_layer, between_calls)
        or _weights_reason(layer, active[0])
        or _global_hooks_reason()
    )


def is_sharded(layer: PeftLinear) -> bool:
    """Return whether a weight of the layer is a DTensor, as it stands."""
    return any(map(_is_dtensor, layer.parameters()))


def _is_dtensor(tensor: Tensor) -> bool:
    # By name: importing torch.distributed.tensor takes a second that most users need not spend.
    return type(tensor).__name__ == "DTensor"


def _replaced_forward_reason(layer: PeftLinear) -> str | None:
    if "forward" not in layer.__dict__:
        return None
    # accelerate keeps the forward that it wraps, and puts it back on the instance when its hook is
    # removed; hooked after patch(), that is the fused one.
    wrapped = layer.__dict__.get("_old_forward", layer.__dict__["forward"])
    if getattr(wrapped, "__func__", None) is LoRALinear.forward:
        return None
    return "its forward was replaced on the instance before it was patched"


def _adapter_reason(layer: PeftLinear, adapter: str, between_calls: bool) -> str | None:
    if adapter in layer.lora_variant:
        return f"the adapter is a LoRA variant: {type(layer.lora_variant[adapter]).__name__}"
    if layer.fan_in_fan_out:
        return "the base weight is stored transposed (fan_in_fan_out)"
    if not layer.cast_input_dtype_enabled:
        return "peft's input cast is switched off (cast_input_dtype_enabled = False)"
    scaling = layer.scaling[adapter]
    if not isinstance(scaling, (int, float)):
        return f"scaling is a {type(scaling).__name__}, not a number (compiled hotswap)"
    for name in ("lora_A", "lora_B"):
        module = getattr(layer, name)[adapter]
        if reason := _plain_linear_reason(module, between_calls):
            return f"{name} {reason}"
        if module.bias is not None:
            return f"{name} has a bias (lora_bias)"
    dropout = layer.lora_dropout[adapter]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"lora_dropout is a {type(dropout).__name__}, not an nn.Dropout"
    if any(getattr(dropout, hooks) for hooks in _HOOKS):
        return "lora_dropout has hooks"
    if type(dropout) is nn.Dropout and dropout.p >= 1.0:
        return f"lora_dropout is {dropout.p}: it drops everything"
    return None


def _base_reason(base: nn.Module, between_calls: bool) -> str | None:
    if reason := _plain_linear_reason(base, between_calls):
        return f"the base layer {reason}"
    if base.weight.requires_grad:
        return "the base weight is trained (requires_grad)"
    return None


def _plain_linear_reason(module: nn.Module, between_calls: bool) -> str | None:
    """Return why reading the module's weight would differ from calling it, or ``None``."""
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, not an nn.Linear"
    if "_hf_hook" in module.__dict__:
        return "is managed by an accelerate hook (offloading)"
    if "forward" in module.__dict__:
        return "had its forward replaced"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks"
    weight = module._parameters.get("weight")
    if weight is None and "_is_replica" in module.__dict__:
        weight = module.__dict__.get("weight")  # nn.DataParallel's copies hold plain tensors
    if weight is None:
        return "computes its weight (parametrization, weight norm or flattened parameters)"
    for name, tensor in (("weight", weight), ("bias", module.bias)):
        plain = tensor is None or type(tensor) in _PLAIN_TENSORS
        if not plain and not (between_calls and _is_dtensor(tensor)):
            return f"has a {name} of type {type(tensor).__name__}"
    if hasattr(weight, "ds_id"):
        return "has a weight that DeepSpeed ZeRO-3 gathers"
    if weight.is_meta:
        return "is on the meta device"
    return None


def _weights_reason(layer: PeftLinear, adapter: str) -> str | None:
    base, a, b = layer.base_layer.weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if (
        a.dim() != 2
        or base.dim() != 2
        or (b.shape, a.shape[1]) != ((base.shape[0], a.shape[0]), base.shape[1])
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
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "hooks are registered on all modules"
    return None


def call_reason(
    layer: PeftLinear, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Return why this call of a layer that could be fused is left to peft, or ``None``."""
    if args:
        return f"it was called with {len(args)} more positional arguments"
    for name, value in kwargs.items():
        if value is not None or name not in _PEFT_ARGUMENTS:
            return f"it was called with {name}="
    if type(x) not in _PLAIN_TENSORS:
        return f"the input is a {type(x).__name__}"
    weight = layer.base_layer.weight
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return (
            f"the input has shape {tuple(x.shape)}, but the layer takes {weight.shape[1]} features"
        )
    if x.device != weight.device:
        return f"the input is on {x.device}, but the weight is on {weight.device}"
    if torch.is_autocast_enabled(x.device.type):
        adapter = layer.lora_A[_active_adapters(layer)[0]].weight
        dtypes = (x.dtype, weight.dtype, adapter.dtype)
        if torch.float64 in dtypes or x.dtype not in FLOAT_DTYPES:
            return "autocast is on, but input, weight and adapter are {}, {}, {}".format(*dtypes)
    elif x.dtype != weight.dtype:
        return f"the input is {x.dtype}, but the weight is {weight.dtype}, and autocast is off"
    return None


def _tracing_reason() -> str | None:
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        return "the model is being exported or traced"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None
