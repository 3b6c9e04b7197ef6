"""Measure which plan and which tile is fastest for each shape, and write it where calls look.

The table that ``tune`` writes is read by ``plans.py`` (fused or hybrid) and by
``kernels/tile_config.py`` (tiles). Only shapes that were measured change; everything else keeps the
rule that is safe anywhere.

Linears that share their input are computed together (``siblings.py``), so they are also measured
together: what is best for q, k and v at once is not what is best for each.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import dropout, plans
from fastlora.discovery import sibling_names
from fastlora.kernels.tile_config import (
    DeviceLimits,
    TileConfig,
    TileKey,
    default_tile,
    device_limits,
    device_slug,
    installed_triton,
    measured_with,
    read_table,
    tile_key,
    user_cache,
)
from fastlora.timing import measure_us

Progress = Callable[[str], None]
Timings = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class LinearShape:
    """A linear layer to tune for: ``[N, K]`` is the shape of its weight."""

    n: int
    k: int

    @property
    def ns(self) -> tuple[int, ...]:
        """The out features, as a group of one has them."""
        return (self.n,)


@dataclass(frozen=True)
class GroupShape:
    """Linears that share their input: ``[N_g, K]`` are the shapes of their weights."""

    ns: tuple[int, ...]
    k: int


Shape = LinearShape | GroupShape


def gemm_candidates(limits: DeviceLimits, default: TileConfig) -> Iterator[TileConfig]:
    """Yield the default tile and others worth trying for the fused GEMM in half precision."""
    yield default
    tiles = [
        TileConfig(128, 256, 64, parts=2, num_warps=8, num_stages=4),
        TileConfig(128, 256, 64, parts=2, num_warps=8, num_stages=3),
        TileConfig(128, 256, 64, parts=4, num_warps=8, num_stages=4),
        TileConfig(256, 128, 64, parts=2, num_warps=8, num_stages=4),
        TileConfig(128, 128, 64, num_warps=8, num_stages=4),
        TileConfig(128, 128, 64, num_warps=4, num_stages=4),
        TileConfig(128, 128, 64, num_warps=8, num_stages=3),
        TileConfig(128, 128, 32, num_warps=8, num_stages=3),
        TileConfig(64, 256, 64, parts=2, num_warps=4, num_stages=4),
        TileConfig(64, 128, 64, num_warps=4, num_stages=4),
    ]
    # 256-wide tiles keep 128 fp32 sums in each thread; they are for the tensor cores that read
    # their operands from shared memory.
    largest = 128 * 256 if limits.capability == 90 else 128 * 128
    for tile in tiles:
        if tile.block_m * tile.block_n <= largest and fits(tile, limits):
            yield tile


def fits(tile: TileConfig, limits: DeviceLimits, itemsize: int = 2) -> bool:
    """Return whether a GEMM's pipeline and the staging of its store fit in shared memory."""
    pipeline = tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k
    staging = tile.block_m * tile.block_n // tile.parts
    return (pipeline + staging) * itemsize <= limits.shared_bytes


