"""Time that the host takes for LoRA linears, where the kernels' launches do nothing.

    python benchmarks/bench_host.py [--profile]

On a GPU a step whose kernels are short waits for Python. This measures the Python: fused plan, few
rows and features on the CPU, so that PyTorch's own arithmetic is next to nothing, and every launch
of a Triton kernel replaced by a function that returns. A launch comes on top, once for each kernel
(``bench_launch.py``); so does, on CUDA, the launch of each of PyTorch's operations, for every
provider. Times are the calling thread's processor time (the backward pass of CPU tensors runs on
it), and the providers take turns, so that a busy machine meets all alike.

A decoder layer is its seven linears, called as a model calls them (q, k, v and gate, up on one
input each); its times are divided by seven. Where there is autocast, every provider's forward is
under it, the bare linears' too.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import pstats
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

import fastlora
from fastlora import autograd, plans
from fastlora.bench import providers as measured
from fastlora.bench.environment import facts
from fastlora.bench.measuring import Timing, columns
from fastlora.bench.results import Row, write_rows
from fastlora.bench.shapes import INPUTS, NAMES, Linear
from fastlora.kernels.launch import Launch

SHAPE, ROWS, RANK = Linear(64, 64), 8, 16
CPU = torch.device("cpu")
TARGET_US = 25.0  # of one forward of a layer
# Of a layer one row of 16 features: from two rows on, a bf16 product of a CPU goes to oneDNN, whose
# 30 us beside 9 would make every provider of the main case look alike.
LAYER = dict.fromkeys(NAMES, Linear(16, 16))
# Of a layer's forward: at most so many times the bare linears', and peft's.
TARGET_BARE, TARGET_PEFT = 3.5, 0.4
BARE, PEFT = "nn.Linear, frozen", "peft"
SETTINGS = {
    "fp32, without autocast": torch.float32,
    "bf16 base, fp32 adapters, under autocast": torch.bfloat16,
}


@contextlib.contextmanager
def null_launches() -> Iterator[None]:
    """Follow the fused plan on the CPU, with launches that do nothing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Launch, "__call__", _nothing))
        # As when interpreted: CPU tensors go to the kernels.
        stack.enter_context(mock.patch.object(plans, "interpreting", _yes))
        stack.enter_context(mock.patch.dict(plans._failures, {CPU: {}}))
        plans.unsupported_reason.cache_clear()
        stack.callback(plans.unsupported_reason.cache_clear)
        stack.enter_context(fastlora.backend("fused"))
        yield


def _yes() -> bool:
    return True


def _nothing(launch: Launch, *args: Any) -> None:
    pass


Call = Callable[[], Any]
Key = TypeVar("Key")


def build(p: float) -> dict[str, tuple[Call, Call]]:
    """Return for each provider its forward, and its forward and backward."""
    x = torch.randn(ROWS, SHAPE.k, requires_grad=True)
    dy = torch.randn(ROWS, SHAPE.n)
    weights = measured.draw_weights({"": SHAPE}, RANK, CPU, torch.float32)[""]
    layers = {
        BARE: measured.build("frozen", weights, p),
        PEFT: measured.build("peft", weights, p),
        "LoRALinear": measured.build("fastlora", weights, p),
    }
    functions: dict[str, tuple[Call, list[Any]]] = {
        name: (functools.partial(layer, x), parameters)
        for name, (layer, parameters) in layers.items()
    }
    layer, parameters = layers["LoRALinear"]
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    options = (measured.SCALING, p, None, "bits")
    functions["apply_lora_linear"] = (
        functools.partial(autograd.apply_lora_linear, x, weight, bias, *parameters, *options),
        parameters,
    )

    def both(forward: Call, parameters: list[Any]) -> Call:
        return lambda: torch.autograd.grad(forward(), [x, *parameters], dy)

    return {name: (forward, both(forward, ps)) for name, (forward, ps) in functions.items()}


def build_layers(dtype: torch.dtype) -> dict[str, tuple[Call, Call]]:
    """Return what ``build`` does, for a decoder layer; fastlora without dropout and with it."""
    inputs = [torch.randn(1, LAYER[name].k).to(dtype).requires_grad_() for name in INPUTS]
    dys = [torch.randn(1, shape.n).to(dtype) for shape in LAYER.values()]
    weights = measured.draw_weights(LAYER, RANK, CPU, dtype)
    calls = {}
    for name, provider, p in (
        (BARE, "frozen", 0.0),
        (PEFT, "peft", 0.0),
        ("fastlora", "fastlora", 0.0),
        ("peft, p = 0.1", "peft", 0.1),
        ("fastlora, p = 0.1", "fastlora", 0.1),
    ):
        layer, parameters = measured.build_layer(provider, weights, p)
        if provider == "frozen" and dtype != torch.float32:
            layer = measured.UnderAutocast(layer, dtype)
        forward = functools.partial(layer, *inputs)
        wanted = [*inputs, *parameters]

        def both(forward: Call = forward, wanted: list[Any] = wanted) -> Any:
            return torch.autograd.grad(forward(), wanted, dys)

        calls[name] = forward, both
    return calls


