"""Kernels alone: all layers in one graph, and of its time what one launch takes.

copy      a large one: by its bandwidth ``serving_promises.py`` makes limits of bytes
empty     a launch that does nothing
kernels   each of the two that multiply with adapters, on each group of linears, and the bytes
          that it moves; and the frozen product of a step that generates, beside PyTorch's
ranks     the two on adapters of mixed ranks, beside the same bytes of one rank
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from served import Rows, Served, empty_kernel, in_turns, path_of, repeated, together
from serving_counts import Batch, expand_bytes, shrink_bytes
from serving_promises import (
    COPY,
    MIXED_PROVIDER,
    MIXED_RANKS,
    OF_EACH_RANK,
    OF_MIXED,
    ONE_RANK,
    case_of,
)
from serving_session import GIB, OutOfTime, Session, about
from torch import Tensor
from torch.nn import functional

from fastlora.bench import measuring
from fastlora.bench.measuring import MIN_ROUNDS, Step, Timing
from fastlora.bench.shapes import GROUPS
from fastlora.kernels import segmented_expand, segmented_shrink
from fastlora.kernels.decode_gemm import prepare_decode_gemm

_MANY_PROGRAMS = 528  # four for every processor of an H200


def measure_copy(session: Session) -> None:
    """Measure a large copy."""
    copy, _, size, _ = measuring.copy_and_product(session.device, session.dtype)
    found = measuring.columns(copy)
    session.add("eager", case=COPY, provider="torch", moved_gib=size / GIB, **found)
    session.run.say(f"  {size / copy.quantile_us(0.5) / 1e6:.2f} TB/s")


def measure_empty_launches(session: Session) -> None:
    """Measure what a launch in a graph takes that does nothing, alone and of many programs."""
    few = session.sizes.empty // 10 + 1
    counts = (few, few + session.sizes.empty)
    x = torch.zeros(1, device=session.device)
    for programs, dependent in itertools.product((1, _MANY_PROGRAMS), (False, True)):
        title = f"an empty launch of {programs} programs"
        title += ", programmatic dependent" if dependent else ""
        kernel = empty_kernel[(programs if session.on_gpu else 1,)]
        launch = functools.partial(kernel, x, **({"launch_pdl": True} if dependent else {}))
        pool = session.pool()
        try:
            steps = [session.capture(functools.partial(repeated, launch, n), pool) for n in counts]
        except OutOfTime:
            raise
        except Exception as error:  # of a Triton that has no such launches
            session.note(f"Not measured: {title} ({type(error).__name__}: {error}).")
            continue
        timings = session.time(dict(zip(counts, (s.replay for s in steps), strict=True)))
        fewer, more = (timings[n].quantile_us(0.5) for n in counts)
        us = (more - fewer) / session.sizes.empty
        session.add(case=title, provider="triton", median_us=us, rounds=MIN_ROUNDS)


def measure_kernels(session: Session, served: Served, slots: Sequence[int]) -> None:
    """Measure the frozen products and both kernels on each group of linears."""
    for count in session.sizes.decode_rows:
        for names, x in zip(GROUPS, served.inputs(count), strict=True):
            _measure_product(session, served, names, x)
    for distinct, count in session.sizes.decode:
        rows = Rows(count, served.pool)
        rows.tell(in_turns(slots[:distinct], count))
        for names, x in zip(GROUPS, served.inputs(count), strict=True):
            _measure_halves(session, served, names, x, rows, distinct)


def _measure_product(session: Session, served: Served, names: tuple[str, ...], x: Tensor) -> None:
    """Measure the frozen product of a group in a step that generates, beside PyTorch's."""
    layers = [
        [served.module.get_submodule(path_of(number, name)) for name in names]
        for number in range(served.model.layers)
    ]
    weights: list[list[Tensor]] = [[one.weight for one in layer] for layer in layers]
    biases: list[list[Tensor | None]] = [[one.bias for one in layer] for layer in layers]
    ours = prepare_decode_gemm(x, weights[0], biases[0])
    operands = list(zip(weights, biases, strict=True))
    pool = session.pool()
    graphs = {
        name: session.capture(functools.partial(_of_all_layers, run, x, operands), pool).replay
        for name, run in (("frozen", _by_torch), ("fastlora", ours))
    }
    each = {
        name: _per_launch(timing, served.model.layers)
        for name, timing in session.time(graphs).items()
    }
    for name, timing in each.items():
        session.add(
            **about(served.model, f"frozen product of {'/'.join(names)}", len(x), name),
            n=sum(served.model.linears[name].n for name in names),
            k=x.shape[1],
            **measuring.columns(timing, each["frozen"]),
        )


