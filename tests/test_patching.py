"""patch, unpatch, explain, enable_for and the callback on whole models, against unpatched twins."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accuracy import assert_as_accurate, assert_layer_as_accurate
from conftest import Spy
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.hotswap import hotswap_adapter
from tiny_models import VOCABULARY, tiny_model, tiny_peft, token_ids
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.trainer_callback import PrinterCallback

import fastlora
from fastlora.functional import DROPOUT_MASKS
from fastlora.layers import LoRALinear
from fastlora.patching import FastLoraModel, PatchReport

QKV = ["q_proj", "k_proj", "v_proj"]
ATTENTION = [*QKV, "o_proj"]
LINEARS = 14  # of a tiny Qwen2 with all-linear: 2 layers of q, k, v, o, gate, up, down

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


def family_peft(family: str, targets: str | list[str], dropout: float) -> PeftModel:
    """Build a peft model of a family that also runs in fp64."""
    # Only the eager experts of a MoE model multiply in fp64; other families ignore the setting.
    base = tiny_model(family, experts_implementation="eager")
    # GPT-2's Conv1D is transposed: peft sets this by itself, but warns.
    transposed = {"fan_in_fan_out": True} if family == "gpt2" else {}
    return tiny_peft(model=base, target_modules=targets, lora_dropout=dropout, **transposed)


def patched_twin(plain: nn.Module, **options: object) -> nn.Module:
    """Return a patched copy of a model."""
    patched = copy.deepcopy(plain)
    fastlora.patch(patched, **options)
    return patched


def twins(**lora: object) -> tuple[PeftModel, PeftModel]:
    """Build a tiny Qwen2 with LoRA twice: patched, and as peft made it."""
    plain = tiny_peft(**lora)
    return patched_twin(plain), plain


def logits_of(model: nn.Module, **kwargs: object) -> Tensor:
    """Return the logits of a fixed batch."""
    output = model(token_ids().to(next(model.parameters()).device), **kwargs)
    return getattr(output, "logits", output)


def loss_and_gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return the loss of each token of a fixed batch, and the gradient of each trained weight."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits = logits_of(model)
    # Not the model's own loss: transformers computes it in fp32 even for a model in fp64.
    targets = token_ids()[:, 1:].to(logits.device)
    loss = F.cross_entropy(logits[:, :-1].mT, targets, reduction="none")
    loss.mean().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}


def assert_agrees_with_peft(patched: nn.Module, plain: nn.Module) -> None:
    """Assert that loss and gradients are as close to fp64 as those of the unpatched twin."""
    models = (patched, plain, copy.deepcopy(plain).double())
    actual, native, exact = (loss_and_gradients(model) for model in models)
    assert len(exact) > 1, "there are no gradients"
    assert actual.keys() == native.keys() == exact.keys()
    assert_as_accurate(actual["loss"], native["loss"], exact["loss"], name="loss")
    vectors = (_all_gradients(results, exact) for results in (actual, native, exact))
    assert_as_accurate(*vectors, name="gradients")


def _all_gradients(results: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """Return all gradients as one vector in which each has about the same norm."""
    # A small tensor of a tiny model sees too few roundings for a ratio of two errors to mean much.
    # A wrong one still shows in the vector, where 1e-6 of its norm is more than what is allowed.
    # Dividing by powers of two rounds nothing.
    scales = {name: 2.0 ** exact[name].norm().log2().round().item() for name in exact}
    return torch.cat([results[name].flatten() / scales[name] for name in exact if name != "loss"])


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two dicts have the same keys in the same order, and equal tensors."""
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def assert_fused_like_peft(
    patched: nn.Module, plain: nn.Module, spy: Spy, linears: int = LINEARS
) -> None:
    """Assert that two models have the same state, and that one runs fused and agrees."""
    assert_same(patched.state_dict(), plain.state_dict())
    spy.reset()
    assert_agrees_with_peft(patched, plain)
    assert (spy.fused, spy.peft) == (linears, 0)


def layers_of_type(model: nn.Module, cls: type) -> list[str]:
    """Return the names of the modules of exactly this class."""
    return [name for name, module in model.named_modules() if type(module) is cls]


