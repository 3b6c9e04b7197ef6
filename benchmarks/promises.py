"""The parts ``bench`` and ``compiled`` of ``gpu.py``, and what was promised of what they measure.

The promises are ratios on an H200, forward and backward, rank 16: of a decoder layer whose linears
are computed in groups, of its linears one by one (the seven added up), and of the fused GEMM's
speed beside cuBLAS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastlora import plans
from fastlora.bench import results, summary
from fastlora.bench.command import write_about
from fastlora.bench.measuring import MIN_ROUNDS
from fastlora.bench.planning import Options
from fastlora.bench.results import Row
from fastlora.bench.session import Session, by_case
from fastlora.bench.shapes import DROPOUT, MAIN_MODELS, MODELS, NAMES, RANK, Linear, Model

if TYPE_CHECKING:
    from gpu import Run

# Those that do not have to be compiled first.
PROVIDERS = ("peft", "peft-bf16", "addmm", "fastlora-fused", "fastlora-hybrid", "fastlora-bf16")

# A layer with dropout 0.1: at most fastlora / frozen.
LAYERS = {
    ("Qwen2.5-0.5B", 8192): 1.22,
    ("Qwen2.5-7B", 8192): 1.07,
    ("Qwen3-8B", 8192): 1.07,
    ("Qwen3-32B", 8192): 1.05,
    ("Qwen2.5-0.5B", 2048): 1.35,
}
# The sum of its linears one by one, 8192 tokens, dropout 0.1: at most fastlora / frozen, at least
# peft / fastlora, at least peft-bf16 / fastlora.
LINEARS = {
    "Qwen2.5-0.5B": (1.32, 2.4, 1.75),
    "Qwen2.5-7B": (1.10, 1.40, 1.20),
    "Qwen3-8B": (1.10, 1.43, 1.20),
    "Qwen3-32B": (1.07, 1.27, 1.12),
}
ADDMM = 0.99  # without dropout, at every linear: at least addmm / fastlora
CUBLAS = 0.97  # the fused GEMM with its low-rank term: at least frozen / fastlora-fused


@dataclass(frozen=True)
class Verdict:
    """One promise, and what was seen of it.

    Attributes:
        what: it is about.
        seen: the ratio.
        limit: what was promised.
        at_most: the limit is from above.
    """

    what: str
    seen: float
    limit: float
    at_most: bool

    @property
    def is_kept(self) -> bool:
        return self.seen <= self.limit if self.at_most else self.seen >= self.limit

    def __str__(self) -> str:
        word = "kept" if self.is_kept else "NOT kept"
        return (
            f"{self.what}: {self.seen:.3f}, {word} ({'<' if self.at_most else '>'}= {self.limit})"
        )


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Hold rows to the promises; what was not measured has no verdict."""
    timed = [row for row in rows if row.median_us and row.rank == RANK]
    return [*_layers(timed), *_linears(timed), *_addmm(timed), *_cublas(timed)]


def _layers(rows: Sequence[Row]) -> Iterable[Verdict]:
    for row in rows:
        limit = LAYERS.get((row.model, row.tokens))
        ours = row.level == "layer" and row.provider == "fastlora" and row.dropout == DROPOUT
        if ours and limit and row.over_frozen:
            yield Verdict(f"{results.describe(row)}: over frozen", row.over_frozen, limit, True)


def _linears(rows: Sequence[Row]) -> Iterable[Verdict]:
    for model, (frozen, peft, peft_bf16) in LINEARS.items():
        sums: dict[str, float] = {}
        here = [r for r in rows if (r.level, r.model, r.tokens) == ("linear", model, 8192)]
        for row in here:
            if row.dropout == DROPOUT:
                us = row.count * (row.median_us or 0.0)
                sums[row.provider] = sums.get(row.provider, 0.0) + us
        what = f"{model}, the sum of its linears, 8,192 tokens, dropout {DROPOUT}"
        for name, limit in (("frozen", frozen), ("peft", peft), ("peft-bf16", peft_bf16)):
            if name in sums and "fastlora" in sums:
                ratio = sums["fastlora"] / sums[name]
                at_most = name == "frozen"
                seen = ratio if at_most else 1 / ratio
                how = "over" if at_most else "speed-up over"
                yield Verdict(f"{what}: {how} {name}", seen, limit, at_most)


def _addmm(rows: Sequence[Row]) -> Iterable[Verdict]:
    for row in rows:
        if row.provider == "addmm" and row.level == "linear" and row.over_fastlora:
            what = f"{results.describe(row)}: speed-up over addmm"
            yield Verdict(what, row.over_fastlora, ADDMM, False)


def _cublas(rows: Sequence[Row]) -> Iterable[Verdict]:
    for row in rows:
        # Operations without a GEMM have no frozen one beside them.
        ours = row.provider == "fastlora-fused" and row.level == "operation"
        if ours and row.over_frozen:
            what = f"{results.describe(row)}: cuBLAS over the fused GEMM"
            yield Verdict(what, 1 / row.over_frozen, CUBLAS, False)


def run_bench(run: Run, part: str) -> int:
    """Measure the part; returns 1 if a promise is not kept or a provider was refused."""
    plans.check_device(run.device)
    run.say(plans.describe(run.device))  # a kernel that failed makes "fused" another plan
    options = _options(run, part)
    session = Session(options, run.out)
    rows = session.run(by_case(run.say))
    write_about(run.out, f"make gpu PART={part} OUT=folder", session.notes)
    run.say(summary.report(rows, session.notes))
    found = verdicts(rows)
    for verdict in found:
        run.say(str(verdict))
    bad = (
        session.failed
        or any(row.refused for row in rows)
        or [one for one in found if not one.is_kept]
    )
    return 1 if bad and not run.smoke else 0


def _options(run: Run, part: str) -> Options:
    compiled = part == "compiled"
    common: dict[str, Any] = {
        "counted": [],  # that needs no GPU
        "seconds": 10.0 if run.smoke else run.seconds_left(),
        "levels": ("layer",) if compiled else ("layer", "linear", "step", "operation"),
        "providers": ("peft", "peft-compiled") if compiled else PROVIDERS,
        "device": run.device,
        "rounds": MIN_ROUNDS,
        "commit": run.facts["commit"],
    }
    if run.smoke:
        # Neither torch.compile nor interpreted plans: they take longer than all the rest, and
        # operations are interpreted anyway.
        small = {"models": [_tiny()], "tokens": (32,), "dtype": torch.float16}
        return Options(**common | small | {"providers": ("peft", "addmm"), "dropouts": (DROPOUT,)})
    return Options(
        **common,
        models=[MODELS[name] for name in run.only or MAIN_MODELS],
        stepped=[MODELS[name] for name in run.only or MAIN_MODELS[:3]],
        tokens=(8192,) if compiled else (8192, 2048),
        dropouts=(DROPOUT,) if compiled else (DROPOUT, 0.0),
        dtype=torch.bfloat16,
    )


def _tiny() -> Model:
    config = dict(MODELS["Qwen2.5-0.5B"].config)
    config |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "num_hidden_layers": 1}
    return Model("tiny", dict.fromkeys(NAMES, Linear(16, 32, True)), 1, config)
