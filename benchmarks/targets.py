"""Compile every kernel ahead of time, for GPUs that need not be here, and read the result.

    python benchmarks/targets.py                        # every tile, every target
    python benchmarks/targets.py --targets sm_90 --json report.json

The launchers run as they would on the device, with its limits in place of a driver, and every
launch compiles instead: the default tiles in the dtypes and ranks below, and every tile in
``kernels/tuned`` for its own architecture. Read off the machine code: registers, spills to local
memory, shared memory against what the device has (the compiler does not object by itself), and the
instructions that the design counts on. The exit status is 1 if a kernel is unfit for its target.

AMD's gfx942 must compile, fit its shared memory and do without atomics. Its scratch memory is shown
and not judged: no tile here was ever timed on one.

It takes 40 minutes of processor time (Triton 3.7), each target in a process of its own. Run it
without TRITON_INTERPRET: interpreted functions cannot be compiled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels import tile_config
from fastlora.kernels.adapter_grads import adapter_grads
from fastlora.kernels.decode_gemm import decode_gemm
from fastlora.kernels.input_pass import input_pass
from fastlora.kernels.low_rank_gemm import (
    input_grad,
    low_rank_gemm,
    low_rank_term,
    prepare_scaled_gemm,
)
from fastlora.kernels.paged_attention import paged_attention
from fastlora.kernels.segmented_expand import segmented_expand
from fastlora.kernels.segmented_gemm import segmented_gemm
from fastlora.kernels.segmented_shrink import prepare_segmented_shrink, segmented_shrink
from fastlora.kernels.segments import PAGE
from fastlora.kernels.shrink import shrink
from fastlora.kernels.tile_config import DeviceLimits, TileConfig

THRESHOLD = 6554  # p = 0.1
GEMM_KERNEL = "_low_rank_gemm_kernel"
DECODE_KERNEL = "_decode_gemm_kernel"
GEMM_KERNELS = (GEMM_KERNEL, "_segmented_gemm_kernel", DECODE_KERNEL)
TENSOR_MEMORY_COLUMNS = 512  # of one sm_100 multiprocessor

# What is counted, and the words that stand for it in PTX or in AMD's assembly.
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05.mma": r"tcgen05\.mma",
    "mma.sync": r"mma\.sync",
    "TMA load": r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global",
    "TMA store": r"cp\.async\.bulk\.tensor\S*\.global\.shared",
    "cp.async": r"cp\.async\.c[ag]",
    "mfma": r"\bv_mfma_",
    "waits": r"griddepcontrol\.wait",
    "atomics": r"\b(?:atom|red)\.\w|\w+_atomic_\w+",
}
TMA = ("TMA load", "TMA store")


@dataclass(frozen=True)
class Target:
    """A device to compile for: its published limits, and what its GEMM in half precision needs."""

    name: str
    arch: int | str
    shared_bytes: int
    processors: int
    multiplies_by: str
    copies_by: tuple[str, ...]

    @property
    def is_nvidia(self) -> bool:
        """Return whether the machine code is NVIDIA's."""
        return isinstance(self.arch, int)

    @property
    def limits(self) -> DeviceLimits:
        """Return what ``tile_config`` would learn from the driver."""
        capability = self.arch if isinstance(self.arch, int) else 0
        name = f"{self.name}, ahead of time"  # no table of tuned tiles is filed under it
        return DeviceLimits(name, capability, self.shared_bytes, self.processors)

    def gpu_target(self) -> GPUTarget:
        """Return the target in Triton's words."""
        return GPUTarget(*(("cuda", self.arch, 32) if self.is_nvidia else ("hip", self.arch, 64)))


TARGETS = (
    Target("sm_80", 80, 163 * 1024, 108, "mma.sync", ("cp.async",)),  # A100
    Target("sm_89", 89, 99 * 1024, 128, "mma.sync", ("cp.async",)),  # RTX 4090, L40S
    Target("sm_90", 90, 227 * 1024, 132, "wgmma", TMA),  # H100, H200
    Target("sm_100", 100, 227 * 1024, 148, "tcgen05.mma", TMA),  # B200
    Target("sm_120", 120, 99 * 1024, 170, "mma.sync", TMA),  # RTX 5090
    Target("gfx942", "gfx942", 64 * 1024, 304, "mfma", ()),  # MI300X
)

