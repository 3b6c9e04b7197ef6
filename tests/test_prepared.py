"""Prepared calls: the same results as operators one after the other, and when they are not used."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_as_accurate
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model, tiny_peft, token_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import autograd, dora, plans, prepared
from fastlora import plain as plain_operators
from fastlora.autograd import apply_call, apply_scaled, apply_siblings
from fastlora.kernels import layout
from fastlora.prepared import Siblings

FAST = dict(layout._FAST)  # which the fixture of every test takes away
K, R, NS, P = 24, 4, (16, 8, 40), 0.25
SCALINGS = (2.0, 0.5, -1.0)


def make_siblings(
    dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None, count: int = 3
) -> Siblings:
    ns = NS[:count]
    weights = tuple(torch.randn(n, K).to(dtype) for n in ns)
    biases = tuple(torch.randn(n).to(dtype) if n != NS[1] else None for n in ns)
    a, b = (
        tuple(torch.randn(shape, dtype=adapter or dtype, requires_grad=True) for shape in shapes)
        for shapes in ([(R, K) for _ in ns], [(n, R) for n in ns])
    )
    return Siblings(weights, biases, a, b)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, K, generator=generator).to(dtype).requires_grad_()


def call_for(siblings: Siblings, x: Tensor, p: float = P, mask: str = "bits") -> prepared.Call:
    call = siblings.call_for(x, SCALINGS[: len(siblings.weights)], p, mask)
    assert call is not None
    return call


def results(
    apply: Callable[[Siblings, Tensor], tuple[Tensor, ...]], siblings: Siblings, x: Tensor
) -> list[Tensor]:
    """Return the outputs and all gradients, the masks always the same."""
    torch.manual_seed(3)
    ys = apply(siblings, x)
    dys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y) for y in ys]
    grads = torch.autograd.grad(ys, [x, *siblings.adapters], dys)
    return [*ys, *grads]


def one_by_one(p: float = P, mask: str = "bits") -> Callable[..., tuple[Tensor, ...]]:
    """Return what computes the same by the operators, unprepared."""

    def apply(siblings: Siblings, x: Tensor) -> tuple[Tensor, ...]:
        tensors = (siblings.weights, siblings.biases, siblings.lora_as, siblings.lora_bs)
        return apply_siblings(x, *tensors, SCALINGS[: len(siblings.weights)], p, None, mask)

    return apply


def by_call(p: float = P, mask: str = "bits") -> Callable[..., tuple[Tensor, ...]]:
    return lambda siblings, x: apply_call(call_for(siblings, x, p, mask), x)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for number, (one, two) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == two.dtype
        assert torch.equal(one, two), number


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()], ids=["matrix", "batch", "vector"])
@pytest.mark.parametrize("mask", ["bits", "recompute"])
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("count", [1, 3], ids=["alone", "group"])
def test_a_prepared_call_computes_what_the_operators_do(count, p, mask, lead):
    siblings, x = make_siblings(count=count), inputs(*lead)
    expected = results(one_by_one(p, mask), siblings, x)
    for _ in range(2):  # prepared by the first, used again by the second
        assert_same(results(by_call(p, mask), siblings, x), expected)


@pytest.mark.parametrize("plan", ["hybrid", "fused"])
@pytest.mark.parametrize("adapter", [torch.float16, torch.float32], ids=["fp16", "fp32-adapters"])
def test_so_it_does_through_the_kernels(plan, adapter):
    siblings, x = make_siblings(torch.float16, adapter), inputs(9, dtype=torch.float16)
    with fastlora.backend(plan):
        expected = results(one_by_one(), siblings, x)
        for _ in range(2):
            assert_same(results(by_call(), siblings, x), expected)


def test_so_it_does_under_autocast():
    siblings = make_siblings(torch.bfloat16, torch.float32)
    x = inputs(5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(one_by_one(), siblings, x)
        for _ in range(2):
            assert_same(results(by_call(), siblings, x), expected)
    assert expected[-1].dtype == torch.float32


def scaled_outputs(siblings: Siblings, scales: list[Tensor], x: Tensor) -> list[Tensor]:
    """Return DoRA's outputs by one operation after the other."""
    n = len(scales)
    frozen = (siblings.weights, (None,) * n, siblings.lora_as, siblings.lora_bs)
    ys = apply_siblings(x, *frozen, SCALINGS[:n], 0.0, None, "bits")
    triples = zip(ys, scales, siblings.biases, strict=True)
    return [dora.scale_columns(y, scale, bias) for y, scale, bias in triples]


