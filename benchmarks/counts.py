"""What forward and backward of LoRA linears launch and move, counted without a GPU.

    python benchmarks/counts.py         or: make counts

Counted is what is really launched, on tensors that have shapes and no data: every operation of
PyTorch that is not a view or an allocation, and every launch of a Triton kernel. A launch moves
each distinct tensor that it reads or writes once: what a kernel must move if its operands fit no
cache and it reads none twice. So these are lower bounds for every provider alike, and no substitute
for a profiler's DRAM counters. "scratch" is the part of the bytes that are fp32 partial results,
written by one kernel of fastlora and read by the next. "saved" is what autograd keeps for the
backward pass, apart from the inputs and the parameters.

A decoder layer is its seven linears as a model calls them: q, k and v on one tensor, gate and up on
another. What autograd adds up where a tensor was used more than once is counted for everyone.

Launchers choose tiles, and with them the size of the scratch, as on an H200.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import baselines
import torch
from shapes import DROPOUT, GROUPS, INPUTS, LORAFUSION, MODELS, RANK, TOKENS, Linear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import LoRALinear, layers, ops, plans, rules
from fastlora.kernels import (
    input_pass,
    low_rank_gemm,
    output_pass,
    partial_sums,
    shrink,
    tile_config,
)

GIB, MIB = 2**30, 2**20
H200 = tile_config.DeviceLimits("NVIDIA H200", 90, 232448, 132)

# What LoRAFusion and its own baseline move: DRAM bytes that a profiler measured on an H100 (figure
# source of https://github.com/CentML/lorafusion). In GiB, forward and backward.
LORAFUSION_PUBLISHED = dict(zip(LORAFUSION, (1.258, 1.836, 4.044), strict=True))
TORCH_PUBLISHED = dict(zip(LORAFUSION, (2.008, 2.771, 5.289), strict=True))
# What the fused plan may move, in GiB, without its scratch.
LIMITS = dict(zip(LORAFUSION, (0.52, 0.67, 1.16), strict=True))

# What one decoder layer may launch, forward and backward, GEMMs and reductions included: at 8192
# rows with dropout, and one more in the forward for the seed of each group.
LAUNCH_LIMITS = {"fused": (8, 20), "hybrid": (15, 27)}
SEED = "randint"  # what draws one

# Column: provider and the plan that fastlora is held to.
COLUMNS = {
    "frozen": ("frozen", "auto"),
    "peft": ("peft", "auto"),
    "peft-bf16": ("peft-bf16", "auto"),
    "hybrid": ("fastlora", "hybrid"),
    "fused": ("fastlora", "fused"),
}

_KERNEL_MODULES = (shrink, low_rank_gemm, output_pass, input_pass, partial_sums)
_OPERATORS: dict[Any, Callable[..., Any]] = {
    ops.shrink: ops._shrink,
    ops.low_rank_gemm: ops._low_rank_gemm,
    ops.adapter_grads: ops._adapter_grads,
    ops.input_grad: ops._input_grad,
}
# Nothing runs on the device for these, and their schemas do not say that they are views.
_FREE = frozenset(
    (
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::_unsafe_view",
        "aten::lift_fresh",
        "prim::device",
    )
)
# They overwrite their first argument and never read it; the others that end in _ do.
_OVERWRITES = frozenset(("aten::copy_", "aten::fill_", "aten::zero_"))


@dataclass(frozen=True)
class Launch:
    """One launch: its name, and the bytes of each distinct operand that it reads or writes."""

    name: str
    reads: dict[Any, int]
    writes: dict[Any, int]


@dataclass
class Counts:
    """Sums over launches; ``bytes`` includes ``scratch``."""

    launches: int = 0
    bytes: int = 0
    scratch: int = 0
    saved: int = 0
    names: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        names = collections.Counter(self.names) + collections.Counter(other.names)
        return Counts(
            self.launches + other.launches,
            self.bytes + other.bytes,
            self.scratch + other.scratch,
            self.saved + other.saved,
            dict(names),
        )

    @property
    def operands(self) -> int:
        """Bytes without the scratch."""
        return self.bytes - self.scratch


def touched_bytes(tensor: Tensor) -> int:
    """Return the bytes behind a tensor: a dimension that was expanded holds one element."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * tensor.element_size()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Name the memory behind a tensor: a transposed view is the same operand, a slice another."""
    extents = tuple(sorted((st, si) for si, st in zip(tensor.shape, tensor.stride(), strict=True)))
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, extents


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in the arguments of a launch: in tuples, lists and descriptors too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(getattr(value, "base", None), Tensor):
        yield value.base


