"""``adapter_names=`` on a patched model: peft's results and errors, in one batch of products."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from test_peft_features import IN, ROWS, inputs, linears, peft_net
from tiny_models import tiny_peft, token_ids
from torch import Tensor, nn
from whole_models import lora_config

import fastlora
from fastlora import mixed

NAMES = ["default", "__base__", "other", "other", "default"] * (ROWS // 5)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers that were computed here, not by peft."""
    seen: list[nn.Module] = []
    forward = mixed.forward

    def counted(layer: nn.Module, *args: object) -> Tensor:
        seen.append(layer)
        return forward(layer, *args)

    monkeypatch.setattr(mixed, "forward", counted)
    return seen


def two_adapters(**lora: object) -> PeftModel:
    model = peft_net(**lora)
    torch.manual_seed(5)
    config = lora_config(["second"], r=7, lora_alpha=3, init_lora_weights=False)
    model.add_adapter("other", config)
    return model.eval()


def pair(model: PeftModel, change: Callable[[PeftModel], object] | None = None) -> list[PeftModel]:
    """Return the model patched, and its unpatched twin."""
    plain = copy.deepcopy(model)
    fastlora.patch(model)
    for each in (model, plain):
        if change is not None:
            change(each)
    return [model, plain]


def outputs(models: list[PeftModel], x: Tensor, names: list[str]) -> list[Tensor]:
    with torch.no_grad():
        return [model(x, adapter_names=names) for model in models]


def assert_close_to_peft(models: list[PeftModel], names: list[str] = NAMES) -> None:
    ours, theirs = outputs(models, inputs(), names)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [NAMES, ["default"] * ROWS, ["__base__"] * ROWS])
def test_a_mixed_batch_is_computed_here_and_explained_as_fused(batches, names):
    models = pair(two_adapters())
    assert_close_to_peft(models, names)
    assert len(batches) == len(linears(models[0])) == 2
    assert "peft" not in fastlora.explain(models[0]).partition(";")[2]