OPERATIONS = ("shrink", "low_rank_gemm", "input_grad", "output_pass", "input_pass")
# The low-rank term of y and of dx alone: in the hybrid plan cuBLAS adds the frozen product to it.
TERMS = ("low_rank_term", "input_grad_term")
SCALED = ("scaled_gemm",)  # DoRA's
SEGMENTED = ("segmented_shrink", "segmented_expand")  # an adapter for each row
THIN = ("shrink", "output_pass", "input_pass", *TERMS)  # the others are never fused in fp32
MASKS = ("none", "bits", "seed")
# A kernel at half of its 255 registers that spills a little is ptxas's choice, to let more programs
# run at once: with `.maxnreg 255` two shrinks of siblings take 130 registers for 80, and spill
# nothing (sm_100). They are bound by memory, where programs count for more than two words.
TRADED_REGISTERS, TRADED_BYTES = 128, 16


# Out features of projections that share their input, of Qwen3-8B and Qwen2.5-7B; four are the most
# that one launch takes.
SIBLINGS = {
    "q, k, v": (4096, 1024, 1024),
    "gate, up": (12288, 12288),
    "four": (3584, 512, 512, 3584),
}


class Segments(NamedTuple):
    """Which adapter every row has: never looked at."""

    slots: Tensor
    order: Tensor
    tiles: Tensor
    block_m: int