def _by_torch(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Compute frozen linears as PyTorch does, one after the other."""
    return [functional.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]


def _of_all_layers(
    run: Callable[..., list[Tensor]], x: Tensor, operands: Sequence[tuple[Any, Any]]
) -> list[Tensor]:
    """Compute the frozen linears of every layer; returns the outputs of the last."""
    for weights, biases in operands:
        ys = run(x, weights, biases)
    return ys


def _per_launch(timing: Timing, launches: int) -> Timing:
    """Return the times of one of several launches."""
    return Timing(tuple(tuple(us / launches for us in turns) for turns in timing.rounds_us))


def _measure_halves(
    session: Session,
    served: Served,
    names: tuple[str, ...],
    x: Tensor,
    rows: Rows,
    distinct: int,
) -> None:
    """Measure both kernels on a group, and count the bytes that they move."""
    runs, h = _halves(served, names, x, rows, served.pool.reach.max_rank)
    batch, ns = Batch.of(distinct, len(x)), [served.model.linears[name].n for name in names]
    sizes = h.shape[0], session.dtype.itemsize, rows.segments.block_m
    moved = {
        "segmented_shrink": shrink_bytes(batch, len(ns), x.shape[1], *sizes),
        "segmented_expand": expand_bytes(batch, tuple(ns), *sizes),
    }
    pool = session.pool()
    graphs = {name: session.capture(run, pool).replay for name, run in runs.items()}
    for name, timing in session.time(graphs).items():
        read, written = moved[name]
        case = case_of(f"{name} of {'/'.join(names)}", distinct)
        session.add(
            **about(served.model, case, len(x), "fastlora"),
            n=sum(ns),
            k=x.shape[1],
            moved_gib=(sum(read.values()) + sum(written.values())) / GIB,
            **measuring.columns(_per_launch(timing, served.model.layers)),
        )


def _halves(
    served: Served, names: tuple[str, ...], x: Tensor, rows: Rows, max_rank: int
) -> tuple[dict[str, Callable[[], list[Tensor]]], Tensor]:
    """Return both kernels on a group of every layer, and an h of the last.

    Outputs and h are of one layer: in a model the launch before has just written them.
    """
    pool = served.pool
    tables = [
        pool.descriptors[group.first : group.first + len(names)] for group in served.groups[names]
    ]
    ys = [
        torch.zeros(len(x), served.model.linears[name].n, dtype=served.dtype, device=served.device)
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


def measure_ranks(session: Session, served: Served) -> None:
    """Measure adapters of mixed ranks beside the same bytes of one rank."""
    mixed = [served.load(f"rank-{rank}", OF_EACH_RANK, rank) for rank in MIXED_RANKS]
    # Slots and the largest rank; mixed ones in turns, so that neighbours differ.
    loaded = {
        MIXED_PROVIDER: (
            [slot for slots in zip(*mixed, strict=True) for slot in slots],
            MIXED_RANKS,
        ),
        "fastlora": (served.load("one-rank", OF_MIXED, ONE_RANK), (ONE_RANK,)),
    }
    for count in sorted({rows for distinct, rows in session.sizes.decode if distinct > 1}):
        graphs: dict[str, Step] = {}
        columns: dict[str, dict[str, Any]] = {}
        pool = session.pool()
        for provider, (slots, ranks) in loaded.items():
            requests = in_turns(slots, count)
            rows = Rows(count, served.pool)
            rows.tell(requests)
            runs: list[Callable[[], list[Tensor]]] = []
            gates = [0.0]
            for names, x in zip(GROUPS, served.inputs(count), strict=True):
                gates.append(_gate_of(served, names, x, rows, requests, max(ranks)))
                halves, _ = _halves(served, names, x, rows, max(ranks))
                runs += halves.values()
            graphs[provider] = session.capture(functools.partial(together, runs), pool).replay
            shown = " to ".join(str(rank) for rank in sorted({min(ranks), max(ranks)}))
            case = f"{case_of('kernels', OF_MIXED)} of rank {shown}"
            row = about(served.model, case, count, provider)
            columns[provider] = row | {"rank": ONE_RANK, "gate": max(gates)}
        timings = session.time(graphs)
        for provider, timing in timings.items():
            found = measuring.columns(timing, None, timings["fastlora"])
            session.add(**columns[provider], **found)


def _gate_of(
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
    before = [y.to(served.device, served.dtype) for y in before]
    ys = [y.clone() for y in before]
    h = segmented_shrink.segmented_shrink(x, pool.arena, table, rows.segments, max_rank=max_rank)
    segmented_expand.segmented_expand(ys, h, pool.arena, table, rows.segments)
    return max(
        served.compare(name, group.first + s, x, y, old.clone(), old.double(), requests)
        for s, (name, y, old) in enumerate(zip(names, ys, before, strict=True))
    )
