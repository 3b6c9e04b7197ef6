"""Every feature of peft's LoRA layers, part 1: what an adapter can be.

One test for each row of the table of peft's features; the docstring says which row. Each checks
the path taken, the result against peft without fastlora, and the reason that ``fastlora.explain``
gives. Part 2 is how an adapter is made, switched and called (test_peft_features_calls), part 3 what
it sits on (test_peft_features_layers), part 4 the models around it (test_peft_features_models, with
a count of the tests). All use the helpers of this file.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path

import peft
import peft.helpers
import pytest
import torch
from accuracy import assert_layer_as_accurate, output_gradient
from conftest import Spy
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_configs
from peft.tuners.lora import variants
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tiny_models import tiny_peft, token_ids
from torch import Tensor, nn

import fastlora
from fastlora import dropout

IN, HIDDEN, OUT = 62, 94, 70
ROWS = 130  # enough that the rounding errors of two orders of summation average out
TARGETS = ["first", "second"]
Change = Callable[[nn.Module], object]


class Net(nn.Module):
    """Two linear layers of odd sizes: 62 -> 94 -> 70."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(IN, HIDDEN, bias=bias)
        self.second = nn.Linear(HIDDEN, OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def peft_net(base: nn.Module | None = None, **lora: object) -> PeftModel:
    """Put an adapter that is not a no-op on both layers of a ``Net``."""
    return tiny_peft(model=Net() if base is None else base, **{"target_modules": TARGETS, **lora})


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(shape or (ROWS, IN), generator=generator).to(dtype)


def tokens() -> Tensor:
    """Return 512 tokens for whole models: as with ROWS, fewer would leave the outcome to chance."""
    return token_ids(16, 32)


def linears(model: nn.Module) -> list[PeftLinear]:
    """The LoRA linears of a model, patched or not."""
    return [m for m in model.modules() if isinstance(m, PeftLinear)]


def twins(model: nn.Module, change: Change | None = None) -> tuple[nn.Module, nn.Module]:
    """Patch ``model``; return it and an unpatched copy. ``change`` is done to both afterwards."""
    plain = copy.deepcopy(model)
    fastlora.patch(model)
    if change is not None:
        change(model)
        change(plain)
    return model, plain


def run(model: nn.Module, x: Tensor, **kwargs: object) -> dict[str, Tensor]:
    """Return the output and every gradient, always from the same random state."""
    torch.manual_seed(3)
    x = x.detach().clone()
    if x.is_floating_point():
        x.requires_grad_()
    model.zero_grad(set_to_none=True)
    y = model(x, **kwargs)
    y = getattr(y, "logits", y)
    y.backward(output_gradient(y))
    named = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **named, **({} if x.grad is None else {"dx": x.grad})}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def assert_fused(
    spy: Spy, fused: nn.Module, plain: nn.Module, x: Tensor | None = None, **kwargs: object
) -> None:
    """Every LoRA linear ran fused once, as accurately as peft, and nothing is said to fall back."""
    count = len(linears(fused))
    spy.reset()
    assert_layer_as_accurate(fused, plain, inputs() if x is None else x, **kwargs)
    assert (spy.fused, spy.peft) == (count, 0)
    explained = fastlora.explain(fused)
    assert re.match(rf"fused {count} of {count} LoRA linears( in \d+ groups)?; 0 fall", explained)
    assert "went to peft" not in explained


def assert_falls_back(
    spy: Spy,
    fused: nn.Module,
    plain: nn.Module,
    reason: str,
    x: Tensor | None = None,
    *,
    still_fused: int = 0,
    **kwargs: object,
) -> None:
    """Peft's own forward ran in every LoRA linear, bit for bit, and ``explain`` says why.

    ``still_fused`` layers took the other path; their result is compared by accuracy.
    """
    x = inputs() if x is None else x
    spy.reset()
    actual = run(fused, x, **kwargs)
    assert spy.fused == still_fused
    assert spy.peft == len(linears(fused)) - still_fused > 0
    assert reason in fastlora.explain(fused)
    if still_fused:
        assert_layer_as_accurate(fused, plain, x, **kwargs)
    else:
        assert_equal(actual, run(plain, x, **kwargs))


