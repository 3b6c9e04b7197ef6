"""What peft saves is read exactly, and what is told of it; the names it may have."""

from __future__ import annotations

import copy
import functools
import json
import struct
from pathlib import Path

import peft
import pytest
import safetensors.torch
import saved_adapters
import torch
from saved_adapters import (
    BF16,
    FP16,
    FP32,
    LINEARS,
    Q_PROJ_B,
    assert_is,
    configure,
    linears_of,
    refusal,
    reweigh,
)
from tiny_models import tiny_model, tiny_peft
from torch import nn

from fastlora.adapters import checks
from fastlora.adapters.adapter import Adapter, LoraFactors, check_name
from fastlora.adapters.checks import PREFIX
from fastlora.adapters.errors import AdapterError
from fastlora.adapters.files import WEIGHTS, read_adapter
from fastlora.adapters.groups import parameter_of

saved = saved_adapters.saved
folder = saved_adapters.folder


# What peft saves.

SAVED = [
    pytest.param({}, id="all-linear"),
    pytest.param({"target_modules": ["q_proj", "v_proj"], "r": 5}, id="odd-rank"),
    pytest.param({"use_rslora": True, "r": 8, "lora_alpha": 3}, id="rslora"),
    pytest.param(
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        id="one-layer",
    ),
    pytest.param(
        {
            "rank_pattern": {r".*\.1\..*_proj": 8, "q_proj": 2},
            "alpha_pattern": {"layers.0.mlp.up_proj": 32, "v_proj": 1},
        },
        id="patterns",
    ),
    pytest.param({"rank_pattern": {"k_proj": 6}, "use_rslora": True}, id="rslora-patterns"),
    pytest.param({"target_modules": ["o_proj"], "lora_dropout": 0.5}, id="dropout"),
    pytest.param({"init_lora_weights": "gaussian"}, id="gaussian"),
    pytest.param({"init_lora_weights": "orthogonal"}, id="orthogonal"),
    pytest.param({"exclude_modules": ["down_proj"], "task_type": "CAUSAL_LM"}, id="excluded"),
]


@pytest.mark.parametrize("lora", SAVED)
def test_what_peft_saved_is_read_exactly(lora: dict[str, object], tmp_path: Path) -> None:
    model = tiny_peft(**lora)
    model.save_pretrained(tmp_path)
    adapter = read_adapter("emoji", str(tmp_path), LINEARS)
    assert_is(adapter, model)
    assert (adapter.name, adapter.source, adapter.folder) == ("emoji", str(tmp_path), tmp_path)


def saved_with_base_weights(model: peft.PeftModel, folder: Path) -> set[str]:
    """Save an adapter as peft does by default, and return what else is in its file."""
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        model.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    return {key.removeprefix(PREFIX) for key in tensors if "lora_" not in key}


def own_weights_of(model: nn.Module):
    return functools.partial(parameter_of, model)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_an_adapter_of_the_last_linear_is_read(tied, dtype, tmp_path: Path) -> None:
    """With the weight of the base model that peft adds to its file."""
    base = tiny_model(tie_word_embeddings=tied)
    model = tiny_peft(model=copy.deepcopy(base), target_modules=["lm_head", "q_proj"]).to(dtype)
    assert saved_with_base_weights(model, tmp_path) == {"lm_head.base_layer.weight"}
    own = own_weights_of(base)
    assert_is(read_adapter("emoji", tmp_path, LINEARS, own_weight=own), model)
    message = refusal(tmp_path)
    assert "lm_head.base_layer.weight': the base model has no such weight to compare" in message
    assert "save_embedding_layers=False" in message
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_is(read_adapter("emoji", tmp_path, LINEARS), model)


