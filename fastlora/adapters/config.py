"""What an adapter's config asks for: every field of it is known, harmless, off, or refused.

``adapter_config.json`` as peft writes it, or what a live model has in its place.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

from fastlora.adapters.errors import Refusal, shown

_MAX_CONFIG_BYTES = 16 << 20  # two patterns for each linear of the largest MoE are 6 MiB

# All patterns on all modules may be tried in so many ways, each of which takes a nanosecond or two;
# to compile a pattern takes as long as so many ways for each character, and for 20 more.
_MAX_WAYS, _WAYS_TO_COMPILE = 3 * 10**8, 1000
_MAX_PATTERN_CHARACTERS, _MAX_REPEATS = 4096, 8

# What is read of a config.
_USED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    "init_lora_weights",
}
# How it was trained and on what, and where the factors are: the file of the weights has them.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("runtime_config", "task_type", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    # These are read only where init_lora_weights asks for them.
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
}
_MERGE = "merge it into a model of its own (merge_and_unload)"
# What changes the computation unless it is off, and why it is not supported.
_REFUSED = {
    "alora_invocation_tokens": "an aLoRA begins where the prompt invokes it, which is not followed",
    "arrow_config": "Arrow routes each token between several adapters",
    "bias": f"biases of the base model were trained, and requests share them; {_MERGE}",
    "fan_in_fan_out": "it was trained on Conv1D layers, whose weights are stored transposed",
    "kasa_config": f"KaSA cuts the base weights and has a diagonal between A and B; {_MERGE}",
    "layer_replication": "it repeats layers of the base model",
    "lora_bias": f"a bias of lora_B is not supported; {_MERGE}",
    "megatron_config": "it was trained on Megatron's parallel layers",
    "modules_to_save": f"whole modules were trained, and requests share them; {_MERGE}",
    "monteclora_config": "MonteCLoRA has the parameters of its sampler beside A and B",
    "target_parameters": "it adapts bare parameters (experts of a MoE model), not linears",
    "trainable_token_indices": "rows of the embedding were trained, and requests share them; "
    + _MERGE,
    "use_bdlora": "the factors of BD-LoRA are block-diagonal",
    "use_dora": f"DoRA rescales the sum of base and adapter weight; {_MERGE}",
    "use_qalora": "QA-LoRA pools its input",
    "velora_config": "VeLoRA has a projection for its backward pass beside A and B",
}
_INITS = ("gaussian", "eva", "orthogonal", "mica")  # these leave the base weights alone
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga")
_CONVERT = (
    "that changed the base weights, and A and B belong to the changed ones; save it again with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=<the adapter before training>), "
    "which makes a plain LoRA of it"
)


@dataclass(frozen=True)
class Settings:
    """What of a config decides the computation, and the scalings of a live model by path."""

    where: str
    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    scalings: Mapping[str, float] | None = None


def read_config(file: BufferedReader) -> dict[str, Any]:
    """Read a config from its file, of a limited size."""
    text = file.read(_MAX_CONFIG_BYTES + 1)
    if len(text) > _MAX_CONFIG_BYTES:
        raise Refusal(f"it has more than {_MAX_CONFIG_BYTES} bytes")
    return json_object(text)


def json_object(text: bytes) -> dict[str, Any]:
    """Return the object that a JSON text is."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refusal(f"it is not a JSON object, but {shown(value)}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of pairs; readers differ in which of two equal names counts."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{shown(name)} stands in it twice")
        values[name] = value
    return values


def settings_of(config: Mapping[str, Any], where: str) -> Settings:
    """Check every field of a config, which stands there."""
    if config.get("peft_type") != "LORA":
        raise Refusal(f"peft_type is {shown(config.get('peft_type'))}, only 'LORA' is supported")
    for field, value in config.items():
        if field in _USED or field in _HARMLESS or _is_off(field, value):
            continue
        if field in _REFUSED:
            raise Refusal(f"{field} is {shown(value)}: {_REFUSED[field]}")
        if not _is_default(field, value):
            raise Refusal(
                f"{shown(field)} is {shown(value)}: this version of fastlora does not know the "
                "field, which may change what the adapter computes"
            )
    _check_init(config.get("init_lora_weights"))
    for field in ("r", "lora_alpha"):
        if field not in config:
            raise Refusal(f"it has no {field}, without which the scaling is not known")
    rslora = config.get("use_rslora")
    if rslora is not None and not isinstance(rslora, bool):
        raise Refusal(f"use_rslora is {shown(rslora)}, not true or false")
    return Settings(
        where,
        r=_rank(config["r"], "r"),
        alpha=_number(config["lora_alpha"], "lora_alpha"),
        rslora=bool(rslora),
        rank_pattern=_pattern(config, "rank_pattern", _rank),
        alpha_pattern=_pattern(config, "alpha_pattern", _number),
    )


