"""Engines that read and write text, with adapters that a judge knows; and how to wait for them.

Of the fixtures, a file names those that it uses among its own, where pytest looks for them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving_models import PATIENCE, Judge, bytes_tokenizer, engine_of, prompts_of, served_model

from fastlora.adapters.pool import AdapterPool
from fastlora.serving.engine import Engine

TOKENIZER = bytes_tokenizer()
WORDS = {"vocab_size": 264}
LONG = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 400}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("adapters"), **WORDS)


@pytest.fixture(scope="module")
def running(judge: Judge) -> Iterator[Engine]:
    """What ``shared`` hands out."""
    with make(judge) as engine:
        yield engine


@pytest.fixture
def shared(running: Engine) -> Iterator[Engine]:
    """An engine for tests that leave it as it is: with no open request, and no lease."""
    yield running
    assert until(lambda: len(running._requests) == 0)
    assert all(info.requests == 0 for info in running.adapters.list())


def make(
    judge: Judge | None = None, *names: str, attention: str = "sdpa", **options: Any
) -> Engine:
    """Return an engine with some of the judge's adapters, or all."""
    folders = {} if judge is None else judge.folders
    folders = {name: folders[name] for name in names or folders}
    options = {"memory": "1MB", "num_blocks": 128, **options}
    engine = engine_of(served_model(attention=attention, **WORDS), folders, **options)
    engine.tokenizer = TOKENIZER
    return engine


def make_pool(judge: Judge, *names: str) -> AdapterPool:
    """Return a pool with some of the judge's adapters, or all."""
    pool = AdapterPool(served_model(**WORDS), memory="1MB")
    for name in names or judge.folders:
        pool.load(name, judge.folders[name])
    return pool


def one_at_a_time(judge: Judge, *names: str, **options: Any) -> Engine:
    """Return an engine whose device holds only the largest of some adapters."""
    sizes = [info.bytes for info in make_pool(judge, *names).list()]
    return make(judge, *names, memory=max(sizes), **options)


def until(holds: Any) -> bool:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(holds())


def own_threads() -> list[str]:
    """Return the names of the threads that are fastlora's."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastlora")]


def prompt_of(length: int, seed: int = 7) -> list[int]:
    """Return a prompt of bytes."""
    return prompts_of(length, seed=seed, vocabulary=256)[0]
