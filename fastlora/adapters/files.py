"""Read a peft adapter from a folder, the hub or a live model, and check all of it.

An adapter may come from anybody. So nothing of it is run (no pickle, no code, and no path or name
that stands in its config is followed), sizes are checked before anything is allocated, and what is
not ``scaling * (x A^T) B^T`` is refused with the reason, never ignored.

The weights are read into memory rather than mapped: a process dies of a mapped file that shrinks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
import reprlib
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, before the path of every module
MAX_RANK = 256

_NAME = re.compile(r"[A-Za-z0-9._:+@-]*")
_RESERVED = {"base": "it stands for the base model", "none": "it would be taken for no adapter"}
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

_MAX_CONFIG_BYTES = 16 << 20  # two patterns for each linear of the largest MoE are 6 MiB
_HEADER_BYTES, _HEADER_BYTES_PER_LINEAR = 1 << 20, 1 << 10  # two entries of about 150 each
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FACTOR = re.compile(r"base_model\.model\.(?P<path>.+)\.(?P<factor>lora_[AB])\.weight", re.DOTALL)

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
_OTHER_TENSORS = {  # by what their names have in them
    ".modules_to_save.": "a module that was trained whole is not supported",
    ".original_module.": "a module that was trained whole is not supported",
    ".trainable_tokens_": "trained rows of an embedding are not supported",
    ".lora_embedding_": "LoRA on an embedding is not supported",
    ".lora_magnitude_vector": "DoRA is not supported",
    ".bias": "biases are not supported",
}

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 160


class AdapterError(ValueError):
    """An adapter that cannot be used, and why; the message begins with the adapter's name."""


