"""Measure what was checked: providers in turn, round by round, ratios within a round.

A machine's clock, its temperature and its other tenants drift by more than what is measured here.
So nothing is compared but what ran in the same round, in which every provider has its turns one
after the other; a ratio is the median over the rounds, and its spread the smallest and the largest.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.bench.results import Ratio
from fastlora.timing import measure_us as measure_us

Step = Callable[[], object]

MIN_ROUNDS = 5
MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """Microseconds of one provider: in each round, those of its turns."""

    rounds_us: tuple[tuple[float, ...], ...]

    @property
    def medians_us(self) -> list[float]:
        """The median of each round."""
        return [statistics.median(turns) for turns in self.rounds_us]

    def quantile_us(self, share: float) -> float:
        """Return a quantile over all turns: 0.5 for the median."""
        turns = sorted(us for turns in self.rounds_us for us in turns)
        place = share * (len(turns) - 1)
        below = int(place)
        above = min(below + 1, len(turns) - 1)
        return turns[below] + (place - below) * (turns[above] - turns[below])

    def over(self, other: Timing) -> Ratio:
        """Return this time over another one that was taken in the same rounds."""
        pairs = zip(self.medians_us, other.medians_us, strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def columns(
    timing: Timing, frozen: Timing | None = None, fastlora: Timing | None = None
) -> dict[str, Any]:
    """Return the columns of a row (``results.Row``) that a timing fills.

    Args:
        timing: of the row's provider.
        frozen: of the bare linears in the same rounds, if they were timed.
        fastlora: of fastlora, likewise.
    """
    found: dict[str, Any] = {
        "rounds": len(timing.rounds_us),
        "median_us": timing.quantile_us(0.5),
        "p20_us": timing.quantile_us(0.2),
        "p80_us": timing.quantile_us(0.8),
    }
    for name, other in (("over_frozen", frozen), ("over_fastlora", fastlora)):
        if other is not None:
            ratio = timing.over(other)
            found |= {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
    return found


def in_rounds(
    steps: Mapping[str, Step],
    device: torch.device,
    *,
    rounds: int,
    turns: int,
    before_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time steps in turn.

    Args:
        steps: by provider.
        device: where they run (see ``timing.measure_us`` for what is timed).
        rounds: how many, at least ``MIN_ROUNDS``.
        turns: of each step in a round; a round's figure is their median.
        before_round: called before each, to show progress or to stop by an exception.

    Raises:
        ValueError: fewer rounds than that, by which no spread can be stated.
    """
    if rounds < MIN_ROUNDS or turns < 1:
        raise ValueError(
            f"at least {MIN_ROUNDS} rounds of one turn or more are needed, got {rounds} of {turns}"
        )
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for number in range(rounds):
        before_round()
        of_round = measure_us(steps, device, turns, first=number, warm_up=number == 0)
        for name, turns_us in of_round.items():
            taken[name].append(tuple(turns_us))
    return {name: Timing(tuple(of_rounds)) for name, of_rounds in taken.items()}


def turns_for(steps: Mapping[str, Step], device: torch.device, rounds: int, seconds: float) -> int:
    """Return how many turns a round may have, so that all rounds take about ``seconds``."""
    start = time.perf_counter()
    for step in steps.values():
        step()
    synchronize(device)
    once = time.perf_counter() - start
    return max(1, min(15, int(seconds / (rounds * once))))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(step: Step, pool: Any) -> Step:
    """Capture a step in a CUDA graph, so that the host's time plays no part.

    Args:
        step: what is captured; it runs three times before.
        pool: memory that several graphs share (``torch.cuda.graph_pool_handle()``): they run one
            after the other, and nobody reads what they leave behind.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return functools.partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, _step: Step) -> None:
    """Replay a graph; the step keeps alive its tensors, of which a graph has the addresses."""
    graph.replay()


def host_us(step: Step, device: torch.device, turns: int = 7) -> float:
    """Return how long the host takes to launch a step on a CUDA device that has nothing to do."""
    taken = []
    for _ in range(turns):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        taken.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize(device)
    return statistics.median(taken)


def peak_mib(step: Step, device: torch.device) -> float:
    """Return the most memory of a CUDA device that a step takes beyond what lies there already."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def copy_and_product(device: torch.device, dtype: torch.dtype) -> tuple[Timing, Timing, int, int]:
    """Time what meets nothing but a device's roofs: a large copy and a large matrix product.

    Returns:
        The two timings, the bytes that the copy reads and writes, and the FLOPs of the product.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    source = torch.zeros((512 if on_gpu else 64) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if not on_gpu:
        dtype = torch.float32  # CPUs compute half precision in it, and the slower for that
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    steps: dict[str, Step] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: left @ right,
    }
    timings = in_rounds(steps, device, rounds=MIN_ROUNDS, turns=3)
    return timings["copy"], timings["product"], 2 * source.numel(), 2 * size**3
