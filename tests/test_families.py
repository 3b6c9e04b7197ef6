"""Every family of models: loss and gradients against peft, dropout, and unpatch."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import Spy
from peft.tuners.lora.layer import Linear as PeftLinear
from tiny_models import class_names, tiny_model, tiny_peft
from torch import nn
from transformers.pytorch_utils import Conv1D
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
CASES = [
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
    pytest.param("gpt2", "all-linear", 8, id="gpt2-all"),
    pytest.param("gpt2", ["c_attn"], 2, id="gpt2-c_attn"),
]
all_families = pytest.mark.parametrize(("family", "targets", "linears"), CASES)


@all_families
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
    assert (spy.fused, spy.peft) == (3 * linears, 0)


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


# Family and how many of its linears are computed with their siblings, layer by layer.
SIBLINGS = {
    **dict.fromkeys(("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3"), (5, 5)),
    **dict.fromkeys(("qwen2-vl-text", "qwen2-5-vl-text", "qwen3-vl-text"), (5, 5)),
    "qwen2-moe": (5, 5),  # of the experts only the shared one has linears
    "qwen3-moe": (3, 3),
    "qwen3-5": (6, 5),
    "qwen3-5-moe": (6, 5),
    "qwen3-next": None,  # newer versions of peft take gate, up and down for the experts alone
    "opt": (3, 3),
    "phi3": (0, 0),
    "gpt2": (0, 0),
}


@pytest.mark.parametrize("family", SIBLINGS)
@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys"
)  # peft's own, for experts
def test_siblings_are_computed_together_and_agree_with_peft(family: str, spy: Spy) -> None:
    missing = [name for name in class_names(family) if not hasattr(transformers, name)]
    if missing:
        pytest.skip(f"transformers {transformers.__version__} lacks {missing[0]}")
    base = tiny_model(family, experts_implementation="eager")
    linears = [
        name
        for name, module in base.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and not any(part in name for part in ("lm_head", "visual", ".experts.", ".gate"))
    ]
    linears += [n for n, _ in base.named_modules() if n.endswith("gate_proj") and ".exp" not in n]
    transposed = {"fan_in_fan_out": True} if family == "gpt2" else {}
    plain = tiny_peft(model=base, target_modules=sorted(set(linears)), **transposed)
    patched = copy.deepcopy(plain)
    report = fastlora.patch(patched)
    assert_agrees_with_peft(patched, plain)
    assert spy.peft == 0
    assert spy.together == sum(map(len, report.groups))
    if SIBLINGS[family] is None:
        assert spy.together >= 5  # in_proj_qkvz and in_proj_ba; q, k and v
    else:
        assert spy.together == sum(SIBLINGS[family])
