"""The GPUs that kernels are compiled for, and what is read off the machine code for them.

That is registers, spills, shared memory and instructions. A kernel is unfit for its target if it
spills, outgrows the shared or tensor memory, adds by atomics (in no fixed order), or lacks an
instruction that its design counts on.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from kernel_calls import TERMS, Case
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fastlora.kernels.tile_config import DeviceLimits

GEMM_KERNEL = "_low_rank_gemm_kernel"
DECODE_KERNEL = "_decode_gemm_kernel"
GEMM_KERNELS = (GEMM_KERNEL, "_segmented_gemm_kernel", DECODE_KERNEL)
TENSOR_MEMORY_COLUMNS = 512  # of one sm_100 multiprocessor
# A kernel at half of its 255 registers that spills a little is ptxas's choice, to let more programs
# run at once: with `.maxnreg 255` two shrinks of siblings take 130 registers for 80, and spill
# nothing (sm_100). They are bound by memory, where programs count for more than two words.
TRADED_REGISTERS, TRADED_BYTES = 128, 16

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


class Compiled(NamedTuple):
    """A kernel that was compiled: its name, what Triton made of it, its constants and options."""

    kernel: str
    code: Any
    options: Mapping[str, Any]


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


def report_of(target: Target, case: str, compiled: Compiled, expected: tuple[str, ...]) -> Report:
    """Read what a kernel turned out to be.

    Args:
        target: it was compiled for.
        case: its name.
        compiled: the kernel.
        expected: the instructions that it must have.
    """
    code, metadata = compiled.code, compiled.code.metadata
    text = code.asm["ptx" if target.is_nvidia else "amdgcn"]
    registers, local_bytes = _usage(code.asm["cubin"]) if target.is_nvidia else _amd_usage(text)
    return Report(
        target=target.name,
        case=case,
        kernel=compiled.kernel,
        tile={
            name: value
            for name, value in compiled.options.items()
            if name.startswith(("BLOCK", "PARTS", "GROUP", "num_"))
        },
        registers=registers,
        local_bytes=local_bytes,
        shared_bytes=metadata.shared,
        shared_limit=target.shared_bytes,
        tensor_columns=getattr(metadata, "tmem_size", None) or 0,
        instructions={name: len(re.findall(words, text)) for name, words in INSTRUCTIONS.items()},
        expected=expected,
        judge_local=target.is_nvidia,
    )


def expected_instructions(
    target: Target, case: Case, operation: str, kernel: str
) -> tuple[str, ...]:
    """Return what the design of a kernel counts on: of a GEMM in half precision, and no other."""
    # Without a frozen product there is no pipeline.
    if kernel not in GEMM_KERNELS or case.dtype == torch.float32 or operation in TERMS:
        return ()
    copies = target.copies_by if case.aligned else ()
    if kernel == DECODE_KERNEL:  # its outputs are small, and transposed
        copies = tuple(name for name in copies if name != "TMA store")
    return (target.multiplies_by, *copies)


def launcher_refuses(code: Any) -> str | None:
    """Return why Triton could not launch what it compiled for NVIDIA, or ``None``.

    It finds out at the first launch alone: a descriptor inside a tuple argument compiles.
    """
    signature = code.src.signature
    descriptors = getattr(code.metadata, "tensordesc_meta", None)
    try:
        if hasattr(nvidia, "expand_signature"):  # Triton 3.7
            nvidia.expand_signature(signature.values(), descriptors)
            nvidia.wrap_handle_tensordesc(lambda *_: None, signature, descriptors)
        else:
            nvidia.make_launcher({}, signature, descriptors)
    except Exception as error:  # whatever stops the launcher is the finding
        return f"its launcher cannot be built: {error!r}"
    return None


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of local memory of NVIDIA machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
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
