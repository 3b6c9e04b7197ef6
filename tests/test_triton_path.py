"""The whole package on the Triton kernels: ``lora_linear``, layers and models, every plan.

Without a GPU the kernels are interpreted, on CPU tensors, where a plan is forced. The interpreter
truncates when it rounds to bf16 (a third more error than rounding to nearest), so bf16 is compared
on a GPU alone; fp16 stands in for it here.
"""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_as_accurate, gradients, output_gradient
from tiny_models import tiny_peft

import fastlora
from fastlora import dropout, lora_linear, plans
from fastlora.autograd import apply_siblings
from fastlora.kernels import tile_config

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not (GPU or plans.interpreting()), reason="the kernels are neither compiled nor interpreted"
)

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
PLANS = ["hybrid", "fused"]

# base dtype, adapter dtype, autocast dtype
DTYPES = [
    pytest.param((FP32, FP32, None), id="fp32"),
    pytest.param((FP16, FP16, None), id="fp16"),
    pytest.param((FP16, FP32, None), id="fp16-fp32-adapters"),
    pytest.param((FP16, FP32, FP16), id="fp16-autocast"),
    pytest.param((FP32, FP32, FP16), id="fp32-autocast-fp16"),
    pytest.param((BF16, BF16, None), id="bf16", marks=pytest.mark.gpu),
    pytest.param((BF16, FP32, None), id="bf16-fp32-adapters", marks=pytest.mark.gpu),
    pytest.param((BF16, FP32, BF16), id="bf16-autocast", marks=pytest.mark.gpu),
]
# rows, in features, out features, rank, bias
SHAPES = [
    pytest.param((2, 20, 64, 48, 5, True), id="ordinary"),
    pytest.param((1, 1, 33, 7, 16, False), id="one-row-odd-sizes"),
    pytest.param((1, 33, 72, 40, 72, False), id="ragged-tiles-rank-72"),
]


def make_inputs(shape, dtypes):
    batch, length, k, n, r, bias = shape
    base, adapter, _ = dtypes
    tensors = {
        "x": torch.randn(batch, length, k).to(base).requires_grad_(),
        "weight": (torch.randn(n, k) * k**-0.5).to(base),
        "bias": torch.randn(n).to(base) if bias else None,
        "lora_a": (torch.randn(r, k) * k**-0.5).to(adapter).requires_grad_(),
        "lora_b": torch.randn(n, r).to(adapter).requires_grad_(),
    }
    return {
        name: tensor
        if tensor is None
        else tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }


def as_peft(keep, scaling, p):
    """peft's formula, on a given mask."""

    def apply(x, weight, bias, lora_a, lora_b):
        y = torch.nn.functional.linear(x, weight, bias)
        dropped = x.to(lora_a.dtype)
        if p:
            dropped = dropped * keep.to(dropped.dtype).view(x.shape) / (1 - p)
        low = torch.nn.functional.linear(torch.nn.functional.linear(dropped, lora_a), lora_b)
        return (y + low * scaling).to(y.dtype)

    return apply


@pytest.mark.parametrize(("p", "mask"), [(0.0, "bits"), (0.25, "bits"), (0.25, "recompute")])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("plan", PLANS)
def test_forward_and_backward_are_as_accurate_as_peft(plan, dtypes, shape, p, mask):
    inputs = make_inputs(shape, dtypes)
    x = inputs["x"]
    rows = x.numel() // x.shape[-1]
    keep = dropout.keep_mask(torch.tensor(11, device=DEVICE), rows, x.shape[-1], p)
    peft = as_peft(keep, 1.7, p)

    def ours(**tensors):
        with fastlora.backend(plan):
            return lora_linear(**tensors, scaling=1.7, dropout_p=p, seed=11, dropout_mask=mask)

    def run(function, tensors, autocast):
        with (
            fastlora.backend(plan),
            torch.autocast(DEVICE, dtype=autocast or FP16, enabled=autocast is not None),
        ):
            y = function(**tensors)
        with fastlora.backend(plan):
            dy = output_gradient(y)
            wanted = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
            grads = torch.autograd.grad(y, list(wanted.values()), dy)
        return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}

    exact_inputs = {
        name: t if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }
    results = [run(f, inputs, dtypes[2]) for f in (ours, peft)]
    exact = run(peft, exact_inputs, None)
    for name in exact:
        assert_as_accurate(results[0][name], results[1][name], exact[name], name=name)


# Out features of siblings: q/k/v with few heads for keys, gate/up, the four in_proj of Qwen3.5.
SIBLINGS = [
    pytest.param((48, 8, 8), id="q-k-v"),
    pytest.param((40, 40), id="gate-up"),
    pytest.param((64, 32, 4, 4), id="four"),
]