class _Refusal(Exception):
    """The reason; ``read_adapter`` puts the name before it, and where it was found."""

    where = ""


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """What an adapter adds to one linear: ``scaling * (x A^T) B^T``.

    Attributes:
        lora_a: ``[r, K]`` on the CPU, contiguous; fp32, fp16 or bf16, as it was saved.
        lora_b: ``[N, r]`` likewise.
        scaling: finite, also in fp32.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """How many rows A has."""
        return self.lora_a.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that was read and found to fit the base model.

    Attributes:
        name: what requests call it.
        source: where it is from, to be printed.
        factors: by the path of the linear in the base model, in the order of the base model.
        fingerprint: SHA-256 of the factors: another one when what is computed has changed.
        folder: where its files lie, absolute (in the hub's cache, those of one revision); ``None``
            for a live model.
    """

    name: str
    source: str
    factors: Mapping[str, LoraFactors]
    fingerprint: str
    folder: Path | None

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, in rising order."""
        return tuple(sorted({each.rank for each in self.factors.values()}))

    @property
    def targets(self) -> str:
        """The last names of the linears, such as ``"q_proj, v_proj"``; eight at most."""
        names = list(dict.fromkeys(path.rpartition(".")[2] for path in self.factors))
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(each.lora_a.numel() + each.lora_b.numel() for each in self.factors.values())

    @property
    def files_dtype(self) -> torch.dtype:
        """The dtype it was saved in; of several, the one that holds them all."""
        dtypes = [t.dtype for each in self.factors.values() for t in (each.lora_a, each.lora_b)]
        return functools.reduce(torch.promote_types, dtypes)

    def without_weights(self) -> Adapter:
        """Return the same with tensors on the meta device: everything but the numbers."""
        factors = {
            path: LoraFactors(each.lora_a.to("meta"), each.lora_b.to("meta"), each.scaling)
            for path, each in self.factors.items()
        }
        return dataclasses.replace(self, factors=factors)


def check_name(name: str) -> str:
    """Return ``name`` if an adapter may be called so.

    Raises:
        AdapterError: it is not 1 to 128 ASCII letters, digits or ``. _ - : + @``; or it begins with
            a dot or has two in a row, which would mean something else in a path; or it is ``base``
            or ``None``, in any case.
    """
    reason = None
    if not isinstance(name, str):
        reason = f"it is a {type(name).__name__}, not a str"
    elif not 1 <= len(name) <= 128:
        reason = f"it has {len(name)} characters, and 1 to 128 are allowed"
    elif not _NAME.fullmatch(name):
        found = next(character for character in name if not _NAME.fullmatch(character))
        reason = f"it has {found!a} in it, and ASCII letters, digits and . _ - : + @ are allowed"
    elif name.startswith(".") or ".." in name:
        reason = "it begins with a dot, or has two in a row"
    elif name.lower() in _RESERVED:
        reason = _RESERVED[name.lower()]
    if reason is not None:
        raise AdapterError(f"{_shown(name)} cannot be the name of an adapter: {reason}")
    return name


def read_adapter(
    name: str,
    source: str | os.PathLike[str] | nn.Module,
    linears: Mapping[str, tuple[int, int]],
    *,
    max_rank: int = MAX_RANK,
) -> Adapter:
    """Read an adapter and check that it fits the base model.

    Args:
        name: what requests will call it.
        source: a folder as peft saves it; ``"org/name"`` or ``"org/name@revision"`` on the hub, if
            there is no such folder (what looks like a path is never looked for there: with a
            backslash, or beginning with ``/``, ``./``, ``../`` or ``~``); or a live model of
            peft's, or of transformers' with peft adapters, of which the adapter called ``name`` is
            read, or the only one. Its tensors are copied, and its scalings are what the layers use
            now.
        linears: ``(N, K)``, out and in features, by the path of every linear of the base model that
            an adapter may target.
        max_rank: the largest rank that is accepted.

    Returns:
        The adapter. Linears that it lacks are not among its factors.

    Raises:
        AdapterError: it is missing, damaged, for another model, or more than plain LoRA; the
            message has the file, the tensor or field, and both values.
    """
    check_name(name)
    try:
        if isinstance(source, nn.Module):
            return _read_live(name, source, linears, max_rank)
        if isinstance(source, (str, os.PathLike)):
            return _read_folder(name, source, linears, max_rank)
        raise _Refusal(f"a folder, a hub id or a peft model is needed, not {_shown(source)}")
    except _Refusal as refusal:
        raise AdapterError(f"{name}: {refusal.where}{refusal}") from refusal.__cause__


def _shown(value: object) -> str:
    """Return a value as it is printed in errors: escaped, and cut where it is long."""
    return _repr.repr(value)


@contextlib.contextmanager
def _about(where: str) -> Iterator[None]:
    """Say of what is refused inside, and has no place yet, that it was found there."""
    try:
        yield
    except _Refusal as refusal:
        refusal.where = refusal.where or f"{where}: "
        raise


# Where the files are.


def _read_folder(
    name: str,
    source: str | os.PathLike[str],
    linears: Mapping[str, tuple[int, int]],
    max_rank: int,
) -> Adapter:
    text = os.fspath(source)
    try:
        folder = _folder_of(text, maybe_hub=isinstance(source, str)).absolute()
        with _opened(folder, CONFIG) as config_file, _opened(folder, WEIGHTS) as weights_file:
            files = (config_file, weights_file)
            before = [_stamp(file) for file in files]
            with _about(CONFIG):
                settings = _settings(_read_config(config_file), CONFIG)
            with _about(WEIGHTS):
                entries = _read_header(weights_file, len(linears))
                fits = _check_tensors(entries, settings, linears, max_rank)
                data = _read_data(weights_file, max(entry.end for entry in entries.values()))
                factors = _factors(fits, lambda key: _view(data, entries[key]))
            if [_stamp(file) for file in files] != before:
                raise _Refusal(f"{_shown(str(folder))} was written to while it was read")
    except OSError as error:
        where = _shown(error.filename or text)
        raise _Refusal(f"{where}: {error.strerror or type(error).__name__}") from error
    printable = text if text.isprintable() else ascii(text)
    return Adapter(name, printable, factors, _fingerprint(factors), folder)


def _stamp(file: BufferedReader) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _folder_of(text: str, *, maybe_hub: bool) -> Path:
    """Return the local folder that is meant, downloaded from the hub if it has to be."""
    if not isinstance(text, str) or not text or any(ord(character) < 32 for character in text):
        raise _Refusal(f"{_shown(text)} is neither a folder nor a hub id")
    maybe_hub &= not (text.startswith(("/", "./", "../", "~")) or "\\" in text)
    folder = Path(os.path.expanduser(text) if text.startswith("~") else text)
    if folder.is_dir():
        return folder
    here = _shown(str(folder.absolute()))
    if folder.exists():
        raise _Refusal(f"{here} is a file; the folder with {CONFIG} and {WEIGHTS} is needed")
    hub_id = _HUB_ID.fullmatch(text) if maybe_hub and ".." not in text else None
    if hub_id is None:
        also = ', and this is no hub id either ("org/name")' if maybe_hub else ""
        raise _Refusal(f"there is no folder {here}{also}")
    return _downloaded(hub_id["repo"], hub_id["revision"], here)


def _downloaded(repo: str, revision: str | None, here: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    # Said once more: version 1.33 asks the hub for a commit's files before it looks in its cache.
    offline = bool(constants.HF_HUB_OFFLINE)
    wanted = [CONFIG, WEIGHTS]
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=wanted, local_files_only=offline
            )
        )
    except Exception as error:  # the hub's own errors, and whatever its HTTP library raises
        at = "" if revision is None else f" at revision {revision}"
        place = "in the hub's cache (HF_HUB_OFFLINE is set)" if offline else "on the hub"
        said = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
        raise _Refusal(
            f"there is no folder {here}, and {repo}{at} was not found {place}: "
            f"{type(error).__name__}: {said}"
        ) from error


@contextlib.contextmanager
def _opened(folder: Path, name: str) -> Iterator[BufferedReader]:
    """Open a file of an adapter; a link may lead only to where the hub's cache keeps its files."""
    try:
        path = (folder / name).resolve(strict=True)
    except FileNotFoundError as error:
        raise _Refusal(_missing(folder, name)) from error
    except RuntimeError as error:  # a loop of links, before Python 3.13
        raise _Refusal(f"{name}: {error}") from error
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(path.is_relative_to(each) for each in homes):
        raise _Refusal(f"{name} is a link to {_shown(str(path))}, outside of its folder")
    # Without these a pipe is waited for, and a link that was put there since is followed.
    more = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | more)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _Refusal(f"{name} is not a regular file")
        yield file


