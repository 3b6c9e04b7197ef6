"""What ``targets.py`` compiles: the shapes, dtypes, ranks and batches that the default tiles serve.

Also every tile of a table that ``fastlora tune`` wrote, for its own architecture; and, for a test,
one call of each kernel.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from kernel_calls import OPERATIONS, SCALED, SEGMENTED, TERMS, AttentionCase, Case
from machine_code import Target

from fastlora.kernels import tile_config
from fastlora.kernels.tile_config import TileConfig

ALL_PLANS = (*OPERATIONS, *SCALED, *TERMS)
THIN = ("shrink", "output_pass", "input_pass", *TERMS)  # the others are never fused in fp32
# Out features of projections that share their input, of Qwen3-8B and Qwen2.5-7B; four are the most
# that one launch takes.
SIBLINGS = {
    "q, k, v": (4096, 1024, 1024),
    "gate, up": (12288, 12288),
    "four": (3584, 512, 512, 3584),
}
# Rows of a batch: each a program's own, tiles of 16, tiles of 64 with K split, and without.
SEGMENTED_ROWS = (8, 64, 1024, 16384)


def default_cases() -> Iterator[Case]:
    """Yield what the default tiles must serve."""
    yield from linear_cases()
    yield from sibling_cases()
    yield Case("bf16 r=16, rows of 4100", ns=(4100,), k=4100, aligned=False)
    yield from segmented_cases()
    yield from segmented_gemm_cases()
    yield from decode_gemm_cases()
    yield from attention_cases()


def linear_cases() -> Iterator[Case]:
    """Yield one linear that is trained, in every combination of dtypes."""
    fp32, fp16 = torch.float32, torch.float16
    for r in (16, 64, 256):
        yield Case(f"bf16 r={r}", r=r, operations=ALL_PLANS)
    halves = Case("fp16 r=128", r=128, dtype=fp16, adapter=fp16, rank_dtype=fp16)
    yield replace(halves, operations=ALL_PLANS)
    for r in (16, 64, 256):
        # What peft makes of a bf16 model by default, with and without autocast.
        mixed = Case(f"bf16, fp32 adapters r={r}", r=r, adapter=fp32, operations=ALL_PLANS)
        yield replace(mixed, name=f"bf16, fp32 adapters, autocast r={r}")
        yield replace(mixed, rank_dtype=fp32)
        yield Case(f"fp32 r={r}", r=r, dtype=fp32, adapter=fp32, rank_dtype=fp32, operations=THIN)


def sibling_cases() -> Iterator[Case]:
    """Yield the same of linears that share their input."""
    fp32 = torch.float32
    for (siblings, ns), r in itertools.product(SIBLINGS.items(), (16, 64, 256)):
        group = Case(f"bf16 r={r} {siblings}", ns=ns, r=r, operations=ALL_PLANS)
        if r < 256 or len(ns) < 4:
            yield group
        if r == 256:  # several accumulators of that rank spill in fp32, whatever the tile
            continue
        mixed = replace(group, name=f"bf16, fp32 adapters r={r} {siblings}", adapter=fp32)
        yield replace(mixed, name=f"bf16, fp32 adapters, autocast r={r} {siblings}")
        # Four siblings with fp32 terms are never fused (see ops.py).
        unfused = tuple(o for o in ALL_PLANS if o != "input_grad" or len(ns) < 4)
        yield replace(mixed, rank_dtype=fp32, operations=unfused)
        wide = replace(mixed, dtype=fp32, rank_dtype=fp32, operations=THIN)
        yield replace(wide, name=f"fp32 r={r} {siblings}")


def segmented_cases() -> Iterator[Case]:
    """Yield the launches of every number of rows that chooses another kernel or tile."""
    fp16, fp32 = torch.float16, torch.float32
    for m in SEGMENTED_ROWS:
        base = Case("", m=m, masks=("none",), operations=SEGMENTED)
        for dtype, ranks, groups in (
            (torch.bfloat16, (16, 64, 256), ((4096,), SIBLINGS["gate, up"], SIBLINGS["q, k, v"])),
            (fp16, (64,), (SIBLINGS["q, k, v"],)),
            (fp32, (16, 256), ((4096,), SIBLINGS["q, k, v"])),
        ):
            for r, ns in itertools.product(ranks, groups):
                name = f"{str(dtype).removeprefix('torch.')} T={m} r={r} S={len(ns)} segmented"
                yield replace(base, name=name, ns=ns, r=r, dtype=dtype, adapter=dtype)
        # The deepest layer of Qwen2.5-7B, split into the most planes.
        yield replace(base, name=f"bfloat16 T={m} r=64 K=18944 segmented", k=18944, r=64)
    odd = {"name": "bfloat16 r=64 rows of 4101 segmented", "ns": (4101,), "k": 4101, "r": 64}
    for m in SEGMENTED_ROWS[1:]:
        yield Case(m=m, masks=("none",), operations=SEGMENTED, aligned=False, **odd)


def segmented_gemm_cases() -> Iterator[Case]:
    """Yield prefills, with one plane of h and with eight."""
    fp16, three = torch.float16, SIBLINGS["q, k, v"]
    for m in SEGMENTED_ROWS[2:]:
        base = Case("", m=m, masks=("none",), operations=("segmented_gemm",))
        for r, ns in itertools.product((16, 64, 256), ((4096,), *SIBLINGS.values())):
            yield replace(base, name=f"bf16 T={m} r={r} S={len(ns)}", ns=ns, r=r)
        halves = {"dtype": fp16, "adapter": fp16, "ns": three, "r": 64}
        yield replace(base, name=f"fp16 T={m} r=64 S=3", **halves)
        odd = {"ns": (4101,), "k": 4101, "r": 64, "aligned": False}
        yield replace(base, name=f"bf16 T={m} r=64, rows of 4101", **odd)


def decode_gemm_cases() -> Iterator[Case]:
    """Yield steps that generate, of every height of a tile, few columns and many."""
    fp16, three = torch.float16, SIBLINGS["q, k, v"]
    for m in (8, 32, 64):
        base = Case("", m=m, masks=("none",), operations=("decode_gemm",))
        for ns in ((4096,), *SIBLINGS.values(), (18944, 18944)):
            yield replace(base, name=f"bf16 T={m} S={len(ns)} N={sum(ns)}", ns=ns)
        halves = {"dtype": fp16, "adapter": fp16, "ns": three}
        yield replace(base, name=f"fp16 T={m} S=3", **halves)
        odd = {"ns": (4101,), "k": 4101, "aligned": False}
        yield replace(base, name=f"bf16 T={m}, rows of 4101", **odd)


def attention_cases() -> Iterator[Case]:
    """Yield batches that only generate, mixed ones, and long prompts."""
    fp16, fp32 = torch.float16, torch.float32
    for m in (64, 1024, 16384):
        base = AttentionCase("", m=m, sequences=min(m, 256))
        for name, changes in (
            ("heads of 128", {}),
            ("heads of 128, no splits", {"longest": 256}),
            ("7 heads in a group", {"heads": 28, "kv_heads": 4}),
            ("64 heads in a group", {"heads": 64, "kv_heads": 1}),
            ("heads of 64", {"heads": 14, "kv_heads": 2, "head_dim": 64}),
            ("heads of 80", {"kv_heads": 32, "head_dim": 80}),
            ("heads of 256", {"heads": 8, "kv_heads": 4, "head_dim": 256}),
            ("a window", {"window": 4096}),
            ("by pages", {"by_pages": True}),
            ("by pages, 7 heads in a group", {"by_pages": True, "heads": 28, "kv_heads": 4}),
            ("fp16", {"dtype": fp16}),
            ("fp32", {"dtype": fp32}),
            ("fp32, heads of 64", {"dtype": fp32, "heads": 14, "kv_heads": 2, "head_dim": 64}),
            ("fp32, heads of 256", {"dtype": fp32, "heads": 8, "kv_heads": 4, "head_dim": 256}),
        ):
            yield replace(base, name=f"attention T={m}, {name}", **changes)
    yield AttentionCase("attention T=1024, heads of 33", m=1024, head_dim=33)


def quick_cases(target: Target) -> Iterator[Case]:
    """Yield one call of each kernel at rank 16, for a test: 6 compilations, and 16 for sm_90."""
    # The pass over x is the same code on all of NVIDIA's but for its copies: sm_90 stands for them.
    everywhere = OPERATIONS if target.name in ("sm_90", "gfx942") else OPERATIONS[:-1]
    yield Case("bf16 r=16", m=16384, masks=("seed",), operations=everywhere)
    if target.name == "sm_90":
        for m in (8, 64, 16384):
            segmented = {"masks": ("none",), "operations": SEGMENTED}
            yield Case(f"bf16 r=16 T={m}", m=m, ns=SIBLINGS["q, k, v"], **segmented)
        yield Case("bf16 r=16", m=16384, masks=("none",), operations=("segmented_gemm",))
        step = {"m": 64, "ns": SIBLINGS["q, k, v"], "operations": ("decode_gemm",)}
        yield Case("bf16 r=16", masks=("none",), **step)
        yield AttentionCase("attention T=64", m=64, sequences=64)


def tuned_cases(folder: Path, target: Target) -> Iterator[Case]:
    """Yield the tiles in ``folder/*.json`` that were tuned on the architecture of a target."""
    for path in sorted(folder.glob("*.json")):
        if json.loads(path.read_text()).get("capability") != target.arch:
            continue
        for key, entry in tile_config.read_table(path).items():
            if not entry.get("tile"):  # a shape that cuBLAS won
                continue
            dtype = getattr(torch, key.dtype)
            yield Case(
                f"{path.stem} {key.operation} {key.dtype} m={key.m} n={key.n} k={key.k} r={key.r}"
                + f" siblings={key.siblings}" * (key.siblings > 1),
                m=key.m,
                ns=(key.n // key.siblings,) * key.siblings if key.n else Case.ns * key.siblings,
                k=key.k or Case.k,
                r=key.r,
                dtype=dtype,
                adapter=dtype,
                rank_dtype=dtype,
                operations=(key.operation,),
                config=TileConfig(**entry["tile"]),
            )
