"""CPU time of a training step's forward and backward: SmolLM2-135M in peft, and patched.

    PYTHONPATH=examples python benchmarks/bench_cpu_step.py

One model, fp32, r = 16 on all linears, 1,024 tokens; patched and unpatched in turn, so that noise
of the machine meets both alike. What is compared is the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import smollm2
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import fastlora
from fastlora.bench.environment import facts
from fastlora.bench.measuring import Timing, columns
from fastlora.bench.results import Row, write_rows

# Dropout and the promised limit: fastlora's time over peft's.
LIMITS = {0.0: 1.0, 0.1: 1.1}


def build(dropout: float) -> PeftModel:
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    return get_peft_model(smollm2.load_qwen2(), config).train()


def step_seconds(model: PeftModel, tokens: Tensor) -> float:
    """Time one forward and backward."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return time.perf_counter() - start


def compare(model: PeftModel, tokens: Tensor, rounds: int) -> tuple[list[float], list[float]]:
    """Time peft and fastlora in turn on the same model; returns seconds of each."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        # The first round warms both up; the order alternates, so that neither always runs second.
        for patched in (False, True) if number % 2 else (True, False):
            if patched:
                fastlora.patch(model, strict=True)
            else:
                fastlora.unpatch(model)
            taken = step_seconds(model, tokens)
            if number:
                seconds[patched].append(taken)
    return seconds[False], seconds[True]


def as_rows(
    dropout: float, shape: tuple[int, int], peft: list[float], fast: list[float]
) -> list[Row]:
    """Return both times as rows of the results."""
    timings = {
        name: Timing(tuple((1e6 * seconds,) for seconds in taken))
        for name, taken in (("peft", peft), ("fastlora", fast))
    }
    row = Row(
        **facts(torch.device("cpu")),
        level="step",
        model="SmolLM2-135M",
        case=f"{shape[0]} x {shape[1]} tokens",
        tokens=shape[0] * shape[1],
        rank=16,
        dropout=dropout,
        dtype="float32",
        timer="wall",
    )
    ours = timings["fastlora"]
    return [
        replace(row, provider=name, **columns(timing, fastlora=ours))
        for name, timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default 7)")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of each sequence")
    parser.add_argument("--out", type=Path, help="folder for cpu_step.csv")
    options = parser.parse_args()

    problems: list[str] = []
    rows: list[Row] = []
    generator = torch.Generator().manual_seed(0)
    shape = (options.sequences, options.length)
    print(
        f"SmolLM2-135M, fp32, r = 16, all-linear, {shape[0]} x {shape[1]} tokens, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds"
    )
    for dropout, limit in LIMITS.items():
        model = build(dropout)
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
        peft, fast = compare(model, tokens, options.rounds)
        ratios = sorted(ours / theirs for ours, theirs in zip(fast, peft, strict=True))
        ratio = statistics.median(ratios)
        print(
            f"  p = {dropout}: peft {statistics.median(peft):.2f} s, fastlora "
            f"{statistics.median(fast):.2f} s, ratio {ratio:.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}), at most {limit}"
        )
        rows += as_rows(dropout, shape, peft, fast)
        if not ratio <= limit:
            problems.append(f"p = {dropout}: {ratio:.3f} of peft's time, at most {limit}")
    if options.out:
        write_rows(options.out / "cpu_step.csv", rows)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
