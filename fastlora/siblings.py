"""Groups of projections that share their input: q/k/v, gate/up, the ``in_proj_*`` of Qwen3-Next.

    the first sibling called with x    computes the outputs of all, in one autograd node
    the others, with that very x       are handed theirs

No model's forward is rewritten, and no order of patches matters: which projections may belong
together is read from the parent's forward once (``discovery.py``), and at every call it is the
tensor itself that decides. A sibling that meets another tensor, a changed one, another mode of
autograd or autocast, or whose own state has changed since, computes its own. (A change of x behind
autograd's back, ``x.data.mul_()``, is not seen.)

What it saves: x is read once for all ``lora_A`` and once for all their gradients, dx is accumulated
in one tensor instead of one for each sibling and an addition, and the host makes one node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import rules
from fastlora.autograd import DropoutMask, apply_call, apply_scaled, apply_siblings
from fastlora.discovery import sibling_names
from fastlora.layers import LoRALinear
from fastlora.prepared import Siblings

MAX_SIBLINGS = 4  # as many operands as the GEMM of the backward pass takes
# Above it the accumulators of siblings do not fit in registers where they are multiplied in fp32:
# four of rank 256 spill 4.9 KB a thread (sm_90).
MAX_FP32_RANK = 64


# Outputs in a row that nobody could use, after which a group is given up until the next patch: its
# siblings get different tensors, say from a hook that casts the input of each.
MAX_MISSED = 8


class SiblingGroup:
    """Some children of one module that are computed together while its forward runs.

    It is shared by its members (``fastlora_group``) and knows their parent only during a call of
    it: a child that is called by anybody else runs alone, one that was replaced is never used, and
    copies and pickles of a model need nothing special.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._parent: nn.Module | None = None
        self._pending: _Pending | None = None
        self._united: _United | None = None
        self._known: list[_United] = []  # of adapters that take turns
        self._missed = 0  # outputs in a row that were for another tensor than their layer got

    def enter(self, parent: nn.Module) -> None:
        """Begin a call of the parent."""
        self._pending = None  # of a call that was interrupted from the keyboard
        # nn.DataParallel calls copies of the parent, which share this object, in several threads.
        if "_is_replica" not in parent.__dict__:
            self._parent = parent

    def leave(self) -> None:
        """End it, and let go of outputs that nobody has asked for.

        A sibling may never be called: shared keys and values, an exception, the early stop of a
        checkpoint's recomputation.
        """
        self._parent = self._pending = None

    def output_of(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """Return the layer's output for ``x``, or ``None`` where it has to run alone."""
        pending = self._pending
        if pending is None:
            return self._compute(layer, x)
        if pending.x is not x:
            self._missed += layer in pending.outputs
            return self._compute(layer, x)
        self._missed = 0
        y = pending.take(layer)
        if not pending.outputs:
            self._pending = None
        return self._compute(layer, x) if y is None else y

    def difference(self, parent: nn.Module) -> str | None:
        """Return in what the members differ, as they stand, that they should have in common."""
        members = self._members(parent)
        if members is None:
            return "one of them was replaced, or is an FSDP unit of its own"
        if self._missed >= MAX_MISSED:
            return (
                "each was called with a tensor of its own (a hook that casts or copies the input?)"
            )
        united = _United(members, [rules.Operands(member) for member in members])
        if united.difference is not None:
            return united.difference
        if united.dropout_p() is None:
            return "the siblings differ in dropout"
        if united.has_large_fp32_rank:
            return f"the rank is above {MAX_FP32_RANK} in fp32, which autocast alone can group"
        return None

    def _members(self, parent: nn.Module | None) -> list[LoRALinear] | None:
        if parent is None:
            return None
        children = parent._modules
        members: list[Any] = [children.get(name) for name in self.names]
        for member in members:
            # Exactly: a subclass is a unit of its own to FSDP, whole only while it is called.
            if type(member) is not LoRALinear:
                return None
        return members

    def _compute(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """Compute the outputs of all members, keep those of the others, return the layer's."""
        # Inference tensors do not say whether they were changed in place.
        if self._missed >= MAX_MISSED or not isinstance(x, Tensor) or x.is_inference():
            return None
        members = self._members(self._parent)
        if members is None:
            self._united, self._known = None, []  # they keep replaced layers alive
            return None
        if layer not in members:
            return None
        united = self._united
        if united is None or not united.holds(members, layer):
            self._united = united = self._unite(members)
        if united is None or united.difference is not None:
            return None
        p = united.dropout_p()
        if p is None or (
            united.has_large_fp32_rank and not torch.is_autocast_enabled(x.device.type)
        ):
            return None
        self._pending = None
        scalings = united.scalings()
        if scalings is None:
            self._united = None
            return None
        ys = united.outputs(x, scalings, p, layer.fastlora_dropout_mask)
        if ys is None:
            return None
        outputs = {}
        for member, y, operands, own in zip(members, ys, united.operands, scalings, strict=True):
            outputs[member] = (y, operands, own, operands.versions())
        result: Tensor = outputs.pop(layer)[0]
        self._pending = _Pending(x, p, outputs)
        return result

    def _unite(self, members: list[LoRALinear]) -> _United | None:
        """Ask the rules for every member; returns ``None`` if one of them falls back."""
        found = []
        for member in members:
            each = rules.operands(member)
            # An unremembered one is not to be compared later.
            if isinstance(each, str) or member.__dict__.get("fastlora_operands") is not each:
                return None
            found.append(each)
        known = [each for each in self._known if each.can_be_of(members)]
        united = next((each for each in known if each.is_of(found)), None)
        if united is None:
            united = _United(members, found)
        others = [each for each in known if each is not united]
        self._known = [united, *others][: rules.MAX_KNOWN]
        return united

    def __reduce__(self) -> tuple[Any, ...]:
        return SiblingGroup, (self.names,)


class _United:
    """The operands of all members."""

    __slots__ = ("_siblings", "difference", "has_large_fp32_rank", "members", "operands")

    def __init__(self, members: list[LoRALinear], operands: list[rules.Operands]) -> None:
        self.members, self.operands = members, operands
        self.difference = _difference(members, operands)  # then each runs alone
        first = operands[0]
        fp32 = first.adapters[0].lora_a.dtype == torch.float32
        self.has_large_fp32_rank = fp32 and first.rank > MAX_FP32_RANK
        self._siblings: Siblings | None = None
        alone = [each.siblings for each in operands if each.siblings is not None]
        if len(alone) == len(operands) and len({each.scaled for each in alone}) == 1:
            self._siblings = Siblings.of(alone)

    def can_be_of(self, members: list[LoRALinear]) -> bool:
        """Return whether these are its members, and still have what it unites."""
        pairs = zip(members, self.operands, strict=True)
        return members == self.members and all(each.is_of(member) for member, each in pairs)

    def is_of(self, operands: list[rules.Operands]) -> bool:
        """Return whether it unites just these."""
        return all(one is other for one, other in zip(self.operands, operands, strict=True))

    def scalings(self) -> list[tuple[float, ...]] | None:
        """Return the scalings of every member's adapters, or ``None`` if one has no such number."""
        found = []
        try:
            for member, operands in zip(self.members, self.operands, strict=True):
                found.append(operands.scalings(member))
        except KeyError:  # the adapter was deleted
            return None
        return found if all(type(each[0]) in rules.NUMBERS for each in found) else None

    def outputs(
        self, x: Tensor, scalings: list[tuple[float, ...]], p: float, mask: DropoutMask
    ) -> Sequence[Tensor] | None:
        """Return the outputs of all members, or ``None`` where each has to run alone."""
        siblings = self._siblings
        if siblings is not None:
            call = None
            if not siblings.scaled or self.input_reason(x) is None:  # DoRA has rules of its own
                call = siblings.call_for(x, tuple([own[0] for own in scalings]), p, mask)
            if call is not None and siblings.scaled:
                pairs = zip(self.operands, scalings, strict=True)
                return apply_scaled(call, x, [each.column_scale(own) for each, own in pairs])
            if call is not None:
                return apply_call(call, x)
        if rules.tracing_reason() or self.input_reason(x):
            return None
        pairs = zip(self.operands, scalings, strict=True)
        arguments = zip(*[each.arguments(own) for each, own in pairs], strict=True)
        weights, biases, lora_as, lora_bs, gains = arguments
        ys = apply_siblings(x, weights, biases, lora_as, lora_bs, gains, p, None, mask)
        triples = zip(ys, self.operands, scalings, strict=True)
        return [each.finish(y, own) for y, each, own in triples]

    def input_reason(self, x: Tensor) -> str | None:
        """Return why a call with this input is not for all members, or ``None``."""
        for each in self.operands:
            if reason := rules.input_reason(each, x):
                return reason
        return None

    def holds(self, members: list[LoRALinear], layer: LoRALinear) -> bool:
        """Return whether a call of one member may compute the outputs of all.

        The rules would still say the same of it, and the tensors of the others are as they were.
        What the rules say of the others is asked when they are called (``_Pending.take``): until
        then it may change.
        """
        if members != self.members:
            return False
        for operands in self.operands:
            if not operands.tensors_hold():
                return False
        return self.operands[members.index(layer)].modules_hold(layer)

    def dropout_p(self) -> float | None:
        """Return the dropout of a call made now, or ``None`` where the siblings' differ."""
        p = self.operands[0].dropout_p()
        for each in self.operands[1:]:
            if each.dropout_p() != p:
                return None
        return p


def _difference(members: list[LoRALinear], found: list[rules.Operands]) -> str | None:
    """Return in what the members differ that must be the same for all, or ``None``."""
    if any(tensor.is_inference() for each in found for tensor in each.tensors):
        return "weights were made in inference mode"
    for what, values in {
        "in features": [each.features for each in found],
        "rank": [each.rank for each in found],
        "dtype": [(each.weight.dtype, each.adapters[0].lora_a.dtype) for each in found],
        "device": [each.device for each in found],
        "dropout_mask": [member.fastlora_dropout_mask for member in members],
    }.items():
        if len(set(values)) > 1:
            return f"the siblings differ in {what}"
    return None


class _Pending:
    """Outputs that were computed with the first sibling's, and when they are still right."""

    __slots__ = ("_device", "_mode", "_p", "_version", "outputs", "x")

    def __init__(self, x: Tensor, p: float, outputs: dict[LoRALinear, tuple[Any, ...]]) -> None:
        self.x = x
        # Each with what it was computed with: operands, scalings, versions of the weights.
        self.outputs = outputs
        self._device = x.device
        self._version = x._version
        self._mode = _mode(x, self._device)
        self._p = p

    def take(self, layer: LoRALinear) -> Tensor | None:
        """Hand out a layer's output, once, if a call made now would compute the same."""
        entry = self.outputs.pop(layer, None)
        if entry is None:
            return None
        y: Tensor
        y, operands, scalings, versions = entry
        if (
            self.x._version != self._version
            or _mode(self.x, self._device) != self._mode
            or operands.versions() != versions
            or not operands.modules_hold(layer)
            or operands.weight.requires_grad
            or operands.dropout_p() != self._p
            or operands.scalings(layer) != scalings
        ):
            return None
        return y


def _mode(x: Tensor, device: torch.device) -> tuple[Any, ...]:
    """Return what a call depends on beside its operands."""
    kind = device.type
    return (
        torch.is_grad_enabled(),
        x.requires_grad,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        # On another stream the outputs may not have been written yet.
        torch._C._cuda_getCurrentRawStream(device.index) if kind == "cuda" else 0,
    )


def group_siblings(model: nn.Module) -> None:
    """Form the groups of a model's patched layers; those of an earlier call are replaced."""
    ungroup_siblings(model)
    for module in list(model.modules()):
        group_children(module)


def group_children(parent: nn.Module) -> None:
    """Form the groups among the patched layers that are children of one module."""
    _ungroup_children(parent)
    groups = [SiblingGroup(names) for names in possible_groups(parent)]
    if not groups:
        return
    for group in groups:
        for name in group.names:
            parent._modules[name].__dict__["fastlora_group"] = group
    parent.__dict__["fastlora_groups"] = tuple(groups)
    parent.register_forward_pre_hook(_enter)
    parent.register_forward_hook(_leave, always_call=True)


def possible_groups(parent: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of the patched children that may be computed together."""
    children = {name for name, child in parent._modules.items() if type(child) is LoRALinear}
    return [
        names[start : start + MAX_SIBLINGS]
        for names in (sibling_names(parent, children) if len(children) > 1 else ())
        for start in range(0, len(names), MAX_SIBLINGS)
        if len(names) - start > 1
    ]


def _enter(parent: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        for group in parent.__dict__.get("fastlora_groups", ()):
            group.enter(parent)


def _leave(parent: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for group in parent.__dict__.get("fastlora_groups", ()):
            group.leave()


def ungroup_siblings(model: nn.Module) -> None:
    """Take back what ``group_siblings`` did."""
    for module in model.modules():
        _ungroup_children(module)


def _ungroup_children(parent: nn.Module) -> None:
    for child in parent._modules.values():
        if child is not None:
            child.__dict__.pop("fastlora_group", None)
    if parent.__dict__.pop("fastlora_groups", None) is None:
        return
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for number, hook in list(hooks.items()):
            if hook in (_enter, _leave):
                del hooks[number]
                parent._forward_hooks_always_called.pop(number, None)


def groups_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, SiblingGroup]]:
    """Yield the model's groups, each with its parent and the parent's name."""
    for name, module in model.named_modules():
        for group in module.__dict__.get("fastlora_groups", ()):
            yield name, module, group
