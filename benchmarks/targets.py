"""Compile every kernel ahead of time, for GPUs that need not be here, and read the result.

    python benchmarks/targets.py                        # every tile, every target
    python benchmarks/targets.py --targets sm_90 --json report.json

The launchers run as they would on the device, with its limits in place of a driver, and every
launch compiles instead: the default tiles in the dtypes and ranks of ``target_cases.py``, and every
tile in ``kernels/tuned`` for its own architecture. Read off the machine code (``machine_code.py``):
registers, spills to local memory, shared memory against what the device has (the compiler does not
object by itself), and the instructions that the design counts on. The exit status is 1 if a kernel
is unfit for its target.

AMD's gfx942 must compile, fit its shared memory and do without atomics. Its scratch memory is shown
and not judged: no tile here was ever timed on one.

It takes 40 minutes of processor time (Triton 3.7), each target in a process of its own. Run it
without TRITON_INTERPRET: interpreted functions cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from kernel_calls import Case, call_launcher
from machine_code import (
    TARGETS,
    Compiled,
    Report,
    Target,
    expected_instructions,
    launcher_refuses,
    report_of,
)
from target_cases import default_cases, quick_cases, tuned_cases
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels import tile_config


class _NoDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: Target):
        self._target, self._device = target.gpu_target(), TARGETS.index(target)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by the number of the device.
        return self._device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def _compile_instead_of_launching(target: Target) -> Iterator[list[Compiled]]:
    """Make every launch in the block compile for ``target``; yields what it compiled."""
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        code = run(self, *args, grid=grid, warmup=True, **options)
        found.append(Compiled(self.__name__, code, options))
        return code

    # It stays: without a device there is no driver to go back to.
    driver.set_active(_NoDriver(target))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tile_config, "INTERPRETER", target.limits),
    ):
        tile_config.forget_tiles()
        yield found


def compile_cases(target: Target, cases: Sequence[Case]) -> tuple[list[Report], list[str]]:
    """Compile every kernel of the cases, each signature once.

    Returns:
        A report for each compiled kernel, and the problems: theirs, and what did not compile.
    """
    reports, problems, seen = [], [], set()
    calls = (
        (case, operation, mask)
        for case in cases
        for operation in case.operations
        for mask in case.masks
    )
    with _compile_instead_of_launching(target) as found:
        for case, operation, mask in calls:
            name = f"{case.name}, {operation} {mask}"
            found.clear()
            try:
                call_launcher(case, operation, mask)
            except Exception as error:  # whatever stops the compiler is the finding
                problems.append(f"{target.name} {name}: does not compile: {error!r}")
            for compiled in found:
                # Triton keeps what it compiled: the same signature is the same object.
                if id(compiled.code) in seen:
                    continue
                seen.add(id(compiled.code))
                if target.is_nvidia and (refused := launcher_refuses(compiled.code)):
                    problems.append(f"{target.name} {name} {compiled.kernel}: {refused}")
                expected = expected_instructions(target, case, operation, compiled.kernel)
                report = report_of(target, name, compiled, expected)
                reports.append(report)
                problems.extend(report.problems())
    return reports, problems


def print_table(reports: Sequence[Report]) -> None:
    """Print one line for each compiled kernel, the columns as wide as their widest cell."""
    head = ("target", "case", "kernel", "tile", "regs", "local", "shared KiB", "instructions")
    rows = [
        (
            report.target,
            report.case,
            report.kernel.strip("_").removesuffix("_kernel"),
            report.tile_text(),
            str(report.registers),
            str(report.local_bytes),
            f"{report.shared_bytes / 1024:.0f} of {report.shared_limit // 1024}",
            report.instruction_text(),
        )
        for report in reports
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _chosen(names: str) -> list[Target]:
    known = {target.name: target for target in TARGETS}
    wanted = names.split(",")
    if unknown := sorted(set(wanted) - set(known)):
        raise argparse.ArgumentTypeError(f"unknown targets {unknown}; there are {list(known)}")
    return [known[name] for name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table and the problems; return the exit status."""
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs that are not here.")
    parser.add_argument("--targets", type=_chosen, default=TARGETS, help="sm_90,gfx942,...")
    parser.add_argument("--quick", action="store_true", help="one default case for each target")
    parser.add_argument("--tuned", type=Path, default=tile_config.TUNED, help="folder of tables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets side by side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there too")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: interpreted functions cannot be compiled; unset it")
    cases = [
        [
            *(quick_cases(target) if options.quick else default_cases()),
            *tuned_cases(options.tuned, target),
        ]
        for target in options.targets
    ]
    if options.jobs == 1:
        found = list(map(compile_cases, options.targets, cases))
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(compile_cases, options.targets, cases))
    reports = [report for of_target, _ in found for report in of_target]
    problems = [problem for _, of_target in found for problem in of_target]
    print_table(reports)
    if options.json:
        rows = [{**asdict(report), "problems": report.problems()} for report in reports]
        options.json.write_text(json.dumps({"reports": rows, "problems": problems}, indent=1))
    print(f"\n{len(reports)} kernels, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
