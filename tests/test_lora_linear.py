"""``lora_linear``: accuracy, gradients, dropout, what is saved, and what is refused."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, gradients, output_gradient
from torch import Tensor

from fastlora import dropout, lora_linear

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

# (x, base weight, adapter, autocast): every combination in which peft trains.
DTYPES = [
    pytest.param((FP32, FP32, FP32, None), id="fp32"),
    pytest.param((BF16, BF16, BF16, None), id="bf16"),
    pytest.param((FP16, FP16, FP16, None), id="fp16"),
    # peft's default: get_peft_model casts the adapters of a half-precision model to fp32.
    pytest.param((BF16, BF16, FP32, None), id="bf16-base"),
    pytest.param((FP16, FP16, FP32, None), id="fp16-base"),
    pytest.param((FP32, FP32, BF16, None), id="bf16-adapter"),
    # TRL's default, and Trainer's with bf16=True: the same under autocast, x in fp32 or in bf16.
    pytest.param((BF16, BF16, FP32, BF16), id="autocast-bf16-base"),
    pytest.param((FP32, BF16, FP32, BF16), id="autocast-bf16-base-fp32-x"),
    pytest.param((FP32, FP32, FP32, BF16), id="autocast-bf16"),
    pytest.param((FP32, FP32, FP32, FP16), id="autocast-fp16"),
]

M, K, N, R = 96, 80, 56, 16  # rows, in features, out features, rank
SCALING = 2.0


def make_inputs(
    dtypes=(FP32, FP32, FP32, None), lead=(M,), k=K, n=N, r=R, bias=True, device="cpu"
) -> dict[str, Tensor | None]:
    x_dtype, base_dtype, adapter_dtype, _ = dtypes
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return {
        "x": normal(*lead, k, dtype=x_dtype).requires_grad_(),
        "weight": normal(n, k, dtype=base_dtype, scale=k**-0.5),
        "bias": normal(n, dtype=base_dtype).requires_grad_() if bias else None,
        "lora_a": normal(r, k, dtype=adapter_dtype, scale=k**-0.5).requires_grad_(),
        "lora_b": normal(n, r, dtype=adapter_dtype).requires_grad_(),
    }


def peft_linear(x, weight, bias, lora_a, lora_b, scale=None) -> Tensor:
    """peft's forward, with its casts and in its order; ``scale`` is the mask over (1 - p)."""
    base = F.linear(x, weight, bias)
    x = x.to(lora_a.dtype)
    if scale is not None:
        x = x * scale.to(x.dtype)
    return (base + F.linear(F.linear(x, lora_a), lora_b) * SCALING).to(base.dtype)


def dropout_scale(x: Tensor, p: float, seed: int) -> Tensor | None:
    """What ``nn.Dropout`` would multiply ``x`` by, for the mask that fastlora draws."""
    if not p:
        return None
    rows = x.numel() // x.shape[-1]
    keep = dropout.keep_mask(torch.tensor(seed, device=x.device), rows, x.shape[-1], p)
    return keep.view(x.shape) * dropout.inverse_keep_probability(p)


def assert_accurate(inputs: dict[str, Tensor | None], p: float = 0.0, autocast=None, **options):
    """Compare y, dx, dbias, dA and dB with peft's in the same dtypes, against fp64."""
    seed = 12345
    scale = dropout_scale(inputs["x"], p, seed)
    exact_inputs = {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    no_bias = {} if inputs["bias"] is not None else {"bias": None}
    device_type = inputs["x"].device.type

    def run(function, tensors):
        context = (
            torch.autocast(device_type, dtype=autocast) if autocast else contextlib.nullcontext()
        )
        with context:
            return gradients(function, tensors)

    def fast(**tensors):
        return lora_linear(**tensors, **no_bias, scaling=SCALING, dropout_p=p, seed=seed, **options)

    def native(**tensors):
        return peft_linear(**tensors, **no_bias, scale=scale)

    actual, peft = run(fast, given), run(native, given)
    exact = gradients(
        native, {name: tensor for name, tensor in exact_inputs.items() if tensor is not None}
    )
    assert actual.keys() == peft.keys()
    for name in actual:
        assert_as_accurate(actual[name], peft[name], exact[name], name=name)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_is_as_accurate_as_peft(dtypes, p, device):
    assert_accurate(make_inputs(dtypes, device=device), p, autocast=dtypes[-1])


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"lead": ()}, id="one-vector"),
        pytest.param({"lead": (1,)}, id="one-row"),
        pytest.param({"lead": (2, 3, 5)}, id="four-dimensions"),
        pytest.param({"r": 1}, id="rank-1"),
        pytest.param({"r": 5}, id="rank-5"),
        pytest.param({"r": 100}, id="rank-above-n"),
        pytest.param({"k": 37}, id="odd-in-features"),
        pytest.param({"n": 1}, id="one-out-feature"),
        pytest.param({"bias": False}, id="no-bias"),
        pytest.param({"lead": (300,), "k": 4096}, id="mask-in-several-pieces"),
    ],
)
def test_any_shape_is_as_accurate_as_peft(shape, p):
    assert_accurate(make_inputs(**shape), p)


