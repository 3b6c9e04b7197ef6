"""``examples/quickstart.py`` from start to end, beside the same script without ``fastlora.patch``.

    make bench-quickstart    or: python benchmarks/bench_quickstart.py [--rounds 5] [--out FOLDER]

Both run as a process of their own, in turn: they load the model, train two adapters with
transformers' Trainer, save them, answer a batch and check what they answered. On a CPU the time is
the processor time of the process, on one thread, on a GPU the wall clock's. Five rounds take about
25 minutes. The script's own checks must pass for both.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from fastlora.bench import summary
from fastlora.bench.environment import facts
from fastlora.bench.measuring import MIN_ROUNDS, Timing, columns
from fastlora.bench.results import Row, write_rows

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# What stands before the script: nothing, or a patch that does nothing.
BEFORE = {
    "fastlora": "",
    "peft": "import fastlora; fastlora.patch = lambda model: 'not patched'; ",
}


def seconds_of(provider: str, arguments: list[str]) -> float:
    """Run the script once; returns the seconds that it took.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    path = str(EXAMPLES / "quickstart.py")
    script = f"import runpy; runpy.run_path({path!r}, run_name='__main__')"
    on_gpu = torch.cuda.is_available()
    # The clock adds up the time of all threads, and those that wait for work spin.
    threads = {} if on_gpu else {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", BEFORE[provider] + script, "--out", folder, *arguments]
        folders = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
        start, used = time.perf_counter(), _children_seconds()
        result = subprocess.run(
            command,
            env=os.environ | threads | {"PYTHONPATH": folders},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        raise RuntimeError(f"{provider}: the script failed\n{result.stdout[-500:]}{result.stderr}")
    return time.perf_counter() - start if on_gpu else _children_seconds() - used


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(rounds: int, arguments: list[str]) -> dict[str, Timing]:
    """Run both in turn; the order alternates."""
    taken: dict[str, list[tuple[float]]] = {provider: [] for provider in BEFORE}
    for number in range(rounds):
        for provider in list(BEFORE)[:: -1 if number % 2 else 1]:
            seconds = seconds_of(provider, arguments)
            print(f"round {number + 1} of {rounds}: {provider} {seconds:.1f} s", flush=True)
            taken[provider].append((1e6 * seconds,))
    return {provider: Timing(tuple(each)) for provider, each in taken.items()}


def rows_of(timings: dict[str, Timing]) -> list[Row]:
    """Return both times as rows of the results."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    row = Row(
        **facts(device),
        level="script",
        model="SmolLM2-135M",
        case="examples/quickstart.py",
        rank=8,
        dropout=0.05,
        timer="wall" if device.type == "cuda" else "cpu",
    )
    return [
        replace(row, provider=provider, **columns(timing, fastlora=timings["fastlora"]))
        for provider, timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=MIN_ROUNDS, help=f"default, and at least: {MIN_ROUNDS}"
    )
    parser.add_argument("--out", type=Path, help="folder for script.csv")
    parser.add_argument("arguments", nargs="*", help="of quickstart.py, after --")
    options = parser.parse_args()
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds must be at least {MIN_ROUNDS}, got {options.rounds}")
    rows = rows_of(compare(options.rounds, options.arguments))
    print(summary.headline(rows))
    for row in rows:
        seconds = (row.median_us or 0.0) / 1e6
        print(f"{row.provider}: {seconds:.1f} s, over fastlora {row.to_fastlora}")
    if options.out:
        write_rows(options.out / "script.csv", rows)


if __name__ == "__main__":
    main()
