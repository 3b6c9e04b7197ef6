"""Whether an adapter's tensors fit the linears of the base model, and what its config says."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.adapters.adapter import LoraFactors
from fastlora.adapters.config import Settings, by_module
from fastlora.adapters.errors import Refusal, about, shown
from fastlora.adapters.weights import DTYPES, Entry

PREFIX = "base_model.model."  # peft's, before the path of every module
_FACTOR = re.compile(r"base_model\.model\.(?P<path>.+)\.(?P<factor>lora_[AB])\.weight", re.DOTALL)
# peft saves these, too, where lm_head or embed_tokens is a target or the vocabulary was resized.
_BASE = re.compile(r"base_model\.model\.(?P<path>.+?)(?:\.base_layer)?\.weight", re.DOTALL)
_COMPARED_AT_ONCE = 1 << 24  # numbers: a head has a billion, and is on a GPU that may be full
_OTHER_TENSORS = {  # by what their names have in them
    ".modules_to_save.": "a module that was trained whole is not supported",
    ".original_module.": "a module that was trained whole is not supported",
    ".trainable_tokens_": "trained rows of an embedding are not supported",
    ".lora_embedding_": "LoRA on an embedding is not supported",
    ".lora_magnitude_vector": "DoRA is not supported",
    ".bias": "biases are not supported",
}


OwnWeight = Callable[[str], Tensor | None]  # by the name of the base model's parameter


class _Fit(NamedTuple):
    """The names of one linear's two tensors, and its scaling."""

    lora_a: str
    lora_b: str
    scaling: float


def base_weights(entries: Mapping[str, Entry], own_weight: OwnWeight) -> dict[str, Tensor]:
    """Return which tensors are weights of the base model, and what the model has there itself.

    Shapes are compared here, before anything is read, and numbers by ``check_base_weights``.
    """
    found: dict[str, Tensor] = {}
    for key, entry in entries.items():
        match = None if _FACTOR.fullmatch(key) else _BASE.fullmatch(key)
        weight = match and own_weight(f"{match['path']}.weight")
        if weight is None:
            continue
        if tuple(weight.shape) != entry.shape:
            raise Refusal(
                f"tensor {shown(key)} has shape {shown(list(entry.shape))}, and the base model's "
                f"own {shown(list(weight.shape))}; was its vocabulary perhaps resized?"
            )
        found[key] = weight
    return found


def check_base_weights(own: Mapping[str, Tensor], tensor: Callable[[str], Tensor]) -> None:
    """Check that weights of the base model in a file are the model's own.

    In the coarser of both dtypes: a model may be served in another than it was trained in.
    """
    for key, weight in own.items():
        coarser = max(weight.dtype, tensor(key).dtype, key=lambda dtype: torch.finfo(dtype).eps)
        theirs = tensor(key).flatten().split(_COMPARED_AT_ONCE)
        ours = weight.detach().flatten().split(_COMPARED_AT_ONCE)
        for its, mine in zip(theirs, ours, strict=True):
            if not torch.equal(mine.to("cpu", coarser), its.to(coarser)):
                raise Refusal(
                    f"tensor {shown(key)} is not what the base model has there: it was trained "
                    "whole, and requests share the base model's, or the adapter is for another one"
                )


def check_tensors(
    entries: Mapping[str, Entry],
    settings: Settings,
    linears: Mapping[str, tuple[int, int]],
    max_rank: int,
) -> dict[str, _Fit]:
    """Check names, dtypes and shapes of all tensors; returned by the path of their linear."""
    if not entries:
        raise Refusal("it has no tensors of LoRA")
    pairs = _pairs(entries, linears)
    with about(settings.where):
        ranks = by_module(settings.rank_pattern, pairs, "rank_pattern")
        alphas = by_module(settings.alpha_pattern, pairs, "alpha_pattern")
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
            raise Refusal(f"{path} has rank {rank}, and its config says {asked} ({field})")
        if rank > max_rank:
            raise Refusal(f"{path} has rank {rank}, at most {max_rank} is allowed")
        with about(settings.where):
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
            raise Refusal(f"tensor {shown(key)}: {_other_tensor(key)}")
        if match["path"] not in linears:
            raise Refusal(f"tensor {shown(key)}: {_unknown(match['path'], linears)}")
        pairs.setdefault(match["path"], {})[match["factor"]] = key
    for keys in pairs.values():
        for factor, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if factor not in keys:
                raise Refusal(f"tensor {shown(keys[other])}: there is no {factor} beside it")
    return pairs


