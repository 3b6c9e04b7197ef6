"""Adapters of live models are read as their files would be."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from saved_adapters import FP64, LINEARS, Q_PROJ, Q_PROJ_A, assert_is, lora_layers, refusal
from tiny_models import tiny_model, tiny_peft
from torch import nn

from fastlora.adapters.files import read_adapter


def test_a_live_model_is_read_as_its_files_are(tmp_path: Path) -> None:
    model = tiny_peft(rank_pattern={"q_proj": 2}, use_rslora=True)
    model.save_pretrained(tmp_path)
    saved = read_adapter("emoji", tmp_path, LINEARS)
    for source in (model, model.base_model):
        live = read_adapter("emoji", source, LINEARS)
        assert_is(live, model)
        assert live.fingerprint == saved.fingerprint
        assert live.folder is None
    assert read_adapter("emoji", model, LINEARS).source == ("adapter 'default' of a live PeftModel")


def test_a_live_model_is_copied(tmp_path: Path) -> None:
    model = tiny_peft()
    before = read_adapter("emoji", model, LINEARS)
    value = before.factors[Q_PROJ].lora_a.clone()
    with torch.no_grad():
        lora_layers(model)[Q_PROJ].lora_A["default"].weight.zero_()
    assert torch.equal(before.factors[Q_PROJ].lora_a, value)
    assert read_adapter("emoji", model, LINEARS).fingerprint != before.fingerprint


def test_the_scalings_of_a_live_model_are_those_it_uses() -> None:
    model = tiny_peft()
    lora_layers(model)[Q_PROJ].set_scale("default", 5)
    adapter = read_adapter("emoji", model, LINEARS)
    assert_is(adapter, model)
    assert adapter.factors[Q_PROJ].scaling == 10


def with_adapters(model: nn.Module, *names: str) -> nn.Module:
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=seed + 2, target_modules=["q_proj", "up_proj"], init_lora_weights=False
        )
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model.add_adapter(config, adapter_name=name)
    return model


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_of_several_live_adapters_the_one_of_the_name_is_read() -> None:
    for model in (
        with_adapters(tiny_peft(), "emoji", "mlp", "weight"),
        with_adapters(tiny_model(), "default", "emoji", "mlp"),
    ):
        assert_is(read_adapter("emoji", model, LINEARS), model, "emoji")
        # peft finds an adapter's tensors by name, and takes all of an mlp for those of "mlp".
        assert any("mlp" in path for path in read_adapter("emoji", model, LINEARS).factors)
        message = refusal(model, name="support")
        assert "has no adapter of this name, but 'default', 'emoji', 'mlp'" in message


def test_the_only_live_adapter_needs_no_name() -> None:
    model = with_adapters(tiny_model(), "support")
    assert_is(read_adapter("emoji", model, LINEARS), model, "support")


def test_live_models_without_adapters_are_refused() -> None:
    assert "the live Qwen2ForCausalLM has no peft adapters" in refusal(tiny_model())
    assert "the live Linear has no peft adapters" in refusal(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"target_modules": ["embed_tokens"]}, "LoRA on an embedding is not supported"),
    ],
    ids=repr,
)
def test_live_models_of_more_than_plain_lora_are_refused(lora, expected: str) -> None:
    message = refusal(tiny_peft(**lora))
    assert message.startswith("adapter 'default' of a live PeftModel: ")
    assert expected in message


def test_a_merged_adapter_is_refused() -> None:
    model = tiny_peft()
    model.merge_adapter()
    assert "is merged into the base weight of model.layers.0" in refusal(model)
    model.unmerge_adapter()
    read_adapter("emoji", model, LINEARS)


def test_tensors_that_are_elsewhere_are_refused() -> None:
    model = tiny_peft()
    layer = lora_layers(model)[Q_PROJ].lora_A["default"]
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    assert f"tensor '{Q_PROJ_A}' is on the meta device" in refusal(model)
    layer.weight = nn.Parameter(torch.zeros(0))  # as DeepSpeed ZeRO-3 leaves it
    assert f"tensor '{Q_PROJ_A}' has shape [0]" in refusal(model)
    layer.weight = nn.Parameter(torch.zeros(4, 32, dtype=FP64))
    assert f"tensor '{Q_PROJ_A}' is torch.float64, not fp32, fp16 or bf16" in refusal(model)
    layer.weight = nn.Parameter(torch.full((4, 32), math.nan))
    assert f"tensor '{Q_PROJ_A}' has NaN in it" in refusal(model)


def test_a_live_model_of_other_kinds_of_peft_is_refused() -> None:
    model = get_peft_model(
        tiny_model(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    assert "peft_type is 'IA3', only 'LORA' is supported" in refusal(model)
    model = get_peft_model(
        tiny_model(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    assert "peft_type is 'PROMPT_TUNING'" in refusal(model)
