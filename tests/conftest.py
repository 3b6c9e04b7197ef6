"""Fixtures for every test: poisoned memory, a spy on the path taken, and devices."""

from __future__ import annotations

import gc
import importlib.util
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
    if importlib.util.find_spec("triton"):
        importlib.import_module("quick_interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """End a worker whose CUDA context is broken: every later test there would fail with it."""
    found = yield
    if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)  # xdist says so, blames this test once more, and starts another
    return found


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True, scope="module")
def no_garbage_of_others() -> None:
    """Leave what the files before keep out of garbage collection.

    An engine that is closed collects twice: of ``test_engine_exactness.py``, in the middle of all
    tests, that was more than 20 of 29 s.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.manual_seed(0)


# torch.device("meta") as a context recognises torch.empty by identity, in a set made at first use:
# it must be made before the fixture below puts another function there.
_device_constructors()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill whatever fastlora allocates with NaN, so that an element it forgets to write is seen."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    from fastlora.kernels import layout

    monkeypatch.setattr(layout, "_FAST", {})  # it would take what cannot be poisoned


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
    from whole_models import FUSED_CALLS

    from fastlora import layers, siblings

    counts = Spy()
    plain = layers.PeftLinear.forward

    def counted(function, siblings_of, together):
        def call(*args):
            number = siblings_of(*args)
            counts.fused += number
            counts.together += number if together else 0
            return function(*args)

        return call

    def counted_plain(self, *args, **kwargs):
        counts.peft += type(self) is layers.LoRALinear
        return plain(self, *args, **kwargs)

    for module, name, siblings_of in FUSED_CALLS:
        function = counted(getattr(module, name), siblings_of, module is siblings)
        monkeypatch.setattr(module, name, function)
    monkeypatch.setattr(layers.PeftLinear, "forward", counted_plain)
    return counts
