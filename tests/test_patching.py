"""patch, unpatch and explain: containers, reports, strictness, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from accuracy import assert_layer_as_accurate
from conftest import Spy
from packaging.version import Version
from peft import (
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as PeftLinear
from tiny_models import VOCABULARY, tiny_model, tiny_peft
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from whole_models import (
    ATTENTION,
    LINEARS,
    assert_fused_like_peft,
    assert_same,
    layers_of_type,
    logits_of,
    lora_config,
    loss_and_gradients,
    patched_twin,
    snapshot,
    tensor_ids,
)

import fastlora
from fastlora.functional import DROPOUT_MASKS
from fastlora.layers import LoRALinear
from fastlora.patching import PatchReport


class Holder(nn.Module):
    """A module of somebody else around a peft model, such as one with a value head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).logits


def plain_module() -> nn.Module:
    """Build a language model without transformers."""
    torch.manual_seed(0)
    linears = (nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, VOCABULARY))
    return nn.Sequential(nn.Embedding(VOCABULARY, 32), *linears)


def transformers_model() -> nn.Module:
    model = tiny_model()
    model.add_adapter(lora_config(ATTENTION))
    return model


needs_transformers_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"model.add_adapter of this transformers refuses peft < {MIN_PEFT_VERSION}",
)

# Container: (LoRA linears, build it, add an adapter named "later" with more targets).
CONTAINERS: dict[str, tuple[int, Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "PeftModel": (
        8,
        lambda: get_peft_model(tiny_model(), lora_config(ATTENTION)),
        lambda model: model.add_adapter("later", lora_config()),
    ),
    "Holder": (
        8,
        lambda: Holder(get_peft_model(tiny_model(), lora_config(ATTENTION))),
        lambda model: model.inner.add_adapter("later", lora_config()),
    ),
    "PeftMixedModel": (
        8,
        lambda: get_peft_model(tiny_model(), lora_config(ATTENTION), mixed=True),
        lambda model: model.add_adapter("later", lora_config([*ATTENTION, "up_proj"])),
    ),
    "Qwen2ForCausalLM": (
        8,
        transformers_model,
        lambda model: model.add_adapter(lora_config([*ATTENTION, "up_proj"]), "later"),
    ),
    "Sequential": (
        1,
        lambda: inject_adapter_in_model(lora_config(["1"]), plain_module()),
        lambda model: inject_adapter_in_model(lora_config(["1", "3"]), model, "later"),
    ),
}
WITHOUT_LORA_MODEL = ["PeftMixedModel", "Qwen2ForCausalLM", "Sequential"]


def containers(names: list[str]) -> pytest.MarkDecorator:
    marks = {"Qwen2ForCausalLM": needs_transformers_adapters}
    values = [pytest.param(name, marks=marks.get(name, ())) for name in names]
    return pytest.mark.parametrize("container", values)


@containers(list(CONTAINERS))
def test_every_container_of_lora_layers_is_fused(container: str, spy: Spy) -> None:
    linears, build, _ = CONTAINERS[container]
    plain = build()
    patched = copy.deepcopy(plain)
    report = fastlora.patch(patched)
    assert report.model == type(plain).__name__
    assert len(report.fused) == linears
    assert_fused_like_peft(patched, plain, spy, linears)


@containers(["PeftModel", "Holder"])
def test_layers_added_later_are_fused_where_a_lora_model_adds_them(container: str) -> None:
    _, build, add_more_targets = CONTAINERS[container]
    model = build()
    report = fastlora.patch(model, dropout_mask="recompute")
    assert not report.notes
    add_more_targets(model)
    assert len(layers_of_type(model, LoRALinear)) == LINEARS
    assert not layers_of_type(model, PeftLinear)
    masks = {m.fastlora_dropout_mask for m in model.modules() if isinstance(m, LoRALinear)}
    assert masks == {"recompute"}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # adding to it is the point
@containers(WITHOUT_LORA_MODEL)
def test_report_notes_that_later_layers_wait_for_the_next_patch(container: str) -> None:
    linears, build, add_more_targets = CONTAINERS[container]
    model = build()
    report = fastlora.patch(model)
    (note,) = report.notes
    assert note.startswith(f"LoRA layers added to this {container} later run as peft")
    assert f"note: {note}" in str(report)
    add_more_targets(model)
    later = layers_of_type(model, PeftLinear)
    assert later
    assert f"{len(later)} not patched" in fastlora.explain(model)
    fastlora.patch(model)
    assert len(layers_of_type(model, LoRALinear)) == linears + len(later)
    assert "not patched" not in fastlora.explain(model)


def test_patching_twice_changes_nothing_more() -> None:
    model = tiny_peft()
    first = fastlora.patch(model)
    after_first = snapshot(model)
    assert fastlora.patch(model) == first
    assert snapshot(model) == after_first


def test_patch_keeps_every_name_and_tensor() -> None:
    model = tiny_peft()
    names, keys = list(snapshot(model)), list(model.state_dict())
    tensors, values = tensor_ids(model), copy.deepcopy(model.state_dict())
    fastlora.patch(model)
    assert list(snapshot(model)) == names
    assert list(model.state_dict()) == keys
    assert tensor_ids(model) == tensors
    assert_same(model.state_dict(), values)


def test_report_names_modules_of_the_model() -> None:
    model = tiny_peft()
    assert list(fastlora.patch(model).fused) == layers_of_type(model, LoRALinear)


def test_dropout_mask_is_stored_on_every_layer_and_changed_by_the_next_patch() -> None:
    model = tiny_peft()
    for dropout_mask in (*DROPOUT_MASKS, DROPOUT_MASKS[0]):
        fastlora.patch(model, dropout_mask=dropout_mask)
        layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
        assert [layer.fastlora_dropout_mask for layer in layers] == [dropout_mask] * LINEARS


@pytest.mark.parametrize("already_patched", [False, True], ids=["plain", "patched"])
def test_unknown_dropout_mask_is_refused_and_changes_nothing(already_patched: bool) -> None:
    model = tiny_peft()
    if already_patched:
        fastlora.patch(model, dropout_mask="recompute")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'seed'"):
        fastlora.patch(model, dropout_mask="seed")
    assert snapshot(model) == before


def test_model_without_lora_layers_warns_and_the_report_says_so() -> None:
    model = tiny_model()
    with pytest.warns(UserWarning, match="Qwen2ForCausalLM has no LoRA layers") as caught:
        report = fastlora.patch(model)
    assert caught[0].filename == __file__
    assert "has no LoRA layers" in str(report)
    assert report == PatchReport("Qwen2ForCausalLM")


def test_strict_refuses_a_model_without_lora_layers() -> None:
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no LoRA layers"):
        fastlora.patch(tiny_model(), strict=True)


def test_strict_refuses_a_layer_that_falls_back_and_changes_nothing() -> None:
    model = tiny_peft()
    name = "base_model.model.model.layers.1.mlp.up_proj"
    model.get_submodule(name).base_layer.weight.requires_grad_()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"nothing was changed") as caught:
        fastlora.patch(model, strict=True)
    assert name in str(caught.value)
    assert "the base weight is trained" in str(caught.value)
    assert snapshot(model) == before


