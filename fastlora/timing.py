"""Time functions in turn, so that whatever else happens on the machine meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key")


def measure_us(
    functions: Mapping[Key, Callable[[], object]],
    device: torch.device,
    rounds: int = 10,
    first: int = 0,
    warm_up: bool = True,
) -> dict[Key, list[float]]:
    """Time functions in turn, round by round, with a cold L2 cache; returns microseconds of each.

    On CUDA the time is the device's, between two events. Elsewhere it is the process's own
    processor time, of all its threads together: what other processes take is not in it. The order
    of a round alternates.

    Args:
        functions: what is timed, by name.
        device: where they run.
        rounds: how often each is timed.
        first: the number of the first round: odd ones go backwards.
        warm_up: run each once before anything is timed.
    """
    if warm_up:
        for function in functions.values():
            function()
    taken: dict[Key, list[float]] = {name: [] for name in functions}
    if device.type != "cuda":
        for number in range(first, first + rounds):
            for name in _in_turn(functions, number):
                start = time.process_time()
                functions[name]()
                taken[name].append(1e6 * (time.process_time() - start))
        return taken
    # Larger than any L2 cache (50 MiB on an H200, 126 on a B200), and long enough to write that the
    # host is ahead of the device when the function's turn comes.
    cold = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    events = []
    for number in range(first, first + rounds):
        for name in _in_turn(functions, number):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cold.zero_()
            before.record()
            functions[name]()
            after.record()
            events.append((name, before, after))
    torch.cuda.synchronize(device)
    for name, before, after in events:
        taken[name].append(1e3 * before.elapsed_time(after))
    return taken


def _in_turn(functions: Mapping[Key, object], number: int) -> Iterable[Key]:
    return reversed(list(functions)) if number % 2 else iter(functions)
