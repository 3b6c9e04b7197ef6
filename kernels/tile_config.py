"""Tiles as data: what a kernel is launched with, which tiles a device can take, and the tuned ones.

    tuned/<device>.json    measured on that device by ``fastlora tune``, committed
    the user's cache       measured by a user, for what the committed tables lack
    default_tile           runs on every supported device, and is not fast on any by design

A table also says which *plan* won (see ``fastlora/plans.py``); here only its tile is read.
Nothing in this file imports triton: plans are looked up on machines that do not have it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

TUNED = Path(__file__).parent / "tuned"
# Rows of a batch are tuned at these sizes. A call takes the nearest one that is not smaller, or the
# largest.
M_BUCKETS = (64, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Segmented operations: up to so many rows of a batch a tile has at most 16.
DECODE_ROWS = 256


@dataclass(frozen=True)
class TileConfig:
    """What a kernel is launched with; a kernel reads the fields it has a use for.

    Attributes:
        block_m: rows of a tile.
        block_n: columns of the output tile, or of the operand that is walked.
        block_k: depth of one step of a GEMM's loop.
        group_m: row blocks that are walked together, for the L2 cache.
        parts: pieces in which a GEMM's tile is finished and stored; more take fewer registers.
        splits: parts of the reduction that run side by side, at least 1.
        num_warps: as in Triton.
        num_stages: likewise; depth of the software pipeline.
        programs: of a grid that shares out its work, for each processor at most.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    group_m: int = 8
    parts: int = 1
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 12

    def as_dict(self) -> dict[str, int]:
        """Return the fields, as a table stores them."""
        return asdict(self)


@dataclass(frozen=True)
class DeviceLimits:
    """What of a device decides over tiles.

    Attributes:
        name: as the driver gives it; tables are filed under it.
        capability: 90 for sm_90; 0 for anything that is not NVIDIA's.
        shared_bytes: shared memory that one program may use.
        processors: number of streaming multiprocessors (compute units).
    """

    name: str
    capability: int
    shared_bytes: int
    processors: int


# Without a device, in the interpreter: small, so that a test needs few programs to be complete.
INTERPRETER = DeviceLimits(name="interpreter", capability=90, shared_bytes=232448, processors=4)


_Cached = TypeVar("_Cached", bound=Callable[..., Any])
_CACHES: list[Any] = []


def cached_by_shape(function: _Cached) -> _Cached:
    """Remember a function's results; ``forget_tiles`` makes it start anew.

    What a launch is made of is worked out once for each shape: doing it at every call costs the
    host as much as the launch.
    """
    cached = functools.lru_cache(maxsize=4096)(function)
    _CACHES.append(cached)
    return cached  # type: ignore[return-value]


def forget_tiles() -> None:
    """Forget devices, tables and everything derived from them: a table was written."""
    for cached in _CACHES:
        cached.cache_clear()


