"""The rows of a run, and the CSV files that they are kept in: units are in their columns' names."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

# A ratio whose rounds differ by more than this share of it is unstable, and never a headline.
STABLE = 0.05

LEVELS = ("roof", "counts", "operation", "linear", "layer", "step", "script")


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times that were taken in turn.

    Attributes:
        value: the median over the rounds.
        low: the smallest of the rounds.
        high: the largest.
    """

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """From the smallest to the largest round, as a share of the median."""
        return (self.high - self.low) / self.value

    @property
    def is_stable(self) -> bool:
        return self.spread <= STABLE

    def agrees_with(self, other: Ratio) -> bool:
        """Return whether the rounds of two runs overlap."""
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        mark = "" if self.is_stable else " ~"
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f}){mark}"


@dataclass(frozen=True)
class Row:
    """One thing measured or counted; a column is empty where it does not apply.

    Attributes:
        date: of the run.
        commit: of fastlora.
        gpu: its name; empty on a CPU.
        driver: of the GPU.
        cpu: its name.
        python: its version, as those of the packages that follow.
        level: one of ``LEVELS`` (at "counts" nothing is timed, at "roof" what the device reaches),
            or "decode", "host", "launch", "saved" or "serve", of the benchmarks that measure those
            alone.
        model: whose shapes these are.
        case: which operation, linear or variant of the step; "layer" for the seven linears.
        count: how often it occurs in a decoder layer.
        n: out features, of a linear.
        k: in features, of a linear.
        tokens: rows of the input.
        rank: of the adapters.
        dropout: ``lora_dropout``.
        dtype: of the frozen weights.
        provider: what computed it.
        timer: "graph" (CUDA graph), "eager", "cpu" (processor time) or "wall".
        rounds: in each of which every provider had its turns.
        median_us: over all turns, forward and backward.
        p20_us: the 20th percentile.
        p80_us: the 80th.
        eager_us: the median without a CUDA graph.
        host_us: what the host takes to launch it all.
        peak_mib: most memory allocated while it ran, beyond what lay there before.
        tokens_per_s: of a training step.
        over_frozen: time over that of the bare frozen linears, the median over the rounds.
        over_frozen_low: in the round where it was smallest.
        over_frozen_high: where it was largest.
        over_fastlora: time over that of the provider ``fastlora``: its speed-up.
        over_fastlora_low: in the round where it was smallest.
        over_fastlora_high: where it was largest.
        counted_as: of counts, on which device: "H200", with its plans and tiles, or "cpu", as it
            is timed there.
        launches: counted: operations and kernels that run on the device.
        moved_gib: counted: every operand of every launch once.
        saved_mib: counted: what autograd keeps for the backward pass.
        tflop: counted: of matrix products.
        gate: the largest error over what is allowed; at most 1 where something was timed.
        refused: why it was not timed.
    """

    date: str = ""
    commit: str = ""
    gpu: str = ""
    driver: str = ""
    cpu: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    peft: str = ""
    transformers: str = ""
    level: str = ""
    model: str = ""
    case: str = ""
    count: int = 1
    n: int | None = None
    k: int | None = None
    tokens: int = 0
    rank: int = 0
    dropout: float = 0.0
    dtype: str = ""
    provider: str = ""
    timer: str = ""
    rounds: int | None = None
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    eager_us: float | None = None
    host_us: float | None = None
    peak_mib: float | None = None
    tokens_per_s: float | None = None
    over_frozen: float | None = None
    over_frozen_low: float | None = None
    over_frozen_high: float | None = None
    over_fastlora: float | None = None
    over_fastlora_low: float | None = None
    over_fastlora_high: float | None = None
    counted_as: str = ""
    launches: int | None = None
    moved_gib: float | None = None
    saved_mib: float | None = None
    tflop: float | None = None
    gate: float | None = None
    refused: str = ""

    @property
    def setting(self) -> tuple[Any, ...]:
        """What two providers must share to be compared."""
        return (self.model, self.tokens, self.rank, self.dropout, self.dtype)

    @property
    def key(self) -> tuple[Any, ...]:
        """What two runs must share for this row to be the same."""
        return (self.level, *self.setting, self.case, self.provider)

    @property
    def to_frozen(self) -> Ratio | None:
        return _ratio(self.over_frozen, self.over_frozen_low, self.over_frozen_high)

    @property
    def to_fastlora(self) -> Ratio | None:
        return _ratio(self.over_fastlora, self.over_fastlora_low, self.over_fastlora_high)

    @property
    def is_stable(self) -> bool:
        """Whether every ratio of the row stays within ``STABLE``."""
        return all(r.is_stable for r in (self.to_frozen, self.to_fastlora) if r is not None)


def _ratio(value: float | None, low: float | None, high: float | None) -> Ratio | None:
    if value is None or low is None or high is None:
        return None
    return Ratio(value, low, high)


COLUMNS = [one.name for one in fields(Row)]


def writer(path: Path) -> Callable[[Row], None]:
    """Open a CSV file; returns a function that writes one row, so that a cut run keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")

    def write(row: Row) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([_cell(getattr(row, c)) for c in COLUMNS])
        with path.open("a", encoding="utf-8") as file:
            file.write(line.getvalue())

    return write


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a CSV file."""
    write = writer(path)
    for row in rows:
        write(row)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """Read the rows of a CSV file that ``writer`` wrote.

    Raises:
        ValueError: the file has no such columns.
        OSError: it cannot be read.
    """
    hints = get_type_hints(Row)
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        unknown = set(table.fieldnames or ()) - set(COLUMNS)
        if unknown or "provider" not in (table.fieldnames or ()):
            raise ValueError(
                f"{path} is not a file of `fastlora bench`: columns {table.fieldnames}"
            )
        rows = []
        for record in table:
            try:
                cells = {name: _parsed(hints[name], text) for name, text in record.items() if text}
            except (KeyError, ValueError) as error:
                raise ValueError(f"{path}, line {table.line_num}: {error!r}") from error
            rows.append(Row(**cells))
        return rows


def read_folder(folder: Path) -> list[Row]:
    """Read all rows that a run has written into a folder.

    Raises:
        ValueError: there are none, or a file is of another kind.
    """
    paths = [folder / f"{level}.csv" for level in LEVELS]
    rows = [row for path in paths if path.exists() for row in read(path)]
    if not rows:
        raise ValueError(f"{folder} holds no results of `fastlora bench`")
    return rows


def _parsed(hint: Any, text: str) -> Any:
    for kind in (int, float):
        if hint in (kind, kind | None):
            return kind(text)
    return text


def describe(row: Row) -> str:
    """Name what a row is about."""
    parts = [f"{row.model} {row.case}".strip()]
    if row.tokens:
        parts += [f"{row.tokens:,} tokens", f"rank {row.rank}", f"dropout {row.dropout:g}"]
    return ", ".join(parts)


def is_ours(provider: str) -> bool:
    """Return whether a provider is fastlora itself, held to a plan or not."""
    return provider.startswith("fastlora")
