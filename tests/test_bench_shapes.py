"""The models that are measured: the known ones, and any other from its config."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from small_session import TINY, save_config

from fastlora.bench import (
    shapes,
)
from fastlora.bench.shapes import GROUPS, INPUTS, MAIN_MODELS, MODELS, NAMES

# Of the published weights, a tied output layer counted once.
PUBLISHED_PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize("name", MODELS)
def test_known_sizes_are_those_of_the_model_that_transformers_builds(name):
    config = transformers.AutoConfig.for_model(**MODELS[name].config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(each.numel() for each in model.parameters()) == PUBLISHED_PARAMETERS[name]
    built = shapes.from_config(config, name)
    assert dict(built.linears) == dict(MODELS[name].linears)
    assert list(built.linears) == list(NAMES)
    assert built.layers == MODELS[name].layers
    assert config.vocab_size == MODELS[name].config["vocab_size"]


def test_linears_that_share_an_input_have_its_width():
    assert set(MAIN_MODELS) <= set(MODELS)
    assert INPUTS == ("q_proj", "o_proj", "gate_proj", "down_proj")
    for model in MODELS.values():
        for group in GROUPS:
            assert len({model.linears[name].k for name in group}) == 1


@pytest.mark.parametrize(
    "name",
    ["Qwen3-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base", "someone/mirror/Qwen3-8B-Instruct"],
)
def test_a_known_model_is_found_by_its_name_without_a_hub(monkeypatch, name):
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    assert shapes.find(name) is MODELS["Qwen3-8B"]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_folder_s_model_is_measured_by_its_config(tmp_path, kind):
    folder = save_config(tmp_path / "model", kind, num_hidden_layers=3, head_dim=8)
    model = shapes.find(folder)
    assert (model.name, model.layers) == (folder, 3)
    bias = {"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set()
    assert dict(model.linears) == {
        name: replace(linear, has_bias=name in bias) for name, linear in TINY.linears.items()
    }


def test_a_model_without_the_seven_linears_is_refused_with_what_it_has(tmp_path):
    transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"has no q_proj, .*; it has no linear layers\. .*--shape"):
        shapes.find(str(tmp_path / "gpt2"))
    opt = transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    with pytest.raises(ValueError, match=r"layer of an OPT has no o_proj, .*it has k_proj, v_proj"):
        shapes.from_config(opt, "an OPT")


def test_a_name_that_is_no_model_is_refused_by_its_name():
    with pytest.raises((OSError, ValueError), match="no-such-model"):
        shapes.find("nobody/no-such-model")
