"""Two processes on one machine, joined by gloo: started, waited for, their results collected."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

WORLD_SIZE = 2
TIMEOUT_S = 120


def join(rank: int, folder: Path) -> None:
    """Be process ``rank``; called first by a worker."""
    # Only the loopback: gloo would look for an interface by the host's name.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD_SIZE
    )


def leave(results: object, rank: int, folder: Path) -> None:
    """Hand the results of this process over; called last by a worker."""
    torch.save(results, folder / f"{rank}.pt")
    # gloo can hang if it is destroyed within milliseconds of its last collective (torch 2.13).
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def results_of(worker: Callable[[int, Path], None], folder: Path) -> list[dict[str, object]]:
    """Run ``worker(rank, folder)`` in each process, and return what each handed over."""
    processes = torch.multiprocessing.start_processes(
        worker, args=(folder,), nprocs=WORLD_SIZE, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        # join raises with the traceback of the process that failed, and ends the other.
        while not processes.join(timeout=1):
            if time.monotonic() > deadline:
                pytest.fail(f"the processes have not finished within {TIMEOUT_S} s")
        return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]
    finally:
        for process in processes.processes:
            process.kill()