@cached_by_shape
def device_limits(device: torch.device) -> DeviceLimits:
    """Ask the driver once for each device."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    return DeviceLimits(
        name=properties.name,
        capability=10 * properties.major + properties.minor if nvidia else 0,
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", 65536),
        processors=properties.multi_processor_count,
    )


def allows_tf32() -> bool:
    """Return whether fp32 products may be rounded to TF32, however the user said so."""
    matmul = torch.backends.cuda.matmul
    # torch 2.9 brought the first, and 2.13 refuses to read the second once the first was set.
    precision = getattr(matmul, "fp32_precision", None)
    if precision in ("tf32", "ieee"):
        return bool(precision == "tf32")
    return bool(matmul.allow_tf32)


def has_descriptors(limits: DeviceLimits) -> bool:
    """Return whether tiles can be copied by the tensor memory accelerator: Hopper and later."""
    return limits.capability >= 90


def default_tile(
    operation: str,
    limits: DeviceLimits,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    siblings: int = 1,
    wide_rank: bool = False,
    aligned: bool = True,
) -> TileConfig:
    """Return a tile that fits every supported device, and spills next to no registers.

    ``make targets`` compiles them all; where a comment says that something spills, it is what that
    command said of the next larger tile (Triton 3.7). Groups of siblings still spill 8 to 16 bytes
    a thread on sm_89, sm_100 and sm_120, where ptxas keeps to a number of registers that lets more
    programs run at once.

    Args:
        operation: ``"shrink"``, ``"low_rank_gemm"``, ``"input_grad"``, ``"output_pass"`` (dh and dB
            over dy), ``"input_pass"`` (dA over x), ``"segmented_shrink"``, ``"segmented_expand"``,
            ``"segmented_gemm"`` or ``"decode_gemm"``.
        limits: of the device.
        dtype: of the operands of the products.
        m: rows.
        n: out features, of several siblings the sum; 0 where they play no part, as in the masked
            term of ``input_grad`` alone.
        k: in features; likewise, as in ``low_rank_term``.
        r: rank of one sibling; of segmented operations the largest.
        siblings: projections of the same input that share the launch.
        wide_rank: the low-rank term of a half-precision GEMM is fp32.
        aligned: rows start on 16-byte boundaries.
    """
    wide, rank = dtype == torch.float32, padded_rank(r)
    if operation == "low_rank_gemm":
        return _gemm_tile(limits, wide, rank, k, 1, wide_rank, aligned, True, siblings > 1)
    if operation == "input_grad":
        group = siblings > 1
        return _gemm_tile(limits, wide, rank, n, siblings, wide_rank, aligned, False, group)
    if operation in ("shrink", "input_pass"):  # every sibling has an accumulator in each thread
        rank = padded_rank(rank * siblings)
    stages = 2 if wide or rank > 64 or limits.capability == 0 else 3
    if operation == "shrink":
        block_m, block_k, warps = _shrink_block(limits, wide, rank, siblings)
        splits = _splits(limits, -(-m // block_m), k, at_least=512)
        return TileConfig(block_m, 0, block_k, splits=splits, num_warps=warps, num_stages=stages)
    if operation == "output_pass":
        block_m, block_n, warps = _output_pass_block(limits, wide, rank, siblings, aligned)
        splits = _splits(limits, -(-m // block_m), n, at_least=512)
        return TileConfig(block_m, block_n, splits=splits, num_warps=warps, num_stages=stages)
    if operation == "input_pass":
        block_m, block_n, warps = _input_pass_block(limits, wide, rank, siblings)
        splits = _splits(limits, -(-k // block_n), m, at_least=512)
        return TileConfig(block_m, block_n, splits=splits, num_warps=warps, num_stages=stages)
    if operation == "segmented_shrink":
        return _segmented_shrink_tile(limits, wide, m, k, rank, siblings, aligned)
    if operation == "segmented_expand":
        return _segmented_expand_tile(wide, m, rank, aligned)
    if operation == "segmented_gemm":
        tile = _gemm_tile(limits, wide, rank, k, 1, False, aligned, True, siblings > 1)
        # Two parts spill 32 bytes a thread unaligned (sm_120), and two or four 24 to 120 on sm_100.
        return replace(
            tile, parts=4 if not aligned else 1 if limits.capability == 100 else tile.parts
        )
    if operation == "decode_gemm":
        return _decode_gemm_tile(limits, m, n, aligned)
    raise ValueError(f"no such operation: {operation!r}")


def _gemm_tile(
    limits: DeviceLimits,
    wide: bool,
    rank: int,
    depth: int,
    siblings: int,
    wide_rank: bool,
    aligned: bool,
    forward: bool,
    group: bool,
) -> TileConfig:
    """Return the GEMM's tile; ``siblings`` share a tile, a ``group`` shares the launch.

    Forward a tile belongs to one sibling.
    """
    if depth == 0:  # the low-rank term alone: bound by its store
        if siblings > 3:  # 32 x 64 spills 8 to 16 bytes a thread (sm_89, sm_120)
            return TileConfig(32, 32, 16, num_warps=4, num_stages=1)
        # In one part, siblings spill 8 bytes a thread (sm_89, sm_90).
        return TileConfig(32, 64, 16, parts=2 if siblings > 1 else 1, num_warps=4, num_stages=1)
    if limits.capability == 120 and wide_rank and siblings > 1 and not wide:
        # 128 x 64 spills 48 to 64 bytes a thread.
        return TileConfig(64, 64, 32, num_warps=4, num_stages=3)
    if siblings > 3 and not wide:
        # 128 x 256 spills 56 bytes a thread (sm_90) and 64 x 64 96; in two parts, 128 x 64 spills
        # 32 (sm_120).
        parts = 1 if limits.capability == 120 else 2
        return TileConfig(128, 64, 32, parts=parts, num_warps=8, num_stages=3)
    if wide:
        return TileConfig(64, 64, 32, num_warps=4, num_stages=2)
    if limits.capability == 0:
        return TileConfig(128, 128, 32, num_warps=8, num_stages=2)
    # Loads of single elements take an address each; and two siblings with an fp32 term spill 8
    # bytes a thread in 128 x 128 (sm_80).
    if not aligned or (wide_rank and siblings > 1):
        # In two parts, three siblings that draw their masks spill 56 bytes a thread on sm_100.
        parts = 4 if limits.capability == 100 and group else 2
        return TileConfig(128, 64, 32, parts=parts, num_warps=8, num_stages=3)
    if limits.capability == 90:
        # 256 columns spill 216 to 392 bytes a thread, and 8 with three siblings above rank 32.
        if wide_rank or (siblings > 2 and rank > 32):
            return TileConfig(128, 128, 64, parts=4, num_warps=8, num_stages=3)
        # 208 of 227 KiB, and no spills with mask bits up to rank 256
        return TileConfig(128, 256, 64, parts=4, num_warps=8, num_stages=4)
    if limits.capability == 100:
        # Forward, two parts spill 8 bytes, or of a group four spill 24; with a mask, four spill 16.
        parts = 4 if forward and not group else 2
        return TileConfig(128, 128, 64, parts=parts, num_warps=8, num_stages=3)
    if limits.capability == 80 and wide_rank:  # a depth of 32 spills 8 bytes a thread
        return TileConfig(128, 128, 64, parts=4, num_warps=8, num_stages=3)
    return TileConfig(128, 128, 32, parts=4, num_warps=8, num_stages=3)


def _output_pass_block(
    limits: DeviceLimits, wide: bool, rank: int, siblings: int, aligned: bool
) -> tuple[int, int, int]:
    """Return rows, columns and warps."""
    # High tiles: every row block writes a whole partial dB, 33 MB in all at 128 rows a block and 17
    # at 256 (M = 8192, N = 4096, rank 16), beside 67 MB of dy.
    block_m = 32 if wide else 256 if aligned else 64
    if siblings > 1 and limits.capability == 120:  # 256 rows spill 8 bytes under autocast
        block_m = min(block_m, 128)
    large = limits.shared_bytes >= 160 * 1024 and rank <= 32 and not wide
    large = large and limits.capability != 100  # 64 columns spill 8 bytes under autocast
    return block_m, 64 if large else 32, 4 if wide else 8


def _input_pass_block(
    limits: DeviceLimits, wide: bool, rank: int, siblings: int
) -> tuple[int, int, int]:
    """Return rows, columns and warps; ``rank`` is the siblings' together."""
    if wide:
        return (32, 32, 4) if rank <= 64 else (32, 16, 8)
    # Siblings that draw their masks spill: four of rank 16 in 128 columns 8 bytes a thread, three
    # of rank 256 in 64 columns 72 (sm_90).
    block_n = 32 if rank > 512 else 64 if rank > 64 or siblings > 3 else 128
    if siblings > 1 and rank > 256 and limits.capability in (80, 89, 120):
        block_n //= 2  # 8 to 16 bytes otherwise
    return 64 if rank <= 64 else 32, block_n, 8