def in_fp64(siblings: Siblings) -> Siblings:
    def doubles(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(
            None if t is None else t.detach().double().requires_grad_(t.requires_grad)
            for t in tensors
        )

    fields = (siblings.weights, siblings.biases, siblings.lora_as, siblings.lora_bs)
    return Siblings(*map(doubles, fields))


@pytest.mark.parametrize("frozen", [None, "x", "a", "scale"])
@pytest.mark.parametrize("plan", ["plain", "hybrid", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_scaled_columns(dtype, plan, frozen, monkeypatch):
    """DoRA: as accurate as one operation after the other; the fused GEMM scales by itself."""
    siblings = make_siblings(dtype)
    siblings.scaled = True
    x, scales = inputs(9, dtype=dtype), [torch.rand(n) + 0.5 for n in NS]
    for name, tensors in {"x": [x], "a": siblings.lora_as, "scale": scales}.items():
        for tensor in tensors:
            tensor.requires_grad_(name != frozen)
    dys = [torch.randn(9, n).to(dtype) for n in NS]
    passes = []
    fill = plain_operators.fill_scaled
    monkeypatch.setattr(plain_operators, "fill_scaled", lambda *a: passes.append(1) or fill(*a))

    def run(apply, siblings, scales, x, dys):
        ys = apply(siblings, scales, x)
        wanted = [t for t in (x, *siblings.adapters, *scales) if t.requires_grad]
        return [*ys, *torch.autograd.grad(ys, wanted, dys)]

    def by_scaled_call(siblings, scales, x):
        return apply_scaled(siblings.call_for(x, SCALINGS, 0.0, "bits"), x, scales)

    with fastlora.backend(plan):
        for _ in range(2):
            passes.clear()
            found = run(by_scaled_call, siblings, scales, x, dys)
            assert len(passes) == (0 if plan == "fused" else len(NS))
        with torch.no_grad():
            for one, two in zip(by_scaled_call(siblings, scales, x), found, strict=False):
                assert torch.equal(one, two)
    native = run(scaled_outputs, siblings, scales, x, dys)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, *scales)]
    exact = run(scaled_outputs, in_fp64(siblings), wide[1:], wide[0], [dy.double() for dy in dys])
    for one, two, right in zip(found, native, exact, strict=True):
        # The scales' gradients are fp32 sums of outputs that were rounded to dtype.
        assert_as_accurate(one.to(dtype), two.to(dtype), right)


def test_without_gradients_nothing_is_saved():
    siblings, x = make_siblings(), inputs(5)
    with torch.no_grad():
        torch.manual_seed(3)
        ys = apply_call(call_for(siblings, x), x)
    assert not any(y.requires_grad for y in ys)
    assert_same(list(ys), results(one_by_one(), siblings, x)[:3])


@pytest.mark.parametrize("frozen", ["x", "a", "b"])
def test_gradients_that_are_not_wanted_are_left_out(frozen):
    siblings, x = make_siblings(), inputs(5)
    expected = dict(zip("xaaabbb", results(one_by_one(), siblings, x)[3:], strict=False))
    wanted = {"x": [x], "a": siblings.lora_as, "b": siblings.lora_bs}
    for tensor in wanted.pop(frozen):
        tensor.requires_grad_(False)
    ys = by_call()(siblings, x)
    saved = [t for t in ys[0].grad_fn.saved_tensors if t is not None]
    if frozen == "a":  # x is saved for dA alone
        assert all(t.data_ptr() != x.data_ptr() for t in saved)
    torch.manual_seed(3)
    ys = by_call()(siblings, x)
    dys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(4)) for y in ys]
    torch.autograd.backward(ys, dys)
    for name, tensors in wanted.items():
        assert torch.equal(tensors[-1].grad, expected[name]), name


def test_a_call_is_prepared_once_for_each_kind_of_input():
    siblings, kinds = make_siblings(), 0

    def expect_another(x: Tensor, *arguments: object) -> None:
        nonlocal kinds
        call = siblings.call_for(x, *arguments)
        kinds += 1
        assert len(siblings._calls) == kinds
        assert siblings.call_for(x, *arguments) is call
        assert len(siblings._calls) == kinds

    usual = (SCALINGS, P, "bits")
    expect_another(inputs(5), *usual)
    expect_another(inputs(6), *usual)
    expect_another(inputs(2, 3), *usual)
    expect_another(inputs(5), (1.0, 1.0, 1.0), P, "bits")
    expect_another(inputs(5), SCALINGS, 0.5, "bits")
    expect_another(inputs(5), SCALINGS, P, "recompute")
    expect_another(inputs(5, dtype=torch.float16), *usual)
    with torch.no_grad():
        expect_another(inputs(5), *usual)
    with torch.autocast("cpu", torch.bfloat16):
        expect_another(inputs(5), *usual)
    with torch.autocast("cpu", torch.float16):
        expect_another(inputs(5), *usual)
    with fastlora.backend("hybrid"):
        expect_another(inputs(5), *usual)
    expect_another(inputs(5).to("meta"), *usual)


