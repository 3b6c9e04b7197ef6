"""Every feature of peft's LoRA layers, part 4: what surrounds the layers in a model.

One test for each row of the table of peft's features, as in test_peft_features.
"""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import peft
import pytest
import test_peft_features
import test_peft_features_calls
import test_peft_features_layers
import torch
from accuracy import assert_layer_as_accurate
from conftest import Spy
from packaging.version import Version
from peft import (
    LoraConfig,
    LoraRuntimeConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraModel
from test_peft_features import (
    IN,
    TARGETS,
    Net,
    assert_equal,
    assert_falls_back,
    assert_fused,
    assert_same_error,
    inputs,
    linears,
    peft_net,
    run,
    tokens,
    twins,
)
from tiny_models import tiny_model, tiny_peft
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

import fastlora
from fastlora import rules
from fastlora.layers import LoRALinear


class TokenNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, IN)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.embedding(x))


def test_wrappers_of_other_modules_are_untouched(spy: Spy) -> None:
    """Row: trainable_token_indices, modules_to_save."""
    model = peft_net(
        TokenNet(),
        target_modules=["first"],
        modules_to_save=["second"],
        trainable_token_indices={"embedding": [3, 5, 8]},
    )
    fused, plain = twins(model)
    assert not fastlora.patch(fused).untouched  # they are no LoRA layers
    for name in ("second", "embedding"):
        cls = type(plain.base_model.model.get_submodule(name))
        assert cls.__name__ in ("ModulesToSaveWrapper", "TrainableTokensWrapper")
        assert type(fused.base_model.model.get_submodule(name)) is cls
    assert_fused(spy, fused, plain, tokens())
    trained = {n.split(".")[2] for n, p in fused.named_parameters() if p.grad is not None}
    assert trained == {"first", "second", "embedding"}