@dataclass(frozen=True)
class Case:
    """Calls of the launchers on one shape: q_proj of Qwen3-8B unless said otherwise."""

    name: str
    m: int = 8192
    ns: tuple[int, ...] = (4096,)  # out features of the siblings
    k: int = 4096
    r: int = 16
    dtype: torch.dtype = torch.bfloat16  # of x, dy and the frozen weight
    adapter: torch.dtype = torch.bfloat16
    rank_dtype: torch.dtype = torch.bfloat16
    operations: tuple[str, ...] = OPERATIONS
    masks: tuple[str, ...] = MASKS
    aligned: bool = True  # rows begin at 16 bytes, as the TMA and cp.async need
    config: TileConfig | None = None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an operand: never touched, so its memory is never really taken."""
        return torch.empty(shape, dtype=dtype or self.dtype)

    def each(self, *shape: int, dtype: torch.dtype) -> list[Tensor]:
        """Return one operand for each sibling."""
        return [self.empty(*shape, dtype=dtype) for _ in self.ns]

    def stacked(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return what the siblings have in one tensor."""
        return self.empty(len(self.ns), *shape, dtype=dtype)

    def mask(self, kind: str) -> Tensor | None:
        """Return the dropout masks of the siblings, as the launchers take them."""
        if kind == "none":
            return None
        if kind == "seed":
            return torch.zeros((), dtype=torch.int64)
        return self.stacked(self.m, -(-self.k // 8), dtype=torch.uint8)

    def segmented(self) -> tuple[Tensor, Tensor, Segments]:
        """Return the arena of the adapters, their descriptors, and the rows by adapter."""
        slots, order = (self.empty(self.m, dtype=torch.int32) for _ in range(2))
        block_m = 16 if self.m <= tile_config.DECODE_ROWS else 64
        tiles = self.empty(4, -(-self.m // block_m), dtype=torch.int32)
        descriptors = self.stacked(65, 4, dtype=torch.int32)
        arena = self.empty(PAGE.value, dtype=self.adapter)
        return arena, descriptors, Segments(slots, order, tiles, block_m)


def _shrink(case: Case, kind: str) -> None:
    if kind == "bits":  # it writes them; reading is for the backward pass
        return
    seed = case.mask(kind)
    shrink(
        case.empty(case.m, case.k),
        case.each(case.r, case.k, dtype=case.adapter),
        seed,
        THRESHOLD,
        rank_dtype=case.rank_dtype,
        return_bits=kind == "seed",
        config=case.config,
    )


def _low_rank_gemm(case: Case, kind: str) -> None:
    if kind != case.masks[0]:  # the forward GEMM knows no mask: once is enough
        return
    low_rank_gemm(
        case.empty(case.m, case.k),
        [case.empty(n, case.k) for n in case.ns],
        [case.empty(n) for n in case.ns],
        case.stacked(case.m, case.r, dtype=case.rank_dtype),
        [case.empty(n, case.r, dtype=case.adapter) for n in case.ns],
        [1.5] * len(case.ns),
        config=case.config,
    )


def _scaled_gemm(case: Case, kind: str) -> None:
    if kind != case.masks[0]:
        return
    operands = (
        case.empty(case.m, case.k),
        [case.empty(n, case.k) for n in case.ns],
        [case.empty(n) for n in case.ns],
        [case.empty(n, case.r, dtype=case.adapter) for n in case.ns],
        [1.5] * len(case.ns),
    )
    run = prepare_scaled_gemm(*operands, rank_dtype=case.rank_dtype, config=case.config)
    h = case.stacked(case.m, case.r, dtype=case.rank_dtype)
    scales = [case.empty(n, dtype=torch.float32) for n in case.ns]
    ys, unscaled = ([case.empty(case.m, n) for n in case.ns] for _ in range(2))
    for kept in (None, unscaled):
        run(operands[0], h, ys, scales, kept)


def _low_rank_term(case: Case, kind: str) -> None:
    if kind != case.masks[0]:  # nor does its term alone
        return
    for has_bias in (False, True):
        low_rank_term(
            case.stacked(case.m, case.r, dtype=case.rank_dtype),
            [case.empty(n, case.r, dtype=case.adapter) for n in case.ns],
            [case.empty(n) if has_bias else None for n in case.ns],
            [1.5] * len(case.ns),
            dtype=case.dtype,
            config=case.config,
        )


def _input_grad(case: Case, kind: str) -> None:
    input_grad(
        [case.empty(case.m, n) for n in case.ns],
        [case.empty(n, case.k) for n in case.ns],
        case.stacked(case.m, case.r, dtype=case.rank_dtype),
        case.each(case.r, case.k, dtype=case.adapter),
        case.mask(kind),
        THRESHOLD,
        grad_dtype=case.dtype,
        config=case.config,
    )


def _input_grad_term(case: Case, kind: str) -> None:
    input_grad(
        [],
        [],
        case.stacked(case.m, case.r, dtype=case.rank_dtype),
        case.each(case.r, case.k, dtype=case.adapter),
        case.mask(kind),
        THRESHOLD,
        grad_dtype=case.dtype,
        config=case.config,
    )


def _output_pass(case: Case, kind: str) -> None:
    if kind != case.masks[0]:  # nor does the pass over dy
        return
    adapter_grads(
        [case.empty(case.m, n) for n in case.ns],
        None,
        case.stacked(case.m, case.r, dtype=case.rank_dtype),
        [case.empty(n, case.r, dtype=case.adapter) for n in case.ns],
        None,
        [1.5] * len(case.ns),
        rank_dtype=case.rank_dtype,
        grad_dtype=case.adapter,
        output_config=case.config,
    )


def _input_pass(case: Case, kind: str) -> None:
    input_pass(
        case.empty(case.m, case.k),
        case.stacked(case.m, case.r, dtype=case.rank_dtype),
        case.each(case.r, case.k, dtype=case.adapter),
        case.mask(kind),
        THRESHOLD,
        rank_dtype=case.rank_dtype,
        config=case.config,
    )


def _segmented_shrink(case: Case, kind: str) -> None:
    if kind != case.masks[0]:  # nor does inference
        return
    x = case.empty(case.m, case.k)
    segmented_shrink(x, *case.segmented(), max_rank=case.r, config=case.config)


def _segmented_expand(case: Case, kind: str) -> None:
    if kind != case.masks[0]:
        return
    x, operands = case.empty(case.m, case.k), case.segmented()
    h = segmented_shrink(x, *operands, max_rank=case.r)  # for its number of planes
    ys = [case.empty(case.m, n) for n in case.ns]
    segmented_expand(ys, h, *operands, config=case.config)


def _segmented_gemm(case: Case, kind: str) -> None:
    if kind != case.masks[0]:
        return
    x, operands = case.empty(case.m, case.k), case.segmented()
    weights = [case.empty(n, case.k) for n in case.ns]
    biases = [case.empty(n) for n in case.ns]
    planes = 1 if case.m > 4096 else 8
    h = case.empty(planes, len(case.ns), case.m, case.r, dtype=torch.float32)
    segmented_gemm(x, weights, biases, h, *operands, config=case.config)


def _decode_gemm(case: Case, kind: str) -> None:
    if kind != case.masks[0]:
        return
    x, operands = case.empty(case.m, case.k), case.segmented()
    weights = [case.empty(n, case.k) for n in case.ns]
    decode_gemm(x, weights, [case.empty(n) for n in case.ns], config=case.config)
    # What runs beside it is code of its own.
    beside = prepare_segmented_shrink(x, *operands, max_rank=case.r, beside=True)
    beside(x, *operands)


@dataclass(frozen=True)
class AttentionCase(Case):
    """One layer's attention of a batch of ``m`` tokens: of Qwen3-8B unless said otherwise."""

    masks: tuple[str, ...] = ("none",)
    operations: tuple[str, ...] = ("paged_attention",)
    sequences: int = 256
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    longest: int = 32768  # with few tokens its sequences are split
    by_pages: bool = False
    window: int | None = None  # in a ring


def _paged_attention(case: Case, _: str) -> None:
    assert isinstance(case, AttentionCase)
    group, places = case.kv_heads, 1 << 18
    joined = case.empty(case.m, case.heads + 2 * group, case.head_dim)
    q, k, v = joined.split((case.heads, group, group), 1)
    starts_q, starts_k = (case.empty(case.sequences + 1, dtype=torch.int32) for _ in range(2))
    # PyTorch writes a ring, even here: to place 0.
    lists = {"read_index": case.empty(1 << 20, dtype=torch.int64)}
    lists["write_index"] = torch.zeros(case.m, dtype=torch.int64)
    if case.by_pages:
        lists = {"block_table": case.empty(case.sequences, 128, dtype=torch.int32)}
    paged_attention(
        q,
        k,
        v,
        case.empty(places, group, case.head_dim),
        case.empty(places, group, case.head_dim),
        starts_q,
        starts_k,
        scaling=0.1,
        longest=case.longest,
        page_size=256 if case.by_pages else 0,
        window=case.window,
        is_ring=case.window is not None,
        config=case.config,
        **lists,
    )


_LAUNCH: Mapping[str, Callable[[Case, str], None]] = {
    "shrink": _shrink,
    "low_rank_gemm": _low_rank_gemm,
    "input_grad": _input_grad,
    "output_pass": _output_pass,
    "input_pass": _input_pass,
    "segmented_shrink": _segmented_shrink,
    "segmented_expand": _segmented_expand,
    "segmented_gemm": _segmented_gemm,
    "decode_gemm": _decode_gemm,
    "paged_attention": _paged_attention,
    "scaled_gemm": _scaled_gemm,
    "low_rank_term": _low_rank_term,
    "input_grad_term": _input_grad_term,
}


def default_cases() -> Iterator[Case]:
    """Yield what the default tiles must serve."""
    fp32, fp16 = torch.float32, torch.float16
    all_plans = (*OPERATIONS, *SCALED, *TERMS)
    for r in (16, 64, 256):
        yield Case(f"bf16 r={r}", r=r, operations=all_plans)
    yield Case("fp16 r=128", r=128, dtype=fp16, adapter=fp16, rank_dtype=fp16, operations=all_plans)
    for r in (16, 64, 256):
        # What peft makes of a bf16 model by default, with and without autocast.
        mixed = Case(f"bf16, fp32 adapters r={r}", r=r, adapter=fp32, operations=all_plans)
        yield replace(mixed, name=f"bf16, fp32 adapters, autocast r={r}")
        yield replace(mixed, rank_dtype=fp32)
        yield Case(f"fp32 r={r}", r=r, dtype=fp32, adapter=fp32, rank_dtype=fp32, operations=THIN)
    for siblings, ns in SIBLINGS.items():
        for r in (16, 64, 256):
            group = Case(f"bf16 r={r} {siblings}", ns=ns, r=r, operations=all_plans)
            if r < 256 or len(ns) < 4:
                yield group
            mixed = replace(group, name=f"bf16, fp32 adapters r={r} {siblings}", adapter=fp32)
            if r < 256:  # several accumulators of rank 256 spill in fp32, whatever the tile
                yield replace(mixed, name=f"bf16, fp32 adapters, autocast r={r} {siblings}")
                # Four siblings with fp32 terms are never fused (see ops.py).
                unfused = tuple(o for o in all_plans if o != "input_grad" or len(ns) < 4)
                yield replace(mixed, rank_dtype=fp32, operations=unfused)
                thin = tuple(operation for operation in all_plans if operation in THIN)
                wide = replace(mixed, name=f"fp32 r={r} {siblings}", operations=thin)
                yield replace(wide, dtype=fp32, rank_dtype=fp32)
    yield Case("bf16 r=16, rows of 4100", ns=(4100,), k=4100, aligned=False)
    yield from segmented_cases()
    yield from segmented_gemm_cases()
    yield from decode_gemm_cases()
    yield from attention_cases()


# Rows of a batch: each a program's own, tiles of 16, tiles of 64 with K split, and without.
SEGMENTED_ROWS = (8, 64, 1024, 16384)


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


@dataclass(frozen=True)
class Report:
    """What one compiled kernel turned out to be; registers and local bytes are one thread's."""

    target: str
    case: str
    kernel: str
    tile: dict[str, int]
    registers: int
    local_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_columns: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    expected: tuple[str, ...] = ()
    judge_local: bool = True

    def problems(self) -> list[str]:
        """Return what makes the kernel unfit for its target."""
        found = []
        traded = self.registers <= TRADED_REGISTERS and self.local_bytes <= TRADED_BYTES
        if self.judge_local and self.local_bytes and not traded:
            found.append(f"{self.local_bytes} bytes of local memory a thread: it spills")
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} bytes of shared memory of {self.shared_limit}")
        if self.instructions.get("atomics"):
            found.append(f"{self.instructions['atomics']} atomics: sums in no fixed order")
        missing = [name for name in self.expected if not self.instructions.get(name)]
        if self.tensor_columns > TENSOR_MEMORY_COLUMNS:
            # Triton then compiles a kernel that does nothing: what it lacks says no more.
            limit = TENSOR_MEMORY_COLUMNS
            found.append(f"{self.tensor_columns} columns of tensor memory of {limit}")
        elif missing:
            found.append(f"no {', no '.join(missing)}, which its design counts on")
        where = f"{self.target} {self.case} {self.kernel} {self.tile_text()}"
        return [f"{where}: {problem}" for problem in found]

    def tile_text(self) -> str:
        """Return the tile as the table shows it: ``128x256x64 r16 w8 s4``."""
        blocks = "x".join(str(self.tile[f"BLOCK_{x}"]) for x in "MNK" if f"BLOCK_{x}" in self.tile)
        short = {"BLOCK": "", "BLOCK_R": "r", "PARTS": "p", "num_warps": "w", "num_stages": "s"}
        rest = [f"{letter}{self.tile[name]}" for name, letter in short.items() if name in self.tile]
        return " ".join([blocks, *rest] if blocks else rest)

    def instruction_text(self) -> str:
        """Return the instructions that occur, as the table shows them."""
        return ", ".join(f"{count} {name}" for name, count in self.instructions.items() if count)


class _NoDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: Target):
        self._target, self._device = target.gpu_target(), TARGETS.index(target)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by the number of the device.
        return self._device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def _compile_instead_of_launching(target: Target) -> Iterator[list[tuple[str, Any, dict]]]:
    """Make every launch in the block compile for ``target``; yields (name, compiled, options)."""
    launches = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.__name__, compiled, options))
        return compiled

    # It stays: without a device there is no driver to go back to.
    driver.set_active(_NoDriver(target))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tile_config, "INTERPRETER", target.limits),
    ):
        tile_config.forget_tiles()
        yield launches


