"""What of a base model adapters can change: its linears, in groups that share their input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastlora.discovery import sibling_names


@dataclass(frozen=True)
class Group:
    """Linears of the model that share their input.

    Attributes:
        names: of the linears, in the order in which their parent calls them.
        first: place of the first in the pool's tables; the others follow.
    """

    names: tuple[str, ...]
    first: int


class Reach(NamedTuple):
    """What the launches of a batch are made for: all that adapters have asked for so far.

    It only grows, so a server captures a CUDA graph a few times at most, and not with every load.

    Attributes:
        max_rank: at least the rank of every adapter on the device; a power of two.
        targeted: the groups that are computed with adapters, by ``Group.first``: those whose names
            (q, k and v; o; ...) an adapter has targeted, in whatever layer. With q and v alone,
            peft's default for Qwen2, six of a layer's eight launches would find nothing to do, and
            one that does nothing takes 0.8 to 1.1 us in a graph (H200).
    """

    max_rank: int
    targeted: frozenset[int]


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Return a model's linears by their paths.

    Raises:
        ValueError: it has peft layers, or no linears.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"the model has peft layers ({name}): give the base model, and load the adapter "
                "into the pool by its name"
            )
        if isinstance(module, nn.Linear):
            found[name] = module
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layers")
    return found


def groups_of(model: nn.Module, linears: dict[str, nn.Linear]) -> tuple[Group, ...]:
    """Return the linears in groups of up to four that share their input."""
    groups: list[tuple[str, ...]] = []
    grouped: set[str] = set()
    for parent_name, parent in model.named_modules():
        prefix = f"{parent_name}." if parent_name else ""
        children = {name for name in parent._modules if prefix + name in linears}
        for names in sibling_names(parent, children) if len(children) > 1 else ():
            for start in range(0, len(names), 4):
                group = tuple(prefix + name for name in names[start : start + 4])
                groups.append(group)
                grouped.update(group)
    groups += [(name,) for name in linears if name not in grouped]
    found: list[Group] = []
    for names in groups:
        found.append(Group(names, sum(len(group.names) for group in found)))
    return tuple(found)


def parameter_of(model: nn.Module, name: str) -> Tensor | None:
    """Return a parameter whose numbers can be looked at, ``None`` if a model has none of the name.

    The name may come from anybody: no attribute but modules and parameters is looked up.
    """
    *path, last = name.split(".")
    module: nn.Module | None = model
    for each in path:
        module = None if module is None else module._modules.get(each)
    found = None if module is None else module._parameters.get(last)
    # Not one that is quantized, or elsewhere.
    is_plain = type(found) is nn.Parameter and found.is_floating_point() and not found.is_meta
    return found if is_plain else None


def alike_of(groups: Sequence[Group]) -> list[frozenset[int]]:
    """Return of each linear the groups of its kind, in whatever layer, by ``Group.first``."""
    alike: dict[tuple[str, ...], set[int]] = {}
    for group in groups:
        alike.setdefault(_last_names(group), set()).add(group.first)
    return [frozenset(alike[_last_names(group)]) for group in groups for _ in group.names]


def _last_names(group: Group) -> tuple[str, ...]:
    return tuple(name.rpartition(".")[2] for name in group.names)


def dtype_of(model: nn.Module, weight: Tensor) -> torch.dtype:
    """Return the dtype of activations: quantized weights have another."""
    dtype = getattr(model, "dtype", weight.dtype)
    return dtype if dtype.is_floating_point else torch.get_default_dtype()
