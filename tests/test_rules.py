"""What a layer remembers of its rules: every change after the first call is noticed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_siblings import attention, rank_options
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from whole_models import patched_twin

from fastlora import rules
from fastlora.layers import LoRALinear

Change = Callable[[LoRALinear], object]


class Subclass(nn.Linear):
    pass


class Doubled(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Wrapped(Tensor):
    pass


def nothing(*args: object) -> None:
    return None


def default(layer: LoRALinear, part: str) -> nn.Module:
    return getattr(layer, part)["default"]


def set_data(parameter: Parameter, data: Tensor) -> None:
    parameter.data = data


def other_adapter(layer: LoRALinear) -> None:
    layer.update_layer("other", **rank_options(layer, 3))


def swap_for_a_subclass(layer: LoRALinear) -> None:
    weight = layer.base_layer.weight
    like = Parameter(torch.randn(weight.shape).as_subclass(Wrapped), requires_grad=False)
    torch.utils.swap_tensors(weight, like)


CHANGES: dict[str, Change] = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "other-active-adapter": lambda layer: (other_adapter(layer), layer.set_adapter("other")),
    "both-active": lambda layer: (other_adapter(layer), layer.set_adapter(["default", "other"])),
    "adapter-added": other_adapter,
    "adapter-deleted": lambda layer: layer.delete_adapter("default"),
    "forward-replaced": lambda layer: setattr(layer, "forward", nothing),
    "variant": lambda layer: layer.lora_variant.update(default=object()),
    "transposed": lambda layer: setattr(layer, "fan_in_fan_out", True),
    "input-cast-off": lambda layer: setattr(layer, "cast_input_dtype_enabled", False),
    "scaling-is-a-tensor": lambda layer: layer.scaling.update(default=torch.ones(())),
    "base-layer-replaced": lambda layer: setattr(layer, "base_layer", nn.Linear(24, 24)),
    "lora-a-replaced": lambda layer: layer.lora_A.update({"default": nn.Linear(24, 4, bias=False)}),
    "lora-b-replaced": lambda layer: layer.lora_B.update({"default": nn.Linear(4, 24, bias=False)}),
    "dropout-replaced": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5)}),
    "dropout-of-another-class": lambda layer: setattr(
        default(layer, "lora_dropout"), "__class__", Doubled
    ),
    "dropout-drops-everything": lambda layer: setattr(default(layer, "lora_dropout"), "p", 1.0),
    "dropout-forward": lambda layer: setattr(default(layer, "lora_dropout"), "forward", nothing),
    "hooks-of-a-new-dictionary": lambda layer: (
        setattr(layer.base_layer, "_forward_hooks", OrderedDict()),
        layer.base_layer.register_forward_hook(nothing),
    ),
    "bias-is-trained": lambda layer: layer.base_layer.bias.requires_grad_(True),
    "laid-out-by-columns": lambda layer: set_data(
        layer.base_layer.weight, layer.base_layer.weight.data.t().contiguous().t()
    ),
    "base-forward": lambda layer: setattr(layer.base_layer, "forward", nothing),
    "base-class": lambda layer: setattr(layer.base_layer, "__class__", Subclass),
    "base-offloaded": lambda layer: setattr(layer.base_layer, "_hf_hook", object()),
    "lora-a-forward": lambda layer: setattr(default(layer, "lora_A"), "forward", nothing),
    "weight-trained": lambda layer: layer.base_layer.weight.requires_grad_(),
    "weight-replaced": lambda layer: setattr(
        layer.base_layer, "weight", Parameter(torch.randn(24, 24), requires_grad=False)
    ),
    "weight-of-a-subclass": swap_for_a_subclass,
    "weight-parametrized": lambda layer: parametrize.register_parametrization(
        layer.base_layer, "weight", nn.Identity()
    ),
    "bias-removed": lambda layer: setattr(layer.base_layer, "bias", None),
    "lora-a-weight-replaced": lambda layer: setattr(
        default(layer, "lora_A"), "weight", Parameter(torch.randn(4, 24))
    ),
    "lora-b-weight-replaced": lambda layer: setattr(
        default(layer, "lora_B"), "weight", Parameter(torch.randn(24, 4))
    ),
    "lora-a-bias": lambda layer: setattr(
        default(layer, "lora_A"), "bias", Parameter(torch.randn(4))
    ),
    "lora-b-bias": lambda layer: setattr(
        default(layer, "lora_B"), "bias", Parameter(torch.randn(24))
    ),
    "half-precision": lambda layer: layer.half(),
    "half-adapter": lambda layer: default(layer, "lora_A").half(),
    "meta": lambda layer: layer.to("meta"),
    "partitioned": lambda layer: set_data(layer.base_layer.weight, torch.empty(0)),
    "other-rank": lambda layer: set_data(default(layer, "lora_A").weight, torch.randn(5, 24)),
}
for part in ("base_layer", "lora_A", "lora_B", "lora_dropout"):
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook"):

        def register(layer: LoRALinear, part: str = part, kind: str = kind) -> None:
            module = layer.base_layer if part == "base_layer" else default(layer, part)
            getattr(module, f"register_{kind}")(nothing)

        CHANGES[f"{kind}-on-{part}"] = register


def remembered() -> tuple[LoRALinear, rules.Operands]:
    """Return a layer that was called, and what it remembers."""
    layer = patched_twin(attention(p=0.25)).q_proj
    layer(torch.randn(2, 24))
    operands = layer.fastlora_operands
    assert operands is not None
    assert operands.hold(layer)
    return layer, operands


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_after_the_first_call_is_noticed(change: Change) -> None:
    layer, operands = remembered()
    change(layer)
    assert not operands.hold(layer)


@contextmanager
def global_hook(hooks: dict[int, object]) -> Iterator[None]:
    hooks[-1] = nothing
    try:
        yield
    finally:
        del hooks[-1]


@pytest.mark.parametrize(
    "name",
    [
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    ],
)
def test_hooks_on_all_modules_are_noticed(name: str) -> None:
    layer, operands = remembered()
    with global_hook(getattr(nn_module, name)):
        assert not operands.hold(layer)
    assert operands.hold(layer)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda layer: layer.set_scale("default", 3.0), id="scaling"),
        pytest.param(lambda layer: layer.eval(), id="eval"),
        pytest.param(lambda layer: setattr(default(layer, "lora_dropout"), "p", 0.5), id="p"),
        pytest.param(lambda layer: default(layer, "lora_A").weight.data.mul_(2), id="a-step"),
        pytest.param(lambda layer: layer.requires_grad_(False), id="frozen"),
    ],
)
def test_what_is_read_at_every_call_needs_no_rule(change: Change) -> None:
    layer, operands = remembered()
    change(layer)
    assert operands.hold(layer)


def test_a_copy_remembers_nothing() -> None:
    layer, _ = remembered()
    assert copy.deepcopy(layer).fastlora_operands is None


def test_dora_notices_its_magnitude() -> None:
    for change in (
        lambda module: setattr(module, "weight", Parameter(torch.ones(24))),
        lambda module: module.register_forward_hook(nothing),
        lambda module: setattr(module, "forward", nothing),
    ):
        layer = patched_twin(attention(use_dora=True)).q_proj
        layer(torch.randn(2, 24))
        operands = layer.fastlora_operands
        assert operands.hold(layer)
        change(layer.lora_magnitude_vector["default"])
        assert not operands.hold(layer)
