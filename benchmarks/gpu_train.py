"""The part ``train`` of ``gpu.py``: forward + backward of layers and of linears, by every provider.

Each provider runs in a CUDA graph, so that the host's time plays no part, and eagerly; all
providers take turns in one process. First come whole layers: the seven linears as a model calls
them, q, k and v on one tensor and gate and up on another; what autograd adds up where a tensor was
used more than once is in the time of everyone, the bare linears' too. Then each linear by itself,
and the sum of the seven.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from baselines import build, build_layer
from shapes import GROUPS, INPUTS

import fastlora
from fastlora import plans
from fastlora.kernels.low_rank_gemm import input_grad, low_rank_gemm
from fastlora.tuning import measure_us

if TYPE_CHECKING:
    from gpu import Run

# The project's promises for a layer whose linears are computed in groups, r = 16, p = 0.1: at most
# fastlora / frozen.
LAYER_PROMISES = {
    ("Qwen2.5-0.5B", 8192): 1.22,
    ("Qwen2.5-7B", 8192): 1.07,
    ("Qwen3-8B", 8192): 1.07,
    ("Qwen3-32B", 8192): 1.05,
    ("Qwen2.5-0.5B", 2048): 1.35,
}
# Those for the sum of its linears one by one, M = 8192, r = 16, p = 0.1: at most fastlora / frozen,
# at least peft / fastlora, at least peft-bf16 / fastlora.
PROMISES = {
    "Qwen2.5-0.5B": (1.32, 2.4, 1.75),
    "Qwen2.5-7B": (1.10, 1.40, 1.20),
    "Qwen3-8B": (1.10, 1.43, 1.20),
    "Qwen3-32B": (1.07, 1.27, 1.12),
}
ADDMM_LIMIT = 1.01  # fastlora / addmm at p = 0, at every shape

# What is timed: a provider of baselines.py, its dropout, and a plan that is forced on it.
Key = tuple[str, float, str]
TIMED_LAYERS: tuple[Key, ...] = (
    ("frozen", 0.0, "auto"),
    ("peft", 0.1, "auto"),
    ("peft-bf16", 0.1, "auto"),
    ("fastlora", 0.1, "auto"),
    ("fastlora", 0.1, "fused"),
    ("fastlora", 0.1, "hybrid"),
)
TIMED: tuple[Key, ...] = (
    *TIMED_LAYERS,
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
    """Time forward + backward of layers and linears by every provider, into ``train.csv``."""
    plans.check_device(run.device)
    run.say(plans.describe(run.device))  # a kernel that failed makes "fused" another plan
    write = run.write_rows("train.csv", COLUMNS)
    kept = True
    for part in (_time_layers, _time_linears):
        for m in (32,) if run.smoke else (8192, 2048):
            for model, linears in run.models().items():
                verdict = part(run, write, model, linears, m)
                if verdict is None:
                    run.say(f"out of time at {model} M={m}")
                    return 1
                kept &= verdict
    return 0 if kept or run.smoke else 1


Write = Callable[[dict[str, Any]], None]


def _time_layers(
    run: Run, write: Write, model: str, linears: dict[str, Any], m: int
) -> bool | None:
    """Time a decoder layer; returns whether its promise is kept, ``None`` when out of time."""
    if run.out_of_time():
        return None
    dtype = torch.float16 if run.smoke else torch.bfloat16
    name, r, rounds = f"{model} M={m}, a layer", 16, 1 if run.smoke else 10

    def draw(width: int) -> Any:
        return torch.randn(1, m, width, device=run.device).to(dtype)

    try:
        inputs = [draw(linears[first].k).requires_grad_() for first in INPUTS]
        dys = [draw(linear.n) for linear in linears.values()]
        steps = {}
        for provider, p, plan in TIMED_LAYERS:
            layer, parameters = build_layer(provider, linears, r, p, run.device, dtype)
            steps[provider, p, plan] = _step(layer, inputs, parameters, dys, plan)
        timings = _time_steps(run, steps, rounds)
        del steps, layer, parameters
        fraction = _layer_fraction(run, linears, m, dtype, rounds)
    except Exception:  # out of memory, or a kernel that does not run: go on without it
        run.say(f"{name} was not timed:\n{traceback.format_exc()}")
        return False
    frozen = timings[TIMED_LAYERS[0]]["graph_us"]
    for key, timing in timings.items():
        facts = {"model": model, "linear": "grouped layer", "count": 1, "m": m, "r": r}
        write(run.facts | facts | _row(key, timing, frozen, fraction))
    times = {key: timing["graph_us"] for key, timing in timings.items()}
    ours = times["fastlora", 0.1, "auto"]
    line = (
        f"{name}: fastlora/frozen {ours / frozen:.3f} "
        f"(fused {times['fastlora', 0.1, 'fused'] / frozen:.3f}, "
        f"hybrid {times['fastlora', 0.1, 'hybrid'] / frozen:.3f}), "
        f"peft/fastlora {times['peft', 0.1, 'auto'] / ours:.2f}, "
        f"peft-bf16/fastlora {times['peft-bf16', 0.1, 'auto'] / ours:.2f}, "
        f"fused GEMMs at {fraction:.3f} of cuBLAS"
    )
    promised = LAYER_PROMISES.get((model, m))
    if promised is None:
        run.say(line)
        return True
    kept = ours / frozen <= promised
    run.say(f"{line}: {'kept' if kept else 'NOT kept'} (fastlora/frozen at most {promised})")
    return kept


def _layer_fraction(run: Run, linears: dict[str, Any], m: int, dtype: Any, rounds: int) -> float:
    """Return what fraction of cuBLAS's speed the fused GEMMs of a layer reach, group by group.

    cuBLAS computes the frozen products alone, and those of a dx in place: the fastest that it can.
    """
    cublas_us = fused_us = 0.0
    for names in GROUPS:
        o = _Operands(run, [linears[name].n for name in names], linears[names[0]].k, m, dtype)
        taken = measure_us({"cublas": o.cublas, "fused": o.fused}, run.device, rounds)
        cublas_us += statistics.median(taken["cublas"])
        fused_us += statistics.median(taken["fused"])
    return cublas_us / fused_us


class _Operands:
    """Random operands of the GEMMs of linears that share their input, and the two ways to run."""

    def __init__(self, run: Run, ns: list[int], k: int, m: int, dtype: Any) -> None:
        def draw(*size: int) -> Any:
            return torch.randn(size, device=run.device).to(dtype)

        self.x, self.dtype = draw(m, k), dtype
        self.dys, self.weights = [draw(m, n) for n in ns], [draw(n, k) for n in ns]
        self.h, self.lora_as = draw(len(ns), m, 16), [draw(16, k) for _ in ns]
        self.lora_bs = [draw(n, 16) for n in ns]
        size = (len(ns), m, -(-k // 8))
        self.mask = torch.full(size, 255, dtype=torch.uint8, device=run.device)

    def cublas(self) -> object:
        ys = [torch.mm(self.x, weight.t()) for weight in self.weights]
        dx = torch.mm(self.dys[0], self.weights[0])
        for dy, weight in zip(self.dys[1:], self.weights[1:], strict=True):
            dx.addmm_(dy, weight)
        return ys, dx

    def fused(self) -> object:
        biases, gains = [None] * len(self.weights), [1.5] * len(self.weights)
        ys = low_rank_gemm(self.x, self.weights, biases, self.h, self.lora_bs, gains)
        terms = self.h, self.lora_as, self.mask
        return ys, input_grad(self.dys, self.weights, *terms, grad_dtype=self.dtype)


def _time_linears(
    run: Run, write: Write, model: str, linears: dict[str, Any], m: int
) -> bool | None:
    """Time each linear; returns whether the promises are kept, ``None`` when out of time."""
    kept = complete = True
    totals: dict[Key, list[float]] = {}
    fractions: list[tuple[float, float]] = []
    same: dict[Any, list[str]] = {}
    for name, linear in linears.items():
        same.setdefault(linear, []).append(name)
    for linear, names in same.items():
        if run.out_of_time():
            return None
        try:
            rows = list(_time_linear(run, linear, m))
        except Exception:  # as in _time_layers
            run.say(f"{model} {names[0]} M={m} was not timed:\n{traceback.format_exc()}")
            complete = kept = False
            continue
        for row in rows:
            row |= {"model": model, "linear": "/".join(names), "count": len(names)}
            write(row)
            sums = totals.setdefault((row["provider"], row["p"], row["plan"]), [0.0, 0.0])
            sums[0] += len(names) * row["graph_us"]
            sums[1] += len(names) * row["eager_us"]
        kept &= _not_slower_than_addmm(run, f"{model} {names[0]} M={m}", rows)
        fractions.append((len(names) * rows[0]["graph_us"], rows[0]["gemm_fraction"]))
    if complete:
        kept &= _summarise(run, write, model, m, totals, fractions)
    return kept


def _time_linear(run: Run, linear: Any, m: int) -> Iterator[dict[str, Any]]:
    """Time one linear by every provider, in turn, in CUDA graphs and eagerly."""
    dtype = torch.float16 if run.smoke else torch.bfloat16
    r, rounds = 16, 1 if run.smoke else 15
    x = torch.randn(1, m, linear.k, device=run.device).to(dtype).requires_grad_()
    dy = torch.randn(1, m, linear.n, device=run.device).to(dtype)
    steps = {}
    for provider, p, plan in TIMED:
        layer, parameters = build(provider, linear, r, p, run.device, dtype)
        steps[provider, p, plan] = _step(layer, [x], parameters, [dy], plan)
    timings = _time_steps(run, steps, rounds)
    o = _Operands(run, [linear.n], linear.k, m, dtype)
    taken = measure_us({"cublas": o.cublas, "fused": o.fused}, run.device, rounds)
    fraction = statistics.median(taken["cublas"]) / statistics.median(taken["fused"])
    frozen = timings[TIMED[0]]["graph_us"]
    for key, timing in timings.items():
        row = run.facts | {"n": linear.n, "k": linear.k, "m": m, "r": r}
        yield row | _row(key, timing, frozen, fraction) | {"gemm_fraction": fraction}


def _step(
    module: Any, inputs: list[Any], parameters: list[Any], dys: list[Any], plan: str
) -> Callable[[], object]:
    """Return a function that runs forward and backward, held to a plan."""
    wanted = [*inputs, *parameters]

    def step() -> object:
        with fastlora.backend(plan):
            outputs = module(*inputs)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            grads = [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)]
            return torch.autograd.grad(outputs, wanted, grads)

    return step


def _time_steps(
    run: Run, steps: dict[Key, Callable[[], object]], rounds: int
) -> dict[Key, dict[str, float]]:
    """Time steps in turn, eagerly and then in CUDA graphs."""
    eager = measure_us({str(key): step for key, step in steps.items()}, run.device, rounds)
    if run.smoke:
        replayed = eager
    else:
        # One pool: the graphs run one after the other and nobody reads what they leave behind.
        pool = torch.cuda.graph_pool_handle()
        graphs = {str(key): _captured(step, pool) for key, step in steps.items()}
        replayed = measure_us(graphs, run.device, rounds)
    timings = {}
    for key in steps:
        times = sorted(replayed[str(key)])
        timings[key] = {
            "graph_us": statistics.median(times),
            "graph_p20_us": times[len(times) // 5],
            "graph_p80_us": times[-1 - len(times) // 5],
            "eager_us": statistics.median(eager[str(key)]),
        }
    return timings


def _row(key: Key, timing: dict[str, float], frozen: float, fraction: float) -> dict[str, Any]:
    """Return the columns of one provider's timing."""
    provider, p, plan = key
    rounded = {name: round(value, 1) for name, value in timing.items()}
    return rounded | {
        "p": p,
        "provider": provider,
        "plan": plan,
        "ratio_to_frozen": round(timing["graph_us"] / frozen, 3),
        "cublas_fraction": round(fraction, 3) if plan == "fused" else "",
    }