def _missing(folder: Path, name: str) -> str:
    said = f"{_shown(str(folder))} has no {name}"
    names = sorted(os.listdir(folder))
    pickles = [each for each in names if each.startswith("adapter") and each.endswith(_PICKLES)]
    if name == WEIGHTS and pickles:
        return (
            f"{said}, only {', '.join(map(_shown, pickles[:3]))}: that is a pickle, and whatever "
            "code is in one runs when it is read. Where you trust it, convert it: "
            "PeftModel.from_pretrained(base_model, folder).save_pretrained(folder)"
        )
    if name == WEIGHTS and folder.parent.name == "snapshots":  # of the hub, only this was asked for
        return f"{said}; an adapter_model.bin on the hub is a pickle, and is not read"
    # save_pretrained gives every adapter but the one called "default" a folder of its own.
    inner = [each for each in names if (folder / each / CONFIG).is_file()]
    if name == CONFIG and inner:
        return f"{said}; perhaps a folder in it is meant: {', '.join(map(_shown, inner[:3]))}"
    return said


# What the config asks for.


@dataclass(frozen=True)
class _Settings:
    """What of a config decides the computation, and the scalings of a live model by path."""

    where: str
    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    scalings: Mapping[str, float] | None = None


def _read_config(file: BufferedReader) -> dict[str, Any]:
    text = file.read(_MAX_CONFIG_BYTES + 1)
    if len(text) > _MAX_CONFIG_BYTES:
        raise _Refusal(f"it has more than {_MAX_CONFIG_BYTES} bytes")
    return _json_object(text)


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _Refusal(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _Refusal(f"it is not a JSON object, but {_shown(value)}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of pairs; readers differ in which of two equal names counts."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{_shown(name)} stands in it twice")
        values[name] = value
    return values


def _settings(config: Mapping[str, Any], where: str) -> _Settings:
    """Check every field of a config, which stands there."""
    if config.get("peft_type") != "LORA":
        raise _Refusal(f"peft_type is {_shown(config.get('peft_type'))}, only 'LORA' is supported")
    for field, value in config.items():
        if field in _USED or field in _HARMLESS or _is_off(field, value):
            continue
        if field in _REFUSED:
            raise _Refusal(f"{field} is {_shown(value)}: {_REFUSED[field]}")
        if not _is_default(field, value):
            raise _Refusal(
                f"{_shown(field)} is {_shown(value)}: this version of fastlora does not know the "
                "field, which may change what the adapter computes"
            )
    _check_init(config.get("init_lora_weights"))
    for field in ("r", "lora_alpha"):
        if field not in config:
            raise _Refusal(f"it has no {field}, without which the scaling is not known")
    rslora = config.get("use_rslora")
    if rslora is not None and not isinstance(rslora, bool):
        raise _Refusal(f"use_rslora is {_shown(rslora)}, not true or false")
    return _Settings(
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
    said = f"init_lora_weights is {_shown(init)}: "
    if isinstance(word, str) and word.startswith(_CHANGED_BASE):
        raise _Refusal(said + _CONVERT)
    if word == "loftq":
        raise _Refusal(f"{said}A and B belong to the base weights that LoftQ rounded; {_MERGE}")
    raise _Refusal(f"{said}it is not known whether that changed the base weights")


def _rank(value: object, field: str) -> int:
    if type(value) is not int or value < 1:
        raise _Refusal(f"{field} is {_shown(value)}, not an integer of at least 1")
    return value


def _number(value: object, field: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _Refusal(f"{field} is {_shown(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Refusal(f"{field} is {_shown(value)}, not a finite number")
    return number


def _pattern(
    config: Mapping[str, Any], field: str, check: Callable[[object, str], Any]
) -> dict[str, Any]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise _Refusal(f"{field} is {_shown(pattern)}, not an object")
    return {key: check(value, f"{field}[{_shown(key)}]") for key, value in pattern.items()}


def _by_module(pattern: Mapping[str, Any], paths: Iterable[str], field: str) -> dict[str, Any]:
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
        said = f"{field}[{_shown(key)}]"
        ways += _ways_to_match(key, longest, said) * len(left)
        ways += _WAYS_TO_COMPILE * (len(key) + 20)
        if ways > _MAX_WAYS:
            raise _Refusal(f"{said}: with the patterns before it, it takes too long to match")
        try:
            matched = {path for path in left if matching_key((key,), path) == key}
        except (re.error, OverflowError, RecursionError) as error:
            raise _Refusal(f"{said} is not a regular expression: {error}") from error
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
        raise _Refusal(f"{said} has {len(pattern)} characters, at most {limit} are allowed")
    atoms = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    atoms = re.sub(r"\[\^?\]?[^\]]*\]", "x", atoms).replace("(?:", "(")
    if "(?" in atoms or re.search(r"\)[*+{]", atoms):
        raise _Refusal(f"{said}: repeated groups, flags and looking around are not supported")
    repeats, optional = sum(map(atoms.count, "*+{")), atoms.count("?")
    most = max(repeats, optional)
    if most > _MAX_REPEATS:
        raise _Refusal(f"{said} repeats {most} parts, at most {_MAX_REPEATS} are allowed")
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


# What the file of the weights holds.


class _Entry(NamedTuple):
    """A tensor as the header describes it; dtype is torch's word."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0


def _read_header(file: BufferedReader, linears: int) -> dict[str, _Entry]:
    """Read which tensors a safetensors file has.

    https://huggingface.co/docs/safetensors: the length of the header in 8 bytes, the header in
    JSON, then the tensors without gaps.
    """
    size, prefix = os.fstat(file.fileno()).st_size, file.read(8)
    if len(prefix) < 8:
        raise _Refusal(f"it is cut off or not safetensors: it has {size} bytes")
    (length,) = struct.unpack("<Q", prefix)
    limit = _HEADER_BYTES + _HEADER_BYTES_PER_LINEAR * linears
    if length > min(size - 8, limit):
        raise _Refusal(
            f"it is cut off or not safetensors: it has {size} bytes, and its header would have "
            f"{length}, of at most {limit} that are allowed"
        )
    text = file.read(length)
    if not text.startswith(b"{"):
        raise _Refusal(f"it is not safetensors: its header begins with {_shown(text[:8])}")
    values = _json_object(text)
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Refusal(f"its __metadata__ is {_shown(metadata)}, not an object of strings")
    entries = {key: _entry(key, value) for key, value in values.items()}
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != end:
            raise _Refusal(
                f"tensor {_shown(key)} begins at byte {entry.begin} of the data, where the one "
                f"before it ends at {end}"
            )
        end = entry.end
    if end != size - 8 - length:
        raise _Refusal(
            f"it is cut off or too long: its tensors take {end} bytes, and {size - 8 - length} "
            "follow the header"
        )
    return entries


def _entry(key: str, value: object) -> _Entry:
    """Check what the header says of one tensor by itself."""
    said = f"tensor {_shown(key)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _Refusal(f"{said}: dtype, shape and data_offsets are needed, not {_shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    for name, numbers in (("shape", shape), ("data_offsets", offsets)):
        # A product of many large numbers takes minutes.
        few = isinstance(numbers, list) and len(numbers) <= 8
        if not few or not all(type(number) is int and number >= 0 for number in numbers):
            raise _Refusal(f"{said}: {name} is {_shown(numbers)}, not a short list of integers")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _Refusal(f"{said} is {_shown(dtype)}, only {', '.join(_DTYPES)} are supported")
    taken = math.prod(shape) * _DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != taken:
        raise _Refusal(
            f"{said}: {_shown(shape)} in {dtype} takes {taken} bytes, but its data_offsets are "
            f"{_shown(offsets)}"
        )
    return _Entry(str(_DTYPES[dtype]), tuple(shape), *offsets)


def _read_data(file: BufferedReader, size: int) -> bytearray:
    """Read what follows the header: as much as the shapes, which were checked, take."""
    data = bytearray(size)
    read = file.readinto(data)
    if read != size:
        raise _Refusal(f"it is cut off: {read} of {size} bytes of its tensors are there")
    return data


def _view(data: bytearray, entry: _Entry) -> Tensor:
    dtype = next(each for each in _DTYPES.values() if str(each) == entry.dtype)
    values = torch.frombuffer(data, dtype=torch.uint8)[entry.begin : entry.end]
    if entry.begin % dtype.itemsize:  # the format asks for no alignment
        values = values.clone()
    return values.view(dtype).view(entry.shape)


class _Fit(NamedTuple):
    """The names of one linear's two tensors, and its scaling."""

    lora_a: str
    lora_b: str
    scaling: float


def _check_tensors(
    entries: Mapping[str, _Entry],
    settings: _Settings,
    linears: Mapping[str, tuple[int, int]],
    max_rank: int,
) -> dict[str, _Fit]:
    """Check names, dtypes and shapes of all tensors; returned by the path of their linear."""
    if not entries:
        raise _Refusal("it has no tensors")
    pairs = _pairs(entries, linears)
    with _about(settings.where):
        ranks = _by_module(settings.rank_pattern, pairs, "rank_pattern")
        alphas = _by_module(settings.alpha_pattern, pairs, "alpha_pattern")
    fits: dict[str, _Fit] = {}
    for path in linears:
        if path not in pairs:
            continue
        key_a, key_b = pairs[path]["lora_A"], pairs[path]["lora_B"]
        rank = _rank_of(path, (key_a, entries[key_a]), (key_b, entries[key_b]), linears[path])
        asked = ranks.get(path, settings.r)
        if rank != asked:
            # They may differ in what peft itself saved: saving sorts the keys.
            field = "the first key of rank_pattern that matches" if path in ranks else "r"
            raise _Refusal(f"{path} has rank {rank}, and its config says {asked} ({field})")
        if rank > max_rank:
            raise _Refusal(f"{path} has rank {rank}, at most {max_rank} is allowed")
        with _about(settings.where):
            fits[path] = _Fit(key_a, key_b, _scaling(path, rank, alphas, settings))
    return fits


def _pairs(
    entries: Iterable[str], linears: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, str]]:
    """Return the names of lora_A and lora_B by the path of their linear."""
    pairs: dict[str, dict[str, str]] = {}
    for key in entries:
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise _Refusal(f"tensor {_shown(key)}: {_other_tensor(key)}")
        if match["path"] not in linears:
            raise _Refusal(f"tensor {_shown(key)}: {_unknown(match['path'], linears)}")
        pairs.setdefault(match["path"], {})[match["factor"]] = key
    for keys in pairs.values():
        for factor, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if factor not in keys:
                raise _Refusal(f"tensor {_shown(keys[other])}: there is no {factor} beside it")
    return pairs


def _other_tensor(key: str) -> str:
    for part, reason in _OTHER_TENSORS.items():
        if part in key:
            return reason
    if not key.startswith(PREFIX):
        return f"its name does not begin with {PREFIX}, as peft writes it"
    if ".lora_" not in key:
        # peft adds them by itself where lm_head or embed_tokens is a target.
        return (
            "weights of the base model are not supported; if it was not trained, save the adapter "
            "with save_pretrained(..., save_embedding_layers=False)"
        )
    return "only lora_A.weight and lora_B.weight of linears are supported"


def _unknown(path: str, linears: Mapping[str, tuple[int, int]]) -> str:
    last = path.rpartition(".")[2]
    # A comparison with every expert of a large model takes seconds.
    alike = [each for each in linears if each.rpartition(".")[2] == last] or list(linears)
    close = difflib.get_close_matches(path[:500], alike[:2000], n=3, cutoff=0.5)
    hint = f", but {', '.join(close)}" if close else ""
    return (
        f"the base model has no linear {_shown(path)}{hint}; was it perhaps trained on another "
        "model?"
    )


def _rank_of(
    path: str, a: tuple[str, _Entry], b: tuple[str, _Entry], features: tuple[int, int]
) -> int:
    """Return the rank of one linear's tensors, whose dtypes and shapes are checked."""
    n, k = features
    for (key, entry), side, size, needed in ((a, 1, k, f"[r, {k}]"), (b, 0, n, f"[{n}, r]")):
        if not any(entry.dtype == str(dtype) for dtype in _DTYPES.values()):
            raise _Refusal(f"tensor {_shown(key)} is {entry.dtype}, not fp32, fp16 or bf16")
        if len(entry.shape) != 2 or entry.shape[side] != size:
            raise _Refusal(
                f"tensor {_shown(key)} has shape {_shown(list(entry.shape))}, and {path} of the "
                f"base model needs {needed}; was it perhaps trained on another model?"
            )
    rank_a, rank_b = a[1].shape[0], b[1].shape[1]
    if rank_a != rank_b or not rank_a:
        raise _Refusal(f"{path} has lora_A of rank {rank_a} and lora_B of rank {rank_b}")
    return rank_a


def _scaling(path: str, rank: int, alphas: Mapping[str, float], settings: _Settings) -> float:
    if settings.scalings is not None:
        scaling = settings.scalings[path]
    else:
        alpha = alphas.get(path, settings.alpha)
        scaling = alpha / (math.sqrt(rank) if settings.rslora else rank)
    # The kernels multiply by it in fp32; this is not true of NaN either.
    if not abs(scaling) <= torch.finfo(torch.float32).max:
        raise _Refusal(f"the scaling of {path} is {scaling}, not finite in fp32")
    return scaling


def _factors(fits: Mapping[str, _Fit], tensor: Callable[[str], Tensor]) -> dict[str, LoraFactors]:
    """Take the tensors and look at their numbers."""
    return {
        path: LoraFactors(_finite(fit.lora_a, tensor), _finite(fit.lora_b, tensor), fit.scaling)
        for path, fit in fits.items()
    }


def _finite(key: str, tensor: Callable[[str], Tensor]) -> Tensor:
    values = tensor(key)
    # One pass without a temporary; where there is a NaN, it is both of them.
    low, high = (float(bound) for bound in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _Refusal(f"tensor {_shown(key)} has {'NaN' if math.isnan(low) else 'infinity'} in it")
    return values


def _fingerprint(factors: Mapping[str, LoraFactors]) -> str:
    digest = hashlib.sha256()
    for path, each in factors.items():
        digest.update(f"{path} {each.rank} {each.scaling!r}\n".encode())
        for tensor in (each.lora_a, each.lora_b):
            digest.update(f"{tensor.dtype}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# A live model.


def _read_live(
    name: str, source: nn.Module, linears: Mapping[str, tuple[int, int]], max_rank: int
) -> Adapter:
    kind = f"live {type(source).__name__}"
    model, configs = _unwrapped(source)
    adapter = name if name in configs or len(configs) != 1 else next(iter(configs))
    if adapter not in configs:
        held = ", ".join(map(_shown, configs)) or "none at all"
        raise _Refusal(f"the {kind} has no adapter of this name, but {held}")
    label = f"adapter {_shown(adapter)} of a {kind}"
    with _about(label):
        text = json.dumps(configs[adapter].to_dict(), default=_as_json)
        settings = _settings(_json_object(text.encode()), label)
        tensors, scalings = _live_tensors(model, adapter)
        entries = {
            key: _Entry(str(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()
        }
        settings = dataclasses.replace(settings, scalings=scalings)
        fits = _check_tensors(entries, settings, linears, max_rank)
        factors = _factors(fits, lambda key: _copied(tensors[key]))
    return Adapter(name, label, factors, _fingerprint(factors), None)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _unwrapped(source: nn.Module) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return the model whose linears are adapted, and the configs of its adapters."""
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    model: Any = getattr(source, "_orig_mod", source)  # of torch.compile
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise _Refusal(f"the live {type(source).__name__} has no peft adapters")
    if isinstance(model, (PeftModel, PeftMixedModel)):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model, configs


def _live_tensors(model: nn.Module, adapter: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return an adapter's tensors by the names that saving gives them, and its scalings by path.

    peft's get_peft_model_state_dict goes by names alone: with another adapter called "mlp", all
    tensors of modules called mlp are missing from what it returns.
    """
    from peft.tuners.lora import LoraLayer

    tensors: dict[str, Tensor] = {}
    scalings: dict[str, float] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for kind in module.adapter_layer_names:
            held: Any = getattr(module, kind, ())
            if adapter not in held:
                continue
            if adapter in module.merged_adapters:
                raise _Refusal(f"it is merged into the base weight of {path}; unmerge it first")
            part = held[adapter]
            inner = [("", part)] if isinstance(part, Tensor) else part.named_parameters()
            for leaf, tensor in inner:
                key = f"{PREFIX}{path}.{kind}" + (f".{leaf}" if leaf else "")
                if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
                    what = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}"
                    raise _Refusal(f"tensor {_shown(key)} is {what}; save it and read the files")
                tensors[key] = tensor
            scalings[path] = float(module.scaling[adapter])
    return tensors, scalings


def _as_json(value: object) -> Any:
    """Return what JSON has no form for: sets as peft saves them, other objects by their repr."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else repr(value)