def compile_cases(target: Target, cases: Sequence[Case]) -> tuple[list[Report], list[str]]:
    """Compile every kernel of the cases, each signature once.

    Returns:
        A report for each compiled kernel, and the problems: theirs, and what did not compile.
    """
    reports, problems, seen = [], [], set()
    with _compile_instead_of_launching(target) as launches:
        for case in cases:
            for operation in case.operations:
                for kind in case.masks:
                    name = f"{case.name}, {operation} {kind}"
                    launches.clear()
                    try:
                        _LAUNCH[operation](case, kind)
                    except Exception as error:  # whatever stops the compiler is the finding
                        problems.append(f"{target.name} {name}: does not compile: {error!r}")
                    for kernel, compiled, options in launches:
                        # Triton keeps what it compiled: the same signature is the same object.
                        if id(compiled) not in seen:
                            seen.add(id(compiled))
                            if target.is_nvidia and (refused := _launcher_refuses(compiled)):
                                problems.append(f"{target.name} {name} {kernel}: {refused}")
                            report = _report(target, case, name, kernel, compiled, options)
                            if operation in TERMS:  # without a frozen product there is no pipeline
                                report = replace(report, expected=())
                            reports.append(report)
                            problems.extend(report.problems())
    return reports, problems


def _launcher_refuses(compiled: Any) -> str | None:
    """Return why Triton could not launch what it compiled, or ``None``.

    It finds out at the first launch alone: a descriptor inside a tuple argument compiles.
    """
    signature = compiled.src.signature
    descriptors = getattr(compiled.metadata, "tensordesc_meta", None)
    try:
        if hasattr(nvidia, "expand_signature"):  # Triton 3.7
            nvidia.expand_signature(signature.values(), descriptors)
            nvidia.wrap_handle_tensordesc(lambda *_: None, signature, descriptors)
        else:
            nvidia.make_launcher({}, signature, descriptors)
    except Exception as error:  # whatever stops the launcher is the finding
        return f"its launcher cannot be built: {error!r}"
    return None


