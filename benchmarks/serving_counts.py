"""What the adapters of a batch launch and move in a decode step, counted without a GPU.

    python benchmarks/serving_counts.py         or, with all the other counts: make counts

Counted is what the engine's own linears launch (see ``fastlora/bench/counting.py``), with the tiles
of an H200: every operand of every launch once. How much of an operand a segmented kernel touches is
up to the batch, which a tensor without data cannot say: of the arena the rank rows of the adapters
that have rows, of x, h and y the rows that have an adapter. ``tests/test_serving_counts.py`` holds
these bytes to what the kernels load and store in Triton's interpreter. Frozen products are launches
that are counted by themselves, PyTorch's or fastlora's own; a long prefill has them inside its
segmented launches, of which only the adapters' part is counted then.

Predicted is what follows from bytes and launches alone, by arithmetic; nothing of it was measured.
"""

from __future__ import annotations

import collections
import functools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fastlora import AdapterPool, plans, segmented_ops
from fastlora.adapters.groups import Reach
from fastlora.bench import counting
from fastlora.bench.providers import DecoderLayer
from fastlora.bench.shapes import INPUTS, MODELS, RANK, Linear, Model
from fastlora.kernels import decode_gemm, segmented_expand, segmented_gemm, segmented_shrink
from fastlora.segments import Segments
from fastlora.serving.linears import RowsOfTokens, attach

COUNTED = ("Qwen2.5-7B", "Qwen3-8B", "Qwen2.5-0.5B")
# Distinct adapters and rows of a batch that generates.
DECODE = ((1, 16), (1, 64), (16, 16), (16, 32), (16, 64), (64, 64))
LAUNCHES = 8  # of a decoder layer's adapters, and none for metadata

# What was promised of Qwen2.5-7B on an H200: the share of the base model's own speed, by launches
# of a layer that nothing else hides, and by distinct adapters.
PROMISED_MODEL = "Qwen2.5-7B"
PROMISED = {
    8: {1: 0.86, 16: 0.80, 64: 0.65},
    4: {1: 0.92, 16: 0.85, 64: 0.68},
}

# The same of a prefill of so many tokens, at once or in chunks.
PREFILL = {1: 0.92, 16: 0.90}
PREFILL_TOKENS = (512, 8192)

# By which times are predicted, of an H200: a large copy, a large product in bf16, and a launch in a
# CUDA graph.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = 790e12
SECONDS_PER_LAUNCH = 2e-6
SLOTS = 1024  # of an engine's pool

_MODULES = (segmented_shrink, segmented_expand, segmented_gemm, decode_gemm)
_PRODUCT = "_decode_gemm_kernel"
_PARTS = {"arena_ptr": "adapters", "x_ptr": "x", "h_ptr": "h"}

Operands = tuple[dict[str, int], dict[str, int]]


@dataclass(frozen=True)
class Batch:
    """The rows of a batch, and the ranks of their adapters.

    Attributes:
        slots: of every row; 0 is no adapter.
        ranks: of every slot, in each of the linears that share an input.
    """

    slots: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, distinct: int, rows: int, rank: int = RANK) -> Batch:
        """Return a batch in which so many adapters of one rank take turns."""
        slots = tuple(row % distinct + 1 for row in range(rows))
        return cls(slots, ((0,) * 4, *((rank,) * 4,) * distinct))

    def rows(self, siblings: Iterable[int]) -> int:
        """Return how many rows have an adapter of one of these linears."""
        of_slot = [any(ranks[s] for s in siblings) for ranks in self.ranks]
        return sum(of_slot[slot] for slot in self.slots)

    def rank_rows(self, sibling: int) -> int:
        """Return how many rows A and B of one linear have in all adapters of the batch."""
        return sum(self.ranks[slot][sibling] for slot in set(self.slots))


