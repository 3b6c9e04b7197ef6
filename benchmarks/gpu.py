"""Everything that needs a GPU, in parts of less than nine minutes each.

    python benchmarks/gpu.py --part tests --out DIR     the tests that are skipped without a GPU
    python benchmarks/gpu.py --part tune  --out DIR     plans and tiles of the Qwen shapes
    python benchmarks/gpu.py --part train --out DIR     forward + backward against peft and others
    python benchmarks/gpu.py --part dram  --out DIR     DRAM bytes, if Nsight Compute is installed
    python benchmarks/gpu.py --import DIR               file what a run wrote, under its device

It needs the repository and a host with torch, triton and transformers; nothing is installed and
nothing is fetched. What a host lacks (peft, pytest) may lie in ``wheels/`` as pure-Python wheels.
Files are flat and written as the run goes, so that one that is cut short leaves what it has. Tune
first and import the table: ``train`` follows the plans that were measured.

``--smoke`` runs any part on tiny shapes without a GPU, on interpreted kernels: its times mean
nothing, its code is the same.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "tune", "train", "dram")
SECONDS = 8.5 * 60  # of a part; what is not done by then is left out, and the log says so

# The table of the project's promises, M = 8192, r = 16, p = 0.1: at most fastlora / frozen, at
# least peft / fastlora, at least peft-bf16 / fastlora.
PROMISES = {
    "Qwen2.5-0.5B": (1.32, 2.4, 1.75),
    "Qwen2.5-7B": (1.10, 1.40, 1.20),
    "Qwen3-8B": (1.10, 1.43, 1.20),
    "Qwen3-32B": (1.07, 1.27, 1.12),
}
ADDMM_LIMIT = 1.01  # fastlora / addmm at p = 0, at every shape

# What is timed: a provider of baselines.py, its dropout, and a plan that is forced on it.
TIMED = (
    ("frozen", 0.0, "auto"),
    ("peft", 0.1, "auto"),
    ("peft-bf16", 0.1, "auto"),
    ("fastlora", 0.1, "auto"),
    ("fastlora", 0.1, "fused"),
    ("fastlora", 0.1, "hybrid"),
    ("fastlora-bf16", 0.1, "auto"),
    ("addmm", 0.0, "auto"),
    ("fastlora", 0.0, "auto"),
)
COLUMNS = [
    *("date", "commit", "device", "torch", "triton"),
    *("model", "linear", "count", "n", "k", "m", "r", "p", "provider", "plan"),
    *("graph_us", "graph_p20_us", "graph_p80_us", "eager_us"),
    *("ratio_to_frozen", "cublas_fraction"),
]


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
        import triton

        self.out: Path = options.out
        self.smoke: bool = options.smoke
        self.end = time.monotonic() + SECONDS
        self.out.mkdir(parents=True, exist_ok=True)
        self.log_file: TextIO = (self.out / f"{options.part}.log").open("w", buffering=1)
        self.device = torch.device("cpu" if options.smoke else "cuda:0")
        name = "smoke" if options.smoke else torch.cuda.get_device_name(0)
        self.facts = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": options.commit or _commit(),
            "device": name,
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        self.say(" ".join(f"{key}={value}" for key, value in self.facts.items()))

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.log_file.write(line + "\n")

    def out_of_time(self) -> bool:
        return time.monotonic() > self.end

    def write_rows(self, name: str, columns: list[str]) -> Callable[[dict[str, Any]], None]:
        """Open ``name`` as CSV; returns a function that writes one row and flushes it."""
        file = (self.out / name).open("w", newline="", buffering=1)
        writer = csv.DictWriter(file, columns)
        writer.writeheader()

        def write(row: dict[str, Any]) -> None:
            writer.writerow({key: row.get(key, "") for key in columns})
            file.flush()

        return write


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_tests(run: Run) -> int:
    """Run the tests marked ``gpu``, then the others of the kernels, which take a GPU as well."""
    tests = ROOT / "tests"
    kernel_tests = [*sorted(tests.glob("test_kernels_*.py")), tests / "test_triton_path.py"]
    files = [str(path) for path in kernel_tests]
    # What needs more than a GPU host has (hypothesis, accelerate) is not collected, and named.
    selections = [["-m", "gpu", "--continue-on-collection-errors"], ["-m", "not gpu", *files]]
    if run.smoke:
        selections = [[str(tests / "test_kernels_pieces.py"), "-k", "philox or slug"]]
    status = 0
    for selection in selections:
        # -P: pytest must not see kernels/ in the working directory. Other versions of torch and
        # transformers than the pinned ones may warn of things that the tests do not cause.
        command = [sys.executable, "-P", "-m", "pytest", "-v", "-W", "default", "-p"]
        command += ["no:cacheprovider", "--durations=10", *selection]
        run.say("$ pytest " + " ".join(selection))
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # A test that hangs writes no line: the clock does not wait for one.
        timer = threading.Timer(max(1.0, run.end - time.monotonic()), process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if " PASSED" not in line and " SKIPPED" not in line:
                run.say(line.rstrip())
        timer.cancel()
        if process.wait() < 0:
            run.say("out of time: the rest of the tests did not run")
        status |= process.returncode
    return 1 if status else 0


def run_tune(run: Run) -> int:
    """Measure plans and tiles for the linears of the four models, into ``tuned.json``."""
    import torch

    from fastlora.tuning import tune

    for model, linears in _models(run).items():
        if run.out_of_time():
            run.say(f"out of time: {model} was not tuned")
            return 1
        run.say(model)
        tune(
            shapes=_distinct(linears),
            tokens=(32,) if run.smoke else (8192, 2048),
            dtype=torch.float16 if run.smoke else torch.bfloat16,
            device=run.device,
            rounds=1 if run.smoke else 10,
            out=run.out / "tuned.json",
            progress=run.say,
        )
    return 0


def _models(run: Run) -> dict[str, dict[str, Any]]:
    from shapes import MODELS, Linear

    return {"tiny": {"q_proj": Linear(48, 64, True)}} if run.smoke else MODELS


def _distinct(linears: dict[str, Any]) -> list[Any]:
    from fastlora.tuning import LinearShape

    return list(dict.fromkeys(LinearShape(linear.n, linear.k) for linear in linears.values()))


def run_train(run: Run) -> int:
    """Time forward + backward of every linear by every provider, into ``train.csv``."""
    from fastlora import plans

    plans.check_device(run.device)
    run.say(plans.describe(run.device))  # a kernel that failed makes "fused" another plan
    write = run.write_rows("train.csv", COLUMNS)
    kept = True
    for m in (32,) if run.smoke else (8192, 2048):
        for model, linears in _models(run).items():
            totals: dict[tuple[str, float, str], list[float]] = {}
            fractions: list[tuple[float, float]] = []
            groups: dict[Any, list[str]] = {}
            complete = True
            for name, linear in linears.items():
                groups.setdefault(linear, []).append(name)
            for linear, names in groups.items():
                if run.out_of_time():
                    run.say(f"out of time at {model} {names[0]} M={m}")
                    return 1
                try:
                    rows = list(_time_linear(run, linear, m))
                except Exception:  # out of memory, or a kernel that does not run: go on without it
                    run.say(f"{model} {names[0]} M={m} was not timed:\n{traceback.format_exc()}")
                    complete = kept = False
                    continue
                for row in rows:
                    row |= {"model": model, "linear": "/".join(names), "count": len(names)}
                    write(row)
                    key = (row["provider"], row["p"], row["plan"])
                    sums = totals.setdefault(key, [0.0, 0.0])
                    sums[0] += len(names) * row["graph_us"]
                    sums[1] += len(names) * row["eager_us"]
                kept &= _not_slower_than_addmm(run, f"{model} {names[0]} M={m}", rows)
                fractions.append((len(names) * rows[0]["graph_us"], rows[0]["gemm_fraction"]))
            if complete:
                kept &= _summarise(run, write, model, m, totals, fractions)
    return 0 if kept or run.smoke else 1


def _time_linear(run: Run, linear: Any, m: int) -> Iterator[dict[str, Any]]:
    """Time one linear by every provider, in turn, in CUDA graphs and eagerly."""
    import torch
    from baselines import build

    import fastlora
    from fastlora.tuning import measure_us

    dtype = torch.float16 if run.smoke else torch.bfloat16
    r, rounds = 16, 1 if run.smoke else 15
    x = torch.randn(1, m, linear.k, device=run.device).to(dtype).requires_grad_()
    dy = torch.randn(1, m, linear.n, device=run.device).to(dtype)
    steps: dict[tuple[str, float, str], Callable[[], object]] = {}
    for provider, p, plan in TIMED:
        layer, parameters = build(provider, linear, r, p, run.device, dtype)

        def step(
            layer: Any = layer, wanted: tuple[Any, ...] = (x, *parameters), plan: str = plan
        ) -> object:
            with fastlora.backend(plan):
                y = layer(x)
                return torch.autograd.grad(y, wanted, dy.to(y.dtype))

        steps[provider, p, plan] = step
    eager = measure_us({str(key): step for key, step in steps.items()}, run.device, rounds)
    graphs = {str(key): _captured(run, step) for key, step in steps.items()}
    replayed = measure_us(graphs, run.device, rounds)
    frozen = statistics.median(replayed[str(TIMED[0])])
    fraction = _gemm_fraction(run, linear, m, dtype, rounds)
    for key in steps:
        times = sorted(replayed[str(key)])
        median = statistics.median(times)
        yield run.facts | {
            "n": linear.n,
            "k": linear.k,
            "m": m,
            "r": r,
            "p": key[1],
            "provider": key[0],
            "plan": key[2],
            "graph_us": round(median, 1),
            "graph_p20_us": round(times[len(times) // 5], 1),
            "graph_p80_us": round(times[-1 - len(times) // 5], 1),
            "eager_us": round(statistics.median(eager[str(key)]), 1),
            "ratio_to_frozen": round(median / frozen, 3),
            "cublas_fraction": round(fraction, 3) if key[2] == "fused" else "",
            "gemm_fraction": fraction,
        }


def _captured(run: Run, step: Callable[[], object]) -> Callable[[], object]:
    """Capture a step in a CUDA graph, so that the host's time plays no part."""
    if run.smoke:
        return step
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _gemm_fraction(run: Run, linear: Any, m: int, dtype: Any, rounds: int) -> float:
    """Return what fraction of cuBLAS's speed the fused GEMMs reach, low-rank term included."""
    import torch

    from fastlora.kernels.low_rank_gemm import input_grad, low_rank_gemm
    from fastlora.tuning import measure_us

    def draw(*size: int) -> Any:
        return torch.randn(size, device=run.device).to(dtype)

    x, dy, weight = draw(m, linear.k), draw(m, linear.n), draw(linear.n, linear.k)
    h, a, b = draw(m, 16), draw(16, linear.k), draw(linear.n, 16)
    bits = torch.full((m, -(-linear.k // 8)), 255, dtype=torch.uint8, device=run.device)

    def cublas() -> object:
        return torch.mm(x, weight.t()), torch.mm(dy, weight)

    def fused() -> object:
        y = low_rank_gemm(x, weight, None, h, b, 1.5)
        return y, input_grad([dy], [weight], [h], [a], [bits], grad_dtype=dtype)

    taken = measure_us({"cublas": cublas, "fused": fused}, run.device, rounds)
    return statistics.median(taken["cublas"]) / statistics.median(taken["fused"])


def _not_slower_than_addmm(run: Run, name: str, rows: list[dict[str, Any]]) -> bool:
    times = {(row["provider"], row["p"], row["plan"]): row["graph_us"] for row in rows}
    ratio = times["fastlora", 0.0, "auto"] / times["addmm", 0.0, "auto"]
    kept = ratio <= ADDMM_LIMIT
    verdict = "kept" if kept else f"NOT kept, at most {ADDMM_LIMIT}"
    run.say(f"{name}: fastlora / addmm at p = 0 is {ratio:.3f}: {verdict}")
    return kept


def _summarise(
    run: Run,
    write: Callable[[dict[str, Any]], None],
    model: str,
    m: int,
    totals: dict[tuple[str, float, str], list[float]],
    fractions: list[tuple[float, float]],
) -> bool:
    """Write a row for the whole layer by each provider, and compare with what is promised."""
    frozen = totals[TIMED[0]][0]
    weights = sum(weight for weight, _ in fractions)
    fraction = sum(weight * value for weight, value in fractions) / weights
    for (provider, p, plan), (graph, eager) in totals.items():
        write(
            run.facts
            | {
                "model": model,
                "linear": "layer",
                "count": 1,
                "m": m,
                "r": 16,
                "p": p,
                "provider": provider,
                "plan": plan,
                "graph_us": round(graph, 1),
                "eager_us": round(eager, 1),
                "ratio_to_frozen": round(graph / frozen, 3),
                "cublas_fraction": round(fraction, 3) if plan == "fused" else "",
            }
        )
    ours = totals["fastlora", 0.1, "auto"][0]
    seen = (
        ours / frozen,
        totals["peft", 0.1, "auto"][0] / ours,
        totals["peft-bf16", 0.1, "auto"][0] / ours,
    )
    line = (
        f"{model} M={m}: fastlora/frozen {seen[0]:.3f}, peft/fastlora {seen[1]:.2f}, "
        f"peft-bf16/fastlora {seen[2]:.2f}, fused GEMMs at {fraction:.3f} of cuBLAS"
    )
    promised = PROMISES.get(model) if m == 8192 else None
    if promised is None:
        run.say(line)
        return True
    kept = seen[0] <= promised[0] and seen[1] >= promised[1] and seen[2] >= promised[2]
    at_most, *at_least = promised
    run.say(f"{line}: {'kept' if kept else 'NOT kept'} (at most {at_most}, at least {at_least})")
    return kept


DRAM_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def run_dram(run: Run) -> int:
    """Count DRAM bytes of forward + backward for LoRAFusion's cases, into ``dram.csv``."""
    from shapes import LORAFUSION

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
    from baselines import build
    from shapes import LORAFUSION

    import fastlora

    linear, device = LORAFUSION[case], torch.device("cuda:0")
    layer, parameters = build("fastlora-bf16", linear, 16, 0.1, device, torch.bfloat16)
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
    names = {row["device"] for rows in tables for row in rows}
    table = folder / "tuned.json"
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
    for path in sorted([*folder.glob("*.csv"), *folder.glob("*.log")]):
        print(f"{path.name} -> {shutil.copy(path, results / path.name)}")
    if table.exists():
        TUNED.mkdir(exist_ok=True)
        print(f"{table.name} -> {shutil.copy(table, TUNED / f'{slug}.json')}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--commit", help="what is measured; default: git's HEAD")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, without a GPU")
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
        parts = {"tests": run_tests, "tune": run_tune, "train": run_train, "dram": run_dram}
        return parts[options.part](Run(options))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
