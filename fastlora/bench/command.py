"""``fastlora bench``: what its arguments ask for, what it prints, and what it writes."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.bench import providers, results, shapes, summary
from fastlora.bench.environment import facts
from fastlora.bench.measuring import MIN_ROUNDS
from fastlora.bench.planning import LEVELS, Options
from fastlora.bench.results import Row
from fastlora.bench.session import Session, progress
from fastlora.kernels.tile_config import device_slug

_QUICK = ("counts", "layer")
_ABOUT = "run.json"  # the command that measured the rows beside it, and what was left out


def run(options: argparse.Namespace) -> int:
    """Run ``fastlora bench``; returns its exit status: 1 if something was refused.

    Args:
        options: as ``arguments.py`` defines them.
            ``options.arguments`` has them as they were given, for the report.
    """
    command = shlex.join(["fastlora", *options.arguments])
    # Now, because it may be the folder that is written to, or not be there.
    earlier = results.read_folder(options.against) if options.against else None
    if options.report:
        rows, about = results.read_folder(options.report), options.report / _ABOUT
        known = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
        command, notes = known.get("command", command), known.get("notes", [])
        return _show(rows, options, earlier, options.report, command, notes)
    wanted = _wanted(options)
    device = wanted.device
    name = facts(device, options.commit)["gpu"] or "cpu"
    folder: Path = options.out or Path("runs/bench") / device_slug(name)
    session = Session(wanted, folder)
    (folder / _ABOUT).unlink(missing_ok=True)  # of an earlier run
    with progress(session.ticks) as tick:
        try:
            session.run(tick)
        except KeyboardInterrupt:
            session.notes.append("Interrupted: what is missing was not measured.")
    write_about(folder, command, session.notes)
    status = _show(session.rows, options, earlier, folder, command, session.notes)
    return 1 if session.failed else status


def write_about(folder: Path, command: str, notes: Sequence[str]) -> None:
    """Write down beside the rows what measured them and what was left out, for a later report."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"command": command, "notes": list(notes)}
    (folder / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


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
    minutes = 0.5 if options.quick else 8.0
    levels = options.levels or (_QUICK if options.quick else LEVELS)
    if options.shape:
        levels = [*levels, *(["linear"] if "linear" not in levels else [])]
    settings: dict[str, Any] = {
        "models": models,
        "counted": counted,
        "linears": {f"{n} x {k}": shapes.Linear(n, k) for n, k in options.shape},
        "tokens": options.tokens[:1] if options.quick else options.tokens,
        "ranks": options.rank,
        "dropouts": options.dropout,
        "levels": levels,
        "providers": names,
        "device": device,
        "dtype": getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32")),
        "rounds": options.rounds or (MIN_ROUNDS if options.quick else 7),
        "seconds": 60 * (minutes if options.minutes is None else options.minutes),
        "commit": options.commit,
    }
    return Options(**settings)


def _show(
    rows: Sequence[Row],
    options: argparse.Namespace,
    earlier: Sequence[Row] | None,
    folder: Path,
    command: str,
    notes: Sequence[str] = (),
) -> int:
    """Print what the rows say, compare, write the page; returns 1 if something was refused."""
    print(summary.report(rows, notes))
    if earlier is not None:
        number, differences = summary.compare(earlier, rows)
        print(f"\n{number} ratios stand in {options.against} too; {len(differences)} disagree")
        for difference in differences:
            print(f"  {difference}")
    print()
    try:
        from fastlora.bench.report import write_report

        written = write_report(rows, folder, command, summary.roofs(rows), notes)
        print(f"written to {folder}: {', '.join(path.name for path in written)}, and the rows")
    except RuntimeError as error:  # matplotlib is missing: everything else is there
        print(f"the rows are in {folder}; {error}", file=sys.stderr)
    return 1 if any(row.refused for row in rows) else 0
