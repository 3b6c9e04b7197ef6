"""A model's linears, run as the engine runs them, with adapters: what the part ``serve`` measures.

Every layer has memory of its own, so that nothing comes from the L2 cache that would not in a
model; graphs are captured while no row has an adapter, and told of the adapters afterwards.
"""

from __future__ import annotations

import collections
import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from serving_counts import LAUNCHES
from torch import Tensor, nn
from torch.nn import functional

from fastlora import AdapterPool
from fastlora.bench import checking, measuring
from fastlora.bench.measuring import Step
from fastlora.bench.providers import DecoderLayer
from fastlora.bench.shapes import GROUPS, INPUTS, NAMES, Linear, Model
from fastlora.kernels import decode_gemm, segmented_expand, segmented_shrink
from fastlora.segments import PAGE, Segments, pages_of
from fastlora.serving.linears import RowsOfTokens, attach

_SPREAD = 0.05  # standard deviation of all weights of adapters
_LOADERS = 8


class Linears(nn.Module):
    """All linears of a model that adapters change, and its head; nothing that is between them."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()

        def linear(shape: Linear) -> nn.Linear:
            layer = nn.Linear(shape.k, shape.n, shape.has_bias, device=device, dtype=dtype)
            return layer.requires_grad_(False)

        self.layers = nn.ModuleList(
            DecoderLayer({name: linear(shape) for name, shape in model.linears.items()})
            for _ in range(model.layers)
        )
        self.lm_head = linear(Linear(model.config["vocab_size"], model.config["hidden_size"]))

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, as transformers' models do."""
        return self.lm_head

    def forward(
        self, inputs: Sequence[Tensor], head: Tensor | None, keep: Iterable[int] = ()
    ) -> list[Tensor]:
        """Run them all.

        Args:
            inputs: of every layer, in the order of ``shapes.INPUTS``.
            head: of the head, unless it is left out.
            keep: numbers of the layers whose outputs are returned.
        """
        kept: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            ys = layer(*inputs)
            if number in keep:
                kept += ys
        if head is not None:
            self.lm_head(head)
        return kept


class Rows:
    """Which adapter every row has, on the device: none at first, and then what it is told."""

    def __init__(self, tokens: int, pool: AdapterPool) -> None:
        self._pool = pool
        # Not what PyTorch's side of the operator walks: that is of the adapters at first.
        self.segments = replace(self._made([(0, tokens)]), runs=None)

    def tell(self, requests: Sequence[tuple[int, int]]) -> None:
        """Take the adapters of other requests with as many rows, in place."""
        told = self._made(requests)
        for name in ("slots", "order", "tiles"):
            getattr(self.segments, name).copy_(getattr(told, name))

    def _made(self, requests: Sequence[tuple[int, int]]) -> Segments:
        return Segments.of(requests, table=self._pool.slots, device=self._pool.device)


class Captured:
    """A step in a CUDA graph, whose outputs stay where they are; without a GPU the step itself.

    Args:
        step: returns its outputs.
        device: where it runs.
        pool: see ``measuring.captured``.
    """

    def __init__(self, step: Callable[[], list[Tensor]], device: torch.device, pool: Any) -> None:
        self.outputs: list[Tensor] = []

        def keeping() -> None:
            self.outputs = step()  # of a graph: of its last call, which is the captured one

        self.replay: Step = keeping
        if device.type == "cuda":
            self.replay = measuring.captured(keeping, pool)


