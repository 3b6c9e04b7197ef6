"""The ``fastlora`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import fastlora
from fastlora.bench.arguments import add_arguments as add_bench_arguments
from fastlora.bench.arguments import add_shape

if TYPE_CHECKING:
    from torch import nn

_DTYPES = ("bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.arguments = list(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, OSError, RuntimeError) as error:
        # What a user can put right: a model that is not there, a device that cannot be tuned, too
        # little memory.
        print(f"fastlora {options.command}: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastlora",
        description="LoRA of peft models: trained on fused kernels, and served many at once.",
    )
    parser.add_argument("--version", action="version", version=f"fastlora {fastlora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_tune(commands.add_parser(
        "tune",
        help="measure which plan and tile is fastest on this GPU",
        description=(
            "Measure, for every linear of a model, whether the fused GEMM or cuBLAS is faster on "
            "this GPU, and with which tiles, and remember it for later runs (in "
            "~/.cache/fastlora/tuned). Takes a minute or two for each model. Shapes in a table "
            "that comes with fastlora keep what it says."
        ),
    ))  # fmt: skip
    bench = commands.add_parser(
        "bench",
        help="measure what fastlora gains over peft on this machine",
        description=(
            "Measure LoRA layers, linears, operators and training steps by fastlora, peft and "
            "others, and count what they launch and move. Everything is checked against fp64 "
            "before it is timed, and all take turns. Prints a table; writes report.html, its "
            "figures and all rows as CSV. The exit status is 1 if a provider was refused because "
            "its results are wrong, or it did not run."
        ),
    )
    add_bench_arguments(bench)
    bench.set_defaults(run=_bench)
    _add_doctor(commands.add_parser(
        "doctor",
        help="say what fastlora does on this machine, and what to do about problems",
        description=(
            "Print versions, GPUs, tuned tables and the plans that the layers of a model would "
            "follow, and what to do about each problem. The exit status is 1 if something is "
            "broken."
        ),
    ))  # fmt: skip
    _add_chat(commands.add_parser(
        "chat",
        help="talk to a model and its adapters, and compare what they answer",
        description=(
            "Talk to a model with LoRA adapters. Answers are written as they come, by the first "
            "adapter until /use NAME or /base; /compare asks the base and all adapters in one "
            "batch; /help says what else there is. Questions and commands may come from a pipe, a "
            "line each."
        ),
    ))  # fmt: skip
    return parser


def _bench(options: argparse.Namespace) -> int:
    from fastlora.bench.command import run

    return run(options)


def _add_model(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--model", help="a model's name on the hub or folder; only its config is read"
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=[8192, 2048],
        metavar="M",
        help="tokens of a batch (default: 8192 2048)",
    )
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--dtype", choices=_DTYPES, default=_DTYPES[0], help="of the base weights")
    parser.add_argument("--dropout", type=float, default=0.1, help="lora_dropout (default: 0.1)")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_sizes(parser)
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    import torch

    from fastlora.doctor import examine

    _check_sizes(options)
    report = examine(
        options.model, options.tokens, options.rank, getattr(torch, options.dtype), options.dropout
    )
    print(report)
    return 1 if report.broken else 0


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the base model's name on the hub or folder")
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="adapters to load: folders as peft saves them, or names on the hub",
    )
    parser.add_argument(
        "--adapter-memory",
        default="2GB",
        metavar="SIZE",
        help="of the device for adapters (default: 2GB)",
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=("float32", *_DTYPES), help="of the base weights (default: as they are)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sample at this temperature, 0: do not (default: as the model's own settings say)",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message")
    parser.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> int:
    from fastlora.serving.chat import run

    return run(options)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to tune for (at least one)")
    _add_model(what)
    add_shape(what)
    _add_sizes(parser)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "--rounds", type=int, default=10, help="timings of each candidate (default: 10)"
    )
    parser.add_argument("--out", type=Path, help="the table to write or extend, instead of yours")
    parser.set_defaults(run=_tune)


def _check_sizes(options: argparse.Namespace) -> None:
    if not 1 <= options.rank <= 256 or min(options.tokens) < 1:
        raise ValueError(
            f"rank must lie in [1, 256] and tokens must be positive, got rank {options.rank}, "
            f"tokens {options.tokens}"
        )
    if not 0.0 <= options.dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {options.dropout}")


def _tune(options: argparse.Namespace) -> int:
    import torch

    from fastlora.tuning import LinearShape, tune

    if not options.model and not options.shape:
        raise ValueError("say what to tune for: --model NAME or --shape N K")
    _check_sizes(options)
    if options.rounds < 1:
        raise ValueError(f"rounds must be positive, got {options.rounds}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device (torch.cuda.is_available() is False)")
    path = tune(
        _model_on_meta(options.model) if options.model else None,
        shapes=[LinearShape(n, k) for n, k in options.shape],
        tokens=options.tokens,
        rank=options.rank,
        dtype=getattr(torch, options.dtype),
        dropout_p=options.dropout,
        device=options.device,
        rounds=options.rounds,
        out=options.out,
    )
    print(f"written to {path}")
    return 0


def _model_on_meta(name: str) -> nn.Module:
    """Build a model without its weights: only the shapes of its linears are wanted."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model