def _captured(step: Callable[[], object], pool: Any) -> Callable[[], object]:
    """Capture a step in a CUDA graph, so that the host's time plays no part."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def _not_slower_than_addmm(run: Run, name: str, rows: list[dict[str, Any]]) -> bool:
    times = {(row["provider"], row["p"], row["plan"]): row["graph_us"] for row in rows}
    ratio = times["fastlora", 0.0, "auto"] / times["addmm", 0.0, "auto"]
    kept = ratio <= ADDMM_LIMIT
    verdict = "kept" if kept else f"NOT kept, at most {ADDMM_LIMIT}"
    run.say(f"{name}: fastlora / addmm at p = 0 is {ratio:.3f}: {verdict}")
    return kept


def _summarise(
    run: Run,
    write: Write,
    model: str,
    m: int,
    totals: dict[Key, list[float]],
    fractions: list[tuple[float, float]],
) -> bool:
    """Write a row for the sum of seven linears by each provider, and compare with the promises."""
    frozen = totals[TIMED[0]][0]
    weights = sum(weight for weight, _ in fractions)
    fraction = sum(weight * value for weight, value in fractions) / weights
    for key, (graph, eager) in totals.items():
        facts = {"model": model, "linear": "sum of linears", "count": 1, "m": m, "r": 16}
        timing = {"graph_us": graph, "eager_us": eager}
        write(run.facts | facts | _row(key, timing, frozen, fraction))
    ours = totals["fastlora", 0.1, "auto"][0]
    seen = (
        ours / frozen,
        totals["peft", 0.1, "auto"][0] / ours,
        totals["peft-bf16", 0.1, "auto"][0] / ours,
    )
    line = (
        f"{model} M={m}, linears: fastlora/frozen {seen[0]:.3f}, peft/fastlora {seen[1]:.2f}, "
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
