"""What was promised of batches with many adapters, and the verdicts on what was measured.

All of Qwen2.5-7B on an H200: shares of the base model's speed (``serving_counts.py`` has them, and
predicts them), the time of a segmented kernel's launch by the bytes that it moves, adapters of
several ranks beside the same bytes of one, and launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from promises import Verdict
from serving_counts import LAUNCHES, PREFILL, PROMISED, PROMISED_MODEL, adapters

from fastlora.bench.results import Row
from fastlora.bench.shapes import RANK

# Whose decode steps are held to what was promised, by how many launches of a layer nothing hides:
# each launch after the one before, or as the engine has them.
PROVIDERS = {8: "fastlora-in-turn", 4: "fastlora"}

# A kernel takes at most what its bytes take at this share of a copy's bandwidth, and a launch.
BANDWIDTH, LAUNCH_US = 0.8, 2.0
COPY = "copy"

# Adapters of several ranks take at most so much longer than the same bytes of one rank.
MIXED = 1.10
MIXED_PROVIDER = "fastlora-mixed"
MIXED_RANKS, ONE_RANK = (8, 24, 32, 64), 32
OF_MIXED = 16  # adapters
OF_EACH_RANK = OF_MIXED // len(MIXED_RANKS)

# At most ``serving_counts.LAUNCHES``, and none.
LAUNCHES_OF_A_LAYER, LAUNCHES_FOR_METADATA = "launches of a decoder layer", "launches for metadata"


def case_of(kind: str, distinct: int) -> str:
    """Name what a row is about."""
    return f"{kind}, {adapters(distinct)}"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Hold rows to what was promised of them; what was not measured has no verdict."""
    mine = [row for row in rows if row.level == "serve" and row.model == PROMISED_MODEL]
    copies = [row for row in rows if row.case == COPY]
    return [*_shares(mine), *_kernels(mine, copies), *_ranks_and_launches(mine)]


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


def _ranks_and_launches(rows: Sequence[Row]) -> Iterable[Verdict]:
    most = {LAUNCHES_OF_A_LAYER: LAUNCHES, LAUNCHES_FOR_METADATA: 0}
    for row in rows:
        if row.provider == MIXED_PROVIDER and row.over_fastlora:
            what = f"{row.case}, {row.tokens} rows: over the same bytes of rank {ONE_RANK}"
            yield Verdict(what, row.over_fastlora, MIXED, True)
        if row.case in most and row.launches is not None:
            yield Verdict(f"{row.model} {row.case}", row.launches, most[row.case], True)
