"""Liger's kernels together with fastlora: both patch instances, in whichever order."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from accuracy import assert_as_accurate
from conftest import Spy
from peft import PeftModel
from tiny_models import tiny_peft, token_ids
from torch import Tensor, nn
from torch.nn import functional as F
from training_runs import adapter_gradients
from whole_models import LINEARS, assert_agrees_with_peft, patched_twin

import fastlora

ORDERS = ["liger-first", "fastlora-first"]


class SiluMul(torch.autograd.Function):
    """``silu(a) * b``, whose backward writes over ``a`` and ``b``, as liger_kernel 0.8.5's does."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, dc: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        sigmoid = a.sigmoid()
        silu = a * sigmoid
        da, db = dc * b * (silu * (1 - sigmoid) + sigmoid), dc * silu
        # .data: a kernel's writes do not count as a new version either.
        a.data.copy_(da)
        b.data.copy_(db)
        return a, b


class RMSNorm(torch.autograd.Function):
    """RMS normalisation, whose backward writes over ``dy``, as liger_kernel 0.8.5's does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        m = dy * weight
        dx = scale * (m - x * scale.square() * (m * x).mean(-1, keepdim=True))
        dy.data.copy_(dx)
        return dy, None, None


def mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(SiluMul.apply(self.gate_proj(x), self.up_proj(x)))


def norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    return RMSNorm.apply(x, self.weight, self.variance_epsilon)


def apply_twin(model: PeftModel) -> None:
    """Bind forwards to the modules that ``apply_liger_kernel_to_qwen2(model=model)`` binds them to.

    Qwen3's too: Liger also replaces the norms of its queries and keys.
    """
    for module in model.modules():
        if type(module).__name__ in ("Qwen2MLP", "Qwen3MLP"):
            module.__dict__["forward"] = MethodType(mlp_forward, module)
        elif type(module).__name__ in ("Qwen2RMSNorm", "Qwen3RMSNorm"):
            module.__dict__["forward"] = MethodType(norm_forward, module)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_replaced_mlps_and_norms_run_with_fused_linears(family: str, order: str, spy: Spy) -> None:
    plain = tiny_peft(family, lora_dropout=0.0)
    untouched = copy.deepcopy(plain)
    if order == "liger-first":
        apply_twin(plain)
        patched = patched_twin(plain)
    else:
        patched = patched_twin(plain)
        apply_twin(patched)
        apply_twin(plain)
    assert fastlora.explain(patched) == "fused 14 of 14 LoRA linears in 4 groups; 0 fall back"
    assert_agrees_with_peft(patched, plain)
    assert (spy.fused, spy.peft) == (LINEARS, 0)
    # Against the model without Liger too: the twin itself may be no worse than transformers.
    assert_agrees_with_peft(patched, untouched)


@pytest.mark.parametrize("order", ORDERS)
def test_unpatch_leaves_the_replaced_forwards_where_they_are(order: str) -> None:
    model = tiny_peft(lora_dropout=0.0)
    steps = [apply_twin, fastlora.patch]
    for step in steps if order == "liger-first" else reversed(steps):
        step(model)
    fastlora.unpatch(model)
    mlps = [module for module in model.modules() if type(module).__name__ == "Qwen2MLP"]
    assert len(mlps) == 2
    assert all(mlp.forward.__func__ is mlp_forward for mlp in mlps)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_real_liger_kernels_run_with_fused_linears(
    family: str, order: str, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    liger = pytest.importorskip("liger_kernel.transformers")
    apply_liger = getattr(liger, f"apply_liger_kernel_to_{family}")
    # Beside the instance Liger replaces names in transformers' module: they are put back.
    stem = family.capitalize()
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    for name in ("apply_rotary_pos_emb", f"{stem}RMSNorm", f"{stem}MLP"):
        monkeypatch.setattr(modeling, name, getattr(modeling, name))
    plain = tiny_peft(family, lora_dropout=0.0).cuda()
    exact = copy.deepcopy(plain).double()
    patched = copy.deepcopy(plain)
    ids = token_ids(rows=8, columns=33).cuda()
    results = []
    exact.train()(ids, labels=ids).loss.backward()
    results.append(adapter_gradients(exact))
    for model, with_fastlora in ((plain, False), (patched, True)):
        if with_fastlora and order == "fastlora-first":
            fastlora.patch(model, strict=True)
        apply_liger(model=model.get_base_model())
        if with_fastlora and order == "liger-first":
            fastlora.patch(model, strict=True)
        model.train()(ids, labels=ids).loss.backward()
        results.append(adapter_gradients(model))
    assert (spy.fused, spy.peft) == (LINEARS, 0)
    reference, native, actual = results
    assert_as_accurate(actual, native, reference, name="gradients")
