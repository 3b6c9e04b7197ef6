"""Everything that needs a GPU, in parts of less than nine minutes each.

    python benchmarks/gpu.py --part tests --out DIR     the tests that are skipped without a GPU
    python benchmarks/gpu.py --part tune  --out DIR     plans and tiles of the Qwen shapes
    python benchmarks/gpu.py --part bench --out DIR     `fastlora bench`, and what was promised
    python benchmarks/gpu.py --part compiled --out DIR  layers against peft by torch.compile
    python benchmarks/gpu.py --part serve --out DIR     batches with many adapters, beside the base
    python benchmarks/gpu.py --part sweep --out DIR     tiles of the segmented kernels, side by side
    python benchmarks/gpu.py --part dram  --out DIR     DRAM bytes, if Nsight Compute is installed
    python benchmarks/gpu.py --import DIR               file what a run wrote, under its device

It needs the repository and a host with torch, triton and transformers; nothing is installed and
nothing is fetched. What a host lacks (peft, pytest) may lie in ``wheels/`` as pure-Python wheels.
Files are flat and written as the run goes, so that one that is cut short leaves what it has. Tune
first and import the table: ``bench`` follows the plans that were measured.

``--smoke`` runs any part on tiny shapes without a GPU, on interpreted kernels: its times mean
nothing, its code is the same.
"""

from __future__ import annotations

import argparse
import collections
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 510.0  # of a part; what is not done by then is left out, and the log says so


def prepare_imports(smoke: bool, wheels: Path) -> Path:
    """Make fastlora importable without installing it; returns the folder that was put on the path.

    Not the repository's root: its kernels/ would hide Hugging Face's package of that name.
    """
    if smoke:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    folder = Path(tempfile.mkdtemp(prefix="fastlora-gpu-"))
    (folder / "fastlora").symlink_to(ROOT / "fastlora")
    link = ROOT / "fastlora" / "kernels"
    if not link.is_dir():  # a copy that lost the link
        link.unlink(missing_ok=True)
        link.symlink_to("../kernels")
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    sys.path[:0] = [str(folder), str(ROOT / "benchmarks")]
    # No empty part: it would stand for the working directory, and for kernels/ in it.
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *others])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return folder