def test_of_many_kinds_of_inputs_not_all_are_remembered(monkeypatch):
    monkeypatch.setattr(prepared, "MAX_CALLS", 3)
    siblings = make_siblings()
    for rows in range(1, 9):
        call_for(siblings, inputs(rows))
        assert len(siblings._calls) <= 3


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


UNUSUAL = {
    "every second column": lambda: torch.randn(5, 2 * K)[:, ::2],
    "not aligned": lambda: torch.randn(5 * K + 1)[1:].view(5, K),
    "no rows": lambda: torch.randn(0, K),
    "other features": lambda: torch.randn(5, K + 1),
    "no dimensions": lambda: torch.randn(()),
    "another dtype": lambda: torch.randn(5, K, dtype=torch.float64),
    "another device": lambda: torch.randn(5, K, device="meta"),
    "a subclass": lambda: torch.randn(5, K).as_subclass(_Subclass),
}


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_inputs_are_not_prepared(make):
    assert make_siblings().call_for(make(), SCALINGS, P, "bits") is None


def test_inference_mode_needs_nothing_more():
    siblings, x = make_siblings(), inputs(5)
    with torch.no_grad():
        torch.manual_seed(3)
        expected = apply_call(call_for(siblings, x), x)
    with torch.inference_mode():
        torch.manual_seed(3)
        assert_same(list(apply_call(call_for(siblings, x * 1), x * 1)), list(expected))


def test_what_was_measured_since_is_followed():
    siblings, x = make_siblings(), inputs(5)
    call = call_for(siblings, x)
    plans.forget_measurements()
    assert call_for(siblings, x) is not call


def test_operands_that_have_to_be_cast_are_not_prepared():
    with torch.autocast("cpu", torch.bfloat16):
        assert make_siblings().call_for(inputs(5), SCALINGS, P, "bits") is None
        siblings, x = make_siblings(torch.bfloat16, torch.float64), inputs(5).bfloat16()
        assert siblings.call_for(x, SCALINGS, P, "bits") is None


def test_whoever_watches_operators_sees_the_registered_ones():
    siblings, x = make_siblings(), inputs(5)
    call_for(siblings, x)
    with _Watching():
        assert siblings.call_for(x, SCALINGS, P, "bits") is None


