"""Helpers of the tests on whole models: patched twins, gradients, and what to compare."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accuracy import assert_as_accurate
from conftest import Spy
from peft import LoraConfig, PeftModel
from tiny_models import tiny_model, tiny_peft, token_ids
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora import layers, siblings

QKV = ["q_proj", "k_proj", "v_proj"]
ATTENTION = [*QKV, "o_proj"]
LINEARS = 14  # of a tiny Qwen2 with all-linear: 2 layers of q, k, v, o, gate, up, down


@contextmanager
def counting_fused() -> Iterator[list[int]]:
    """Collect how many linears each fused computation was for: one, or a group of siblings."""
    counted: list[int] = []

    def counting(function: Callable[..., Any], siblings_of: Callable[..., int]) -> Any:
        def counted_call(*args: Any) -> Any:
            counted.append(siblings_of(*args))
            return function(*args)

        return counted_call

    with ExitStack() as stack:
        for module, name, siblings_of in FUSED_CALLS:
            function = counting(getattr(module, name), siblings_of)
            stack.enter_context(mock.patch.object(module, name, function))
        yield counted


# Where fused computations are called, and of how many linears each is.
FUSED_CALLS: list[tuple[Any, str, Callable[..., int]]] = [
    (layers, "apply_call", lambda call, *args: len(call.siblings.weights)),
    (layers, "apply_scaled", lambda call, *args: len(call.siblings.weights)),
    (layers, "apply_lora_linear", lambda *args: 1),
    (siblings, "apply_call", lambda call, *args: len(call.siblings.weights)),
    (siblings, "apply_scaled", lambda call, *args: len(call.siblings.weights)),
    (siblings, "apply_siblings", lambda x, weights, *args: len(weights)),
]


def family_peft(family: str, targets: str | list[str], dropout: float) -> PeftModel:
    """Build a peft model of a family that also runs in fp64."""
    # Only the eager experts of a MoE model multiply in fp64; other families ignore the setting.
    base = tiny_model(family, experts_implementation="eager")
    # GPT-2's Conv1D is transposed: peft sets this by itself, but warns.
    transposed = {"fan_in_fan_out": True} if family == "gpt2" else {}
    return tiny_peft(model=base, target_modules=targets, lora_dropout=dropout, **transposed)


def patched_twin(plain: nn.Module, **options: object) -> nn.Module:
    """Return a patched copy of a model."""
    patched = copy.deepcopy(plain)
    fastlora.patch(patched, **options)
    return patched


def through_pickle(model: nn.Module) -> nn.Module:
    """Return a model as another process would get it."""
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    """Return a model as a file would keep it."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def twins(**lora: object) -> tuple[PeftModel, PeftModel]:
    """Build a tiny Qwen2 with LoRA twice: patched, and as peft made it."""
    plain = tiny_peft(**lora)
    return patched_twin(plain), plain


def logits_of(model: nn.Module, **kwargs: object) -> Tensor:
    """Return the logits of a fixed batch."""
    output = model(token_ids().to(next(model.parameters()).device), **kwargs)
    return getattr(output, "logits", output)


def loss_and_gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return the loss of each token of a fixed batch, and the gradient of each trained weight."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits = logits_of(model)
    # Not the model's own loss: transformers computes it in fp32 even for a model in fp64.
    targets = token_ids()[:, 1:].to(logits.device)
    loss = F.cross_entropy(logits[:, :-1].mT, targets, reduction="none")
    loss.mean().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}


def assert_agrees_with_peft(patched: nn.Module, plain: nn.Module) -> None:
    """Assert that loss and gradients are as close to fp64 as those of the unpatched twin."""
    models = (patched, plain, copy.deepcopy(plain).double())
    actual, native, exact = (loss_and_gradients(model) for model in models)
    assert len(exact) > 1, "there are no gradients"
    assert actual.keys() == native.keys() == exact.keys()
    assert_as_accurate(actual["loss"], native["loss"], exact["loss"], name="loss")
    vectors = (_all_gradients(results, exact) for results in (actual, native, exact))
    assert_as_accurate(*vectors, name="gradients")


def _all_gradients(results: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """Return all gradients as one vector in which each has about the same norm."""
    # A small tensor of a tiny model sees too few roundings for a ratio of two errors to mean much.
    # A wrong one still shows in the vector, where 1e-6 of its norm is more than what is allowed.
    # Dividing by powers of two rounds nothing.
    scales = {name: 2.0 ** exact[name].norm().log2().round().item() for name in exact}
    return torch.cat([results[name].flatten() / scales[name] for name in exact if name != "loss"])


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two dicts have the same keys in the same order, and equal tensors."""
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def assert_fused_like_peft(
    patched: nn.Module, plain: nn.Module, spy: Spy, linears: int = LINEARS
) -> None:
    """Assert that two models have the same state, and that one runs fused and agrees."""
    assert_same(patched.state_dict(), plain.state_dict())
    spy.reset()
    assert_agrees_with_peft(patched, plain)
    assert (spy.fused, spy.peft) == (linears, 0)


def layers_of_type(model: nn.Module, cls: type) -> list[str]:
    """Return the names of the modules of exactly this class."""
    return [name for name, module in model.named_modules() if type(module) is cls]


def snapshot(model: nn.Module) -> dict[str, tuple[int, type, dict[str, object]]]:
    """Record of each module its identity, its class and its plain attributes."""
    return {
        name: (
            id(module),
            type(module),
            {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, (bool, int, float, str, type(None)))
            },
        )
        for name, module in model.named_modules()
    }


def tensor_ids(model: nn.Module) -> dict[str, int]:
    """Return the identity of each parameter and buffer."""
    return {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}


def lora_config(targets: str | list[str] = "all-linear", **options: object) -> LoraConfig:
    """Return a config whose adapter is not a no-op."""
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    return LoraConfig(target_modules=targets, **settings)


def saved_config(folder: Path) -> dict[str, object]:
    """Read an adapter_config.json."""
    config = json.loads((folder / "adapter_config.json").read_text())
    # peft keeps the targets in a set and writes them in any order.
    return {**config, "target_modules": sorted(config["target_modules"])}
