"""``LoRALinear.from_linear``: a LoRA layer without a peft model, and its exchange with peft."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from accuracy import assert_layer_as_accurate
from conftest import Spy
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file
from tiny_models import tiny_peft
from torch import nn

import fastlora
from fastlora import LoRALinear


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def peft_twin(**settings) -> peft.PeftModel:
    """A peft model whose adapter is not a no-op, on a fixed base."""
    torch.manual_seed(0)
    base = TwoLayers()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], **settings}
    return get_peft_model(base, LoraConfig(init_lora_weights=False, **settings))


def own_twin(**settings) -> TwoLayers:
    torch.manual_seed(0)
    model = TwoLayers()
    settings = {"r": 4, "lora_alpha": 6, **settings}
    model.up = LoRALinear.from_linear(model.up, **settings)
    model.down = LoRALinear.from_linear(model.down, **settings)
    return model


def test_only_the_adapter_is_trained():
    layer = LoRALinear.from_linear(nn.Linear(12, 20), r=4)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight"}


def test_a_new_adapter_changes_nothing_yet(spy):
    linear = nn.Linear(12, 20)
    x = torch.randn(3, 12)
    expected = linear(x)
    layer = LoRALinear.from_linear(linear, r=4)
    assert torch.equal(layer(x), expected)
    assert (spy.fused, spy.peft) == (1, 0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_settings_are_those_of_peft(use_rslora):
    layer = LoRALinear.from_linear(
        nn.Linear(12, 20),
        r=4,
        lora_alpha=6,
        lora_dropout=0.3,
        adapter_name="emoji",
        use_rslora=use_rslora,
    )
    assert layer.scaling == {"emoji": 6 / 4**0.5 if use_rslora else 6 / 4}
    assert layer.lora_dropout["emoji"].p == 0.3
    assert layer.r == {"emoji": 4}


def test_takes_dtype_of_the_base_layer():
    layer = LoRALinear.from_linear(nn.Linear(12, 20, dtype=torch.bfloat16), r=4)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


def test_state_dict_has_the_keys_of_peft():
    own = {name for name in own_twin().state_dict() if name.startswith("up.")}
    theirs = peft_twin().base_model.model.state_dict()
    assert own == {name for name in theirs if name.startswith("up.")}


def test_loads_what_peft_trained_and_computes_the_same(spy):
    trained = peft_twin()
    own = own_twin()
    own.load_state_dict(trained.base_model.model.state_dict())
    x = torch.randn(7, 12)
    assert_layer_as_accurate(own, copy.deepcopy(trained.base_model.model), x)
    assert spy.peft == 0


def test_peft_loads_what_it_trained():
    own, theirs = own_twin(), peft_twin()
    for p in own.parameters():
        nn.init.normal_(p)
    theirs.base_model.model.load_state_dict(own.state_dict())
    x = torch.randn(7, 12)
    fastlora.patch(theirs)
    assert torch.equal(theirs(x), own(x))


def test_loads_an_adapter_file(tmp_path):
    trained = peft_twin()
    trained.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model."
    own = own_twin()
    outcome = own.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, strict=False
    )
    assert outcome.unexpected_keys == []
    assert all("base_layer" in name for name in outcome.missing_keys)
    fastlora.patch(trained)
    x = torch.randn(7, 12)
    assert torch.equal(own(x), trained(x))


def test_its_adapter_is_the_adapter_that_peft_would_save():
    own, theirs = own_twin(), peft_twin()
    theirs.base_model.model.load_state_dict(own.state_dict())
    saved = get_peft_model_state_dict(theirs)
    for name, tensor in saved.items():
        module, part = name.removeprefix("base_model.model.").split(".")[:2]
        assert torch.equal(tensor, getattr(getattr(own, module), part).default.weight)


def test_merging_and_switching_are_those_of_peft(spy):
    layer = LoRALinear.from_linear(nn.Linear(12, 20), r=4, init_lora_weights=False)
    x = torch.randn(3, 12)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert spy.peft == 2


def test_unpatch_makes_it_a_peft_layer():
    model = own_twin()
    x = torch.randn(3, 12)
    expected = model(x)
    fastlora.unpatch(model)
    assert type(model.up) is PeftLinear
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("linear", "settings", "error", "message"),
    [
        (nn.Bilinear(3, 3, 3), {}, TypeError, "plain torch.nn.Linear, got Bilinear"),
        (
            nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3),
            {},
            TypeError,
            "plain torch.nn.Linear, got NonDynamicallyQuantizableLinear",
        ),
        (nn.Linear(3, 3), {"r": 0}, ValueError, "positive integer, got 0"),
        (nn.Linear(3, 3), {"lora_dropout": 1.0}, ValueError, r"\[0, 1\), got 1.0"),
        (nn.Linear(3, 3), {"lora_dropout": -0.1}, ValueError, r"\[0, 1\), got -0.1"),
    ],
)
def test_bad_settings_are_refused(linear, settings, error, message):
    with pytest.raises(error, match=message):
        LoRALinear.from_linear(linear, **settings)
    assert all(p.requires_grad for p in linear.parameters())


def test_layers_of_a_data_parallel_replica_are_fused(spy: Spy) -> None:
    """nn.DataParallel, which Trainer uses on several GPUs, calls copies that hold plain tensors."""
    model = LoRALinear.from_linear(nn.Linear(12, 20), r=4, init_lora_weights=False)
    x = torch.randn(3, 12)
    expected = model(x)

    def replica_of(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        replica._modules = {name: replica_of(child) for name, child in module._modules.items()}
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
        return replica

    model.base_layer.requires_grad_(False)
    replica = replica_of(model)
    assert not dict(replica.named_parameters())
    assert torch.equal(replica(x), expected)
    assert (spy.fused, spy.peft) == (2, 0)


def test_fp64_adapter_under_autocast_falls_back(spy: Spy) -> None:
    layer = LoRALinear.from_linear(nn.Linear(12, 20), r=4)
    layer.lora_A.double()
    layer.lora_B.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(3, 12))
    assert (spy.fused, spy.peft) == (0, 1)
    assert "autocast is on, but input, weight and adapter are" in fastlora.explain(layer)


def test_only_layers_without_a_peft_model_take_adapter_files() -> None:
    patched = tiny_peft()
    fastlora.patch(patched)
    name = next(name for name, m in patched.named_modules() if type(m) is LoRALinear)
    outcome = patched.load_state_dict({f"{name}.lora_A.weight": torch.zeros(4, 32)}, strict=False)
    assert outcome.unexpected_keys == [f"{name}.lora_A.weight"]
