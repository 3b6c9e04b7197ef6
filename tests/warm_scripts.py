"""Scripts that run in a process of their own each, on interpreted kernels.

To import torch, transformers and peft takes longer than most of them. A server imports these once,
and nothing of fastlora, and forks itself for every script.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

IMPORTED = ["torch", "transformers", "peft", "triton"]
_PATIENCE = 300.0  # seconds; the slowest takes 10
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}


def run_script(script: Path, *arguments: object, log: Path) -> int:
    """Run a script to its end; returns its status, and ``log`` holds what it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(str(script), list(map(str, arguments)), log))
    with mock.patch.dict(os.environ, ENVIRONMENT):  # of the server, which the first one starts
        process.start()
    process.join(_PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _run(script: str, arguments: list[str], log: Path) -> None:
    os.environ |= ENVIRONMENT  # also where a server was there before
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    assert "fastlora" not in sys.modules
    import quick_interpreter  # noqa: F401

    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
