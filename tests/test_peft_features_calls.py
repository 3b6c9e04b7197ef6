"""Every feature of peft's LoRA layers, part 2: how an adapter is made, switched and called.

One test for each row of the table of peft's features, as in test_peft_features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable

import peft
import peft.helpers
import peft.tuners.lora.layer
import peft.utils.loftq_utils
import pytest
import torch
from conftest import Spy
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_configs
from peft.tuners.lora.model import _alora_offsets_pre_forward_hook
from test_peft_features import (
    IN,
    ROWS,
    TARGETS,
    Net,
    add_second_adapter,
    assert_equal,
    assert_falls_back,
    assert_fused,
    assert_same_error,
    inputs,
    linears,
    nudge,
    peft_net,
    run,
    tokens,
    twins,
)
from tiny_models import tiny_peft
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import fastlora
from fastlora import ops
from fastlora import plain as plain_operators


def _init_corda(net: Net, config: LoraConfig) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    config.corda_config = lora_configs.CordaConfig()
    preprocess_corda(net, config, run_model=lambda: net(inputs()))


def _init_lora_ga(net: Net, config: LoraConfig) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    config.lora_ga_config = lora_configs.LoraGAConfig()
    preprocess_loraga(net, config, train_step=lambda: net(inputs()).square().sum().backward())


def _init_loftq(net: Net, config: LoraConfig) -> None:
    config.init_lora_weights = "loftq"
    config.loftq_config = {"loftq_bits": 4, "loftq_iter": 1}


def _loftq_without_bitsandbytes(
    weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    """LoftQ by rounding to a grid; peft's own needs bitsandbytes and, before 0.20, scipy."""
    step = weight.detach().abs().max() / 2 ** (num_bits - 1)
    quantized = (weight.detach() / step).round() * step
    u, s, vh = torch.linalg.svd(weight.detach() - quantized, full_matrices=False)
    root = s[:reduced_rank].sqrt()
    return quantized, root[:, None] * vh[:reduced_rank], u[:, :reduced_rank] * root


LORA_GA = pytest.mark.skipif(
    not hasattr(lora_configs, "LoraGAConfig"), reason=f"peft {peft.__version__} has no LoRA-GA"
)


@pytest.mark.parametrize(
    ("init", "before"),
    [
        pytest.param("pissa", None, id="PiSSA"),
        pytest.param("pissa_niter_2", None, id="PiSSA-fast"),
        pytest.param("olora", None, id="OLoRA"),
        pytest.param("corda", _init_corda, id="CorDA"),
        pytest.param("lora_ga", _init_lora_ga, id="LoRA-GA", marks=LORA_GA),
        pytest.param("eva", None, id="EVA"),
        pytest.param(True, _init_loftq, id="LoftQ"),
        pytest.param("orthogonal", None, id="orthogonal"),
        pytest.param("gaussian", None, id="gaussian"),
    ],
)
@pytest.mark.filterwarnings("ignore:lora with eva", "ignore:Full backward hook is firing")
def test_every_initialization_is_fused(
    spy: Spy, monkeypatch: pytest.MonkeyPatch, init: bool | str, before: Callable | None
) -> None:
    """Row: PiSSA/OLoRA/CorDA/LoRA-GA/EVA/LoftQ/orthogonal/gaussian."""
    for module in (peft.tuners.lora.layer, peft.utils.loftq_utils):
        # Peft 0.18 imports it where it is used.
        monkeypatch.setattr(module, "loftq_init", _loftq_without_bitsandbytes, raising=False)
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # peft's CorDA takes `dataclass` from it
    net = Net()
    config = LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, init_lora_weights=init)
    if before is not None:
        before(net, config)
    model = get_peft_model(net, config)
    if init == "eva":
        batches = [{"x": inputs()}, {"x": -inputs()}]
        peft.initialize_lora_eva_weights(
            model,
            batches,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda x, *_: x[0] if isinstance(x, tuple) else x,
            show_progress_bar=False,
        )
    nudge(model)
    fused, plain = twins(model)
    assert_fused(spy, fused, plain)
    # These methods replace the base weight's data; so may others, after the first call.
    for module in (fused, plain):
        for layer in linears(module):
            layer.base_layer.weight.data = layer.base_layer.weight.data * 1.5
    assert_fused(spy, fused, plain)