def _report(
    target: Target, case: Case, name: str, kernel: str, compiled: Any, options: Mapping[str, Any]
) -> Report:
    code = compiled.asm["ptx" if target.is_nvidia else "amdgcn"]
    registers, local_bytes = _usage(compiled) if target.is_nvidia else _amd_usage(code)
    expected: tuple[str, ...] = ()
    if kernel in GEMM_KERNELS and case.dtype != torch.float32:
        expected = (target.multiplies_by, *(target.copies_by if case.aligned else ()))
    if kernel == DECODE_KERNEL:  # its outputs are small, and transposed
        expected = tuple(name for name in expected if name != "TMA store")
    tile = {
        key: value
        for key, value in options.items()
        if key.startswith(("BLOCK", "PARTS", "GROUP", "num_"))
    }
    return Report(
        target=target.name,
        case=name,
        kernel=kernel,
        tile=tile,
        registers=registers,
        local_bytes=local_bytes,
        shared_bytes=compiled.metadata.shared,
        shared_limit=target.shared_bytes,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        instructions={key: len(re.findall(words, code)) for key, words in INSTRUCTIONS.items()},
        expected=expected,
        judge_local=target.is_nvidia,
    )


def _usage(compiled: Any) -> tuple[int, int]:
    """Return registers and bytes of local memory of NVIDIA machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    # Spilled registers are counted under STACK, indexed arrays under LOCAL.
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(code: str) -> tuple[int, int]:
    """Return vector registers and bytes of scratch memory, from the notes in AMD's assembly."""
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", code))
    return int(found["vgpr_count"]), int(found["private_segment_fixed_size"])


