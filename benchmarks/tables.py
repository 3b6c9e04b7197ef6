"""Put the figures of ``benchmarks/results/`` into the READMEs, between their markers.

    python benchmarks/tables.py             or: make bench-tables
    python benchmarks/tables.py --check     fail if a README says something else than the files

No figure of a README is written by hand: a test runs the second line.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastlora.bench import results, summary
from fastlora.bench.results import Row
from fastlora.bench.shapes import GROUPS
from fastlora.bench.summary import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
MARKERS = re.compile(r"<!-- figures: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def rows_of(name: str, device: str = "cpu") -> list[Row]:
    """Return the rows of one file of a device."""
    return results.read(RESULTS / device / f"{name}.csv")


def where(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Return the rows that have these columns."""
    return [r for r in rows if all(getattr(r, name) == value for name, value in wanted.items())]


def span(values: Iterable[float | None], text: str = "{:.2f}") -> str:
    """Write the smallest and the largest of some values."""
    known = sorted(value for value in values if value is not None)
    ends = [text.format(known[0]), text.format(known[-1])]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _over_peft(rows: Sequence[Row], provider: str, column: str) -> list[float]:
    """Return, for each model, a column of a provider over peft's."""
    theirs = {row.setting: getattr(row, column) for row in where(rows, provider="peft")}
    mine = where(rows, provider=provider)
    return [getattr(row, column) / theirs[row.setting] for row in mine]


def _counts() -> list[str]:
    rows = where(rows_of("counts"), dropout=0.1, counted_as="H200")
    moved = [span(_over_peft(rows, f"fastlora-{p}", "moved_gib")) for p in ("fused", "hybrid")]
    launches = [
        span((row.launches for row in where(rows, provider=name)), "{:.0f}")
        for name in ("fastlora-fused", "fastlora-hybrid", "peft")
    ]
    saved = [1 - share for share in _over_peft(rows, "fastlora-fused", "saved_mib")]
    what = (
        f"a decoder layer's linears of {len({row.model for row in rows})} Qwen models, forward and "
        "backward, 8,192 tokens, dropout 0.1, counted from what is launched"
    )
    figure = (
        f"bytes moved: {moved[0]} of peft's by the fused plan, {moved[1]} by the hybrid one; "
        f"launches: {launches[0]} and {launches[1]}, peft {launches[2]}; saved for the backward "
        f"pass: {span(saved, '{:.0%}')} less"
    )
    return [what, figure, "`make bench`", "`counts.csv`"]


def _saved() -> list[str]:
    rows = {(row.case, row.provider): row.saved_mib or 0.0 for row in rows_of("saved_memory")}

    def share(case: str) -> str:
        default = rows[case, "fastlora"] / rows[case, "peft"]
        bf16 = rows[case, "fastlora, bf16 adapters"] / rows[case, "peft, bf16 adapters"]
        return f"{default:.0%} of peft's default and {bf16:.0%} of peft with bf16 adapters"

    what = "bytes that LoRA adds to what one layer of Qwen2.5-0.5B saves, bf16 base, dropout 0.1"
    figure = f"{share('bf16 base')}; under autocast {share('bf16 base, autocast')}"
    return [what, figure, "`make bench-memory`", "`saved_memory.csv`"]


def _step() -> list[str]:
    # How fastlora's time stands to peft's, where the rows have peft's over fastlora's.
    parts = [
        f"{1 / row.over_fastlora:.2f} of peft's time at dropout {row.dropout:g}"
        for row in where(rows_of("cpu_step"), provider="peft")
        if row.over_fastlora
    ]
    what = "forward and backward of SmolLM2-135M on a CPU, 1,024 tokens, in turn with peft"
    return [what, ", ".join(parts), "`make bench-cpu`", "`cpu_step.csv`"]


def _decode() -> list[str]:
    rows = where(rows_of("decode"), case="16 adapters")
    times = {row.provider: row.to_frozen for row in rows}
    what = (
        "a step of generating on a CPU, 16 rows with 16 adapters (8 layers, 256 wide), time over "
        "the base model's"
    )
    figure = (
        f"`Engine` {times['fastlora-engine']}, `adapter_names=` on a patched model "
        f"{times['fastlora']}, peft's {times['peft']}"
    )
    return [what, figure, "`make bench-decode`", "`decode.csv`"]


