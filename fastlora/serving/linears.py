"""The linears of a base model, with the adapter of each row's own added to it.

``attach`` makes every plain ``nn.Linear`` of a model one of these by its class alone: no parameter,
no name and no other model changes, and while no batch with adapters runs they are what they were.
Which adapter a row has is said by whoever runs the model, for one thread and one forward at a time:

    with routing.batch(RowsOfSequences([1, 0, 2], table)):    # a slot for each sequence
        model(input_ids)

Linears that share their input (q, k, v; gate, up) are computed by the first of them that is called,
so that their adapters are read in one launch forward and one back to the width of the model.
"""

from __future__ import annotations

import functools
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional

from fastlora import segmented_ops
from fastlora.adapters.groups import Group, Reach
from fastlora.adapters.pool import AdapterPool
from fastlora.segments import Segments

BATCH = "fastlora_batch"  # by this name the model's forward may be handed the batch that it runs


class Batch:
    """What the linears are told of the batch that runs.

    Args:
        reach: the pool's, with the batch's adapters. It may grow while the batch runs, and all its
            launches are to be alike.
    """

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        # Of a group that has been computed, the outputs that wait to be asked for.
        self.pending: dict[_Siblings, _Computed] = {}

    @abstractmethod
    def segments_for(self, tokens: int, is_head: bool) -> Segments | None:
        """Return the metadata for an input of that many rows; ``None``: no row has an adapter.

        Raises:
            OtherRows: the input has other rows than the batch.
        """


class OtherRows(RuntimeError):
    """A linear was called with other rows than the batch has."""


class RowsOfTokens(Batch):
    """A batch of packed tokens, as continuous batching runs it.

    Args:
        segments: of all tokens.
        logits: of those whose logits are wanted; a model may select them before its head.
        reach: see ``Batch``.
    """

    def __init__(self, segments: Segments, logits: Segments, reach: Reach) -> None:
        super().__init__(reach)
        self._segments, self._logits = segments, logits

    def segments_for(self, tokens: int, is_head: bool) -> Segments | None:
        """Return the metadata of all tokens, or for the head of those with logits."""
        if is_head and len(self._logits.slots) == tokens:
            return self._logits
        rows = len(self._segments.slots)
        if rows != tokens:
            raise OtherRows(
                f"a linear was called with {tokens} rows in a batch of {rows}: which adapter each "
                "of them has is not known"
            )
        return self._segments


class RowsOfSequences(Batch):
    """A batch of sequences that are equally long, as ``generate`` runs it.

    Args:
        slots: of each sequence.
        pool: of the adapters.
    """

    def __init__(self, slots: Sequence[int], pool: AdapterPool) -> None:
        super().__init__(pool.reach)
        self._slots, self._pool = list(slots), pool
        self._made: dict[int, Segments] = {}

    def segments_for(self, tokens: int, is_head: bool) -> Segments | None:
        """Return the metadata of an input with as many rows for each sequence."""
        if not any(self._slots):
            return None
        each, rest = divmod(tokens, len(self._slots))
        if rest:
            raise OtherRows(
                f"a linear was called with {tokens} rows in a batch of {len(self._slots)} sequences"
            )
        if each not in self._made:
            requests = [(slot, each) for slot in self._slots]
            pool = self._pool
            self._made[each] = Segments.of(requests, table=pool.slots, device=pool.device)
        return self._made[each]


