"""Whole steps with many adapters beside the base model's: decode, prefill, one layer beside peft.

decode      one CUDA graph of all linears and the head, as the engine has it and in other ways
targets     likewise, of adapters that have q and v alone
prefill     8192 tokens at once, and a chunk of 512, in a graph and without one
layer       one decoder layer beside peft's ``adapter_names=``, eagerly
launches    of a decoder layer, counted by PyTorch's profiler
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
from served import (
    Captured,
    Rows,
    Served,
    empty_launches,
    in_turns,
    is_own,
    is_segmented,
    launched,
    path_of,
    runs_of,
)
from serving_promises import LAUNCHES_FOR_METADATA, LAUNCHES_OF_A_LAYER, case_of
from serving_session import Session, about
from torch import Tensor, nn

from fastlora import segmented_ops
from fastlora.adapters.pool import Reach
from fastlora.bench import measuring
from fastlora.bench.measuring import Step
from fastlora.bench.providers import DecoderLayer
from fastlora.bench.shapes import NAMES, RANK
from fastlora.serving.linears import RowsOfTokens

# How a decode step runs: as the engine has it; likewise, but each launch after the one before; and
# with PyTorch's frozen products, as on other devices than Hopper's, where shrinks have a stream.
VARIANTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "fastlora": nullcontext,
    "fastlora-in-turn": functools.partial(mock.patch.object, segmented_ops, "OVERLAPS", False),
    "fastlora-added": functools.partial(mock.patch.object, segmented_ops, "DECODE_GEMM_ROWS", 0),
}
PEFT_ADAPTERS = 16  # at most, in a layer beside peft
TARGETS, ADAPTERS_OF_TARGETS = ("q_proj", "v_proj"), 16
_NEVER = 1 << 30  # rows


def measure_decode(session: Session, served: Served, slots: Sequence[int]) -> None:
    """Measure a decode step of all linears and the head in one graph, beside the base's."""
    for count in session.sizes.decode_rows:
        inputs, pool = served.inputs(count), session.pool()
        base = served.step(inputs, inputs[0], None, None)
        steps: dict[Any, Captured] = {"frozen": session.capture(base, pool)}
        columns: dict[Any, dict[str, Any]] = {}
        distincts = [distinct for distinct, rows in session.sizes.decode if rows == count]
        for (variant, context), distinct in itertools.product(VARIANTS.items(), distincts):
            rows = Rows(count, served.pool)
            row = about(served.model, case_of("decode", distinct), count, variant)
            eager = served.step(inputs, inputs[0], rows, rows)
            with context():
                step = session.capture(eager, pool)
                row["host_us"] = session.host_us(eager)
            requests = in_turns(slots[:distinct], count)
            if session.checked(served, step, [(rows, requests)], inputs, row):
                steps[variant, distinct], columns[variant, distinct] = step, row
        steps["empty"] = _with_empty_launches(session, served, inputs, pool)
        columns["empty"] = about(served.model, "decode, launches that do nothing", count, "empty")
        timings = session.time({name: step.replay for name, step in steps.items()})
        frozen = timings["frozen"]
        columns["frozen"] = about(served.model, "decode", count, "frozen")
        columns["frozen"]["host_us"] = session.host_us(base)
        for name, timing in timings.items():
            session.add(**columns[name], **measuring.columns(timing, frozen))


def measure_targets(session: Session, served: Served) -> None:
    """Measure a decode step whose adapters have q and v alone, as peft's for Qwen2 by default."""
    slots = served.load("q-and-v", ADAPTERS_OF_TARGETS, RANK, TARGETS)
    targeted = frozenset(
        group.first
        for names, groups in served.groups.items()
        if set(names) & set(TARGETS)
        for group in groups
    )
    count = max(rows for _, rows in session.sizes.decode)
    inputs, pool = served.inputs(count), session.pool()
    rows, requests = Rows(count, served.pool), in_turns(slots, count)
    base = served.step(inputs, inputs[0], None, None)
    steps: dict[str, Captured] = {"frozen": session.capture(base, pool)}
    columns: dict[str, dict[str, Any]] = {}
    # Of a pool that has only these; and of one in which others have targeted all linears.
    narrow = Reach(served.pool.reach.max_rank, targeted)
    for provider, reach in (("fastlora", narrow), ("fastlora-all", served.pool.reach)):
        with mock.patch.object(served.pool, "reach", reach):
            step = session.capture(served.step(inputs, inputs[0], rows, rows), pool)
        case = case_of("decode of q and v", len(slots))
        row = columns[provider] = about(served.model, case, count, provider)
        if session.checked(served, step, [(rows, requests)], inputs, row):
            steps[provider] = step
    timings = session.time({name: step.replay for name, step in steps.items()})
    for provider in columns.keys() & timings.keys():
        found = measuring.columns(timings[provider], timings["frozen"])
        session.add(**columns[provider], **found)


