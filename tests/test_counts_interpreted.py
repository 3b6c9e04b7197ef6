"""What is counted of a kernel is what it does: every load, store and product of it, interpreted.

Each case is run twice by the same launcher: on tensors with data, while Triton's interpreter tells
which bytes every program really loads and stores and what it multiplies, and on tensors without, as
``fastlora.bench.counting`` counts it. For each launch must hold:

    every operand that is counted    all of it is loaded, or all of it is stored, once; never both
    its counted bytes                those that are loaded or stored
    any other byte                   neither loaded nor stored
    the counted scratch              stored once by one kernel, loaded once by the next
    the counted FLOPs                those of its products; where a tile overruns, at most those
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from kernel_cases import P, every_second, padded_rows, transposed
from torch import Tensor, nn
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

import fastlora
from fastlora import dropout, plans
from fastlora.bench import counting, providers
from fastlora.bench.shapes import INPUTS, Linear
from fastlora.kernels import adapter_grads, input_pass, low_rank_gemm, shrink
from fastlora.kernels.tile_config import TileConfig, padded_rank

pytestmark = pytest.mark.skipif(not plans.interpreting(), reason="it watches the interpreter")

HALF, WIDE = torch.float16, torch.float32
THRESHOLD = dropout.threshold(P)
GEMM, SUMS = "_low_rank_gemm_kernel", "_add_partials_kernel"


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Override the fixture of all tests: filling what fastlora allocates would be counted."""


@dataclass
class Operand:
    """A tensor in the arguments of a launch, and what is done to each of its elements.

    Attributes:
        name: of the argument.
        addresses: of the elements, each once, ascending; an expanded dimension has one.
        itemsize: bytes of an element.
        loads: how often the launch loads each.
        stores: how often it stores each.
    """

    name: str
    addresses: np.ndarray
    itemsize: int
    loads: np.ndarray
    stores: np.ndarray

    @property
    def moved(self) -> int:
        """Bytes that are loaded, and bytes that are stored, at least once."""
        return self.itemsize * int((self.loads > 0).sum() + (self.stores > 0).sum())

    @property
    def is_loaded(self) -> bool:
        return bool((self.loads > 0).all() and (self.stores == 0).all())

    @property
    def is_loaded_once(self) -> bool:
        return bool((self.loads == 1).all() and (self.stores == 0).all())

    @property
    def is_stored_once(self) -> bool:
        return bool((self.stores == 1).all() and (self.loads == 0).all())


@dataclass
class Trace:
    """What one launch does.

    Attributes:
        name: of the kernel.
        arguments: by their names, as the interpreter hands them to the kernel.
        operands: the distinct tensors in them, in their order.
        strays: loads and stores of something else than an element of one of them.
        flops: 2 M N K of every product.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    operands: list[Operand] = field(default_factory=list)
    strays: int = 0
    flops: int = 0

    def operand(self, name: str) -> Operand:
        (found,) = (operand for operand in self.operands if operand.name == name)
        return found


class Watcher:
    """Records every launch that is interpreted; ``watch`` puts it in the interpreter's way."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []
        # Of the lanes that are not masked off, by the bytes that each of them moves.
        self._loads: dict[int, list[np.ndarray]] = {}
        self._stores: dict[int, list[np.ndarray]] = {}
        self._accesses = (self._loads, self._stores)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
        run, to_host = executor.__call__, executor._init_args_hst
        load, store = builder.create_masked_load, builder.create_masked_store
        dot = builder.create_dot

        def watched_run(launch: Any, *args: Any, **constants: Any) -> None:
            self.traces.append(Trace(launch.fn.__name__))
            run(launch, *args, **constants)
            self._finish()

        def watched_to_host(launch: Any, args: Any, constants: Any) -> Any:
            # Of tensors that are elsewhere the kernel is given copies.
            args, constants = to_host(launch, args, constants)
            self.traces[-1].arguments = dict(zip(launch.arg_names, args, strict=False)) | constants
            return args, constants

        def watched_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            _note(self._loads, pointers, mask)
            return load(builder, pointers, mask, *rest, **named)

        def watched_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            _note(self._stores, pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def watched_dot(builder: Any, left: Any, right: Any, *rest: Any) -> Any:
            (m, k), n = left.data.shape, right.data.shape[1]
            self.traces[-1].flops += 2 * m * n * k
            return dot(builder, left, right, *rest)

        def refused(*args: Any) -> Any:
            raise AssertionError("an atomic operation, which is not counted")

        monkeypatch.setattr(executor, "__call__", watched_run)
        monkeypatch.setattr(executor, "_init_args_hst", watched_to_host)
        # Every other load and store of the interpreter's, of a descriptor too, is made of these.
        monkeypatch.setattr(builder, "create_masked_load", watched_load)
        monkeypatch.setattr(builder, "create_masked_store", watched_store)
        monkeypatch.setattr(builder, "create_dot", watched_dot)
        monkeypatch.setattr(builder, "create_atomic_cas", refused)
        monkeypatch.setattr(builder, "create_atomic_rmw", refused)
        # Looking for overflows takes a quarter of the time.
        unchecked = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", unchecked)

    def _finish(self) -> None:
        trace = self.traces[-1]
        seen: set[bytes] = set()
        for name, tensor in _named_tensors("", trace.arguments):
            addresses, size = _addresses(tensor), tensor.element_size()
            if addresses.tobytes() not in seen:  # a transposed view is the same operand
                seen.add(addresses.tobytes())
                times = [_times(addresses, each.get(size, [])) for each in self._accesses]
                trace.operands.append(Operand(name, addresses, size, *times))
        done = sum(
            lanes.size for each in self._accesses for some in each.values() for lanes in some
        )
        known = sum(int(each.loads.sum() + each.stores.sum()) for each in trace.operands)
        trace.strays = done - known
        for each in self._accesses:
            each.clear()


def _note(accesses: dict[int, list[np.ndarray]], pointers: Any, mask: Any) -> None:
    taken = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)
    size = pointers.get_element_ty().primitive_bitwidth // 8
    accesses.setdefault(size, []).append(pointers.data[taken].astype(np.int64))


