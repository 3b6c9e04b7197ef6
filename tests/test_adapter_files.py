"""Reading peft adapters: what peft saves is read exactly, anything else is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct
import time
from pathlib import Path

import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from tiny_models import tiny_model, tiny_peft
from torch import nn

from fastlora.adapters import config, files
from fastlora.adapters.adapter import Adapter, LoraFactors, check_name
from fastlora.adapters.checks import PREFIX
from fastlora.adapters.errors import AdapterError, Refusal
from fastlora.adapters.files import CONFIG, WEIGHTS, read_adapter

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
Q_PROJ = "model.layers.0.self_attn.q_proj"
Q_PROJ_A, Q_PROJ_B = (f"{PREFIX}{Q_PROJ}.{factor}.weight" for factor in ("lora_A", "lora_B"))


def linears_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


LINEARS = linears_of(tiny_model())


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return {path: each for path, each in base.named_modules() if isinstance(each, LoraLayer)}


def assert_is(adapter: Adapter, model: nn.Module, name: str = "default") -> None:
    """Compare every factor with the layers of the peft model, bit by bit."""
    layers = {path: each for path, each in lora_layers(model).items() if name in each.lora_A}
    assert list(adapter.factors) == list(layers)
    for path, layer in layers.items():
        factors = adapter.factors[path]
        for ours, theirs in (
            (factors.lora_a, layer.lora_A[name].weight),
            (factors.lora_b, layer.lora_B[name].weight),
        ):
            assert ours.dtype == theirs.dtype
            assert ours.is_contiguous()
            assert torch.equal(ours, theirs)
        assert factors.scaling == layer.scaling[name]
        assert factors.rank == layer.r[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter of rank 4 on all linears, as peft saved it; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_peft().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "adapter")


def configure(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def reweigh(folder: Path, change) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def refusal(source: object, linears=LINEARS, name: str = "emoji", **options: int) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter(name, source, linears, **options)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    return message.removeprefix(f"{name}: ")


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


def test_an_adapter_of_the_last_linear_is_read(tmp_path: Path) -> None:
    model = tiny_peft(target_modules=["lm_head", "q_proj"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_is(read_adapter("emoji", tmp_path, LINEARS), model)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        model.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "lm_head.base_layer.weight': weights of the base model" in message
    assert "save_embedding_layers=False" in message


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


# Patterns, as peft resolves them.

KEYS = [
    "q_proj",
    "self_attn.q_proj",
    Q_PROJ,
    rf"^{Q_PROJ}",
    r".*\.1\..*",
    r"model\.layers\.(0|1)\.mlp\.(up|gate)_proj",
    r"layers.[01].self_attn.\w+",
    "proj",
    r".*_proj",
    "mlp.down_proj|o_proj",
    "model.layers.1",
    "nothing",
]
patterns = st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9), max_size=4)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(ranks=patterns, alphas=patterns, rslora=st.booleans(), alpha=st.integers(1, 40))
def test_scalings_of_random_patterns_are_those_of_peft(ranks, alphas, rslora, alpha, tmp_path):
    # Sorted, as they are saved: in another order they may say another rank when they are loaded.
    ranks, alphas = dict(sorted(ranks.items())), dict(sorted(alphas.items()))
    model = tiny_peft(
        rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora, lora_alpha=alpha, r=3
    )
    model.save_pretrained(tmp_path)
    assert_is(read_adapter("emoji", tmp_path, LINEARS), model)


def test_patterns_that_saving_reorders_are_read_as_peft_loads_them(tmp_path: Path) -> None:
    model = tiny_peft(alpha_pattern={"q_proj": 2, r".*\.1\..*_proj": 16})
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert_is(read_adapter("emoji", tmp_path, LINEARS), loaded)
    assert_is(read_adapter("emoji", model, LINEARS), model)
    layers = [lora_layers(each)["model.layers.1.self_attn.q_proj"] for each in (model, loaded)]
    assert [layer.scaling["default"] for layer in layers] == [0.5, 4.0]
    tiny_peft(rank_pattern={"q_proj": 2, r".*\.1\..*_proj": 8}).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "has rank 2, and its config says 8 (the first key of rank_pattern" in message


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what Python says of "[["
@settings(max_examples=200, deadline=None)
@given(
    pattern=st.dictionaries(
        st.sampled_from(KEYS) | st.text("a.b*?|()\\1[]^", max_size=6), st.integers(1, 9), max_size=5
    )
)
def test_patterns_are_resolved_as_in_peft(pattern):
    paths = [*LINEARS, "a", "a.b", "aab", "b.a.b"]
    try:
        ours = config.by_module(pattern, paths, "rank_pattern")
    except Refusal:
        return
    theirs = {path: pattern.get(get_pattern_key(pattern.keys(), path)) for path in paths}
    assert ours == {path: value for path, value in theirs.items() if value is not None}


def test_without_pefts_helper_patterns_are_resolved_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = {key: value for value, key in enumerate(KEYS)}
    expected = config.by_module(pattern, LINEARS, "rank_pattern")
    monkeypatch.delattr("peft.utils.other.get_pattern_key")
    assert config.by_module(pattern, LINEARS, "rank_pattern") == expected
    assert len(expected) > 10


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("(.*a)*b", "repeated groups"),
        (r"((\w+)+)!", "repeated groups"),
        ("(?:x|x){20}", "repeated groups"),
        ("(?=a)b", "looking around"),
        ("(?i)Q_PROJ", "flags"),
        (".*" * 9 + "!", "repeats 9 parts, at most 8"),
        ("x?" * 9, "repeats 9 parts, at most 8"),
        (".*" * 8 + "!", "it takes too long to match"),
        ("(.|.)" * 40, "it takes too long to match"),
        ("q" * 5000, "5000 characters, at most 4096"),
        ("(q_proj", "not a regular expression"),
        ("q_proj\\", "not a regular expression"),
    ],
)
def test_patterns_that_take_for_ever_are_refused(pattern: str, expected: str, folder: Path) -> None:
    configure(folder, alpha_pattern={pattern: 4})
    start = time.process_time()
    message = refusal(folder)
    assert time.process_time() - start < 5
    assert message.startswith(f"{CONFIG}: alpha_pattern[")
    assert expected in message


def test_too_many_patterns_are_refused(folder: Path) -> None:
    # To compile and try each takes 30 us, and a config may have a million of them.
    configure(folder, alpha_pattern={f"module_{n}": 1 for n in range(10_000)})
    assert "it takes too long to match" in refusal(folder)


# Configs.

REFUSED_FIELDS = [
    ("alora_invocation_tokens", [1, 2], "aLoRA"),
    ("arrow_config", {"top_k": 3}, "Arrow"),
    ("bias", "all", "biases of the base model"),
    ("bias", "lora_only", "biases of the base model"),
    ("fan_in_fan_out", True, "Conv1D"),
    ("kasa_config", {"beta": 1e-4}, "KaSA"),
    ("layer_replication", [[0, 1]], "repeats layers"),
    ("lora_bias", True, "merge_and_unload"),
    ("megatron_config", {"a": 1}, "Megatron"),
    ("modules_to_save", ["lm_head"], "merge_and_unload"),
    ("monteclora_config", {"buffer_size": 1}, "MonteCLoRA"),
    ("target_parameters", ["experts.down_proj"], "bare parameters"),
    ("trainable_token_indices", [1], "embedding"),
    ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
    ("use_dora", True, "DoRA"),
    ("use_qalora", True, "QA-LoRA"),
    ("velora_config", {"scale": 1.0}, "VeLoRA"),
    ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "OLoRA", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "lora_ga", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "loftq", "LoftQ rounded"),
    ("init_lora_weights", "new", "not known"),
    ("init_lora_weights", ["eva"], "not known"),
    ("use_new_thing", True, "does not know"),
    ("new_config", {"a": 1}, "does not know"),
    ("new\x1b[31m", 0, r"'new\x1b[31m'"),
]


@pytest.mark.parametrize(
    ("field", "value", "expected"), REFUSED_FIELDS, ids=lambda value: repr(value)[:30]
)
def test_what_is_not_plain_lora_is_refused_by_name(
    field: str, value: object, expected: str, folder: Path
) -> None:
    configure(folder, **{field: value})
    message = refusal(folder)
    assert message.startswith(f"{CONFIG}: ")
    assert field.removesuffix("\x1b[31m") in message
    assert expected in message
    assert repr(value) in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA', only 'LORA' is supported"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r is 0, not an integer of at least 1"),
        ({"r": 4.0}, "r is 4.0, not an integer"),
        ({"r": True}, "r is True, not an integer"),
        ({"r": None}, "r is None, not an integer"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', not a number"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan, not a finite number"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf, not a finite number"),
        ({"lora_alpha": 10**400}, "not a finite number"),
        ({"lora_alpha": 1e300}, "the scaling of model.layers.0.self_attn.q_proj is 2.5e+299"),
        ({"use_rslora": "false"}, "use_rslora is 'false', not true or false"),
        ({"use_rslora": 1}, "use_rslora is 1, not true or false"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj'], not an object"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0, not an integer"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern['q_proj'] is None, not a number"),
    ],
    ids=repr,
)
def test_senseless_values_are_refused(fields, expected: str, folder: Path) -> None:
    configure(folder, **fields)
    assert expected in refusal(folder)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_fields_that_decide_are_required(field: str, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config[field]
    (folder / CONFIG).write_text(json.dumps(config))
    assert field in refusal(folder)


@pytest.mark.parametrize("off", [None, False, {}, [], ""], ids=repr)
def test_fields_that_are_off_do_no_harm(off: object, folder: Path) -> None:
    new = {field: off for field, _, _ in REFUSED_FIELDS if field != "init_lora_weights"}
    configure(folder, **new, use_rslora=None, rank_pattern=None, alpha_pattern=None)
    assert len(read_adapter("emoji", folder, LINEARS).factors) == 14


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "MiCA"])
def test_initialisations_that_leave_the_base_alone_do_no_harm(init: object, folder: Path) -> None:
    configure(folder, init_lora_weights=init, eva_config={"rho": 2.0}, corda_config={"a": 1})
    assert len(read_adapter("emoji", folder, LINEARS).factors) == 14


def test_every_field_of_the_installed_peft_is_known() -> None:
    tables = config._USED | config._HARMLESS | set(config._REFUSED)
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= tables


def test_a_field_that_only_peft_knows_may_have_its_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "_HARMLESS", config._HARMLESS - {"qalora_group_size"})
    read_adapter("emoji", folder, LINEARS)
    configure(folder, qalora_group_size=32)
    assert "'qalora_group_size' is 32: this version of fastlora" in refusal(folder)


def test_nothing_that_a_config_names_is_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args, **kwargs):
        raise AssertionError

    for owner, name in (
        (torch, "load"),
        (huggingface_hub, "snapshot_download"),
        (huggingface_hub, "hf_hub_download"),
        (peft.PeftConfig, "from_pretrained"),
    ):
        monkeypatch.setattr(owner, name, never)
    configure(
        folder,
        base_model_name_or_path="/etc/passwd",
        revision="../..",
        auto_mapping={"base_model_class": "os", "parent_library": "os"},
        target_modules="(a+)+$",
        megatron_core="os",
        runtime_config={"ephemeral_gpu_offload": True},
    )
    assert len(read_adapter("emoji", folder, LINEARS).factors) == 14


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object, but []"),
        (b'"LORA"', "not a JSON object, but 'LORA'"),
        (b'{"r": 8, "r": 4}', "'r' stands in it twice"),
        (b'{"peft_type": "LORA", "r": 4}', "lora_alpha"),
        (b"{" + b" " * (config._MAX_CONFIG_BYTES + 1), "more than 16777216 bytes"),
    ],
    ids=["empty", "open", "utf-16", "nested", "list", "string", "twice", "short", "large"],
)
def test_damaged_configs_are_refused(text: bytes, expected: str, folder: Path) -> None:
    (folder / CONFIG).write_bytes(text)
    message = refusal(folder)
    assert message.startswith(f"{CONFIG}: ")
    assert expected in message


# Tensors.


def put(key: str, value: torch.Tensor):
    return lambda tensors: tensors.update({key: value})


def other(suffix: str, shape: tuple[int, ...] = (4,)):
    return put(f"{PREFIX}model.layers.0.{suffix}", torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other("self_attn.q_proj.lora_magnitude_vector"), "DoRA"),
        (other("self_attn.q_proj.lora_B.bias"), "biases"),
        (other("self_attn.q_proj.base_layer.weight"), "weights of the base model"),
        (other("embed_tokens.weight"), "save_embedding_layers=False"),
        (other("lm_head.modules_to_save.weight"), "trained whole"),
        (other("embed_tokens.lora_embedding_A", (4, 64)), "embedding"),
        (other("embed_tokens.token_adapter.trainable_tokens_delta"), "embedding"),
        (other("self_attn.q_proj.lora_C.weight"), "only lora_A.weight and lora_B.weight"),
        (other("self_attn.q_proj.lora_A.default.weight"), "only lora_A.weight and lora_B.weight"),
        (put("model.x.lora_A.weight", torch.zeros(4, 4)), f"does not begin with {PREFIX}"),
        (put("\x1b[31m", torch.zeros(4, 4)), r"'\x1b[31m'"),
        (lambda tensors: tensors.pop(Q_PROJ_A), f"tensor '{Q_PROJ_B}': there is no lora_A"),
        (lambda tensors: tensors.pop(Q_PROJ_B), f"tensor '{Q_PROJ_A}': there is no lora_B"),
        (lambda tensors: tensors.clear(), "it has no tensors"),
        (put(Q_PROJ_A, torch.zeros(4, 33)), "has shape [4, 33], and model.layers.0.self_attn."),
        (put(Q_PROJ_B, torch.zeros(64, 4)), "base model needs [32, r]"),
        (put(Q_PROJ_B, torch.zeros(32, 4, 1)), "has shape [32, 4, 1]"),
        (put(Q_PROJ_A, torch.zeros(5, 32)), "lora_A of rank 5 and lora_B of rank 4"),
        (
            lambda tensors: tensors.update(
                {Q_PROJ_A: torch.zeros(0, 32), Q_PROJ_B: torch.zeros(32, 0)}
            ),
            "lora_A of rank 0 and lora_B of rank 0",
        ),
        (
            lambda tensors: tensors.update(
                {Q_PROJ_A: torch.zeros(5, 32), Q_PROJ_B: torch.zeros(32, 5)}
            ),
            "has rank 5, and its config says 4 (r)",
        ),
        (put(Q_PROJ_A, torch.zeros(4, 32, dtype=FP64)), "is 'F64', only F32, F16, BF16"),
        (put(Q_PROJ_A, torch.zeros(4, 32, dtype=torch.int8)), "is 'I8', only F32, F16, BF16"),
        (put(Q_PROJ_A, torch.zeros(4, 32).to(torch.float8_e4m3fn)), "is 'F8_E4M3', only F32"),
        (lambda tensors: tensors[Q_PROJ_A].view(-1)[7:8].fill_(math.nan), "has NaN in it"),
        (lambda tensors: tensors[Q_PROJ_B].view(-1)[-1:].fill_(math.inf), "has infinity in it"),
        (lambda tensors: tensors[Q_PROJ_B].view(-1)[:1].fill_(-math.inf), "has infinity in it"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, expected: str, folder: Path) -> None:
    reweigh(folder, change)
    message = refusal(folder)
    assert message.startswith(f"{WEIGHTS}: ")
    assert expected in message
    assert message.isprintable()


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_nan_is_found_in_half_precision(dtype: torch.dtype, folder: Path) -> None:
    def change(tensors):
        tensors[Q_PROJ_A] = tensors[Q_PROJ_A].to(dtype)
        tensors[Q_PROJ_A][2, 3] = math.nan

    reweigh(folder, change)
    assert f"tensor '{Q_PROJ_A}' has NaN in it" in refusal(folder)


def test_an_adapter_of_another_model_is_refused_with_what_is_alike(folder: Path) -> None:
    linears = {path.replace("model.", "model.language_model."): n for path, n in LINEARS.items()}
    message = refusal(folder, linears)
    assert "the base model has no linear 'model.layers." in message
    assert message.count(", model.language_model.layers.") == 1
    assert ", but model.language_model.layers." in message
    assert "another model" in message
    assert "the base model has no linear" in refusal(folder, {"something": (2, 2)})


def test_a_rank_beyond_the_largest_is_refused(folder: Path) -> None:
    assert "has rank 4, at most 3 is allowed" in refusal(folder, max_rank=3)
    assert read_adapter("emoji", folder, LINEARS, max_rank=4).rank == 4


def test_ranks_that_the_config_does_not_say_are_refused(folder: Path) -> None:
    configure(folder, rank_pattern={"q_proj": 2})
    message = refusal(folder)
    assert f"{Q_PROJ} has rank 4, and its config says 2 (the first key of rank_pattern" in message


def test_a_file_of_senseless_size_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "read_data", None)
    rank = 10**6
    entries = {}
    for key, shape in ((Q_PROJ_A, [rank, 32]), (Q_PROJ_B, [32, rank])):
        begin = len(entries) * rank * 64
        entries[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, begin + rank * 64]}
    text = json.dumps(entries).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + rank * 128)  # sparse: it takes no room
    configure(folder, r=rank)
    assert "has rank 1000000, at most 256 is allowed" in refusal(folder)


# Damaged files.


def parts_of(folder: Path) -> tuple[dict[str, object], bytes]:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def entry(**fields: object):
    def change(header):
        header[Q_PROJ_A] = {**header[Q_PROJ_A], **fields}

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (entry(shape=[4, 33]), "takes 528 bytes, but its data_offsets are"),
        (entry(shape=[-4, -32]), "shape is [-4, -32], not a short list of integers"),
        (entry(shape=[4.0, 32]), "not a short list of integers"),
        (entry(shape=[True, 32]), "not a short list of integers"),
        (entry(shape="432"), "not a short list of integers"),
        (entry(shape=[9] * 100_000), "not a short list of integers"),
        (entry(data_offsets=[512, 0]), "but its data_offsets are [512, 0]"),
        (entry(data_offsets=[0]), "but its data_offsets are [0]"),
        (entry(data_offsets=[3, 515]), "where the one before it ends at"),
        (entry(dtype=["F32"]), "is ['F32'], only F32"),
        (entry(more=1), "dtype, shape and data_offsets are needed"),
        (lambda header: header.update({Q_PROJ_A: 3}), "are needed, not 3"),
        (lambda header: header.update(__metadata__={"format": 1}), "not an object of strings"),
        (lambda header: header.update(__metadata__=[]), "not an object of strings"),
        (lambda header: header.pop(Q_PROJ_A), "of the data, where the one before it ends"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(
    change, expected: str, folder: Path
) -> None:
    header, data = parts_of(folder)
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)
    message = refusal(folder)
    assert message.startswith(f"{WEIGHTS}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "it has 0 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "9223372036854775808"),
        (struct.pack("<Q", 3_000_000) + b"{" + b" " * 2_999_999, "of at most 1063936"),
        (struct.pack("<Q", 2) + b"[]", "not safetensors: its header begins with b'[]'"),
        (struct.pack("<Q", 2) + b"{}", "it has no tensors"),
        (struct.pack("<Q", 2) + b"{}x", "take 0 bytes, and 1 follow the header"),
        (struct.pack("<Q", 1) + b"{", "not JSON"),
        (struct.pack("<Q", 900_000) + b'{"a":' + b"[" * 899_995, "not JSON"),
        (b"PK\x03\x04" + bytes(100), "not safetensors"),
    ],
    ids=["empty", "huge", "large", "list", "none", "more", "open", "nested", "zip"],
)
def test_what_is_not_safetensors_is_refused(data: bytes, expected: str, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(data)
    message = refusal(folder)
    assert message.startswith(f"{WEIGHTS}: ")
    assert expected in message


def test_files_that_were_cut_off_are_refused(folder: Path) -> None:
    for name, word in ((WEIGHTS, "cut off"), (CONFIG, "not JSON")):
        data = (folder / name).read_bytes()
        step = max(1, len(data) // 150)
        for length in [*range(24), *range(24, len(data), step), len(data) - 1]:
            (folder / name).write_bytes(data[:length])
            message = refusal(folder)
            assert message.startswith(f"{name}: ")
            assert word in message
        (folder / name).write_bytes(data)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x")
    assert "too long" in refusal(folder)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_are_refused_or_give_the_same_shapes(data, saved: Path, tmp_path: Path):
    name = data.draw(st.sampled_from([WEIGHTS, WEIGHTS, CONFIG]))
    text = bytearray((saved / name).read_bytes())
    end = 8 + struct.unpack("<Q", text[:8])[0] if name == WEIGHTS else len(text)
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    for each in (CONFIG, WEIGHTS):
        (tmp_path / each).write_bytes(text if each == name else (saved / each).read_bytes())
    try:
        adapter = read_adapter("emoji", tmp_path, LINEARS)
    except AdapterError:
        return
    assert len(adapter.factors) == 14
    reference = safetensors.torch.load(bytes(text)) if name == WEIGHTS else None
    for path, factors in adapter.factors.items():
        n, k = LINEARS[path]
        assert (factors.lora_a.shape, factors.lora_b.shape) == ((4, k), (n, 4))
        if reference is not None:
            assert torch.equal(factors.lora_a, reference[f"{PREFIX}{path}.lora_A.weight"])


def test_a_file_that_is_written_to_meanwhile_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = files.read_data

    def meanwhile(*args):
        os.utime(folder / CONFIG, ns=(1, 1))
        return read(*args)

    monkeypatch.setattr(files, "read_data", meanwhile)
    assert "was written to while it was read" in refusal(folder)


def test_a_file_that_shrinks_meanwhile_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = files.check_tensors

    def meanwhile(*args):
        fits = check(*args)
        os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 64)
        return fits

    monkeypatch.setattr(files, "check_tensors", meanwhile)
    assert "cut off" in refusal(folder)


# Folders and links.


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert refusal(folder) == f"{str(folder)!r} has no {WEIGHTS}"
    assert refusal(tmp_path) == (
        f"{str(tmp_path)!r} has no {CONFIG}; perhaps a folder in it is meant: 'adapter'"
    )
    (folder / CONFIG).unlink()
    assert refusal(folder) == f"{str(folder)!r} has no {CONFIG}"


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl"])
def test_pickles_are_refused_without_a_look(
    suffix: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / WEIGHTS).rename(folder / f"adapter_model.{suffix}")
    message = refusal(folder)
    assert f"only 'adapter_model.{suffix}': that is a pickle" in message
    assert "save_pretrained" in message


def test_snapshots_with_a_pickle_on_the_hub_say_so(saved: Path, tmp_path: Path) -> None:
    _, snapshot = hub_cache(tmp_path, saved)
    (snapshot / WEIGHTS).unlink()
    assert f"has no {WEIGHTS}; an adapter_model.bin on the hub is a pickle" in refusal(snapshot)


def test_hub_snapshots_are_read_through_their_links(saved: Path, tmp_path: Path) -> None:
    _, snapshot = hub_cache(tmp_path, saved)
    adapter = read_adapter("emoji", snapshot, LINEARS)
    assert adapter.fingerprint == read_adapter("emoji", saved, LINEARS).fingerprint


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    ("under", "target"),
    [("adapter", "elsewhere"), ("repo/snapshots/0", "elsewhere"), ("a/b/adapter", "a/blobs")],
)
def test_links_out_of_the_folder_are_refused(
    name: str, under: str, target: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / under)
    (tmp_path / target).mkdir()
    (folder / name).rename(tmp_path / target / "file")
    (folder / name).symlink_to(tmp_path / target / "file")
    assert f"{name} is a link to" in refusal(folder)
    assert "outside of its folder" in refusal(folder)


def test_the_blobs_of_a_snapshot_may_not_be_elsewhere(saved: Path, tmp_path: Path) -> None:
    cache, snapshot = hub_cache(tmp_path, saved)
    (cache / "models--org--name" / "blobs").rename(tmp_path / "elsewhere")
    (cache / "models--org--name" / "blobs").symlink_to(tmp_path / "elsewhere")
    assert "outside of its folder" in refusal(snapshot)


def test_links_within_and_to_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(folder / "v3.safetensors")
    (folder / WEIGHTS).symlink_to("v3.safetensors")
    (tmp_path / "current").symlink_to(folder)
    assert len(read_adapter("emoji", tmp_path / "current", LINEARS).factors) == 14


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
        (lambda path: path.symlink_to(path.name), ""),
        (lambda path: path.symlink_to("nothing"), f"has no {WEIGHTS}"),
    ],
    ids=["directory", "pipe", "loop", "dangling"],
)
def test_what_is_no_file_is_refused(make, expected: str, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    make(folder / WEIGHTS)
    message = refusal(folder)
    assert WEIGHTS in message
    assert expected in message


# Names of sources.


REVISION = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(tmp_path: Path, saved: Path) -> tuple[Path, Path]:
    """Lay an adapter out as the hub's cache does; returns the cache and the snapshot."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / REVISION
    for part in (repo / "blobs", snapshot, repo / "refs"):
        part.mkdir(parents=True)
    for number, name in enumerate((CONFIG, WEIGHTS)):
        shutil.copy(saved / name, repo / "blobs" / f"{number}")
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (repo / "refs" / "main").write_text(REVISION)
    return tmp_path / "hub", snapshot