def test_transposed_base_weight_is_fused(spy: Spy) -> None:
    """Row: fan_in_fan_out / Conv1D (GPT-2)."""
    fused, plain = twins(tiny_peft("gpt2", fan_in_fan_out=True))
    assert {type(layer.base_layer).__name__ for layer in linears(fused)} == {"Conv1D"}
    assert_fused(spy, fused, plain, tokens())
    # Only where the two belong together: peft multiplies by what the base layer is.
    for model in (fused, plain):
        for layer in linears(model):
            layer.fan_in_fan_out = False
    reason = "falls back to peft: the base layer is a Conv1D, not an nn.Linear"
    assert_falls_back(spy, fused, plain, reason, tokens())


def test_mixed_batch_is_fused_without_gradients(spy: Spy) -> None:
    """Row: mixed batch `adapter_names=[...]`; see test_adapter_names."""

    def prepare(model: PeftModel) -> None:
        add_second_adapter(model)
        model.eval()

    fused, plain = twins(peft_net(), prepare)
    names = ["default", "__base__", "other", "other", "default"] * (ROWS // 5)
    reason = "last call went to peft: adapter_names= are fused without gradients only"
    assert_falls_back(spy, fused, plain, reason, adapter_names=names)
    assert_fused(spy, fused, plain)  # the next call is an ordinary one again
    with torch.no_grad():
        mixed = fused(inputs(), adapter_names=names)
        torch.testing.assert_close(mixed, plain(inputs(), adapter_names=names))
    assert "went to peft" not in fastlora.explain(fused)

    assert_same_error(fused, plain, inputs(), adapter_names=names[:2])
    assert_same_error(fused, plain, inputs(), adapter_names=[*names[:-1], "unknown"])
    for model in (fused, plain):
        model.train()
    assert_same_error(fused, plain, inputs(), adapter_names=names)


def test_alora_offsets_of_none_stay_fused(spy: Spy) -> None:
    """Row: `alora_offsets` kwarg present but None."""

    def hook(model: nn.Module, offsets: list[int] | None = None) -> None:
        for layer in linears(model):
            layer.register_forward_pre_hook(
                lambda *args: _alora_offsets_pre_forward_hook(*args, alora_offsets=offsets),
                with_kwargs=True,
            )

    fused, plain = twins(peft_net(), hook)
    assert_fused(spy, fused, plain)
    assert_fused(spy, linears(fused)[0], linears(plain)[0], alora_offsets=None, adapter_names=None)
    # Offsets for an adapter that is no aLoRA mean nothing, but that is for peft to say.
    for model in (fused, plain):
        hook(model, [1] * ROWS)
    reason = "last call went to peft: it was called with alora_offsets="
    assert_falls_back(spy, fused, plain, reason)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_adapter_falls_back(spy: Spy, safe_merge: bool) -> None:
    """Row: merged."""
    fused, plain = twins(peft_net(), lambda model: model.merge_adapter(safe_merge=safe_merge))
    reason = "falls back to peft: its adapters are merged into the base weight: default"
    assert_falls_back(spy, fused, plain, reason)
    for model in (fused, plain):
        model.unmerge_adapter()
    assert_fused(spy, fused, plain)
    merged, plain_merged = fused.merge_and_unload(), plain.merge_and_unload()
    assert type(merged.first) is nn.Linear
    assert torch.equal(merged(inputs()), plain_merged(inputs()))


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged-before"])
@pytest.mark.parametrize("way", ["disable_adapter", "disable_adapter_layers", "enable_adapters"])
def test_disabled_adapters_fall_back(spy: Spy, way: str, merged: bool) -> None:
    """Row: disable_adapter() / enable_adapters(False)."""
    fused, plain = twins(peft_net())
    reason = "falls back to peft: its adapters are disabled"
    with contextlib.ExitStack() as stack:
        for model in (fused, plain):
            if merged:
                model.merge_adapter()
            if way == "disable_adapter":
                stack.enter_context(model.disable_adapter())
            elif way == "disable_adapter_layers":
                stack.callback(model.base_model.enable_adapter_layers)
                model.base_model.disable_adapter_layers()
            else:
                for layer in linears(model):
                    stack.callback(layer.enable_adapters, True)
                    layer.enable_adapters(False)
        # Peft un-merges in the first call, if it is not done by then.
        assert_falls_back(spy, fused, plain, reason)
        assert not any(layer.merged for layer in linears(fused))
    assert_fused(spy, fused, plain)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "lora_"], ids=["A", "B", "inference_mode"])
def test_frozen_adapter_is_fused(spy: Spy, frozen: str) -> None:
    """Row: requires_grad False on A/B (inference_mode, frozen adapter, disable)."""

    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if frozen in name:
                parameter.requires_grad_(False)

    fused, plain = twins(peft_net(inference_mode=frozen == "lora_"), freeze)
    assert_fused(spy, fused, plain)
    trained = {name for name, p in fused.named_parameters() if p.grad is not None}
    assert len(trained) == (0 if frozen == "lora_" else 2)
    for context in (torch.no_grad, torch.inference_mode):
        spy.reset()
        with context():
            y = fused(inputs())
        assert (spy.fused, spy.peft, y.requires_grad) == (2, 0, False)


