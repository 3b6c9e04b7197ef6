"""The part ``serve`` of ``gpu.py``: what many adapters in a batch cost, and what was promised.

The linears of a model and its head have random weights, and run as the engine runs them (the same
classes, an ``AdapterPool``, its tables), without attention, norms and activations. Every layer has
memory of its own, so that nothing comes from the L2 cache that would not in a model. Graphs are
captured while no row has an adapter, and told of the adapters afterwards; what they compute is
compared with a loop over the adapters, in fp64 and in the model's dtype, before they are timed.

    decode      one CUDA graph of all linears and the head, beside the base model's
    prefill     8192 tokens at once, and a chunk of 512
    kernels     each of the two kernels on each group of linears: time, and the bytes it moves; and
                the frozen product of a step that generates, beside PyTorch's
    launches    counted by PyTorch's profiler; and what an empty one takes
    engine      ``Engine`` end to end, where this transformers is one that it was written for
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import itertools
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import serving_counts
import torch
from promises import Verdict
from served import (
    Captured,
    Rows,
    Served,
    adapted,
    empty_kernel,
    empty_launches,
    idle,
    in_turns,
    is_own,
    is_segmented,
    launched,
    path_of,
    repeated,
    runs_of,
    save_adapter,
    together,
)
from serving_counts import (
    DECODE,
    LAUNCHES,
    PREFILL,
    PREFILL_TOKENS,
    PROMISED,
    PROMISED_MODEL,
    Batch,
)
from torch import Tensor, nn
from torch.nn import functional

import fastlora
from fastlora import plans, segmented_ops
from fastlora.bench import checking, measuring
from fastlora.bench.command import write_about
from fastlora.bench.environment import facts
from fastlora.bench.measuring import MIN_ROUNDS, Step, Timing, in_rounds
from fastlora.bench.providers import DecoderLayer
from fastlora.bench.results import Row, writer
from fastlora.bench.shapes import GROUPS, MODELS, NAMES, RANK, Linear, Model
from fastlora.kernels import segmented_expand, segmented_shrink
from fastlora.kernels.decode_gemm import prepare_decode_gemm
from fastlora.serving.linears import RowsOfTokens

if TYPE_CHECKING:
    from gpu import Run

# A kernel takes at most what its bytes take at this share of a copy's bandwidth, and a launch.
BANDWIDTH, LAUNCH_US = 0.8, 2.0
# Adapters of several ranks take at most so much longer than the same bytes of one rank.
MIXED = 1.10
MIXED_RANKS, ONE_RANK, OF_MIXED = (8, 24, 32, 64), 32, 16

# By how many launches of a layer nothing hides; who is timed is in ``VARIANTS``.
PROVIDERS = {8: "fastlora-in-turn", 4: "fastlora"}
# How a decode step runs: as the engine has it; likewise, but each launch after the one before; and
# with PyTorch's frozen products, as on other devices than Hopper's, where shrinks have a stream.
VARIANTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "fastlora": nullcontext,
    "fastlora-in-turn": functools.partial(mock.patch.object, segmented_ops, "OVERLAPS", False),
    "fastlora-added": functools.partial(mock.patch.object, segmented_ops, "DECODE_GEMM_ROWS", 0),
}
_NEVER = 1 << 30  # rows

GIB = 2**30
_EMPTY = 1000  # launches
_MANY_PROGRAMS = 528  # four for every processor of an H200


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
    empty: int = _EMPTY
    requests: tuple[int, int, int] = (64, 128, 128)
    engine: Model = MODELS["Qwen2.5-0.5B"]


def _tiny() -> Model:
    linears = {
        "q_proj": Linear(48, 32, True),
        "k_proj": Linear(16, 32, True),
        "v_proj": Linear(16, 32, True),
        "o_proj": Linear(32, 48),
        "gate_proj": Linear(64, 32),
        "up_proj": Linear(64, 32),
        "down_proj": Linear(32, 64),
    }
    config = {
        **MODELS["Qwen2.5-0.5B"].config,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    return Model("tiny", linears, 1, config)


SIZES = Sizes(tuple(MODELS[name] for name in (PROMISED_MODEL, "Qwen2.5-0.5B", "Qwen3-8B")))
SMOKE = Sizes(
    (_tiny(),), ((2, 2),), (65,), (2,), turns=1, empty=2, requests=(3, 4, 2), engine=_tiny()
)


class OutOfTime(Exception):
    """The part's time is over."""