def _with_empty_launches(
    session: Session, served: Served, inputs: Sequence[Tensor], pool: Any
) -> Captured:
    """Capture a decode step whose adapters launch as often, and do nothing."""
    count = len(inputs[0])
    rows = Rows(count, served.pool)
    with (
        mock.patch.object(segmented_ops, "OVERLAPS", False),
        mock.patch.object(segmented_ops, "DECODE_GEMM_ROWS", 0),
        mock.patch.object(segmented_ops, "add_adapters", empty_launches),
    ):
        return session.capture(served.step(inputs, inputs[0], rows, rows), pool)


def prefill_providers(tokens: int) -> dict[str, bool]:
    """Return how a prefill runs, the engine's way first: whether terms are added in the product."""
    fuses = tokens >= segmented_ops.PREFILL_ROWS
    return {"fastlora": fuses, f"fastlora-{'added' if fuses else 'fused'}": not fuses}


def measure_prefill(session: Session, served: Served, slots: Sequence[int], tokens: int) -> None:
    """Measure a prefill, in a graph and eagerly, beside the base model's."""
    inputs, pool = served.inputs(tokens), session.pool()
    # Of a prompt only the last token's logits are wanted.
    heads = {distinct: inputs[0][:distinct] for distinct in session.sizes.distinct}
    base = served.step(inputs, inputs[0][:1], None, None)
    steps: dict[Any, Step] = {
        ("graph", 0, ""): session.capture(base, pool).replay,
        ("eager", 0, ""): base,
    }
    columns: dict[Any, dict[str, Any]] = {
        key: about(served.model, "prefill", tokens, "frozen") | {"timer": key[0]} for key in steps
    }
    for (distinct, head), (provider, fuses) in itertools.product(
        heads.items(), prefill_providers(tokens).items()
    ):
        row = about(served.model, case_of("prefill", distinct), tokens, provider)
        rows, logits = Rows(tokens, served.pool), Rows(distinct, served.pool)
        eager = _fusing(served.step(inputs, head, rows, logits), fuses)
        step = session.capture(eager, pool)
        requests = runs_of(slots[:distinct], tokens)
        ends = [(slot, 1) for slot in slots[:distinct]]
        if session.checked(served, step, [(rows, requests), (logits, ends)], inputs, row):
            for timer, timed in (("graph", step.replay), ("eager", eager)):
                steps[timer, distinct, provider] = timed
                columns[timer, distinct, provider] = row | {"timer": timer}
    # A long one takes a sixth of a second: once in a round is enough.
    turns = 1 if tokens > 1024 else max(1, session.sizes.turns // 4)
    timings = session.time(steps, turns)
    for key, timing in timings.items():
        session.add(**columns[key], **measuring.columns(timing, timings[key[0], 0, ""]))


def _fusing(step: Callable[[], list[Tensor]], fuses: bool) -> Callable[[], list[Tensor]]:
    """Return a prefill step whose terms are added in the product, or not, whenever it runs."""

    def run() -> list[Tensor]:
        with mock.patch.object(segmented_ops, "PREFILL_ROWS", 0 if fuses else _NEVER):
            return step()

    return run


def measure_layer(session: Session, served: Served, slots: Sequence[int]) -> None:
    """Measure one decoder layer beside peft's ``adapter_names=``, eagerly."""
    distinct, count = max(pair for pair in session.sizes.decode if pair[0] <= PEFT_ADAPTERS)
    inputs, rows = served.inputs(count), Rows(count, served.pool)
    rows.tell(in_turns(slots[:distinct], count))
    first: Any = served.module.layers[0]
    model = _peft_layer(session, served, distinct)
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
        timings = session.time(steps)
    for name, timing in timings.items():
        row = about(served.model, case_of("decode of one layer", distinct), count, name)
        found = measuring.columns(timing, timings["frozen"], timings["fastlora"])
        session.add("eager", **row, **found)


def _peft_layer(session: Session, served: Served, distinct: int) -> Any:
    """Return peft's model of the first decoder layer, with adapters called a0, a1, ..."""
    from peft import LoraConfig, get_peft_model

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
    return model.to(session.device, session.dtype).eval()


def count_launches(session: Session, served: Served, slots: Sequence[int]) -> None:
    """Count what adapters add to the launches of a decoder layer."""
    if not session.on_gpu:
        session.note("Launches are counted on a GPU (without one: make counts).")
        return
    distinct, count = session.sizes.decode[-1]
    inputs, rows = served.inputs(count), Rows(count, served.pool)
    rows.tell(in_turns(slots[:distinct], count))
    bare = launched(served.step(inputs, None, None, None), session.device)
    ours = launched(served.step(inputs, None, rows, rows), session.device)
    segmented = sum(n for name, n in ours.items() if is_segmented(name))
    others = sum(n for name, n in (ours - bare).items() if not is_own(name))
    for case, found in (
        (LAUNCHES_OF_A_LAYER, math.ceil((segmented + others) / served.model.layers)),
        (LAUNCHES_FOR_METADATA, others),
    ):
        session.add("eager", **about(served.model, case, count, "fastlora"), launches=found)
    session.run.say(f"  all layers: {dict(ours)}; without adapters: {dict(bare)}")