def _shrink_block(
    limits: DeviceLimits, wide: bool, rank: int, siblings: int
) -> tuple[int, int, int]:
    """Return rows, depth and warps; ``rank`` is the siblings' together."""
    if wide:
        if siblings > 1:  # in 32 x 32, and above rank 64 in four warps, two spill 8 bytes a thread
            if limits.capability == 100 and 64 < rank <= 128:  # two in 16 x 16 spill 24
                return 16, 32, 8
            return (32, 16, 4) if rank <= 64 else (16, 16, 8)
        # In four warps rank 256 spills 16 bytes a thread where it draws its mask (sm_90).
        return (32, 32, 4) if rank <= 64 else (16, 16, 8 if rank > 128 else 4)
    if rank > 512:  # four siblings of rank 256 spill 16 bytes a thread in 32 x 32
        return 16, 32, 8
    deepest = {100: 256, 120: 64}.get(limits.capability, 0)
    if siblings > 1 and rank <= deepest:
        # 64 x 64 spills 16 to 32 bytes a thread (three siblings of rank 16). Four of rank 16 spill
        # 24 in eight warps, and of rank 64 8 in four (sm_100).
        return 64, 32, 4 if siblings > 3 and rank <= 64 and limits.capability == 100 else 8
    if rank > 64:
        return 32, 32, 8
    # Four siblings in four warps spill 8 bytes a thread under autocast (sm_80).
    return 64, 64, 4 if rank == 64 and siblings < 4 and limits.capability != 100 else 8