@pytest.mark.parametrize(("p", "mask"), [(0.0, "bits"), (0.25, "bits"), (0.25, "recompute")])
@pytest.mark.parametrize("ns", SIBLINGS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("plan", PLANS)
def test_siblings_are_as_accurate_as_peft(plan, dtypes, ns, p, mask):
    """Every output and gradient of a group, and the sum of its members' dx."""
    members = [make_inputs((2, 20, 64, n, 5, g != 1), dtypes) for g, n in enumerate(ns)]
    x, seed, scalings = members[0]["x"], torch.tensor(11, device=DEVICE), (1.7, -0.5, 1.0, 2.0)
    keeps = [dropout.keep_mask(seed, 40, 64, p, stream=g) if p else None for g in range(len(ns))]

    def ours(x, members):
        columns = zip(*[list(member.values())[1:] for member in members], strict=True)
        return apply_siblings(x, *columns, scalings[: len(ns)], p, seed if p else None, mask)

    def peft(x, members):
        return [
            as_peft(keep, scaling, p)(x, *list(member.values())[1:])
            for member, keep, scaling in zip(members, keeps, scalings, strict=False)
        ]

    def run(function, x, members, autocast):
        adapters = [m[name] for m in members for name in ("lora_a", "lora_b")]
        with (
            fastlora.backend(plan),
            torch.autocast(DEVICE, dtype=autocast or FP16, enabled=autocast is not None),
        ):
            ys = function(x, members)
        with fastlora.backend(plan):
            grads = torch.autograd.grad(ys, [x, *adapters], [output_gradient(y) for y in ys])
        # As one vector of A and of B: in a small one the ratio of two errors is mostly chance.
        da, db = (torch.cat([g.flatten() for g in grads[first::2]]) for first in (1, 2))
        return {"y": torch.cat([y.detach() for y in ys], -1), "dx": grads[0], "dA": da, "dB": db}

    def in_fp64(tensor):
        if tensor is None:
            return None
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    exact_members = [{name: in_fp64(t) for name, t in m.items()} for m in members]
    actual, native = (run(f, x, members, dtypes[2]) for f in (ours, peft))
    exact = run(peft, in_fp64(x), exact_members, None)
    for name in exact:
        assert_as_accurate(actual[name], native[name], exact[name], name=name)


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_draws_the_same_mask(plan):
    inputs = make_inputs((2, 20, 64, 48, 5, True), (FP32, FP32, None))
    results = []
    for name in ("plain", plan):
        torch.manual_seed(3)
        with fastlora.backend(name):
            y = lora_linear(**inputs, scaling=1.0, dropout_p=0.5)
        results.append(y.detach().double())
    error = (results[1] - results[0]).norm() / results[0].norm()
    assert error < 1e-5  # another mask would be off by a third


@pytest.mark.parametrize("plan", PLANS)
def test_same_seed_gives_the_same_bits_three_times(plan):
    inputs = make_inputs((2, 20, 64, 48, 5, True), (FP16, FP32, None))
    with fastlora.backend(plan):
        runs = [
            gradients(lambda **t: lora_linear(**t, scaling=1.7, dropout_p=0.1, seed=4), inputs)
            for _ in range(3)
        ]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name])
        assert torch.equal(runs[0][name], runs[2][name])


