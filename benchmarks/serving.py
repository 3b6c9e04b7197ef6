"""The part ``serve`` of ``gpu.py``: what many adapters in a batch cost, and what was promised.

The linears of a model and its head have random weights, and run as the engine runs them (the same
classes, an ``AdapterPool``, its tables), without attention, norms and activations. Every layer has
memory of its own, so that nothing comes from the L2 cache that would not in a model
(``served.py``).

    serving_steps.py      decode steps and prefills beside the base model's; a layer beside peft's;
                          launches, counted by PyTorch's profiler
    serving_kernels.py    each of the two kernels on each group of linears: time, and the bytes it
                          moves; the frozen product of a step that generates, beside PyTorch's; and
                          what an empty launch takes
    serving_engine.py     ``Engine`` end to end, where transformers is one that it was written for
    serving_session.py    how all of it is checked, timed and written
    serving_promises.py   what it is held to
"""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from served import Served
from serving_engine import measure_engine
from serving_kernels import (
    measure_copy,
    measure_empty_launches,
    measure_kernels,
    measure_ranks,
)
from serving_promises import MIXED_RANKS, OF_EACH_RANK, OF_MIXED, ONE_RANK, verdicts
from serving_session import SIZES, SMOKE, Session
from serving_steps import (
    ADAPTERS_OF_TARGETS,
    count_launches,
    measure_decode,
    measure_layer,
    measure_prefill,
    measure_targets,
)

import fastlora
from fastlora import plans
from fastlora.bench.command import write_about
from fastlora.bench.shapes import MODELS, RANK, Model

if TYPE_CHECKING:
    from gpu import Run


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
    session.section("copy", partial(measure_copy, session))
    session.section("empty launches", partial(measure_empty_launches, session))
    for number, model in enumerate(session.sizes.models):
        session.section(model.name, partial(_measure_model, session, model, number == 0))
        if number == 0:
            session.section("engine", partial(measure_engine, session))
    write_about(run.out, "make gpu PART=serve OUT=folder", session.notes)
    found = verdicts(session.rows)
    missed = [verdict for verdict in found if not verdict.is_kept]
    run.say(f"\n{len(found) - len(missed)} of {len(found)} promises kept")
    for verdict in missed:
        run.say(str(verdict))
    bad = session.failed or missed or any(row.refused for row in session.rows)
    return 1 if bad and not run.smoke else 0


def _measure_model(session: Session, model: Model, everything: bool) -> None:
    """Measure a model: all that there is of the first, and of others what is promised of it."""
    most = max(distinct for distinct, _ in session.sizes.decode)
    loaded = [(most, RANK)]
    if everything:
        loaded += [(OF_MIXED, ONE_RANK), *((OF_EACH_RANK, rank) for rank in MIXED_RANKS)]
        loaded.append((ADAPTERS_OF_TARGETS, RANK))
    served = Served(model, session.device, session.dtype, loaded)
    slots = served.load("adapter", most, RANK)
    session.run.say(f"{model.name}: {most} adapters of rank {RANK} loaded\n{served.pool}"[:400])
    parts: list[tuple[str, Callable[[], None]]] = [
        ("launches", partial(count_launches, session, served, slots)),
        ("decode", partial(measure_decode, session, served, slots)),
    ]
    if everything:
        parts.append(("kernels", partial(measure_kernels, session, served, slots)))
        parts.append(("peft", partial(measure_layer, session, served, slots)))
        parts.append(("targets", partial(measure_targets, session, served)))
    parts += [
        (f"prefill of {tokens}", partial(measure_prefill, session, served, slots, tokens))
        for tokens in session.sizes.prefill
    ]
    if everything:
        # Last: with them the pool's launches are made for a larger rank.
        parts.append(("ranks", partial(measure_ranks, session, served)))
    for title, measure in parts:
        session.section(f"{model.name}, {title}", measure)