def _is_off(field: str, value: object) -> bool:
    empty = isinstance(value, (dict, list, str)) and not value
    return value is None or value is False or empty or (field == "bias" and value == "none")


def _is_default(field: str, value: object) -> bool:
    """Return whether the installed peft knows a field, and does nothing because of a value."""
    from peft import LoraConfig

    defaults = {known.name: known.default for known in dataclasses.fields(LoraConfig)}
    return type(value) is type(defaults.get(field)) and value == defaults[field]


def _check_init(init: object) -> None:
    word = init.lower() if isinstance(init, str) else init
    if word is None or isinstance(word, bool) or word in _INITS:
        return
    said = f"init_lora_weights is {shown(init)}: "
    if isinstance(word, str) and word.startswith(_CHANGED_BASE):
        raise Refusal(said + _CONVERT)
    if word == "loftq":
        raise Refusal(f"{said}A and B belong to the base weights that LoftQ rounded; {_MERGE}")
    raise Refusal(f"{said}it is not known whether that changed the base weights")


def _rank(value: object, field: str) -> int:
    if type(value) is not int or value < 1:
        raise Refusal(f"{field} is {shown(value)}, not an integer of at least 1")
    return value


def _number(value: object, field: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise Refusal(f"{field} is {shown(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Refusal(f"{field} is {shown(value)}, not a finite number")
    return number


def _pattern(
    config: Mapping[str, Any], field: str, check: Callable[[object, str], Any]
) -> dict[str, Any]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise Refusal(f"{field} is {shown(pattern)}, not an object")
    return {key: check(value, f"{field}[{shown(key)}]") for key, value in pattern.items()}


def by_module(pattern: Mapping[str, Any], paths: Iterable[str], field: str) -> dict[str, Any]:
    """Return what a pattern says for each of the modules that it speaks of, as peft reads it.

    Its keys are regular expressions, and the first that matches the end of a path counts. Some
    regular expressions take for ever to match, which nothing can interrupt: they are refused.
    """
    if not pattern:
        return {}
    matching_key = _pattern_matcher()
    left, ways = list(paths), 0
    longest = max(map(len, left))
    found: dict[str, Any] = {}
    # peft goes through all keys for each path; Python forgets compiled ones beyond a few hundred.
    for key, value in pattern.items():
        if not left:
            break
        said = f"{field}[{shown(key)}]"
        ways += _ways_to_match(key, longest, said) * len(left)
        ways += _WAYS_TO_COMPILE * (len(key) + 20)
        if ways > _MAX_WAYS:
            raise Refusal(f"{said}: with the patterns before it, it takes too long to match")
        try:
            matched = {path for path in left if matching_key((key,), path) == key}
        except (re.error, OverflowError, RecursionError) as error:
            raise Refusal(f"{said} is not a regular expression: {error}") from error
        found.update(dict.fromkeys(matched, value))
        left = [path for path in left if path not in matched]
    return found


def _pattern_matcher() -> Callable[[tuple[str, ...], str], str]:
    try:
        from peft.utils.other import get_pattern_key
    except ImportError:  # it is not one of peft's public names

        def get_pattern_key(keys: tuple[str, ...], path: str) -> str:
            return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), path)

    return get_pattern_key


def _ways_to_match(pattern: str, length: int, said: str) -> int:
    """Return an upper bound on the ways in which a pattern can be tried on so many characters."""
    if len(pattern) > _MAX_PATTERN_CHARACTERS:
        limit = _MAX_PATTERN_CHARACTERS
        raise Refusal(f"{said} has {len(pattern)} characters, at most {limit} are allowed")
    atoms = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    atoms = re.sub(r"\[\^?\]?[^\]]*\]", "x", atoms).replace("(?:", "(")
    if "(?" in atoms or re.search(r"\)[*+{]", atoms):
        raise Refusal(f"{said}: repeated groups, flags and looking around are not supported")
    repeats, optional = sum(map(atoms.count, "*+{")), atoms.count("?")
    most = max(repeats, optional)
    if most > _MAX_REPEATS:
        raise Refusal(f"{said} repeats {most} parts, at most {_MAX_REPEATS} are allowed")
    repeats += 1  # peft puts one before it
    ways = math.comb(length + repeats, repeats) * 2**optional
    alternatives = [1]  # of the groups that are open
    for character in atoms:
        if character == "(":
            alternatives.append(1)
        elif character == "|":
            alternatives[-1] += 1
        elif character == ")" and len(alternatives) > 1:
            ways *= alternatives.pop()
    return ways * math.prod(alternatives)
