"""What the rows of a run say: the table of models, the headline, two runs compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastlora.bench.results import LEVELS, STABLE, Ratio, Row, describe, is_ours


@dataclass(frozen=True)
class Summary:
    """One line of the table of a model: its decoder layer's linears, forward and backward.

    Attributes:
        model: whose.
        tokens: rows of the input.
        rank: of the adapters.
        dropout: ``lora_dropout``.
        dtype: of the frozen weights.
        over_frozen: time over the bare frozen linears'.
        over_peft: speed-up over peft's default.
        over_peft_bf16: over peft with adapters in the base's dtype.
        over_best: over the fastest other provider.
        best: its name.
        memory_saved: share of peft's memory that is saved.
        memory: which memory that is: the "peak" as it was measured, or what is saved for the
            backward pass as it was "counted".
        bytes_over_peft: bytes moved through memory over peft's, counted.
    """

    model: str
    tokens: int
    rank: int
    dropout: float
    dtype: str
    over_frozen: Ratio | None = None
    over_peft: Ratio | None = None
    over_peft_bf16: Ratio | None = None
    over_best: Ratio | None = None
    best: str = ""
    memory_saved: float | None = None
    memory: str = ""
    bytes_over_peft: float | None = None

    @property
    def is_stable(self) -> bool:
        ratios = (self.over_frozen, self.over_peft, self.over_peft_bf16, self.over_best)
        return all(ratio.is_stable for ratio in ratios if ratio is not None)


HEADINGS = (
    "model",
    "tokens",
    "rank",
    "dropout",
    "time / bare frozen linears",
    "speed-up over peft",
    "over peft bf16",
    "over the best other",
    "memory saved",
    "bytes moved / peft's",
)


def summaries(rows: Sequence[Row], ours: str = "fastlora") -> list[Summary]:
    """Return a line for every setting of a decoder layer that was timed or counted."""
    found = []
    for setting in dict.fromkeys(row.setting for row in rows if row.case == "layer"):
        here = [row for row in rows if row.setting == setting and row.case == "layer"]
        timed = {row.provider: row for row in here if row.level == "layer" and row.median_us}
        counted = {row.provider: row for row in here if row.level == "counts"}
        found.append(
            dataclasses.replace(
                Summary(*setting),
                **_of_timings(timed, ours),
                **_of_memory(timed, counted, ours),
            )
        )
    return found


def others(timed: dict[str, Row]) -> dict[str, Ratio]:
    """Return how much slower than fastlora every other provider is, the bare linears left out."""
    return {
        name: row.to_fastlora
        for name, row in timed.items()
        if row.to_fastlora is not None and name != "frozen" and not is_ours(name)
    }


def _of_timings(timed: dict[str, Row], ours: str) -> dict[str, Any]:
    if ours not in timed:
        return {}
    slower = others(timed)
    best = min(slower, key=lambda name: slower[name].value) if slower else ""
    return {
        "over_frozen": timed[ours].to_frozen,
        "over_peft": slower.get("peft"),
        "over_peft_bf16": slower.get("peft-bf16"),
        "over_best": slower.get(best),
        "best": best,
    }


def _of_memory(timed: dict[str, Row], counted: dict[str, Row], ours: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for rows, column, memory in ((counted, "saved_mib", "counted"), (timed, "peak_mib", "peak")):
        if ours in rows and "peft" in rows:
            mine, theirs = getattr(rows[ours], column), getattr(rows["peft"], column)
            if mine is not None and theirs:
                result |= {"memory_saved": 1 - mine / theirs, "memory": memory}
    if ours in counted and "peft" in counted:
        mine, theirs = counted[ours].moved_gib, counted["peft"].moved_gib
        if mine is not None and theirs:
            result["bytes_over_peft"] = mine / theirs
    return result


def table(lines: Sequence[Summary]) -> str:
    """Return the table of models, as Markdown that is also readable as it is."""
    return markdown(HEADINGS, [_cells(line) for line in lines])


def times(rows: Sequence[Row]) -> str:
    """Return a table of everything that was timed, or refused, one line a row."""
    return markdown(
        ("model", "case", "tokens", "dropout", "provider", "ms", "/ frozen", "/ fastlora"),
        [
            (
                row.model,
                row.case,
                f"{row.tokens:,}",
                f"{row.dropout:g}",
                row.provider,
                "refused" if row.refused else f"{(row.median_us or 0.0) / 1e3:.2f}",
                str(row.to_frozen or ""),
                str(row.to_fastlora or ""),
            )
            for row in rows
            if row.level not in ("counts", "roof") and (row.median_us or row.refused)
        ],
    )


def _cells(line: Summary) -> list[str]:
    def shown(value: Any, text: str) -> str:
        return "" if value is None else text

    return [
        line.model,
        f"{line.tokens:,}",
        str(line.rank),
        f"{line.dropout:g}",
        shown(line.over_frozen, str(line.over_frozen)),
        shown(line.over_peft, str(line.over_peft)),
        shown(line.over_peft_bf16, str(line.over_peft_bf16)),
        shown(line.over_best, f"{line.over_best} {line.best}"),
        shown(line.memory_saved, f"{line.memory_saved or 0.0:.0%} ({line.memory})"),
        shown(line.bytes_over_peft, f"{line.bytes_over_peft or 0.0:.2f}"),
    ]


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up."""
    cells = [list(headings), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


@dataclass(frozen=True)
class Roofs:
    """What a device reaches where nothing else is in the way.

    Attributes:
        name: of the device.
        bytes_per_s: of copying, what is read and what is written together.
        flops_per_s: of a large matrix product.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float


def roofs(rows: Sequence[Row]) -> Roofs | None:
    """Return the roofs that a run has measured, if it has."""
    found = {row.case: row for row in rows if row.level == "roof" and row.median_us}
    if not {"copy", "product"} <= set(found):
        return None
    copy, product = found["copy"], found["product"]
    bytes_moved, flops = 2**30 * (copy.moved_gib or 0.0), 1e12 * (product.tflop or 0.0)
    seconds = [(row.median_us or 0.0) / 1e6 for row in (copy, product)]
    return Roofs(copy.gpu or copy.cpu, bytes_moved / seconds[0], flops / seconds[1])


def verdicts(rows: Sequence[Row]) -> Iterator[tuple[str, Row, Ratio]]:
    """Yield for everything that was timed whether fastlora "wins", is "even", or "loses".

    Against the fastest other provider of the same case; "even" where the rounds lie on both sides
    of 1, or nothing can be said: "unstable".
    """
    timed = [row for row in rows if row.level not in ("counts", "roof") and row.median_us]
    for case in dict.fromkeys((row.level, row.setting, row.case) for row in timed):
        here = {r.provider: r for r in timed if (r.level, r.setting, r.case) == case}
        slower = others(here)
        if "fastlora" not in here or not slower:
            continue
        best = min(slower, key=lambda name: slower[name].value)
        ratio = slower[best]
        if not ratio.is_stable:
            verdict = "unstable"
        elif ratio.low > 1:
            verdict = "wins"
        else:
            verdict = "loses" if ratio.high < 1 else "even"
        yield verdict, here[best], ratio


def headline(rows: Sequence[Row]) -> str:
    """Say in a few lines what fastlora gains over the fastest other, and where it loses."""
    found = list(verdicts(rows))
    lines = _counted_lines(rows)
    if not found:
        return "\n".join([*lines, "Nothing was timed against another provider."])
    stable = [one for one in found if one[0] != "unstable"]
    for level in LEVELS:
        of_level = [one for one in stable if one[1].level == level]
        if of_level:
            values = sorted(ratio.value for _, _, ratio in of_level)
            number = sum(verdict == "wins" for verdict, _, _ in of_level)
            lines.append(
                f"{level}: {values[0]:.2f} to {values[-1]:.2f} times as fast as the fastest other "
                f"provider; faster in {number} of {len(of_level)} cases"
            )
    unstable = len(found) - len(stable)
    if unstable:
        lines.append(
            f"{unstable} of {len(found)} comparisons are unstable (rounds more than {STABLE:.0%} "
            "apart) and are not in these lines"
        )
    for word, text in (("loses", "slower"), ("even", "neither faster nor slower")):
        for verdict, row, ratio in stable:
            if verdict == word:
                lines.append(f"{text} than {row.provider}: {describe(row)}, {ratio}")
    return "\n".join(lines)


def _counted_lines(rows: Sequence[Row]) -> list[str]:
    """Say what was counted of layers as on an H200."""
    counted = [row for row in rows if row.counted_as == "H200"]
    lines = [line for line in summaries(counted) if line.bytes_over_peft is not None]
    if not lines:
        return []
    moved = sorted(line.bytes_over_peft or 0.0 for line in lines)
    saved = sorted(line.memory_saved or 0.0 for line in lines if line.memory == "counted")
    text = f"counts: a layer moves {moved[0]:.2f} to {moved[-1]:.2f} of peft's bytes"
    if saved:
        text += f" and keeps {saved[0]:.0%} to {saved[-1]:.0%} less for its backward pass"
    return [f"{text}, with the plans of an H200"]


@dataclass(frozen=True)
class Difference:
    """A ratio that two runs do not agree on."""

    row: Row
    column: str
    before: Ratio
    after: Ratio

    def __str__(self) -> str:
        what = f"{self.row.level}: {describe(self.row)}, {self.row.provider}"
        return f"{what}, {self.column}: {self.before} before, {self.after} now"


def compare(before: Sequence[Row], after: Sequence[Row]) -> tuple[int, list[Difference]]:
    """Compare the ratios of two runs.

    Returns:
        How many ratios stand in both, and those whose rounds do not overlap.
    """
    earlier = {row.key: row for row in before}
    number, differences = 0, []
    for row in after:
        other = earlier.get(row.key)
        for column, name in (("over_frozen", "to_frozen"), ("over_fastlora", "to_fastlora")):
            then, now = (getattr(each, name, None) for each in (other, row))
            # A provider's ratio to itself says nothing.
            if then is None or now is None or then.low == then.high == 1.0:
                continue
            number += 1
            if not now.agrees_with(then):
                differences.append(Difference(row, column, then, now))
    return number, differences


def report(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Return all that a run has to say: its table, the headline, what was left out and refused."""
    lines = summaries(rows)
    refused = [
        f"REFUSED {row.provider}, {row.level}, {describe(row)}: {row.refused}"
        for row in rows
        if row.refused
    ]
    first = table(lines) if lines else times(rows)
    return "\n".join([first, "", headline(rows), *notes, *refused])
