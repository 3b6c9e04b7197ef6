"""What the linears of the Qwen models launch and move, counted without a GPU, and the limits on it.

    python benchmarks/counts.py         or: make counts

How it is counted, and what the words mean: ``fastlora/bench/counting.py``. What a decode step with
many adapters takes is counted in ``serving_counts.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from serving_counts import serving_table

from fastlora import plans
from fastlora.bench.counting import H200, SEED, Counts, count, h200, record_layer
from fastlora.bench.shapes import (
    DROPOUT,
    GROUPS,
    LORAFUSION,
    MAIN_MODELS,
    MODELS,
    RANK,
    TOKENS,
    Linear,
)
from fastlora.kernels import tile_config

GIB, MIB = 2**30, 2**20

# What LoRAFusion and its own baseline move: DRAM bytes that a profiler measured on an H100 (figure
# source of https://github.com/CentML/lorafusion). In GiB, forward and backward.
LORAFUSION_PUBLISHED = dict(zip(LORAFUSION, (1.258, 1.836, 4.044), strict=True))
TORCH_PUBLISHED = dict(zip(LORAFUSION, (2.008, 2.771, 5.289), strict=True))
# What the fused plan may move, in GiB, without its scratch.
LIMITS = dict(zip(LORAFUSION, (0.52, 0.67, 1.16), strict=True))

# What one decoder layer may launch, forward and backward, GEMMs and reductions included: at 8192
# rows with dropout, and one more in the forward for the seed of each group.
LAUNCH_LIMITS = {"fused": (8, 20), "hybrid": (15, 27)}

# Column: provider.
COLUMNS = {
    "frozen": "frozen",
    "peft": "peft",
    "peft-bf16": "peft-bf16",
    "hybrid": "fastlora-hybrid",
    "fused": "fastlora-fused",
}


def automatic_plans(linears: Mapping[str, Linear], m: int) -> dict[str, dict[str, str]]:
    """Return the plans that fastlora takes by itself on an H200: operation -> names -> plan."""
    groups = {"/".join(names): names for names in GROUPS if set(names) <= set(linears)}
    cuda = torch.device("cuda")
    with h200():
        return {
            operation: {
                group: plans.plan_for(
                    operation,
                    cuda,
                    torch.bfloat16,
                    m,
                    sum(linears[name].n for name in names),
                    linears[names[0]].k,
                    RANK,
                    masked=True,
                    siblings=len(names),
                )
                for group, names in groups.items()
            }
            for operation in ("low_rank_gemm", "input_grad", "shrink", "adapter_grads")
        }


def _described(by_operation: dict[str, dict[str, str]]) -> str:
    """Describe plans in a line; the thin products have none to choose between."""
    parts = []
    for operation in ("low_rank_gemm", "input_grad"):
        by_plan: dict[str, list[str]] = {}
        for names, plan in by_operation[operation].items():
            by_plan.setdefault(plan, []).append(names.replace("_proj", ""))
        chosen = "; ".join(
            plan if len(by_plan) == 1 else f"{plan} for {', '.join(names)}"
            for plan, names in by_plan.items()
        )
        parts.append(f"{operation} {chosen}")
    return ", ".join(parts)


def exceeded(column: str, forward: Counts, backward: Counts) -> str | None:
    """Return by what a decoder layer's launches exceed their limit, or ``None``."""
    seeds = forward.names.get(SEED, 0)
    found = forward.launches - seeds, backward.launches
    limit = LAUNCH_LIMITS[column]
    if found[0] <= limit[0] and found[1] <= limit[1] and seeds <= len(GROUPS):
        return None
    return (
        f"{found[0]} and {found[1]} launches beside {seeds} seeds, at most {limit[0]} and "
        f"{limit[1]} beside {len(GROUPS)}"
    )