class Routing:
    """Tells the linears of one model which batch runs in this thread."""

    def __init__(self, pool: AdapterPool) -> None:
        self.pool = pool
        self._local = threading.local()
        # transformers writes is_causal into the model's config for as long as a forward runs: of
        # two that overlap the later end would leave what the other one wrote, for ever.
        self._forward = threading.RLock()

    @property
    def current(self) -> Batch | None:
        """The batch that runs in this thread."""
        batch: Batch | None = getattr(self._local, "batch", None)
        return batch

    def begin(self, batch: Batch | None) -> None:
        """Let this thread run a batch, ``None`` for the base model, until ``end``."""
        before: list[Batch | None] = self._local.__dict__.setdefault("before", [])
        before.append(self.current)
        self._local.batch = batch

    def end(self) -> None:
        """Go back to what this thread ran before."""
        batch = self.current
        self._local.batch = self._local.before.pop()
        if batch is not None and batch is not self.current:
            batch.pending.clear()

    @contextmanager
    def batch(self, batch: Batch | None) -> Iterator[None]:
        """Run a batch inside the ``with`` block; ``None`` for the base model."""
        self.begin(batch)
        try:
            yield
        finally:
            self.end()

    def routed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a model's forward in the batch that it is handed, or else in this thread's.

        No hook: of a forward that is interrupted torch would not call the one that ends the batch.
        """

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._forward, self.batch(kwargs.pop(BATCH, self.current)):
                return forward(*args, **kwargs)

        return run

    def with_adapters(
        self,
        group: Group,
        compute: Callable[[], list[Tensor]],
        x: Tensor,
        segments: Segments,
        max_rank: int,
    ) -> list[Tensor]:
        """Compute the outputs of a group and add every row's low-rank term to them, in place."""
        pool = self.pool
        return segmented_ops.with_adapters(
            compute,
            x.reshape(-1, x.shape[-1]),
            pool.arena,
            self._descriptors_of(group),
            segments,
            max_rank=max_rank,
            adapters=lambda s, slots: pool.in_slots(group.first + s, slots),
        )

    def fused(
        self,
        group: Group,
        members: Sequence[nn.Module],
        x: Tensor,
        segments: Segments | None,
        max_rank: int,
    ) -> list[Tensor] | None:
        """Compute plain linears, and ``with_adapters`` if there are any, without torch's products.

        ``None``: it is not to be done for these.
        """
        linears = [member for member in members if type(member) is RoutedLinear]
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases: list[Tensor | None] = [linear.bias for linear in linears]
        arena = self.pool.arena
        if len(linears) < len(members) or not segmented_ops.fuses_linears(
            x, weights, biases, arena, max_rank, has_adapters=segments is not None
        ):
            return None
        flat = x.reshape(-1, x.shape[-1])
        if segments is None:
            ys = segmented_ops.frozen_linears(flat, weights, biases)
        else:
            operands = (arena, self._descriptors_of(group), segments)
            ys = segmented_ops.linears_with_adapters(
                flat, weights, biases, *operands, max_rank=max_rank
            )
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]

    def _descriptors_of(self, group: Group) -> Tensor:
        return self.pool.descriptors[group.first : group.first + len(group.names)]


class _Computed(NamedTuple):
    """Outputs of a group for one input, that nobody may have changed since."""

    x: Tensor
    version: int
    outputs: dict[nn.Module, Tensor]

    def fits(self, layer: nn.Module, x: Tensor) -> bool:
        return x is self.x and x._version == self.version and layer in self.outputs