def thin_candidates(operation: str, default: TileConfig) -> Iterator[TileConfig]:
    """Yield the default tile of a thin product and variants of each of its fields."""
    yield default
    field = "block_k" if operation == "shrink" else "block_n"
    for splits in sorted({1, default.splits * 2, default.splits * 4} - {default.splits}):
        yield replace(default, splits=splits)
    for num_stages in {2, 4} - {default.num_stages}:
        yield replace(default, num_stages=num_stages)
    yield replace(default, num_warps=8 if default.num_warps == 4 else 4)
    for block_m in (default.block_m // 2, default.block_m * 2):
        if block_m >= 16:
            yield replace(default, block_m=block_m)
    for width in (getattr(default, field) // 2, getattr(default, field) * 2):
        if width >= 16:
            yield replace(default, **{field: width})


def _fastest(
    functions: Timings, device: torch.device, rounds: int, say: Progress
) -> tuple[str, float]:
    """Time what runs at all and return the name and the median of the fastest."""
    working, refused = {}, None
    for name, function in functions.items():
        try:
            function()
        except Exception as error:  # a tile that a compiler or a device refuses is not a candidate
            say(f"    {name}: {type(error).__name__}")
            refused = error
            continue
        working[name] = function
    if not working:
        raise ValueError(f"no tile runs on {device}; the last one said: {refused!r}")
    taken = measure_us(working, device, rounds)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    name = min(medians, key=medians.__getitem__)
    return name, medians[name]


class _Operands:
    """Random operands of a group of linears, as the operators get them."""

    def __init__(
        self, shape: Shape, m: int, r: int, dtype: torch.dtype, p: float, device: torch.device
    ) -> None:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, device=device).to(dtype)

        ns, k = shape.ns, shape.k
        self.x, self.dys = draw(m, k), [draw(m, n) for n in ns]
        self.weights = [draw(n, k) * k**-0.5 for n in ns]
        self.lora_as, self.lora_bs = [draw(r, k) * k**-0.5 for _ in ns], [draw(n, r) for n in ns]
        self.h, self.gains, self.biases = draw(len(ns), m, r), [1.5] * len(ns), [None] * len(ns)
        self.threshold = dropout.threshold(p)
        self.seed = torch.ones((), dtype=torch.int64, device=device) if p else None
        # Their values do not matter to the time, and drawing them by PyTorch would take longer.
        bits = torch.full((len(ns), m, -(-k // 8)), 255, dtype=torch.uint8, device=device)
        self.mask = bits if p else None


def tune(
    model: nn.Module | None = None,
    *,
    shapes: Sequence[Shape] = (),
    tokens: Sequence[int] = (8192, 2048),
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    dropout_p: float = 0.1,
    device: torch.device | str = "cuda",
    rounds: int = 10,
    out: Path | None = None,
    progress: Progress = print,
) -> Path:
    """Measure plans and tiles on this device and write them to the user's cache.

    Adapters are measured in the dtype of the base, without a bias. What a committed table says of a
    shape stands above the cache.

    Args:
        model: its linear layers, and the groups of them that share their input, are the shapes to
            tune for, with or without peft; it may be on the meta device. The output layer
            (``lm_head``) is left out.
        shapes: more shapes, or all of them without a model.
        tokens: rows of a batch to tune for; a call uses the next larger one.
        rank: of the adapters.
        dtype: of the frozen weights: bf16 or fp16.
        dropout_p: of the adapters.
        device: a CUDA device (or the CPU where Triton is interpreted, which measures nothing).
        rounds: how often each candidate is timed; medians are compared.
        out: the table to write or extend; by default the one in the user's cache.
        progress: called with a line of text now and then.

    Returns:
        The file that was written. It is written after every shape, so that an interrupted run
        leaves what it has measured.

    Raises:
        ValueError: there is nothing to tune, a size is not positive (or below the 64 rows from
            which on kernels are used), or the kernels do not run on this device.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if reason := plans.unsupported_reason(device, dtype, rank):
        raise ValueError(f"nothing to tune on {device}: {reason}")
    failed = plans.check_device(device)
    if "shrink" in failed or "adapter_grads" in failed:
        raise ValueError(f"nothing to tune on {device}: {plans.describe(device)}")
    wanted = _checked_shapes(model, shapes, tokens, device)
    limits = device_limits(device)
    path = out or user_cache() / f"{device_slug(limits.name)}.json"
    # What another Triton was measured with is not carried into a table that names this one.
    current = path.exists() and measured_with(path) in (None, installed_triton())
    entries = dict(read_table(path)) if current else {}
    total = len(wanted) * len(tokens)
    for number, (shape, m) in enumerate(((s, m) for s in wanted for m in tokens), start=1):
        start = time.perf_counter()
        found = tune_shape(shape, m, rank, dtype, dropout_p, device, rounds, progress)
        entries.update({TileKey(**entry["key"]): entry for entry in found})
        _write(path, limits, entries)
        chosen = ", ".join(f"{e['key']['operation']} {e['plan']}" for e in found if "plan" in e)
        n = "+".join(map(str, shape.ns))
        progress(
            f"[{number}/{total}] N={n} K={shape.k} M={m} r={rank}: {chosen} "
            f"({time.perf_counter() - start:.0f} s)"
        )
    plans.forget_measurements()
    return path


def _checked_shapes(
    model: nn.Module | None,
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    device: torch.device,
) -> list[Shape]:
    """Return the distinct shapes to tune for, or raise if there is nothing that can be tuned."""
    of_model: list[Shape] = []
    if model is not None:
        of_model = [*linear_shapes(model), *group_shapes(model)]
    wanted = list(dict.fromkeys([*of_model, *shapes]))
    if not wanted:
        raise ValueError("nothing to tune: give a model with linear layers, or shapes")
    if wrong := [shape for shape in wanted if min(*shape.ns, shape.k) < 1]:
        raise ValueError(f"out and in features must be positive, got {wrong[0]}")
    if min(tokens) < plans.MIN_ROWS and device.type == "cuda":
        raise ValueError(
            f"batches of less than {plans.MIN_ROWS} tokens are not tuned (they go to cuBLAS), got "
            f"{min(tokens)}"
        )
    return wanted


def linear_shapes(model: nn.Module) -> list[LinearShape]:
    """Return the distinct shapes of a model's linear layers, adapters and ``lm_head`` left out."""
    shapes: dict[LinearShape, None] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if isinstance(module, nn.Linear) and not {"lora_A", "lora_B", "lm_head"} & set(parts):
            shapes[LinearShape(module.out_features, module.in_features)] = None
    return list(shapes)


def group_shapes(model: nn.Module) -> list[GroupShape]:
    """Return the distinct groups of a model's linear layers that share their input.

    As ``siblings.py`` forms them: of at most four.
    """
    from fastlora.kernels.low_rank_gemm import MAX_SIBLINGS

    groups: dict[GroupShape, None] = {}
    for parent in model.modules():
        linears: dict[str, nn.Linear] = {}
        for name, child in parent.named_children():
            linear = getattr(child, "base_layer", child)  # peft's layers keep theirs inside
            if isinstance(linear, nn.Linear):
                linears[name] = linear
        for names in sibling_names(parent, linears) if len(linears) > 1 else ():
            for start in range(0, len(names), MAX_SIBLINGS):
                members = [linears[name] for name in names[start : start + MAX_SIBLINGS]]
                if len(members) > 1 and len({member.in_features for member in members}) == 1:
                    ns = tuple(member.out_features for member in members)
                    groups[GroupShape(ns, members[0].in_features)] = None
    return list(groups)


def tune_shape(
    shape: Shape,
    m: int,
    r: int,
    dtype: torch.dtype,
    dropout_p: float,
    device: torch.device,
    rounds: int,
    say: Progress,
) -> list[dict[str, Any]]:
    """Measure a linear or a group with ``m`` rows.

    Returns:
        Table entries for its five operations.
    """
    operands = _Operands(shape, m, r, dtype, dropout_p, device)
    sizes = (dtype, m, sum(shape.ns), shape.k, r)
    siblings = len(shape.ns)
    limits = device_limits(device)
    entries: list[dict[str, Any]] = []
    for operation, run in _thin_products(operands, dtype).items():
        default = default_tile(operation, limits, *sizes, siblings=siblings)
        tiles = {str(tile): tile for tile in thin_candidates(operation, default)}
        runs = {name: _bind(run, tile) for name, tile in tiles.items()}
        best, best_us = _fastest(runs, device, rounds, say)
        key = asdict(tile_key(operation, *sizes, siblings))
        entries.append({"key": key, "tile": tiles[best].as_dict(), "us": round(best_us, 2)})
    failed = plans.check_device(device)
    for kernel in ("low_rank_gemm", "low_rank_term"):
        if kernel in failed:  # then there is no choice of a plan
            say(f"    the frozen products are not tuned, {kernel}: {failed[kernel]}")
            return entries
    for operation, (fused, hybrid, base) in _gemms(operands, dtype).items():
        default = default_tile(operation, limits, *sizes, siblings=siblings)
        tiles = {str(tile): tile for tile in gemm_candidates(limits, default)}
        runs = {name: _bind(fused, tile) for name, tile in tiles.items()}
        best, _ = _fastest(runs, device, rounds, say)
        # The winner runs again beside the other plan, in turn: a ratio is only fair in one run.
        taken = measure_us({"fused": runs[best], "hybrid": hybrid, "base": base}, device, rounds)
        us = {name: round(statistics.median(values), 2) for name, values in taken.items()}
        entries.append(
            {
                "key": asdict(tile_key(operation, *sizes, siblings)),
                "tile": tiles[best].as_dict(),
                "plan": plans.FUSED if us["fused"] < us["hybrid"] else plans.HYBRID,
                "fused_us": us["fused"],
                "hybrid_us": us["hybrid"],
                "base_us": us["base"],  # the frozen products alone, by cuBLAS
            }
        )
    return entries


def _bind(run: Callable[[TileConfig], object], tile: TileConfig) -> Callable[[], object]:
    return lambda: run(tile)


def _thin_products(o: _Operands, dtype: torch.dtype) -> dict[str, Callable[[TileConfig], object]]:
    from fastlora.kernels.adapter_grads import adapter_grads
    from fastlora.kernels.input_pass import input_pass
    from fastlora.kernels.shrink import shrink

    masked = o.seed is not None
    das = [torch.empty_like(a) for a in o.lora_as]

    def run_shrink(tile: TileConfig) -> object:
        options = {"rank_dtype": dtype, "return_bits": masked, "config": tile}
        return shrink(o.x, o.lora_as, o.seed, o.threshold, **options)  # type: ignore[arg-type]

    def run_output_pass(tile: TileConfig) -> object:
        options = {"rank_dtype": dtype, "grad_dtype": torch.float32, "output_config": tile}
        operands = (o.dys, None, o.h, o.lora_bs, None, o.gains)
        return adapter_grads(*operands, **options)  # type: ignore[arg-type]

    def run_input_pass(tile: TileConfig) -> None:
        input_pass(o.x, o.h, das, o.mask, o.threshold, rank_dtype=dtype, config=tile)

    return {"shrink": run_shrink, "output_pass": run_output_pass, "input_pass": run_input_pass}


_Forms = tuple[Callable[[TileConfig], object], Callable[[], object], Callable[[], object]]


def _gemms(o: _Operands, dtype: torch.dtype) -> dict[str, _Forms]:
    """Return for each GEMM its fused form, its hybrid form, and the frozen products alone.

    The hybrid forms are those of ``ops.py``: Triton writes the low-rank term, cuBLAS adds to it.
    """
    from fastlora.kernels.low_rank_gemm import input_grad, low_rank_gemm, low_rank_term

    terms = (o.h, o.lora_as, o.mask, o.threshold)
    pairs = list(zip(o.dys, o.weights, strict=True))

    def fused_backward(tile: TileConfig) -> object:
        return input_grad(o.dys, o.weights, *terms, grad_dtype=dtype, config=tile)

    def hybrid_backward() -> object:
        dx = input_grad([], [], *terms, grad_dtype=dtype)
        for dy, weight in pairs:
            dx.addmm_(dy, weight)
        return dx

    def base_backward() -> object:
        dx = torch.mm(*pairs[0])
        for dy, weight in pairs[1:]:
            dx += torch.mm(dy, weight)  # as autograd adds up the gradients of a shared input
        return dx

    def fused_forward(tile: TileConfig) -> object:
        return low_rank_gemm(o.x, o.weights, o.biases, o.h, o.lora_bs, o.gains, config=tile)

    def hybrid_forward() -> object:
        ys = low_rank_term(o.h, o.lora_bs, o.biases, o.gains, dtype=dtype)
        for y, weight in zip(ys, o.weights, strict=True):
            y.addmm_(o.x, weight.t())
        return ys

    def base_forward() -> object:
        return [torch.mm(o.x, weight.t()) for weight in o.weights]

    return {
        "low_rank_gemm": (fused_forward, hybrid_forward, base_forward),
        "input_grad": (fused_backward, hybrid_backward, base_backward),
    }


def _write(path: Path, limits: DeviceLimits, entries: Mapping[TileKey, Mapping[str, Any]]) -> None:
    """Write a table, whole or not at all."""
    import triton

    ordered = sorted(entries.items(), key=lambda item: tuple(asdict(item[0]).values()))
    table = {
        "device": limits.name,
        "capability": limits.capability,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "entries": [entry for _, entry in ordered],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(table, indent=1) + "\n")
    unfinished.replace(path)
