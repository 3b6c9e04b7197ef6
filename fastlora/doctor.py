"""What ``fastlora doctor`` prints: packages, devices, tuned tables, plans, and what to do.

What is examined may be broken, torch and fastlora's own files included: errors are findings.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import TextWrapper
from typing import Any, Literal

from fastlora import __version__

_import_error: Exception | None = None
try:
    import torch

    from fastlora import plans
    from fastlora.bench import environment, shapes
    from fastlora.kernels import tile_config
except (ImportError, OSError) as error:  # OSError: of a library that torch links to
    _import_error = error

OURS, OTHER = "fastlora-kernels", "fastlora"  # two distributions with one import name
PACKAGE = Path(__file__).resolve().parent  # of a checkout that a link on the path leads to
BESIDE = {"accelerate": "", "trl": "", "liger-kernel": "works beside fastlora"}
WITHOUT_GEMM = "3.5.1"  # the Triton that does not compile it; a device's check finds that too
ANOTHER_TRITON = "pip install --upgrade torch  # each torch brings its own Triton"
LEGEND = {
    "fused": "one Triton GEMM with the low-rank term inside",
    "hybrid": "Triton writes the low-rank term, cuBLAS adds the frozen product to it",
    "plain": "PyTorch",
    "thin products": "dropout, x A^T, and the gradients of A and B",
    "by rule": "not measured for this shape: what is safe on any device",
    "few rows": "most of a Triton tile would be padding: left to cuBLAS",
}

_Asked = tuple[Sequence[int], int, "torch.dtype", bool]  # tokens, rank, dtype, dropout is on


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at and what mends it; of no kind is a line that only informs."""

    kind: Literal["ok", "advice", "broken", ""]
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that was found, by title; as a string, what the command prints."""

    sections: Mapping[str, Sequence[Finding]]

    @property
    def findings(self) -> list[Finding]:
        """The findings of all sections, those that are broken first."""
        found = [finding for section in self.sections.values() for finding in section]
        return sorted(found, key=lambda finding: finding.kind != "broken")

    @property
    def broken(self) -> bool:
        """Whether anything does not work as it should: the command's exit status is then 1."""
        return any(finding.kind == "broken" for finding in self.findings)

    def __str__(self) -> str:
        lines, wrap = [], TextWrapper(90, break_long_words=False, break_on_hyphens=False).wrap
        for title, findings in self.sections.items():
            lines.append(title)
            for finding in findings:
                lines.append(f"  {finding.kind:6}  " + f"\n{'':10}".join(wrap(finding.what)))
        remedies = dict.fromkeys(finding.remedy for finding in self.findings if finding.remedy)
        lines.append("what to do" if remedies else "no problems found")
        return "\n".join(lines + [f"  {i}. {remedy}" for i, remedy in enumerate(remedies, start=1)])


def examine(
    model: str | None, tokens: Sequence[int], rank: int, dtype: str | torch.dtype, dropout_p: float
) -> Report:
    """Examine packages, devices and tuned tables, and look up the plans of a model.

    The kernels are checked on every CUDA device, and compiled for it where they never were.

    Args:
        model: its name on the hub, or its folder; without one no plans are looked up.
        tokens: rows of the batches whose plans are wanted.
        rank: of the adapters.
        dtype: of the frozen weights, or its name.
        dropout_p: of the adapters.

    Raises:
        ValueError: the model's decoder layers do not have the linears of Qwen and Llama.
        OSError: transformers finds no configuration of that name.
    """
    sections: dict[str, Sequence[Finding]] = {"packages": list(_packages())}
    if _import_error is not None:
        return Report(sections)
    shape = shapes.find(model) if model and _installed("transformers") else None
    name = str(dtype).removeprefix("torch.")
    sizes = " ".join(str(m) for m in tokens if m >= plans.MIN_ROWS)  # others are not tuned
    tune = f"fastlora tune --model {shlex.quote(model or 'NAME_OR_FOLDER')} --rank {rank} "
    tune += f"--dtype {name} --dropout {dropout_p}" + (f" --tokens {sizes}" if sizes else "")
    machine = list(_variables())
    forced = "auto" if Report({"": machine}).broken else plans.requested()
    kinds: dict[str, torch.device] = {}
    with warnings.catch_warnings(), plans.backend(forced):
        warnings.simplefilter("ignore")  # what a device or a table would warn of is a finding
        sections["machine"] = [*machine, *_devices(kinds)]
        sections["tuned tables"] = list(_tables(kinds, tune))
        sections["serving"] = list(_serving())
        if shape is not None:
            title = f"plans of {model}, {name}, rank {rank}, dropout {dropout_p}, on "
            asked = (tokens, rank, getattr(torch, name), dropout_p > 0)
            on = {kind: _followed(shape, device, asked, tune) for kind, device in kinds.items()}
            on = on or {"an NVIDIA H200": _of_an_h200(shape, asked)}
            sections |= {title + kind: findings for kind, findings in on.items()}
    return Report(sections)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _reinstall() -> str:
    """Return the command that installs fastlora again from where it came from."""
    if (PACKAGE.parent / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(str(PACKAGE.parent))}"
    origin = _installed(OURS) and importlib.metadata.distribution(OURS).read_text("direct_url.json")
    where = json.loads(origin or "{}").get("url", OURS)
    return f"pip install --force-reinstall --no-deps {shlex.quote(where)}"