def metadata_bytes(batch: Batch, block_m: int, siblings: int, entry_bytes: int) -> dict[str, int]:
    """Return what a launch reads to learn which adapter a row has.

    Args:
        batch: the rows.
        block_m: rows of a tile at most.
        siblings: linears of the launch.
        entry_bytes: that are read of a descriptor.
    """
    rows = collections.Counter(slot for slot in batch.slots if slot)
    used = sum(-(-count // block_m) for count in rows.values())
    return {
        "descriptors_ptr": entry_bytes * siblings * len(rows),
        "order_ptr": 4 * rows.total(),
        "tiles_ptr": 4 + 12 * used,  # how many are used, and three numbers of each
    }


def shrink_bytes(
    batch: Batch, siblings: int, k: int, planes: int, itemsize: int, block_m: int
) -> Operands:
    """Return the bytes of each operand that ``segmented_shrink`` reads, and that it writes.

    Args:
        batch: the rows.
        siblings: linears that share x.
        k: in features.
        planes: parts of h.
        itemsize: of x and the adapters.
        block_m: see ``metadata_bytes``.
    """
    every = range(siblings)
    read = metadata_bytes(batch, block_m, siblings, 8)  # page of A, rank
    read["x_ptr"] = itemsize * k * batch.rows(every)
    read["arena_ptr"] = itemsize * k * sum(map(batch.rank_rows, every))
    ranks = sum(batch.ranks[slot][s] for s in every for slot in batch.slots)
    return read, {"h_ptr": 4 * planes * ranks}


def expand_bytes(
    batch: Batch, ns: tuple[int, ...], planes: int, itemsize: int, block_m: int
) -> Operands:
    """Return the bytes of each operand that ``segmented_expand`` reads, and that it writes.

    Args:
        batch: the rows.
        ns: out features of the linears.
        planes: parts of h.
        itemsize: of the outputs and the adapters.
        block_m: see ``metadata_bytes``.
    """
    read = metadata_bytes(batch, block_m, len(ns), 12)  # page of B, rank, scaling
    # Tiles of an adapter that changes none of the linears are left.
    read["order_ptr"] = 4 * batch.rows(range(len(ns)))
    written: dict[str, int] = {}
    read["arena_ptr"] = itemsize * sum(n * batch.rank_rows(s) for s, n in enumerate(ns))
    # h is read in whole vectors of 16 ranks.
    ranks = [-(-batch.ranks[slot][s] // 16) * 16 for s in range(len(ns)) for slot in batch.slots]
    read["h_ptr"] = 4 * planes * sum(ranks)
    for s, n in enumerate(ns):
        written[f"ys.{s}"] = read[f"ys.{s}"] = itemsize * n * batch.rows([s])
    return read, written


def gemm_bytes(batch: Batch, ns: tuple[int, ...], planes: int, itemsize: int) -> Operands:
    """Return the bytes that ``segmented_gemm`` reads for adapters; its products are the model's.

    Args:
        batch: the rows.
        ns: out features of the linears.
        planes: parts of h.
        itemsize: of the adapters.
    """
    read, _ = expand_bytes(batch, ns, planes, itemsize, 16)
    read = {name: read[name] for name in ("arena_ptr", "h_ptr", "descriptors_ptr")}
    return read | {"slots_ptr": 4 * len(batch.slots)}, {}


def product_bytes(arguments: Mapping[str, Any]) -> Operands:
    """Return the bytes of each operand that ``decode_gemm`` reads, and that it writes."""
    siblings = range(arguments["SIBLINGS"])
    read = {"x": arguments["x"].base.nbytes}
    read |= {f"weights.{s}": arguments[f"left_{s}"].base.nbytes for s in siblings}
    return read, {f"ys.{s}": arguments[f"out_{s}"].nbytes for s in siblings}


def operands_of(arguments: Mapping[str, Any], batch: Batch) -> Operands:
    """Return the bytes that one launch reads and writes, from the arguments of its kernel."""
    if "left_0" in arguments:
        return product_bytes(arguments)
    block_m = arguments["BLOCK_M"]
    planes, siblings = arguments["h_ptr"].shape[:2]
    if "right_0" in arguments:
        ns = tuple(output.columns for output in arguments["outputs"])
        return gemm_bytes(batch, ns, planes, arguments["arena_ptr"].element_size())
    if "x_ptr" in arguments:
        x = arguments["x_ptr"]
        return shrink_bytes(batch, siblings, x.shape[-1], planes, x.element_size(), block_m)
    ys = arguments["ys"]
    ns = tuple(y.shape[-1] for y in ys)
    return expand_bytes(batch, ns, planes, ys[0].element_size(), block_m)


@contextmanager
def recording(batch: Batch) -> Iterator[counting.Recorder]:
    """Record what is launched inside the block, where all segmented launches have this batch."""
    with ExitStack() as stack:
        recorder = stack.enter_context(counting.recording())
        for module in _MODULES:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                parameters = tuple(getattr(module, name).arg_names)
                stand_in = _Kernel(recorder, name, parameters, batch)
                stack.enter_context(mock.patch.object(module, name, stand_in))
        plain = segmented_ops.PLAIN_TENSORS | {FakeTensor}
        stack.enter_context(mock.patch.object(segmented_ops, "PLAIN_TENSORS", plain))
        # The recorder watches, and would see the whole of it as one operator.
        stack.enter_context(mock.patch.object(segmented_ops, "is_watched", return_value=False))
        stack.enter_context(mock.patch.object(plans, "segmented_reason", return_value=""))
        yield recorder


@dataclass(frozen=True)
class _Kernel:
    """What stands in for a segmented kernel; it computes nothing."""

    recorder: counting.Recorder
    name: str
    parameters: tuple[str, ...]
    batch: Batch

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            arguments = dict(zip(self.parameters, args, strict=False)) | constants
            read, written = operands_of(arguments, self.batch)
            # FLOPs are not counted: they are a hundredth of what the bytes take.
            self.recorder.launches.append(counting.Launch(self.name, read, written, 0))

        return launch


@dataclass(frozen=True)
class LayerCounts:
    """What the linears of one decoder layer launch for a batch.

    Attributes:
        frozen: launches of frozen products alone.
        kernels: of the segmented kernels.
        others: of anything else: metadata, copies.
        moved: bytes that the segmented kernels move: of the adapters, of x, of y (read and
            written), of h (written and read), and of the metadata.
    """

    frozen: int
    kernels: int
    others: int
    moved: dict[str, int]

    @property
    def launches(self) -> int:
        """Launches that the adapters add."""
        return self.kernels + self.others

    @property
    def bytes(self) -> int:
        """Bytes that the adapters' kernels move."""
        return sum(self.moved.values())


@functools.cache
def count_layer(model: str, distinct: int, rows: int, rank: int = RANK) -> LayerCounts:
    """Count one decoder layer of a model in bf16, as the engine runs it.

    Args:
        model: one of ``shapes.MODELS``.
        distinct: adapters in the batch.
        rows: of the batch.
        rank: of the adapters, on every linear.
    """
    batch = Batch.of(distinct, rows, rank)
    bare = {launch.name for launch in _launches(MODELS[model].linears, None, rank)}
    return summed(_launches(MODELS[model].linears, batch, rank), bare | {_PRODUCT})


def summed(launches: list[counting.Launch], products: Collection[str]) -> LayerCounts:
    """Sort launches, of which those of some names are frozen products."""
    moved = dict.fromkeys(("adapters", "x", "y", "h", "metadata"), 0)
    frozen = sum(launch.name in products for launch in launches)
    kernels = [launch for launch in launches if launch.name.startswith("_segmented_")]
    for launch in kernels:
        for operand, size in [*launch.reads.items(), *launch.writes.items()]:
            is_y = operand.startswith("ys.")
            moved["y" if is_y else _PARTS.get(operand, "metadata")] += size
    return LayerCounts(frozen, len(kernels), len(launches) - len(kernels) - frozen, moved)


def _launches(
    linears: Mapping[str, Linear], batch: Batch | None, rank: int
) -> list[counting.Launch]:
    """Record a decoder layer's linears, of the base model alone if there is no batch."""
    layer = DecoderLayer(
        {
            name: nn.Linear(one.k, one.n, one.has_bias, device="meta", dtype=torch.bfloat16)
            for name, one in linears.items()
        }
    )
    rows = 16 if batch is None else len(batch.slots)
    segments = None if batch is None else Segments.of_slots(batch.slots, table=SLOTS)
    with torch.no_grad(), recording(batch or Batch.of(1, rows)) as recorder:
        counting.without_data(layer)
        pool = AdapterPool(layer, memory=1 << 20, slots=SLOTS)
        routing = attach(layer, pool)
        inputs = [torch.empty(rows, linears[name].k, dtype=torch.bfloat16) for name in INPUTS]
        every = frozenset(group.first for group in pool.groups)
        reach = Reach(max(16, 1 << (rank - 1).bit_length()), every)
        tokens = None if segments is None else RowsOfTokens(segments, segments, reach)
        first = len(recorder.launches)
        with routing.batch(tokens):
            layer(*inputs)
        return recorder.launches[first:]


def base_bytes(model: Model) -> int:
    """Return the bytes that a decode step of the base model reads in bf16, linears and head."""
    layer = sum(linear.n * linear.k for linear in model.linears.values())
    head: int = model.config["vocab_size"] * model.config["hidden_size"]
    return 2 * (model.layers * layer + head)


def share(model: Model, layer_bytes: int, layer_launches: int) -> float:
    """Return the share of the base model's speed that bytes and launches leave.

    By ``BYTES_PER_SECOND`` and ``SECONDS_PER_LAUNCH``, and the base model by its weights alone: its
    launches and what its products miss of the bandwidth would make the share larger.
    """
    base = base_bytes(model) / BYTES_PER_SECOND
    added = layer_bytes / BYTES_PER_SECOND + layer_launches * SECONDS_PER_LAUNCH
    return base / (base + model.layers * added)


def share_of_prefill(model: Model, tokens: int, layer_bytes: int, layer_launches: int) -> float:
    """Return the same of a prefill, whose base is the FLOPs of the linears.

    The adapters' own FLOPs, 0.6 % of those at rank 16, are not in it.
    """
    base = 2 * tokens * sum(linear.n * linear.k for linear in model.linears.values())
    added = layer_bytes / BYTES_PER_SECOND + layer_launches * SECONDS_PER_LAUNCH
    return base / (base + added * FLOPS_PER_SECOND)


def shares(model: Model, counted: LayerCounts) -> dict[str, float]:
    """Return the ceiling by the adapters' bytes, and what is predicted below it.

    x, h and y were written by the launch before, so that they may be in the L2 cache ("warm"), or
    be read again and written to memory ("cold").
    """
    weights = counted.moved["adapters"]
    return {
        "ceiling": share(model, weights, 0),
        "warm": share(model, weights, counted.launches),
        "cold": share(model, counted.bytes, counted.launches),
        "warm_exposed": share(model, weights, min(counted.launches, *PROMISED)),
    }


def exceeded(counted: LayerCounts, adapters_bytes: int) -> str | None:
    """Return by what a layer exceeds its limits, or ``None``."""
    if counted.launches > LAUNCHES or counted.others:
        return (
            f"{counted.launches} launches, {counted.others} of them for something else than the "
            f"adapters' products; at most {LAUNCHES} and none"
        )
    if counted.moved["adapters"] > adapters_bytes:
        return f"{counted.moved['adapters']:,} bytes of adapters that have {adapters_bytes:,}"
    return None


def weight_bytes(model: Model, distinct: int, rank: int = RANK) -> int:
    """Return the bytes of adapters in one decoder layer."""
    return 2 * distinct * rank * sum(linear.n + linear.k for linear in model.linears.values())


def adapters(distinct: int) -> str:
    """Say how many adapters there are."""
    return "1 adapter" if distinct == 1 else f"{distinct} adapters"


def serving_table() -> tuple[list[dict[str, Any]], list[str]]:
    """Print what a decode step takes; returns the rows, and where a limit is exceeded."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    print(
        f"Serving: a decode step of all linears and the head, bf16, r = {RANK} on every linear.\n"
        "Counted, of a decoder layer: launches that adapters add, and the MB that these move.\n"
        f"Predicted, NOT measured, at {BYTES_PER_SECOND / 1e12} TB/s and "
        f"{SECONDS_PER_LAUNCH * 1e6:g} us a launch: the share of the base model's own speed, with "
        "x, h\nand y in the L2 cache (warm) or not (cold), and warm with at most "
        f"{min(PROMISED)} of a layer's launches exposed.\n"
    )
    print(
        f"{'':13} {'adapters':>8} {'rows':>4} {'launches':>8}"
        + "".join(f"{name:>9}" for name in ("adapters", "x", "y", "h", "metadata", "together"))
        + "".join(f"{name:>9}" for name in ("ceiling", "warm", "cold", "exposed"))
    )
    for name in COUNTED:
        model = MODELS[name]
        for distinct, m in DECODE:
            counted = count_layer(name, distinct, m)
            found = shares(model, counted)
            moved = [*counted.moved.values(), counted.bytes]
            print(
                f"{name:13} {distinct:8} {m:4} {counted.launches:8}"
                + "".join(f"{size / 1e6:9.3f}" for size in moved)
                + "".join(f"{100 * one:8.1f}%" for one in found.values())
            )
            problem = exceeded(counted, weight_bytes(model, distinct))
            if problem is not None:
                problems.append(f"{name}, {adapters(distinct)}, {m} rows: {problem}")
            rows.append(
                {"model": name, "adapters": distinct, "rows": m, "predicted": found}
                | asdict(counted)
            )
    print(
        f"\nA layer at most {LAUNCHES} launches, the exact rank rows of every adapter once: ",
        end="",
    )
    print("EXCEEDED" if problems else "kept")
    problems += _promises(rows)
    prefill_table()
    return rows, problems


def prefill_table() -> None:
    """Print what a prefill takes, and what is predicted of it."""
    model = MODELS[PROMISED_MODEL]
    print(
        f"\nA prefill, likewise, beside the FLOPs of the linears at {FLOPS_PER_SECOND / 1e12:g} "
        "TFLOP/s:"
    )
    for tokens in PREFILL_TOKENS:
        for distinct, least in PREFILL.items():
            counted = count_layer(PROMISED_MODEL, distinct, tokens)
            # Where no frozen product is alone, half of the launches are what the base model has.
            added = counted.launches // (1 if counted.frozen else 2)
            cold, warm = (
                100 * share_of_prefill(model, tokens, size, added)
                for size in (counted.bytes, counted.moved["adapters"])
            )
            print(
                f"  {PROMISED_MODEL}, {adapters(distinct)}, {tokens} tokens: {counted.launches} "
                f"launches and {counted.bytes / 1e6:.0f} MB a layer, promised {100 * least:.0f} %, "
                f"predicted {warm:.1f} warm, {cold:.1f} cold"
            )


def _promises(rows: list[dict[str, Any]]) -> list[str]:
    """Print what was promised beside what is predicted; returns what cannot be kept."""
    problems = []
    for launches, promised in PROMISED.items():
        for distinct, least in promised.items():
            mine = [
                row["predicted"]
                for row in rows
                if row["model"] == PROMISED_MODEL and row["adapters"] == distinct
            ]
            warm = min(one["warm" if launches == LAUNCHES else "warm_exposed"] for one in mine)
            cold = f", {100 * min(one['cold'] for one in mine):.1f} cold"
            print(
                f"  {PROMISED_MODEL}, {adapters(distinct)}, {launches} launches exposed: promised "
                f"{100 * least:.0f} %, predicted {100 * warm:.1f}"
                + (cold if launches == LAUNCHES else "")
            )
            if warm < least:
                problems.append(
                    f"{PROMISED_MODEL}, {adapters(distinct)}: {100 * warm:.1f} % predicted with "
                    f"{launches} launches, {100 * least:.0f} promised"
                )
    return problems


def main() -> None:
    _, problems = serving_table()
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