class Served:
    """The linears of a model, and a pool of adapters.

    Args:
        model: whose shapes they have.
        device: where they are.
        dtype: of weights and adapters.
        loaded: count and rank of all adapters that are to have room.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device,
        dtype: torch.dtype,
        loaded: Iterable[tuple[int, int]],
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.module = Linears(model, device, dtype)
        pages = sum(
            count * model.layers * (pages_of(rank * one.k) + pages_of(rank * one.n))
            for count, rank in loaded
            for one in model.linears.values()
        )
        self.pool = AdapterPool(self.module, memory=pages * PAGE * dtype.itemsize, host_memory=0)
        self.routing = attach(self.module, self.pool)
        # The outputs of these are compared: a table that is off by a layer is right in the first.
        self.checked = sorted({0, model.layers - 1})
        self.groups: dict[tuple[str, ...], list[Any]] = {names: [] for names in GROUPS}
        for group in self.pool.groups:
            names = tuple(name.rpartition(".")[2] for name in group.names)
            if names in self.groups:
                self.groups[names].append(group)
        assert {len(found) for found in self.groups.values()} == {model.layers}, self.groups

    def load(self, name: str, count: int, rank: int, targets: Collection[str] = NAMES) -> list[int]:
        """Load adapters of one rank, each with weights of its own; returns their slots.

        All come from one file, so that it need not be written for each; the weights are drawn anew
        where they lie.
        """
        names = [f"{name}-{number}" for number in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(Path(folder), adapted(self.pool, targets), rank, self.dtype)
            with ThreadPoolExecutor(_LOADERS) as threads:
                list(threads.map(lambda each: self.pool.load(each, folder), names))
        self.pool.arena.normal_(std=_SPREAD)
        slots = [self.pool.lease(each).slot for each in names]
        assert len(set(slots) - {0}) == count, slots
        return slots

    def inputs(self, tokens: int) -> list[Tensor]:
        """Draw the inputs of every layer's linears."""
        linears = self.model.linears
        generator = torch.Generator(self.device).manual_seed(tokens)
        return [
            torch.randn(tokens, linears[name].k, generator=generator, device=self.device).to(
                self.dtype
            )
            for name in INPUTS
        ]

    def step(
        self, inputs: Sequence[Tensor], head: Tensor | None, rows: Rows | None, logits: Rows | None
    ) -> Callable[[], list[Tensor]]:
        """Return a step, of the base model if there are no rows with adapters."""
        keep = self.checked if rows else []

        def run() -> list[Tensor]:
            batch = None
            if rows is not None and logits is not None:
                batch = RowsOfTokens(rows.segments, logits.segments, self.pool.reach)
            with torch.no_grad(), self.routing.batch(batch):
                found: list[Tensor] = self.module(inputs, head, keep)
            return found

        return run

    def check(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        requests: Sequence[tuple[int, int]],
    ) -> float:
        """Hold outputs of a step to the rule, against a loop over the adapters.

        Returns:
            The largest error as a share of what is allowed.

        Raises:
            WrongResult: one is farther from fp64 than allowed.
        """
        by_input = dict(zip(INPUTS, inputs, strict=True))
        xs = {name: by_input[names[0]] for names in GROUPS for name in names}
        named = [(number, name) for number in self.checked for name in self.model.linears]
        worst = 0.0
        for (number, name), y in zip(named, outputs, strict=True):
            (at,) = (i for i, path in enumerate(self.pool.names) if path == path_of(number, name))
            linear: Any = self.module.get_submodule(self.pool.names[at])
            weight, bias, x = linear.weight, linear.bias, xs[name]
            native = functional.linear(x, weight, bias)
            wide_bias = None if bias is None else bias.double()
            exact = functional.linear(x.double(), weight.double(), wide_bias)
            title = f"layer {number}, {name}"
            worst = max(worst, self.compare(title, at, x, y, native, exact, requests))
        return worst

    def compare(
        self,
        title: str,
        at: int,
        x: Tensor,
        y: Tensor,
        native: Tensor,
        exact: Tensor,
        requests: Sequence[tuple[int, int]],
    ) -> float:
        """Compare one output, given what it is without adapters in its dtype and in fp64."""
        slots = tuple(dict.fromkeys(slot for slot, _ in requests if slot))
        of_row = [slot for slot, count in requests for _ in range(count)]
        for slot, each in zip(slots, self.pool.in_slots(at, slots).factors, strict=True):
            if each is None:
                continue
            rows = torch.tensor(
                [row for row, own in enumerate(of_row) if own == slot], device=self.device
            )
            a, b, own = each.lora_a, each.lora_b, x[rows]
            native[rows] += (own @ a.t()) @ b * each.scaling
            exact[rows] += (own.double() @ a.double().t()) @ b.double() * each.scaling
        # Of thousands of rows a single wrong one is next to nothing: the worst is held by itself.
        errors, allowed = row_errors(y, exact), row_errors(native, exact)
        at_worst = int(errors.argmax())
        row = f"{title}, row {at_worst}"
        return max(
            checking.check({title: y}, {title: native}, {title: exact}),
            checking.check_errors(
                {row: y[at_worst]}, {row: float(allowed.max())}, {row: exact[at_worst]}
            ),
        )