def _packages() -> Iterator[Finding]:
    if other := _installed(OTHER):
        remedy = f"pip uninstall -y {OTHER} {OURS} && {_reinstall()}"
        yield Finding("broken", f"{OTHER} {other}, another project, is installed too", remedy)
    if not (PACKAGE / "kernels" / "tile_config.py").is_file():
        yield Finding("broken", f"{PACKAGE / 'kernels'} is missing", _reinstall())
    elif _import_error is not None and _installed("torch"):
        yield Finding("broken", _line(_import_error), "pip install --force-reinstall torch")
    try:
        python, needs = declared()
        from packaging.requirements import Requirement
    except ImportError as error:  # of packaging, which peft brings, or nothing is declared
        yield Finding("broken", _line(error), f"{_reinstall()} packaging")
        return
    version = _installed(OURS)
    where = f"in {PACKAGE}" if version else f"in {PACKAGE}, which is on the path, not installed"
    yield Finding("ok", f"{'fastlora':13} {version or __version__:12} {where}")
    yield _compared(Requirement(f"python{python}"), platform.python_version())
    for need in map(Requirement, needs):
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield _compared(need, _installed(need.name))
    for name, note in BESIDE.items():
        if version := _installed(name):
            yield Finding("ok", f"{name:13} {version:12} {note}".rstrip())


def declared() -> tuple[str, Sequence[str]]:
    """Return the range of Pythons and the requirements: of the distribution, or of a checkout.

    Raises:
        PackageNotFoundError: fastlora is not installed, and this is no checkout (or Python 3.10,
            which reads no ``pyproject.toml``).
    """
    try:
        python = importlib.metadata.metadata(OURS)["Requires-Python"]
        return python, importlib.metadata.requires(OURS) or ()
    except importlib.metadata.PackageNotFoundError:
        project = PACKAGE.parent / "pyproject.toml"
        if sys.version_info < (3, 11) or not project.is_file():
            raise
        import tomllib

        found = tomllib.loads(project.read_text()).get("project", {})
        if found.get("name") != OURS:  # of a project that has a copy of ours
            raise
        return found["requires-python"], found["dependencies"]


def _compared(need: Any, version: str) -> Finding:
    row = f"{need.name:13} {version or 'missing':12} needs {need.specifier}"
    if not version or not need.specifier.contains(version, prereleases=True):
        command = "in an environment of" if need.name == "python" else "pip install"
        return Finding("broken", row, f'{command} "{need.name}{need.specifier}"')
    if need.name == "triton" and version == WITHOUT_GEMM:
        return Finding("advice", f"{row}; does not compile the GEMM: never fused", ANOTHER_TRITON)
    if need.name == "torch" and _import_error is None:
        row += f"; its CUDA: {torch.version.cuda or torch.version.hip or 'none'}"
    return Finding("ok", row)


def _variables() -> Iterator[Finding]:
    try:
        if (forced := plans.requested()) != "auto":
            what = f"{plans.ENVIRONMENT}: every plan is {forced} where possible, measured or not"
            yield Finding("advice", what, f"unset {plans.ENVIRONMENT}")
    except ValueError as error:
        yield Finding("broken", str(error), f"unset {plans.ENVIRONMENT}")
    if plans.interpreting():
        what = "TRITON_INTERPRET: kernels are interpreted, a thousand times slower than PyTorch"
        yield Finding("advice", what, "unset TRITON_INTERPRET")


def _devices(kinds: dict[str, torch.device]) -> Iterator[Finding]:
    """Yield what is found of the CUDA devices, and note one of each kind that runs kernels."""
    if driver := environment.driver_version():
        yield Finding("ok", f"driver {driver}")
    if torch.cuda.is_available():
        for device in [torch.device("cuda", index) for index in range(torch.cuda.device_count())]:
            try:
                yield _device(device)
                limit = plans.possible_plan("shrink", device, torch.float16, 1, tf32=False)
                if limit != plans.PLAIN:
                    kinds.setdefault(tile_config.device_limits(device).name, device)
            except Exception as error:
                remedy = "nvidia-smi  # and CUDA_VISIBLE_DEVICES leaves a device out"
                yield Finding("broken", f"{device}: {_line(error)}", remedy)
    elif not driver:
        what = "no CUDA device: plain PyTorch; an H200's plans: the counts of `fastlora bench`"
        yield Finding("ok", what)
    elif not torch.version.cuda:
        remedy = "pip uninstall -y torch triton && pip install torch"
        yield Finding("broken", "a driver is here, and torch was built without CUDA", remedy)
    else:
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        remedy = "unset CUDA_VISIBLE_DEVICES" if hidden else "nvidia-smi  # update an old driver"
        yield Finding("advice" if hidden else "broken", "torch finds no CUDA device", remedy)