def test_strict_refuses_a_lora_layer_of_another_class_and_changes_nothing() -> None:
    model = tiny_peft(target_modules=["q_proj", "embed_tokens"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.embed_tokens"):
        fastlora.patch(model, strict=True)
    assert snapshot(model) == before


def test_strict_accepts_a_model_that_is_fused_completely() -> None:
    assert len(fastlora.patch(tiny_peft(), strict=True).fused) == LINEARS


class SpecialLinear(PeftLinear):
    """Stands for peft's own subclasses (quantized bases) and other libraries'."""


def test_a_subclass_of_the_lora_linear_is_never_swapped(spy: Spy) -> None:
    plain = tiny_peft()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    plain.get_submodule(name).__class__ = SpecialLinear
    patched = copy.deepcopy(plain)
    report = fastlora.patch(patched)
    assert type(patched.get_submodule(name)) is SpecialLinear
    assert list(report.untouched) == [name]
    assert "SpecialLinear" in report.untouched[name]
    assert_fused_like_peft(patched, plain, spy, LINEARS - 1)


class SpecialLoraModel(LoraModel):
    """Stands for another library's subclass of peft's tuner."""


def test_a_subclass_of_the_lora_model_is_never_swapped() -> None:
    model = tiny_peft()
    model.base_model.__class__ = SpecialLoraModel
    report = fastlora.patch(model)
    assert type(model.base_model) is SpecialLoraModel
    assert report.notes


def test_other_lora_layers_are_left_alone_and_named(spy: Spy) -> None:
    plain = tiny_peft(target_modules=["q_proj", "embed_tokens"])
    patched = copy.deepcopy(plain)
    report = fastlora.patch(patched)
    assert list(report.untouched) == ["base_model.model.model.embed_tokens"]
    assert "left alone: Embedding is not peft's plain LoRA Linear" in str(report)
    assert_fused_like_peft(patched, plain, spy, linears=2)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="transformers 4 keeps the experts of Qwen3-MoE as linears",
)
def test_experts_are_left_alone_and_named(spy: Spy) -> None:
    base = tiny_model("qwen3-moe", experts_implementation="eager")
    experts = ["mlp.experts.gate_up_proj"]
    plain = tiny_peft(model=base, target_modules=ATTENTION, target_parameters=experts)
    patched = copy.deepcopy(plain)
    report = fastlora.patch(patched)
    assert len(report.untouched) == 2
    assert all(name.endswith(".mlp.experts") for name in report.untouched)
    assert all("ParamWrapper" in reason for reason in report.untouched.values())
    assert_fused_like_peft(patched, plain, spy, linears=8)


def test_other_models_in_the_process_are_untouched(spy: Spy) -> None:
    forward, create = PeftLinear.forward, LoraModel._create_and_replace
    older = tiny_peft()
    before, expected = snapshot(older), loss_and_gradients(older)
    fastlora.patch(tiny_peft())
    newer = tiny_peft()
    assert snapshot(older) == before
    assert_same(loss_and_gradients(older), expected)
    assert len(layers_of_type(newer, PeftLinear)) == LINEARS
    assert type(newer.base_model) is LoraModel
    assert PeftLinear.forward is forward
    assert LoraModel._create_and_replace is create
    assert spy == Spy()


def test_explain_says_that_patch_has_not_been_called() -> None:
    text = fastlora.explain(tiny_peft())
    assert text.startswith(f"fused 0 of {LINEARS} LoRA linears; 0 fall back; {LINEARS} not patched")


def test_explain_of_a_patched_model_is_its_report() -> None:
    model = tiny_peft()
    report = fastlora.patch(model)
    logits_of(model)
    assert fastlora.explain(model) == str(report)
    assert str(report) == f"fused {LINEARS} of {LINEARS} LoRA linears in 4 groups; 0 fall back"


def test_explain_follows_the_state_of_the_model() -> None:
    model = tiny_peft()
    fused = str(fastlora.patch(model))
    with model.disable_adapter():
        text = fastlora.explain(model)
        assert text.startswith(f"fused 0 of {LINEARS} LoRA linears; {LINEARS} fall back")
        assert "falls back to peft: its adapters are disabled" in text
    assert fastlora.explain(model) == fused


def test_explain_tells_why_the_last_call_went_to_peft() -> None:
    model = tiny_peft().eval()
    fused = str(fastlora.patch(model))
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(model, adapter_names=["default", "__base__"])
    reason = "last call went to peft: adapter_names= are not fused under autocast"
    assert reason in fastlora.explain(model)
    logits_of(model)
    assert fastlora.explain(model) == fused


@pytest.mark.parametrize(
    ("names", "abridged"),
    [
        pytest.param(["a", "b.c"], ["a", "b.c"], id="nothing-in-common"),
        pytest.param(
            [f"layers.{n}.mlp.{part}" for n in range(28) for part in ("gate", "up")],
            ["layers.0-27.mlp.(gate, up)"],
            id="layers-and-siblings",
        ),
        pytest.param(
            [f"layers.{n}.{part}" for n in (0, 4, 5) for part in ("q", "v")] + ["layers.1.q"],
            ["layers.0,4,5.(q, v)", "layers.1.q"],
            id="some-layers-only",
        ),
        pytest.param(
            ["x.0.e.0.w", "x.0.e.1.w", "x.1.e.0.w"],
            ["x.0.e.0.w", "x.0.e.1.w", "x.1.e.0.w"],
            id="not-every-combination",
        ),
        pytest.param(["h.0.w{}", "h.1.w{}"], ["h.0,1.w{}"], id="braces-in-a-name"),
    ],
)
def test_report_names_every_layer_in_few_words(names: list[str], abridged: list[str]) -> None:
    report = PatchReport("Model", fallback=dict.fromkeys(names, "why"))
    (line,) = str(report).splitlines()[1:]
    count = f"{len(names)} layers: " if len(abridged) < len(names) else ""
    assert line == f"  falls back to peft: why ({count}{', '.join(abridged)})"
    assert all(name in report.text() for name in names)


def test_report_groups_layers_by_reason_and_fits_on_a_screen() -> None:
    report = PatchReport(
        "Model",
        fused=("a",),
        fallback={"b": "rare", **dict.fromkeys("cdefg", "common")},
        untouched={"h": "special"},
        unpatched=("i",),
        notes=("a note",),
    )
    assert str(report).splitlines() == [
        "fused 1 of 8 LoRA linears; 6 fall back; 1 not patched",
        "  falls back to peft: common (5 layers: (c, d, e, f, g))",
        "  falls back to peft: rare (b)",
        "  left alone: special (h)",
        "  not patched: fastlora.patch has not been called on it (i)",
        "  note: a note",
    ]


# What peft offers keeps working: every test does the same to a patched and to an unpatched model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch-to", "to-patch"])
def test_patch_works_before_and_after_changing_the_dtype(
    patch_first: bool, dtype: torch.dtype, spy: Spy
) -> None:
    plain = tiny_peft()
    patched = patched_twin(plain).to(dtype) if patch_first else patched_twin(plain.to(dtype))
    plain = plain.to(dtype)
    assert_same(patched.state_dict(), plain.state_dict())
    assert logits_of(patched).dtype == dtype
    assert (spy.fused, spy.peft) == (LINEARS, 0)
    # One layer at a time: in half precision the roundings of everything else in the model decide
    # which of two ways through it ends nearer to fp64.
    for name in layers_of_type(patched, LoRALinear):
        layer = patched.get_submodule(name)
        x = torch.randn(256, layer.in_features).to(dtype)
        assert_layer_as_accurate(layer, plain.get_submodule(name), x)
    assert (spy.fused, spy.peft) == (2 * LINEARS, 0)
    assert_fused_like_peft(patched.float(), plain.float(), spy)


@pytest.mark.gpu
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch-to", "to-patch"])
def test_patch_works_before_and_after_moving_to_a_gpu(patch_first: bool, spy: Spy) -> None:
    plain = tiny_peft()
    patched = patched_twin(plain).to("cuda") if patch_first else patched_twin(plain.to("cuda"))
    assert_fused_like_peft(patched, plain.to("cuda"), spy)


@pytest.mark.parametrize("model", [None, "Qwen2"])
def test_patch_refuses_what_is_no_module(model: object) -> None:
    with pytest.raises(TypeError, match=f"torch.nn.Module, got {type(model).__name__}"):
        fastlora.patch(model)