def test_zero_rows_give_empty_output_and_zero_gradients():
    inputs = make_inputs(lead=(2, 0))
    results = gradients(lambda **t: lora_linear(**t, scaling=1.0, dropout_p=0.1), inputs)
    assert results["y"].shape == (2, 0, N)
    assert results["dx"].shape == (2, 0, K)
    for name in ("lora_a", "lora_b", "bias"):
        assert torch.equal(results[f"d{name}"], torch.zeros_like(inputs[name]))


def test_strides_do_not_matter():
    inputs = make_inputs(lead=(6, 10))
    dy = output_gradient(torch.empty(6, 10, N))

    def run(x, dy, **tensors):
        return gradients(lambda **t: lora_linear(**t, scaling=SCALING), {"x": x, **tensors}, dy)

    x = inputs.pop("x")
    expected = run(x, dy, **inputs)
    strided = {
        "transposed x": (x.detach().transpose(0, 1).contiguous().transpose(0, 1), dy),
        "every second column of x": (x.detach().repeat_interleave(2, dim=-1)[..., ::2], dy),
        "transposed dy": (x.detach(), dy.transpose(0, 2).contiguous().transpose(0, 2)),
    }
    for name, (other_x, other_dy) in strided.items():
        results = run(other_x.requires_grad_(), other_dy, **inputs)
        for key, value in results.items():
            assert torch.equal(value, expected[key]), f"{name}: {key}"
    expanded = run(x, dy[:1, :1].expand_as(dy), **inputs)
    contiguous = run(x, dy[:1, :1].expand_as(dy).contiguous(), **inputs)
    for key, value in expanded.items():
        assert torch.equal(value, contiguous[key]), f"expanded dy: {key}"


def test_transposed_adapter_storage_is_read_by_its_strides():
    # peft ties an adapter of lm_head to the embedding's: its A and B are transposed views.
    inputs = make_inputs()
    for name in ("lora_a", "lora_b"):
        tied = inputs[name].detach().t().contiguous().t()
        assert tied.stride() != inputs[name].stride()
        inputs[name] = tied.requires_grad_()
    assert_accurate(inputs)