def test_an_adapter_beside_a_resized_vocabulary_is_read(tmp_path: Path) -> None:
    base = tiny_model()
    base.resize_token_embeddings(67, mean_resizing=False)
    model = tiny_peft(model=copy.deepcopy(base), target_modules=["q_proj"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    linears = linears_of(base)
    assert_is(read_adapter("emoji", tmp_path, linears, own_weight=own_weights_of(base)), model)
    message = refusal(tmp_path, own_weight=own_weights_of(tiny_model()))
    assert "has shape [67, 32], and the base model's own [64, 32]; was its vocabulary" in message


@pytest.mark.parametrize("at", [0, -1])
def test_weights_of_the_base_model_that_are_others_are_refused(at, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checks, "_COMPARED_AT_ONCE", 100)
    saved_with_base_weights(tiny_peft(target_modules=["lm_head", "q_proj"]), tmp_path)
    base = tiny_model()
    assert read_adapter("emoji", tmp_path, LINEARS, own_weight=own_weights_of(base))
    with torch.no_grad():
        base.lm_head.weight.view(-1)[at] += 1e-3
    message = refusal(tmp_path, own_weight=own_weights_of(base))
    assert "lm_head.base_layer.weight' is not what the base model has there" in message
    base.lm_head.to("meta")
    message = refusal(tmp_path, own_weight=own_weights_of(base))
    assert "the base model has no such weight to compare it with" in message


def test_a_file_of_nothing_but_weights_of_the_base_model_is_no_adapter(folder: Path) -> None:
    base = tiny_model()

    def only_base(tensors):
        tensors.clear()
        tensors[f"{PREFIX}lm_head.base_layer.weight"] = base.lm_head.weight.detach().clone()

    reweigh(folder, only_base)
    assert "it has no tensors of LoRA" in refusal(folder, own_weight=own_weights_of(base))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_dtype_of_the_files_is_kept(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_peft(family).to(dtype)
    model.save_pretrained(tmp_path)
    adapter = read_adapter("emoji", tmp_path, linears_of(tiny_model(family)))
    assert_is(adapter, model)
    assert adapter.files_dtype == dtype


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({}, (4, (4,), "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj", 3712)),
        (
            {"rank_pattern": {"v_proj": 2}, "target_modules": ["v_proj", "q_proj"], "r": 1},
            (2, (1, 2), "q_proj, v_proj", 320),
        ),
    ],
    ids=["all-linear", "two"],
)
def test_what_is_told_of_an_adapter(lora, expected, tmp_path: Path) -> None:
    model = tiny_peft(**lora)
    model.save_pretrained(tmp_path)
    adapter = read_adapter("emoji", tmp_path, LINEARS)
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    assert sum(p.numel() for p in weights) == expected[-1]
    for each in (adapter, adapter.without_weights()):
        assert (each.rank, each.ranks, each.targets, each.parameters) == expected
        assert each.files_dtype == FP32
        assert (each.name, each.fingerprint) == (adapter.name, adapter.fingerprint)
    light = adapter.without_weights()
    assert all(each.lora_a.is_meta and each.lora_b.is_meta for each in light.factors.values())
    assert [f.scaling for f in light.factors.values()] == [
        f.scaling for f in adapter.factors.values()
    ]


def test_many_targets_are_abridged() -> None:
    factors = {
        f"h.{n}": LoraFactors(torch.zeros(1, 2), torch.zeros(2, 1, dtype=BF16), 1.0)
        for n in range(10)
    }
    adapter = Adapter("emoji", "", factors, "", None)
    assert adapter.targets == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert adapter.files_dtype == FP32


def test_the_fingerprint_is_of_what_is_computed(folder: Path) -> None:
    first = read_adapter("emoji", folder, LINEARS).fingerprint
    configure(folder, inference_mode=False, base_model_name_or_path="elsewhere")
    assert read_adapter("other", folder, LINEARS).fingerprint == first
    configure(folder, lora_alpha=9)
    second = read_adapter("emoji", folder, LINEARS).fingerprint
    reweigh(folder, lambda tensors: tensors[Q_PROJ_B][0].neg_())
    third = read_adapter("emoji", folder, LINEARS).fingerprint
    reweigh(folder, lambda tensors: tensors.update({k: t.half() for k, t in tensors.items()}))
    fourth = read_adapter("emoji", folder, LINEARS).fingerprint
    reweigh(folder, lambda tensors: tensors.update({k: t.view(BF16) for k, t in tensors.items()}))
    fifth = read_adapter("emoji", folder, LINEARS).fingerprint
    assert len({first, second, third, fourth, fifth}) == 5


def test_tensors_need_not_be_aligned(folder: Path) -> None:
    adapter = read_adapter("emoji", folder, LINEARS)
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    # 66 bytes of fp16 in front of the others.
    moved = {
        key: {**value, "data_offsets": [offset + 66 for offset in value["data_offsets"]]}
        for key, value in header.items()
        if key != "__metadata__"
    }
    for factor, shape, offsets in (("A", [1, 31], [0, 62]), ("B", [2, 1], [62, 66])):
        entry = {"dtype": "F16", "shape": shape, "data_offsets": offsets}
        moved[f"{PREFIX}extra.lora_{factor}.weight"] = entry
    text = json.dumps(moved).encode()
    (folder / WEIGHTS).write_bytes(
        struct.pack("<Q", len(text)) + text + bytes(66) + data[8 + length :]
    )
    configure(folder, rank_pattern={"extra": 1})
    shifted = read_adapter("emoji", folder, {"extra": (2, 31), **LINEARS})
    for path, factors in adapter.factors.items():
        assert torch.equal(shifted.factors[path].lora_a, factors.lora_a)
        assert torch.equal(shifted.factors[path].lora_b, factors.lora_b)


# Names of adapters.


@pytest.mark.parametrize("name", ["a", "emoji", "Emoji-v1.2_b:c+d@e", "1", "x" * 128, "-", "base1"])
def test_names_that_are_allowed(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "0 characters"),
        ("x" * 129, "129 characters"),
        ("a/b", "'/'"),
        ("a\\b", r"'\\'"),
        ("a b", "' '"),
        ("a\n", r"'\n'"),
        ("a\x00", r"'\x00'"),
        ("né", r"'\xe9'"),
        ("表情", r"'\u8868'"),
        ("\ud800", r"'\ud800'"),
        ("\u202e", r"'\u202e'"),
        (".hidden", "begins with a dot"),
        ("a..b", "two in a row"),
        ("..", "dot"),
        ("base", "base model"),
        ("Base", "base model"),
        ("None", "no adapter"),
        (None, "NoneType"),
        (3, "int"),
    ],
)
def test_names_that_are_refused(name: object, expected: str, folder: Path) -> None:
    for check in (lambda: check_name(name), lambda: read_adapter(name, folder, LINEARS)):
        with pytest.raises(AdapterError) as caught:
            check()
        message = str(caught.value)
        assert expected in message
        assert "cannot be the name of an adapter" in message
        assert message.isprintable()
