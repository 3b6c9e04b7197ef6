"""The structure that the design promises: imports in one direction, one stem in five places."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastlora"

# Each module may import those that stand before it, and none that stand after.
ORDER = [
    "dropout",
    "reference",
    "plain",
    "segments",
    "segmented",
    "plans",
    "ops",
    "segmented_ops",
    "prepared",
    "autograd",
    "functional",
    "dora",
    "rules",
    "discovery",
    "mixed",
    "layers",
    "siblings",
    "patching",
    "callback",
    "timing",
    "tuning",
    "adapters",
    "serving",
    "bench",
    "doctor",
    "cli",
    "__main__",
]
# The same inside each folder.
INSIDE = {
    "bench": [
        "arguments",
        "accuracy",
        "shapes",
        "results",
        "summary",
        "providers",
        "checking",
        "counting",
        "environment",
        "measuring",
        "modules",
        "operations",
        "steps",
        "planning",
        "session",
        "report",
        "command",
    ],
    "adapters": [
        *("errors", "adapter", "config", "weights", "checks", "live", "files", "pages", "groups"),
        *("table", "versions", "reading", "pool"),
    ],
    "serving": [
        *("penalties", "sampling", "attention", "linears", "stops", "requests", "manager"),
        *("batching", "loading", "prompts", "options", "rows", "engine", "chat"),
    ],
}
FOLDERS = sorted((folder, module) for folder, modules in INSIDE.items() for module in modules)


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names |= {prefix} | {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_place_in_the_order():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules | set(INSIDE) == set(ORDER)
    for folder, inside in INSIDE.items():
        found = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
        assert found == set(inside), folder


def paths_of(module):
    """Return the files of a module, or of a folder."""
    folder = PACKAGE / module
    return sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module):
    later = tuple(f"fastlora.{name}" for name in ORDER[ORDER.index(module) :])
    for path in paths_of(module):
        for name in imported_modules(path):
            inside = module in INSIDE and name.startswith(f"fastlora.{module}")
            assert inside or not (name in later or name.startswith(tuple(f"{n}." for n in later)))


@pytest.mark.parametrize(("folder", "module"), FOLDERS)
def test_imports_inside_a_folder_go_one_way(folder, module):
    modules = INSIDE[folder]
    later = {f"fastlora.{folder}.{name}" for name in modules[modules.index(module) :]}
    assert not imported_modules(PACKAGE / folder / f"{module}.py") & later


OPERATION = ORDER[: ORDER.index("functional") + 1]


@pytest.mark.parametrize("module", OPERATION)
def test_the_operation_knows_neither_peft_nor_transformers(module):
    names = {name.split(".")[0] for name in imported_modules(PACKAGE / f"{module}.py")}
    assert not names & {"peft", "transformers"}


def test_kernels_import_only_torch_triton_the_standard_library_and_each_other():
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imported_modules(path):
            package = name.split(".")[0]
            own = name.startswith(".") or package in ("torch", "triton")
            allowed = own or package in sys.stdlib_module_names
            assert allowed, f"{path.name} imports {name}"


# Kernels that are two halves of one operator; and of a frozen product that goes with one: with its
# second half inside, or beside its first.
STEMS = {
    "output_pass": "adapter_grads",
    "input_pass": "adapter_grads",
    "segmented_shrink": "segmented_add",
    "segmented_expand": "segmented_add",
    "segmented_gemm": "segmented_add",
    "decode_gemm": "segmented_add",
}


# Called by transformers, as an attention, and so no operator: what defines it, and where its tests
# are.
NO_OPERATOR = {"paged_attention": ("serving/attention.py", "test_kernels_paged_attention.py")}


def test_every_kernel_has_its_five_places():
    for path in (ROOT / "kernels").glob("*.py"):
        stem, source = path.stem, path.read_text(encoding="utf-8")
        if f"def _{stem}_kernel" not in source:
            continue
        stem = STEMS.get(stem, stem)
        assert (ROOT / f"benchmarks/bench_{stem}.py").exists()
        if stem in NO_OPERATOR:
            definition, tests = NO_OPERATOR[stem]
            assert f"def plain_{stem}(" in (PACKAGE / definition).read_text(encoding="utf-8")
            assert (ROOT / "tests" / tests).exists()
            continue
        operators = "segmented_ops" if stem.startswith("segmented_") else "ops"
        for module in ("reference", operators):
            names = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
            assert f"def {stem}(" in names or f"{stem} = " in names, f"{module}.{stem} is missing"
        assert (ROOT / f"tests/test_{stem}.py").exists()


def test_no_test_or_example_names_a_device_of_its_own():
    for folder in ("tests", "examples"):
        for path in (ROOT / folder).glob("*.py"):
            source = path.read_text(encoding="utf-8")
            assert 'device="cuda' + '"' not in source, (
                f"{path.name}: take the device as a parameter"
            )