def case_of(kind: str, distinct: int) -> str:
    """Name what a row is about."""
    return f"{kind}, {serving_counts.adapters(distinct)}"


def kernel_case(kernel: str, names: Sequence[str], distinct: int) -> str:
    """Name a kernel on a group of linears."""
    return case_of(f"{kernel} of {'/'.join(names)}", distinct)


def prefill_providers(tokens: int) -> dict[str, bool]:
    """Return how a prefill runs, the engine's way first: whether terms are added in the product."""
    fuses = tokens >= segmented_ops.PREFILL_ROWS
    return {"fastlora": fuses, f"fastlora-{'added' if fuses else 'fused'}": not fuses}


def fusing(step: Callable[[], list[Tensor]], fuses: bool) -> Callable[[], list[Tensor]]:
    """Return a prefill step whose terms are added in the product, or not, whenever it runs."""

    def run() -> list[Tensor]:
        with mock.patch.object(segmented_ops, "PREFILL_ROWS", 0 if fuses else _NEVER):
            return step()

    return run


def by_torch(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Compute frozen linears as PyTorch does, one after the other."""
    return [functional.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]


def products_of(
    run: Callable[..., list[Tensor]], x: Tensor, layers: Sequence[tuple[Any, Any]]
) -> list[Tensor]:
    """Compute the frozen linears of every layer; returns the outputs of the last."""
    for weights, biases in layers:
        ys = run(x, weights, biases)
    return ys


def per_launch(timing: Timing, launches: int) -> Timing:
    """Return the times of one of several launches."""
    return Timing(tuple(tuple(us / launches for us in turns) for turns in timing.rounds_us))


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Hold rows to what was promised of them; what was not measured has no verdict."""
    mine = [row for row in rows if row.level == "serve" and row.model == PROMISED_MODEL]
    return [
        *_shares(mine),
        *_kernels(mine, [row for row in rows if row.case == "copy"]),
        *_others(mine),
    ]


def _shares(rows: Sequence[Row]) -> Iterable[Verdict]:
    limits = {
        (provider, case_of("decode", distinct)): least
        for launches, provider in PROVIDERS.items()
        for distinct, least in PROMISED[launches].items()
    }
    limits |= {("fastlora", case_of("prefill", d)): least for d, least in PREFILL.items()}
    for row in rows:
        least = limits.get((row.provider, row.case))
        if least is not None and row.rank == RANK and row.over_frozen:
            what = f"{row.model} {row.case}, {row.tokens:,} rows, {row.timer}, {row.provider}"
            yield Verdict(f"{what}: share of the base's speed", 1 / row.over_frozen, least, False)


def _kernels(rows: Sequence[Row], copies: Sequence[Row]) -> Iterable[Verdict]:
    for copy in copies[:1]:
        us_per_gib = (copy.median_us or 0.0) / (copy.moved_gib or 1.0) / BANDWIDTH
        for row in rows:
            if row.case.startswith("segmented_") and row.median_us and row.moved_gib:
                most = round(us_per_gib * row.moved_gib + LAUNCH_US, 3)
                what = f"{row.case}, {row.tokens} rows: us of a launch"
                yield Verdict(what, row.median_us, most, True)


def _others(rows: Sequence[Row]) -> Iterable[Verdict]:
    for row in rows:
        if row.provider == "fastlora-mixed" and row.over_fastlora:
            what = f"{row.case}, {row.tokens} rows: over the same bytes of rank {ONE_RANK}"
            yield Verdict(what, row.over_fastlora, MIXED, True)
        if row.case == "launches of a decoder layer" and row.launches is not None:
            yield Verdict(f"{row.model} {row.case}", row.launches, LAUNCHES, True)
        if row.case == "launches for metadata" and row.launches is not None:
            yield Verdict(f"{row.model} {row.case}", row.launches, 0, True)


class Session:
    """One run of the part."""

    def __init__(self, run: Run, sizes: Sizes) -> None:
        self.run, self.sizes, self.device = run, sizes, run.device
        self.dtype = torch.float16 if run.smoke else torch.bfloat16  # see DESIGN §7
        self.on_gpu = self.device.type == "cuda"
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.failed = False
        self._facts = facts(self.device, run.facts["commit"])
        self._write = writer(run.out / "serve.csv")
        self._said: set[str] = set()

    # What is common to all of it.

    def section(self, title: str, measure: Callable[[], None]) -> None:
        """Measure something; whatever goes wrong with it, the rest is measured all the same."""
        start = time.monotonic()
        try:
            self._stop_if_late()
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

    def _stop_if_late(self) -> None:
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
            before_round=self._stop_if_late,
        )

    def host_us(self, step: Step) -> float | None:
        """Return what the host takes to launch a step without a graph."""
        return measuring.host_us(step, self.device) if self.on_gpu else None

    def pool(self) -> Any:
        """Return memory for graphs that run one after the other."""
        return torch.cuda.graph_pool_handle() if self.on_gpu else None

    def capture(self, step: Callable[[], list[Tensor]], pool: Any) -> Captured:
        """Capture a step, if there is time."""
        self._stop_if_late()
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

    # What is measured.

    def roofs(self) -> None:
        """Measure a large copy."""
        copy, _, size, _ = measuring.copy_and_product(self.device, self.dtype)
        self.add(
            "eager", case="copy", provider="torch", moved_gib=size / GIB, **measuring.columns(copy)
        )
        self.run.say(f"  {size / copy.quantile_us(0.5) / 1e6:.2f} TB/s")

    def empty(self) -> None:
        """Measure what a launch in a graph takes that does nothing, alone and of many programs."""
        counts = (self.sizes.empty // 10 + 1, self.sizes.empty // 10 + 1 + self.sizes.empty)
        x = torch.zeros(1, device=self.device)
        for programs, dependent in itertools.product((1, _MANY_PROGRAMS), (False, True)):
            title = f"an empty launch of {programs} programs"
            title += ", programmatic dependent" if dependent else ""
            kernel = empty_kernel[(programs if self.on_gpu else 1,)]
            launch = functools.partial(kernel, x, **({"launch_pdl": True} if dependent else {}))
            pool = self.pool()
            try:
                steps = [self.capture(functools.partial(repeated, launch, n), pool) for n in counts]
            except OutOfTime:
                raise
            except Exception as error:  # of a Triton that has no such launches
                self.note(f"Not measured: {title} ({type(error).__name__}: {error}).")
                continue
            few, many = self.time(
                dict(zip(counts, (s.replay for s in steps), strict=True))
            ).values()
            us = (many.quantile_us(0.5) - few.quantile_us(0.5)) / self.sizes.empty
            self.add(case=title, provider="triton", median_us=us, rounds=MIN_ROUNDS)

    def decode(self, served: Served, slots: Sequence[int]) -> None:
        """Measure a decode step of all linears and the head in one graph, beside the base's."""
        for count in sorted({rows for _, rows in self.sizes.decode}):
            inputs, pool = served.inputs(count), self.pool()
            base = served.step(inputs, inputs[0], None, None)
            steps: dict[Any, Captured] = {"frozen": self.capture(base, pool)}
            about: dict[Any, dict[str, Any]] = {}
            for (variant, context), distinct in itertools.product(
                VARIANTS.items(), (d for d, rows in self.sizes.decode if rows == count)
            ):
                rows = Rows(count, served.pool)
                row = self._about(served, case_of("decode", distinct), count, variant)
                eager = served.step(inputs, inputs[0], rows, rows)
                with context():
                    step = self.capture(eager, pool)
                    row["host_us"] = self.host_us(eager)
                requests = in_turns(slots[:distinct], count)
                if self.checked(served, step, [(rows, requests)], inputs, row):
                    steps[variant, distinct], about[variant, distinct] = step, row
            with (
                mock.patch.object(segmented_ops, "OVERLAPS", False),
                mock.patch.object(segmented_ops, "DECODE_GEMM_ROWS", 0),
                mock.patch.object(segmented_ops, "add_adapters", empty_launches),
            ):
                rows = Rows(count, served.pool)
                steps["empty"] = self.capture(served.step(inputs, inputs[0], rows, rows), pool)
            about["empty"] = self._about(served, "decode, launches that do nothing", count, "empty")
            timings = self.time({name: step.replay for name, step in steps.items()})
            frozen = timings.pop("frozen")
            self.add(
                **self._about(served, "decode", count, "frozen"),
                host_us=self.host_us(base),
                **measuring.columns(frozen, frozen),
            )
            for name, timing in timings.items():
                self.add(**about[name], **measuring.columns(timing, frozen))

    def _about(self, served: Served, case: str, tokens: int, provider: str) -> dict[str, Any]:
        return {
            "model": served.model.name,
            "case": case,
            "tokens": tokens,
            "rank": RANK,
            "provider": provider,
        }

    def prefill(self, served: Served, slots: Sequence[int], tokens: int) -> None:
        """Measure a prefill, in a graph and eagerly, beside the base model's."""
        inputs, pool = served.inputs(tokens), self.pool()
        # Of a prompt only the last token's logits are wanted.
        heads = {distinct: inputs[0][:distinct] for distinct in self.sizes.distinct}
        base = served.step(inputs, inputs[0][:1], None, None)
        steps: dict[Any, Step] = {
            ("graph", 0, ""): self.capture(base, pool).replay,
            ("eager", 0, ""): base,
        }
        about: dict[Any, dict[str, Any]] = {
            (timer, 0, ""): self._about(served, "prefill", tokens, "frozen") | {"timer": timer}
            for timer in ("graph", "eager")
        }
        providers = prefill_providers(tokens)
        for (distinct, head), provider in itertools.product(heads.items(), providers):
            row = self._about(served, case_of("prefill", distinct), tokens, provider)
            rows, logits = Rows(tokens, served.pool), Rows(distinct, served.pool)
            eager = fusing(served.step(inputs, head, rows, logits), providers[provider])
            step = self.capture(eager, pool)
            requests = runs_of(slots[:distinct], tokens)
            ends = [(slot, 1) for slot in slots[:distinct]]
            if self.checked(served, step, [(rows, requests), (logits, ends)], inputs, row):
                for timer, timed in (("graph", step.replay), ("eager", eager)):
                    steps[timer, distinct, provider] = timed
                    about[timer, distinct, provider] = row | {"timer": timer}
        # A long one takes a sixth of a second: once in a round is enough.
        turns = 1 if tokens > 1024 else max(1, self.sizes.turns // 4)
        timings = self.time(steps, turns)
        for key, timing in timings.items():
            self.add(**about[key], **measuring.columns(timing, timings[key[0], 0, ""]))

    def kernels(self, served: Served, slots: Sequence[int]) -> None:
        """Measure each kernel on each group, all layers in one graph."""
        for count in sorted({rows for _, rows in self.sizes.decode}):
            self.products(served, count)
        for distinct, count in self.sizes.decode:
            rows = Rows(count, served.pool)
            rows.tell(in_turns(slots[:distinct], count))
            batch = Batch.of(distinct, count)
            for names, x in zip(GROUPS, served.inputs(count), strict=True):
                linears = [served.model.linears[name] for name in names]
                runs, h = self.halves(served, names, x, rows, served.pool.reach.max_rank)
                table = rows.segments
                planes, size = h.shape[0], self.dtype.itemsize
                ns = tuple(one.n for one in linears)
                moved = {
                    "segmented_shrink": serving_counts.shrink_bytes(
                        batch, len(names), linears[0].k, planes, size, table.block_m
                    ),
                    "segmented_expand": serving_counts.expand_bytes(
                        batch, ns, planes, size, table.block_m
                    ),
                }
                pool = self.pool()
                graphs = {name: self.capture(run, pool).replay for name, run in runs.items()}
                for name, timing in self.time(graphs).items():
                    read, written = moved[name]
                    self.add(
                        **self._about(
                            served, kernel_case(name, names, distinct), count, "fastlora"
                        ),
                        n=sum(ns),
                        k=linears[0].k,
                        moved_gib=(sum(read.values()) + sum(written.values())) / GIB,
                        **measuring.columns(per_launch(timing, served.model.layers)),
                    )

    def products(self, served: Served, count: int) -> None:
        """Measure the frozen products of a step that generates, beside PyTorch's."""
        for names, x in zip(GROUPS, served.inputs(count), strict=True):
            layers = [
                [served.module.get_submodule(path_of(number, name)) for name in names]
                for number in range(served.model.layers)
            ]
            weights: list[list[Tensor]] = [[one.weight for one in layer] for layer in layers]
            biases: list[list[Tensor | None]] = [[one.bias for one in layer] for layer in layers]
            run = prepare_decode_gemm(x, weights[0], biases[0])
            each_layer = list(zip(weights, biases, strict=True))
            torchs = functools.partial(products_of, by_torch, x, each_layer)
            ours = functools.partial(products_of, run, x, each_layer)
            pool = self.pool()
            steps = {"frozen": self.capture(torchs, pool), "fastlora": self.capture(ours, pool)}
            timings = self.time({name: step.replay for name, step in steps.items()})
            for name, timing in timings.items():
                case = f"frozen product of {'/'.join(names)}"
                each = per_launch(timing, served.model.layers)
                of_torch = per_launch(timings["frozen"], served.model.layers)
                self.add(
                    **self._about(served, case, count, name),
                    n=sum(served.model.linears[name].n for name in names),
                    k=x.shape[1],
                    **measuring.columns(each, of_torch),
                )

    def halves(
        self, served: Served, names: tuple[str, ...], x: Tensor, rows: Rows, max_rank: int
    ) -> tuple[dict[str, Callable[[], list[Tensor]]], Tensor]:
        """Return both kernels on a group of every layer, and an h of the first.

        Outputs and h are of one layer: in a model the launch before has just written them.
        """
        pool = served.pool
        tables = [
            pool.descriptors[group.first : group.first + len(names)]
            for group in served.groups[names]
        ]
        ys = [
            torch.zeros(len(x), served.model.linears[name].n, dtype=self.dtype, device=self.device)
            for name in names
        ]

        def shrinks() -> list[Tensor]:
            for table in tables:
                h = segmented_shrink.segmented_shrink(
                    x, pool.arena, table, rows.segments, max_rank=max_rank
                )
            return [h]

        (h,) = shrinks()

        def expands() -> list[Tensor]:
            for table in tables:
                segmented_expand.segmented_expand(ys, h, pool.arena, table, rows.segments)
            return []

        return {"segmented_shrink": shrinks, "segmented_expand": expands}, h

    def ranks(self, served: Served) -> None:
        """Measure adapters of mixed ranks beside the same bytes of one rank."""
        each = OF_MIXED // len(MIXED_RANKS)
        mixed = [served.load(f"rank-{rank}", each, rank) for rank in MIXED_RANKS]
        # In turns, so that neighbours differ.
        loaded = {
            "fastlora-mixed": [slot for slots in zip(*mixed, strict=True) for slot in slots],
            "fastlora": served.load("one-rank", OF_MIXED, ONE_RANK),
        }
        ceilings = {"fastlora-mixed": max(MIXED_RANKS), "fastlora": ONE_RANK}
        for count in sorted({rows for distinct, rows in self.sizes.decode if distinct > 1}):
            graphs: dict[str, Step] = {}
            gates: dict[str, float] = {}
            pool = self.pool()
            for provider, slots in loaded.items():
                requests = in_turns(slots, count)
                rows = Rows(count, served.pool)
                rows.tell(requests)
                runs: list[Callable[[], list[Tensor]]] = []
                for names, x in zip(GROUPS, served.inputs(count), strict=True):
                    gate = self.gate_of(served, names, x, rows, requests, ceilings[provider])
                    gates[provider] = max(gates.get(provider, 0.0), gate)
                    halves, _ = self.halves(served, names, x, rows, ceilings[provider])
                    runs += halves.values()
                graphs[provider] = self.capture(functools.partial(together, runs), pool).replay
            timings = self.time(graphs)
            for provider, timing in timings.items():
                ranks = MIXED_RANKS if provider == "fastlora-mixed" else (ONE_RANK,)
                shown = " to ".join(str(rank) for rank in sorted({min(ranks), max(ranks)}))
                about = self._about(
                    served, f"{case_of('kernels', OF_MIXED)} of rank {shown}", count, provider
                )
                self.add(
                    **about | {"rank": ONE_RANK, "gate": gates[provider]},
                    **measuring.columns(timing, None, timings["fastlora"]),
                )

    def gate_of(
        self,
        served: Served,
        names: tuple[str, ...],
        x: Tensor,
        rows: Rows,
        requests: Sequence[tuple[int, int]],
        max_rank: int,
    ) -> float:
        """Compare both kernels on a group of the last layer with a loop over the adapters."""
        pool, group = served.pool, served.groups[names][-1]
        table = pool.descriptors[group.first : group.first + len(names)]
        before = [torch.randn(len(x), served.model.linears[name].n) for name in names]
        before = [y.to(self.device, self.dtype) for y in before]
        ys = [y.clone() for y in before]
        h = segmented_shrink.segmented_shrink(
            x, pool.arena, table, rows.segments, max_rank=max_rank
        )
        segmented_expand.segmented_expand(ys, h, pool.arena, table, rows.segments)
        return max(
            served.compare(name, group.first + s, x, y, old.clone(), old.double(), requests)
            for s, (name, y, old) in enumerate(zip(names, ys, before, strict=True))
        )

    def launches(self, served: Served, slots: Sequence[int]) -> None:
        """Count what adapters add to the launches of a decoder layer."""
        if not self.on_gpu:
            self.note("Launches are counted on a GPU (without one: make counts).")
            return
        distinct, count = self.sizes.decode[-1]
        inputs, rows = served.inputs(count), Rows(count, served.pool)
        rows.tell(in_turns(slots[:distinct], count))
        bare = launched(served.step(inputs, None, None, None), self.device)
        ours = launched(served.step(inputs, None, rows, rows), self.device)
        segmented = sum(n for name, n in ours.items() if is_segmented(name))
        others = {name: n for name, n in (ours - bare).items() if not is_own(name)}
        per_layer = (segmented + sum(others.values())) / served.model.layers
        for case, found in (
            ("launches of a decoder layer", math.ceil(per_layer)),
            ("launches for metadata", sum(others.values())),
        ):
            about = self._about(served, case, count, "fastlora")
            self.add("eager", **about, launches=found)
        self.run.say(f"  all layers: {dict(ours)}; without adapters: {dict(bare)}")

    def peft(self, served: Served, slots: Sequence[int]) -> None:
        """Measure one decoder layer beside peft's ``adapter_names=``, eagerly."""
        from peft import LoraConfig, get_peft_model

        distinct, count = max(pair for pair in self.sizes.decode if pair[0] <= OF_MIXED)
        inputs, rows = served.inputs(count), Rows(count, served.pool)
        requests = in_turns(slots[:distinct], count)
        rows.tell(requests)
        first: Any = served.module.layers[0]
        linears = {}
        for name, shape in served.model.linears.items():
            routed: Any = served.module.get_submodule(path_of(0, name))
            linears[name] = nn.Linear(shape.k, shape.n, shape.has_bias, device="meta")
            linears[name].weight, linears[name].bias = routed.weight, routed.bias
        config = LoraConfig(r=RANK, target_modules=list(NAMES), init_lora_weights=False)
        model: Any = get_peft_model(
            DecoderLayer(linears), config, adapter_name="a0", autocast_adapter_dtype=False
        )
        for number in range(1, distinct):
            model.add_adapter(f"a{number}", config)
        model.to(self.device, self.dtype).eval()
        names = [f"a{row % distinct}" for row in range(count)]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(model.base_model._enable_peft_forward_hooks(adapter_names=names))

            def ours() -> object:
                batch = RowsOfTokens(rows.segments, rows.segments, served.pool.reach)
                with served.routing.batch(batch):
                    return first(*inputs)

            steps: dict[str, Step] = {
                "frozen": lambda: first(*inputs),
                "peft": lambda: model.base_model.model(*inputs),
                "fastlora": ours,
            }
            for step in steps.values():
                step()
            timings = self.time(steps)
        for name, timing in timings.items():
            about = self._about(served, case_of("decode of one layer", distinct), count, name)
            found = measuring.columns(timing, timings["frozen"], timings["fastlora"])
            self.add("eager", **about, **found)

    def engine(self) -> None:
        """Measure ``Engine`` with adapters beside the same without, end to end."""
        from fastlora.serving import batching

        reason = batching.unsupported_reason()
        if reason is not None:
            self.note(f"Engine was not measured: {reason}.")
            return
        from transformers import AutoConfig, AutoModelForCausalLM

        model, (count, length, new) = self.sizes.engine, self.sizes.requests
        torch.manual_seed(0)
        # On a CPU it runs on PyTorch's operations, as it does for its users there.
        dtype = self.dtype if self.on_gpu else torch.float32
        with torch.device(self.device):
            base: Any = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**model.config), dtype=dtype
            )
        distinct = min(OF_MIXED, count)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(model.config["vocab_size"], (count, length), generator=generator)
        named: dict[str, Sequence[str | None]] = {
            "fastlora": [f"a{number % distinct}" for number in range(count)],
            "frozen": [None] * count,
        }
        taken: dict[str, list[float]] = {provider: [] for provider in named}
        with (
            tempfile.TemporaryDirectory() as name,
            fastlora.backend("auto"),
            fastlora.Engine(base) as engine,
        ):
            save_adapter(Path(name), adapted(engine.adapters), RANK, dtype)
            for number in range(distinct):
                engine.adapters.load(f"a{number}", name)

            def generate(provider: str) -> float:
                self._stop_if_late()
                start = time.perf_counter()
                results = engine.generate(
                    prompts.tolist(),
                    adapter=named[provider],
                    max_new_tokens=new,
                    ignore_eos=True,
                    progress=False,
                )
                seconds = time.perf_counter() - start
                assert not any(result.error for result in results)
                made = sum(len(result.token_ids) for result in results)
                assert made == count * new, f"{made} tokens of {count * new}"
                return seconds

            for provider in named:
                generate(provider)  # compiles, and captures its graphs
            for number in range(MIN_ROUNDS):
                for provider in list(named) if number % 2 else list(reversed(named)):
                    taken[provider].append(generate(provider))
            self.run.say(f"  {_described(engine)}")
        timings = {
            provider: Timing(tuple((1e6 * one,) for one in seconds))
            for provider, seconds in taken.items()
        }
        for provider, timing in timings.items():
            us = timing.quantile_us(0.5)
            self.add(
                "wall",
                model=model.name,
                case=case_of(f"engine, {count} requests", distinct),
                tokens=count,
                rank=RANK,
                provider=provider,
                tokens_per_s=count * new / us * 1e6,
                **measuring.columns(timing, timings["frozen"]),
            )
            self.run.say(f"  {provider}: {count * new / us * 1e6:,.0f} tokens/s")