def _addresses(tensor: Tensor) -> np.ndarray:
    """Return the addresses of the elements that a tensor shows."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = np.add.outer(offsets, np.arange(size if stride else 1) * stride)
    return np.sort(tensor.data_ptr() + tensor.element_size() * offsets.ravel())


def _times(addresses: np.ndarray, accesses: list[np.ndarray]) -> np.ndarray:
    """Return how often each of the ascending addresses is accessed."""
    first, length = addresses[0], addresses[-1] - addresses[0] + 1
    lanes = np.concatenate([np.empty(0, np.int64), *accesses]) - first
    inside = lanes[(lanes >= 0) & (lanes < length)]
    return np.bincount(inside, minlength=length)[addresses - first]


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the arguments of a launch, and where they are in them."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, TensorDescriptor):
        yield name, value.base
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named_tensors(key, item)
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", range(len(value)))
        for key, item in zip(fields, value, strict=True):
            yield from _named_tensors(f"{name}.{key}", item)


@pytest.fixture
def traces(monkeypatch) -> list[Trace]:
    watcher = Watcher()
    watcher.watch(monkeypatch)
    return watcher.traces


class Sizes(NamedTuple):
    """Rows, out features of each sibling, in features, rank."""

    m: int
    ns: tuple[int, ...]
    k: int
    r: int


New = Callable[..., Tensor]  # makes a tensor of a shape and a dtype, by default fp16
Call = Callable[[Sizes, New, TileConfig], Any]
Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        call: makes the operands and calls it.
        siblings: how many.
        changes: of the tile.
        described: it is the GEMM, and moves tiles by descriptors, which take whole vectors.
    """

    call: Call
    siblings: int
    changes: dict[str, int]
    described: bool = False

    def sizes(self, whole: bool) -> Sizes:
        """Return sizes that are multiples of ``tile``, or none of which is."""
        if whole:
            return Sizes(64, (64, 32, 32, 32)[: self.siblings], 64, 16)
        if self.described:
            return Sizes(25, (40, 8, 24, 8)[: self.siblings], 40, 5)
        return Sizes(25, (37, 7, 21, 7)[: self.siblings], 43, 5)

    def tile(self, whole: bool) -> TileConfig:
        return replace(TileConfig(32, 32, 16) if whole else TileConfig(16, 32, 32), **self.changes)

    def trace(self, traces: list[Trace], whole: bool) -> None:
        """Interpret it, on tensors with data."""
        self.call(self.sizes(whole), with_data, self.tile(whole))
        for trace in traces:
            if trace.name == GEMM:
                assert isinstance(trace.arguments["out_0"], TensorDescriptor) is self.described

    def count(self, whole: bool, sizes: Sizes | None = None) -> counting.Recorder:
        """Count it, or the same call at other sizes."""
        with counting.recording() as recorder:
            self.call(sizes or self.sizes(whole), without_data, self.tile(whole))
        return recorder


