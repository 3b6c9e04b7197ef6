"""What a measurement was made with: it stands in every row."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


@functools.cache
def facts(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return the columns that say where, when and with what something was measured.

    Args:
        device: what ran it.
        commit: of fastlora; by default git's, or the version where this is no checkout.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or _commit(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "driver": driver_version() if device.type == "cuda" else "",
        "cpu": _cpu(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "peft", "transformers")},
    }


def version(package: str) -> str:
    """Return the installed version of a package, or ``""``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        # Only in a checkout of fastlora: an installation may lie inside somebody else's.
        if (root / "kernels").is_dir():
            head = _git(root, "rev-parse", "--short", "HEAD")
            # What was measured before does not change what is measured now.
            changed = _git(root, "status", "--porcelain", "-uno", ":/", ":!benchmarks/results")
            return f"{head}-dirty" if changed else head
    except (OSError, subprocess.CalledProcessError):
        pass
    return version("fastlora-kernels") or "unknown"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or ``""`` where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.split("\n")[0].strip()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
