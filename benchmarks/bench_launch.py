"""Host microseconds of one launch: Triton's own way, and fastlora's past it.

    python benchmarks/bench_launch.py [--rounds 31] [--calls 200]
    python benchmarks/bench_launch.py --check     # compare the two, time nothing

The kernels are compiled for sm_90 and launched by Triton's own code, but libcuda is a stub (see
``fake_cuda.py``): a driver's own time for a launch, for asking what a pointer is and for encoding a
tensor map is in no column, nor is PyTorch's for the current device and stream. What fastlora does
around a launch, allocations and descriptors, is not either; ``bench_host.py`` has it. Times are the
calling thread's processor time. Columns:

    jit       kernel[grid](*args, **constants), which is ``JITFunction.run``
    direct    ``Launch``, from its second call on; every operand at an address that it has seen
    by run    the same without the C function of Triton 3.7.1: what any other version gets
    C         Triton 3.7.1's C launcher alone, which no path can avoid

First both ways must hand the driver the same grid, stream and bytes of every parameter, for two
calls with different tensors; if they do not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import fake_cuda
import torch
import triton
from kernel_calls import Case, call_launcher
from machine_code import TARGETS
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlora.bench.shapes import GROUPS
from fastlora.kernels import launch as launching
from fastlora.kernels import tile_config
from fastlora.kernels.launch import Launch
from fastlora.kernels.tile_config import TileConfig

COLUMNS = ("jit", "direct", "by run", "C")
H100 = next(target for target in TARGETS if target.name == "sm_90")
# Out features of the siblings, by how many there are: o, gate and up, q and k and v of Qwen3-8B.
SIBLINGS = {1: (4096,), 2: (12288, 12288), 3: (4096, 1024, 1024)}
# Each operation with its dropout mask, and the numbers of siblings.
OPERATIONS = {
    ("shrink", "seed"): (1, 2, 3),
    ("low_rank_gemm", "none"): (1, 2, 3),
    ("input_grad", "bits"): (3,),
    ("output_pass", "none"): (3,),
    ("input_pass", "bits"): (3,),
}
# Quick to compile; what is passed depends on no tile but for the sizes in it.
SMALL = TileConfig(32, 32, 32, num_warps=4, num_stages=2)

Arguments = tuple[Any, ...]


def launches(check: bool) -> Iterator[tuple[str, Launch, Arguments, Arguments]]:
    """Yield every launch: its name, and the arguments of two calls with different tensors."""
    for (operation, mask), numbers in OPERATIONS.items():
        for siblings in numbers[-1:] if check else numbers:
            case = Case("", ns=SIBLINGS[siblings])
            if check:
                case = replace(case, m=64, ns=(64,) * siblings, k=64, config=SMALL)
            calls = [recorded(operation, case, mask) for _ in range(2)]
            for (launch, args), (_, others) in zip(*calls, strict=True):
                name = launch._kernel.__name__.strip("_").removesuffix("_kernel")
                if name == "low_rank_gemm":  # the kernel of the backward form too
                    name = operation
                number = len(args[2]) if name == "add_partials" else siblings
                yield f"{name}, {number}", launch, args, others


def recorded(operation: str, case: Case, mask: str) -> list[tuple[Launch, Arguments]]:
    """Return the launches of an operation, which do not take place."""
    made: list[tuple[Launch, Arguments]] = []

    def keep(launch: Launch, *args: Any) -> None:
        made.append((launch, args))

    with mock.patch.object(Launch, "__call__", keep):
        call_launcher(case, operation, mask)
    return made


def ways(launch: Launch, args: Arguments) -> dict[str, Callable[..., Any]]:
    """Return the ways to launch a kernel, as functions of its arguments."""
    kernel, grid, constants = launch._kernel, launch._grid, launch._constants

    def jit(*args: Any) -> Any:
        return kernel[grid](*args, **constants)

    def prepared() -> Launch:
        direct = Launch(kernel, grid, constants)
        direct(*args)
        if direct._direct is None:
            raise SystemExit(f"fastlora leaves every launch to Triton {triton.__version__}")
        return direct

    found: dict[str, Callable[..., Any]] = {"jit": jit, "direct": prepared()}
    with mock.patch.object(launching, "_HAS_C_LAUNCH", False):
        found["by run"] = prepared()
    if launching._HAS_C_LAUNCH:
        sent: list[Arguments] = []
        utils = driver.active.utils
        with mock.patch.object(utils, "launch", lambda *args: sent.append(args)):
            prepared()(*args)
        found["C"] = lambda *args: utils.launch(*sent[0])
    return found


def sizes_of(compiled: Any) -> list[int]:
    """Return the bytes of each of a kernel's parameters."""
    of_type = {"i1": 1, "i32": 4, "u32": 4, "fp32": 4}

    def sizes(ty: Any) -> list[int]:
        if isinstance(ty, tuple):
            return [size for each in ty for size in sizes(each)]
        if ty.startswith("tensordesc"):  # of a matrix: a tensor map, its sizes and strides
            return [128, 4, 4, 8, 8]
        return [] if ty == "constexpr" else [of_type.get(ty, 8)]

    scratch = [8] if triton.__version__ < "3.5" else [8, 8]
    return sizes(tuple(compiled.src.signature.values())) + scratch