@pytest.mark.skipif(
    not hasattr(LoraModel, "_add_targets_to_tie"),
    reason=f"peft {peft.__version__} does not tie LoRA adapters",
)
def test_tied_adapter_is_fused(spy: Spy) -> None:
    """Row: weight tying (ensure_weight_tying)."""
    # Rank 16: at 4, the CPU sums fp32 gradients of B in another order than peft's (1.6 x its error,
    # 2e-7), which is a property of matrices with 4 columns and not of tied ones.
    model = tiny_peft(
        "qwen2-tied", r=16, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    (head,) = linears(model)
    head.kwargs.clear()  # peft keeps the tied tensors there, which cannot be deep-copied
    fused, plain = twins(model)
    a, b = head.lora_A["default"].weight, head.lora_B["default"].weight
    embedding = fused.base_model.model.model.embed_tokens
    assert not a.is_contiguous()
    assert not b.is_contiguous()
    assert a.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()
    assert list(fastlora.patch(fused).untouched) == ["base_model.model.model.embed_tokens"]
    assert_fused(spy, fused, plain, tokens())


def test_replicated_layers_are_fused(spy: Spy) -> None:
    """Row: layer_replication."""
    fused, plain = twins(tiny_peft("llama", layer_replication=[[0, 2], [1, 2]]))
    first, second = (fused.base_model.model.model.layers[n].mlp.up_proj for n in (1, 2))
    assert first.base_layer.weight is second.base_layer.weight
    assert not torch.equal(first.lora_A["default"].weight, second.lora_A["default"].weight)
    assert len(linears(fused)) == 21
    assert_fused(spy, fused, plain, tokens())


def test_meta_adapter_falls_back_until_it_is_loaded(spy: Spy) -> None:
    """Row: low_cpu_mem_usage / meta."""
    weights = get_peft_model_state_dict(peft_net())
    config = LoraConfig(r=4, target_modules=TARGETS)
    fused, plain = twins(get_peft_model(Net(), config, low_cpu_mem_usage=True))
    reason = "falls back to peft: lora_A is on the meta device"
    assert reason in fastlora.explain(fused)
    # Called on the CPU, torch 2.13 multiplies with whatever lies in memory: no result to compare.
    shape_only = copy.deepcopy(fused).to("meta")
    y = shape_only(inputs().to("meta"))
    assert (spy.fused, spy.peft, y.is_meta) == (0, 2, True)
    assert y.shape == plain(inputs()).shape
    assert reason in fastlora.explain(shape_only)
    for model in (fused, plain):
        set_peft_model_state_dict(model, copy.deepcopy(weights), low_cpu_mem_usage=True)
    assert_fused(spy, fused, plain)


@pytest.mark.parametrize("way", ["inject_adapter_in_model", "add_adapter", "load_adapter"])
def test_adapter_without_a_peft_model_is_fused(spy: Spy, tmp_path: Path, way: str) -> None:
    """Row: inject_adapter_in_model, model.add_adapter/load_adapter (PeftAdapterMixin)."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    if way == "inject_adapter_in_model":
        config.target_modules = set(TARGETS)
        model, x = inject_adapter_in_model(config, Net()), inputs()
    else:
        if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
            pytest.skip(f"this transformers takes adapters from peft {MIN_PEFT_VERSION} on")
        model, x = tiny_model("qwen2"), tokens()
        if way == "add_adapter":
            model.add_adapter(config)
        else:
            tiny_peft("qwen2").save_pretrained(tmp_path)
            model.load_adapter(str(tmp_path), is_trainable=True)
    fused, plain = twins(model)
    assert_fused(spy, fused, plain, x)
    assert "later run as peft until the next patch" in fastlora.explain(fused)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_is_fused(spy: Spy, use_reentrant: bool) -> None:
    """Row: gradient checkpointing reentrant / not."""

    # Checkpointing switches the cache off, which in transformers 4 changes how attention rounds.
    def model(**lora: float) -> peft.PeftModel:
        return tiny_peft(model=tiny_model("qwen2", use_cache=False), **lora)

    def checkpoint(model: nn.Module) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model.train()

    fused, plain = twins(model(), checkpoint)
    actual = run(fused, tokens())
    assert spy.peft == 0
    assert spy.fused > len(linears(fused))  # forward and recomputation
    assert "0 fall back" in fastlora.explain(fused)
    assert_equal(actual, run(twins(model())[0].train(), tokens()))
    assert_layer_as_accurate(fused, plain, tokens())

    # The recomputation draws the mask of the forward pass again.
    with_dropout = model(lora_dropout=0.25)
    without_checkpoints = copy.deepcopy(with_dropout).train()
    fastlora.patch(without_checkpoints)
    fused, _ = twins(with_dropout, checkpoint)
    assert_equal(run(fused, tokens()), run(without_checkpoints, tokens()))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copied_and_pickled_model_is_fused(spy: Spy, tmp_path: Path, way: str) -> None:
    """Row: deepcopy, pickle, torch.save(model)."""
    fused, plain = twins(peft_net())
    if way == "deepcopy":
        copied = copy.deepcopy(fused)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(fused))
    else:
        torch.save(fused, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    assert [type(layer) for layer in linears(copied)] == [LoRALinear] * 2
    assert_fused(spy, copied, plain)
    assert_equal(run(copied, inputs()), run(fused, inputs()))


def test_runtime_config_changes_nothing(spy: Spy) -> None:
    """Row: ephemeral_gpu_offload, runtime_config."""
    runtime = LoraRuntimeConfig(ephemeral_gpu_offload=True)
    fused, plain = twins(peft_net(runtime_config=runtime))
    assert linears(fused)[0].ephemeral_gpu_offload
    assert_fused(spy, fused, plain)


def test_unsupported_device_falls_back(
    spy: Spy, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row: CPU, MPS, XPU tensors."""
    # Patched on the CPU and moved afterwards: every call asks where it runs.
    fused, plain = twins(peft_net(), lambda model: model.to(device))
    assert_fused(spy, fused, plain, inputs().to(device))
    with monkeypatch.context() as patched:
        patched.setattr(rules, "_DEVICES", frozenset(("another",)))
        for layer in linears(fused):
            for name in ("fastlora_operands", "fastlora_known"):
                layer.__dict__.pop(name)  # no device ceases to be supported in reality
        assert rules.state_reason(linears(fused)[0]) is not None
        reason = f"falls back to peft: fastlora has no implementation for {device.type}"
        assert_falls_back(spy, fused, plain, reason, inputs().to(device))
    assert_fused(spy, fused, plain, inputs().to(device))

    elsewhere = inputs().to("meta")
    assert_same_error(linears(fused)[0], linears(plain)[0], elsewhere)
    reason = f"last call went to peft: the input is on meta, but the weight is on {device}"
    assert reason in fastlora.explain(fused)


def test_every_feature_has_its_test() -> None:
    # The 57 rows of the table of peft's features. One test each, named in its docstring.
    modules = (
        test_peft_features,
        test_peft_features_calls,
        test_peft_features_layers,
        sys.modules[__name__],
    )
    tests = [
        function
        for module in modules
        for name, function in vars(module).items()
        if name.startswith("test_")
        and getattr(function, "__module__", None) == module.__name__
        and function is not test_every_feature_has_its_test
    ]
    assert len(tests) == 57
    assert all(test.__doc__.startswith("Row: ") for test in tests)
    assert len({test.__doc__ for test in tests}) == 57