def assert_same_error(fused: nn.Module, plain: nn.Module, x: Tensor, **kwargs: object) -> None:
    """Both raise, the same exception with the same words."""
    messages = []
    for model in (fused, plain):
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as caught:
            model(x, **kwargs)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


def add_second_adapter(model: PeftModel, **lora: object) -> None:
    settings = {"r": 3, "target_modules": TARGETS, "init_lora_weights": False, **lora}
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(**settings))


def nudge(model: nn.Module) -> None:
    """Move every adapter weight as training would, away from zeros and exact inverses."""
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def assert_left_alone(
    fused: nn.Module, plain: nn.Module, classes: dict[str, type], x: Tensor
) -> None:
    """The layers kept their class, compute what they did, and the report lists them."""
    report = fastlora.patch(fused)
    for name, cls in classes.items():
        assert type(fused.get_submodule(name)) is type(plain.get_submodule(name)) is cls
        assert report.untouched[name] == f"{cls.__name__} is not peft's plain LoRA Linear"
    assert f"left alone: {cls.__name__} is not peft's plain LoRA Linear" in fastlora.explain(fused)
    assert report.untouched.keys() == classes.keys()
    assert_equal(run(fused, x), run(plain, x))


class QuantizedLinear(nn.Module):
    """What a quantized linear looks like to peft: sizes, an integer weight, a forward."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        self.register_buffer("qweight", torch.randint(-8, 8, shape, dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 8, self.bias)


def test_plain_adapter_is_fused(spy: Spy) -> None:
    """Row: plain, one active adapter."""
    fused, plain = twins(peft_net())
    assert_fused(spy, fused, plain)

    # An active adapter that this layer does not have does not count, in a list or in a tuple.
    def activate(model: PeftModel) -> None:
        add_second_adapter(model, target_modules=["second"])
        model.base_model.set_adapter(["default", "other"])
        linears(model)[1].set_adapter(["other"])

    for model in (fused, plain):
        activate(model)
    assert linears(fused)[0].active_adapters == ["default", "other"]
    assert_fused(spy, fused, plain)


def test_layer_without_an_active_adapter_falls_back(spy: Spy) -> None:
    """Row: no active adapter here (other adapter targets it)."""

    def activate_other(model: PeftModel) -> None:
        add_second_adapter(model, target_modules=["second"])
        model.set_adapter("other")

    fused, plain = twins(peft_net(), activate_other)
    reason = "falls back to peft: none of its adapters is active (base_model.model.first)"
    assert_falls_back(spy, fused, plain, reason, still_fused=1)
    assert_falls_back(
        spy, linears(fused)[0], linears(plain)[0], "none of its adapters is active", inputs()
    )


def activate_both(model: PeftModel, **lora: object) -> None:
    add_second_adapter(model, **lora)
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    "second",
    [
        pytest.param({}, id="alike"),
        pytest.param({"r": 7, "lora_alpha": 3}, id="other-rank-and-scaling"),
        pytest.param({"lora_bias": True}, id="one-with-a-bias"),
    ],
)
def test_several_active_adapters_are_stacked(spy: Spy, second: dict[str, object]) -> None:
    """Row: several active adapters (base_model.set_adapter([a, b]))."""
    fused, plain = twins(peft_net(), lambda model: activate_both(model, **second))
    assert_fused(spy, fused, plain)
    # One may be frozen: it takes part, and gets no gradient.
    for model in (fused, plain):
        for layer in linears(model):
            layer.lora_A["default"].requires_grad_(False)
            layer.lora_B["default"].requires_grad_(False)
    assert_fused(spy, fused, plain)
    assert not [n for n, p in fused.named_parameters() if "default" in n and p.grad is not None]

    # A mask for each of them: not in one operation.
    for model in (fused, plain):
        for layer in linears(model):
            layer.lora_dropout["other"] = nn.Dropout(0.5)
        model.train()
    spy.reset()
    fused(inputs())
    assert (spy.fused, spy.peft) == (0, 2)
    assert "2 adapters with dropout are active at once: default, other" in fastlora.explain(fused)
    assert_fused(spy, fused.eval(), plain.eval())

    # peft casts the input from one dtype to the next, in the order of the adapters.
    for model in (fused, plain):
        for layer in linears(model):
            layer.lora_A["other"].double()
            layer.lora_B["other"].double()
    reason = "2 adapters of different dtypes are active at once: default is torch.float32, other is"
    assert_falls_back(spy, fused, plain, reason)


class FixedMask(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, keep: Tensor, p: float) -> None:
        super().__init__()
        self.register_buffer("factor", keep * dropout.inverse_keep_probability(p))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("dropout_mask", ["bits", "recompute"])
def test_dropout_is_fused_with_its_own_mask(spy: Spy, dropout_mask: str) -> None:
    """Row: lora_dropout."""
    model = peft_net(lora_dropout=0.25, target_modules=["first"])
    plain = copy.deepcopy(model)
    fastlora.patch(model, dropout_mask=dropout_mask)
    torch.manual_seed(7)
    keep = dropout.keep_mask(dropout.draw_seed(torch.device("cpu")), ROWS, IN, 0.25)
    assert 0 < keep.sum() < keep.numel()
    linears(plain)[0].lora_dropout["default"] = FixedMask(keep, 0.25)
    torch.manual_seed(7)
    assert_fused(spy, model, plain)

    without, plain_without = twins(peft_net(lora_dropout=0.0))
    assert_fused(spy, without, plain_without)


def test_dropout_follows_its_own_training_flag(spy: Spy) -> None:
    """Row: dropout.training."""

    def dropout_alone_in_eval(model: nn.Module) -> None:
        model.train()
        for layer in linears(model):
            layer.lora_dropout.eval()

    fused, plain = twins(peft_net(lora_dropout=0.5), dropout_alone_in_eval)
    assert_fused(spy, fused, plain)
    dropped = copy.deepcopy(fused)
    dropped.eval()
    linears(dropped)[0].lora_dropout.train()
    spy.reset()
    assert not torch.equal(dropped(inputs()), dropped(inputs()))
    assert (spy.fused, spy.peft) == (4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_base_bias_is_fused(spy: Spy, bias: bool, dtype: torch.dtype) -> None:
    """Row: base bias."""
    base = Net(bias=bias)
    if bias:
        base.first.bias.data *= 30  # large enough that a missing or misplaced rounding shows
    fused, plain = twins(peft_net(base.to(dtype)))
    assert (linears(fused)[0].base_layer.bias is not None) == bias
    assert_fused(spy, fused, plain, inputs(dtype=dtype))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_base_bias_gets_its_gradient(spy: Spy, bias: str) -> None:
    """Row: bias="all"/"lora_only"."""
    fused, plain = twins(peft_net(bias=bias))
    assert_fused(spy, fused, plain)
    assert all(layer.base_layer.bias.grad.abs().sum() > 0 for layer in linears(fused))


def test_trained_base_weight_falls_back(spy: Spy) -> None:
    """Row: base weight requires_grad."""

    def train_base_weights(model: nn.Module) -> None:
        for layer in linears(model):
            layer.base_layer.weight.requires_grad_()

    fused, plain = twins(peft_net(), train_base_weights)
    reason = "falls back to peft: the base weight is trained (requires_grad)"
    assert_falls_back(spy, fused, plain, reason)
    assert all(layer.base_layer.weight.grad is not None for layer in linears(fused))


def test_bias_of_the_adapter_is_fused(spy: Spy) -> None:
    """Row: lora_bias=True."""
    fused, plain = twins(peft_net(lora_bias=True))
    for model in (fused, plain):
        for layer in linears(model):
            torch.manual_seed(6)
            nn.init.normal_(layer.lora_B["default"].bias)
    assert_fused(spy, fused, plain)
    assert all(layer.lora_B["default"].bias.grad is not None for layer in linears(fused))


@pytest.mark.parametrize(
    ("settings", "ranks", "scalings"),
    [
        pytest.param({"use_rslora": True}, [4, 4], [4.0, 4.0], id="rslora"),
        pytest.param({"rank_pattern": {"first": 3}}, [3, 4], [8 / 3, 2.0], id="rank_pattern"),
        pytest.param({"alpha_pattern": {"second": 5}}, [4, 4], [2.0, 1.25], id="alpha_pattern"),
    ],
)
def test_rslora_rank_pattern_and_alpha_pattern_are_fused(
    spy: Spy, settings: dict[str, object], ranks: list[int], scalings: list[float]
) -> None:
    """Row: rsLoRA, rank_pattern, alpha_pattern."""
    fused, plain = twins(peft_net(**settings))
    assert [layer.r["default"] for layer in linears(fused)] == ranks
    assert [layer.scaling["default"] for layer in linears(fused)] == scalings
    assert_fused(spy, fused, plain)


def _assign_scaling(model: nn.Module) -> None:
    linears(model)[0].scaling["default"] = -3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: [x.set_scale("default", 3.0) for x in linears(m)], id="set_scale"),
        pytest.param(lambda m: [x.scale_layer(3.0) for x in linears(m)], id="scale_layer"),
        pytest.param(lambda m: [x.unscale_layer(4.0) for x in linears(m)], id="unscale_layer"),
        pytest.param(
            lambda m: peft.helpers.rescale_adapter_scale(m, 0.5), id="rescale_adapter_scale"
        ),
        pytest.param(_assign_scaling, id="assigned"),
    ],
)
def test_every_change_of_the_scaling_is_followed(spy: Spy, change: Change) -> None:
    """Row: set_scale / scale_layer / rescale_adapter_scale / set `scaling[a]=`."""
    fused, plain = twins(peft_net())
    before = fused(inputs())
    with contextlib.ExitStack() as stack:
        for model in (fused, plain):
            result = change(model)
            if isinstance(result, contextlib.AbstractContextManager):
                stack.enter_context(result)
        assert_fused(spy, fused, plain)
        assert not torch.allclose(fused(inputs()), before)
    assert_fused(spy, fused, plain)


def test_compiled_hotswap_falls_back(spy: Spy) -> None:
    """Row: compiled hotswap."""

    def prepare(model: PeftModel) -> None:
        prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)

    fused, plain = twins(peft_net(), prepare)
    assert linears(fused)[0].lora_A["default"].weight.shape == (8, IN)
    reason = "falls back to peft: scaling is a Tensor, not a number (compiled hotswap)"
    assert_falls_back(spy, fused, plain, reason)


@pytest.mark.parametrize("rank", [4, 6], ids=["same-rank", "larger-rank"])
def test_hotswapped_adapter_is_fused(spy: Spy, tmp_path: Path, rank: int) -> None:
    """Row: hotswap_adapter (eager)."""
    saved = peft_net(r=rank, lora_alpha=3)
    nudge(saved)
    saved.save_pretrained(tmp_path)
    fused, plain = twins(peft_net())
    # As for inference: where no graph holds the weights, peft swaps whole tensors.
    with torch.no_grad():
        before = fused(inputs())
    for model in (fused, plain):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(
        linears(fused)[0].lora_A["default"].weight, linears(saved)[0].lora_A["default"].weight
    )
    assert_fused(spy, fused, plain)
    assert not torch.allclose(fused(inputs()), before)


def variant(name: str, cls: str, settings: Callable[[], dict[str, object]]) -> object:
    missing = not hasattr(variants, cls)
    reason = f"peft {peft.__version__} has no {name}"
    return pytest.param(cls, settings, id=name, marks=pytest.mark.skipif(missing, reason=reason))


def _bd_lora() -> dict[str, object]:
    # A of one layer and B of the other are block-diagonal.
    config = lora_configs.BdLoraConfig(
        target_modules_bd_a=["second"], target_modules_bd_b=["first"], nblocks=2
    )
    return {"use_bdlora": config}


def _arrow() -> dict[str, object]:
    config = lora_configs.ArrowConfig(top_k=1, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = ["default", "other"], []
    return {"arrow_config": config}


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        variant("aLoRA", "ALoraLinearVariant", lambda: {"alora_invocation_tokens": [1]}),
        variant("Arrow", "ArrowLinearVariant", _arrow),
        variant("BD-LoRA", "BdLoraLinearVariant", _bd_lora),
        variant(
            "VeLoRA",
            "VeloraLinearVariant",
            lambda: {"velora_config": lora_configs.VeloraConfig(num_groups=2)},
        ),
        variant(
            "MonteCLoRA",
            "MontecloraLinearVariant",
            lambda: {"monteclora_config": lora_configs.MontecloraConfig(buffer_size=2)},
        ),
        variant("KaSA", "KasaLinearVariant", lambda: {"kasa_config": lora_configs.KasaConfig()}),
    ],
)
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported for CAUSAL_LM")
def test_other_variants_fall_back(
    spy: Spy, cls: str, settings: Callable[[], dict[str, object]]
) -> None:
    """Row: aLoRA, Arrow, BD-LoRA, VeLoRA, MonteCLoRA, KaSA."""
    lora = settings()
    if "arrow_config" in lora:  # routes between the plain adapters that are already there
        model = peft_net()
        add_second_adapter(model, r=4)
        model.add_adapter("arrow_router", LoraConfig(r=4, target_modules=TARGETS, **lora))
        model.set_adapter("arrow_router")
    else:
        model = peft_net(**lora)
    fused, plain = twins(model)
    reason = f"the adapter is a LoRA variant: {cls}"
    assert reason in fastlora.explain(fused)
    # Layer by layer: aLoRA's offsets are positions in a sequence, which the model has no tokens of.
    kwargs = {"alora_offsets": [2, None, 4]} if cls == "ALoraLinearVariant" else {}
    for fused_layer, plain_layer in zip(linears(fused), linears(plain), strict=True):
        x = inputs(3, 5, fused_layer.in_features)
        assert_falls_back(spy, fused_layer, plain_layer, reason, x, **kwargs)


def to_half_base(model: PeftModel) -> PeftModel:
    for layer in linears(model):
        layer.base_layer.bfloat16()
    return model


def test_dora_is_fused(spy: Spy) -> None:
    """Row: DoRA."""
    fused, plain = twins(peft_net(use_dora=True, lora_dropout=0.25))
    for model in (fused, plain):
        nudge(model)
        for layer in linears(model):
            layer.lora_magnitude_vector["default"].weight.data *= 1.5
    assert_fused(spy, fused.eval(), plain.eval())
    magnitudes = [n for n, p in fused.named_parameters() if "magnitude" in n and p.grad is not None]
    assert len(magnitudes) == 2

    # With dropout peft drops the input of the frozen product as well.
    spy.reset()
    fused.train()(inputs())
    assert (spy.fused, spy.peft) == (0, 2)
    assert "last call went to peft: DoRA with dropout" in fastlora.explain(fused)

    # The gradient is scaled in the base's dtype: not enough for wider adapters.
    fused, plain = twins(peft_net(use_dora=True), lambda model: to_half_base(model).eval())
    reason = "DoRA in torch.float32 on a base in torch.bfloat16, without autocast"
    assert_falls_back(spy, fused, plain, reason, inputs().bfloat16())

    def activate_other(model: PeftModel) -> None:
        activate_both(model)
        model.eval()

    fused, plain = twins(peft_net(use_dora=True), activate_other)
    reason = "DoRA is active beside other adapters: default, other"
    assert_falls_back(spy, fused, plain, reason)


@pytest.mark.skipif(
    not hasattr(variants, "MiCALinearVariant"), reason=f"peft {peft.__version__} has no MiCA"
)
def test_mica_falls_back(spy: Spy) -> None:
    """Row: MiCA."""
    model = peft_net(init_lora_weights="mica")
    nudge(model)
    fused, plain = twins(model)
    reason = "falls back to peft: the adapter is a LoRA variant: MiCALinearVariant"
    assert_falls_back(spy, fused, plain, reason)
    assert all(layer.lora_B["default"].weight.grad is None for layer in linears(fused))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_qalora_layer_is_left_alone() -> None:
    """Row: Q-aLoRA (`use_qalora`)."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config = LoraConfig(
        r=4,
        target_modules=["0"],
        use_qalora=True,
        qalora_group_size=2,
        init_lora_weights=False,
    )
    config._register_custom_module({QuantizedLinear: GPTQLoraLinear})
    fused, plain = twins(get_peft_model(nn.Sequential(QuantizedLinear(IN, OUT)), config))
    layer = fused.base_model.model[0]
    assert type(layer.lora_variant["default"]).__name__ == "QALoraLinearVariant"
    assert_left_alone(fused, plain, {"base_model.model.0": GPTQLoraLinear}, inputs())