def with_data(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def without_data(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def a_mask(kind: str, new: New, siblings: int, rows: int, columns: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "seed":
        return new(dtype=torch.int64)
    return new(siblings, rows, -(-columns // 8), dtype=torch.uint8)


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def expanded(dy: Tensor) -> Tensor:
    """Return a gradient as ``y.sum()`` makes it."""
    return dy[:1, :1].expand(dy.shape)


def shrinks(
    siblings: int = 1,
    mask: str = "none",
    layout: Layout = as_it_is,
    dtypes: tuple[torch.dtype, ...] = (HALF, HALF, HALF),
    **changes: int,
) -> Case:
    """Shrink; ``dtypes`` are those of x, of A and of the products."""

    def call(s: Sizes, new: New, config: TileConfig) -> None:
        x = layout(new(s.m, s.k, dtype=dtypes[0]))
        adapters = [new(s.r, s.k, dtype=dtypes[1]) for _ in s.ns]
        seed = None if mask == "none" else new(dtype=torch.int64)
        shrink.shrink(
            x,
            adapters,
            seed,
            THRESHOLD,
            rank_dtype=dtypes[2],
            return_bits=mask == "bits",
            config=config,
        )

    return Case(call, siblings, changes)


def multiplies(
    siblings: int, described: bool = True, rank_dtype: torch.dtype = HALF, **changes: int
) -> Case:
    """The GEMM's forward form, the first sibling with a bias."""

    def call(s: Sizes, new: New, config: TileConfig) -> None:
        low_rank_gemm.low_rank_gemm(
            new(s.m, s.k),
            [new(n, s.k) for n in s.ns],
            [new(s.ns[0]), *[None] * (siblings - 1)],
            new(siblings, s.m, s.r, dtype=rank_dtype),
            [new(n, s.r, dtype=rank_dtype) for n in s.ns],
            [2.0] * siblings,
            aligned=described,
            config=config,
        )

    return Case(call, siblings, changes, described)


def adds_its_term(siblings: int, **changes: int) -> Case:
    """The GEMM's forward form without frozen products, the first sibling with a bias."""

    def call(s: Sizes, new: New, config: TileConfig) -> None:
        low_rank_gemm.low_rank_term(
            new(siblings, s.m, s.r),
            [new(n, s.r) for n in s.ns],
            [new(s.ns[0]), *[None] * (siblings - 1)],
            [2.0] * siblings,
            dtype=HALF,
            config=config,
        )

    return Case(call, siblings, changes, described=True)


def scales(keeps_unscaled: bool) -> Case:
    """The GEMM's forward form with DoRA's scaled columns, both siblings with a bias."""

    def call(s: Sizes, new: New, config: TileConfig) -> None:
        x, weights = new(s.m, s.k), [new(n, s.k) for n in s.ns]
        bs, biases = [new(n, s.r) for n in s.ns], [new(n) for n in s.ns]
        run = low_rank_gemm.prepare_scaled_gemm(
            x, weights, biases, bs, [2.0] * 2, rank_dtype=HALF, config=config
        )
        ys, unscaled = ([new(s.m, n) for n in s.ns] for _ in range(2))
        columns = [new(n, dtype=WIDE) for n in s.ns]
        run(x, new(2, s.m, s.r), ys, columns, unscaled if keeps_unscaled else None)

    return Case(call, 2, {}, described=True)


def multiplies_back(
    siblings: int,
    mask: str,
    frozen: bool = True,
    described: bool = True,
    rank_dtype: torch.dtype = HALF,
    **changes: int,
) -> Case:
    """The GEMM's backward form, or its low-rank terms alone."""

    def call(s: Sizes, new: New, config: TileConfig) -> None:
        low_rank_gemm.input_grad(
            [new(s.m, n) for n in s.ns] if frozen else [],
            [new(n, s.k) for n in s.ns] if frozen else [],
            new(siblings, s.m, s.r, dtype=rank_dtype),
            [new(s.r, s.k, dtype=rank_dtype) for _ in s.ns],
            a_mask(mask, new, siblings, s.m, s.k),
            THRESHOLD,
            grad_dtype=HALF,
            aligned=described,
            config=config,
        )

    return Case(call, siblings, changes, described)


def passes_over_dy(
    siblings: int = 1,
    layout: Layout = as_it_is,
    dtypes: tuple[torch.dtype, ...] = (HALF, HALF, HALF),
    **changes: int,
) -> Case:
    """The output pass and its sums; ``dtypes`` are those of dy, of B and of the products."""

    def call(s: Sizes, new: New, config: TileConfig) -> None:
        adapter_grads.adapter_grads(
            [layout(new(s.m, n, dtype=dtypes[0])) for n in s.ns],
            None,
            new(siblings, s.m, s.r, dtype=dtypes[2]),
            [new(n, s.r, dtype=dtypes[1]) for n in s.ns],
            None,
            [2.0] * siblings,
            rank_dtype=dtypes[2],
            grad_dtype=dtypes[1],
            output_config=config,
        )

    return Case(call, siblings, changes)


def passes_over_x(
    siblings: int = 1,
    mask: str = "none",
    layout: Layout = as_it_is,
    dtypes: tuple[torch.dtype, ...] = (HALF, HALF, HALF),
    **changes: int,
) -> Case:
    """The input pass and its sums; ``dtypes`` are those of x, of dA and of the products."""

    def call(s: Sizes, new: New, config: TileConfig) -> None:
        input_pass.input_pass(
            layout(new(s.m, s.k, dtype=dtypes[0])),
            new(siblings, s.m, s.r, dtype=dtypes[2]),
            [layout(new(s.r, s.k, dtype=dtypes[1])) for _ in s.ns],
            a_mask(mask, new, siblings, s.m, s.k),
            THRESHOLD,
            rank_dtype=dtypes[2],
            config=config,
        )

    return Case(call, siblings, changes)


def finds_all_grads(rank_dtype: torch.dtype = HALF, rank: int | None = None) -> Case:
    """Both passes and their sums; above the output pass's ranks, what takes its place."""

    def call(s: Sizes, new: New, config: TileConfig) -> None:
        r = rank or s.r
        adapter_grads.adapter_grads(
            [new(s.m, n) for n in s.ns],
            new(s.m, s.k),
            new(2, s.m, r, dtype=rank_dtype),
            [new(n, r) for n in s.ns],
            a_mask("bits", new, 2, s.m, s.k),
            [2.0] * 2,
            rank_dtype=rank_dtype,
            grad_dtype=HALF,
            output_config=config,
            input_config=config,
        )

    return Case(call, 2, {})


MASKS = ("none", "bits", "seed")
AUTOCAST = (HALF, WIDE, HALF)  # adapters are wider than the products, and cast as they are loaded
FP32 = (WIDE, WIDE, WIDE)
CASES = {
    "shrink": shrinks(),
    "shrink-split": shrinks(splits=2),
    "shrink-dropped-2-split": shrinks(2, "seed", splits=2),
    "shrink-bits-3": shrinks(3, "bits"),
    "shrink-autocast": shrinks(dtypes=AUTOCAST),
    "shrink-fp32": shrinks(dtypes=FP32),
    "shrink-padded": shrinks(layout=padded_rows),
    "shrink-every-second": shrinks(layout=every_second),
    "forward-1": multiplies(1),
    "forward-2-pointers": multiplies(2, described=False),
    "forward-3-parts": multiplies(3, parts=4),
    "forward-three-passes": multiplies(1, rank_dtype=WIDE),
    **{f"forward-term-{count}": adds_its_term(count) for count in (1, 2, 3)},
    "forward-scaled": scales(keeps_unscaled=False),
    "forward-scaled-and-unscaled": scales(keeps_unscaled=True),
    **{f"backward-{mask}-1-parts": multiplies_back(1, mask, parts=2) for mask in MASKS},
    **{f"backward-{mask}-2": multiplies_back(2, mask, described=False) for mask in MASKS},
    "backward-bits-3": multiplies_back(3, "bits"),
    "backward-none-4": multiplies_back(4, "none"),
    "backward-three-passes": multiplies_back(1, "bits", rank_dtype=WIDE),
    **{f"backward-term-{mask}-1": multiplies_back(1, mask, frozen=False) for mask in MASKS},
    "backward-term-bits-3": multiplies_back(3, "bits", frozen=False, parts=2),
    "output-pass": passes_over_dy(),
    "output-pass-split": passes_over_dy(splits=2),
    "output-pass-3-split": passes_over_dy(3, splits=4),
    "output-pass-autocast": passes_over_dy(dtypes=AUTOCAST),
    "output-pass-fp32": passes_over_dy(dtypes=FP32),
    "output-pass-expanded": passes_over_dy(layout=expanded),
    "output-pass-transposed": passes_over_dy(2, layout=transposed),
    **{f"input-pass-{mask}-1": passes_over_x(1, mask) for mask in MASKS},
    **{f"input-pass-{mask}-2-split": passes_over_x(2, mask, splits=2) for mask in MASKS},
    "input-pass-autocast": passes_over_x(dtypes=AUTOCAST),
    "input-pass-fp32": passes_over_x(dtypes=FP32),
    "input-pass-transposed": passes_over_x(layout=transposed),
    "all-grads": finds_all_grads(),
    "all-grads-apart": finds_all_grads(WIDE, rank=32),
}


def ours(launches: list[counting.Launch]) -> list[counting.Launch]:
    """Return the launches of Triton kernels."""
    return [launch for launch in launches if launch.name in counting.KERNEL_FLOPS]


def assert_touched_as_counted(traces: list[Trace], launches: list[counting.Launch]) -> None:
    """Assert of each launch that it moves each counted operand once, and nothing else."""
    assert [trace.name for trace in traces] == [launch.name for launch in launches]
    for trace, launch in zip(traces, launches, strict=True):
        sizes = [*launch.reads.values(), *launch.writes.values()]
        touched = {operand.name: operand.moved for operand in trace.operands}
        assert list(touched.values()) == sizes, f"{trace.name}: {touched} touched, {sizes} counted"
        assert trace.strays == 0, trace.name
        for operand in trace.operands:
            whole = operand.is_loaded or operand.is_stored_once
            assert whole, f"{trace.name}: {operand.name} is neither loaded nor stored as a whole"


def scratch_bytes(traces: list[Trace]) -> list[int]:
    """Return the bytes of partial results that each launch moves, each of them once."""
    moved = [0] * len(traces)
    for number, (before, after) in enumerate(itertools.pairwise(traces)):
        if after.name == SUMS:
            read = after.operand("scratch_ptr")
            (written,) = (
                operand
                for operand in before.operands
                if np.array_equal(operand.addresses, read.addresses)
            )
            assert written.is_stored_once, before.name
            assert read.is_loaded_once
            moved[number], moved[number + 1] = written.moved, read.moved
    assert sum(map(bool, moved)) == 2 * [trace.name for trace in traces].count(SUMS)
    return moved


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_kernel_touches_what_is_counted_and_multiplies_what_is_counted(traces, case):
    case.trace(traces, whole=True)
    recorder = case.count(whole=True)
    assert_touched_as_counted(traces, ours(recorder.launches))
    counts = [
        recorder.counts(number, number + 1)
        for number, launch in enumerate(recorder.launches)
        if launch.name in counting.KERNEL_FLOPS
    ]
    moved = [sum(operand.moved for operand in trace.operands) for trace in traces]
    assert [count.bytes for count in counts] == moved
    assert [count.scratch for count in counts] == scratch_bytes(traces)
    assert [count.flops for count in counts] == [trace.flops for trace in traces]


# Adapters that are taken apart get default tiles, not these; the others differ in dtypes alone.
RAGGED = {
    name: case
    for name, case in CASES.items()
    if not name.endswith(("-apart", "-autocast", "-fp32", "-three-passes"))
}


@pytest.mark.parametrize("case", RAGGED.values(), ids=RAGGED)
def test_a_ragged_call_touches_what_is_counted_and_multiplies_what_is_counted_of_whole_tiles(
    traces, case
):
    case.trace(traces, whole=False)
    recorder = case.count(whole=False)
    launches = ours(recorder.launches)
    assert_touched_as_counted(traces, launches)
    assert sum(scratch_bytes(traces)) == recorder.counts().scratch
    padded = case.count(False, in_whole_tiles(case.sizes(whole=False), case.tile(whole=False)))
    executed = [trace.flops for trace in traces]
    assert executed == [launch.flops for launch in ours(padded.launches)]
    for launch, flops in zip(launches, executed, strict=True):
        assert launch.flops < flops or launch.name == SUMS


def in_whole_tiles(sizes: Sizes, tile: TileConfig) -> Sizes:
    """Return the sizes rounded up to what a tile covers, whichever way a kernel walks them."""
    assert tile.block_n == tile.block_k

    def up(size: int, block: int) -> int:
        return -(-size // block) * block

    ns = tuple(up(n, tile.block_n) for n in sizes.ns)
    return Sizes(up(sizes.m, tile.block_m), ns, up(sizes.k, tile.block_k), padded_rank(sizes.r))


def test_every_kernel_that_is_counted_has_a_case():
    names = set()
    for case in CASES.values():
        names |= {launch.name for launch in ours(case.count(whole=True).launches)}
    assert names == set(counting.KERNEL_FLOPS)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(shrinks(3, "bits"), "x_ptr", id="shrink"),
        pytest.param(passes_over_dy(splits=2), "dys.0", id="output-pass"),
        pytest.param(passes_over_x(3, "seed", splits=2), "x_ptr", id="input-pass"),
    ],
)
def test_the_large_operand_of_a_thin_product_is_read_once_for_all_siblings(traces, case, name):
    case.trace(traces, whole=False)
    assert traces[0].operand(name).is_loaded_once


@pytest.mark.parametrize("name", ["forward-three-passes", "backward-three-passes"])
def test_a_product_in_three_passes_of_tf32_is_counted_once(traces, name):
    CASES[name].trace(traces, whole=True)
    m, (n,), k, r = CASES[name].sizes(whole=True)
    (trace,) = traces
    assert trace.arguments["PRECISION"] == "tf32x3"
    frozen, columns = 2 * m * n * k, n if name.startswith("forward") else k
    (launch,) = CASES[name].count(whole=True).launches
    assert trace.flops == launch.flops == frozen + 2 * m * columns * r


def assert_passes_as_counted(
    traces: list[Trace],
    module: nn.Module,
    parameters: list[Tensor],
    inputs: list[Tensor],
    plan: str,
    passes: counting.Passes,
    whole: bool,
) -> None:
    """Run forward and backward of a module, and assert that its Triton launches are as counted."""
    with counting.h200(), fastlora.backend(plan):
        outputs = module(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        middle = len(traces)
        dys = [torch.ones_like(y) for y in outputs]
        torch.autograd.grad(outputs, [*inputs, *parameters], dys)
    halves = (traces[:middle], passes.forward), (traces[middle:], passes.backward)
    for (done, launches), count in zip(halves, passes.counts, strict=True):
        assert_touched_as_counted(done, ours(launches))
        assert sum(scratch_bytes(done)) == count.scratch
        for trace, launch in zip(done, ours(launches), strict=True):
            assert trace.flops == launch.flops if whole else trace.flops >= launch.flops, trace.name


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("provider", "p", "plan"),
    [
        ("fastlora-bf16", P, "fused"),
        ("fastlora-bf16", P, "hybrid"),
        ("fastlora-bf16", 0.0, "hybrid"),
        ("fastlora", P, "fused"),
    ],
)
def test_a_linear_launches_touches_and_multiplies_what_is_counted_of_it(traces, provider, p, plan):
    """Sizes are whole tiles of an H200's defaults, by which both choose."""
    m, r, size = 256, 16, 256 if plan == "fused" else 128
    shape = {"": Linear(size, size, has_bias=True)}

    def built(device):
        (weights,) = providers.draw_weights(shape, r, device, HALF).values()
        return providers.build(provider, weights, p)

    passes = counting.record(built(counting.META)[0], [size], plan, m, HALF)
    assert counting.count(provider, shape[""], m, r, p, HALF, plan=plan) == passes.counts
    x = torch.ones(m, size, dtype=HALF, requires_grad=True)
    assert_passes_as_counted(traces, *built(CPU), [x], plan, passes, whole=True)


@pytest.mark.parametrize("plan", ["fused", "hybrid"])
def test_a_decoder_layer_launches_and_touches_what_is_counted_of_it(traces, plan):
    """As models call it: q, k and v in one launch, gate and up in another."""
    linears = {
        "q_proj": Linear(40, 72, has_bias=True),
        "k_proj": Linear(16, 72, has_bias=True),
        "v_proj": Linear(16, 72, has_bias=True),
        "o_proj": Linear(72, 40),
        "gate_proj": Linear(88, 72),
        "up_proj": Linear(88, 72),
        "down_proj": Linear(72, 88),
    }
    m, r = 33, 5
    passes = counting.record_layer("fastlora", linears, m, r, P, HALF, plan=plan)
    module, parameters = providers.build_layer(
        "fastlora", providers.draw_weights(linears, r, CPU, HALF), P
    )
    inputs = [torch.ones(m, linears[name].k, dtype=HALF, requires_grad=True) for name in INPUTS]
    assert_passes_as_counted(traces, module, parameters, inputs, plan, passes, whole=False)
