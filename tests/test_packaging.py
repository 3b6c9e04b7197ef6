"""What a checkout and an installation must be: the link, the lazy import, the README's tree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import fastlora

ROOT = Path(__file__).parent.parent


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    output = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [name for name in output.splitlines() if (ROOT / name).exists()]


def test_kernels_is_a_link_and_no_package_of_its_own():
    # With an __init__.py, transformers would import our folder as Hugging Face's `kernels`.
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "fastlora/kernels").is_symlink()
    assert (ROOT / "fastlora/kernels").resolve() == ROOT / "kernels"


def test_import_is_lazy():
    script = "import sys, json, fastlora; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    loaded = {name.split(".")[0] for name in json.loads(output)}
    assert not loaded & {"torch", "transformers", "peft", "triton"}


def test_lora_linear_alone_does_not_import_transformers():
    script = "import sys; from fastlora import lora_linear; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd="/", check=False).returncode == 0


def test_every_public_name_can_be_imported():
    for name in fastlora.__all__:
        assert getattr(fastlora, name) is not None
    assert set(dir(fastlora)) == set(fastlora.__all__)
    assert not hasattr(fastlora, "no_such_name")


def test_every_public_name_is_documented():
    for name in fastlora.__all__:
        if name != "__version__":
            assert getattr(fastlora, name).__doc__, f"{name} has no docstring"


def test_every_dependency_of_the_environment_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = set()
    for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
        wanted |= {re.match(r"[\w-]+", line)[0].lower() for line in requirements}
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert wanted <= {name.lower().replace("_", "-") for name in pinned}


def test_readme_tree_names_every_file():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1]
    tree = tree.split("```")[1]
    for name in tracked_files():
        path = Path(name)
        if path.parts[0].startswith(".") or path.name == "py.typed":
            continue
        assert re.search(rf"(^|\s){re.escape(path.name)}\b", tree), f"{name} is not in the tree"


def test_readme_tree_names_no_file_that_is_gone():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1]
    existing = {part for name in tracked_files() for part in Path(name).parts}
    for name in re.findall(
        r"^\s*([\w.-]+\.(?:py|toml|md|txt|jsonl))\b", tree.split("```")[1], re.M
    ):
        assert name in existing, f"the tree names {name}"
