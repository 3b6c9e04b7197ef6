"""fastlora: LoRA of peft models, trained on fused kernels and served many adapters at once.

report = fastlora.patch(model)      # model: anything that holds peft LoRA layers
engine = fastlora.Engine("Qwen/Qwen2.5-7B-Instruct", adapters={"emoji": "adapters/emoji"})
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora.adapters.pool import AdapterPool
    from fastlora.callback import FastLoRACallback
    from fastlora.functional import lora_linear
    from fastlora.layers import LoRALinear
    from fastlora.patching import PatchReport, enable_for, explain, patch, unpatch
    from fastlora.plans import backend
    from fastlora.serving.engine import Engine
    from fastlora.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "AdapterPool",
    "Engine",
    "FastLoRACallback",
    "LoRALinear",
    "PatchReport",
    "__version__",
    "backend",
    "enable_for",
    "explain",
    "lora_linear",
    "patch",
    "tune",
    "unpatch",
]

# Where each public name lives. They are imported when first used: peft alone brings transformers,
# seconds that `import fastlora` must not cost a script that only wants lora_linear.
_MODULES = {
    "AdapterPool": "adapters.pool",
    "Engine": "serving.engine",
    "FastLoRACallback": "callback",
    "LoRALinear": "layers",
    "PatchReport": "patching",
    "backend": "plans",
    "enable_for": "patching",
    "explain": "patching",
    "lora_linear": "functional",
    "patch": "patching",
    "tune": "tuning",
    "unpatch": "patching",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