@pytest.mark.parametrize("plan", PLANS)
def test_an_expanded_output_gradient_is_taken_as_it_is(plan):
    inputs = make_inputs((2, 20, 64, 48, 5, True), (FP32, FP32, None))
    wanted = [inputs[name] for name in ("x", "lora_a", "lora_b")]
    results = []
    for name in ("plain", plan):
        with fastlora.backend(name):
            y = lora_linear(**inputs, scaling=1.0, dropout_p=0.5, seed=9)
            results.append(torch.autograd.grad(y.sum(), wanted))
    for ours, plain in zip(results[1], results[0], strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("scaling", [0.0, -2.0, 1e-30, 1e30])
def test_any_scaling_is_honoured(plan, scaling):
    inputs = make_inputs((2, 20, 64, 48, 5, True), (FP32, FP32, None))
    results = []
    for name in ("plain", plan):
        with fastlora.backend(name):
            results.append(lora_linear(**inputs, scaling=scaling).detach())
    assert (results[1] - results[0]).norm() <= 1e-6 * results[0].norm()


@pytest.mark.parametrize("plan", PLANS)
def test_a_strided_or_expanded_bias_is_read_right(plan):
    inputs = make_inputs((2, 20, 64, 48, 5, True), (FP32, FP32, None))
    wide = torch.randn(96, device=DEVICE)
    for bias in (wide[::2], wide[:1].expand(48)):
        results = []
        for name in ("plain", plan):
            with fastlora.backend(name):
                results.append(lora_linear(**inputs | {"bias": bias}, scaling=1.0).detach())
        assert (results[1] - results[0]).norm() <= 1e-5 * results[0].norm()


@pytest.mark.parametrize("plan", PLANS)
def test_the_output_can_be_changed_in_place(plan):
    """A view made inside an autograd Function cannot (residual.add_, dropout(inplace=True))."""
    inputs = make_inputs((2, 20, 64, 48, 5, True), (FP16, FP32, None))
    with fastlora.backend(plan):
        y = lora_linear(**inputs, scaling=1.0, dropout_p=0.5)
        y.add_(1)
        y.sum().backward()
    assert inputs["x"].grad is not None


@pytest.mark.parametrize("plan", PLANS)
def test_rows_that_autocast_makes_unaligned_are_computed(plan):
    """144-byte rows in fp32 are 72-byte rows in fp16."""
    inputs = make_inputs((1, 20, 36, 44, 5, False), (FP32, FP32, FP16))
    with fastlora.backend(plan), torch.autocast(DEVICE, dtype=FP16):
        y = lora_linear(**inputs, scaling=1.0, dropout_p=0.5)
        y.backward(torch.ones_like(y))
    assert y.isfinite().all()


def test_tf32_asked_for_in_the_new_words_does_not_stop_a_call():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch 2.9 brought them")
    before = matmul.fp32_precision
    inputs = make_inputs((2, 20, 64, 48, 5, True), (FP32, FP32, None))
    try:
        matmul.fp32_precision = "tf32"
        assert tile_config.allows_tf32()
        with fastlora.backend("fused"):
            lora_linear(**inputs, scaling=1.0).sum().backward()
        matmul.fp32_precision = "ieee"
        assert not tile_config.allows_tf32()
    finally:
        matmul.fp32_precision = before


def test_scaling_that_changes_between_calls_is_honoured():
    model = tiny_peft().to(DEVICE)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and m.lora_A)
    fastlora.patch(model)
    x = torch.randn(8, layer.in_features, device=DEVICE)
    with fastlora.backend("fused"), torch.no_grad():
        base, once = layer.base_layer(x), layer(x)
        layer.scale_layer(3.0)
        thrice = layer(x)
    assert (thrice - base - 3 * (once - base)).norm() <= 1e-5 * thrice.norm()


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("plan", PLANS)
def test_a_patched_qwen_trains_through_the_kernels_as_it_does_without(plan, p):
    """Logits and gradients of a tiny Qwen2; at p > 0 the plain plan draws the same masks.

    In fp32: in half precision the roundings of everything else in the model decide which of two
    ways through it ends nearer to fp64. Over four sets of weights in fp16 the plain and the hybrid
    plan are off by 0.4, 1.5, 2.0, 0.2 % and 1.2, 1.0, 1.2, 0.2 %.
    """
    model = tiny_peft(lora_dropout=p).to(DEVICE).train()
    peft = copy.deepcopy(model)
    fastlora.patch(model, strict=True)
    tokens = torch.arange(24, device=DEVICE).view(2, 12)

    def step(model, plan):
        torch.manual_seed(5)
        model.zero_grad(set_to_none=True)
        with fastlora.backend(plan):
            logits = model(input_ids=tokens).logits
            logits.backward(output_gradient(logits))
        named = [(name, q.grad) for name, q in model.named_parameters() if q.grad is not None]
        # All A and all B as one vector each: a single small gradient is off by luck.
        together = {
            part: torch.cat([grad.flatten() for name, grad in named if part in name])
            for part in ("lora_A", "lora_B")
        }
        return {"logits": logits.detach(), **together}

    ours = step(model, plan)
    native = step(model, "plain") if p else step(peft, "auto")
    exact = step(copy.deepcopy(model if p else peft).double(), "plain")
    for name in ours:
        # Nothing is rounded but the sums themselves, and their order is not PyTorch's.
        assert_as_accurate(ours[name], native[name], exact[name], 2.0, name)


def test_the_kernels_really_run(monkeypatch):
    """What the tests above compare would also agree if everything went to the plain plan."""
    from fastlora.kernels import input_pass, low_rank_gemm, output_pass, shrink

    launched = []
    for module in (shrink, low_rank_gemm, output_pass, input_pass):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, _Counted(getattr(module, name), name, launched))
    inputs = make_inputs((2, 20, 64, 48, 5, True), (FP16, FP16, None))
    for plan, gemms in (("plain", 0), ("hybrid", 2), ("fused", 2)):
        launched.clear()
        with fastlora.backend(plan):
            lora_linear(**inputs, scaling=1.0, dropout_p=0.5).sum().backward()
        thin = int(plan != "plain")
        assert launched.count("_shrink_kernel") == thin
        assert launched.count("_output_pass_kernel") == thin
        assert launched.count("_input_pass_kernel") == thin
        # An expanded dy (of sum) is not aligned: its dx goes to cuBLAS, after the masked term.
        assert launched.count("_low_rank_gemm_kernel") == gemms


class _Counted:
    def __init__(self, kernel, name, launched):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]