def compare(
    name: str, fake: fake_cuda.FakeDriver, found: dict[str, Callable[..., Any]], *calls: Arguments
) -> None:
    """Check that every way hands the driver the same."""
    jit = found["jit"]
    sizes = sizes_of(jit(*calls[0]))
    wanted = [fake.launched(functools.partial(jit, *args), sizes) for args in calls]
    if wanted[0] == wanted[1]:
        raise SystemExit(f"{name}: other tensors make no difference, so that nothing is compared")
    for way in ("direct", "by run"):
        for args, bytes_of_jit in zip(calls, wanted, strict=True):
            call = functools.partial(found[way], *args)
            with mock.patch.object(JITFunction, "run", side_effect=AssertionError("not direct")):
                got = fake.launched(call, sizes)
            if got != bytes_of_jit:
                raise SystemExit(f"{name}, {way}: other parameters than Triton's")
    print(f"{name}: {len(sizes)} parameters, {len(wanted[0])} bytes the same")


def print_table(us: dict[tuple[str, str], float]) -> None:
    """Print the times, and their sums over the forward of a decoder layer."""
    names = list(dict.fromkeys(name for name, _ in us))
    columns = [column for column in COLUMNS if (names[0], column) in us]
    print(f"\nTriton {triton.__version__}, us a launch", end="")
    print(f"\n{'':20}", *(f"{column:>8}" for column in columns))
    for name in names:
        print(f"{name:20}", *(f"{us[name, column]:8.2f}" for column in columns))
    forward = [f"{kernel}, {len(g)}" for kernel in ("shrink", "low_rank_gemm") for g in GROUPS]
    sums = (sum(us[name, column] for name in forward) for column in columns)
    print(f"{'a layer, 8 launches':20}", *(f"{total:8.2f}" for total in sums))


def write(path: Path, taken: dict[tuple[str, str], Any]) -> None:
    """Write the times as rows: the case is the launch, the provider the way it goes."""
    from fastlora.bench.environment import facts
    from fastlora.bench.measuring import columns
    from fastlora.bench.results import Row, write_rows

    row = Row(**facts(torch.device("cpu")), level="launch", timer="cpu")
    write_rows(
        path,
        (
            replace(row, case=name, provider=way, **columns(timing))
            for (name, way), timing in taken.items()
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=31, help="measured rounds (default 31)")
    parser.add_argument("--calls", type=int, default=200, help="calls in a round (default 200)")
    parser.add_argument("--check", action="store_true", help="compare small launches, time none")
    parser.add_argument("--out", type=Path, help="folder for launch.csv")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: interpreted functions are not launched; unset it")
    try:
        fake = fake_cuda.install()
    except RuntimeError as error:
        sys.exit(f"bench_launch: {error}")
    functions: dict[tuple[str, str], Callable[[], Any]] = {}
    with mock.patch.object(tile_config, "INTERPRETER", H100.limits):
        tile_config.forget_tiles()
        for name, launch, args, others in launches(options.check):
            found = ways(launch, args)
            compare(name, fake, found, args, others)
            for column, function in found.items():
                functions[name, column] = functools.partial(function, *args)
    if not options.check:
        from bench_host import measure  # peft is slow to import, and a check does without

        taken = measure(functions, options.rounds, options.calls)
        print_table({key: timing.quantile_us(0.5) for key, timing in taken.items()})
        if options.out:
            write(options.out / "launch.csv", taken)


if __name__ == "__main__":
    main()
