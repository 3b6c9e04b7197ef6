"""What forward and backward of LoRA linears launch, move and compute, counted without a GPU.

Counted is what is really launched, on tensors that have shapes and no data: every operation of
PyTorch that is not a view or an allocation, and every launch of a Triton kernel. A launch moves
each distinct tensor that it reads or writes once: what a kernel must move if its operands fit no
cache and it reads none twice. So these are lower bounds for every provider alike, and no substitute
for a profiler's DRAM counters. "scratch" is the part of the bytes that are fp32 partial results,
written by one kernel of fastlora and read by the next. "saved" is what autograd keeps for the
backward pass, apart from the inputs and the parameters. "flops" are those of matrix products: by
PyTorch's own formulas for its operations, by ``KERNEL_FLOPS`` for ours.

``tests/test_counts_interpreted.py`` holds the bytes and FLOPs of our kernels to the loads, stores
and products that they really do.

A decoder layer is its seven linears as a model calls them: q, k and v on one tensor, gate and up on
another. What autograd adds up where a tensor was used more than once is counted for everyone.

Launchers choose plans and tiles, and with them the size of the scratch, as on an H200; or what is
counted is what a CPU runs, where that is what is timed.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fastlora
from fastlora import LoRALinear, layers, ops, plans, rules
from fastlora.bench import providers
from fastlora.bench.providers import Provider
from fastlora.bench.shapes import DROPOUT, INPUTS, RANK, Linear
from fastlora.kernels import (
    input_pass,
    low_rank_gemm,
    output_pass,
    partial_sums,
    shrink,
    tile_config,
)

H200 = tile_config.DeviceLimits("NVIDIA H200", 90, 232448, 132)
SEED = "randint"  # what draws the seed of a dropout mask

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


def _gemm_flops(arguments: Mapping[str, Any]) -> int:
    columns = [output.columns for output in arguments["outputs"]]
    depths = [product.depth for product in arguments["frozen"]]
    ranks = [arguments["R"]] * len(arguments["low_rank"])
    if not arguments["FORWARD"]:  # one dx, to which every sibling adds
        columns = columns * low_rank_gemm.MAX_SIBLINGS
    # The hybrid plan's launches have no frozen products.
    products = [*zip(columns, depths, strict=False), *zip(columns, ranks, strict=False)]
    return 2 * int(arguments["M"]) * sum(n * depth for n, depth in products)


# Of each Triton kernel, from the arguments of its launch.
KERNEL_FLOPS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "_shrink_kernel": lambda a: 2 * a["M"] * a["K"] * a["R"] * len(a["adapters"]),
    "_low_rank_gemm_kernel": _gemm_flops,
    # dh and dB, both from one tile of dy
    "_output_pass_kernel": lambda a: 4 * a["M"] * a["R"] * sum(o.n for o in a["outputs"]),
    "_input_pass_kernel": lambda a: 2 * a["M"] * a["K"] * a["R"] * len(a["siblings"]),
    "_add_partials_kernel": lambda a: 0,
}


@dataclass(frozen=True)
class Launch:
    """One launch: its name, its FLOPs, and the bytes of each operand that it reads or writes."""

    name: str
    reads: dict[Any, int]
    writes: dict[Any, int]
    flops: int


@dataclass
class Counts:
    """Sums over launches; ``bytes`` includes ``scratch``."""

    launches: int = 0
    bytes: int = 0
    scratch: int = 0
    saved: int = 0
    flops: int = 0
    names: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        names = collections.Counter(self.names) + collections.Counter(other.names)
        return Counts(
            self.launches + other.launches,
            self.bytes + other.bytes,
            self.scratch + other.scratch,
            self.saved + other.saved,
            self.flops + other.flops,
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
        flops = _aten_flops(func, args, kwargs, result)
        self._record(name, reads, list(_tensors(result)), flops)

    def kernel(self, name: str, kernel: Any) -> _Kernel:
        """Return what stands in for a Triton kernel; it computes nothing."""
        return _Kernel(self, name, tuple(inspect.signature(kernel.fn).parameters))

    def record_kernel(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Record one launch; which operands are written does not change the count."""
        if name == "_add_partials_kernel":
            self._partials.add(_identity(arguments["scratch_ptr"]))
        tensors = list(_tensors(tuple(arguments.values())))
        self._record(name, tensors, [], KERNEL_FLOPS[name](arguments))

    def _record(self, name: str, reads: list[Tensor], writes: list[Tensor], flops: int) -> None:
        self._alive += reads + writes
        launch = Launch(name.removeprefix("aten::"), _sizes(reads), _sizes(writes), flops)
        self.launches.append(launch)

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
                flops=launch.flops,
                names={launch.name: 1},
            )
        return total


