"""``Engine`` end to end: a batch of requests with adapters, beside the same without.

The model has random weights. It is measured where transformers is one that the engine was written
for, and the log says so where it is not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from served import adapted, save_adapter
from serving_promises import case_of
from serving_session import Session, about

import fastlora
from fastlora.bench import measuring
from fastlora.bench.measuring import MIN_ROUNDS, Timing
from fastlora.bench.shapes import RANK, Model

ADAPTERS = 16  # at most; requests take turns with them


def measure_engine(session: Session) -> None:
    """Measure tokens a second with adapters and without."""
    from fastlora.serving import batching

    reason = batching.unsupported_reason()
    if reason is not None:
        session.note(f"Engine was not measured: {reason}.")
        return
    model, (count, length, new) = session.sizes.engine, session.sizes.requests
    # On a CPU it runs on PyTorch's operations, as it does for its users there.
    dtype = session.dtype if session.on_gpu else torch.float32
    base = _random_model(model, session.device, dtype)
    distinct = min(ADAPTERS, count)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config["vocab_size"], (count, length), generator=generator)
    named: dict[str, Sequence[str | None]] = {
        "fastlora": [f"a{number % distinct}" for number in range(count)],
        "frozen": [None] * count,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        fastlora.backend("auto"),
        fastlora.Engine(base) as engine,
    ):
        save_adapter(Path(folder), adapted(engine.adapters), RANK, dtype)
        for number in range(distinct):
            engine.adapters.load(f"a{number}", folder)

        def generate(provider: str) -> float:
            session.stop_if_late()
            return _seconds_of(engine, prompts.tolist(), named[provider], new)

        timings = _in_turn(generate, list(named))
        session.run.say(f"  {_described(engine)}")
    case = case_of(f"engine, {count} requests", distinct)
    for provider, timing in timings.items():
        tokens_per_s = count * new / timing.quantile_us(0.5) * 1e6
        session.add(
            "wall",
            **about(model, case, count, provider),
            tokens_per_s=tokens_per_s,
            **measuring.columns(timing, timings["frozen"]),
        )
        session.run.say(f"  {provider}: {tokens_per_s:,.0f} tokens/s")


def _random_model(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the whole of a model, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config), dtype=dtype)


def _seconds_of(
    engine: Any, prompts: list[list[int]], adapters: Sequence[str | None], new: int
) -> float:
    """Answer every prompt with so many new tokens; returns the seconds that it takes."""
    start = time.perf_counter()
    results = engine.generate(
        prompts, adapter=adapters, max_new_tokens=new, ignore_eos=True, progress=False
    )
    seconds = time.perf_counter() - start
    assert not any(result.error for result in results)
    made = sum(len(result.token_ids) for result in results)
    assert made == len(prompts) * new, f"{made} tokens of {len(prompts) * new}"
    return seconds


def _in_turn(generate: Callable[[str], float], providers: Sequence[str]) -> dict[str, Timing]:
    """Time providers in turn, in rounds whose order alternates."""
    for provider in providers:
        generate(provider)  # compiles, and captures its graphs
    taken: dict[str, list[float]] = {provider: [] for provider in providers}
    for number in range(MIN_ROUNDS):
        for provider in providers if number % 2 else reversed(providers):
            taken[provider].append(generate(provider))
    return {
        provider: Timing(tuple((1e6 * one,) for one in seconds))
        for provider, seconds in taken.items()
    }


def _described(engine: Any) -> str:
    """Say how an engine ran, as far as transformers tells."""
    config = engine._manager.continuous_batching_config
    return (
        f"attention {engine.model.config._attn_implementation}, CUDA graphs "
        f"{config.use_cuda_graph}, asynchronous {config.use_async_batching}"
    )
