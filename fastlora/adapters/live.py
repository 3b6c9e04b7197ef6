"""An adapter of a live model: of peft's, or of transformers' with peft adapters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.adapter import Adapter
from fastlora.adapters.checks import PREFIX, check_tensors, factors_of, fingerprint_of
from fastlora.adapters.config import json_object, settings_of
from fastlora.adapters.errors import Refusal, about, shown
from fastlora.adapters.weights import Entry


def read_live(
    name: str, source: nn.Module, linears: Mapping[str, tuple[int, int]], max_rank: int
) -> Adapter:
    """Read an adapter of a live model, see ``files.read_adapter``; its tensors are copied."""
    kind = f"live {type(source).__name__}"
    model, configs = _unwrapped(source)
    adapter = name if name in configs or len(configs) != 1 else next(iter(configs))
    if adapter not in configs:
        held = ", ".join(map(shown, configs)) or "none at all"
        raise Refusal(f"the {kind} has no adapter of this name, but {held}")
    label = f"adapter {shown(adapter)} of a {kind}"
    with about(label):
        text = json.dumps(configs[adapter].to_dict(), default=_as_json)
        settings = settings_of(json_object(text.encode()), label)
        tensors, scalings = _live_tensors(model, adapter)
        entries = {
            key: Entry(str(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()
        }
        settings = dataclasses.replace(settings, scalings=scalings)
        fits = check_tensors(entries, settings, linears, max_rank)
        factors = factors_of(fits, lambda key: _copied(tensors[key]))
    return Adapter(name, label, factors, fingerprint_of(factors), None)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _unwrapped(source: nn.Module) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return the model whose linears are adapted, and the configs of its adapters."""
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    model: Any = getattr(source, "_orig_mod", source)  # of torch.compile
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise Refusal(f"the live {type(source).__name__} has no peft adapters")
    if isinstance(model, (PeftModel, PeftMixedModel)):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model, configs


def _live_tensors(model: nn.Module, adapter: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return an adapter's tensors by the names that saving gives them, and its scalings by path.

    peft's get_peft_model_state_dict goes by names alone: with another adapter called "mlp", all
    tensors of modules called mlp are missing from what it returns.
    """
    from peft.tuners.lora import LoraLayer

    tensors: dict[str, Tensor] = {}
    scalings: dict[str, float] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for kind in module.adapter_layer_names:
            held: Any = getattr(module, kind, ())
            if adapter not in held:
                continue
            if adapter in module.merged_adapters:
                raise Refusal(f"it is merged into the base weight of {path}; unmerge it first")
            part = held[adapter]
            inner = [("", part)] if isinstance(part, Tensor) else part.named_parameters()
            for leaf, tensor in inner:
                key = f"{PREFIX}{path}.{kind}" + (f".{leaf}" if leaf else "")
                if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
                    what = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}"
                    raise Refusal(f"tensor {shown(key)} is {what}; save it and read the files")
                tensors[key] = tensor
            scalings[path] = float(module.scaling[adapter])
    return tensors, scalings


def _as_json(value: object) -> Any:
    """Return what JSON has no form for: sets as peft saves them, other objects by their repr."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else repr(value)