@pytest.mark.parametrize("which", ["x", "h", "weights"])
def test_what_hooks_put_in_the_place_of_saved_tensors_is_used(which):
    """Offloading brings back copies, perhaps laid out in another way."""
    siblings, x = make_siblings(), inputs(5)
    expected = results(by_call(), siblings, x)
    weights = {tensor.data_ptr() for tensor in (*siblings.weights, *siblings.adapters)}
    used = []

    def is_wanted(saved: Tensor) -> bool:
        kind = "weights" if saved.data_ptr() in weights else "x" if saved.dim() == 2 else "h"
        return kind == which and saved.is_floating_point()

    def unpack(saved: Tensor) -> Tensor:
        if not is_wanted(saved):
            return saved
        used.append(which)
        return saved.detach().mT.contiguous().mT  # the same values by columns

    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
        found = results(by_call(), siblings, x)
    assert used
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layout_of",
    [
        pytest.param(lambda dy: dy.mT.contiguous().mT, id="by-columns"),
        pytest.param(lambda dy: dy[:1, :1].expand_as(dy), id="expanded"),
        pytest.param(lambda dy: None, id="unused"),
    ],
)
def test_any_gradient_of_an_output_will_do(layout_of):
    siblings, x = make_siblings(), inputs(5)

    def run(apply):
        torch.manual_seed(3)
        ys = apply(siblings, x)
        dys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(4)) for y in ys]
        dys[1] = layout_of(dys[1])
        pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
        outputs, gradients = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, [x, *siblings.adapters], gradients, allow_unused=True)

    apply_call(call_for(siblings, x), x)  # the backward pass below is not the first
    for one, two in zip(run(by_call()), run(one_by_one()), strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


def test_a_second_derivative_is_refused():
    siblings, x = make_siblings(), inputs(5)
    y = by_call()(siblings, x)[0]
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()


def test_nothing_of_a_step_is_kept():
    siblings, x = make_siblings(), inputs(5)
    inner = x * 1
    ys = by_call()(siblings, inner)
    alive = [weakref.ref(tensor) for tensor in (inner, *ys)]
    torch.autograd.backward([y.sum() for y in ys])
    del inner, ys
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_memory_is_made_as_compiled_code_makes_it(monkeypatch):
    """In the other tests it is filled with NaN, which takes torch.empty_strided."""
    made = []
    monkeypatch.setitem(layout._FAST, "cpu", lambda *args: made.append(args) or FAST["cpu"](*args))
    tensor = layout.allocator((2, 3, 4), torch.float16, torch.device("cpu"))()
    assert (tensor.shape, tensor.dtype, tensor.stride()) == ((2, 3, 4), torch.float16, (12, 4, 1))
    assert not tensor.requires_grad
    assert made == [((2, 3, 4), (12, 4, 1), torch.float16)]
    with _Watching():
        layout.allocator((2,), torch.float16, torch.device("cpu"))()
    assert len(made) == 1


@pytest.mark.parametrize("plan", ["plain", "hybrid", "fused"])
def test_so_made_memory_holds_the_same_results(plan, monkeypatch):
    siblings, x = make_siblings(), inputs(2, 3)
    with fastlora.backend(plan):
        expected = results(by_call(), siblings, x)
        monkeypatch.setattr(layout, "_FAST", FAST)
        siblings._calls.clear()
        assert_same(results(by_call(), siblings, x), expected)


@pytest.mark.parametrize("plan", [None, "fused"])
def test_a_layer_uses_its_prepared_call(plan, monkeypatch):
    layer = fastlora.LoRALinear.from_linear(nn.Linear(K, 16), r=R, init_lora_weights=False)
    x, unprepared = inputs(5), []
    monkeypatch.setattr(autograd, "_apply", lambda *args: unprepared.append(args))
    with fastlora.backend(plan) if plan else nullcontext():
        layer(x)  # checks the device if nobody has, after which plans may be others
        layer.fastlora_operands.siblings._calls.clear()
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert len(layer.fastlora_operands.siblings._calls) == 1
        layer.set_scale("default", 3.0)
        assert not torch.equal(layer(x), first)
        assert len(layer.fastlora_operands.siblings._calls) == 2
    assert unprepared == []


def test_the_environment_is_read_at_each_call(monkeypatch):
    siblings, x = make_siblings(), inputs(5)
    call = call_for(siblings, x)
    monkeypatch.setenv(plans.ENVIRONMENT, "hybrid")
    assert call_for(siblings, x) is not call


# What may change between two calls, or between a forward pass and its backward


def make_layer(dtype: torch.dtype = torch.float32, **options: object) -> fastlora.LoRALinear:
    linear = nn.Linear(K, 16, dtype=dtype)
    return fastlora.LoRALinear.from_linear(linear, r=R, init_lora_weights=False, **options)


@pytest.mark.parametrize("plan", ["plain", "hybrid", "fused"])
@pytest.mark.parametrize("which", ["base_layer", "lora_A", "lora_B"])
def test_weights_that_are_laid_out_anew_are_noticed(which, plan):
    layer, x = make_layer(), inputs(8)
    module = layer.base_layer if which == "base_layer" else getattr(layer, which)["default"]

    def run() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y.sum(), [x, *adapters_of(layer)])]

    with fastlora.backend(plan):
        expected = run()
        module.weight.data = module.weight.data.t().contiguous().t()
        for one, two in zip(run(), expected, strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


def adapters_of(layer: fastlora.LoRALinear) -> list[Tensor]:
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def test_a_bias_that_is_trained_from_now_on_gets_its_gradient():
    layer, x = make_layer(), inputs(5)
    layer(x).sum().backward()
    layer.base_layer.bias.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.equal(layer.base_layer.bias.grad, torch.full((16,), 5.0))
    layer.base_layer.bias.requires_grad_(False)
    layer.base_layer.bias.grad = None
    layer(x).sum().backward()
    assert layer.base_layer.bias.grad is None


def test_transforms_work_on_a_layer_that_ran_before():
    layer, x = make_layer(), inputs(5).detach()
    expected = layer(x)
    assert torch.allclose(torch.func.vmap(layer)(x), expected, atol=1e-6)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    found = torch.func.grad(lambda x: layer(x).sum())(x.detach())
    assert torch.allclose(found, grad, atol=1e-6)


@pytest.fixture
def kernels_launched(monkeypatch):
    from fastlora.kernels.launch import Launch

    launched = []
    call = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *a: launched.append(1) or call(self, *a))
    return launched