class Run:
    """One part of one run: where it writes, and what every row of it says."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from fastlora.bench.environment import facts

        self.out: Path = options.out
        self.smoke: bool = options.smoke
        self.workers: int = options.workers
        self.only: list[str] = options.models
        self.select: str = options.select
        self.end = time.monotonic() + options.seconds
        self.out.mkdir(parents=True, exist_ok=True)
        self.log_file: TextIO = (self.out / f"{options.part}.log").open("w", buffering=1)
        self.device = torch.device("cpu" if options.smoke else "cuda:0")
        found = dict(facts(self.device, options.commit))
        found["device"] = "smoke" if options.smoke else found["gpu"]
        named = ("date", "commit", "device", "torch", "triton")
        self.facts = {name: found[name] for name in named}
        self.say(" ".join(f"{key}={value}" for key, value in self.facts.items()))

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.log_file.write(line + "\n")

    def models(self) -> dict[str, Any]:
        """Return the linears to run on, by model."""
        from fastlora.bench.shapes import MAIN_MODELS, MODELS, NAMES, Linear

        if self.smoke:
            return {"tiny": dict.fromkeys(NAMES, Linear(16, 32, True))}
        return {name: MODELS[name].linears for name in self.only or MAIN_MODELS}

    def out_of_time(self) -> bool:
        return time.monotonic() > self.end

    def seconds_left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def write_rows(self, name: str, columns: list[str]) -> Callable[[dict[str, Any]], None]:
        """Open ``name`` as CSV; returns a function that writes one row and flushes it."""
        file = (self.out / name).open("w", newline="", buffering=1)
        writer = csv.DictWriter(file, columns)
        writer.writeheader()

        def write(row: dict[str, Any]) -> None:
            writer.writerow({key: row.get(key, "") for key in columns})
            file.flush()

        return write


def run_tests(run: Run) -> int:
    """Run the tests marked ``gpu``, then the others of the kernels, which take a GPU as well."""
    tests = ROOT / "tests"
    kernel_tests = [*sorted(tests.glob("test_kernels_*.py")), tests / "test_triton_path.py"]
    files = [str(path) for path in kernel_tests]
    # What needs more than a GPU host has (hypothesis, accelerate) is not collected, and named.
    selections = [["-m", "gpu", "--continue-on-collection-errors"], ["-m", "not gpu", *files]]
    beside = ["-n", str(run.workers)] if run.workers else []
    if run.select:
        beside += ["-k", run.select]
    if run.smoke:
        selections = [[str(tests / "test_kernels_pieces.py"), "-k", "philox or slug"]]
    status = 0
    for selection in selections:
        # -P: pytest must not see kernels/ in the working directory. Other versions of torch and
        # transformers than the pinned ones may warn of things that the tests do not cause.
        command = [sys.executable, "-P", "-m", "pytest", "-v", "-W", "default", "-p"]
        command += ["no:cacheprovider", "--durations=10", *beside, *selection]
        run.say("$ pytest " + " ".join([*beside, *selection]))
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # with its workers, to be ended together
        )
        # A test that hangs writes no line: the clock does not wait for one.
        left = max(1.0, run.end - time.monotonic())
        timer = threading.Timer(left, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        passed: collections.Counter[str] = collections.Counter()
        try:
            for line in process.stdout:
                if " PASSED" in line:
                    passed.update(re.findall(r"(\w+)\.py::", line))
                elif " SKIPPED" not in line and "PytestBenchmarkWarning" not in line:
                    run.say(line.rstrip())
        except BaseException:  # Ctrl-C does not reach it
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        if process.wait() < 0:
            of_files = ", ".join(f"{count} of {name}" for name, count in sorted(passed.items()))
            run.say(f"out of time: {passed.total()} tests passed, and the rest did not run")
            run.say(of_files or "none passed")
        status |= process.returncode
    return 1 if status else 0


def run_tune(run: Run) -> int:
    """Measure plans and tiles for the linears and groups of four models, into ``tuned.json``."""
    import torch

    from fastlora.tuning import tune

    for model, linears in run.models().items():
        run.say(model)
        for shape in _distinct(linears, run.smoke):
            if run.out_of_time():
                run.say(f"out of time: {model} was not tuned from {shape} on")
                return 1
            tune(
                shapes=[shape],
                tokens=(32,) if run.smoke else (8192, 2048),
                dtype=torch.float16 if run.smoke else torch.bfloat16,
                device=run.device,
                rounds=1 if run.smoke else 10,
                out=run.out / "tuned.json",
                progress=run.say,
            )
    return 0


def _distinct(linears: dict[str, Any], smoke: bool) -> list[Any]:
    """Return what is computed in one call first: the groups, then the linears alone."""
    from fastlora.bench.shapes import GROUPS
    from fastlora.tuning import GroupShape, LinearShape

    shapes = [
        GroupShape(tuple(linears[name].n for name in names), linears[names[0]].k)
        for names in GROUPS
        if len(names) > 1
    ]
    shapes += [LinearShape(linear.n, linear.k) for linear in linears.values()]
    return list(dict.fromkeys(shapes))[1 if smoke else 0 :]  # 8 s of the interpreter saved


def run_bench(run: Run) -> int:
    """Measure as ``fastlora bench`` does, and hold layers and linears to what was promised."""
    from promises import run_bench  # it needs peft, which the other parts do without

    return run_bench(run, "bench")


def run_compiled(run: Run) -> int:
    """Measure layers beside peft by ``torch.compile``, which takes its time to compile them."""
    from promises import run_bench

    return run_bench(run, "compiled")


def run_serve(run: Run) -> int:
    """Measure decode steps and prefills with many adapters, and hold them to what was promised."""
    from serving import run_serve  # it needs peft and safetensors

    return run_serve(run)


def run_sweep(run: Run) -> int:
    """Time tiles of the segmented kernels side by side, into ``sweep.csv``."""
    from sweep_segmented import run_sweep

    return run_sweep(run)


DRAM_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def run_dram(run: Run) -> int:
    """Count DRAM bytes of forward + backward for LoRAFusion's cases, into ``dram.csv``."""
    from fastlora.bench.shapes import LORAFUSION

    write = run.write_rows("dram.csv", ["date", "commit", "device", "case", "plan", *DRAM_METRICS])
    ncu = shutil.which("ncu")
    if ncu is None:
        run.say("Nsight Compute (ncu) is not installed: nothing was counted")
        return 0
    if run.smoke:
        run.say("smoke: there is no device whose bytes could be counted")
        return 0
    for case in LORAFUSION:
        for plan in ("fused", "hybrid"):
            command = [ncu, "--profile-from-start", "off", "--csv", "--page", "raw", "--metrics"]
            command += [",".join(DRAM_METRICS), sys.executable, __file__, "--dram-case", case, plan]
            try:
                left = max(1.0, run.end - time.monotonic())
                result = subprocess.run(
                    command, capture_output=True, text=True, check=False, timeout=left
                )
            except subprocess.TimeoutExpired:
                run.say(f"out of time at {case} {plan}")
                return 1
            sums = _sum_metrics(result.stdout)
            if result.returncode or not sums:
                run.say(f"{case} {plan}: ncu failed\n{result.stdout[-800:]}{result.stderr[-800:]}")
                continue
            write(run.facts | {"case": case, "plan": plan} | sums)
            total = sum(sums.values()) / 2**30
            run.say(f"{case} {plan}: {total:.3f} GiB of DRAM traffic")
    return 0


