"""Read a peft adapter from a folder, the hub or a live model, and check all of it.

An adapter may come from anybody. So nothing of it is run (no pickle, no code, and no path or name
that stands in its config is followed), sizes are checked before anything is allocated, and what is
not ``scaling * (x A^T) B^T`` is refused with the reason, never ignored.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path

from torch import nn

from fastlora.adapters.adapter import Adapter, check_name
from fastlora.adapters.checks import (
    OwnWeight,
    base_weights,
    check_base_weights,
    check_tensors,
    factors_of,
    fingerprint_of,
)
from fastlora.adapters.config import read_config, settings_of
from fastlora.adapters.errors import AdapterError, Refusal, about, shown
from fastlora.adapters.live import read_live
from fastlora.adapters.weights import read_data, read_header, view_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 256

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def read_adapter(
    name: str,
    source: str | os.PathLike[str] | nn.Module,
    linears: Mapping[str, tuple[int, int]],
    *,
    max_rank: int = MAX_RANK,
    own_weight: OwnWeight = lambda name: None,
) -> Adapter:
    """Read an adapter and check that it fits the base model.

    Args:
        name: what requests will call it.
        source: a folder as peft saves it; ``"org/name"`` or ``"org/name@revision"`` on the hub, if
            there is no such folder (what looks like a path is never looked for there: with a
            backslash, or beginning with ``/``, ``./``, ``../`` or ``~``); or a live model of
            peft's, or of transformers' with peft adapters, of which the adapter called ``name`` is
            read, or the only one. Its tensors are copied, and its scalings are what the layers use
            now.
        linears: ``(N, K)``, out and in features, by the path of every linear of the base model that
            an adapter may target.
        max_rank: the largest rank that is accepted.
        own_weight: returns a parameter of the base model by its name, ``None`` if there is none.
            Files may have weights of the base model in them (peft adds those of a targeted
            ``lm_head``), and are accepted if these are the model's own.

    Returns:
        The adapter. Linears that it lacks are not among its factors.

    Raises:
        AdapterError: it is missing, damaged, for another model, or more than plain LoRA; the
            message has the file, the tensor or field, and both values.
    """
    check_name(name)
    try:
        if isinstance(source, nn.Module):
            return read_live(name, source, linears, max_rank)
        if isinstance(source, (str, os.PathLike)):
            return _read_folder(name, source, linears, max_rank, own_weight)
        raise Refusal(f"a folder, a hub id or a peft model is needed, not {shown(source)}")
    except Refusal as refusal:
        raise AdapterError(f"{name}: {refusal.where}{refusal}") from refusal.__cause__


def _read_folder(
    name: str,
    source: str | os.PathLike[str],
    linears: Mapping[str, tuple[int, int]],
    max_rank: int,
    own_weight: OwnWeight,
) -> Adapter:
    text = os.fspath(source)
    try:
        folder = _folder_of(text, maybe_hub=isinstance(source, str)).absolute()
        with _opened(folder, CONFIG) as config_file, _opened(folder, WEIGHTS) as weights_file:
            files = (config_file, weights_file)
            before = [_stamp(file) for file in files]
            with about(CONFIG):
                settings = settings_of(read_config(config_file), CONFIG)
            with about(WEIGHTS):
                entries = read_header(weights_file, len(linears))
                own = base_weights(entries, own_weight)
                others = {key: entry for key, entry in entries.items() if key not in own}
                fits = check_tensors(others, settings, linears, max_rank)
                data = read_data(weights_file, max(entry.end for entry in entries.values()))
                check_base_weights(own, lambda key: view_of(data, entries[key]))
                factors = factors_of(fits, lambda key: view_of(data, entries[key]))
            if [_stamp(file) for file in files] != before:
                raise Refusal(f"{shown(str(folder))} was written to while it was read")
    except OSError as error:
        where = shown(error.filename or text)
        raise Refusal(f"{where}: {error.strerror or type(error).__name__}") from error
    printable = text if text.isprintable() else ascii(text)
    return Adapter(name, printable, factors, fingerprint_of(factors), folder)


def _stamp(file: BufferedReader) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _folder_of(text: str, *, maybe_hub: bool) -> Path:
    """Return the local folder that is meant, downloaded from the hub if it has to be."""
    if not isinstance(text, str) or not text or any(ord(character) < 32 for character in text):
        raise Refusal(f"{shown(text)} is neither a folder nor a hub id")
    maybe_hub &= not (text.startswith(("/", "./", "../", "~")) or "\\" in text)
    folder = Path(os.path.expanduser(text) if text.startswith("~") else text)
    if folder.is_dir():
        return folder
    here = shown(str(folder.absolute()))
    if folder.exists():
        raise Refusal(f"{here} is a file; the folder with {CONFIG} and {WEIGHTS} is needed")
    hub_id = _HUB_ID.fullmatch(text) if maybe_hub and ".." not in text else None
    if hub_id is None:
        also = ', and this is no hub id either ("org/name")' if maybe_hub else ""
        raise Refusal(f"there is no folder {here}{also}")
    return _downloaded(hub_id["repo"], hub_id["revision"], here)


def _downloaded(repo: str, revision: str | None, here: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    # Said once more: version 1.33 asks the hub for a commit's files before it looks in its cache.
    offline = bool(constants.HF_HUB_OFFLINE)
    wanted = [CONFIG, WEIGHTS]
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=wanted, local_files_only=offline
            )
        )
    except Exception as error:  # the hub's own errors, and whatever its HTTP library raises
        at = "" if revision is None else f" at revision {revision}"
        place = "in the hub's cache (HF_HUB_OFFLINE is set)" if offline else "on the hub"
        said = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
        raise Refusal(
            f"there is no folder {here}, and {repo}{at} was not found {place}: "
            f"{type(error).__name__}: {said}"
        ) from error


@contextlib.contextmanager
def _opened(folder: Path, name: str) -> Iterator[BufferedReader]:
    """Open a file of an adapter; a link may lead only to where the hub's cache keeps its files."""
    try:
        path = (folder / name).resolve(strict=True)
    except FileNotFoundError as error:
        raise Refusal(_missing(folder, name)) from error
    except RuntimeError as error:  # a loop of links, before Python 3.13
        raise Refusal(f"{name}: {error}") from error
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(path.is_relative_to(each) for each in homes):
        raise Refusal(f"{name} is a link to {shown(str(path))}, outside of its folder")
    # Without these a pipe is waited for, and a link that was put there since is followed.
    more = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | more)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Refusal(f"{name} is not a regular file")
        yield file


def _missing(folder: Path, name: str) -> str:
    said = f"{shown(str(folder))} has no {name}"
    names = sorted(os.listdir(folder))
    pickles = [each for each in names if each.startswith("adapter") and each.endswith(_PICKLES)]
    if name == WEIGHTS and pickles:
        return (
            f"{said}, only {', '.join(map(shown, pickles[:3]))}: that is a pickle, and whatever "
            "code is in one runs when it is read. Where you trust it, convert it: "
            "PeftModel.from_pretrained(base_model, folder).save_pretrained(folder)"
        )
    if name == WEIGHTS and folder.parent.name == "snapshots":  # of the hub, only this was asked for
        return f"{said}; an adapter_model.bin on the hub is a pickle, and is not read"
    # save_pretrained gives every adapter but the one called "default" a folder of its own.
    inner = [each for each in names if (folder / each / CONFIG).is_file()]
    if name == CONFIG and inner:
        return f"{said}; perhaps a folder in it is meant: {', '.join(map(shown, inner[:3]))}"
    return said