class _Siblings:
    """The linears of one group, in a model."""

    def __init__(self, routing: Routing, group: Group, members: Sequence[nn.Module]) -> None:
        self.routing, self.group, self.members = routing, group, tuple(members)

    def output_of(self, layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
        # An inference tensor does not say whether it was changed.
        together = len(self.members) > 1 and not x.is_inference()
        computed = batch.pending.get(self) if together else None
        if computed is not None and computed.fits(layer, x):
            y = computed.outputs.pop(layer)
            if not computed.outputs:
                del batch.pending[self]
            return y
        segments = self._segments_for(layer, x, batch)
        members, group = self.members, self.group
        if not together:
            at = members.index(layer)
            members, group = (layer,), Group((group.names[at],), group.first + at)

        def compute() -> list[Tensor]:
            return [_linear(member, x) for member in members]

        max_rank = batch.reach.max_rank
        ys = self.routing.fused(group, members, x, segments, max_rank)
        if ys is None:
            if segments is None:
                return _linear(layer, x)
            ys = self.routing.with_adapters(group, compute, x, segments, max_rank)
        outputs = dict(zip(members, ys, strict=True))
        y = outputs.pop(layer)
        if together:
            batch.pending[self] = _Computed(x, x._version, outputs)
        return y

    def _segments_for(self, layer: nn.Module, x: Tensor, batch: Batch) -> Segments | None:
        """Return the metadata for a layer's input; ``None``: no adapter is to be added."""
        if self.group.first not in batch.reach.targeted:
            return None
        is_head = "fastlora_is_head" in layer.__dict__
        try:
            return batch.segments_for(x.numel() // x.shape[-1], is_head)
        except OtherRows:
            # Of experts for example, which are called with some of the tokens.
            if self.routing.pool.has_adapters(self.group.first + self.members.index(layer)):
                raise
            return None


class RoutedLinear(nn.Linear):
    """A linear whose rows may have adapters; without a batch it is an ``nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        siblings: _Siblings = self.__dict__["fastlora_siblings"]
        batch = siblings.routing.current
        if batch is None:
            return functional.linear(input, self.weight, self.bias)
        return siblings.output_of(self, input, batch)

    def _get_name(self) -> str:
        return "Linear"


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    if type(layer) is RoutedLinear:
        return functional.linear(x, layer.weight, layer.bias)
    y: Tensor = layer.__dict__["fastlora_forward"](x)
    return y


def refuse_attached(model: nn.Module) -> None:
    """Raise a ``ValueError`` if the linears of a model are routed already."""
    if any("fastlora_siblings" in module.__dict__ for module in model.modules()):
        raise ValueError("another engine runs on this model: close that one first")


def attach(model: nn.Module, pool: AdapterPool) -> Routing:
    """Route a model and its linears through a pool, until ``detach``.

    A subclass of ``nn.Linear`` (a quantized one) keeps its class, and has its ``forward`` replaced
    on the object; so does one whose ``forward`` somebody has replaced on the object (accelerate's
    hooks).

    Args:
        model: the base model that the pool was made for.
        pool: of its adapters.

    Returns:
        What says which batch runs.

    Raises:
        ValueError: another engine has the model already.
    """
    refuse_attached(model)
    routing = Routing(pool)
    modules = dict(model.named_modules())
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    for group in pool.groups:
        members = [modules[name] for name in group.names]
        siblings = _Siblings(routing, group, members)
        for member in members:
            member.__dict__["fastlora_siblings"] = siblings
            if member is head:
                member.__dict__["fastlora_is_head"] = True
            if type(member) is nn.Linear and "forward" not in member.__dict__:
                member.__class__ = RoutedLinear
            else:
                _replace_forward(member)
    _keep_forward(model)
    model.__dict__["forward"] = routing.routed(model.forward)
    return routing


def _keep_forward(module: nn.Module) -> None:
    """Remember the forward of a module before it is replaced on the object."""
    module.__dict__["fastlora_own_forward"] = module.__dict__.get("forward")
    module.__dict__["fastlora_forward"] = module.forward


def _replace_forward(layer: nn.Module) -> None:
    siblings: _Siblings = layer.__dict__["fastlora_siblings"]
    _keep_forward(layer)
    before = layer.__dict__["fastlora_forward"]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = siblings.routing.current
        if batch is None or args or kwargs:
            y: Tensor = before(x, *args, **kwargs)
            return y
        return siblings.output_of(layer, x, batch)

    layer.__dict__["forward"] = forward


def detach(model: nn.Module) -> None:
    """Make a model and its linears what they were."""
    for module in model.modules():
        own = module.__dict__
        own.pop("fastlora_siblings", None)
        own.pop("fastlora_is_head", None)
        if own.pop("fastlora_forward", None) is not None:
            del own["forward"]
            if (forward := own.pop("fastlora_own_forward")) is not None:
                own["forward"] = forward
        if type(module) is RoutedLinear:
            cast(nn.Module, module).__class__ = nn.Linear