def snapshot(model: nn.Module) -> dict[str, tuple[int, type, dict[str, object]]]:
    """Record of each module its identity, its class and its plain attributes."""
    return {
        name: (
            id(module),
            type(module),
            {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, (bool, int, float, str, type(None)))
            },
        )
        for name, module in model.named_modules()
    }


def tensor_ids(model: nn.Module) -> dict[str, int]:
    """Return the identity of each parameter and buffer."""
    return {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}


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


class Holder(nn.Module):
    """A module of somebody else around a peft model, such as one with a value head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).logits


def lora_config(targets: str | list[str] = "all-linear", **options: object) -> LoraConfig:
    """Return a config whose adapter is not a no-op."""
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    return LoraConfig(target_modules=targets, **settings)


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
    assert str(report) == f"fused {LINEARS} of {LINEARS} LoRA linears; 0 fall back"


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
    logits_of(model, adapter_names=["default", "__base__"])
    assert "last call went to peft: it was called with adapter_names=" in fastlora.explain(model)
    logits_of(model)
    assert fastlora.explain(model) == fused


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
        "  falls back to peft: common (c, d, e, and 2 more)",
        "  falls back to peft: rare (b)",
        "  left alone: special (h)",
        "  not patched: fastlora.patch has not been called on it (i)",
        "  note: a note",
    ]


# What peft offers keeps working: every test does the same to a patched and to an unpatched model


def add_adapter(model: PeftModel, name: str, targets: str | list[str] = "all-linear") -> None:
    """Add the same random adapter to whatever model is given."""
    torch.manual_seed(5)
    model.add_adapter(name, lora_config(targets, r=3))


def save_adapter(folder: Path) -> Path:
    """Save an adapter that a tiny Qwen2 can load, with other weights than ``tiny_peft``'s."""
    torch.manual_seed(6)
    get_peft_model(tiny_model(), lora_config()).save_pretrained(folder)
    return folder


def saved_config(folder: Path) -> dict[str, object]:
    """Read an adapter_config.json."""
    config = json.loads((folder / "adapter_config.json").read_text())
    # peft keeps the targets in a set and writes them in any order.
    return {**config, "target_modules": sorted(config["target_modules"])}


def test_saved_adapter_is_the_same_file_and_loads_into_peft(tmp_path: Path, spy: Spy) -> None:
    patched, plain = twins()
    patched.save_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    assert saved_config(tmp_path / "patched") == saved_config(tmp_path / "plain")
    patched_file, plain_file = (
        tmp_path / name / "adapter_model.safetensors" for name in ("patched", "plain")
    )
    assert patched_file.read_bytes() == plain_file.read_bytes()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "patched", is_trainable=True)
    loaded.train()
    assert_same(loss_and_gradients(loaded), loss_and_gradients(plain))
    fastlora.patch(loaded)
    assert_fused_like_peft(loaded, plain, spy)


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_merged_and_unloaded_models_are_the_same(method: str) -> None:
    merged, expected = (getattr(model, method)() for model in twins())
    assert type(merged) is type(expected) is type(tiny_model())
    assert not layers_of_type(merged, LoRALinear)
    assert repr(merged) == repr(expected)
    assert_same(merged.state_dict(), expected.state_dict())
    assert torch.equal(logits_of(merged), logits_of(expected))


def test_merge_and_unmerge_change_the_same_weights(spy: Spy) -> None:
    patched, plain = twins()
    for model in (patched, plain):
        model.merge_adapter()
    assert_same(patched.state_dict(), plain.state_dict())
    assert torch.equal(logits_of(patched), logits_of(plain))
    assert (spy.fused, spy.peft) == (0, LINEARS)
    for model in (patched, plain):
        model.unmerge_adapter()
    assert_fused_like_peft(patched, plain, spy)


def test_added_adapter_with_the_same_targets_is_fused(spy: Spy) -> None:
    patched, plain = twins()
    for model in (patched, plain):
        add_adapter(model, "second")
        model.set_adapter("second")
    assert_fused_like_peft(patched, plain, spy)


def test_added_adapter_with_more_targets_is_fused(spy: Spy) -> None:
    patched, plain = twins(target_modules=QKV)
    for model in (patched, plain):
        add_adapter(model, "second")
        model.set_adapter("second")
    assert_fused_like_peft(patched, plain, spy)