def _sizes(tensors: Iterable[Tensor]) -> dict[Any, int]:
    return {_identity(tensor): touched_bytes(tensor) for tensor in tensors}


class Recorder(TorchDispatchMode):
    """Records every launch: PyTorch's operations as a dispatch mode, kernels by ``kernel``."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._partials: set[Any] = set()
        # A storage that was freed would lend its identity to a later one.
        self._alive: list[Tensor] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPERATORS:
            with self:
                return _OPERATORS[func](*args, **kwargs)
        name = func._schema.name
        if name in _FREE:
            return func(*args, **kwargs)
        # Below autograd, which is where operators run, composite operations arrive whole.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        # Without a tensor in the result nothing ran on the device.
        if not func.is_view and next(_tensors(result), None) is not None:
            self._record_operation(func, name, args, kwargs, result)
        return result

    def _record_operation(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        reads: list[Tensor] = []
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            tensors = list(_tensors(named.get(argument.name)))
            written = argument.alias_info is not None and argument.alias_info.is_write
            unread = (
                (written and (argument.is_out or name in _OVERWRITES))
                # beta * self + alpha * left @ right
                or (argument.name == "self" and named.get("beta", 1) == 0)
            )
            if not unread:
                reads += tensors
        self._record(name, reads, list(_tensors(result)))

    def kernel(self, name: str) -> _Kernel:
        """Return what stands in for a Triton kernel; it computes nothing."""
        return _Kernel(self, name)

    def record_kernel(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Record one launch; which operands are written does not change the count."""
        if name == "_add_partials_kernel":
            self._partials.add(_identity(arguments[0]))
        self._record(name, list(_tensors(arguments)), [])

    def _record(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        self._alive += reads + writes
        self.launches.append(Launch(name.removeprefix("aten::"), _sizes(reads), _sizes(writes)))

    def counts(self, first: int = 0, end: int | None = None) -> Counts:
        """Return the sums over the launches from ``first`` to ``end``."""
        total = Counts()
        for launch in self.launches[first:end]:
            # An operand that is read and written in place is moved both ways.
            moved = [*launch.reads.items(), *launch.writes.items()]
            total += Counts(
                1,
                sum(size for _, size in moved),
                sum(size for key, size in moved if key in self._partials),
                names={launch.name: 1},
            )
        return total


@dataclass(frozen=True)
class _Kernel:
    recorder: Recorder
    name: str

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            self.recorder.record_kernel(self.name, args)

        return launch


def _clear_caches() -> None:
    plans.forget_measurements()
    plans.unsupported_reason.cache_clear()


@contextlib.contextmanager
def h200() -> Iterator[None]:
    """Let tiles and plans be chosen as on an H200 whose kernels passed their check.

    By the committed table alone: what a user has tuned on this machine must not change a count.
    """
    devices = (torch.device("cpu"), torch.device("cuda"))
    limits = mock.Mock(return_value=H200)
    with contextlib.ExitStack() as stack:
        for module in (tile_config, low_rank_gemm, plans):
            stack.enter_context(mock.patch.object(module, "device_limits", limits))
        committed = mock.Mock(return_value=tile_config.TUNED)
        stack.enter_context(mock.patch.object(tile_config, "user_cache", committed))
        stack.enter_context(mock.patch.dict(plans._failures, {device: {} for device in devices}))
        _clear_caches()
        stack.callback(_clear_caches)
        yield


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Record what is launched inside the block; the tensors made there have no data.

    They say that they are on the CPU, because autocast and autograd ask for a device that exists.
    Two things are made to go the way of a GPU: kernels take these tensors, and dropout is the one
    operation that it is in CUDA.
    """
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(h200())
        replace = functools.partial(mock.patch.object)
        for module in _KERNEL_MODULES:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(replace(module, name, recorder.kernel(name)))
        stack.enter_context(replace(plans, "interpreting", lambda: True))
        stack.enter_context(replace(FakeTensor, "data_ptr", lambda tensor: 0))
        stack.enter_context(replace(rules, "_PLAIN_TENSORS", rules._PLAIN_TENSORS | {FakeTensor}))
        stack.enter_context(replace(nn.functional, "dropout", _cuda_dropout))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(recorder)
        yield recorder


def without_data(layer: nn.Module) -> list[nn.Parameter]:
    """Put a meta layer's parameters where ``recording`` wants tensors; returns the trainable ones.

    (torch cannot move a module whose parameters are such tensors, as peft does when it builds one.)
    """
    for module in layer.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = torch.empty(old.shape, dtype=old.dtype)
            module.register_parameter(name, nn.Parameter(new, requires_grad=old.requires_grad))
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _cuda_dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return x
    return torch.native_dropout(x, p, True)[0]


@dataclass(frozen=True)
class Passes:
    """The launches of a forward and a backward pass.

    Attributes:
        forward: in their order.
        backward: likewise.
        saved: bytes that autograd keeps in between, apart from the inputs and the parameters.
        inputs: the inputs, by which ``readers`` knows their storages.
        counts: the sums of forward and backward.
    """

    forward: list[Launch]
    backward: list[Launch]
    saved: int
    inputs: list[Tensor]
    counts: tuple[Counts, Counts]

    def readers(self, number: int) -> list[str]:
        """Return the names of the launches that read one of the inputs, in their order."""
        storage = self.inputs[number].untyped_storage()._cdata
        return [
            launch.name
            for launch in self.forward + self.backward
            if any(key[0] == storage for key in launch.reads)
        ]


def record(
    module: nn.Module, features: Iterable[int], plan: str, m: int, dtype: torch.dtype
) -> Passes:
    """Record the forward and the backward pass of a module on the meta device.

    Args:
        module: its outputs are a tensor or a tuple of them; every one gets a gradient.
        features: in features of its inputs.
        plan: as in ``count``.
        m: rows of every input.
        dtype: of the inputs and of the gradients of the outputs.
    """
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with recording() as recorder, fastlora.backend(plan):
        parameters = without_data(module)
        inputs = [torch.empty(m, k, dtype=dtype, requires_grad=True) for k in features]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = list(_tensors(module(*inputs)))
        middle = len(recorder.launches)
        dys = [torch.empty(m, y.shape[1], dtype=dtype) for y in outputs]
        torch.autograd.grad(outputs, [*inputs, *parameters], dys)
        for part in module.modules():
            if isinstance(part, LoRALinear):
                assert part.fastlora_last_call == layers.FUSED, part.fastlora_last_call
        passes = recorder.counts(0, middle), recorder.counts(middle)
        ours = {tensor.untyped_storage()._cdata for tensor in (*inputs, *module.parameters())}
        passes[0].saved = sum(
            tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in ours
        )
    launches = recorder.launches
    return Passes(launches[:middle], launches[middle:], passes[0].saved, inputs, passes)


META = torch.device("meta")


@functools.cache
def count(
    provider: str,
    plan: str,
    shape: Linear,
    m: int,
    r: int = RANK,
    p: float = DROPOUT,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Counts, Counts]:
    """Count the forward and the backward pass of one linear.

    Args:
        provider: one of ``baselines.PROVIDERS``.
        plan: what fastlora is held to: ``"fused"`` or ``"hybrid"``. (The plain plan draws masks in
            pieces whose number depends on the device.)
        shape: of the linear.
        m: rows of the input.
        r: rank.
        p: dropout.
        dtype: of input, base weight and output.
    """
    layer, _ = baselines.build(provider, shape, r, p, META, dtype)
    return record(layer, [shape.k], plan, m, dtype).counts


@functools.cache
def record_layer(
    provider: str,
    plan: str,
    model: str,
    m: int,
    r: int = RANK,
    p: float = DROPOUT,
    dtype: torch.dtype = torch.bfloat16,
) -> Passes:
    """Record the linears of one decoder layer of a model (see ``count`` for the arguments)."""
    linears = MODELS[model]
    layer, _ = baselines.build_layer(provider, linears, r, p, META, dtype)
    return record(layer, [linears[name].k for name in INPUTS], plan, m, dtype)


def clear() -> None:
    """Forget what was counted: plans or tiles have changed."""
    count.cache_clear()
    record_layer.cache_clear()


def automatic_plans(linears: dict[str, Linear], m: int) -> dict[str, dict[str, str]]:
    """Return the plans that fastlora takes by itself on an H200: operation -> names -> plan."""
    groups = {"/".join(names): names for names in GROUPS if set(names) <= set(linears)}
    cuda = torch.device("cuda")
    with h200():
        return {
            operation: {
                group: plans.plan_for(
                    operation,
                    cuda,
                    torch.bfloat16,
                    m,
                    sum(linears[name].n for name in names),
                    linears[names[0]].k,
                    RANK,
                    masked=True,
                    siblings=len(names),
                )
                for group, names in groups.items()
            }
            for operation in ("low_rank_gemm", "input_grad", "shrink", "adapter_grads")
        }


def _described(by_operation: dict[str, dict[str, str]]) -> str:
    """Describe plans in a line; the thin products have none to choose between."""
    parts = []
    for operation in ("low_rank_gemm", "input_grad"):
        by_plan: dict[str, list[str]] = {}
        for names, plan in by_operation[operation].items():
            by_plan.setdefault(plan, []).append(names.replace("_proj", ""))
        chosen = "; ".join(
            plan if len(by_plan) == 1 else f"{plan} for {', '.join(names)}"
            for plan, names in by_plan.items()
        )
        parts.append(f"{operation} {chosen}")
    return ", ".join(parts)


def exceeded(column: str, forward: Counts, backward: Counts) -> str | None:
    """Return by what a decoder layer's launches exceed their limit, or ``None``."""
    seeds = forward.names.get(SEED, 0)
    found = forward.launches - seeds, backward.launches
    limit = LAUNCH_LIMITS[column]
    if found[0] <= limit[0] and found[1] <= limit[1] and seeds <= len(GROUPS):
        return None
    return (
        f"{found[0]} and {found[1]} launches beside {seeds} seeds, at most {limit[0]} and "
        f"{limit[1]} beside {len(GROUPS)}"
    )


def layers_table() -> tuple[list[dict[str, Any]], list[str]]:
    """Print what a decoder layer takes; returns the rows, and where a limit is exceeded."""
    rows, problems = [], []
    print(
        f"The linears of one decoder layer, forward and backward, bf16, r = {RANK}, "
        f"p = {DROPOUT}.\npeft, hybrid and fused have fp32 adapters under autocast; hybrid and "
        "fused are fastlora's plans.\n"
    )
    print(f"{'':13} {'rows':>5} {'':13}" + "".join(f"{name:>11}" for name in COLUMNS))
    for model, linears in MODELS.items():
        for m in TOKENS:
            counted = {
                name: record_layer(provider, plan, model, m).counts
                for name, (provider, plan) in COLUMNS.items()
            }
            for label, shown in (
                ("GiB", lambda f, b: f"{(f + b).bytes / GIB:.3f}"),
                ("launches f/b", lambda f, b: f"{f.launches}/{b.launches}"),
                ("saved MiB", lambda f, b: f"{f.saved / MIB:.1f}"),
            ):
                first = f"{model:13} {m:5}" if label == "GiB" else " " * 19
                line = "".join(f"{shown(*passes):>11}" for passes in counted.values())
                print(f"{first} {label:13}{line}")
            if m == TOKENS[0]:
                problems += _verdicts(model, counted)
            rows.append(
                {
                    "model": model,
                    "rows": m,
                    "columns": {
                        name: {"forward": _as_json(forward), "backward": _as_json(backward)}
                        for name, (forward, backward) in counted.items()
                    },
                    "automatic_plans": automatic_plans(linears, m),
                }
            )
    with h200():
        measured = len(tile_config.tuned_entries(H200.name))
    print(f"\nPlans that `auto` takes on an H200; the committed table has {measured} entries:")
    by_plans: dict[str, list[str]] = {}
    for row in rows:
        described = _described(row["automatic_plans"])
        by_plans.setdefault(described, []).append(f"{row['model']} ({row['rows']})")
    for described, names in by_plans.items():
        everywhere = len(names) == len(rows)
        print(f"  {'all of these' if everywhere else ', '.join(names)}: {described}")
    return rows, problems


def _verdicts(model: str, counted: dict[str, tuple[Counts, Counts]]) -> list[str]:
    """Print whether the limits on launches are kept; returns those that are not."""
    problems = []
    for column, (of_forward, of_backward) in LAUNCH_LIMITS.items():
        found = exceeded(column, *counted[column])
        limit = f"{column} at most {of_forward} + {len(GROUPS)} seeds / {of_backward}"
        print(f"{'':19} {limit}: {'kept' if found is None else 'EXCEEDED'}")
        if found is not None:
            problems.append(f"{model}, {column}: {found}")
    return problems


def _as_json(counts: Counts) -> dict[str, Any]:
    return asdict(counts) | {"operands": counts.operands}


def lorafusion_table() -> tuple[list[dict[str, Any]], list[str]]:
    """Print the cases of LoRAFusion's paper; returns the rows, and where a limit is exceeded."""
    rows, problems = [], []
    m = TOKENS[0]
    print(
        f"LoRAFusion's cases: {m} rows, bf16 throughout, r = {RANK}, p = {DROPOUT}, forward and "
        "backward, GiB.\nPublished figures are DRAM bytes measured on an H100; counted ones are "
        "operands, each moved once.\n"
    )
    print(f"{'':13}{'torch, peft':>22}{'LoRAFusion':>13}{'fastlora, fused':>37}")
    print(
        f"{'':13}{'published':>11}{'counted':>11}{'published':>13}{'operands':>13}{'scratch':>12}"
        f"{'together':>12}{'limit':>9}  by operands / together"
    )
    for name, shape in LORAFUSION.items():
        forward, backward = count("fastlora-bf16", "fused", shape, m)
        fused = forward + backward
        forward, backward = count("peft-bf16", "auto", shape, m)
        peft = forward + backward
        kept = fused.operands <= LIMITS[name] * GIB
        verdict = " / ".join(
            "kept" if moved <= LIMITS[name] * GIB else "EXCEEDED"
            for moved in (fused.operands, fused.bytes)
        )
        print(
            f"{name:13}{TORCH_PUBLISHED[name]:11.3f}{peft.bytes / GIB:11.3f}"
            f"{LORAFUSION_PUBLISHED[name]:13.3f}{fused.operands / GIB:13.3f}"
            f"{fused.scratch / GIB:12.3f}{fused.bytes / GIB:12.3f}{LIMITS[name]:9.2f}  {verdict}"
        )
        if not kept:
            problems.append(
                f"{name}: {fused.operands / GIB:.3f} GiB of operands, at most {LIMITS[name]}"
            )
        rows.append(
            {
                "case": name,
                "fused": _as_json(fused),
                "peft-bf16": _as_json(peft),
                "lorafusion_published_gib": LORAFUSION_PUBLISHED[name],
                "torch_published_gib": TORCH_PUBLISHED[name],
                "limit_gib": LIMITS[name],
            }
        )
    return rows, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there as well")
    options = parser.parse_args()
    models, too_many = layers_table()
    print()
    cases, too_much = lorafusion_table()
    if options.json:
        options.json.write_text(json.dumps({"models": models, "lorafusion": cases}, indent=1))
    if too_many or too_much:
        sys.exit("\n".join(too_many + too_much))


if __name__ == "__main__":
    main()