def print_table(reports: Sequence[Report]) -> None:
    """Print one line for each compiled kernel, the columns as wide as their widest cell."""
    head = ("target", "case", "kernel", "tile", "regs", "local", "shared KiB", "instructions")
    rows = [
        (
            report.target,
            report.case,
            report.kernel.strip("_").removesuffix("_kernel"),
            report.tile_text(),
            str(report.registers),
            str(report.local_bytes),
            f"{report.shared_bytes / 1024:.0f} of {report.shared_limit // 1024}",
            report.instruction_text(),
        )
        for report in reports
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _chosen(names: str) -> list[Target]:
    known = {target.name: target for target in TARGETS}
    wanted = names.split(",")
    if unknown := sorted(set(wanted) - set(known)):
        raise argparse.ArgumentTypeError(f"unknown targets {unknown}; there are {list(known)}")
    return [known[name] for name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table and the problems; return the exit status."""
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs that are not here.")
    parser.add_argument("--targets", type=_chosen, default=TARGETS, help="sm_90,gfx942,...")
    parser.add_argument("--quick", action="store_true", help="one default case for each target")
    parser.add_argument("--tuned", type=Path, default=tile_config.TUNED, help="folder of tables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets side by side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there too")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: interpreted functions cannot be compiled; unset it")
    cases = [
        [
            *(quick_cases(target) if options.quick else default_cases()),
            *tuned_cases(options.tuned, target),
        ]
        for target in options.targets
    ]
    if options.jobs == 1:
        found = list(map(compile_cases, options.targets, cases))
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(compile_cases, options.targets, cases))
    reports = [report for of_target, _ in found for report in of_target]
    problems = [problem for _, of_target in found for problem in of_target]
    print_table(reports)
    if options.json:
        rows = [{**asdict(report), "problems": report.problems()} for report in reports]
        options.json.write_text(json.dumps({"reports": rows, "problems": problems}, indent=1))
    print(f"\n{len(reports)} kernels, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