@pytest.mark.skipif(not plans.interpreting(), reason="runs on the interpreter")
def test_a_backward_pass_follows_the_plan_of_its_own_time(kernels_launched):
    siblings, x = make_siblings(), inputs(5)

    def backward(plan):
        kernels_launched.clear()
        with fastlora.backend(plan):
            ys[0].sum().backward(retain_graph=True, inputs=[x])
            torch.autograd.backward([y.sum() for y in ys], inputs=[x], retain_graph=True)
        return len(kernels_launched)

    with fastlora.backend("fused"):
        ys = by_call()(siblings, x)
        first = backward("fused")
        assert first
        assert backward("plain") == 0
        assert backward("fused") == first


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda saved: saved.double(), id="another-dtype"),
        pytest.param(lambda saved: saved.mT.contiguous().mT, id="another-layout"),
    ],
)
def test_saved_tensors_that_come_back_changed_are_not_for_prepared_passes(change):
    siblings, x = make_siblings(), inputs(5)
    call = call_for(siblings, x)
    with torch.no_grad():
        ys, h, mask = call.forward(x)
    operands = (*siblings.weights, *siblings.adapters)
    dys = [torch.randn_like(y) for y in ys]
    assert call.fits(dys, x, h, mask, *operands)
    assert not call.fits(dys, change(x), h, mask, *operands)
    assert not call.fits(dys, x, change(h), mask, *operands)
    assert not call.fits([dys[0], None, dys[2]], x, h, mask, *operands)
    assert not call.fits([change(dy) for dy in dys], x, h, mask, *operands)
    assert not call.fits(dys, x, h, mask, *[change(each) for each in operands])
    siblings.lora_as[0].data = siblings.lora_as[0].data.double()
    assert not call.fits(dys, x, h, mask, *operands)


def test_the_precision_of_fp32_products_is_part_of_the_circumstances(monkeypatch):
    monkeypatch.setattr(prepared, "allows_tf32", lambda: "tf32")
    cuda = SimpleNamespace(type="cuda")
    half, fp32 = torch.float16, torch.float32
    for x_dtype, adapter, autocast, matters in (
        (fp32, fp32, None, True),
        (half, fp32, None, True),
        (half, fp32, half, False),
        (half, half, None, False),
    ):
        x = SimpleNamespace(dtype=x_dtype, device=cuda)
        siblings = make_siblings(x_dtype, adapter)
        assert (siblings.circumstances(x, autocast)[2] == "tf32") == matters


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "group"])
def test_adapters_that_take_turns_keep_what_was_prepared(grouped, monkeypatch):
    made = []
    init = prepared.Call.__init__
    monkeypatch.setattr(
        prepared.Call, "__init__", lambda self, *a: made.append(1) or init(self, *a)
    )
    model = tiny_peft(model=tiny_model(num_hidden_layers=1)) if grouped else peft_of_one()
    model.add_adapter("other", model.peft_config["default"])
    fastlora.patch(model)

    def step():
        for name in ("default", "other"):
            model.set_adapter(name)
            run_once(model, grouped)
            with model.disable_adapter():
                run_once(model, grouped)

    step()
    first = len(made)
    assert first
    step()
    step()
    assert len(made) == first


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "group"])
def test_a_deleted_adapter_is_let_go_at_the_next_call(grouped):
    model = tiny_peft(model=tiny_model(num_hidden_layers=1)) if grouped else peft_of_one()
    model.add_adapter("other", model.peft_config["default"])
    fastlora.patch(model)
    for name in ("default", "other"):
        model.set_adapter(name)
        run_once(model, grouped)
    alive = [
        weakref.ref(parameter)
        for name, parameter in model.named_parameters()
        if ".default." in name
    ]
    model.delete_adapter("default")
    run_once(model, grouped)
    gc.collect()
    assert alive
    assert not any(ref() is not None for ref in alive)


def peft_of_one():
    model = nn.Sequential(nn.Linear(K, 16))
    return get_peft_model(model, LoraConfig(r=R, target_modules=["0"], init_lora_weights=False))


def run_once(model, grouped):
    if grouped:
        return model(token_ids(), use_cache=False)
    return model(inputs(5))


def test_what_is_no_tensor_gets_torch_s_own_words():
    layer = make_layer()
    layer(inputs(5))
    with pytest.raises(TypeError, match="linear"):
        layer(None)
