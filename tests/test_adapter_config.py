"""What an adapter's config asks for is done as peft does it, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import huggingface_hub
import peft
import pytest
import saved_adapters
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from saved_adapters import LINEARS, Q_PROJ, assert_is, configure, lora_layers, refusal
from tiny_models import tiny_model, tiny_peft

from fastlora.adapters import config
from fastlora.adapters.errors import Refusal
from fastlora.adapters.files import CONFIG, read_adapter

saved = saved_adapters.saved
folder = saved_adapters.folder


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
