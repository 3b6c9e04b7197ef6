"""Everything that peft offers keeps working on a patched model, as on its unpatched twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Spy
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from tiny_models import tiny_model, tiny_peft, token_ids
from torch import nn
from whole_models import (
    LINEARS,
    QKV,
    assert_fused_like_peft,
    assert_same,
    layers_of_type,
    logits_of,
    lora_config,
    loss_and_gradients,
    patched_twin,
    saved_config,
    tensor_ids,
    through_pickle,
    through_torch_save,
    twins,
)

import fastlora
from fastlora.functional import DROPOUT_MASKS
from fastlora.layers import LoRALinear
from fastlora.patching import FastLoraModel


def add_adapter(model: PeftModel, name: str, targets: str | list[str] = "all-linear") -> None:
    """Add the same random adapter to whatever model is given."""
    torch.manual_seed(5)
    model.add_adapter(name, lora_config(targets, r=3))


def save_adapter(folder: Path) -> Path:
    """Save an adapter that a tiny Qwen2 can load, with other weights than ``tiny_peft``'s."""
    torch.manual_seed(6)
    get_peft_model(tiny_model(), lora_config()).save_pretrained(folder)
    return folder


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
    torch.testing.assert_close(*logits)
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
