"""The part ``train`` of ``gpu.py``: forward + backward of every linear by every provider.

Each provider runs one linear in a CUDA graph, so that the host's time plays no part, and eagerly;
all providers take turns in one process. A layer is the sum of its seven linears.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from baselines import build

import fastlora
from fastlora import plans
from fastlora.kernels.low_rank_gemm import input_grad, low_rank_gemm
from fastlora.tuning import measure_us

if TYPE_CHECKING:
    from gpu import Run

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


def run_train(run: Run) -> int:
    """Time forward + backward of every linear by every provider, into ``train.csv``."""
    plans.check_device(run.device)
    run.say(plans.describe(run.device))  # a kernel that failed makes "fused" another plan
    write = run.write_rows("train.csv", COLUMNS)
    kept = True
    for m in (32,) if run.smoke else (8192, 2048):
        for model, linears in run.models().items():
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