def _script() -> list[str]:
    (peft,) = where(rows_of("script"), provider="peft")
    assert peft.to_fastlora is not None
    what = (
        "the quickstart from start to end on a CPU (batches of 4 short examples), in turn with peft"
    )
    figure = f"peft takes {peft.to_fastlora} times as long"
    return [what, figure, "`make bench-quickstart`", "`script.csv`"]


def _host() -> list[str]:
    rows = where(rows_of("host"), case="forward", provider="fastlora")
    both = where(rows_of("host"), provider="peft")
    of_peft = {
        case: span(1 / r.over_fastlora for r in where(both, case=case) if r.over_fastlora)
        for case in ("forward", "forward and backward")
    }
    what = "what a layer's linears cost the host, with launches that do nothing"
    figure = (
        f"a forward takes {span((r.over_frozen for r in rows), '{:.1f}')} times a bare "
        f"`nn.Linear`'s and {of_peft['forward']} of peft's; with its backward "
        f"{of_peft['forward and backward']} of peft's"
    )
    return [what, figure, "`make bench-host`", "`host.csv`"]


def _launch() -> list[str]:
    us = {(row.case, row.provider): row.median_us or 0.0 for row in rows_of("launch")}
    forward = [f"{kernel}, {len(g)}" for kernel in ("shrink", "low_rank_gemm") for g in GROUPS]
    direct, jit = (sum(us[name, way] for name in forward) for way in ("direct", "jit"))
    each = [
        span((t for (_, w), t in us.items() if w == way), "{:.0f}") for way in ("direct", "jit")
    ]
    what = (
        "what a launch costs the host, through Triton's C launcher and a driver that does nothing"
    )
    figure = (
        f"{each[0]} us, where Triton takes {each[1]}; the eight of a layer's forward {direct:.0f} "
        f"instead of {jit:.0f}"
    )
    return [what, figure, "`make bench-launch`", "`launch.csv`"]


def numbers() -> str:
    """Return the table of the top README."""
    made = [_counts(), _saved(), _step(), _decode(), _script(), _host(), _launch()]
    return markdown(("what", "figure", "command", "file in benchmarks/results/cpu"), made)


def models(device: str, *levels: str) -> str:
    """Return the table of models, as ``fastlora bench`` prints it, of some levels' rows."""
    rows = [row for level in levels for row in rows_of(level, device)]
    return summary.table(summary.summaries(rows))


def counted() -> str:
    """Return what every provider launches, moves and saves for each model."""
    rows = where(rows_of("counts"), dropout=0.1, counted_as="H200")
    return markdown(
        ("model", "provider", "launches", "moved, GiB", "saved, MiB", "TFLOP"),
        [
            (
                row.model, row.provider, str(row.launches), f"{row.moved_gib:.3f}",
                f"{row.saved_mib:.1f}", f"{row.tflop:.3f}",
            )
            for row in rows
        ],
    )  # fmt: skip


def timed(device: str, level: str) -> str:
    """Return the times of one level: every case and provider, where fastlora loses too."""
    return summary.times(rows_of(level, device))


def made_with(device: str) -> str:
    """Return what the rows of a device were made with."""
    paths = sorted((RESULTS / device).glob("*.csv"))
    rows = [row for path in paths for row in results.read(path)]
    columns = ("gpu", "driver", "cpu", "python", "torch", "triton", "peft", "transformers")
    lines = []
    for column in (*columns, "commit", "date"):
        values = sorted({getattr(row, column) for row in rows} - {""})
        if values:
            lines.append((column, ", ".join(values)))
    return markdown(("what", "made with"), lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "numbers": numbers,
    "counted": counted,
    "cpu-made-with": lambda: made_with("cpu"),
    "cpu-models": lambda: models("cpu", "counts", "layer"),
    "cpu-layer": lambda: timed("cpu", "layer"),
    "cpu-step": lambda: timed("cpu", "step"),
    "cpu-linear": lambda: timed("cpu", "linear"),
    "cpu-operation": lambda: timed("cpu", "operation"),
}


def filled(text: str) -> str:
    """Return a README with its figures.

    Raises:
        ValueError: a marker names figures that there are not.
    """

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in BLOCKS:
            raise ValueError(f"there are no figures {name!r}; there are {', '.join(BLOCKS)}")
        return f"<!-- figures: {name} -->\n{BLOCKS[name]()}\n<!-- end -->"

    return MARKERS.sub(block, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    options = parser.parse_args()
    stale = []
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"{', '.join(stale)}: other figures than in benchmarks/results; make bench-tables")
    print(f"written: {', '.join(stale)}" if stale else "the READMEs say what the files do")


if __name__ == "__main__":
    main()
