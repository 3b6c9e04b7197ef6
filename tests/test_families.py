"""Every family of models: loss and gradients against peft, dropout, and unpatch."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Spy
from peft.tuners.lora.layer import Linear as PeftLinear
from whole_models import (
    ATTENTION,
    QKV,
    assert_agrees_with_peft,
    assert_same,
    family_peft,
    layers_of_type,
    loss_and_gradients,
    patched_twin,
    snapshot,
)

import fastlora

# Family, target_modules, LoRA linears. With all-linear, peft also adapts the experts of a MoE
# model, and those are parameters, not linears (test_experts_are_left_alone_and_named).
FUSED_CASES = [
    pytest.param("qwen2", "all-linear", 14, id="qwen2-all"),
    pytest.param("qwen2", QKV, 6, id="qwen2-qkv"),
    pytest.param("qwen2-tied", "all-linear", 14, id="qwen2-tied-all"),
    pytest.param("qwen2-tied", QKV, 6, id="qwen2-tied-qkv"),
    pytest.param("qwen3", "all-linear", 14, id="qwen3-all"),
    pytest.param("qwen3", QKV, 6, id="qwen3-qkv"),
    pytest.param("qwen3-moe", ATTENTION, 8, id="qwen3-moe-attention"),
    pytest.param("qwen3-moe", QKV, 6, id="qwen3-moe-qkv"),
    pytest.param("llama", "all-linear", 14, id="llama-all"),
    pytest.param("llama", QKV, 6, id="llama-qkv"),
    pytest.param("opt", "all-linear", 12, id="opt-all"),
    pytest.param("opt", QKV, 6, id="opt-qkv"),
]
GPT2_CASES = [
    pytest.param("gpt2", "all-linear", 8, id="gpt2-all"),
    pytest.param("gpt2", ["c_attn"], 2, id="gpt2-c_attn"),
]
fused_families = pytest.mark.parametrize(("family", "targets", "linears"), FUSED_CASES)
all_families = pytest.mark.parametrize(("family", "targets", "linears"), FUSED_CASES + GPT2_CASES)


@fused_families
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no-dropout", "dropout-in-eval"])
def test_loss_and_gradients_agree_with_peft(
    family: str, targets: str | list[str], linears: int, dropout: float, spy: Spy
) -> None:
    plain = family_peft(family, targets, dropout).train(dropout == 0.0)
    patched = copy.deepcopy(plain)
    report = fastlora.patch(patched)
    assert len(report.fused) == linears
    assert not report.fallback
    assert not report.untouched
    assert_agrees_with_peft(patched, plain)
    assert (spy.fused, spy.peft) == (linears, 0)


@pytest.mark.parametrize(("family", "targets", "linears"), GPT2_CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no-dropout", "dropout"])
def test_gpt2_stays_with_peft_and_says_why(
    family: str, targets: str | list[str], linears: int, dropout: float, spy: Spy
) -> None:
    plain = family_peft(family, targets, dropout).train()
    patched = copy.deepcopy(plain)
    report = fastlora.patch(patched)
    assert not report.fused
    assert len(report.fallback) == linears
    assert all("fan_in_fan_out" in reason for reason in report.fallback.values())
    assert_same(loss_and_gradients(patched), loss_and_gradients(plain))
    assert (spy.fused, spy.peft) == (0, linears)


@all_families
def test_dropout_follows_torch_manual_seed(
    family: str, targets: str | list[str], linears: int, spy: Spy
) -> None:
    model = patched_twin(family_peft(family, targets, 0.1)).train()
    first = loss_and_gradients(model, seed=3)
    assert_same(loss_and_gradients(model, seed=3), first)
    other = loss_and_gradients(model, seed=4)
    unchanged = [name for name in first if torch.equal(first[name], other[name])]
    assert not unchanged
    assert (spy.fused, spy.peft) == ((0, 3 * linears) if family == "gpt2" else (3 * linears, 0))


@all_families
def test_unpatch_gives_back_the_same_model_bit_for_bit(
    family: str, targets: str | list[str], linears: int
) -> None:
    model = family_peft(family, targets, 0.1).train()
    before, expected = snapshot(model), loss_and_gradients(model)
    fastlora.patch(model)
    # A call leaves its reason on each layer: unpatch must remove that as well.
    loss_and_gradients(model)
    fastlora.unpatch(model)
    assert snapshot(model) == before
    assert len(layers_of_type(model, PeftLinear)) == linears
    assert_same(loss_and_gradients(model), expected)
