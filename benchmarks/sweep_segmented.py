"""Time tiles of the segmented kernels side by side, on the linears of a model: for their defaults.

    python benchmarks/gpu.py --part sweep --out DIR

Each figure is that of one launch, of a graph with the launches of all layers, whose adapters are in
memory of their own and not in the L2 cache. Nothing is checked here: the part ``serve``
compares what the default tiles compute. Kernels are compiled by several processes at once first,
because Triton compiles for longer than is timed.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from served import in_turns, runs_of
from torch import Tensor

from fastlora.bench import measuring
from fastlora.bench.shapes import GROUPS, MODELS
from fastlora.kernels import segmented_expand, segmented_shrink
from fastlora.kernels.tile_config import (
    TileConfig,
    default_tile,
    device_limits,
    forget_tiles,
    padded_rank,
)
from fastlora.segments import MAX_DECODE_TOKENS, PAGE, Segments, pages_of
from fastlora.timing import measure_us

if TYPE_CHECKING:
    from gpu import Run

MODEL = "Qwen2.5-7B"
LAYERS = 28
RANK = 16
COLUMNS = ["date", "commit", "device", "kernel", "group", "rows", "adapters", "rank", "tile", "us"]


@dataclass(frozen=True)
class Case:
    """A batch for a group of linears."""

    names: tuple[str, ...]
    rows: int
    adapters: int
    rank: int = RANK

    @property
    def generates(self) -> bool:
        """Return whether its rows are those of a step that generates, one of a request each."""
        return self.rows <= MAX_DECODE_TOKENS

    @property
    def ns(self) -> tuple[int, ...]:
        return tuple(MODELS[MODEL].linears[name].n for name in self.names)

    @property
    def k(self) -> int:
        return MODELS[MODEL].linears[self.names[0]].k


DECODE = ((1, 16), (16, 16), (1, 64), (16, 64), (64, 64))
PREFILL = ((1, 512), (16, 512), (1, 8192))


def cases(groups: Sequence[tuple[str, ...]] = GROUPS) -> list[Case]:
    """Return batches that generate, and prompts."""
    return [Case(names, rows, n) for n, rows in (*DECODE, *PREFILL) for names in groups]


class Operands:
    """What both kernels get, for every layer."""

    def __init__(self, case: Case, device: torch.device, layers: int) -> None:
        self.case = case
        slots, page = case.adapters + 1, 0
        tables = torch.zeros((layers, len(case.ns), slots, 4), dtype=torch.int32)
        scale = torch.tensor(2.0).view(torch.int32)
        for table in tables:
            for s, n in enumerate(case.ns):
                for slot in range(1, slots):
                    table[s, slot, 0], page = page, page + pages_of(case.rank * case.k)
                    table[s, slot, 1], page = page, page + pages_of(case.rank * n)
                    table[s, slot, 2], table[s, slot, 3] = case.rank, scale
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
        self.tables = list(tables.to(device))
        self.arena = torch.empty(page * PAGE, dtype=dtype, device=device).normal_(std=0.02)
        self.x = torch.randn(case.rows, case.k, device=device).to(dtype)
        self.ys = [torch.zeros(case.rows, n, dtype=dtype, device=device) for n in case.ns]
        arrange = in_turns if case.generates else runs_of
        requests = arrange(range(1, slots), case.rows)
        self.segments = Segments.of(requests, table=slots, device=device)

    def shrinks(self, config: TileConfig | None) -> Callable[[], Any]:
        """Return the shrinks of all layers; they return h of the last."""
        down = self._shrink(config)
        return lambda: [down(table) for table in self.tables][-1]

    def expands(self, config: TileConfig | None, h: Tensor) -> Callable[[], Any]:
        up = self._expand(config, h)

        def all_layers() -> None:
            for table in self.tables:
                up(h, table)

        return all_layers

    def _shrink(self, config: TileConfig | None) -> Callable[[Tensor], Tensor]:
        run = segmented_shrink.prepare_segmented_shrink(
            *(self.x, self.arena, self.tables[0], self.segments),
            max_rank=padded_rank(self.case.rank),
            config=config,
        )
        return lambda table: run(self.x, self.arena, table, self.segments)

    def _expand(self, config: TileConfig | None, h: Tensor) -> Callable[[Tensor, Tensor], None]:
        run = segmented_expand.prepare_segmented_expand(
            self.ys, h, self.arena, self.tables[0], self.segments, config=config
        )
        return lambda h, table: run(self.ys, h, self.arena, table, self.segments)

    def pairs(self, shrink: TileConfig | None, expand: TileConfig | None) -> Callable[[], Any]:
        down = self._shrink(shrink)
        up = self._expand(expand, down(self.tables[0]))

        def all_layers() -> None:
            for table in self.tables:
                up(down(table), table)

        return all_layers


def shrink_tiles(case: Case, default: TileConfig) -> Iterator[TileConfig]:
    """Yield tiles of the shrink worth timing, the default first."""
    yield default
    if case.generates:
        for warps, block_k, stages in itertools.product((1, 2, 4), (128, 256), (2, 4)):
            tile = replace(default, block_k=block_k, num_warps=warps, num_stages=stages)
            for splits in (max(1, default.splits // 2), default.splits, default.splits * 2):
                yield replace(tile, splits=splits)
                if stages == 4:
                    yield replace(tile, splits=splits, programs=32)
    else:
        for warps, block_k, stages in itertools.product((4, 8), (32, 64, 128), (3, 5)):
            yield replace(default, block_k=block_k, num_warps=warps, num_stages=stages)


def expand_tiles(case: Case, default: TileConfig) -> Iterator[TileConfig]:
    """Yield tiles of the expand worth timing, the default first."""
    yield default
    few = case.generates
    for warps, block_n, stages, programs in itertools.product(
        (1, 2, 4) if few else (4, 8),
        (64, 128, 256) if few else (64, 128),
        (1, 3, 4) if few else (1, 2, 3),
        (2, 4, 8),
    ):
        tile = replace(default, block_n=block_n, num_warps=warps)
        yield replace(tile, num_stages=stages, programs=programs)


def _defaults(case: Case, device: torch.device) -> tuple[TileConfig, TileConfig]:
    limits, dtype = device_limits(device), torch.bfloat16
    common = {"siblings": len(case.ns), "wide_rank": False, "aligned": True}
    shrink = default_tile("segmented_shrink", limits, dtype, case.rows, 0, case.k, 16, **common)
    expand = default_tile(
        "segmented_expand", limits, dtype, case.rows, sum(case.ns), 0, 16, **common
    )
    return shrink, expand


def _key(tile: TileConfig) -> tuple[int, ...]:
    """Return what a kernel is compiled for."""
    return (tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages)


def _compile(job: tuple[int, int, list[Case]]) -> int:
    """Compile a share of all tiles, in a process of its own; returns how many."""
    number, of, chosen = job
    device, count = torch.device("cuda", 0), 0
    seen: set[tuple[Any, ...]] = set()
    for case in chosen:
        operands = Operands(replace(case, adapters=1), device, 1)
        down, up = _defaults(case, device)
        h = operands.shrinks(down)()
        planes = (h.shape[0] - 1).bit_length()  # as the expand rounds them
        for kernel, tiles in (
            ("shrink", shrink_tiles(case, down)),
            (f"expand of {planes}", expand_tiles(case, up)),
        ):
            for tile in tiles:
                key = (kernel, len(case.ns), _key(tile))
                if key in seen:
                    continue
                seen.add(key)
                if len(seen) % of != number:
                    continue
                try:
                    (operands.shrinks(tile) if kernel == "shrink" else operands.expands(tile, h))()
                    count += 1
                except Exception:  # it is named where it is timed
                    continue
    return count


def _text(tile: TileConfig) -> str:
    return (
        f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages} "
        f"splits {tile.splits} programs {tile.programs}"
    )


def run_sweep(run: Run) -> int:
    """Time every tile of every case; writes ``sweep.csv``."""
    write = run.write_rows("sweep.csv", COLUMNS)
    chosen = cases()
    if run.smoke:
        chosen = [Case(("o_proj",), 2, 1)]
    elif run.workers:
        context = multiprocessing.get_context("spawn")
        jobs = [(n, run.workers, chosen) for n in range(run.workers)]
        try:
            with concurrent.futures.ProcessPoolExecutor(run.workers, context) as pool:
                run.say(f"{sum(pool.map(_compile, jobs))} kernels compiled")
        except Exception as error:  # then they are compiled one by one
            run.say(f"not compiled side by side: {error!r}")
    for case in chosen:
        if run.out_of_time():
            run.say(f"out of time from {case} on")
            return 1
        _sweep(run, write, case)
    return 0


def _sweep(run: Run, write: Callable[[dict[str, Any]], None], case: Case) -> None:
    """Time the tiles of one case: of each kernel, and the default ones one after the other."""
    layers = 1 if run.smoke else LAYERS if case.rows <= 512 else 4
    operands = Operands(case, run.device, layers)
    down, up = _defaults(case, run.device)
    last = 1 if run.smoke else None
    shrinks = list(dict.fromkeys(shrink_tiles(case, down)))[:last]
    expands = list(dict.fromkeys(expand_tiles(case, up)))[:last]
    h = operands.shrinks(down)()
    pairs = {"early": operands.pairs(down, up)}
    with ExitStack() as stack:
        for module in (segmented_shrink, segmented_expand):
            stack.enter_context(mock.patch.object(module, "starts_early", return_value=False))
        forget_tiles()
        pairs["one after the other"] = operands.pairs(down, up)
    forget_tiles()
    for kernel, runs in (
        ("shrink", {_text(tile): operands.shrinks(tile) for tile in shrinks}),
        ("expand", {_text(tile): operands.expands(tile, h) for tile in expands}),
        ("pair", pairs),
    ):
        medians = _time(run, runs, layers)
        best = sorted(medians, key=medians.__getitem__)
        about = {"kernel": kernel, "group": "/".join(case.names), "rows": case.rows}
        about |= {"adapters": case.adapters, "rank": case.rank}
        for name in best:
            write(run.facts | about | {"tile": name, "us": f"{medians[name]:.3f}"})
        default = medians.get(next(iter(runs)), math.nan)
        run.say(
            f"{about['group']}, {case.rows} rows, {case.adapters} adapters, {kernel}: default "
            f"{default:.2f} us; " + "; ".join(f"{medians[name]:.2f} {name}" for name in best[:4])
        )
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def _time(run: Run, runs: Mapping[str, Callable[[], Any]], layers: int) -> dict[str, float]:
    """Return the microseconds of a launch of each, the median of seven rounds."""
    steps: dict[str, Callable[[], Any]] = {}
    memory = torch.cuda.graph_pool_handle() if run.device.type == "cuda" else None
    for name, launches in runs.items():
        try:
            launches()
            steps[name] = measuring.captured(launches, memory) if memory else launches
        except Exception as error:  # a tile that does not compile is no candidate
            run.say(f"  {name}: {type(error).__name__}")
    taken = measure_us(steps, run.device, 1 if run.smoke else 7)
    return {name: statistics.median(us) / layers for name, us in taken.items()}