def test_input_without_gradient_is_fused_without_its_gradient(
    spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row: x needs no grad (first layer)."""
    fused, plain = twins(
        peft_net(nn.Sequential(nn.Embedding(64, IN), nn.Linear(IN, 40)), target_modules=["1"])
    )

    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("the gradient of an input that needs none was computed")

    monkeypatch.setattr(plain_operators, "fill_input_grad", refuse)
    monkeypatch.setattr(ops.DIRECT, "input_grad", refuse)
    assert_fused(spy, fused, plain, tokens())
    with pytest.raises(AssertionError, match="needs none"):
        run(linears(fused)[0], inputs())


def test_disabled_input_cast_falls_back(spy: Spy) -> None:
    """Row: cast_input_dtype_enabled False (helpers.disable_input_dtype_casting)."""
    reason = "peft's input cast is switched off (cast_input_dtype_enabled = False)"
    fused, plain = twins(peft_net())
    with (
        peft.helpers.disable_input_dtype_casting(fused),
        peft.helpers.disable_input_dtype_casting(plain),
    ):
        assert_falls_back(spy, fused, plain, f"falls back to peft: {reason}")
    assert_fused(spy, fused, plain)

    # With adapters of another dtype, peft raises without its cast.
    fused, plain = twins(peft_net(Net().bfloat16()))
    with (
        peft.helpers.disable_input_dtype_casting(fused),
        peft.helpers.disable_input_dtype_casting(plain),
    ):
        assert_same_error(fused, plain, inputs(dtype=torch.bfloat16))
        assert reason in fastlora.explain(fused)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_adapter_of_another_dtype_is_fused(
    spy: Spy, dtype: torch.dtype, autocast_adapter_dtype: bool
) -> None:
    """Row: autocast_adapter_dtype=True (default)."""
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    fused, plain = twins(model)
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert linears(fused)[0].lora_A["default"].weight.dtype == expected
    assert_fused(spy, fused, plain, inputs(dtype=dtype))
    # Peft may replace the Parameters at any time: no reference to the old ones may stay.
    for module in (fused, plain):
        for layer in linears(module):
            for part in (layer.lora_A, layer.lora_B):
                part["default"].weight = nn.Parameter(part["default"].weight.detach().float() / 2)
    assert_fused(spy, fused, plain, inputs(dtype=dtype))


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["to-bf16", "to-fp16"])
def test_autocast_is_fused(spy: Spy, dtype: torch.dtype, base_dtype: torch.dtype) -> None:
    """Row: autocast (torch.amp)."""
    fused, plain = twins(peft_net(Net().to(base_dtype)))
    with torch.autocast("cpu", dtype):
        assert_fused(spy, fused, plain)
        assert fused(inputs()).dtype == dtype
    assert linears(fused)[0].lora_A["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("allow_tf32", [False, True], ids=["ieee", "tf32"])
def test_fp32_base_is_fused(
    request: pytest.FixtureRequest, spy: Spy, device: torch.device, allow_tf32: bool
) -> None:
    """Row: base fp32."""
    before = torch.get_float32_matmul_precision()
    request.addfinalizer(lambda: torch.set_float32_matmul_precision(before))
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    fused, plain = twins(peft_net().to(device))
    assert_fused(spy, fused, plain, inputs().to(device))


def test_input_of_another_dtype_raises_as_in_peft(spy: Spy) -> None:
    """Row: x dtype != W dtype without autocast."""
    fused, plain = twins(peft_net(Net().bfloat16()))
    assert_same_error(fused, plain, inputs())
    assert spy.fused == 0
    reason = "the input is torch.float32, but the weight is torch.bfloat16, and autocast is off"
    assert f"last call went to peft: {reason}" in fastlora.explain(fused)
    assert_fused(spy, fused, plain, inputs(dtype=torch.bfloat16))


class Reshaped(nn.Module):
    """A model behind a view, because a clone of a non-contiguous input may be contiguous."""

    def __init__(self, model: nn.Module, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.view = model, view

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.view(x))


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        pytest.param((0, IN), lambda x: x, id="0-tokens"),
        pytest.param((2, 0, IN), lambda x: x, id="0-tokens-of-2-sequences"),
        pytest.param((IN,), lambda x: x, id="1-D"),
        pytest.param((4, 33, IN), lambda x: x, id="3-D"),
        pytest.param((2, 3, 22, IN), lambda x: x, id="4-D"),
        pytest.param((IN, ROWS), lambda x: x.t(), id="transposed"),
        pytest.param((ROWS, 2 * IN), lambda x: x[:, ::2], id="every-second-column"),
        pytest.param((5, 26, IN), lambda x: x.transpose(0, 1), id="swapped-rows"),
        pytest.param((26, 1, IN), lambda x: x.expand(26, 5, IN), id="expanded"),
    ],
)
def test_every_shape_and_stride_of_the_input_is_fused(
    spy: Spy, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]
) -> None:
    """Row: 0 tokens, 1-D x, 4-D x, non-contiguous x."""
    fused, plain = (Reshaped(model, view) for model in twins(peft_net()))
    x = inputs(*shape) if 0 not in shape else torch.zeros(shape)
    assert_fused(spy, fused, plain, x)
    assert fused(x).shape == plain(x).shape


def test_compiled_model_is_one_fused_graph(spy: Spy) -> None:
    """Row: torch.compile."""
    fused, plain = twins(peft_net(lora_dropout=0.25).eval())
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    fused.compile(fullgraph=True, backend=backend)
    assert_fused(spy, fused, plain)
    assert backend.frame_count == 1
    # The mask of a compiled model is the one that the same seed draws without a compiler.
    fused.train()
    compiled = run(fused, inputs())
    fused._compiled_call_impl = None
    assert_equal(compiled, run(fused, inputs()))


@pytest.mark.parametrize("how", ["export", "export-strict", "jit.trace", "fx"])
@pytest.mark.filterwarnings(
    "ignore:While compiling, we found certain side effects",  # the spy's counts
    "ignore:`torch.jit.*` is deprecated",
    "ignore::torch.jit.TracerWarning",
)
def test_exported_and_traced_models_hold_no_fused_operator(spy: Spy, how: str) -> None:
    """Row: torch.export / onnx / jit.trace / fx."""
    fused, plain = twins(peft_net())
    if how == "fx":
        # Peft compares x.dtype, which fx does not trace, patched or not.
        for model in (fused, plain):
            with pytest.raises(torch.fx.proxy.TraceError, match="control flow"):
                torch.fx.symbolic_trace(model.base_model.model)
        assert "last call went to peft: " in fastlora.explain(fused)
        assert_fused(spy, fused, plain)
        return
    if how == "jit.trace":
        traced = torch.jit.trace(fused, inputs(), check_trace=False)
        graph = str(traced.inlined_graph)
        reason = "last call went to peft: the model is being exported or traced"
        assert reason in fastlora.explain(fused)
    else:  # torch.onnx.export begins with the first of the two
        program = torch.export.export(fused, (inputs(),), strict=how == "export-strict")
        traced, graph = program.module(), str(program.graph)
        assert "went to peft" not in fastlora.explain(fused)  # what is compiled is not recorded
    assert spy.fused == 0
    assert "linear" in graph
    assert "fastlora::" not in graph
    assert "ops.fastlora" not in graph
    assert torch.equal(traced(inputs()), plain(inputs()))


def _vmap(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return (torch.func.vmap(model)(x),)


def _grad(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    grads, dx = torch.func.grad(loss, argnums=(0, 1))(dict(model.named_parameters()), x)
    return (*grads.values(), dx)


def _grad_of_input(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return (torch.func.grad(lambda x: model(x).square().sum())(x),)


def _forward_mode(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))))


def _double_backward(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x.requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    return (x.grad,)


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        pytest.param(_vmap, "a torch.func transform is active", id="vmap"),
        pytest.param(_grad_of_input, "a torch.func transform is active", id="grad"),
        pytest.param(_grad, "a torch.func transform is active", id="grad-of-functional_call"),
        pytest.param(_forward_mode, "forward-mode differentiation is active", id="forward-AD"),
        pytest.param(_double_backward, None, id="double-backward"),
    ],
)
def test_function_transforms_fall_back(
    spy: Spy, transform: Callable[[nn.Module, Tensor], tuple[Tensor, ...]], reason: str | None
) -> None:
    """Row: torch.func / vmap / forward AD / double backward."""
    fused, plain = twins(peft_net())
    expected = transform(plain, inputs())
    if reason is None:  # nobody can know in the forward pass: the backward pass says so
        with pytest.raises(
            RuntimeError, match=r"cannot be differentiated twice; call fastlora.unpatch"
        ):
            transform(fused, inputs())
        return
    actual = transform(fused, inputs())
    assert (spy.fused, spy.peft) == (0, 2)
    assert f"last call went to peft: {reason}" in fastlora.explain(fused)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