def _described(engine: Any) -> str:
    """Say how an engine ran, as far as transformers tells."""
    manager = engine._manager
    config = manager.continuous_batching_config
    return (
        f"attention {engine.model.config._attn_implementation}, CUDA graphs "
        f"{config.use_cuda_graph}, asynchronous {config.use_async_batching}"
    )


def run_serve(run: Run) -> int:
    """Measure the part; returns 1 if a promise is not kept, or something is wrong or failed."""
    # A device that hangs writes no line: the clock does not wait for one.
    faulthandler.dump_traceback_later(run.seconds_left() + 20, exit=True, file=run.log_file)
    try:
        with fastlora.backend("fused") if run.smoke else nullcontext():
            return _run(run)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _run(run: Run) -> int:
    sizes = SMOKE if run.smoke else SIZES
    if run.only and not run.smoke:
        sizes = replace(sizes, models=tuple(MODELS[name] for name in run.only))
    session = Session(run, sizes)
    plans.check_device(run.device)
    run.say(plans.describe(run.device))
    for kernel in (plans.SEGMENTED, plans.DECODE_GEMM, plans.SEGMENTED_GEMM):
        wrong = plans.segmented_reason(run.device, kernel)
        run.say(f"{kernel}: {wrong or 'right on a small problem'}")
    session.section("copy", session.roofs)
    session.section("empty launches", session.empty)
    for number, model in enumerate(session.sizes.models):
        session.section(model.name, functools.partial(_measure, session, model, number == 0))
        if number == 0:
            session.section("engine", session.engine)
    write_about(run.out, "make gpu PART=serve OUT=folder", session.notes)
    found = verdicts(session.rows)
    missed = [verdict for verdict in found if not verdict.is_kept]
    run.say(f"\n{len(found) - len(missed)} of {len(found)} promises kept")
    for verdict in missed:
        run.say(str(verdict))
    bad = session.failed or missed or any(row.refused for row in session.rows)
    return 1 if bad and not run.smoke else 0