def test_generates_the_same_tokens_as_peft(batches):
    models = []
    for _ in range(2):
        model = tiny_peft().eval()
        torch.manual_seed(5)
        model.add_adapter("second", lora_config("all-linear", r=3, init_lora_weights=False))
        models.append(model)
    fastlora.patch(models[0])
    prompts, names = token_ids(rows=5), ["default", "second", "__base__", "default", "second"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    ours, theirs = (
        model.generate(input_ids=prompts, attention_mask=mask, adapter_names=names, **options)
        for model in models
    )
    assert torch.equal(ours, theirs)
    assert len(batches) == 6 * len(linears(models[0]))
    # Beams repeat the names.
    beams = {**options, "num_beams": 2}
    ours, theirs = (
        model.generate(input_ids=prompts, attention_mask=mask, adapter_names=names, **beams)
        for model in models
    )
    assert torch.equal(ours, theirs)


def test_a_packed_batch_names_an_adapter_for_each_token(batches):
    model, plain = pair(two_adapters())
    x = inputs().unsqueeze(0)
    (packed,) = outputs([model], x, NAMES)
    (rows,) = outputs([plain], inputs(), NAMES)
    torch.testing.assert_close(packed, rows.unsqueeze(0), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        plain(x, adapter_names=NAMES)
    assert len(batches) == 2
    # Also where a layer is left to peft.
    linears(model)[0].lora_A["default"].register_forward_hook(lambda *_: None)
    (packed,) = outputs([model], x, NAMES)
    torch.testing.assert_close(packed, rows.unsqueeze(0), rtol=1e-5, atol=1e-5)
    assert len(batches) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_on_a_half_precision_base_multiply_in_fp32(batches, dtype):
    model = two_adapters().to(dtype)
    for layer in linears(model):
        for module in (layer.lora_A, layer.lora_B):
            module.float()
    models = pair(model)
    x = inputs(dtype=dtype)
    ours, theirs = outputs(models, x, NAMES)
    exact = outputs([copy.deepcopy(models[1]).double()], x.double(), NAMES)[0]
    errors = [(y.double() - exact).norm() / exact.norm() for y in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1] + torch.finfo(dtype).eps
    assert len(batches) == 2


CHANGES = {
    "weights trained in place": lambda m: [
        layer.lora_B["default"].weight.data.mul_(-2) for layer in linears(m)
    ],
    "weights trained by an optimizer": lambda m: [
        torch.optim.SGD([_with_grad(layer.lora_A["default"].weight)], lr=1).step()
        for layer in linears(m)
    ],
    "data replaced": lambda m: [
        setattr(layer.lora_B["default"].weight, "data", layer.lora_A["default"].weight.new_ones(
            layer.lora_B["default"].weight.shape)) for layer in linears(m)
    ],
    "parameter replaced": lambda m: [
        setattr(layer.lora_A["default"], "weight", nn.Parameter(-layer.lora_A["default"].weight))
        for layer in linears(m)
    ],
    "scaling set": lambda m: [layer.set_scale("default", 3.0) for layer in linears(m)],
    "adapter deleted": lambda m: m.delete_adapter("other"),
    "adapter added where it was missing": lambda m: m.add_adapter(
        "third", lora_config(["first", "second"], r=2)
    ),
    "moved to another dtype": lambda m: m.double().float(),
}  # fmt: skip


# All but the last three, which leave the adapter of these rows as it is.
MATTER = list(CHANGES.values())[:-3]


def _with_grad(weight: Tensor) -> Tensor:
    weight.grad = torch.ones_like(weight)
    return weight


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_two_calls_is_seen(batches, change):
    models = pair(two_adapters())
    names = ["default", "__base__", "default", "__base__", "default"] * (ROWS // 5)
    assert_close_to_peft(models, names)
    before = outputs(models[:1], inputs(), names)[0]
    for model in models:
        torch.manual_seed(9)
        change(model)
    fastlora.patch(models[0])
    assert_close_to_peft(models, names)
    if change in MATTER:
        assert not torch.allclose(before, outputs(models[:1], inputs(), names)[0])


def hook(model: PeftModel) -> None:
    for layer in linears(model):
        layer.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)


def train_dropout(model: PeftModel) -> None:
    for layer in linears(model):
        layer.lora_dropout["default"].train()


def bias(model: PeftModel) -> None:
    for layer in linears(model):
        layer.lora_B["default"].bias = nn.Parameter(torch.ones(layer.out_features))


LEFT = {
    "hooks on lora_A": (hook, {}, "has hooks"),
    "dropout while training": (train_dropout, {"lora_dropout": 0.5}, "dropout while the layer"),
    "bias": (bias, {}, "has a bias"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "lora", "reason"), LEFT.values(), ids=LEFT)
def test_other_adapters_are_left_to_peft(batches, change, lora, reason):
    models = pair(two_adapters(**lora), change)
    names = ["default"] * ROWS
    results = []
    for model in models:
        torch.manual_seed(3)
        results += outputs([model], inputs(), names)
    assert torch.equal(*results)
    assert not batches
    assert reason in fastlora.explain(models[0])


def test_adapters_of_two_dtypes_are_left_to_peft(batches):
    def widen(model: PeftModel) -> None:
        for module in (
            layer.lora_A["other"] for layer in linears(model) if "other" in layer.lora_A
        ):
            module.double()

    for model in pair(two_adapters(), widen):
        with pytest.raises(RuntimeError, match="dtype"):  # peft multiplies A and B of two dtypes
            outputs([model], inputs(), NAMES)
    assert len(batches) == 1  # the first linear has one of them alone


def test_gradients_autocast_and_compile_are_left_to_peft(batches):
    models = pair(two_adapters())
    grads = []
    for model in models:
        x = inputs().requires_grad_()
        model(x, adapter_names=NAMES).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*outputs(models, inputs(), NAMES))
    assert not batches
    assert "adapter_names= are not fused under autocast" in fastlora.explain(models[0])
    compiled = torch.compile(models[0], backend="eager")
    ours, theirs = (outputs([m], inputs(), NAMES)[0] for m in (compiled, models[1]))
    torch.testing.assert_close(ours, theirs)


def test_copies_and_inference_mode(batches):
    models = pair(two_adapters())
    assert_close_to_peft(models)
    copied = copy.deepcopy(models[0])
    for layer in linears(copied):
        layer.lora_B["default"].weight.data.zero_()
    assert_close_to_peft(models)  # the copy has adapters of its own
    assert not torch.allclose(*outputs([models[0], copied], inputs(), NAMES))
    with torch.inference_mode():
        made = two_adapters()
        fastlora.patch(made)
        first = made(inputs(), adapter_names=NAMES)
        for layer in linears(made):
            layer.lora_B["default"].weight.mul_(5)
        second = made(inputs(), adapter_names=NAMES)
    assert not torch.allclose(first, second)


def test_inputs_of_more_dimensions_have_names_for_their_first(batches):
    models = pair(two_adapters())
    x = inputs(4, 3, 5, IN)
    names = ["other", "default", "__base__", "default"]
    ours, theirs = outputs(models, x, names)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(batches) == 2