def _sum_metrics(output: str) -> dict[str, float]:
    """Add up ncu's CSV over all kernels; it has a row of units below the header."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    if len(rows) < 2:
        return {}
    scale = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    units, kernels = rows[0], rows[1:]
    return {
        metric: sum(float(row[metric].replace(",", "")) for row in kernels) * scale[units[metric]]
        for metric in DRAM_METRICS
    }


def dram_case(case: str, plan: str) -> None:
    """Run one step of one case between profiler marks: what ncu counts."""
    import torch

    import fastlora
    from fastlora.bench.providers import build, draw_weights
    from fastlora.bench.shapes import LORAFUSION

    linear, device = LORAFUSION[case], torch.device("cuda:0")
    (weights,) = draw_weights({"": linear}, 16, device, torch.bfloat16).values()
    layer, parameters = build("fastlora-bf16", weights, 0.1)
    x = torch.randn(8192, linear.k, device=device).bfloat16().requires_grad_()
    dy = torch.randn(8192, linear.n, device=device).bfloat16()
    with fastlora.backend(plan):
        for number in range(3):
            if number == 2:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            torch.autograd.grad(layer(x), (x, *parameters), dy)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def import_results(folder: Path) -> int:
    """File a run's CSV and logs under ``benchmarks/results/<device>/``, its table in ``tuned/``."""
    from fastlora.kernels.tile_config import TUNED, device_slug, read_table

    tables = [csv.DictReader(path.read_text().splitlines()) for path in folder.glob("*.csv")]
    names = {row.get("gpu") or row.get("device") for rows in tables for row in rows} - {None, ""}
    table, about = folder / "tuned.json", folder / "run.json"
    if table.exists():
        import json

        read_table(table)  # refuse a broken one
        names.add(json.loads(table.read_text())["device"])
    if not names:  # the tests alone: their log says on what they ran
        heads = (path.read_text().partition("\n")[0] for path in folder.glob("*.log"))
        found = (re.search(r"device=(.*) torch=", head) for head in heads)
        names = {match.group(1) for match in found if match}
    if len(names) != 1:
        print(f"{folder} holds results of {sorted(names) or 'no device'}; expected one")
        return 1
    slug = device_slug(names.pop())
    results = ROOT / "benchmarks" / "results" / slug
    results.mkdir(parents=True, exist_ok=True)
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".csv", ".log") or p == about):
        print(f"{path.name} -> {shutil.copy(path, results / path.name)}")
    if table.exists():
        TUNED.mkdir(exist_ok=True)
        print(f"{table.name} -> {shutil.copy(table, TUNED / f'{slug}.json')}")
    return 0


_RUN = {
    "tests": run_tests,
    "tune": run_tune,
    "bench": run_bench,
    "compiled": run_compiled,
    "serve": run_serve,
    "sweep": run_sweep,
    "dram": run_dram,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=_RUN)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--commit", help="what is measured; default: git's HEAD")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, without a GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what the part may take")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes side by side: of tests (pytest-xdist), or compiling before a sweep",
    )
    parser.add_argument("--select", default="", help="tests, as pytest's -k")
    parser.add_argument("--models", nargs="+", help="of tune, bench, compiled, serve", default=[])
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels")
    parser.add_argument("--import", dest="results", type=Path, metavar="DIR")
    parser.add_argument("--dram-case", nargs=2, metavar=("CASE", "PLAN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = prepare_imports(options.smoke, options.wheels)
    try:
        if options.results:
            return import_results(options.results)
        if options.dram_case:
            dram_case(*options.dram_case)
            return 0
        if not options.part or not options.out:
            parser.error("--part and --out are required (or --import DIR)")
        import torch

        if not options.smoke and not torch.cuda.is_available():
            parser.error("there is no CUDA device; --smoke runs without one")
        return _RUN[options.part](Run(options))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