def compare_layers(setting: str, rounds: int, calls: int) -> list[Row]:
    """Print a decoder layer's time by every provider, and whether the targets are kept.

    Returns:
        A row for each provider and pass, in microseconds of a linear.
    """
    with null_launches():
        providers = build_layers(SETTINGS[setting])
        # One table, so that forward and both take turns too.
        functions = {(name, i): pair[i] for name, pair in providers.items() for i in (0, 1)}
        taken = measure(functions, rounds, calls)
    us = {key: timing.quantile_us(0.5) / len(LAYER) for key, timing in taken.items()}
    print(f"\nA decoder layer, us a linear: {setting}")
    print(
        f"{'':20}{'forward':>10}{'/ bare':>9}{'/ peft':>9}{'and backward':>15}{'/ bare':>9}", end=""
    )
    print(f"{'/ peft':>9}")
    for name in providers:
        peft = name.replace("fastlora", PEFT) if name.startswith("fastlora") else PEFT
        ratios = [(us[name, i] / us[BARE, i], us[name, i] / us[peft, i]) for i in (0, 1)]
        (bare, of_peft), (bare_both, of_peft_both) = ratios
        print(f"{name:20}{us[name, 0]:10.1f}{bare:9.2f}{of_peft:9.2f}", end="")
        print(f"{us[name, 1]:15.1f}{bare_both:9.2f}{of_peft_both:9.2f}", end="")
        verdicts = [_verdict(bare, TARGET_BARE), _verdict(of_peft, TARGET_PEFT)]
        print(f"  {' / '.join(verdicts)}" if name.startswith("fastlora") else "")
    print(
        f"targets of the forward: {TARGET_BARE} times the bare linear's / {TARGET_PEFT} of peft's"
    )
    return [_row(setting, name, i, taken) for name in providers for i in (0, 1)]


def _row(setting: str, name: str, i: int, taken: dict[tuple[str, int], Timing]) -> Row:
    """Return a provider's row; fastlora of the same dropout is what ``over_fastlora`` is over."""
    dropped = name.endswith(" = 0.1")
    ours = taken["fastlora, p = 0.1" if dropped else "fastlora", i]
    found = columns(taken[name, i], taken[BARE, i], ours)
    for us in ("median_us", "p20_us", "p80_us"):
        found[us] /= len(LAYER)
    return Row(
        **facts(CPU),
        level="host",
        model="a decoder layer",
        case=("forward", "forward and backward")[i],
        tokens=1,
        rank=RANK,
        dropout=0.1 if dropped else 0.0,
        dtype=str(SETTINGS[setting]).removeprefix("torch."),
        provider="frozen" if name == BARE else name.partition(",")[0],
        timer="cpu",
        **found,
    )


def _verdict(found: float, limit: float) -> str:
    return "kept" if found <= limit else "EXCEEDED"


def measure(functions: dict[Key, Call], rounds: int, calls: int) -> dict[Key, Timing]:
    """Return the microseconds of a call; in each round every function has its turn."""
    times: dict[Key, list[tuple[float]]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.thread_time()
            for _ in range(calls):
                function()
            if number:  # the first round warms up
                times[name].append(((time.thread_time() - start) / calls * 1e6,))
    return {name: Timing(tuple(each)) for name, each in times.items()}


def profile(function: Call, calls: int = 5000) -> None:
    """Print the functions that take the most time of their own (cProfile adds to each call)."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        function()
    profiler.disable()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="measured rounds (default 40)")
    parser.add_argument("--calls", type=int, default=50, help="calls in a round (default 50)")
    parser.add_argument("--profile", action="store_true", help="print where the forward spends it")
    parser.add_argument("--out", type=Path, help="folder for host.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Host time, torch {torch.__version__}, null launcher")
    rows = []
    for setting in SETTINGS:
        rows += compare_layers(setting, options.rounds, max(1, options.calls // len(LAYER)))
    if options.out:
        write_rows(options.out / "host.csv", rows)
    print("\nOne linear, us a call: fp32, without autocast")
    for p in (0.0, 0.1):
        with null_launches():
            providers = build(p)
            calls = {(name, i): pair[i] for name, pair in providers.items() for i in (0, 1)}
            taken = measure(calls, options.rounds, options.calls)
            us = {key: timing.quantile_us(0.5) for key, timing in taken.items()}
            print(f"\np = {p:<16}{'forward':>10}{'and backward':>15}")
            for name in providers:
                print(f"{name:20}{us[name, 0]:10.1f}{us[name, 1]:15.1f}")
            verdict = _verdict(us["LoRALinear", 0], TARGET_US)
            print(f"target of the forward of a LoRALinear: {TARGET_US:.0f} us, {verdict}")
            if options.profile:
                profile(providers["LoRALinear"][0])


if __name__ == "__main__":
    main()