def _aten_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the FLOPs of one of PyTorch's operations by its own counter's formulas."""
    packet = func._overloadpacket
    name = packet.__name__
    if name.endswith("_") and not name.startswith("_"):  # addmm_ computes what addmm does
        packet = getattr(torch.ops.aten, name[:-1], packet)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


@dataclass(frozen=True)
class _Kernel:
    recorder: Recorder
    name: str
    parameters: tuple[str, ...]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            arguments = dict(zip(self.parameters, args, strict=False)) | constants
            self.recorder.record_kernel(self.name, arguments)

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
def recording(as_h200: bool = True) -> Iterator[Recorder]:
    """Record what is launched inside the block; the tensors made there have no data.

    They say that they are on the CPU, because autocast and autograd ask for a device that exists.

    Args:
        as_h200: let three things go the way of that GPU: plans and tiles are its own, kernels take
            these tensors, and dropout is the one operation that it is in CUDA. Otherwise what is
            recorded is what a CPU runs.
    """
    recorder = Recorder()
    replace = mock.patch.object
    with contextlib.ExitStack() as stack:
        if as_h200:
            stack.enter_context(h200())
            stack.enter_context(replace(plans, "interpreting", lambda: True))
            stack.enter_context(replace(plans, "plan_for", _plan_on_cuda))
            stack.enter_context(replace(nn.functional, "dropout", _cuda_dropout))
        for module in _KERNEL_MODULES:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stand_in = recorder.kernel(name, getattr(module, name))
                stack.enter_context(replace(module, name, stand_in))
        stack.enter_context(replace(FakeTensor, "data_ptr", lambda tensor: 0))
        stack.enter_context(replace(rules, "_PLAIN_TENSORS", rules._PLAIN_TENSORS | {FakeTensor}))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(recorder)
        yield recorder


_plan_for = plans.plan_for


def _plan_on_cuda(operation: str, device: torch.device, *args: Any, **kwargs: Any) -> plans.Plan:
    return _plan_for(operation, torch.device("cuda"), *args, **kwargs)


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
    module: nn.Module,
    features: Iterable[int],
    plan: str,
    m: int,
    dtype: torch.dtype,
    as_h200: bool = True,
) -> Passes:
    """Record the forward and the backward pass of a module on the meta device.

    Args:
        module: its outputs are a tensor or a tuple of them; every one gets a gradient.
        features: in features of its inputs.
        plan: as in ``count``.
        m: rows of every input.
        dtype: of the inputs and of the gradients of the outputs.
        as_h200: see ``recording``.
    """
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with recording(as_h200) as recorder, fastlora.backend(plan):
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


def count(
    provider: str,
    shape: Linear,
    m: int,
    r: int = RANK,
    p: float = DROPOUT,
    dtype: torch.dtype = torch.bfloat16,
    *,
    plan: str | None = None,
) -> tuple[Counts, Counts]:
    """Count the forward and the backward pass of one linear.

    Args:
        provider: one of ``providers.PROVIDERS`` that is countable.
        shape: of the linear.
        m: rows of the input.
        r: rank.
        p: dropout.
        dtype: of input, base weight and output.
        plan: what fastlora is held to, by default the provider's. (The plain plan draws masks in
            pieces whose number depends on the device.)

    Raises:
        ValueError: there is no such provider, it has no dropout, or it cannot be counted.
    """
    return _count(_countable(provider), plan, shape, m, r, p, dtype)


@functools.cache
def _count(
    provider: Provider,
    plan: str | None,
    shape: Linear,
    m: int,
    r: int,
    p: float,
    dtype: torch.dtype,
) -> tuple[Counts, Counts]:
    (weights,) = providers.draw_weights({"": shape}, r, META, dtype).values()
    layer, _ = providers.build(provider, weights, p)
    return record(layer, [shape.k], plan or provider.plan, m, dtype).counts


def record_layer(
    provider: str,
    linears: Mapping[str, Linear],
    m: int,
    r: int = RANK,
    p: float = DROPOUT,
    dtype: torch.dtype = torch.bfloat16,
    *,
    plan: str | None = None,
    as_h200: bool = True,
) -> Passes:
    """Record the linears of one decoder layer (see ``count`` and ``recording``)."""
    named = tuple(linears.items())
    return _record_layer(_countable(provider), plan, named, m, r, p, dtype, as_h200)


@functools.cache
def _record_layer(
    provider: Provider,
    plan: str | None,
    named: tuple[tuple[str, Linear], ...],
    m: int,
    r: int,
    p: float,
    dtype: torch.dtype,
    as_h200: bool,
) -> Passes:
    linears = dict(named)
    weights = providers.draw_weights(linears, r, META, dtype)
    layer, _ = providers.build_layer(provider, weights, p)
    features = [linears[name].k for name in INPUTS]
    return record(layer, features, plan or provider.plan, m, dtype, as_h200)


def _countable(name: str) -> Provider:
    provider = providers.find(name)
    if not provider.countable:
        raise ValueError(f"{name} does not run on tensors without data: it cannot be counted")
    return provider


def clear() -> None:
    """Forget what was counted: plans or tiles have changed."""
    _count.cache_clear()
    _record_layer.cache_clear()