def _serving() -> Iterator[Finding]:
    if not _installed("transformers"):
        return
    try:
        from fastlora.serving.batching import TESTED, unsupported_reason

        reason = unsupported_reason()
    except ImportError as error:
        reason = _line(error)
    if reason is None:
        yield Finding("ok", f"Engine: continuous batching of transformers {TESTED}")
    else:
        what = f"Engine: {reason}: generate() only, without continuous batching"
        yield Finding("advice", what, f'pip install "transformers=={TESTED}.*"')
    if torch.cuda.is_available():
        own = "its own paged attention: flash-attn is not installed"
        yield Finding("ok", f"attention: {'flash-attn' if _installed('flash-attn') else own}")


def _device(device: torch.device) -> Finding:
    of = torch.cuda.get_device_properties(device)
    reason = plans.unsupported_reason(device)
    failed = {} if reason else plans.check_device(device)
    what = f"{device}, {of.name}, sm_{of.major}{of.minor}, {of.total_memory / 2**30:.0f} GiB: "
    what += plans.describe(device).partition(": ")[2]
    if any("out of memory" in why for why in failed.values()):
        return Finding("advice", what, "nvidia-smi  # who holds the memory; then: fastlora doctor")
    known = set(failed) == {"low_rank_gemm"} and _installed("triton") == WITHOUT_GEMM
    if failed:
        return Finding("advice" if known else "broken", what, ANOTHER_TRITON)
    if reason:
        return Finding("advice", what, "use another GPU; nothing mends this one")
    return Finding("ok", what)


def _tables(kinds: Mapping[str, torch.device], tune: str) -> Iterator[Finding]:
    if not kinds:
        names = ", ".join(path.name for path in sorted(tile_config.TUNED.glob("*.json")))
        yield Finding("ok", f"with fastlora: {names or 'none'}")
    for name, device in kinds.items():
        file, command = f"{tile_config.device_slug(name)}.json", f"{tune} --device {device}"
        yield _table("with fastlora", tile_config.TUNED / file)
        yield _table("yours", tile_config.user_cache() / file, command)
        if not tile_config.tuned_entries(name):
            yield Finding("advice", f"nothing was measured on {name}: plans are by rule", command)


def _table(whose: str, path: Path, command: str = "") -> Finding:
    if not path.exists():
        return Finding("ok", f"{whose}: none ({path})")
    try:
        entries, triton = tile_config.read_table(path), tile_config.measured_with(path)
    except ValueError as error:
        return Finding("broken", str(error), f"rm {shlex.quote(str(path))}")
    what = f"{whose}: {len(entries)} entries, measured with Triton {triton} ({path})"
    if command and triton not in (None, tile_config.installed_triton()):
        return Finding("advice", f"{what}: ignored, another Triton is installed", command)
    return Finding("ok", what)


def _of_an_h200(shape: shapes.Model, asked: _Asked) -> list[Finding]:
    try:
        from fastlora.bench.counting import h200

        with h200(), plans.backend("auto"):  # what is forced here says nothing of that machine
            found = _followed(shape, torch.device("cuda"), asked)
        return [Finding("", "by the table that comes with fastlora; plain PyTorch here"), *found]
    except (ImportError, ValueError) as error:  # no Triton, or a table that cannot be read
        return [Finding("", f"not known: {_line(error)}")]


def _followed(
    shape: shapes.Model, device: torch.device, asked: _Asked, tune: str = ""
) -> list[Finding]:
    """Look up what every group of a decoder layer follows, and whether that was measured."""
    (tokens, rank, dtype, masked), forced = asked, plans.requested() != "auto"
    entries = tile_config.tuned_entries(tile_config.device_limits(device).name)
    lines = [f"{'tokens':>6}  {'linears':8} {'forward':17} {'backward':17} thin products"]
    sources = []
    for m, names in itertools.product(tokens, shapes.GROUPS):
        n, siblings = sum(shape.linears[name].n for name in names), len(names)
        sizes = (dtype, m, n, shape.linears[names[0]].k, rank)
        line = f"{m:6}  {'/'.join(name.removesuffix('_proj') for name in names):8}"
        for operation in ("low_rank_gemm", "input_grad"):
            plan = plans.plan_for(operation, device, *sizes, masked=masked, siblings=siblings)
            entry = entries.get(tile_config.tile_key(operation, *sizes, siblings), {})
            found = "measured" if entry.get("plan") == plan else "by rule"
            sources.append("forced" if forced else found if m >= plans.MIN_ROWS else "few rows")
            line += f" {f'{plan}, {sources[-1]}':17}"
        thin = plans.plan_for("shrink", device, *sizes, masked=masked, siblings=siblings)
        lines.append(f"{line} {'PyTorch' if thin == plans.PLAIN else 'Triton'}")
    lines += [f"{word:14}{LEGEND[word]}" for word in LEGEND if word in " ".join(lines)]
    findings = [Finding("", line) for line in lines]
    possible = plans.possible_plan("low_rank_gemm", device, dtype, rank, tf32=False)
    if tune and "by rule" in sources and possible == plans.FUSED:
        what = f"{sources.count('by rule')} of {len(sources)} plans were not measured"
        findings.append(Finding("advice", what, f"{tune} --device {device}"))
    return findings
