"""The arguments of ``fastlora bench``, apart from what runs it: ``--help`` imports little."""

from __future__ import annotations

import argparse
from pathlib import Path

_DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fastlora bench``."""
    _add_what(parser.add_argument_group("what to measure"))
    _add_how(parser.add_argument_group("how"))
    _add_results(parser.add_argument_group("results"))


def add_shape(group: argparse._ActionsContainer) -> None:
    """Add ``--shape N K``, which ``fastlora tune`` has too."""
    group.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("N", "K"),
        action="append",
        default=[],
        help="out and in features of a linear; may be repeated",
    )


def _add_what(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help=(
            "a model's name on the hub or folder; only its config is read, and for the Qwen models "
            "that fastlora knows not even that. May be repeated. Default: all known ones are "
            "counted, and those that suit the device are timed"
        ),
    )
    add_shape(what)
    what.add_argument(
        "--tokens", nargs="+", type=int, default=[8192], metavar="M", help="default: 8192"
    )
    what.add_argument("--rank", nargs="+", type=int, default=[16], metavar="R", help="default: 16")
    what.add_argument(
        "--dropout",
        nargs="+",
        type=float,
        default=[0.1, 0.0],
        metavar="P",
        help="lora_dropout (default: 0.1 0)",
    )
    what.add_argument(
        "--levels",
        nargs="+",
        metavar="LEVEL",
        help="of counts, layer, step, linear, operation (default: all that fit)",
    )
    what.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help=(
            "one of peft, peft-bf16, peft-compiled, addmm, fastlora-fused, fastlora-hybrid, "
            "fastlora-bf16, or package.module:name of your own, on PYTHONPATH; may be repeated. "
            "frozen and fastlora are always there"
        ),
    )


def _add_how(how: argparse._ArgumentGroup) -> None:
    how.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    how.add_argument(
        "--dtype", choices=_DTYPES, help="of the frozen weights (default: bfloat16, float32 on cpu)"
    )
    how.add_argument(
        "--rounds", type=int, help="in each of which all take turns (default: 7, quick: 5)"
    )
    how.add_argument("--minutes", type=float, help="what it may take (default: 8)")
    how.add_argument(
        "--quick",
        action="store_true",
        help="counts and layers, the first number of tokens, in under a minute (7B on a CPU: 1.5)",
    )


def _add_results(output: argparse._ArgumentGroup) -> None:
    output.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/bench/<device>")
    output.add_argument(
        "--report", type=Path, metavar="FOLDER", help="measure nothing: show what lies there"
    )
    output.add_argument(
        "--against", type=Path, metavar="FOLDER", help="compare with the run that lies there"
    )
    output.add_argument("--commit", help="what is measured (default: git's HEAD)")