def row_errors(value: Tensor, exact: Tensor) -> Tensor:
    """Return the relative error of every row."""
    errors: Tensor = (value.double() - exact).norm(dim=1) / exact.norm(dim=1)
    return errors


def path_of(number: int, name: str) -> str:
    """Return what a linear of a layer is called in ``Linears``."""
    return f"layers.{number}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"


def save_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int, dtype: torch.dtype
) -> None:
    """Write an adapter as peft does.

    Args:
        folder: where.
        shapes: out and in features of the linears that it changes, by their paths.
        rank: of it.
        dtype: of its weights.
    """
    from safetensors.torch import save_file

    tensors = {}
    for path, (n, k) in shapes.items():
        for factor, size in (("A", (rank, k)), ("B", (n, rank))):
            weight = (torch.randn(size) * _SPREAD).to(dtype)
            tensors[f"base_model.model.{path}.lora_{factor}.weight"] = weight
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(NAMES)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def adapted(pool: AdapterPool, targets: Collection[str] = NAMES) -> dict[str, tuple[int, int]]:
    """Return the shapes of a pool's linears that adapters change; by default all but the head's."""
    shapes = pool.shapes.items()
    return {path: shape for path, shape in shapes if path.rpartition(".")[2] in targets}


@triton.jit
def empty_kernel(x_ptr):
    pass


def empty_launches(ys: object, x: Tensor, *_: object, **__: object) -> None:
    """Stand in for ``segmented_ops.add_adapters``: as many launches, which do nothing."""
    for _number in range(LAUNCHES // len(GROUPS)):
        empty_kernel[(1,)](x)


def repeated(launch: Callable[[], object], count: int) -> list[Tensor]:
    """Launch so many times; a step without outputs."""
    for _ in range(count):
        launch()
    return []


def together(runs: Sequence[Callable[[], list[Tensor]]]) -> list[Tensor]:
    """Take steps one after the other, and keep none of their outputs."""
    for run in runs:
        run()
    return []


def idle() -> object:
    """Take next to no time."""
    return sum(range(1000))


def in_turns(slots: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Return requests of one row each, in which adapters take turns."""
    return [(slots[row % len(slots)], 1) for row in range(rows)]


def runs_of(slots: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """Return one request for each adapter, as equally long as can be."""
    each, rest = divmod(tokens, len(slots))
    return [(slot, each + (number < rest)) for number, slot in enumerate(slots)]


def launched(step: Step, device: torch.device) -> collections.Counter[str]:
    """Return the kernels that a step launches on a CUDA device, by PyTorch's profiler."""
    step()
    measuring.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        measuring.synchronize(device)
    events = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    # Copies and fills are not kernels.
    return collections.Counter(name for name in events if not name.startswith(("Memcpy", "Memset")))


def is_segmented(name: str) -> bool:
    """Return whether a kernel is one of the two that multiply with adapters."""
    return _is_of(name, segmented_shrink, segmented_expand)


def is_own(name: str) -> bool:
    """Return whether a kernel is one of a decode step's that are not PyTorch's."""
    return is_segmented(name) or _is_of(name, decode_gemm)


def _is_of(name: str, *modules: ModuleType) -> bool:
    return any(
        name.startswith(one) for module in modules for one in vars(module) if "_kernel" in one
    )
