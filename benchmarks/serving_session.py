"""One run of the part ``serve``: how much is measured, how it is timed, and where it is written.

Graphs are captured while no row has an adapter, and told of the adapters afterwards; what they
compute is compared with a loop over the adapters, in fp64 and in the model's dtype, before they are
timed. What fails, or has no time left, costs nothing else: a note says what is missing.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from served import Captured, Rows, Served, idle
from serving_counts import DECODE, PREFILL, PREFILL_TOKENS, PROMISED_MODEL
from serving_promises import verdicts
from torch import Tensor

from fastlora.bench import checking, measuring
from fastlora.bench.environment import facts
from fastlora.bench.measuring import MIN_ROUNDS, Step, Timing, in_rounds
from fastlora.bench.results import Row, writer
from fastlora.bench.shapes import MODELS, RANK, Linear, Model

if TYPE_CHECKING:
    from gpu import Run

GIB = 2**30


class OutOfTime(Exception):
    """The part's time is over."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        models: the first has everything measured.
        decode: distinct adapters and rows.
        prefill: tokens.
        distinct: adapters of a prefill.
        turns: of a step in a round; of a prefill there are fewer.
        empty: launches that do nothing.
        requests: to the engine, of so many tokens, answered with so many.
        engine: whose shape the engine's model has.
    """

    models: tuple[Model, ...]
    decode: tuple[tuple[int, int], ...] = DECODE
    prefill: tuple[int, ...] = PREFILL_TOKENS
    distinct: tuple[int, ...] = tuple(PREFILL)
    turns: int = 9
    empty: int = 1000
    requests: tuple[int, int, int] = (64, 128, 128)
    engine: Model = MODELS["Qwen2.5-0.5B"]

    @property
    def decode_rows(self) -> list[int]:
        """Rows of the decode steps, each number once."""
        return sorted({rows for _, rows in self.decode})


TINY = Model(
    "tiny",
    {
        "q_proj": Linear(48, 32, True),
        "k_proj": Linear(16, 32, True),
        "v_proj": Linear(16, 32, True),
        "o_proj": Linear(32, 48),
        "gate_proj": Linear(64, 32),
        "up_proj": Linear(64, 32),
        "down_proj": Linear(32, 64),
    },
    layers=1,
    config={
        **MODELS["Qwen2.5-0.5B"].config,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    },
)
SIZES = Sizes(tuple(MODELS[name] for name in (PROMISED_MODEL, "Qwen2.5-0.5B", "Qwen3-8B")))
SMOKE = Sizes((TINY,), ((2, 2),), (65,), (2,), turns=1, empty=2, requests=(3, 4, 2), engine=TINY)


def about(model: Model, case: str, tokens: int, provider: str) -> dict[str, Any]:
    """Return the columns that say what a row is about."""
    return {
        "model": model.name,
        "case": case,
        "tokens": tokens,
        "rank": RANK,
        "provider": provider,
    }


class Session:
    """One run of the part.

    Attributes:
        rows: what was found so far.
        notes: what was left out, in sentences.
        failed: whether something failed (a note says what).
    """

    def __init__(self, run: Run, sizes: Sizes) -> None:
        self.run, self.sizes, self.device = run, sizes, run.device
        # Products in bf16 are wrong in Triton's interpreter.
        self.dtype = torch.float16 if run.smoke else torch.bfloat16
        self.on_gpu = self.device.type == "cuda"
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.failed = False
        self._facts = facts(self.device, run.facts["commit"])
        self._write = writer(run.out / "serve.csv")
        self._said: set[str] = set()

    def section(self, title: str, measure: Callable[[], None]) -> None:
        """Measure something; whatever goes wrong with it, the rest is measured all the same."""
        start = time.monotonic()
        try:
            self.stop_if_late()
            measure()
        except OutOfTime:
            self.note(f"Out of time: {title}.")
        except torch.OutOfMemoryError as error:
            self.note(f"Too large for the memory: {title} ({str(error).partition(chr(10))[0]}).")
        except Exception as error:  # the rest of a run must not be lost with one case
            self.failed = True
            self.note(f"Failed: {title} ({type(error).__name__}: {error}).")
            self.run.say(traceback.format_exc())
        gc.collect()  # graphs and models hold on to each other
        if self.on_gpu:
            torch.cuda.empty_cache()
        for verdict in map(str, verdicts(self.rows)):
            if verdict not in self._said:
                self._said.add(verdict)
                self.run.say(verdict)
        self.run.say(f"{title}: {time.monotonic() - start:.0f} s")

    def note(self, line: str) -> None:
        """Say something that belongs beside the rows."""
        self.notes.append(line)
        self.run.say(line)

    def add(self, timer: str = "graph", **columns: Any) -> None:
        """Write a row."""
        name = str(self.dtype).removeprefix("torch.")
        row = Row(**self._facts, level="serve", dtype=name, timer=timer, **columns)
        self.rows.append(row)
        self._write(row)
        us = "" if row.median_us is None else f" {row.median_us:.2f} us"
        us += "" if row.launches is None else f" {row.launches}"
        ratio = "" if row.to_frozen is None else f", over frozen {row.to_frozen}"
        self.run.say(
            f"  {row.model} {row.case}, {row.tokens} rows, {row.timer}, {row.provider}:{us}{ratio}"
            + (f" REFUSED: {row.refused}" if row.refused else "")
        )

    def stop_if_late(self) -> None:
        """Raise ``OutOfTime`` if the part's time is over."""
        if self.run.out_of_time():
            raise OutOfTime

    def time(self, steps: Mapping[Any, Step], turns: int | None = None) -> dict[Any, Timing]:
        """Time steps in turn, at least five rounds; they have been run once."""
        if self.run.smoke:  # interpreted, five rounds would take minutes and say no more
            steps = dict.fromkeys(steps, idle)
        return in_rounds(
            steps,
            self.device,
            rounds=MIN_ROUNDS,
            turns=turns or self.sizes.turns,
            before_round=self.stop_if_late,
        )

    def host_us(self, step: Step) -> float | None:
        """Return what the host takes to launch a step without a graph."""
        return measuring.host_us(step, self.device) if self.on_gpu else None

    def pool(self) -> Any:
        """Return memory for graphs that run one after the other."""
        return torch.cuda.graph_pool_handle() if self.on_gpu else None

    def capture(self, step: Callable[[], list[Tensor]], pool: Any) -> Captured:
        """Capture a step, if there is time."""
        self.stop_if_late()
        return Captured(step, self.device, pool)

    def checked(
        self,
        served: Served,
        step: Captured,
        told: Sequence[tuple[Rows, Sequence[tuple[int, int]]]],
        inputs: Sequence[Tensor],
        row: dict[str, Any],
    ) -> bool:
        """Tell a captured step of its adapters and compare what it computes.

        Args:
            served: the model.
            step: captured without any.
            told: rows, and the requests that they are told of; first those of the layers.
            inputs: of the layers.
            row: columns, to which the gate is added; a row is written if the step is refused.
        """
        for rows, requests in told:
            rows.tell(requests)
        step.replay()
        measuring.synchronize(self.device)
        try:
            row["gate"] = served.check(step.outputs, inputs, told[0][1])
        except checking.WrongResult as error:
            self.add(**row, refused=str(error))
            return False
        return True