def _segmented_shrink_tile(
    limits: DeviceLimits, wide: bool, m: int, k: int, rank: int, siblings: int, aligned: bool
) -> TileConfig:
    """Return the tile: ``block_n`` are ranks. How many adapters there are is not known."""
    if m <= DECODE_ROWS:
        # Two items a processor, if all rows have one adapter.
        tiles = -(-m // 16)  # at least
        # The expand adds the planes, and nothing hides it: splits of 512 columns, 16 at most, are
        # faster here (q, k, v of 7B: 4.1 us for 5.9) and slower there (a layer, one adapter and 64
        # rows: 21.1 for 18.4). With 64 adapters a step is as fast by either (H200).
        splits = min(_splits(limits, -(-tiles * siblings // 2), k, at_least=1024), 8)
        if wide:
            return TileConfig(16, 16, 32, splits=splits, num_warps=4, num_stages=3)
        # Two warps leave room beside a decode_gemm: 0 to 22 us a layer where both began at once. In
        # today's order, which has the product first, 64 adapters take as long with four (H200, 7B).
        warps = 2 if aligned else 4  # which spill 24 bytes a thread unaligned (sm_89)
        return TileConfig(16, 16, 128, splits=splits, num_warps=warps, num_stages=4)
    # The expand reads every plane once for each of its runs of columns.
    splits = min(_splits(limits, -(-m // 64), k, at_least=512), 16)
    widest = (64 if siblings == 1 and aligned else 32) // (2 if wide else 1)
    block_r, block_k, stages = min(rank, widest), 32 if wide else 64, 3 if wide else 5
    if not wide and aligned and m > 2048 and siblings * block_r <= 64:  # else it spills 8 bytes
        block_k = 128  # 0.9 of the time (H200, 8192 rows)
    if wide and siblings > 2:
        block_k = 16  # 32 spill 24 bytes a thread (sm_90)
    # In four warps rank 64, and three siblings, spill 8 bytes a thread (sm_80, sm_89), and three
    # siblings in fp32 48 (sm_100). In eight, three siblings of 32 ranks spill 8 on sm_100.
    large = siblings * block_r > 32
    warps = 8 if large and (wide or limits.capability not in (90, 100)) else 4
    return TileConfig(64, block_r, block_k, splits=splits, num_warps=warps, num_stages=stages)


def _segmented_expand_tile(wide: bool, m: int, rank: int, aligned: bool) -> TileConfig:
    """Return the tile: ``block_k`` are ranks."""
    if wide:  # 32 ranks spill 24 bytes a thread in tiles of 64 rows (sm_100)
        few = m <= DECODE_ROWS
        block_m, block_n, block_r = (16, 64, 32) if few else (64, 64 if aligned else 32, 16)
        warps = 4 if few else 8
        return TileConfig(
            block_m, block_n, min(rank, block_r), num_warps=warps, num_stages=1, programs=4
        )
    # More ranks of unaligned rows spill 8 to 32 bytes (64 on sm_120; 32 in large tiles on sm_100).
    if m <= DECODE_ROWS:
        block_n, block_r = (128, min(rank, 64)) if aligned else (64, min(rank, 32))
        return TileConfig(16, block_n, block_r, num_warps=4, num_stages=4, programs=4)
    # As many programs as run at once. Eight warps would hold the product of hi and that of lo in
    # different layouts, and exchange the sum between them (sm_90).
    block_n = 32 if not aligned else 128 if rank <= 64 else 64
    block_r = min(rank, 64 if aligned else 16)
    return TileConfig(64, block_n, block_r, num_warps=4, num_stages=3, programs=2)


def _decode_gemm_tile(limits: DeviceLimits, m: int, n: int, aligned: bool) -> TileConfig:
    """Return the tile: ``block_n`` weights' rows, which tensor cores want to be 64."""
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    if not aligned or limits.capability not in (90, 100):
        # Unaligned, a depth of 64 spills 80 bytes a thread (sm_120).
        return TileConfig(block_m, 64, 64 if aligned else 32, num_warps=4, num_stages=3)
    if -(-n // 64) >= 3 * limits.processors:
        # Three programs a processor. With 64 rows a depth of 128 takes 1.03 of the time, and with
        # 32 one of 64 1.13 (H200, gate and up of 7B).
        block_k, stages = (64, 4) if block_m == 64 else (128, 3)
        return TileConfig(block_m, 64, block_k, num_warps=4, num_stages=stages)
    # One of them has to have in flight what a processor's share of the bandwidth takes: with three
    # stages down of 7B takes 1.7 times as long, in half of the depth 1.2 to 1.3 times.
    return TileConfig(block_m, 64, 128, num_warps=4, num_stages=6 if block_m == 64 else 8)


def _splits(limits: DeviceLimits, blocks: int, length: int, at_least: int) -> int:
    """Return in how many parts to split a reduction so that every processor has work.

    Rounded to the nearest: 128 blocks on 132 processors are not worth a second pass.
    """
    wanted = round(limits.processors / max(blocks, 1))
    return max(1, min(wanted, length // at_least))


def with_stages_that_fit(
    config: TileConfig, limits: DeviceLimits, stage_bytes: int, other_bytes: int
) -> TileConfig:
    """Return the tile with as many pipeline stages as shared memory holds, at least one.

    A tile is chosen, and tuned, by the dtype of the products; under autocast the operands may be
    stored in fp32, twice as wide.

    Args:
        config: the tile.
        limits: of the device.
        stage_bytes: of the operands of one step, as they are stored.
        other_bytes: shared memory that is used beside the pipeline.
    """
    stages = max(1, (limits.shared_bytes - other_bytes) // stage_bytes)
    return config if stages >= config.num_stages else replace(config, num_stages=stages)


def padded_rank(rank: int) -> int:
    """Return the rank as a tile holds it: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class TileKey:
    """What a tuned entry is found by: one operation on one shape, rows rounded up to a bucket."""

    operation: str
    dtype: str
    n: int
    k: int
    r: int
    m: int
    siblings: int = 1  # what a table does not say: older ones know no groups


def tile_key(
    operation: str, dtype: torch.dtype, m: int, n: int, k: int, r: int, siblings: int = 1
) -> TileKey:
    """Return the key that a call with these sizes is looked up by (see ``default_tile``)."""
    bucket = next((size for size in M_BUCKETS if m <= size), M_BUCKETS[-1])
    n = 0 if operation in ("shrink", "input_pass", "segmented_shrink") else n
    k = 0 if operation in ("output_pass", "segmented_expand") else k
    name = str(dtype).removeprefix("torch.")
    return TileKey(operation, name, n, k, padded_rank(r), bucket, siblings)


def device_slug(name: str) -> str:
    """Return a device's name as a file name: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def user_cache() -> Path:
    """Return the folder that ``fastlora tune`` writes to."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fastlora" / "tuned"


@cached_by_shape
def tuned_entries(device_name: str) -> Mapping[TileKey, Mapping[str, Any]]:
    """Return everything that is known of a device: its committed table over the user's cache.

    Read once for each device, until ``forget_tiles``.

    A table in the user's cache that cannot be read, or that another minor version of Triton was
    measured with, is left out with a warning: it must not stop a training run.

    Raises:
        ValueError: a committed table cannot be read; the message names the file.
    """
    entries: dict[TileKey, Mapping[str, Any]] = {}
    name = f"{device_slug(device_name)}.json"
    if (path := user_cache() / name).exists():
        try:
            entries.update(read_table(path))
            if (measured := measured_with(path)) not in (None, installed_triton()):
                raise ValueError(
                    f"{path} was measured with Triton {measured}, and {installed_triton()} is "
                    "installed; run `fastlora tune` again"
                )
        except ValueError as error:
            entries.clear()
            warnings.warn(f"ignored: {error}", RuntimeWarning, stacklevel=2)
    if (path := TUNED / name).exists():
        entries.update(read_table(path))
    return entries


def measured_with(path: Path) -> str | None:
    """Return the minor version of Triton that a table was measured with, if it says.

    Raises:
        ValueError: it is not a table; the message names the file.
    """
    read_table(path)
    version = json.loads(path.read_text()).get("triton")
    return None if version is None else ".".join(str(version).split(".")[:2])


def installed_triton() -> str:
    """Return the minor version of Triton that is installed."""
    return ".".join(importlib.metadata.version("triton").split(".")[:2])


def read_table(path: Path) -> dict[TileKey, Mapping[str, Any]]:
    """Read a table of tuned entries.

    Raises:
        ValueError: it is not such a table; the message names the file.
    """
    try:
        entries = {TileKey(**row["key"]): row for row in json.loads(path.read_text())["entries"]}
        for entry in entries.values():
            if entry.get("tile"):
                TileConfig(**entry["tile"])
            if entry.get("plan", "hybrid") not in ("fused", "hybrid", "plain"):
                raise ValueError(f"no such plan: {entry['plan']!r}")
        return entries
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of tuned tiles: {error!r}; delete it") from error


@cached_by_shape
def tile_config_for(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    m: int,
    *,
    n: int = 0,
    k: int = 0,
    r: int,
    siblings: int = 1,
    wide_rank: bool = False,
    aligned: bool = True,
) -> TileConfig:
    """Return the tuned tile of a call, or the default one (see ``default_tile`` for the args).

    What is tuned has aligned rows and a low-rank term as wide as the rest.
    """
    limits = device_limits(device)
    if aligned and not wide_rank:
        entry = tuned_entries(limits.name).get(tile_key(operation, dtype, m, n, k, r, siblings))
        if entry is not None and entry.get("tile"):
            return TileConfig(**entry["tile"])
    return default_tile(
        operation,
        limits,
        dtype,
        m,
        n,
        k,
        r,
        siblings=siblings,
        wide_rank=wide_rank,
        aligned=aligned,
    )
