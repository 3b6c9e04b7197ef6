"""Time tiles of the segmented kernels side by side, on the linears of a model: for their defaults.

    python benchmarks/gpu.py --part sweep --out DIR

Each figure is that of one launch, of a graph with the launches of all layers, whose adapters are in
memory of their own and not in the L2 cache. Nothing is checked here: ``serving.py`` compares what
the default tiles compute. Kernels are compiled by several processes at once first, because Triton
compiles for longer than is timed.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from fastlora.bench import measuring
from fastlora.bench.shapes import GROUPS, MODELS
from fastlora.kernels import segmented_expand, segmented_shrink
from fastlora.kernels.tile_config import TileConfig, default_tile, device_limits
from fastlora.segments import PAGE, TILE_ROWS, Segments, fill, pages_of
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
    block_m: int = 16

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
    found = [Case(names, rows, n) for n, rows in DECODE for names in groups]
    return found + [Case(names, rows, n, block_m=64) for n, rows in PREFILL for names in groups]


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
        each = max(1, case.rows // case.adapters)
        if case.block_m == 16:
            requests = [(row % case.adapters + 1, 1) for row in range(case.rows)]
        else:
            requests = [(number + 1, each) for number in range(case.adapters)]
        metadata = torch.zeros((2, case.rows), dtype=torch.int32)
        most = min(case.rows, case.rows // case.block_m + min(case.rows, slots - 1))
        tiles = torch.zeros((TILE_ROWS, most), dtype=torch.int32)
        fill(requests, metadata[0], metadata[1], tiles, case.block_m)
        metadata = metadata.to(device)
        self.segments = Segments(metadata[0], metadata[1], tiles.to(device), case.block_m)

    def shrinks(self, config: TileConfig | None) -> Callable[[], Any]:
        first, arguments = self.tables[0], {"max_rank": 16 * math.ceil(self.case.rank / 16)}
        run = segmented_shrink.prepare_segmented_shrink(
            self.x, self.arena, first, self.segments, config=config, **arguments
        )
        return lambda: [run(self.x, self.arena, table, self.segments) for table in self.tables][-1]

    def expands(self, config: TileConfig | None, h: torch.Tensor) -> Callable[[], Any]:
        first = self.tables[0]
        run = segmented_expand.prepare_segmented_expand(
            self.ys, h, self.arena, first, self.segments, config=config
        )

        def all_layers() -> None:
            for table in self.tables:
                run(self.ys, h, self.arena, table, self.segments)

        return all_layers

    def pairs(self, shrink: TileConfig | None, expand: TileConfig | None) -> Callable[[], Any]:
        first, most = self.tables[0], 16 * math.ceil(self.case.rank / 16)
        operands = (self.x, self.arena, first, self.segments)
        down = segmented_shrink.prepare_segmented_shrink(*operands, max_rank=most, config=shrink)
        h = down(*operands)
        up = segmented_expand.prepare_segmented_expand(
            self.ys, h, self.arena, first, self.segments, config=expand
        )

        def all_layers() -> None:
            for table in self.tables:
                h = down(self.x, self.arena, table, self.segments)
                up(self.ys, h, self.arena, table, self.segments)

        return all_layers


def shrink_tiles(case: Case, default: TileConfig) -> Iterator[TileConfig]:
    """Yield tiles of the shrink worth timing, the default first."""
    yield default
    if case.block_m == 16:
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
    few = case.block_m == 16
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
    device = run.device
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
        layers = 1 if run.smoke else LAYERS if case.rows <= 512 else 4
        operands = Operands(case, device, layers)
        title = f"{'/'.join(case.names)}, {case.rows} rows, {case.adapters} adapters"
        down, up = _defaults(case, device)

        def timed(
            kernel: str, runs: dict[str, Callable[[], Any]], title=title, case=case, layers=layers
        ) -> None:
            steps = {}
            memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            for name, launches in runs.items():
                try:
                    launches()
                    steps[name] = measuring.captured(launches, memory) if memory else launches
                except Exception as error:  # a tile that does not compile is no candidate
                    run.say(f"  {name}: {type(error).__name__}")
            taken = measure_us(steps, device, 1 if run.smoke else 7)
            medians = {name: statistics.median(us) / layers for name, us in taken.items()}
            best = sorted(medians, key=medians.__getitem__)
            for name in best:
                write(
                    run.facts
                    | {"kernel": kernel, "group": "/".join(case.names), "rows": case.rows}
                    | {"adapters": case.adapters, "rank": case.rank, "tile": name}
                    | {"us": f"{medians[name]:.3f}"}
                )
            first = next(iter(runs))
            run.say(
                f"{title}, {kernel}: default {medians.get(first, math.nan):.2f} us; "
                + "; ".join(f"{medians[name]:.2f} {name}" for name in best[:4])
            )

        last = 1 if run.smoke else None
        tiles = list(dict.fromkeys(shrink_tiles(case, down)))[:last]
        timed("shrink", {_text(tile): operands.shrinks(tile) for tile in tiles})
        h = operands.shrinks(down)()
        tiles = list(dict.fromkeys(expand_tiles(case, up)))[:last]
        timed("expand", {_text(tile): operands.expands(tile, h) for tile in tiles})
        pairs = {"early": operands.pairs(down, up)}
        with ExitStack() as stack:
            for module in (segmented_shrink, segmented_expand):
                stack.enter_context(mock.patch.object(module, "starts_early", return_value=False))
            _forget()
            pairs["one after the other"] = operands.pairs(down, up)
        _forget()
        timed("pair", pairs)
        del operands, h, pairs
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def _forget() -> None:
    for module in (segmented_shrink, segmented_expand):
        module._settings.cache_clear()
