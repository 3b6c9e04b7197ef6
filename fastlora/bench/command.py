"""``fastlora bench``: what its arguments ask for, what it prints, and what it writes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.bench import providers, results, shapes
from fastlora.bench.measuring import MIN_ROUNDS
from fastlora.bench.planning import LEVELS, Options
from fastlora.bench.results import Row
from fastlora.bench.session import Session, progress
from fastlora.kernels.tile_config import device_slug

_QUICK = ("counts", "layer")
_COMMAND = "command.txt"  # what measured the rows beside it, for a later report


def run(options: argparse.Namespace) -> int:
    """Run ``fastlora bench``; returns its exit status: 1 if something was refused.

    Args:
        options: as ``arguments.py`` defines them.
            ``options.arguments`` has them as they were given, for the report.
    """
    command = shlex.join(["fastlora", *options.arguments])
    if options.report:
        rows, measured_by = results.read_folder(options.report), options.report / _COMMAND
        if measured_by.exists():
            command = measured_by.read_text(encoding="utf-8").strip()
        return _show(rows, options, options.report, command)
    wanted = _wanted(options)
    device = wanted.device
    slug = device_slug(_device_name(device))
    folder: Path = options.out or Path("runs/bench") / slug
    session = Session(wanted, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _COMMAND).write_text(f"{command}\n", encoding="utf-8")
    with progress(session.ticks) as tick:
        try:
            session.run(tick)
        except KeyboardInterrupt:
            session.notes.append("Interrupted: what is missing was not measured.")
    return _show(session.rows, options, folder, command, session.notes)


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _wanted(options: argparse.Namespace) -> Options:
    """Return the options of the run, with the defaults that depend on the device."""
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device (torch.cuda.is_available() is False)")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    on_gpu = device.type == "cuda"
    models = [shapes.find(name) for name in options.model]
    counted = None
    if not models and not options.shape:
        timed = shapes.MAIN_MODELS if on_gpu else shapes.MAIN_MODELS[:1]
        models, counted = [shapes.MODELS[name] for name in timed], list(shapes.MODELS.values())
    names = None
    if options.provider:
        names = [providers.load(n).name if ":" in n else n for n in options.provider]
    quick: dict[str, Any] = {}
    if options.quick:
        quick = {"rounds": MIN_ROUNDS, "tokens": options.tokens[:1]}
    minutes = 0.5 if options.quick else 8.0
    levels = options.levels or (_QUICK if options.quick else LEVELS)
    if options.shape:
        levels = [*levels, *(["linear"] if "linear" not in levels else [])]
    settings = {
        "models": models,
        "counted": counted,
        "linears": {f"{n} x {k}": shapes.Linear(n, k) for n, k in options.shape},
        "tokens": options.tokens,
        "ranks": options.rank,
        "dropouts": options.dropout,
        "levels": levels,
        "providers": names,
        "device": device,
        "dtype": getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32")),
        "rounds": options.rounds,
        "seconds": 60 * (minutes if options.minutes is None else options.minutes),
        "commit": options.commit,
    }
    return Options(**settings | quick)


def _show(
    rows: Sequence[Row],
    options: argparse.Namespace,
    folder: Path,
    command: str,
    notes: Sequence[str] = (),
) -> int:
    """Print the table and the headline, write the report, compare."""
    lines = results.summaries(rows)
    print(results.table(lines) if lines else results.times(rows))
    print()
    print(results.headline(rows))
    for note in notes:
        print(note)
    refused = [row for row in rows if row.refused]
    for row in refused:
        print(f"REFUSED {row.provider}, {row.level}, {results.describe(row)}: {row.refused}")
    if options.against:
        number, differences = results.compare(results.read_folder(options.against), rows)
        print(f"\n{number} ratios stand in {options.against} too; {len(differences)} disagree")
        for difference in differences:
            print(f"  {difference}")
    print()
    try:
        from fastlora.bench.report import write_report

        written = write_report(rows, folder, command, results.roofs(rows), notes)
        print(f"written to {folder}: {', '.join(path.name for path in written)}, and the rows")
    except RuntimeError as error:  # matplotlib is missing: everything else is there
        print(f"the rows are in {folder}; {error}", file=sys.stderr)
    return 1 if refused else 0