def layers_table() -> tuple[list[dict[str, Any]], list[str]]:
    """Print what a decoder layer takes; returns the rows, and where a limit is exceeded."""
    rows, problems = [], []
    print(
        f"The linears of one decoder layer, forward and backward, bf16, r = {RANK}, "
        f"p = {DROPOUT}.\npeft, hybrid and fused have fp32 adapters under autocast; hybrid and "
        "fused are fastlora's plans.\n"
    )
    print(f"{'':13} {'rows':>5} {'':13}" + "".join(f"{name:>11}" for name in COLUMNS))
    for model in MAIN_MODELS:
        linears = MODELS[model].linears
        for m in TOKENS:
            counted = {
                name: record_layer(provider, linears, m).counts
                for name, provider in COLUMNS.items()
            }
            for label, shown in (
                ("GiB", lambda f, b: f"{(f + b).bytes / GIB:.3f}"),
                ("launches f/b", lambda f, b: f"{f.launches}/{b.launches}"),
                ("saved MiB", lambda f, b: f"{f.saved / MIB:.1f}"),
            ):
                first = f"{model:13} {m:5}" if label == "GiB" else " " * 19
                line = "".join(f"{shown(*passes):>11}" for passes in counted.values())
                print(f"{first} {label:13}{line}")
            if m == TOKENS[0]:
                problems += _verdicts(model, counted)
            rows.append(
                {
                    "model": model,
                    "rows": m,
                    "columns": {
                        name: {"forward": _as_json(forward), "backward": _as_json(backward)}
                        for name, (forward, backward) in counted.items()
                    },
                    "automatic_plans": automatic_plans(linears, m),
                }
            )
    with h200():
        measured = len(tile_config.tuned_entries(H200.name))
    print(f"\nPlans that `auto` takes on an H200; the committed table has {measured} entries:")
    by_plans: dict[str, list[str]] = {}
    for row in rows:
        described = _described(row["automatic_plans"])
        by_plans.setdefault(described, []).append(f"{row['model']} ({row['rows']})")
    for described, names in by_plans.items():
        everywhere = len(names) == len(rows)
        print(f"  {'all of these' if everywhere else ', '.join(names)}: {described}")
    return rows, problems


def _verdicts(model: str, counted: dict[str, tuple[Counts, Counts]]) -> list[str]:
    """Print whether the limits on launches are kept; returns those that are not."""
    problems = []
    for column, (of_forward, of_backward) in LAUNCH_LIMITS.items():
        found = exceeded(column, *counted[column])
        limit = f"{column} at most {of_forward} + {len(GROUPS)} seeds / {of_backward}"
        print(f"{'':19} {limit}: {'kept' if found is None else 'EXCEEDED'}")
        if found is not None:
            problems.append(f"{model}, {column}: {found}")
    return problems


def _as_json(counts: Counts) -> dict[str, Any]:
    return asdict(counts) | {"operands": counts.operands}


def lorafusion_table() -> tuple[list[dict[str, Any]], list[str]]:
    """Print the cases of LoRAFusion's paper; returns the rows, and where a limit is exceeded."""
    rows, problems = [], []
    m = TOKENS[0]
    print(
        f"LoRAFusion's cases: {m} rows, bf16 throughout, r = {RANK}, p = {DROPOUT}, forward and "
        "backward, GiB.\nPublished figures are DRAM bytes measured on an H100; counted ones are "
        "operands, each moved once.\n"
    )
    print(f"{'':13}{'torch, peft':>22}{'LoRAFusion':>13}{'fastlora, fused':>37}")
    print(
        f"{'':13}{'published':>11}{'counted':>11}{'published':>13}{'operands':>13}{'scratch':>12}"
        f"{'together':>12}{'limit':>9}  by operands / together"
    )
    for name, shape in LORAFUSION.items():
        forward, backward = count("fastlora-bf16", shape, m, plan="fused")
        fused = forward + backward
        forward, backward = count("peft-bf16", shape, m)
        peft = forward + backward
        kept = fused.operands <= LIMITS[name] * GIB
        verdict = " / ".join(
            "kept" if moved <= LIMITS[name] * GIB else "EXCEEDED"
            for moved in (fused.operands, fused.bytes)
        )
        print(
            f"{name:13}{TORCH_PUBLISHED[name]:11.3f}{peft.bytes / GIB:11.3f}"
            f"{LORAFUSION_PUBLISHED[name]:13.3f}{fused.operands / GIB:13.3f}"
            f"{fused.scratch / GIB:12.3f}{fused.bytes / GIB:12.3f}{LIMITS[name]:9.2f}  {verdict}"
        )
        if not kept:
            problems.append(
                f"{name}: {fused.operands / GIB:.3f} GiB of operands, at most {LIMITS[name]}"
            )
        rows.append(
            {
                "case": name,
                "fused": _as_json(fused),
                "peft-bf16": _as_json(peft),
                "lorafusion_published_gib": LORAFUSION_PUBLISHED[name],
                "torch_published_gib": TORCH_PUBLISHED[name],
                "limit_gib": LIMITS[name],
            }
        )
    return rows, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there as well")
    options = parser.parse_args()
    models, too_many = layers_table()
    print()
    cases, too_much = lorafusion_table()
    print()
    serving, too_slow = serving_table()
    if options.json:
        found = {"models": models, "lorafusion": cases, "serving": serving}
        options.json.write_text(json.dumps(found, indent=1))
    if problems := too_many + too_much + too_slow:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
