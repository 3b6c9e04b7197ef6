"""Fixtures for every test: poisoned memory, a spy on the path taken, and devices."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

# No test may reach for a hub, and none should wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch.use_deterministic_algorithms asks for it where cuBLAS is used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch.utils._device import _device_constructors

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen before the import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.manual_seed(0)


# torch.device("meta") as a context recognises torch.empty by identity, in a set made at first use:
# it must be made before the fixture below puts another function there.
_device_constructors()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill whatever fastlora allocates with NaN, so that an element it forgets to write is seen."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "fastlora":
            out.fill_(float("nan") if out.is_floating_point() else 0xA5)
        return out

    return poisoned


@dataclass
class Spy:
    """Counts of the forward calls of patched layers, by the path they took."""

    fused: int = 0
    together: int = 0  # of those, the ones that were computed with their siblings
    peft: int = 0

    def reset(self) -> None:
        self.fused = self.together = self.peft = 0


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    from fastlora import layers, siblings

    counts = Spy()
    fused, together = layers.apply_lora_linear, siblings.apply_siblings
    plain = layers.PeftLinear.forward

    def counted_fused(*args):
        counts.fused += 1
        return fused(*args)

    def counted_together(x, weights, *args):
        counts.fused += len(weights)
        counts.together += len(weights)
        return together(x, weights, *args)

    def counted_plain(self, *args, **kwargs):
        counts.peft += type(self) is layers.LoRALinear
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(layers, "apply_lora_linear", counted_fused)
    monkeypatch.setattr(siblings, "apply_siblings", counted_together)
    monkeypatch.setattr(layers.PeftLinear, "forward", counted_plain)
    return counts