@pytest.mark.parametrize("dropout_mask", ["bits", "recompute"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_right_in_fp64(p, dropout_mask):
    inputs = make_inputs((FP64, FP64, FP64, None), lead=(2, 3), k=11, n=7, r=3)
    weight = inputs.pop("weight")
    names = list(inputs)

    def function(*tensors):
        return lora_linear(
            weight=weight,
            scaling=SCALING,
            dropout_p=p,
            seed=77,
            dropout_mask=dropout_mask,
            **dict(zip(names, tensors, strict=True)),
        )

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("wanted", ["x", "bias", "lora_a", "lora_b"])
def test_only_the_gradient_that_is_asked_for_is_computed(wanted, monkeypatch):
    from fastlora import ops

    calls = []
    for name in ("adapter_grads", "input_grad"):
        operator = getattr(ops.DIRECT, name)
        monkeypatch.setattr(
            ops.DIRECT,
            name,
            lambda *a, _op=operator, _name=name, **k: calls.append((_name, a, k)) or _op(*a, **k),
        )
    inputs = make_inputs()
    expected = gradients(lambda **t: lora_linear(**t, scaling=SCALING), inputs)
    calls.clear()
    alone = {
        name: tensor.detach().requires_grad_(name == wanted) for name, tensor in inputs.items()
    }
    results = gradients(lambda **t: lora_linear(**t, scaling=SCALING), alone)
    assert torch.equal(results[f"d{wanted}"], expected[f"d{wanted}"])
    expected_operators = {
        "x": ["adapter_grads", "input_grad"],
        "bias": [],
        "lora_a": ["adapter_grads"],
        "lora_b": ["adapter_grads"],
    }
    assert [name for name, *_ in calls] == expected_operators[wanted]
    if wanted != "bias":
        _, (_, x, h, *_), options = calls[0]
        assert options["need_dh"] == (wanted != "lora_b")
        assert (x is not None) == (wanted == "lora_a")
        assert (h is not None) == (wanted == "lora_b")


def test_trained_bias_gets_its_gradient_under_autocast():
    assert_accurate(make_inputs((FP32, FP32, FP32, BF16)), autocast=BF16)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_backward_is_the_same_inside_and_outside_of_autocast(inside):
    inputs = make_inputs()

    def backward(stay_inside):
        tensors = {n: t.detach().requires_grad_(t.requires_grad) for n, t in inputs.items()}
        with torch.autocast("cpu", dtype=BF16):
            y = lora_linear(**tensors, scaling=SCALING, dropout_p=0.1, seed=5)
            assert y.dtype == BF16
            if stay_inside:
                y.backward(output_gradient(y))
        if not stay_inside:
            y.backward(output_gradient(y))
        return {n: t.grad for n, t in tensors.items() if t.grad is not None}

    for name, grad in backward(inside).items():
        assert grad.dtype == FP32
        assert torch.equal(grad, backward(False)[name]), name


# -- dropout


def test_forward_backward_and_recompute_use_the_same_mask():
    inputs = make_inputs(lead=(300,), k=4096)  # several pieces

    def run(dropout_mask):
        return gradients(
            lambda **t: lora_linear(
                **t, scaling=SCALING, dropout_p=0.2, seed=8, dropout_mask=dropout_mask
            ),
            inputs,
        )

    bits, recomputed = run("bits"), run("recompute")
    for name in bits:
        assert torch.equal(bits[name], recomputed[name]), name


def test_dropped_inputs_get_no_gradient_through_the_adapter():
    inputs = make_inputs()
    inputs["weight"] = torch.zeros_like(inputs["weight"])
    results = gradients(lambda **t: lora_linear(**t, scaling=1.0, dropout_p=0.5, seed=4), inputs)
    keep = dropout.keep_mask(torch.tensor(4), M, K, 0.5)
    assert torch.equal(results["dx"] != 0, keep)


def test_masks_differ_between_calls_and_follow_manual_seed():
    inputs = make_inputs()

    def three_calls():
        torch.manual_seed(21)
        return [lora_linear(**inputs, scaling=SCALING, dropout_p=0.1) for _ in range(3)]

    first, again = three_calls(), three_calls()
    for one, same in zip(first, again, strict=True):
        assert torch.equal(one, same)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_mean_over_masks_is_the_output_without_dropout():
    inputs = {
        name: tensor.detach() for name, tensor in make_inputs(lead=(4,), k=24, n=6, r=4).items()
    }
    expected = lora_linear(**inputs, scaling=SCALING)
    draws = torch.stack(
        [lora_linear(**inputs, scaling=SCALING, dropout_p=0.3) for _ in range(4000)]
    )
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() < 5 * standard_error).all()


def test_p_zero_draws_nothing_from_the_generator():
    inputs = make_inputs()
    state = torch.get_rng_state()
    lora_linear(**inputs, scaling=SCALING)
    assert torch.equal(torch.get_rng_state(), state)
    lora_linear(**inputs, scaling=SCALING, dropout_p=0.1)
    assert not torch.equal(torch.get_rng_state(), state)


def test_result_is_the_same_without_gradients():
    inputs = make_inputs()
    with torch.no_grad():
        without = lora_linear(**inputs, scaling=SCALING, dropout_p=0.1, seed=1)
    assert not without.requires_grad
    assert torch.equal(without, lora_linear(**inputs, scaling=SCALING, dropout_p=0.1, seed=1))


@pytest.mark.parametrize("seed", [6, torch.tensor(6), torch.tensor([6])], ids=["int", "0-d", "1-d"])
def test_seed_may_be_a_number_or_a_tensor(seed):
    inputs = make_inputs()
    expected = lora_linear(**inputs, scaling=SCALING, dropout_p=0.1, seed=torch.tensor(6))
    assert torch.equal(lora_linear(**inputs, scaling=SCALING, dropout_p=0.1, seed=seed), expected)


# -- what is saved for the backward pass


def saved_tensors(function) -> list[Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


@pytest.mark.parametrize(
    ("options", "extra_bytes"),
    [
        pytest.param({}, 0, id="no-dropout"),
        pytest.param({"dropout_p": 0.1}, M * K // 8, id="bits"),
        pytest.param({"dropout_p": 0.1, "dropout_mask": "recompute"}, 8, id="recompute"),
    ],
)
def test_saves_x_and_h_and_one_bit_per_element(options, extra_bytes):
    inputs = make_inputs()
    tensors = saved_tensors(lambda: lora_linear(**inputs, scaling=SCALING, **options))
    own = {t.data_ptr() for name, t in inputs.items() if name != "x"}
    activations = [t for t in tensors if t.data_ptr() not in own]
    assert any(t.data_ptr() == inputs["x"].data_ptr() for t in activations)
    used = sum(t.untyped_storage().nbytes() for t in activations)
    assert used == inputs["x"].nbytes + M * R * 4 + extra_bytes


def test_autocast_saves_no_cast_copy():
    inputs = make_inputs()
    with torch.autocast("cpu", dtype=BF16):
        tensors = saved_tensors(lambda: lora_linear(**inputs, scaling=SCALING, dropout_p=0.1))
    own = {t.data_ptr() for t in inputs.values()}
    others = [t for t in tensors if t.data_ptr() not in own]
    assert sorted((t.dtype, t.shape[-1]) for t in others if t.dtype == BF16) == [(BF16, R)]
    assert sum(t.nbytes for t in others) == M * R * 2 + M * K // 8


def test_hooks_on_saved_tensors_see_everything_that_is_kept():
    """Offloading by hooks frees the activations: nothing else holds x, h or the mask."""
    inputs = make_inputs()
    expected = gradients(
        lambda **t: lora_linear(**t, scaling=SCALING, dropout_p=0.1, seed=2), inputs
    )
    parameters = {t.data_ptr() for name, t in inputs.items() if name != "x"}
    offloaded: list[weakref.ref[torch.UntypedStorage]] = []

    def offload(tensor):
        if tensor.data_ptr() not in parameters:
            offloaded.append(weakref.ref(tensor.untyped_storage()))
        return tensor.detach().clone()

    x = inputs["x"].detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(offload, lambda t: t):
        y = lora_linear(**{**inputs, "x": x * 1}, scaling=SCALING, dropout_p=0.1, seed=2)
    gc.collect()
    assert len(offloaded) == 3  # x, h and the bits
    assert all(storage() is None for storage in offloaded)
    y.backward(output_gradient(y))
    assert torch.equal(x.grad, expected["dx"])


def test_backward_may_run_twice():
    inputs = make_inputs()
    y = lora_linear(**inputs, scaling=SCALING, dropout_p=0.1)
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    first = torch.autograd.grad(y, wanted, output_gradient(y), retain_graph=True)
    second = torch.autograd.grad(y, wanted, output_gradient(y))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_output_may_be_changed_in_place():
    # An output that is a view made inside an autograd.Function refuses this.
    inputs = make_inputs(lead=(2, 3))
    y = lora_linear(**inputs, scaling=SCALING)
    y *= 2
    y.sum().backward()
    assert inputs["lora_b"].grad is not None


def test_second_derivative_is_refused():
    inputs = make_inputs()
    y = lora_linear(**inputs, scaling=SCALING)
    (dx,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    gradient_penalty = y.sum() + dx.square().sum()
    with pytest.raises(
        RuntimeError, match=r"lora_linear cannot be differentiated twice; call fastlora.unpatch"
    ):
        gradient_penalty.backward()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_not_a_number_is_never_hidden(value):
    inputs = {name: tensor.detach() for name, tensor in make_inputs().items()}
    inputs["x"][3, 5] = value
    y = lora_linear(**inputs, scaling=SCALING, dropout_p=0.5, seed=1)
    assert not torch.isfinite(y[3]).any()
    assert torch.isfinite(y[4:]).all()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dropout_mask", ["bits", "recompute"])
def test_compiles_without_a_graph_break(dropout_mask, autocast):
    inputs = make_inputs()

    def function(**tensors):
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            return lora_linear(
                **tensors, scaling=SCALING, dropout_p=0.1, seed=3, dropout_mask=dropout_mask
            )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = gradients(function, inputs)
    for name, value in gradients(compiled, inputs).items():
        assert torch.equal(value, eager[name]), name


# -- what is refused


def changed(**replaced):
    return {**make_inputs(lead=(4,)), "scaling": SCALING, **replaced}


REFUSED = [
    pytest.param(
        lambda: changed(x=torch.zeros(4, K + 1)), ValueError, ["(4, 81)", "(56, 80)"], id="x"
    ),
    pytest.param(lambda: changed(x=torch.zeros(())), ValueError, ["()", "(56, 80)"], id="x-0-d"),
    pytest.param(
        lambda: changed(lora_a=torch.zeros(R, 79)), ValueError, ["(16, 79)", "(56, 80)"], id="a"
    ),
    pytest.param(
        lambda: changed(lora_b=torch.zeros(55, R)), ValueError, ["(55, 16)", "(56, 80)"], id="b"
    ),
    pytest.param(
        lambda: changed(lora_b=torch.zeros(N, 8)), ValueError, ["(56, 8)", "(16, 80)"], id="rank"
    ),
    pytest.param(
        lambda: changed(lora_a=torch.zeros(0, K), lora_b=torch.zeros(N, 0)),
        ValueError,
        ["rank is 0", "(0, 80)"],
        id="rank-0",
    ),
    pytest.param(
        lambda: changed(bias=torch.zeros(55)), ValueError, ["(55,)", "(56, 80)"], id="bias"
    ),
    pytest.param(
        lambda: changed(weight=torch.zeros(N)), ValueError, ["weight", "(56,)"], id="weight-1-d"
    ),
    pytest.param(
        lambda: changed(x=torch.zeros(4, K, dtype=BF16)),
        ValueError,
        ["bfloat16", "float32"],
        id="x-dtype",
    ),
    pytest.param(
        lambda: changed(lora_b=torch.zeros(N, R, dtype=FP16)),
        ValueError,
        ["float32", "float16"],
        id="b-dtype",
    ),
    pytest.param(
        lambda: changed(bias=torch.zeros(N, dtype=FP16)),
        ValueError,
        ["float32", "float16"],
        id="bias-dtype",
    ),
    pytest.param(
        lambda: changed(x=torch.zeros(4, K, dtype=torch.int32)), ValueError, ["int32"], id="int"
    ),
    pytest.param(
        lambda: changed(lora_a=torch.zeros(R, K, device="meta")),
        ValueError,
        ["meta", "cpu"],
        id="device",
    ),
    pytest.param(lambda: changed(dropout_p=1.0), ValueError, ["[0, 1)", "1.0"], id="p-1"),
    pytest.param(lambda: changed(dropout_p=-0.1), ValueError, ["[0, 1)", "-0.1"], id="p-negative"),
    pytest.param(
        lambda: changed(dropout_p=float("nan")), ValueError, ["[0, 1)", "nan"], id="p-nan"
    ),
    pytest.param(
        lambda: changed(weight=torch.zeros(N, K, requires_grad=True)),
        ValueError,
        ["weight requires a gradient"],
        id="trained-weight",
    ),
    pytest.param(
        lambda: changed(dropout_mask="bytes"), ValueError, ["bits", "bytes"], id="dropout-mask"
    ),
    pytest.param(
        lambda: changed(scaling=torch.tensor(2.0)), TypeError, ["scaling"], id="tensor-scaling"
    ),
    pytest.param(lambda: changed(scaling="2"), TypeError, ["scaling", "'2'"], id="text-scaling"),
    pytest.param(lambda: changed(dropout_p="0.1"), TypeError, ["dropout_p", "'0.1'"], id="text-p"),
    pytest.param(lambda: changed(seed=1.5), TypeError, ["seed", "1.5"], id="seed-float"),
    pytest.param(
        lambda: changed(weight=torch.zeros(N, 0)),
        ValueError,
        ["no elements", "(56, 0)"],
        id="no-elements",
    ),
    pytest.param(lambda: changed(seed=-1), ValueError, ["-1"], id="seed-negative"),
    pytest.param(lambda: changed(seed=1 << 63), ValueError, [str(1 << 63)], id="seed-large"),
    pytest.param(
        lambda: changed(seed=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        ["(2,)"],
        id="seed-shape",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED)
def test_bad_arguments_are_refused_with_both_values(arguments, error, words):
    with pytest.raises(error) as raised:
        lora_linear(**arguments())
    for word in words:
        assert word in str(raised.value)


def test_fp64_is_refused_under_autocast():
    with (
        torch.autocast("cpu", dtype=BF16),
        pytest.raises(ValueError, match=r"autocast leaves fp64 alone, but weight is torch.float64"),
    ):
        lora_linear(**changed(weight=torch.zeros(N, K, dtype=FP64)))