def _other_tensor(key: str) -> str:
    for part, reason in _OTHER_TENSORS.items():
        if part in key:
            return reason
    if not key.startswith(PREFIX):
        return f"its name does not begin with {PREFIX}, as peft writes it"
    if ".lora_" not in key:
        return (
            "the base model has no such weight to compare it with; if it was not trained, save the "
            "adapter with save_pretrained(..., save_embedding_layers=False)"
        )
    return "only lora_A.weight and lora_B.weight of linears are supported"


def _unknown(path: str, linears: Mapping[str, tuple[int, int]]) -> str:
    last = path.rpartition(".")[2]
    # A comparison with every expert of a large model takes seconds.
    alike = [each for each in linears if each.rpartition(".")[2] == last] or list(linears)
    close = difflib.get_close_matches(path[:500], alike[:2000], n=3, cutoff=0.5)
    hint = f", but {', '.join(close)}" if close else ""
    return (
        f"the base model has no linear {shown(path)}{hint}; was it perhaps trained on another "
        "model?"
    )


def _rank_of(
    path: str, a: tuple[str, Entry], b: tuple[str, Entry], features: tuple[int, int]
) -> int:
    """Return the rank of one linear's tensors, whose dtypes and shapes are checked."""
    n, k = features
    for (key, entry), side, size, needed in ((a, 1, k, f"[r, {k}]"), (b, 0, n, f"[{n}, r]")):
        if not any(entry.dtype == str(dtype) for dtype in DTYPES.values()):
            raise Refusal(f"tensor {shown(key)} is {entry.dtype}, not fp32, fp16 or bf16")
        if len(entry.shape) != 2 or entry.shape[side] != size:
            raise Refusal(
                f"tensor {shown(key)} has shape {shown(list(entry.shape))}, and {path} of the "
                f"base model needs {needed}; was it perhaps trained on another model?"
            )
    rank_a, rank_b = a[1].shape[0], b[1].shape[1]
    if rank_a != rank_b or not rank_a:
        raise Refusal(f"{path} has lora_A of rank {rank_a} and lora_B of rank {rank_b}")
    return rank_a


def _scaling(path: str, rank: int, alphas: Mapping[str, float], settings: Settings) -> float:
    if settings.scalings is not None:
        scaling = settings.scalings[path]
    else:
        alpha = alphas.get(path, settings.alpha)
        scaling = alpha / (math.sqrt(rank) if settings.rslora else rank)
    # The kernels multiply by it in fp32; this is not true of NaN either.
    if not abs(scaling) <= torch.finfo(torch.float32).max:
        raise Refusal(f"the scaling of {path} is {scaling}, not finite in fp32")
    return scaling


def factors_of(fits: Mapping[str, _Fit], tensor: Callable[[str], Tensor]) -> dict[str, LoraFactors]:
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
        raise Refusal(f"tensor {shown(key)} has {'NaN' if math.isnan(low) else 'infinity'} in it")
    return values


def fingerprint_of(factors: Mapping[str, LoraFactors]) -> str:
    """Return the SHA-256 of all that decides what is computed."""
    digest = hashlib.sha256()
    for path, each in factors.items():
        digest.update(f"{path} {each.rank} {each.scaling!r}\n".encode())
        for tensor in (each.lora_a, each.lora_b):
            digest.update(f"{tensor.dtype}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
