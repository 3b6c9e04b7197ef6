"""A tiny adapter as peft saves it, ways to change its files, and what comes of reading them.

Of the fixtures, a file names those that it uses among its own, where pytest looks for them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer
from tiny_models import tiny_model, tiny_peft
from torch import nn

from fastlora.adapters.adapter import Adapter
from fastlora.adapters.checks import PREFIX
from fastlora.adapters.errors import AdapterError
from fastlora.adapters.files import CONFIG, WEIGHTS, read_adapter

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
Q_PROJ = "model.layers.0.self_attn.q_proj"
Q_PROJ_A, Q_PROJ_B = (f"{PREFIX}{Q_PROJ}.{factor}.weight" for factor in ("lora_A", "lora_B"))


def linears_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the out and in features of a model's linears."""
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


LINEARS = linears_of(tiny_model())


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return peft's layers of a model, by their paths in the base model."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return {path: each for path, each in base.named_modules() if isinstance(each, LoraLayer)}


def assert_is(adapter: Adapter, model: nn.Module, name: str = "default") -> None:
    """Compare every factor with the layers of the peft model, bit by bit."""
    layers = {path: each for path, each in lora_layers(model).items() if name in each.lora_A}
    assert list(adapter.factors) == list(layers)
    for path, layer in layers.items():
        factors = adapter.factors[path]
        for ours, theirs in (
            (factors.lora_a, layer.lora_A[name].weight),
            (factors.lora_b, layer.lora_B[name].weight),
        ):
            assert ours.dtype == theirs.dtype
            assert ours.is_contiguous()
            assert torch.equal(ours, theirs)
        assert factors.scaling == layer.scaling[name]
        assert factors.rank == layer.r[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter of rank 4 on all linears, as peft saved it; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_peft().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return shutil.copytree(saved, tmp_path / "adapter")


def configure(folder: Path, **fields: object) -> None:
    """Change fields of the config in a folder."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def reweigh(folder: Path, change) -> None:
    """Change the tensors in a folder."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def refusal(source: object, linears=LINEARS, name: str = "emoji", **options: Any) -> str:
    """Return why an adapter is refused, without its name."""
    with pytest.raises(AdapterError) as caught:
        read_adapter(name, source, linears, **options)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    return message.removeprefix(f"{name}: ")