def test_set_adapter_switches_between_fused_adapters(spy: Spy) -> None:
    patched, plain = twins()
    for model in (patched, plain):
        add_adapter(model, "second")
    outputs = []
    for name in ("second", "default", "second"):
        for model in (patched, plain):
            model.set_adapter(name)
        assert_fused_like_peft(patched, plain, spy)
        outputs.append(logits_of(patched))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_deleted_adapter_is_gone_and_the_other_is_fused(spy: Spy) -> None:
    patched, plain = twins()
    for model in (patched, plain):
        add_adapter(model, "second")
        model.set_adapter("second")
        model.delete_adapter("default")
    assert list(patched.peft_config) == ["second"]
    assert_fused_like_peft(patched, plain, spy)


def test_loaded_adapter_is_fused(tmp_path: Path, spy: Spy) -> None:
    patched, plain = twins(target_modules=QKV)
    folder = save_adapter(tmp_path)
    for model in (patched, plain):
        model.load_adapter(folder, "loaded", is_trainable=True)
        model.set_adapter("loaded")
    assert_fused_like_peft(patched, plain, spy)


def test_disabled_adapters_leave_the_base_model(spy: Spy) -> None:
    patched, plain = twins()
    with patched.disable_adapter(), plain.disable_adapter():
        assert torch.equal(logits_of(patched), logits_of(plain))
        assert torch.equal(logits_of(patched), logits_of(tiny_model()))
    assert (spy.fused, spy.peft) == (0, 2 * LINEARS)
    assert_fused_like_peft(patched, plain, spy)


def test_one_batch_with_several_adapters_is_the_same(spy: Spy) -> None:
    patched, plain = twins()
    names = ["default", "second", "__base__", "default"]
    prompts = token_ids(rows=len(names), columns=5)
    tokens, logits = [], []
    for model in (patched, plain):
        add_adapter(model, "second")
        model.eval()
        with torch.no_grad():
            logits.append(model(prompts, adapter_names=names).logits)
            tokens.append(
                model.generate(
                    input_ids=prompts,
                    attention_mask=torch.ones_like(prompts),
                    adapter_names=names,
                    max_new_tokens=3,
                    do_sample=False,
                    pad_token_id=0,
                )
            )
    assert torch.equal(*logits)
    assert torch.equal(*tokens)
    assert tokens[0].shape == (4, 8)
    assert spy.fused == 0
    assert_fused_like_peft(patched, plain, spy)


def test_generation_with_one_adapter_is_fused_and_gives_the_same_tokens(spy: Spy) -> None:
    prompts = token_ids(columns=5)
    tokens = [
        model.eval().generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )
        for model in twins()
    ]
    assert torch.equal(*tokens)
    assert (spy.fused, spy.peft) == (3 * LINEARS, 0)


def test_adapter_state_dict_is_the_same_and_can_be_set(spy: Spy) -> None:
    patched, plain = twins()
    state = get_peft_model_state_dict(patched)
    assert_same(state, get_peft_model_state_dict(plain))
    other = {name: tensor + 0.125 for name, tensor in state.items()}
    for model in (patched, plain):
        set_peft_model_state_dict(model, other)
    assert_same(get_peft_model_state_dict(patched), other)
    assert_fused_like_peft(patched, plain, spy)


def test_hotswapped_adapter_is_used_at_the_next_call(tmp_path: Path, spy: Spy) -> None:
    patched, plain = twins()
    before = logits_of(patched)
    folder = save_adapter(tmp_path)
    for model in (patched, plain):
        hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")
        model.set_adapter("default")  # peft 0.18 leaves the new weights without requires_grad
    assert not torch.equal(logits_of(patched), before)
    assert_fused_like_peft(patched, plain, spy)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_patched_and_independent(
    duplicate: Callable[[nn.Module], nn.Module], spy: Spy
) -> None:
    plain = tiny_peft(lora_dropout=0.1).train()
    original = patched_twin(plain, dropout_mask="recompute")
    copied = duplicate(original)
    assert type(copied.base_model) is FastLoraModel
    assert fastlora.explain(copied) == fastlora.explain(original)
    masks = {m.fastlora_dropout_mask for m in copied.modules() if isinstance(m, LoRALinear)}
    assert masks == {"recompute"}
    assert not set(tensor_ids(copied).values()) & set(tensor_ids(original).values())
    assert_same(loss_and_gradients(copied), loss_and_gradients(original))
    assert (spy.fused, spy.peft) == (2 * LINEARS, 0)
    # The two share no state: what happens to the copy leaves the original as it was.
    fastlora.unpatch(copied)
    assert_same(loss_and_gradients(copied), loss_and_gradients(plain))
    assert len(layers_of_type(original, LoRALinear)) == LINEARS