@pytest.fixture
def offline_hub(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache, snapshot = hub_cache(tmp_path, saved)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


@pytest.mark.parametrize("source", ["org/name", "org/name@main", f"org/name@{REVISION}"])
def test_hub_ids_are_found_in_the_cache(source: str, offline_hub: Path) -> None:
    adapter = read_adapter("emoji", source, LINEARS)
    assert (adapter.source, adapter.folder) == (source, offline_hub)


def test_a_hub_id_that_is_nowhere_says_where_it_was_looked_for(offline_hub: Path) -> None:
    here = str(Path.cwd() / "org/other")
    message = refusal("org/other")
    assert f"there is no folder {here!r}, and org/other was not found in the hub's" in message
    assert "cache (HF_HUB_OFFLINE is set): LocalEntryNotFoundError: Cannot find" in message
    assert "org/name at revision v2 was not found in the hub's cache" in refusal("org/name@v2")


def test_what_the_hub_says_is_passed_on(offline_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repo, **asked):
        assert (repo, asked["revision"], asked["local_files_only"]) == ("org/other", "v2", False)
        assert asked["allow_patterns"] == [CONFIG, WEIGHTS]
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal("org/other@v2")
    assert message.endswith("at revision v2 was not found on the hub: ConnectionError: no route")


def test_a_folder_is_taken_before_the_hub(offline_hub: Path, folder: Path) -> None:
    shutil.copytree(folder, "org/name")
    adapter = read_adapter("emoji", "org/name", LINEARS)
    assert adapter.folder == Path.cwd() / "org/name"


@pytest.mark.parametrize(
    "source",
    [
        *("/org/name", "./org/name", "../name", "~/name", "~org/name", "org\\name", ".\\name"),
        *("name", "a/b/c", "org/../name", "org/name@", "org/name@../main", "org/name@a/../b"),
        *("-org/name", "org/.name", "", "org/na\nme", "org/name\x00", "ürg/name"),
        *("http://org/name", "org/name/", Path("org/other")),
    ],
)
def test_what_is_no_hub_id_is_never_looked_for_there(
    source: str | Path, offline_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **_: asked.append(args))
    message = refusal(source)
    assert not asked
    assert "folder" in message
    assert message.isprintable()


def test_paths_are_not_told_of_the_hub(offline_hub: Path) -> None:
    for source in ("/org/name", "./org/name", "../org/name", "~/org/name", "org\\name"):
        assert "hub id" not in refusal(source)
    assert 'this is no hub id either ("org/name")' in refusal("name")


def test_a_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert read_adapter("emoji", "~/adapter", LINEARS).folder == folder


def test_sources_of_another_kind_are_refused(folder: Path) -> None:
    assert f"is a file; the folder with {CONFIG}" in refusal(folder / CONFIG)
    assert "a folder, a hub id or a peft model is needed, not 3" in refusal(3)
    assert "is neither a folder nor a hub id" in refusal(os.fsdecode(b"a\x00"))
    assert "File name too long" in refusal("x" * 5000)
    assert "there is no folder" in refusal("\ud800")


# Live models.


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