def _measure(session: Session, model: Model, everything: bool) -> None:
    """Measure a model: all that there is of the first, and of others what is promised of it."""
    most = max(distinct for distinct, _ in session.sizes.decode)
    loaded = [(most, RANK)]
    if everything:
        each = OF_MIXED // len(MIXED_RANKS)
        loaded += [(OF_MIXED, ONE_RANK), *((each, rank) for rank in MIXED_RANKS)]
    served = Served(model, session.device, session.dtype, loaded)
    slots = served.load("adapter", most, RANK)
    session.run.say(f"{model.name}: {most} adapters of rank {RANK} loaded\n{served.pool}"[:400])
    part = functools.partial
    parts: list[tuple[str, Callable[[], None]]] = [
        ("launches", part(session.launches, served, slots)),
        ("decode", part(session.decode, served, slots)),
    ]
    if everything:
        parts.append(("kernels", part(session.kernels, served, slots)))
        parts.append(("peft", part(session.peft, served, slots)))
    parts += [
        (f"prefill of {tokens}", part(session.prefill, served, slots, tokens))
        for tokens in session.sizes.prefill
    ]
    if everything:
        # Last: with them the pool's launches are made for a larger rank.
        parts.append(("ranks", part(session.ranks, served)))
    for title, measure in parts:
        session.section(f"{model.name}, {title}", measure)