def test_status_and_repr_are_those_of_peft() -> None:
    patched, plain = twins(lora_dropout=0.1)
    for model in (patched, plain):
        add_adapter(model, "second")
    assert get_layer_status(patched) == get_layer_status(plain)
    assert get_model_status(patched) == get_model_status(plain)
    assert repr(patched) == repr(plain)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout_mask", DROPOUT_MASKS)
def test_checkpointing_recomputes_with_the_same_dropout(
    dropout_mask: str, use_reentrant: bool, spy: Spy
) -> None:
    # transformers switches the cache off when it checkpoints; in 4.57 attention then rounds
    # differently, with or without fastlora.
    plain = tiny_peft(model=tiny_model(use_cache=False), lora_dropout=0.1)
    model = patched_twin(plain, dropout_mask=dropout_mask).train()
    # A reentrant segment whose input needs no gradient would have none itself.
    model.enable_input_require_grads()
    expected = loss_and_gradients(model)
    assert (spy.fused, spy.peft) == (LINEARS, 0)
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    spy.reset()
    assert_same(loss_and_gradients(model), expected)
    assert spy.peft == 0
    assert spy.fused > LINEARS, "nothing was recomputed"


def test_enable_for_builds_fused_layers_without_patch(spy: Spy) -> None:
    plain = tiny_peft()
    config = lora_config()
    assert fastlora.enable_for(config) is config
    base = tiny_model()
    torch.manual_seed(1)  # as tiny_peft does
    fused = get_peft_model(base, config)
    assert len(layers_of_type(fused, LoRALinear)) == LINEARS
    assert_fused_like_peft(fused, plain, spy)


def test_enable_for_takes_no_subclass_of_linear() -> None:
    class ScaledLinear(nn.Linear):
        """Stands for a quantized base layer."""

    model = nn.Sequential(nn.Linear(4, 4), ScaledLinear(4, 4))
    inject_adapter_in_model(fastlora.enable_for(lora_config(["0", "1"])), model)
    assert type(model[0]) is LoRALinear
    assert type(model[1]) is PeftLinear


def test_enable_for_leaves_other_configs_alone() -> None:
    fastlora.enable_for(lora_config())
    model = get_peft_model(tiny_model(), lora_config())
    assert len(layers_of_type(model, PeftLinear)) == LINEARS


@pytest.mark.parametrize("config", [None, {"r": 8}, peft.IA3Config()], ids=["none", "dict", "ia3"])
def test_enable_for_refuses_what_is_not_a_lora_config(config: object) -> None:
    with pytest.raises(TypeError, match=type(config).__name__):
        fastlora.enable_for(config)


def test_enable_for_leaves_no_trace_in_the_saved_config(tmp_path: Path) -> None:
    for name, config in (("marked", fastlora.enable_for(lora_config())), ("plain", lora_config())):
        get_peft_model(tiny_model(), config).save_pretrained(tmp_path / name)
    assert saved_config(tmp_path / "marked") == saved_config(tmp_path / "plain")


