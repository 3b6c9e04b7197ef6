"""Where adapters are: folders, links and the hub; what is not there says so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import saved_adapters
from saved_adapters import LINEARS, refusal

from fastlora.adapters.files import CONFIG, WEIGHTS, read_adapter

saved = saved_adapters.saved
folder = saved_adapters.folder


# Folders and links.


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert refusal(folder) == f"{str(folder)!r} has no {WEIGHTS}"
    assert refusal(tmp_path) == (
        f"{str(tmp_path)!r} has no {CONFIG}; perhaps a folder in it is meant: 'adapter'"
    )
    (folder / CONFIG).unlink()
    assert refusal(folder) == f"{str(folder)!r} has no {CONFIG}"


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl"])
def test_pickles_are_refused_without_a_look(
    suffix: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / WEIGHTS).rename(folder / f"adapter_model.{suffix}")
    message = refusal(folder)
    assert f"only 'adapter_model.{suffix}': that is a pickle" in message
    assert "save_pretrained" in message


def test_snapshots_with_a_pickle_on_the_hub_say_so(saved: Path, tmp_path: Path) -> None:
    _, snapshot = hub_cache(tmp_path, saved)
    (snapshot / WEIGHTS).unlink()
    assert f"has no {WEIGHTS}; an adapter_model.bin on the hub is a pickle" in refusal(snapshot)


def test_hub_snapshots_are_read_through_their_links(saved: Path, tmp_path: Path) -> None:
    _, snapshot = hub_cache(tmp_path, saved)
    adapter = read_adapter("emoji", snapshot, LINEARS)
    assert adapter.fingerprint == read_adapter("emoji", saved, LINEARS).fingerprint


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    ("under", "target"),
    [("adapter", "elsewhere"), ("repo/snapshots/0", "elsewhere"), ("a/b/adapter", "a/blobs")],
)
def test_links_out_of_the_folder_are_refused(
    name: str, under: str, target: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / under)
    (tmp_path / target).mkdir()
    (folder / name).rename(tmp_path / target / "file")
    (folder / name).symlink_to(tmp_path / target / "file")
    assert f"{name} is a link to" in refusal(folder)
    assert "outside of its folder" in refusal(folder)


def test_the_blobs_of_a_snapshot_may_not_be_elsewhere(saved: Path, tmp_path: Path) -> None:
    cache, snapshot = hub_cache(tmp_path, saved)
    (cache / "models--org--name" / "blobs").rename(tmp_path / "elsewhere")
    (cache / "models--org--name" / "blobs").symlink_to(tmp_path / "elsewhere")
    assert "outside of its folder" in refusal(snapshot)


def test_links_within_and_to_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(folder / "v3.safetensors")
    (folder / WEIGHTS).symlink_to("v3.safetensors")
    (tmp_path / "current").symlink_to(folder)
    assert len(read_adapter("emoji", tmp_path / "current", LINEARS).factors) == 14


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
        (lambda path: path.symlink_to(path.name), ""),
        (lambda path: path.symlink_to("nothing"), f"has no {WEIGHTS}"),
    ],
    ids=["directory", "pipe", "loop", "dangling"],
)
def test_what_is_no_file_is_refused(make, expected: str, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    make(folder / WEIGHTS)
    message = refusal(folder)
    assert WEIGHTS in message
    assert expected in message


# Names of sources.

REVISION = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(tmp_path: Path, saved: Path) -> tuple[Path, Path]:
    """Lay an adapter out as the hub's cache does; returns the cache and the snapshot."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / REVISION
    for part in (repo / "blobs", snapshot, repo / "refs"):
        part.mkdir(parents=True)
    for number, name in enumerate((CONFIG, WEIGHTS)):
        shutil.copy(saved / name, repo / "blobs" / f"{number}")
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (repo / "refs" / "main").write_text(REVISION)
    return tmp_path / "hub", snapshot


@pytest.fixture
def offline_hub(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache, snapshot = hub_cache(tmp_path, saved)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


@pytest.mark.parametrize("source", ["org/name", "org/name@main", f"org/name@{REVISION}"])
def test_hub_ids_are_found_in_the_cache(source: str, offline_hub: Path) -> None:
    adapter = read_adapter("emoji", source, LINEARS)
    assert (adapter.source, adapter.folder) == (source, offline_hub)


def test_a_hub_id_that_is_nowhere_says_where_it_was_looked_for(offline_hub: Path) -> None:
    here = str(Path.cwd() / "org/other")
    message = refusal("org/other")
    assert f"there is no folder {here!r}, and org/other was not found in the hub's" in message
    assert "cache (HF_HUB_OFFLINE is set): LocalEntryNotFoundError: Cannot find" in message
    assert "org/name at revision v2 was not found in the hub's cache" in refusal("org/name@v2")


def test_what_the_hub_says_is_passed_on(offline_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repo, **asked):
        assert (repo, asked["revision"], asked["local_files_only"]) == ("org/other", "v2", False)
        assert asked["allow_patterns"] == [CONFIG, WEIGHTS]
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal("org/other@v2")
    assert message.endswith("at revision v2 was not found on the hub: ConnectionError: no route")


def test_a_folder_is_taken_before_the_hub(offline_hub: Path, folder: Path) -> None:
    shutil.copytree(folder, "org/name")
    adapter = read_adapter("emoji", "org/name", LINEARS)
    assert adapter.folder == Path.cwd() / "org/name"


@pytest.mark.parametrize(
    "source",
    [
        *("/org/name", "./org/name", "../name", "~/name", "~org/name", "org\\name", ".\\name"),
        *("name", "a/b/c", "org/../name", "org/name@", "org/name@../main", "org/name@a/../b"),
        *("-org/name", "org/.name", "", "org/na\nme", "org/name\x00", "ürg/name"),
        *("http://org/name", "org/name/", Path("org/other")),
    ],
)
def test_what_is_no_hub_id_is_never_looked_for_there(
    source: str | Path, offline_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **_: asked.append(args))
    message = refusal(source)
    assert not asked
    assert "folder" in message
    assert message.isprintable()


def test_paths_are_not_told_of_the_hub(offline_hub: Path) -> None:
    for source in ("/org/name", "./org/name", "../org/name", "~/org/name", "org\\name"):
        assert "hub id" not in refusal(source)
    assert 'this is no hub id either ("org/name")' in refusal("name")


def test_a_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert read_adapter("emoji", "~/adapter", LINEARS).folder == folder


def test_sources_of_another_kind_are_refused(folder: Path) -> None:
    assert f"is a file; the folder with {CONFIG}" in refusal(folder / CONFIG)
    assert "a folder, a hub id or a peft model is needed, not 3" in refusal(3)
    assert "is neither a folder nor a hub id" in refusal(os.fsdecode(b"a\x00"))
    assert "File name too long" in refusal("x" * 5000)
    assert "there is no folder" in refusal("\ud800")