def train(model: PeftModel, folder: Path, *callbacks: transformers.TrainerCallback) -> list[float]:
    """Train two steps with transformers' Trainer and return the two losses."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in token_ids(rows=4)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)  # it prints the log, and only ours is looked at
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_callback_patches_when_training_begins(
    tmp_path: Path, spy: Spy, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_peft(lora_dropout=0.1)
    twin = copy.deepcopy(model)
    callback = fastlora.FastLoRACallback(verbose=False, dropout_mask="recompute")
    assert callback.report is None
    losses = train(model, tmp_path, callback)
    assert (spy.fused, spy.peft) == (2 * LINEARS, 0)
    assert capsys.readouterr().out == ""
    report = fastlora.patch(twin, dropout_mask="recompute")
    assert callback.report == report
    assert train(twin, tmp_path) == losses
    assert len(losses) == 2
    assert_same(model.state_dict(), twin.state_dict())


def begin_training(callback: fastlora.FastLoRACallback, is_main_process: bool = True) -> PeftModel:
    """Call a callback as the trainer does when training begins."""
    model = tiny_peft()
    state = TrainerState(is_world_process_zero=is_main_process)
    callback.on_train_begin(None, state, TrainerControl(), model=model)
    return model


def test_callback_prints_the_report_once(capsys: pytest.CaptureFixture[str]) -> None:
    callback = fastlora.FastLoRACallback()
    model = begin_training(callback)
    assert capsys.readouterr().out == f"{callback.report}\n"
    assert str(callback.report) == fastlora.explain(model)
    begin_training(callback, is_main_process=False)
    assert capsys.readouterr().out == ""


def test_callback_hands_its_options_to_patch() -> None:
    model = begin_training(fastlora.FastLoRACallback(dropout_mask="recompute", verbose=False))
    masks = {m.fastlora_dropout_mask for m in model.modules() if isinstance(m, LoRALinear)}
    assert masks == {"recompute"}
    callback = fastlora.FastLoRACallback(strict=True)
    with pytest.raises(ValueError, match="no LoRA layers"):
        callback.on_train_begin(None, TrainerState(), TrainerControl(), model=tiny_model())
    assert callback.report is None


# Devices and dtypes are looked at when a layer is called


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


# -- what a review found


def square_net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def test_enable_for_leaves_fan_in_fan_out_to_peft() -> None:
    settings = {"r": 2, "target_modules": ["0", "1"], "init_lora_weights": False}
    config = fastlora.enable_for(LoraConfig(fan_in_fan_out=True, **settings))
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        model = get_peft_model(square_net(), config)
    x = torch.randn(3, 8)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


class TensorSubclass(torch.Tensor):
    pass


def test_enable_for_leaves_tensor_subclasses_to_peft() -> None:
    base = square_net()
    weight = base[0].weight.detach().as_subclass(TensorSubclass)
    base[0].weight = nn.Parameter(weight, requires_grad=False)
    config = fastlora.enable_for(LoraConfig(r=2, target_modules=["0", "1"]))
    model = get_peft_model(base, config).base_model.model
    assert [type(layer) for layer in model] == [PeftLinear, LoRALinear]


def test_enable_for_leaves_single_parameters_to_peft() -> None:
    config = fastlora.enable_for(LoraConfig(r=2, target_parameters=["0.weight"]))
    model = get_peft_model(square_net(), config).base_model.model
    assert type(model[0]).__name__ == "ParamWrapper"


def test_layers_of_a_data_parallel_replica_are_fused(spy: Spy) -> None:
    """nn.DataParallel, which Trainer uses on several GPUs, calls copies that hold plain tensors."""
    model = LoRALinear.from_linear(nn.Linear(12, 20), r=4, init_lora_weights=False)
    x = torch.randn(3, 12)
    expected = model(x)

    def replica_of(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        replica._modules = {name: replica_of(child) for name, child in module._modules.items()}
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
        return replica

    model.base_layer.requires_grad_(False)
    replica = replica_of(model)
    assert not dict(replica.named_parameters())
    assert torch.equal(replica(x), expected)
    assert (spy.fused, spy.peft) == (2, 0)


def test_fp64_adapter_under_autocast_falls_back(spy: Spy) -> None:
    layer = LoRALinear.from_linear(nn.Linear(12, 20), r=4)
    layer.lora_A.double()
    layer.lora_B.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(3, 12))
    assert (spy.fused, spy.peft) == (0, 1)
    assert "autocast is on, but input, weight and adapter are" in fastlora.explain(layer)


@pytest.mark.parametrize("model", [None, "Qwen2"])
def test_patch_refuses_what_is_no_module(model: object) -> None:
    with pytest.raises(TypeError, match=f"torch.nn.Module, got {type(model).__name__}"):
        fastlora.patch(model)


def test_only_layers_without_a_peft_model_take_adapter_files() -> None:
    patched = tiny_peft()
    fastlora.patch(patched)
    name = next(name for name, m in patched.named_modules() if type(m) is LoRALinear)
    outcome = patched.load_state_dict({f"{name}.lora_A.weight": torch.zeros(4, 32)}, strict=False)
    assert outcome.unexpected_keys == [f"{name}.lora_A.weight"]
